/*
 * y = residual + scale * act(x W^T + bias) on the CPU, and y = act(gate) * up of [gate, up] =
 * x W^T + bias: the packed weight, the packed input, and the walk over tiles.
 *
 * A weight is packed once, for one row and for thousands alike, in strips of STRIP_BLOCKS blocks of
 * sixteen outputs, of which the last may have fewer:
 *
 *     strip | lane | k            | block | 16 outputs   float32
 *     strip | lane | pair of k    | block | 16 outputs | 2   bfloat16
 *
 * Decode streams it from end to end, all blocks of a strip at once; prefill keeps some strips in
 * the second-level cache and passes all panels of x over them. A lane of odd length is padded with
 * a zero to a whole pair. Each output is one accumulator a lane, running over k in order, and the
 * lanes of an output are added as a binary tree, so no tile shape, thread count or neighbouring row
 * can change its bits.
 *
 * x is packed, rounded to bfloat16 where the weight is bfloat16, as panels of up to TILE_ROWS_MAX
 * rows: [k][rows of the panel] float32, or [pair of k][rows][2] bfloat16 for vdpbf16ps.
 */
#include <string.h>
#include <unistd.h>

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

/* Where a block's first line lies in the packed weight, and how far apart its steps are. */
struct place {
    size_t bytes, step_bytes;
};

