/* A chained hash table over page numbers; see prefix_cache.h. */
#include "daemon/engine/prefix_cache.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

#define DOMAIN "internvld prefix 1"

/* One token of a page, as it is compared and hashed. */
struct token_content {
    int32_t id;
    int32_t row;      // of its tile's features that takes the embedding's place, or -1
    int32_t rope_len; // that rope saw, where it depends on it, else 0
};

void prefix_cache_init(struct prefix_cache *c, int32_t n_pages, int32_t page_size,
                       int32_t n_features_per_tile, int32_t rope_dynamic_from)
{
    memset(c, 0, sizeof(*c));
    c->n_pages = n_pages;
    c->page_size = page_size;
    c->n_features_per_tile = n_features_per_tile;
    c->rope_dynamic_from = rope_dynamic_from;
    c->pages = xcalloc((size_t)n_pages, sizeof(*c->pages));
    for (c->n_buckets = 64; c->n_buckets < (uint32_t)n_pages;)
        c->n_buckets *= 2;
    c->buckets = xcalloc(c->n_buckets, sizeof(*c->buckets));
    for (uint32_t i = 0; i < c->n_buckets; i++)
        c->buckets[i] = -1;
    c->hasher = hasher_new();
    /* The most: each token begins another tile. */
    c->scratch =
        xcalloc((size_t)page_size + 1, sizeof(struct token_content) + sizeof(struct digest));
}

void prefix_cache_release(struct prefix_cache *c)
{
    for (int32_t i = 0; c->pages && i < c->n_pages; i++)
        free(c->pages[i].content);
    free(c->pages);
    free(c->buckets);
    free(c->scratch);
    hasher_free(c->hasher);
    memset(c, 0, sizeof(*c));
}

void prefix_cache_root(struct prefix_cache *c, const char *salt, struct digest *root)
{
    hasher_begin(c->hasher);
    hasher_add(c->hasher, DOMAIN, sizeof(DOMAIN));
    if (salt)
        hasher_add(c->hasher, salt, strlen(salt));
    hasher_end(c->hasher, root);
}

/* ---- content and key of one page of a sequence ---- */

/* As step.c says rope_len: the whole prompt for its tokens, then growing. */
static int32_t rope_len_of(const struct prefix_cache *c, const struct ticket *t, int32_t i)
{
    int32_t n = i < t->n_prompt ? t->n_prompt : i + 1;
    return c->rope_dynamic_from > 0 && n > c->rope_dynamic_from ? n : 0;
}

/* Writes the content of page `index` to the scratch and returns its bytes; `n_images` image tokens
 * come before it, and it is moved past those of the page. */
static int32_t make_content(struct prefix_cache *c, const struct sequence *q, int32_t index,
                            int32_t *n_images)
{
    const struct ticket *t = q->ticket;
    const struct request *r = t->request;
    size_t n_bytes = 0;
    if (index == 0) {
        memcpy(c->scratch, &t->cache_root, sizeof(t->cache_root));
        n_bytes = sizeof(t->cache_root);
    }
    uint8_t *tokens = c->scratch + n_bytes;
    n_bytes += (size_t)c->page_size * sizeof(struct token_content);
    int32_t last_tile = -1;
    for (int32_t k = 0; k < c->page_size; k++) {
        int32_t i = index * c->page_size + k;
        struct token_content x = {
            .id = sequence_id(q, i), .row = -1, .rope_len = rope_len_of(c, t, i)};
        if (r->n_tiles > 0 && i < t->n_prompt && x.id == r->image_token_id) {
            int32_t tile = *n_images / c->n_features_per_tile;
            x.row = *n_images % c->n_features_per_tile;
            (*n_images)++;
            if (tile != last_tile) {
                memcpy(c->scratch + n_bytes, &r->tile_digests[tile], sizeof(struct digest));
                n_bytes += sizeof(struct digest);
            }
            last_tile = tile;
        }
        memcpy(tokens + (size_t)k * sizeof(x), &x, sizeof(x));
    }
    return (int32_t)n_bytes;
}

/* The content in the scratch, and the key, which is made once in a sequence's life. */
static int32_t prepare(struct prefix_cache *c, struct sequence *q, int32_t index)
{
    if (index > q->n_keys)
        BUG("page %d of a sequence has no key before it", index);
    int32_t n_images = index > 0 ? q->keys[index - 1].n_images : 0;
    int32_t n_bytes = make_content(c, q, index, &n_images);
    if (index == q->n_keys) {
        struct page_key key = {.n_images = n_images};
        hasher_begin(c->hasher);
        if (index > 0)
            hasher_add(c->hasher, &q->keys[index - 1].digest, sizeof(struct digest));
        hasher_add(c->hasher, c->scratch, (size_t)n_bytes);
        hasher_end(c->hasher, &key.digest);
        sequence_add_key(q, &key);
    }
    return n_bytes;
}

/* ---- the table ---- */

static int32_t *bucket_of(struct prefix_cache *c, const struct digest *key)
{
    return &c->buckets[digest_prefix(key) & (c->n_buckets - 1)];
}

static int32_t find_key(struct prefix_cache *c, const struct digest *key)
{
    int32_t page = *bucket_of(c, key);
    while (page >= 0 && !digest_equal(&c->pages[page].key, key))
        page = c->pages[page].next;
    return page;
}

int32_t prefix_cache_find(struct prefix_cache *c, struct sequence *q, int32_t index, int32_t before)
{
    int32_t n_bytes = prepare(c, q, index);
    int32_t page = find_key(c, &q->keys[index].digest);
    if (page < 0)
        return -1;
    const struct cached_page *p = &c->pages[page];
    uint64_t serial = before < 0 ? 0 : c->pages[before].serial;
    if (p->before != serial || p->n_bytes != n_bytes ||
        memcmp(p->content, c->scratch, (size_t)n_bytes) != 0)
        return -1;
    return page;
}

int prefix_cache_add(struct prefix_cache *c, struct sequence *q, int32_t index)
{
    int32_t n_bytes = prepare(c, q, index), page = q->pages[index];
    struct cached_page *p = &c->pages[page];
    const struct digest *key = &q->keys[index].digest;
    uint64_t before = index > 0 ? c->pages[q->pages[index - 1]].serial : 0;
    if (p->serial != 0)
        BUG("page %d is in the prefix cache already", page);
    if ((index > 0 && before == 0) || find_key(c, key) >= 0)
        return -1;
    int32_t *bucket = bucket_of(c, key);
    *p = (struct cached_page){.key = *key,
                              .serial = ++c->last_serial,
                              .before = before,
                              .content = xcalloc((size_t)n_bytes, 1),
                              .n_bytes = n_bytes,
                              .next = *bucket};
    memcpy(p->content, c->scratch, (size_t)n_bytes);
    *bucket = page;
    c->n_cached++;
    return 0;
}

void prefix_cache_forget(struct prefix_cache *c, int32_t page)
{
    struct cached_page *p = &c->pages[page];
    if (p->serial == 0)
        BUG("page %d is not in the prefix cache", page);
    int32_t *link = bucket_of(c, &p->key);
    while (*link != page)
        link = &c->pages[*link].next;
    *link = p->next;
    free(p->content);
    *p = (struct cached_page){0};
    c->n_cached--;
}
