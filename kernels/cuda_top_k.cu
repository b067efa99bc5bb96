/*
 * The best logits of a row and its sums, so that a row of a whole vocabulary need not go to the
 * host for a token to be drawn from it (op_top_k).
 *
 * A row is cut into SLICES slices, each a block's, so that a few rows too are read by many
 * multiprocessors; a second kernel makes one of a row's slices. How a row is cut depends on the
 * vocabulary alone and a row's result on no other row. Selection, of a slice and of all slices'
 * best: a logit and its id make one 64-bit key, no two alike; the k-th largest is found digit by
 * digit from the top (radix select: a histogram of one byte of the keys that share the digits found
 * so far), what is not smaller is collected, and the few are sorted by counting. Sums are float64,
 * relative to the largest logit: a thread's own in order, then a tree over the block, then one over
 * the slices.
 */
#include "kernels/cuda_internal.h"

#define TOP_THREADS 256
#define DIGITS 256
#define SLICES 32

/* Of one slice of a row. */
struct top_slice {
    uint64_t keys[TOP_K]; // [n] the largest, in any order
    double sum, weights;  // as in struct top_k, relative to the slice's own largest
    float largest;
    int n, n_bad; // n_bad > 0: logits that are not finite, and nothing else is known
};

struct top_params {
    const float *logits; // [n_parts, n_rows, part]
    const float *temperature;
    struct top_slice *slices; // [n_rows, SLICES]
    struct top_k *out;
    int n_rows, part, vocab;
};

__device__ __forceinline__ float logit_at(const struct top_params &p, int row, int id)
{
    return p.logits[((int64_t)(id / p.part) * p.n_rows + row) * p.part + id % p.part];
}

/* Larger for a larger logit, then for a lower id, and above 0; -0 and 0 are one value. */
__device__ __forceinline__ uint64_t key_of(float x, int id)
{
    uint32_t bits = __float_as_uint(x + 0.0f);

    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)id);
}

__device__ __forceinline__ int id_of(uint64_t key)
{
    return (int)(0xffffffffu - (uint32_t)key);
}

__device__ __forceinline__ float value_of(uint64_t key)
{
    uint32_t bits = (uint32_t)(key >> 32);

    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

/* The keys of a slice, the first of which is id `first`'s. */
struct slice_keys {
    const struct top_params &p;
    int row, first;

    __device__ __forceinline__ uint64_t operator()(int i) const
    {
        return key_of(logit_at(p, row, first + i), first + i);
    }
};

/* The best keys of all slices of a row, 0 where a slice has fewer. */
struct row_keys {
    const struct top_slice *slices; // [SLICES]

    __device__ __forceinline__ uint64_t operator()(int i) const
    {
        const struct top_slice *s = slices + i / TOP_K;

        return i % TOP_K < s->n ? s->keys[i % TOP_K] : 0;
    }
};

/* The sum over the block in a fixed tree, the same on every thread. */
__device__ __forceinline__ double block_sum_f64(double v, double *shared)
{
    shared[threadIdx.x] = v;
    for (int n = TOP_THREADS / 2; n > 0; n /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < n)
            shared[threadIdx.x] += shared[threadIdx.x + n];
    }
    __syncthreads();
    v = shared[0];
    __syncthreads();
    return v;
}

/* The smallest of the n_wanted largest of n keys, n_wanted < n. */
template <class Keys>
__device__ __forceinline__ uint64_t select_key(const Keys &keys, int n, int n_wanted,
                                               unsigned *histogram, int *found)
{
    uint64_t prefix = 0, mask = 0;
    int left = n_wanted;

    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < DIGITS; i += TOP_THREADS)
            histogram[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += TOP_THREADS) {
            uint64_t key = keys(i);
            if ((key & mask) == prefix)
                atomicAdd(&histogram[key >> shift & (DIGITS - 1)], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = DIGITS - 1, rest = left;
            while (rest > (int)histogram[digit])
                rest -= (int)histogram[digit--];
            found[0] = digit;
            found[1] = rest;
        }
        __syncthreads();
        int digit = found[0], all = (int)histogram[digit];
        left = found[1];
        prefix |= (uint64_t)digit << shift;
        mask |= (uint64_t)(DIGITS - 1) << shift;
        __syncthreads();
        if (all == left)
            break;
    }
    return prefix;
}

/* best [n_wanted] <- the largest of n keys, in any order. Returns the largest, to every thread. */
template <class Keys>
__device__ __forceinline__ uint64_t collect_best(uint64_t *best, const Keys &keys, int n,
                                                 int n_wanted)
{
    CUDA_SHARED(unsigned, histogram, DIGITS);
    CUDA_SHARED(int, found, 2);
    CUDA_SHARED(unsigned, n_collected, 1);
    uint64_t least = n <= n_wanted ? 0 : select_key(keys, n, n_wanted, histogram, found);
    uint64_t largest = 0;

    if (threadIdx.x == 0)
        *n_collected = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += TOP_THREADS) {
        uint64_t key = keys(i);
        if (key >= least)
            best[atomicAdd(n_collected, 1u)] = key;
    }
    __syncthreads();
    for (int i = 0; i < n_wanted; i++)
        largest = best[i] > largest ? best[i] : largest;
    return largest;
}

