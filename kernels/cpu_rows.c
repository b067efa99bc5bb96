/*
 * The ops that work row by row on the CPU: norms, sums, gated activation. Rows are shared out
 * over the threads; a row is one thread's, so nothing depends on their number.
 */
#include "kernels/cpu_backend.h"

/* One op of this file: what to do with a row, and its operands. */
struct rows_job {
    const struct cpu_vector_ops *vector;
    void (*row)(const struct rows_job *job, int64_t i);
    struct tensor *y, *y2;
    const struct tensor *x;
    const float *weight, *bias;
    float eps;
    enum activation act;
};

static void rows_work(void *arg, int thread, int n_threads)
{
    const struct rows_job *job = arg;
    int64_t first, end;
    cpu_share(tensor_n_rows(job->y), thread, n_threads, &first, &end);
    for (int64_t i = first; i < end; i++)
        job->row(job, i);
}

/* cost: float operations an element of y, about. */
static void rows_run(struct backend *b, struct rows_job *job, int64_t cost)
{
    job->vector = cpu_state(b)->vector;
    cpu_parallel(b, tensor_n_elements(job->y) * cost, rows_work, job);
}

static void rms_norm_row(const struct rows_job *job, int64_t i)
{
    job->vector->rms_norm(cpu_row(job->y, i), cpu_row(job->x, i), job->weight,
                          tensor_n_cols(job->y), job->eps);
}

void cpu_rms_norm(struct backend *b, struct tensor *y, const struct tensor *x, const float *weight,
                  float eps)
{
    struct rows_job job = {.row = rms_norm_row, .y = y, .x = x, .weight = weight, .eps = eps};
    rows_run(b, &job, 1);
}

static void add_rms_norm_row(const struct rows_job *job, int64_t i)
{
    int64_t n = tensor_n_cols(job->y);
    float *x = cpu_row(job->y2, i);
    job->vector->add(x, cpu_row(job->x, i), n);
    job->vector->rms_norm(cpu_row(job->y, i), x, job->weight, n, job->eps);
}

void cpu_add_rms_norm(struct backend *b, struct tensor *y, struct tensor *x,
                      const struct tensor *add, const float *weight, float eps)
{
    struct rows_job job = {.row = add_rms_norm_row, .y = y, .y2 = x, .x = add, .weight = weight};
    job.eps = eps;
    rows_run(b, &job, 2);
}

static void layer_norm_row(const struct rows_job *job, int64_t i)
{
    job->vector->layer_norm(cpu_row(job->y, i), cpu_row(job->x, i), job->weight, job->bias,
                            tensor_n_cols(job->y), job->eps);
}

void cpu_layer_norm(struct backend *b, struct tensor *y, const struct tensor *x,
                    const float *weight, const float *bias, float eps)
{
    struct rows_job job = {.row = layer_norm_row, .y = y, .x = x, .weight = weight, .bias = bias};
    job.eps = eps;
    rows_run(b, &job, 1);
}

static void add_row(const struct rows_job *job, int64_t i)
{
    job->vector->add(cpu_row(job->y, i), cpu_row(job->x, i), tensor_n_cols(job->y));
}

void cpu_add(struct backend *b, struct tensor *y, const struct tensor *x)
{
    struct rows_job job = {.row = add_row, .y = y, .x = x};
    rows_run(b, &job, 1);
}

static void add_bias_row(const struct rows_job *job, int64_t i)
{
    job->vector->add(cpu_row(job->y, i), job->bias, tensor_n_cols(job->y));
}

void cpu_add_bias(struct backend *b, struct tensor *y, const float *bias)
{
    struct rows_job job = {.row = add_bias_row, .y = y, .bias = bias};
    rows_run(b, &job, 1);
}

static void gated_row(const struct rows_job *job, int64_t i)
{
    const struct tensor *y = job->y;
    const float *x = cpu_row(job->x, i);
    const int64_t n = tensor_n_cols(y);
    job->vector->finish(&(struct finish){.y = cpu_element(y, i, 0),
                                         .x = x,
                                         .up = x + n,
                                         .n_rows = 1,
                                         .n = n,
                                         .act = job->act,
                                         .rounds = y->dtype == DTYPE_BF16});
}

void cpu_gated_activation(struct backend *b, struct tensor *y, const struct tensor *x,
                          enum activation act)
{
    struct rows_job job = {.row = gated_row, .y = y, .x = x, .act = act};
    rows_run(b, &job, 4);
}
