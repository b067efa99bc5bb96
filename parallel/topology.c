/*
 * Roles of ranks: arithmetic on (rank, world, layout) and the words for it.
 *
 * Owns nothing, talks to nobody; every layout is a unit test. Must not know MPI.
 */
#include "parallel/topology.h"

#include <limits.h>
#include <stdint.h>
#include <stdio.h>

#include "kernels/log.h"

static int64_t world_of(const struct layout *l)
{
    return 1 + (int64_t)l->n_vision + (int64_t)l->pipeline_parallel * l->tensor_parallel;
}

int layout_world(const struct layout *l)
{
    int64_t world = world_of(l);
    return world > INT_MAX ? INT_MAX : (int)world;
}

int layout_shares_tensors(const struct layout *l)
{
    return l->pipeline_parallel > 1 || l->tensor_parallel > 1;
}

static int layout_check(const struct layout *l, struct error *err)
{
    int T = l->tensor_parallel;
    if (T != 1 && T != 2 && T != 4 && T != 8)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "tensor-parallel size %d is not one of 1, 2, 4, 8", T);
    if (l->n_vision < 1)
        return error_set(err, ERROR_INVALID_ARGUMENT, "%d vision ranks: at least 1 is needed",
                         l->n_vision);
    if (l->pipeline_parallel < 1)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "pipeline-parallel size %d: at least 1 is needed", l->pipeline_parallel);
    return 0;
}

int topology_init(struct topology *t, int rank, int world, const struct layout *l,
                  struct error *err)
{
    if (layout_check(l, err))
        return -1;
    if (world_of(l) != world)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "this layout needs 1 gateway + %d vision + %d stages x %d shards = %lld "
                         "ranks, but the job has %d",
                         l->n_vision, l->pipeline_parallel, l->tensor_parallel,
                         (long long)world_of(l), world);
    if (rank < 0 || rank >= world)
        return error_set(err, ERROR_INVALID_ARGUMENT, "rank %d is not among the job's %d", rank,
                         world);
    *t = (struct topology){.rank = rank,
                           .world = world,
                           .layout = *l,
                           .role = ROLE_GATEWAY,
                           .vision_index = -1,
                           .stage = -1,
                           .shard = -1};
    if (rank > l->n_vision) {
        int i = rank - 1 - l->n_vision;
        t->role = ROLE_LANGUAGE;
        t->stage = i / l->tensor_parallel;
        t->shard = i % l->tensor_parallel;
    } else if (rank > 0) {
        t->role = ROLE_VISION;
        t->vision_index = rank - 1;
    }
    return 0;
}

int topology_vision_rank(const struct topology *t, int vision_index)
{
    if (vision_index < 0 || vision_index >= t->layout.n_vision)
        BUG("vision index %d of %d", vision_index, t->layout.n_vision);
    return 1 + vision_index;
}

int topology_language_rank(const struct topology *t, int stage, int shard)
{
    const struct layout *l = &t->layout;
    if (stage < 0 || stage >= l->pipeline_parallel || shard < 0 || shard >= l->tensor_parallel)
        BUG("stage %d of %d, shard %d of %d", stage, l->pipeline_parallel, shard,
            l->tensor_parallel);
    return 1 + l->n_vision + stage * l->tensor_parallel + shard;
}

const char *role_name(enum role r)
{
    switch (r) {
    case ROLE_GATEWAY:
        return "gateway";
    case ROLE_VISION:
        return "vision";
    case ROLE_LANGUAGE:
        return "language";
    }
    BUG("role %d", (int)r);
}

const char *topology_describe(const struct topology *t, int rank, char *buf, int n_bytes)
{
    struct topology of = {0};
    if (n_bytes < 1)
        BUG("buffer of %d bytes", n_bytes);
    if (topology_init(&of, rank, t->world, &t->layout, NULL))
        snprintf(buf, (size_t)n_bytes, "no such rank");
    else if (of.role == ROLE_VISION)
        snprintf(buf, (size_t)n_bytes, "vision %d", of.vision_index);
    else if (of.role == ROLE_LANGUAGE)
        snprintf(buf, (size_t)n_bytes, "language stage %d shard %d", of.stage, of.shard);
    else
        snprintf(buf, (size_t)n_bytes, "%s", role_name(of.role));
    return buf;
}
