/*
 * matmul: values against the naive loop over shapes, types, lanes and epilogues; and the promises
 * of batch and layout invariance, bit for bit.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/cpu_cores.h"
#include "kernels/log.h"
#include "tests/op/op_case.h"
#include "tests/op/op_naive.h"

static struct linear linear_of(const struct tensor *w, enum dtype dtype, int n_lanes)
{
    return op_case_linear(w->shape[0], w->shape[1], dtype, n_lanes);
}

/* The same values stored as another type; caller frees .data. */
static struct tensor stored_as(const struct tensor *w, enum dtype t)
{
    int64_t n = tensor_n_elements(w);
    uint16_t *h = xcalloc((size_t)n + 1, sizeof(*h));
    for (int64_t i = 0; i < n; i++) {
        float f = ((const float *)w->data)[i];
        _Float16 f16 = (_Float16)f;
        if (t == DTYPE_BF16)
            h[i] = f32_to_bf16(f);
        else
            memcpy(&h[i], &f16, sizeof(f16));
    }
    return tensor_2d(h, t, w->shape[0], w->shape[1]);
}

struct shape {
    int m, n, k, n_lanes;
};
static const struct shape shapes[] = {
    {1, 1, 1, 1},    {1, 16, 16, 1},  {1, 17, 33, 2},    {2, 15, 7, 4},   {3, 64, 65, 8},
    {4, 130, 96, 1}, {5, 48, 255, 2}, {7, 100, 130, 4},  {12, 33, 64, 1}, {13, 96, 128, 8},
    {25, 65, 90, 2}, {40, 31, 5, 8},  {64, 128, 300, 4}, {1, 300, 700, 8}};
#define N_SHAPES ((int)(sizeof(shapes) / sizeof(shapes[0])))

/* One shape with the epilogue that `variant` chooses. */
static void check_values(struct backend *b, const struct shape *s, enum dtype dtype,
                         enum dtype stored, int variant)
{
    struct tensor x = variant & 1 ? op_case_strided(s->m, s->k) : op_case_matrix(s->m, s->k);
    struct tensor w = op_case_matrix(s->n, s->k), y = op_case_strided(s->m, s->n);
    struct tensor residual = op_case_matrix(s->m, s->n), raw = {0};
    struct tensor bias = tensor_1d(op_case_floats(s->n, 1), DTYPE_F32, s->n);
    float *scale = op_case_floats(s->n, 1), *want = op_case_floats((int64_t)s->m * s->n, 0);
    if (stored != DTYPE_F32) {
        raw = stored_as(&w, stored);
        tensor_widen(w.data, raw.data, stored, tensor_n_elements(&w));
    }
    struct linear l = linear_of(&w, dtype, s->n_lanes);
    op_linear_pack(b, &l, raw.data ? &raw : &w, variant & 2 ? &bias : NULL);
    struct epilogue e = {.act = (enum activation)(variant % 6)};
    e.scale = variant & 4 ? scale : NULL;
    e.residual = variant & 8 ? &residual : NULL;
    naive_matmul(want, &x, &w, dtype == DTYPE_BF16, variant & 2 ? bias.data : NULL, e.act, e.scale,
                 e.residual);
    op_matmul(b, &y, &x, &l, &e);
    op_case_compare(dtype == DTYPE_F32 ? "matmul float32" : "matmul bfloat16", &y, want, 1e-11);
    if (e.residual) { // in place: the residual is y itself
        op_copy(b, &y, &residual);
        e.residual = &y;
        op_matmul(b, &y, &x, &l, &e);
        op_case_compare("matmul in place", &y, want, 1e-11);
    }
    op_linear_free(b, &l);
    free(x.data);
    free(w.data);
    free(y.data);
    free(residual.data);
    free(raw.data);
    free(bias.data);
    free(scale);
    free(want);
}

static void test_values(void **state)
{
    (void)state;
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        printf("  %s\n", b->ops->describe(b));
        op_case_seed(1);
        for (int s = 0; s < N_SHAPES; s++) {
            for (int variant = 0; variant < 16; variant++) {
                static const enum dtype stored[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F16};
                check_values(b, &shapes[s], DTYPE_F32, stored[variant % 3], variant);
                check_values(b, &shapes[s], DTYPE_BF16, stored[variant % 3], variant);
            }
        }
        op_case_report();
        backend_close(b);
    }
}

