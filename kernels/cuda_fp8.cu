/*
 * Products of FP8 codes with FP8 codes: x is rounded to E4M3 (kernels/quantized.h, x_format) by one
 * kernel, cuBLASLt multiplies it with the weight's codes, a lane at a time, into float32, and one
 * more kernel applies the scales, adds the lanes by the tree and does what follows.
 *
 * The codes of x lie as those of the weight, whose layout (cuda_codes.h) is a permutation of a
 * lane's columns with zeros behind them: a lane is one product of whole steps, aligned as cuBLASLt
 * wants it, whatever its columns.
 *
 * Batch and layout invariance are cuda_matmul.cu's: one algorithm for any number of rows. A scale
 * of x is of a row and a lane, and is applied to the lane's own sum before the tree, so that
 * shards, which have whole lanes, come to the same bits. cuBLASLt's fast accumulation stays off.
 */
#include "kernels/cuda_codes.h"

#define E4M3_MAX 448.0f

/* ---- x to codes ---- */

/* The nearest code, ties to even, of the largest where x is above it; a NaN stays one. */
__device__ __forceinline__ uint32_t fp8_code(float x)
{
    uint32_t sign = __float_as_uint(x) >> 24 & 0x80;
    float magnitude = fminf(fabsf(x), E4M3_MAX);
    uint32_t bits = __float_as_uint(magnitude);

    if (x != x)
        return 0x7f;
    if (magnitude < 0x1p-6f) // steps of 2^-9, which are those of a float behind 2^14
        return sign | (__float_as_uint(magnitude + 0x1p14f) - __float_as_uint(0x1p14f));
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

__device__ __forceinline__ void unit_floats(float v[UNIT], uint4 pairs)
{
    const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};

#pragma unroll
    for (int i = 0; i < UNIT; i++)
        v[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
}

/* codes [n_rows, row_bytes], scales [lanes, n_rows] <- x; a block has a lane of a row. */
__global__ void quantize_kernel(uint8_t *codes, float *scales, const bf16 *x, int64_t x_stride,
                                struct codes c, int whole)
{
    int row = blockIdx.x, lane = blockIdx.y, start = c.lane_start[lane];
    int n = c.lane_start[lane + 1] - start,
        n_units = (c.lane_at[lane + 1] - c.lane_at[lane]) / UNIT;
    uint8_t *to = codes + row * c.row_bytes + c.lane_at[lane];
    float v[UNIT], largest = 0;

    x += row * x_stride + start;
    for (int u = threadIdx.x; u < n_units; u += blockDim.x) {
        unit_floats(v, unit_of_x(x + u * UNIT, n - u * UNIT, whole));
#pragma unroll
        for (int i = 0; i < UNIT; i++)
            largest = fmaxf(largest, fabsf(v[i]));
    }
    float scale = fmaxf(block_max(largest) / E4M3_MAX, 0x1p-126f);
    for (int u = threadIdx.x; u < n_units; u += blockDim.x) {
        uint32_t words[2] = {0, 0};
        unit_floats(v, unit_of_x(x + u * UNIT, n - u * UNIT, whole));
#pragma unroll
        for (int i = 0; i < UNIT; i++)
            words[i / 4] |= fp8_code(v[i] / scale) << i % 4 * 8;
        *(uint2 *)(to + unit_at(u, UNIT)) = {words[0], words[1]};
    }
    if (threadIdx.x == 0)
        scales[(int64_t)lane * gridDim.x + row] = scale;
}

/* ---- sums to y ---- */

struct lane_sums {
    const float *sums;                // [lanes, n_rows, n_outs]
    const float *x_scales, *w_scales; // [lanes, n_rows], [out_dim]
    int64_t n_rows, n_outs;
};

/* N lanes from `lane` on, each with its scales, by the tree. */
template <int N>
__device__ __forceinline__ float tree_of_lanes(const struct lane_sums &s, int64_t row, int out,
                                               int lane)
{
    int64_t at = lane * s.n_rows + row;

    if (N == 1)
        return s.sums[at * s.n_outs + out] * s.x_scales[at] * s.w_scales[out];
    return tree_of_lanes<(N + 1) / 2>(s, row, out, lane) +
           tree_of_lanes<(N + 1) / 2>(s, row, out, lane + N / 2);
}

/* y <- of the sums and what follows; one block a row. */
template <int N, class T>
__global__ void finish_kernel(T *y, struct lane_sums s, int out_dim, struct finish f)
{
    for (int out = threadIdx.x; out < out_dim; out += blockDim.x)
        finish_sum<true>(y, f, blockIdx.x, out, tree_of_lanes<N>(s, blockIdx.x, out, 0));
}

template <int N>
static void finish_lanes(struct cuda_state *s, const struct codes_product *p,
                         const struct lane_sums &sums, int out_dim)
{
    WITH_TYPE(p->type_y, T,
              LAUNCH((finish_kernel<N, T>), dim3((unsigned)p->n_rows), dim3(256), 0, s->stream,
                     (T *)p->y, sums, out_dim, p->finish));
}

/* ---- the product ---- */

size_t cuda_fp8_row_bytes(const struct cuda_state *s, const struct linear *l)
{
    const struct codes c = cuda_codes_of(s, l);

    return (size_t)c.row_bytes + (size_t)c.n_lanes * (1 + (size_t)c.n_rows) * sizeof(float);
}

static void multiply_lanes(struct cuda_state *s, const struct codes &c, const uint8_t *x,
                           float *sums, int64_t n_rows)
{
    struct product p = {};

    p.m = n_rows;
    p.n = p.n_whole = p.ld_y = c.n_rows;
    p.ld_w = p.ld_x = c.row_bytes;
    p.type = DTYPE_F8_E4M3;
    p.type_y = DTYPE_F32;
    for (int lane = 0; lane < c.n_lanes; lane++) {
        p.k = c.lane_at[lane + 1] - c.lane_at[lane];
        p.w = c.codes + c.lane_at[lane];
        p.x = x + c.lane_at[lane];
        p.y = sums + lane * n_rows * c.n_rows;
        if (p.k > 0)
            cuda_blas_multiply(s, &p);
        else
            CUDA_CHECK(
                cudaMemsetAsync(p.y, 0, (size_t)(n_rows * c.n_rows) * sizeof(float), s->stream));
    }
}

void cuda_fp8_multiply(struct cuda_state *s, const struct linear *l, const struct codes_product *p,
                       char *scratch)
{
    const struct codes c = cuda_codes_of(s, l);
    uint8_t *x = (uint8_t *)scratch;
    float *x_scales = (float *)(scratch + rounded((size_t)(p->n_rows * c.row_bytes)));
    float *sums =
        x_scales + rounded((size_t)(c.n_lanes * p->n_rows) * sizeof(float)) / sizeof(float);
    struct lane_sums of_lanes = {sums, x_scales, c.scales, p->n_rows, c.n_rows};

    LAUNCH(quantize_kernel, dim3((unsigned)p->n_rows, (unsigned)c.n_lanes), dim3(256), 0, s->stream,
           x, x_scales, p->x, p->x_stride, c, units_are_whole(c, p->x, p->x_stride));
    multiply_lanes(s, c, x, sums, p->n_rows);
    switch (c.n_lanes) {
    case 1:
        return finish_lanes<1>(s, p, of_lanes, c.out_dim);
    case 2:
        return finish_lanes<2>(s, p, of_lanes, c.out_dim);
    case 4:
        return finish_lanes<4>(s, p, of_lanes, c.out_dim);
    default:
        return finish_lanes<8>(s, p, of_lanes, c.out_dim);
    }
}
