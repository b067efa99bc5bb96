/*
 * Resize against its definition, EXIF, broken pictures, sampling's corners.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/image.h"
#include "daemon/processor/resize.h"
#include "daemon/processor/tiling.h"
#include "daemon/processor/video.h"
#include "kernels/log.h"
#include "tests/unit/processor/checkpoint.h"

#define MAX_PIXELS ((int64_t)1 << 20)

static double cubic(double x)
{
    x = fabs(x);
    if (x < 1)
        return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/* The definition of one pass, sample by sample: in [n_lines, n_in] to out [n_lines, n_out]. */
static void pass(const uint8_t *in, int n_lines, int n_in, int n_out, uint8_t *out)
{
    double scale = (double)n_in / n_out, f = scale > 1 ? scale : 1, largest = 0;
    double *w = xcalloc((size_t)n_out * (size_t)n_in, sizeof(*w));
    int precision = 0;

    if (n_in == n_out) {
        memcpy(out, in, (size_t)n_lines * (size_t)n_in);
        free(w);
        return;
    }
    for (int i = 0; i < n_out; i++) {
        double center = scale * (i + 0.5), total = 0, *row = w + (size_t)i * (size_t)n_in;
        int low = (int)fmax((int)(center - 2 * f + 0.5), 0);
        int high = (int)fmin((int)(center + 2 * f + 0.5), n_in);

        for (int k = low; k < high; k++)
            total += row[k] = cubic((k - center + 0.5) * (1.0 / f));
        for (int k = low; k < high; k++)
            largest = fmax(largest, row[k] /= total);
    }
    while (precision < 22 && (int)(0.5 + largest * (1 << (precision + 1))) < 1 << 15)
        precision++;
    for (int l = 0; l < n_lines; l++) {
        for (int i = 0; i < n_out; i++) {
            int64_t sum = (int64_t)1 << (precision - 1);

            for (int k = 0; k < n_in; k++)
                sum += (int64_t)round(w[(size_t)i * (size_t)n_in + (size_t)k] * (1 << precision)) *
                       in[l * n_in + k];
            sum >>= precision;
            out[l * n_out + i] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
        }
    }
    free(w);
}

static void transpose(const uint8_t *in, int n_rows, int n_cols, uint8_t *out)
{
    for (int y = 0; y < n_rows; y++)
        for (int x = 0; x < n_cols; x++)
            out[x * n_rows + y] = in[y * n_cols + x];
}

static void check_resize(int w, int h, int n_columns, int n_rows, int tile_w, int tile_h)
{
    int out_w = n_columns * tile_w, out_h = n_rows * tile_h;
    size_t big = (size_t)(w > out_w ? w : out_w) * (size_t)(h > out_h ? h : out_h);
    uint8_t *rgb = xcalloc((size_t)h, 3 * (size_t)w + 5), *a = xcalloc(big, 1),
            *b = xcalloc(big, 1);
    uint8_t *tiles = xcalloc(3 * (size_t)out_w, (size_t)out_h);
    const struct rgb_view view = {
        .rgb = rgb, .row_bytes = 3 * (size_t)w + 5, .width = w, .height = h};

    for (size_t i = 0; i < (size_t)h * view.row_bytes; i++)
        rgb[i] = (uint8_t)(i * 2654435761u >> 13);
    resize_to_tiles(&view, n_columns, n_rows, tile_w, tile_h, tiles);
    for (int c = 0; c < 3; c++) {
        for (int y = 0; y < h; y++)
            for (int x = 0; x < w; x++)
                a[y * w + x] = rgb[(size_t)y * view.row_bytes + (size_t)(3 * x + c)];
        pass(a, h, w, out_w, b);
        transpose(b, h, out_w, a);
        pass(a, out_w, h, out_h, b);
        transpose(b, out_w, out_h, a); // [out_h, out_w]
        for (int y = 0; y < out_h; y++) {
            for (int x = 0; x < out_w; x++) {
                int tile = y / tile_h * n_columns + x / tile_w;
                int got = tiles[((tile * 3 + c) * tile_h + y % tile_h) * tile_w + x % tile_w];

                if (got != a[y * out_w + x])
                    fail_msg("%d x %d to %d x %d: %d at %d, %d, expected %d", w, h, out_w, out_h,
                             got, x, y, a[y * out_w + x]);
            }
        }
    }
    free(tiles);
    free(b);
    free(a);
    free(rgb);
}

