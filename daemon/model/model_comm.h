/*
 * The groups of ranks that a model's tensors travel in. Opened by device.h, used by the language
 * model.
 */
#ifndef INTERNVLD_MODEL_MODEL_COMM_H
#define INTERNVLD_MODEL_MODEL_COMM_H

#include "parallel/comm.h"

struct model_comm {
    struct comm *shards; // the T shards of this rank's stage; rank = shard. NULL: not a language
                         // rank, or a process alone (a group of one)
    struct comm *stages; // the P stages of this rank's shard index; rank = stage. NULL as above
};

#endif
