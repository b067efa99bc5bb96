/*
 * A copy and a product on the device (gpu_limits.h).
 */
#include "tests/bench/gpu_limits.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/clock.h"
#include "kernels/cuda_backend.h"
#include "kernels/log.h"

#define N_CALLS 4 // of each, in a round
#define WORKSPACE_BYTES ((size_t)32 << 20)

struct gpu_product {
    cublasLtHandle_t handle;
    cublasLtMatmulDescOpaque_t desc;
    cublasLtMatrixLayoutOpaque_t matrix, result; // w and x are alike; y is bfloat16
    cublasLtMatmulAlgo_t algorithm;
};

static void check_cuda(cudaError_t e, const char *what)
{
    if (e != cudaSuccess)
        die("CUDA: %s: %s", what, cudaGetErrorString(e));
}

static void check_blas(cublasStatus_t s, const char *what)
{
    if (s != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt: %s: status %d", what, (int)s);
}

/* y = x w^T, in the row-major form of kernels/cuda_matmul.cu. */
static struct gpu_product *describe(int64_t side, cudaDataType_t type)
{
    struct gpu_product *p = xcalloc(1, sizeof(*p));
    const int32_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
    const uint64_t workspace_bytes = WORKSPACE_BYTES, n = (uint64_t)side;
    const uint32_t no_split = CUBLASLT_REDUCTION_SCHEME_NONE;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t best;
    int n_found = 0;

    check_blas(cublasLtCreate(&p->handle), "create");
    check_blas(cublasLtMatmulDescInit(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product");
    check_blas(cublasLtMatmulDescSetAttribute(&p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                              sizeof(transposed)),
               "a product's form");
    check_blas(cublasLtMatmulDescSetAttribute(&p->desc, CUBLASLT_MATMUL_DESC_TRANSB, &plain,
                                              sizeof(plain)),
               "a product's form");
    check_blas(cublasLtMatrixLayoutInit(&p->matrix, type, n, n, side), "a matrix");
    check_blas(cublasLtMatrixLayoutInit(&p->result, CUDA_R_16BF, n, n, side), "a matrix");
    check_blas(cublasLtMatmulPreferenceInit(&preference), "preferences");
    check_blas(cublasLtMatmulPreferenceSetAttribute(&preference,
                                                    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                    &workspace_bytes, sizeof(workspace_bytes)),
               "the workspace");
    check_blas(cublasLtMatmulPreferenceSetAttribute(&preference,
                                                    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                    &no_split, sizeof(no_split)),
               "the reduction");
    check_blas(cublasLtMatmulAlgoGetHeuristic(p->handle, &p->desc, &p->matrix, &p->matrix,
                                              &p->result, &p->result, &preference, 1, &best,
                                              &n_found),
               "choosing an algorithm");
    if (n_found < 1)
        die("cuBLASLt has no algorithm for a product of side %lld", (long long)side);
    p->algorithm = best.algo;
    return p;
}

/* Device memory of random bfloat16 values in [-1, 1): what a product draws depends on its data. As
 * E4M3, of which none is a NaN either, its bytes are as random. */
static void *random_matrix(struct backend *b, int64_t side)
{
    size_t n = (size_t)(side * side);
    uint16_t *host = xcalloc(n, sizeof(*host));
    uint32_t state = 1;
    void *p = op_alloc(b, n * sizeof(*host));

    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        host[i] = f32_to_bf16((float)(int32_t)state / 2147483648.0f);
        if ((host[i] & 0x7f) == 0x7f)
            host[i] ^= 1;
    }
    op_upload(b, p, host, n * sizeof(*host));
    op_sync(b);
    free(host);
    return p;
}

void gpu_limits_open(struct gpu_limits *l, struct backend *b, size_t copy_bytes, int64_t side)
{
    *l = (struct gpu_limits){.b = b, .copy_bytes = copy_bytes, .side = side};
    l->from = op_alloc(b, copy_bytes);
    l->to = op_alloc(b, copy_bytes);
    l->x = random_matrix(b, side);
    l->w = random_matrix(b, side);
    l->y = op_alloc(b, (size_t)(side * side) * sizeof(uint16_t));
    l->workspace = op_alloc(b, WORKSPACE_BYTES);
    l->bfloat16 = describe(side, CUDA_R_16BF);
    l->fp8 = b->has_fp8 ? describe(side, CUDA_R_8F_E4M3) : NULL;
}

static void copy(struct gpu_limits *l)
{
    check_cuda(cudaMemcpyAsync(l->to, l->from, l->copy_bytes, cudaMemcpyDeviceToDevice,
                               backend_cuda_stream(l->b)),
               "copying on the device");
}

static void multiply(struct gpu_limits *l, struct gpu_product *p)
{
    const float one = 1, zero = 0;

    check_blas(cublasLtMatmul(p->handle, &p->desc, &one, l->w, &p->matrix, l->x, &p->matrix, &zero,
                              l->y, &p->result, l->y, &p->result, &p->algorithm, l->workspace,
                              WORKSPACE_BYTES, backend_cuda_stream(l->b)),
               "a product");
}

static void multiply_bfloat16(struct gpu_limits *l)
{
    multiply(l, l->bfloat16);
}

static void multiply_fp8(struct gpu_limits *l)
{
    multiply(l, l->fp8);
}

/* Seconds of one call, of N_CALLS in a row. */
static double time_of(struct gpu_limits *l, void (*run)(struct gpu_limits *))
{
    op_sync(l->b);
    uint64_t begun = clock_now_ns();
    for (int i = 0; i < N_CALLS; i++)
        run(l);
    op_sync(l->b);
    return (double)(clock_now_ns() - begun) * 1e-9 / N_CALLS;
}

struct gpu_limits_rates gpu_limits_measure(struct gpu_limits *l)
{
    double side = (double)l->side, flops = 2.0 * side * side * side;
    return (struct gpu_limits_rates){.bytes_per_s = 2.0 * (double)l->copy_bytes / time_of(l, copy),
                                     .flops_per_s = flops / time_of(l, multiply_bfloat16),
                                     .fp8_flops_per_s =
                                         l->fp8 ? flops / time_of(l, multiply_fp8) : 0};
}

void gpu_limits_close(struct gpu_limits *l)
{
    void *memory[] = {l->from, l->to, l->x, l->w, l->y, l->workspace};

    op_sync(l->b);
    for (size_t i = 0; i < sizeof(memory) / sizeof(memory[0]); i++)
        op_free(l->b, memory[i]);
    struct gpu_product *products[] = {l->bfloat16, l->fp8};
    for (int i = 0; i < 2 && products[i]; i++) {
        check_blas(cublasLtDestroy(products[i]->handle), "destroy");
        free(products[i]);
    }
}
