/*
 * The template: finding it, recognising it, rendering it. See chat_template.h.
 */
#include "daemon/processor/chat_template.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/config_file.h"

#define MAX_TEMPLATE_BYTES ((size_t)1 << 20)
#define MAX_CONFIG_BYTES ((size_t)16 << 20)

/* convert_internvl_weights_to_hf.py of Transformers; newlines as the released files have them */
#define TEMPLATE(image_mark)                                                                       \
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"                     \
    "{% if message['content'] is string %}{{ message['content'] }}"                                \
    "{% else %}{% for content in message['content'] %}"                                            \
    "{% if content['type'] == 'image' %}{{ '" image_mark "\n' }}"                                  \
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"                                       \
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"  \
    "{{'<|im_end|>\n'}}{% endfor %}"                                                               \
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"

/* `\n` written as an escape is the same to Jinja as the newline itself, and a final newline is
 * dropped by it. */
static void canonicalize(char *s)
{
    char *start = s, *out = s;

    for (; *s; s++) {
        if (s[0] == '\\' && s[1] == 'n') {
            *out++ = '\n';
            s++;
        } else if (s[0] != '\r') {
            *out++ = *s;
        }
    }
    *out = '\0';
    if (out > start && out[-1] == '\n')
        out[-1] = '\0';
}

static int recognise(struct chat_template *t, char *text, const char *dir, const char *file,
                     struct error *err)
{
    canonicalize(text);
    if (strcmp(text, TEMPLATE(CHAT_IMAGE_TOKEN)) == 0)
        t->image_mark = CHAT_IMAGE_TOKEN;
    else if (strcmp(text, TEMPLATE(CHAT_OLD_IMAGE_MARK)) == 0)
        t->image_mark = CHAT_OLD_IMAGE_MARK;
    else
        return error_set(err, ERROR_FAILED_PRECONDITION,
                         "%.120s/%s: the chat template is not InternVL's; no other is supported",
                         dir, file);
    return 0;
}

/* The "chat_template" of a JSON file: 1 found (and recognised or refused: see err), 0 not there. */
static int try_json(struct chat_template *t, const char *dir, const char *file, struct error *err)
{
    cJSON *root = config_file_parse(dir, file, MAX_CONFIG_BYTES, err);
    cJSON *item = cJSON_GetObjectItemCaseSensitive(root, "chat_template");
    int found = err->code || (item && !cJSON_IsNull(item));

    if (cJSON_IsString(item))
        recognise(t, item->valuestring, dir, file, err);
    else if (found && !err->code)
        error_set(err, ERROR_FAILED_PRECONDITION, "%.120s/%s: \"chat_template\" must be a string",
                  dir, file);
    cJSON_Delete(root);
    return found;
}

int chat_template_load(struct chat_template *t, const char *dir, struct error *err)
{
    static const char *const files[] = {"chat_template.json", "processor_config.json",
                                        "tokenizer_config.json"};
    char *text = config_file_read(dir, "chat_template.jinja", MAX_TEMPLATE_BYTES, NULL, err);

    if (text)
        recognise(t, text, dir, "chat_template.jinja", err);
    free(text);
    if (text || err->code)
        return err->code ? -1 : 0;
    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++)
        if (try_json(t, dir, files[i], err))
            return err->code ? -1 : 0;
    return error_set(err, ERROR_FAILED_PRECONDITION,
                     "%.120s: no chat template (chat_template.jinja)", dir);
}

static void put(struct byte_buffer *out, const char *s)
{
    byte_buffer_append(out, s, strlen(s));
}

/* Roles as the template prints them; the reference would print any. */
static int known_role(const char *role)
{
    return role && (strcmp(role, "system") == 0 || strcmp(role, "user") == 0 ||
                    strcmp(role, "assistant") == 0);
}

static void put_video(struct byte_buffer *out, int n_frames)
{
    for (int k = 0; k < n_frames; k++) {
        char frame[64];

        snprintf(frame, sizeof(frame), "%sFrame%d: <img>" CHAT_IMAGE_TOKEN "</img>", k ? "\n" : "",
                 k + 1);
        put(out, frame);
    }
    put(out, "\n");
}

static size_t count(const struct byte_buffer *b, size_t from, const char *mark)
{
    size_t n = 0, length = strlen(mark);
    const char *at = b->data + from, *end = b->data + b->n;

    while ((at = memmem(at, (size_t)(end - at), mark, length))) {
        n++;
        at += length;
    }
    return n;
}

/* A mark in the text, be it pieced together from several parts, would be taken for media: the
 * reference counts it as a placeholder and fails. */
static int check_marks(const struct byte_buffer *out, size_t from, size_t n_image_tokens,
                       size_t n_video_tokens, struct error *err)
{
    if (count(out, from, CHAT_IMAGE_TOKEN) != n_image_tokens)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "the text holds \"" CHAT_IMAGE_TOKEN "\", which stands for pictures");
    if (count(out, from, CHAT_VIDEO_TOKEN) != n_video_tokens)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "the text holds \"" CHAT_VIDEO_TOKEN "\", which stands for videos");
    return 0;
}

int chat_template_render(const struct chat_template *t, const struct conversation *c,
                         const int *frames, struct byte_buffer *out, struct error *err)
{
    size_t from = out->n, n_image_tokens = 0, n_video_tokens = 0;
    int n_videos = 0;

    if (c->n_messages < 1)
        return error_set(err, ERROR_INVALID_ARGUMENT, "the conversation has no messages");
    for (int m = 0; m < c->n_messages; m++) {
        const struct chat_message *message = &c->messages[m];

        if (!known_role(message->role))
            return error_set(err, ERROR_INVALID_ARGUMENT,
                             "message %d has an unknown role; system, user and assistant are known",
                             m + 1);
        put(out, "<|im_start|>");
        put(out, message->role);
        put(out, "\n");
        for (int i = 0; i < message->n_parts; i++) {
            const struct content_part *part = &message->parts[i];

            if (part->kind == PART_TEXT) {
                byte_buffer_append(out, part->text, part->n_bytes);
            } else if (part->kind == PART_IMAGE && frames) {
                put(out, "<img>" CHAT_IMAGE_TOKEN "</img>\n");
                n_image_tokens++;
            } else if (part->kind == PART_IMAGE) {
                put(out, t->image_mark);
                put(out, "\n");
                n_image_tokens += strcmp(t->image_mark, CHAT_IMAGE_TOKEN) == 0;
            } else if (frames) {
                put_video(out, frames[n_videos]);
                n_image_tokens += (size_t)frames[n_videos++];
            } else {
                put(out, CHAT_VIDEO_TOKEN "\n");
                n_video_tokens++;
            }
        }
        if (m + 1 < c->n_messages || !c->continue_final_message)
            put(out, "<|im_end|>\n");
    }
    if (!c->continue_final_message)
        put(out, "<|im_start|>assistant\n");
    return check_marks(out, from, n_image_tokens, n_video_tokens, err);
}