static struct place place_of(const struct linear *l, const struct steps *s, int64_t block)
{
    const int64_t in_strip = block % STRIP_BLOCKS;
    const size_t strip = (size_t)((block - in_strip) * s->n) * LINE_BYTES;
    return (struct place){
        .bytes = strip + (size_t)in_strip * LINE_BYTES,
        .step_bytes =
            (size_t)cpu_strip_blocks(n_blocks_of(l->out_dim), block, STRIP_BLOCKS) * LINE_BYTES};
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
static int pack_words(const struct pack_job *job, void *dst, int64_t line, const void *const *rows,
                      int64_t k0, int64_t k1)
{
    const struct tensor *w = job->w;
    const int64_t per_word = job->steps.step;
    const char *from = (const char *)rows[0] + (size_t)k0 * dtype_size(w->dtype);
    if (w->dtype != job->l->dtype || !rows[15] || (uintptr_t)from % 4 != 0 ||
        (k1 - k0) % per_word != 0 || w->row_stride % per_word != 0)
        return 0;
    job->vector->transpose(dst, line, (const uint32_t *)(const void *)from,
                           w->row_stride / per_word, 16, (k1 - k0) / per_word);
    return 1;
}

/* Columns [k0, k1) of 16 rows (the last block's missing rows are NULL and become 0) to a block's
 * lines, `line` words from one to the next. */
static void pack_lane_f32(float *dst, int64_t line, const void *const *rows, enum dtype t,
                          int64_t k0, int64_t k1)
{
    for (int j = 0; j < 16; j++) {
        for (int64_t k = k0; k < k1; k++)
            dst[(k - k0) * line + j] = rows[j] ? element_f32(rows[j], t, k) : 0.0f;
    }
}

static void pack_lane_bf16(uint16_t *dst, int64_t line, const void *const *rows, enum dtype t,
                           int64_t k0, int64_t k1)
{
    for (int64_t k = k0; k < k1; k += 2, dst += 2 * line) {
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
    const int64_t n_rows = tensor_n_rows(job->w);
    int64_t first, end;
    cpu_share(n_blocks_of(n_rows), thread, n_threads, &first, &end);
    for (int64_t block = first; block < end; block++) {
        const void *rows[16] = {0};
        for (int j = 0; j < 16 && block * 16 + j < n_rows; j++)
            rows[j] = (const char *)job->w->data +
                      (size_t)((block * 16 + j) * job->w->row_stride) * element;
        const struct place at = place_of(l, s, job->first_row / 16 + block);
        const int64_t line = (int64_t)(at.step_bytes / 4);
        for (int i = 0; i < l->n_lanes; i++) {
            const int64_t k0 = l->lane_start[i], k1 = l->lane_start[i + 1];
            void *to = (char *)l->packed + at.bytes + (size_t)s->start[i] * at.step_bytes;
            if (pack_words(job, to, line, rows, k0, k1))
                continue;
            if (l->dtype == DTYPE_F32)
                pack_lane_f32(to, line, rows, job->w->dtype, k0, k1);
            else
                pack_lane_bf16(to, line, rows, job->w->dtype, k0, k1);
        }
    }
}

void cpu_linear_pack(struct backend *b, struct linear *l, int64_t first, const struct tensor *w,
                     const struct tensor *bias)
{
    struct pack_job job = {.vector = cpu_state(b)->vector, .l = l, .first_row = first, .w = w};
    steps_init(&job.steps, l);
    if (first == 0) {
        l->format = WEIGHT_FLOAT;
        l->packed_bytes = (size_t)(n_blocks_of(l->out_dim) * job.steps.n) * LINE_BYTES;
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
    int64_t n_columns; // of y
    int n_parts;       // of W whose rows meet in one column of y: 2 for gate and up, else 1
    struct steps steps;
    struct cpu_factor factor; // of x
    int64_t n_rows, n_panels;
    int n_blocks_wide;     // blocks of one tile
    int n_blocks_kept;     // of a part, that all panels pass over before the next are fetched
    uint32_t *packed_x;    // NULL: each thread packs its own
    size_t expanded_bytes; // of what is expanded of a part at a time
    struct cpu_quantized_layout quantized; // of a quantised weight
    int multiplies;                        // with a quantised weight that is not expanded
    int64_t row_words;                     // of a row of packed x
    int64_t run_start[LANES_MAX + 1];      // of products of integers: each lane's first run
};

/* The blocks of the weight that are kept; where it expands, whole or a chunk at a time. */
struct blocks {
    int64_t first;
    int n;
    char *memory;       // for what is expanded
    size_t block_bytes; // there, from one block to the next
};

/* The rows are cut into panels as even as they come. */
static int64_t panel_start(const struct matmul_job *job, int64_t panel)
{
    return job->n_rows * panel / job->n_panels;
}

/* 1 where codes become floats before they are multiplied. */
static int expands(const struct matmul_job *job)
{
    return job->l->format != WEIGHT_FLOAT && !job->multiplies;
}

/* Blocks of a strip of the weight. */
static int strip_of(const struct matmul_job *job)
{
    return job->l->format == WEIGHT_FLOAT ? STRIP_BLOCKS : job->quantized.strip;
}

/* Rows of x, of so many bytes packed, that go through the whole weight before others do: what stays
 * in a third-level cache of 32 MiB while part after part of the weight passes over it. Fewer rows
 * would have the weight read too often. */
#define TOGETHER_BYTES (8448 << 10) // a little more than a tile's 1025 rows of 4096 bfloat16
#define TOGETHER_MIN 512

static int64_t rows_together(int64_t row_bytes)
{
    return larger(TOGETHER_MIN, TOGETHER_BYTES / row_bytes);
}

/* Of one row of x, packed: at most so many. */
static int64_t row_bytes_of(const struct cpu_tile_ops *tile, int64_t in_dim, enum dtype dtype)
{
    struct cpu_factor f = cpu_factor_of(tile->takes_bf16, dtype);
    return (in_dim + LANES_MAX) * 4 * f.words / f.step;
}

size_t cpu_matmul_bytes(const struct cpu_tile_ops *tile, int64_t n_rows, int64_t in_dim,
                        enum dtype dtype)
{
    int64_t row_bytes = row_bytes_of(tile, in_dim, dtype);
    return (size_t)(smaller(n_rows, rows_together(row_bytes)) * row_bytes);
}

/* Enough for cache-friendly transposition, small enough for the stack. */
#define CHUNK 256

/* n_k <= CHUNK columns from `column` on of n_rows rows of x, to n_k rounded up to whole steps, at
 * `dst` [step]. */
static void pack_chunk(const struct matmul_job *job, uint32_t *dst, int64_t row, int64_t column,
                       int n_rows, int64_t n_k)
{
    uint32_t words[TILE_ROWS_MAX][CHUNK];
    const struct tensor *x = job->x;
    const int64_t at = row * x->row_stride + column;
    int64_t n_words;
    if (x->dtype == DTYPE_BF16)
        n_words = cpu_factor_rows_bf16(&job->factor, words[0], CHUNK,
                                       (const uint16_t *)x->data + at, x->row_stride, n_rows, n_k);
    else
        n_words = cpu_factor_rows(job->vector, &job->factor, words[0], CHUNK,
                                  (const float *)x->data + at, x->row_stride, n_rows, n_k);
    job->vector->transpose(dst, n_rows, words[0], CHUNK, n_rows, n_words);
}

/* One panel's chunks, of which a thread packs [first, end). */
static void pack_panel(const struct matmul_job *job, uint32_t *packed, int64_t panel, int64_t first,
                       int64_t end)
{
    const struct linear *l = job->l;
    const int words = job->factor.words, step = job->steps.step;
    const int64_t row = panel_start(job, panel);
    const int n_rows = (int)(panel_start(job, panel + 1) - row);
    uint32_t *base = packed + row * job->row_words;
    int64_t chunk = 0;
    for (int i = 0; i < l->n_lanes; i++) {
        const int64_t n_k = l->lane_start[i + 1] - l->lane_start[i];
        for (int64_t k = 0; k < n_k; k += CHUNK, chunk++) {
            if (chunk >= first && chunk < end)
                pack_chunk(job, base + (job->steps.start[i] + k / step) * words * n_rows, row,
                           l->lane_start[i] + k, n_rows, n_k - k < CHUNK ? n_k - k : CHUNK);
        }
    }
}

/* Where a lane lies in a packed panel of codes: all words, all begins of runs, all scales. */
static struct cpu_codes lane_codes(const struct matmul_job *job, uint32_t *words, int n_rows,
                                   int lane)
{
    const struct linear *l = job->l;
    const int bits = weight_format_bits(l->format);
    uint32_t *begins = words + job->steps.n * job->factor.words * n_rows;
    uint32_t *scales = begins + job->run_start[l->n_lanes] * n_rows;
    return (struct cpu_codes){
        .bits = bits,
        .offset = l->has_zeros ? 1 : 1 << (bits - 1),
        .first_run = cpu_quantized_run(l, lane, 0, l->lane_start[lane + 1] - l->lane_start[lane]),
        .run = l->group_size,
        .n_runs = job->run_start[lane + 1] - job->run_start[lane],
        .words = words + job->steps.start[lane] * job->factor.words * n_rows,
        .begins = (int32_t *)begins + job->run_start[lane] * n_rows,
        .scales = (float *)scales + lane * n_rows,
    };
}

static void pack_codes(const struct matmul_job *job, uint32_t *packed, int64_t panel, int lane)
{
    const struct linear *l = job->l;
    const int64_t row = panel_start(job, panel), column = l->lane_start[lane];
    const int n_rows = (int)(panel_start(job, panel + 1) - row);
    const struct cpu_codes codes = lane_codes(job, packed + row * job->row_words, n_rows, lane);
    cpu_factor_codes(job->state, &codes, job->x, row, column, n_rows,
                     l->lane_start[lane + 1] - column);
}

/* One thread's part of the chunks of all panels, or of their lanes. */
static void pack_x(const struct matmul_job *job, uint32_t *packed, int thread, int n_threads)
{
    const struct linear *l = job->l;
    int64_t n = 0, first, end;
    if (l->x_format == WEIGHT_INT8) {
        cpu_share(l->n_lanes * job->n_panels, thread, n_threads, &first, &end);
        for (int64_t i = first; i < end; i++)
            pack_codes(job, packed, i / l->n_lanes, (int)(i % l->n_lanes));
        return;
    }
    for (int i = 0; i < l->n_lanes; i++)
        n += (l->lane_start[i + 1] - l->lane_start[i] + CHUNK - 1) / CHUNK;
    cpu_share(n * job->n_panels, thread, n_threads, &first, &end);
    for (int64_t panel = first / n; panel * n < end; panel++)
        pack_panel(job, packed, panel, first - panel * n, end - panel * n);
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

/* Steps of a quantised weight that are expanded for one panel: those of four blocks stay in the
 * first-level cache. A whole number of units of any format. */
#define CHUNK_STEPS 64

/* A quantised weight is expanded a few blocks at a time, each whole, where several panels use them
 * or runs are summed apart, which a tile does in one go. */
static int expands_whole(const struct matmul_job *job)
{
    const unsigned all = (1u << job->l->n_lanes) - 1;
    return job->n_panels > 1 || (job->quantized.is_factored && job->quantized.irregular != all);
}

/* Expands a quantised weight's blocks where they are needed whole. */
static void blocks_init(struct blocks *blocks, const struct matmul_job *job, char *memory,
                        int64_t first, int n)
{
    const struct linear *l = job->l;
    *blocks = (struct blocks){.first = first, .n = n, .memory = memory};
    if (!memory)
        return;
    blocks->block_bytes = (size_t)(expands_whole(job) ? job->steps.n : CHUNK_STEPS) * LINE_BYTES;
    for (int i = 0; expands_whole(job) && i < l->n_lanes; i++)
        cpu_expand(job->state, l, &job->quantized, memory + job->steps.start[i] * LINE_BYTES,
                   blocks->block_bytes, first, n, i, 0, l->lane_start[i + 1] - l->lane_start[i],
                   expands_to(job, i));
}

/* One panel, and those of the kept blocks that it is multiplied with. */
struct product {
    uint32_t *x; // packed
    int64_t panel;
    int n_rows;
    const struct blocks *blocks;
    int64_t block; // the first
    int n_blocks;
    struct cpu_ahead ahead;
};

/* Further than the processor's own prefetch reaches across pages of memory. */
#define PREFETCH_BYTES 4096

/* Panels that pass over the blocks of a tile before the next blocks: the blocks come from memory
 * while the first four do, not while one alone waits for them, and the four stay in the
 * second-level cache beside the blocks that are kept. */
#define PANELS_TOGETHER 4

/* The tiles that pass over a strip first fetch the next one, each an equal part from end to end, so
 * that memory and arithmetic are both busy all the time; a tile that is alone, what it will read.
 */
static void set_ahead(struct cpu_ahead *a, const struct matmul_job *job, const struct product *p)
{
    const int n_panels = (int)smaller(job->n_panels, PANELS_TOGETHER), strip = strip_of(job);
    a->own = n_panels == 1 && job->n_blocks_wide >= strip; // a token's: no divisions for it
    a->part = 0;
    a->lines = 0;
    if (a->own || p->panel >= n_panels)
        return;
    const int n = cpu_strip_blocks(n_blocks_of(job->l->out_dim), p->block, strip);
    const int n_parts = (n + p->n_blocks - 1) / p->n_blocks * n_panels;
    const int lines = (n + n_parts - 1) / n_parts;
    a->own = n_parts == 1;
    if (a->own)
        return;
    a->part = (int)(p->block % strip) / p->n_blocks * n_panels + (int)p->panel;
    a->lines = a->part * lines < n ? lines : 0;
}

/* t->c <- a lane of a weight in floats, whose steps begin at `start`. */
static void run_dense(struct tile *t, const struct matmul_job *job, const struct product *p,
                      int64_t start)
{
    const struct linear *l = job->l;
    const size_t element = dtype_size(l->dtype);
    const struct place at = place_of(l, &job->steps, p->block);
    const struct cpu_ahead *ahead = &p->ahead;
    const int64_t next = (p->block / STRIP_BLOCKS + 1) * STRIP_BLOCKS * job->steps.n;
    t->b = (const char *)l->packed + at.bytes + (size_t)start * at.step_bytes;
    t->b_step = (int64_t)(at.step_bytes / element);
    t->b_block = (int64_t)(LINE_BYTES / element);
    t->ahead = (const char *)t->b + PREFETCH_BYTES;
    t->ahead_step = (int)at.step_bytes;
    if (!ahead->own) {
        t->ahead = (const char *)l->packed +
                   (next + (ahead->part * job->steps.n + start) * ahead->lines) * LINE_BYTES;
        t->ahead_step = ahead->lines * LINE_BYTES;
    }
    job->tile->run(t, p->n_rows, p->n_blocks, job->factor.source);
}

/* The same of a quantised weight whose blocks are expanded whole, */
static void run_expanded(struct tile *t, const struct matmul_job *job, const struct product *p,
                         int lane, int64_t start)
{
    const struct blocks *blocks = p->blocks;
    const size_t element = dtype_size(job->l->dtype);
    t->b = blocks->memory + (size_t)(p->block - blocks->first) * blocks->block_bytes +
           start * LINE_BYTES;
    t->b_step = (int64_t)(LINE_BYTES / element);
    t->b_block = (int64_t)(blocks->block_bytes / element);
    struct tile_runs runs;
    if (is_factored(job, lane)) {
        runs = cpu_quantized_runs(job->l, &job->quantized, p->block, lane);
        t->runs = &runs;
    }
    job->tile->run(t, p->n_rows, p->n_blocks, job->factor.source);
}

/* or a chunk of steps at a time. */
static void run_chunks(struct tile *t, const struct matmul_job *job, const struct product *p,
                       int lane)
{
    const struct linear *l = job->l;
    const struct blocks *blocks = p->blocks;
    const int step = job->steps.step;
    const int64_t n_k = l->lane_start[lane + 1] - l->lane_start[lane], n = t->n_k;
    const uint32_t *a = t->a;
    t->b = blocks->memory;
    t->b_step = step * 16;
    t->b_block = (int64_t)(blocks->block_bytes / dtype_size(l->dtype));
    for (int64_t done = 0; done == 0 || done < n; done += CHUNK_STEPS) {
        t->a = a + done * p->n_rows * job->factor.words;
        t->accumulate = done > 0;
        t->n_k = smaller(CHUNK_STEPS, n - done);
        cpu_expand(job->state, l, &job->quantized, blocks->memory, blocks->block_bytes, p->block,
                   p->n_blocks, lane, done * step, smaller(n_k - done * step, t->n_k * step),
                   expands_to(job, lane));
        job->tile->run(t, p->n_rows, p->n_blocks, job->factor.source);
    }
}

/* or multiplied as it is, */
static void run_codes(struct tile *t, const struct matmul_job *job, const struct product *p,
                      int lane, const struct cpu_codes *codes)
{
    cpu_quantized_multiply(job->state, job->l, &job->quantized, t, codes, p->n_rows, p->block,
                           p->n_blocks, lane, &p->ahead);
}

/* with x in codes. */
static void run_integers(struct tile *t, const struct matmul_job *job, const struct product *p,
                         int lane)
{
    const struct cpu_codes codes = lane_codes(job, p->x, p->n_rows, lane);
    run_codes(t, job, p, lane, &codes);
}

/* sums [n_rows, n_blocks * 16] <- one lane. */
static void compute_lane(const struct matmul_job *job, const struct product *p, int lane,
                         float *sums)
{
    const int64_t start = job->steps.start[lane];
    struct tile t = {.a = p->x + start * p->n_rows * job->factor.words,
                     .a_step = p->n_rows,
                     .a_row = 1,
                     .c = sums,
                     .c_row = p->n_blocks * 16,
                     .n_k = job->steps.start[lane + 1] - start};
    if (job->l->format == WEIGHT_FLOAT)
        run_dense(&t, job, p, start);
    else if (job->l->x_format == WEIGHT_INT8)
        run_integers(&t, job, p, lane);
    else if (job->multiplies)
        run_codes(&t, job, p, lane, NULL);
    else if (expands_whole(job))
        run_expanded(&t, job, p, lane, start);
    else
        run_chunks(&t, job, p, lane);
}

/* sums[0] [n_rows, n_blocks * 16] <- all lanes, as their tree. */
static void compute_lanes(const struct matmul_job *job, const struct product *p,
                          float sums[4][TILE_FLOATS_MAX])
{
    int depth = 0;
    for (int i = 0; i < job->l->n_lanes; i++) {
        compute_lane(job, p, i, sums[depth]);
        depth++;
        for (int carry = i; carry & 1; carry >>= 1, depth--)
            job->vector->add(sums[depth - 2], sums[depth - 1], p->n_rows * p->n_blocks * 16);
    }
}

/* What becomes of one panel's sums of the columns from `column` on, which are set later. */
static struct finish finish_of(const struct matmul_job *job, int64_t panel, int64_t column,
                               int64_t n_columns)
{
    const struct tensor *y = job->y;
    const struct epilogue *e = &job->epilogue;
    const size_t element = dtype_size(y->dtype);
    const int64_t row = panel_start(job, panel);
    struct finish f = {.y = cpu_element(y, row, column),
                       .y_row = y->row_stride,
                       .x_row = n_columns,
                       .n_rows = panel_start(job, panel + 1) - row,
                       .n = smaller(job->n_columns - column, n_columns),
                       .bias = job->l->bias ? job->l->bias + column : NULL,
                       .scale = e->scale ? e->scale + column : NULL,
                       .act = e->act,
                       .rounds = y->dtype == DTYPE_BF16};
    if (e->residual) {
        f.residual = cpu_row(e->residual, row) + column;
        f.residual_row = e->residual->row_stride;
    }
    for (int64_t r = 0; r < f.n_rows; r++) // its lines come while the tile is computed
        for (size_t i = 0; i < (size_t)f.n * element; i += LINE_BYTES)
            __builtin_prefetch((char *)f.y + (size_t)(r * f.y_row) * element + i, 1);
    return f;
}

/* One panel times n_blocks of each of the kept parts, from their `first` on. */
static void compute_tile(const struct matmul_job *job, uint32_t *packed_x, int64_t panel,
                         const struct blocks *kept, int64_t first, int n_blocks)
{
    float sums[2][4][TILE_FLOATS_MAX] __attribute__((aligned(64)));
    struct finish f = finish_of(job, panel, (kept->first + first) * 16, n_blocks * 16);
    for (int i = 0; i < job->n_parts; i++) {
        struct product p = {.x = packed_x + panel_start(job, panel) * job->row_words,
                            .panel = panel,
                            .n_rows = (int)f.n_rows,
                            .blocks = &kept[i],
                            .block = kept[i].first + first,
                            .n_blocks = n_blocks};
        set_ahead(&p.ahead, job, &p); // field by field: a copy would wait for stores
        compute_lanes(job, &p, sums[i]);
    }
    f.x = sums[0][0];
    if (job->n_parts == 2) {
        f.up = sums[1][0];
        f.up_bias = f.bias ? f.bias + job->n_columns : NULL;
    }
    job->vector->finish(&f);
}

/* The panels times blocks [first, end) of each part. */
static void compute_blocks(const struct matmul_job *job, uint32_t *packed_x, char *memory,
                           int64_t first, int64_t end)
{
    struct blocks kept[2];
    const int64_t n = end - first;
    for (int i = 0; i < job->n_parts; i++)
        blocks_init(&kept[i], job, memory ? memory + (size_t)i * job->expanded_bytes : NULL,
                    i * n_blocks_of(job->n_columns) + first, (int)n);
    for (int64_t panels = 0; panels < job->n_panels; panels += PANELS_TOGETHER) {
        const int64_t panels_end = smaller(panels + PANELS_TOGETHER, job->n_panels);
        for (int64_t at = 0; at < n; at += job->n_blocks_wide) {
            for (int64_t panel = panels; panel < panels_end; panel++)
                compute_tile(job, packed_x, panel, kept, at,
                             (int)smaller(n - at, job->n_blocks_wide));
        }
    }
}

/* The items are strips: a thread's part of them is a contiguous part of the weight. */
static void matmul_work(void *arg, int thread, int n_threads)
{
    const struct matmul_job *job = arg;
    uint32_t *packed_x = job->packed_x;
    if (packed_x) {
        pack_x(job, job->packed_x, thread, n_threads);
        if (n_threads > 1)
            cpu_team_barrier(job->state->team);
    } else {
        packed_x = cpu_scratch_reserve(&job->state->thread[thread],
                                       (size_t)(job->n_rows * job->row_words) * 4);
        pack_x(job, packed_x, 0, 1);
    }
    char *memory = NULL;
    if (job->expanded_bytes > 0)
        memory = cpu_scratch_reserve(&job->state->expanded[thread],
                                     job->expanded_bytes * (size_t)job->n_parts);
    const int64_t n_blocks = n_blocks_of(job->n_columns), n = strip_of(job);
    int64_t strip, end;
    while (cpu_parts_take(job->state, thread, larger(job->n_blocks_kept / n, 1), &strip, &end)) {
        end = smaller(end * n, n_blocks);
        for (int64_t first = strip * n; first < end; first += job->n_blocks_kept)
            compute_blocks(job, packed_x, memory, first, smaller(first + job->n_blocks_kept, end));
    }
}

/* Input this small is packed by every thread for itself, which is cheaper than a barrier. */
#define OWN_PACK_WORDS 16384
/* More than half of a second-level cache of 1 MiB wins nothing. */
#define KEPT_BYTES_MAX (512 << 10)
#define KEPT_BYTES_MIN (128 << 10)

/* Of the blocks that are kept beside a panel: half of the second-level cache. */
static int64_t kept_bytes(void)
{
    int64_t half = sysconf(_SC_LEVEL2_CACHE_SIZE) / 2; // 0 or less: not known
    return half <= 0 ? KEPT_BYTES_MAX : larger(KEPT_BYTES_MIN, smaller(half, KEPT_BYTES_MAX));
}

/* Fewer wait for memory, which is read without a break while each strip is kept alone. */
#define KEPT_PANELS_MIN 9
/* Of each thread, so that all are busy to the end. */
#define ITEMS_MIN 4

/* Whole strips, or whole tiles of what is expanded. Where all panels pass over a tile's blocks
 * before the next, and nothing is expanded, they are kept by no cache and are only an item:
 * smaller, and more of them. */
static int blocks_kept(const struct matmul_job *job, int n_threads)
{
    const int64_t wide = job->n_blocks_wide;
    const int64_t unit = expands(job) ? wide : larger(wide, strip_of(job));
    int64_t n = n_blocks_of(job->n_columns) / (n_threads * ITEMS_MIN);
    n = smaller(n, kept_bytes() / (job->steps.n * LINE_BYTES * job->n_parts + 1));
    if (job->n_panels <= PANELS_TOGETHER && !expands(job))
        n /= 2;
    else if (job->n_panels < KEPT_PANELS_MIN)
        n = unit;
    return (int)(larger(n, unit) / unit * unit);
}

/* A thread keeps most when it is alone. */
size_t cpu_expanded_bytes(const struct cpu_tile_ops *tile, int64_t out_dim, int64_t in_dim,
                          int n_parts, enum dtype dtype)
{
    const int64_t block_bytes = (in_dim + LANES_MAX) * 16 * (int64_t)dtype_size(dtype) * n_parts;
    const int64_t all = n_blocks_of(out_dim / n_parts) / ITEMS_MIN * block_bytes;
    const int64_t whole = tile->wide_blocks(tile->max_rows) * block_bytes;
    return (size_t)larger(larger(whole, smaller(all, kept_bytes())),
                          (int64_t)TILE_BLOCKS_MAX * CHUNK_STEPS * LINE_BYTES * n_parts);
}

/* How a job of panels of so many rows takes x: rounded as the weight is, */
static void take_floats(struct matmul_job *job, int panel_rows)
{
    const struct cpu_state *s = job->state;
    const struct linear *l = job->l;
    int takes_bf16 = s->tile->takes_bf16;
    steps_init(&job->steps, l);
    job->n_blocks_wide = (int)smaller(s->tile->wide_blocks(panel_rows), STRIP_BLOCKS);
    if (l->format != WEIGHT_FLOAT) {
        job->multiplies =
            cpu_quantized_multiplies(s, l, &job->quantized, job->n_rows, job->n_panels);
        if (job->multiplies) {
            job->n_blocks_wide = s->multiply->product_blocks(panel_rows);
            takes_bf16 = s->multiply->takes_bf16;
        } else if (expands_whole(job)) {
            job->n_blocks_wide = s->tile->wide_blocks(s->tile->max_rows);
        }
    }
    job->factor = cpu_factor_of(takes_bf16, l->dtype);
    job->row_words = job->steps.n * job->factor.words;
}

/* or as codes: steps are units of the weight's, and behind the words of a row comes what it has of
 * each run and lane. */
static void take_integers(struct matmul_job *job, int panel_rows)
{
    const struct cpu_state *s = job->state;
    const struct linear *l = job->l;
    const struct cpu_quantized_layout *at = &job->quantized;
    job->multiplies = 1;
    job->steps.step = at->unit;
    memcpy(job->steps.start, at->lane_unit, sizeof(job->steps.start));
    job->steps.n = at->lane_unit[l->n_lanes];
    job->n_blocks_wide = s->integer->product_blocks(panel_rows);
    job->factor = (struct cpu_factor){
        .step = at->unit, .words = s->integer->unit_words(weight_format_bits(l->format))};
    for (int i = 0; i < l->n_lanes; i++)
        job->run_start[i + 1] = job->run_start[i] + cpu_quantized_n_runs(l, i);
    job->row_words = job->steps.n * job->factor.words + job->run_start[l->n_lanes] + l->n_lanes;
}

/* Of a job as job_of() has it, and its epilogue. */
static void run_together(struct backend *b, struct matmul_job *job)
{
    struct cpu_state *s = job->state;
    const struct linear *l = job->l;
    job->n_columns = l->out_dim / job->n_parts;
    job->n_rows = tensor_n_rows(job->x);
    job->n_panels = (job->n_rows + s->tile->max_rows - 1) / s->tile->max_rows;
    int panel_rows = (int)((job->n_rows + job->n_panels - 1) / job->n_panels);
    if (l->x_format == WEIGHT_INT8)
        take_integers(job, panel_rows);
    else
        take_floats(job, panel_rows);
    job->n_blocks_kept = blocks_kept(job, s->n_threads);
    if (expands(job))
        job->expanded_bytes =
            (size_t)((expands_whole(job) ? job->steps.n : CHUNK_STEPS) * job->n_blocks_kept) *
            LINE_BYTES;
    if (job->n_rows * job->row_words > OWN_PACK_WORDS)
        job->packed_x = cpu_scratch_reserve(&s->shared, (size_t)(job->n_rows * job->row_words) * 4);
    cpu_parts_init(s, (n_blocks_of(job->n_columns) + strip_of(job) - 1) / strip_of(job));
    int64_t weight = l->out_dim * l->in_dim; // few rows take the time to read it
    int64_t cost = cpu_product_cost(s, job->n_rows * weight);
    cpu_parallel(b, larger(cost, weight), matmul_work, job);
}

static struct tensor rows_of(const struct tensor *t, int64_t first, int64_t end)
{
    struct tensor rows =
        tensor_2d(cpu_element(t, first, 0), t->dtype, end - first, tensor_n_cols(t));
    rows.row_stride = t->row_stride;
    return rows;
}

/* The same, the rows in parts as even as they come. */
static void run_job(struct backend *b, const struct matmul_job *all)
{
    const struct linear *l = all->l;
    const int64_t n_rows = tensor_n_rows(all->x);
    const int64_t most = rows_together(row_bytes_of(all->tile, l->in_dim, l->dtype));
    const int n = (int)((n_rows + most - 1) / most);
    for (int i = 0; i < n; i++) {
        struct matmul_job job = *all;
        int64_t first, end;
        cpu_share(n_rows, i, n, &first, &end);
        struct tensor y = rows_of(all->y, first, end), x = rows_of(all->x, first, end), residual;
        job.y = &y;
        job.x = &x;
        if (all->epilogue.residual) {
            residual = rows_of(all->epilogue.residual, first, end);
            job.epilogue.residual = &residual;
        }
        run_together(b, &job);
    }
}

static struct matmul_job job_of(struct backend *b, struct tensor *y, const struct tensor *x,
                                const struct linear *l, int n_parts)
{
    struct cpu_state *s = cpu_state(b);
    struct matmul_job job = {.tile = s->tile,
                             .vector = s->vector,
                             .state = s,
                             .y = y,
                             .x = x,
                             .l = l,
                             .n_parts = n_parts};
    if (l->format != WEIGHT_FLOAT)
        cpu_quantized_layout(&job.quantized, s, l);
    return job;
}

void cpu_matmul(struct backend *b, struct tensor *y, const struct tensor *x, const struct linear *l,
                const struct epilogue *e)
{
    struct matmul_job job = job_of(b, y, x, l, 1);
    if (e)
        job.epilogue = *e;
    run_job(b, &job);
}

int cpu_matmul_gated(struct backend *b, struct tensor *y, const struct tensor *x,
                     const struct linear *l, enum activation act)
{
    struct matmul_job job = job_of(b, y, x, l, 2);
    job.epilogue.act = act;
    if (tensor_n_cols(y) % (16 * strip_of(&job)) != 0) // a strip would have rows of both
        return 0;
    if (tensor_n_rows(x) <= cpu_state(b)->tile->max_rows) // one stream is read faster than two
        return 0;
    run_job(b, &job);
    return 1;
}
