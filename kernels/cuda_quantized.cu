/*
 * Quantised weights on CUDA: codes, scales and zero points stay on the device as they come, and
 * become dense values, rounded to the linear's type, in memory of the back end just before they are
 * used. So a product is the dense one of the same values to the last bit, whatever its rows, also
 * in bfloat16, where the CPU's can be of values that are not rounded (kernels/quantized.h); it
 * saves memory, and costs a pass over the dense values on top of the dense product's time.
 *
 * A packed weight: codes [out_dim] rows of row_bytes, of 4 bits two a byte, the even column in the
 * low half | scales [out_dim, n_groups] | zeros [out_dim, n_groups] where it has any | what
 * cuda_matmul.cu puts behind every weight.
 */
#include "kernels/cuda_internal.h"

/* What a kernel needs of a weight. */
struct codes {
    const uint8_t *codes;
    const float *scales;
    const int8_t *zeros;     // or NULL
    const int32_t *group_of; // or NULL
    enum weight_format format;
    int is_4_bit;
    int64_t out_dim, in_dim, row_bytes, n_groups, group_size, group_phase;
    float table[16]; // of a format of 4 bits
};

static int64_t code_row_bytes(const struct linear *l)
{
    return weight_format_bits(l->format) == 4 ? (l->in_dim + 1) / 2 : l->in_dim;
}

static size_t scales_at(const struct linear *l)
{
    return rounded((size_t)(l->out_dim * code_row_bytes(l)));
}

static size_t zeros_at(const struct linear *l)
{
    return scales_at(l) + rounded((size_t)(l->out_dim * l->n_groups) * sizeof(float));
}

size_t cuda_quantized_bytes(const struct linear *l)
{
    return zeros_at(l) + (l->has_zeros ? rounded((size_t)(l->out_dim * l->n_groups)) : 0);
}

static struct codes codes_of(const struct linear *l)
{
    const char *packed = (const char *)l->packed;
    const float *table = weight_format_table(l->format, l->has_zeros);
    struct codes c = {};

    c.codes = (const uint8_t *)packed;
    c.scales = (const float *)(packed + scales_at(l));
    c.zeros = l->has_zeros ? (const int8_t *)(packed + zeros_at(l)) : NULL;
    c.group_of = l->group_of;
    c.format = l->format;
    c.is_4_bit = weight_format_bits(l->format) == 4;
    c.out_dim = l->out_dim;
    c.in_dim = l->in_dim;
    c.row_bytes = code_row_bytes(l);
    c.n_groups = l->n_groups;
    c.group_size = l->group_size;
    c.group_phase = l->group_phase;
    if (table)
        memcpy(c.table, table, sizeof(c.table));
    return c;
}

/* ---- packing ---- */

static void pack_row(uint8_t *to, const struct quantized *q, int64_t row, int is_4_bit)
{
    const uint8_t *from = q->codes + row * q->in_dim;

    if (!is_4_bit) {
        memcpy(to, from, (size_t)q->in_dim);
        return;
    }
    for (int64_t k = 0; k < q->in_dim; k += 2)
        to[k / 2] = (uint8_t)(from[k] | (k + 1 < q->in_dim ? from[k + 1] << 4 : 0));
}

/* Memory for the dense values of the largest weight, or as many of its rows as fit. */
static void reserve_dense(struct cuda_state *s, const struct linear *l)
{
    size_t row_bytes = (size_t)l->in_dim * dtype_size(l->dtype);
    size_t want = (size_t)l->out_dim * row_bytes;

    if (want > s->dense_bytes_max)
        want = s->dense_bytes_max > 64 * row_bytes ? s->dense_bytes_max : 64 * row_bytes;
    if (want <= s->dense_bytes)
        return;
    CUDA_CHECK(cudaFree(s->dense));
    CUDA_CHECK(cudaMalloc(&s->dense, want));
    s->dense_bytes = want;
}

