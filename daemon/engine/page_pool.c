/* Counted pages, a free stack and a ring of idle ones; see page_pool.h. */
#include "daemon/engine/page_pool.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

void page_pool_init(struct page_pool *p, int32_t n_pages)
{
    if (n_pages < 1)
        BUG("a page pool of %d pages", n_pages);
    p->n_pages = p->n_free = n_pages;
    p->n_idle = 0;
    p->free = xcalloc((size_t)n_pages, sizeof(*p->free));
    p->refs = xcalloc((size_t)n_pages, sizeof(*p->refs));
    p->holds = xcalloc((size_t)n_pages, sizeof(*p->holds));
    p->kept = xcalloc((size_t)n_pages, sizeof(*p->kept));
    p->next = xcalloc((size_t)n_pages + 1, sizeof(*p->next));
    p->previous = xcalloc((size_t)n_pages + 1, sizeof(*p->previous));
    for (int32_t i = 0; i < n_pages; i++)
        p->free[i] = n_pages - 1 - i; // page 0 first
    p->next[n_pages] = p->previous[n_pages] = n_pages;
}

void page_pool_release(struct page_pool *p)
{
    free(p->free);
    free(p->refs);
    free(p->holds);
    free(p->kept);
    free(p->next);
    free(p->previous);
    memset(p, 0, sizeof(*p));
}

/* ---- the ring of idle pages ---- */

static void make_idle(struct page_pool *p, int32_t page)
{
    int32_t head = p->n_pages, last = p->previous[head];
    p->next[last] = p->previous[head] = page;
    p->previous[page] = last;
    p->next[page] = head;
    p->n_idle++;
}

static void leave_idle(struct page_pool *p, int32_t page)
{
    p->next[p->previous[page]] = p->next[page];
    p->previous[p->next[page]] = p->previous[page];
    p->n_idle--;
}

/* ---- counting ---- */

static void check_number(const struct page_pool *p, int32_t page)
{
    if (page < 0 || page >= p->n_pages)
        BUG("page %d of a pool of %d", page, p->n_pages);
}

static int is_taken(const struct page_pool *p, int32_t page)
{
    return p->refs[page] + p->holds[page] > 0;
}

static void check_taken(const struct page_pool *p, int32_t page)
{
    check_number(p, page);
    if (!is_taken(p, page))
        BUG("page %d is not taken", page);
}

static void let_go_if_unused(struct page_pool *p, int32_t page)
{
    if (is_taken(p, page))
        return;
    if (p->kept[page])
        make_idle(p, page);
    else
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

int page_pool_is_idle(const struct page_pool *p, int32_t page)
{
    check_number(p, page);
    return p->kept[page] && !is_taken(p, page);
}

void page_pool_ref(struct page_pool *p, int32_t page)
{
    if (page_pool_is_idle(p, page))
        leave_idle(p, page);
    else
        check_taken(p, page);
    p->refs[page]++;
}

void page_pool_unref(struct page_pool *p, int32_t page)
{
    check_taken(p, page);
    if (p->refs[page] == 0)
        BUG("page %d has no reference to drop", page);
    p->refs[page]--;
    let_go_if_unused(p, page);
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
    let_go_if_unused(p, page);
}

int page_pool_is_shared(const struct page_pool *p, int32_t page)
{
    check_taken(p, page);
    return p->refs[page] > 1;
}

void page_pool_keep(struct page_pool *p, int32_t page)
{
    check_taken(p, page);
    p->kept[page] = 1;
}

int32_t page_pool_evict(struct page_pool *p)
{
    int32_t page = p->next[p->n_pages];
    if (page == p->n_pages)
        return -1;
    leave_idle(p, page);
    p->kept[page] = 0;
    p->free[p->n_free++] = page;
    return page;
}
