/*
 * Parity of picture decoding, tiling, resizing and normalisation with Transformers: hashes of every
 * file of the reference, whole tensors of some, and the grid table.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <png.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/image.h"
#include "daemon/processor/processor.h"
#include "daemon/processor/resize.h"
#include "daemon/processor/tiling.h"
#include "kernels/log.h"
#include "tests/parity/processor/reference.h"

#define MAX_PIXELS ((int64_t)64 << 20)

struct picture {
    uint8_t *rgb;
    int width, height;
};

static struct picture load(const char *file)
{
    struct image_info info;
    struct picture p;
    struct error err = {0};
    char name[256];
    size_t n;

    snprintf(name, sizeof(name), "preprocess/images/%s", file);
    uint8_t *bytes = (uint8_t *)reference_read(name, &n);

    if (image_probe(bytes, n, MAX_PIXELS, &info, &err) ||
        image_decode(bytes, n, &info, &p.rgb, &err))
        fail_msg("%s: %s", file, err.msg);
    free(bytes);
    p.width = info.width;
    p.height = info.height;
    return p;
}

/* Hash of the planar form [3, height, width], as the reference stores pictures. */
static void planar_sha256(const struct picture *p, char hex[65])
{
    size_t n = (size_t)p->width * (size_t)p->height;
    uint8_t *plane = xcalloc(n, 1);
    struct sha256 s;

    sha256_init(&s);
    for (size_t c = 0; c < 3; c++) {
        for (size_t i = 0; i < n; i++)
            plane[i] = p->rgb[3 * i + c];
        sha256_update(&s, plane, n);
    }
    sha256_hex(&s, hex);
    free(plane);
}

/* The tiles of one setting, thumbnail included; caller frees. */
static uint8_t *cut(const struct picture *p, int tile_width, int tile_height, int n_columns,
                    int n_rows)
{
    const struct rgb_view view = {
        .rgb = p->rgb, .row_bytes = 3 * (size_t)p->width, .width = p->width, .height = p->height};
    size_t tile_bytes = 3 * (size_t)tile_width * (size_t)tile_height;
    int n = tiling_n_tiles(n_columns, n_rows, 1);
    uint8_t *tiles = xcalloc((size_t)n, tile_bytes);

    resize_to_tiles(&view, n_columns, n_rows, tile_width, tile_height, tiles);
    if (n > 1)
        resize_to_tiles(&view, 1, 1, tile_width, tile_height,
                        tiles + (size_t)(n_columns * n_rows) * tile_bytes);
    return tiles;
}

static const float mean[] = {0.485f * 255.0f, 0.456f * 255.0f, 0.406f * 255.0f};
static const float std[] = {0.229f * 255.0f, 0.224f * 255.0f, 0.225f * 255.0f};

static void hash_normalized(struct sha256 *s, const uint8_t *tiles, int n_tiles, size_t plane)
{
    float *x = xcalloc(plane, sizeof(*x));

    for (int t = 0; t < n_tiles; t++) {
        for (int c = 0; c < 3; c++) {
            for (size_t i = 0; i < plane; i++)
                x[i] = ((float)tiles[i] - mean[c]) / std[c];
            sha256_update(s, x, plane * sizeof(*x));
            tiles += plane;
        }
    }
    free(x);
}

