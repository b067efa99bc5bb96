/* Messages, parts and the bytes of media files. */
#include "client/conversation.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "client/rpc.h"

#define MAX_FILE_BYTES ((size_t)1 << 30)
#define MEDIA_PREFIX "media:"

char *read_file(const char *path, size_t *n_bytes, struct internvl_error *err)
{
    *n_bytes = 0;
    FILE *f = fopen(path, "rb");
    struct stat st;
    if (!f || fstat(fileno(f), &st) != 0 || S_ISDIR(st.st_mode)) {
        rpc_error(err, INTERNVL_NOT_FOUND, "%s: %s", path, strerror(f ? EISDIR : errno));
        if (f)
            fclose(f);
        return NULL;
    }
    size_t capacity = st.st_size > 0 ? (size_t)st.st_size + 1 : 1 << 16, n = 0;
    char *bytes = command_alloc(capacity, 1);
    while (n < MAX_FILE_BYTES) {
        n += fread(bytes + n, 1, capacity - 1 - n, f);
        if (n < capacity - 1)
            break;
        capacity *= 2; // a pipe, or a file that grew
        char *more = command_alloc(capacity, 1);
        memcpy(more, bytes, n);
        free(bytes);
        bytes = more;
    }
    int failed = ferror(f);
    fclose(f);
    if (failed || n >= MAX_FILE_BYTES) {
        rpc_error(err, failed ? INTERNVL_NOT_FOUND : INTERNVL_RESOURCE_EXHAUSTED, "%s: %s", path,
                  failed ? "cannot be read" : "larger than 1 GiB");
        free(bytes);
        return NULL;
    }
    bytes[n] = '\0';
    *n_bytes = n;
    return bytes;
}

static char *copy_string(const char *s)
{
    size_t n = strlen(s) + 1;
    char *copy = command_alloc(n, 1);
    memcpy(copy, s, n);
    return copy;
}

void conversation_add_message(struct conversation *c, const char *role)
{
    c->messages = command_grow(c->messages, c->n_messages, sizeof(*c->messages));
    struct internvl_message *m = &c->messages[c->n_messages++];
    memset(m, 0, sizeof(*m));
    m->role = copy_string(role);
}

static struct internvl_part *add_part(struct conversation *c)
{
    struct internvl_message *m = &c->messages[c->n_messages - 1];
    struct internvl_part *parts =
        command_grow((void *)m->parts, m->n_parts, sizeof(*parts)); // ours, const to the library
    m->parts = parts;
    struct internvl_part *part = &parts[m->n_parts++];
    memset(part, 0, sizeof(*part));
    return part;
}

void conversation_add_text(struct conversation *c, const char *text)
{
    struct internvl_part *part = add_part(c);
    part->kind = INTERNVL_TEXT;
    part->text = copy_string(text);
}

int conversation_add_file(struct conversation *c, const char *path, int is_video,
                          const struct command_options *o, struct internvl_error *err)
{
    size_t n_bytes = 0, n_prefix = strlen(MEDIA_PREFIX);
    const char *media_id = strncmp(path, MEDIA_PREFIX, n_prefix) == 0 ? path + n_prefix : NULL;
    char *bytes = media_id ? NULL : read_file(path, &n_bytes, err);
    if (!bytes && !media_id)
        return -1;
    struct internvl_part *part = add_part(c);
    part->kind = is_video ? INTERNVL_VIDEO : INTERNVL_IMAGE;
    part->data = bytes;
    part->n_bytes = n_bytes;
    part->media_id = media_id ? copy_string(media_id) : NULL;
    part->tiling = o->tiling;
    part->video = o->video;
    return 0;
}

void conversation_add_bytes(struct conversation *c, void *bytes, size_t n_bytes,
                            const struct command_options *o)
{
    struct internvl_part *part = add_part(c);
    part->kind = INTERNVL_IMAGE;
    part->data = bytes;
    part->n_bytes = n_bytes;
    part->tiling = o->tiling;
}

static void release_message(struct internvl_message *m)
{
    for (size_t i = 0; i < m->n_parts; i++) {
        free((void *)m->parts[i].text);
        free((void *)m->parts[i].data);
        free((void *)m->parts[i].media_id);
    }
    free((void *)m->parts);
    free((void *)m->role);
}

void conversation_drop_message(struct conversation *c)
{
    if (c->n_messages > 0)
        release_message(&c->messages[--c->n_messages]);
}

int conversation_from_options(struct conversation *c, const struct command_options *o,
                              const char *question, struct internvl_error *err)
{
    if (o->system) {
        conversation_add_message(c, "system");
        conversation_add_text(c, o->system);
    }
    conversation_add_message(c, "user");
    for (size_t i = 0; i < o->n_media; i++)
        if (conversation_add_file(c, o->media[i].path, o->media[i].is_video, o, err))
            return -1;
    conversation_add_text(c, question);
    return 0;
}

static const char *member(const cJSON *object, const char *name)
{
    const char *s = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
    return s ? s : "";
}

static int add_json_part(struct conversation *c, const cJSON *part, const char *folder,
                         const struct command_options *o, struct internvl_error *err)
{
    const char *type = member(part, "type");
    if (strcmp(type, "text") == 0) {
        conversation_add_text(c, member(part, "text"));
        return 0;
    }
    int is_video = strcmp(type, "video") == 0;
    if (!is_video && strcmp(type, "image") != 0)
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT,
                         "a part has type '%s', not text, image or video", type);
    const char *path = member(part, "path");
    if (!*path)
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "an %s part has no path", type);
    char full[4096];
    const char *prefix = *path == '/' ? "" : folder;
    if (snprintf(full, sizeof(full), "%s%s", prefix, path) >= (int)sizeof(full))
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "a path is longer than 4095 bytes");
    return conversation_add_file(c, full, is_video, o, err);
}

int conversation_from_json(struct conversation *c, const cJSON *messages, const char *folder,
                           const struct command_options *o, struct internvl_error *err)
{
    if (!cJSON_IsArray(messages))
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "\"messages\" is not an array");
    const cJSON *message, *part;
    cJSON_ArrayForEach(message, messages)
    {
        const cJSON *content = cJSON_GetObjectItemCaseSensitive(message, "content");
        conversation_add_message(c, member(message, "role"));
        if (cJSON_IsString(content))
            conversation_add_text(c, content->valuestring);
        else if (!cJSON_IsArray(content))
            return rpc_error(err, INTERNVL_INVALID_ARGUMENT,
                             "\"content\" is neither a string nor an array");
        if (!cJSON_IsArray(content))
            continue;
        cJSON_ArrayForEach(part, content)
        {
            if (add_json_part(c, part, folder, o, err))
                return -1;
        }
    }
    return 0;
}

struct internvl_prompt conversation_prompt(const struct conversation *c)
{
    struct internvl_prompt p = {.messages = c->messages, .n_messages = c->n_messages};
    return p;
}

void conversation_release(struct conversation *c)
{
    while (c->n_messages > 0)
        conversation_drop_message(c);
    free(c->messages);
    memset(c, 0, sizeof(*c));
}
