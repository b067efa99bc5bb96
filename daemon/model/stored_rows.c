/*
 * Rows of a quantised checkpoint's weight as the kernels' codes, scales and zero points
 * (stored_codes.h).
 *
 * Bits are moved, nothing is computed but bitsandbytes' nested scales: the values of a weight are
 * those of quantized_value().
 */
#include <math.h>

#include "daemon/model/stored_codes.h"
#include "kernels/log.h"

/* What is being read. */
struct reading {
    const struct stored_codes *c;
    struct range rows, columns;
    struct quantized *q;
    int64_t to; // the row of q that rows.start becomes
};

static uint32_t word(const struct safetensors_tensor *t, int64_t i)
{
    uint32_t w;
    memcpy(&w, t->data + (size_t)i * sizeof(w), sizeof(w));
    return w;
}

static float number(const struct safetensors_tensor *t, int64_t i)
{
    uint8_t aligned[4] __attribute__((aligned(4))) = {0};
    size_t size = dtype_size(t->dtype);
    float f;
    memcpy(aligned, t->data + (size_t)i * size, size);
    tensor_widen(&f, aligned, t->dtype, 1);
    return f;
}

/* Code `at` of those packed in word i. */
static uint8_t packed_code(const struct stored_codes *c, enum stored_part part, int64_t i,
                           int64_t at)
{
    return (uint8_t)(word(c->parts[part], i) >> (at * c->bits) & ((1u << c->bits) - 1));
}

