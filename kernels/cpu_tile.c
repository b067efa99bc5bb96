/*
 * The inner loop of every product: a few rows times a few blocks of sixteen columns, all sums in
 * registers. Compiled once per instruction set (CPU_TILE_OPS names the table it exports).
 *
 * Each sum runs over k in order in one accumulator, so the shape of the tile changes only how many
 * independent sums are in flight, never their bits. It knows no threads, lanes or layouts.
 */
#include "kernels/cpu_isa.h"
#include "kernels/cpu_simd.h"

/* Registers set the shape: 12 x 32 columns of 32 zmm, 6 x 16 of 16 ymm. */
#if VF_N == 16
#define MAX_ROWS 12
#elif VF_N == 8
#define MAX_ROWS 6
#else
#define MAX_ROWS 4
#endif

/* Few rows read b once and little else: more blocks at a time keep more of memory in flight. */
static int wide_blocks(int n_rows)
{
    if (VF_N == 16)
        return n_rows <= 4 ? 4 : 2;
    if (VF_N == 8)
        return n_rows == 1 ? 4 : n_rows == 2 ? 2 : 1;
    return 1;
}

static int blocks_at_once(int n_rows, int n_left)
{
    const int wide = wide_blocks(n_rows);
    return n_left >= wide ? wide : wide == 4 && n_left >= 2 ? 2 : 1;
}

ALWAYS_INLINE void load_block(vf *v, const void *b)
{
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK_VECTORS; i++)
        v[i] = vf_load((const float *)b + i * VF_N);
}

/* The even or the odd k of a pair. */
ALWAYS_INLINE void load_half_block(vf *v, const void *b, const int is_odd,
                                   const enum tile_source source)
{
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK_VECTORS; i++) {
        if (source == TILE_I8_PAIRS) {
            v[i] = vf_load_i8((const int8_t *)b + is_odd * 16 + i * VF_N);
            continue;
        }
        vu u = *(const vu_memory *)((const uint16_t *)b + i * 2 * VF_N);
        v[i] = is_odd ? (vf)(u & 0xffff0000u) : (vf)(u << 16);
    }
}

ALWAYS_INLINE void add_step(vf (*acc)[TILE_BLOCKS_MAX * BLOCK_VECTORS], const float *a,
                            int64_t a_row, const vf *v, int n_rows, int n_vectors)
{
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
        vf x = vf_set(a[r * a_row]);
#pragma GCC unroll 16
        for (int j = 0; j < n_vectors; j++)
            vf_add_product(&acc[r][j], x, v[j]);
    }
}

ALWAYS_INLINE void store_sums(float *c, int64_t c_row, vf (*acc)[TILE_BLOCKS_MAX * BLOCK_VECTORS],
                              const int n_rows, const int n_vectors)
{
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 16
        for (int j = 0; j < n_vectors; j++)
            vf_store(c + r * c_row + j * VF_N, acc[r][j]);
    }
}

ALWAYS_INLINE size_t element_bytes(const enum tile_source source)
{
    return source == TILE_F32          ? sizeof(float)
           : source == TILE_BF16_PAIRS ? sizeof(uint16_t)
                                       : sizeof(int8_t);
}

/* acc += a b of one part, from its block `first` on; returns a past the part. */
ALWAYS_INLINE const float *add_part(vf (*acc)[TILE_BLOCKS_MAX * BLOCK_VECTORS],
                                    const struct tile *t, const struct tile_part *part,
                                    const float *a, int first, const int n_rows, const int n_blocks,
                                    const enum tile_source source)
{
    const int n_vectors = n_blocks * BLOCK_VECTORS;
    const int64_t a_row = n_rows <= TILE_ROWS_APART ? t->a_row : 1;
    const size_t element = element_bytes(source);
    const size_t step_bytes = (size_t)t->b_step * element;
    const char *b[TILE_BLOCKS_MAX];
#pragma GCC unroll 16
    for (int i = 0; i < n_blocks; i++)
        b[i] = t->blocks ? t->blocks[first + i]
                         : (const char *)part->b + (size_t)((first + i) * t->b_block) * element;
    const char *ahead = t->ahead_step ? t->ahead : (const char *)a; // or what is there already
    for (int64_t k = 0; k < part->n_k; k++) {
        vf v[TILE_BLOCKS_MAX * BLOCK_VECTORS];
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead + LINE_BYTES, 0, 2);
        ahead += t->ahead_step;
#pragma GCC unroll 16
        for (int i = 0; i < n_blocks; i++) {
            if (source == TILE_F32)
                load_block(v + i * BLOCK_VECTORS, b[i]);
            else
                load_half_block(v + i * BLOCK_VECTORS, b[i], 1, source);
        }
        if (source != TILE_F32) {
            add_step(acc, a + t->a_step, a_row, v, n_rows, n_vectors);
            /* The pairs are loaded again: with both halves at once, sixteen registers do not do. */
            __asm__ volatile("" ::: "memory");
#pragma GCC unroll 16
            for (int i = 0; i < n_blocks; i++)
                load_half_block(v + i * BLOCK_VECTORS, b[i], 0, source);
        }
        add_step(acc, a, a_row, v, n_rows, n_vectors);
        a += source == TILE_F32 ? t->a_step : 2 * t->a_step;
#pragma GCC unroll 16
        for (int i = 0; i < n_blocks; i++)
            b[i] += step_bytes;
    }
    return a;
}

