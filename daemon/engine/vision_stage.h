/*
 * Which vision rank encodes which tiles: requests whose pictures are not encoded yet, cut into
 * jobs.
 *
 * A job is a run of one request's tiles for one rank. The rank with the fewest outstanding tiles
 * gets the next job, and none is given more than one job ahead of the one that it computes, so that
 * a cancelled request's tiles are mostly never sent, and a picture that comes later does not wait
 * behind a whole album. Requests are served by priority, then arrival; features that wait for the
 * language model take memory, so no request is begun while too many tiles are held. Pure: it sends
 * nothing, and knows neither ranks' numbers nor pixels. Owned by the engine thread.
 */
#ifndef INTERNVLD_ENGINE_VISION_STAGE_H
#define INTERNVLD_ENGINE_VISION_STAGE_H

#include <stdint.h>

#include "daemon/engine/sequence.h"

struct vision_job {
    uint64_t job_id;
    int32_t vision_index;        // of the rank
    struct ticket *ticket;       // NULL: the request is over, the result is dropped
    int32_t first_tile, n_tiles; // of the request's tiles
};

struct vision_stage {
    int32_t n_ranks, max_tiles; // of one job
    int64_t max_held, n_held;   // tiles of requests that were begun and are not over
    int32_t *outstanding;       // [n_ranks] tiles sent, features not back
    struct ticket **waiting;    // [n_waiting] tickets with unsent tiles, in order of service
    int32_t n_waiting, waiting_capacity;
    struct vision_job *jobs; // [n_jobs] sent
    int32_t n_jobs, jobs_capacity;
    uint64_t last_job_id;
};

void vision_stage_init(struct vision_stage *v, int32_t n_ranks, int32_t max_tiles,
                       int64_t max_held);
void vision_stage_release(struct vision_stage *v); // accepts a zeroed struct

void vision_stage_add(struct vision_stage *v, struct ticket *t); // nothing without tiles
/* The next job to send now; 0: every rank has enough, or no tiles wait. */
int vision_stage_next(struct vision_stage *v, struct vision_job *job);
/* Takes the job whose features are back out of the list. 0: there is no such job. */
int vision_stage_done(struct vision_stage *v, uint64_t job_id, struct vision_job *job);
/* The request is over: every ticket that was added comes here once. */
void vision_stage_forget(struct vision_stage *v, const struct ticket *t);

#endif
