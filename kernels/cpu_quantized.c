/*
 * Quantised weights on the CPU: how they are packed, and which part of one is expanded to floats.
 *
 *     block of 16 outputs | scales     | group | 16 outputs   float32
 *                         | zeros      | group | 16 outputs   int8, where the format has them
 *                         | codes lane | k     | 16 outputs   8 bits, or two k in a byte
 *
 * A block lies together, so that a product reads one stream. A lane's columns are padded to whole
 * pairs, as in the dense bfloat16 layout. A group that a lane or a shard cuts serves both sides:
 * scales are found by column, not by lane. Where groups do not begin at whole pairs, or columns
 * are in no order (GPTQ's g_idx), each column carries its group's number.
 */
#include <string.h>

#include "kernels/cpu_backend.h"
#include "kernels/log.h"

static int64_t round_up(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit * unit;
}

/* Where things lie in a packed block, in bytes. */
struct block_layout {
    size_t zeros, codes, n_bytes;
    int64_t lane_pair[LANES_MAX + 1]; // first pair of each lane
    int pair_bytes;                   // of 16 columns
};

static void block_layout_init(struct block_layout *at, const struct linear *l)
{
    at->pair_bytes = weight_format_bits(l->format) * 4;
    at->zeros = (size_t)l->n_groups * 16 * sizeof(float);
    at->codes = at->zeros + (size_t)(l->has_zeros ? round_up(l->n_groups * 16, 64) : 0);
    at->lane_pair[0] = 0;
    for (int i = 0; i < l->n_lanes; i++) {
        int64_t n_k = l->lane_start[i + 1] - l->lane_start[i];
        at->lane_pair[i + 1] = at->lane_pair[i] + (n_k + 1) / 2;
    }
    at->n_bytes = at->codes + (size_t)round_up(at->lane_pair[l->n_lanes] * at->pair_bytes, 64);
}

/* ---- packing ---- */

/* 1 when every pair of a lane lies in one group, and groups follow each other. */
static int groups_are_regular(const struct linear *l, const struct quantized *q)
{
    if (q->group_of)
        return 0;
    if (q->group_size >= q->group_phase + q->in_dim)
        return 1;
    int regular = q->group_size % 2 == 0;
    for (int i = 0; i < l->n_lanes; i++)
        regular = regular && (l->lane_start[i] + q->group_phase) % 2 == 0;
    return regular;
}

/* [lane | k padded to pairs]: a padding column takes the group of the one before it. */
static int32_t *list_groups(struct backend *b, const struct linear *l, const struct quantized *q,
                            const struct block_layout *at)
{
    int32_t *of = b->ops->alloc(b, (size_t)at->lane_pair[l->n_lanes] * 2 * sizeof(*of) + 1);
    for (int i = 0; i < l->n_lanes; i++) {
        for (int64_t k = l->lane_start[i]; k < l->lane_start[i + 1]; k++)
            of[at->lane_pair[i] * 2 + k - l->lane_start[i]] = (int32_t)quantized_group(q, k);
        if ((l->lane_start[i + 1] - l->lane_start[i]) % 2)
            of[at->lane_pair[i + 1] * 2 - 1] = of[at->lane_pair[i + 1] * 2 - 2];
    }
    return of;
}

struct pack_job {
    struct linear *l;
    const struct quantized *q;
    struct block_layout at;
};

/* One lane's codes of output `row`, which is column j of its block. */
static void pack_codes(const struct pack_job *job, uint8_t *dst, int64_t row, int lane, int j)
{
    const struct linear *l = job->l;
    const uint8_t *codes = job->q->codes + row * l->in_dim;
    const int is_4_bit = weight_format_bits(l->format) == 4;
    uint8_t *lane_codes = dst + job->at.lane_pair[lane] * job->at.pair_bytes;
    const int64_t start = l->lane_start[lane], n_k = l->lane_start[lane + 1] - start;
    for (int64_t k = 0; k < n_k; k++) {
        uint8_t code = codes[start + k];
        if (is_4_bit)
            lane_codes[k / 2 * 16 + j] |= (uint8_t)(k % 2 ? code << 4 : code);
        else
            lane_codes[k * 16 + j] = code;
    }
}

