/*
 * From a listed weight to codes and scales (weight_codes.h).
 */
#include "daemon/model/weight_codes.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

void weight_codes_init(struct quantized *q, const struct weights *w, const struct weight_spec *as,
                       int64_t n_rows, struct range columns, uint8_t *codes)
{
    int64_t first = columns.start / as->group_size;
    q->format = as->format;
    q->out_dim = n_rows;
    q->in_dim = columns.n;
    q->group_size = as->group_size;
    q->codes = codes;
    if (as->has_order) {
        int32_t *group_of = xcalloc((size_t)columns.n, sizeof(*group_of));
        for (int64_t k = 0; k < columns.n; k++)
            group_of[k] = stored_codes_group(weights_codes(w, as), columns.start + k);
        q->group_of = group_of;
        q->n_groups = weights_codes(w, as)->n_groups;
    } else {
        q->group_phase = columns.start % as->group_size;
        q->n_groups = (columns.start + columns.n - 1) / as->group_size - first + 1;
    }
    q->scales = xcalloc((size_t)(n_rows * q->n_groups), sizeof(float));
    if (as->has_zeros)
        q->zeros = xcalloc((size_t)(n_rows * q->n_groups), 1);
}

void weight_codes_release(struct quantized *q)
{
    free((void *)(uintptr_t)q->group_of);
    free(q->scales);
    free(q->zeros);
    *q = (struct quantized){0};
}

/* ---- quantising ---- */

/* Rows that are quantised together: those that bitsandbytes' groups over the flattened weight do
 * not leave; else one. */
struct unit {
    int64_t n_rows, n_columns;
    int64_t group_size; // of the flattened rows
};

static struct unit unit_of(const struct weight_spec *as)
{
    struct unit u = {.n_rows = 1, .n_columns = weight_spec_columns(as)};
    if (as->format == WEIGHT_NF4 || as->format == WEIGHT_FP4) {
        u.group_size = BITSANDBYTES_GROUP;
        u.n_rows = BITSANDBYTES_GROUP / as->group_size;
    } else {
        u.group_size = as->group_size;
    }
    return u;
}

/* Memory of one thread. */
struct unit_memory {
    float *rows;    // [n_rows, n_columns]
    uint8_t *codes; // the same
    float *scales;  // of each group
};

/* Unit `i` of `s` into memory. */
static void quantize_unit(const struct unit *u, struct unit_memory *m, const struct weights *w,
                          const struct weight_spec *s, enum weight_format format, int64_t i,
                          enum dtype dtype)
{
    int64_t n = 0, group = 0, end = weight_spec_rows(s);
    for (int64_t r = 0; r < u->n_rows && (i * u->n_rows + r < end || r == 0); r++) {
        weights_row(w, s, i * u->n_rows + r, m->rows + n);
        n += u->n_columns;
    }
    if (dtype == DTYPE_BF16)
        for (int64_t k = 0; k < n; k++)
            m->rows[k] = bf16_to_f32(f32_to_bf16(m->rows[k]));
    for (int64_t k = 0, size; k < n; k += size, group++) {
        size = n - k < u->group_size ? n - k : u->group_size;
        m->scales[group] =
            quantize_group(format, m->rows + k, size, size < u->group_size, m->codes + k);
    }
}

/* One row of the unit to row `to` of q. */
static void take_row(struct quantized *q, int64_t to, const struct unit *u,
                     const struct unit_memory *m, int64_t row, struct range columns)
{
    int64_t first = columns.start - q->group_phase, at = row * u->n_columns;
    memcpy(q->codes + to * q->in_dim, m->codes + at + columns.start, (size_t)columns.n);
    for (int64_t g = 0; g < q->n_groups; g++)
        q->scales[to * q->n_groups + g] =
            m->scales[(at + first + g * q->group_size) / u->group_size];
}

/* What a team of threads does to the rows of one weight. */
struct codes_job {
    struct quantized *q;
    int64_t first_row;
    const struct weights *w;
    const struct weight_spec *s;
    const struct stored_codes *stored; // then no unit
    struct unit unit;
    struct range rows, columns;
    enum dtype dtype;
};

static void quantize_work(void *arg, int thread, int n_threads)
{
    const struct codes_job *job = arg;
    const struct unit *u = &job->unit;
    const int64_t n_floats = u->n_rows * u->n_columns, end = job->rows.start + job->rows.n;
    const int64_t first_unit = job->rows.start / u->n_rows;
    const int64_t n_units = (end + u->n_rows - 1) / u->n_rows - first_unit;
    struct unit_memory m = {.rows = xcalloc((size_t)n_floats, sizeof(float)),
                            .codes = xcalloc((size_t)n_floats, 1),
                            .scales = xcalloc((size_t)n_floats, sizeof(float))};
    for (int64_t i = first_unit + n_units * thread / n_threads;
         i < first_unit + n_units * (thread + 1) / n_threads; i++) {
        quantize_unit(u, &m, job->w, job->s, job->q->format, i, job->dtype);
        for (int64_t r = 0; r < u->n_rows; r++) {
            int64_t row = i * u->n_rows + r;
            if (row >= job->rows.start && row < end)
                take_row(job->q, job->first_row + row - job->rows.start, u, &m, r, job->columns);
        }
    }
    free(m.rows);
    free(m.codes);
    free(m.scales);
}

/* ---- taking a checkpoint's codes ---- */

static void take_work(void *arg, int thread, int n_threads)
{
    const struct codes_job *job = arg;
    int64_t first = job->rows.n * thread / n_threads, end = job->rows.n * (thread + 1) / n_threads;
    int64_t start = job->rows.start + job->w->sources[job->s - job->w->list.specs].first_row;
    stored_codes_rows(job->stored, (struct range){start + first, end - first}, job->columns, job->q,
                      job->first_row + first);
}

/* ---- either ---- */

uint64_t weight_codes_read(struct quantized *q, int64_t first_row, const struct weights *w,
                           const struct weight_spec *s, const struct weight_spec *as,
                           struct range rows, struct range columns, enum dtype dtype,
                           struct backend *b)
{
    struct codes_job job = {.q = q,
                            .first_row = first_row,
                            .w = w,
                            .s = s,
                            .stored = weights_codes(w, s),
                            .rows = rows,
                            .columns = columns,
                            .dtype = dtype};
    int64_t there = weight_spec_rows(s) - rows.start;
    if (job.stored)
        job.rows.n = there < rows.n ? (there > 0 ? there : 0) : rows.n;
    else
        job.unit = unit_of(as);
    op_parallel(b, job.stored ? take_work : quantize_work, &job);
    if (job.stored)
        return weight_spec_quantized_bytes(as, job.rows, columns);
    const struct safetensors_tensor *t = w->sources[s - w->list.specs].tensor;
    return (uint64_t)(rows.n * weight_spec_columns(s)) * dtype_size(t ? t->dtype : DTYPE_F32);
}

uint64_t weight_codes_values(const struct weights *w, const struct weight_spec *s, int64_t row,
                             struct range columns, float *values)
{
    struct quantized q = {0};
    uint8_t *codes = xcalloc((size_t)columns.n, 1);
    int64_t first = w->sources[s - w->list.specs].first_row;
    weight_codes_init(&q, w, s, 1, columns, codes);
    stored_codes_rows(weights_codes(w, s), (struct range){row + first, 1}, columns, &q, 0);
    for (int64_t k = 0; k < columns.n; k++)
        values[k] = quantized_value(&q, 0, k);
    weight_codes_release(&q);
    free(codes);
    return weight_spec_quantized_bytes(s, (struct range){row, 1}, columns);
}
