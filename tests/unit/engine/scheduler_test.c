/*
 * The scheduler and the page pool under random operations: arrivals, features that come late,
 * cancels, candidates ended from outside, forks, preemptions, several steps in flight.
 *
 * A fake model stands in for the workers: a page holds, for each token, a hash of everything up to
 * it, read through the batch's page list; the next token is a function of that hash. A page lost,
 * shared wrongly, freed too early or copied too late changes a token, and every answer is compared
 * with the one computed from the ids alone. So the results are shown to be independent of
 * scheduling, of chunks and of preemption.
 *
 * usage: scheduler_test [operations per setting]
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

#define EOS 3
#define IMAGE 7
#define FEATURE_DIM 2

static int n_operations = 100000; // over all settings

/* ---- random numbers and hashes ---- */

struct random {
    uint64_t state;
};

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

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
    int finished;
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
    int n_finished, n_cancelled, n_forked, n_images, n_decodes_skipped;
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
    r->max_tokens = random_below(&w->random, 12) == 0 ? 0 : 1 + random_below(&w->random, 30);
    if (r->max_tokens == 0)
        r->n = 1;
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
    if (random_below(&w->random, 6) == 0)
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
        int32_t id = next_token(hash, row->candidate, row->position);
        for (int32_t k = 0; k < row->n_banned; k++)
            if (b->banned[row->banned_start + k] == id)
                id = 49;
        f->samples[i] = (struct sample_result){.sequence = row->sequence, .token.id = id};
        if (row->n_prompt > 0)
            assert_int_equal(row->n_prompt + row->n_output, b->context_len[row->sequence]);
    }
}

/* The output that candidate k must have, from the ids alone; returns its length and whether it is
 * complete at that length. */
