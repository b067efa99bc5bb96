/*
 * Keys and values in pages: writing them (rope on the way), attending to them, copying pages.
 *
 * Attention. Queries of one kv head's group are packed as rows, row = token * group + head, so that
 * a decode step's few heads share one read of the keys. A sequence's keys are cut into splits of
 * SPLIT_KEYS at absolute positions; a row's splits are computed apart, each by attend_step(), and
 * folded in order by fold_out()/fold_sum(). The same numbers come out of both kernels:
 *
 *   decode_kernel   one warp a (split, kv head, sequence with one new token); the partial results
 *                   go to scratch and decode_fold_kernel folds them
 *   prefill_kernel  four warps a tile of 64 rows, walking the splits in order, folding in registers
 *
 * so a token's attention is bitwise the same decoded, prefilled, in chunks, or beside other
 * sequences. plain_kernel does float32 and head sizes that have no tensor-core kernel.
 *
 * Codes of int8 pages are copied as they are and become bfloat16, exactly, from shared memory to
 * shared memory; plain_kernel multiplies values, code * scale.
 */
#include <float.h>

#include "kernels/cuda_attention.h"

#define SPLIT_KEYS 256 // a multiple of STEP_KEYS
#define PREFILL_WARPS 4
#define HEADS_MAX 256
#define KV_HEADS_MAX 128

/* The query heads in the order of their kv heads: group g is heads[start[g] … start[g + 1]). */
struct head_map {
    int16_t heads[HEADS_MAX];
    int16_t start[KV_HEADS_MAX + 1];
};

struct paged_params {
    const void *q, *k, *v;
    void *out;
    int64_t q_stride, out_stride; // elements between rows
    const int32_t *query_start, *context_len, *page_start, *pages;
    int n_sequences, n_kv_heads, page_size, head_dim, window;
    int64_t head_bytes; // kv_head_bytes()
    float scale_log2;
    float *partial;     // decode: [sequence, head, split, head_dim + 2]
    int n_splits;       // decode: splits of a row of `partial`
    int first_sequence; // decode: the sequence of blockIdx.z = 0
    int n_heads;
    int skip_single; // prefill: sequences with one new token are decode_kernel's
    struct head_map map;
};

/* Of `pages`, p.k or p.v, the page that has the position, of one kv head. */
template <class KV>
__device__ __forceinline__ const KV *page_of(const void *pages, const struct paged_params &p,
                                             int sequence, int position, int kv_head)
{
    int64_t page = p.pages[p.page_start[sequence] + position / p.page_size];

    return (const KV *)((const char *)pages + (page * p.n_kv_heads + kv_head) * p.head_bytes);
}

/* The scales [page_size] behind a page's codes. */
__device__ __forceinline__ const float *scales_of(const int8_t *page, const struct paged_params &p)
{
    return (const float *)(page + p.head_dim * p.page_size);
}

/* The first key that a query at `position` sees. */
__device__ __forceinline__ int first_visible(const struct paged_params &p, int position)
{
    int low = position - p.window + 1;

    return p.window > 0 && low > 0 ? low : 0;
}

/* ---- tensor cores ---- */

template <int HEAD_DIM> struct step_tile {
    bf16 keys[HEAD_DIM * (STEP_KEYS + SHARED_PAD)];
    bf16 values[STEP_KEYS * (HEAD_DIM + SHARED_PAD)];
};

/* The same as int8 pages hold it. */
template <int HEAD_DIM> struct step_codes {
    int8_t keys[HEAD_DIM * STEP_KEYS];
    int8_t values[STEP_KEYS * HEAD_DIM];
    float scales[2][STEP_KEYS]; // of keys, of values
};

/* Shared memory of a block: two steps in flight; what codes become. */
template <int HEAD_DIM, class KV> struct step_memory {
    step_tile<HEAD_DIM> loaded[2];
};
template <int HEAD_DIM> struct step_memory<HEAD_DIM, int8_t> {
    step_codes<HEAD_DIM> loaded[2];
    step_tile<HEAD_DIM> tile;
    float scales[2][STEP_KEYS];
};

/* Starts copying one step's keys and values; what lies past the context reads as zero. */
template <int HEAD_DIM>
__device__ __forceinline__ void load_step(step_tile<HEAD_DIM> *t, const struct paged_params &p,
                                          int sequence, int kv_head, int first_key, int n_keys)
{
    for (int i = threadIdx.x; i < HEAD_DIM * STEP_KEYS / 8; i += blockDim.x) {
        int dim = i / (STEP_KEYS / 8), key = i % (STEP_KEYS / 8) * 8;
        int position = first_key + key;
        bool valid = position < n_keys;
        const bf16 *src = (const bf16 *)p.k;
        if (valid)
            src = page_of<bf16>(p.k, p, sequence, position, kv_head) + dim * p.page_size +
                  position % p.page_size;
        cp_async_16(&t->keys[dim * (STEP_KEYS + SHARED_PAD) + key], src, valid);
    }
    for (int i = threadIdx.x; i < HEAD_DIM * STEP_KEYS / 8; i += blockDim.x) {
        int key = i / (HEAD_DIM / 8), dim = i % (HEAD_DIM / 8) * 8;
        int position = first_key + key;
        bool valid = position < n_keys;
        const bf16 *src = (const bf16 *)p.v;
        if (valid)
            src = page_of<bf16>(p.v, p, sequence, position, kv_head) +
                  position % p.page_size * HEAD_DIM + dim;
        cp_async_16(&t->values[key * (HEAD_DIM + SHARED_PAD) + dim], src, valid);
    }
    cp_async_commit();
}

