/*
 * Quantised weights on the CPU: how they are packed, which part of one is expanded to floats or
 * multiplied, and rows of one as floats.
 *
 *     strip | codes lane | unit of 4 or 8 k | block        64 bytes (kernels/cpu_isa.h)
 *           | scales     | block | group | 16 outputs      float32
 *           | zeros      | block | group | 16 outputs      int8, where the format has them
 *
 * A strip (some blocks of sixteen outputs, the last may have fewer) lies together,
 * so that a product reads one stream, which may read a little past the codes. A lane's columns are
 * padded to whole units. A group that a lane or a shard cuts serves both sides: scales are found by
 * column, not by lane. Where groups do not begin at whole units, or columns are in no order (GPTQ's
 * g_idx), each column carries its group's number.
 */
#include <string.h>

#include "kernels/cpu_backend.h"
#include "kernels/log.h"

static int64_t round_up(int64_t n, int64_t unit)
{
    return (n + unit - 1) / unit * unit;
}

/* Depends on where the lane lies in the whole weight, not on the shard that has it. */
static int lane_is_regular(const struct linear *l, int lane)
{
    const struct quantized q = {
        .format = l->format, .group_size = l->group_size, .group_phase = l->group_phase};
    return l->group_size > 0 && // or in no order
           quantized_is_regular(&q, l->lane_start[lane], l->lane_start[lane + 1]);
}

void cpu_quantized_layout(struct cpu_quantized_layout *at, const struct cpu_state *s,
                          const struct linear *l)
{
    at->strip = s->multiply ? s->multiply->strip_blocks : 1;
    at->unit = UNIT_BYTES / 2 / weight_format_bits(l->format);
    at->is_factored = l->dtype == DTYPE_BF16 && weight_format_is_factored(l->format);
    at->irregular = 0;
    at->lane_unit[0] = 0;
    for (int i = 0; i < l->n_lanes; i++) {
        int64_t n_k = l->lane_start[i + 1] - l->lane_start[i];
        at->lane_unit[i + 1] = at->lane_unit[i] + (n_k + at->unit - 1) / at->unit;
        at->irregular |= (unsigned)!lane_is_regular(l, i) << i;
    }
    at->codes = (size_t)at->lane_unit[l->n_lanes] * UNIT_BYTES;
    at->scales = (size_t)l->n_groups * 16 * sizeof(float);
    at->zeros = (size_t)(l->has_zeros ? round_up(l->n_groups * 16, 64) : 0);
    at->n_bytes = at->codes + at->scales + at->zeros;
}

/* Where a block's parts begin, in the packed weight, and how far apart its units are. */
struct place {
    size_t codes, scales, zeros, unit_bytes;
};

static struct place place_of(const struct linear *l, const struct cpu_quantized_layout *at,
                             int64_t block)
{
    const size_t n = (size_t)cpu_strip_blocks((l->out_dim + 15) / 16, block, at->strip);
    const size_t in_strip = (size_t)(block % at->strip);
    const size_t strip = ((size_t)block - in_strip) * at->n_bytes;
    return (struct place){
        .codes = strip + in_strip * UNIT_BYTES,
        .scales = strip + n * at->codes + in_strip * at->scales,
        .zeros = strip + n * (at->codes + at->scales) + in_strip * at->zeros,
        .unit_bytes = n * UNIT_BYTES,
    };
}

/* ---- packing ---- */

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
    int64_t first_row; // of the weight, in q
    const struct quantized *q;
    struct cpu_quantized_layout at;
};

/* One lane's codes of q's output `row` to its words, a unit of which is at `dst`. */
static void pack_codes(const struct pack_job *job, uint8_t *dst, size_t unit_bytes, int64_t row,
                       int lane)
{
    const struct linear *l = job->l;
    const uint8_t *codes = job->q->codes + row * l->in_dim + l->lane_start[lane];
    const int is_4_bit = weight_format_bits(l->format) == 4;
    const int is_integer = weight_format_is_integer(l->format);
    const int64_t n_k = l->lane_start[lane + 1] - l->lane_start[lane];
    uint8_t *word = dst + (size_t)job->at.lane_unit[lane] * unit_bytes;
    const int unit = job->at.unit;
    for (int64_t k = 0; k < n_k; k += unit, word += unit_bytes) {
        for (int i = 0; i < unit && k + i < n_k; i++) {
            if (is_4_bit)
                word[i % 2 * 2 + i / 4] |= (uint8_t)(codes[k + i] << i / 2 % 2 * 4);
            else
                word[i % 2 * 2 + i / 2] = is_integer ? codes[k + i] ^ 0x80 : codes[k + i];
        }
    }
}

