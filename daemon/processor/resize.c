/*
 * Resizing in strips, so that a tall picture never needs its whole horizontally resized copy: rows
 * go through the horizontal pass STRIP at a time into a ring that holds what one output row of the
 * vertical pass reads. See resize.h for the recipe.
 *
 * The inner loops multiply 16-bit by 16-bit into 32 bits over contiguous memory, which the compiler
 * vectorises; they exist twice, for AVX2 and for any CPU, with the same integers as result.
 */
#include "daemon/processor/resize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

#define STRIP 16 // rows of one horizontal step
#define LANES (3 * STRIP)
#define MAX_PRECISION 22

struct axis { // one dimension: output i is a weighted sum of n_taps[i] inputs from first[i] on
    int n_in, n_out, precision, max_taps;
    int *first, *n_taps;
    int16_t *weights; // [n_out, max_taps]
};

static double cubic(double x)
{
    const double a = -0.5;

    x = fabs(x);
    if (x < 1)
        return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2)
        return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

static void axis_init(struct axis *x, int n_in, int n_out)
{
    double scale = (double)n_in / n_out, filter_scale = scale > 1 ? scale : 1;
    double support = 2 * filter_scale, largest = 0;

    *x = (struct axis){.n_in = n_in, .n_out = n_out, .max_taps = (int)ceil(support) * 2 + 2};
    x->first = xcalloc((size_t)n_out, sizeof(*x->first));
    x->n_taps = xcalloc((size_t)n_out, sizeof(*x->n_taps));
    x->weights = xcalloc((size_t)n_out * (size_t)x->max_taps, sizeof(*x->weights));
    double *w = xcalloc((size_t)n_out * (size_t)x->max_taps, sizeof(*w));

    for (int i = 0; i < n_out; i++) {
        double center = scale * (i + 0.5), total = 0;
        double *row = w + (size_t)i * (size_t)x->max_taps;
        int low = (int)(center - support + 0.5), high = (int)(center + support + 0.5);

        low = low > 0 ? low : 0;
        high = high < n_in ? high : n_in;
        x->first[i] = low;
        x->n_taps[i] = high - low;
        if (high - low > x->max_taps || high <= low)
            BUG("resize %d to %d: %d taps at %d", n_in, n_out, high - low, i);
        for (int k = 0; k < high - low; k++) {
            row[k] = cubic((k + low - center + 0.5) * (1.0 / filter_scale));
            total += row[k];
        }
        for (int k = 0; k < high - low; k++) {
            if (total != 0)
                row[k] /= total;
            largest = row[k] > largest ? row[k] : largest;
        }
    }
    while (x->precision < MAX_PRECISION &&
           (int)(0.5 + largest * (1 << (x->precision + 1))) < 1 << 15)
        x->precision++;
    for (size_t i = 0; i < (size_t)n_out * (size_t)x->max_taps; i++) {
        double v = w[i] * (1 << x->precision);

        x->weights[i] = (int16_t)(v < 0 ? v - 0.5 : v + 0.5); // half away from zero
    }
    free(w);
}

static void axis_release(struct axis *x)
{
    free(x->first);
    free(x->n_taps);
    free(x->weights);
}

static inline uint8_t to_byte(int32_t sum, int precision)
{
    int32_t v = sum >> precision;

    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef int16_t words16 __attribute__((vector_size(32)));

/* 16 rows of 16 bytes become 16 columns: four rounds, each of which deals row i and row i + 8 out
 * like two halves of a deck of cards. */
static inline __attribute__((always_inline)) void transpose(bytes16 rows[16])
{
    bytes16 dealt[16];

    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            dealt[2 * i] = __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19,
                                                   4, 20, 5, 21, 6, 22, 7, 23);
            dealt[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(rows, dealt, sizeof(dealt));
    }
}

/* Source rows in[STRIP] of n interleaved bytes to columns [n, STRIP]. */
static void columns_of(const uint8_t *const in[STRIP], int n, int16_t *columns)
{
    int j = 0;

    for (; j + 16 <= n; j += 16) {
        bytes16 block[16];

        for (int k = 0; k < STRIP; k++)
            memcpy(&block[k], in[k] + j, sizeof(block[k]));
        transpose(block);
        for (int k = 0; k < 16; k++) {
            words16 wide = __builtin_convertvector(block[k], words16);

            memcpy(columns + (size_t)(j + k) * STRIP, &wide, sizeof(wide));
        }
    }
    for (; j < n; j++)
        for (int k = 0; k < STRIP; k++)
            columns[(size_t)j * STRIP + (size_t)k] = in[k][j];
}

