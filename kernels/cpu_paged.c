/*
 * Causal attention over pages on the CPU.
 *
 * A few query rows of one kv head walk their keys in steps of positions: scores = q K^T by the tile
 * product, one softmax step a row, sums += p V by the tile product. A row's result is a function of
 * its own query and keys: every score is one accumulator over head_dim in order, every output one
 * accumulator over the keys in order, every softmax sum the fixed tree of its step; rows share a
 * tile only to share what is loaded.
 *
 * With bfloat16 pages both products are bfloat16's, in pairs of dimensions and of positions (2 i, 2
 * i + 1): queries are rounded once, and so is each e^(score - m) before it meets the values. The
 * sum that the result is divided by is of the unrounded ones, as in PyTorch's flash attention on
 * CPUs. Where a row sees one key of a pair, the other's value is taken as 0, whatever is there.
 *
 * Int8 pages are bfloat16's pairs of codes, expanded in registers; scores and e^(score - m) are
 * multiplied with the scales of keys and values on their way.
 *
 * Many rows of a prompt, over bfloat16 pages and with vdpbf16ps, lie key by key instead, as
 * vision's do (cpu_attention.c): scores = K q^T, the keys of a page being the left factor as they
 * are, and e^(score - m) comes out as the left factor of p V. The sums are the same, in the same
 * order.
 */
#include <string.h>

#include "kernels/cpu_backend.h"
#include "kernels/log.h"

/* Key positions of one softmax step, whatever the page size: [i * step, (i + 1) * step). */
#define STEP_F32 64
#define STEP_BF16 256
#define STEP_MAX STEP_BF16
#define RUNS_MAX (STEP_MAX / 16)
#define GROUP 96     // rows that lie key by key: whole tiles, and whole vectors of their softmax
#define KEYS 8       // of a product with them: even parts of the sixteen that lie in one page
#define FETCH_ROWS 4 // of those that are fetched, at each such product
#define ITEMS_A_THREAD 8
#define ITEM_TILES_MAX 32

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
    int64_t item_rows;        // of a sequence and kv head: what a thread takes at a time
    int64_t *item_start;      // [n_sequences + 1] the first item of each
    struct cpu_factor factor; // of queries and of p
    int pairs;                // 0 with float32 pages, else 1
    int has_groups;           // 1 where tiles have up to GROUP rows, else up to TILE_ROWS_MAX
    int has_scales;           // 1 with int8 pages
    int64_t step;             // positions
    int64_t dim, dim16;       // head_dim; rounded up to 16
    int64_t key_bytes;        // of one key, or its values, and their scale
    size_t element;           // of the page's type
    size_t head_bytes;        // kv_head_bytes()
    size_t block_bytes;       // of sixteen keys of one dimension, or of a pair
    size_t step_bytes;        // of the values of one key or pair of them, of dim16 dimensions
};

/* The keys of one step that lie in one page. */
struct paged_run {
    const char *k, *v;              // of the first of these keys
    const float *k_scale, *v_scale; // theirs, with int8 pages
    int64_t column, n;              // of the step: [column, column + n), multiples of 16
};

/* Key positions first + [from, to), multiples of 16, of which a row may see any. */
struct paged_step {
    int64_t first, from, to;
    int n_runs;
    struct paged_run runs[RUNS_MAX];
};

/* A few (token, head) rows of one sequence that read the same kv head; a later one sees no fewer
 * keys at the end and no more at the beginning. More than TILE_ROWS_MAX lie key by key. */
struct paged_tile {
    int32_t sequence, kv_head, n_rows;
    int is_first;  // of its item
    int n_fetched; // rows
    int32_t token[GROUP], head[GROUP];
    int64_t lo[GROUP], hi[GROUP]; // key positions it sees: [lo, hi)
    int64_t page, slot;           // of the first key after the steps so far
    struct softmax softmax[GROUP];
    const struct paged_step *next; // NULL, or the step whose keys and values products fetch
    struct cpu_factor_place queries, p;
    uint32_t *q_rows;    // [rows][dim16]
    uint32_t *q_columns; // [dim16][TILE_ROWS_MAX], or [GROUP / 16][pairs of dim16][16]
    float *scores;       // [TILE_ROWS_MAX][STEP_MAX], or [STEP_MAX][GROUP], then p there
    uint32_t *p_rows;    // [TILE_ROWS_MAX][STEP_MAX]
    uint32_t *p_columns; // [STEP_MAX][TILE_ROWS_MAX]
    float *l;            // [16][GROUP] of a step
    float *sums;         // [rows][dim16]
    float *scales;       // [STEP_MAX] of the step's keys or values
    char *edge;          // [2][dim16][2] of the page's type: pairs of which one key is seen
    char *values;        // [STEP_MAX][dim16] of the page's type, where they are gathered
};

