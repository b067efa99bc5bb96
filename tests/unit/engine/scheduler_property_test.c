/*
 * The scheduler and the page pool under random operations: arrivals, features that come late,
 * cancels, candidates ended from outside, forks, beam searches, preemptions, several steps in
 * flight.
 *
 * A fake model stands in for the workers: a page holds, for each token, a hash of everything up to
 * it, read through the batch's page list; the next token is a function of that hash. A page lost,
 * shared wrongly, freed too early or copied too late changes a token, and every answer is compared
 * with the one computed from the ids alone. So the results are shown to be independent of
 * scheduling, of chunks and of preemption.
 *
 * usage: scheduler_property_test [operations over all settings]
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/engine/scheduler.h"
#include "daemon/engine/stream.h"
#include "kernels/log.h"
#include "tests/unit/engine/mix.h"

#define EOS 3
#define IMAGE 7
#define FEATURE_DIM 2

static int n_operations = 100000; // over all settings

/* ---- random numbers and hashes ---- */

struct random {
    uint64_t state;
};

static int32_t random_below(struct random *r, int32_t n)
{
    r->state += 0x9e3779b97f4a7c15u;
    return (int32_t)(mix(r->state) % (uint64_t)n);
}

/* What the fake model's cache holds for a token, given its predecessor's. */
static uint64_t token_hash(uint64_t before, int32_t id, float feature, int32_t rope_len)
{
    return mix(before * 31 + (uint64_t)id + (uint64_t)(feature * 1000.0f) + 1 +
               mix((uint64_t)rope_len));
}

/* The k-th best next token of a beam, no two the same, and its log-probability. */
static int32_t beam_token(uint64_t hash, int32_t k)
{
    return (int32_t)((mix(hash) + (uint64_t)k * 7) % 50);
}

static float beam_logprob(uint64_t hash, int32_t k)
{
    return -0.01f * (float)(mix(hash ^ 77) % 100) - 0.2f * (float)k;
}

/* Banned tokens [n] are left out, as a log-probability of minus infinity would have it. */
static void fill_beams(struct sample_result *out, int32_t n_best, uint64_t hash,
                       const int32_t *banned, int32_t n)
{
    for (int32_t k = 0; out->n_top < n_best; k++) {
        int32_t id = beam_token(hash, k), is_banned = 0;
        for (int32_t i = 0; i < n; i++)
            is_banned |= banned[i] == id;
        if (!is_banned)
            out->top[out->n_top++] =
                (struct token_logprob){.id = id, .logprob = beam_logprob(hash, k)};
    }
}

static int32_t next_token(uint64_t hash, int32_t candidate, int32_t position)
{
    return (int32_t)(mix(hash ^ mix((uint64_t)candidate * 1000 + (uint64_t)position)) % 50);
}

/* ---- one simulated daemon ---- */

#define TICKETS_MAX 64

struct expected { // what a live ticket should give
    struct ticket *ticket;
    int32_t *ids;
    int32_t n_ids, n_tiles;
    uint64_t features_salt;
    int32_t stop_after; // candidate 0 is ended from outside after so many tokens; 0: never
};

struct flight {
    struct step *step;
    struct sample_result *samples;
    int32_t n_samples;
};

struct world {
    struct scheduler_config config;
    struct scheduler scheduler;
    struct random random;
    uint64_t now;
    uint64_t *cache; // [n_pages * page_size]
    struct expected live[TICKETS_MAX];
    int n_live;
    struct flight flights[8];
    int n_flights;
    int n_finished, n_cancelled, n_forked, n_searches, n_images, n_decodes_skipped;
};

static const int32_t eos_ids[] = {EOS};

static float feature_of(uint64_t salt, int32_t k)
{
    return (float)(mix(salt + (uint64_t)k) % 97) / 8.0f;
}

static int32_t tokens_per_tile(void)
{
    return 3;
}

static void world_init(struct world *w, const struct scheduler_config *c, uint64_t seed)
{
    memset(w, 0, sizeof(*w));
    w->config = *c;
    w->config.feature_dim = FEATURE_DIM;
    w->config.eos_ids = eos_ids;
    w->config.n_eos = 1;
    w->random.state = seed;
    w->now = 1;
    w->config.n_features_per_tile = tokens_per_tile();
    scheduler_init(&w->scheduler, &w->config);
    w->cache = xcalloc((size_t)c->n_pages * (size_t)c->page_size, sizeof(*w->cache));
}