/* Grid (slice, row). */
__global__ void __launch_bounds__(TOP_THREADS) top_slice_kernel(const struct top_params p)
{
    CUDA_SHARED(double, sums, TOP_THREADS);
    CUDA_SHARED(uint64_t, best, TOP_K);
    int row = (int)blockIdx.y, length = (p.vocab + SLICES - 1) / SLICES;
    int first = (int)blockIdx.x * length, left = p.vocab - first;
    int n = left < length ? left : length, n_best = n < TOP_K ? n : TOP_K, n_bad = 0;
    struct top_slice *out = p.slices + (int64_t)row * SLICES + blockIdx.x;

    for (int i = threadIdx.x; i < n; i += TOP_THREADS)
        n_bad += !isfinite(logit_at(p, row, first + i));
    n_bad = (int)block_sum_f64(n_bad, sums);
    if (n <= 0 || n_bad > 0) {
        if (threadIdx.x == 0) {
            out->n = 0;
            out->n_bad = n_bad;
        }
        return;
    }
    float largest = value_of(collect_best(best, slice_keys{p, row, first}, n, n_best));
    float temperature = p.temperature[row];
    double sum = 0, weights = 0;
    for (int i = threadIdx.x; i < n; i += TOP_THREADS) {
        float x = logit_at(p, row, first + i);
        double e = exp((double)x - (double)largest);
        sum += e;
        weights += temperature == 1.0f
                       ? e
                       : exp((double)(x / temperature) - (double)(largest / temperature));
    }
    sum = block_sum_f64(sum, sums);
    weights = block_sum_f64(weights, sums);
    for (int i = threadIdx.x; i < n_best; i += TOP_THREADS)
        out->keys[i] = best[i];
    if (threadIdx.x == 0) {
        out->sum = sum;
        out->weights = weights;
        out->largest = largest;
        out->n = n_best;
        out->n_bad = 0;
    }
}

/* A block a row. */
__global__ void __launch_bounds__(TOP_THREADS) top_row_kernel(const struct top_params p)
{
    CUDA_SHARED(double, sums, TOP_THREADS);
    CUDA_SHARED(uint64_t, best, TOP_K);
    int row = (int)blockIdx.x, n = p.vocab < TOP_K ? p.vocab : TOP_K;
    const struct top_slice *slices = p.slices + (int64_t)row * SLICES;
    const struct top_slice *mine = threadIdx.x < SLICES ? slices + threadIdx.x : NULL;
    struct top_k *out = p.out + row;

    if (block_sum_f64(mine ? mine->n_bad : 0, sums) > 0) { // nothing else is asked of such a row
        if (threadIdx.x == 0) {
            out->n = 0;
            out->finite = 0;
        }
        return;
    }
    float largest = value_of(collect_best(best, row_keys{slices}, SLICES * TOP_K, n));
    float temperature = p.temperature[row];
    for (int i = threadIdx.x; i < n; i += TOP_THREADS) {
        int place = 0;
        for (int j = 0; j < n; j++)
            place += best[j] > best[i];
        out->values[place] = value_of(best[i]);
        out->ids[place] = id_of(best[i]);
    }
    double sum = 0, weights = 0;
    if (mine && mine->n > 0) {
        sum = mine->sum * exp((double)mine->largest - (double)largest);
        weights = mine->weights *
                  exp((double)(mine->largest / temperature) - (double)(largest / temperature));
    }
    sum = block_sum_f64(sum, sums);
    weights = block_sum_f64(weights, sums);
    if (threadIdx.x == 0) {
        out->log_sum = (double)largest + log(sum);
        out->weight_sum = weights;
        out->n = n;
        out->finite = 1;
    }
}

void cuda_top_k(struct backend *b, struct top_k *out, const float *logits, int32_t n_parts,
                int32_t n_rows, int32_t part, int32_t vocab, const float *temperature)
{
    struct cuda_state *s = cuda_state_of(b);
    struct top_params p = {logits, temperature, (struct top_slice *)s->scratch, out, n_rows,
                           part,   vocab};

    (void)n_parts;
    if ((size_t)n_rows * SLICES * sizeof(*p.slices) > s->scratch_bytes)
        BUG("the best of %d rows at once", n_rows);
    LAUNCH(top_slice_kernel, dim3(SLICES, (unsigned)n_rows), dim3(TOP_THREADS), 0, s->stream, p);
    LAUNCH(top_row_kernel, dim3((unsigned)n_rows), dim3(TOP_THREADS), 0, s->stream, p);
}
