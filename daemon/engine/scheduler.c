/* The policy described in scheduler.h. */
#include "daemon/engine/scheduler.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

static int32_t pages_of(int32_t page_size, int32_t n_tokens)
{
    return (int32_t)(((int64_t)n_tokens + page_size - 1) / page_size);
}

/* Tokens of one sequence: what the model allows, or what fits in the pool when it runs alone. */
static int32_t context_limit(const struct scheduler_config *c)
{
    int64_t capacity = (int64_t)c->n_pages * c->page_size;
    return capacity < c->max_model_len ? (int32_t)capacity : c->max_model_len;
}

void scheduler_init(struct scheduler *s, const struct scheduler_config *c)
{
    if (c->page_size < 1 || c->n_pages < 1 || c->max_num_seqs < 1 || c->n_batches_in_flight < 1 ||
        c->max_model_len < 1)
        die("the scheduler's settings must be positive");
    if (c->max_num_batched_tokens < c->max_num_seqs)
        die("--max-num-batched-tokens (%d) must be at least --max-num-seqs (%d)",
            c->max_num_batched_tokens, c->max_num_seqs);
    memset(s, 0, sizeof(*s));
    s->config = *c;
    s->context_limit = context_limit(c);
    page_pool_init(&s->pool, c->n_pages);
    if (c->enable_prefix_caching && c->n_features_per_tile < 1)
        die("prefix caching needs to know the features of a tile");
    if (c->enable_prefix_caching)
        prefix_cache_init(&s->prefix, c->n_pages, c->page_size, c->n_features_per_tile,
                          c->rope_dynamic_from);
    s->steps = xcalloc((size_t)c->n_batches_in_flight, sizeof(*s->steps));
    for (int32_t i = 0; i < c->n_batches_in_flight; i++)
        step_init(&s->steps[i], c->max_num_seqs);
    batch_builder_init(&s->builder, c->max_num_batched_tokens, c->max_num_seqs, c->feature_dim,
                       c->eos_ids, c->n_eos);
    s->events = xcalloc((size_t)c->max_num_seqs * BEAMS_MAX, sizeof(*s->events));
    s->found = xcalloc((size_t)c->n_pages, sizeof(*s->found));
}

static void free_tickets(struct scheduler *s, struct ticket *first)
{
    for (struct ticket *t = first, *next; t; t = next) {
        next = t->next;
        for (int32_t i = 0; i < t->n_sequences; i++)
            sequence_drop_pages(&t->sequences[i], &s->pool);
        if (t->request)
            request_free(t->request);
        ticket_free(t);
    }
}

void scheduler_release(struct scheduler *s)
{
    free_tickets(s, s->first);
    free_tickets(s, s->dead);
    for (int32_t i = 0; s->steps && i < s->config.n_batches_in_flight; i++)
        step_release(&s->steps[i]);
    free(s->steps);
    free(s->order);
    free(s->events);
    free(s->found);
    batch_builder_release(&s->builder);
    prefix_cache_release(&s->prefix);
    page_pool_release(&s->pool);
    memset(s, 0, sizeof(*s));
}

int32_t scheduler_n_pages_used(const struct scheduler *s)
{
    return s->pool.n_pages - s->pool.n_free - s->pool.n_idle;
}

static int contains(const int32_t *ids, int32_t n, int32_t id)
{
    for (int32_t i = 0; i < n; i++)
        if (ids[i] == id)
            return 1;
    return 0;
}

/* Distinct tokens that end a continuation. */
static int32_t n_end_tokens(const struct scheduler_config *c, const struct request *r)
{
    int32_t n = 0;
    for (int32_t i = 0; i < c->n_eos && !r->ignore_eos; i++)
        n += !contains(c->eos_ids, i, c->eos_ids[i]);
    for (int32_t i = 0; i < r->n_stop_token_ids; i++)
        n += !contains(r->stop_token_ids, i, r->stop_token_ids[i]) &&
             (r->ignore_eos || !contains(c->eos_ids, c->n_eos, r->stop_token_ids[i]));
    return n;
}

/* Best next tokens that each beam must tell. */
static int32_t n_best_of(const struct scheduler_config *c, const struct request *r)
{
    return beams_needed(r->n_beams, n_end_tokens(c, r));
}