static void tile_reserve(const struct paged_job *job, struct paged_tile *t, int thread)
{
    const int64_t rows = job->has_groups ? GROUP : TILE_ROWS_MAX, dim = job->dim16;
    const int64_t n_l = job->has_groups ? 16 * rows : 0;
    const int64_t n_values = dim != job->dim ? STEP_MAX * dim : 0;
    const int64_t n_words =
        3 * rows * dim + (rows + 2 * TILE_ROWS_MAX + 1) * STEP_MAX + n_l + 2 * dim + n_values;
    char *at = cpu_scratch_reserve(&job->state->thread[thread], (size_t)n_words * 4);
    t->q_rows = cpu_carve(&at, rows * dim);
    t->q_columns = cpu_carve(&at, dim * rows);
    t->scores = cpu_carve(&at, rows * STEP_MAX);
    t->p_rows = cpu_carve(&at, TILE_ROWS_MAX * STEP_MAX);
    t->p_columns = cpu_carve(&at, STEP_MAX * TILE_ROWS_MAX);
    t->l = cpu_carve(&at, n_l);
    t->sums = cpu_carve(&at, rows * dim);
    t->scales = cpu_carve(&at, STEP_MAX);
    t->edge = cpu_carve(&at, 2 * dim);
    t->values = cpu_carve(&at, n_values);
}

/* The next step of the tile's keys, cut at the ends of pages. */
static void cut_step(const struct paged_job *job, struct paged_tile *t, struct paged_step *s,
                     int64_t from, int64_t to)
{
    const struct kv_pages *kv = job->kv;
    const int64_t size = kv->page_size;
    const int32_t *pages = job->layout->pages + job->layout->page_start[t->sequence];
    s->first = from / job->step * job->step;
    s->from = from - s->first;
    s->to = smaller(to - s->first, job->step);
    s->n_runs = 0;
    for (int64_t column = s->from; column < s->to;) {
        const int64_t n = smaller(size - t->slot, s->to - column);
        const int32_t page = pages[t->page];
        if (page < 0 || page >= kv->n_pages)
            BUG("page %d of %d", page, kv->n_pages);
        const size_t at = (size_t)((int64_t)page * kv->n_kv_heads + t->kv_head) * job->head_bytes;
        const char *k = (const char *)kv->k + at, *v = (const char *)kv->v + at;
        struct paged_run *run = &s->runs[s->n_runs++];
        *run = (struct paged_run){
            .k = k + (size_t)(t->slot << job->pairs) * job->element,
            .v = v + (size_t)(t->slot * job->dim) * job->element,
            .column = column,
            .n = n,
        };
        if (job->has_scales) { // behind the codes of the whole page
            run->k_scale = (const float *)(const void *)(k + job->dim * size) + t->slot;
            run->v_scale = (const float *)(const void *)(v + job->dim * size) + t->slot;
        }
        column += n;
        t->slot += n;
        if (t->slot == size) {
            t->slot = 0;
            t->page++;
        }
    }
}

/* Values of head_dim dimensions, where that is no multiple of 16, are padded to one. */
static void gather_values(const struct paged_job *job, struct paged_tile *t, struct paged_step *s)
{
    const size_t to_bytes = job->step_bytes;
    const size_t bytes = to_bytes / (size_t)job->dim16 * (size_t)job->dim;
    for (int i = 0; i < s->n_runs; i++) {
        struct paged_run *run = &s->runs[i];
        const size_t n = (size_t)(run->n >> job->pairs);
        char *to = t->values + (size_t)(run->column >> job->pairs) * to_bytes;
        for (size_t j = 0; j < n; j++) {
            memcpy(to + j * to_bytes, run->v + j * bytes, bytes);
            memset(to + j * to_bytes + bytes, 0, to_bytes - bytes);
        }
        run->v = to;
    }
}