/* y <- x W^T in a fresh back end. */
static void product(const char *isa, int n_threads, struct tensor *y, const struct tensor *x,
                    const struct tensor *w, enum dtype dtype, int n_lanes)
{
    struct backend *b = backend_cpu_open(n_threads, isa);
    struct linear l = linear_of(w, dtype, n_lanes);
    struct epilogue e = {.act = ACTIVATION_GELU};
    /* By several threads in parts, too. */
    int64_t part = n_threads == 1 ? l.out_dim : LINEAR_PACK_ROWS * (n_threads - 1);
    for (int64_t first = 0; first < l.out_dim; first += part) {
        int64_t n = part < l.out_dim - first ? part : l.out_dim - first;
        struct tensor rows = tensor_rows(w, first, n);
        op_linear_pack_rows(b, &l, first, &rows, NULL);
    }
    op_matmul(b, y, x, &l, &e);
    op_linear_free(b, &l);
    backend_close(b);
}

/* M rows at once, by one thread and by several, equal M calls of one row. */
static void check_rows(const char *isa, enum dtype dtype, int m, int n, int k, int n_lanes)
{
    struct tensor x = op_case_matrix(m, k), w = op_case_matrix(n, k);
    struct tensor all = op_case_matrix(m, n), other = op_case_matrix(m, n);
    size_t n_bytes = (size_t)(m * n) * sizeof(float);
    product(isa, 1, &all, &x, &w, dtype, n_lanes);
    for (int n_threads = 2; n_threads <= 5; n_threads++) {
        product(isa, n_threads, &other, &x, &w, dtype, n_lanes);
        op_case_same(all.data, other.data, n_bytes, "matmul by several threads");
    }
    struct backend *b = backend_cpu_open(2, isa);
    struct linear l = linear_of(&w, dtype, n_lanes);
    struct epilogue e = {.act = ACTIVATION_GELU};
    op_linear_pack(b, &l, &w, NULL);
    for (int i = 0; i < m;) {
        int rows = i < m / 2 ? 1 : op_case_integer(m - i) + 1;
        struct tensor y1 = tensor_rows(&other, i, rows), x1 = tensor_rows(&x, i, rows);
        op_matmul(b, &y1, &x1, &l, &e);
        i += rows;
    }
    op_case_same(all.data, other.data, n_bytes, "matmul row by row");
    op_linear_free(b, &l);
    backend_close(b);
    free(x.data);
    free(w.data);
    free(all.data);
    free(other.data);
}

static void test_rows_are_independent(void **state)
{
    (void)state;
    for (int i = 0; i < op_n_isas; i++) {
        if (!op_case_has(op_isas[i]))
            continue;
        op_case_seed(2);
        for (int dtype = DTYPE_F32; dtype <= DTYPE_BF16; dtype++) {
            check_rows(op_isas[i], (enum dtype)dtype, 29, 112, 300, 1);
            check_rows(op_isas[i], (enum dtype)dtype, 14, 70, 301, 8);
            check_rows(op_isas[i], (enum dtype)dtype, 150, 33, 90, 4);
            check_rows(op_isas[i], (enum dtype)dtype, 110, 560, 40, 2); // blocks are kept
        }
    }
}

/* T shards of neighbouring lanes, added as a tree, equal the whole. */
static void check_shards(struct backend *b, enum dtype dtype, int n_shards)
{
    const int m = 5, n = 40, k = 223;
    struct tensor x = op_case_matrix(m, k), w = op_case_matrix(n, k), want = op_case_matrix(m, n);
    struct tensor part[LANES_MAX];
    struct linear whole = linear_of(&w, dtype, LANES_MAX);
    op_linear_pack(b, &whole, &w, NULL);
    op_matmul(b, &want, &x, &whole, NULL);
    for (int t = 0; t < n_shards; t++) {
        const int64_t *start = whole.lane_start + t * LANES_MAX / n_shards;
        struct linear l = {.out_dim = n, .dtype = dtype, .n_lanes = LANES_MAX / n_shards};
        for (int i = 0; i <= l.n_lanes; i++)
            l.lane_start[i] = start[i] - start[0];
        l.in_dim = l.lane_start[l.n_lanes];
        struct tensor columns = tensor_columns(&w, start[0], l.in_dim);
        struct tensor x1 = tensor_columns(&x, start[0], l.in_dim);
        part[t] = op_case_matrix(m, n);
        op_linear_pack(b, &l, &columns, NULL);
        op_matmul(b, &part[t], &x1, &l, NULL);
        op_linear_free(b, &l);
    }
    for (int step = 1; step < n_shards; step *= 2) {
        for (int t = 0; t < n_shards; t += 2 * step)
            op_add(b, &part[t], &part[t + step]);
    }
    op_case_same(want.data, part[0].data, (size_t)(m * n) * sizeof(float), "sum of shards");
    op_linear_free(b, &whole);
    for (int t = 0; t < n_shards; t++)
        free(part[t].data);
    free(x.data);
    free(w.data);
    free(want.data);
}

