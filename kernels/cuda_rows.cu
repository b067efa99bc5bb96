/*
 * Ops that see one row at a time: embedding, row moves, norms, sums, gate, type change.
 *
 * One block a row, so a row's result never depends on how many rows there are; the number of
 * threads is a function of the row's length alone, which fixes the order of a norm's sum. Sums and
 * functions are float32 whatever the tensors hold. All are bound by memory; none was timed on a
 * device yet.
 */
#include "kernels/cuda_internal.h"

template <class T, class U>
__global__ void embed_kernel(T *y, int64_t y_stride, const U *table, int64_t table_stride,
                             const int32_t *ids, int64_t first_row, int64_t n_rows, int64_t n_cols)
{
    int64_t i = blockIdx.x, row = ids[i] - first_row;
    bool here = row >= 0 && row < n_rows;

    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x)
        y[i * y_stride + c] = from_float<T>(here ? to_float(table[row * table_stride + c]) : 0.0f);
}

void cuda_embed(struct backend *b, struct tensor *y, const struct tensor *table, const int32_t *ids,
                int32_t first_row)
{
    int64_t n = tensor_n_rows(y), n_cols = tensor_n_cols(y);

    WITH_TYPE(y->dtype, T,
              WITH_TYPE(table->dtype, U,
                        LAUNCH((embed_kernel<T, U>), dim3((unsigned)n), dim3(row_threads(n_cols)),
                               0, cuda_state_of(b)->stream, (T *)y->data, y->row_stride,
                               (const U *)table->data, table->row_stride, ids, (int64_t)first_row,
                               tensor_n_rows(table), n_cols)));
}

/* Row `to ? to[i] : i` of y <- row `from ? from[i] : i` of x; a negative number skips the row. */
template <class T, class U>
__global__ void move_rows_kernel(T *y, int64_t y_stride, const int32_t *to, const U *x,
                                 int64_t x_stride, const int32_t *from, int64_t n_cols)
{
    int64_t i = blockIdx.x, target = to ? to[i] : i, source = from ? from[i] : i;

    if (target < 0 || source < 0)
        return;
    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x)
        y[target * y_stride + c] = from_float<T>(to_float(x[source * x_stride + c]));
}

template <class T, class U>
static void move_rows_of(struct backend *b, struct tensor *y, const int32_t *to,
                         const struct tensor *x, const int32_t *from, int64_t n)
{
    int64_t n_cols = tensor_n_cols(y);

    LAUNCH((move_rows_kernel<T, U>), dim3((unsigned)n), dim3(row_threads(n_cols)), 0,
           cuda_state_of(b)->stream, (T *)y->data, y->row_stride, to, (const U *)x->data,
           x->row_stride, from, n_cols);
}

void cuda_scatter_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                       const int32_t *rows)
{
    WITH_TYPE(y->dtype, T, move_rows_of<T, T>(b, y, rows, x, NULL, tensor_n_rows(x)));
}

void cuda_gather_rows(struct backend *b, struct tensor *y, const struct tensor *x,
                      const int32_t *rows)
{
    WITH_TYPE(y->dtype, T, move_rows_of<T, T>(b, y, NULL, x, rows, tensor_n_rows(y)));
}

/* Same types of any kind are bytes; F32 and BF16 are converted. */
void cuda_copy(struct backend *b, struct tensor *y, const struct tensor *x)
{
    size_t n_bytes = (size_t)tensor_n_elements(y) * dtype_size(y->dtype);

    if (y->dtype == x->dtype && y->row_stride == tensor_n_cols(y) &&
        x->row_stride == tensor_n_cols(x))
        CUDA_CHECK(cudaMemcpyAsync(y->data, x->data, n_bytes, cudaMemcpyDeviceToDevice,
                                   cuda_state_of(b)->stream));
    else if (y->dtype == x->dtype && dtype_size(x->dtype) == sizeof(float))
        move_rows_of<float, float>(b, y, NULL, x, NULL, tensor_n_rows(x));
    else
        WITH_TYPE(
            y->dtype, T,
            WITH_TYPE(x->dtype, U, move_rows_of<T, U>(b, y, NULL, x, NULL, tensor_n_rows(x))));
}

template <class T, class U>
__global__ void rms_norm_kernel(T *y, int64_t y_stride, const U *x, int64_t x_stride,
                                const float *weight, float eps, int64_t n_cols)
{
    const U *xr = x + blockIdx.x * x_stride;
    float sum = 0;

    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x) {
        float v = to_float(xr[c]);
        sum = fmaf(v, v, sum);
    }
    store_rms_norm(y + blockIdx.x * y_stride, xr, sum, weight, eps, n_cols);
}

/* add_kernel and rms_norm_kernel in one: each thread reads back what it wrote. */
template <class T, class U>
__global__ void add_rms_norm_kernel(T *y, int64_t y_stride, U *x, int64_t x_stride, const U *add,
                                    int64_t add_stride, const float *weight, float eps,
                                    int64_t n_cols)
{
    U *xr = x + blockIdx.x * x_stride;
    const U *ar = add + blockIdx.x * add_stride;
    float sum = 0;

    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x) {
        U added = from_float<U>(to_float(xr[c]) + to_float(ar[c]));
        float v = to_float(added);
        xr[c] = added;
        sum = fmaf(v, v, sum);
    }
    store_rms_norm(y + blockIdx.x * y_stride, xr, sum, weight, eps, n_cols);
}