static void pack_work(void *arg, int thread, int n_threads)
{
    const struct pack_job *job = arg;
    const struct linear *l = job->l;
    const struct quantized *q = job->q;
    int64_t first, end;
    cpu_share((q->out_dim + 15) / 16, thread, n_threads, &first, &end);
    for (int64_t row = first * 16; row < end * 16 && row < q->out_dim; row++) {
        const struct place at = place_of(l, &job->at, (job->first_row + row) / 16);
        uint8_t *packed = l->packed;
        const size_t j = (size_t)(row % 16);
        for (int64_t g = 0; g < l->n_groups; g++) {
            const size_t i = (size_t)g * 16 + j;
            memcpy(packed + at.scales + i * sizeof(float), q->scales + row * l->n_groups + g,
                   sizeof(float));
            if (l->has_zeros)
                packed[at.zeros + i] = (uint8_t)q->zeros[row * l->n_groups + g];
        }
        for (int lane = 0; lane < l->n_lanes; lane++)
            pack_codes(job, packed + at.codes + j * 4, at.unit_bytes, row, lane);
    }
}

/* Memory for a weight as q has parts of it. */
static void begin_weight(struct backend *b, struct linear *l, const struct quantized *q,
                         const struct tensor *bias)
{
    struct cpu_quantized_layout at;
    l->format = q->format;
    l->n_groups = q->n_groups;
    l->group_size = q->group_of ? 0 : q->group_size;
    l->group_phase = q->group_phase;
    l->has_zeros = q->zeros != NULL;
    cpu_quantized_layout(&at, cpu_state(b), l);
    l->group_of = at.irregular ? list_groups(b, l, q, &at) : NULL;
    l->packed_bytes = (size_t)((l->out_dim + 15) / 16) * at.n_bytes;
    l->packed = b->ops->alloc(b, l->packed_bytes);
    cpu_linear_pack_bias(b, l, bias);
}

void cpu_linear_pack_quantized(struct backend *b, struct linear *l, int64_t first,
                               const struct quantized *q, const struct tensor *bias)
{
    struct pack_job job = {.l = l, .first_row = first, .q = q};
    if (first == 0)
        begin_weight(b, l, q, bias);
    cpu_quantized_layout(&job.at, cpu_state(b), l);
    cpu_parallel(b, q->out_dim * l->in_dim, pack_work, &job);
}

/* ---- products ---- */

/* Of the column `first` of a regular lane. */
static int64_t group_at(const struct linear *l, int lane, int64_t first)
{
    return (l->lane_start[lane] + first + l->group_phase) / l->group_size;
}

int64_t cpu_quantized_run(const struct linear *l, int lane, int64_t first, int64_t n_k)
{
    int64_t left = (group_at(l, lane, first) + 1) * l->group_size -
                   (l->lane_start[lane] + first + l->group_phase);
    return left < n_k ? left : n_k;
}

int64_t cpu_quantized_n_runs(const struct linear *l, int lane)
{
    const int64_t n_k = l->lane_start[lane + 1] - l->lane_start[lane];
    return n_k == 0 ? 0 : group_at(l, lane, n_k - 1) - group_at(l, lane, 0) + 1;
}

/* The n_k columns of one block's lane from `first` on, which are of one group where the lane is
 * regular. */
static struct expansion expansion_of(const struct linear *l, const struct cpu_quantized_layout *at,
                                     int64_t block, int lane, int64_t first, int64_t n_k)
{
    const uint8_t *packed = l->packed;
    const struct place place = place_of(l, at, block);
    const int64_t unit = at->lane_unit[lane] + first / at->unit;
    const int is_regular = !(at->irregular >> lane & 1);
    const int64_t group = is_regular ? group_at(l, lane, first) : 0;
    return (struct expansion){
        .codes = packed + place.codes + (size_t)unit * place.unit_bytes,
        .unit_bytes = (int64_t)place.unit_bytes,
        .scales = (const float *)l->packed + place.scales / sizeof(float) + group * 16,
        .zeros = l->has_zeros ? (const int8_t *)packed + place.zeros + group * 16 : NULL,
        .table = weight_format_table(l->format, l->has_zeros),
        .group_of = is_regular ? NULL : l->group_of + unit * at->unit,
        .n_k = n_k,
    };
}

