/*
 * Attention on the CPU: causal over pages for the language model, full inside a tile for vision.
 *
 * Both are the same three steps on a few query rows at a time: scores = q K^T by the tile product,
 * one softmax step a row, sums += p V by the tile product. A row's result is a function of its own
 * query and keys: every score is one accumulator over head_dim in order, every output one
 * accumulator over the keys in order, every softmax sum the fixed tree of its step; rows share a
 * tile only to share what is loaded.
 */
#include <string.h>

#include "kernels/cpu_backend.h"
#include "kernels/log.h"

static int64_t round_up16(int64_t n)
{
    return (n + 15) / 16 * 16;
}

static int64_t clamp(int64_t x, int64_t lo, int64_t hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

/* Carves `n` floats, a multiple of 16, off a scratch block. */
static float *carve(float **at, int64_t n)
{
    float *p = *at;
    *at += round_up16(n);
    return p;
}

/* dst[j][r] <- src[r][j]: n_rows rows of n to n rows of TILE_ROWS_MAX. In fours of rows, so rows of
 * src up to the next multiple of four are read and their columns of dst written. */
static void transpose(const struct cpu_state *s, float *dst, const float *src, int64_t src_row,
                      int n_rows, int64_t n)
{
    s->vector->transpose((uint32_t *)dst, TILE_ROWS_MAX, (const uint32_t *)src, src_row,
                         (n_rows + 3) / 4 * 4, n);
}

/* ---- causal attention over pages ---- */

/* Key positions of one softmax step, whatever the page size: [i * PAGED_STEP, (i + 1) * …). */
#define PAGED_STEP 64

struct paged_job {
    struct cpu_state *state;
    struct tensor *out;
    const struct tensor *q;
    const struct kv_pages *kv;
    const struct paged_layout *layout;
    const int32_t *kv_of_head;
    int32_t n_heads, window;
    float scale;
    int tile_rows;
};

/* A few (token, head) rows of one sequence that read the same kv head. */
struct paged_tile {
    int32_t sequence, kv_head, n_rows;
    int32_t token[TILE_ROWS_MAX], head[TILE_ROWS_MAX];
    int64_t lo[TILE_ROWS_MAX], hi[TILE_ROWS_MAX]; // key positions it sees: [lo, hi)
    struct softmax softmax[TILE_ROWS_MAX];
    float *queries; // [head_dim][TILE_ROWS_MAX]
    float *scores;  // [n_rows][PAGED_STEP]
    float *p;       // [PAGED_STEP][TILE_ROWS_MAX]
    float *sums;    // [n_rows][head_dim rounded up to 16]
    void *v_tail;   // [PAGED_STEP][16] of the page's type: the last columns, where 16 divides not
};

static void tile_reserve(const struct paged_job *job, struct paged_tile *t, int thread)
{
    const int64_t n_rows = TILE_ROWS_MAX, dim = round_up16(job->kv->head_dim);
    size_t n_floats = (size_t)(n_rows * (2 * dim + 2 * PAGED_STEP) + PAGED_STEP * 16 + 5 * 16);
    float *at = cpu_scratch_reserve(&job->state->thread[thread], n_floats * sizeof(float));
    t->queries = carve(&at, dim * n_rows);
    t->scores = carve(&at, n_rows * PAGED_STEP);
    t->p = carve(&at, PAGED_STEP * n_rows);
    t->sums = carve(&at, n_rows * dim);
    t->v_tail = carve(&at, PAGED_STEP * 16);
}

/* The keys of one step that lie in one page: columns [column, column + n) of the step's scores. */
struct paged_run {
    const char *k, *v; // of the first of these keys: [head_dim][page_size], [n][head_dim]
    int64_t column, n; // n is a multiple of 16
};

/* Columns [from, to) of the run: sums[row ..] += p V for n_rows rows from `row` on. */
static void add_values(const struct paged_job *job, struct paged_tile *t,
                       const struct paged_run *run, int row, int n_rows, int64_t from, int64_t to)
{
    const struct kv_pages *kv = job->kv;
    const enum tile_source source = kv->dtype == DTYPE_F32 ? TILE_F32 : TILE_BF16;
    const size_t element = dtype_size(kv->dtype);
    const int64_t dim = kv->head_dim, dim16 = round_up16(dim);
    from = clamp(from - run->column, 0, run->n);
    to = clamp(to - run->column, 0, run->n);
    if (from >= to)
        return;
    struct tile product = {
        .a = t->p + (run->column + from) * TILE_ROWS_MAX + row,
        .a_step = TILE_ROWS_MAX,
        .b = run->v + (size_t)(from * dim) * element,
        .b_step = dim,
        .b_block = 16,
        .c = t->sums + row * dim16,
        .c_row = dim16,
        .n_k = to - from,
        .accumulate = 1,
    };
    if (dim >= 16)
        job->state->tile->run(&product, n_rows, (int)(dim / 16), source);
    if (dim % 16) {
        product.b = (const char *)t->v_tail + (size_t)(from * 16) * element;
        product.b_step = 16;
        product.c += dim / 16 * 16;
        job->state->tile->run(&product, n_rows, 1, source);
    }
}

/* The last head_dim % 16 columns of a run's values, padded with zeros to 16. */
static void copy_value_tail(const struct kv_pages *kv, struct paged_tile *t,
                            const struct paged_run *run)
{
    const size_t element = dtype_size(kv->dtype);
    const size_t n = (size_t)(kv->head_dim % 16) * element;
    const size_t first = (size_t)(kv->head_dim / 16 * 16) * element;
    if (n == 0)
        return;
    memset(t->v_tail, 0, (size_t)run->n * 16 * element);
    for (int64_t j = 0; j < run->n; j++)
        memcpy((char *)t->v_tail + (size_t)j * 16 * element,
               run->v + (size_t)(j * kv->head_dim) * element + first, n);
}

/* Cuts key positions [first + from, first + to) at the ends of pages; returns how many runs. */
static int cut_runs(const struct paged_job *job, const struct paged_tile *t, int64_t first,
                    int64_t from, int64_t to, struct paged_run runs[PAGED_STEP / 16])
{
    const struct kv_pages *kv = job->kv;
    const int64_t size = kv->page_size, dim = kv->head_dim;
    const int32_t *pages = job->layout->pages + job->layout->page_start[t->sequence];
    const size_t element = dtype_size(kv->dtype);
    int n_runs = 0;
    for (int64_t column = from; column < to;) {
        int64_t index = (first + column) / size, offset = (first + column) % size;
        int64_t n = size - offset < to - column ? size - offset : to - column;
        int32_t page = pages[index];
        if (page < 0 || page >= kv->n_pages)
            BUG("page %d of %d", page, kv->n_pages);
        int64_t at = ((int64_t)page * kv->n_kv_heads + t->kv_head) * dim * size;
        runs[n_runs++] = (struct paged_run){
            .k = (const char *)kv->k + (size_t)(at + offset) * element,
            .v = (const char *)kv->v + (size_t)(at + offset * dim) * element,
            .column = column,
            .n = n,
        };
        column += n;
    }
    return n_runs;
}

/* Pages lie anywhere, so the processor's own prefetch ends at the end of each. Into the
 * second-level cache: a step's keys and values can be more than the first holds. */
static void prefetch(const char *p, int64_t n_bytes)
{
    for (int64_t i = 0; i < n_bytes; i += 64)
        __builtin_prefetch(p + i, 0, 2);
}

/* The scores of all rows and the keys of the runs, which lie one behind the other. */
static void score_keys(const struct paged_job *job, struct paged_tile *t,
                       const struct paged_run *runs, int n_runs)
{
    const struct kv_pages *kv = job->kv;
    const size_t block_bytes = 16 * dtype_size(kv->dtype);
    const void *blocks[PAGED_STEP / 16];
    int n_blocks = 0;
    for (int i = 0; i < n_runs; i++) {
        for (int64_t j = 0; j < runs[i].n / 16; j++)
            blocks[n_blocks++] = runs[i].k + (size_t)j * block_bytes;
    }
    struct tile product = {
        .a = t->queries,
        .a_step = TILE_ROWS_MAX,
        .b_step = kv->page_size,
        .blocks = blocks,
        .c = t->scores + runs[0].column,
        .c_row = PAGED_STEP,
        .n_k = kv->head_dim,
    };
    job->state->tile->run(&product, t->n_rows, n_blocks,
                          kv->dtype == DTYPE_F32 ? TILE_F32 : TILE_BF16);
}

/* The PAGED_STEP keys from position `first` on: scores of all that any row sees, then each row
 * takes in those that it sees. Others may hold anything (a page is reused without being cleared):
 * they enter no sum of the row. */
static void tile_take_step(const struct paged_job *job, struct paged_tile *t, int64_t first)
{
    const struct kv_pages *kv = job->kv;
    const int64_t dim = kv->head_dim;
    int64_t lo[TILE_ROWS_MAX], hi[TILE_ROWS_MAX]; // what each row sees of the step
    int64_t all_lo = 0, all_hi = PAGED_STEP, any_lo = PAGED_STEP, any_hi = 0;
    for (int r = 0; r < t->n_rows; r++) {
        lo[r] = clamp(t->lo[r] - first, 0, PAGED_STEP);
        hi[r] = clamp(t->hi[r] - first, lo[r], PAGED_STEP);
        all_lo = lo[r] > all_lo ? lo[r] : all_lo;
        all_hi = hi[r] < all_hi ? hi[r] : all_hi;
        any_lo = lo[r] < any_lo ? lo[r] : any_lo;
        any_hi = hi[r] > any_hi ? hi[r] : any_hi;
    }
    any_lo = any_lo / 16 * 16;
    any_hi = round_up16(any_hi);
    struct paged_run runs[PAGED_STEP / 16];
    int n_runs = cut_runs(job, t, first, any_lo, any_hi, runs);
    for (int i = 0; i < n_runs; i++)
        prefetch(runs[i].v, runs[i].n * dim * (int64_t)dtype_size(kv->dtype));
    score_keys(job, t, runs, n_runs);
    float correction[TILE_ROWS_MAX];
    job->state->vector->softmax_step(t->scores, PAGED_STEP, t->n_rows, lo, hi, job->scale,
                                     t->softmax, correction);
    for (int r = 0; r < t->n_rows; r++) {
        if (correction[r] != 1.0f)
            job->state->vector->multiply(t->sums + r * round_up16(dim), correction[r], dim);
    }
    transpose(job->state, t->p + any_lo * TILE_ROWS_MAX, t->scores + any_lo, PAGED_STEP, t->n_rows,
              any_hi - any_lo);
    if (all_lo >= all_hi)
        all_lo = all_hi = PAGED_STEP; // no key that every row sees: row by row
    for (int i = 0; i < n_runs; i++) {
        const struct paged_run *run = &runs[i];
        copy_value_tail(kv, t, run);
        for (int r = 0; r < t->n_rows; r++)
            add_values(job, t, run, r, 1, lo[r], hi[r] < all_lo ? hi[r] : all_lo);
        add_values(job, t, run, 0, t->n_rows, all_lo, all_hi);
        for (int r = 0; r < t->n_rows; r++)
            add_values(job, t, run, r, 1, lo[r] > all_hi ? lo[r] : all_hi, hi[r]);
    }
}

static void tile_run(const struct paged_job *job, struct paged_tile *t)
{
    const struct kv_pages *kv = job->kv;
    const int64_t dim = kv->head_dim, dim16 = round_up16(dim);
    int64_t lo = t->lo[0], hi = t->hi[0];
    for (int r = 0; r < t->n_rows; r++) {
        const float *q = cpu_row(job->q, t->token[r]) + t->head[r] * dim;
        memcpy(t->sums + r * dim16, q, (size_t)dim * sizeof(float));
        t->softmax[r] = (struct softmax){.m = -__builtin_inff(), .l = 0.0f};
        lo = t->lo[r] < lo ? t->lo[r] : lo;
        hi = t->hi[r] > hi ? t->hi[r] : hi;
    }
    transpose(job->state, t->queries, t->sums, dim16, t->n_rows, dim);
    memset(t->sums, 0, (size_t)(t->n_rows * dim16) * sizeof(float));
    for (int64_t first = lo / PAGED_STEP * PAGED_STEP; first < hi; first += PAGED_STEP) {
        struct paged_run next[PAGED_STEP / 16];
        int64_t n_next = clamp(round_up16(hi - first - PAGED_STEP), 0, PAGED_STEP);
        int n_runs = cut_runs(job, t, first + PAGED_STEP, 0, n_next, next);
        for (int i = 0; i < n_runs; i++)
            prefetch(next[i].k, (int64_t)dtype_size(kv->dtype) * dim * next[i].n);
        tile_take_step(job, t, first);
    }
    for (int r = 0; r < t->n_rows; r++)
        job->state->vector->divide(cpu_row(job->out, t->token[r]) + t->head[r] * dim,
                                   t->sums + r * dim16, t->softmax[r].l, dim);
}

/* The rows of one sequence and kv head are its tokens times the heads that read it, token first.
 * Tile i of them goes to thread i mod n_threads, counted over all sequences and kv heads. */
static void paged_work(void *arg, int thread, int n_threads)
{
    const struct paged_job *job = arg;
    const struct paged_layout *layout = job->layout;
    struct paged_tile t;
    tile_reserve(job, &t, thread);
    int64_t item = 0;
    for (int32_t s = 0; s < layout->n_sequences; s++) {
        const int32_t first = layout->query_start[s], n_tokens = layout->query_start[s + 1] - first;
        const int64_t position = (int64_t)layout->context_len[s] - n_tokens;
        for (int32_t g = 0; g < job->kv->n_kv_heads; g++) {
            t.sequence = s;
            t.kv_head = g;
            t.n_rows = 0;
            for (int32_t i = 0; i < n_tokens; i++) {
                for (int32_t h = 0; h < job->n_heads; h++) {
                    if (job->kv_of_head[h] != g)
                        continue;
                    int64_t hi = position + i + 1;
                    t.token[t.n_rows] = first + i;
                    t.head[t.n_rows] = h;
                    t.hi[t.n_rows] = hi;
                    t.lo[t.n_rows] = job->window > 0 && hi > job->window ? hi - job->window : 0;
                    if (++t.n_rows < job->tile_rows)
                        continue;
                    if (item++ % n_threads == thread)
                        tile_run(job, &t);
                    t.n_rows = 0;
                }
            }
            if (t.n_rows && item++ % n_threads == thread)
                tile_run(job, &t);
        }
    }
}

void cpu_paged_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                         const struct kv_pages *kv, const struct paged_layout *layout,
                         const int32_t *kv_of_head, int32_t n_heads, float scale, int32_t window)
{
    struct paged_job job = {.state = cpu_state(b), .out = out, .q = q, .kv = kv, .layout = layout};
    job.kv_of_head = kv_of_head;
    job.n_heads = n_heads;
    job.scale = scale;
    job.window = window;
    /* Full tiles unless that would leave threads without one. */
    int64_t n_rows = (int64_t)layout->n_tokens * n_heads;
    job.tile_rows =
        (int)clamp((n_rows + b->n_threads - 1) / b->n_threads, 1, job.state->tile->max_rows);
    cpu_parallel(b, n_rows * kv->head_dim * layout->max_context_len, paged_work, &job);
}

