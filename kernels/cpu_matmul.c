/*
 * y = residual + scale * act(x W^T + bias) on the CPU: the packed weight, the packed input, and the
 * walk over tiles.
 *
 * A weight is packed once, for one row and for thousands alike:
 *
 *     block of 16 outputs | lane | k            | 16 outputs   float32
 *     block of 16 outputs | lane | pair of k    | 16 outputs | 2   bfloat16
 *
 * Decode streams it from end to end; prefill keeps two blocks in the second-level cache and passes
 * panels of x over them. A lane of odd length is padded with a zero to a whole pair. Each output is
 * one accumulator a lane, running over k in order, and the lanes of an output are added as a binary
 * tree, so no tile shape, thread count or neighbouring row can change its bits.
 *
 * x is packed, rounded to bfloat16 where the weight is bfloat16, as panels of up to TILE_ROWS_MAX
 * rows: [k][rows of the panel] float32, or [pair of k][rows][2] bfloat16 for vdpbf16ps.
 */
#include <string.h>

#include "kernels/cpu_backend.h"
#include "kernels/log.h"

/* Where each lane lies in a packed block or panel; in steps of k (pairs for bfloat16 weights). */
struct steps {
    int64_t n;                    // of all lanes
    int64_t start[LANES_MAX + 1]; // of each lane
    int step;                     // k a step: 1 or 2
};

static void steps_init(struct steps *s, const struct linear *l)
{
    s->step = l->dtype == DTYPE_BF16 ? 2 : 1;
    s->start[0] = 0;
    for (int i = 0; i < l->n_lanes; i++) {
        int64_t n_k = l->lane_start[i + 1] - l->lane_start[i];
        s->start[i + 1] = s->start[i] + (n_k + s->step - 1) / s->step;
    }
    s->n = s->start[l->n_lanes];
}

static int64_t n_blocks_of(int64_t out_dim)
{
    return (out_dim + 15) / 16;
}

/* ---- packing weights ---- */

struct pack_job {
    const struct cpu_vector_ops *vector;
    struct linear *l;
    int64_t first_row; // of the weight, in w
    const struct tensor *w;
    struct steps steps;
};

