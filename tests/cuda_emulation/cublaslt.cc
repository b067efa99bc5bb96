/*
 * cuBLASLt by plain loops. D [m, n] (column-major) = op(A) B + beta C, then the bias of each row of
 * D. Sums run in 16 interleaved float32 partial sums combined in order: a function of k alone, as
 * the back end demands of the algorithms it picks.
 *
 * Checks what the real library would refuse: types, the TN form, alignment worse than promised to
 * the heuristic, an algorithm chosen for another shape, memory that is not the device's; of E4M3
 * products (cublasLtMatmul()'s documentation, "FP8 kernels") a device older than sm_89, another
 * compute type than float32, and pointers, strides and sides that are not multiples of 16 bytes.
 */
#include "cublasLt.h"

#include <math.h>
#include <string.h>
#include <vector>

#include "execution.h"
#include "kernels/tensor.h"

struct emulated_cublaslt {
    int unused;
};

static int size_of(cudaDataType type)
{
    return type == CUDA_R_32F ? 4 : type == CUDA_R_16BF ? 2 : 1;
}

static float e4m3_to_f32(uint8_t code)
{
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float v =
        exponent ? ldexpf(1.0f + (float)mantissa / 8, exponent - 7) : ldexpf((float)mantissa, -9);

    return (code & 0x7f) == 0x7f ? NAN : code & 0x80 ? -v : v;
}

static void load_row(const void *p, cudaDataType type, int64_t first, int64_t n, float *to)
{
    if (type == CUDA_R_32F)
        memcpy(to, (const float *)p + first, (size_t)n * sizeof(float));
    else if (type == CUDA_R_16BF)
        for (int64_t i = 0; i < n; i++)
            to[i] = bf16_to_f32(((const uint16_t *)p)[first + i]);
    else
        for (int64_t i = 0; i < n; i++)
            to[i] = e4m3_to_f32(((const uint8_t *)p)[first + i]);
}

static float load(const void *p, cudaDataType type, int64_t i)
{
    float v;

    load_row(p, type, i, 1, &v);
    return v;
}

static void store(void *p, cudaDataType type, int64_t i, float v)
{
    if (type == CUDA_R_32F)
        ((float *)p)[i] = v;
    else
        ((uint16_t *)p)[i] = f32_to_bf16(v);
}

/* The largest power of two up to 256 that divides a pointer and a stride in bytes. */
static uint32_t alignment_of(const void *p, cublasLtMatrixLayout_t l)
{
    uintptr_t bits = (uintptr_t)p | (uintptr_t)(l->ld * size_of(l->type)) | 256;

    return (uint32_t)(bits & ~(bits - 1));
}

struct product {
    int64_t m, n, k;
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t a, b, c, d;
    const void *pa, *pb, *pc;
    void *pd;
    float alpha, beta;
};

static void run(const product &p)
{
    std::vector<float> x((size_t)p.k), w((size_t)p.k * (size_t)p.m);

    for (int64_t i = 0; i < p.m; i++)
        load_row(p.pa, p.a.type, i * p.a.ld, p.k, &w[(size_t)(i * p.k)]);
    for (int64_t j = 0; j < p.n; j++) {
        load_row(p.pb, p.b.type, j * p.b.ld, p.k, x.data());
        for (int64_t i = 0; i < p.m; i++) {
            const float *wi = &w[(size_t)(i * p.k)];
            float partial[16] = {}, sum = 0;
            int64_t k = 0;
            for (; k + 16 <= p.k; k += 16)
                for (int t = 0; t < 16; t++)
                    partial[t] += x[(size_t)(k + t)] * wi[k + t];
            for (int t = 0; k < p.k; k++, t++)
                partial[t] += x[(size_t)k] * wi[k];
            for (int t = 0; t < 16; t++)
                sum += partial[t];
            sum *= p.alpha;
            if (p.beta != 0.0f)
                sum += p.beta * load(p.pc, p.c.type, j * p.c.ld + i);
            if (p.desc.epilogue == CUBLASLT_EPILOGUE_BIAS)
                sum += load(p.desc.bias, p.d.type, i);
            store(p.pd, p.d.type, j * p.d.ld + i, sum);
        }
    }
}

/* What is asked of layouts beyond all others'. */
static int fp8_is_sound(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                        cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t d)
{
    struct cudaDeviceProp p;

    cudaGetDeviceProperties(&p, 0);
    return (p.major > 8 || p.minor >= 9) && desc->compute == CUBLAS_COMPUTE_32F &&
           desc->epilogue == CUBLASLT_EPILOGUE_DEFAULT && a->rows % 16 == 0 && a->ld % 16 == 0 &&
           b->ld % 16 == 0 && d->rows * (uint64_t)size_of(d->type) % 16 == 0 &&
           d->ld * size_of(d->type) % 16 == 0;
}

