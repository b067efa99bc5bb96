/*
 * The best logits of a row and its sums, so that a row of a whole vocabulary need not go to the
 * host for a token to be drawn from it (op_top_k).
 *
 * One block a row, so a row's result depends on no other row. Selection: a logit and its id make
 * one 64-bit key, no two alike; the k-th largest is found digit by digit from the top (radix
 * select: a histogram of one byte of the keys that share the digits found so far), what is not
 * smaller is collected, and the few are sorted by counting. Sums are float64, a thread's own in
 * order, then a tree over the block.
 */
#include "kernels/cuda_internal.h"

#define TOP_THREADS 512
#define DIGITS 256

struct top_params {
    const float *logits; // [n_parts, n_rows, part]
    const float *temperature;
    struct top_k *out;
    int n_rows, part, vocab;
};

__device__ __forceinline__ float logit_at(const struct top_params &p, int row, int id)
{
    return p.logits[((int64_t)(id / p.part) * p.n_rows + row) * p.part + id % p.part];
}

/* Larger for a larger logit, then for a lower id; -0 and 0 are one value. */
__device__ __forceinline__ uint64_t key_of(float x, int id)
{
    uint32_t bits = __float_as_uint(x + 0.0f);

    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)id);
}

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

/* The smallest key of the n_wanted largest, of more. */
__device__ __forceinline__ uint64_t select_key(const struct top_params &p, int row, int n_wanted,
                                               unsigned *histogram, uint64_t *found)
{
    uint64_t prefix = 0, mask = 0;
    int left = n_wanted;

    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < DIGITS; i += TOP_THREADS)
            histogram[i] = 0;
        __syncthreads();
        for (int id = threadIdx.x; id < p.vocab; id += TOP_THREADS) {
            uint64_t key = key_of(logit_at(p, row, id), id);
            if ((key & mask) == prefix)
                atomicAdd(&histogram[key >> shift & (DIGITS - 1)], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = DIGITS - 1, n = left;
            while (n > (int)histogram[digit])
                n -= (int)histogram[digit--];
            found[0] = (uint64_t)digit;
            found[1] = (uint64_t)n;
        }
        __syncthreads();
        int digit = (int)found[0], all = (int)histogram[digit];
        left = (int)found[1];
        prefix |= (uint64_t)digit << shift;
        mask |= (uint64_t)(DIGITS - 1) << shift;
        __syncthreads();
        if (all == left)
            break;
    }
    return prefix;
}

__global__ void __launch_bounds__(TOP_THREADS) top_k_kernel(const struct top_params p)
{
    CUDA_SHARED(double, sums, TOP_THREADS);
    CUDA_SHARED(unsigned, histogram, DIGITS);
    CUDA_SHARED(uint64_t, keys, TOP_K);
    CUDA_SHARED(uint64_t, found, 2);
    CUDA_SHARED(unsigned, n_collected, 1);
    int row = (int)blockIdx.x, n = p.vocab < TOP_K ? p.vocab : TOP_K;
    struct top_k *out = p.out + row;
    int n_bad = 0;

    for (int id = threadIdx.x; id < p.vocab; id += TOP_THREADS)
        n_bad += !isfinite(logit_at(p, row, id));
    if (block_sum_f64(n_bad, sums) > 0) { // nothing else is asked of such a row
        if (threadIdx.x == 0) {
            out->n = 0;
            out->finite = 0;
        }
        return;
    }
    uint64_t least = p.vocab <= TOP_K ? 0 : select_key(p, row, n, histogram, found);
    if (threadIdx.x == 0)
        *n_collected = 0;
    __syncthreads();
    for (int id = threadIdx.x; id < p.vocab; id += TOP_THREADS) {
        uint64_t key = key_of(logit_at(p, row, id), id);
        if (key >= least)
            keys[atomicAdd(n_collected, 1u)] = key;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += TOP_THREADS) {
        int place = 0, id = (int)(0xffffffffu - (uint32_t)keys[i]);
        for (int j = 0; j < n; j++)
            place += keys[j] > keys[i];
        out->values[place] = logit_at(p, row, id);
        out->ids[place] = id;
        if (place == 0)
            found[0] = keys[i];
    }
    __syncthreads();
    float largest = logit_at(p, row, (int)(0xffffffffu - (uint32_t)found[0]));
    float temperature = p.temperature[row];
    double sum = 0, weights = 0;
    for (int id = threadIdx.x; id < p.vocab; id += TOP_THREADS) {
        float x = logit_at(p, row, id);
        double e = exp((double)x - (double)largest);
        sum += e;
        weights += temperature == 1.0f
                       ? e
                       : exp((double)(x / temperature) - (double)(largest / temperature));
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
    struct top_params p = {logits, temperature, out, n_rows, part, vocab};

    (void)n_parts;
    LAUNCH(top_k_kernel, dim3((unsigned)n_rows), dim3(TOP_THREADS), 0, cuda_state_of(b)->stream, p);
}
