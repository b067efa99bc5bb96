/*
 * The inner product of bfloat16 weights, or of codes that become such in registers, by vdpbf16ps:
 * two products a column and step, float32 sums.
 *
 * The same tile as cpu_tile.c with both factors in bfloat16. The instruction adds the odd product,
 * then the even one, each rounded to nearest, and flushes denormals; cpu_tile.c keeps that order,
 * so the two agree but for denormals. Other sources go to the AVX-512 table.
 *
 * Some processors do the instruction at half the rate of two float32 multiply-adds (Intel's of
 * 2023: one in two cycles, two multiply-adds in each). For those the second table here has the
 * AVX-512 tile, which flushes denormals too while it works: the same bits but for a NaN's.
 */
#include <immintrin.h>

#include "kernels/cpu_isa.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define MAX_ROWS 12

static int wide_blocks(int n_rows)
{
    return n_rows <= 4 ? 4 : 2;
}

/* A block of a pair of k. Floats of small integers have nothing in their lower halves. */
ALWAYS_INLINE __m512bh load_pairs(const char *b, const enum tile_source source)
{
    if (source == TILE_BF16_PAIRS)
        return (__m512bh)_mm512_loadu_si512(b);
    __m512i even = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u *)b));
    __m512i odd = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u *)(b + 16)));
    even = _mm512_srli_epi32((__m512i)_mm512_cvtepi32_ps(even), 16);
    return (__m512bh)_mm512_or_si512(even, (__m512i)_mm512_cvtepi32_ps(odd));
}

ALWAYS_INLINE int64_t element_bytes(const enum tile_source source)
{
    return source == TILE_BF16_PAIRS ? sizeof(uint16_t) : sizeof(int8_t);
}

ALWAYS_INLINE void store_sums(float *c, int64_t c_row, __m512 (*acc)[TILE_BLOCKS_MAX],
                              const int n_rows, const int n_blocks)
{
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 16
        for (int j = 0; j < n_blocks; j++)
            _mm512_storeu_ps(c + r * c_row + j * 16, acc[r][j]);
    }
}

/* c [n_rows] += the i-th run's scales * acc, which is 0 then. */
ALWAYS_INLINE void end_run(__m512 (*acc)[TILE_BLOCKS_MAX], const struct tile *t, float *c,
                           int first, int i, const int n_rows, const int n_blocks)
{
#pragma GCC unroll 16
    for (int j = 0; j < n_blocks; j++) {
        const float *scales = t->runs->scales + (first + j) * t->runs->scale_block + i * 16;
        __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(scales), _mm512_set1_ps(t->runs->factor));
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; r++) {
            float *to = c + r * t->c_row + j * 16;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(scale, acc[r][j], _mm512_loadu_ps(to)));
            acc[r][j] = _mm512_setzero_ps();
        }
    }
}

/* acc += a b of one part, from its block `first` on; returns a past the part. */
ALWAYS_INLINE const int32_t *add_part(__m512 (*acc)[TILE_BLOCKS_MAX], const struct tile *t,
                                      const struct tile_part *part, const int32_t *a, int first,
                                      const int n_rows, const int n_blocks,
                                      const enum tile_source source)
{
    const int64_t a_row = n_rows <= TILE_ROWS_APART ? t->a_row : 1;
    const int64_t element = element_bytes(source);
    const int64_t step_bytes = t->b_step * element;
    const char *b[TILE_BLOCKS_MAX];
#pragma GCC unroll 16
    for (int j = 0; j < n_blocks; j++)
        b[j] = t->blocks ? t->blocks[first + j]
                         : (const char *)part->b + (first + j) * t->b_block * element;
    const char *ahead[2]; // with nothing to fetch, what is there already
    int64_t ahead_step = t->ahead_step;
    for (int i = 0; i < 2; i++)
        ahead[i] = t->ahead_step ? t->ahead + i * LINE_BYTES : (const char *)a;
    if (n_rows > TILE_ROWS_APART && (t->blocks_ahead || part->ahead)) {
        ahead_step = step_bytes;
        for (int i = 0; i < 2; i++) {
            const int j = first + (i < n_blocks ? i : 0);
            ahead[i] = t->blocks_ahead ? t->blocks_ahead[j]
                                       : (const char *)part->ahead + j * t->b_block * element;
        }
    }
    for (int64_t k = 0; k < part->n_k; k++) {
        __m512bh v[TILE_BLOCKS_MAX];
        for (int i = 0; i < 2; i++) {
            __builtin_prefetch(ahead[i], 0, 2);
            ahead[i] += ahead_step;
        }
#pragma GCC unroll 16
        for (int j = 0; j < n_blocks; j++) {
            v[j] = load_pairs(b[j], source);
            b[j] += step_bytes;
        }
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; r++) {
            __m512bh x = (__m512bh)_mm512_set1_epi32(a[r * a_row]);
#pragma GCC unroll 16
            for (int j = 0; j < n_blocks; j++)
                acc[r][j] = _mm512_dpbf16_ps(acc[r][j], x, v[j]);
        }
        a += t->a_step;
    }
    return a;
}

