/*
 * The arithmetic that both attentions (paged, and full within a tile) share, on tensor cores in
 * bfloat16 and on ordinary cores in float32. Included by cuda_paged.cu and cuda_vision.cu alone.
 *
 * Tensor cores (FlashAttention-2, arXiv 2307.08691, on mma.m16n8k16): a warp owns 16 rows of
 * queries and walks keys in steps of STEP_KEYS at absolute positions, with an online softmax. A
 * row's result depends on the order of its own keys only: keys it may not see contribute p = 0,
 * which changes no bit, so one row comes out the same beside any others.
 *
 * expf is exp2f with log2(e) folded into the scale. Multiply-adds are fused where fmaf is written
 * and nowhere else (-fmad=false), so that two kernels that share a function share its bits.
 */
#ifndef INTERNVLD_KERNELS_CUDA_ATTENTION_H
#define INTERNVLD_KERNELS_CUDA_ATTENTION_H

#include "kernels/cuda_internal.h"

#define STEP_KEYS 64 // keys of one step of the online softmax
#define WARP_ROWS 16 // query rows of one warp
#define LOG2_E 1.4426950408889634f

/* Rows of shared memory are 16 bytes longer than their values: ldmatrix then meets no bank twice.
 */
#define SHARED_PAD 8

/* One row's running softmax: largest score, sum of exponentials. Two rows a thread: g and g + 8. */
template <int HEAD_DIM> struct row_state {
    float max[2], sum[2];
    float out[HEAD_DIM / 8][4]; // C fragments: row g has [.][0..1], row g + 8 has [.][2..3]
};

template <int HEAD_DIM> __device__ __forceinline__ void row_state_clear(row_state<HEAD_DIM> *s)
{
    for (int r = 0; r < 2; r++) {
        s->max[r] = -INFINITY;
        s->sum[r] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s->out[d][i] = 0.0f;
}

/* exp2(a - b) where b is a maximum that a took part in; nothing seen yet gives 0. */
__device__ __forceinline__ float exp2_below(float a, float b)
{
    return exp2f(a - (b == -INFINITY ? 0.0f : b));
}

/* Query fragments of rows g and g + 8 (NULL: a row of zeros). */
template <int HEAD_DIM>
__device__ __forceinline__ void load_queries(uint32_t q[HEAD_DIM / 16][4], const bf16 *row0,
                                             const bf16 *row1)
{
    int column = 2 * (threadIdx.x & 3);

#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        int at = 16 * k + column;
        q[k][0] = row0 ? *(const uint32_t *)(row0 + at) : 0;
        q[k][1] = row1 ? *(const uint32_t *)(row1 + at) : 0;
        q[k][2] = row0 ? *(const uint32_t *)(row0 + at + 8) : 0;
        q[k][3] = row1 ? *(const uint32_t *)(row1 + at + 8) : 0;
    }
}

/*
 * One step: keys [first_key, first_key + STEP_KEYS) from shared memory.
 *   keys    KEYS_BY_DIM ? [HEAD_DIM, STEP_KEYS + pad] : [STEP_KEYS, HEAD_DIM + pad]
 *   values  [STEP_KEYS, HEAD_DIM + pad]; rows that nobody may see must be finite (zero)
 *   SCALED  key_scales, value_scales [STEP_KEYS]: keys and values are codes, to be multiplied with
 *           them; finite where nobody may see one
 * Row r of this thread sees keys low[r] <= key < high[r].
 */
template <int HEAD_DIM, bool KEYS_BY_DIM, bool SCALED = false>
__device__ __forceinline__ void
attend_step(row_state<HEAD_DIM> *s, const uint32_t q[HEAD_DIM / 16][4], const bf16 *keys,
            const bf16 *values, int first_key, const int low[2], const int high[2],
            float scale_log2, const float *key_scales = NULL, const float *value_scales = NULL)
{
    const int KEY_LD = KEYS_BY_DIM ? STEP_KEYS + SHARED_PAD : HEAD_DIM + SHARED_PAD;
    const int VALUE_LD = HEAD_DIM + SHARED_PAD;
    int lane = threadIdx.x & 31, quad = lane & 3;
    int matrix = lane >> 3, matrix_row = lane & 7; // which row of which 8x8 this lane names
    float p[STEP_KEYS / 8][4];

#pragma unroll
    for (int n = 0; n < STEP_KEYS / 8; n++)
        p[n][0] = p[n][1] = p[n][2] = p[n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++)
#pragma unroll
        for (int n = 0; n < STEP_KEYS / 16; n++) {
            uint32_t b[4]; // keys 16n … +7 in b[0..1], +8 … +15 in b[2..3]
            int dim = 16 * k + 8 * (matrix & 1), key = 16 * n + 8 * (matrix >> 1);
            if (KEYS_BY_DIM)
                ldmatrix_x4_trans(b, keys + (dim + matrix_row) * KEY_LD + key);
            else
                ldmatrix_x4(b, keys + (key + matrix_row) * KEY_LD + dim);
            mma_m16n8k16(p[2 * n], q[k], b);
            mma_m16n8k16(p[2 * n + 1], q[k], b + 2);
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float largest = s->max[r], sum = 0.0f;
#pragma unroll
        for (int n = 0; n < STEP_KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int key = first_key + 8 * n + 2 * quad + i;
                float *score = &p[n][2 * r + i];
                if (SCALED)
                    *score *= key_scales[8 * n + 2 * quad + i];
                *score = key >= low[r] && key < high[r] ? *score * scale_log2 : -INFINITY;
                largest = fmaxf(largest, *score);
            }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        float fade = exp2_below(s->max[r], largest);
#pragma unroll
        for (int n = 0; n < STEP_KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                p[n][2 * r + i] = exp2_below(p[n][2 * r + i], largest);
                sum += p[n][2 * r + i];
                if (SCALED)
                    p[n][2 * r + i] *= value_scales[8 * n + 2 * quad + i];
            }
        s->max[r] = largest;
        s->sum[r] = fmaf(s->sum[r], fade, sum); // this thread's keys; row_sums() adds the quad's
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++) {
            s->out[d][2 * r] *= fade;
            s->out[d][2 * r + 1] *= fade;
        }
    }