template <int HEAD_DIM>
__device__ __forceinline__ void load_step(step_codes<HEAD_DIM> *c, const struct paged_params &p,
                                          int sequence, int kv_head, int first_key, int n_keys)
{
    for (int i = threadIdx.x; i < HEAD_DIM * STEP_KEYS / 16; i += blockDim.x) {
        int dim = i / (STEP_KEYS / 16), key = i % (STEP_KEYS / 16) * 16;
        int position = first_key + key;
        bool valid = position < n_keys;
        const int8_t *src = (const int8_t *)p.k;
        if (valid)
            src = page_of<int8_t>(p.k, p, sequence, position, kv_head) + dim * p.page_size +
                  position % p.page_size;
        cp_async_16(&c->keys[dim * STEP_KEYS + key], src, valid);
    }
    for (int i = threadIdx.x; i < HEAD_DIM * STEP_KEYS / 16; i += blockDim.x) {
        int key = i / (HEAD_DIM / 16), dim = i % (HEAD_DIM / 16) * 16;
        int position = first_key + key;
        bool valid = position < n_keys;
        const int8_t *src = (const int8_t *)p.v;
        if (valid)
            src = page_of<int8_t>(p.v, p, sequence, position, kv_head) +
                  position % p.page_size * HEAD_DIM + dim;
        cp_async_16(&c->values[key * HEAD_DIM + dim], src, valid);
    }
    for (int i = threadIdx.x; i < 2 * STEP_KEYS / 4; i += blockDim.x) {
        int is_value = i / (STEP_KEYS / 4), key = i % (STEP_KEYS / 4) * 4;
        int position = first_key + key;
        bool valid = position < n_keys;
        const void *pages = is_value ? p.v : p.k;
        const float *src = (const float *)pages;
        if (valid)
            src = scales_of(page_of<int8_t>(pages, p, sequence, position, kv_head), p) +
                  position % p.page_size;
        cp_async_16(&c->scales[is_value][key], src, valid);
    }
    cp_async_commit();
}

/* Sixteen codes as bfloat16. */
__device__ __forceinline__ void expand_codes(bf16 *dst, const int8_t *codes)
{
    uint4 in = *(const uint4 *)codes;
    const uint32_t words[4] = {in.x, in.y, in.z, in.w};
    uint32_t pairs[8];

#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t word = words[i / 2] >> 16 * (i % 2);
        pairs[i] = pack_bf16((float)(int8_t)word, (float)(int8_t)(word >> 8));
    }
    ((uint4 *)dst)[0] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    ((uint4 *)dst)[1] = {pairs[4], pairs[5], pairs[6], pairs[7]};
}

/* What has been loaded of a step to m->tile and m->scales. Slots past the context may hold
 * anything; scales count as 0 there. */
template <int HEAD_DIM>
__device__ __forceinline__ void expand_step(step_memory<HEAD_DIM, int8_t> *m,
                                            const step_codes<HEAD_DIM> *c, int first_key,
                                            int n_keys)
{
    for (int i = threadIdx.x; i < HEAD_DIM * STEP_KEYS / 16; i += blockDim.x) {
        int dim = i / (STEP_KEYS / 16), key = i % (STEP_KEYS / 16) * 16;
        expand_codes(&m->tile.keys[dim * (STEP_KEYS + SHARED_PAD) + key], c->keys + 16 * i);
    }
    for (int i = threadIdx.x; i < HEAD_DIM * STEP_KEYS / 16; i += blockDim.x) {
        int key = i / (HEAD_DIM / 16), dim = i % (HEAD_DIM / 16) * 16;
        expand_codes(&m->tile.values[key * (HEAD_DIM + SHARED_PAD) + dim], c->values + 16 * i);
    }
    for (int i = threadIdx.x; i < 2 * STEP_KEYS; i += blockDim.x) {
        int is_value = i / STEP_KEYS, key = i % STEP_KEYS;
        m->scales[is_value][key] = first_key + key < n_keys ? c->scales[is_value][key] : 0.0f;
    }
}

/* The rows of one tile of one kv head's group, as one thread sees them. */
struct tile_rows {
    int sequence, token0, n_new; // first token row and number of new tokens of the sequence
    int row;                     // of this thread's row g; its other one is row + 8
    int low[2], high[2];         // keys that the two see; none where there is no such row
    int tile_low, tile_high;     // keys that any row of the tile sees
};