static void world_release(struct world *w)
{
    scheduler_release(&w->scheduler);
    free(w->cache);
}

/* What dynamic rope would see: nothing up to its limit. */
static int32_t rope_of(const struct world *w, int32_t rope_len)
{
    int32_t from = w->config.rope_dynamic_from;
    return from > 0 && rope_len > from ? rope_len : 0;
}

static void name_tiles(struct request *r, uint64_t features_salt)
{
    r->tile_digests = arena_alloc(&r->arena, (size_t)r->n_tiles, sizeof(struct digest));
    for (int32_t i = 0; i < r->n_tiles; i++)
        memcpy(r->tile_digests[i].bytes,
               (uint64_t[]){mix(features_salt), mix((uint64_t)i), 0, features_salt},
               sizeof(struct digest));
}

static void arrive(struct world *w)
{
    if (w->n_live == TICKETS_MAX)
        return;
    struct request *r = request_new((size_t)1 << 20);
    int32_t n_tiles = random_below(&w->random, 4) == 0 ? 1 + random_below(&w->random, 3) : 0;
    int32_t n_image = n_tiles * tokens_per_tile();
    int32_t limit = w->scheduler.context_limit;
    int32_t n = n_image + 1 + random_below(&w->random, 40);
    if (random_below(&w->random, 20) == 0)
        n = limit - 1 - random_below(&w->random, 3); // fills the pool by itself
    if (n < n_image + 1)
        n = n_image + 1;
    r->ids = arena_alloc(&r->arena, (size_t)n, sizeof(int32_t));
    r->n_ids = n;
    r->image_token_id = IMAGE;
    r->n_image_tokens = n_image;
    r->n_tiles = n_tiles;
    /* Half of them are of a few families, whose prompts begin alike for a while. */
    int32_t family = random_below(&w->random, 6), n_alike = random_below(&w->random, n + 1);
    uint64_t features_salt = family < 3 ? (uint64_t)random_below(&w->random, 2) : w->random.state;
    for (int32_t i = 0; i < n; i++)
        r->ids[i] = i < n_image                 ? IMAGE
                    : family < 3 && i < n_alike ? 10 + (family * 7 + i) % 30
                                                : 10 + random_below(&w->random, 30);
    name_tiles(r, features_salt);
    r->cache_salt = random_below(&w->random, 4) == 0 ? "other" : NULL;
    if (random_below(&w->random, 10) == 0)
        r->captures = CAPTURE_LOGITS;
    r->n = random_below(&w->random, 5) == 0 ? 1 + random_below(&w->random, 4) : 1;
    if (random_below(&w->random, 6) == 0) {
        r->n_beams = 2 + random_below(&w->random, 3);
        r->n = 1 + random_below(&w->random, r->n_beams);
        r->length_penalty = (float)random_below(&w->random, 3);
        r->early_stopping = (enum early_stopping)random_below(&w->random, 3);
    }
    r->max_tokens = random_below(&w->random, 12) == 0 ? 0 : 1 + random_below(&w->random, 30);
    if (r->max_tokens == 0)
        r->n = r->n_beams = 1;
    if (random_below(&w->random, 3) == 0)
        r->min_tokens = random_below(&w->random, 8);
    r->ignore_eos = random_below(&w->random, 4) == 0;
    r->priority = random_below(&w->random, 3);
    if (random_below(&w->random, 4) == 0)
        r->sampling.presence_penalty = 0.5f; // travels with its history
    if (scheduler_check(&w->config, r, NULL) < 0) {
        request_free(r);
        return;
    }
    struct expected *x = &w->live[w->n_live++];
    *x = (struct expected){.n_ids = n, .n_tiles = n_tiles, .features_salt = features_salt};
    x->ids = xcalloc((size_t)n, sizeof(int32_t));
    memcpy(x->ids, r->ids, (size_t)n * sizeof(int32_t));
    if (r->n_beams == 1 && random_below(&w->random, 6) == 0)
        x->stop_after = 1 + random_below(&w->random, 5);
    x->ticket = scheduler_add(&w->scheduler, r);
    w->n_images += n_tiles > 0;
}