/* The values of the pair that has key `column`, the other key's being 0. */
static struct tile_part edge_pair(const struct paged_job *job, char *edge,
                                  const struct paged_step *s, int64_t column)
{
    const struct paged_run *run = s->runs;
    while (column >= run->column + run->n)
        run++;
    const char *pair = run->v + (size_t)((column - run->column) / 2) * job->step_bytes;
    const size_t is_odd = (size_t)(column % 2);
    memset(edge, 0, job->step_bytes);
    if (job->has_scales) { // sixteen codes of one key beside the other's
        for (size_t i = is_odd * 16; i < job->step_bytes; i += 2 * 16)
            memcpy(edge + i, pair + i, 16);
    } else {
        for (size_t i = is_odd * sizeof(uint16_t); i < job->step_bytes; i += 2 * sizeof(uint16_t))
            memcpy(edge + i, pair + i, sizeof(uint16_t));
    }
    return (struct tile_part){.b = edge, .n_k = 1};
}

/* The values of keys [from, to) of the step; returns how many parts. */
static int cut_values(const struct paged_job *job, struct paged_tile *t, const struct paged_step *s,
                      int64_t from, int64_t to, struct tile_part parts[RUNS_MAX + 2])
{
    const int64_t whole = to & ~(int64_t)job->pairs;
    const char *v_end = NULL; // of the last part
    int n = 0;
    if (from & job->pairs) {
        parts[n++] = edge_pair(job, t->edge, s, from);
        from++;
    }
    for (int i = 0; i < s->n_runs; i++) {
        const struct paged_run *run = &s->runs[i];
        const int64_t lo = larger(from, run->column), hi = smaller(whole, run->column + run->n);
        if (lo >= hi)
            continue;
        const char *v = run->v + (size_t)((lo - run->column) >> job->pairs) * job->step_bytes;
        if (n == 0 || v != v_end) {
            parts[n++] = (struct tile_part){.b = v};
            if (t->next && i < t->next->n_runs && run->column == lo)
                parts[n - 1].ahead = t->next->runs[i].v;
        }
        parts[n - 1].n_k += (hi - lo) >> job->pairs;
        v_end = v + (size_t)((hi - lo) >> job->pairs) * job->step_bytes;
    }
    if (whole < to)
        parts[n++] = edge_pair(job, t->edge + job->step_bytes, s, whole);
    return n;
}

/* A product of rows that may be more than its tile takes: tiles of about the same height, so that
 * what they read comes from memory once. */
static void run_tiles(const struct paged_job *job, const struct tile *whole, int n_rows,
                      int n_blocks)
{
    const int max_rows = job->state->tile->max_rows, n = (n_rows + max_rows - 1) / max_rows;
    for (int i = 0; i < n; i++) {
        int64_t row, end;
        cpu_share(n_rows, i, n, &row, &end);
        struct tile product = *whole;
        product.a = (const uint32_t *)whole->a + row * whole->a_row;
        product.c = whole->c + row * whole->c_row;
        job->state->tile->run(&product, (int)(end - row), n_blocks, job->factor.source);
    }
}

/* sums[row ..] += p V for n_rows rows from `row` on and keys [from, to) of the step. */
static void add_values(const struct paged_job *job, struct paged_tile *t,
                       const struct paged_step *s, int row, int n_rows, int64_t from, int64_t to)
{
    struct tile_part parts[RUNS_MAX + 2];
    if (from >= to)
        return;
    const int64_t at = (from >> job->pairs) * job->factor.words;
    struct tile product = {
        .a = t->p.a + row * t->p.a_row + at * t->p.a_step,
        .a_step = t->p.a_step,
        .a_row = t->p.a_row,
        .b_step = job->dim16 * job->factor.step,
        .b_block = 16 * job->factor.step,
        .parts = parts,
        .n_parts = cut_values(job, t, s, from, to, parts),
        .c = t->sums + row * job->dim16,
        .c_row = job->dim16,
        .accumulate = 1,
    };
    run_tiles(job, &product, n_rows, (int)(job->dim16 / 16));
}

