/*
 * struct comm among threads of one process (thread_comm.h).
 */
#include "tests/parity/model/thread_comm.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

#define MAX_MEMBERS 8

struct group {
    pthread_barrier_t barrier; // of all members
    const void *published[MAX_MEMBERS];
    pthread_mutex_t mutex; // of the mailboxes
    pthread_cond_t changed;
    const void *mail[MAX_MEMBERS]; // to member i; NULL: empty
};

struct member {
    struct comm comm;
    struct group *group;
    float *scratch;
    size_t scratch_n;
};

struct thread_job {
    int n_stages, n_shards;
    struct group shard_groups[MAX_MEMBERS], stage_groups[MAX_MEMBERS];
    struct member shards[MAX_MEMBERS * MAX_MEMBERS], stages[MAX_MEMBERS * MAX_MEMBERS];
    struct model_comm comms[MAX_MEMBERS * MAX_MEMBERS];
};

static void do_all_reduce(struct comm *c, float *x, size_t n)
{
    struct member *m = c->state;
    struct group *g = m->group;
    g->published[c->rank] = x;
    if (m->scratch_n < n) {
        m->scratch = xrealloc(m->scratch, n, sizeof(float));
        m->scratch_n = n;
    }
    pthread_barrier_wait(&g->barrier);
    for (size_t i = 0; i < n; i++) {
        float v[MAX_MEMBERS];
        for (int r = 0; r < c->size; r++)
            v[r] = ((const float *)g->published[r])[i];
        for (int width = c->size; width > 1; width /= 2)
            for (int r = 0; r < width / 2; r++)
                v[r] = v[2 * r] + v[2 * r + 1];
        m->scratch[i] = v[0];
    }
    pthread_barrier_wait(&g->barrier);
    memcpy(x, m->scratch, n * sizeof(float));
}

static void do_all_gather(struct comm *c, void *dst, const void *src, size_t n_bytes)
{
    struct member *m = c->state;
    struct group *g = m->group;
    g->published[c->rank] = src;
    pthread_barrier_wait(&g->barrier);
    for (int r = 0; r < c->size; r++)
        memmove((char *)dst + (size_t)r * n_bytes, g->published[r], n_bytes);
    pthread_barrier_wait(&g->barrier);
}

static void do_send(struct comm *c, const void *x, size_t n_bytes, int to)
{
    struct group *g = ((struct member *)c->state)->group;
    (void)n_bytes;
    pthread_mutex_lock(&g->mutex);
    g->mail[to] = x;
    pthread_cond_broadcast(&g->changed);
    while (g->mail[to])
        pthread_cond_wait(&g->changed, &g->mutex);
    pthread_mutex_unlock(&g->mutex);
}

static void do_recv(struct comm *c, void *x, size_t n_bytes, int from)
{
    struct group *g = ((struct member *)c->state)->group;
    (void)from;
    pthread_mutex_lock(&g->mutex);
    while (!g->mail[c->rank])
        pthread_cond_wait(&g->changed, &g->mutex);
    memcpy(x, g->mail[c->rank], n_bytes);
    g->mail[c->rank] = NULL;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->mutex);
}

static const struct comm_ops thread_ops = {.name = "threads",
                                           .all_reduce = do_all_reduce,
                                           .all_gather = do_all_gather,
                                           .send = do_send,
                                           .recv = do_recv};

static void group_init(struct group *g, int size)
{
    pthread_barrier_init(&g->barrier, NULL, (unsigned)size);
    pthread_mutex_init(&g->mutex, NULL);
    pthread_cond_init(&g->changed, NULL);
}

static void member_init(struct member *m, struct group *g, int rank, int size)
{
    m->group = g;
    m->comm = (struct comm){.ops = &thread_ops, .rank = rank, .size = size, .state = m};
}

struct thread_job *thread_job_new(int n_stages, int n_shards)
{
    struct thread_job *j = xcalloc(1, sizeof(*j));
    j->n_stages = n_stages;
    j->n_shards = n_shards;
    for (int p = 0; p < n_stages; p++)
        group_init(&j->shard_groups[p], n_shards);
    for (int t = 0; t < n_shards; t++)
        group_init(&j->stage_groups[t], n_stages);
    for (int p = 0; p < n_stages; p++)
        for (int t = 0; t < n_shards; t++) {
            int i = p * n_shards + t;
            member_init(&j->shards[i], &j->shard_groups[p], t, n_shards);
            member_init(&j->stages[i], &j->stage_groups[t], p, n_stages);
            j->comms[i] = (struct model_comm){&j->shards[i].comm, &j->stages[i].comm};
        }
    return j;
}

struct model_comm *thread_job_comm(struct thread_job *j, int stage, int shard)
{
    return &j->comms[stage * j->n_shards + shard];
}

void thread_job_free(struct thread_job *j)
{
    for (int i = 0; i < j->n_stages * j->n_shards; i++)
        free(j->shards[i].scratch);
    free(j);
}