void cuda_linear_pack_quantized(struct backend *b, struct linear *l, const struct quantized *q,
                                const struct tensor *bias)
{
    struct cuda_state *s = cuda_state_of(b);

    l->format = q->format;
    l->n_groups = q->n_groups;
    l->group_size = q->group_size;
    l->group_phase = q->group_phase;
    l->has_zeros = q->zeros != NULL;
    l->group_of = NULL;
    int64_t row_bytes = code_row_bytes(l), at_once = (int64_t)s->staging_bytes / row_bytes;
    size_t n_scales = (size_t)(l->out_dim * l->n_groups);
    if (at_once < 1)
        BUG("a row of %lld codes is larger than the staging buffer", (long long)l->in_dim);
    reserve_dense(s, l);
    cuda_weight_alloc(b, l, cuda_quantized_bytes(l), bias);
    for (int64_t row = 0; row < l->out_dim; row += at_once) {
        int64_t n = l->out_dim - row < at_once ? l->out_dim - row : at_once;
        uint8_t *half = (uint8_t *)cuda_staging_next(s);
        for (int64_t i = 0; i < n; i++)
            pack_row(half + i * row_bytes, q, row + i, weight_format_bits(l->format) == 4);
        cuda_staging_upload(b, (char *)l->packed + row * row_bytes, (size_t)(n * row_bytes));
    }
    b->ops->upload(b, (char *)l->packed + scales_at(l), q->scales, n_scales * sizeof(float));
    if (q->zeros)
        b->ops->upload(b, (char *)l->packed + zeros_at(l), q->zeros, n_scales);
    if (q->group_of) {
        l->group_of = (int32_t *)b->ops->alloc(b, (size_t)l->in_dim * sizeof(int32_t));
        b->ops->upload(b, l->group_of, q->group_of, (size_t)l->in_dim * sizeof(int32_t));
    }
}

/* ---- values ---- */

__device__ __forceinline__ float fp8_e4m3(uint8_t code)
{
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float magnitude =
        exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);

    if (exponent == 15 && mantissa == 7)
        return NAN;
    return code & 0x80 ? -magnitude : magnitude;
}

/* quantized_value(), operation by operation. */
__device__ __forceinline__ float value_at(const struct codes &c, int64_t row, int64_t k)
{
    const uint8_t *codes = c.codes + row * c.row_bytes;
    uint8_t code = c.is_4_bit ? (uint8_t)(codes[k / 2] >> k % 2 * 4 & 15) : codes[k];
    int64_t group = c.group_of ? c.group_of[k] : (k + c.group_phase) / c.group_size;
    float scale = c.scales[row * c.n_groups + group];
    float zero = c.zeros ? (float)c.zeros[row * c.n_groups + group] : 0.0f;

    if (c.is_4_bit)
        return (c.table[code] - zero) * scale;
    if (c.format == WEIGHT_FP8)
        return fp8_e4m3(code) * scale;
    if (c.format == WEIGHT_INT8_127)
        return (float)(int8_t)code * scale * INT8_127_FACTOR;
    return ((float)(int8_t)code - zero) * scale;
}

/* w [rows, in_dim] <- rows [first, first + gridDim.x) */
template <class T> __global__ void expand_kernel(T *w, struct codes c, int64_t first)
{
    for (int64_t k = threadIdx.x; k < c.in_dim; k += blockDim.x)
        w[blockIdx.x * c.in_dim + k] = from_float<T>(value_at(c, first + blockIdx.x, k));
}

int64_t cuda_dense_rows(struct cuda_state *s, const struct linear *l)
{
    int64_t n = (int64_t)(s->dense_bytes / ((size_t)l->in_dim * dtype_size(l->dtype)));

    return n >= l->out_dim ? l->out_dim : n / 64 * 64;
}

const void *cuda_expand(struct cuda_state *s, const struct linear *l, int64_t first, int64_t n)
{
    WITH_TYPE(l->dtype, T,
              LAUNCH((expand_kernel<T>), dim3((unsigned)n), dim3(256), 0, s->stream, (T *)s->dense,
                     codes_of(l), first));
    return s->dense;
}

/* y's row i <- the table's row ids[i] - first_row, in the table's type first; zeros where it has
 * none. */
template <class Y, class T>
__global__ void embed_kernel(Y *y, int64_t y_stride, struct codes c, const int32_t *ids,
                             int32_t first_row)
{
    int64_t row = (int64_t)ids[blockIdx.x] - first_row;

    for (int64_t k = threadIdx.x; k < c.in_dim; k += blockDim.x) {
        float v = row >= 0 && row < c.out_dim ? to_float(from_float<T>(value_at(c, row, k))) : 0.0f;
        y[blockIdx.x * y_stride + k] = from_float<Y>(v);
    }
}

void cuda_embed_quantized(struct backend *b, struct tensor *y, const struct linear *table,
                          const int32_t *ids, int32_t first_row)
{
    int64_t n = tensor_n_rows(y);

    if (n == 0)
        return;
    WITH_TYPE(y->dtype, Y,
              WITH_TYPE(table->dtype, T,
                        LAUNCH((embed_kernel<Y, T>), dim3((unsigned)n), dim3(256), 0,
                               cuda_state_of(b)->stream, (Y *)y->data, y->row_stride,
                               codes_of(table), ids, first_row)));
}
