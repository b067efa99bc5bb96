/* Dealing of tiles to idle ranks, the oldest and the newest by turns, each content once; see
 * vision_stage.h. */
#include "daemon/engine/vision_stage.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

void vision_stage_init(struct vision_stage *v, int32_t n_ranks, int32_t max_tiles, int64_t max_held,
                       int64_t n_floats, uint64_t cache_bytes)
{
    if (n_ranks < 1 || max_tiles < 1)
        BUG("a vision stage of %d ranks and %d tiles", n_ranks, max_tiles);
    memset(v, 0, sizeof(*v));
    v->n_ranks = n_ranks;
    v->max_tiles = max_tiles;
    v->max_held = max_held;
    v->n_floats = n_floats;
    v->jobs = xcalloc((size_t)n_ranks, sizeof(*v->jobs));
    for (int32_t i = 0; i < n_ranks; i++) {
        v->jobs[i].vision_index = i;
        v->jobs[i].tiles = xcalloc((size_t)max_tiles, sizeof(struct vision_tile));
    }
    feature_cache_init(&v->cache, cache_bytes, n_floats);
}

void vision_stage_release(struct vision_stage *v)
{
    for (int32_t i = 0; i < v->n_ranks; i++) {
        for (int32_t k = 0; k < v->max_tiles; k++)
            free(v->jobs[i].tiles[k].waiters);
        free(v->jobs[i].tiles);
    }
    free(v->jobs);
    free(v->waiting);
    feature_cache_release(&v->cache);
    memset(v, 0, sizeof(*v));
}

/* ---- who waits for what ---- */

