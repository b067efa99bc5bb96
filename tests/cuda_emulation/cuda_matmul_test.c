/*
 * CUDA's matmul: values against the naive loop over shapes, types, lanes and epilogues; batch and
 * layout invariance bit for bit; a captured graph; the tree sum of comm_nccl.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/cuda_emulation/cuda_op_case.h"
#include "tests/op/op_naive.h"

static struct linear linear_of(struct backend *b, const struct tensor *w, enum dtype dtype,
                               int n_lanes, const struct tensor *bias)
{
    struct linear l = case_linear(w->shape[0], w->shape[1], n_lanes, dtype);

    op_linear_pack(b, &l, w, bias);
    return l;
}

static struct tensor host_weight(int64_t n, int64_t k, enum dtype dtype)
{
    return tensor_2d(case_floats(n * k, 1, dtype), DTYPE_F32, n, k);
}

struct shape {
    int m, n, k, n_lanes;
};
static const struct shape shapes[] = {
    {1, 1, 1, 1},     {1, 16, 16, 1},  {3, 64, 64, 8},    {4, 130, 96, 1},  {5, 48, 255, 2},
    {13, 96, 128, 8}, {40, 31, 80, 4}, {64, 128, 300, 4}, {1, 300, 700, 8}, {600, 40, 24, 2}};

static void check_values(struct backend *b, const struct shape *s, enum dtype weights,
                         enum dtype values, int variant)
{
    struct case_matrix x = case_matrix_new(b, values, s->m, s->k, variant & 1 ? 8 : 0);
    struct case_matrix y = case_matrix_new(b, values, s->m, s->n, variant & 2 ? 4 : 0);
    struct case_matrix residual = case_matrix_new(b, values, s->m, s->n, variant & 1 ? 4 : 0);
    struct tensor hx = tensor_2d(x.host, DTYPE_F32, s->m, s->k);
    struct tensor hr = tensor_2d(residual.host, DTYPE_F32, s->m, s->n);
    struct tensor w = host_weight(s->n, s->k, weights);
    struct tensor bias = tensor_1d(case_floats(s->n, 1, weights), DTYPE_F32, s->n);
    const float *scale = case_floats(s->n, 1, DTYPE_F32);
    float *want = case_floats((int64_t)s->m * s->n, 0, DTYPE_F32);
    struct linear l = linear_of(b, &w, weights, s->n_lanes, variant & 2 ? &bias : NULL);
    struct epilogue e = {.act = (enum activation)(variant < 16 ? 0 : variant % 6)};
    double bound = values == DTYPE_F32 ? 1e-11 : 2e-5; // bfloat16 rounds once or twice

    e.scale = variant & 4 ? case_upload(b, scale, s->n) : NULL;
    e.residual = variant & 8 ? &residual.device : NULL;
    naive_matmul(want, &hx, &w, weights == DTYPE_BF16, variant & 2 ? bias.data : NULL, e.act,
                 variant & 4 ? scale : NULL, variant & 8 ? &hr : NULL);
    op_matmul(b, &y.device, &x.device, &l, &e);
    case_compare(b, weights == DTYPE_F32 ? "matmul, weights f32," : "matmul, weights bf16,",
                 &y.device, want, bound);
    if (e.residual) { // in place: the residual is y itself
        op_copy(b, &y.device, &residual.device);
        e.residual = &y.device;
        op_matmul(b, &y.device, &x.device, &l, &e);
        case_compare(b, "matmul in place", &y.device, want, bound);
    }
    op_linear_free(b, &l);
    case_clear(b);
}

static void test_values(void **state)
{
    (void)state;
    case_seed(1);
    for (int deterministic = 0; deterministic < 2; deterministic++) {
        for (int values = DTYPE_F32; values <= DTYPE_BF16; values++) {
            struct backend *b = case_open((enum dtype)values, deterministic);
            for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s += 1 + 3 * case_small) {
                for (int variant = 0; variant < 32; variant += 1 + (s > 2) + 8 * case_small) {
                    check_values(b, &shapes[s], DTYPE_F32, (enum dtype)values, variant);
                    check_values(b, &shapes[s], DTYPE_BF16, (enum dtype)values, variant);
                }
            }
            backend_close(b);
        }
    }
    case_report();
}

/* float16 weights widen to float32 or round to bfloat16; bfloat16 ones are kept as they are. */
static void test_stored_types(void **state)
{
    (void)state;
    struct backend *b = case_open(DTYPE_F32, 0);
    _Float16 half[6 * 8];
    uint16_t brain[6 * 8];
    float *want = case_floats(4 * 6, 0, DTYPE_F32), *values = case_floats(6 * 8, 1, DTYPE_BF16);
    struct case_matrix x = case_matrix_new(b, DTYPE_BF16, 4, 8, 0);
    struct tensor f16 = tensor_2d(half, DTYPE_F16, 6, 8), bf = tensor_2d(brain, DTYPE_BF16, 6, 8);
    struct tensor hx = tensor_2d(x.host, DTYPE_F32, 4, 8), hw = tensor_2d(values, DTYPE_F32, 6, 8);
    const struct tensor *stored[] = {&f16, &bf};
    float *device_x = case_upload(b, x.host, 32);
    struct tensor dx = tensor_2d(device_x, DTYPE_F32, 4, 8);
    struct case_matrix y = case_matrix_new(b, DTYPE_F32, 4, 6, 0);

    for (int i = 0; i < 48; i++) {
        half[i] = (_Float16)values[i];
        values[i] = (float)half[i]; // small bfloat16 values lose bits in float16
        values[i] = bf16_to_f32(f32_to_bf16(values[i]));
        half[i] = (_Float16)values[i];
        brain[i] = f32_to_bf16(values[i]);
    }
    naive_matmul(want, &hx, &hw, 0, NULL, ACTIVATION_NONE, NULL, NULL);
    for (int i = 0; i < 4; i++) {
        struct linear l = linear_of(b, stored[i / 2], i % 2 ? DTYPE_BF16 : DTYPE_F32, 1, NULL);
        op_matmul(b, &y.device, &dx, &l, NULL);
        case_compare(b, "matmul, stored f16 or bf16,", &y.device, want, 1e-11);
        op_linear_free(b, &l);
    }
    case_clear(b);
    backend_close(b);
    case_report();
}