/* Blocks [first, first + n_blocks). Unrolled whole, so that the sums are registers and not an
 * array. */
ALWAYS_INLINE void tile_run(const struct tile *t, int first, const int n_rows, const int n_blocks,
                            const enum tile_source source)
{
    float *c = t->c + first * 16;
    __m512 acc[MAX_ROWS][TILE_BLOCKS_MAX];
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 16
        for (int j = 0; j < n_blocks; j++)
            acc[r][j] =
                t->accumulate ? _mm512_loadu_ps(c + r * t->c_row + j * 16) : _mm512_setzero_ps();
    }
    const int in_runs = source == TILE_BF16_PAIRS && t->runs;
    if (in_runs)
        store_sums(c, t->c_row, acc, n_rows, n_blocks);
    const int32_t *a = t->a;
    int64_t done = 0;
    for (int i = 0; t->parts ? i < t->n_parts : done < t->n_k; i++) {
        const struct tile_part part =
            tile_part_at(t, i, done, (size_t)(t->b_step * element_bytes(source)));
        a = add_part(acc, t, &part, a, first, n_rows, n_blocks, source);
        if (in_runs)
            end_run(acc, t, c, first, i, n_rows, n_blocks);
        done += part.n_k;
    }
    if (!in_runs)
        store_sums(c, t->c_row, acc, n_rows, n_blocks);
}

/* n_blocks is 1, 2 or, of few rows, 4. */
ALWAYS_INLINE void run_blocks(const struct tile *t, int first, const int n_rows, int n_blocks,
                              const enum tile_source source)
{
    if (n_rows <= 4 && n_blocks == 4)
        tile_run(t, first, n_rows, 4, source);
    else if (n_blocks == 2)
        tile_run(t, first, n_rows, 2, source);
    else
        tile_run(t, first, n_rows, 1, source);
}

ALWAYS_INLINE void run_rows(const struct tile *t, int first, int n_rows, int n_blocks,
                            const enum tile_source source)
{
    switch (n_rows) {
    case 1:
        return run_blocks(t, first, 1, n_blocks, source);
    case 2:
        return run_blocks(t, first, 2, n_blocks, source);
    case 3:
        return run_blocks(t, first, 3, n_blocks, source);
    case 4:
        return run_blocks(t, first, 4, n_blocks, source);
    case 5:
        return run_blocks(t, first, 5, n_blocks, source);
    case 6:
        return run_blocks(t, first, 6, n_blocks, source);
    case 7:
        return run_blocks(t, first, 7, n_blocks, source);
    case 8:
        return run_blocks(t, first, 8, n_blocks, source);
    case 9:
        return run_blocks(t, first, 9, n_blocks, source);
    case 10:
        return run_blocks(t, first, 10, n_blocks, source);
    case 11:
        return run_blocks(t, first, 11, n_blocks, source);
    case 12:
        return run_blocks(t, first, 12, n_blocks, source);
    }
}

static void run_bf16_pairs(const struct tile *t, int first, int n_rows, int n_blocks)
{
    run_rows(t, first, n_rows, n_blocks, TILE_BF16_PAIRS);
}

static void run_i8_pairs(const struct tile *t, int first, int n_rows, int n_blocks)
{
    run_rows(t, first, n_rows, n_blocks, TILE_I8_PAIRS);
}

static void run(const struct tile *t, int n_rows, int n_blocks, enum tile_source source)
{
    if (source == TILE_F32) {
        cpu_tile_avx512.run(t, n_rows, n_blocks, source);
        return;
    }
    for (int done = 0, step; done < n_blocks; done += step) {
        int left = n_blocks - done;
        step = n_rows <= 4 && left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (source == TILE_BF16_PAIRS)
            run_bf16_pairs(t, done, n_rows, step);
        else
            run_i8_pairs(t, done, n_rows, step);
    }
}

const struct cpu_tile_ops cpu_tile_avx512bf16 = {
    .max_rows = MAX_ROWS,
    .takes_bf16 = 1,
    .products_a_unit = 8,
    .wide_blocks = wide_blocks,
    .run = run,
};

static void run_fma(const struct tile *t, int n_rows, int n_blocks, enum tile_source source)
{
    const unsigned mode = _mm_getcsr();
    struct tile flushed = *t;
    struct tile_runs runs;
    if (t->runs) {
        runs = *t->runs;
        runs.mode = mode;
        flushed.runs = &runs;
    }
    if (source != TILE_F32)
        _mm_setcsr(mode | MXCSR_FLUSH);
    cpu_tile_avx512.run(&flushed, n_rows, n_blocks, source);
    _mm_setcsr(mode);
}

const struct cpu_tile_ops cpu_tile_avx512bf16fma = {
    .max_rows = MAX_ROWS,
    .takes_bf16 = 0,
    .products_a_unit = 4,
    .wide_blocks = wide_blocks,
    .run = run_fma,
};
