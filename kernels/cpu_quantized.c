/*
 * Quantised weights on the CPU: how they are packed, which part of one is expanded to floats or
 * multiplied, and rows of one as floats.
 *
 *     block of 16 outputs | scales     | group | 16 outputs   float32
 *                         | zeros      | group | 16 outputs   int8, where the format has them
 *                         | codes lane | unit of 4 or 8 k     64 bytes (kernels/cpu_isa.h)
 *
 * A block lies together, so that a product reads one stream. A lane's columns are padded to whole
 * units. A group that a lane or a shard cuts serves both sides: scales are found by column, not by
 * lane. Where groups do not begin at whole units, or columns are in no order (GPTQ's g_idx), each
 * column carries its group's number.
 */
#include <string.h>

#include "kernels/cpu_backend.h"
#include "kernels/log.h"

static int64_t round_up(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit * unit;
}

void cpu_quantized_layout(struct cpu_quantized_layout *at, const struct linear *l)
{
    at->unit = UNIT_BYTES / 2 / weight_format_bits(l->format);
    at->zeros = (size_t)l->n_groups * 16 * sizeof(float);
    at->codes = at->zeros + (size_t)(l->has_zeros ? round_up(l->n_groups * 16, 64) : 0);
    at->lane_unit[0] = 0;
    at->lanes_are_whole = 1;
    for (int i = 0; i < l->n_lanes; i++) {
        int64_t n_k = l->lane_start[i + 1] - l->lane_start[i];
        at->lane_unit[i + 1] = at->lane_unit[i] + (n_k + at->unit - 1) / at->unit;
        at->lanes_are_whole = at->lanes_are_whole && n_k % at->unit == 0;
    }
    at->n_bytes = at->codes + (size_t)at->lane_unit[l->n_lanes] * UNIT_BYTES;
}

/* ---- packing ---- */

/* 1 when every unit of a lane lies in one group, and groups follow each other. */
static int groups_are_regular(const struct linear *l, const struct quantized *q,
                              const struct cpu_quantized_layout *at)
{
    if (q->group_of)
        return 0;
    if (q->group_size >= q->group_phase + q->in_dim)
        return 1;
    int regular = q->group_size % at->unit == 0;
    for (int i = 0; i < l->n_lanes; i++)
        regular = regular && (l->lane_start[i] + q->group_phase) % at->unit == 0;
    return regular;
}

/* [lane | k padded to units]: padding columns take the group of the one before them. */
static int32_t *list_groups(struct backend *b, const struct linear *l, const struct quantized *q,
                            const struct cpu_quantized_layout *at)
{
    const int64_t n = at->lane_unit[l->n_lanes] * at->unit;
    int32_t *of = b->ops->alloc(b, (size_t)n * sizeof(*of) + 1);
    for (int i = 0; i < l->n_lanes; i++) {
        int32_t *to = of + at->lane_unit[i] * at->unit;
        for (int64_t k = l->lane_start[i]; k < l->lane_start[i + 1]; k++)
            *to++ = (int32_t)quantized_group(q, k);
        for (; to < of + at->lane_unit[i + 1] * at->unit; to++)
            *to = to[-1];
    }
    return of;
}

struct pack_job {
    struct linear *l;
    const struct quantized *q;
    struct cpu_quantized_layout at;
};