static int sound(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                 cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d)
{
    return desc->trans_a == CUBLAS_OP_T && desc->trans_b == CUBLAS_OP_N && a->type == b->type &&
           c->type == d->type && d->type != CUDA_R_8F_E4M3 &&
           (a->type != CUDA_R_32F || d->type == CUDA_R_32F) &&
           (a->type != CUDA_R_8F_E4M3 || fp8_is_sound(desc, a, b, d)) &&
           desc->scale == CUDA_R_32F && a->rows == b->rows && d->rows == a->cols &&
           d->cols == b->cols && c->rows == d->rows && c->cols == d->cols &&
           a->ld >= (int64_t)a->rows && b->ld >= (int64_t)b->rows && d->ld >= (int64_t)d->rows &&
           a->rows && d->rows && d->cols;
}

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = new emulated_cublaslt();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t desc, cublasComputeType_t compute,
                                      cudaDataType_t scale)
{
    *desc = {compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t n_bytes)
{
    int pointer = attribute == CUBLASLT_MATMUL_DESC_BIAS_POINTER;

    if (n_bytes != (pointer ? sizeof(void *) : sizeof(int32_t)))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (pointer)
        memcpy(&desc->bias, value, n_bytes);
    else if (attribute == CUBLASLT_MATMUL_DESC_TRANSA)
        memcpy(&desc->trans_a, value, n_bytes);
    else if (attribute == CUBLASLT_MATMUL_DESC_TRANSB)
        memcpy(&desc->trans_b, value, n_bytes);
    else
        memcpy(&desc->epilogue, value, n_bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t layout, cudaDataType type,
                                        uint64_t rows, uint64_t cols, int64_t ld)
{
    *layout = {type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t preference)
{
    *preference = {0, ~0u, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t n_bytes)
{
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) {
        if (n_bytes != sizeof(uint64_t))
            return CUBLAS_STATUS_INVALID_VALUE;
        memcpy(&preference->workspace_bytes, value, n_bytes);
        return CUBLAS_STATUS_SUCCESS;
    }
    if (n_bytes != sizeof(uint32_t))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
        memcpy(&preference->reduction_mask, value, n_bytes);
    else
        memcpy(&preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES],
               value, n_bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference,
                                              int n_requested,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int *n_returned)
{
    (void)handle;
    *n_returned = 0;
    if (!sound(desc, a, b, c, d) || n_requested < 1)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (preference->reduction_mask != CUBLASLT_REDUCTION_SCHEME_NONE)
        emulated_die("cuBLASLt: split sums allowed: results would depend on the batch");
    for (int i = 0; i < 4; i++)
        if (a->type == CUDA_R_8F_E4M3 && preference->alignment[i] < 16)
            return CUBLAS_STATUS_NOT_SUPPORTED;
    memset(&results[0], 0, sizeof(results[0]));
    results[0].algo.k = a->rows;
    results[0].algo.type = a->type;
    results[0].algo.type_y = d->type;
    results[0].algo.epilogue = desc->epilogue;
    memcpy(results[0].algo.alignment, preference->alignment, sizeof(preference->alignment));
    *n_returned = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t layout_a, const void *b,
                              cublasLtMatrixLayout_t layout_b, const void *beta, const void *c,
                              cublasLtMatrixLayout_t layout_c, void *d,
                              cublasLtMatrixLayout_t layout_d, const cublasLtMatmulAlgo_t *algo,
                              void *workspace, size_t workspace_bytes, cudaStream_t stream)
{
    product p;

    (void)handle;
    (void)workspace;
    (void)workspace_bytes;
    if (!sound(desc, layout_a, layout_b, layout_c, layout_d))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (algo->k != layout_a->rows || algo->type != layout_a->type ||
        algo->type_y != layout_d->type || algo->epilogue != desc->epilogue)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (alignment_of(a, layout_a) < algo->alignment[0] ||
        alignment_of(b, layout_b) < algo->alignment[1] ||
        alignment_of(c, layout_c) < algo->alignment[2] ||
        alignment_of(d, layout_d) < algo->alignment[3])
        return CUBLAS_STATUS_INVALID_VALUE;
    p = {(int64_t)layout_d->rows,
         (int64_t)layout_d->cols,
         (int64_t)layout_a->rows,
         *desc,
         *layout_a,
         *layout_b,
         *layout_c,
         *layout_d,
         a,
         b,
         c,
         d,
         *(const float *)alpha,
         *(const float *)beta};
    emulated_submit(stream, [p] { run(p); });
    return CUBLAS_STATUS_SUCCESS;
}

} // extern "C"