__device__ __forceinline__ int group_of(const struct paged_params &p, int kv_head)
{
    return p.map.start[kv_head + 1] - p.map.start[kv_head];
}

__device__ __forceinline__ void tile_rows_init(struct tile_rows *t, const struct paged_params &p,
                                               int kv_head, int sequence, int first_row, int n_rows)
{
    int group = group_of(p, kv_head), context = p.context_len[sequence];

    t->sequence = sequence;
    t->token0 = p.query_start[sequence];
    t->n_new = p.query_start[sequence + 1] - t->token0;
    t->row = first_row + (int)(threadIdx.x >> 5) * WARP_ROWS + (int)(threadIdx.x & 31) / 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int token = (t->row + 8 * r) / group;
        bool here = token < t->n_new;
        int position = context - t->n_new + token;
        t->low[r] = here ? first_visible(p, position) : 0;
        t->high[r] = here ? position + 1 : 0;
    }
    int last = (first_row + n_rows - 1) / group, first = first_row / group;
    if (last > t->n_new - 1)
        last = t->n_new - 1;
    t->tile_low = first_visible(p, context - t->n_new + first);
    t->tile_high = context - t->n_new + last + 1;
}

/* The query head of this thread's row r. */
__device__ __forceinline__ int head_of(const struct paged_params &p, const struct tile_rows &t,
                                       int kv_head, int r)
{
    return p.map.heads[p.map.start[kv_head] + (t.row + 8 * r) % group_of(p, kv_head)];
}

/* Where row r of this thread begins in a tensor of queries or results, in elements. */
__device__ __forceinline__ int64_t row_offset(const struct paged_params &p,
                                              const struct tile_rows &t, int kv_head, int r,
                                              int64_t stride, int head_dim)
{
    int token = t.token0 + (t.row + 8 * r) / group_of(p, kv_head);

    return token * stride + head_of(p, t, kv_head, r) * head_dim;
}

template <int HEAD_DIM>
__device__ __forceinline__ void tile_queries(uint32_t q[HEAD_DIM / 16][4],
                                             const struct paged_params &p,
                                             const struct tile_rows &t, int kv_head)
{
    const bf16 *row[2];

#pragma unroll
    for (int r = 0; r < 2; r++)
        row[r] = t.high[r] > 0
                     ? (const bf16 *)p.q + row_offset(p, t, kv_head, r, p.q_stride, HEAD_DIM)
                     : NULL;
    load_queries<HEAD_DIM>(q, row[0], row[1]);
}

/* Folding a further split (b) into what was folded before (a); both decode and prefill use it. */
__device__ __forceinline__ float fold_sum(float a, float fade_a, float b, float fade_b)
{
    return fmaf(a, fade_a, b * fade_b);
}

/* One step whose loads have ended, of the keys from `key` on. */
template <int HEAD_DIM>
__device__ __forceinline__ void
attend_loaded(row_state<HEAD_DIM> *s, const uint32_t q[HEAD_DIM / 16][4],
              step_memory<HEAD_DIM, bf16> *m, int stage, const struct paged_params &p,
              const struct tile_rows &t, int key)
{
    attend_step<HEAD_DIM, true>(s, q, m->loaded[stage].keys, m->loaded[stage].values, key, t.low,
                                t.high, p.scale_log2);
}

template <int HEAD_DIM>
__device__ __forceinline__ void
attend_loaded(row_state<HEAD_DIM> *s, const uint32_t q[HEAD_DIM / 16][4],
              step_memory<HEAD_DIM, int8_t> *m, int stage, const struct paged_params &p,
              const struct tile_rows &t, int key)
{
    expand_step<HEAD_DIM>(m, &m->loaded[stage], key, p.context_len[t.sequence]);
    __syncthreads();
    attend_step<HEAD_DIM, true, true>(s, q, m->tile.keys, m->tile.values, key, t.low, t.high,
                                      p.scale_log2, m->scales[0], m->scales[1]);
}

