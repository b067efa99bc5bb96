/*
 * The left factor of the CPU's products, rounded and laid out as the tile takes it: the input of a
 * matmul, and the queries and probabilities of attention.
 */
#include <string.h>

#include "kernels/cpu_backend.h"

struct cpu_factor cpu_factor_of(int takes_bf16, enum dtype dtype)
{
    if (dtype == DTYPE_F32)
        return (struct cpu_factor){.source = TILE_F32, .step = 1, .words = 1};
    return (struct cpu_factor){.source = dtype == DTYPE_I8 ? TILE_I8_PAIRS : TILE_BF16_PAIRS,
                               .step = 2,
                               .words = takes_bf16 ? 1 : 2};
}

int64_t cpu_factor_rows(const struct cpu_vector_ops *vector, const struct cpu_factor *f,
                        uint32_t *dst, int64_t dst_row, const float *src, int64_t src_row,
                        int n_rows, int64_t n)
{
    const int64_t n_words = (n + f->step - 1) / f->step * f->words;
    for (int r = 0; r < n_rows; r++, dst += dst_row, src += src_row) {
        if (f->source == TILE_F32) {
            memcpy(dst, src, (size_t)n * sizeof(float));
            continue;
        }
        dst[n_words - 1] = 0;
        if (f->words == 1)
            vector->to_bf16((uint16_t *)dst, src, n);
        else
            vector->round_bf16((float *)dst, src, n);
    }
    return n_words;
}

int64_t cpu_factor_rows_bf16(const struct cpu_factor *f, uint32_t *dst, int64_t dst_row,
                             const uint16_t *src, int64_t src_row, int n_rows, int64_t n)
{
    const int64_t n_words = (n + f->step - 1) / f->step * f->words;
    for (int r = 0; r < n_rows; r++, dst += dst_row, src += src_row) {
        dst[n_words - 1] = 0;
        if (f->words == 1)
            memcpy(dst, src, (size_t)n * sizeof(*src));
        else
            tensor_widen((float *)dst, src, DTYPE_BF16, n);
    }
    return n_words;
}

/* ---- codes ---- */

#define CODES_TOGETHER 256 // columns, on the stack: whole units

static int64_t run_of(const struct cpu_codes *c, int64_t k)
{
    return k < c->first_run ? 0 : 1 + (k - c->first_run) / c->run;
}

/* Of columns [k, k + n) of a row. */
static void take_off(const struct cpu_integer_ops *integer, const struct cpu_codes *c,
                     int32_t *begins, int n_rows, const int8_t *codes, int64_t k, int64_t n)
{
    for (int64_t end = k + n, run_end; k < end; codes += run_end - k, k = run_end) {
        const int64_t run = run_of(c, k);
        run_end = smaller(end, c->first_run + run * c->run);
        begins[run * n_rows] -= integer->total(codes, run_end - k) * c->offset;
    }
}

void cpu_factor_codes(const struct cpu_state *s, const struct cpu_codes *c, const struct tensor *x,
                      int64_t row, int64_t column, int n_rows, int64_t n)
{
    int8_t codes[CODES_TOGETHER];
    uint32_t words[TILE_ROWS_MAX][CODES_TOGETHER / 2];
    const int unit = 32 / c->bits, unit_words = s->integer->unit_words(c->bits);
    memset(c->begins, 0, (size_t)(c->n_runs * n_rows) * sizeof(*c->begins));
    for (int r = 0; r < n_rows; r++)
        c->scales[r] = s->vector->code_scale(cpu_element(x, row + r, column), x->dtype, n);
    for (int64_t k = 0; k < n; k += CODES_TOGETHER) {
        const int64_t n_k = smaller(n - k, CODES_TOGETHER), n_units = (n_k + unit - 1) / unit;
        for (int r = 0; r < n_rows; r++) {
            s->vector->codes(codes, cpu_element(x, row + r, column + k), x->dtype, n_k,
                             c->scales[r]);
            s->integer->lay(words[r], codes, n_units, c->bits);
            take_off(s->integer, c, c->begins + r, n_rows, codes, k, n_k);
        }
        s->vector->transpose(c->words + k / unit * unit_words * n_rows, n_rows, words[0],
                             CODES_TOGETHER / 2, n_rows, n_units * unit_words);
    }
}

/* ---- places ---- */

struct cpu_factor_place cpu_factor_place(const struct cpu_vector_ops *vector, const uint32_t *rows,
                                         int64_t row_words, uint32_t *columns, int n_rows,
                                         int64_t n_words)
{
    if (n_rows <= TILE_ROWS_APART)
        return (struct cpu_factor_place){.a = rows, .a_step = 1, .a_row = row_words};
    vector->transpose(columns, TILE_ROWS_MAX, rows, row_words, (n_rows + 3) / 4 * 4, n_words);
    return (struct cpu_factor_place){.a = columns, .a_step = TILE_ROWS_MAX, .a_row = 1};
}
