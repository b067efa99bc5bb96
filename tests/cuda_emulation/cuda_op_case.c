/*
 * The CUDA back end's op_test: each op against its naive loop, in float32 and bfloat16, and what
 * must be equal to the last bit. Built twice from the same sources: with the emulation (label
 * cuda-emulated), and with the real toolkit for a machine that has a device (target
 * cuda_op_test_real).
 */
#include "tests/cuda_emulation/cuda_op_case.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/log.h"

int case_small;
static uint32_t random_state = 1;
static void *host_blocks[4096], *device_blocks[4096];
static int n_host, n_device;

static void *keep_host(void *p)
{
    if (n_host == 4096)
        BUG("too many blocks in one case");
    return host_blocks[n_host++] = p;
}

static void *keep_device(void *p)
{
    if (n_device == 4096)
        BUG("too many device blocks in one case");
    return device_blocks[n_device++] = p;
}

void case_clear(struct backend *b)
{
    while (n_host)
        free(host_blocks[--n_host]);
    while (n_device)
        op_free(b, device_blocks[--n_device]);
}

void case_seed(uint32_t seed)
{
    random_state = seed * 2654435761u + 1;
}

static uint32_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

int case_integer(int n)
{
    return (int)(next_random() % (uint32_t)n);
}

float *case_floats(int64_t n, float scale, enum dtype t)
{
    float *p = keep_host(xcalloc((size_t)n + 1, sizeof(*p)));

    for (int64_t i = 0; i < n; i++) {
        p[i] = (float)(int32_t)next_random() / 2147483648.0f * scale;
        if (t == DTYPE_BF16)
            p[i] = bf16_to_f32(f32_to_bf16(p[i]));
    }
    return p;
}

float *case_upload(struct backend *b, const float *host, int64_t n)
{
    float *p = keep_device(op_alloc(b, (size_t)n * sizeof(*p)));

    op_upload(b, p, host, (size_t)n * sizeof(*p));
    return p;
}

int32_t *case_upload_ids(struct backend *b, const int32_t *host, int64_t n)
{
    int32_t *p = keep_device(op_alloc(b, (size_t)n * sizeof(*p)));

    op_upload(b, p, host, (size_t)n * sizeof(*p));
    return p;
}

struct case_matrix case_matrix_new(struct backend *b, enum dtype t, int64_t m, int64_t n, int pad)
{
    struct case_matrix c = {.host = case_floats(m * n, 1, t)};
    size_t n_bytes = (size_t)(m * (n + pad)) * dtype_size(t);
    char *raw = xcalloc(n_bytes + 1, 1);

    memset(raw, 0xff, n_bytes); // between the rows: NaN
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            if (t == DTYPE_F32)
                ((float *)raw)[i * (n + pad) + j] = c.host[i * n + j];
            else
                ((uint16_t *)raw)[i * (n + pad) + j] = f32_to_bf16(c.host[i * n + j]);
        }
    }
    c.device = tensor_2d(keep_device(op_alloc(b, n_bytes)), t, m, n);
    c.device.row_stride = n + pad;
    op_upload(b, c.device.data, raw, n_bytes);
    free(raw);
    return c;
}

float *case_download(struct backend *b, const struct tensor *t)
{
    int64_t m = tensor_n_rows(t), n = tensor_n_cols(t);
    size_t size = dtype_size(t->dtype);
    size_t n_bytes = (size_t)((m - 1) * t->row_stride + n) * size;
    char *raw = xcalloc(n_bytes + 1, 1);
    float *p = keep_host(xcalloc((size_t)(m * n) + 1, sizeof(*p)));

    op_download(b, raw, t->data, n_bytes);
    for (int64_t i = 0; i < m; i++)
        tensor_widen(p + i * n, raw + (size_t)(i * t->row_stride) * size, t->dtype, n);
    free(raw);
    return p;
}

#define N_REPORTS 64
static struct report {
    char op[48];
    double nmse, bound;
} reports[N_REPORTS];

void case_compare(struct backend *b, const char *op, const struct tensor *got, const float *want,
                  double bound)
{
    const float *values = case_download(b, got);
    int64_t n = tensor_n_elements(got);
    double error = 0, power = 0;

    for (int64_t i = 0; i < n; i++) {
        double d = (double)values[i] - want[i];
        error += d * d;
        power += (double)want[i] * want[i];
    }
    double nmse = power > 0 ? error / power : error;
    if (!(nmse <= bound))
        fail_msg("%s %s [%lld, %lld]: nmse %.3g, bound %.3g", op, dtype_name(got->dtype),
                 (long long)tensor_n_rows(got), (long long)tensor_n_cols(got), nmse, bound);
    char name[48];
    snprintf(name, sizeof(name), "%s %s", op, dtype_name(got->dtype));
    for (struct report *r = reports; r < reports + N_REPORTS; r++) {
        if (r->op[0] && strcmp(r->op, name) != 0)
            continue;
        memcpy(r->op, name, sizeof(name));
        r->bound = bound;
        r->nmse = nmse > r->nmse ? nmse : r->nmse;
        return;
    }
    fail_msg("more than %d ops in one report", N_REPORTS);
}

void case_same(struct backend *b, const struct tensor *x, const struct tensor *y, const char *what)
{
    const float *vx = case_download(b, x), *vy = case_download(b, y);

    for (int64_t i = 0; i < tensor_n_elements(x); i++) {
        if (memcmp(vx + i, vy + i, sizeof(float)) != 0)
            fail_msg("%s (%s): element %lld is %.9g and %.9g", what, dtype_name(x->dtype),
                     (long long)i, vx[i], vy[i]);
    }
}

void case_report(void)
{
    for (struct report *r = reports; r < reports + N_REPORTS && r->op[0]; r++)
        printf("    %-44s nmse %8.2g  bound %8.2g\n", r->op, r->nmse, r->bound);
    memset(reports, 0, sizeof(reports));
}

struct linear case_linear(int64_t n, int64_t k, int n_lanes, enum dtype dtype)
{
    struct linear l = {.out_dim = n, .in_dim = k, .dtype = dtype, .n_lanes = n_lanes};

    for (int i = 1; i < n_lanes; i++)
        l.lane_start[i] = k * i / n_lanes / 8 * 8;
    l.lane_start[n_lanes] = k;
    return l;
}

struct backend *case_open(enum dtype activation_dtype, int deterministic)
{
    struct cuda_options o = {.activation_dtype = activation_dtype, .deterministic = deterministic};

    /* One in cuda_race_test, which sees what threads of the host write but not how they meet. */
    o.n_threads = case_small ? 1 : 3;
    o.scratch_bytes = (size_t)1 << 20; // small: long calls go in pieces
    return backend_cuda_open(&o);
}

int main(int argc, char **argv)
{
    log_init();
    case_small = argc > 1 && !strcmp(argv[1], "--small");
    if (backend_cuda_count() == 0) {
        printf("skipped: this machine has no CUDA device\n");
        return 77;
    }
    struct backend *b = case_open(DTYPE_F32, 0);
    printf("device: %s\n", b->ops->describe(b));
    backend_close(b);
    return cuda_matmul_tests() + cuda_quantized_tests() + cuda_fp8_tests() + cuda_row_tests() +
                   cuda_attention_tests() + cuda_all_reduce_tests() + cuda_top_k_tests() +
                   cuda_draw_tests()
               ? 1
               : 0;
}
