/*
 * What answers for comm_nccl in a build without CUDA. Nobody who has no device gets here.
 */
#include "kernels/log.h"
#include "parallel/comm_nccl.h"

struct comm *comm_nccl_open(struct backend *b, int rank, int world, int color, int key,
                            size_t max_bytes, int deterministic)
{
    BUG("%s: no NCCL in this build (rank %d of %d, group %d, key %d, %zu bytes, deterministic %d)",
        b ? b->ops->name : "no back end", rank, world, color, key, max_bytes, deterministic);
}