/* What each row sees of the step, [lo, hi): those keys that all see at once, what is before and
 * after them by the rows that see the same. Each row's keys come in order. */
static void take_values(const struct paged_job *job, struct paged_tile *t,
                        const struct paged_step *s, const int64_t *lo, const int64_t *hi)
{
    const int n_rows = t->n_rows, last = n_rows - 1;
    int64_t all_lo = lo[last], all_hi = hi[0];
    if (lo[0] != lo[last])
        all_lo += all_lo & job->pairs;
    if (hi[0] != hi[last])
        all_hi -= all_hi & job->pairs;
    if (all_lo >= all_hi)
        all_lo = all_hi = job->step;
    for (int is_after = 0; is_after <= 1; is_after++) {
        for (int r = 0, end; r < n_rows; r = end) {
            for (end = r + 1; end < n_rows && lo[end] == lo[r] && hi[end] == hi[r];)
                end++;
            add_values(job, t, s, r, end - r, is_after ? larger(lo[r], all_hi) : lo[r],
                       is_after ? hi[r] : smaller(hi[r], all_lo));
        }
        if (!is_after)
            add_values(job, t, s, 0, n_rows, all_lo, all_hi);
    }
}

/* Pages lie anywhere, so the processor's own prefetch ends at the end of each. Into the
 * second-level cache: a step's keys and values can be more than the first holds. The first tile
 * fetches for those that follow it: line by line as its products go, where they can, so that memory
 * and arithmetic are busy together, else a step at once. */
static void prefetch(const char *p, int64_t n_bytes)
{
    for (int64_t i = 0; i < n_bytes; i += 64)
        __builtin_prefetch(p + i, 0, 2);
}

/* Where each sixteen keys of the step begin; returns how many. */
static int cut_keys(const struct paged_job *job, const struct paged_step *s,
                    const void *blocks[RUNS_MAX])
{
    int n = 0;
    for (int i = 0; i < s->n_runs; i++) {
        for (int64_t j = 0; j < s->runs[i].n / 16; j++)
            blocks[n++] = s->runs[i].k + (size_t)j * job->block_bytes;
    }
    return n;
}

/* The scores of all rows and the keys of the step. */
static void score_keys(const struct paged_job *job, struct paged_tile *t,
                       const struct paged_step *s)
{
    const void *blocks[RUNS_MAX], *ahead[RUNS_MAX];
    const int n_blocks = cut_keys(job, s, blocks);
    for (int i = t->next ? cut_keys(job, t->next, ahead) : 0; i < n_blocks; i++)
        ahead[i] = blocks[i];
    struct tile product = {
        .a = t->queries.a,
        .a_step = t->queries.a_step,
        .a_row = t->queries.a_row,
        .b_step = job->kv->page_size << job->pairs,
        .blocks = blocks,
        .blocks_ahead = t->next ? ahead : NULL,
        .c = t->scores + s->from,
        .c_row = STEP_MAX,
        .n_k = job->dim >> job->pairs,
    };
    run_tiles(job, &product, t->n_rows, n_blocks);
}

/* Scores <- their products with the scales of the step's keys, or of its values, where a row sees
 * them: others may hold anything, and a probability of 0 times that could be a NaN. */
static void multiply_scales(const struct paged_job *job, struct paged_tile *t,
                            const struct paged_step *s, int is_values)
{
    float *scales = t->scales;
    for (int i = 0; i < s->n_runs; i++) {
        const struct paged_run *run = &s->runs[i];
        memcpy(scales + run->column, is_values ? run->v_scale : run->k_scale,
               (size_t)run->n * sizeof(float));
    }
    for (int r = 0; r < t->n_rows; r++) {
        const int64_t lo = larger(t->lo[r] - s->first, s->from);
        const int64_t hi = smaller(t->hi[r] - s->first, s->to);
        if (lo < hi)
            job->state->vector->multiply_by(t->scores + r * STEP_MAX + lo, scales + lo, hi - lo);
    }
}