/* n_columns (at most 16) finished columns [16][3, STRIP] to rows of [3, n_out], from column i on.
 */
static inline __attribute__((always_inline)) void store_columns(const uint8_t done[16][LANES],
                                                                int n_columns, int i, int n_out,
                                                                int n_rows, uint8_t *const rows[])
{
    for (int c = 0; c < 3; c++) {
        bytes16 block[16];

        for (int k = 0; k < 16; k++)
            memcpy(&block[k], done[k] + c * STRIP, sizeof(block[k]));
        transpose(block);
        for (int r = 0; r < n_rows; r++)
            memcpy(rows[r] + (size_t)c * (size_t)n_out + (size_t)i, &block[r], (size_t)n_columns);
    }
}

/* One strip through the horizontal pass: columns [n_in, 3, STRIP] to rows [STRIP] of [3, n_out]. */
static inline __attribute__((always_inline)) void
horizontal_body(const struct axis *x, const int16_t *columns, int n_rows, uint8_t *const rows[])
{
    uint8_t done[16][LANES] = {0};

    for (int i = 0; i < x->n_out; i++) {
        const int16_t *w = x->weights + (size_t)i * (size_t)x->max_taps;
        const int16_t *in = columns + (size_t)x->first[i] * LANES;
        int32_t sum[LANES];

        for (int j = 0; j < LANES; j++)
            sum[j] = 1 << (x->precision - 1);
        for (int k = 0; k < x->n_taps[i]; k++, in += LANES)
            for (int j = 0; j < LANES; j++)
                sum[j] += w[k] * in[j];
        for (int j = 0; j < LANES; j++)
            done[i % 16][j] = to_byte(sum[j], x->precision);
        if (i % 16 == 15 || i + 1 == x->n_out)
            store_columns(done, i % 16 + 1, i - i % 16, x->n_out, n_rows, rows);
    }
}

#define BLOCK 64 // columns of one vertical step

/* One output segment of the vertical pass: n columns of rows[0 … n_taps), which start `offset`
 * bytes into each row. */
static inline __attribute__((always_inline)) void vertical_body(const int16_t *w, int n_taps,
                                                                int precision,
                                                                const uint8_t *const *rows,
                                                                size_t offset, int n, uint8_t *out)
{
    int j = 0;

    for (; j + BLOCK <= n; j += BLOCK) {
        int32_t sum[BLOCK];

        for (int l = 0; l < BLOCK; l++)
            sum[l] = 1 << (precision - 1);
        for (int k = 0; k < n_taps; k++) {
            const uint8_t *in = rows[k] + offset + j;

            for (int l = 0; l < BLOCK; l++)
                sum[l] += w[k] * (int16_t)in[l];
        }
        for (int l = 0; l < BLOCK; l++)
            out[j + l] = to_byte(sum[l], precision);
    }
    for (; j < n; j++) {
        int32_t sum = 1 << (precision - 1);

        for (int k = 0; k < n_taps; k++)
            sum += w[k] * rows[k][offset + (size_t)j];
        out[j] = to_byte(sum, precision);
    }
}

typedef void horizontal_fn(const struct axis *, const int16_t *, int, uint8_t *const[]);
typedef void vertical_fn(const int16_t *, int, int, const uint8_t *const *, size_t, int, uint8_t *);

static void horizontal_any(const struct axis *x, const int16_t *columns, int n_rows,
                           uint8_t *const rows[])
{
    horizontal_body(x, columns, n_rows, rows);
}

static void vertical_any(const int16_t *w, int n_taps, int precision, const uint8_t *const *rows,
                         size_t offset, int n, uint8_t *out)
{
    vertical_body(w, n_taps, precision, rows, offset, n, out);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void
horizontal_avx2(const struct axis *x, const int16_t *columns, int n_rows, uint8_t *const rows[])
{
    horizontal_body(x, columns, n_rows, rows);
}

__attribute__((target("avx2"))) static void vertical_avx2(const int16_t *w, int n_taps,
                                                          int precision, const uint8_t *const *rows,
                                                          size_t offset, int n, uint8_t *out)
{
    vertical_body(w, n_taps, precision, rows, offset, n, out);
}
#endif

static void choose_loops(horizontal_fn **horizontal, vertical_fn **vertical)
{
    *horizontal = horizontal_any;
    *vertical = vertical_any;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
        *horizontal = horizontal_avx2;
        *vertical = vertical_avx2;
    }
#endif
}

