/*
 * A typed view of memory: shape, type, pointer. Owns nothing.
 *
 * Row-major. Rows of the last dimension are contiguous; `row_stride` (elements) is the distance
 * between the starts of consecutive rows when the tensor is seen as [n_rows, n_cols], which lets q,
 * k and v be views into one buffer.
 */
#ifndef INTERNVLD_KERNELS_TENSOR_H
#define INTERNVLD_KERNELS_TENSOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum dtype {
    DTYPE_F32,
    DTYPE_BF16,
    DTYPE_F16,
    DTYPE_I32,
    DTYPE_I64,
    DTYPE_U8,
    DTYPE_I8,      // of codes of quantised weights in files, as the next
    DTYPE_F8_E4M3,
};

#define TENSOR_MAX_DIMS 5
struct tensor {
    void *data;
    enum dtype dtype;
    int n_dims;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t row_stride; // elements; shape[n_dims - 1] when contiguous
};

size_t dtype_size(enum dtype t);      // bytes
const char *dtype_name(enum dtype t); // "float32", "bfloat16", …: Transformers' names

struct tensor tensor_1d(void *data, enum dtype t, int64_t n);
struct tensor tensor_2d(void *data, enum dtype t, int64_t n_rows, int64_t n_cols);
struct tensor tensor_3d(void *data, enum dtype t, int64_t a, int64_t b, int64_t c);
/* Columns [first, first + n) of a 2-d tensor, as a view. */
struct tensor tensor_columns(const struct tensor *t, int64_t first, int64_t n);
/* Rows [first, first + n) of a tensor, as a view with the same number of dimensions. */
struct tensor tensor_rows(const struct tensor *t, int64_t first, int64_t n);
int64_t tensor_n_elements(const struct tensor *t);
int64_t tensor_n_cols(const struct tensor *t); // shape of the last dimension
int64_t tensor_n_rows(const struct tensor *t); // product of all the others

/* bfloat16 is the upper half of a float32; rounding is to nearest, ties to even; a NaN stays a NaN.
 */
static inline float bf16_to_f32(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}

static inline uint16_t f32_to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

float f16_to_f32(uint16_t h);
/* `n` elements of `src` (any of F32, BF16, F16) widened to float32. */
void tensor_widen(float *dst, const void *src, enum dtype src_dtype, int64_t n);

#endif
