/*
 * What the cuda_*.cu files share: the back end's state, checks, dispatch over types, sums over a
 * warp and a block. Included by them alone.
 */
#ifndef INTERNVLD_KERNELS_CUDA_INTERNAL_H
#define INTERNVLD_KERNELS_CUDA_INTERNAL_H

#include <cublasLt.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define _Noreturn [[noreturn]]
extern "C" {
#include "kernels/cpu_team.h"
#include "kernels/cuda_backend.h"
#include "kernels/log.h"
}
#include "kernels/cuda_primitives.h"

#define PLANS_MAX 512
#define STAGING_HALVES 2

/* How one shape of product is computed, chosen once (cuda_matmul.cu). */
struct cuda_plan {
    int64_t n, k, ld_w, ld_x, ld_y;
    cudaDataType_t type, type_y;
    int with_bias, with_residual, alignment;
    cublasLtMatmulAlgo_t algorithm;
};

struct cuda_state {
    int device;
    int deterministic;
    char description[320];
    cudaStream_t stream;
    cublasLtHandle_t blas;
    void *workspace; // cuBLASLt's
    size_t workspace_bytes;
    char *scratch; // of the running op; ops follow each other on one stream
    size_t scratch_bytes;
    void *dense; // a quantised weight's values, as they are used (cuda_quantized.cu)
    size_t dense_bytes, dense_bytes_max;
    char *staging; // pinned host memory that uploads pass through, STAGING_HALVES of staging_bytes
    size_t staging_bytes;
    struct cpu_team *team;              // of op_parallel(); NULL: one thread
    int staging_half;                   // the one that is being filled
    size_t staging_used;                // of it
    cudaEvent_t staged[STAGING_HALVES]; // each half's last upload
    struct cuda_plan plans[PLANS_MAX];
    int n_plans;
};

static inline struct cuda_state *cuda_state_of(struct backend *b)
{
    return (struct cuda_state *)b->state;
}

/* Sums that a product of l's is made of: its lanes, or one. */
static inline int cuda_n_sums(const struct cuda_state *s, const struct linear *l)
{
    return s->deterministic ? l->n_lanes : 1;
}

