/*
 * The sum of a few GPUs' small vectors in one kernel: each rank reads the parts of all.
 *
 * Plain C, no CUDA headers. Knows device memory that other devices can read and write, and nothing
 * of processes: parallel/comm_ipc.c lends the memory out, finds that of others and decides who may
 * use this.
 */
#ifndef INTERNVLD_KERNELS_CUDA_ALL_REDUCE_H
#define INTERNVLD_KERNELS_CUDA_ALL_REDUCE_H

#include "kernels/backend.h"

#define ALL_REDUCE_RANKS_MAX 8
#define ALL_REDUCE_MAILBOX_BYTES ((size_t)2 << 20) // whole pieces that other processes can map

/* One rank's view of its group. A mailbox begins with its flags, which are equal in all mailboxes
 * before anybody's first call. */
struct cuda_all_reduce {
    int rank, size;                        // size: 2, 4 or 8
    void *mailboxes[ALL_REDUCE_RANKS_MAX]; // device, of each rank, as this process sees it
    uint32_t *overdue; // host, pinned: 0, or 1 + the rank of the group that did not come in time
};

/* r->mailboxes[rank] <- ALL_REDUCE_MAILBOX_BYTES of the device, zeroed when this returns; the
 * caller sets the others'. */
void cuda_all_reduce_open(struct cuda_all_reduce *r, struct backend *b, int rank, int size);
/* Nobody else uses this rank's mailbox any more. A zeroed *r is allowed. */
void cuda_all_reduce_close(struct cuda_all_reduce *r, struct backend *b);
/* Most elements of one call in a group of `size`. */
size_t cuda_all_reduce_max(int size);

/*
 * x [n] <- the sum of the group's x by the binary tree of its ranks (bit for bit that of
 * backend_cuda_tree_sum()), the same on every rank; n up to cuda_all_reduce_max(), the same on
 * every rank. On the stream of `b`, and can be recorded into a graph: which call it is, the
 * mailboxes know.
 *
 * Waits for the others' kernels up to limit_ns; then *overdue is set and, when `fatal`, the context
 * ends with a trap, or else x is undefined; and likewise when *overdue was set by anybody.
 */
void backend_cuda_all_reduce(struct backend *b, const struct cuda_all_reduce *r, float *x, size_t n,
                             uint64_t limit_ns, int fatal);
/* The same followed by op_add_rms_norm(b, y, x, sum, weight, eps), in one kernel and to its bits;
 * `sum` is this rank's part and stays. Rows have as many columns in every call. */
void backend_cuda_all_reduce_norm(struct backend *b, const struct cuda_all_reduce *r,
                                  struct tensor *y, struct tensor *x, const struct tensor *sum,
                                  const float *weight, float eps, uint64_t limit_ns, int fatal);
/* 1 when so many rows go into one call of that. */
int cuda_all_reduce_norm_takes(int64_t n_rows, int64_t n_cols);

#endif