static void test_shards_add_up(void **state)
{
    (void)state;
    for (int i = 0; i < op_n_isas; i++) {
        if (!op_case_has(op_isas[i]))
            continue;
        struct backend *b = backend_cpu_open(2, op_isas[i]);
        op_case_seed(3);
        for (int n_shards = 1; n_shards <= LANES_MAX; n_shards *= 2) {
            check_shards(b, DTYPE_F32, n_shards);
            check_shards(b, DTYPE_BF16, n_shards);
        }
        backend_close(b);
    }
}

/* The two tiles of AVX-512 BF16 flush the same denormals: factors whose products are denormal,
 * sums that become so, operands that are. */
static void test_bf16_tiles_agree(void **state)
{
    (void)state;
    const int m = 13, n = 50, k = 333;
    if (!op_case_has("avx512bf16"))
        return;
    op_case_seed(6);
    struct tensor x = op_case_matrix(m, k), w = op_case_matrix(n, k);
    struct tensor dots = op_case_matrix(m, n), fma = op_case_matrix(m, n),
                  kept = op_case_matrix(m, n);
    const size_t n_bytes = (size_t)(m * n) * sizeof(float);
    for (int power = -130; power <= -10; power += 10) { // of x; products lie around 2^-126
        for (int i = 0; i < m * k; i++)
            ((float *)x.data)[i] = ldexpf(op_case_random(), power + i % 7);
        for (int i = 0; i < n * k; i++)
            ((float *)w.data)[i] = ldexpf(op_case_random(), -126 - power + i % 11 - 8);
        product("avx512bf16", 2, &dots, &x, &w, DTYPE_BF16, 4);
        product("avx512bf16fma", 2, &fma, &x, &w, DTYPE_BF16, 4);
        product("avx512", 2, &kept, &x, &w, DTYPE_BF16, 4);
        op_case_same(dots.data, fma.data, n_bytes, "FMA tiles");
        assert_memory_not_equal(dots.data, kept.data, n_bytes);
    }
    free(x.data);
    free(w.data);
    free(dots.data);
    free(fma.data);
    free(kept.data);
}

/* Float32 weights give the same bits on every instruction set; bfloat16 ones too, as long as no
 * product or sum is denormal (vdpbf16ps flushes those). */
static void test_isas_agree(void **state)
{
    (void)state;
    const int m = 17, n = 50, k = 333;
    op_case_seed(4);
    struct tensor x = op_case_matrix(m, k), w = op_case_matrix(n, k);
    struct tensor want = op_case_matrix(m, n), y = op_case_matrix(m, n);
    for (int dtype = DTYPE_F32; dtype <= DTYPE_BF16; dtype++) {
        product("scalar", 1, &want, &x, &w, (enum dtype)dtype, 4);
        for (int i = 0; i < op_n_isas; i++) {
            if (!op_case_has(op_isas[i]))
                continue;
            product(op_isas[i], 2, &y, &x, &w, (enum dtype)dtype, 4);
            op_case_same(want.data, y.data, (size_t)(m * n) * sizeof(float), op_isas[i]);
        }
    }
    free(x.data);
    free(w.data);
    free(want.data);
    free(y.data);
}

/* Gate and up, with whole blocks of sixteen rows each and without. */
static void test_gated(void **state)
{
    (void)state;
    static const struct shape gated[] = {
        {1, 96, 65, 1},  {3, 64, 130, 4}, {4, 16, 96, 1},  {13, 80, 64, 8},
        {29, 160, 7, 1}, {1, 40, 33, 2},  {17, 24, 96, 1}, {110, 528, 40, 2},
    };
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        op_case_seed(5);
        for (int s = 0; s < (int)(sizeof(gated) / sizeof(gated[0])); s++) {
            for (int variant = 0; variant < 4; variant++) {
                struct tensor w = op_case_matrix(2 * gated[s].n, gated[s].k);
                struct tensor bias = op_case_matrix(1, 2 * gated[s].n);
                struct linear l =
                    linear_of(&w, variant & 1 ? DTYPE_BF16 : DTYPE_F32, gated[s].n_lanes);
                op_linear_pack(b, &l, &w, variant & 2 ? &bias : NULL);
                op_case_check_gated(b, &l, gated[s].m);
                op_linear_free(b, &l);
                free(w.data);
                free(bias.data);
            }
        }
        backend_close(b);
    }
}

