/*
 * What is in which KV page: full pages by everything that their keys and values depend on.
 *
 * A page's content is its tokens' ids, for image tokens the tile (by the digest of its pixels) and
 * the row in it, the length that "dynamic" rope saw, and for the first page the request's salt. Its
 * key is the SHA-256 of its content and of the key before it: a chain over all that precedes. A hit
 * is verified: the stored content is compared byte for byte, and the page before must be the one
 * that the stored page was made after. Tiles are compared by their digests.
 *
 * Since a sequence that has a page has all pages before it, and lets go of the last first, a page
 * is never evicted before those that follow it. The cache knows nothing of references or of the
 * order of eviction: page_pool.h has those. Owned by the scheduler; not thread-safe.
 */
#ifndef INTERNVLD_ENGINE_PREFIX_CACHE_H
#define INTERNVLD_ENGINE_PREFIX_CACHE_H

#include <stdint.h>

#include "daemon/engine/digest.h"
#include "daemon/engine/sequence.h"

struct cached_page {
    struct digest key;
    uint64_t serial, before; // of this content, of the page before (0: the first); serial 0: empty
    uint8_t *content;        // [n_bytes]
    int32_t n_bytes;
    int32_t next; // in its bucket, -1: the last
};

struct prefix_cache {
    int32_t n_pages, page_size, n_features_per_tile, rope_dynamic_from;
    struct cached_page *pages; // [n_pages] by page number
    int32_t *buckets;          // [n_buckets] first page, or -1
    uint32_t n_buckets;        // a power of two
    int32_t n_cached;          // pages with content
    uint64_t last_serial;
    struct hasher *hasher;
    uint8_t *scratch; // content of one page
};

void prefix_cache_init(struct prefix_cache *c, int32_t n_pages, int32_t page_size,
                       int32_t n_features_per_tile, int32_t rope_dynamic_from);
void prefix_cache_release(struct prefix_cache *c); // accepts a zeroed struct

/* Names a prompt's first page: two requests share pages only where it is equal. salt may be NULL.
 */
void prefix_cache_root(struct prefix_cache *c, const char *salt, struct digest *root);

/* Where a sequence's page `index` would be, given that `before` (-1 for index 0) has what precedes
 * it: a page number, or -1. All tokens of that page must be known. */
int32_t prefix_cache_find(struct prefix_cache *c, struct sequence *q, int32_t index,
                          int32_t before);
/* Page `index` of `q` is computed and not in the cache, the one before is: remembers it. -1: not
 * possible (another content has the same key, or the page before is unknown). */
int prefix_cache_add(struct prefix_cache *c, struct sequence *q, int32_t index);
/* The page was evicted. */
void prefix_cache_forget(struct prefix_cache *c, int32_t page);

#endif
