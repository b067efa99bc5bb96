/*
 * Parity of the whole processor with Transformers: the scenarios of the reference (rendered text,
 * ids, pixels), its error cases, and the demo evaluation's prompts.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/processor/processor.h"
#include "kernels/log.h"
#include "tests/parity/processor/reference.h"

#define BUDGET ((size_t)256 << 20)
#define MAX_PARTS 64

struct chat { // a conversation of JSON with its files in memory
    struct conversation c;
    struct chat_message messages[16];
    struct content_part parts[MAX_PARTS];
    char *files[MAX_PARTS];
    int n_parts;
};

static void put_options(struct content_part *part, const cJSON *kwargs)
{
    const cJSON *o;

    part->tiling = (struct tiling_options){-1, -1, -1, -1};
    part->video = (struct video_options){.sample = -1, .initial_shift = NAN};
    cJSON_ArrayForEach(o, kwargs)
    {
        if (strcmp(o->string, "crop_to_patches") == 0)
            part->tiling.crop_to_patches = cJSON_IsTrue(o);
        else if (strcmp(o->string, "min_patches") == 0)
            part->tiling.min_patches = (int)o->valuedouble;
        else if (strcmp(o->string, "max_patches") == 0)
            part->tiling.max_patches = (int)o->valuedouble;
        else if (strcmp(o->string, "num_frames") == 0)
            part->video.num_frames = (int)o->valuedouble;
        else if (strcmp(o->string, "fps") == 0)
            part->video.fps = o->valuedouble;
        else if (strcmp(o->string, "initial_shift") == 0)
            part->video.initial_shift =
                cJSON_IsBool(o) ? cJSON_IsTrue(o) ? NAN : 0 : o->valuedouble;
        else
            die("unknown option %s", o->string);
    }
}

/* `dir` is where the paths of the messages start. */
static void chat_init(struct chat *chat, const cJSON *messages, const cJSON *kwargs,
                      const char *dir)
{
    const cJSON *m, *p;

    *chat = (struct chat){0};
    chat->c.messages = chat->messages;
    cJSON_ArrayForEach(m, messages)
    {
        struct chat_message *message = &chat->messages[chat->c.n_messages++];
        const cJSON *content = json_item(m, "content");

        message->role = json_string(m, "role");
        message->parts = &chat->parts[chat->n_parts];
        if (cJSON_IsString(content)) {
            chat->parts[chat->n_parts++] =
                (struct content_part){.kind = PART_TEXT,
                                      .text = content->valuestring,
                                      .n_bytes = strlen(content->valuestring)};
            message->n_parts = 1;
            continue;
        }
        cJSON_ArrayForEach(p, content)
        {
            struct content_part *part = &chat->parts[chat->n_parts];
            const char *type = json_string(p, "type");

            put_options(part, kwargs);
            if (strcmp(type, "text") == 0) {
                part->text = json_string(p, "text");
                part->n_bytes = strlen(part->text);
            } else {
                char path[PATH_MAX];

                snprintf(path, sizeof(path), "%s/%s", dir, json_string(p, "path"));
                part->kind = *type == 'i' ? PART_IMAGE : PART_VIDEO;
                chat->files[chat->n_parts] = file_read(path, &part->n_bytes);
                part->bytes = (uint8_t *)chat->files[chat->n_parts];
            }
            chat->n_parts++;
            message->n_parts++;
        }
    }
}

static void chat_release(struct chat *chat)
{
    for (int i = 0; i < chat->n_parts; i++)
        free(chat->files[i]);
}

static void check_ids(const char *what, const cJSON *want, const cJSON *mask,
                      const struct prompt *p)
{
    const cJSON *id = want->child, *m = mask->child;
    int64_t i = 0;

    for (; id; id = id->next, m = m->next) {
        if (m->valuedouble == 0)
            continue; // left padding of the batch
        if (i >= p->n_ids || p->ids[i] != (int32_t)id->valuedouble)
            fail_msg("%s: id %ld of %ld differs", what, (long)i, (long)p->n_ids);
        i++;
    }
    assert_int_equal(i, p->n_ids);
}

static size_t plane_of(const struct prompt *p)
{
    return (size_t)p->tile_height * (size_t)p->tile_width;
}

static void hash_pixels(struct sha256 *s, const struct processor *proc, const struct prompt *p)
{
    size_t plane = plane_of(p);
    float *x = xcalloc(plane, sizeof(*x));

    for (int i = 0; i < p->n_tiles * p->channels; i++) {
        float mean = processor_mean(proc)[i % p->channels],
              std = processor_std(proc)[i % p->channels];

        for (size_t k = 0; k < plane; k++)
            x[k] = ((float)p->tiles[(size_t)i * plane + k] - mean) / std;
        sha256_update(s, x, plane * sizeof(*x));
    }
    free(x);
}

