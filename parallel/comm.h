/*
 * Tensor collectives: five verbs over a group of ranks, MPI on host memory or NCCL on device
 * memory.
 *
 * Entered only after a control message said so (MPI waits spin). A group of one returns at once.
 * Every failure ends the job: die(). No verb allocates after comm_open().
 */
#ifndef INTERNVLD_PARALLEL_COMM_H
#define INTERNVLD_PARALLEL_COMM_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/tensor.h"

struct comm;

struct comm_ops {
    const char *name; // "mpi", "nccl"
    /* x[i] <- sum over the group, float32, by recursive doubling: bitwise the binary tree of the
     * lanes, the same on every rank. Group size is a power of two. */
    void (*all_reduce)(struct comm *c, float *x, size_t n);
    /* all_reduce of `sum` [n, dim] float32, then op_add_rms_norm(y, x, sum, weight, eps), as one;
     * what `sum` holds after is undefined. Returns 0 and has done nothing when it does not take so
     * many rows, on every rank alike. NULL: never. */
    int (*all_reduce_norm)(struct comm *c, struct tensor *y, struct tensor *x,
                           const struct tensor *sum, const float *weight, float eps);
    /* dst [size, n_bytes] <- src [n_bytes] of each rank in group order; src may be dst + rank *
     * n_bytes. */
    void (*all_gather)(struct comm *c, void *dst, const void *src, size_t n_bytes);
    void (*broadcast)(struct comm *c, void *x, size_t n_bytes, int root);
    void (*send)(struct comm *c, const void *x, size_t n_bytes,
                 int to); // point to point, blocking, in order
    void (*recv)(struct comm *c, void *x, size_t n_bytes, int from);
    void (*close)(struct comm *c);
};

struct comm {
    const struct comm_ops *ops;
    int rank, size; // within the group
    void *state;
    uint64_t wait_ns; // time spent inside verbs since open
};

/* Collective over the whole job, called once by every rank in the same order. `color` < 0: this
 * rank is in no group (returns NULL). Members are ordered by `key`. max_bytes bounds any later
 * all_reduce (scratch is allocated here). */
struct comm *comm_mpi_open(int color, int key, size_t max_bytes);

void comm_all_reduce(struct comm *c, float *x, size_t n);
int comm_all_reduce_norm(struct comm *c, struct tensor *y, struct tensor *x,
                         const struct tensor *sum, const float *weight, float eps);
void comm_all_gather(struct comm *c, void *dst, const void *src, size_t n_bytes);
void comm_broadcast(struct comm *c, void *x, size_t n_bytes, int root);
void comm_send(struct comm *c, const void *x, size_t n_bytes, int to);
void comm_recv(struct comm *c, void *x, size_t n_bytes, int from);
void comm_close(struct comm *c); // NULL allowed

#endif