#if VF_N == 16
/* MXCSR <- mode, after all that was added to the sums and before all that will be: the compiler
 * does not know that arithmetic depends on it. */
ALWAYS_INLINE void set_mode(vf (*acc)[TILE_BLOCKS_MAX * BLOCK_VECTORS], unsigned mode,
                            const int n_rows, const int n_vectors)
{
#pragma GCC unroll 2
    for (int side = 0; side < 2; side++) {
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 16
            for (int j = 0; j < n_vectors; j++)
                __asm__ volatile("" : "+v"(acc[r][j])::"memory");
        }
        if (side == 0)
            _mm_setcsr(mode);
    }
}
#endif

/* c [n_rows] += the i-th run's scales * acc, which is 0 then. */
ALWAYS_INLINE void end_run(vf (*acc)[TILE_BLOCKS_MAX * BLOCK_VECTORS], const struct tile *t,
                           float *c, int first, int i, const int n_rows, const int n_blocks)
{
#if VF_N == 16
    if (t->runs->mode)
        set_mode(acc, t->runs->mode, n_rows, n_blocks);
#endif
#pragma GCC unroll 16
    for (int j = 0; j < n_blocks * BLOCK_VECTORS; j++) {
        const float *of_block =
            t->runs->scales + (first + j / BLOCK_VECTORS) * t->runs->scale_block + i * 16;
        vf scale = vf_load(of_block + j % BLOCK_VECTORS * VF_N) * t->runs->factor;
#pragma GCC unroll 16
        for (int r = 0; r < n_rows; r++) {
            float *to = c + r * t->c_row + j * VF_N;
            vf_store(to, vf_fma(scale, acc[r][j], vf_load(to)));
            acc[r][j] = vf_set(0.0f);
        }
    }
#if VF_N == 16
    if (t->runs->mode)
        set_mode(acc, t->runs->mode | MXCSR_FLUSH, n_rows, n_blocks);
#endif
}

/* Blocks [first, first + n_blocks). Unrolled whole, so that the sums are registers and not an
 * array. */
ALWAYS_INLINE void tile_run(const struct tile *t, int first, const int n_rows, const int n_blocks,
                            const enum tile_source source)
{
    const int n_vectors = n_blocks * BLOCK_VECTORS;
    float *c = t->c + first * 16;
    vf acc[MAX_ROWS][TILE_BLOCKS_MAX * BLOCK_VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < n_rows; r++) {
#pragma GCC unroll 16
        for (int j = 0; j < n_vectors; j++)
            acc[r][j] = t->accumulate ? vf_load(c + r * t->c_row + j * VF_N) : vf_set(0.0f);
    }
    const int in_runs = source == TILE_BF16_PAIRS && t->runs;
    if (in_runs)
        store_sums(c, t->c_row, acc, n_rows, n_vectors);
    const float *a = t->a;
    int64_t done = 0;
    for (int i = 0; t->parts ? i < t->n_parts : done < t->n_k; i++) {
        const struct tile_part part =
            tile_part_at(t, i, done, (size_t)t->b_step * element_bytes(source));
        a = add_part(acc, t, &part, a, first, n_rows, n_blocks, source);
        if (in_runs)
            end_run(acc, t, c, first, i, n_rows, n_blocks);
        done += part.n_k;
    }
    if (!in_runs)
        store_sums(c, t->c_row, acc, n_rows, n_vectors);
}

/* n_blocks as blocks_at_once() has it; what it never says for n_rows is not compiled. */
ALWAYS_INLINE void run_blocks(const struct tile *t, int first, const int n_rows, int n_blocks,
                              enum tile_source source)
{
    if (wide_blocks(n_rows) == 4 && n_blocks == 4)
        tile_run(t, first, n_rows, 4, source);
    else if (wide_blocks(n_rows) >= 2 && n_blocks == 2)
        tile_run(t, first, n_rows, 2, source);
    else
        tile_run(t, first, n_rows, 1, source);
}

/* One case a tile height, so that every loop above has constant bounds. */
ALWAYS_INLINE void run_rows(const struct tile *t, int first, int n_rows, int n_blocks,
                            enum tile_source source)
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
#if MAX_ROWS >= 6
    case 5:
        return run_blocks(t, first, 5, n_blocks, source);
    case 6:
        return run_blocks(t, first, 6, n_blocks, source);
#endif
#if MAX_ROWS >= 12
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
#endif
    }
}

static void run_f32(const struct tile *t, int first, int n_rows, int n_blocks)
{
    run_rows(t, first, n_rows, n_blocks, TILE_F32);
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
    for (int done = 0, step; done < n_blocks; done += step) {
        step = blocks_at_once(n_rows, n_blocks - done);
        if (source == TILE_F32 || source == TILE_F32_BF16)
            run_f32(t, done, n_rows, step);
        else if (source == TILE_BF16_PAIRS)
            run_bf16_pairs(t, done, n_rows, step);
        else
            run_i8_pairs(t, done, n_rows, step);
    }
}

const struct cpu_tile_ops CPU_TILE_OPS = {
    .max_rows = MAX_ROWS,
    .takes_bf16 = 0,
    .products_a_unit = VF_N / 4,
    .wide_blocks = wide_blocks,
    .run = run,
};
