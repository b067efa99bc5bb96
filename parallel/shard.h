/*
 * Which part of a weight a shard owns: pure arithmetic, no ranks talk.
 *
 * Layout invariance (design section 5): the reduced dimension of a row-parallel product is cut into
 * `n_lanes` fixed lanes that do not depend on T; shard t of T owns lanes [t·n_lanes/T,
 * (t+1)·n_lanes/T).
 *
 * Attention lanes are runs of query heads that never cross a kv group: with 14 query heads on 2 kv
 * heads and 8 lanes each group's 7 heads are cut 2,2,2,1. A lane is never empty. KV heads are
 * replicated where several shards share one. So every T that divides n_lanes works, whether or not
 * it divides the heads.
 */
#ifndef INTERNVLD_PARALLEL_SHARD_H
#define INTERNVLD_PARALLEL_SHARD_H

#include <stdint.h>

#include "kernels/backend.h" // LANES_MAX
#include "kernels/error.h"

struct range {
    int64_t start, n;
};

struct lanes {
    int n;                        // power of two, 1 … LANES_MAX
    int64_t start[LANES_MAX + 1]; // in units of the cut dimension (heads, or columns)
};

/* Lanes over query heads: the largest power of two n <= 8 such that (n_kv_heads % n == 0) or (n %
 * n_kv_heads == 0 and every kv group has at least n / n_kv_heads heads). start[] in heads. */
void lanes_of_heads(struct lanes *l, int n_heads, int n_kv_heads);
/* Lanes over the MLP's intermediate columns: 8 lanes whose borders are multiples of the largest
 * unit of {128, 64, 32, 16, 8, 4, 2, 1} that divides n and leaves every lane at least one unit;
 * fewer lanes (a power of two) only when n < 8. Units are spread so that earlier lanes are never
 * smaller than later ones. */
void lanes_of_columns(struct lanes *l, int64_t n);

/* What shard `t` of `T` owns of one language layer. */
struct layer_shard {
    struct range heads;        // query heads
    struct range kv_heads;     // kv heads it reads (replicated ones included)
    struct lanes head_lanes;   // this shard's lanes, start[] in columns of its own o_proj input
                               // (heads · head_dim)
    struct range columns;      // of the MLP's intermediate dimension
    struct lanes column_lanes; // this shard's lanes, start[] in its own columns
};
/* Error (INVALID_ARGUMENT naming both numbers) when T does not divide the lane count of heads or
 * columns. */
int layer_shard_init(struct layer_shard *s, int n_heads, int n_kv_heads, int head_dim,
                     int64_t intermediate, int t, int T, struct error *err);
/* Local kv head of local query head h. */
int32_t layer_shard_kv_of_head(const struct layer_shard *s, int n_heads, int n_kv_heads, int h);

/* Rows of the vocabulary (padded up to a multiple of T): start and n of shard t; rows at or past
 * vocab_size do not exist and count as -inf logits. */
struct range shard_vocab(int64_t vocab_size, int t, int T);
/* Layers of pipeline stage p of P, as even as can be, the first stages one more. */
struct range shard_layers(int n_layers, int p, int P);

#endif