/* e^(score - m) as the left factor of p V. */
static void place_p(const struct paged_job *job, struct paged_tile *t, const struct paged_step *s)
{
    const struct cpu_vector_ops *vector = job->state->vector;
    if (job->has_scales)
        multiply_scales(job, t, s, 1);
    const struct cpu_factor *f = &job->factor;
    const int64_t at = (s->from >> job->pairs) * f->words;
    int64_t n_words = s->to - s->from;
    uint32_t *rows = (uint32_t *)t->scores + at;
    if (f->source != TILE_F32) {
        rows = t->p_rows + at;
        n_words = cpu_factor_rows(vector, f, rows, STEP_MAX, t->scores + s->from, STEP_MAX,
                                  t->n_rows, n_words);
    }
    t->p = cpu_factor_place(vector, rows, STEP_MAX, t->p_columns + at * TILE_ROWS_MAX, t->n_rows,
                            n_words);
    t->p.a -= at * t->p.a_step;
}

/* Scores of the keys [column, column + KEYS) that a row does not see <- -infinity; the rows before
 * `first` see none of them. */
static void mask_keys(struct paged_tile *t, int64_t column, int first, const int64_t *lo,
                      const int64_t *hi)
{
    const int n_rows = t->n_rows;
    for (int64_t i = column; i < column + KEYS; i++) {
        float *scores = t->scores + i * GROUP;
        while (first < n_rows && hi[first] <= i)
            first++;
        for (int r = 0; r < first; r++)
            scores[r] = -__builtin_inff();
        for (int r = n_rows - 1; r >= 0 && lo[r] > i; r--)
            scores[r] = -__builtin_inff();
    }
}

/* Some lines that the tile will write, and some of queries that the next one may read. */
static void fetch_rows(const struct paged_job *job, struct paged_tile *t)
{
    const int n_tokens = t->token[t->n_rows - 1] - t->token[0] + 1;
    for (int i = 0; i < FETCH_ROWS && t->n_fetched < t->n_rows; i++, t->n_fetched++) {
        const int64_t token = t->token[t->n_fetched], at = t->head[t->n_fetched] * job->dim;
        prefetch((const char *)(cpu_row(job->out, token) + at), job->dim * 4);
        if (token + n_tokens < job->layout->n_tokens)
            prefetch((const char *)(cpu_row(job->q, token + n_tokens) + at), job->dim * 4);
    }
}

/* scores <- K q^T, largest [GROUP] <- the largest that each row sees. */
static void score_group(const struct paged_job *job, struct paged_tile *t,
                        const struct paged_step *s, const int64_t *lo, const int64_t *hi,
                        float *largest)
{
    const int n_blocks = (t->n_rows + 15) / 16;
    for (int r = 0; r < GROUP; r++)
        largest[r] = -__builtin_inff();
    struct tile product = {
        .a_step = job->kv->page_size,
        .a_row = 1,
        .b_step = 2 * 16,
        .b_block = job->dim * 16,
        .c_row = GROUP,
        .n_k = job->dim / 2,
    };
    int first = 0; // of the rows that see a key from `column` on
    for (int i = 0; i < s->n_runs; i++) {
        const struct paged_run *run = &s->runs[i];
        for (int64_t j = 0; j < run->n; j += KEYS) {
            const int64_t column = run->column + j;
            while (first < t->n_rows && hi[first] <= column)
                first++;
            if (first == t->n_rows)
                return;
            const int block = first / 16;
            product.a = (const uint32_t *)(const void *)run->k + j;
            product.b = t->q_columns + block * product.b_block / 2;
            product.c = t->scores + column * GROUP + block * 16;
            job->state->tile->run(&product, KEYS, n_blocks - block, job->factor.source);
            if (column < lo[t->n_rows - 1] || column + KEYS > hi[0])
                mask_keys(t, column, first, lo, hi);
            job->state->vector->columns_largest(largest + block * 16, product.c, GROUP, KEYS,
                                                16 * (n_blocks - block));
            fetch_rows(job, t);
        }
    }
}

