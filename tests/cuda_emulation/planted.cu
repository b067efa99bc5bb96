/*
 * Mistakes planted on purpose, one a run: `cuda_planted_test NAME` must be caught by the emulation
 * (or, where the name says so, by the sanitizer it is built with). `none` must pass.
 */
#include <stdio.h>
#include <string.h>

#include "kernels/cuda_internal.h"
extern "C" {
#include "kernels/cuda_all_reduce.h"
}

enum planted {
    NONE,
    NO_BARRIER,
    DIVERGENT_BARRIER,
    EXITED_LANE,
    EARLY_READ,
    NEVER_WAITED,
    BLOCKS_RACE,
    HOST_TOUCH,
    TOO_MANY_THREADS,
    CAPTURED_ALLOCATION,
    REUSED_HALF,
    REUSED_SHARED,
    ABSENT_PEER,
    N_PLANTED
};
static const char *const names[N_PLANTED] = {
    "none",         "no-barrier",    "divergent-barrier", "exited-lane",      "early-read",
    "never-waited", "blocks-race",   "host-touch",        "too-many-threads", "captured-allocation",
    "reused-half",  "reused-shared", "absent-peer"};

/* y[i] <- sum over the block of x, through shared memory; y[n] counts blocks. */
__global__ void sum_kernel(float *y, const float *x, enum planted planted)
{
    CUDA_SHARED(float, partial, 32);
    float v = x[threadIdx.x];

    if (planted == EXITED_LANE && threadIdx.x == 3)
        return;
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0)
        partial[threadIdx.x / 32] = v;
    if (planted != NO_BARRIER && (planted != DIVERGENT_BARRIER || threadIdx.x < 64))
        __syncthreads();
    v = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0.0f);
    if (planted == REUSED_SHARED) { // which other warps may still have to read
        if (threadIdx.x % 32 == 0)
            partial[threadIdx.x / 32] = v;
        __syncthreads();
    }
    if (planted == BLOCKS_RACE)
        y[threadIdx.x] = v;
    else
        y[blockIdx.x * blockDim.x + threadIdx.x] = v;
}

/* Through cp.async into shared memory. */
__global__ void copy_kernel(float *y, const float *x, enum planted planted)
{
    CUDA_SHARED(uint4, buffer, 128);
    const float *values = (const float *)buffer;

    cp_async_16(&buffer[threadIdx.x], x + 4 * threadIdx.x, true);
    cp_async_commit();
    if (planted == NEVER_WAITED)
        return;
    if (planted == EARLY_READ)
        cp_async_wait<1>(); // leaves the group that is needed
    else
        cp_async_wait<0>();
    y[threadIdx.x] = values[4 * threadIdx.x];
    cp_async_wait<0>();
}

static int check(struct backend *b, const float *y, float want, int n)
{
    float got[256];

    b->ops->download(b, got, y, (size_t)n * sizeof(float));
    for (int i = 0; i < n; i++)
        if (!(got[i] == want)) {
            printf("wrong result: %g instead of %g\n", got[i], want);
            return 1;
        }
    return 0;
}

/* Uploads from pinned memory that is filled anew, once the first upload has read it. */
static int check_staging(struct backend *b, float *y, enum planted planted)
{
    cudaStream_t stream = (cudaStream_t)backend_cuda_stream(b);
    cudaEvent_t read;
    float *half;

    CUDA_CHECK(cudaMallocHost((void **)&half, sizeof(float)));
    CUDA_CHECK(cudaEventCreateWithFlags(&read, cudaEventDisableTiming));
    *half = 3.0f;
    CUDA_CHECK(cudaMemcpyAsync(y, half, sizeof(float), cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaEventRecord(read, stream));
    if (planted != REUSED_HALF)
        CUDA_CHECK(cudaEventSynchronize(read));
    *half = 4.0f;
    int failed = check(b, y, 3.0f, 1);
    CUDA_CHECK(cudaEventDestroy(read));
    CUDA_CHECK(cudaFreeHost(half));
    return failed;
}

/* A sum among two, where nobody plays the other. */
static void wait_for_nobody(struct backend *b, float *x)
{
    struct cuda_all_reduce one, other;

    cuda_all_reduce_open(&one, b, 0, 2);
    cuda_all_reduce_open(&other, b, 1, 2);
    one.mailboxes[1] = other.mailboxes[1];
    backend_cuda_all_reduce(b, &one, x, 1, 1000000, 1);
    b->ops->sync(b);
}

int main(int argc, char **argv)
{
    struct cuda_options o = {};
    o.scratch_bytes = 1 << 20;
    struct backend *b = backend_cuda_open(&o);
    cudaStream_t stream = (cudaStream_t)backend_cuda_stream(b);
    float *x = (float *)b->ops->alloc(b, 512 * sizeof(float)), ones[512];
    float *y = (float *)b->ops->alloc(b, 512 * sizeof(float));
    int planted = NONE;

    while (argc > 1 && planted < N_PLANTED && strcmp(argv[1], names[planted]))
        planted++;
    for (int i = 0; i < 512; i++)
        ones[i] = 1.0f;
    b->ops->upload(b, x, ones, sizeof(ones));
    if (planted == HOST_TOUCH)
        printf("%g\n", x[0]);
    if (planted == CAPTURED_ALLOCATION)
        op_graph_begin(b), b->ops->alloc(b, 64);
    if (planted == ABSENT_PEER)
        wait_for_nobody(b, y);
    LAUNCH(sum_kernel, dim3(2), dim3(planted == TOO_MANY_THREADS ? 1056 : 128), 0, stream, y, x,
           (enum planted)planted);
    int failed = check(b, y, 128.0f, 256);
    LAUNCH(copy_kernel, dim3(1), dim3(128), 0, stream, y, x, (enum planted)planted);
    failed |= check(b, y, 1.0f, 128);
    failed |= check_staging(b, y, (enum planted)planted);
    b->ops->free(b, x);
    b->ops->free(b, y);
    b->ops->close(b);
    printf(failed ? "wrong\n" : "all right\n");
    return failed;
}