/* ---- full attention inside a tile ---- */

struct full_job {
    struct cpu_state *state;
    struct tensor *out;
    const struct tensor *q, *k, *v;
    int64_t n_tiles, n_tokens; // tokens of one tile
    int64_t head_dim;
    int32_t n_heads;
    int32_t n_splits; // parts of a head's query rows, each packing the head's keys for itself
    float scale;
    float *probs;
};

struct full_head {
    float *keys;    // [n_tokens / 16][head_dim][16]
    float *values;  // [n_tokens][head_dim rounded up to 16]
    float *queries; // [head_dim][TILE_ROWS_MAX]
    float *scores;  // [rows][n_tokens rounded up to 16]
    float *p;       // [n_tokens][TILE_ROWS_MAX]
    float *sums;    // [rows][head_dim rounded up to 16]
};

static void head_reserve(const struct full_job *job, struct full_head *h, int thread)
{
    const int64_t n16 = round_up16(job->n_tokens), dim16 = round_up16(job->head_dim);
    int64_t n_floats = n16 * (job->head_dim + dim16) + TILE_ROWS_MAX * (2 * n16 + 2 * dim16);
    float *at = cpu_scratch_reserve(&job->state->thread[thread],
                                    (size_t)(n_floats + 6 * 16) * sizeof(float));
    h->keys = carve(&at, n16 * job->head_dim);
    h->values = carve(&at, n16 * dim16);
    h->queries = carve(&at, dim16 * TILE_ROWS_MAX);
    h->scores = carve(&at, TILE_ROWS_MAX * n16);
    h->p = carve(&at, n16 * TILE_ROWS_MAX);
    h->sums = carve(&at, TILE_ROWS_MAX * dim16);
}