static void test_resize(void **state)
{
    (void)state;
    check_resize(1, 1, 2, 2, 28, 28);
    check_resize(28, 28, 1, 1, 28, 28);
    check_resize(28, 50, 1, 2, 28, 28);
    check_resize(57, 28, 1, 1, 28, 28);
    check_resize(100, 37, 3, 1, 28, 14);
    check_resize(33, 201, 1, 3, 17, 70);
    check_resize(301, 17, 2, 1, 65, 64);
    check_resize(3, 400, 1, 4, 28, 28);
}

/* One pixel by the largest side, and the other way round: bounded scratch, no overflow. */
static void test_resize_extremes(void **state)
{
    uint8_t *rgb = xcalloc(3, RESIZE_MAX_SIDE), *tiles = xcalloc(3 * 28 * 28, 4);

    (void)state;
    memset(rgb, 200, 3 * RESIZE_MAX_SIDE);
    for (int tall = 0; tall < 2; tall++) {
        const struct rgb_view view = {.rgb = rgb,
                                      .row_bytes = tall ? 3 : 3 * RESIZE_MAX_SIDE,
                                      .width = tall ? 1 : RESIZE_MAX_SIDE,
                                      .height = tall ? RESIZE_MAX_SIDE : 1};

        resize_to_tiles(&view, tall ? 1 : 4, tall ? 4 : 1, 28, 28, tiles);
        for (int i = 0; i < 3 * 28 * 28 * 4; i++)
            assert_in_range(tiles[i], 199, 201);
    }
    free(tiles);
    free(rgb);
}

static void test_tiling(void **state)
{
    int c, r;

    (void)state;
    tiling_choose(640, 360, 448, 448, 1, 12, &c, &r);
    assert_true(c == 2 && r == 1);
    tiling_choose(640, 360, 448, 448, 5, 4, &c, &r);
    assert_true(c == 1 && r == 1);
    assert_int_equal(tiling_n_tiles(1, 1, 1), 1);
    assert_int_equal(tiling_n_tiles(3, 2, 1), 7);
    assert_int_equal(tiling_n_tiles(3, 2, 0), 6);
}

static void test_exif(void **state)
{
    static const uint8_t little[] = {'I',  'I', 0x2a, 0, 8, 0, 0, 0, 1, 0, 0x12,
                                     0x01, 3,   0,    1, 0, 0, 0, 6, 0, 0, 0};
    static const uint8_t big[] = {'M',  'M', 0, 0x2a, 0, 0, 0, 8, 0, 1, 0x01,
                                  0x12, 0,   3, 0,    0, 0, 1, 0, 8, 0, 0};

    (void)state;
    assert_int_equal(exif_orientation(little, sizeof(little)), 6);
    assert_int_equal(exif_orientation(big, sizeof(big)), 8);
    for (size_t n = 0; n < 20; n++)
        assert_int_equal(exif_orientation(little, n < 19 ? n : 0), 1);
}

static int decode(const uint8_t *bytes, size_t n, struct error *err)
{
    struct image_info info;
    uint8_t *rgb;

    if (image_probe(bytes, n, MAX_PIXELS, &info, err) || image_decode(bytes, n, &info, &rgb, err))
        return -1;
    free(rgb);
    return 0;
}

