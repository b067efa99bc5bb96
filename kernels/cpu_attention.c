/*
 * Full attention inside a tile on the CPU: vision's.
 *
 * A head's keys and values are packed once for its query rows, a group of which at a time is the
 * columns of K q^T: scores lie key by key, so that the softmax of sixteen queries is one vector
 * operation and e^(score - m) comes out, in the scores' place, as the tile takes the left factor of
 * p V. All keys are one step of the softmax, and one product, so that its sums are begun and stored
 * once. A tile of one block (AVX2's) reads both factors too often for the second-level cache: there
 * as many keys as the first holds are raised to e and multiplied at a time.
 *
 * Every score is one accumulator over head_dim in order, every output one over the keys in order,
 * every sum of e^(score - m) the tree of sixteen. In bfloat16 keys, values, queries and each
 * e^(score - m) are rounded, the odd dimension, or key, of a pair coming before the even one;
 * without bfloat16 products that is float32's product of rounded values in that order.
 */
#include <string.h>

#include "kernels/cpu_backend.h"

#define GROUP 48 // query rows: whole tiles and whole blocks of every instruction set
#define AHEAD 24 // rows of keys and values that are fetched ahead
#define CHUNK 64 // keys of values and e^(score - m) that the first-level cache holds

struct full_job {
    struct cpu_state *state;
    struct tensor *out;
    const struct tensor *q, *k, *v;
    int64_t n_tiles, n_tokens; // tokens of one tile
    int64_t head_dim;
    int32_t n_heads;
    int64_t chunk;    // keys that are raised to e, then multiplied with their values; even
    int32_t n_splits; // parts of a head's query rows, each packing the head's keys for itself
    float scale;
    float *probs;
    enum tile_source source;
    enum columns_form form;
    int64_t step;        // dimensions, or keys, of a word
    int64_t dim_words;   // of a key or a query
    int64_t value_steps; // rows of values: keys or pairs of them
    int64_t dim16;       // head_dim rounded up to 16
};

/* In words of 4 bytes: a float32, or a pair of bfloat16. A panel is max_rows of the tile. */
struct full_head {
    uint32_t *keys;    // [n_tokens in panels][dim_words][panel]
    uint32_t *values;  // [value_steps][dim16]
    uint32_t *queries; // [GROUP / 16][dim_words][16]
    uint32_t *rows;    // [16][dim_words] on their way
    float *scores;     // [n_tokens + 1][GROUP], and e^(score - m) in their place
    float *m;          // [GROUP]
    float *l;          // [16][GROUP], the total in the first row
    float *sums;       // [GROUP][dim16]
};

/* Query rows [row, row + n) of the head whose rows begin at `first` of the tensors. */
struct full_rows {
    int64_t first, column, row, n;
};

static void head_reserve(const struct full_job *job, struct full_head *h, int thread)
{
    const int64_t n_keys = job->n_tokens + TILE_ROWS_MAX;
    const int64_t n_words = (n_keys + GROUP + 16) * job->dim_words +
                            (job->value_steps + GROUP) * job->dim16 +
                            (job->n_tokens + 2 + 16) * GROUP;
    char *at = cpu_scratch_reserve(&job->state->thread[thread], (size_t)(n_words + 8 * 16) * 4);
    h->keys = cpu_carve(&at, n_keys * job->dim_words);
    h->values = cpu_carve(&at, job->value_steps * job->dim16);
    h->queries = cpu_carve(&at, GROUP * job->dim_words);
    h->rows = cpu_carve(&at, 16 * job->dim_words);
    h->scores = cpu_carve(&at, (job->n_tokens + 1) * GROUP);
    h->m = cpu_carve(&at, GROUP);
    h->l = cpu_carve(&at, 16 * GROUP);
    h->sums = cpu_carve(&at, GROUP * job->dim16);
}

/* Heads lie side by side in a row, so that the next row of one is in another page of memory, where
 * the processor's own prefetch ends. Rows [row, row + n) or those of them before `end`. */
static void prefetch_rows(const struct full_job *job, const struct tensor *t, int64_t row,
                          int64_t column, int64_t n, int64_t end)
{
    const size_t n_bytes = (size_t)job->head_dim * dtype_size(t->dtype);
    for (; n > 0 && row < end; row++, n--) {
        const char *x = cpu_element(t, row, column);
        for (size_t i = 0; i < n_bytes; i += 64)
            __builtin_prefetch(x + i, 0, 2);
    }
}

