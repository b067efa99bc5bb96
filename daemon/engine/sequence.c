/* Tickets and sequences; see sequence.h. */
#include "daemon/engine/sequence.h"

#include <stdlib.h>

#include "kernels/log.h"

struct ticket *ticket_new(struct request *r, uint64_t number)
{
    struct ticket *t = xcalloc(1, sizeof(*t));
    t->request = r;
    t->number = number;
    t->priority = r->priority;
    t->n_prompt = r->n_ids;
    t->n_tiles = r->n_tiles;
    t->n_tile_floats = -1;
    t->n_sequences = t->n_unfinished = r->n_beams > 1 ? r->n_beams : r->n;
    t->sequences = xcalloc((size_t)t->n_sequences, sizeof(*t->sequences));
    for (int32_t i = 0; i < t->n_sequences; i++) {
        t->sequences[i].ticket = t;
        t->sequences[i].candidate = i;
        t->sequences[i].state = i == 0 ? SEQUENCE_WAITING : SEQUENCE_FORK;
    }
    t->forked = t->n_sequences == 1;
    return t;
}

static void sequence_free_lists(struct sequence *q)
{
    if (q->n_pages != 0)
        BUG("a sequence is freed with %d pages", q->n_pages);
    free(q->output);
    free(q->pages);
    free(q->keys);
}

void ticket_free(struct ticket *t)
{
    for (int32_t i = 0; i < t->n_sequences; i++)
        sequence_free_lists(&t->sequences[i]);
    beam_search_free(t->beams);
    free(t->sequences);
    free(t->features);
    free(t->tile_asked);
    free(t);
}

int ticket_compare(const struct ticket *a, const struct ticket *b)
{
    if (a->priority != b->priority)
        return a->priority < b->priority ? -1 : 1;
    return a->number < b->number ? -1 : a->number > b->number;
}

int ticket_is_ready(const struct ticket *t)
{
    return t->n_tiles_done == t->n_tiles;
}

int sequence_compare(const struct sequence *a, const struct sequence *b)
{
    int order = ticket_compare(a->ticket, b->ticket);
    return order != 0 ? order : a->candidate - b->candidate;
}

int32_t sequence_n_known(const struct sequence *q)
{
    return q->ticket->n_prompt + q->n_output;
}

int32_t sequence_n_todo(const struct sequence *q)
{
    return sequence_n_known(q) - q->n_computed;
}

int32_t sequence_id(const struct sequence *q, int32_t index)
{
    int32_t n_prompt = q->ticket->n_prompt;
    return index < n_prompt ? q->ticket->request->ids[index] : q->output[index - n_prompt];
}

/* Room for one more element of an int32 list. */
static void reserve(int32_t **list, int32_t n, int32_t *capacity)
{
    if (n < *capacity)
        return;
    *capacity = *capacity < 16 ? 16 : *capacity * 2;
    *list = xrealloc(*list, (size_t)*capacity, sizeof(**list));
}

void sequence_append(struct sequence *q, int32_t id)
{
    reserve(&q->output, q->n_output, &q->output_capacity);
    q->output[q->n_output++] = id;
}

void sequence_add_page(struct sequence *q, int32_t page)
{
    reserve(&q->pages, q->n_pages, &q->pages_capacity);
    q->pages[q->n_pages++] = page;
}

void sequence_add_key(struct sequence *q, const struct page_key *key)
{
    if (q->n_keys == q->keys_capacity) {
        q->keys_capacity = q->keys_capacity < 16 ? 16 : q->keys_capacity * 2;
        q->keys = xrealloc(q->keys, (size_t)q->keys_capacity, sizeof(*q->keys));
    }
    q->keys[q->n_keys++] = *key;
}

void sequence_drop_pages(struct sequence *q, struct page_pool *p)
{
    /* Last first: free pages of the beginning are taken again first, idle ones are evicted last. */
    while (q->n_pages > 0)
        page_pool_unref(p, q->pages[--q->n_pages]);
    q->n_computed = q->n_image_computed = q->n_cached = 0;
}

void sequence_fork(struct sequence *child, const struct sequence *parent, struct page_pool *p)
{
    for (int32_t i = 0; i < parent->n_pages; i++) {
        page_pool_ref(p, parent->pages[i]);
        sequence_add_page(child, parent->pages[i]);
    }
    for (int32_t i = 0; i < parent->n_keys; i++)
        sequence_add_key(child, &parent->keys[i]);
    child->n_cached = parent->n_cached;
    child->n_computed = parent->n_computed;
    child->n_image_computed = parent->n_image_computed;
    child->state = SEQUENCE_RUNNING;
}

int32_t ticket_reorder_beams(struct ticket *t, struct page_pool *p, int32_t n_running_max)
{
    const struct beam_search *b = t->beams;
    struct sequence *next = xcalloc((size_t)t->n_sequences, sizeof(*next));
    int32_t n_running = 0;
    for (int32_t i = 0; i < t->n_sequences; i++) {
        const struct sequence *parent = &t->sequences[b->parents[i]];
        next[i] = (struct sequence){.ticket = t, .candidate = i, .state = SEQUENCE_WAITING};
        if (parent->state == SEQUENCE_RUNNING && n_running < n_running_max) {
            sequence_fork(&next[i], parent, p);
            n_running++;
        }
        for (int32_t k = 0; k < parent->n_output; k++)
            sequence_append(&next[i], parent->output[k]);
        sequence_append(&next[i], b->tokens[i]);
    }
    for (int32_t i = 0; i < t->n_sequences; i++) {
        sequence_drop_pages(&t->sequences[i], p);
        sequence_free_lists(&t->sequences[i]);
        t->sequences[i] = next[i];
    }
    free(next);
    return n_running;
}
