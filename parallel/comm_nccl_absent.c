/*
 * What answers for comm_nccl in a build without CUDA. Nobody who has no device gets here.
 */
#include "kernels/log.h"
#include "parallel/comm_nccl.h"

struct comm *comm_nccl_open(struct backend *b, int rank, int world, int color, int key,
                            const struct comm_nccl_options *o)
{
    BUG("%s: no NCCL in this build (rank %d of %d, group %d, key %d, %zu bytes)",
        b ? b->ops->name : "no back end", rank, world, color, key, o->max_bytes);
}
