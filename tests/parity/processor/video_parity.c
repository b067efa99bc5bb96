/*
 * Parity of frame sampling and video decoding with Transformers (PyAV): every table of indices, the
 * frames of every clip.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/video.h"
#include "kernels/log.h"
#include "tests/parity/processor/reference.h"

#define MAX_FRAMES 200000

static int64_t indices[MAX_FRAMES];

static void check_indices(const char *what, const cJSON *want, int n)
{
    const cJSON *item;
    int i = 0;

    if (n != cJSON_GetArraySize(want))
        fail_msg("%s: %d indices, expected %d", what, n, cJSON_GetArraySize(want));
    cJSON_ArrayForEach(item, want)
    {
        if (indices[i] != (int64_t)item->valuedouble)
            fail_msg("%s: index %d is %ld, expected %ld", what, i, (long)indices[i],
                     (long)item->valuedouble);
        i++;
    }
}

static double shift_of(const cJSON *args)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(args, "initial_shift");

    if (!item || cJSON_IsTrue(item))
        return NAN;
    return cJSON_IsFalse(item) ? 0 : item->valuedouble;
}

static double number_or_0(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);

    return cJSON_IsNumber(item) ? item->valuedouble : 0;
}

/* Long results are recorded by count, ends and sum. */
static void check_summary(const cJSON *c, int n)
{
    const cJSON *item;
    double sum = 0;
    int i = 0;

    assert_int_equal(n, (int)json_number(c, "count"));
    for (int k = 0; k < n; k++)
        sum += (double)indices[k];
    assert_true(sum == json_number(c, "sum"));
    cJSON_ArrayForEach(item, json_item(c, "first"))
        assert_int_equal(indices[i++], (int64_t)item->valuedouble);
    i = n - cJSON_GetArraySize(json_item(c, "last"));
    cJSON_ArrayForEach(item, json_item(c, "last"))
        assert_int_equal(indices[i++], (int64_t)item->valuedouble);
}

static void test_sampling(void **state)
{
    int n_errors = 0, n_cases = 0;

    (void)state;
    if (!reference_has("video/sample_frames.json"))
        skip();
    cJSON *rows = reference_json("video/sample_frames.json");
    const cJSON *c;

    cJSON_ArrayForEach(c, rows)
    {
        const cJSON *args = json_item(c, "args");
        const struct video_sampling s = {.num_frames = (int)number_or_0(args, "num_frames"),
                                         .fps = number_or_0(args, "fps"),
                                         .initial_shift = shift_of(args)};
        struct error err = {0};
        int n = video_sample(&s, (int64_t)json_number(c, "total_num_frames"),
                             number_or_0(c, "video_fps"), MAX_FRAMES, indices, &err);

        if (cJSON_HasObjectItem(c, "error")) {
            assert_int_equal(n, -1);
            assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
            n_errors++;
        } else if (cJSON_HasObjectItem(c, "count")) {
            check_summary(c, n);
        } else {
            char *what = cJSON_PrintUnformatted(c);

            check_indices(what, json_item(c, "indices"), n);
            free(what);
        }
        n_cases++;
    }
    cJSON_Delete(rows);
    printf("video/sample_frames.json: %d cases equal, %d of them errors\n", n_cases, n_errors);
}

static void test_dense_sampling(void **state)
{
    int n_cases = 0;

    (void)state;
    if (!reference_has("video/sample_frames_dense.json"))
        skip();
    cJSON *root = reference_json("video/sample_frames_dense.json");
    const cJSON *c;

    cJSON_ArrayForEach(c, json_item(root, "indices"))
    {
        struct video_sampling s = {.initial_shift = NAN};
        struct error err = {0};
        int total;

        assert_int_equal(sscanf(c->string, "%d,%d", &total, &s.num_frames), 2);
        check_indices(c->string, c, video_sample(&s, total, 30, MAX_FRAMES, indices, &err));
        n_cases++;
    }
    cJSON_Delete(root);
    printf("video/sample_frames_dense.json: %d cases equal\n", n_cases);
}

struct frame_check {
    struct sha256 sha;
    const uint8_t *want; // [n, height, width, 3] or NULL
    int worst;
};

static int take_frame(void *arg, int k, const struct rgb_view *f, struct error *err)
{
    struct frame_check *c = arg;
    size_t row = 3 * (size_t)f->width;

    (void)err;
    for (int y = 0; y < f->height; y++) {
        const uint8_t *in = f->rgb + (size_t)y * f->row_bytes;

        sha256_update(&c->sha, in, row);
        for (size_t i = 0; c->want && i < row; i++) {
            size_t at = ((size_t)k * (size_t)f->height + (size_t)y) * row + i;
            int d = abs(in[i] - c->want[at]);

            c->worst = d > c->worst ? d : c->worst;
        }
    }
    return 0;
}

static void check_clip(const cJSON *clip)
{
    static const struct video_limits limits = {
        .max_pixels = 1 << 20, .max_frames = 1000, .max_seconds = 60};
    struct frame_check c = {0};
    struct video_info info;
    struct error err = {0};
    char name[256], hex[65];
    size_t n_bytes, n_want;
    int64_t shape[8];

    snprintf(name, sizeof(name), "scenarios/%s", json_string(clip, "file"));
    if (!reference_has(name))
        return;
    char *bytes = reference_read(name, &n_bytes);
    struct video *v = video_open((uint8_t *)bytes, n_bytes, &limits, VIDEO_WHOLE, &info, &err);

    if (!v)
        fail_msg("%s: %s", name, err.msg);
    assert_int_equal(info.n_frames, (int64_t)json_number(clip, "container_frames"));
    assert_true(info.fps == json_number(clip, "container_fps"));
    assert_int_equal(info.width, (int)json_number(clip, "width"));
    assert_int_equal(info.height, (int)json_number(clip, "height"));
    uint8_t *want = NULL;

    if (reference_has("scenarios/media/decoded_frames.safetensors"))
        want = reference_tensor("scenarios/media/decoded_frames.safetensors", clip->string, shape,
                                &n_want);
    c.want = want;
    sha256_init(&c.sha);
    for (int i = 0; i < (int)info.n_frames; i++)
        indices[i] = i;
    if (video_read(v, indices, (int)info.n_frames, take_frame, &c, &err))
        fail_msg("%s: %s", name, err.msg);
    sha256_hex(&c.sha, hex);
    int equal = strcmp(hex, json_string(clip, "decoded_sha256")) == 0;

    if (strcmp(json_string(clip, "codec"), "rgb") == 0)
        assert_true(equal);
    else
        assert_true(equal || (want && c.worst <= 2));
    printf("%s: %d frames, %s\n", name, (int)info.n_frames, equal ? "equal" : "within 2 levels");
    video_close(v);
    free(bytes);
    free(want);
}

static void test_clips(void **state)
{
    (void)state;
    if (!reference_has("scenarios/media/videos.json"))
        skip();
    cJSON *root = reference_json("scenarios/media/videos.json");
    const cJSON *clip;

    cJSON_ArrayForEach(clip, root) check_clip(clip);
    cJSON_Delete(root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sampling),
        cmocka_unit_test(test_dense_sampling),
        cmocka_unit_test(test_clips),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