/* Largest difference to the recorded bytes; for clips in YUV, where two levels are allowed. */
static void check_stored_pixels(const char *name, const struct prompt *p)
{
    char file[256];
    int64_t shape[8];
    size_t n_bytes;
    int worst = 0;

    snprintf(file, sizeof(file), "scenarios/pixels_112/%s.safetensors", name);
    if (!reference_has(file))
        return;
    uint8_t *want = reference_tensor(file, "u8", shape, &n_bytes);

    assert_int_equal(n_bytes, (size_t)p->n_tiles * (size_t)p->channels * plane_of(p));
    for (size_t i = 0; i < n_bytes; i++) {
        int d = abs(p->tiles[i] - want[i]);

        worst = d > worst ? d : worst;
    }
    if (worst > 2)
        fail_msg("%s: pixels differ by up to %d", name, worst);
    printf("%s: pixels within %d levels of the reference (YUV clip)\n", name, worst);
    free(want);
}

static void check_scenario(const struct processor *proc, const cJSON *row)
{
    const char *name = json_string(row, "name");
    const cJSON *conversations = json_item(row, "conversations"), *messages;
    const cJSON *rendered = json_item(row, "rendered");
    const cJSON *sha = cJSON_GetObjectItemCaseSensitive(row, "pixel_values_sha256");
    char *text = cJSON_PrintUnformatted(conversations);
    int is_yuv = strstr(text, "clip_yuv") != NULL, i = 0, n_tiles = 0;
    struct sha256 s;
    char hex[65];

    free(text);
    sha256_init(&s);
    cJSON_ArrayForEach(messages, conversations)
    {
        struct chat chat;
        struct arena a;
        struct prompt p;
        struct error err = {0};
        size_t n_bytes;
        const char *want = cJSON_IsArray(rendered) ? cJSON_GetArrayItem(rendered, i)->valuestring
                                                   : rendered->valuestring;

        chat_init(&chat, messages, json_item(row, "processor_kwargs"), reference_path("scenarios"));
        arena_init(&a, BUDGET);
        char *out = processor_render(proc, &chat.c, &a, &n_bytes, &err);

        assert_non_null(out);
        assert_string_equal(out, want);
        if (processor_prepare(proc, &chat.c, &a, &p, &err))
            fail_msg("%s: %s", name, err.msg);
        check_ids(name, cJSON_GetArrayItem(json_item(row, "input_ids"), i),
                  cJSON_GetArrayItem(json_item(row, "attention_mask"), i), &p);
        hash_pixels(&s, proc, &p);
        if (is_yuv)
            check_stored_pixels(name, &p);
        n_tiles += p.n_tiles;
        arena_release(&a);
        chat_release(&chat);
        i++;
    }
    sha256_hex(&s, hex);
    if (sha)
        assert_int_equal(n_tiles, (int)json_number(row, "tiles"));
    if (sha && strcmp(hex, sha->valuestring)) {
        if (!is_yuv)
            fail_msg("%s: other pixel_values", name);
        printf("%s: pixel_values not bit-equal (YUV clip; see above)\n", name);
    }
}

static struct processor *open_checkpoint(const char *dir, int image_token, int seq_length, int side)
{
    const struct processor_model model = {.image_token_id = image_token,
                                          .image_seq_length = seq_length,
                                          .n_channels = 3,
                                          .image_height = side,
                                          .image_width = side};
    struct processor_limits limits = processor_limits_default();
    struct error err = {0};
    struct processor *p = processor_open(dir, &model, &limits, &err);

    if (!p)
        fail_msg("%s", err.msg);
    return p;
}

static void test_scenarios(void **state)
{
    static const struct {
        const char *name;
        int side, seq_length;
    } checkpoints[] = {{"ln-1b-style", 112, 16},
                       {"rms-78b-style", 112, 16},
                       {"t-qwen3", 56, 4},
                       {"t-qwen3moe", 56, 4}};

    (void)state;
    for (size_t k = 0; k < sizeof(checkpoints) / sizeof(checkpoints[0]); k++) {
        char dir[128], file[128], config[160];

        snprintf(dir, sizeof(dir), "checkpoints/%s", checkpoints[k].name);
        snprintf(config, sizeof(config), "%s/config.json", dir);
        snprintf(file, sizeof(file), "scenarios/%s.json", checkpoints[k].name);
        if (!reference_has(config) || !reference_has(file))
            continue;
        cJSON *c = reference_json(config), *rows = reference_json(file);
        const cJSON *row;
        struct processor *p =
            open_checkpoint(reference_path(dir), (int)json_number(c, "image_token_id"),
                            (int)json_number(c, "image_seq_length"), checkpoints[k].side);

        cJSON_ArrayForEach(row, rows) check_scenario(p, row);
        printf("%s: %d scenarios equal\n", file, cJSON_GetArraySize(rows));
        processor_close(p);
        cJSON_Delete(rows);
        cJSON_Delete(c);
    }
}