void cpu_expand(const struct cpu_state *s, const struct linear *l,
                const struct cpu_quantized_layout *at, void *dst, size_t dst_block, int64_t block,
                int n_blocks, int lane, int64_t first, int64_t n_k, enum expand_to to)
{
    const size_t row_bytes = 16 * dtype_size(l->dtype);
    /* Multiples without zero points are the same in all groups. */
    const int in_runs = !(at->irregular >> lane & 1) && (to != EXPAND_MULTIPLES || l->has_zeros);
    for (int i = 0; i < n_blocks; i++) {
        char *to_block = (char *)dst + (size_t)i * dst_block;
        for (int64_t k = 0, n; k < n_k; k += n) {
            n = in_runs ? cpu_quantized_run(l, lane, first + k, n_k - k) : n_k;
            struct expansion e = expansion_of(l, at, block + i, lane, first + k, n);
            s->expand->run(to_block + (size_t)k * row_bytes, &e, l->format, to);
        }
    }
}

struct tile_runs cpu_quantized_runs(const struct linear *l, const struct cpu_quantized_layout *at,
                                    int64_t block, int lane)
{
    const int64_t n_k = l->lane_start[lane + 1] - l->lane_start[lane];
    return (struct tile_runs){
        .first = (cpu_quantized_run(l, lane, 0, n_k) + 1) / 2,
        .n = l->group_size / 2,
        .scales = expansion_of(l, at, block, lane, 0, n_k).scales,
        .scale_block = l->n_groups * 16,
        .factor = l->format == WEIGHT_INT8_127 ? INT8_127_FACTOR : 1.0f,
    };
}

/* Each panel decodes the weight again, beside its products; expanding it once takes a time of its
 * own, which more rows share, sooner of formats that take long to decode. */
#define INTEGER_ROWS_MAX 24

int cpu_quantized_multiplies(const struct cpu_state *s, const struct linear *l,
                             const struct cpu_quantized_layout *at, int64_t n_rows,
                             int64_t n_panels)
{
    if (!s->multiply || l->dtype != DTYPE_BF16 || at->irregular)
        return 0;
    switch (l->format) {
    case WEIGHT_NF4:
    case WEIGHT_FP4:
        return n_panels <= s->multiply->table_panels;
    case WEIGHT_FP8:
        return n_panels <= 2;
    default:
        return n_rows <= INTEGER_ROWS_MAX;
    }
}

void cpu_quantized_multiply(const struct cpu_state *s, const struct linear *l,
                            const struct cpu_quantized_layout *at, const struct tile *t,
                            const struct cpu_codes *codes, int n_rows, int64_t block, int n_blocks,
                            int lane, const struct cpu_ahead *ahead)
{
    const int64_t n_k = l->lane_start[lane + 1] - l->lane_start[lane];
    const int64_t n = cpu_strip_blocks((l->out_dim + 15) / 16, block, at->strip);
    struct expansion e = expansion_of(l, at, block, lane, 0, n_k);
    struct expand_product m = {
        .c = t->c,
        .c_row = t->c_row,
        .a = t->a,
        .n_rows = n_rows,
        .n_blocks = n_blocks,
        .first_run = cpu_quantized_run(l, lane, 0, n_k),
        .run = l->group_size,
        .scale_block = l->n_groups * 16,
        .zero_block = (int64_t)at->zeros,
        .strip_bytes = n * (int64_t)at->n_bytes,
        .tail_bytes = n * (int64_t)(at->scales + at->zeros),
        .codes_left = n * ((int64_t)at->codes - at->lane_unit[lane] * UNIT_BYTES),
        .ahead = ahead->own
                     ? NULL
                     : (const char *)l->packed +
                           (block - block % at->strip + n) * (int64_t)at->n_bytes +
                           (ahead->part * (int64_t)at->codes + at->lane_unit[lane] * UNIT_BYTES) *
                               ahead->lines,
        .ahead_step = ahead->lines * UNIT_BYTES,
        .begins = codes ? codes->begins : NULL,
        .a_scales = codes ? codes->scales : NULL,
    };
    if (codes)
        s->integer->multiply(&m, &e, l->format);
    else
        s->multiply->multiply(&m, &e, l->format);
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
        cpu_expand(job->state, l, &job->at, expanded, sizeof(expanded), row / 16, 1, 0, first, n,
                   l->dtype == DTYPE_F32 ? EXPAND_F32 : EXPAND_BF16);
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
    cpu_quantized_layout(&job.at, cpu_state(b), table);
    cpu_parallel(b, tensor_n_elements(y) * 16, embed_work, &job);
}