/* to [dim_words] <- a row of the head, rounded. */
static void round_row(const struct full_job *job, uint32_t *to, const void *row, enum dtype dtype)
{
    const struct cpu_vector_ops *vector = job->state->vector;
    const int64_t dim = job->head_dim;
    const uint16_t *x = row;
    to[job->dim_words - 1] = 0; // an odd dimension is alone in its pair
    if (job->form == COLUMNS_ROUNDED && dtype == DTYPE_F32) {
        vector->round_bf16_odd_first((float *)to, row, dim);
    } else if (job->form == COLUMNS_ROUNDED) {
        to[dim - 1] = 0;
        for (int64_t d = 0; d < dim; d++)
            to[d ^ 1] = (uint32_t)x[d] << 16;
    } else if (dtype == DTYPE_F32) {
        vector->to_bf16((uint16_t *)to, row, dim);
    } else {
        memcpy(to, x, (size_t)dim * sizeof(*x));
    }
}

/* 1 where rows are stored as they are packed: in whole words of 4 bytes. */
static int is_in_words(const struct full_job *job, const struct tensor *t, const void *row)
{
    if (job->form == COLUMNS_F32)
        return 1;
    return job->form == COLUMNS_BF16_PAIRS && t->dtype == DTYPE_BF16 && job->head_dim % 2 == 0 &&
           t->row_stride % 2 == 0 && (uintptr_t)row % 4 == 0;
}

/* dst [dim_words][dst_row] <- n <= dst_row <= 16 rows of a tensor, rounded, as columns. */
static void pack_columns(const struct full_job *job, struct full_head *h, uint32_t *dst,
                         int64_t dst_row, const struct tensor *t, int64_t row, int64_t column,
                         int64_t n)
{
    const uint32_t *from = cpu_element(t, row, column);
    int64_t from_row = t->row_stride / job->step;
    if (!is_in_words(job, t, from)) {
        for (int64_t r = 0; r < n; r++)
            round_row(job, h->rows + r * job->dim_words, cpu_element(t, row + r, column), t->dtype);
        from = h->rows;
        from_row = job->dim_words;
    }
    if (n < dst_row)
        memset(dst, 0, (size_t)(job->dim_words * dst_row) * 4);
    job->state->vector->transpose(dst, dst_row, from, from_row, n, job->dim_words);
}

/* Two rows of values as pairs; `odd` NULL: zeros. */
static void pair_rows(uint32_t *dst, const uint16_t *even, const uint16_t *odd, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        dst[i] = even[i] | (odd ? (uint32_t)odd[i] << 16 : 0);
}

/* Row i of the values. */
static void pack_values(const struct full_job *job, uint32_t *dst, int64_t i, int64_t first_row,
                        int64_t column)
{
    const struct cpu_vector_ops *vector = job->state->vector;
    const struct tensor *v = job->v;
    const int64_t dim = job->head_dim;
    /* The key, or the first of a pair. */
    const int64_t key = job->form == COLUMNS_F32 ? i : job->form == COLUMNS_ROUNDED ? i ^ 1 : 2 * i;
    const void *row = cpu_element(v, first_row + key, column);
    const void *next = key + 1 < job->n_tokens ? cpu_element(v, first_row + key + 1, column) : NULL;
    if (key >= job->n_tokens)
        memset(dst, 0, (size_t)dim * 4);
    else if (job->form == COLUMNS_BF16_PAIRS && v->dtype == DTYPE_BF16)
        pair_rows(dst, row, next, dim);
    else if (job->form == COLUMNS_BF16_PAIRS)
        vector->pair_bf16(dst, row, next, dim);
    else if (job->form == COLUMNS_ROUNDED && v->dtype == DTYPE_F32)
        vector->round_bf16((float *)dst, row, dim);
    else
        tensor_widen((float *)dst, row, v->dtype, dim);
    memset(dst + dim, 0, (size_t)(job->dim16 - dim) * 4);
}

