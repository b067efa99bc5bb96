/*
 * The groups of ranks a model's tensors travel in (model_comm.h).
 */
#include "daemon/model/model_comm.h"

void model_comm_open(struct model_comm *mc, const struct topology *t, size_t max_bytes)
{
    int language = t->role == ROLE_LANGUAGE;
    mc->shards = comm_mpi_open(language ? t->stage : -1, language ? t->shard : 0, max_bytes);
    mc->stages = comm_mpi_open(language ? t->shard : -1, language ? t->stage : 0, 0);
}

void model_comm_close(struct model_comm *mc)
{
    comm_close(mc->stages);
    comm_close(mc->shards);
    *mc = (struct model_comm){0};
}
