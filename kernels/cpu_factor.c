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

struct cpu_factor_place cpu_factor_place(const struct cpu_vector_ops *vector, const uint32_t *rows,
                                         int64_t row_words, uint32_t *columns, int n_rows,
                                         int64_t n_words)
{
    if (n_rows <= TILE_ROWS_APART)
        return (struct cpu_factor_place){.a = rows, .a_step = 1, .a_row = row_words};
    vector->transpose(columns, TILE_ROWS_MAX, rows, row_words, (n_rows + 3) / 4 * 4, n_words);
    return (struct cpu_factor_place){.a = columns, .a_step = TILE_ROWS_MAX, .a_row = 1};
}