static void pack_work(void *arg, int thread, int n_threads)
{
    const struct pack_job *job = arg;
    const struct linear *l = job->l;
    const struct quantized *q = job->q;
    int64_t first, end;
    cpu_share((l->out_dim + 15) / 16, thread, n_threads, &first, &end);
    for (int64_t row = first * 16; row < end * 16 && row < l->out_dim; row++) {
        uint8_t *block = (uint8_t *)l->packed + (size_t)(row / 16) * job->at.n_bytes;
        int j = (int)(row % 16);
        for (int64_t g = 0; g < l->n_groups; g++) {
            memcpy(block + (size_t)(g * 16 + j) * sizeof(float), q->scales + row * l->n_groups + g,
                   sizeof(float));
            if (l->has_zeros)
                block[job->at.zeros + (size_t)(g * 16 + j)] =
                    (uint8_t)q->zeros[row * l->n_groups + g];
        }
        for (int lane = 0; lane < l->n_lanes; lane++)
            pack_codes(job, block + job->at.codes, row, lane, j);
    }
}

void cpu_linear_pack_quantized(struct backend *b, struct linear *l, const struct quantized *q,
                               const struct tensor *bias)
{
    struct pack_job job = {.l = l, .q = q};
    l->format = q->format;
    l->n_groups = q->n_groups;
    l->group_size = q->group_size;
    l->group_phase = q->group_phase;
    l->has_zeros = q->zeros != NULL;
    block_layout_init(&job.at, l);
    l->group_of = groups_are_regular(l, q) ? NULL : list_groups(b, l, q, &job.at);
    l->packed_bytes = (size_t)((l->out_dim + 15) / 16) * job.at.n_bytes;
    l->packed = b->ops->alloc(b, l->packed_bytes);
    cpu_parallel(b, l->out_dim * l->in_dim, pack_work, &job);
    cpu_linear_pack_bias(b, l, bias);
}

/* ---- expanding ---- */

/* Columns of `lane` from `first` on that share one group's scales, at most n_k. */
static int64_t run_length(const struct linear *l, int lane, int64_t first, int64_t n_k,
                          int64_t *group)
{
    int64_t k = l->lane_start[lane] + first + l->group_phase;
    *group = k / l->group_size;
    int64_t left = (*group + 1) * l->group_size - k;
    return left < n_k ? left : n_k;
}

void cpu_expand(const struct cpu_state *s, const struct linear *l, void *dst, size_t dst_block,
                int64_t block, int n_blocks, int lane, int64_t first, int64_t n_k)
{
    const float *table = weight_format_table(l->format, l->has_zeros);
    const size_t row_bytes = 16 * dtype_size(l->dtype);
    struct block_layout at;
    block_layout_init(&at, l);
    for (int i = 0; i < n_blocks; i++) {
        const uint8_t *from = (const uint8_t *)l->packed + (size_t)(block + i) * at.n_bytes;
        const uint8_t *codes = from + at.codes;
        char *to = (char *)dst + (size_t)i * dst_block;
        for (int64_t k = 0, n; k < n_k; k += n) {
            int64_t group = 0, pair = at.lane_pair[lane] + (first + k) / 2;
            n = l->group_of ? n_k : run_length(l, lane, first + k, n_k - k, &group);
            struct expansion e = {
                .codes = codes + pair * at.pair_bytes,
                .scales = (const float *)(const void *)from + group * 16,
                .zeros = l->has_zeros ? (const int8_t *)from + at.zeros + group * 16 : NULL,
                .table = table,
                .group_of = l->group_of ? l->group_of + pair * 2 : NULL,
                .n_k = n};
            s->expand->run(to + (size_t)k * row_bytes, &e, l->format, l->dtype);
        }
    }
}