/* Keys [begin, end) of the tile (begin on a step's border), two steps in flight. */
template <int HEAD_DIM, class KV>
__device__ __forceinline__ void
attend_range(row_state<HEAD_DIM> *s, const uint32_t q[HEAD_DIM / 16][4],
             step_memory<HEAD_DIM, KV> *m, const struct paged_params &p, const struct tile_rows &t,
             int kv_head, int begin, int end)
{
    int n_keys = p.context_len[t.sequence], stage = 0;

    load_step<HEAD_DIM>(&m->loaded[0], p, t.sequence, kv_head, begin, n_keys);
    for (int key = begin; key < end; key += STEP_KEYS, stage ^= 1) {
        if (key + STEP_KEYS < end) {
            load_step<HEAD_DIM>(&m->loaded[stage ^ 1], p, t.sequence, kv_head, key + STEP_KEYS,
                                n_keys);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        attend_loaded<HEAD_DIM>(s, q, m, stage, p, t, key);
        __syncthreads(); // the next load overwrites this stage
    }
    row_sums<HEAD_DIM>(s);
}

/* Grid (split, kv head * row tiles, sequence), one warp. Writes out unnormalised, then max, sum. */
template <int HEAD_DIM, class KV> __global__ void decode_kernel(const struct paged_params p)
{
    typedef step_memory<HEAD_DIM, KV> memory_type;
    CUDA_DYNAMIC_SHARED(memory_type, memory);
    int sequence = p.first_sequence + (int)blockIdx.z;
    int kv_head = (int)blockIdx.y % p.n_kv_heads, row_tile = (int)blockIdx.y / p.n_kv_heads;
    int group = group_of(p, kv_head);
    uint32_t q[HEAD_DIM / 16][4];
    row_state<HEAD_DIM> s;
    struct tile_rows t;

    if (p.query_start[sequence + 1] - p.query_start[sequence] != 1 || row_tile * WARP_ROWS >= group)
        return;
    tile_rows_init(&t, p, kv_head, sequence, row_tile * WARP_ROWS, WARP_ROWS);
    int begin = (int)blockIdx.x * SPLIT_KEYS, end = begin + SPLIT_KEYS;
    if (begin >= t.tile_high || end <= t.tile_low)
        return;
    begin = begin > t.tile_low ? begin : t.tile_low / STEP_KEYS * STEP_KEYS;
    end = end < t.tile_high ? end : t.tile_high;
    tile_queries<HEAD_DIM>(q, p, t, kv_head);
    row_state_clear<HEAD_DIM>(&s);
    attend_range<HEAD_DIM, KV>(&s, q, memory, p, t, kv_head, begin, end);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (t.high[r] == 0)
            continue;
        float *row = p.partial +
                     (((int64_t)blockIdx.z * p.n_heads + head_of(p, t, kv_head, r)) * p.n_splits +
                      blockIdx.x) *
                         (HEAD_DIM + 2);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++)
            for (int i = 0; i < 2; i++)
                row[8 * d + 2 * (threadIdx.x & 3) + i] = s.out[d][2 * r + i];
        if ((threadIdx.x & 3) == 0) {
            row[HEAD_DIM] = s.max[r];
            row[HEAD_DIM + 1] = s.sum[r];
        }
    }
}

/* Grid (head, sequence), a thread a dimension. */
template <int HEAD_DIM> __global__ void decode_fold_kernel(const struct paged_params p)
{
    int head = (int)blockIdx.x, sequence = p.first_sequence + (int)blockIdx.y;
    int d = (int)threadIdx.x, token = p.query_start[sequence];
    float max = -INFINITY, sum = 0.0f, out = 0.0f;

    if (p.query_start[sequence + 1] - token != 1)
        return;
    int high = p.context_len[sequence], low = first_visible(p, high - 1);
    const float *row =
        p.partial + ((int64_t)blockIdx.y * p.n_heads + head) * p.n_splits * (HEAD_DIM + 2);
    for (int split = low / SPLIT_KEYS; split * SPLIT_KEYS < high; split++) {
        const float *part = row + (int64_t)split * (HEAD_DIM + 2);
        float largest = fmaxf(max, part[HEAD_DIM]);
        float fade = exp2_below(max, largest), fade_part = exp2_below(part[HEAD_DIM], largest);
        max = largest;
        sum = fold_sum(sum, fade, part[HEAD_DIM + 1], fade_part);
        out = fold_sum(out, fade, part[d], fade_part);
    }
    float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    ((bf16 *)p.out)[token * p.out_stride + head * HEAD_DIM + d] = from_float<bf16>(out * inverse);
}

/* Which sequence tile number `tile` belongs to, its own number there; -1 past the last. */
__device__ __forceinline__ int find_tile(const struct paged_params &p, int group, int tile_rows,
                                         int *tile)
{
    for (int s = 0; s < p.n_sequences; s++) {
        int n_new = p.query_start[s + 1] - p.query_start[s];
        int n_tiles = n_new == 1 && p.skip_single ? 0 : (n_new * group + tile_rows - 1) / tile_rows;
        if (*tile < n_tiles)
            return s;
        *tile -= n_tiles;
    }
    return -1;
}