static int32_t n_beams_max(const struct scheduler_config *c, const struct request *r)
{
    int32_t n = TOP_LOGPROBS_MAX / beams_needed(1, n_end_tokens(c, r));
    return n < c->max_num_seqs ? n : c->max_num_seqs;
}

int scheduler_check(const struct scheduler_config *c, const struct request *r, struct error *err)
{
    if (r->n_ids < 1)
        return error_set(err, ERROR_INVALID_ARGUMENT, "the prompt is empty");
    if (r->n < 1 || r->n > c->max_num_seqs)
        return error_set(err, ERROR_INVALID_ARGUMENT, "n is %d: it must be 1 to %d", r->n,
                         c->max_num_seqs);
    if (r->n_beams < 1 || (r->n_beams > 1 && r->n > r->n_beams))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "n is %d: of %d beams no more can be returned", r->n, r->n_beams);
    if (r->n_beams > 1 &&
        (r->n_beams > c->max_num_seqs || r->max_tokens == 0 || n_best_of(c, r) > TOP_LOGPROBS_MAX))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "num_beams is %d: with %d end tokens it must be at most %d", r->n_beams,
                         n_end_tokens(c, r), n_beams_max(c, r));
    if (r->max_tokens < 0 || r->min_tokens < 0 || (r->max_tokens == 0 && r->n > 1))
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "max_tokens and min_tokens must not be negative");
    int64_t n_needed = (int64_t)r->n_ids + (r->max_tokens > 0);
    if (n_needed > c->max_model_len)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "the prompt has %d tokens and the model's context is %d", r->n_ids,
                         c->max_model_len);
    if (n_needed > context_limit(c))
        return error_set(err, ERROR_RESOURCE_EXHAUSTED,
                         "the prompt has %d tokens and the KV cache holds %d", r->n_ids,
                         context_limit(c));
    return 0;
}

/* ---- the order of service ---- */