static void check_output(struct world *w, const struct expected *x, int32_t k)
{
    const struct ticket *t = x->ticket;
    const struct request *r = t->request;
    const struct sequence *q = &t->sequences[k];
    uint64_t hash = 0;
    for (int32_t i = 0; i < x->n_ids; i++)
        hash =
            token_hash(hash, x->ids[i],
                       i < x->n_tiles * tokens_per_tile() ? feature_of(x->features_salt, i) : 0.0f,
                       rope_of(w, x->n_ids));
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
    for (int32_t i = 0; last_admitted && s->order[i] != last_admitted; i++)
        if (s->order[i]->state == SEQUENCE_WAITING)
            assert_false(ticket_is_ready(s->order[i]->ticket));
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
        for (int32_t k = 0; k < t->n_sequences; k++)
            check_output(w, &w->live[i], k);
        w->n_forked += t->n_sequences > 1;
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
                  "%d with pictures came), %d cancelled, %llu steps, %llu preempted, %d decodes "
                  "without a page, %llu of %llu tokens cached\n",
                  c->n_pages, c->page_size, c->max_num_seqs, c->max_num_batched_tokens,
                  c->n_batches_in_flight, w.n_finished, w.n_forked, w.n_images, w.n_cancelled,
                  (unsigned long long)w.scheduler.n_steps,
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

/* ---- single cases ---- */

static struct request *text_request(int32_t n_ids, int32_t max_tokens)
{
    struct request *r = request_new(1 << 20);
    r->ids = arena_alloc(&r->arena, (size_t)n_ids, sizeof(int32_t));
    r->n_ids = n_ids;
    r->max_tokens = max_tokens;
    r->sampling.temperature = 0.0f;
    for (int32_t i = 0; i < n_ids; i++)
        r->ids[i] = 10 + i;
    return r;
}

static struct scheduler_config small_config(void)
{
    return (struct scheduler_config){.page_size = 4,
                                     .n_pages = 16,
                                     .max_model_len = 64,
                                     .max_num_seqs = 4,
                                     .max_num_batched_tokens = 8,
                                     .n_batches_in_flight = 1,
                                     .feature_dim = FEATURE_DIM,
                                     .eos_ids = eos_ids,
                                     .n_eos = 1};
}

/* Ends the step with the same token for every sample. */
static void answer(struct scheduler *s, struct step *p, int32_t id)
{
    struct sample_result samples[16];
    memset(samples, 0, sizeof(samples));
    for (int32_t i = 0; i < p->n_samples; i++)
        samples[i].token.id = id;
    scheduler_update(s, p, samples, p->n_samples, 2);
}

static void test_check(void **state)
{
    (void)state;
    struct scheduler_config c = small_config();
    struct error err;
    struct request *r = text_request(63, 1);
    assert_int_equal(scheduler_check(&c, r, &err), 0);
    r->n = 5;
    assert_int_equal(scheduler_check(&c, r, &err), -1);
    assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
    request_free(r);
    r = text_request(64, 1);
    assert_int_equal(scheduler_check(&c, r, &err), -1);
    assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
    r->max_tokens = 0; // a pass over the prompt alone needs no room for an answer
    assert_int_equal(scheduler_check(&c, r, &err), 0);
    c.n_pages = 15;
    assert_int_equal(scheduler_check(&c, r, &err), -1);
    assert_int_equal(err.code, ERROR_RESOURCE_EXHAUSTED);
    request_free(r);
}

/* A long prompt in chunks does not keep a running answer waiting for a single step. */
static void test_decode_beside_prefill(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct ticket *a = scheduler_add(&s, text_request(3, 50));
    answer(&s, scheduler_step(&s, 1), 9);
    struct ticket *b = scheduler_add(&s, text_request(30, 5));
    for (int i = 0; b->prefill_end_ns == 0; i++) {
        struct step *p = scheduler_step(&s, 1);
        assert_int_equal(p->n_items, 2);
        assert_ptr_equal(p->items[0].sequence->ticket, a);
        assert_int_equal(p->items[0].n_new, 1);
        assert_ptr_equal(p->items[1].sequence->ticket, b);
        assert_int_equal(p->items[1].n_new, i < 4 ? 7 : 2);
        answer(&s, p, 9);
    }
    assert_int_equal(a->sequences[0].n_output, 6);
    assert_int_equal(b->sequences[0].n_output, 1);
    scheduler_release(&s);
}

static void test_end_rules(void **state)
{
    (void)state;
    static const int32_t stop_ids[] = {20, 21};
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct request *r = text_request(3, 10);
    r->stop_token_ids = stop_ids;
    r->n_stop_token_ids = 2;
    r->min_tokens = 1;
    struct ticket *t = scheduler_add(&s, r);
    struct step *p = scheduler_step(&s, 1);
    assert_int_equal(s.batch->samples[0].n_banned, 3); // end token and two stop ids
    assert_int_equal(s.batch->banned[s.batch->samples[0].banned_start], EOS);
    answer(&s, p, 21); // were it drawn, it would not end the answer
    assert_int_equal(s.events[0].finish, FINISH_NONE);
    p = scheduler_step(&s, 1);
    assert_int_equal(s.batch->samples[0].n_banned, 0);
    answer(&s, p, 21);
    assert_int_equal(s.events[0].finish, FINISH_STOP);
    assert_true(s.events[0].is_end);
    assert_int_equal(t->n_unfinished, 0);
    assert_int_equal(scheduler_n_pages_used(&s), 0);
    request_free(scheduler_remove(&s, t));

    r = text_request(3, 10);
    r->ignore_eos = 1;
    scheduler_add(&s, r);
    answer(&s, scheduler_step(&s, 1), EOS);
    assert_int_equal(s.events[0].finish, FINISH_NONE);
    scheduler_release(&s);
}

static void test_context_is_full(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct ticket *t = scheduler_add(&s, text_request(60, 100));
    while (t->n_unfinished > 0)
        answer(&s, scheduler_step(&s, 1), 9);
    assert_int_equal(t->sequences[0].n_output, 4);
    assert_int_equal(s.events[0].finish, FINISH_LENGTH);
    scheduler_release(&s);
}

/* n = 4: one prompt pass, four samples of its last row, shared pages, one copy fewer than writers.
 */
static void test_fork(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct request *r = text_request(6, 10);
    r->n = 4;
    struct ticket *t = scheduler_add(&s, r);
    struct step *p = scheduler_step(&s, 1);
    assert_int_equal(p->n_samples, 4);
    for (int32_t i = 0; i < 4; i++) {
        assert_int_equal(s.batch->samples[i].candidate, i);
        assert_int_equal(s.batch->samples[i].row, 5);
    }
    assert_int_equal(scheduler_n_pages_used(&s), 2);
    answer(&s, p, 9);
    assert_int_equal(s.n_events, 4);
    assert_int_equal(scheduler_n_pages_used(&s), 2);
    p = scheduler_step(&s, 1);
    assert_int_equal(p->n_items, 4);
    assert_int_equal(s.batch->n_copies, 3); // the last writes in place
    assert_int_equal(scheduler_n_pages_used(&s), 5);
    for (int32_t i = 1; i < 4; i++) // the full page is still one
        assert_int_equal(t->sequences[i].pages[0], t->sequences[0].pages[0]);
    answer(&s, p, 9);
    scheduler_release(&s);
}

/* A request that is cancelled while a batch names its pages keeps them until that batch is back. */
static void test_cancel_in_flight(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct ticket *t = scheduler_add(&s, text_request(6, 10));
    struct step *p = scheduler_step(&s, 1);
    request_free(scheduler_remove(&s, t));
    assert_int_equal(scheduler_n_pages_used(&s), 2);
    assert_int_equal(s.n_running, 0);
    answer(&s, p, 9);
    assert_int_equal(s.n_events, 0);
    assert_int_equal(scheduler_n_pages_used(&s), 0);
    scheduler_release(&s);
}

static void test_not_finite(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct ticket *a = scheduler_add(&s, text_request(3, 10));
    struct ticket *b = scheduler_add(&s, text_request(3, 10));
    struct step *p = scheduler_step(&s, 1);
    struct sample_result samples[2] = {{.not_finite = 1}, {.token.id = 9}};
    scheduler_update(&s, p, samples, 2, 2);
    assert_int_equal(s.events[0].finish, FINISH_ERROR);
    assert_ptr_equal(s.events[0].ticket, a);
    assert_int_equal(s.events[1].finish, FINISH_NONE);
    assert_int_equal(b->sequences[0].n_output, 1);
    scheduler_release(&s);
}

/* A smaller priority number is served first; pictures that are not encoded hold nobody up. */
static void test_order_of_service(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    c.max_num_seqs = 1;
    scheduler_init(&s, &c);
    struct request *picture = text_request(4, 1);
    picture->n_tiles = 1;
    picture->priority = -1;
    struct ticket *a = scheduler_add(&s, picture);
    struct ticket *b = scheduler_add(&s, text_request(3, 1));
    struct request *urgent = text_request(3, 1);
    urgent->priority = -1;
    struct ticket *u = scheduler_add(&s, urgent);
    struct ticket *expected[] = {u, a, b};
    for (int i = 0; i < 3; i++) {
        struct step *p = scheduler_step(&s, 1);
        assert_ptr_equal(p->items[0].sequence->ticket, expected[i]);
        answer(&s, p, 9);
        request_free(scheduler_remove(&s, expected[i]));
        if (i == 0)
            a->n_tiles_done = 1;
    }
    assert_null(scheduler_step(&s, 1));
    scheduler_release(&s);
}

/* A higher priority takes a running one's place at once and gives it back; an equal one waits. */
static void test_priority(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    c.max_num_seqs = 2;
    scheduler_init(&s, &c);
    struct ticket *low[2];
    for (int i = 0; i < 2; i++) {
        struct request *r = text_request(3, 10);
        r->priority = 1;
        low[i] = scheduler_add(&s, r);
    }
    answer(&s, scheduler_step(&s, 1), 9);
    struct request *equal = text_request(3, 10), *high = text_request(3, 2);
    equal->priority = 1;
    struct ticket *e = scheduler_add(&s, equal);
    struct step *p = scheduler_step(&s, 1);
    assert_int_equal(p->n_items, 2);
    assert_ptr_equal(p->items[1].sequence->ticket, low[1]);
    struct ticket *h = scheduler_add(&s, high);
    assert_null(scheduler_step(&s, 1)); // both are in a batch
    answer(&s, p, 9);
    p = scheduler_step(&s, 1);
    assert_int_equal(p->n_items, 2);
    assert_ptr_equal(p->items[0].sequence->ticket, low[0]);
    assert_ptr_equal(p->items[1].sequence->ticket, h);
    assert_int_equal(low[1]->n_preempted, 1);
    assert_int_equal(low[0]->n_preempted, 0);
    answer(&s, p, 9);
    answer(&s, scheduler_step(&s, 1), 9); // the high one has its two tokens
    assert_int_equal(h->n_unfinished, 0);
    p = scheduler_step(&s, 1);
    assert_ptr_equal(p->items[1].sequence->ticket, low[1]);
    answer(&s, p, 9);
    assert_int_equal(low[1]->sequences[0].n_output, 3); // it went on where it was
    assert_int_equal(e->sequences[0].n_output, 0);
    scheduler_release(&s);
}

/* Nobody is preempted in vain: all that is below would not make enough room. */
static void test_priority_in_vain(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct request *first = text_request(36, 10), *below = text_request(3, 10);
    struct request *large = text_request(40, 10);
    below->priority = 1;
    scheduler_add(&s, first);
    struct ticket *b = scheduler_add(&s, below);
    while (b->first_token_ns == 0)
        answer(&s, scheduler_step(&s, 1), 9);
    scheduler_add(&s, large);
    struct step *p = scheduler_step(&s, 1);
    assert_int_equal(p->n_items, 2);
    assert_int_equal(b->n_preempted, 0);
    answer(&s, p, 9);
    scheduler_release(&s);
}

/* Two batches in flight share the running sequences. */
static void test_share_of_pipeline(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    c.n_batches_in_flight = 2;
    scheduler_init(&s, &c);
    for (int i = 0; i < 4; i++)
        scheduler_add(&s, text_request(2, 10));
    answer(&s, scheduler_step(&s, 1), 9);
    struct step *first = scheduler_step(&s, 1), *second = scheduler_step(&s, 1);
    assert_int_equal(first->n_items, 2);
    assert_int_equal(second->n_items, 2);
    assert_null(scheduler_step(&s, 1));
    answer(&s, first, 9);
    answer(&s, second, 9);
    scheduler_release(&s);
}

/* ---- the prefix cache ---- */

/* Runs the request to its end and returns how much of its prompt was cached. */
static int32_t run_cached(struct scheduler *s, struct request *r)
{
    struct ticket *t = scheduler_add(s, r);
    while (t->n_unfinished > 0)
        answer(s, scheduler_step(s, 1), 9);
    int32_t n = t->n_cached_tokens;
    request_free(scheduler_remove(s, t));
    return n;
}

static struct scheduler_config cached_config(void)
{
    struct scheduler_config c = small_config();
    c.enable_prefix_caching = 1;
    c.n_features_per_tile = 4;
    return c;
}

static void test_prefix(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = cached_config();
    scheduler_init(&s, &c);
    assert_int_equal(run_cached(&s, text_request(12, 3)), 0);
    assert_int_equal(scheduler_n_pages_used(&s), 0);
    assert_int_equal(run_cached(&s, text_request(12, 3)), 8); // one token is left to compute
    assert_int_equal(run_cached(&s, text_request(13, 3)), 12);
    struct request *r = text_request(13, 3);
    r->cache_salt = "mine";
    assert_int_equal(run_cached(&s, r), 0);
    r = text_request(13, 3);
    r->cache_salt = "mine";
    assert_int_equal(run_cached(&s, r), 12);
    r = text_request(13, 3);
    r->ids[5] = 49; // in the second page
    assert_int_equal(run_cached(&s, r), 4);
    r = text_request(13, 0);
    r->captures = CAPTURE_LOGITS;
    assert_int_equal(run_cached(&s, r), 0);
    /* The answer's tokens are cached as well: a conversation goes on. */
    r = text_request(20, 3);
    r->ids[12] = r->ids[13] = r->ids[14] = 9;
    assert_int_equal(run_cached(&s, r), 12);
    r = text_request(10, 7);
    run_cached(&s, r);
    r = text_request(17, 1);
    for (int32_t i = 10; i < 17; i++)
        r->ids[i] = 9;
    assert_int_equal(run_cached(&s, r), 16);
    /* All pages are needed for another prompt: nothing is left of the old ones. */
    r = text_request(60, 4);
    for (int32_t i = 0; i < 60; i++)
        r->ids[i] = 8;
    run_cached(&s, r);
    assert_int_equal(run_cached(&s, text_request(13, 3)), 0);
    scheduler_release(&s);
}

/* The same ids with other pictures are other prompts. */
static void test_prefix_pictures(void **state)
{
    (void)state;
    static const struct {
        uint64_t salts[2];
        int32_t n_cached;
    } cases[] = {{{1, 2}, 0}, {{1, 2}, 8}, {{1, 3}, 4}, {{2, 1}, 0}, {{2, 1}, 8}, {{3, 2}, 0}};
    struct scheduler s;
    struct scheduler_config c = cached_config();
    scheduler_init(&s, &c);
    for (size_t k = 0; k < sizeof(cases) / sizeof(cases[0]); k++) {
        struct request *r = text_request(10, 1);
        for (int32_t i = 0; i < 8; i++)
            r->ids[i] = IMAGE;
        r->image_token_id = IMAGE;
        r->n_tiles = 2;
        r->tile_digests = arena_alloc(&r->arena, 2, sizeof(struct digest));
        for (int i = 0; i < 2; i++)
            r->tile_digests[i].bytes[0] = (uint8_t)cases[k].salts[i];
        struct ticket *t = scheduler_add(&s, r);
        t->features = xcalloc(8, FEATURE_DIM * sizeof(float));
        t->n_tiles_done = 2;
        while (t->n_unfinished > 0)
            answer(&s, scheduler_step(&s, 1), 9);
        assert_int_equal(t->n_cached_tokens, cases[k].n_cached);
        request_free(scheduler_remove(&s, t));
    }
    scheduler_release(&s);
}

/* A key is not believed: what it stands for is compared. */
static void test_prefix_verified(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = cached_config();
    scheduler_init(&s, &c);
    run_cached(&s, text_request(13, 1));
    for (int32_t i = 0; i < s.prefix.n_pages; i++)
        if (s.prefix.pages[i].serial == 2) // as if another prompt's second page had the same key
            s.prefix.pages[i].content[0] ^= 1;
    assert_int_equal(run_cached(&s, text_request(13, 1)), 4);
    assert_int_equal(run_cached(&s, text_request(13, 1)), 4); // and is not overwritten
    scheduler_release(&s);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        n_operations = atoi(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_check),
        cmocka_unit_test(test_decode_beside_prefill),
        cmocka_unit_test(test_end_rules),
        cmocka_unit_test(test_context_is_full),
        cmocka_unit_test(test_fork),
        cmocka_unit_test(test_cancel_in_flight),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_order_of_service),
        cmocka_unit_test(test_priority),
        cmocka_unit_test(test_priority_in_vain),
        cmocka_unit_test(test_share_of_pipeline),
        cmocka_unit_test(test_prefix),
        cmocka_unit_test(test_prefix_pictures),
        cmocka_unit_test(test_prefix_verified),
        cmocka_unit_test(test_random_operations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