/* Where AWQ keeps output j of eight, among the eight places of a word. */
static int awq_place(int64_t j)
{
    static const int places[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    return places[j % 8];
}

/* The kernels hold codes of 8 bits with a sign. */
static uint8_t held(const struct stored_codes *c, uint8_t code)
{
    return c->bits == 8 ? (uint8_t)(code - 128) : code;
}

/* ---- codes ---- */

/* AWQ and GPTQ keep inputs in rows: outputs that share a cache line are taken together. */
#define OUTPUTS_TOGETHER 128

static void read_transposed(const struct reading *r, int64_t first, int64_t end)
{
    const struct stored_codes *c = r->c;
    const struct safetensors_tensor *t = c->parts[STORED_CODES];
    const int64_t in_word = 32 / c->bits, start = r->columns.start;
    const int is_awq = c->layout == STORED_AWQ;
    const uint32_t mask = (1u << c->bits) - 1;
    int64_t
        at[OUTPUTS_TOGETHER]; // of each output: its word in the row of words, and its place there
    int shift[OUTPUTS_TOGETHER];
    for (int64_t n = first; n < end; n++) {
        at[n - first] = is_awq ? n / in_word : n;
        shift[n - first] = is_awq ? awq_place(n) * c->bits : 0;
    }
    for (int64_t k = start; k < start + r->columns.n; k++) {
        uint8_t *to = r->q->codes + (r->to + first - r->rows.start) * r->q->in_dim + k - start;
        int64_t row = is_awq ? k * (c->out_dim / in_word) : k / in_word * c->out_dim;
        int shift_of_row = is_awq ? 0 : (int)(k % in_word) * c->bits;
        for (int64_t j = 0; j < end - first; j++, to += r->q->in_dim)
            *to = held(c, (uint8_t)(word(t, row + at[j]) >> (shift_of_row + shift[j]) & mask));
    }
}

static void read_packed_row(const struct reading *r, int64_t n, uint8_t *to)
{
    const struct stored_codes *c = r->c;
    const int64_t in_word = 32 / c->bits, words = (c->in_dim + in_word - 1) / in_word;
    for (int64_t j = 0; j < r->columns.n; j++) {
        int64_t k = r->columns.start + j;
        to[j] = held(c, packed_code(c, STORED_CODES, n * words + k / in_word, k % in_word));
    }
}

static void read_bytes_row(const struct reading *r, int64_t n, uint8_t *to)
{
    const struct stored_codes *c = r->c;
    const struct safetensors_tensor *t = c->parts[STORED_CODES];
    memcpy(to, t->data + (size_t)(n * c->in_dim + r->columns.start), (size_t)r->columns.n);
    if (c->format != WEIGHT_FP8)
        return;
    int is_nan = 0;
    for (int64_t j = 0; j < r->columns.n; j++)
        is_nan |= (to[j] & 0x7f) == 0x7f;
    if (is_nan)
        die("%s: tensor %s: row %lld has a code that is not a number", t->file, t->name,
            (long long)n);
}

/* The first of two elements lies in the upper half of a byte. */
static void read_flat_row(const struct reading *r, int64_t n, uint8_t *to)
{
    const uint8_t *data = r->c->parts[STORED_CODES]->data;
    const int64_t first = n * r->c->in_dim + r->columns.start;
    for (int64_t j = 0; j < r->columns.n; j++) {
        uint8_t both = data[(first + j) / 2];
        to[j] = (first + j) % 2 ? both & 15 : both >> 4;
    }
}

static void read_codes(const struct reading *r)
{
    const enum stored_layout layout = r->c->layout;
    const int64_t end = r->rows.start + r->rows.n;
    for (int64_t n = r->rows.start, next; n < end; n = next) {
        uint8_t *to = r->q->codes + (r->to + n - r->rows.start) * r->q->in_dim;
        next = n + 1;
        if (layout == STORED_AWQ || layout == STORED_GPTQ) {
            next = n + OUTPUTS_TOGETHER < end ? n + OUTPUTS_TOGETHER : end;
            read_transposed(r, n, next);
        } else if (layout == STORED_PACKED) {
            read_packed_row(r, n, to);
        } else if (layout == STORED_BYTES) {
            read_bytes_row(r, n, to);
        } else {
            read_flat_row(r, n, to);
        }
    }
}

/* ---- scales and zero points ---- */

/* Of output n, in the group of column k, the `group`-th of a row. */
static float read_scale(const struct stored_codes *c, int64_t n, int64_t k, int64_t group)
{
    const struct safetensors_tensor *t = c->parts[STORED_SCALES];
    int64_t i = n / c->rows_per_scale * c->n_groups + group;
    if (c->layout == STORED_AWQ || c->layout == STORED_GPTQ)
        i = group * c->out_dim + n;
    if (c->layout == STORED_BITSANDBYTES)
        i = (n * c->in_dim + k) / c->group_size;
    if (!c->nested_group)
        return number(t, i);
    float of_group = number(c->parts[STORED_NESTED_SCALES], i / c->nested_group);
    return number(c->parts[STORED_NESTED_MAP], t->data[i]) * of_group + c->nested_offset;
}

static int8_t read_zero(const struct stored_codes *c, int64_t n, int64_t group)
{
    const int64_t in_word = 32 / c->bits, words = c->out_dim / in_word;
    const int largest = (1 << c->bits) - 1;
    uint8_t zero;
    switch (c->layout) {
    case STORED_AWQ:
        zero = packed_code(c, STORED_ZEROS, group * words + n / in_word, awq_place(n));
        break;
    case STORED_GPTQ:
        zero = packed_code(c, STORED_ZEROS, group * words + n / in_word, n % in_word);
        zero = (uint8_t)((zero + c->zeros_less_one) & largest);
        break;
    case STORED_PACKED:
        zero = packed_code(c, STORED_ZEROS, n / in_word * c->n_groups + group, n % in_word);
        break;
    default:
        return (int8_t)c->parts[STORED_ZEROS]->data[n / c->rows_per_scale * c->n_groups + group];
    }
    return (int8_t)held(c, zero);
}

static void read_groups(const struct reading *r, int64_t n)
{
    const struct stored_codes *c = r->c;
    const struct quantized *q = r->q;
    const int64_t row = r->to + n - r->rows.start;
    for (int64_t g = 0; g < q->n_groups; g++) {
        int64_t k = r->columns.start - q->group_phase + g * q->group_size;
        int64_t group = c->has_order ? g : k / q->group_size;
        float scale = read_scale(c, n, k, group);
        if (!isfinite(scale))
            die("%s: tensor %s: a scale of row %lld is not finite", c->parts[STORED_SCALES]->file,
                c->parts[STORED_SCALES]->name, (long long)n);
        q->scales[row * q->n_groups + g] = scale;
        if (q->zeros)
            q->zeros[row * q->n_groups + g] = read_zero(c, n, group);
    }
}

void stored_codes_rows(const struct stored_codes *c, struct range rows, struct range columns,
                       struct quantized *q, int64_t to)
{
    struct reading r = {c, rows, columns, q, to};
    read_codes(&r);
    for (int64_t n = rows.start; n < rows.start + rows.n; n++)
        read_groups(&r, n);
}
