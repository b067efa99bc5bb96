/*
 * Features of tiles that were encoded before, by the tiles' content.
 *
 * A fixed number of equal slots, as many as the given bytes hold, bookkeeping included; taken from
 * the system as they are first used, never more. A tile is named by a SHA-256 (of its pixels,
 * shape, type and salt); a hit is verified over all 256 bits. When every slot is taken, the tile
 * that was found or put longest ago makes room. Pure: it knows no requests, ranks or threads. Owned
 * by the engine thread.
 */
#ifndef INTERNVLD_ENGINE_FEATURE_CACHE_H
#define INTERNVLD_ENGINE_FEATURE_CACHE_H

#include <stdint.h>

#include "daemon/engine/digest.h"

struct cached_tile {
    struct digest key;
    int32_t next;         // in its bucket, -1: the last
    int32_t newer, older; // in the order of use, -1: the end
};

struct feature_cache {
    int64_t n_floats; // of one tile's features
    int32_t n_slots, n_used;
    float *features;           // [n_slots, n_floats]
    struct cached_tile *tiles; // [n_slots] the first n_used are in use
    int32_t *buckets;          // [n_buckets] first slot, or -1
    uint32_t n_buckets;        // a power of two; 0 without slots
    int32_t newest, oldest;    // -1: none
};

/* As many slots as n_bytes hold; fewer than one slot's bytes: none, and nothing is ever found. */
void feature_cache_init(struct feature_cache *c, uint64_t n_bytes, int64_t n_floats);
void feature_cache_release(struct feature_cache *c); // accepts a zeroed struct

/* The features [n_floats] of this content, from now on the newest; valid until the next put. NULL:
 * not there. */
const float *feature_cache_find(struct feature_cache *c, const struct digest *key);
/* Keeps a copy. What is there already is only made the newest. */
void feature_cache_put(struct feature_cache *c, const struct digest *key, const float *features);

#endif