/* A row's result is the same among any number of others. */
static void test_rows_are_independent(void **state)
{
    (void)state;
    case_seed(2);
    for (int deterministic = 0; deterministic < 2; deterministic++) {
        struct backend *b = case_open(DTYPE_BF16, deterministic);
        struct case_matrix x = case_matrix_new(b, DTYPE_BF16, 29, 96, 0);
        struct case_matrix all = case_matrix_new(b, DTYPE_BF16, 29, 70, 0);
        struct case_matrix other = case_matrix_new(b, DTYPE_BF16, 29, 70, 0);
        struct tensor w = host_weight(70, 96, DTYPE_BF16);
        struct linear l = linear_of(b, &w, DTYPE_BF16, 4, NULL);
        struct epilogue e = {.act = ACTIVATION_GELU};
        op_matmul(b, &all.device, &x.device, &l, &e);
        for (int i = 0; i < 29;) {
            int n = i < 10 ? 1 : case_integer(29 - i) + 1;
            struct tensor y1 = tensor_rows(&other.device, i, n);
            struct tensor x1 = tensor_rows(&x.device, i, n);
            op_matmul(b, &y1, &x1, &l, &e);
            i += n;
        }
        case_same(b, &all.device, &other.device, "matmul row by row");
        op_linear_free(b, &l);
        case_clear(b);
        backend_close(b);
    }
}

/* Deterministic: T shards of neighbouring lanes, added by the tree, equal the whole. */
static void check_shards(struct backend *b, enum dtype dtype, int n_shards)
{
    const int m = 5, n = 40, k = 224;
    struct case_matrix x = case_matrix_new(b, dtype, m, k, 0);
    struct case_matrix want = case_matrix_new(b, DTYPE_F32, m, n, 0);
    struct case_matrix sum = case_matrix_new(b, DTYPE_F32, m, n, 0);
    struct case_matrix parts = case_matrix_new(b, DTYPE_F32, (int64_t)m * n_shards, n, 0);
    struct tensor w = host_weight(n, k, dtype);
    struct linear whole = linear_of(b, &w, dtype, LANES_MAX, NULL);

    op_matmul(b, &want.device, &x.device, &whole, NULL);
    for (int t = 0; t < n_shards; t++) {
        const int64_t *start = whole.lane_start + t * LANES_MAX / n_shards;
        struct linear l = {.out_dim = n, .dtype = dtype, .n_lanes = LANES_MAX / n_shards};
        for (int i = 0; i <= l.n_lanes; i++)
            l.lane_start[i] = start[i] - start[0];
        l.in_dim = l.lane_start[l.n_lanes];
        struct tensor columns = tensor_columns(&w, start[0], l.in_dim);
        struct tensor x1 = tensor_columns(&x.device, start[0], l.in_dim);
        struct tensor y1 = tensor_rows(&parts.device, (int64_t)t * m, m);
        op_linear_pack(b, &l, &columns, NULL);
        op_matmul(b, &y1, &x1, &l, NULL);
        op_linear_free(b, &l);
    }
    backend_cuda_tree_sum(b, sum.device.data, parts.device.data, n_shards, (size_t)(m * n));
    case_same(b, &want.device, &sum.device, "sum of shards");
    op_linear_free(b, &whole);
    case_clear(b);
}