struct resizer {
    const struct rgb_view *source;
    struct axis x, y;
    int n_ring;       // rows of the ring: slot of source row r is r % n_ring
    int n_made;       // source rows [0, n_made) have been through the horizontal pass
    uint8_t *ring;    // [n_ring, 3, x.n_out]
    int16_t *columns; // [x.n_in, 3, STRIP]
    horizontal_fn *horizontal;
    vertical_fn *vertical;
};

static uint8_t *ring_row(const struct resizer *r, int row)
{
    return r->ring + (size_t)(row % r->n_ring) * 3 * (size_t)r->x.n_out;
}

static void make_strip(struct resizer *r)
{
    const struct rgb_view *s = r->source;
    int n = s->height - r->n_made < STRIP ? s->height - r->n_made : STRIP;
    const uint8_t *in[STRIP];
    uint8_t *rows[STRIP];

    for (int k = 0; k < STRIP; k++) { // the last strip repeats its last row
        int row = r->n_made + (k < n ? k : n - 1);

        in[k] = s->rgb + (size_t)row * s->row_bytes;
        rows[k] = ring_row(r, row);
    }
    if (r->x.n_in == r->x.n_out) { // no pass: only from interleaved to planar
        for (int k = 0; k < n; k++)
            for (int i = 0; i < r->x.n_out; i++)
                for (int c = 0; c < 3; c++)
                    rows[k][(size_t)c * (size_t)r->x.n_out + (size_t)i] = in[k][3 * i + c];
    } else {
        columns_of(in, 3 * r->x.n_in, r->columns);
        r->horizontal(&r->x, r->columns, n, rows);
    }
    r->n_made += n;
}

/* Output row y of the whole canvas, channel after channel, column of tiles after column. */
static void write_row(struct resizer *r, int y, const uint8_t **rows, int n_columns, int tile_width,
                      int tile_height, uint8_t *tiles)
{
    int same = r->y.n_in == r->y.n_out;
    int first = same ? y : r->y.first[y], n_taps = same ? 1 : r->y.n_taps[y];
    size_t plane = (size_t)tile_width * (size_t)tile_height;

    while (r->n_made < first + n_taps)
        make_strip(r);
    for (int k = 0; k < n_taps; k++)
        rows[k] = ring_row(r, first + k);
    for (int col = 0; col < n_columns; col++) {
        size_t tile = (size_t)(y / tile_height) * (size_t)n_columns + (size_t)col;

        for (int c = 0; c < 3; c++) {
            uint8_t *out = tiles + (tile * 3 + (size_t)c) * plane +
                           (size_t)(y % tile_height) * (size_t)tile_width;
            size_t offset = (size_t)c * (size_t)r->x.n_out + (size_t)col * (size_t)tile_width;

            if (same)
                memcpy(out, rows[0] + offset, (size_t)tile_width);
            else
                r->vertical(r->y.weights + (size_t)y * (size_t)r->y.max_taps, n_taps,
                            r->y.precision, rows, offset, tile_width, out);
        }
    }
}

void resize_to_tiles(const struct rgb_view *source, int n_columns, int n_rows, int tile_width,
                     int tile_height, uint8_t *tiles)
{
    struct resizer r = {.source = source};

    if (source->width < 1 || source->height < 1 || source->width > RESIZE_MAX_SIDE ||
        source->height > RESIZE_MAX_SIDE)
        BUG("resize of %d x %d pixels", source->width, source->height);
    axis_init(&r.x, source->width, n_columns * tile_width);
    axis_init(&r.y, source->height, n_rows * tile_height);
    choose_loops(&r.horizontal, &r.vertical);
    r.n_ring = r.y.max_taps + STRIP;
    r.ring = xcalloc((size_t)r.n_ring * 3, (size_t)r.x.n_out);
    r.columns = xcalloc((size_t)r.x.n_in, LANES * sizeof(*r.columns));
    const uint8_t **rows = xcalloc((size_t)r.y.max_taps, sizeof(*rows));

    for (int y = 0; y < r.y.n_out; y++)
        write_row(&r, y, rows, n_columns, tile_width, tile_height, tiles);
    free(rows);
    free(r.columns);
    free(r.ring);
    axis_release(&r.x);
    axis_release(&r.y);
}
