/*
 * CUDA's execution model on one host thread: fibres, barriers, warp collectives, shared memory.
 *
 * One fibre a CUDA thread; blocks run one after another. INTERNVLD_EMULATION_SEED picks the
 * schedule: 0 forward, 1 backward, others random orders of warps and lanes. A barrier reached by
 * some threads only, a collective whose mask names a lane that has left, or a deadlock ends the
 * process with block and thread named.
 *
 * Under ThreadSanitizer each CUDA thread is one of its fibres; only the start and end of a launch,
 * __syncthreads() within a block and __syncwarp() within a warp order memory. A missing barrier is
 * then a reported race, in shared memory and, between blocks too, in global memory. execution.cc
 * itself is never instrumented by it.
 */
#ifndef CUDA_EMULATION_EXECUTION_H
#define CUDA_EMULATION_EXECUTION_H

#include <functional>
#include <stddef.h>
#include <stdint.h>
#include <tuple>

#include "cuda_runtime_api.h"

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c)
    {
    }
};

struct emulated_context {
    dim3 thread, block, block_dim, grid_dim;
    unsigned linear; // thread's number in its block
};
extern emulated_context *emulated_now; // the running CUDA thread

enum emulated_operation {
    EMULATED_SYNCWARP = 1,
    EMULATED_SHUFFLE,
    EMULATED_LDMATRIX,
    EMULATED_MMA
};
/* On a `complete` function: it runs for all lanes at once, which a race detector must not judge. */
#define EMULATION_UNSEEN __attribute__((no_sanitize("thread")))
/* `complete` sees the in and out pointers of all lanes of the mask at once and fills the outs. */
typedef void (*emulated_complete)(unsigned mask, const void *const in[32], void *const out[32]);

void emulated_barrier(const char *file, int line);
void emulated_collective(unsigned mask, emulated_operation op, const void *in, void *out,
                         emulated_complete complete = nullptr);
/* Of a thread that waits for another process: lets other threads and processes run. */
void emulated_pause(void);
[[noreturn]] void emulated_die(const char *what);

/* Memory of the running block, fresh and filled with 0xff (a NaN) for every block. `site` tells one
 * __shared__ declaration from another. */
void *emulated_shared(const void *site, size_t n_bytes);
void *emulated_dynamic_shared(void);

/* cp.async: the copy happens at the wait that covers its group, by the thread that asked. */
struct emulated_copy {
    void *dst;
    const void *src; // NULL: zeros
    int group;
};
void emulated_copy_push(void *dst, const void *src);
void emulated_copy_commit(void);
/* The next copy of a group older than the last `n_pending`, taken off the list; 0: none is left. */
int emulated_copy_pop(int n_pending, emulated_copy *c);

/* Runs a grid now. */
void emulated_run(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                  const std::function<void()> &kernel);
/* runtime.cc: checks the configuration, then queues the grid on the stream (or records it); with
 * another process's memory among its arguments it is run, since that process may wait for it. */
void emulated_launch_checked(const void *kernel, dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t s, const void *arguments, size_t n_bytes,
                             std::function<void()> body);
/* cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes). */
cudaError_t emulated_func_limit(const void *kernel, int n_bytes);
/* Queues any other work of a stream: copies, cuBLASLt, NCCL. It may touch device memory. */
void emulated_submit(cudaStream_t s, std::function<void()> work);
/* Runs what is queued now, unless the stream is being recorded: other ranks wait for it. */
void emulated_flush(cudaStream_t s);

template <class... P, class... A>
void emulated_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t s, A... arguments)
{
    std::tuple<P...> values(arguments...); // as the device does: by value, at the launch
    emulated_launch_checked((const void *)kernel, grid, block, shared_bytes, s, &values,
                            sizeof(values), [kernel, values] { std::apply(kernel, values); });
}

#endif