static void test_shards_add_up(void **state)
{
    (void)state;
    struct backend *b = case_open(DTYPE_BF16, 1);

    case_seed(3);
    for (int n_shards = 1; n_shards <= LANES_MAX; n_shards *= 2) {
        check_shards(b, DTYPE_F32, n_shards);
        check_shards(b, DTYPE_BF16, n_shards);
    }
    backend_close(b);
}

/* Weights packed one behind the other, of more than the staging memory holds: each must have been
 * read before another part is put in its place. */
static void test_packed_in_a_row(void **state)
{
    enum { N_WEIGHTS = 5, M = 2, N = 1040, K = 1024, FIRST = 2 * LINEAR_PACK_ROWS };
    (void)state;
    assert_true(N_WEIGHTS * N * K * sizeof(float) > CUDA_STAGING_BYTES);
    struct backend *b = case_open(DTYPE_F32, 0);
    struct tensor w[N_WEIGHTS];
    struct linear l[N_WEIGHTS];

    case_seed(6);
    struct case_matrix x = case_matrix_new(b, DTYPE_F32, M, K, 0);
    struct case_matrix y = case_matrix_new(b, DTYPE_F32, M, N, 0);
    struct tensor hx = tensor_2d(x.host, DTYPE_F32, M, K);
    for (int i = 0; i < N_WEIGHTS; i++)
        w[i] = host_weight(N, K, DTYPE_F32);
    for (int i = 0; i < N_WEIGHTS; i++) {
        struct tensor top = tensor_2d(w[i].data, DTYPE_F32, FIRST, K);
        struct tensor rest = tensor_2d((float *)w[i].data + FIRST * K, DTYPE_F32, N - FIRST, K);
        l[i] = (struct linear){.out_dim = N, .in_dim = K, .dtype = DTYPE_F32, .n_lanes = 1};
        l[i].lane_start[1] = K;
        op_linear_pack_rows(b, &l[i], 0, &top, NULL);
        op_linear_pack_rows(b, &l[i], FIRST, &rest, NULL);
    }
    for (int i = 0; i < N_WEIGHTS; i++) {
        float *want = case_floats(M * N, 0, DTYPE_F32);
        naive_matmul(want, &hx, &w[i], 0, NULL, ACTIVATION_NONE, NULL, NULL);
        op_matmul(b, &y.device, &x.device, &l[i], NULL);
        case_compare(b, "weights packed in a row", &y.device, want, 1e-11);
        op_linear_free(b, &l[i]);
    }
    case_clear(b);
    backend_close(b);
}

/* A recorded step runs on what its buffers hold at each replay. */
static void test_graph(void **state)
{
    (void)state;
    struct backend *b = case_open(DTYPE_BF16, 0);
    case_seed(4);
    struct case_matrix x = case_matrix_new(b, DTYPE_BF16, 3, 64, 0);
    struct case_matrix x2 = case_matrix_new(b, DTYPE_BF16, 3, 64, 0);
    struct case_matrix y = case_matrix_new(b, DTYPE_BF16, 3, 32, 0);
    struct case_matrix want = case_matrix_new(b, DTYPE_BF16, 3, 32, 0);
    struct tensor w = host_weight(32, 64, DTYPE_BF16);
    struct linear l = linear_of(b, &w, DTYPE_BF16, 1, NULL);
    const float *weight = case_upload(b, case_floats(64, 1, DTYPE_F32), 64);

    op_matmul(b, &y.device, &x.device, &l, NULL); // chooses the algorithm
    op_graph_begin(b);
    op_rms_norm(b, &x.device, &x.device, weight, 1e-6f);
    op_matmul(b, &y.device, &x.device, &l, NULL);
    struct graph *g = op_graph_end(b);
    for (int i = 0; i < 2; i++) {
        const struct tensor *input = i ? &x2.device : &x.device;
        struct case_matrix copy = case_matrix_new(b, DTYPE_BF16, 3, 64, 0);
        op_copy(b, &copy.device, input);
        op_copy(b, &x.device, input);
        op_graph_launch(b, g);
        op_rms_norm(b, &copy.device, &copy.device, weight, 1e-6f);
        op_matmul(b, &want.device, &copy.device, &l, NULL);
        case_same(b, &want.device, &y.device, "a replayed graph");
    }
    op_graph_free(b, g);
    op_linear_free(b, &l);
    case_clear(b);
    backend_close(b);
}

int cuda_matmul_tests(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_stored_types),
        cmocka_unit_test(test_rows_are_independent),
        cmocka_unit_test(test_shards_add_up),
        cmocka_unit_test(test_packed_in_a_row),
        cmocka_unit_test(test_graph),
    };
    return cmocka_run_group_tests_name("cuda matmul", tests, NULL, NULL);
}
