/* Least-loaded dealing of tiles; see vision_stage.h. */
#include "daemon/engine/vision_stage.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

void vision_stage_init(struct vision_stage *v, int32_t n_ranks, int32_t max_tiles, int64_t max_held)
{
    if (n_ranks < 1 || max_tiles < 1)
        BUG("a vision stage of %d ranks and %d tiles", n_ranks, max_tiles);
    memset(v, 0, sizeof(*v));
    v->n_ranks = n_ranks;
    v->max_tiles = max_tiles;
    v->max_held = max_held;
    v->outstanding = xcalloc((size_t)n_ranks, sizeof(*v->outstanding));
}

void vision_stage_release(struct vision_stage *v)
{
    free(v->outstanding);
    free(v->waiting);
    free(v->jobs);
    memset(v, 0, sizeof(*v));
}

void vision_stage_add(struct vision_stage *v, struct ticket *t)
{
    if (t->n_tiles == 0)
        return;
    if (v->n_waiting == v->waiting_capacity) {
        v->waiting_capacity = v->waiting_capacity ? 2 * v->waiting_capacity : 16;
        v->waiting = xrealloc(v->waiting, (size_t)v->waiting_capacity, sizeof(struct ticket *));
    }
    int32_t i = v->n_waiting++;
    for (; i > 0 && ticket_compare(t, v->waiting[i - 1]) < 0; i--)
        v->waiting[i] = v->waiting[i - 1];
    v->waiting[i] = t;
}

static void remove_waiting(struct vision_stage *v, int32_t i)
{
    v->n_waiting--;
    memmove(v->waiting + i, v->waiting + i + 1,
            (size_t)(v->n_waiting - i) * sizeof(struct ticket *));
}

static int32_t least_loaded(const struct vision_stage *v)
{
    int32_t best = 0;
    for (int32_t i = 1; i < v->n_ranks; i++)
        if (v->outstanding[i] < v->outstanding[best])
            best = i;
    return best;
}

int vision_stage_next(struct vision_stage *v, struct vision_job *job)
{
    int32_t rank = least_loaded(v);
    if (v->n_waiting == 0 || v->outstanding[rank] > v->max_tiles)
        return 0;

    struct ticket *t = v->waiting[0];
    if (t->n_tiles_sent == 0) {
        if (v->n_held > 0 && v->n_held + t->n_tiles > v->max_held)
            return 0;
        v->n_held += t->n_tiles;
    }
    int32_t n = (t->n_tiles + v->n_ranks - 1) / v->n_ranks; // one picture over all ranks
    if (n > v->max_tiles)
        n = v->max_tiles;
    if (n > t->n_tiles - t->n_tiles_sent)
        n = t->n_tiles - t->n_tiles_sent;
    *job = (struct vision_job){.job_id = ++v->last_job_id,
                               .vision_index = rank,
                               .ticket = t,
                               .first_tile = t->n_tiles_sent,
                               .n_tiles = n};
    t->n_tiles_sent += n;
    v->outstanding[rank] += n;
    if (t->n_tiles_sent == t->n_tiles)
        remove_waiting(v, 0);

    if (v->n_jobs == v->jobs_capacity) {
        v->jobs_capacity = v->jobs_capacity ? 2 * v->jobs_capacity : 16;
        v->jobs = xrealloc(v->jobs, (size_t)v->jobs_capacity, sizeof(*v->jobs));
    }
    v->jobs[v->n_jobs++] = *job;
    return 1;
}

int vision_stage_done(struct vision_stage *v, uint64_t job_id, struct vision_job *job)
{
    for (int32_t i = 0; i < v->n_jobs; i++) {
        if (v->jobs[i].job_id != job_id)
            continue;
        *job = v->jobs[i];
        v->jobs[i] = v->jobs[--v->n_jobs];
        v->outstanding[job->vision_index] -= job->n_tiles;
        return 1;
    }
    return 0;
}

void vision_stage_forget(struct vision_stage *v, const struct ticket *t)
{
    for (int32_t i = v->n_waiting - 1; i >= 0; i--)
        if (v->waiting[i] == t)
            remove_waiting(v, i);
    for (int32_t i = 0; i < v->n_jobs; i++)
        if (v->jobs[i].ticket == t)
            v->jobs[i].ticket = NULL;
    if (t->n_tiles_sent > 0)
        v->n_held -= t->n_tiles;
}
