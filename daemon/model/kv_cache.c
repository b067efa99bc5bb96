/*
 * The KV pages of one rank (kv_cache.h).
 */
#include "daemon/model/kv_cache.h"

#include <stdlib.h>

#include "kernels/log.h"

uint64_t kv_page_bytes(int n_layers, int n_kv_heads, int head_dim, int32_t page_size,
                       enum dtype dtype)
{
    return 2 * (uint64_t)n_layers * (uint64_t)n_kv_heads *
           kv_head_bytes(head_dim, page_size, dtype);
}

void kv_cache_init(struct kv_cache *kv, struct backend *b, int n_layers, int n_kv_heads,
                   int head_dim, int32_t page_size, int32_t n_pages, enum dtype dtype)
{
    size_t half =
        (size_t)kv_page_bytes(1, n_kv_heads, head_dim, page_size, dtype) / 2 * (size_t)n_pages;
    *kv = (struct kv_cache){.n_layers = n_layers, .backend = b};
    kv->layers = xcalloc((size_t)n_layers, sizeof(*kv->layers));
    for (int i = 0; i < n_layers; i++) {
        kv->layers[i] = (struct kv_pages){.dtype = dtype,
                                          .n_pages = n_pages,
                                          .page_size = page_size,
                                          .n_kv_heads = n_kv_heads,
                                          .head_dim = head_dim};
        kv->layers[i].k = op_alloc(b, half);
        kv->layers[i].v = op_alloc(b, half);
        kv->n_bytes += 2 * half;
    }
}

void kv_cache_release(struct kv_cache *kv)
{
    for (int i = 0; i < kv->n_layers; i++) {
        op_free(kv->backend, kv->layers[i].v);
        op_free(kv->backend, kv->layers[i].k);
    }
    free(kv->layers);
    *kv = (struct kv_cache){0};
}

void kv_cache_copy_pages(struct kv_cache *kv, const int32_t *src, const int32_t *dst, int32_t n)
{
    for (int i = 0; i < kv->n_layers && n > 0; i++)
        op_copy_pages(kv->backend, &kv->layers[i], src, dst, n);
}
