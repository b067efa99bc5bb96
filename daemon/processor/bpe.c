/*
 * Merging with a linked list and a heap of candidate pairs; short pre-tokens, which are nearly all,
 * take a plain scan instead. See bpe.h.
 */
#include "daemon/processor/bpe.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

#define BPE_NO_KEY UINT64_MAX
#define SHORT_BYTES 32 // up to here a scan per merge is cheaper than a heap

static size_t slot_of(const struct bpe *b, uint64_t key)
{
    uint64_t h = key * 0x9e3779b97f4a7c15ull;

    return (size_t)(h ^ h >> 29) & (b->n_slots - 1);
}

static uint64_t pair_key(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

void bpe_init(struct bpe *b, size_t n_merges_expected)
{
    b->n_slots = 16;
    while (b->n_slots < 2 * n_merges_expected)
        b->n_slots *= 2;
    b->n_merges = 0;
    b->slots = xcalloc(b->n_slots, sizeof(*b->slots));
    for (size_t i = 0; i < b->n_slots; i++)
        b->slots[i].key = BPE_NO_KEY;
    for (int i = 0; i < 256; i++)
        b->byte_ids[i] = -1;
}

void bpe_release(struct bpe *b)
{
    free(b->slots);
    *b = (struct bpe){0};
}

void bpe_add(struct bpe *b, int32_t left, int32_t right, uint32_t rank, int32_t id)
{
    uint64_t key = pair_key(left, right);
    size_t i = slot_of(b, key);

    if (2 * b->n_merges >= b->n_slots)
        BUG("more merges than announced");
    while (b->slots[i].key != BPE_NO_KEY) {
        if (b->slots[i].key == key)
            break;
        i = (i + 1) & (b->n_slots - 1);
    }
    b->n_merges += b->slots[i].key == BPE_NO_KEY;
    b->slots[i] = (struct bpe_merge){.key = key, .rank = rank, .id = id};
}

static const struct bpe_merge *find(const struct bpe *b, int32_t left, int32_t right)
{
    uint64_t key = pair_key(left, right);
    size_t i = slot_of(b, key);

    while (b->slots[i].key != BPE_NO_KEY) {
        if (b->slots[i].key == key)
            return &b->slots[i];
        i = (i + 1) & (b->n_slots - 1);
    }
    return NULL;
}

void bpe_scratch_release(struct bpe_scratch *s)
{
    free(s->symbols);
    free(s->heap);
    free(s->ids);
    *s = (struct bpe_scratch){0};
}

static void reserve_ids(struct bpe_scratch *s, size_t n)
{
    if (n <= s->n_ids_capacity)
        return;
    s->n_ids_capacity = n > 256 ? n : 256;
    s->ids = xrealloc(s->ids, s->n_ids_capacity, sizeof(*s->ids));
}

/* At most SHORT_BYTES symbols: rank of every neighbouring pair beside the ids, lowest first. */
static size_t encode_short(const struct bpe *b, int32_t *ids, const char *bytes, size_t n)
{
    const struct bpe_merge *pairs[SHORT_BYTES + 1];

    for (size_t i = 0; i < n; i++)
        ids[i] = b->byte_ids[(uint8_t)bytes[i]];
    for (size_t i = 0; i + 1 < n; i++)
        pairs[i] = find(b, ids[i], ids[i + 1]);
    while (n > 1) {
        size_t best = n;

        for (size_t i = 0; i + 1 < n; i++)
            if (pairs[i] && (best == n || pairs[i]->rank < pairs[best]->rank))
                best = i;
        if (best == n)
            break;
        ids[best] = pairs[best]->id;
        memmove(ids + best + 1, ids + best + 2, (n - best - 2) * sizeof(*ids));
        if (n - best > 2)
            memmove(pairs + best + 1, pairs + best + 2, (n - best - 3) * sizeof(*pairs));
        n--;
        if (best > 0)
            pairs[best - 1] = find(b, ids[best - 1], ids[best]);
        if (best + 1 < n)
            pairs[best] = find(b, ids[best], ids[best + 1]);
    }
    return n;
}

static int before(struct bpe_candidate a, struct bpe_candidate b)
{
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

static void sift_down(struct bpe_candidate *heap, size_t n, size_t i)
{
    struct bpe_candidate moved = heap[i];

    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(heap[child + 1], heap[child]))
            child++;
        if (!before(heap[child], moved))
            break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

static void heap_push(struct bpe_candidate *heap, size_t *n, struct bpe_candidate c)
{
    size_t i = (*n)++;

    for (; i > 0 && before(c, heap[(i - 1) / 2]); i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = c;
}

/* Fills s->symbols and the heap of all mergeable pairs; returns the heap's size. */
static size_t prepare_long(const struct bpe *b, struct bpe_scratch *s, const char *bytes, size_t n)
{
    size_t n_heap = 0;

    if (n > s->n_symbols) {
        s->n_symbols = n;
        s->symbols = xrealloc(s->symbols, n, sizeof(*s->symbols));
        s->n_heap = 2 * n; // a merge takes one candidate and adds at most two
        s->heap = xrealloc(s->heap, s->n_heap, sizeof(*s->heap));
    }
    for (size_t i = 0; i < n; i++)
        s->symbols[i] = (struct bpe_symbol){
            .id = b->byte_ids[(uint8_t)bytes[i]],
            .previous = (int32_t)i - 1,
            .next = i + 1 < n ? (int32_t)i + 1 : -1,
        };
    for (size_t i = 0; i + 1 < n; i++) {
        const struct bpe_merge *m = find(b, s->symbols[i].id, s->symbols[i + 1].id);

        if (m)
            s->heap[n_heap++] = (struct bpe_candidate){.rank = m->rank, .at = (int32_t)i};
    }
    for (size_t i = n_heap / 2; i-- > 0;)
        sift_down(s->heap, n_heap, i);
    return n_heap;
}

static void push_pair(const struct bpe *b, struct bpe_scratch *s, size_t *n_heap, int32_t left,
                      int32_t right)
{
    const struct bpe_merge *m =
        left < 0 || right < 0 ? NULL : find(b, s->symbols[left].id, s->symbols[right].id);

    if (m)
        heap_push(s->heap, n_heap, (struct bpe_candidate){.rank = m->rank, .at = left});
}

static size_t encode_long(const struct bpe *b, struct bpe_scratch *s, const char *bytes, size_t n)
{
    size_t n_heap = prepare_long(b, s, bytes, n);
    struct bpe_symbol *symbols = s->symbols;

    while (n_heap > 0) {
        struct bpe_candidate c = s->heap[0];
        struct bpe_symbol *left = &symbols[c.at];

        s->heap[0] = s->heap[--n_heap];
        if (n_heap > 0)
            sift_down(s->heap, n_heap, 0);
        if (left->id < 0 || left->next < 0)
            continue; // swallowed, or nothing follows any more
        struct bpe_symbol *right = &symbols[left->next];
        const struct bpe_merge *m = find(b, left->id, right->id);

        if (!m || m->rank != c.rank)
            continue; // the pair has changed since; the new one has its own candidate
        left->id = m->id;
        right->id = -1;
        left->next = right->next;
        if (left->next >= 0)
            symbols[left->next].previous = c.at;
        push_pair(b, s, &n_heap, left->previous, c.at);
        push_pair(b, s, &n_heap, c.at, left->next);
    }
    size_t n_ids = 0;

    for (int32_t i = 0; i >= 0; i = symbols[i].next)
        s->ids[n_ids++] = symbols[i].id;
    return n_ids;
}

size_t bpe_encode(const struct bpe *b, struct bpe_scratch *s, const char *bytes, size_t n_bytes)
{
    if (n_bytes == 0)
        return 0;
    if (n_bytes >= (size_t)1 << 30)
        BUG("pre-token of %zu bytes", n_bytes);
    reserve_ids(s, n_bytes);
    return n_bytes <= SHORT_BYTES ? encode_short(b, s->ids, bytes, n_bytes)
                                  : encode_long(b, s, bytes, n_bytes);
}
