/*
 * Who runs when: the policy, and nothing but the policy.
 *
 * Pure: no sockets, no threads, no streams, no clock (time is passed in), so that it is
 * property-tested and simulated as it stands. The engine thread calls it; whoever executes the
 * batches hands the samples back.
 *
 *   scheduler_add()      a request becomes a ticket in the queue
 *   scheduler_step()     ready sequences become a batch (NULL: nothing to do, or all slots out)
 *   scheduler_update()   samples become tokens; a list of events says what to tell the client
 *   scheduler_remove()   the request is over, for whatever reason
 *
 * Policy. Order of service is priority, then arrival, then candidate; nobody overtakes in the
 * queue, except that a request whose pictures are not encoded yet is passed over. A step first
 * takes one token of every running sequence that has one to compute (with several batches in
 * flight: its fair share of them), then fills the token budget with prompts in chunks: decode never
 * waits for a prefill. A sequence is in one batch at a time. At admission a sequence gets the pages
 * of all it knows, so a prefill never stalls; a decode that needs a page when there is none
 * preempts the newest running sequence (which later recomputes) and never an older one, so the
 * oldest always goes on. A ready request that cannot be admitted takes the places and pages of
 * running sequences whose priority is lower than its own (those of equal priority it waits for),
 * newest first, unless all of them together would not make enough room. The first in the order of
 * service is never preempted, so something always gets on; a low priority can starve under a load
 * of higher ones that never ends, and that is what it asked for. Candidates of one request share
 * the prompt's pages; the one who writes into a shared page copies it first.
 *
 * A full page stays in the prefix cache when it is computed, and when nobody has it any more until
 * pages are needed. A sequence that is admitted begins after the pages that the cache has of it;
 * one token at least is computed, and all of a prompt whose tensors are captured. A page that turns
 * out to be the same as a cached one is given up for that one.
 *
 * Beams (beam.h) are sequences too. They step independently, but each waits after its step until
 * all of its search have made theirs; then the search says which go on, and these share their
 * parents' pages. A beam that waits gives its pages up to whoever needs one for its next token,
 * and to sequences let in again that came before it.
 */
#ifndef INTERNVLD_ENGINE_SCHEDULER_H
#define INTERNVLD_ENGINE_SCHEDULER_H

#include <stdint.h>

#include "daemon/engine/page_pool.h"
#include "daemon/engine/prefix_cache.h"
#include "daemon/engine/sequence.h"
#include "daemon/engine/step.h"
#include "kernels/error.h"

struct scheduler_config {
    int32_t page_size, n_pages;     // tokens; pages
    int32_t max_model_len;          // tokens of prompt and answer together
    int32_t max_num_seqs;           // candidates running at once, hence sequences in a batch
    int32_t max_num_batched_tokens; // of one batch, at least max_num_seqs
    int32_t n_batches_in_flight;
    int32_t feature_dim;
    int32_t rope_dynamic_from; // tokens; past it rope depends on the length ("dynamic"). 0: never
    const int32_t *eos_ids;    // [n_eos] borrowed
    int32_t n_eos;
    int enable_prefix_caching;
    int32_t n_features_per_tile; // at least 1 with prefix caching
};

/* What happened to one candidate in a step. */
struct token_event {
    struct ticket *ticket; // valid until the next scheduler_step()
    int32_t candidate;
    const struct sample_result *sample; // NULL: a prompt pass without generation has ended, or a
                                        // beam search, of which this is a result (ticket->beams)
    int is_end;                         // the token ends the candidate
    enum finish_reason finish; // FINISH_NONE: it goes on. FINISH_ERROR: not finite, or, without a
                               // sample, a search that finished fewer sequences than asked for
};

struct scheduler {
    struct scheduler_config config;
    int32_t context_limit; // tokens: max_model_len, or what the pool holds
    struct page_pool pool;
    struct prefix_cache prefix;  // of the pool's kept pages
    struct ticket *first, *last; // the live tickets, by arrival
    struct ticket *dead;         // ended ones with sequences in flight
    struct sequence **order;     // [n_order] unfinished, forked sequences in order of service
    int32_t n_order, order_capacity;
    int32_t n_running;              // candidates that take part or will fork from one that does
    int32_t n_tickets, n_unstarted; // live tickets; those that never had a step
    struct step *steps;             // [n_batches_in_flight]
    int32_t n_in_flight;            // steps out
    uint64_t last_step_id, last_ticket;
    struct batch_builder builder;
    const struct batch *batch;  // of the latest step, valid until the next scheduler_step()
    int32_t *found;             // [n_pages] cached pages of the sequence that is being admitted
    struct token_event *events; // [n_events] of the latest update
    int32_t n_events;
    uint64_t n_steps, n_preempted, n_generated_tokens, n_prompt_tokens;
    uint64_t n_prefix_queries, n_prefix_hits; // tokens of admitted sequences, those found
};

/* Dies when the settings contradict each other. */
void scheduler_init(struct scheduler *s, const struct scheduler_config *c);
/* Accepts a zeroed struct. Live tickets are freed with their requests. */
void scheduler_release(struct scheduler *s);

/* Could `r` ever run? INVALID_ARGUMENT when it contradicts itself or exceeds max_model_len,
 * RESOURCE_EXHAUSTED when the page pool is too small. Reads the configuration alone: any thread. */
int scheduler_check(const struct scheduler_config *c, const struct request *r, struct error *err);
/* Takes over a request that passed scheduler_check(). It is eligible once ticket_is_ready(). */
struct ticket *scheduler_add(struct scheduler *s, struct request *r);
/* The next step, its batch in s->batch; NULL when there is nothing to compute now. */
struct step *scheduler_step(struct scheduler *s, uint64_t now_ns);
struct step *scheduler_find_step(struct scheduler *s, uint64_t step_id); // NULL: none such
/* Ends the step: samples [n_samples] as in its batch. Fills s->events; sample pointers are kept
 * in them. */
void scheduler_update(struct scheduler *s, struct step *p, const struct sample_result *samples,
                      int32_t n_samples, uint64_t now_ns);
/* A candidate has ended by a rule that the scheduler does not know (a stop string). */
void scheduler_finish(struct scheduler *s, struct ticket *t, int32_t candidate);
/* The request is over: finished, cancelled, failed. Its pages are free at once, or when the batch
 * that names them is back. Gives the request back. */
struct request *scheduler_remove(struct scheduler *s, struct ticket *t);

/* Pages that sequences have; cached pages that nobody has do not count. */
int32_t scheduler_n_pages_used(const struct scheduler *s);

#endif