/* The softmax step of rows that lie side by side, and their p. */
static void softmax_group(const struct paged_job *job, struct paged_tile *t,
                          const struct paged_step *s, const int64_t *lo, const int64_t *hi,
                          const float *largest, float *correction)
{
    float m[GROUP], fall[GROUP];
    const int64_t n16 = cpu_round16(t->n_rows);
    const int64_t n_keys = (hi[t->n_rows - 1] + 1) / 2 * 2 - s->from; // whole pairs that any sees
    for (int r = 0; r < n16; r++)
        m[r] = fall[r] = 0.0f;
    for (int r = 0; r < t->n_rows; r++) {
        const float old = t->softmax[r].m, now = largest[r] * job->scale;
        if (lo[r] == hi[r])
            continue; // e^(-infinity - 0), whatever m is
        if (now > old) {
            fall[r] = old - now;
            t->softmax[r].m = now;
        }
        m[r] = t->softmax[r].m;
    }
    const struct cpu_vector_ops *vector = job->state->vector;
    vector->exp2_falling(correction, fall, n16);
    memset(t->l, 0, 16 * GROUP * sizeof(float));
    struct softmax_columns softmax = {
        .scores = t->scores + s->from * GROUP,
        .n_keys = n_keys,
        .n = n16,
        .row = GROUP,
        .scale = job->scale,
        .m = m,
        .sums = t->l,
        .p = t->scores + s->from / 2 * GROUP,
        .form = COLUMNS_BF16_PAIRS,
    };
    vector->columns_exp(&softmax);
    vector->columns_total(t->l, GROUP, n16);
    for (int r = 0; r < t->n_rows; r++)
        t->softmax[r].l = t->softmax[r].l * correction[r] + t->l[r];
    t->p = (struct cpu_factor_place){.a = (const uint32_t *)t->scores, .a_step = GROUP, .a_row = 1};
}

/* Each row takes in the keys that it sees of the step. Others may hold anything (a page is reused
 * without being cleared): they enter no sum of the row. */
static void tile_take_step(const struct paged_job *job, struct paged_tile *t, struct paged_step *s)
{
    const int has_sums = s->first + s->from > t->lo[0];
    const struct cpu_vector_ops *vector = job->state->vector;
    int64_t lo[GROUP], hi[GROUP]; // what each row sees of the step
    for (int r = 0; r < t->n_rows; r++) {
        lo[r] = smaller(larger(t->lo[r] - s->first, 0), job->step);
        hi[r] = smaller(larger(t->hi[r] - s->first, lo[r]), job->step);
    }
    float correction[GROUP];
    if (t->n_rows > TILE_ROWS_MAX) {
        float largest[GROUP];
        score_group(job, t, s, lo, hi, largest);
        softmax_group(job, t, s, lo, hi, largest, correction);
    } else {
        score_keys(job, t, s);
        if (job->has_scales)
            multiply_scales(job, t, s, 0);
        vector->softmax_step(t->scores, STEP_MAX, t->n_rows, lo, hi, job->scale, t->softmax,
                             correction);
        place_p(job, t, s);
    }
    for (int r = 0; r < t->n_rows; r++) {
        if (correction[r] != 1.0f && has_sums)
            vector->multiply(t->sums + r * job->dim16, correction[r], job->dim);
    }
    if (job->dim != job->dim16)
        gather_values(job, t, s);
    take_values(job, t, s, lo, hi);
}

static void place_queries(const struct paged_job *job, struct paged_tile *t)
{
    const struct cpu_vector_ops *vector = job->state->vector;
    const int64_t dim = job->dim, dim16 = job->dim16;
    int64_t n_words = 0;
    for (int r = 0; r < t->n_rows; r++)
        n_words = cpu_factor_rows(vector, &job->factor, t->q_rows + r * dim16, dim16,
                                  cpu_row(job->q, t->token[r]) + t->head[r] * dim, 0, 1, dim);
    if (t->n_rows <= TILE_ROWS_MAX) {
        t->queries = cpu_factor_place(vector, t->q_rows, dim16, t->q_columns, t->n_rows, n_words);
        return;
    }
    for (int r = t->n_rows; r < cpu_round16(t->n_rows); r++)
        memset(t->q_rows + r * dim16, 0, (size_t)n_words * 4);
    for (int r = 0; r < t->n_rows; r += 16)
        vector->transpose(t->q_columns + r * n_words, 16, t->q_rows + r * dim16, dim16, 16,
                          n_words);
}