static void head_pack(const struct full_job *job, struct full_head *h, int64_t first_row,
                      int64_t column)
{
    const int64_t panel = job->state->tile->max_rows, end = first_row + job->n_tokens;
    const int64_t keys_a_step = job->form == COLUMNS_BF16_PAIRS ? 2 : 1;
    int64_t value = 0;
    for (int64_t i = 0; i < job->n_tokens; i += panel) {
        const int64_t row = first_row + i;
        prefetch_rows(job, job->k, row + AHEAD, column, panel, end);
        prefetch_rows(job, job->v, row + AHEAD, column, panel, end);
        pack_columns(job, h, h->keys + i * job->dim_words, panel, job->k, row, column,
                     smaller(end - row, panel));
        for (; value < smaller(job->value_steps, (i + panel) / keys_a_step); value++)
            pack_values(job, h->values + value * job->dim16, value, first_row, column);
    }
}

/* scores <- K q^T of the query rows, m <- the largest scaled one of each. */
static void score_keys(const struct full_job *job, struct full_head *h,
                       const struct full_rows *rows)
{
    const int64_t max_rows = job->state->tile->max_rows, n16 = cpu_round16(rows->n);
    for (int64_t i = 0; i < rows->n; i += 16)
        pack_columns(job, h, h->queries + i * job->dim_words, 16, job->q,
                     rows->first + rows->row + i, rows->column, smaller(rows->n - i, 16));
    for (int64_t j = 0; j < n16; j++)
        h->m[j] = -__builtin_inff();
    for (int64_t i = 0; i < job->n_tokens; i += max_rows) {
        const int64_t n = smaller(job->n_tokens - i, max_rows);
        struct tile product = {
            .a = h->keys + i * job->dim_words,
            .a_step = max_rows,
            .a_row = 1,
            .b = h->queries,
            .b_step = 16 * job->step,
            .b_block = job->dim_words * 16 * job->step,
            .c = h->scores + i * GROUP,
            .c_row = GROUP,
            .n_k = job->dim_words,
        };
        job->state->tile->run(&product, (int)n, (int)(n16 / 16), job->source);
        job->state->vector->columns_largest(h->m, product.c, GROUP, n, n16);
    }
    for (int64_t j = 0; j < n16; j++)
        h->m[j] *= job->scale;
}

/* sums [n_rows][dim16] (+)= p V of the n keys from `key` on. */
static void add_values(const struct full_job *job, struct full_head *h, int64_t key, int64_t n,
                       int64_t n_rows)
{
    const int64_t panel = job->state->tile->max_rows;
    const int64_t words = job->form == COLUMNS_BF16_PAIRS ? 2 : 1;
    for (int64_t r = 0; r < n_rows; r += panel) {
        struct tile product = {
            .a = h->scores + key * GROUP + r,
            .a_step = GROUP,
            .a_row = 1,
            .b = h->values + key / words * job->dim16,
            .b_step = job->dim16 * job->step,
            .b_block = 16 * job->step,
            .c = h->sums + r * job->dim16,
            .c_row = job->dim16,
            .n_k = smaller(job->value_steps - key / words, n / words),
            .accumulate = key > 0,
        };
        job->state->tile->run(&product, (int)smaller(n_rows - r, panel), (int)(job->dim16 / 16),
                              job->source);
    }
}

static void write_probs(const struct full_job *job, const struct full_head *h,
                        struct softmax_columns softmax, int64_t n_rows, float *probs)
{
    float unused[GROUP] = {0}; // one key's sums are the first row
    softmax.n_keys = 1;
    softmax.sums = unused;
    softmax.form = COLUMNS_F32;
    for (int64_t i = 0; i < job->n_tokens; i++) {
        softmax.scores = softmax.p = h->scores + i * GROUP;
        job->state->vector->columns_exp(&softmax);
        for (int64_t r = 0; r < n_rows; r++)
            probs[r * job->n_tokens + i] = ((const float *)softmax.p)[r] / h->l[r];
    }
}

