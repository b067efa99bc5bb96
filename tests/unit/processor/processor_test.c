/*
 * The files of a checkpoint (which wins, what is refused), the chat template, and the limits of
 * processor_prepare().
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/chat_template.h"
#include "daemon/processor/processor.h"
#include "daemon/processor/settings.h"
#include "kernels/log.h"
#include "tests/unit/processor/checkpoint.h"

#define BUDGET ((size_t)64 << 20)

static void expect_settings_error(const char *file, const char *text, const char *word)
{
    struct settings s;
    struct error err = {0};
    char dir[256];

    checkpoint_make(dir);
    checkpoint_write(dir, file, text);
    int rc = settings_load(&s, dir, &checkpoint_model, &err);

    if (rc == 0 || !strstr(err.msg, word) || !strstr(err.msg, file))
        fail_msg("%s: %s", text, rc ? err.msg : "accepted");
    assert_int_equal(err.code, ERROR_FAILED_PRECONDITION);
    checkpoint_remove(dir);
}

static void test_settings(void **state)
{
    struct settings s;
    struct error err = {0};
    char dir[256];

    (void)state;
    checkpoint_make(dir);
    assert_int_equal(settings_load(&s, dir, &checkpoint_model, &err), 0);
    assert_true(s.image.crop_to_patches == 1 && s.image.max_patches == 4); // the file says false
    assert_true(s.image.mean[0] == 0.485f * 255.0f && s.image.std[2] == 0.225f * 255.0f);
    assert_true(s.video.sample == 0 && s.video.num_frames == 0 && isnan(s.video.initial_shift));

    checkpoint_write(dir, "video_preprocessor_config.json",
                     "{\"num_frames\": 5, \"do_sample_frames\": true, \"initial_shift\": false, "
                     "\"size\": {\"height\": 28, \"width\": 28}, \"image_mean\": [0.485, 0.456, "
                     "0.406], \"image_std\": [0.229, 0.224, 0.225]}");
    assert_int_equal(settings_load(&s, dir, &checkpoint_model, &err), 0);
    assert_true(s.video.sample == 1 && s.video.num_frames == 5 && s.video.initial_shift == 0);

    checkpoint_write(dir, "processor_config.json",
                     "{\"image_processor\": {\"max_patches\": 9, \"size\": {\"height\": 28, "
                     "\"width\": 28}, \"image_mean\": [0.485, 0.456, 0.406], \"image_std\": "
                     "[0.229, 0.224, 0.225]}}"); // the nested one wins over its own file
    assert_int_equal(settings_load(&s, dir, &checkpoint_model, &err), 0);
    assert_int_equal(s.image.max_patches, 9);

    checkpoint_delete(dir, "processor_config.json");
    checkpoint_delete(dir, "preprocessor_config.json");
    checkpoint_delete(dir, "video_preprocessor_config.json");
    assert_int_equal(settings_load(&s, dir, &checkpoint_model, &err), 0); // none at all
    assert_true(s.image.tile_width == 28 && s.image.max_patches == 12);
    checkpoint_remove(dir);
}

static void test_settings_refusals(void **state)
{
    (void)state;
    expect_settings_error("preprocessor_config.json", "{\"resample\": 2}", "resample");
    expect_settings_error("preprocessor_config.json", "{\"do_resize\": false}", "do_resize");
    expect_settings_error("preprocessor_config.json", "{\"do_center_crop\": true}", "center_crop");
    expect_settings_error("preprocessor_config.json", "{\"size\": {\"shortest_edge\": 3}}", "size");
    expect_settings_error("preprocessor_config.json", "{\"size\": 1e9}", "size");
    expect_settings_error("preprocessor_config.json", "{\"size\": 56}", "image_size");
    expect_settings_error("preprocessor_config.json", "{\"max_patches\": 0}", "max_patches");
    expect_settings_error("preprocessor_config.json", "{\"min_patches\": 13}", "min_patches");
    expect_settings_error("preprocessor_config.json", "{\"image_std\": [1, 0, 1]}", "image_std");
    expect_settings_error("preprocessor_config.json", "{\"image_mean\": [1, 2]}", "image_mean");
    expect_settings_error("preprocessor_config.json", "{\"rescale_factor\": 0}", "rescale_factor");
    expect_settings_error("preprocessor_config.json",
                          "{\"image_processor_type\": \"ViTImageProcessor\"}", "ViT");
    expect_settings_error("preprocessor_config.json", "[]", "JSON object");
    expect_settings_error("processor_config.json", "{\"image_seq_length\": 256}", "256");
    expect_settings_error("video_preprocessor_config.json", "{\"size\": 14}", "differs");
    expect_settings_error("video_preprocessor_config.json", "{\"num_frames\": 0}", "num_frames");
}

static int load_template(const char *dir, struct chat_template *t, struct error *err)
{
    *err = (struct error){0};
    return chat_template_load(t, dir, err);
}

static void test_template_files(void **state)
{
    struct chat_template t;
    struct error err;
    struct byte_buffer json = {0};
    char dir[256];

    (void)state;
    checkpoint_make(dir);
    assert_int_equal(load_template(dir, &t, &err), 0);
    assert_string_equal(t.image_mark, "<IMG_CONTEXT>");

    checkpoint_write(dir, "chat_template.jinja", "{{ messages }}");
    assert_int_equal(load_template(dir, &t, &err), -1);
    assert_int_equal(err.code, ERROR_FAILED_PRECONDITION);
    assert_non_null(strstr(err.msg, "chat_template.jinja"));
    checkpoint_write(dir, "chat_template.jinja", "");
    assert_int_equal(load_template(dir, &t, &err), -1);

    /* the older mark, escaped newlines, inside tokenizer_config.json */
    checkpoint_delete(dir, "chat_template.jinja");
    assert_int_equal(load_template(dir, &t, &err), -1); // none anywhere
    byte_buffer_append(&json, "{\"chat_template\": \"", 19);
    for (const char *p = checkpoint_template; *p; p++) {
        if (strncmp(p, "<IMG_CONTEXT>", 13) == 0) {
            byte_buffer_append(&json, "<image>", 7);
            p += 12;
        } else if (*p == '\n') {
            byte_buffer_append(&json, "\\\\n", 3);
        } else {
            byte_buffer_append(&json, p, 1);
        }
    }
    byte_buffer_append(&json, "\"}", 3);
    checkpoint_write(dir, "tokenizer_config.json", json.data);
    assert_int_equal(load_template(dir, &t, &err), 0);
    assert_string_equal(t.image_mark, "<image>");
    byte_buffer_release(&json);
    checkpoint_remove(dir);
}

