/*
 * Quantised weights as CUDA holds them, and what one code is worth. Shared by cuda_quantized.cu,
 * which packs them and makes them dense, cuda_codes.cu, which multiplies them as they are, and
 * cuda_fp8.cu, which multiplies them with FP8; included by these alone.
 *
 * A packed weight: codes [out_dim] rows of row_bytes | scales [out_dim, n_groups] float32 | zeros
 * [out_dim, n_groups] int8 where it has any | what cuda_matmul.cu puts behind every weight.
 *
 * A row's codes are its lanes, of those that are summed apart, each of whole steps of STEP_BYTES
 * with zeros behind its last column. A step is dealt in units of UNIT columns to the four threads
 * that share a row in mma's fragments: thread q's 16 bytes are the step's units q, q + 4, …, so
 * that it reads them at once and the x beside them lies together for the four.
 *
 * cuBLASLt multiplies FP8 codes in that order as well (cuda_fp8.cu): x is brought into the same
 * one. It wants whole sixteens of rows, the last of them zeros.
 */
#ifndef INTERNVLD_KERNELS_CUDA_CODES_H
#define INTERNVLD_KERNELS_CUDA_CODES_H

#include "kernels/cuda_internal.h"

#define STEP_BYTES CUDA_STEP_BYTES
#define FP8_ROWS CUDA_FP8_ROWS
#define UNIT 8 // columns: 4 bytes of codes of 4 bits, the even column in the low half, or 8

enum code_kind { CODES_INT8, CODES_FP8, CODES_INT4, CODES_TABLE };

__host__ __device__ constexpr int unit_bytes_of(enum code_kind kind)
{
    return kind == CODES_INT8 || kind == CODES_FP8 ? UNIT : UNIT / 2;
}

/* What a kernel needs of a weight. */
struct codes {
    const uint8_t *codes;
    const float *scales;
    const int8_t *zeros;     // or NULL
    const int32_t *group_of; // or NULL
    enum code_kind kind;
    int64_t row_bytes;
    int n_rows; // that are held: out_dim, of FP8 rounded up to FP8_ROWS
    int out_dim, in_dim, n_groups, group_size, group_phase;
    int group_shift;                     // group_size = 1 << group_shift, or -1
    int groups_of_units;                 // 1: a unit's columns are all of one group
    int n_lanes;                         // sums of a row
    int lane_start[LANES_MAX + 1];       // columns
    int lane_at[LANES_MAX + 1];          // bytes
    float zero;                          // where zeros is NULL
    float factor;                        // of every scale
    float table[16];                     // of CODES_TABLE
    size_t scales_at, zeros_at, n_bytes; // of the packed weight
};

/* Of l, whose memory need not be there yet: pointers into it are then NULL. */
struct codes cuda_codes_of(const struct cuda_state *s, const struct linear *l);

/* Where a unit's codes lie behind its lane's first, in bytes. */
__host__ __device__ static inline int unit_at(int unit, int unit_bytes)
{
    int in_step = STEP_BYTES / unit_bytes, i = unit % in_step;

    return unit / in_step * STEP_BYTES + i % 4 * 16 + i / 4 * unit_bytes;
}

__device__ __forceinline__ int group_at(const struct codes &c, int k)
{
    if (c.group_of)
        return c.group_of[k];
    return c.group_shift >= 0 ? (k + c.group_phase) >> c.group_shift
                              : (k + c.group_phase) / c.group_size;
}

/* Columns [k, k + UNIT) of a row of x, of which `n` are there (0 or less: none); zeros behind
 * them. whole: a unit can be read at once. */
__device__ __forceinline__ uint4 unit_of_x(const bf16 *x, int n, int whole)
{
    uint32_t pairs[4] = {0, 0, 0, 0};

    if (whole && n >= UNIT)
        return *(const uint4 *)x;
#pragma unroll
    for (int i = 0; i < UNIT; i++)
        if (i < n)
            pairs[i / 2] |= (uint32_t)x[i].bits << i % 2 * 16;
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

/* 1 where every lane's units can be. */
static inline int units_are_whole(const struct codes &c, const bf16 *x, int64_t x_stride)
{
    int whole = ((uintptr_t)x | (uintptr_t)x_stride * sizeof(bf16)) % 16 == 0;

    for (int i = 0; i < c.n_lanes; i++)
        whole &= c.lane_start[i] % UNIT == 0;
    return whole;
}

struct scaling {
    float zero, scale;
};

__device__ __forceinline__ struct scaling scaling_at(const struct codes &c, int64_t row, int group)
{
    int64_t at = row * c.n_groups + group;

    return {c.zeros ? (float)c.zeros[at] : c.zero, c.scales[at]};
}

/* Its bits, with those of a denormal, are a float's of an exponent 120 too small. */
__device__ __forceinline__ float fp8_e4m3(uint32_t code)
{
    uint32_t magnitude = code & 0x7f;

    if (magnitude == 0x7f)
        return NAN;
    return __uint_as_float((code & 0x80) << 24 | magnitude << 20) * 0x1p120f;
}

/* quantized_value(), bit for bit. An integer is put into the mantissa of 2^23 and comes out of it
 * with its zero point: both steps are exact. */
template <enum code_kind KIND>
__device__ __forceinline__ float code_value(const struct codes &c, const float *table,
                                            uint32_t code, struct scaling s)
{
    const uint32_t two_23 = 0x4b000000;

    switch (KIND) {
    case CODES_INT8:
        return (__uint_as_float(two_23 | (code ^ 0x80)) - (0x1p23f + 128 + s.zero)) * s.scale *
               c.factor;
    case CODES_FP8:
        return fp8_e4m3(code) * s.scale;
    case CODES_INT4:
        return (__uint_as_float(two_23 | code) - (0x1p23f + s.zero)) * s.scale;
    default:
        return table[code] * s.scale;
    }
}

/* Runs the statements with KIND naming a constant. */
#define WITH_KIND(kind_, KIND, ...)                                                                \
    do {                                                                                           \
        switch (kind_) {                                                                           \
        case CODES_INT8: {                                                                         \
            const enum code_kind KIND = CODES_INT8;                                                \
            __VA_ARGS__;                                                                           \
        } break;                                                                                   \
        case CODES_FP8: {                                                                          \
            const enum code_kind KIND = CODES_FP8;                                                 \
            __VA_ARGS__;                                                                           \
        } break;                                                                                   \
        case CODES_INT4: {                                                                         \
            const enum code_kind KIND = CODES_INT4;                                                \
            __VA_ARGS__;                                                                           \
        } break;                                                                                   \
        case CODES_TABLE: {                                                                        \
            const enum code_kind KIND = CODES_TABLE;                                               \
            __VA_ARGS__;                                                                           \
        } break;                                                                                   \
        }                                                                                          \
    } while (0)

#endif
