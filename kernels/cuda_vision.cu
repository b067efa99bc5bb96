/*
 * What only the vision tower does: patches from pixels, full attention within a tile, pixel
 * shuffle.
 *
 * Attention of a tile (1025 tokens, heads of 64 or 128): FlashAttention-2 on tensor cores in
 * bfloat16, ordinary cores in float32 or for other head sizes; a plain kernel writes the
 * probabilities where a caller asks for them. A tile never sees another one.
 */
#include "kernels/cuda_attention.h"

#define VISION_WARPS 4

struct tile_params {
    const void *q, *k, *v;
    void *out;
    int64_t q_stride, k_stride, v_stride, out_stride; // elements between rows
    int n_tokens, head_dim;                           // of one tile
    float scale_log2;
};

/* ---- tensor cores ---- */

template <int HEAD_DIM> struct vision_step {
    bf16 keys[STEP_KEYS * (HEAD_DIM + SHARED_PAD)];
    bf16 values[STEP_KEYS * (HEAD_DIM + SHARED_PAD)];
};

template <int HEAD_DIM>
__device__ __forceinline__ void load_tile_step(vision_step<HEAD_DIM> *t, const bf16 *k,
                                               const bf16 *v, const struct tile_params &p,
                                               int first_key)
{
    for (int i = threadIdx.x; i < STEP_KEYS * HEAD_DIM / 8; i += blockDim.x) {
        int key = i / (HEAD_DIM / 8), dim = i % (HEAD_DIM / 8) * 8, at = first_key + key;
        bool valid = at < p.n_tokens;
        int64_t row = valid ? at : 0;
        cp_async_16(&t->keys[key * (HEAD_DIM + SHARED_PAD) + dim], k + row * p.k_stride + dim,
                    valid);
        cp_async_16(&t->values[key * (HEAD_DIM + SHARED_PAD) + dim], v + row * p.v_stride + dim,
                    valid);
    }
    cp_async_commit();
}

/* Grid (tile of 64 rows, head, image tile). */
template <int HEAD_DIM>
__global__ void __launch_bounds__(32 * VISION_WARPS)
    tile_attention_kernel(const struct tile_params p)
{
    CUDA_DYNAMIC_SHARED(vision_step<HEAD_DIM>, steps);
    int64_t token0 = (int64_t)blockIdx.z * p.n_tokens;
    int column = (int)blockIdx.y * HEAD_DIM, stage = 0;
    int row = (int)blockIdx.x * VISION_WARPS * WARP_ROWS + (int)(threadIdx.x >> 5) * WARP_ROWS +
              (int)(threadIdx.x & 31) / 4;
    const bf16 *q = (const bf16 *)p.q + token0 * p.q_stride + column;
    const bf16 *k = (const bf16 *)p.k + token0 * p.k_stride + column;
    const bf16 *v = (const bf16 *)p.v + token0 * p.v_stride + column;
    bf16 *out = (bf16 *)p.out + token0 * p.out_stride + column;
    int low[2] = {0, 0}, high[2] = {p.n_tokens, p.n_tokens};
    uint32_t fragments[HEAD_DIM / 16][4];
    row_state<HEAD_DIM> s;

    load_queries<HEAD_DIM>(fragments, row < p.n_tokens ? q + row * p.q_stride : NULL,
                           row + 8 < p.n_tokens ? q + (row + 8) * p.q_stride : NULL);
    row_state_clear<HEAD_DIM>(&s);
    load_tile_step<HEAD_DIM>(&steps[0], k, v, p, 0);
    for (int key = 0; key < p.n_tokens; key += STEP_KEYS, stage ^= 1) {
        if (key + STEP_KEYS < p.n_tokens) {
            load_tile_step<HEAD_DIM>(&steps[stage ^ 1], k, v, p, key + STEP_KEYS);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        attend_step<HEAD_DIM, false>(&s, fragments, steps[stage].keys, steps[stage].values, key,
                                     low, high, p.scale_log2);
        __syncthreads(); // the next load overwrites this stage
    }
    row_sums<HEAD_DIM>(&s);
#pragma unroll
    for (int r = 0; r < 2; r++)
        if (row + 8 * r < p.n_tokens)
            store_row<HEAD_DIM>(out + (row + 8 * r) * p.out_stride, &s, r);
}

/* ---- ordinary cores ---- */

/* Grid (tile of PLAIN_WARPS rows, head, image tile). */
template <class T> __global__ void plain_tile_kernel(const struct tile_params p)
{
    CUDA_DYNAMIC_SHARED(float, shared);
    int64_t token0 = (int64_t)blockIdx.z * p.n_tokens;
    int hd = p.head_dim, column = (int)blockIdx.y * hd;
    int row = (int)blockIdx.x * PLAIN_WARPS + (int)(threadIdx.x >> 5);
    float *keys = shared, *values = keys + CHUNK_KEYS * (hd + 1);
    float *q = values + CHUNK_KEYS * hd + (threadIdx.x >> 5) * hd;
    bool here = row < p.n_tokens;
    struct plain_row s;

    plain_row_clear(&s);
    for (int d = threadIdx.x & 31; here && d < hd; d += 32)
        q[d] = to_float(((const T *)p.q)[(token0 + row) * p.q_stride + column + d]);
    for (int key0 = 0; key0 < p.n_tokens; key0 += CHUNK_KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < CHUNK_KEYS * hd; i += blockDim.x) {
            int key = i / hd, d = i % hd;
            bool valid = key0 + key < p.n_tokens;
            int64_t token = token0 + key0 + key;
            keys[key * (hd + 1) + d] =
                valid ? to_float(((const T *)p.k)[token * p.k_stride + column + d]) : 0.0f;
            values[key * hd + d] =
                valid ? to_float(((const T *)p.v)[token * p.v_stride + column + d]) : 0.0f;
        }
        __syncthreads();
        if (here)
            plain_step(&s, q, keys, values, hd, key0, 0, p.n_tokens, p.scale_log2);
    }
    if (here)
        plain_store((T *)p.out + (token0 + row) * p.out_stride + column, &s, hd);
}

