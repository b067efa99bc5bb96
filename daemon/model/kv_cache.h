/*
 * The KV pages of one rank: one struct kv_pages for each layer of its stage, its shard's kv heads.
 *
 * Owns the bytes. Which page holds what is the engine's knowledge; here pages are numbers.
 */
#ifndef INTERNVLD_MODEL_KV_CACHE_H
#define INTERNVLD_MODEL_KV_CACHE_H

#include "kernels/backend.h"

struct kv_cache {
    int n_layers;
    struct kv_pages *layers; // [n_layers]
    struct backend *backend;
    size_t n_bytes;
};

/* Bytes of one page over all n_layers, keys and values. */
uint64_t kv_page_bytes(int n_layers, int n_kv_heads, int head_dim, int32_t page_size,
                       enum dtype dtype);
void kv_cache_init(struct kv_cache *kv, struct backend *b, int n_layers, int n_kv_heads,
                   int head_dim, int32_t page_size, int32_t n_pages, enum dtype dtype);
void kv_cache_release(struct kv_cache *kv); // accepts a zeroed struct
/* Page dst[i] <- page src[i] in every layer. */
void kv_cache_copy_pages(struct kv_cache *kv, const int32_t *src, const int32_t *dst, int32_t n);

#endif