/* More rows than go through a weight together equal those of two calls, the residual being added to
 * where it is. */
static void check_parts(struct backend *b, enum dtype dtype)
{
    enum { M = 600, N = 32, K = 8200, FIRST = 301 };
    struct tensor x = op_case_strided(M, K), w = op_case_matrix(N, K);
    struct tensor y = op_case_strided(M, N), want = y;
    const size_t n_bytes = (size_t)(M * y.row_stride) * sizeof(float);
    float *scale = op_case_floats(N, 1);
    struct linear l = linear_of(&w, dtype, 2);
    want.data = op_case_floats(M * y.row_stride, 0);
    memcpy(want.data, y.data, n_bytes);
    op_linear_pack(b, &l, &w, NULL);
    op_matmul(b, &y, &x, &l, &(struct epilogue){.scale = scale, .residual = &y});
    for (int64_t first = 0; first < M; first += FIRST) {
        int64_t n = first ? M - FIRST : FIRST;
        struct tensor to = tensor_rows(&want, first, n), of = tensor_rows(&x, first, n);
        op_matmul(b, &to, &of, &l, &(struct epilogue){.scale = scale, .residual = &to});
    }
    op_case_same(want.data, y.data, n_bytes, "rows in parts");
    op_case_check_gated(b, &l, M);
    op_linear_free(b, &l);
    free(x.data);
    free(w.data);
    free(y.data);
    free(want.data);
    free(scale);
}

static void test_rows_in_parts(void **state)
{
    (void)state;
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        op_case_seed(7);
        check_parts(b, DTYPE_F32);
        check_parts(b, DTYPE_BF16);
        backend_close(b);
    }
}

/* y in bfloat16 is float32's, rounded. */
static void check_rounded_output(struct backend *b, const struct linear *l, const struct tensor *x,
                                 enum activation act)
{
    const int64_t m = x->shape[0], n = l->out_dim;
    struct tensor y = op_case_matrix(m, n), rounded = op_case_strided(m, n), widened = y;
    struct epilogue e = {.act = act};
    rounded.dtype = DTYPE_BF16;
    widened.data = op_case_floats(m * n, 0);
    op_matmul(b, &y, x, l, &e);
    op_matmul(b, &rounded, x, l, &e);
    op_copy(b, &widened, &rounded);
    for (int64_t i = 0; i < m * n; i++)
        ((float *)y.data)[i] = bf16_to_f32(f32_to_bf16(((float *)y.data)[i]));
    op_case_same(y.data, widened.data, (size_t)(m * n) * sizeof(float), "rounded output");
    free(y.data);
    free(rounded.data);
    free(widened.data);
}

/* What is rounded already gives the bits of what is rounded for the product. */
static void test_rounded(void **state)
{
    (void)state;
    for (int i = 0; i < op_n_isas; i++) {
        struct backend *b = op_case_open(op_isas[i], 2);
        if (!b)
            continue;
        op_case_seed(6);
        for (int s = 0; s < N_SHAPES; s++) {
            const struct shape *shape = &shapes[s];
            struct tensor x = op_case_matrix(shape->m, shape->k), rounded = x;
            struct tensor w = op_case_matrix(shape->n, shape->k);
            struct tensor want = op_case_matrix(shape->m, shape->n);
            struct tensor y = op_case_matrix(shape->m, shape->n);
            struct linear l = linear_of(&w, DTYPE_BF16, shape->n_lanes);
            rounded.dtype = DTYPE_BF16;
            rounded.row_stride = shape->k + 3;
            rounded.data = op_case_strided(shape->m, shape->k).data;
            op_copy(b, &rounded, &x);
            op_linear_pack(b, &l, &w, NULL);
            op_matmul(b, &want, &x, &l, NULL);
            op_matmul(b, &y, &rounded, &l, NULL);
            op_case_same(want.data, y.data, (size_t)(shape->m * shape->n) * sizeof(float),
                         "rounded input");
            check_rounded_output(b, &l, &x, (enum activation)(s % 6));
            op_linear_free(b, &l);
            free(x.data);
            free(rounded.data);
            free(w.data);
            free(want.data);
            free(y.data);
        }
        backend_close(b);
    }
}