/* One lane's codes of output `row`, which is column j of its block. */
static void pack_codes(const struct pack_job *job, uint8_t *dst, int64_t row, int lane, int j)
{
    const struct linear *l = job->l;
    const uint8_t *codes = job->q->codes + row * l->in_dim + l->lane_start[lane];
    const int is_4_bit = weight_format_bits(l->format) == 4;
    const int is_integer = l->format == WEIGHT_INT8 || l->format == WEIGHT_INT8_127;
    const int64_t n_k = l->lane_start[lane + 1] - l->lane_start[lane];
    uint8_t *word = dst + job->at.lane_unit[lane] * UNIT_BYTES + (j % 8) * 8;
    const int unit = is_4_bit ? 8 : 4, half = j / 8;
    for (int64_t k = 0; k < n_k; k += unit, word += UNIT_BYTES) {
        for (int i = 0; i < unit && k + i < n_k; i++) {
            if (is_4_bit)
                word[i % 2 * 4 + i / 2] |= (uint8_t)(codes[k + i] << half * 4);
            else
                word[i % 2 * 4 + i / 2 * 2 + half] =
                    is_integer ? codes[k + i] ^ 0x80 : codes[k + i];
        }
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
    cpu_quantized_layout(&job.at, l);
    l->group_of = groups_are_regular(l, q, &job.at) ? NULL : list_groups(b, l, q, &job.at);
    l->packed_bytes = (size_t)((l->out_dim + 15) / 16) * job.at.n_bytes;
    l->packed = b->ops->alloc(b, l->packed_bytes);
    cpu_parallel(b, l->out_dim * l->in_dim, pack_work, &job);
    cpu_linear_pack_bias(b, l, bias);
}

/* ---- products ---- */

/* Columns of `lane` from `first` on that share one group's scales, at most n_k. */
static int64_t run_length(const struct linear *l, int lane, int64_t first, int64_t n_k,
                          int64_t *group)
{
    int64_t k = l->lane_start[lane] + first + l->group_phase;
    *group = k / l->group_size;
    int64_t left = (*group + 1) * l->group_size - k;
    return left < n_k ? left : n_k;
}

/* The n_k columns of one block's lane from `first` on, all of `group` where l has no list. */
static struct expansion expansion_of(const struct linear *l, const struct cpu_quantized_layout *at,
                                     int64_t block, int lane, int64_t first, int64_t n_k,
                                     int64_t group)
{
    const uint8_t *from = (const uint8_t *)l->packed + (size_t)block * at->n_bytes;
    const int64_t unit = at->lane_unit[lane] + first / at->unit;
    return (struct expansion){
        .codes = from + at->codes + unit * UNIT_BYTES,
        .scales = (const float *)(const void *)from + group * 16,
        .zeros = l->has_zeros ? (const int8_t *)from + at->zeros + group * 16 : NULL,
        .table = weight_format_table(l->format, l->has_zeros),
        .group_of = l->group_of ? l->group_of + unit * at->unit : NULL,
        .n_k = n_k,
    };
}

void cpu_expand(const struct cpu_state *s, const struct linear *l,
                const struct cpu_quantized_layout *at, void *dst, size_t dst_block, int64_t block,
                int n_blocks, int lane, int64_t first, int64_t n_k)
{
    const size_t row_bytes = 16 * dtype_size(l->dtype);
    for (int i = 0; i < n_blocks; i++) {
        char *to = (char *)dst + (size_t)i * dst_block;
        for (int64_t k = 0, n; k < n_k; k += n) {
            int64_t group = 0;
            n = l->group_of ? n_k : run_length(l, lane, first + k, n_k - k, &group);
            struct expansion e = expansion_of(l, at, block + i, lane, first + k, n, group);
            s->expand->run(to + (size_t)k * row_bytes, &e, l->format, l->dtype);
        }
    }
}

int cpu_quantized_multiplies(const struct cpu_state *s, const struct linear *l,
                             const struct cpu_quantized_layout *at, int64_t n_rows)
{
    return s->expand->multiply && l->dtype == DTYPE_BF16 && n_rows <= PRODUCT_ROWS_MAX &&
           !l->group_of && at->lanes_are_whole;
}

void cpu_quantized_multiply(const struct cpu_state *s, const struct linear *l,
                            const struct cpu_quantized_layout *at, const struct tile *t, int n_rows,
                            int64_t block, int n_blocks, int lane)
{
    const int64_t n_k = l->lane_start[lane + 1] - l->lane_start[lane];
    for (int r = 0; r < n_rows; r++)
        memset(t->c + r * t->c_row, 0, (size_t)n_blocks * 16 * sizeof(float));
    for (int i = 0; i < n_blocks; i += 2) {
        struct expand_product m = {.c = t->c + i * 16,
                                   .c_row = t->c_row,
                                   .a_step = t->a_step,
                                   .n_rows = n_rows,
                                   .n_blocks = n_blocks - i < 2 ? 1 : 2,
                                   .e_block = (int64_t)at->n_bytes};
        for (int64_t k = 0, n; k < n_k; k += n) {
            int64_t group;
            n = run_length(l, lane, k, n_k - k, &group);
            struct expansion e = expansion_of(l, at, block + i, lane, k, n, group);
            m.a = (const uint32_t *)t->a + k / 2 * t->a_step;
            s->expand->multiply(&m, &e, l->format);
        }
    }
}

/* ---- rows ---- */

#define COLUMNS_TOGETHER 256 // expanded on the stack, sixteen outputs of them

struct embed_job {
    const struct cpu_state *state;
    struct tensor *y;
    const struct linear *table;
    struct cpu_quantized_layout at;
    const int32_t *ids;
    int32_t first_row;
};

/* Of each block of sixteen rows only one is wanted: what is thrown away is little beside the layers
 * that a token passes. */
static void embed_row(const struct embed_job *job, int64_t i)
{
    float expanded[COLUMNS_TOGETHER * 16] __attribute__((aligned(64)));
    const struct linear *l = job->table;
    const int64_t row = (int64_t)job->ids[i] - job->first_row, j = row % 16;
    const uint16_t *pairs = (const uint16_t *)(const void *)expanded; // [k / 2, 16 outputs, 2]
    float *y = cpu_row(job->y, i);
    if (row < 0 || row >= l->out_dim) {
        memset(y, 0, (size_t)l->in_dim * sizeof(float));
        return;
    }
    for (int64_t first = 0, n; first < l->in_dim; first += n) {
        n = l->in_dim - first < COLUMNS_TOGETHER ? l->in_dim - first : COLUMNS_TOGETHER;
        cpu_expand(job->state, l, &job->at, expanded, sizeof(expanded), row / 16, 1, 0, first, n);
        for (int64_t k = 0; k < n; k++)
            y[first + k] = l->dtype == DTYPE_F32 ? expanded[k * 16 + j]
                                                 : bf16_to_f32(pairs[k / 2 * 32 + j * 2 + k % 2]);
    }
}

static void embed_work(void *arg, int thread, int n_threads)
{
    const struct embed_job *job = arg;
    int64_t first, end;
    cpu_share(tensor_n_rows(job->y), thread, n_threads, &first, &end);
    for (int64_t i = first; i < end; i++)
        embed_row(job, i);
}

void cpu_embed_quantized(struct backend *b, struct tensor *y, const struct linear *table,
                         const int32_t *ids, int32_t first_row)
{
    struct embed_job job = {
        .state = cpu_state(b), .y = y, .table = table, .ids = ids, .first_row = first_row};
    cpu_quantized_layout(&job.at, table);
    cpu_parallel(b, tensor_n_elements(y) * 16, embed_work, &job);
}
