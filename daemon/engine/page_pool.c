/* Counted pages and a free stack; see page_pool.h. */
#include "daemon/engine/page_pool.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

void page_pool_init(struct page_pool *p, int32_t n_pages)
{
    if (n_pages < 1)
        BUG("a page pool of %d pages", n_pages);
    p->n_pages = p->n_free = n_pages;
    p->free = xcalloc((size_t)n_pages, sizeof(*p->free));
    p->refs = xcalloc((size_t)n_pages, sizeof(*p->refs));
    p->holds = xcalloc((size_t)n_pages, sizeof(*p->holds));
    for (int32_t i = 0; i < n_pages; i++)
        p->free[i] = n_pages - 1 - i; // page 0 first
}

void page_pool_release(struct page_pool *p)
{
    free(p->free);
    free(p->refs);
    free(p->holds);
    memset(p, 0, sizeof(*p));
}

static void check_taken(const struct page_pool *p, int32_t page)
{
    if (page < 0 || page >= p->n_pages)
        BUG("page %d of a pool of %d", page, p->n_pages);
    if (p->refs[page] + p->holds[page] == 0)
        BUG("page %d is free", page);
}

static void free_if_unused(struct page_pool *p, int32_t page)
{
    if (p->refs[page] + p->holds[page] == 0)
        p->free[p->n_free++] = page;
}

int32_t page_pool_take(struct page_pool *p)
{
    if (p->n_free == 0)
        return -1;
    int32_t page = p->free[--p->n_free];
    p->refs[page] = 1;
    return page;
}

void page_pool_ref(struct page_pool *p, int32_t page)
{
    check_taken(p, page);
    p->refs[page]++;
}

void page_pool_unref(struct page_pool *p, int32_t page)
{
    check_taken(p, page);
    if (p->refs[page] == 0)
        BUG("page %d has no reference to drop", page);
    p->refs[page]--;
    free_if_unused(p, page);
}

void page_pool_hold(struct page_pool *p, int32_t page)
{
    check_taken(p, page);
    p->holds[page]++;
}

void page_pool_unhold(struct page_pool *p, int32_t page)
{
    check_taken(p, page);
    if (p->holds[page] == 0)
        BUG("page %d has no hold to drop", page);
    p->holds[page]--;
    free_if_unused(p, page);
}

int page_pool_is_shared(const struct page_pool *p, int32_t page)
{
    check_taken(p, page);
    return p->refs[page] > 1;
}
