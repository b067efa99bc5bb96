/*
 * Full attention inside a tile on the CPU: vision's.
 *
 * A head's keys and values are packed once for its rows, a few of which at a time take the same
 * steps as in cpu_paged.c, all keys being one step of the softmax. In bfloat16 keys, values,
 * queries and each e^(score - m) are rounded, in pairs as there.
 */
#include <string.h>

#include "kernels/cpu_backend.h"

#define BLOCK_BYTES 64 // sixteen keys of one dimension, or of a pair

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
    struct cpu_factor factor;   // of queries and of p
    int64_t n16, dim16;         // n_tokens and head_dim rounded up to 16
    int64_t n_steps, dim_steps; // values or pairs of them
    int64_t q_words, p_words;   // of a row of queries and of p
};

/* In words of 4 bytes: a float32, or a pair of bfloat16. */
struct full_head {
    uint32_t *keys;      // [n_tokens / 16][dim_steps][16]
    uint32_t *values;    // [n_steps][dim16]
    uint32_t *pairs;     // [16][dim_steps] keys on their way, of bfloat16
    uint32_t *q_rows;    // [TILE_ROWS_MAX][q_words]
    uint32_t *q_columns; // [q_words][TILE_ROWS_MAX]
    float *scores;       // [TILE_ROWS_MAX][n16]
    uint32_t *p_rows;    // [TILE_ROWS_MAX][p_words]; float32: the scores
    uint32_t *p_columns; // [p_words][TILE_ROWS_MAX]
    float *sums;         // [TILE_ROWS_MAX][dim16]
};

static void head_reserve(const struct full_job *job, struct full_head *h, int thread)
{
    const int64_t rows = TILE_ROWS_MAX, is_f32 = job->factor.source == TILE_F32;
    const int64_t pairs = is_f32 ? 0 : 16 * job->dim_steps,
                  p_rows = is_f32 ? 0 : rows * job->p_words;
    const int64_t n_words = job->n16 * job->dim_steps + job->n_steps * job->dim16 + pairs +
                            rows * (2 * job->q_words + job->n16 + job->p_words + job->dim16) +
                            p_rows;
    char *at = cpu_scratch_reserve(&job->state->thread[thread], (size_t)(n_words + 9 * 16) * 4);
    h->keys = cpu_carve(&at, job->n16 * job->dim_steps);
    h->values = cpu_carve(&at, job->n_steps * job->dim16);
    h->pairs = cpu_carve(&at, pairs);
    h->q_rows = cpu_carve(&at, rows * job->q_words);
    h->q_columns = cpu_carve(&at, job->q_words * rows);
    h->scores = cpu_carve(&at, rows * job->n16);
    h->p_rows = is_f32 ? (uint32_t *)h->scores : cpu_carve(&at, p_rows);
    h->p_columns = cpu_carve(&at, job->p_words * rows);
    h->sums = cpu_carve(&at, rows * job->dim16);
}

/* Keys of n <= 16 rows from `row` on, dimension by dimension. */
static void pack_keys(const struct full_job *job, struct full_head *h, uint32_t *keys, int64_t row,
                      int64_t column, int64_t n)
{
    const uint32_t *from = (const uint32_t *)cpu_row(job->k, row) + column;
    int64_t from_row = job->k->row_stride;
    if (job->factor.source != TILE_F32) {
        for (int64_t r = 0; r < n; r++) {
            h->pairs[r * job->dim_steps + job->dim_steps - 1] = 0;
            job->state->vector->to_bf16((uint16_t *)(h->pairs + r * job->dim_steps),
                                        cpu_row(job->k, row + r) + column, job->head_dim);
        }
        from = h->pairs;
        from_row = job->dim_steps;
    }
    if (n < 16)
        memset(keys, 0, (size_t)job->dim_steps * BLOCK_BYTES);
    job->state->vector->transpose(keys, 16, from, from_row, n, job->dim_steps);
}

static void head_pack(const struct full_job *job, struct full_head *h, int64_t first_row,
                      int64_t column)
{
    const int64_t dim = job->head_dim, n = job->n_tokens;
    for (int64_t i = 0; i < n; i += 16)
        pack_keys(job, h, h->keys + i * job->dim_steps, first_row + i, column,
                  n - i < 16 ? n - i : 16);
    for (int64_t i = 0; i < job->n_steps; i++) {
        uint32_t *values = h->values + i * job->dim16;
        const int64_t token = i * job->factor.step;
        const float *row = cpu_row(job->v, first_row + token) + column;
        if (job->factor.source == TILE_F32)
            memcpy(values, row, (size_t)dim * sizeof(float));
        else
            job->state->vector->pair_bf16(values, row,
                                          token + 1 < n ? row + job->v->row_stride : NULL, dim);
        memset(values + dim, 0, (size_t)(job->dim16 - dim) * 4);
    }
}