/* The features of one tile of one request come back. */
static void see(struct world *w)
{
    for (int i = 0; i < w->n_live; i++) {
        struct ticket *t = w->live[i].ticket;
        if (t->n_tiles_done == t->n_tiles || random_below(&w->random, 2) == 0)
            continue;
        if (!t->features)
            t->features =
                xcalloc((size_t)(t->n_tiles * tokens_per_tile()), FEATURE_DIM * sizeof(float));
        for (int32_t k = 0; k < tokens_per_tile(); k++) {
            int32_t row = t->n_tiles_done * tokens_per_tile() + k;
            t->features[row * FEATURE_DIM] = feature_of(w->live[i].features_salt, row);
            t->features[row * FEATURE_DIM + 1] = (float)row;
        }
        t->n_tiles_done++;
        return;
    }
}

/* ---- what must hold always ---- */

static void check_pages(struct world *w)
{
    const struct page_pool *p = &w->scheduler.pool;
    int32_t *refs = xcalloc((size_t)p->n_pages, sizeof(*refs));
    int32_t *holds = xcalloc((size_t)p->n_pages, sizeof(*holds));
    const struct ticket *lists[] = {w->scheduler.first, w->scheduler.dead};
    for (int k = 0; k < 2; k++)
        for (const struct ticket *t = lists[k]; t; t = t->next)
            for (int32_t i = 0; i < t->n_sequences; i++)
                for (int32_t j = 0; j < t->sequences[i].n_pages; j++)
                    refs[t->sequences[i].pages[j]]++;
    for (int i = 0; i < w->n_flights; i++)
        for (int32_t j = 0; j < w->flights[i].step->n_copies; j++)
            holds[w->flights[i].step->copy_src[j]]++;
    int32_t n_used = 0, n_idle = 0;
    for (int32_t i = p->next[p->n_pages]; i != p->n_pages; i = p->next[i]) {
        assert_true(page_pool_is_idle(p, i));
        n_idle++;
    }
    assert_int_equal(n_idle, p->n_idle);
    for (int32_t i = 0; i < p->n_pages; i++) {
        assert_int_equal(refs[i], p->refs[i]);
        assert_int_equal(holds[i], p->holds[i]);
        assert_int_equal(p->kept[i],
                         w->scheduler.prefix.pages && w->scheduler.prefix.pages[i].serial != 0);
        n_used += refs[i] + holds[i] > 0;
    }
    assert_int_equal(n_used, scheduler_n_pages_used(&w->scheduler));
    assert_int_equal(n_used + n_idle + p->n_free, p->n_pages);
    for (int32_t i = 0; i < p->n_free; i++) {
        assert_int_equal(p->refs[p->free[i]] + p->holds[p->free[i]], 0);
        p->refs[p->free[i]] = -1; // met
    }
    for (int32_t i = 0; i < p->n_free; i++) {
        assert_int_equal(p->refs[p->free[i]], -1); // twice in the list would show here
        p->refs[p->free[i]] = 0;
    }
    free(refs);
    free(holds);
}

/* A cached page's predecessor is cached: pages are evicted from the end of a prompt. */
static void check_chains(struct world *w)
{
    const struct prefix_cache *c = &w->scheduler.prefix;
    int32_t n = 0;
    for (int32_t i = 0; i < c->n_pages; i++) {
        int has_before = c->pages[i].serial == 0 || c->pages[i].before == 0;
        n += c->pages[i].serial != 0;
        for (int32_t j = 0; !has_before && j < c->n_pages; j++)
            has_before = c->pages[j].serial == c->pages[i].before;
        assert_true(has_before);
    }
    assert_int_equal(n, c->n_cached);
}

static void check_order(struct world *w)
{
    const struct scheduler *s = &w->scheduler;
    int32_t n_places = 0;
    for (int32_t i = 0; i < s->n_order; i++) {
        const struct sequence *q = s->order[i];
        if (i > 0)
            assert_true(sequence_compare(s->order[i - 1], q) < 0);
        assert_true(q->state == SEQUENCE_WAITING || q->state == SEQUENCE_RUNNING);
        assert_true((q->n_pages > 0) == (q->state == SEQUENCE_RUNNING));
        if (q->state == SEQUENCE_RUNNING)
            n_places += q->ticket->forked ? 1 : q->ticket->n_sequences;
    }
    assert_int_equal(n_places, s->n_running);
    assert_true(s->n_running <= s->config.max_num_seqs);
}

