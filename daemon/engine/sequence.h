/*
 * What has become of a request: a ticket, with one sequence for each of its candidates.
 *
 * A sequence is one running continuation: the prompt (shared, in the request), the tokens drawn so
 * far, and the pages that hold their keys and values. A ticket gathers what the candidates have in
 * common: order of service, features of the pictures, times. Owned by the scheduler, touched by the
 * engine thread alone. Neither knows of batches, ranks or streams.
 *
 *   tokens of a sequence   [ prompt 0 … n_prompt ) [ output 0 … n_output )
 *                          [ in the cache: n_computed ) [ to do … )
 */
#ifndef INTERNVLD_ENGINE_SEQUENCE_H
#define INTERNVLD_ENGINE_SEQUENCE_H

#include <stdint.h>

#include "daemon/engine/digest.h"
#include "daemon/engine/page_pool.h"
#include "daemon/engine/request.h"

enum sequence_state {
    SEQUENCE_FORK,    // a candidate past the first, until the prompt pass has ended
    SEQUENCE_WAITING, // no pages: new, or preempted
    SEQUENCE_RUNNING, // has pages
    SEQUENCE_FINISHED,
};

/* Names a full page by everything up to its end; see prefix_cache.h. */
struct page_key {
    struct digest digest;
    int32_t n_images; // image tokens up to the page's end
};

struct ticket;
struct sequence {
    struct ticket *ticket;
    int32_t candidate;
    enum sequence_state state;
    int in_flight;            // a submitted batch names it; its pages stay until that one is back
    int32_t n_computed;       // tokens in the cache, not counting a batch in flight
    int32_t n_image_computed; // image tokens among them
    int32_t *output;          // [n_output] drawn ids
    int32_t n_output, output_capacity;
    uint64_t last_token_ns; // when the latest was drawn; 0: none yet
    int32_t *pages;         // [n_pages] page i holds tokens [i * page_size, (i + 1) * page_size)
    int32_t n_pages, pages_capacity;
    int32_t n_cached;      // pages of it that the prefix cache knows, from the first on
    struct page_key *keys; // [n_keys] of its first pages, made when they are first asked for
    int32_t n_keys, keys_capacity;
};

struct ticket {
    struct request *request; // NULL once the request has ended (sequences may still be in flight)
    uint64_t number;         // order of arrival
    int32_t priority, n_prompt;
    struct sequence *sequences; // [n_sequences] one a candidate
    int32_t n_sequences, n_unfinished, n_in_flight;
    enum finish_reason finish; // of the candidate that ended last
    int forked;                // the prompt pass has ended: each candidate goes its own way

    struct beam_search *beams; // whose beams the sequences are; NULL: each is a candidate
    struct digest cache_root;  // names the prompt's beginning; see prefix_cache.h
    int is_cacheable;          // its pages may be found and kept by the prefix cache
    int32_t n_cached_tokens;   // of the prompt that were not computed, when it first ran

    float *features;       // [n_image_tokens, dim] rows of the pictures, or NULL
    int64_t n_tile_floats; // of one tile in `features`; -1: of a tile of the model's size
    int32_t n_tiles, n_tiles_done;
    uint8_t *tile_asked; // [n_tiles] 1: there, or in a job; NULL: the vision stage has not begun it
    int32_t n_tiles_asked, next_tile; // all before next_tile are asked for
    int32_t n_cached_tiles;           // that needed no encoding

    uint64_t vision_start_ns, vision_end_ns, first_step_ns, prefill_end_ns, first_token_ns; // 0: no
    uint32_t n_preempted;

    struct ticket *previous, *next; // in the scheduler's list
};

/* Takes over `r`. `number` breaks ties of priority. */
struct ticket *ticket_new(struct request *r, uint64_t number);
void ticket_free(struct ticket *t); // not the request; its sequences must have no pages
/* Order of service: priority, arrival. < 0 when a goes first. */
int ticket_compare(const struct ticket *a, const struct ticket *b);
/* All features have arrived, or none are needed. */
int ticket_is_ready(const struct ticket *t);

int sequence_compare(const struct sequence *a, const struct sequence *b); // then by candidate
int32_t sequence_n_known(const struct sequence *q); // prompt and output tokens
int32_t sequence_n_todo(const struct sequence *q);  // known, not in the cache
int32_t sequence_id(const struct sequence *q, int32_t index);
void sequence_append(struct sequence *q, int32_t id);
void sequence_add_page(struct sequence *q, int32_t page); // the reference goes along
void sequence_add_key(struct sequence *q, const struct page_key *key);
/* Drops the pages and forgets what was computed; ids and keys stay. */
void sequence_drop_pages(struct sequence *q, struct page_pool *p);
/* The sequences become the next beams: sequence i goes on from parents[i] with tokens[i], sharing
 * its pages; of one without pages, or past the first n_running_max that have some, only the ids are
 * there, to be computed again. None is in flight. Returns how many have pages. */
int32_t ticket_reorder_beams(struct ticket *t, struct page_pool *p, int32_t n_running_max);
/* Gives `child` the state of `parent` after its prompt pass; every page is shared. */
void sequence_fork(struct sequence *child, const struct sequence *parent, struct page_pool *p);

#endif
