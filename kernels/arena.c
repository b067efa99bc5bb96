/*
 * Arena: a list of chunks, the newest first; small allocations share a chunk, large ones get their
 * own. See arena.h.
 */
#include "kernels/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

#define ALIGN_BYTES 64
#define CHUNK_BYTES 16384
#define LARGE_BYTES 4096

struct arena_chunk {
    struct arena_chunk *next;
    size_t used_bytes,
        size_bytes; // of the payload, which starts at the next multiple of ALIGN_BYTES
};

static size_t round_up(size_t n)
{
    return (n + ALIGN_BYTES - 1) & ~(size_t)(ALIGN_BYTES - 1);
}

static unsigned char *payload(struct arena_chunk *c)
{
    return (unsigned char *)c + ALIGN_BYTES;
}

static struct arena_chunk *chunk_new(size_t size_bytes)
{
    struct arena_chunk *c = NULL;

    if (posix_memalign((void **)&c, ALIGN_BYTES, ALIGN_BYTES + size_bytes))
        die("out of memory: %zu bytes", size_bytes);
    memset(c, 0, ALIGN_BYTES + size_bytes);
    c->size_bytes = size_bytes;
    return c;
}

void arena_init(struct arena *a, size_t budget_bytes)
{
    *a = (struct arena){.budget_bytes = budget_bytes};
}

void arena_release(struct arena *a)
{
    while (a->chunks) {
        struct arena_chunk *next = a->chunks->next;

        free(a->chunks);
        a->chunks = next;
    }
    *a = (struct arena){0};
}

void *arena_alloc(struct arena *a, size_t n, size_t size)
{
    if (size && n > SIZE_MAX / 2 / size)
        return NULL;
    size_t n_bytes = round_up(n * size);

    if (n_bytes == 0)
        n_bytes = ALIGN_BYTES;
    if (n_bytes > a->budget_bytes || a->used_bytes > a->budget_bytes - n_bytes)
        return NULL;

    struct arena_chunk *head = a->chunks;
    if (n_bytes >= LARGE_BYTES) { // its own chunk, behind the head, which keeps its room
        struct arena_chunk *c = chunk_new(n_bytes);

        c->used_bytes = n_bytes;
        if (head) {
            c->next = head->next;
            head->next = c;
        } else {
            a->chunks = c;
        }
        a->used_bytes += n_bytes;
        return payload(c);
    }
    if (!head || head->size_bytes - head->used_bytes < n_bytes) {
        head = chunk_new(CHUNK_BYTES);
        head->next = a->chunks;
        a->chunks = head;
    }
    void *p = payload(head) + head->used_bytes;

    head->used_bytes += n_bytes;
    a->used_bytes += n_bytes;
    return p;
}

char *arena_strndup(struct arena *a, const char *s, size_t n)
{
    char *p = n == SIZE_MAX ? NULL : arena_alloc(a, n + 1, 1);

    if (p && n)
        memcpy(p, s, n);
    return p;
}