/* ---- the fake model ---- */

static uint64_t *cell(struct world *w, const struct batch *b, int32_t sequence, int32_t position)
{
    int32_t page = position / w->config.page_size;
    assert_true(page < b->page_start[sequence + 1] - b->page_start[sequence]);
    return &w->cache[(size_t)b->pages[b->page_start[sequence] + page] *
                         (size_t)w->config.page_size +
                     (size_t)(position % w->config.page_size)];
}

static void execute(struct world *w, const struct batch *b, struct flight *f)
{
    size_t page_size = (size_t)w->config.page_size;
    assert_true(b->n_tokens <= w->config.max_num_batched_tokens);
    assert_true(b->n_sequences <= w->config.max_num_seqs);
    assert_true(b->n_samples <= w->config.max_num_seqs);
    for (int32_t i = 0; i < b->n_copies; i++)
        memcpy(w->cache + (size_t)b->copy_dst[i] * page_size,
               w->cache + (size_t)b->copy_src[i] * page_size, page_size * sizeof(*w->cache));
    for (int32_t i = 0; i < b->n_sequences; i++) {
        int32_t n_new = b->query_start[i + 1] - b->query_start[i];
        int32_t start = b->context_len[i] - n_new;
        assert_true(n_new >= 1 && start >= 0 && b->rope_len[i] >= b->context_len[i]);
        for (int32_t j = 0; j < n_new; j++) {
            int32_t row = b->query_start[i] + j, feature_row = b->feature_rows[row];
            assert_true(b->positions[row] == (float)(start + j));
            assert_true(feature_row < b->n_features);
            uint64_t before = start + j > 0 ? *cell(w, b, i, start + j - 1) : 0;
            *cell(w, b, i, start + j) =
                token_hash(before, b->token_ids[row],
                           feature_row < 0 ? 0.0f : b->features[feature_row * FEATURE_DIM],
                           rope_of(w, b->rope_len[i]));
        }
    }
    f->n_samples = b->n_samples;
    f->samples = xcalloc((size_t)b->n_samples, sizeof(*f->samples));
    for (int32_t i = 0; i < b->n_samples; i++) {
        const struct sample_row *row = &b->samples[i];
        assert_int_equal(row->row, b->query_start[row->sequence + 1] - 1);
        uint64_t hash = *cell(w, b, row->sequence, b->context_len[row->sequence] - 1);
        if (row->sampling.n_beam_best > 0) {
            f->samples[i].sequence = row->sequence;
            fill_beams(&f->samples[i], row->sampling.n_beam_best, hash,
                       b->banned + row->banned_start, row->n_banned);
            continue;
        }
        int32_t id = next_token(hash, row->candidate, row->position);
        for (int32_t k = 0; k < row->n_banned; k++)
            if (b->banned[row->banned_start + k] == id)
                id = 49;
        f->samples[i] = (struct sample_result){.sequence = row->sequence, .token.id = id};
        if (row->n_prompt > 0)
            assert_int_equal(row->n_prompt + row->n_output, b->context_len[row->sequence]);
    }
}

static uint64_t prompt_hash(struct world *w, const struct expected *x)
{
    uint64_t hash = 0;
    for (int32_t i = 0; i < x->n_ids; i++)
        hash =
            token_hash(hash, x->ids[i],
                       i < x->n_tiles * tokens_per_tile() ? feature_of(x->features_salt, i) : 0.0f,
                       rope_of(w, x->n_ids));
    return hash;
}

/* A beam search by itself: no pages, no steps, no company. */
struct lone_search {
    const struct request *request;
    struct beam_search *b;
    uint64_t hashes[BEAMS_MAX];
    int32_t *outputs[BEAMS_MAX];
};

static int lone_is_end(const void *arg, int32_t id)
{
    const struct lone_search *l = arg;
    return id == EOS && !l->request->ignore_eos && l->b->n_tokens + 1 > l->request->min_tokens;
}