static float element_f32(const void *row, enum dtype t, int64_t k)
{
    if (t == DTYPE_F32)
        return ((const float *)row)[k];
    uint16_t h = ((const uint16_t *)row)[k];
    return t == DTYPE_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

static uint16_t element_bf16(const void *row, enum dtype t, int64_t k)
{
    if (t == DTYPE_BF16)
        return ((const uint16_t *)row)[k];
    return f32_to_bf16(element_f32(row, t, k));
}

/* A lane that is stored as it is to be packed is words of 4 bytes to transpose: a float32 each, or
 * a pair of bfloat16. Returns 0 where it is not. */
static int pack_words(const struct pack_job *job, void *dst, const void *const *rows, int64_t k0,
                      int64_t k1)
{
    const struct tensor *w = job->w;
    const int64_t per_word = job->steps.step;
    const char *from = (const char *)rows[0] + (size_t)k0 * dtype_size(w->dtype);
    if (w->dtype != job->l->dtype || !rows[15] || (uintptr_t)from % 4 != 0 ||
        (k1 - k0) % per_word != 0 || w->row_stride % per_word != 0)
        return 0;
    job->vector->transpose(dst, 16, (const uint32_t *)(const void *)from, w->row_stride / per_word,
                           16, (k1 - k0) / per_word);
    return 1;
}

/* Columns [k0, k1) of 16 rows (the last block's missing rows are NULL and become 0). */
static void pack_lane_f32(float *dst, const void *const *rows, enum dtype t, int64_t k0, int64_t k1)
{
    for (int j = 0; j < 16; j++) {
        for (int64_t k = k0; k < k1; k++)
            dst[(k - k0) * 16 + j] = rows[j] ? element_f32(rows[j], t, k) : 0.0f;
    }
}

static void pack_lane_bf16(uint16_t *dst, const void *const *rows, enum dtype t, int64_t k0,
                           int64_t k1)
{
    for (int64_t k = k0; k < k1; k += 2, dst += 32) {
        for (int j = 0; j < 16; j++) {
            dst[2 * j] = rows[j] ? element_bf16(rows[j], t, k) : 0;
            dst[2 * j + 1] = rows[j] && k + 1 < k1 ? element_bf16(rows[j], t, k + 1) : 0;
        }
    }
}

static void pack_work(void *arg, int thread, int n_threads)
{
    const struct pack_job *job = arg;
    const struct linear *l = job->l;
    const struct steps *s = &job->steps;
    const size_t element = dtype_size(job->w->dtype);
    const int64_t block_elements = s->n * s->step * 16;
    const int64_t n_rows = tensor_n_rows(job->w);
    int64_t first, end;
    cpu_share(n_blocks_of(n_rows), thread, n_threads, &first, &end);
    for (int64_t block = first; block < end; block++) {
        const void *rows[16] = {0};
        for (int j = 0; j < 16 && block * 16 + j < n_rows; j++)
            rows[j] = (const char *)job->w->data +
                      (size_t)((block * 16 + j) * job->w->row_stride) * element;
        for (int i = 0; i < l->n_lanes; i++) {
            int64_t at =
                (job->first_row / 16 + block) * block_elements + s->start[i] * s->step * 16;
            if (pack_words(job, (char *)l->packed + (size_t)at * dtype_size(l->dtype), rows,
                           l->lane_start[i], l->lane_start[i + 1]))
                continue;
            if (l->dtype == DTYPE_F32)
                pack_lane_f32((float *)l->packed + at, rows, job->w->dtype, l->lane_start[i],
                              l->lane_start[i + 1]);
            else
                pack_lane_bf16((uint16_t *)l->packed + at, rows, job->w->dtype, l->lane_start[i],
                               l->lane_start[i + 1]);
        }
    }
}

void cpu_linear_pack(struct backend *b, struct linear *l, int64_t first, const struct tensor *w,
                     const struct tensor *bias)
{
    struct pack_job job = {.vector = cpu_state(b)->vector, .l = l, .first_row = first, .w = w};
    steps_init(&job.steps, l);
    if (first == 0) {
        size_t block_bytes = (size_t)(job.steps.n * job.steps.step * 16) * dtype_size(l->dtype);
        l->format = WEIGHT_FLOAT;
        l->packed_bytes = (size_t)n_blocks_of(l->out_dim) * block_bytes;
        l->packed = b->ops->alloc(b, l->packed_bytes);
        cpu_linear_pack_bias(b, l, bias);
    }
    cpu_parallel(b, tensor_n_elements(w), pack_work, &job);
}

void cpu_linear_pack_bias(struct backend *b, struct linear *l, const struct tensor *bias)
{
    l->bias = NULL;
    if (bias) {
        l->bias = b->ops->alloc(b, (size_t)l->out_dim * sizeof(float));
        tensor_widen(l->bias, bias->data, bias->dtype, l->out_dim);
    }
}

void cpu_linear_free(struct backend *b, struct linear *l)
{
    b->ops->free(b, l->packed);
    b->ops->free(b, l->bias);
    b->ops->free(b, l->group_of);
    l->packed = NULL;
    l->group_of = NULL;
    l->bias = NULL;
    l->packed_bytes = 0;
}

/* ---- the product ---- */

struct matmul_job {
    const struct cpu_tile_ops *tile;
    const struct cpu_vector_ops *vector;
    struct cpu_state *state;
    struct tensor *y;
    const struct tensor *x;
    const struct linear *l;
    struct epilogue epilogue;
    struct steps steps;
    struct cpu_factor factor; // of x
    int64_t n_rows, n_panels;
    int64_t n_groups;   // of panels, passed over two blocks before the next two are fetched
    int n_blocks_wide;  // blocks of one tile
    uint32_t *packed_x; // NULL: each thread packs its own
    int64_t chunk;      // steps of a quantised weight expanded at a time, with one panel
    struct cpu_quantized_layout quantized; // of a quantised weight
    int multiplies;                        // with a quantised weight that is not expanded
};

/* Some blocks of the weight: dense in memory, or of a quantised one, expanded whole where several
 * panels use them and a chunk at a time where one does. */
struct blocks {
    int64_t first;
    int n;
    size_t block_bytes; // from one block to the next
    const char *dense;  // NULL: expanded as it is used
    char *memory;       // of the thread, for what is expanded
};

/* The rows are cut into panels as even as they come. */
static int64_t panel_start(const struct matmul_job *job, int64_t panel)
{
    return job->n_rows * panel / job->n_panels;
}

/* And the panels into groups. */
static int64_t group_start(const struct matmul_job *job, int64_t group)
{
    return job->n_panels * group / job->n_groups;
}

size_t cpu_matmul_bytes(const struct cpu_tile_ops *tile, int64_t n_rows, int64_t in_dim,
                        enum dtype dtype)
{
    struct cpu_factor f = cpu_factor_of(tile, dtype);
    return (size_t)n_rows * (size_t)(in_dim + LANES_MAX) * 4 * (size_t)f.words / (size_t)f.step;
}

/* Enough for cache-friendly transposition, small enough for the stack. */
#define CHUNK 256

/* n_k <= CHUNK columns of n_rows rows from x, to n_k rounded up to whole steps, at `dst` [step]. */
static void pack_chunk(const struct matmul_job *job, uint32_t *dst, const float *x, int n_rows,
                       int64_t n_k)
{
    uint32_t words[TILE_ROWS_MAX][CHUNK];
    int64_t n_words = cpu_factor_rows(job->vector, &job->factor, words[0], CHUNK, x,
                                      job->x->row_stride, n_rows, n_k);
    job->vector->transpose(dst, n_rows, words[0], CHUNK, n_rows, n_words);
}

/* One thread's part of the columns of every panel. */
static void pack_x(const struct matmul_job *job, uint32_t *packed, int thread, int n_threads)
{
    const struct linear *l = job->l;
    const int words = job->factor.words, step = job->steps.step;
    for (int64_t panel = 0; panel < job->n_panels; panel++) {
        int64_t row = panel_start(job, panel);
        int n_rows = (int)(panel_start(job, panel + 1) - row);
        uint32_t *base = packed + row * job->steps.n * words;
        for (int i = 0; i < l->n_lanes; i++) {
            int64_t n_k = l->lane_start[i + 1] - l->lane_start[i], first, end;
            cpu_share((n_k + CHUNK - 1) / CHUNK, thread, n_threads, &first, &end);
            for (int64_t k = first * CHUNK; k < end * CHUNK && k < n_k; k += CHUNK)
                pack_chunk(job, base + (job->steps.start[i] + k / step) * words * n_rows,
                           cpu_row(job->x, row) + l->lane_start[i] + k, n_rows,
                           n_k - k < CHUNK ? n_k - k : CHUNK);
        }
    }
}

static int is_factored(const struct matmul_job *job, int lane)
{
    return job->quantized.is_factored && !(job->quantized.irregular >> lane & 1);
}

/* What the tile takes of a lane of a quantised weight. */
static enum expand_to expands_to(const struct matmul_job *job, int lane)
{
    if (job->l->dtype == DTYPE_F32)
        return EXPAND_F32;
    return is_factored(job, lane) ? EXPAND_MULTIPLES : EXPAND_BF16;
}

/* The weight of `blocks`, where it is needed as a whole: by several panels, or dense. */
static void blocks_init(struct blocks *blocks, const struct matmul_job *job, int thread,
                        int64_t first, int n)
{
    const struct linear *l = job->l;
    const size_t row_bytes = 16 * dtype_size(l->dtype) * (size_t)job->steps.step;
    *blocks =
        (struct blocks){.first = first, .n = n, .block_bytes = row_bytes * (size_t)job->steps.n};
    if (l->format == WEIGHT_FLOAT) {
        blocks->dense = (const char *)l->packed + (size_t)first * blocks->block_bytes;
        return;
    }
    if (job->multiplies)
        return;
    int64_t n_steps = job->n_panels > 1 ? job->steps.n : job->chunk;
    blocks->memory = cpu_scratch_reserve(&job->state->expanded[thread],
                                         row_bytes * (size_t)(n_steps * job->n_blocks_wide));
    if (job->n_panels == 1) {
        blocks->block_bytes = row_bytes * (size_t)job->chunk;
        return;
    }
    for (int i = 0; i < l->n_lanes; i++)
        cpu_expand(job->state, l, &job->quantized,
                   blocks->memory + row_bytes * (size_t)job->steps.start[i], blocks->block_bytes,
                   first, n, i, 0, l->lane_start[i + 1] - l->lane_start[i], expands_to(job, i));
    blocks->dense = blocks->memory;
}

/* Further than the processor's own prefetch reaches across pages of memory. */
#define PREFETCH_BYTES 2048
#define LINE_BYTES 64 // a step of one block

/* One panel, and the blocks that it is multiplied with. */
struct product {
    const uint32_t *x; // packed
    int64_t panel;
    int n_rows;
    const struct blocks *blocks;
};

/* The blocks after these are fetched while these are used, each during another panel, so that
 * memory and arithmetic are both busy all the time; the last panel fetches what is left. */
static void fetch_ahead(struct tile *t, const struct matmul_job *job, const struct product *p)
{
    const struct blocks *blocks = p->blocks;
    const char *next = (const char *)t->b + (size_t)blocks->n * blocks->block_bytes;
    int64_t last = p->panel == job->n_panels - 1 ? blocks->n - 1 : p->panel;
    t->ahead[0] = t->ahead[1] = t->b;
    t->ahead_step = 0;
    if (blocks->memory || p->panel >= blocks->n)
        return;
    t->ahead[0] = next + (size_t)p->panel * blocks->block_bytes;
    t->ahead[1] = next + (size_t)last * blocks->block_bytes;
    t->ahead_step = LINE_BYTES;
}

/* sums [n_rows, n_blocks * 16] <- columns [first, first + n_k) of a lane; first is of a whole
 * step. */
static void compute_columns(const struct matmul_job *job, const struct product *p, int lane,
                            int64_t first, int64_t n_k, float *sums)
{
    const struct blocks *blocks = p->blocks;
    const int step = job->steps.step, words = job->factor.words;
    const size_t element = dtype_size(job->l->dtype);
    const int64_t start = job->steps.start[lane] + first / step,
                  end = start + (n_k + step - 1) / step;
    struct tile t = {.a_step = p->n_rows,
                     .a_row = 1,
                     .b = blocks->memory,
                     .b_step = step * 16,
                     .b_block = (int64_t)(blocks->block_bytes / element),
                     .prefetch_bytes = blocks->dense ? PREFETCH_BYTES : 0,
                     .c = sums,
                     .c_row = blocks->n * 16};
    for (int64_t at = start; at == start || at < end; at += t.n_k) {
        t.a = p->x + at * p->n_rows * words;
        t.accumulate = at > start;
        t.n_k = end - at;
        if (blocks->dense) {
            t.b = blocks->dense + (size_t)(at * t.b_step) * element;
            fetch_ahead(&t, job, p);
        } else {
            int64_t done = (at - start) * step, left = n_k - done;
            t.n_k = t.n_k < job->chunk ? t.n_k : job->chunk;
            cpu_expand(job->state, job->l, &job->quantized, blocks->memory, blocks->block_bytes,
                       blocks->first, blocks->n, lane, first + done,
                       left < t.n_k * step ? left : t.n_k * step, expands_to(job, lane));
        }
        job->tile->run(&t, p->n_rows, blocks->n, job->factor.source);
        if (t.n_k == 0)
            return;
    }
}

/* sums [n_rows, n_blocks * 16] <- a lane whose runs are summed apart (kernels/quantized.h). */
static void compute_runs(const struct matmul_job *job, const struct product *p, int lane,
                         float *sums)
{
    float run[TILE_FLOATS_MAX] __attribute__((aligned(64)));
    const struct linear *l = job->l;
    const int64_t n_k = l->lane_start[lane + 1] - l->lane_start[lane];
    memset(sums, 0, (size_t)(p->n_rows * p->blocks->n * 16) * sizeof(float));
    for (int64_t first = 0, n; first < n_k; first += n) {
        n = cpu_quantized_run(l, lane, first, n_k - first);
        compute_columns(job, p, lane, first, n, run);
        cpu_quantized_add_run(job->state, l, &job->quantized, sums, run, p->n_rows,
                              p->blocks->first, p->blocks->n, lane, first);
    }
}

/* sums [n_rows, n_blocks * 16] <- one lane. */
static void compute_lane(const struct matmul_job *job, const struct product *p, int lane,
                         float *sums)
{
    const struct linear *l = job->l;
    if (job->multiplies) {
        struct tile t = {.a = p->x + job->steps.start[lane] * p->n_rows,
                         .a_step = p->n_rows,
                         .c = sums,
                         .c_row = p->blocks->n * 16};
        cpu_quantized_multiply(job->state, l, &job->quantized, &t, p->n_rows, p->blocks->first,
                               p->blocks->n, lane);
    } else if (is_factored(job, lane)) {
        compute_runs(job, p, lane, sums);
    } else {
        compute_columns(job, p, lane, 0, l->lane_start[lane + 1] - l->lane_start[lane], sums);
    }
}

/* One panel times `blocks`: lanes, their tree, the epilogue. */
static void compute_tile(const struct matmul_job *job, const uint32_t *packed_x, int64_t panel,
                         const struct blocks *blocks)
{
    const struct linear *l = job->l;
    const int64_t row = panel_start(job, panel), block = blocks->first;
    const int n_rows = (int)(panel_start(job, panel + 1) - row), n_blocks = blocks->n;
    const struct product p = {.x = packed_x + row * job->steps.n * job->factor.words,
                              .panel = panel,
                              .n_rows = n_rows,
                              .blocks = blocks};
    float sums[4][TILE_FLOATS_MAX] __attribute__((aligned(64)));
    int depth = 0;
    for (int r = 0; r < n_rows; r++) // y's lines come while the tile is computed
        for (int i = 0; i < n_blocks; i++)
            __builtin_prefetch(cpu_row(job->y, row + r) + (block + i) * 16, 1);
    for (int i = 0; i < l->n_lanes; i++) {
        compute_lane(job, &p, i, sums[depth]);
        depth++;
        for (int carry = i; carry & 1; carry >>= 1, depth--)
            job->vector->add(sums[depth - 2], sums[depth - 1], n_rows * n_blocks * 16);
    }
    const struct epilogue *e = &job->epilogue;
    const int64_t column = block * 16;
    int64_t n = l->out_dim - column < n_blocks * 16 ? l->out_dim - column : n_blocks * 16;
    for (int r = 0; r < n_rows; r++)
        job->vector->epilogue(cpu_row(job->y, row + r) + column, sums[0] + r * n_blocks * 16, n,
                              l->bias ? l->bias + column : NULL, e->act,
                              e->scale ? e->scale + column : NULL,
                              e->residual ? cpu_row(e->residual, row + r) + column : NULL);
}

/* The items are (group of panels, block): with one group, a thread's part of them is a contiguous
 * part of the weight. */
static void matmul_work(void *arg, int thread, int n_threads)
{
    const struct matmul_job *job = arg;
    const uint32_t *packed_x = job->packed_x;
    if (packed_x) {
        pack_x(job, job->packed_x, thread, n_threads);
        if (n_threads > 1)
            cpu_team_barrier(job->state->team);
    } else {
        size_t words = (size_t)(job->n_rows * job->steps.n) * (size_t)job->factor.words;
        uint32_t *own = cpu_scratch_reserve(&job->state->thread[thread], words * 4);
        pack_x(job, own, 0, 1);
        packed_x = own;
    }
    const int64_t n_blocks = n_blocks_of(job->l->out_dim);
    int64_t at, end;
    while (cpu_parts_take(job->state, thread, job->n_blocks_wide, &at, &end)) {
        while (at < end) {
            int64_t group = at / n_blocks, block = at % n_blocks, n = end - at;
            if (n > n_blocks - block)
                n = n_blocks - block;
            struct blocks blocks;
            blocks_init(&blocks, job, thread, block, (int)n);
            for (int64_t p = group_start(job, group); p < group_start(job, group + 1); p++)
                compute_tile(job, packed_x, p, &blocks);
            at += n;
        }
    }
}

/* Input this small is packed by every thread for itself, which is cheaper than a barrier. */
#define OWN_PACK_WORDS 16384
/* Panels that stay in the second-level cache beside two blocks of the weight: well below a cache of
 * 1 MiB, whose pages collide (of 512 KiB, a quarter of the rate was lost with two threads). */
#define GROUP_BYTES (192 << 10)
#define GROUP_PANELS_MIN 8
/* Bytes a block of a quantised weight that is expanded for one panel: four stay in the first-level
 * cache. A whole number of units of any format. */
#define CHUNK_BYTES 4096

void cpu_matmul(struct backend *b, struct tensor *y, const struct tensor *x, const struct linear *l,
                const struct epilogue *e)
{
    struct cpu_state *s = cpu_state(b);
    struct matmul_job job = {.tile = s->tile, .vector = s->vector, .state = s, .y = y, .x = x};
    job.l = l;
    if (e)
        job.epilogue = *e;
    steps_init(&job.steps, l);
    job.factor = cpu_factor_of(s->tile, l->dtype);
    job.n_rows = tensor_n_rows(x);
    job.n_panels = (job.n_rows + s->tile->max_rows - 1) / s->tile->max_rows;
    int panel_rows = (int)((job.n_rows + job.n_panels - 1) / job.n_panels);
    job.n_blocks_wide = s->tile->wide_blocks(panel_rows);
    if (l->format != WEIGHT_FLOAT) {
        cpu_quantized_layout(&job.quantized, l);
        job.multiplies = cpu_quantized_multiplies(s, l, &job.quantized, job.n_rows);
        if (job.multiplies)
            job.n_blocks_wide = s->expand->product_blocks((int)job.n_rows);
    }
    job.chunk = CHUNK_BYTES / (16 * job.steps.step * (int64_t)dtype_size(l->dtype));
    int64_t words = job.steps.n * job.factor.words;
    int64_t group_panels = GROUP_BYTES / (words * 4 * panel_rows + 1);
    if (group_panels < GROUP_PANELS_MIN)
        group_panels = GROUP_PANELS_MIN;
    job.n_groups = (job.n_panels + group_panels - 1) / group_panels;
    if (job.n_rows * words > OWN_PACK_WORDS)
        job.packed_x = cpu_scratch_reserve(&s->shared, (size_t)(job.n_rows * words) * 4);
    cpu_parts_init(s, job.n_groups * n_blocks_of(l->out_dim));
    cpu_parallel(b, job.n_rows * l->out_dim * l->in_dim, matmul_work, &job);
}
