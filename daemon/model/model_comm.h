/*
 * The groups of ranks a model's tensors travel in, opened in one place and one order.
 *
 * comm_mpi_open() is collective over the whole job, so the gateway and the vision ranks call
 * model_comm_open() too, and get no group.
 */
#ifndef INTERNVLD_MODEL_MODEL_COMM_H
#define INTERNVLD_MODEL_MODEL_COMM_H

#include <stddef.h>

#include "parallel/comm.h"
#include "parallel/topology.h"

struct model_comm {
    struct comm *shards; // the T shards of this rank's stage; rank = shard. NULL: not a language
                         // rank, or a process alone (a group of one)
    struct comm *stages; // the P stages of this rank's shard index; rank = stage. NULL as above
};

/* Every rank of the job calls it once, right after launch_init(), in the same order. max_bytes
 * bounds an all_reduce: max_num_batched_tokens * hidden_size * 4. */
void model_comm_open(struct model_comm *mc, const struct topology *t, size_t max_bytes);
void model_comm_close(struct model_comm *mc); // accepts a zeroed struct

#endif