static void lone_reorder(struct world *w, struct lone_search *l, int32_t n_prompt)
{
    struct lone_search next = *l;
    int32_t n = l->b->n_tokens; // the latest token included
    for (int32_t i = 0; i < l->b->settings.n_beams; i++) {
        int32_t parent = l->b->parents[i];
        next.outputs[i] = xcalloc((size_t)n, sizeof(int32_t));
        if (n > 1)
            memcpy(next.outputs[i], l->outputs[parent], (size_t)(n - 1) * sizeof(int32_t));
        next.outputs[i][n - 1] = l->b->tokens[i];
        next.hashes[i] =
            token_hash(l->hashes[parent], l->b->tokens[i], 0.0f, rope_of(w, n_prompt + n));
    }
    for (int32_t i = 0; i < l->b->settings.n_beams; i++)
        free(l->outputs[i]);
    *l = next;
}

static void check_beams(struct world *w, const struct expected *x)
{
    const struct ticket *t = x->ticket;
    const struct request *r = t->request;
    const int32_t eos[] = {EOS};
    struct lone_search l = {.request = r, .b = beam_search_new(&t->beams->settings)};
    int32_t n_beams = r->n_beams;
    for (int32_t i = 0; i < n_beams; i++)
        l.hashes[i] = prompt_hash(w, x);
    for (int over = 0, n_rows = 1; !over; n_rows = n_beams) {
        memset(l.b->rows, 0, sizeof(l.b->rows));
        for (int32_t i = 0; i < n_rows; i++)
            fill_beams(&l.b->rows[i], l.b->settings.n_best, l.hashes[i], eos,
                       !r->ignore_eos && l.b->n_tokens < r->min_tokens);
        over = beam_search_step(l.b, n_rows, (const int32_t *const *)l.outputs, lone_is_end, &l);
        lone_reorder(w, &l, x->n_ids);
    }
    for (int32_t i = 0; i < r->n; i++) {
        const struct beam_finished *f = &t->beams->finished[i], *e = &l.b->finished[i];
        assert_true(f->is_complete && e->is_complete);
        assert_memory_equal(&f->score, &e->score, sizeof(f->score));
        assert_int_equal(f->ends_by_token, e->ends_by_token);
        assert_int_equal(f->n_ids, e->n_ids);
        assert_memory_equal(f->ids, e->ids, (size_t)f->n_ids * sizeof(*f->ids));
    }
    for (int32_t i = 0; i < n_beams; i++)
        free(l.outputs[i]);
    beam_search_free(l.b);
}

/* The output that candidate k must have, from the ids alone. */
static void check_output(struct world *w, const struct expected *x, int32_t k)
{
    const struct ticket *t = x->ticket;
    const struct request *r = t->request;
    const struct sequence *q = &t->sequences[k];
    uint64_t hash = prompt_hash(w, x);
    int32_t n = 0;
    for (int end = r->max_tokens == 0; !end; n++) {
        int32_t id = next_token(hash, k, n);
        if (n < r->min_tokens && id == EOS && !r->ignore_eos)
            id = 49;
        assert_true(n < q->n_output);
        assert_int_equal(id, q->output[n]);
        hash = token_hash(hash, id, 0.0f, rope_of(w, x->n_ids + n + 1));
        end = (id == EOS && !r->ignore_eos) || n + 1 == r->max_tokens ||
              x->n_ids + n + 1 == w->scheduler.context_limit || (k == 0 && x->stop_after == n + 1);
    }
    assert_int_equal(n, q->n_output);
}

static void forget(struct world *w, int i)
{
    struct request *r = scheduler_remove(&w->scheduler, w->live[i].ticket);
    request_free(r);
    free(w->live[i].ids);
    w->live[i] = w->live[--w->n_live];
}

static struct expected *find(struct world *w, const struct ticket *t)
{
    for (int i = 0; i < w->n_live; i++)
        if (w->live[i].ticket == t)
            return &w->live[i];
    fail_msg("an event of an unknown ticket");
    return NULL;
}

/* ---- operations ---- */

