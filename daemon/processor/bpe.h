/*
 * Byte-pair merging: the bytes of one pre-token to ids, merges by rank. Immutable once built; knows
 * no files and no patterns.
 *
 * The rule (Sennrich et al. 2016; tokenizers' models/bpe/word.rs merge_all): while a neighbouring
 * pair is in the table, merge the pair of lowest rank, the leftmost of equals.
 */
#ifndef INTERNVLD_PROCESSOR_BPE_H
#define INTERNVLD_PROCESSOR_BPE_H

#include <stddef.h>
#include <stdint.h>

struct bpe_merge { // 16 bytes; key BPE_NO_KEY is a free slot
    uint64_t key;  // left << 32 | right
    uint32_t rank;
    int32_t id; // of the merged token
};

struct bpe {
    int32_t byte_ids[256];
    struct bpe_merge *slots; // open addressing, n_slots a power of two
    size_t n_slots, n_merges;
};

void bpe_init(struct bpe *b, size_t n_merges_expected);
void bpe_release(struct bpe *b);
/* A pair added twice has its last rank, as in tokenizers. */
void bpe_add(struct bpe *b, int32_t left, int32_t right, uint32_t rank, int32_t id);

struct bpe_symbol {
    int32_t id, previous, next; // indices; -1: none
};
struct bpe_candidate {
    uint32_t rank;
    int32_t at; // index of the left symbol
};
struct bpe_scratch { // grows; zeroed is empty; one per thread of use
    struct bpe_symbol *symbols;
    struct bpe_candidate *heap;
    size_t n_symbols, n_heap;
    int32_t *ids; // the result of the last bpe_encode(), [n_ids]
    size_t n_ids_capacity;
};
void bpe_scratch_release(struct bpe_scratch *s);

/* Ids of bytes [n_bytes < 2^30] in s->ids; returns their number. O(n log n). */
size_t bpe_encode(const struct bpe *b, struct bpe_scratch *s, const char *bytes, size_t n_bytes);

#endif
