/*
 * The KV pages as numbers: who counts on which page, and which are free.
 *
 * A page is shared by reference (candidates of one request share their prompt, requests a common
 * beginning) and is let go when nobody refers to it and no submitted batch names it as the source
 * of a copy (a hold). Then it is free, or, where it is kept (the prefix cache knows what is in it),
 * idle: idle pages stand in a list, the one that was let go longest ago first, until they are
 * referred to again or evicted. It knows neither bytes nor sequences: the workers have the bytes,
 * struct sequence has the lists, the prefix cache the contents. Owned by the scheduler; not
 * thread-safe. Every misuse (a page freed twice, a number out of range) is BUG().
 */
#ifndef INTERNVLD_ENGINE_PAGE_POOL_H
#define INTERNVLD_ENGINE_PAGE_POOL_H

#include <stdint.h>

struct page_pool {
    int32_t n_pages, n_free, n_idle;
    int32_t *free;  // [n_pages] a stack; free[n_free - 1] is taken next
    int32_t *refs;  // [n_pages] sequences that have the page
    int32_t *holds; // [n_pages] submitted batches that copy from the page
    uint8_t *kept;  // [n_pages] 1: idle rather than free when it is let go
    /* [n_pages + 1] the ring of idle pages; element n_pages is its head */
    int32_t *next, *previous;
};

void page_pool_init(struct page_pool *p, int32_t n_pages);
void page_pool_release(struct page_pool *p); // accepts a zeroed struct

int32_t page_pool_take(struct page_pool *p);           // a free page with one reference, or -1
void page_pool_ref(struct page_pool *p, int32_t page); // taken or idle
void page_pool_unref(struct page_pool *p, int32_t page);
void page_pool_hold(struct page_pool *p, int32_t page);
void page_pool_unhold(struct page_pool *p, int32_t page);
int page_pool_is_shared(const struct page_pool *p, int32_t page); // more than one reference
int page_pool_is_idle(const struct page_pool *p, int32_t page);

void page_pool_keep(struct page_pool *p, int32_t page); // of a taken page
/* The page that has been idle longest becomes free and is no longer kept; -1: none is idle. */
int32_t page_pool_evict(struct page_pool *p);

#endif