static void expect_error(const struct processor *p, const char *json, const char *kwargs,
                         enum error_code code, const char *word)
{
    cJSON *messages = cJSON_Parse(json), *options = cJSON_Parse(kwargs);
    struct chat chat;
    struct arena a;
    struct prompt out;
    struct error err = {0};

    chat_init(&chat, messages, options, reference_path("scenarios"));
    arena_init(&a, BUDGET);
    assert_int_equal(processor_prepare(p, &chat.c, &a, &out, &err), -1);
    if (err.code != code || !strstr(err.msg, word))
        fail_msg("%s: %s: %s", json, error_code_name(err.code), err.msg);
    arena_release(&a);
    chat_release(&chat);
    cJSON_Delete(messages);
    cJSON_Delete(options);
}

/* scenarios/errors.json, as far as our calls can express them, and our own limits. */
static void test_errors(void **state)
{
    (void)state;
    if (!reference_has("scenarios/media/short_rgb.mp4"))
        skip();
    struct processor *p = open_checkpoint(reference_path("checkpoints/ln-1b-style"), 1204, 16, 112);

    expect_error(p,
                 "[{\"role\":\"user\",\"content\":[{\"type\":\"video\",\"path\":\"media/"
                 "short_rgb.mp4\"}]}]",
                 "{\"num_frames\":50}", ERROR_INVALID_ARGUMENT, "num_frames is 50");
    expect_error(p,
                 "[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"path\":\"media/"
                 "image0.png\"},{\"type\":\"text\",\"text\":\"say <IMG_CONTEXT>\"}]}]",
                 "{}", ERROR_INVALID_ARGUMENT, "<IMG_CONTEXT>");
    expect_error(p, "[{\"role\":\"user\",\"content\":\"say <video>\"}]", "{}",
                 ERROR_INVALID_ARGUMENT, "<video>");
    expect_error(p,
                 "[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"<IMG_\"},"
                 "{\"type\":\"text\",\"text\":\"CONTEXT>\"}]}]",
                 "{}", ERROR_INVALID_ARGUMENT, "<IMG_CONTEXT>");
    expect_error(p, "[{\"role\":\"tool\",\"content\":\"x\"}]", "{}", ERROR_INVALID_ARGUMENT,
                 "unknown role");
    expect_error(p,
                 "[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"path\":\"media/"
                 "short_rgb.mp4\"}]}]",
                 "{}", ERROR_INVALID_ARGUMENT, "media 1 (picture)");
    expect_error(p,
                 "[{\"role\":\"user\",\"content\":[{\"type\":\"video\",\"path\":\"media/"
                 "image0.png\"}]}]",
                 "{}", ERROR_INVALID_ARGUMENT, "media 1 (video)");
    expect_error(p,
                 "[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"path\":\"media/"
                 "image0.png\"}]}]",
                 "{\"max_patches\":1000}", ERROR_INVALID_ARGUMENT, "max_patches");
    processor_close(p);
}

/* Every prompt of the demo evaluation; 8 frames of each video without being asked. */
static void test_demo(void **state)
{
    const char *dir = INTERNVLD_SOURCE_DIR "/tests/data/demo-eval";
    const char *model = INTERNVLD_SOURCE_DIR "/deploy/demo/model";
    int n = 0, n_videos = 0;

    (void)state;
    if (access(INTERNVLD_SOURCE_DIR "/deploy/demo/model/tokenizer.json", R_OK) ||
        access(INTERNVLD_SOURCE_DIR "/tests/data/demo-eval/eval.jsonl", R_OK)) {
        printf("skipped: the demo model or its evaluation is not here\n");
        skip();
    }
    struct processor *p = open_checkpoint(model, 1016, 16, 112);
    char *text = file_read(INTERNVLD_SOURCE_DIR "/tests/data/demo-eval/eval.jsonl", NULL);
    char *at = text;
    cJSON *row;

    while ((row = reference_next_line(&at))) {
        struct chat chat;
        struct arena a;
        struct prompt out;
        struct error err = {0};

        chat_init(&chat, json_item(row, "messages"), NULL, dir);
        arena_init(&a, BUDGET);
        if (processor_prepare(p, &chat.c, &a, &out, &err))
            fail_msg("%s: %s", json_string(row, "id"), err.msg);
        for (int i = 0; i < out.n_media; i++) {
            if (out.media[i].kind == PART_VIDEO) {
                assert_int_equal(out.media[i].n_tiles, 8);
                n_videos++;
            } else {
                assert_true(out.media[i].n_tiles <= 7);
            }
        }
        assert_int_equal(out.n_image_tokens, 16 * out.n_tiles);
        arena_release(&a);
        chat_release(&chat);
        cJSON_Delete(row);
        n++;
    }
    free(text);
    processor_close(p);
    printf("demo evaluation: %d prompts prepared, %d videos of 8 frames\n", n, n_videos);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scenarios),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_demo),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