/* Grid (tile, kv head). */
template <int HEAD_DIM, class KV>
__global__ void __launch_bounds__(32 * PREFILL_WARPS, 2) prefill_kernel(const struct paged_params p)
{
    typedef step_memory<HEAD_DIM, KV> memory_type;
    CUDA_DYNAMIC_SHARED(memory_type, memory);
    const int TILE_ROWS = PREFILL_WARPS * WARP_ROWS;
    int kv_head = (int)blockIdx.y, tile = (int)blockIdx.x;
    int group = group_of(p, kv_head);
    uint32_t q[HEAD_DIM / 16][4];
    row_state<HEAD_DIM> all, split;
    struct tile_rows t;

    if (group == 0)
        return;
    int sequence = find_tile(p, group, TILE_ROWS, &tile);
    if (sequence < 0)
        return;
    tile_rows_init(&t, p, kv_head, sequence, tile * TILE_ROWS, TILE_ROWS);
    tile_queries<HEAD_DIM>(q, p, t, kv_head);
    row_state_clear<HEAD_DIM>(&all);
    for (int border = t.tile_low / SPLIT_KEYS * SPLIT_KEYS; border < t.tile_high;
         border += SPLIT_KEYS) {
        int begin = border > t.tile_low ? border : t.tile_low / STEP_KEYS * STEP_KEYS;
        int end = border + SPLIT_KEYS < t.tile_high ? border + SPLIT_KEYS : t.tile_high;
        row_state_clear<HEAD_DIM>(&split);
        attend_range<HEAD_DIM, KV>(&split, q, memory, p, t, kv_head, begin, end);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = fmaxf(all.max[r], split.max[r]);
            float fade = exp2_below(all.max[r], largest);
            float fade_split = exp2_below(split.max[r], largest);
            all.max[r] = largest;
            all.sum[r] = fold_sum(all.sum[r], fade, split.sum[r], fade_split);
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++)
                    all.out[d][i] = fold_sum(all.out[d][i], fade, split.out[d][i], fade_split);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
        if (t.high[r] > 0)
            store_row<HEAD_DIM>(
                (bf16 *)p.out + row_offset(p, t, kv_head, r, p.out_stride, HEAD_DIM), &all, r);
}

/* ---- ordinary cores ---- */

/* Element `at` of a page's head, which is of the token in `slot`. */
template <class KV>
__device__ __forceinline__ float held(const KV *page, int at, const struct paged_params &, int)
{
    return to_float(page[at]);
}

template <>
__device__ __forceinline__ float held<int8_t>(const int8_t *page, int at,
                                              const struct paged_params &p, int slot)
{
    return (float)page[at] * scales_of(page, p)[slot];
}

/* Grid (tile of PLAIN_WARPS rows, kv head). */
template <class T, class KV> __global__ void plain_kernel(const struct paged_params p)
{
    CUDA_DYNAMIC_SHARED(float, shared);
    int kv_head = (int)blockIdx.y, tile = (int)blockIdx.x, hd = p.head_dim;
    int start = p.map.start[kv_head], group = p.map.start[kv_head + 1] - start;
    float *keys = shared, *values = keys + CHUNK_KEYS * (hd + 1);
    float *q = values + CHUNK_KEYS * hd + (threadIdx.x >> 5) * hd;
    struct plain_row s;

    if (group == 0)
        return;
    int sequence = find_tile(p, group, PLAIN_WARPS, &tile);
    if (sequence < 0)
        return;
    int token0 = p.query_start[sequence], n_new = p.query_start[sequence + 1] - token0;
    int n_keys = p.context_len[sequence], row = tile * PLAIN_WARPS + (int)(threadIdx.x >> 5);
    int token = row / group, head = p.map.heads[start + row % group];
    bool here = token < n_new;
    int high = here ? n_keys - n_new + token + 1 : 0;
    int low = here ? first_visible(p, high - 1) : 0;
    int first = first_visible(p, n_keys - n_new + tile * PLAIN_WARPS / group);
    int last = (tile * PLAIN_WARPS + PLAIN_WARPS - 1) / group;
    int end = n_keys - n_new + (last < n_new ? last : n_new - 1) + 1;

    plain_row_clear(&s);
    for (int d = threadIdx.x & 31; here && d < hd; d += 32)
        q[d] = to_float(((const T *)p.q)[(token0 + token) * p.q_stride + head * hd + d]);
    for (int key0 = first / CHUNK_KEYS * CHUNK_KEYS; key0 < end; key0 += CHUNK_KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < CHUNK_KEYS * hd; i += blockDim.x) {
            int key = i % CHUNK_KEYS, d = i / CHUNK_KEYS, position = key0 + key;
            int slot = position % p.page_size;
            float k = 0.0f, v = 0.0f;
            if (position < n_keys) {
                k = held<KV>(page_of<KV>(p.k, p, sequence, position, kv_head),
                             d * p.page_size + slot, p, slot);
                v = held<KV>(page_of<KV>(p.v, p, sequence, position, kv_head), slot * hd + d, p,
                             slot);
            }
            keys[key * (hd + 1) + d] = k;
            values[key * hd + d] = v;
        }
        __syncthreads();
        if (here)
            plain_step(&s, q, keys, values, hd, key0, low, high, p.scale_log2);
    }
    if (here)
        plain_store((T *)p.out + (token0 + token) * p.out_stride + head * hd, &s, hd);
}

/* ---- the op ---- */

static void map_heads(struct head_map *m, const int32_t *kv_of_head, int n_heads, int n_kv_heads)
{
    int n = 0;

    if (n_heads > HEADS_MAX || n_kv_heads > KV_HEADS_MAX)
        die("attention of %d heads on %d kv heads: the CUDA back end holds %d on %d", n_heads,
            n_kv_heads, HEADS_MAX, KV_HEADS_MAX);
    for (int g = 0; g < n_kv_heads; g++) {
        m->start[g] = (int16_t)n;
        for (int h = 0; h < n_heads; h++)
            if (kv_of_head[h] == g)
                m->heads[n++] = (int16_t)h;
    }
    m->start[n_kv_heads] = (int16_t)n;
}

