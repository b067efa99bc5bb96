/* Least recently used slots under a chained hash table; see feature_cache.h. */
#include "daemon/engine/feature_cache.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

/* A power of two below twice the number of slots: two entries of the table a slot at most. */
static uint32_t n_buckets_for(int32_t n_slots)
{
    uint32_t n = n_slots > 0;
    while (n < (uint32_t)n_slots)
        n *= 2;
    return n;
}

void feature_cache_init(struct feature_cache *c, uint64_t n_bytes, int64_t n_floats)
{
    if (n_floats < 1)
        BUG("a cache of features of %lld floats", (long long)n_floats);
    uint64_t slot =
        (uint64_t)n_floats * sizeof(float) + sizeof(struct cached_tile) + 2 * sizeof(int32_t);
    uint64_t n = n_bytes / slot;
    *c = (struct feature_cache){.n_floats = n_floats,
                                .n_slots = n < INT32_MAX / 4 ? (int32_t)n : INT32_MAX / 4,
                                .newest = -1,
                                .oldest = -1};
    c->n_buckets = n_buckets_for(c->n_slots);
    if (c->n_slots == 0)
        return;
    c->features = xcalloc((size_t)c->n_slots, (size_t)n_floats * sizeof(float));
    c->tiles = xcalloc((size_t)c->n_slots, sizeof(*c->tiles));
    c->buckets = xcalloc(c->n_buckets, sizeof(*c->buckets));
    memset(c->buckets, -1, c->n_buckets * sizeof(*c->buckets));
}

void feature_cache_release(struct feature_cache *c)
{
    free(c->features);
    free(c->tiles);
    free(c->buckets);
    *c = (struct feature_cache){0};
}

static int32_t *bucket_of(const struct feature_cache *c, const struct digest *key)
{
    return &c->buckets[digest_prefix(key) & (c->n_buckets - 1)];
}

static float *features_of(const struct feature_cache *c, int32_t slot)
{
    return c->features + slot * c->n_floats;
}

/* ---- the order of use ---- */

static void unlink_use(struct feature_cache *c, int32_t slot)
{
    struct cached_tile *t = &c->tiles[slot];
    *(t->newer >= 0 ? &c->tiles[t->newer].older : &c->newest) = t->older;
    *(t->older >= 0 ? &c->tiles[t->older].newer : &c->oldest) = t->newer;
}

static void link_newest(struct feature_cache *c, int32_t slot)
{
    struct cached_tile *t = &c->tiles[slot];
    t->newer = -1;
    t->older = c->newest;
    *(c->newest >= 0 ? &c->tiles[c->newest].newer : &c->oldest) = slot;
    c->newest = slot;
}

/* ---- find, put ---- */

static int32_t find_slot(const struct feature_cache *c, const struct digest *key)
{
    if (c->n_slots == 0)
        return -1;
    int32_t slot = *bucket_of(c, key);
    while (slot >= 0 && !digest_equal(&c->tiles[slot].key, key))
        slot = c->tiles[slot].next;
    return slot;
}

const float *feature_cache_find(struct feature_cache *c, const struct digest *key)
{
    int32_t slot = find_slot(c, key);
    if (slot < 0)
        return NULL;
    unlink_use(c, slot);
    link_newest(c, slot);
    return features_of(c, slot);
}

/* The oldest slot, no longer in use. */
static int32_t evict(struct feature_cache *c)
{
    int32_t slot = c->oldest, *at = bucket_of(c, &c->tiles[slot].key);
    while (*at != slot)
        at = &c->tiles[*at].next;
    *at = c->tiles[slot].next;
    unlink_use(c, slot);
    return slot;
}

void feature_cache_put(struct feature_cache *c, const struct digest *key, const float *features)
{
    if (c->n_slots == 0 || feature_cache_find(c, key))
        return;
    int32_t slot = c->n_used < c->n_slots ? c->n_used++ : evict(c);
    int32_t *bucket = bucket_of(c, key);
    c->tiles[slot].key = *key;
    c->tiles[slot].next = *bucket;
    *bucket = slot;
    link_newest(c, slot);
    memcpy(features_of(c, slot), features, (size_t)c->n_floats * sizeof(float));
}