static void check_result(const char *file, const struct picture *p, const cJSON *r)
{
    int tile = (int)json_number(r, "tile"), n_columns = 1, n_rows = 1;
    const cJSON *u8_sha = cJSON_GetObjectItemCaseSensitive(r, "u8_sha256");
    size_t plane = (size_t)tile * (size_t)tile;
    struct sha256 s;
    char hex[65];

    if (cJSON_IsTrue(json_item(r, "crop_to_patches")))
        tiling_choose(p->width, p->height, tile, tile, (int)json_number(r, "min_patches"),
                      (int)json_number(r, "max_patches"), &n_columns, &n_rows);
    assert_int_equal(n_columns, (int)json_number(r, "grid_columns"));
    assert_int_equal(n_rows, (int)json_number(r, "grid_rows"));
    int n = tiling_n_tiles(n_columns, n_rows, 1);

    assert_int_equal(n, (int)json_number(r, "tiles"));
    if (!u8_sha)
        return; // 16-bit source: the reference normalises uint16 there (its defect)
    uint8_t *tiles = cut(p, tile, tile, n_columns, n_rows);

    sha256_init(&s);
    sha256_update(&s, tiles, (size_t)n * 3 * plane);
    sha256_hex(&s, hex);
    if (strcmp(hex, u8_sha->valuestring))
        fail_msg("%s: tile %d, %d x %d: other bytes", file, tile, n_columns, n_rows);
    if (tile == 112) { // hashing four times the bytes of the large tiles would prove nothing more
        sha256_init(&s);
        hash_normalized(&s, tiles, n, plane);
        sha256_hex(&s, hex);
        if (strcmp(hex, json_string(r, "f32_sha256")))
            fail_msg("%s: tile %d, %d x %d: other normalised values", file, tile, n_columns,
                     n_rows);
    }
    free(tiles);
}

/* libpng's own 16-bit samples, to tie our high bytes to the reference's uint16 hash. */
static void check_high_bytes(const char *file, const struct picture *p, const char *want)
{
    char name[256], hex[65];
    size_t n_bytes, n = (size_t)p->width * (size_t)p->height;

    snprintf(name, sizeof(name), "preprocess/images/%s", file);
    char *bytes = reference_read(name, &n_bytes);
    FILE *f = fmemopen(bytes, n_bytes, "rb");
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    uint16_t *samples = xcalloc(3 * n, sizeof(*samples));
    png_bytep *rows = xcalloc((size_t)p->height, sizeof(*rows));
    struct sha256 s;

    for (int y = 0; y < p->height; y++)
        rows[y] = (png_bytep)(samples + 3 * (size_t)y * (size_t)p->width);
    png_init_io(png, f);
    png_read_info(png, info);
    png_set_gray_to_rgb(png);
    png_set_swap(png);
    png_read_update_info(png, info);
    png_read_image(png, rows);
    sha256_init(&s);
    for (size_t c = 0; c < 3; c++) {
        uint16_t *plane = xcalloc(n, sizeof(*plane));

        for (size_t i = 0; i < n; i++) {
            plane[i] = samples[3 * i + c];
            assert_int_equal(p->rgb[3 * i + c], plane[i] >> 8);
        }
        sha256_update(&s, plane, n * sizeof(*plane));
        free(plane);
    }
    sha256_hex(&s, hex);
    assert_string_equal(hex, want);
    png_destroy_read_struct(&png, &info, NULL);
    fclose(f);
    free(rows);
    free(samples);
    free(bytes);
}

static void test_images(void **state)
{
    int n_results = 0, n_files = 0;

    (void)state;
    if (!reference_has("preprocess/images.json"))
        skip();
    cJSON *rows = reference_json("preprocess/images.json");
    const cJSON *row, *r;

    cJSON_ArrayForEach(row, rows)
    {
        const char *file = json_string(row, "file");
        const cJSON *tensor = json_item(json_item(row, "decode"), "tensor");
        char hex[65], name[256];

        snprintf(name, sizeof(name), "preprocess/images/%s", file);
        if (!reference_has(name))
            continue;
        if (cJSON_GetObjectItemCaseSensitive(tensor, "error")) { // BMP: refused there and here
            struct image_info info;
            struct error err = {0};
            size_t n;
            char *bytes = reference_read(name, &n);

            assert_int_equal(image_probe((uint8_t *)bytes, n, MAX_PIXELS, &info, &err), -1);
            assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
            free(bytes);
            continue;
        }
        struct picture p = load(file);

        assert_int_equal(p.width, (int)json_number(tensor, "width"));
        assert_int_equal(p.height, (int)json_number(tensor, "height"));
        planar_sha256(&p, hex);
        if (strcmp(json_string(tensor, "dtype"), "uint8"))
            check_high_bytes(file, &p, json_string(tensor, "sha256"));
        else if (strcmp(hex, json_string(tensor, "sha256")))
            fail_msg("%s: other pixels", file);
        cJSON_ArrayForEach(r, json_item(row, "results"))
        {
            check_result(file, &p, r);
            n_results++;
        }
        free(p.rgb);
        n_files++;
    }
    printf("preprocess/images.json: %d files decoded equal, %d tilings equal\n", n_files,
           n_results);
    cJSON_Delete(rows);
}

