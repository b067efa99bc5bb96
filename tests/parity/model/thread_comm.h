/*
 * struct comm among threads of one process, so that tensor- and pipeline-parallel layouts are tests
 * without MPI. The all-reduce adds by the binary tree that comm.h promises.
 */
#ifndef INTERNVLD_TESTS_PARITY_MODEL_THREAD_COMM_H
#define INTERNVLD_TESTS_PARITY_MODEL_THREAD_COMM_H

#include "daemon/model/model_comm.h"

struct thread_job;

/* P stages of T shards. comm[stage * T + shard] is what that thread gives language_init(). */
struct thread_job *thread_job_new(int n_stages, int n_shards);
struct model_comm *thread_job_comm(struct thread_job *j, int stage, int shard);
void thread_job_free(struct thread_job *j);

#endif