/* Every cut of a file is refused with a sentence, and every single damaged byte does no harm. */
static void check_damage(uint8_t *bytes, size_t n, size_t n_tail)
{
    struct error err = {0};

    assert_int_equal(decode(bytes, n, &err), 0);
    for (size_t k = 0; k + n_tail < n; k++) {
        uint8_t *cut = xcalloc(k + 1, 1); // its own block, so that reading past it is seen

        memcpy(cut, bytes, k);
        err = (struct error){0};
        if (decode(cut, k, &err) == 0)
            fail_msg("%zu of %zu bytes were enough", k, n);
        assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
        assert_true(strlen(err.msg) > 10);
        free(cut);
    }
    for (size_t k = 0; k < n; k++) {
        bytes[k] ^= 0xff;
        decode(bytes, n, &err);
        bytes[k] ^= 0xff;
    }
    free(bytes);
}

static void test_damaged_pictures(void **state)
{
    size_t n;

    (void)state;
    uint8_t *png = checkpoint_png(13, 9, &n);

    check_damage(png, n, 16); // the last chunk, and the checksum before it, may be missing
    uint8_t *jpeg = checkpoint_jpeg(19, 17, 0, &n);

    check_damage(jpeg, n, 2); // the end marker may be missing
    jpeg = checkpoint_jpeg(19, 17, 1, &n);
    check_damage(jpeg, n, 2);
}

static void test_picture_limits(void **state)
{
    struct image_info info;
    struct error err = {0};
    size_t n;
    uint8_t *png = checkpoint_png(100, 90, &n);

    (void)state;
    assert_int_equal(image_probe(png, n, 9000, &info, &err), 0);
    assert_true(info.format == IMAGE_PNG && info.width == 100 && info.height == 90);
    assert_int_equal(image_probe(png, n, 8999, &info, &err), -1);
    assert_non_null(strstr(err.msg, "100 x 90"));
    png[16] = 0x40; // a width of a thousand million in the header, checksum wrong besides
    assert_int_equal(image_probe(png, n, MAX_PIXELS, &info, &err), -1);
    free(png);
    assert_int_equal(image_probe((const uint8_t *)"", 0, MAX_PIXELS, &info, &err), -1);
    assert_int_equal(image_probe((const uint8_t *)"BM......", 8, MAX_PIXELS, &info, &err), -1);
    assert_non_null(strstr(err.msg, "not a PNG"));
}

static void test_sampling(void **state)
{
    struct video_sampling s = {.num_frames = 4, .initial_shift = NAN};
    struct error err = {0};
    int64_t indices[16];

    (void)state;
    assert_int_equal(video_sample(&s, 16, 0, 16, indices, &err), 4);
    assert_true(indices[0] == 2 && indices[3] == 14);
    assert_int_equal(video_sample(&s, 16, 0, 3, indices, &err), -1);
    assert_int_equal(video_sample(&s, 3, 0, 16, indices, &err), -1);
    assert_int_equal(video_sample(&s, 0, 0, 16, indices, &err), -1);
    s = (struct video_sampling){.fps = 1, .initial_shift = 0};
    assert_int_equal(video_sample(&s, 20, 10, 16, indices, &err), 2);
    assert_int_equal(video_sample(&s, 20, 0, 16, indices, &err), -1); // the rate is not known
    s.fps = 1e300;
    assert_int_equal(video_sample(&s, 20, 10, 16, indices, &err), -1);
    s = (struct video_sampling){.num_frames = 2, .initial_shift = -1e300};
    assert_int_equal(video_sample(&s, 20, 10, 16, indices, &err), -1);
    s.initial_shift = 20;
    assert_int_equal(video_sample(&s, 20, 10, 16, indices, &err), -1);
    s = (struct video_sampling){.initial_shift = NAN};
    assert_int_equal(video_sample(&s, 16, 0, 16, indices, &err), 16);
    assert_int_equal(video_sample(&s, 17, 0, 16, indices, &err), -1);
}