static void head_pack(const struct full_job *job, struct full_head *h, int64_t first_row,
                      int64_t column)
{
    const int64_t dim = job->head_dim, dim16 = round_up16(dim), n = job->n_tokens;
    if (n % 16)
        memset(h->keys + n / 16 * dim * 16, 0, (size_t)dim * 16 * sizeof(float));
    for (int64_t i = 0; i < n; i += 16)
        job->state->vector->transpose((uint32_t *)h->keys + i * dim, 16,
                                      (const uint32_t *)cpu_row(job->k, first_row + i) + column,
                                      job->k->row_stride, n - i < 16 ? n - i : 16, dim);
    for (int64_t i = 0; i < n; i++) {
        float *values = h->values + i * dim16;
        memcpy(values, cpu_row(job->v, first_row + i) + column, (size_t)dim * sizeof(float));
        memset(values + dim, 0, (size_t)(dim16 - dim) * sizeof(float));
    }
}

/* Query rows [row, row + n_rows) of one head whose first row is `first_row`. */
static void head_rows(const struct full_job *job, struct full_head *h, int64_t first_row,
                      int64_t column, int64_t row, int n_rows, float *probs)
{
    const int64_t dim = job->head_dim, dim16 = round_up16(dim);
    const int64_t n = job->n_tokens, n16 = round_up16(n);
    struct softmax softmax[TILE_ROWS_MAX];
    int64_t lo[TILE_ROWS_MAX], hi[TILE_ROWS_MAX];
    float correction[TILE_ROWS_MAX]; // no older sums: unused
    for (int r = 0; r < n_rows; r++) {
        const float *q = cpu_row(job->q, first_row + row + r) + column;
        memcpy(h->sums + r * dim16, q, (size_t)dim * sizeof(float));
        softmax[r] = (struct softmax){.m = -__builtin_inff(), .l = 0.0f};
        lo[r] = 0;
        hi[r] = n;
    }
    transpose(job->state, h->queries, h->sums, dim16, n_rows, dim);
    struct tile scores = {
        .a = h->queries,
        .a_step = TILE_ROWS_MAX,
        .b = h->keys,
        .b_step = 16,
        .b_block = dim * 16,
        .c = h->scores,
        .c_row = n16,
        .n_k = dim,
    };
    job->state->tile->run(&scores, n_rows, (int)(n16 / 16), TILE_F32);
    job->state->vector->softmax_step(h->scores, n16, n_rows, lo, hi, job->scale, softmax,
                                     correction);
    for (int r = 0; r < n_rows && probs; r++)
        job->state->vector->divide(probs + (row + r) * n, h->scores + r * n16, softmax[r].l, n);
    transpose(job->state, h->p, h->scores, n16, n_rows, n);
    struct tile values = {
        .a = h->p,
        .a_step = TILE_ROWS_MAX,
        .b = h->values,
        .b_step = dim16,
        .b_block = 16,
        .c = h->sums,
        .c_row = dim16,
        .n_k = n,
    };
    job->state->tile->run(&values, n_rows, (int)(dim16 / 16), TILE_F32);
    for (int r = 0; r < n_rows; r++)
        job->state->vector->divide(cpu_row(job->out, first_row + row + r) + column,
                                   h->sums + r * dim16, softmax[r].l, dim);
}