static struct content_part text_part(const char *text)
{
    return (struct content_part){.kind = PART_TEXT, .text = text, .n_bytes = strlen(text)};
}

static void expect_rendered(const struct conversation *c, const int *frames, const char *want)
{
    const struct chat_template t = {.image_mark = CHAT_IMAGE_TOKEN};
    struct byte_buffer out = {0};
    struct error err = {0};

    if (chat_template_render(&t, c, frames, &out, &err))
        fail_msg("%s", err.msg);
    byte_buffer_append(&out, "", 1);
    assert_string_equal(out.data, want);
    byte_buffer_release(&out);
}

static void test_render(void **state)
{
    const struct content_part parts[] = {
        text_part("hi"), {.kind = PART_IMAGE}, {.kind = PART_VIDEO}, text_part("?")};
    struct chat_message messages[] = {{.role = "system", .parts = parts, .n_parts = 1},
                                      {.role = "user", .parts = parts, .n_parts = 4},
                                      {.role = "assistant", .parts = parts, .n_parts = 1}};
    struct conversation c = {.messages = messages, .n_messages = 2};
    const int frames[] = {2};

    (void)state;
    expect_rendered(&c, NULL,
                    "<|im_start|>system\nhi<|im_end|>\n<|im_start|>user\nhi<IMG_CONTEXT>\n<video>\n"
                    "?<|im_end|>\n<|im_start|>assistant\n");
    expect_rendered(&c, frames,
                    "<|im_start|>system\nhi<|im_end|>\n<|im_start|>user\nhi<img><IMG_CONTEXT></img>"
                    "\nFrame1: <img><IMG_CONTEXT></img>\nFrame2: <img><IMG_CONTEXT></img>\n?"
                    "<|im_end|>\n<|im_start|>assistant\n");
    c.messages = messages + 2;
    c.n_messages = 1;
    c.continue_final_message = 1;
    expect_rendered(&c, NULL, "<|im_start|>assistant\nhi");
}