/* A failed call of the run time is the machine's fault: the rank ends and names the call. */
#define CUDA_CHECK(call)                                                                           \
    do {                                                                                           \
        cudaError_t cuda_check_error = (call);                                                     \
        if (cuda_check_error != cudaSuccess)                                                       \
            die("CUDA: %s: %s", #call, cudaGetErrorString(cuda_check_error));                      \
    } while (0)
#define CUBLAS_CHECK(call)                                                                         \
    do {                                                                                           \
        cublasStatus_t cublas_check_status = (call);                                               \
        if (cublas_check_status != CUBLAS_STATUS_SUCCESS)                                          \
            die("cuBLASLt: %s: status %d", #call, (int)cublas_check_status);                       \
    } while (0)
/* A launch and the check of its configuration. */
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                     \
    do {                                                                                           \
        CUDA_LAUNCH(kernel, grid, block, shared_bytes, stream, __VA_ARGS__);                       \
        CUDA_CHECK(cudaGetLastError());                                                            \
    } while (0)

/* Runs the statements with T naming the element type of an activation. */
#define WITH_TYPE(dtype_, T, ...)                                                                  \
    do {                                                                                           \
        if ((dtype_) == DTYPE_F32) {                                                               \
            typedef float T;                                                                       \
            __VA_ARGS__;                                                                           \
        } else if ((dtype_) == DTYPE_BF16) {                                                       \
            typedef bf16 T;                                                                        \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            BUG("%s is no activation type", dtype_name(dtype_));                                   \
        }                                                                                          \
    } while (0)

/* n_bytes of the staging memory, at most staging_bytes, to fill next; where they begin the other
 * half, that half's uploads have been waited for (cuda_backend.cu). */
char *cuda_staging_take(struct cuda_state *s, size_t n_bytes);
/* Uploads what was taken; returns before it has been read. */
void cuda_staging_upload(struct backend *b, void *dst, const char *taken, size_t n_bytes);

/* To the alignment of cudaMalloc(): parts of one block begin there. */
static inline size_t rounded(size_t n_bytes)
{
    return (n_bytes + CUDA_BLOCK_BYTES - 1) / CUDA_BLOCK_BYTES * CUDA_BLOCK_BYTES;
}

static inline unsigned blocks_for(int64_t n, int per_block)
{
    return (unsigned)((n + per_block - 1) / per_block);
}

/* The same on every lane, added in a fixed order. */
__device__ __forceinline__ float warp_sum(float v)
{
    for (int offset = 16; offset; offset >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

__device__ __forceinline__ float warp_max(float v)
{
    for (int offset = 16; offset; offset >>= 1)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

/* Sum over a block of whole warps, the same on every thread; every thread of the block calls it. */
__device__ __forceinline__ float block_sum(float v)
{
    CUDA_SHARED(float, partial, 32);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;

    v = warp_sum(v);
    __syncthreads(); // a former call may still be read
    if (lane == 0)
        partial[warp] = v;
    __syncthreads();
    return warp_sum(lane < n_warps ? partial[lane] : 0.0f);
}

/* The largest, likewise. */
__device__ __forceinline__ float block_max(float v)
{
    CUDA_SHARED(float, partial, 32);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;

    v = warp_max(v);
    __syncthreads(); // a former call may still be read
    if (lane == 0)
        partial[warp] = v;
    __syncthreads();
    return warp_max(lane < n_warps ? partial[lane] : -INFINITY);
}

/* The lanes' binary tree over N values `stride` apart: ((p0 + p1) + (p2 + p3)) + … */
template <int N, class P> __device__ __forceinline__ float tree_of(const P *p, size_t stride)
{
    if (N == 1)
        return to_float(p[0]);
    return tree_of<(N + 1) / 2>(p, stride) +
           tree_of<(N + 1) / 2>(p + (size_t)(N / 2) * stride, stride);
}

/* Threads of a block that has one row: by its length alone, which fixes the order of a norm's sum.
 */
static inline int row_threads(int64_t n_cols)
{
    return n_cols <= 128 ? 32 : n_cols <= 1024 ? 128 : 256;
}

/* y <- the norm of a row whose `sum` of squares is known. The normalised value is rounded to x's
 * type before the weight (LlamaRMSNorm). */
template <class T, class U>
__device__ __forceinline__ void store_rms_norm(T *y, const U *x, float sum, const float *weight,
                                               float eps, int64_t n_cols)
{
    float inverse = 1.0f / sqrtf(block_sum(sum) / (float)n_cols + eps);

    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x)
        y[c] = from_float<T>(weight[c] * to_float(from_float<U>(to_float(x[c]) * inverse)));
}

/* The activation functions of enum activation in float32. */
__device__ __forceinline__ float activate(float x, enum activation act)
{
    switch (act) {
    case ACTIVATION_NONE:
        return x;
    case ACTIVATION_GELU:
        return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case ACTIVATION_GELU_TANH:
        return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case ACTIVATION_QUICK_GELU:
        return x / (1.0f + expf(-1.702f * x));
    case ACTIVATION_RELU:
        return x > 0.0f ? x : 0.0f;
    case ACTIVATION_SILU:
        return x / (1.0f + expf(-x));
    }
    return x;
}

/* What follows a product: y <- residual + scale * act(sum + bias). Strides in elements. */
struct finish {
    const float *bias, *scale; // [out_dim], or NULL
    enum activation act;
    const void *residual; // of y's type, or NULL; may be y
    int64_t residual_stride, y_stride;
};

/* Of the sum at (row, column); without ACTIVATES act must be ACTIVATION_NONE. */
template <bool ACTIVATES, class T>
__device__ __forceinline__ void finish_sum(T *y, const struct finish &f, int64_t row,
                                           int64_t column, float v)
{
    if (f.bias)
        v += f.bias[column];
    if (ACTIVATES)
        v = activate(v, f.act);
    if (f.scale)
        v *= f.scale[column];
    if (f.residual)
        v += to_float(((const T *)f.residual)[row * f.residual_stride + column]);
    y[row * f.y_stride + column] = from_float<T>(v);
}

/* ---- the ops, by file ---- */

/* cuda_matmul.cu */
void cuda_linear_pack(struct backend *b, struct linear *l, int64_t first, const struct tensor *w,
                      const struct tensor *bias);
/* l->packed of n_bytes, what belongs behind them, l->bias. */
void cuda_weight_alloc(struct backend *b, struct linear *l, size_t n_bytes,
                       const struct tensor *bias);
void cuda_linear_free(struct backend *b, struct linear *l);
void cuda_matmul(struct backend *b, struct tensor *y, const struct tensor *x,
                 const struct linear *l, const struct epilogue *e);
/* One product by cuBLASLt: y [m, n] <- x [m, k] w[n, k]^T (+ bias [n] of y's type) (+ residual,
 * strided as y); in float32 where x and w are E4M3. */
struct product {
    int64_t m, n, k, ld_w, ld_x, ld_y; // elements
    int64_t n_whole;                   // outputs of the weight, whose these n are of
    enum dtype type, type_y;
    const void *w, *x, *bias, *residual;
    void *y;
};
void cuda_blas_multiply(struct cuda_state *s, const struct product *p);
/* cuda_quantized.cu */
void cuda_linear_pack_quantized(struct backend *b, struct linear *l, int64_t first,
                                const struct quantized *q, const struct tensor *bias);
size_t cuda_quantized_bytes(const struct cuda_state *s, const struct linear *l);
/* So many rows of a quantised float32 weight can be dense at a time, all or a multiple of 64; and
 * rows [first, first + n) of it: [n, in_dim], until the next call. */
int64_t cuda_dense_rows(struct cuda_state *s, const struct linear *l);
const float *cuda_expand(struct cuda_state *s, const struct linear *l, int64_t first, int64_t n);
void cuda_embed_quantized(struct backend *b, struct tensor *y, const struct linear *table,
                          const int32_t *ids, int32_t first_row);
/* cuda_codes.cu: of a quantised bfloat16 linear, y <- x W^T and what follows it but an activation;
 * or, where it has several sums, those. cuda_fp8.cu: of one whose x_format is FP8, y and all that
 * follows, with so many bytes of scratch memory for each row. */
struct codes_product {
    const bf16 *x; // [n_rows, in_dim], rows x_stride apart
    void *y;       // [n_rows, out_dim], or sums [cuda_n_sums(), n_rows, out_dim] of float32
    enum dtype type_y;
    int64_t n_rows, x_stride, lane_stride; // strides in elements, lane_stride of sums
    struct finish finish;                  // of sums y_stride alone
};
void cuda_codes_multiply(struct cuda_state *s, const struct linear *l,
                         const struct codes_product *p);
size_t cuda_fp8_row_bytes(const struct cuda_state *s, const struct linear *l);
void cuda_fp8_multiply(struct cuda_state *s, const struct linear *l, const struct codes_product *p,
                       char *scratch);
/* cuda_rows.cu */
void cuda_embed(struct backend *b, struct tensor *y, const struct tensor *table, const int32_t *ids,
                int32_t first_row);
void cuda_scatter_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                       const int32_t *rows);
void cuda_gather_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                      const int32_t *rows);
void cuda_rms_norm(struct backend *b, struct tensor *y, const struct tensor *x, const float *weight,
                   float eps);
void cuda_add_rms_norm(struct backend *b, struct tensor *y, struct tensor *x,
                       const struct tensor *add, const float *weight, float eps);
void cuda_layer_norm(struct backend *b, struct tensor *y, const struct tensor *x,
                     const float *weight, const float *bias, float eps);
void cuda_add(struct backend *b, struct tensor *y, const struct tensor *x);
void cuda_add_bias(struct backend *b, struct tensor *y, const float *bias);
void cuda_gated_activation(struct backend *b, struct tensor *y, const struct tensor *x,
                           enum activation act);
void cuda_copy(struct backend *b, struct tensor *y, const struct tensor *x);
/* cuda_vision.cu */
void cuda_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                    const struct tensor *k, const struct tensor *v, int64_t n_tiles,
                    int32_t n_heads, float scale, enum dtype dtype, float *probs);
void cuda_patchify(struct backend *b, struct tensor *patches, const struct tensor *pixels,
                   int32_t ph, int32_t pw, const float *mean, const float *std);
void cuda_pixel_shuffle(struct backend *b, struct tensor *y, const struct tensor *x, int32_t side,
                        int32_t k);
/* cuda_paged.cu */
void cuda_kv_write(struct backend *b, struct kv_pages *kv, const struct paged_layout *layout,
                   struct tensor *k, const struct tensor *v, const struct rotation *rope);
void cuda_paged_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                          const struct kv_pages *kv, const struct paged_layout *layout,
                          const int32_t *kv_of_head, int32_t n_heads, float scale, int32_t window);
void cuda_copy_pages(struct backend *b, struct kv_pages *kv, const int32_t *src, const int32_t *dst,
                     int32_t n);
/* cuda_top_k.cu */
void cuda_top_k(struct backend *b, struct top_k *out, const float *logits, int32_t n_parts,
                int32_t n_rows, int32_t part, int32_t vocab, const float *temperature);
/* cuda_draw.cu */
void cuda_draw(struct backend *b, struct drawn *out, const struct draw_params *params, int32_t n,
               const struct top_k *best, int32_t first, int32_t n_rows, int32_t vocab);

#endif