static void full_work(void *arg, int thread, int n_threads)
{
    const struct full_job *job = arg;
    (void)n_threads;
    const int64_t n = job->n_tokens;
    const int max_rows = job->state->tile->max_rows;
    struct full_head h;
    head_reserve(job, &h, thread);
    int64_t item, end;
    while (cpu_parts_take(job->state, thread, 1, &item, &end)) {
        const int64_t head_index = item / job->n_splits;
        const int64_t first_row = head_index / job->n_heads * n;
        const int64_t column = head_index % job->n_heads * job->head_dim;
        float *probs = job->probs ? job->probs + head_index * n * n : NULL;
        int64_t row, end_row;
        cpu_share(n, (int)(item % job->n_splits), job->n_splits, &row, &end_row);
        head_pack(job, &h, first_row, column);
        for (; row < end_row; row += max_rows)
            head_rows(job, &h, first_row, column, row,
                      (int)(end_row - row < max_rows ? end_row - row : max_rows), probs);
    }
}

void cpu_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                   const struct tensor *k, const struct tensor *v, int64_t n_tiles, int32_t n_heads,
                   float scale, float *probs)
{
    struct full_job job = {.state = cpu_state(b), .out = out, .q = q, .k = k, .v = v};
    job.n_tiles = n_tiles;
    job.n_tokens = tensor_n_rows(q) / n_tiles;
    job.n_heads = n_heads;
    job.head_dim = tensor_n_cols(q) / n_heads;
    job.scale = scale;
    job.probs = probs;
    int64_t n_heads_total = n_tiles * n_heads;
    job.n_splits = (int32_t)((b->n_threads + n_heads_total - 1) / n_heads_total);
    cpu_parts_init(job.state, n_heads_total * job.n_splits);
    cpu_parallel(b, tensor_n_rows(q) * job.n_tokens * tensor_n_cols(q), full_work, &job);
}