/* Whole tensors: where a hash above differs, this says by how much. */
static void test_tensors(void **state)
{
    static const char *const files[] = {"preprocess/tiles112_u8.safetensors",
                                        "preprocess/tiles448_u8.safetensors"};
    int n = 0;

    (void)state;
    if (!reference_has("preprocess/images.json"))
        skip();
    cJSON *rows = reference_json("preprocess/images.json");
    const cJSON *row;

    for (int k = 0; k < 2; k++) {
        if (!reference_has(files[k]))
            continue;
        cJSON_ArrayForEach(row, rows)
        {
            int64_t shape[8];
            size_t n_bytes;
            const char *file = json_string(row, "file");
            uint8_t *want = reference_tensor(files[k], file, shape, &n_bytes);
            int tile = k ? 448 : 112, n_columns, n_rows, worst = 0;

            if (!want)
                continue;
            struct picture p = load(file);

            tiling_choose(p.width, p.height, tile, tile, 1, 12, &n_columns, &n_rows);
            uint8_t *tiles = cut(&p, tile, tile, n_columns, n_rows);

            for (size_t i = 0; i < n_bytes; i++) {
                int d = abs(tiles[i] - want[i]);

                worst = d > worst ? d : worst;
            }
            if (worst)
                fail_msg("%s: %s differs by up to %d", files[k], file, worst);
            free(tiles);
            free(p.rgb);
            free(want);
            n++;
        }
    }
    cJSON_Delete(rows);
    printf("preprocess/tiles*_u8: %d pictures equal\n", n);
}

/* processor_mean() and processor_std() of a real checkpoint give the reference's pixel_values. */
static void test_normalisation(void **state)
{
    static const struct processor_model model = {.image_token_id = 1204,
                                                 .image_seq_length = 16,
                                                 .n_channels = 3,
                                                 .image_height = 112,
                                                 .image_width = 112};
    struct processor_limits limits = processor_limits_default();
    struct error err = {0};

    (void)state;
    if (!reference_has("checkpoints/ln-1b-style/tokenizer.json"))
        skip();
    struct processor *p =
        processor_open(reference_path("checkpoints/ln-1b-style"), &model, &limits, &err);

    if (!p)
        fail_msg("%s", err.msg);
    for (int c = 0; c < 3; c++) {
        assert_true(processor_mean(p)[c] == mean[c]);
        assert_true(processor_std(p)[c] == std[c]);
    }
    processor_close(p);
    if (!reference_has("preprocess/tiles112_f32.safetensors"))
        return;
    cJSON *rows = reference_json("preprocess/images.json");
    const cJSON *row;
    int n = 0;

    cJSON_ArrayForEach(row, rows)
    {
        int64_t shape[8];
        size_t n_f32, n_u8;
        const char *file = json_string(row, "file");
        float *want = (float *)(void *)reference_tensor("preprocess/tiles112_f32.safetensors", file,
                                                        shape, &n_f32);
        uint8_t *u8 =
            want ? reference_tensor("preprocess/tiles112_u8.safetensors", file, shape, &n_u8)
                 : NULL;
        size_t plane = 112 * 112;

        for (size_t i = 0; u8 && i < n_u8; i++) {
            size_t c = i / plane % 3;

            if (((float)u8[i] - mean[c]) / std[c] != want[i])
                fail_msg("%s: value %zu is not equal", file, i);
        }
        n += u8 != NULL;
        free(want);
        free(u8);
    }
    printf("preprocess/tiles112_f32: %d pictures equal\n", n);
    cJSON_Delete(rows);
}