void cuda_rms_norm(struct backend *b, struct tensor *y, const struct tensor *x, const float *weight,
                   float eps)
{
    int64_t n = tensor_n_rows(y), n_cols = tensor_n_cols(y);

    WITH_TYPE(
        y->dtype, T,
        WITH_TYPE(x->dtype, U,
                  LAUNCH((rms_norm_kernel<T, U>), dim3((unsigned)n), dim3(row_threads(n_cols)), 0,
                         cuda_state_of(b)->stream, (T *)y->data, y->row_stride, (const U *)x->data,
                         x->row_stride, weight, eps, n_cols)));
}

void cuda_add_rms_norm(struct backend *b, struct tensor *y, struct tensor *x,
                       const struct tensor *add, const float *weight, float eps)
{
    int64_t n = tensor_n_rows(y), n_cols = tensor_n_cols(y);

    WITH_TYPE(y->dtype, T,
              WITH_TYPE(x->dtype, U,
                        LAUNCH((add_rms_norm_kernel<T, U>), dim3((unsigned)n),
                               dim3(row_threads(n_cols)), 0, cuda_state_of(b)->stream, (T *)y->data,
                               y->row_stride, (U *)x->data, x->row_stride, (const U *)add->data,
                               add->row_stride, weight, eps, n_cols)));
}

template <class T, class U>
__global__ void layer_norm_kernel(T *y, int64_t y_stride, const U *x, int64_t x_stride,
                                  const float *weight, const float *bias, float eps, int64_t n_cols)
{
    const U *xr = x + blockIdx.x * x_stride;
    T *yr = y + blockIdx.x * y_stride;
    float sum = 0, squares = 0;

    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x)
        sum += to_float(xr[c]);
    float mean = block_sum(sum) / (float)n_cols;
    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x) {
        float v = to_float(xr[c]) - mean;
        squares = fmaf(v, v, squares);
    }
    float inverse = 1.0f / sqrtf(block_sum(squares) / (float)n_cols + eps);
    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x)
        yr[c] = from_float<T>(fmaf((to_float(xr[c]) - mean) * inverse, weight ? weight[c] : 1.0f,
                                   bias ? bias[c] : 0.0f));
}

void cuda_layer_norm(struct backend *b, struct tensor *y, const struct tensor *x,
                     const float *weight, const float *bias, float eps)
{
    int64_t n = tensor_n_rows(y), n_cols = tensor_n_cols(y);

    WITH_TYPE(
        y->dtype, T,
        WITH_TYPE(x->dtype, U,
                  LAUNCH((layer_norm_kernel<T, U>), dim3((unsigned)n), dim3(row_threads(n_cols)), 0,
                         cuda_state_of(b)->stream, (T *)y->data, y->row_stride, (const U *)x->data,
                         x->row_stride, weight, bias, eps, n_cols)));
}

template <class T, class U>
__global__ void add_kernel(T *y, int64_t y_stride, const U *x, int64_t x_stride, int64_t n_cols)
{
    T *yr = y + blockIdx.x * y_stride;
    const U *xr = x + blockIdx.x * x_stride;

    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x)
        yr[c] = from_float<T>(to_float(yr[c]) + to_float(xr[c]));
}

void cuda_add(struct backend *b, struct tensor *y, const struct tensor *x)
{
    int64_t n = tensor_n_rows(y), n_cols = tensor_n_cols(y);

    WITH_TYPE(y->dtype, T,

              LAUNCH((add_kernel<T, T>), dim3((unsigned)n), dim3(row_threads(n_cols)), 0,
                     cuda_state_of(b)->stream, (T *)y->data, y->row_stride, (const T *)x->data,
                     x->row_stride, n_cols));
}

void cuda_add_bias(struct backend *b, struct tensor *y, const float *bias)
{
    int64_t n = tensor_n_rows(y), n_cols = tensor_n_cols(y);

    WITH_TYPE(y->dtype, T,
              LAUNCH((add_kernel<T, float>), dim3((unsigned)n), dim3(row_threads(n_cols)), 0,
                     cuda_state_of(b)->stream, (T *)y->data, y->row_stride, bias, (int64_t)0,
                     n_cols));
}

template <class T>
__global__ void gated_activation_kernel(T *y, int64_t y_stride, const T *x, int64_t x_stride,
                                        enum activation act, int64_t n_cols)
{
    const T *gate = x + blockIdx.x * x_stride, *up = gate + n_cols;
    T *yr = y + blockIdx.x * y_stride;

    for (int64_t c = threadIdx.x; c < n_cols; c += blockDim.x)
        yr[c] = from_float<T>(activate(to_float(gate[c]), act) * to_float(up[c]));
}

void cuda_gated_activation(struct backend *b, struct tensor *y, const struct tensor *x,
                           enum activation act)
{
    int64_t n = tensor_n_rows(y), n_cols = tensor_n_cols(y);

    WITH_TYPE(y->dtype, T,

              LAUNCH((gated_activation_kernel<T>), dim3((unsigned)n), dim3(row_threads(n_cols)), 0,
                     cuda_state_of(b)->stream, (T *)y->data, y->row_stride, (const T *)x->data,
                     x->row_stride, act, n_cols));
}