/* 1 where products fetch what the next step will read. */
static int tiles_fetch(const struct paged_job *job, int n_rows)
{
    const int max_rows = job->state->tile->max_rows, n = (n_rows + max_rows - 1) / max_rows;
    return job->factor.words == 1 && n_rows <= TILE_ROWS_MAX && n_rows / n > TILE_ROWS_APART;
}

static void tile_run(const struct paged_job *job, struct paged_tile *t)
{
    const struct cpu_vector_ops *vector = job->state->vector;
    const int64_t dim = job->dim, dim16 = job->dim16;
    const int last = t->n_rows - 1;
    for (int r = 0; r < t->n_rows; r++)
        t->softmax[r] = (struct softmax){.m = -__builtin_inff(), .l = 0.0f};
    place_queries(job, t);
    memset(t->sums, 0, (size_t)(t->n_rows * dim16) * sizeof(float));
    const int64_t from = t->lo[0] / 16 * 16, to = cpu_round16(t->hi[last]);
    t->page = from / job->kv->page_size;
    t->slot = from % job->kv->page_size;
    struct paged_step steps[2];
    const int fetches = tiles_fetch(job, t->n_rows);
    t->next = NULL;
    t->n_fetched = 0;
    cut_step(job, t, &steps[0], from, to);
    for (int i = 0, has_next = 1; has_next; i = !i) {
        const int64_t end = steps[i].first + steps[i].to;
        has_next = end < to;
        if (has_next) {
            struct paged_step *next = &steps[!i];
            cut_step(job, t, next, end, to);
            for (int j = 0; j < next->n_runs && t->is_first && !fetches; j++)
                prefetch(next->runs[j].k, next->runs[j].n * job->key_bytes);
        }
        for (int j = 0; j < steps[i].n_runs && t->is_first && !(fetches && t->next); j++)
            prefetch(steps[i].runs[j].v, steps[i].runs[j].n * job->key_bytes);
        t->next = has_next && t->is_first && fetches ? &steps[!i] : NULL;
        tile_take_step(job, t, &steps[i]);
    }
    for (int r = 0; r < t->n_rows; r++)
        vector->divide(cpu_row(job->out, t->token[r]) + t->head[r] * dim, t->sums + r * dim16,
                       t->softmax[r].l, dim);
}

static int heads_of(const struct paged_job *job, int32_t kv_head)
{
    int n = 0;
    for (int32_t h = 0; h < job->n_heads; h++)
        n += job->kv_of_head[h] == kv_head;
    return n;
}

/* Rows [from, to) of the tile's sequence and kv head, which are its tokens times the heads that
 * read it, token first; there may be fewer. */
static void run_rows(const struct paged_job *job, struct paged_tile *t, int64_t from, int64_t to)
{
    const struct paged_layout *layout = job->layout;
    const int32_t first = layout->query_start[t->sequence];
    const int64_t n_tokens = layout->query_start[t->sequence + 1] - first;
    const int64_t position = layout->context_len[t->sequence] - n_tokens;
    const int64_t n_heads = larger(1, heads_of(job, t->kv_head));
    t->n_rows = 0;
    t->is_first = 1;
    for (int64_t i = from / n_heads, row = i * n_heads; i < n_tokens && row < to; i++) {
        for (int32_t h = 0; h < job->n_heads; h++) {
            if (job->kv_of_head[h] != t->kv_head || row++ < from || row > to)
                continue;
            const int64_t hi = position + i + 1;
            t->token[t->n_rows] = first + (int32_t)i;
            t->head[t->n_rows] = h;
            t->hi[t->n_rows] = hi;
            t->lo[t->n_rows] = job->window > 0 && hi > job->window ? hi - job->window : 0;
            if (++t->n_rows < job->tile_rows)
                continue;
            tile_run(job, t);
            t->n_rows = 0;
            t->is_first = 0;
        }
    }
    if (t->n_rows)
        tile_run(job, t);
}

