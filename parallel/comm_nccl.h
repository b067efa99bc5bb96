/*
 * The five verbs of parallel/comm.h on device memory, over NCCL. Plain C, no CUDA or NCCL headers.
 */
#ifndef INTERNVLD_PARALLEL_COMM_NCCL_H
#define INTERNVLD_PARALLEL_COMM_NCCL_H

#include "kernels/backend.h"
#include "parallel/comm.h"

struct comm_nccl_options {
    size_t max_bytes;  // bounds any later all_reduce; 0: there will be none
    int deterministic; // sums by the lanes' tree
    int one_shot;      // short sums over CUDA IPC where that is possible (parallel/comm_ipc.h)
};

/*
 * Collective over the whole job, as comm_mpi_open(): every rank calls it once in the same order
 * with the same *o, `color` < 0 is in no group (NULL), members are ordered by `key`, a group of one
 * never calls NCCL. `rank` and `world` are launch_init()'s. Members open `b` (CUDA) first; others
 * may pass NULL.
 *
 * Verbs are put on the back end's stream and return before they have run: every pointer is device
 * memory, and order with the ops comes by itself. all_reduce sums in NCCL's order; with
 * `deterministic` it gathers and adds by the lanes' tree, bitwise the same in every layout, and so
 * do short sums with `one_shot`. Dies when the group cannot be made within 60 s.
 */
struct comm *comm_nccl_open(struct backend *b, int rank, int world, int color, int key,
                            const struct comm_nccl_options *o);

#endif
