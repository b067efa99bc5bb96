/*
 * Codes of a quantised weight to the floats that a tile takes. Compiled once per instruction set
 * (CPU_EXPAND_OPS names the table it exports).
 *
 * A product with a quantised weight expands a few blocks of columns into the first-level cache and
 * runs the dense tile on them: the order of its sums is the dense one because it is the dense code.
 * A few rows, which would wait for that, are multiplied with codes as they are (cpu_multiply.c).
 */
#include "kernels/cpu_codes.h"

/* ---- expanding ---- */

/* Everything but the pointers is a constant: one loop for each combination that is used. dst takes
 * n_units whole units. */
ALWAYS_INLINE void expand_units(void *dst, const struct expansion *e, const uint8_t *codes,
                                int64_t first, int64_t n_units, const enum decoding d,
                                const int has_zeros, const int has_groups, const enum expand_to to)
{
    const int n_pairs = pairs_of_unit(d);
    const struct decoder f = decoder_of(e, d, has_zeros);
    struct grid even, odd;
    uint32_t *words = dst;
    grid_init(&even, e, 0, d, has_zeros);
    odd = even;
    for (int64_t i = 0; i < n_units; i++, codes += e->unit_bytes) {
        __builtin_prefetch(codes + PREFETCH_BYTES);
#pragma GCC unroll 4
        for (int p = 0; p < n_pairs; p++) {
            if (has_groups) {
                const int32_t *of = e->group_of + first + (i * n_pairs + p) * 2;
                grid_init(&even, e, of[0], d, has_zeros);
                grid_init(&odd, e, of[1], d, has_zeros);
            }
#pragma GCC unroll 4
            for (int v = 0; v < BLOCK_VECTORS; v++) {
                vu u = *(const vu_memory *)(codes + v * VF_N * 4);
                if (to == EXPAND_MULTIPLES) {
                    *(vu_memory *)(words + v * VF_N) =
                        multiples_pair(u, p, v, &f, &even, d, has_zeros);
                    continue;
                }
                vf x = value(u, p, 0, v, &f, &even, d), y = value(u, p, 1, v, &f, &odd, d);
                if (to == EXPAND_BF16) {
                    *(vu_memory *)(words + v * VF_N) = rounded_pair(x, y);
                } else {
                    *(vf_memory *)(words + v * VF_N) = x;
                    *(vf_memory *)(words + 16 + v * VF_N) = y;
                }
            }
            words += to == EXPAND_F32 ? 32 : 16;
        }
    }
}

/* Whole units straight to dst; what is left by way of a unit of its own, a missing odd k being 0.
 */
ALWAYS_INLINE void expand(void *dst, const struct expansion *e, const enum decoding d,
                          const int has_zeros, const int has_groups, const enum expand_to to)
{
    const int unit = 2 * pairs_of_unit(d); // k
    const int64_t n_units = e->n_k / unit, left = e->n_k % unit;
    const size_t element = to == EXPAND_F32 ? sizeof(float) : sizeof(uint16_t);
    expand_units(dst, e, e->codes, 0, n_units, d, has_zeros, has_groups, to);
    if (left == 0)
        return;
    float rest[8 * 16];
    char *end = (char *)dst + (size_t)(n_units * unit) * 16 * element;
    expand_units(rest, e, e->codes + n_units * e->unit_bytes, n_units * unit, 1, d, has_zeros,
                 has_groups, to);
    if (to == EXPAND_F32) {
        memcpy(end, rest, (size_t)left * 16 * element);
        return;
    }
    for (int j = 0; left % 2 && j < 16; j++)
        memset((char *)rest + (size_t)(left / 2 * 32 + 2 * j + 1) * element, 0, element);
    memcpy(end, rest, (size_t)((left + 1) / 2) * 32 * element);
}

ALWAYS_INLINE void expand_to(void *dst, const struct expansion *e, const enum decoding d,
                             const int has_zeros, const enum expand_to to)
{
    if (to == EXPAND_MULTIPLES)
        expand(dst, e, d, has_zeros, 0, EXPAND_MULTIPLES);
    else if (to == EXPAND_BF16 && e->group_of)
        expand(dst, e, d, has_zeros, 1, EXPAND_BF16);
    else if (to == EXPAND_BF16)
        expand(dst, e, d, has_zeros, 0, EXPAND_BF16);
    else if (e->group_of)
        expand(dst, e, d, has_zeros, 1, EXPAND_F32);
    else
        expand(dst, e, d, has_zeros, 0, EXPAND_F32);
}

ALWAYS_INLINE void expand_integers(void *dst, const struct expansion *e, const enum decoding d,
                                   const enum expand_to to)
{
    if (e->zeros)
        expand_to(dst, e, d, 1, to);
    else
        expand_to(dst, e, d, 0, to);
}

static void run(void *dst, const struct expansion *e, enum weight_format format, enum expand_to to)
{
    switch (format) {
    case WEIGHT_INT8:
        return expand_integers(dst, e, DECODE_INT8, to);
    case WEIGHT_INT8_127:
        return expand_to(dst, e, DECODE_INT8_127, 0, to);
    case WEIGHT_FP8:
        return expand_to(dst, e, DECODE_FP8, 0, to);
    case WEIGHT_INT4:
        return expand_integers(dst, e, DECODE_INT4, to);
    default:
        return expand_to(dst, e, DECODE_TABLE, 0, to);
    }
}

const struct cpu_expand_ops CPU_EXPAND_OPS = {.run = run};
