/*
 * Where the blocks of a product with codes lie, strip by strip, and what it fetches ahead.
 *
 * Included only by the files that are compiled once per instruction set and multiply codes as they
 * are (cpu_multiply.c, cpu_integer.c).
 */
#ifndef INTERNVLD_KERNELS_CPU_STRIP_H
#define INTERNVLD_KERNELS_CPU_STRIP_H

#include "kernels/cpu_isa.h"
#include "kernels/cpu_simd.h"

/* Blocks whose codes lie side by side: as many as a few rows take at once, which so read memory
 * from end to end. AVX2's rows take one or two, and wait for arithmetic. */
#define STRIP (VF_N == 16 ? 4 : 1)

ALWAYS_INLINE int n_strips_of(const int n_blocks)
{
    return (n_blocks + STRIP - 1) / STRIP;
}

/* Where block b's codes are, of the first one's. */
ALWAYS_INLINE const uint8_t *codes_of(const struct expand_product *m, const uint8_t *codes,
                                      const int b)
{
    return codes + b / STRIP * m->strip_bytes + b % STRIP * UNIT_BYTES;
}

/* The expansion of block b, from the `group`-th of the lane on. */
ALWAYS_INLINE struct expansion block_of(const struct expand_product *m, const struct expansion *e,
                                        int64_t group, int b)
{
    struct expansion at = *e;
    const int64_t strip = b / STRIP * m->strip_bytes, in_strip = b % STRIP;
    at.scales = e->scales + group * 16 + in_strip * m->scale_block + strip / (int64_t)sizeof(float);
    at.zeros = e->zeros ? e->zeros + group * 16 + in_strip * m->zero_block + strip : NULL;
    return at;
}

/* m and e <- those of their blocks from the b-th on. */
ALWAYS_INLINE void begin_with(struct expand_product *m, struct expansion *e, int b)
{
    const struct expansion of = block_of(m, e, 0, b);
    e->codes = codes_of(m, e->codes, b);
    e->scales = of.scales;
    e->zeros = of.zeros;
    m->c += b * 16;
}

/* What a product fetches at each unit: so many lines of each strip, so far ahead of the loads; to
 * the second-level cache where arithmetic takes less time than memory does, else to the first. */
struct fetching {
    int n_lines;
    int64_t n_bytes;
    int waits_for_memory;
};

ALWAYS_INLINE int lines_of(const int n_blocks)
{
    return n_blocks < STRIP ? 2 : STRIP;
}

/* What is read later than codes at `codes`, unit i of the lane's, after which `left` bytes of codes
 * are left in the strip, near its end of the strips after these; or what the caller asked for. */
ALWAYS_INLINE void fetch_ahead(const struct expand_product *m, const uint8_t *codes, int64_t left,
                               int64_t i, const int n_blocks, const struct fetching f)
{
    const int n_strips = n_strips_of(n_blocks);
    const char *ahead = m->ahead + i * m->ahead_step;
    if (!m->ahead) {
        ahead = (const char *)codes + f.n_bytes;
        if (left <= f.n_bytes)
            ahead += m->tail_bytes + (n_strips - 1) * m->strip_bytes;
    }
#pragma GCC unroll 4
    for (int k = 0; k < n_strips; k++, ahead += m->strip_bytes) {
#pragma GCC unroll 4
        for (int line = 0; line < f.n_lines; line++)
            prefetch(ahead + line * LINE_BYTES, f.waits_for_memory);
    }
}

#endif