#pragma unroll
    for (int k = 0; k < STEP_KEYS / 16; k++) {
        uint32_t a[4] = {pack_bf16(p[2 * k][0], p[2 * k][1]), pack_bf16(p[2 * k][2], p[2 * k][3]),
                         pack_bf16(p[2 * k + 1][0], p[2 * k + 1][1]),
                         pack_bf16(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; d++) {
            uint32_t b[4];
            int key = 16 * k + 8 * (matrix & 1), dim = 16 * d + 8 * (matrix >> 1);
            ldmatrix_x4_trans(b, values + (key + matrix_row) * VALUE_LD + dim);
            mma_m16n8k16(s->out[2 * d], a, b);
            mma_m16n8k16(s->out[2 * d + 1], a, b + 2);
        }
    }
}

/* The sums of the two rows over the four threads that share them. */
template <int HEAD_DIM> __device__ __forceinline__ void row_sums(row_state<HEAD_DIM> *s)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        s->sum[r] += __shfl_xor_sync(0xffffffffu, s->sum[r], 1);
        s->sum[r] += __shfl_xor_sync(0xffffffffu, s->sum[r], 2);
    }
}

/* out[2r], out[2r + 1] of every fragment to one row, divided by the row's sum. */
template <int HEAD_DIM>
__device__ __forceinline__ void store_row(bf16 *row, const row_state<HEAD_DIM> *s, int r)
{
    float inverse = s->sum[r] > 0.0f ? 1.0f / s->sum[r] : 0.0f;

#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; d++)
        *(uint32_t *)(row + 8 * d + 2 * (threadIdx.x & 3)) =
            pack_bf16(s->out[d][2 * r] * inverse, s->out[d][2 * r + 1] * inverse);
}

/*
 * ---- ordinary cores ----
 *
 * For float32, and for shapes the tensor-core kernels are not made for. A warp owns one row; keys
 * are walked CHUNK_KEYS at a time, a lane a key, from shared memory that the block filled.
 */
#define CHUNK_KEYS 32
#define PLAIN_WARPS 4
#define PLAIN_DIM_MAX 256

struct plain_row {
    float max, sum, out[PLAIN_DIM_MAX / 32]; // lane owns dimensions lane, lane + 32, …
};

static inline size_t plain_shared_bytes(int head_dim)
{
    return sizeof(float) *
           (size_t)(CHUNK_KEYS * (head_dim + 1) + CHUNK_KEYS * head_dim + PLAIN_WARPS * head_dim);
}

__device__ __forceinline__ void plain_row_clear(struct plain_row *s)
{
    s->max = -INFINITY;
    s->sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PLAIN_DIM_MAX / 32; i++)
        s->out[i] = 0.0f;
}

/* keys [CHUNK_KEYS, head_dim + 1], values [CHUNK_KEYS, head_dim], q [head_dim], all shared. */
__device__ __forceinline__ void plain_step(struct plain_row *s, const float *q, const float *keys,
                                           const float *values, int head_dim, int first_key,
                                           int low, int high, float scale_log2)
{
    int lane = threadIdx.x & 31, key = first_key + lane;
    float score = 0.0f;

    for (int d = 0; d < head_dim; d++)
        score = fmaf(q[d], keys[lane * (head_dim + 1) + d], score);
    score = key >= low && key < high ? score * scale_log2 : -INFINITY;
    float largest = fmaxf(s->max, warp_max(score)), fade = exp2_below(s->max, largest);
    float p = exp2_below(score, largest);
    s->max = largest;
    s->sum = fmaf(s->sum, fade, warp_sum(p));
#pragma unroll
    for (int i = 0; i < PLAIN_DIM_MAX / 32; i++)
        s->out[i] *= fade;
    for (int j = 0; j < CHUNK_KEYS; j++) {
        float pj = __shfl_sync(0xffffffffu, p, j);
#pragma unroll
        for (int i = 0; i < PLAIN_DIM_MAX / 32; i++)
            if (lane + 32 * i < head_dim)
                s->out[i] = fmaf(pj, values[j * head_dim + lane + 32 * i], s->out[i]);
    }
}

template <class T>
__device__ __forceinline__ void plain_store(T *row, const struct plain_row *s, int head_dim)
{
    float inverse = s->sum > 0.0f ? 1.0f / s->sum : 0.0f;

#pragma unroll
    for (int i = 0; i < PLAIN_DIM_MAX / 32; i++) {
        int d = (int)(threadIdx.x & 31) + 32 * i;
        if (d < head_dim)
            row[d] = from_float<T>(s->out[i] * inverse);
    }
}

#endif