/* An item is some rows of a sequence and a kv head. */
static void paged_work(void *arg, int thread, int n_threads)
{
    const struct paged_job *job = arg;
    const int32_t n_kv_heads = job->kv->n_kv_heads;
    struct paged_tile t = {0};
    int64_t item, end;
    (void)n_threads;
    tile_reserve(job, &t, thread);
    while (cpu_parts_take(job->state, thread, 1, &item, &end)) {
        if (item < job->item_start[t.sequence])
            t.sequence = 0;
        while (item >= job->item_start[t.sequence + 1])
            t.sequence++;
        const int64_t place = job->item_start[t.sequence + 1] - 1 - item; // most keys first
        const int64_t from = place / n_kv_heads * job->item_rows;
        t.kv_head = (int32_t)(place % n_kv_heads);
        run_rows(job, &t, from, from + job->item_rows);
    }
}

/* Items of whole tiles, enough for every thread to be busy to the end; returns how many. */
static int64_t cut_items(struct paged_job *job, int64_t n_rows, int n_threads)
{
    const struct paged_layout *layout = job->layout;
    const int64_t n_kv_heads = job->kv->n_kv_heads;
    const int64_t n_tiles = n_rows / (n_threads * ITEMS_A_THREAD * job->tile_rows);
    int64_t most_heads = 1;
    for (int32_t g = 0; g < n_kv_heads; g++)
        most_heads = larger(most_heads, heads_of(job, g));
    job->item_rows = job->tile_rows * larger(1, smaller(n_tiles, ITEM_TILES_MAX));
    job->item_start = cpu_scratch_reserve(&job->state->shared, (size_t)(layout->n_sequences + 1) *
                                                                   sizeof(*job->item_start));
    job->item_start[0] = 0;
    for (int32_t s = 0; s < layout->n_sequences; s++) {
        const int64_t rows = most_heads * (layout->query_start[s + 1] - layout->query_start[s]);
        job->item_start[s + 1] =
            job->item_start[s] + n_kv_heads * ((rows + job->item_rows - 1) / job->item_rows);
    }
    return job->item_start[layout->n_sequences];
}

void cpu_paged_attention(struct backend *b, struct tensor *out, const struct tensor *q,
                         const struct kv_pages *kv, const struct paged_layout *layout,
                         const int32_t *kv_of_head, int32_t n_heads, float scale, int32_t window)
{
    struct paged_job job = {.state = cpu_state(b), .out = out, .q = q, .kv = kv, .layout = layout};
    job.kv_of_head = kv_of_head;
    job.n_heads = n_heads;
    job.scale = scale * LOG2_E;
    job.window = window;
    job.factor = cpu_factor_of(job.state->tile->takes_bf16, kv->dtype);
    job.pairs = kv->dtype != DTYPE_F32;
    job.has_scales = kv->dtype == DTYPE_I8;
    job.has_groups = job.factor.source == TILE_BF16_PAIRS && job.factor.words == 1;
    job.step = job.pairs ? STEP_BF16 : STEP_F32;
    job.dim = kv->head_dim;
    job.dim16 = cpu_round16(job.dim);
    job.element = dtype_size(kv->dtype);
    job.head_bytes = kv_head_bytes(kv->head_dim, kv->page_size, kv->dtype);
    job.key_bytes = (int64_t)job.head_bytes / kv->page_size;
    job.block_bytes = 16 * (size_t)job.factor.step * job.element;
    job.step_bytes = (size_t)(job.dim16 * job.factor.step) * job.element;
    /* Full tiles unless that would leave threads without one. */
    int64_t n_rows = (int64_t)layout->n_tokens * n_heads;
    const int n_threads = job.state->n_threads;
    job.tile_rows =
        (int)smaller((n_rows + n_threads - 1) / n_threads, job.has_groups ? GROUP : TILE_ROWS_MAX);
    const int64_t n_items = cut_items(&job, n_rows, n_threads);
    if (layout->n_tokens > layout->n_sequences)
        cpu_parts_init_in_order(job.state, n_items);
    else
        cpu_parts_init(job.state, n_items);
    cpu_parallel(b,
                 cpu_product_cost(job.state, 2 * n_rows * kv->head_dim * layout->max_context_len),
                 paged_work, &job);
}