static void test_batch(void **state)
{
    static const char *const names[] = {"batch", "batch_rect"};

    (void)state;
    if (!reference_has("preprocess/summary.json"))
        skip();
    cJSON *root = reference_json("preprocess/summary.json");

    for (int k = 0; k < 2; k++) {
        const cJSON *b = json_item(root, names[k]), *f;
        int w = (int)json_number(b, k ? "tile_width" : "tile");
        int h = (int)json_number(b, k ? "tile_height" : "tile");
        struct sha256 s;
        char hex[65];

        sha256_init(&s);
        cJSON_ArrayForEach(f, json_item(b, "files"))
        {
            struct picture p = load(f->valuestring);
            int n_columns, n_rows;

            tiling_choose(p.width, p.height, w, h, 1, (int)json_number(b, "max_patches"),
                          &n_columns, &n_rows);
            uint8_t *tiles = cut(&p, w, h, n_columns, n_rows);

            hash_normalized(&s, tiles, tiling_n_tiles(n_columns, n_rows, 1), (size_t)w * (size_t)h);
            free(tiles);
            free(p.rgb);
        }
        sha256_hex(&s, hex);
        assert_string_equal(hex, json_string(b, "f32_sha256"));
    }
    cJSON_Delete(root);
}

struct grid_case {
    int tile_width, tile_height, min, max, width, height, n_columns, n_rows;
};

static void check_grid(const struct grid_case *g)
{
    int n_columns, n_rows;

    tiling_choose(g->width, g->height, g->tile_width, g->tile_height, g->min, g->max, &n_columns,
                  &n_rows);
    if (n_columns != g->n_columns || n_rows != g->n_rows)
        fail_msg("%d x %d with %d to %d: %d x %d, expected %d x %d", g->width, g->height, g->min,
                 g->max, n_columns, n_rows, g->n_columns, g->n_rows);
}

static int item_int(const cJSON *list, int i)
{
    return (int)cJSON_GetArrayItem(list, i)->valuedouble;
}

static void test_grids(void **state)
{
    int n = 0;

    (void)state;
    if (!reference_has("preprocess/grids.json"))
        skip();
    cJSON *root = reference_json("preprocess/grids.json");
    const cJSON *table, *c;

    cJSON_ArrayForEach(table, json_item(root, "tables"))
    {
        int square = cJSON_HasObjectItem(table, "tile");

        cJSON_ArrayForEach(c, json_item(table, "cases_width_height_columns_rows"))
        {
            check_grid(&(struct grid_case){
                .tile_width = (int)json_number(table, square ? "tile" : "tile_width"),
                .tile_height = (int)json_number(table, square ? "tile" : "tile_height"),
                .min = (int)json_number(table, "min_patches"),
                .max = (int)json_number(table, "max_patches"),
                .width = item_int(c, 0),
                .height = item_int(c, 1),
                .n_columns = item_int(c, 2),
                .n_rows = item_int(c, 3)});
            n++;
        }
    }
    cJSON_ArrayForEach(c, json_item(root, "unusual_limits"))
    {
        check_grid(&(struct grid_case){.tile_width = 448,
                                       .tile_height = 448,
                                       .min = (int)json_number(c, "min_patches"),
                                       .max = (int)json_number(c, "max_patches"),
                                       .width = item_int(json_item(c, "size"), 0),
                                       .height = item_int(json_item(c, "size"), 1),
                                       .n_columns = item_int(json_item(c, "columns_rows"), 0),
                                       .n_rows = item_int(json_item(c, "columns_rows"), 1)});
        n++;
    }
    cJSON_Delete(root);
    printf("preprocess/grids.json: %d grids equal\n", n);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grids),   cmocka_unit_test(test_images),
        cmocka_unit_test(test_tensors), cmocka_unit_test(test_normalisation),
        cmocka_unit_test(test_batch),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
