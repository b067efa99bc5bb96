/* internvl upload: files that stay with the daemon, for requests that name them by id. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/command.h"
#include "client/conversation.h"
#include "client/interrupt.h"
#include "client/json_out.h"

/* By the first bytes of the three picture formats that a request takes. */
static int is_picture(const char *bytes, size_t n)
{
    return (n >= 8 && memcmp(bytes, "\x89PNG\r\n\x1a\n", 8) == 0) ||
           (n >= 3 && memcmp(bytes, "\xff\xd8\xff", 3) == 0) ||
           (n >= 12 && memcmp(bytes, "RIFF", 4) == 0 && memcmp(bytes + 8, "WEBP", 4) == 0);
}

static void print_result(const struct command_options *o, const char *path, int is_video,
                         const struct internvl_upload_result *r)
{
    struct json_out j = {.file = stdout};
    if (!o->json) {
        printf("media:%s\n", r->media_id);
        return;
    }
    json_object_begin(&j, NULL);
    json_string(&j, "file", path);
    json_string(&j, "media_id", r->media_id);
    json_string(&j, "kind", is_video ? "video" : "image");
    json_uint(&j, "n_bytes", r->n_bytes);
    json_uint(&j, "ttl_seconds", r->ttl_seconds);
    json_object_end(&j);
    json_end_line(&j);
}

int command_upload(struct internvl_client *c, const struct command_options *o)
{
    if (o->n_arguments < 1)
        return command_usage(o, "at least one file is needed");
    struct internvl_call_options call = command_call_options(o);
    struct internvl_error err = {0};
    int status = EXIT_OK;
    interrupt_set_busy(1);
    for (size_t i = 0; i < o->n_arguments && status == EXIT_OK; i++) {
        struct internvl_upload upload = {0};
        struct internvl_upload_result result;
        char *bytes = read_file(o->arguments[i], &upload.n_bytes, &err);
        upload.data = bytes;
        upload.kind = bytes && is_picture(bytes, upload.n_bytes) ? INTERNVL_IMAGE : INTERNVL_VIDEO;
        if (!bytes || internvl_upload_media(c, &upload, &call, &result, &err))
            status = command_fail(o, &err);
        else
            print_result(o, o->arguments[i], upload.kind == INTERNVL_VIDEO, &result);
        free(bytes);
    }
    return status;
}
