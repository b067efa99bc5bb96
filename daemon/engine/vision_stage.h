/*
 * Which vision rank encodes which tiles: the tiles of all requests, merged into jobs.
 *
 * A job is a batch of tiles, of one request or of many, for one rank. A rank has one job at a time
 * (which costs it a round trip between two of them, some tenths of a millisecond), and the idle
 * rank that was sent the fewest tiles so far gets the next one; what waits is shared among the idle
 * ranks. Requests are served by priority; among those of equal priority every other tile is one of
 * the oldest's, the others are of whoever had the fewest so far. So a picture that comes after an
 * album waits for the jobs under way and no longer, and an album is not kept waiting by pictures
 * without end. A cancelled request's tiles that were not sent never are.
 *
 * A tile that the feature cache knows (by content and the request's salt) is not sent, nor is one
 * that is in a job already: whoever needs it waits for that job, and whoever is cancelled only
 * stops waiting. Tiles whose tensors are captured are always encoded, for their request alone.
 *
 * Features that wait for the language model take memory, so no request is begun (given memory for
 * its features) while too many tiles are held; a request that does not fit yet is not overtaken.
 * Pure: it sends nothing, and knows neither ranks' numbers nor pixels nor the clock. Owned by the
 * engine thread.
 */
#ifndef INTERNVLD_ENGINE_VISION_STAGE_H
#define INTERNVLD_ENGINE_VISION_STAGE_H

#include <stdint.h>

#include "daemon/engine/feature_cache.h"
#include "daemon/engine/sequence.h"

struct tile_waiter {
    struct ticket *ticket; // NULL: the request is over
    int32_t tile;          // of the request's tiles
};

struct vision_tile {
    struct digest digest;
    int is_shared;               // others may wait for it and the cache may keep it
    struct tile_waiter *waiters; // [n_waiters] the first one's pixels are sent
    int32_t n_waiters, waiters_capacity;
};

struct vision_job {
    uint64_t job_id; // 0: the rank is idle
    int32_t vision_index, n_tiles;
    struct vision_tile *tiles; // [n_tiles] room for max_tiles
    int64_t n_tile_floats;     // features of each of them
    uint64_t n_sent;           // tiles in all jobs of the rank so far
};

struct vision_stage {
    int32_t n_ranks, max_tiles; // of one job
    int64_t max_held, n_held;   // tiles of requests that were begun and are not over
    int64_t n_floats;           // features of one tile
    struct vision_job *jobs;    // [n_ranks]
    struct ticket **waiting;    // [n_waiting] with tiles to ask for, by priority and arrival
    int32_t n_waiting, waiting_capacity;
    int32_t n_jobs;                 // under way
    uint64_t last_job_id, n_placed; // tiles in all jobs so far
    struct feature_cache cache;
    uint64_t n_queries, n_hits; // tiles that might have been known; that needed no encoding
};

/* cache_bytes 0: every tile is encoded. */
void vision_stage_init(struct vision_stage *v, int32_t n_ranks, int32_t max_tiles, int64_t max_held,
                       int64_t n_floats, uint64_t cache_bytes);
void vision_stage_release(struct vision_stage *v); // accepts a zeroed struct

/* Nothing without tiles. The ticket may be ready at once. */
void vision_stage_add(struct vision_stage *v, struct ticket *t, uint64_t now_ns);
/* The next job to send now, all its tiles of one shape, type and set of captures; NULL: no rank is
 * idle, or no tiles wait. Tickets may have become ready either way. */
const struct vision_job *vision_stage_next(struct vision_stage *v, uint64_t now_ns);
/* The job of this id, until vision_stage_end(); NULL: there is none. */
struct vision_job *vision_stage_find(struct vision_stage *v, uint64_t job_id);
/* Features [n_tile_floats] of a tile of a job, all finite: to everybody who waits, and to the
 * cache. */
void vision_stage_deliver(struct vision_stage *v, struct vision_tile *tile, const float *features,
                          uint64_t now_ns);
/* The job is over and its rank idle. */
void vision_stage_end(struct vision_stage *v, struct vision_job *job);
/* The request is over: every ticket that was added comes here once. */
void vision_stage_forget(struct vision_stage *v, const struct ticket *t);

#endif