struct fixture {
    char dir[256];
    struct processor *p;
    uint8_t *png;
    size_t n_png;
    struct arena arena;
};

static void fixture_open(struct fixture *f, const struct processor_limits *limits)
{
    struct error err = {0};

    checkpoint_make(f->dir);
    f->p = processor_open(f->dir, &checkpoint_model, limits, &err);
    if (!f->p)
        fail_msg("%s", err.msg);
    f->png = checkpoint_png(112, 56, &f->n_png);
    arena_init(&f->arena, BUDGET);
}

static void fixture_close(struct fixture *f)
{
    arena_release(&f->arena);
    free(f->png);
    processor_close(f->p);
    checkpoint_remove(f->dir);
}

static struct content_part image_part(const struct fixture *f)
{
    return (struct content_part){
        .kind = PART_IMAGE, .bytes = f->png, .n_bytes = f->n_png, .tiling = {-1, -1, -1, -1}};
}

static int prepare(struct fixture *f, const struct content_part *parts, int n, struct prompt *out,
                   struct error *err)
{
    const struct chat_message message = {.role = "user", .parts = parts, .n_parts = n};
    const struct conversation c = {.messages = &message, .n_messages = 1};

    *err = (struct error){0};
    return processor_prepare(f->p, &c, &f->arena, out, err);
}

