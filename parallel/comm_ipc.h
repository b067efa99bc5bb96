/*
 * A short way for small sums among GPUs of one host, beside NCCL: every rank of a group opens a
 * piece of the others' device memory (CUDA IPC) and reads their parts itself. Plain C, no CUDA
 * headers.
 */
#ifndef INTERNVLD_PARALLEL_COMM_IPC_H
#define INTERNVLD_PARALLEL_COMM_IPC_H

#include "kernels/backend.h"

struct comm_ipc;

/*
 * Collective over the whole job: every rank calls it in the same order, members of a group of
 * `size` with their back end (CUDA) and their `place` in it; others with a size of 0. members
 * [size]: the group's ranks of the job, borrowed for the call.
 *
 * NULL on all members or on none: when the group is not one of 2, 4 or 8, or has a rank on another
 * host, without access to a peer's memory, linked by PCIe alone to more than one, or with a wrong
 * sum in the test that ends the opening. A line of the log by the group's first rank says which.
 */
struct comm_ipc *comm_ipc_open(struct backend *b, int world, const int *members, int size,
                               int place);
/* 1 when a sum of n elements goes this way: the same answer on every member. NULL: 0. */
int comm_ipc_takes(const struct comm_ipc *s, size_t n);
/* x [n] <- the sum over the group by the lanes' tree, on the back end's stream; can be recorded. A
 * rank that does not come within 60 s ends the others' contexts: their next call of CUDA dies. */
void comm_ipc_all_reduce(struct comm_ipc *s, float *x, size_t n);
/* Verb all_reduce_norm of struct comm_ops; NULL: 0. */
int comm_ipc_all_reduce_norm(struct comm_ipc *s, struct tensor *y, struct tensor *x,
                             const struct tensor *sum, const float *weight, float eps);
/* From any thread: the rank of the group that did not come, or -1. NULL: -1. */
int comm_ipc_overdue(const struct comm_ipc *s);
/* From any thread: kernels that wait end this rank's context; the job is ending. NULL allowed. */
void comm_ipc_abort(struct comm_ipc *s);
/* Lets go of the others' memory; no all_reduce after it. NULL allowed. */
void comm_ipc_leave(struct comm_ipc *s);
/* When every member has left. NULL allowed. */
void comm_ipc_close(struct comm_ipc *s);

#endif
