/*
 * Codes of a quantised weight to the floats that a tile takes. Compiled once per instruction set
 * (CPU_EXPAND_OPS names the table it exports).
 *
 * A product with a quantised weight expands a few blocks of columns into the first-level cache and
 * runs the dense tile on them: the order of its sums is the dense one because it is the dense code.
 * Each value is computed as quantized_value() says, in the same roundings, at every vector width.
 */
#include "kernels/cpu_isa.h"
#include "kernels/cpu_simd.h"

/* Bytes of codes ahead of the loads. */
#define PREFETCH_BYTES 1024

typedef int8_t vb __attribute__((vector_size(VF_N)));
typedef uint8_t vub __attribute__((vector_size(VF_N)));
typedef int8_t vb_memory __attribute__((vector_size(VF_N), aligned(1), may_alias));
typedef uint8_t vub_memory __attribute__((vector_size(VF_N), aligned(1), may_alias));

/* How codes become numbers, before zero point and scale. */
enum decoding { DECODE_INT8, DECODE_INT8_127, DECODE_FP8, DECODE_TABLE };

ALWAYS_INLINE vi load_int8(const void *p)
{
    return __builtin_convertvector((vb)(*(const vb_memory *)p), vi);
}

/* The sign and the seven other bits of E4M3 put where float32 has its sign and lowest exponents,
 * so that also the denormals come out right; 2^120 is the difference of the two biases. */
ALWAYS_INLINE vf decode_fp8(vi code)
{
    vu u = (vu)code << 20;
    return (vf)(u & 0x87f00000u) * vf_set(0x1p120f);
}

/* table[index % 16] */
struct lookup {
#if VF_N == 16
    __m512 all;
#elif VF_N == 8
    __m256 lower, upper;
#else
    const float *table;
#endif
};

ALWAYS_INLINE struct lookup lookup_of(const float *table)
{
#if VF_N == 16
    return (struct lookup){_mm512_loadu_ps(table)};
#elif VF_N == 8
    return (struct lookup){_mm256_loadu_ps(table), _mm256_loadu_ps(table + 8)};
#else
    return (struct lookup){table};
#endif
}