/* Sequences that could take a decode token now. */
static int32_t ready_decodes(const struct scheduler *s, struct sequence **list)
{
    int32_t n = 0;
    for (int32_t i = 0; i < s->n_order; i++) {
        struct sequence *q = s->order[i];
        if (q->state == SEQUENCE_RUNNING && !q->in_flight && sequence_n_todo(q) == 1)
            list[n++] = q;
    }
    return n;
}

static int in_step(const struct step *p, const struct sequence *q)
{
    for (int32_t i = 0; i < p->n_items; i++)
        if (p->items[i].sequence == q)
            return 1;
    return 0;
}

/* Decode first; the queue in order; nothing in two batches. */
static void check_step(struct world *w, const struct step *p, struct sequence **decodes,
                       int32_t n_decodes, const int *was_waiting)
{
    const struct scheduler *s = &w->scheduler;
    const struct sequence *last_admitted = NULL;
    int32_t n_running = 0;
    for (int32_t i = 0; i < p->n_items; i++) {
        const struct sequence *q = p->items[i].sequence;
        assert_true(q->in_flight && q->state == SEQUENCE_RUNNING);
        assert_true(ticket_is_ready(q->ticket));
        for (int k = 0; k < w->n_flights; k++)
            assert_false(in_step(w->flights[k].step, q));
    }
    for (int32_t i = 0; i < s->n_order; i++) {
        n_running += s->order[i]->state == SEQUENCE_RUNNING;
        if (was_waiting[i] && in_step(p, s->order[i]))
            last_admitted = s->order[i];
    }
    for (int32_t i = 0; last_admitted && s->order[i] != last_admitted; i++) {
        const struct ticket *t = s->order[i]->ticket;
        int is_idle = t->beams && t->beams->has_row[s->order[i]->candidate];
        if (s->order[i]->state == SEQUENCE_WAITING && !is_idle)
            assert_false(ticket_is_ready(t));
    }
    int32_t n_batches = w->config.n_batches_in_flight;
    int share_is_full = p->n_items >= (n_running + n_batches - 1) / n_batches && n_batches > 1;
    for (int32_t i = 0; i < n_decodes; i++) {
        if (in_step(p, decodes[i]) || decodes[i]->state == SEQUENCE_WAITING || share_is_full)
            continue;
        w->n_decodes_skipped++; // for want of a page: then nothing new was let in
        assert_null(last_admitted);
    }
}

static void step(struct world *w)
{
    struct scheduler *s = &w->scheduler;
    struct sequence *decodes[256];
    int *was_waiting = xcalloc((size_t)s->n_order + 1, sizeof(int));
    int n_ready = 0;
    for (int32_t i = 0; i < s->n_order; i++) {
        was_waiting[i] = s->order[i]->state == SEQUENCE_WAITING;
        n_ready += ticket_is_ready(s->order[i]->ticket);
    }
    int32_t n_decodes = ready_decodes(s, decodes);
    struct step *p = scheduler_step(s, w->now++);
    if (p) {
        check_step(w, p, decodes, n_decodes, was_waiting);
        struct flight *f = &w->flights[w->n_flights++];
        f->step = p;
        execute(w, s->batch, f);
    } else if (w->n_flights == 0) {
        assert_int_equal(n_ready, 0); // with nothing in flight something always runs
    }
    free(was_waiting);
}

static void complete(struct world *w)
{
    if (w->n_flights == 0)
        return;
    struct flight f = w->flights[0];
    struct scheduler *s = &w->scheduler;
    w->n_flights--;
    memmove(w->flights, w->flights + 1, (size_t)w->n_flights * sizeof(f));
    scheduler_update(s, f.step, f.samples, f.n_samples, w->now++);
    for (int32_t i = 0; i < s->n_events; i++) {
        const struct token_event *event = &s->events[i];
        struct expected *x = find(w, event->ticket);
        const struct sequence *q = &event->ticket->sequences[event->candidate];
        if (event->sample)
            assert_int_equal(event->sample->token.id, q->output[q->n_output - 1]);
        assert_true((event->finish != FINISH_NONE) == (q->state == SEQUENCE_FINISHED));
        if (event->candidate == 0 && x->stop_after == q->n_output && event->finish == FINISH_NONE)
            scheduler_finish(s, event->ticket, 0);
    }
    for (int i = w->n_live - 1; i >= 0; i--) {
        const struct ticket *t = w->live[i].ticket;
        if (t->n_unfinished > 0)
            continue;
        if (t->beams)
            check_beams(w, &w->live[i]);
        for (int32_t k = 0; k < t->n_sequences && !t->beams; k++)
            check_output(w, &w->live[i], k);
        w->n_forked += t->n_sequences > 1 && !t->beams;
        w->n_searches += t->beams != NULL;
        w->n_finished++;
        forget(w, i);
    }
    free(f.samples);
}