/* scores [n_rows][n16] <- q K^T of query rows [row, row + n_rows). */
static void score_keys(const struct full_job *job, struct full_head *h, int64_t row, int64_t column,
                       int n_rows)
{
    const struct cpu_vector_ops *vector = job->state->vector;
    cpu_factor_rows(vector, &job->factor, h->q_rows, job->q_words, cpu_row(job->q, row) + column,
                    job->q->row_stride, n_rows, job->head_dim);
    struct cpu_factor_place q =
        cpu_factor_place(vector, h->q_rows, job->q_words, h->q_columns, n_rows, job->q_words);
    struct tile product = {
        .a = q.a,
        .a_step = q.a_step,
        .a_row = q.a_row,
        .b = h->keys,
        .b_step = 16 * job->factor.step,
        .b_block = job->dim_steps * 16 * job->factor.step,
        .c = h->scores,
        .c_row = job->n16,
        .n_k = job->dim_steps,
    };
    job->state->tile->run(&product, n_rows, (int)(job->n16 / 16), job->factor.source);
}

/* sums [n_rows][dim16] <- p V, p being e^(score - m) in `scores`. */
static void sum_values(const struct full_job *job, struct full_head *h, int n_rows)
{
    const struct cpu_vector_ops *vector = job->state->vector;
    int64_t p_row = job->n16;
    if (job->factor.source != TILE_F32) {
        p_row = job->p_words;
        cpu_factor_rows(vector, &job->factor, h->p_rows, p_row, h->scores, job->n16, n_rows,
                        job->n_tokens);
    }
    struct cpu_factor_place p =
        cpu_factor_place(vector, h->p_rows, p_row, h->p_columns, n_rows, job->p_words);
    struct tile product = {
        .a = p.a,
        .a_step = p.a_step,
        .a_row = p.a_row,
        .b = h->values,
        .b_step = job->dim16 * job->factor.step,
        .b_block = 16 * job->factor.step,
        .c = h->sums,
        .c_row = job->dim16,
        .n_k = job->n_steps,
    };
    job->state->tile->run(&product, n_rows, (int)(job->dim16 / 16), job->factor.source);
}

/* Query rows [row, row + n_rows) of one head whose first row is `first_row`. */
static void head_rows(const struct full_job *job, struct full_head *h, int64_t first_row,
                      int64_t column, int64_t row, int n_rows, float *probs)
{
    const struct cpu_vector_ops *vector = job->state->vector;
    const int64_t n = job->n_tokens;
    struct softmax softmax[TILE_ROWS_MAX];
    int64_t lo[TILE_ROWS_MAX], hi[TILE_ROWS_MAX];
    float correction[TILE_ROWS_MAX]; // no older sums: unused
    for (int r = 0; r < n_rows; r++) {
        softmax[r] = (struct softmax){.m = -__builtin_inff(), .l = 0.0f};
        lo[r] = 0;
        hi[r] = n;
    }
    score_keys(job, h, first_row + row, column, n_rows);
    vector->softmax_step(h->scores, job->n16, n_rows, lo, hi, job->scale, softmax, correction);
    for (int r = 0; r < n_rows && probs; r++)
        vector->divide(probs + (row + r) * n, h->scores + r * job->n16, softmax[r].l, n);
    sum_values(job, h, n_rows);
    for (int r = 0; r < n_rows; r++)
        vector->divide(cpu_row(job->out, first_row + row + r) + column, h->sums + r * job->dim16,
                       softmax[r].l, job->head_dim);
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
                   float scale, enum dtype dtype, float *probs)
{
    struct full_job job = {.state = cpu_state(b), .out = out, .q = q, .k = k, .v = v};
    job.n_tiles = n_tiles;
    job.n_tokens = tensor_n_rows(q) / n_tiles;
    job.n_heads = n_heads;
    job.head_dim = tensor_n_cols(q) / n_heads;
    job.scale = scale;
    job.probs = probs;
    job.factor = cpu_factor_of(job.state->tile->takes_bf16, dtype);
    job.n16 = cpu_round16(job.n_tokens);
    job.dim16 = cpu_round16(job.head_dim);
    job.n_steps = (job.n_tokens + job.factor.step - 1) / job.factor.step;
    job.dim_steps = (job.head_dim + job.factor.step - 1) / job.factor.step;
    job.q_words = job.dim_steps * job.factor.words;
    job.p_words = job.n_steps * job.factor.words;
    int64_t n_heads_total = n_tiles * n_heads;
    job.n_splits = (int32_t)((job.state->n_threads + n_heads_total - 1) / n_heads_total);
    cpu_parts_init(job.state, n_heads_total * job.n_splits);
    cpu_parallel(
        b, cpu_product_cost(job.state, 2 * tensor_n_rows(q) * job.n_tokens * tensor_n_cols(q)),
        full_work, &job);
}