ALWAYS_INLINE vf look_up(const struct lookup *l, vu index)
{
#if VF_N == 16
    return _mm512_permutexvar_ps((__m512i)index, l->all);
#elif VF_N == 8
    __m256i i = (__m256i)index;
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(l->lower, i),
                            _mm256_permutevar8x32_ps(l->upper, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
#else
    vu low = index & 15u;
    return (vf){l->table[low[0]], l->table[low[1]], l->table[low[2]], l->table[low[3]]};
#endif
}

ALWAYS_INLINE vf decode_8(const uint8_t *codes, const enum decoding d)
{
    vi code = load_int8(codes);
    return d == DECODE_FP8 ? decode_fp8(code) : __builtin_convertvector(code, vf);
}

/* Scale and zero point of the vector's columns in a group. */
struct grid {
    vf scale, zero;
};

ALWAYS_INLINE struct grid grid_of(const struct expansion *e, int64_t group, int column,
                                  const int has_zeros)
{
    struct grid g = {vf_load(e->scales + group * 16 + column), vf_set(0.0f)};
    if (has_zeros)
        g.zero = __builtin_convertvector(load_int8(e->zeros + group * 16 + column), vf);
    return g;
}

ALWAYS_INLINE vf scaled(vf v, const struct grid *g, const enum decoding d, const int has_zeros)
{
    if (has_zeros)
        v -= g->zero;
    v *= g->scale;
    return d == DECODE_INT8_127 ? v * vf_set(INT8_127_FACTOR) : v;
}

/* Finite values only; to the nearest, ties to even. Not used where the processor has this. */
__attribute__((unused)) ALWAYS_INLINE vu to_bf16_high(vf x)
{
    vu u = (vu)x;
    return (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
}

/* The pair (even, odd) of each of the vector's columns as bfloat16 side by side. */
ALWAYS_INLINE void store_pairs(uint16_t *dst, vf even, vf odd)
{
#if defined(__AVX512BF16__)
    const __m512i interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(interleave, both));
#else
    *(vu_memory *)dst = to_bf16_high(even) >> 16 | to_bf16_high(odd);
#endif
}

/* Everything but the pointers is a constant: one loop for each combination that is used. */
ALWAYS_INLINE void expand(void *dst, const struct expansion *e, const enum decoding d,
                          const int has_zeros, const int has_groups, const enum dtype to)
{
    const uint8_t *codes = e->codes;
    const struct lookup table = d == DECODE_TABLE ? lookup_of(e->table) : (struct lookup){0};
    struct grid even_grid[BLOCK_VECTORS], odd_grid[BLOCK_VECTORS];
    float *to_f32 = dst;
    uint16_t *to_bf16 = dst;
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK_VECTORS; i++)
        even_grid[i] = odd_grid[i] = grid_of(e, 0, i * VF_N, has_zeros);
    for (int64_t k = 0; k < e->n_k; k += 2) {
        const int is_pair = k + 1 < e->n_k;
        __builtin_prefetch(codes + PREFETCH_BYTES);
#pragma GCC unroll 4
        for (int i = 0; i < BLOCK_VECTORS; i++) {
            vf even, odd;
            if (has_groups) {
                even_grid[i] = grid_of(e, e->group_of[k], i * VF_N, has_zeros);
                odd_grid[i] = grid_of(e, e->group_of[k + is_pair], i * VF_N, has_zeros);
            }
            if (d == DECODE_TABLE) {
                vub byte = *(const vub_memory *)(codes + i * VF_N);
                vu u = __builtin_convertvector(byte, vu);
                even = look_up(&table, u);
                odd = look_up(&table, u >> 4);
            } else {
                even = decode_8(codes + i * VF_N, d);
                odd = decode_8(codes + 16 + i * VF_N, d);
            }
            even = scaled(even, &even_grid[i], d, has_zeros);
            odd = scaled(odd, &odd_grid[i], d, has_zeros);
            if (to == DTYPE_F32) {
                vf_store(to_f32 + i * VF_N, even);
                if (is_pair)
                    vf_store(to_f32 + 16 + i * VF_N, odd);
            } else {
                store_pairs(to_bf16 + i * 2 * VF_N, even, is_pair ? odd : vf_set(0.0f));
            }
        }
        codes += d == DECODE_TABLE ? 16 : 32;
        to_f32 += 32;
        to_bf16 += 32;
    }
}

ALWAYS_INLINE void expand_as(void *dst, const struct expansion *e, const enum decoding d,
                             const int has_zeros, const enum dtype to)
{
    if (e->group_of)
        expand(dst, e, d, has_zeros, 1, to);
    else
        expand(dst, e, d, has_zeros, 0, to);
}

ALWAYS_INLINE void expand_to(void *dst, const struct expansion *e, enum weight_format format,
                             const enum dtype to)
{
    switch (format) {
    case WEIGHT_INT8:
        return e->zeros ? expand_as(dst, e, DECODE_INT8, 1, to)
                        : expand_as(dst, e, DECODE_INT8, 0, to);
    case WEIGHT_INT8_127:
        return expand_as(dst, e, DECODE_INT8_127, 0, to);
    case WEIGHT_FP8:
        return expand_as(dst, e, DECODE_FP8, 0, to);
    default:
        return e->zeros ? expand_as(dst, e, DECODE_TABLE, 1, to)
                        : expand_as(dst, e, DECODE_TABLE, 0, to);
    }
}

static void run(void *dst, const struct expansion *e, enum weight_format format, enum dtype to)
{
    if (to == DTYPE_F32)
        expand_to(dst, e, format, DTYPE_F32);
    else
        expand_to(dst, e, format, DTYPE_BF16);
}

const struct cpu_expand_ops CPU_EXPAND_OPS = {.run = run};