static void cancel(struct world *w)
{
    if (w->n_live == 0)
        return;
    w->n_cancelled++;
    forget(w, random_below(&w->random, w->n_live));
}

static void run_world(const struct scheduler_config *c, uint64_t seed, int n)
{
    struct world w;
    world_init(&w, c, seed);
    for (int i = 0; i < n; i++) {
        int32_t dice = random_below(&w.random, 100);
        if (dice < 12)
            arrive(&w);
        else if (dice < 20)
            see(&w);
        else if (dice < 22)
            cancel(&w);
        else if (dice < 60)
            step(&w);
        else
            complete(&w);
        if (n < 20000 || i % 8 == 0) {
            check_pages(&w);
            check_order(&w);
        }
        if (i % 64 == 0)
            check_chains(&w);
    }
    /* Nobody is cancelled any more: everything finishes. */
    for (int i = 0; w.n_live > 0; i++) {
        see(&w);
        step(&w);
        complete(&w);
        assert_true(i < 1000000);
    }
    step(&w); // the dead go
    check_pages(&w);
    assert_int_equal(scheduler_n_pages_used(&w.scheduler), 0);
    assert_int_equal(w.scheduler.n_running, 0);
    assert_null(w.scheduler.dead);
    print_message("pages %d x %d, seqs %d, budget %d, in flight %d: %d finished (%d with n > 1, "
                  "%d beam searches, %d with pictures came), %d cancelled, %llu steps, %llu "
                  "preempted, %d decodes "
                  "without a page, %llu of %llu tokens cached\n",
                  c->n_pages, c->page_size, c->max_num_seqs, c->max_num_batched_tokens,
                  c->n_batches_in_flight, w.n_finished, w.n_forked, w.n_searches, w.n_images,
                  w.n_cancelled, (unsigned long long)w.scheduler.n_steps,
                  (unsigned long long)w.scheduler.n_preempted, w.n_decodes_skipped,
                  (unsigned long long)w.scheduler.n_prefix_hits,
                  (unsigned long long)w.scheduler.n_prefix_queries);
    assert_true(n < 1000 || !c->enable_prefix_caching || w.scheduler.n_prefix_hits > 0);
    world_release(&w);
}

static void test_random_operations(void **state)
{
    (void)state;
    static const struct scheduler_config settings[] = {
        {.page_size = 4,
         .n_pages = 200,
         .enable_prefix_caching = 1,
         .max_model_len = 120,
         .max_num_seqs = 16,
         .max_num_batched_tokens = 32,
         .n_batches_in_flight = 1},
        {.page_size = 4,
         .n_pages = 30,
         .max_model_len = 200,
         .max_num_seqs = 8,
         .max_num_batched_tokens = 16,
         .n_batches_in_flight = 1},
        {.page_size = 4,
         .n_pages = 30,
         .max_model_len = 200,
         .max_num_seqs = 8,
         .max_num_batched_tokens = 16,
         .enable_prefix_caching = 1,
         .n_batches_in_flight = 2},
        {.page_size = 16,
         .n_pages = 40,
         .max_model_len = 300,
         .max_num_seqs = 32,
         .max_num_batched_tokens = 64,
         .enable_prefix_caching = 1,
         .n_batches_in_flight = 4},
        {.page_size = 1,
         .n_pages = 60,
         .max_model_len = 60,
         .max_num_seqs = 4,
         .max_num_batched_tokens = 4,
         .n_batches_in_flight = 3,
         .enable_prefix_caching = 1,
         .rope_dynamic_from = 20},
    };
    int n_settings = (int)(sizeof(settings) / sizeof(settings[0]));
    for (int i = 0; i < n_settings; i++)
        run_world(&settings[i], 1234567u + (uint64_t)i, n_operations / n_settings);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        n_operations = atoi(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_operations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