/* Grid (row, head, image tile): scores, softmax and products of one row; probs [tile, head, T, T].
 */
template <class T>
__global__ void tile_probs_kernel(const struct tile_params p, float *probs, float scale)
{
    int64_t token0 = (int64_t)blockIdx.z * p.n_tokens;
    int row = (int)blockIdx.x, hd = p.head_dim, column = (int)blockIdx.y * hd;
    const T *q = (const T *)p.q + (token0 + row) * p.q_stride + column;
    float *pr =
        probs + (((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * p.n_tokens + row) * p.n_tokens;
    float largest = -INFINITY, sum = 0.0f;

    for (int j = threadIdx.x; j < p.n_tokens; j += blockDim.x) {
        const T *k = (const T *)p.k + (token0 + j) * p.k_stride + column;
        float score = 0.0f;
        for (int d = 0; d < hd; d++)
            score = fmaf(to_float(q[d]), to_float(k[d]), score);
        pr[j] = score * scale;
        largest = fmaxf(largest, pr[j]);
    }
    largest = block_max(largest);
    for (int j = threadIdx.x; j < p.n_tokens; j += blockDim.x) {
        pr[j] = expf(pr[j] - largest);
        sum += pr[j];
    }
    float inverse = 1.0f / block_sum(sum);
    for (int j = threadIdx.x; j < p.n_tokens; j += blockDim.x)
        pr[j] *= inverse;
    __syncthreads();
    for (int d = threadIdx.x; d < hd; d += blockDim.x) {
        float out = 0.0f;
        for (int j = 0; j < p.n_tokens; j++)
            out = fmaf(pr[j], to_float(((const T *)p.v)[(token0 + j) * p.v_stride + column + d]),
                       out);
        ((T *)p.out)[(token0 + row) * p.out_stride + column + d] = from_float<T>(out);
    }
}

/* ---- the op ---- */

template <int HEAD_DIM>
static void attend_tiles(struct cuda_state *s, const struct tile_params *p, int64_t n_tiles,
                         int n_heads)
{
    const int shared_bytes = 2 * (int)sizeof(vision_step<HEAD_DIM>);

    CUDA_CHECK(cudaFuncSetAttribute(tile_attention_kernel<HEAD_DIM>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    LAUNCH(tile_attention_kernel<HEAD_DIM>,
           dim3(blocks_for(p->n_tokens, VISION_WARPS * WARP_ROWS), (unsigned)n_heads,
                (unsigned)n_tiles),
           dim3(32 * VISION_WARPS), (size_t)shared_bytes, s->stream, *p);
}

/* Rows that cp.async can read: 16-byte borders. */
static int is_aligned(const struct tensor *t)
{
    return !((uintptr_t)t->data % 16) && !(t->row_stride % 8);
}

void cuda_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                    const struct tensor *k, const struct tensor *v, int64_t n_tiles,
                    int32_t n_heads, float scale, enum dtype /* its tensors' */, float *probs)
{
    struct cuda_state *s = cuda_state_of(b);
    struct tile_params p = {};

    p.q = q->data;
    p.k = k->data;
    p.v = v->data;
    p.out = out->data;
    p.q_stride = q->row_stride;
    p.k_stride = k->row_stride;
    p.v_stride = v->row_stride;
    p.out_stride = out->row_stride;
    p.n_tokens = (int)(tensor_n_rows(q) / n_tiles);
    p.head_dim = (int)(tensor_n_cols(q) / n_heads);
    p.scale_log2 = scale * LOG2_E;
    if (probs) {
        WITH_TYPE(q->dtype, T,
                  LAUNCH(tile_probs_kernel<T>,
                         dim3((unsigned)p.n_tokens, (unsigned)n_heads, (unsigned)n_tiles),
                         dim3(128), 0, s->stream, p, probs, scale));
        return;
    }
    if (q->dtype == DTYPE_BF16 && is_aligned(q) && is_aligned(k) && is_aligned(v) &&
        is_aligned(out)) {
        switch (p.head_dim) {
        case 16:
            attend_tiles<16>(s, &p, n_tiles, n_heads);
            return;
        case 32:
            attend_tiles<32>(s, &p, n_tiles, n_heads);
            return;
        case 64:
            attend_tiles<64>(s, &p, n_tiles, n_heads);
            return;
        case 128:
            attend_tiles<128>(s, &p, n_tiles, n_heads);
            return;
        }
    }
    if (p.head_dim > PLAIN_DIM_MAX)
        die("heads of %d dimensions: the CUDA back end holds %d", p.head_dim, PLAIN_DIM_MAX);
    size_t shared_bytes = plain_shared_bytes(p.head_dim);
    WITH_TYPE(
        q->dtype, T,
        CUDA_CHECK(cudaFuncSetAttribute(
            plain_tile_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
        LAUNCH(plain_tile_kernel<T>,
               dim3(blocks_for(p.n_tokens, PLAIN_WARPS), (unsigned)n_heads, (unsigned)n_tiles),
               dim3(32 * PLAIN_WARPS), shared_bytes, s->stream, p));
}

/* ---- pixels ---- */

#define CHANNELS_MAX 16

struct patch_params {
    int channels, height, width, ph, pw;
    float mean[CHANNELS_MAX], std[CHANNELS_MAX];
};

/* One block a patch; a thread an element, in the patch's own order (channel, row, column). */
template <class T, class P>
__global__ void patchify_kernel(T *patches, int64_t stride, const P *pixels,
                                const struct patch_params p)
{
    int across = p.width / p.pw, down = p.height / p.ph, n = p.channels * p.ph * p.pw;
    int64_t patch = blockIdx.x, tile = patch / (across * down);
    int y0 = (int)(patch / across % down) * p.ph, x0 = (int)(patch % across) * p.pw;

    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int c = i / (p.ph * p.pw), y = y0 + i / p.pw % p.ph, x = x0 + i % p.pw;
        float v = (float)pixels[((tile * p.channels + c) * p.height + y) * p.width + x];
        if (sizeof(P) == 1)
            v = (v - p.mean[c]) / p.std[c];
        patches[patch * stride + i] = from_float<T>(v);
    }
}

void cuda_patchify(struct backend *b, struct tensor *patches, const struct tensor *pixels,
                   int32_t ph, int32_t pw, const float *mean, const float *std)
{
    cudaStream_t stream = cuda_state_of(b)->stream;
    struct patch_params p = {};
    unsigned n = (unsigned)tensor_n_rows(patches);

    if (pixels->shape[1] > CHANNELS_MAX)
        die("pixels of %lld channels: the CUDA back end holds %d", (long long)pixels->shape[1],
            CHANNELS_MAX);
    p.channels = (int)pixels->shape[1];
    p.height = (int)pixels->shape[2];
    p.width = (int)pixels->shape[3];
    p.ph = ph;
    p.pw = pw;
    for (int c = 0; pixels->dtype == DTYPE_U8 && c < p.channels; c++) {
        p.mean[c] = mean[c];
        p.std[c] = std[c];
    }
    if (pixels->dtype == DTYPE_U8)
        WITH_TYPE(patches->dtype, T,
                  LAUNCH((patchify_kernel<T, uint8_t>), dim3(n), dim3(128), 0, stream,
                         (T *)patches->data, patches->row_stride, (const uint8_t *)pixels->data,
                         p));
    else
        WITH_TYPE(patches->dtype, T,
                  LAUNCH((patchify_kernel<T, float>), dim3(n), dim3(128), 0, stream,
                         (T *)patches->data, patches->row_stride, (const float *)pixels->data, p));
}

/* One block an output token. */
template <class T>
__global__ void pixel_shuffle_kernel(T *y, int64_t y_stride, const T *x, int64_t x_stride, int side,
                                     int k, int64_t dim)
{
    int across = side / k;
    int64_t token = blockIdx.x, tile = token / (across * across);
    int i = (int)(token / across % across), j = (int)(token % across);

    for (int64_t c = threadIdx.x; c < k * k * dim; c += blockDim.x) {
        int block = (int)(c / dim), row = k * i + block / k, column = k * j + block % k;
        int64_t source = (tile * side + row) * side + column;
        y[token * y_stride + c] = x[source * x_stride + c % dim];
    }
}

void cuda_pixel_shuffle(struct backend *b, struct tensor *y, const struct tensor *x, int32_t side,
                        int32_t k)
{
    WITH_TYPE(y->dtype, T,
              LAUNCH(pixel_shuffle_kernel<T>, dim3((unsigned)tensor_n_rows(y)), dim3(256), 0,
                     cuda_state_of(b)->stream, (T *)y->data, y->row_stride, (const T *)x->data,
                     x->row_stride, side, k, tensor_n_cols(x)));
}