static void test_not_a_video(void **state)
{
    static const struct video_limits limits = {
        .max_pixels = 1 << 20, .max_frames = 100, .max_seconds = 5};
    struct video_info info;
    struct error err = {0};

    (void)state;
    assert_null(video_open((const uint8_t *)"", 0, &limits, VIDEO_WHOLE, &info, &err));
    assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
    assert_null(video_open((const uint8_t *)"#EXTM3U\nhttp://127.0.0.1/x.ts\n", 30, &limits,
                           VIDEO_WHOLE, &info, &err)); // a playlist: its demuxer is not allowed
    video_close(NULL);
}

static int count_frame(void *arg, int k, const struct rgb_view *frame, struct error *err)
{
    int *n = arg;

    (void)err;
    assert_true(frame->width == 32 && frame->height == 16);
    assert_int_equal(k, (*n)++);
    return 0;
}

/* Small clips of every container; two of them do not say how many frames they have. Cut anywhere,
 * they are refused or end early, and no more. */
static void test_containers(void **state)
{
    static const struct {
        const char *file;
        int n_frames;
    } clips[] = {{"mpeg4.mp4", 4}, {"h264.mp4", 3}, {"mjpeg.avi", 2}, {"vp8.webm", 3}, {"gif", 3}};
    static const struct video_limits limits = {
        .max_pixels = 32 * 16, .max_frames = 4, .max_seconds = 20};
    static const struct video_limits small = {
        .max_pixels = 32 * 16 - 1, .max_frames = 4, .max_seconds = 20};
    static const struct video_limits few = {
        .max_pixels = 32 * 16, .max_frames = 1, .max_seconds = 20};
    static const int64_t indices[] = {0, 1, 2, 3};

    (void)state;
    for (size_t i = 0; i < sizeof(clips) / sizeof(clips[0]); i++) {
        static uint8_t bytes[1 << 16];
        char path[512];
        struct video_info info;
        struct error err = {0};
        int n_seen = 0;

        snprintf(path, sizeof(path), "%s/tests/fuzz/processor/corpus/video/%s",
                 INTERNVLD_SOURCE_DIR, clips[i].file);
        FILE *f = fopen(path, "rb");

        assert_non_null(f);
        size_t n = fread(bytes, 1, sizeof(bytes), f);

        fclose(f);
        struct video *v = video_open(bytes, n, &limits, VIDEO_WHOLE, &info, &err);

        if (!v)
            fail_msg("%s: %s", clips[i].file, err.msg);
        assert_int_equal(info.n_frames, clips[i].n_frames);
        assert_true(info.fps > 4.9 && info.fps < 5.1);
        if (video_read(v, indices, clips[i].n_frames, count_frame, &n_seen, &err))
            fail_msg("%s: %s", clips[i].file, err.msg);
        assert_int_equal(n_seen, clips[i].n_frames);
        video_close(v);
        assert_null(video_open(bytes, n, &small, VIDEO_WHOLE, &info, &err));
        assert_non_null(strstr(err.msg, "32 x 16"));
        assert_null(video_open(bytes, n, &few, VIDEO_WHOLE, &info, &err));
        assert_non_null(strstr(err.msg, "more than 1 frames"));
        for (size_t k = 0; k < n; k += 1 + n / 100) {
            n_seen = 0;
            v = video_open(bytes, k, &limits, VIDEO_WHOLE, &info, &err);
            if (v)
                video_read(v, indices, clips[i].n_frames, count_frame, &n_seen, &err);
            video_close(v);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resize),           cmocka_unit_test(test_resize_extremes),
        cmocka_unit_test(test_tiling),           cmocka_unit_test(test_exif),
        cmocka_unit_test(test_damaged_pictures), cmocka_unit_test(test_picture_limits),
        cmocka_unit_test(test_sampling),         cmocka_unit_test(test_not_a_video),
        cmocka_unit_test(test_containers),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
