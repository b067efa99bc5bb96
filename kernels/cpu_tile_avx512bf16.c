/*
 * The inner product of bfloat16 weights by vdpbf16ps: two products a column and step, float32 sums.
 *
 * The same tile as cpu_tile.c with both factors in bfloat16. The instruction adds the odd product,
 * then the even one, each rounded to nearest, and flushes denormals; cpu_tile.c keeps that order,
 * so the two agree but for denormals. Other sources go to the AVX-512 table.
 */
#include <immintrin.h>

#include "kernels/cpu_isa.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define MAX_ROWS 12

static int wide_blocks(int n_rows)
{
    return n_rows <= 4 ? 4 : 2;
}

/* Unrolled whole, so that the sums are registers and not an array. */
ALWAYS_INLINE void tile_run(const struct tile *t, const int n_rows, const int n_blocks)
{
    __m512 acc[MAX_ROWS][TILE_BLOCKS_MAX];
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 16
        for (int j = 0; j < n_blocks; j++)
            acc[r][j] =
                t->accumulate ? _mm512_loadu_ps(t->c + r * t->c_row + j * 16) : _mm512_setzero_ps();
    }
    const int32_t *a = t->a;
    const uint16_t *b = t->b;
    for (int64_t k = 0; k < t->n_k; k++) {
        __m512bh v[TILE_BLOCKS_MAX];
#pragma GCC unroll 16
        for (int j = 0; j < n_blocks; j++) {
            if (n_rows <= 4)
                __builtin_prefetch((const char *)(b + j * t->b_block) + t->prefetch_bytes);
            v[j] = (__m512bh)_mm512_loadu_si512(b + j * t->b_block);
        }
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; r++) {
            __m512bh x = (__m512bh)_mm512_set1_epi32(a[r]);
#pragma GCC unroll 16
            for (int j = 0; j < n_blocks; j++)
                acc[r][j] = _mm512_dpbf16_ps(acc[r][j], x, v[j]);
        }
        a += t->a_step;
        b += t->b_step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 16
        for (int j = 0; j < n_blocks; j++)
            _mm512_storeu_ps(t->c + r * t->c_row + j * 16, acc[r][j]);
    }
}

static void run_rows(const struct tile *t, int n_rows, int wide)
{
    switch (n_rows) {
    case 1:
        return wide ? tile_run(t, 1, 4) : tile_run(t, 1, 1);
    case 2:
        return wide ? tile_run(t, 2, 4) : tile_run(t, 2, 1);
    case 3:
        return wide ? tile_run(t, 3, 4) : tile_run(t, 3, 1);
    case 4:
        return wide ? tile_run(t, 4, 4) : tile_run(t, 4, 1);
    case 5:
        return wide ? tile_run(t, 5, 2) : tile_run(t, 5, 1);
    case 6:
        return wide ? tile_run(t, 6, 2) : tile_run(t, 6, 1);
    case 7:
        return wide ? tile_run(t, 7, 2) : tile_run(t, 7, 1);
    case 8:
        return wide ? tile_run(t, 8, 2) : tile_run(t, 8, 1);
    case 9:
        return wide ? tile_run(t, 9, 2) : tile_run(t, 9, 1);
    case 10:
        return wide ? tile_run(t, 10, 2) : tile_run(t, 10, 1);
    case 11:
        return wide ? tile_run(t, 11, 2) : tile_run(t, 11, 1);
    case 12:
        return wide ? tile_run(t, 12, 2) : tile_run(t, 12, 1);
    }
}

static void run(const struct tile *t, int n_rows, int n_blocks, enum tile_source source)
{
    if (source != TILE_BF16_PAIRS) {
        cpu_tile_avx512.run(t, n_rows, n_blocks, source);
        return;
    }
    const int wide = wide_blocks(n_rows);
    struct tile part = *t;
    for (int done = 0; done < n_blocks;) {
        int step = n_blocks - done >= wide ? wide : 1;
        run_rows(&part, n_rows, step > 1);
        part.b = (const uint16_t *)part.b + step * t->b_block;
        part.c += step * 16;
        done += step;
    }
}

const struct cpu_tile_ops cpu_tile_avx512bf16 = {
    .max_rows = MAX_ROWS,
    .takes_bf16 = 1,
    .wide_blocks = wide_blocks,
    .run = run,
};