static void head_rows(const struct full_job *job, struct full_head *h, const struct full_rows *rows,
                      float *probs)
{
    const struct cpu_vector_ops *vector = job->state->vector;
    struct softmax_columns softmax = {
        .n = cpu_round16(rows->n),
        .row = GROUP,
        .scale = job->scale,
        .m = h->m,
        .sums = h->l,
        .form = job->form,
    };
    score_keys(job, h, rows);
    const int64_t row = rows->first + rows->row;
    prefetch_rows(job, job->out, row, rows->column, rows->n, row + rows->n);
    prefetch_rows(job, job->q, row + rows->n, rows->column, GROUP, rows->first + job->n_tokens);
    memset(h->l, 0, 16 * GROUP * sizeof(float));
    for (int64_t key = 0; key < job->n_tokens; key += job->chunk) {
        softmax.scores = softmax.p = h->scores + key * GROUP;
        softmax.n_keys = smaller(job->n_tokens - key, job->chunk);
        vector->columns_exp(&softmax);
        add_values(job, h, key, job->chunk, rows->n);
    }
    vector->columns_total(h->l, GROUP, softmax.n);
    for (int64_t r = 0; r < rows->n; r++) {
        void *out = cpu_element(job->out, row + r, rows->column);
        float *sums = h->sums + r * job->dim16;
        vector->divide(job->out->dtype == DTYPE_F32 ? out : sums, sums, h->l[r], job->head_dim);
        if (job->out->dtype == DTYPE_BF16)
            vector->to_bf16(out, sums, job->head_dim);
    }
    if (probs) {
        score_keys(job, h, rows); // p is where they were
        write_probs(job, h, softmax, rows->n, probs + rows->row * job->n_tokens);
    }
}

static void head_place(const struct full_job *job, int64_t head, int64_t *first, int64_t *column)
{
    *first = head / job->n_heads * job->n_tokens;
    *column = head % job->n_heads * job->head_dim;
}

static void full_work(void *arg, int thread, int n_threads)
{
    const struct full_job *job = arg;
    (void)n_threads;
    const int64_t n = job->n_tokens;
    struct full_head h;
    head_reserve(job, &h, thread);
    int64_t item, end;
    while (cpu_parts_take(job->state, thread, 1, &item, &end)) {
        const int64_t head = item / job->n_splits;
        float *probs = job->probs ? job->probs + head * n * n : NULL;
        struct full_rows rows = {0};
        int64_t end_row;
        head_place(job, head, &rows.first, &rows.column);
        cpu_share(n, (int)(item % job->n_splits), job->n_splits, &rows.row, &end_row);
        head_pack(job, &h, rows.first, rows.column);
        for (; rows.row < end_row; rows.row += GROUP) {
            rows.n = smaller(end_row - rows.row, GROUP);
            head_rows(job, &h, &rows, probs);
        }
    }
}

void cpu_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                   const struct tensor *k, const struct tensor *v, int64_t n_tiles, int32_t n_heads,
                   float scale, enum dtype dtype, float *probs)
{
    struct full_job job = {.state = cpu_state(b), .out = out, .q = q, .k = k, .v = v};
    job.n_tiles = n_tiles;
    job.n_tokens = tensor_n_rows(q) / n_tiles;
    job.n_heads = n_heads;
    job.head_dim = tensor_n_cols(q) / n_heads;
    job.scale = scale * LOG2_E;
    job.probs = probs;
    const int is_f32 = dtype == DTYPE_F32, is_paired = !is_f32 && job.state->tile->takes_bf16;
    job.source = is_paired ? TILE_BF16_PAIRS : is_f32 ? TILE_F32 : TILE_F32_BF16;
    job.form = is_f32 ? COLUMNS_F32 : is_paired ? COLUMNS_BF16_PAIRS : COLUMNS_ROUNDED;
    job.step = is_paired ? 2 : 1;
    job.dim_words = is_f32 ? job.head_dim : (job.head_dim + 1) / 2 * 2 / job.step;
    job.value_steps = is_f32 ? job.n_tokens : (job.n_tokens + 1) / 2 * 2 / job.step;
    job.dim16 = cpu_round16(job.head_dim);
    job.chunk = job.state->tile->wide_blocks(job.state->tile->max_rows) > 1
                    ? (job.n_tokens + 1) / 2 * 2
                    : CHUNK;
    int64_t n_heads_total = n_tiles * n_heads;
    job.n_splits = (int32_t)((job.state->n_threads + n_heads_total - 1) / n_heads_total);
    cpu_parts_init(job.state, n_heads_total * job.n_splits);
    cpu_parallel(
        b, cpu_product_cost(job.state, 2 * tensor_n_rows(q) * job.n_tokens * tensor_n_cols(q)),
        full_work, &job);
}
