/*
 * Views of memory and the two half-width float formats. See tensor.h.
 */
#include "kernels/tensor.h"

#include "kernels/log.h"

size_t dtype_size(enum dtype t)
{
    switch (t) {
    case DTYPE_F32:
    case DTYPE_I32:
        return 4;
    case DTYPE_BF16:
    case DTYPE_F16:
        return 2;
    case DTYPE_I64:
        return 8;
    case DTYPE_U8:
    case DTYPE_I8:
    case DTYPE_F8_E4M3:
        return 1;
    }
    BUG("no such dtype: %d", (int)t);
}

const char *dtype_name(enum dtype t)
{
    switch (t) {
    case DTYPE_F32:
        return "float32";
    case DTYPE_BF16:
        return "bfloat16";
    case DTYPE_F16:
        return "float16";
    case DTYPE_I32:
        return "int32";
    case DTYPE_I64:
        return "int64";
    case DTYPE_U8:
        return "uint8";
    case DTYPE_I8:
        return "int8";
    case DTYPE_F8_E4M3:
        return "float8_e4m3fn";
    }
    BUG("no such dtype: %d", (int)t);
}

struct tensor tensor_1d(void *data, enum dtype t, int64_t n)
{
    return (struct tensor){.data = data, .dtype = t, .n_dims = 1, .shape = {n}, .row_stride = n};
}

struct tensor tensor_2d(void *data, enum dtype t, int64_t n_rows, int64_t n_cols)
{
    return (struct tensor){
        .data = data, .dtype = t, .n_dims = 2, .shape = {n_rows, n_cols}, .row_stride = n_cols};
}

struct tensor tensor_3d(void *data, enum dtype t, int64_t a, int64_t b, int64_t c)
{
    return (struct tensor){
        .data = data, .dtype = t, .n_dims = 3, .shape = {a, b, c}, .row_stride = c};
}

struct tensor tensor_columns(const struct tensor *t, int64_t first, int64_t n)
{
    struct tensor v = *t;

    if (t->n_dims != 2 || first < 0 || n < 0 || first + n > t->shape[1])
        BUG("columns [%lld, +%lld) of a %d-d tensor with %lld columns", (long long)first,
            (long long)n, t->n_dims, (long long)tensor_n_cols(t));
    v.data = (char *)t->data + (size_t)first * dtype_size(t->dtype);
    v.shape[1] = n;
    return v;
}

struct tensor tensor_rows(const struct tensor *t, int64_t first, int64_t n)
{
    struct tensor v = *t;
    int64_t rows_each = 1;

    for (int i = 1; i < t->n_dims - 1; i++)
        rows_each *= t->shape[i];
    if (t->n_dims < 2 || first < 0 || n < 0 || first + n > t->shape[0])
        BUG("rows [%lld, +%lld) of a tensor with %lld", (long long)first, (long long)n,
            (long long)t->shape[0]);
    v.data = (char *)t->data + (size_t)(first * rows_each * t->row_stride) * dtype_size(t->dtype);
    v.shape[0] = n;
    return v;
}

int64_t tensor_n_cols(const struct tensor *t)
{
    return t->shape[t->n_dims - 1];
}

int64_t tensor_n_rows(const struct tensor *t)
{
    int64_t n = 1;

    for (int i = 0; i < t->n_dims - 1; i++)
        n *= t->shape[i];
    return n;
}

int64_t tensor_n_elements(const struct tensor *t)
{
    return tensor_n_rows(t) * tensor_n_cols(t);
}

float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu, u;
    float f;

    if (exponent == 0x1f) { // infinity, NaN
        u = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent) {
        u = sign | (exponent + 112) << 23 | mantissa << 13;
    } else { // zero, subnormal: mantissa * 2^-24 is exact in float32
        f = (float)mantissa * 0x1p-24f;
        return sign ? -f : f;
    }
    memcpy(&f, &u, sizeof(f));
    return f;
}

void tensor_widen(float *dst, const void *src, enum dtype src_dtype, int64_t n)
{
    const uint16_t *half = src;

    switch (src_dtype) {
    case DTYPE_F32:
        memcpy(dst, src, (size_t)n * sizeof(float));
        return;
    case DTYPE_BF16:
        for (int64_t i = 0; i < n; i++)
            dst[i] = bf16_to_f32(half[i]);
        return;
    case DTYPE_F16:
        for (int64_t i = 0; i < n; i++)
            dst[i] = f16_to_f32(half[i]);
        return;
    default:
        BUG("%s cannot be widened to float32", dtype_name(src_dtype));
    }
}