static int largest_group(const struct head_map *m, int n_kv_heads)
{
    int largest = 1;

    for (int g = 0; g < n_kv_heads; g++)
        if (m->start[g + 1] - m->start[g] > largest)
            largest = m->start[g + 1] - m->start[g];
    return largest;
}

/* An upper bound of the tiles of `rows` rows that n_tokens of n_sequences make. */
static unsigned tiles_bound(const struct paged_layout *layout, int group, int rows)
{
    return (unsigned)((int64_t)layout->n_tokens * group / rows + layout->n_sequences);
}

/* What keys and values are, and who has them. */
static struct paged_params params_of(const struct kv_pages *kv, const struct paged_layout *layout)
{
    struct paged_params p = {};

    p.k = kv->k;
    p.v = kv->v;
    p.query_start = layout->query_start;
    p.context_len = layout->context_len;
    p.page_start = layout->page_start;
    p.pages = layout->pages;
    p.n_sequences = layout->n_sequences;
    p.n_kv_heads = kv->n_kv_heads;
    p.page_size = kv->page_size;
    p.head_dim = kv->head_dim;
    p.head_bytes = (int64_t)kv_head_bytes(kv->head_dim, kv->page_size, kv->dtype);
    return p;
}

template <int HEAD_DIM, class KV>
static void attend_tensor_cores(struct cuda_state *s, struct paged_params *p,
                                const struct paged_layout *layout, int n_heads)
{
    const int shared_bytes = (int)sizeof(step_memory<HEAD_DIM, KV>);
    int group = largest_group(&p->map, p->n_kv_heads);
    int n_splits = (layout->max_context_len + SPLIT_KEYS - 1) / SPLIT_KEYS;
    size_t per_sequence = sizeof(float) * (size_t)n_heads * (size_t)n_splits * (HEAD_DIM + 2);
    int at_once = (int)(s->scratch_bytes / per_sequence);

    if (at_once < 1)
        BUG("%zu bytes of scratch do not hold one sequence of %d tokens", s->scratch_bytes,
            layout->max_context_len);
    if (at_once > 65535)
        at_once = 65535;
    CUDA_CHECK(cudaFuncSetAttribute(decode_kernel<HEAD_DIM, KV>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    CUDA_CHECK(cudaFuncSetAttribute(prefill_kernel<HEAD_DIM, KV>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    p->partial = (float *)s->scratch;
    p->n_splits = n_splits;
    p->n_heads = n_heads;
    p->skip_single = 1;
    for (int first = 0; first < layout->n_sequences; first += at_once) {
        int n = layout->n_sequences - first < at_once ? layout->n_sequences - first : at_once;
        p->first_sequence = first;
        LAUNCH((decode_kernel<HEAD_DIM, KV>),
               dim3((unsigned)n_splits, (unsigned)p->n_kv_heads * blocks_for(group, WARP_ROWS),
                    (unsigned)n),
               dim3(32), (size_t)shared_bytes, s->stream, *p);
        LAUNCH(decode_fold_kernel<HEAD_DIM>, dim3((unsigned)n_heads, (unsigned)n), dim3(HEAD_DIM),
               0, s->stream, *p);
    }
    if (layout->n_tokens > layout->n_sequences)
        LAUNCH((prefill_kernel<HEAD_DIM, KV>),
               dim3(tiles_bound(layout, group, PREFILL_WARPS * WARP_ROWS), (unsigned)p->n_kv_heads),
               dim3(32 * PREFILL_WARPS), (size_t)shared_bytes, s->stream, *p);
}

/* 0 where no kernel is made for such heads. */
template <class KV>
static int try_tensor_cores(struct cuda_state *s, struct paged_params *p,
                            const struct paged_layout *layout, int n_heads)
{
    switch (p->head_dim) {
    case 16:
        attend_tensor_cores<16, KV>(s, p, layout, n_heads);
        return 1;
    case 32:
        attend_tensor_cores<32, KV>(s, p, layout, n_heads);
        return 1;
    case 64:
        attend_tensor_cores<64, KV>(s, p, layout, n_heads);
        return 1;
    case 128:
        attend_tensor_cores<128, KV>(s, p, layout, n_heads);
        return 1;
    }
    return 0;
}

template <class T, class KV>
static void attend_plain(struct cuda_state *s, const struct paged_params *p,
                         const struct paged_layout *layout)
{
    size_t shared_bytes = plain_shared_bytes(p->head_dim);
    unsigned n_tiles = tiles_bound(layout, largest_group(&p->map, p->n_kv_heads), PLAIN_WARPS);

    CUDA_CHECK(cudaFuncSetAttribute(
        plain_kernel<T, KV>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
    LAUNCH((plain_kernel<T, KV>), dim3(n_tiles, (unsigned)p->n_kv_heads), dim3(32 * PLAIN_WARPS),
           shared_bytes, s->stream, *p);
}

void cuda_paged_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                          const struct kv_pages *kv, const struct paged_layout *layout,
                          const int32_t *kv_of_head, int32_t n_heads, float scale, int32_t window)
{
    struct cuda_state *s = cuda_state_of(b);
    struct paged_params p = params_of(kv, layout);
    int tensor_cores = q->dtype == DTYPE_BF16 && !(q->row_stride % 2) && !(out->row_stride % 2) &&
                       !((uintptr_t)q->data % 4) && !((uintptr_t)out->data % 4);

    p.q = q->data;
    p.out = out->data;
    p.q_stride = q->row_stride;
    p.out_stride = out->row_stride;
    p.window = window;
    p.scale_log2 = scale * LOG2_E;
    map_heads(&p.map, kv_of_head, n_heads, kv->n_kv_heads);
    if (tensor_cores && kv->dtype == DTYPE_BF16 && try_tensor_cores<bf16>(s, &p, layout, n_heads))
        return;
    if (tensor_cores && kv->dtype == DTYPE_I8 && try_tensor_cores<int8_t>(s, &p, layout, n_heads))
        return;
    if (kv->head_dim > PLAIN_DIM_MAX)
        die("heads of %d dimensions: the CUDA back end holds %d", kv->head_dim, PLAIN_DIM_MAX);
    if (kv->dtype == DTYPE_I8)
        WITH_TYPE(q->dtype, T, attend_plain<T, int8_t>(s, &p, layout));
    else
        WITH_TYPE(q->dtype, T, WITH_TYPE(kv->dtype, KV, attend_plain<T, KV>(s, &p, layout)));
}

/* ---- writing and copying pages ---- */

/* What a token's block does: rotate the heads of its query and key, store key and value. */
struct write_params {
    void *q; // NULL: nothing is rotated
    const float *cos_table, *sin_table;
    int64_t q_stride, k_stride, v_stride; // elements
    int n_heads;                          // of q
};

/* Dimensions d and d + half of a head, turned. */
template <class T>
__device__ __forceinline__ void rotate_pair(T *a, T *b, const float *cosine, const float *sine)
{
    float x = to_float(*a), y = to_float(*b);

    *a = from_float<T>(x * *cosine - y * *sine);
    *b = from_float<T>(y * *cosine + x * *sine);
}

/* Pairs of the heads of one row; a thread owns a pair. */
template <class T>
__device__ __forceinline__ void rotate_heads(T *row, int n_heads, int half, const float *cosines,
                                             const float *sines)
{
    for (int i = threadIdx.x; i < n_heads * half; i += blockDim.x) {
        int d = i % half;
        T *first = row + i / half * 2 * half + d;
        rotate_pair(first, first + half, cosines + d, sines + d);
    }
}

/* Sequences are few: each thread finds the token's own. */
__device__ __forceinline__ int sequence_of(const struct paged_params &p, int token)
{
    int sequence = 0;

    while (sequence + 1 < p.n_sequences && p.query_start[sequence + 1] <= token)
        sequence++;
    return sequence;
}

template <class T>
__device__ __forceinline__ void rotate_token(T *key, int token, const struct write_params &w,
                                             const struct paged_params &p)
{
    int half = p.head_dim / 2;
    const float *c = w.cos_table + (int64_t)token * half, *s = w.sin_table + (int64_t)token * half;

    rotate_heads((T *)w.q + token * w.q_stride, w.n_heads, half, c, s);
    rotate_heads(key, p.n_kv_heads, half, c, s);
    __syncthreads(); // a key's dimensions are stored by other threads
}

/* Where the keys and values of this block's token go. */
struct written {
    int token, sequence, position, slot;
};

/* One block a token, whose key and queries it rotates. 0: a row that pads a recorded step is no
 * sequence's. */
template <class T>
__device__ __forceinline__ int begin_token(struct written *at, T *k, const struct write_params &w,
                                           const struct paged_params &p)
{
    int token = (int)blockIdx.x;

    if (token >= p.query_start[p.n_sequences])
        return 0;
    if (w.q)
        rotate_token(k + token * w.k_stride, token, w, p);
    at->token = token;
    at->sequence = sequence_of(p, token);
    at->position = p.context_len[at->sequence] - p.query_start[at->sequence + 1] + token;
    at->slot = at->position % p.page_size;
    return 1;
}

template <class T, class KV>
__global__ void kv_write_kernel(T *k, const T *v, const struct write_params w,
                                const struct paged_params p)
{
    struct written at;

    if (!begin_token(&at, k, w, p))
        return;
    const T *key = k + at.token * w.k_stride, *value = v + at.token * w.v_stride;
    for (int i = threadIdx.x; i < p.n_kv_heads * p.head_dim; i += blockDim.x) {
        int head = i / p.head_dim, d = i % p.head_dim;
        KV *keys = (KV *)page_of<KV>(p.k, p, at.sequence, at.position, head);
        KV *values = (KV *)page_of<KV>(p.v, p, at.sequence, at.position, head);
        keys[d * p.page_size + at.slot] = from_float<KV>(to_float(key[i]));
        values[at.slot * p.head_dim + d] = from_float<KV>(to_float(value[i]));
    }
}

/* A warp's x [n] to codes `step` apart, and their scale (struct kv_pages). */
template <class T>
__device__ __forceinline__ void encode(int8_t *codes, int step, float *scale_to, const T *x, int n)
{
    int lane = threadIdx.x & 31;
    float largest = 0.0f;

    for (int d = lane; d < n; d += 32) {
        float magnitude = fabsf(to_float(x[d]));
        largest = fmaxf(largest, magnitude <= FLT_MAX ? magnitude : INFINITY);
    }
    largest = warp_max(largest);
    float scale = largest / 127.0f;
    if (scale < FLT_MIN)
        scale = 0.0f;
    if (largest > FLT_MAX)
        scale = NAN;
    for (int d = lane; d < n; d += 32)
        codes[d * step] = scale > 0.0f ? (int8_t)rintf(to_float(x[d]) / scale) : (int8_t)0;
    if (lane == 0)
        *scale_to = scale;
}

/* The same into int8 pages, a warp a vector. */
template <class T>
__global__ void kv_encode_kernel(T *k, const T *v, const struct write_params w,
                                 const struct paged_params p)
{
    struct written at;

    if (!begin_token(&at, k, w, p))
        return;
    const T *key = k + at.token * w.k_stride, *value = v + at.token * w.v_stride;
    for (int i = threadIdx.x >> 5; i < 2 * p.n_kv_heads; i += blockDim.x >> 5) {
        int head = i >> 1, is_value = i & 1;
        int8_t *page =
            (int8_t *)page_of<int8_t>(is_value ? p.v : p.k, p, at.sequence, at.position, head);
        float *scale = (float *)scales_of(page, p) + at.slot;
        if (is_value)
            encode(page + at.slot * p.head_dim, 1, scale, value + head * p.head_dim, p.head_dim);
        else
            encode(page + at.slot, p.page_size, scale, key + head * p.head_dim, p.head_dim);
    }
}

void cuda_kv_write(struct backend *b, struct kv_pages *kv, const struct paged_layout *layout,
                   struct tensor *k, const struct tensor *v, const struct rotation *rope)
{
    struct paged_params p = params_of(kv, layout);
    struct write_params w = {};
    const dim3 grid((unsigned)layout->n_tokens), block(128);
    cudaStream_t stream = cuda_state_of(b)->stream;

    w.k_stride = k->row_stride;
    w.v_stride = v->row_stride;
    if (rope) {
        w.q = rope->q->data;
        w.q_stride = rope->q->row_stride;
        w.n_heads = (int)(tensor_n_cols(rope->q) / kv->head_dim);
        w.cos_table = rope->cos;
        w.sin_table = rope->sin;
    }
    if (kv->dtype == DTYPE_I8)
        WITH_TYPE(k->dtype, T,
                  LAUNCH(kv_encode_kernel<T>, grid, block, 0, stream, (T *)k->data,
                         (const T *)v->data, w, p));
    else
        WITH_TYPE(k->dtype, T,
                  WITH_TYPE(kv->dtype, KV,
                            LAUNCH((kv_write_kernel<T, KV>), grid, block, 0, stream, (T *)k->data,
                                   (const T *)v->data, w, p)));
}

#define PAIRS_MAX 256

struct page_pairs {
    int32_t src[PAIRS_MAX], dst[PAIRS_MAX];
};

/* Grid (pair, part of the page); pages are whole multiples of 16 bytes. */
__global__ void copy_pages_kernel(uint4 *k, uint4 *v, const struct page_pairs pairs,
                                  int64_t n_vectors)
{
    int64_t from = pairs.src[blockIdx.x] * n_vectors, to = pairs.dst[blockIdx.x] * n_vectors;

    for (int64_t i = (int64_t)blockIdx.y * blockDim.x + threadIdx.x; i < n_vectors;
         i += (int64_t)gridDim.y * blockDim.x) {
        k[to + i] = k[from + i];
        v[to + i] = v[from + i];
    }
}

/* src and dst are host arrays: they travel with the launch. */
void cuda_copy_pages(struct backend *b, struct kv_pages *kv, const int32_t *src, const int32_t *dst,
                     int32_t n)
{
    size_t n_bytes = (size_t)kv->n_kv_heads * kv_head_bytes(kv->head_dim, kv->page_size, kv->dtype);

    for (int32_t first = 0; first < n; first += PAIRS_MAX) {
        struct page_pairs pairs = {};
        int32_t n_pairs = n - first < PAIRS_MAX ? n - first : PAIRS_MAX;
        memcpy(pairs.src, src + first, (size_t)n_pairs * sizeof(*src));
        memcpy(pairs.dst, dst + first, (size_t)n_pairs * sizeof(*dst));
        LAUNCH(copy_pages_kernel, dim3((unsigned)n_pairs, 8), dim3(128), 0,
               cuda_state_of(b)->stream, (uint4 *)kv->k, (uint4 *)kv->v, pairs,
               (int64_t)(n_bytes / sizeof(uint4)));
    }
}
