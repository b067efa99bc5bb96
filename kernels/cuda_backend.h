/*
 * The CUDA back end as the rest of the daemon sees it: how it is opened, and the things that are
 * not ops (stream, the tree sum of comm_nccl, device memory, where the device is).
 *
 * Plain C, no CUDA headers. Where the build has no CUDA toolkit, cuda_absent.c answers instead:
 * backend_cuda_count() is 0 and backend_cuda_open() dies.
 *
 * What a caller must know beyond kernels/backend.h:
 *   - every pointer handed to an op is device memory (op_alloc), except kv_of_head and the shapes;
 *   - ops return before they have run; op_sync() and op_download() wait;
 *   - in BF16 activations are bfloat16, sums float32; a row-parallel product that goes to an
 *     all-reduce should have a float32 y.
 */
#ifndef INTERNVLD_KERNELS_CUDA_BACKEND_H
#define INTERNVLD_KERNELS_CUDA_BACKEND_H

#include "kernels/backend.h"

/* Of the device, taken at the opening: scratch of the running op, cuBLASLt's workspace; and at
 * most, with quantised float32 weights, their dense values. Of pinned host memory: staging. Every
 * block is rounded up to CUDA_BLOCK_BYTES. */
#define CUDA_SCRATCH_BYTES ((size_t)256 << 20)
#define CUDA_WORKSPACE_BYTES ((size_t)32 << 20)
#define CUDA_DENSE_BYTES ((size_t)64 << 20)
#define CUDA_STAGING_BYTES ((size_t)16 << 20)
#define CUDA_BLOCK_BYTES 256

/* Rows of FP8 codes come in whole sixteens (kernels/cuda_codes.h). */
#define CUDA_FP8_ROWS 16
/* Of one lane of a row of codes of so many bits: whole steps (kernels/cuda_codes.h). */
#define CUDA_STEP_BYTES 64
static inline size_t cuda_codes_lane_bytes(int bits, int64_t n_columns)
{
    size_t n_bytes = ((size_t)n_columns * (size_t)bits + 7) / 8;
    return (n_bytes + CUDA_STEP_BYTES - 1) / CUDA_STEP_BYTES * CUDA_STEP_BYTES;
}

struct cuda_options {
    int device;                  // number among this host's devices
    int n_threads;               // on the host: struct backend's; 0: 1
    enum dtype activation_dtype; // BF16, or F32 (--dtype float32)
    int deterministic;           // 1: lanes and tree, bitwise the same in every layout
    int enforce_eager;           // 1: no step is to be recorded and replayed
    size_t scratch_bytes;        // 0: 256 MiB
    size_t dense_bytes; // most of a quantised float32 weight that is dense at a time; 0: 64 MiB
};

/* The number of devices of this host, 0 without a driver. */
int backend_cuda_count(void);
/* name [n_bytes] <- what the first of them calls itself, "" where there is none. */
void backend_cuda_name(char *name, size_t n_bytes);
/* address [n_bytes] <- where device `device` of this host is on the PCI bus: "0000:1B:00.0". Dies
 * when it does not exist. */
void backend_cuda_pci_address(int device, char *address, size_t n_bytes);
/* Dies when the device does not exist or is older than sm_80. backend_close() closes it. */
struct backend *backend_cuda_open(const struct cuda_options *o);
/* The cudaStream_t that every op of `b` runs on. Borrowed. */
void *backend_cuda_stream(struct backend *b);
/* Bytes free and in all on the device now. */
void backend_cuda_memory(struct backend *b, size_t *free_bytes, size_t *total_bytes);

/* x [n] <- parts [n_parts, n] summed by the lanes' binary tree; n_parts a power of two up to 8.
 * x may be parts. The reduction of comm_nccl's deterministic all-reduce. */
void backend_cuda_tree_sum(struct backend *b, float *x, const float *parts, int n_parts, size_t n);

#endif