struct at_work {
    const struct core_claim *mine;
    _Atomic int n_threads, n_unclaimed;
};

static void look_at_claim(void *arg, int thread, int n_threads)
{
    struct at_work *w = arg;
    atomic_fetch_add(&w->n_threads, 1);
    atomic_fetch_add(&w->n_unclaimed, atomic_load(&w->mine->until_ns) != UINT64_MAX);
    (void)thread, (void)n_threads;
}

/* Who has one core left is seen to be at work too. */
static void test_claims(void **state)
{
    (void)state;
    struct core_claim claims[2] = {{0}};
    struct cpu_cores cores = {.claims = claims, .n_ranks = 2, .n_cores = 2};
    struct at_work w = {.mine = &claims[0]};
    struct backend *b = backend_cpu_open(2, NULL);
    backend_cpu_share(b, &cores);
    for (int busy = 0; busy < 2; busy++) {
        atomic_store(&claims[1].until_ns, busy ? UINT64_MAX : 0);
        op_parallel(b, look_at_claim, &w); // the share of the op after it
        w = (struct at_work){.mine = &claims[0]};
        op_parallel(b, look_at_claim, &w);
        assert_int_equal(atomic_load(&w.n_threads), busy ? 1 : 2);
        assert_int_equal(atomic_load(&w.n_unclaimed), 0);
        assert_true(atomic_load(&claims[0].until_ns) != UINT64_MAX);
    }
    backend_close(b);
}

/* How many threads an op takes changes from one to the next while others come and go; its bits
 * do not. */
static void test_cores_are_shared(void **state)
{
    (void)state;
    enum { M = 40, N = 300, K = 257, N_OTHERS = 5 };
    struct core_claim claims[1 + N_OTHERS] = {{0}};
    struct cpu_cores cores = {.claims = claims, .n_ranks = 1 + N_OTHERS, .n_cores = 6};
    op_case_seed(6);
    struct tensor x = op_case_matrix(M, K), w = op_case_matrix(N, K);
    struct tensor want = op_case_matrix(M, N), y = op_case_matrix(M, N);
    struct linear l = linear_of(&w, DTYPE_BF16, 4);
    struct epilogue e = {.act = ACTIVATION_GELU};
    struct backend *b = backend_cpu_open(6, NULL);
    product(NULL, 1, &want, &x, &w, DTYPE_BF16, 4);
    backend_cpu_share(b, &cores);
    op_linear_pack(b, &l, &w, NULL);
    for (int i = 0; i < 200; i++) {
        for (int r = 1; r <= N_OTHERS; r++)
            atomic_store(&claims[r].until_ns, r <= i * 7 % (N_OTHERS + 1) ? UINT64_MAX : 0);
        memset(y.data, 0xff, M * N * sizeof(float));
        op_matmul(b, &y, &x, &l, &e);
        op_case_same(want.data, y.data, M * N * sizeof(float), "shared cores");
    }
    op_linear_free(b, &l);
    backend_close(b);
    free(x.data);
    free(w.data);
    free(want.data);
    free(y.data);
}

static void test_no_rows(void **state)
{
    (void)state;
    struct backend *b = backend_cpu_open(2, NULL);
    struct tensor w = op_case_matrix(8, 8), x = tensor_2d(w.data, DTYPE_F32, 0, 8);
    struct tensor y = tensor_2d(w.data, DTYPE_F32, 0, 8);
    struct linear l = linear_of(&w, DTYPE_F32, 1);
    op_linear_pack(b, &l, &w, NULL);
    op_matmul(b, &y, &x, &l, NULL);
    op_linear_free(b, &l);
    backend_close(b);
    free(w.data);
}

int op_matmul_tests(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),           cmocka_unit_test(test_rows_are_independent),
        cmocka_unit_test(test_shards_add_up),    cmocka_unit_test(test_isas_agree),
        cmocka_unit_test(test_bf16_tiles_agree), cmocka_unit_test(test_gated),
        cmocka_unit_test(test_rounded),          cmocka_unit_test(test_claims),
        cmocka_unit_test(test_cores_are_shared), cmocka_unit_test(test_no_rows),
        cmocka_unit_test(test_rows_in_parts),
    };
    return cmocka_run_group_tests_name("matmul", tests, NULL, NULL);
}
