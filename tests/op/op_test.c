/*
 * Every op against its naive loop, on every instruction set of this processor; and what must be
 * equal to the last bit. (How fast: tests/bench/op_bench.)
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/log.h"
#include "tests/op/op_case.h"

const char *const op_isas[] = {"avx512bf16", "avx512bf16fma", "avx512vnni",
                               "avx512",     "avx2",          "scalar"};
const int op_n_isas = (int)(sizeof(op_isas) / sizeof(op_isas[0]));

int op_case_has(const char *isa)
{
    if (backend_cpu_has(isa))
        return 1;
    printf("skipped: this processor lacks %s\n", isa);
    return 0;
}

struct backend *op_case_open(const char *isa, int n_threads)
{
    return op_case_has(isa) ? backend_cpu_open(n_threads, isa) : NULL;
}

struct linear op_case_linear(int64_t out_dim, int64_t in_dim, enum dtype dtype, int n_lanes)
{
    struct linear l = {.out_dim = out_dim, .in_dim = in_dim, .dtype = dtype, .n_lanes = n_lanes};
    for (int i = 1; i < n_lanes; i++)
        l.lane_start[i] = in_dim * i / n_lanes + (i % 3 == 1 && in_dim > 64);
    l.lane_start[n_lanes] = in_dim;
    return l;
}

static uint32_t random_state = 1;

void op_case_seed(uint32_t seed)
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

float op_case_random(void)
{
    return (float)(int32_t)next_random() / 2147483648.0f;
}

int op_case_integer(int n)
{
    return (int)(next_random() % (uint32_t)n);
}

float *op_case_floats(int64_t n, float scale)
{
    float *p = xcalloc((size_t)n + 1, sizeof(*p));
    for (int64_t i = 0; i < n; i++)
        p[i] = op_case_random() * scale;
    return p;
}

struct tensor op_case_matrix(int64_t m, int64_t n)
{
    return tensor_2d(op_case_floats(m * n, 1), DTYPE_F32, m, n);
}

struct tensor op_case_strided(int64_t m, int64_t n)
{
    struct tensor t = op_case_matrix(m, n + 5);
    t.shape[1] = n;
    return t;
}

void op_case_check_gated(struct backend *b, const struct linear *l, int64_t m)
{
    const int64_t d = l->out_dim / 2;
    struct tensor x = op_case_matrix(m, l->in_dim), gate_up = op_case_matrix(m, 2 * d);
    struct tensor scratch = op_case_matrix(m, 2 * d), want = op_case_strided(m, d), y = want;
    y.data = op_case_strided(m, d).data;
    op_matmul(b, &gate_up, &x, l, NULL);
    op_gated_activation(b, &want, &gate_up, ACTIVATION_SILU);
    op_matmul_gated(b, &y, &scratch, &x, l, ACTIVATION_SILU);
    for (int64_t i = 0; i < m; i++)
        op_case_same((float *)want.data + i * want.row_stride, (float *)y.data + i * y.row_stride,
                     (size_t)d * sizeof(float), "gated");
    if (l->dtype == DTYPE_BF16) {
        struct tensor rounded = tensor_2d(scratch.data, DTYPE_BF16, m, d);
        op_copy(b, &rounded, &want);
        y.dtype = DTYPE_BF16;
        op_matmul_gated(b, &y, &gate_up, &x, l, ACTIVATION_SILU);
        for (int64_t i = 0; i < m; i++)
            op_case_same((uint16_t *)rounded.data + i * d, (uint16_t *)y.data + i * y.row_stride,
                         (size_t)d * 2, "gated, rounded");
    }
    free(x.data);
    free(gate_up.data);
    free(scratch.data);
    free(want.data);
    free(y.data);
}

#define N_REPORTS 32
static struct report {
    char op[40];
    double nmse, bound;
} reports[N_REPORTS];

void op_case_compare(const char *op, const struct tensor *got, const float *want, double bound)
{
    int64_t m = tensor_n_rows(got), n = tensor_n_cols(got);
    double error = 0, power = 0;
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double w = want[i * n + j], d = ((const float *)got->data)[i * got->row_stride + j] - w;
            error += d * d;
            power += w * w;
        }
    }
    double nmse = power > 0 ? error / power : error;
    if (!(nmse <= bound))
        fail_msg("%s [%lld, %lld]: nmse %.3g, bound %.3g", op, (long long)m, (long long)n, nmse,
                 bound);
    for (struct report *r = reports; r < reports + N_REPORTS; r++) {
        if (r->op[0] && strcmp(r->op, op) != 0)
            continue;
        snprintf(r->op, sizeof(r->op), "%s", op);
        r->bound = bound;
        r->nmse = nmse > r->nmse ? nmse : r->nmse;
        return;
    }
    fail_msg("more than %d ops in one report", N_REPORTS);
}

void op_case_report(void)
{
    for (struct report *r = reports; r < reports + N_REPORTS && r->op[0]; r++)
        printf("    %-40s nmse %8.2g  bound %8.2g\n", r->op, r->nmse, r->bound);
    memset(reports, 0, sizeof(reports));
}

void op_case_same(const void *a, const void *b, size_t n_bytes, const char *what)
{
    if (memcmp(a, b, n_bytes) == 0)
        return;
    const float *x = a, *y = b;
    for (size_t i = 0; i < n_bytes / sizeof(float); i++) {
        if (memcmp(x + i, y + i, sizeof(float)) != 0)
            fail_msg("%s: element %zu is %.9g and %.9g", what, i, x[i], y[i]);
    }
    fail_msg("%s: bytes differ", what);
}

int main(void)
{
    log_init();
    return op_matmul_tests() + op_quantized_tests() + op_integer_tests() + op_attention_tests() +
                   op_row_tests()
               ? 1
               : 0;
}