/* Index of the first sequence that does not come before `q`. */
static int32_t order_find(const struct scheduler *s, const struct sequence *q)
{
    int32_t low = 0, high = s->n_order;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (sequence_compare(s->order[middle], q) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void order_insert(struct scheduler *s, struct sequence *q)
{
    if (s->n_order == s->order_capacity) {
        s->order_capacity = s->order_capacity ? 2 * s->order_capacity : 64;
        s->order = xrealloc(s->order, (size_t)s->order_capacity, sizeof(struct sequence *));
    }
    int32_t i = order_find(s, q);
    memmove(s->order + i + 1, s->order + i, (size_t)(s->n_order - i) * sizeof(struct sequence *));
    s->order[i] = q;
    s->n_order++;
}

static void order_remove(struct scheduler *s, const struct sequence *q)
{
    int32_t i = order_find(s, q);
    if (i == s->n_order || s->order[i] != q)
        BUG("a sequence is not in the order of service");
    s->n_order--;
    memmove(s->order + i, s->order + i + 1, (size_t)(s->n_order - i) * sizeof(struct sequence *));
}

/* ---- tickets ---- */

struct ticket *scheduler_add(struct scheduler *s, struct request *r)
{
    struct ticket *t = ticket_new(r, ++s->last_ticket);
    t->previous = s->last;
    *(s->last ? &s->last->next : &s->first) = t;
    s->last = t;
    s->n_tickets++;
    s->n_unstarted++;
    if (r->n_features_per_tile >= 0)
        t->n_tile_floats = (int64_t)r->n_features_per_tile * s->config.feature_dim;
    t->is_cacheable = s->config.enable_prefix_caching && !r->inputs_embeds &&
                      (r->n_tiles == 0 || (r->tile_digests && !request_has_odd_tiles(r)));
    if (t->is_cacheable)
        prefix_cache_root(&s->prefix, r->cache_salt, &t->cache_root);
    if (r->n_beams > 1) {
        int32_t n_left = s->context_limit - r->n_ids;
        t->beams = beam_search_new(&(struct beam_settings){
            .n_beams = r->n_beams,
            .n_best = n_best_of(&s->config, r),
            .max_tokens = r->max_tokens < n_left ? r->max_tokens : n_left,
            .length_penalty = r->length_penalty,
            .early_stopping = r->early_stopping,
        });
    }
    order_insert(s, &t->sequences[0]);
    return t;
}

/* How many of max_num_seqs the sequence stands for while it runs: before the fork candidate 0
 * reserves the places of all. */
static int32_t places_of(const struct sequence *q)
{
    return q->ticket->forked ? 1 : q->ticket->n_sequences;
}

/* Out of the order of service, for good. The pages of one in flight stay until its batch is back.
 */
static void end_sequence(struct scheduler *s, struct sequence *q)
{
    if (q->state == SEQUENCE_FINISHED)
        return;
    if (q->state == SEQUENCE_RUNNING)
        s->n_running -= places_of(q);
    if (q->state != SEQUENCE_FORK)
        order_remove(s, q);
    q->state = SEQUENCE_FINISHED;
    q->ticket->n_unfinished--;
    if (!q->in_flight)
        sequence_drop_pages(q, &s->pool);
}

void scheduler_finish(struct scheduler *s, struct ticket *t, int32_t candidate)
{
    end_sequence(s, &t->sequences[candidate]);
}

struct request *scheduler_remove(struct scheduler *s, struct ticket *t)
{
    struct request *r = t->request;
    for (int32_t i = 0; i < t->n_sequences; i++)
        end_sequence(s, &t->sequences[i]);
    *(t->previous ? &t->previous->next : &s->first) = t->next;
    *(t->next ? &t->next->previous : &s->last) = t->previous;
    t->previous = NULL;
    t->next = s->dead;
    s->dead = t;
    s->n_tickets--;
    s->n_unstarted -= t->first_step_ns == 0;
    t->request = NULL;
    free(t->features);
    t->features = NULL;
    return r;
}

static void free_dead_tickets(struct scheduler *s)
{
    struct ticket **link = &s->dead;
    while (*link) {
        struct ticket *t = *link;
        if (t->n_in_flight > 0) {
            link = &t->next;
        } else {
            *link = t->next;
            ticket_free(t);
        }
    }
}

/* ---- pages ---- */

/* A page for whoever needs one: free, or the one that nobody has wanted for longest. -1: none. */
static int32_t take_page(struct scheduler *s)
{
    if (s->pool.n_free == 0) {
        int32_t page = page_pool_evict(&s->pool);
        if (page >= 0)
            prefix_cache_forget(&s->prefix, page);
    }
    return page_pool_take(&s->pool);
}

static void preempt(struct scheduler *s, struct sequence *victim)
{
    sequence_drop_pages(victim, &s->pool);
    s->n_running -= places_of(victim);
    victim->state = SEQUENCE_WAITING;
    victim->ticket->n_preempted++;
    s->n_preempted++;
}

/* Takes the pages of the newest running sequence that comes after `q` and is in no batch. 0: there
 * is none. */
static int preempt_newest(struct scheduler *s, const struct sequence *q)
{
    for (int32_t i = s->n_order - 1; i >= 0 && s->order[i] != q; i--) {
        struct sequence *victim = s->order[i];
        if (victim->state != SEQUENCE_RUNNING || victim->in_flight)
            continue;
        preempt(s, victim);
        return 1;
    }
    return 0;
}

/* A beam whose next tokens are known waits for the other beams of its search, and until these are
 * there it needs neither a batch nor its pages. */
static int is_idle_beam(const struct sequence *q)
{
    return q->ticket->beams && q->ticket->beams->has_row[q->candidate];
}

/* Takes the pages of a beam that waits for others, the newest first; only of the search of `q` and
 * later ones, or of any. Without this two searches could wait for each other's pages. 0: there is
 * none. */
static int preempt_idle_beam(struct scheduler *s, const struct sequence *q, int of_any)
{
    for (int32_t i = s->n_order - 1; i >= 0; i--) {
        struct sequence *victim = s->order[i];
        if (!of_any && ticket_compare(victim->ticket, q->ticket) < 0)
            return 0;
        if (victim->state == SEQUENCE_RUNNING && is_idle_beam(victim)) {
            preempt(s, victim);
            return 1;
        }
    }
    return 0;
}

/* A page that the next token of `q` can be written to, by preemption if need be: one more when the
 * last is full, a copy when it is shared. 0: not now (older sequences, or batches in flight, have
 * all pages). */
static int make_writable(struct scheduler *s, struct step *p, struct sequence *q)
{
    int32_t index = q->n_computed / s->config.page_size;
    for (;;) {
        if (index < q->n_pages && !page_pool_is_shared(&s->pool, q->pages[index]))
            return 1;
        int32_t page = take_page(s);
        if (page >= 0 && index == q->n_pages) {
            sequence_add_page(q, page);
            return 1;
        }
        if (page >= 0) {
            int32_t shared = q->pages[index];
            p->copy_src[p->n_copies] = shared;
            p->copy_dst[p->n_copies++] = page;
            page_pool_hold(&s->pool, shared);
            page_pool_unref(&s->pool, shared);
            q->pages[index] = page;
            return 1;
        }
        if (!preempt_newest(s, q) && !preempt_idle_beam(s, q, 1))
            return 0;
    }
}

/* How many of its first pages are cached. At least one token is left to compute, which gives the
 * logits; everything is where tensors are taken on the way. */
static int32_t count_cached(struct scheduler *s, struct sequence *q, int32_t *pages)
{
    const struct request *r = q->ticket->request;
    int32_t n_most = (sequence_n_known(q) - 1) / s->config.page_size, n = 0, page = -1;
    if (!q->ticket->is_cacheable || r->captures || r->targets || r->want_logits)
        return 0;
    while (n < n_most && (page = prefix_cache_find(&s->prefix, q, n, page)) >= 0)
        pages[n++] = page;
    return n;
}

/* The sequence begins with cached pages [n]. */
static void share_cached(struct scheduler *s, struct sequence *q, const int32_t *pages, int32_t n)
{
    struct ticket *t = q->ticket;
    for (int32_t i = 0; i < n; i++) {
        page_pool_ref(&s->pool, pages[i]);
        sequence_add_page(q, pages[i]);
    }
    q->n_cached = n;
    q->n_computed = n * s->config.page_size;
    q->n_image_computed = n > 0 ? q->keys[n - 1].n_images : 0;
    if (t->is_cacheable)
        s->n_prefix_queries += (uint64_t)sequence_n_known(q);
    s->n_prefix_hits += (uint64_t)q->n_computed;
    if (t->first_step_ns == 0)
        t->n_cached_tokens = q->n_computed;
}

/* A waiting sequence gets places and the pages of everything it knows. One page for each running
 * candidate is left, since each will soon want one; the first to run needs no such reserve. */
static int admit(struct scheduler *s, struct sequence *q)
{
    int32_t n_places = places_of(q);
    int32_t n_pages = pages_of(s->config.page_size, sequence_n_known(q));
    int32_t reserve = s->n_running == 0 ? 0 : s->n_running + n_places - 1;
    if (s->n_running + n_places > s->config.max_num_seqs)
        return 0;
    int32_t n_cached = count_cached(s, q, s->found), n_left = s->pool.n_free + s->pool.n_idle;
    for (int32_t i = 0; i < n_cached; i++)
        n_left -= page_pool_is_idle(&s->pool, s->found[i]);
    if (n_left < n_pages - n_cached + reserve)
        return 0;
    share_cached(s, q, s->found, n_cached);
    for (int32_t i = n_cached; i < n_pages; i++)
        sequence_add_page(q, take_page(s));
    q->state = SEQUENCE_RUNNING;
    s->n_running += n_places;
    return 1;
}

/* The pages that have become full are cached, or given up for those that are. */
static void cache_pages(struct scheduler *s, struct sequence *q)
{
    int32_t n_full = q->n_computed / s->config.page_size;
    while (q->ticket->is_cacheable && q->n_cached < n_full) {
        int32_t i = q->n_cached, page = q->pages[i];
        int32_t same = prefix_cache_find(&s->prefix, q, i, i > 0 ? q->pages[i - 1] : -1);
        if (same >= 0 && same != page) {
            page_pool_ref(&s->pool, same);
            page_pool_unref(&s->pool, page);
            q->pages[i] = same;
        } else if (same < 0) {
            if (prefix_cache_add(&s->prefix, q, i) < 0)
                return;
            page_pool_keep(&s->pool, page);
        }
        q->n_cached++;
    }
}

/* ---- priority ---- */

static int is_below(const struct sequence *victim, const struct sequence *q)
{
    return victim->state == SEQUENCE_RUNNING && victim->ticket->priority > q->ticket->priority;
}

/* Would `q` get in if every running sequence below it were gone? A bound from above: pages that
 * they share are counted for each. */
static int has_enough_below(const struct scheduler *s, const struct sequence *q)
{
    int64_t n_pages = s->pool.n_free + s->pool.n_idle;
    int32_t n_running = s->n_running;
    for (int32_t i = s->n_order - 1; i >= 0 && s->order[i] != q; i--) {
        if (!is_below(s->order[i], q))
            continue;
        n_pages += s->order[i]->n_pages;
        n_running -= places_of(s->order[i]);
    }
    return n_running < s->n_running && n_running + places_of(q) <= s->config.max_num_seqs &&
           n_pages >= pages_of(s->config.page_size, sequence_n_known(q)) + n_running;
}

static int preempt_below(struct scheduler *s, const struct sequence *q)
{
    for (int32_t i = s->n_order - 1; i >= 0 && s->order[i] != q; i--)
        if (is_below(s->order[i], q) && !s->order[i]->in_flight) {
            preempt(s, s->order[i]);
            return 1;
        }
    return 0;
}

/* Ready requests, in order, that are above a running one are let in before the batch is made up:
 * later those below them would be in it. */
static void admit_above(struct scheduler *s)
{
    for (int32_t i = 0; i < s->n_order; i++) {
        struct sequence *q = s->order[i];
        if (q->state != SEQUENCE_WAITING || !ticket_is_ready(q->ticket) || is_idle_beam(q))
            continue;
        if (!has_enough_below(s, q))
            return;
        int admitted = admit(s, q);
        while (!admitted && preempt_below(s, q))
            admitted = admit(s, q);
        if (!admitted)
            return;
    }
}

/* ---- the step ---- */

static void add_item(struct step *p, struct sequence *q, int32_t n_new)
{
    p->items[p->n_items++] =
        (struct step_item){.sequence = q, .start = q->n_computed, .n_new = n_new};
    p->n_tokens += n_new;
    q->in_flight = 1;
    q->ticket->n_in_flight++;
}

/* How many of its tokens a sequence computes at once, at most n_max. Where rope depends on the
 * length, drawn tokens are recomputed as they were computed: one by one. */
static int32_t chunk_of(const struct scheduler *s, const struct sequence *q, int32_t n_max)
{
    int32_t n = sequence_n_todo(q), start = q->n_computed, n_prompt = q->ticket->n_prompt;
    if (n > n_max)
        n = n_max;
    if (s->config.rope_dynamic_from > 0 && start + n > s->config.rope_dynamic_from) {
        if (start >= n_prompt)
            return 1;
        if (start + n > n_prompt)
            return n_prompt - start;
    }
    return n;
}

static int can_step(const struct sequence *q)
{
    return q->state == SEQUENCE_RUNNING && !q->in_flight;
}

/* One token of each running sequence that has just one to compute, oldest first. With k batches in
 * flight each takes a k-th of them, so that every pipeline stage has work. */
static void add_decodes(struct scheduler *s, struct step *p)
{
    int32_t n_batches = s->config.n_batches_in_flight, n_sequences = 0;
    for (int32_t i = 0; i < s->n_order; i++)
        n_sequences += s->order[i]->state == SEQUENCE_RUNNING;
    int32_t share = (n_sequences + n_batches - 1) / n_batches;
    for (int32_t i = 0; i < s->n_order && p->n_items < share; i++) {
        struct sequence *q = s->order[i];
        if (can_step(q) && sequence_n_todo(q) == 1 && make_writable(s, p, q))
            add_item(p, q, 1);
    }
}

/* The rest of the budget goes to prompts, in order; the first that cannot be admitted ends the
 * admissions. */
static void add_prefills(struct scheduler *s, struct step *p)
{
    int admitting = 1;
    for (int32_t i = 0; i < s->n_order; i++) {
        struct sequence *q = s->order[i];
        int32_t left = s->config.max_num_batched_tokens - p->n_tokens;
        if (left == 0 || p->n_items == s->config.max_num_seqs)
            return;
        int is_new = q->state == SEQUENCE_WAITING && admitting && ticket_is_ready(q->ticket) &&
                     !is_idle_beam(q);
        if (is_new) {
            is_new = admit(s, q);
            while (!is_new && preempt_idle_beam(s, q, 0))
                is_new = admit(s, q);
            admitting = is_new;
        }
        if (is_new || (can_step(q) && sequence_n_todo(q) > 1))
            add_item(p, q, chunk_of(s, q, left));
    }
}

struct step *scheduler_step(struct scheduler *s, uint64_t now_ns)
{
    free_dead_tickets(s);
    struct step *p = scheduler_find_step(s, 0);
    if (!p || s->n_order == 0)
        return NULL;
    p->n_items = p->n_tokens = p->n_copies = 0;
    admit_above(s);
    add_decodes(s, p);
    add_prefills(s, p);
    if (p->n_items == 0)
        return NULL;
    for (int32_t i = 0; i < p->n_items; i++) {
        struct ticket *t = p->items[i].sequence->ticket;
        if (t->first_step_ns == 0) {
            t->first_step_ns = now_ns;
            s->n_unstarted--;
        }
    }
    p->step_id = ++s->last_step_id;
    s->n_in_flight++;
    s->n_steps++;
    s->batch = step_batch(p, &s->builder);
    return p;
}

struct step *scheduler_find_step(struct scheduler *s, uint64_t step_id)
{
    for (int32_t i = 0; i < s->config.n_batches_in_flight; i++)
        if (s->steps[i].step_id == step_id)
            return &s->steps[i];
    return NULL;
}

/* ---- the result ---- */

static void add_event(struct scheduler *s, struct sequence *q, const struct sample_result *sample,
                      int is_end, enum finish_reason finish)
{
    s->events[s->n_events++] = (struct token_event){.ticket = q->ticket,
                                                    .candidate = q->candidate,
                                                    .sample = sample,
                                                    .is_end = is_end,
                                                    .finish = finish};
    if (finish != FINISH_NONE)
        end_sequence(s, q);
}

/* Does the token just appended end its candidate? vLLM's check_stop(): end tokens count once
 * min_tokens others are there. */
static int is_end_token(const struct scheduler *s, const struct request *r, int32_t n_output,
                        int32_t id)
{
    if (n_output <= r->min_tokens)
        return 0;
    return (!r->ignore_eos && contains(s->config.eos_ids, s->config.n_eos, id)) ||
           contains(r->stop_token_ids, r->n_stop_token_ids, id);
}

static void take_sample(struct scheduler *s, struct sequence *q, const struct sample_result *sample)
{
    if (sample->not_finite) {
        add_event(s, q, sample, 0, FINISH_ERROR);
        return;
    }
    sequence_append(q, sample->token.id);
    s->n_generated_tokens++;
    int is_end = is_end_token(s, q->ticket->request, q->n_output, sample->token.id);
    enum finish_reason finish = FINISH_NONE;
    if (is_end)
        finish = FINISH_STOP;
    else if (q->n_output >= q->ticket->request->max_tokens ||
             sequence_n_known(q) >= s->context_limit)
        finish = FINISH_LENGTH;
    add_event(s, q, sample, is_end, finish);
}

/* The prompt pass of several candidates has ended: each goes on by itself. The places that
 * candidate 0 had reserved are theirs now. */
static void fork_ticket(struct scheduler *s, struct ticket *t)
{
    for (int32_t i = 1; i < t->n_sequences; i++) {
        sequence_fork(&t->sequences[i], &t->sequences[0], &s->pool);
        order_insert(s, &t->sequences[i]);
    }
    t->forked = 1;
}

struct beam_end { // what beam_search_step() asks with
    const struct scheduler *scheduler;
    const struct ticket *ticket;
};

static int is_beam_end(const void *arg, int32_t id)
{
    const struct beam_end *e = arg;
    return is_end_token(e->scheduler, e->ticket->request, e->ticket->beams->n_tokens + 1, id);
}

/* The search is over: its n best are the candidates. */
static void end_beams(struct scheduler *s, struct ticket *t)
{
    for (int32_t i = 0; i < t->n_sequences; i++)
        end_sequence(s, &t->sequences[i]);
    for (int32_t i = 0; i < t->request->n; i++) {
        const struct beam_finished *f = &t->beams->finished[i];
        if (!f->is_complete) {
            add_event(s, &t->sequences[i], NULL, 0, FINISH_ERROR);
            return;
        }
        s->n_generated_tokens += (uint64_t)f->n_ids;
        add_event(s, &t->sequences[i], NULL, f->ends_by_token,
                  f->ends_by_token ? FINISH_STOP : FINISH_LENGTH);
    }
}

/* A beam's best next tokens are there. With those of all beams the search takes a step. */
static void take_beam_row(struct scheduler *s, struct sequence *q,
                          const struct sample_result *sample, int is_first)
{
    struct ticket *t = q->ticket;
    struct beam_search *b = t->beams;
    const int32_t *outputs[BEAMS_MAX];
    int32_t n_rows = is_first ? 1 : t->n_sequences, n_running = 0;
    if (sample->not_finite) {
        add_event(s, q, sample, 0, FINISH_ERROR);
        return;
    }
    b->rows[q->candidate] = *sample;
    b->has_row[q->candidate] = 1;
    for (int32_t i = 0; i < n_rows; i++)
        if (!b->has_row[i])
            return;
    for (int32_t i = 0; i < t->n_sequences; i++) {
        outputs[i] = t->sequences[i].output;
        n_running += t->sequences[i].state == SEQUENCE_RUNNING;
    }
    struct beam_end end = {.scheduler = s, .ticket = t};
    if (beam_search_step(b, n_rows, outputs, is_beam_end, &end)) {
        end_beams(s, t);
        return;
    }
    s->n_running -= n_running;
    s->n_running += ticket_reorder_beams(t, &s->pool, s->config.max_num_seqs - s->n_running);
}

static void take_item(struct scheduler *s, const struct step_item *item,
                      const struct sample_result *samples, uint64_t now_ns)
{
    struct sequence *q = item->sequence;
    struct ticket *t = q->ticket;
    q->in_flight = 0;
    t->n_in_flight--;
    if (q->state == SEQUENCE_FINISHED) { // while it was in flight
        sequence_drop_pages(q, &s->pool);
        return;
    }
    q->n_computed += item->n_new;
    q->n_image_computed += item->n_images;
    cache_pages(s, q);
    if (t->prefill_end_ns == 0 && q->n_computed >= t->n_prompt) {
        t->prefill_end_ns = now_ns;
        s->n_prompt_tokens += (uint64_t)t->n_prompt;
    }
    if (q->n_computed == t->n_prompt && t->request->max_tokens == 0) {
        add_event(s, q, NULL, 0, FINISH_LENGTH);
        return;
    }
    if (item->n_samples == 0)
        return;
    if (t->first_token_ns == 0)
        t->first_token_ns = now_ns;
    int is_first = !t->forked;
    if (is_first)
        fork_ticket(s, t);
    if (t->beams) {
        take_beam_row(s, q, &samples[item->first_sample], is_first);
        return;
    }
    for (int32_t i = 0; i < item->n_samples; i++)
        take_sample(s, q + i, &samples[item->first_sample + i]);
}

void scheduler_update(struct scheduler *s, struct step *p, const struct sample_result *samples,
                      int32_t n_samples, uint64_t now_ns)
{
    if (p->step_id == 0 || n_samples != p->n_samples)
        BUG("step %llu has %d samples, got %d", (unsigned long long)p->step_id, p->n_samples,
            n_samples);
    s->n_events = 0;
    for (int32_t i = 0; i < p->n_copies; i++)
        page_pool_unhold(&s->pool, p->copy_src[i]);
    for (int32_t i = 0; i < p->n_items; i++)
        take_item(s, &p->items[i], samples, now_ns);
    p->step_id = 0;
    s->n_in_flight--;
}
