/*
 * Scratch, sized and laid out by one function: run it with base NULL for the size, again with the
 * memory for the pointers. (llm.c's way of allocating activations once.)
 */
#ifndef INTERNVLD_MODEL_CARVE_H
#define INTERNVLD_MODEL_CARVE_H

#include <stddef.h>
#include <stdint.h>

struct carve {
    uint8_t *base; // NULL: only add up
    size_t used_bytes;
};

/* n * size bytes aligned to 64; NULL while adding up. */
static inline void *carve(struct carve *c, int64_t n, size_t size)
{
    void *p = c->base ? c->base + c->used_bytes : NULL;
    c->used_bytes += ((size_t)n * size + 63) / 64 * 64;
    return p;
}

#endif
