/*
 * One request's memory: many allocations, one release, one budget.
 *
 * An arena belongs to whoever holds its request. It is not thread-safe; it changes owner with the
 * request. The budget is what keeps a client from making the daemon allocate without bound: past it
 * arena_alloc() returns NULL and the caller answers RESOURCE_EXHAUSTED.
 */
#ifndef INTERNVLD_KERNELS_ARENA_H
#define INTERNVLD_KERNELS_ARENA_H

#include <stddef.h>

struct arena_chunk;
struct arena {
    struct arena_chunk *chunks;
    size_t used_bytes, budget_bytes;
};

void arena_init(struct arena *a, size_t budget_bytes);
void arena_release(struct arena *a); // accepts a zeroed struct; leaves it zeroed

/* n * size zeroed bytes aligned to 64, or NULL past the budget (or when n * size overflows). Large
 * blocks get a chunk of their own. */
void *arena_alloc(struct arena *a, size_t n, size_t size);
char *arena_strndup(struct arena *a, const char *s, size_t n); // NUL-terminated copy, or NULL

#endif