static void insert_waiting(struct vision_stage *v, struct ticket *t)
{
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

static int is_shared(const struct vision_stage *v, const struct request *r)
{
    return v->cache.n_slots > 0 && r->vision_captures == 0 && !request_has_odd_tiles(r);
}

static void add_waiter(struct vision_tile *tile, struct ticket *t, int32_t index, uint64_t now_ns)
{
    if (tile->n_waiters == tile->waiters_capacity) {
        tile->waiters_capacity = tile->waiters_capacity ? 2 * tile->waiters_capacity : 4;
        tile->waiters =
            xrealloc(tile->waiters, (size_t)tile->waiters_capacity, sizeof(*tile->waiters));
    }
    tile->waiters[tile->n_waiters++] = (struct tile_waiter){t, index};
    if (t->vision_start_ns == 0)
        t->vision_start_ns = now_ns;
    t->tile_asked[index] = 1;
    t->n_tiles_asked++;
}

/* The tile of a job under way, or of the one that is being put together, that has this content. */
static struct vision_tile *find_tile(struct vision_stage *v, const struct digest *digest)
{
    for (int32_t i = 0; i < v->n_ranks; i++)
        for (int32_t k = 0; k < v->jobs[i].n_tiles; k++) {
            struct vision_tile *tile = &v->jobs[i].tiles[k];
            if (tile->is_shared && digest_equal(&tile->digest, digest))
                return tile;
        }
    return NULL;
}

static int64_t tile_floats(const struct vision_stage *v, const struct ticket *t)
{
    return t->n_tile_floats < 0 ? v->n_floats : t->n_tile_floats;
}

/* Tiles of the model's size that would take as much room. */
static int64_t held_by(const struct vision_stage *v, const struct ticket *t)
{
    return (t->n_tiles * tile_floats(v, t) + v->n_floats - 1) / v->n_floats;
}

static void give(const struct vision_stage *v, struct ticket *t, int32_t tile,
                 const float *features, uint64_t now_ns)
{
    size_t n = (size_t)tile_floats(v, t);
    memcpy(t->features + (size_t)tile * n, features, n * sizeof(*features));
    t->n_tiles_done++;
    if (ticket_is_ready(t))
        t->vision_end_ns = now_ns;
}

/* Without encoding: from the cache, or with a job that has the same content. 0: not possible. */
static int find_features(struct vision_stage *v, struct ticket *t, int32_t index, uint64_t now_ns)
{
    if (!is_shared(v, t->request))
        return 0;
    const struct digest *digest = &t->request->tile_digests[index];
    struct vision_tile *tile = find_tile(v, digest);
    const float *features = tile ? NULL : feature_cache_find(&v->cache, digest);
    if (tile) {
        add_waiter(tile, t, index, now_ns);
    } else if (features) {
        t->tile_asked[index] = 1;
        t->n_tiles_asked++;
        give(v, t, index, features, now_ns);
    } else {
        return 0;
    }
    v->n_queries++;
    v->n_hits++;
    t->n_cached_tiles++;
    return 1;
}

/* ---- beginning ---- */

static int is_begun(const struct ticket *t)
{
    return t->tile_asked != NULL;
}

static void begin(struct vision_stage *v, struct ticket *t, uint64_t now_ns)
{
    v->n_held += held_by(v, t);
    t->features = xcalloc((size_t)t->n_tiles, (size_t)tile_floats(v, t) * sizeof(*t->features));
    t->tile_asked = xcalloc((size_t)t->n_tiles, sizeof(*t->tile_asked));
    for (int32_t i = 0; i < t->n_tiles; i++)
        find_features(v, t, i, now_ns);
}

/* Begins requests in the order of service, as long as their features have room. */
static void begin_waiting(struct vision_stage *v, uint64_t now_ns)
{
    for (int32_t i = 0; i < v->n_waiting;) {
        struct ticket *t = v->waiting[i];
        if (!is_begun(t)) {
            if (v->n_held > 0 && v->n_held + held_by(v, t) > v->max_held)
                return;
            begin(v, t, now_ns);
        }
        if (t->n_tiles_asked == t->n_tiles)
            remove_waiting(v, i);
        else
            i++;
    }
}

void vision_stage_add(struct vision_stage *v, struct ticket *t, uint64_t now_ns)
{
    if (t->n_tiles == 0)
        return;
    insert_waiting(v, t);
    begin_waiting(v, now_ns);
}

/* ---- jobs ---- */

/* NULL: all ranks have a job. */
static struct vision_job *idle_job(struct vision_stage *v)
{
    struct vision_job *best = NULL;
    for (int32_t i = 0; i < v->n_ranks; i++)
        if (v->jobs[i].job_id == 0 && (!best || v->jobs[i].n_sent < best->n_sent))
            best = &v->jobs[i];
    return best;
}

/* An equal share of what waits for each idle rank. */
static int32_t job_size(const struct vision_stage *v)
{
    int64_t n_tiles = 0, n_idle = v->n_ranks - v->n_jobs;
    for (int32_t i = 0; i < v->n_waiting; i++)
        if (is_begun(v->waiting[i]))
            n_tiles += v->waiting[i]->n_tiles - v->waiting[i]->n_tiles_asked;
    int64_t n = (n_tiles + n_idle - 1) / n_idle;
    return n < v->max_tiles ? (int32_t)n : v->max_tiles;
}

static int is_alike(const struct request *a, const struct request *b)
{
    return a->channels == b->channels && a->height == b->height && a->width == b->width &&
           a->pixel_dtype == b->pixel_dtype && a->vision_captures == b->vision_captures &&
           a->n_mask == b->n_mask;
}

/* The ticket's next tile that must be encoded; -1: none is left. */
static int32_t next_tile(struct vision_stage *v, struct ticket *t, uint64_t now_ns)
{
    for (; t->next_tile < t->n_tiles; t->next_tile++)
        if (!t->tile_asked[t->next_tile] && !find_features(v, t, t->next_tile, now_ns))
            return t->next_tile;
    return -1;
}

static void add_tile(struct vision_stage *v, struct vision_job *job, struct ticket *t,
                     int32_t index, uint64_t now_ns)
{
    struct vision_tile *tile = &job->tiles[job->n_tiles++];
    tile->digest = t->request->tile_digests[index];
    tile->is_shared = is_shared(v, t->request);
    tile->n_waiters = 0;
    job->n_tile_floats = tile_floats(v, t);
    v->n_queries += tile->is_shared != 0;
    v->n_placed++;
    add_waiter(tile, t, index, now_ns);
}

/* Whose tile takes the next place of a job that has begun with `first`'s (NULL: with none yet): of
 * the highest priority that waits, the oldest, or the one with the fewest tiles so far. An index of
 * `waiting`; -1: nobody's. */
static int32_t choose(const struct vision_stage *v, const struct request *first, int is_oldest)
{
    int32_t best = -1;
    for (int32_t i = 0; i < v->n_waiting; i++) {
        const struct ticket *t = v->waiting[i], *other = best < 0 ? NULL : v->waiting[best];
        if (!is_begun(t) || (first && !is_alike(first, t->request)))
            continue;
        if (other && (is_oldest || t->priority > other->priority))
            break;
        if (!other || t->n_tiles_asked < other->n_tiles_asked)
            best = i;
    }
    return best;
}

static void fill(struct vision_stage *v, struct vision_job *job, uint64_t now_ns)
{
    int32_t wanted = job_size(v), i;
    const struct request *first = NULL;
    while (job->n_tiles < wanted && (i = choose(v, first, v->n_placed % 2 != 0)) >= 0) {
        struct ticket *t = v->waiting[i];
        int32_t index = next_tile(v, t, now_ns);
        if (index >= 0) {
            first = t->request;
            add_tile(v, job, t, index, now_ns);
        }
        if (t->n_tiles_asked == t->n_tiles)
            remove_waiting(v, i);
    }
}

const struct vision_job *vision_stage_next(struct vision_stage *v, uint64_t now_ns)
{
    begin_waiting(v, now_ns);
    struct vision_job *job = idle_job(v);
    if (!job)
        return NULL;
    fill(v, job, now_ns);
    if (job->n_tiles == 0)
        return NULL;
    job->job_id = ++v->last_job_id;
    job->n_sent += (uint64_t)job->n_tiles;
    v->n_jobs++;
    return job;
}

struct vision_job *vision_stage_find(struct vision_stage *v, uint64_t job_id)
{
    for (int32_t i = 0; i < v->n_ranks; i++)
        if (job_id != 0 && v->jobs[i].job_id == job_id)
            return &v->jobs[i];
    return NULL;
}

void vision_stage_deliver(struct vision_stage *v, struct vision_tile *tile, const float *features,
                          uint64_t now_ns)
{
    for (int32_t i = 0; i < tile->n_waiters; i++)
        if (tile->waiters[i].ticket)
            give(v, tile->waiters[i].ticket, tile->waiters[i].tile, features, now_ns);
    if (tile->is_shared)
        feature_cache_put(&v->cache, &tile->digest, features);
}

void vision_stage_end(struct vision_stage *v, struct vision_job *job)
{
    job->job_id = 0;
    job->n_tiles = 0;
    v->n_jobs--;
}

void vision_stage_forget(struct vision_stage *v, const struct ticket *t)
{
    for (int32_t i = v->n_waiting - 1; i >= 0; i--)
        if (v->waiting[i] == t)
            remove_waiting(v, i);
    for (int32_t i = 0; i < v->n_ranks; i++)
        for (int32_t k = 0; k < v->jobs[i].n_tiles; k++)
            for (int32_t w = 0; w < v->jobs[i].tiles[k].n_waiters; w++)
                if (v->jobs[i].tiles[k].waiters[w].ticket == t)
                    v->jobs[i].tiles[k].waiters[w].ticket = NULL;
    if (is_begun(t))
        v->n_held -= held_by(v, t);
}