static void test_prepare(void **state)
{
    struct processor_limits limits = processor_limits_default();
    struct fixture f;
    struct prompt out;
    struct error err;

    (void)state;
    fixture_open(&f, &limits);
    struct content_part parts[] = {image_part(&f), text_part("ab"), image_part(&f)};

    parts[2].tiling.crop_to_patches = 0;
    if (prepare(&f, parts, 3, &out, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(out.n_media, 2);
    assert_true(out.media[0].n_columns == 2 && out.media[0].n_rows == 1);
    assert_int_equal(out.media[0].n_tiles, 3);
    assert_int_equal(out.media[1].n_tiles, 1);
    assert_int_equal(out.media[1].first_tile, 3);
    assert_int_equal(out.n_tiles, 4);
    assert_int_equal(out.n_image_tokens, 4 * CHECKPOINT_SEQ_LENGTH);
    int64_t n_marks = 0;

    for (int64_t i = 0; i < out.n_ids; i++)
        n_marks += out.ids[i] == CHECKPOINT_IMAGE_TOKEN;
    assert_int_equal(n_marks, out.n_image_tokens);
    /* the thumbnail and the single tile are the same resize */
    size_t tile = 3 * CHECKPOINT_TILE * CHECKPOINT_TILE;

    assert_memory_equal(out.tiles + 2 * tile, out.tiles + 3 * tile, tile);
    fixture_close(&f);
}

static void expect_refused(struct fixture *f, const struct content_part *parts, int n,
                           enum error_code code, const char *word)
{
    struct prompt out;
    struct error err;

    if (prepare(f, parts, n, &out, &err) == 0 || err.code != code || !strstr(err.msg, word))
        fail_msg("expected %s with \"%s\": %s: %s", error_code_name(code), word,
                 error_code_name(err.code), err.msg);
}

static void test_limits(void **state)
{
    struct processor_limits limits = processor_limits_default();
    struct fixture f;

    (void)state;
    limits.max_media = 3;
    limits.max_tiles = 7;
    limits.max_parts = 5;
    limits.max_text_bytes = 100;
    limits.max_prompt_tokens = 60;
    limits.max_image_pixels = 112 * 56;
    fixture_open(&f, &limits);
    struct content_part parts[] = {image_part(&f), image_part(&f), image_part(&f),
                                   image_part(&f), text_part("x"), text_part("y")};
    char long_text[128];

    expect_refused(&f, parts, 4, ERROR_INVALID_ARGUMENT, "more than 3 pictures");
    expect_refused(&f, parts, 3, ERROR_INVALID_ARGUMENT, "more than 7 tiles");
    expect_refused(&f, parts, 6, ERROR_INVALID_ARGUMENT, "parts");
    memset(long_text, 'q', sizeof(long_text));
    parts[0] = (struct content_part){.kind = PART_TEXT, .text = long_text, .n_bytes = 101};
    expect_refused(&f, parts, 1, ERROR_INVALID_ARGUMENT, "bytes of text");
    parts[0].n_bytes = 90;
    expect_refused(&f, parts, 1, ERROR_OUT_OF_RANGE, "more than 60 tokens");
    parts[0] = (struct content_part){.kind = PART_TEXT, .text = "\xff", .n_bytes = 1};
    expect_refused(&f, parts, 1, ERROR_INVALID_ARGUMENT, "UTF-8");
    parts[0] = image_part(&f);
    parts[0].n_bytes = 60;
    expect_refused(&f, parts, 1, ERROR_INVALID_ARGUMENT, "media 1 (picture): the PNG");
    parts[0] = image_part(&f);
    parts[0].tiling.max_patches = 8;
    expect_refused(&f, parts, 1, ERROR_INVALID_ARGUMENT, "max_patches");
    parts[0].tiling.max_patches = 2;
    parts[0].tiling.min_patches = 3;
    expect_refused(&f, parts, 1, ERROR_INVALID_ARGUMENT, "min_patches");
    parts[0] = image_part(&f);
    parts[0].kind = PART_VIDEO;
    parts[0].video = (struct video_options){.sample = -1, .fps = NAN, .initial_shift = NAN};
    expect_refused(&f, parts, 1, ERROR_INVALID_ARGUMENT, "media 1 (video)");
    arena_release(&f.arena);
    arena_init(&f.arena, 4096);
    parts[0] = image_part(&f);
    expect_refused(&f, parts, 1, ERROR_RESOURCE_EXHAUSTED, "memory");
    fixture_close(&f);

    limits.max_image_pixels = 112 * 56 - 1;
    fixture_open(&f, &limits);
    parts[0] = image_part(&f);
    expect_refused(&f, parts, 1, ERROR_INVALID_ARGUMENT, "112 x 56");
    fixture_close(&f);
}

static void test_open_errors(void **state)
{
    struct processor_limits limits = processor_limits_default();
    struct processor_model model = checkpoint_model;
    struct error err = {0};
    char dir[256];

    (void)state;
    assert_null(processor_open("/nowhere", &model, &limits, &err));
    assert_non_null(strstr(err.msg, "tokenizer.json"));
    checkpoint_make(dir);
    model.image_token_id = 7;
    assert_null(processor_open(dir, &model, &limits, &err));
    assert_non_null(strstr(err.msg, "config.json"));
    checkpoint_edit_tokenizer(dir, "</img>", "</IMG>");
    assert_null(processor_open(dir, &checkpoint_model, &limits, &err));
    assert_non_null(strstr(err.msg, "</img>"));
    checkpoint_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_settings),       cmocka_unit_test(test_settings_refusals),
        cmocka_unit_test(test_template_files), cmocka_unit_test(test_render),
        cmocka_unit_test(test_prepare),        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_open_errors),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
