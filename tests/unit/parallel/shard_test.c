/*
 * Shard arithmetic over every head count of the family and some that are awkward: shards partition,
 * lanes do not depend on T, kv groups are never crossed.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "parallel/shard.h"

#define HEAD_DIM 16

static const struct {
    int n_heads, n_kv_heads, n_lanes;
} attentions[] = {
    {14, 2, 8}, {12, 2, 8}, {28, 4, 8}, {40, 8, 8},  {64, 8, 8}, {32, 2, 8}, {8, 4, 8},  {2, 2, 2},
    {1, 1, 1},  {4, 2, 4},  {6, 2, 4},  {25, 25, 1}, {16, 4, 8}, {8, 8, 8},  {16, 1, 8}, {12, 6, 2},
};
#define N_ATTENTIONS (sizeof(attentions) / sizeof(attentions[0]))

static const int64_t widths[] = {4864,  8960, 18944, 29568, 27648, 12288, 3072,
                                 25600, 352,  384,   448,   13,    7,     8};
#define N_WIDTHS (sizeof(widths) / sizeof(widths[0]))

static void check_lanes(const struct lanes *l, int64_t n)
{
    assert_true(l->n >= 1 && l->n <= LANES_MAX && (l->n & (l->n - 1)) == 0);
    assert_int_equal(l->start[0], 0);
    assert_int_equal(l->start[l->n], n);
    for (int i = 0; i < l->n; i++)
        assert_true(l->start[i] < l->start[i + 1]);
}

static void test_lanes_of_heads(void **state)
{
    (void)state;
    for (size_t a = 0; a < N_ATTENTIONS; a++) {
        struct lanes l;
        int group = attentions[a].n_heads / attentions[a].n_kv_heads;
        lanes_of_heads(&l, attentions[a].n_heads, attentions[a].n_kv_heads);
        assert_int_equal(l.n, attentions[a].n_lanes);
        check_lanes(&l, attentions[a].n_heads);
        for (int i = 0; i < l.n; i++) { /* whole groups, or inside one */
            int64_t first = l.start[i], last = l.start[i + 1] - 1;
            int whole = first % group == 0 && (last + 1) % group == 0;
            assert_true(whole || first / group == last / group);
        }
    }
}

static void test_lanes_of_14_heads(void **state)
{
    (void)state;
    static const int64_t expected[] = {0, 2, 4, 6, 7, 9, 11, 13, 14};
    struct lanes l;
    lanes_of_heads(&l, 14, 2);
    assert_memory_equal(l.start, expected, sizeof(expected));
}

static void check_widths(int64_t n, int n_lanes, const int64_t *expected)
{
    struct lanes l;
    lanes_of_columns(&l, n);
    assert_int_equal(l.n, n_lanes);
    check_lanes(&l, n);
    for (int i = 0; i < n_lanes; i++)
        assert_int_equal(l.start[i + 1] - l.start[i], expected[i]);
}

static void test_lanes_of_columns(void **state)
{
    (void)state;
    check_widths(29568, 8,
                 (const int64_t[]){3712, 3712, 3712, 3712, 3712, 3712, 3712, 3584});  // 29 … 28
    check_widths(4864, 8, (const int64_t[]){640, 640, 640, 640, 640, 640, 512, 512}); // 38 units
    check_widths(352, 8, (const int64_t[]){64, 64, 64, 32, 32, 32, 32, 32});
    check_widths(384, 8, (const int64_t[]){64, 64, 64, 64, 32, 32, 32, 32});
    check_widths(448, 8, (const int64_t[]){64, 64, 64, 64, 64, 64, 32, 32});
    check_widths(13, 8, (const int64_t[]){2, 2, 2, 2, 2, 1, 1, 1});
    check_widths(8, 8, (const int64_t[]){1, 1, 1, 1, 1, 1, 1, 1});
    check_widths(7, 4, (const int64_t[]){2, 2, 2, 1});
    check_widths(3, 2, (const int64_t[]){2, 1});
    check_widths(1, 1, (const int64_t[]){1});
    for (int64_t n = 1; n <= 3000; n++) {
        struct lanes l;
        lanes_of_columns(&l, n);
        check_lanes(&l, n);
        for (int i = 0; i + 1 < l.n; i++)
            assert_true(l.start[i + 1] - l.start[i] >= l.start[i + 2] - l.start[i + 1]);
    }
}

/* Shards of T in a row are the whole: `at` and `lane` walk along. */
struct walk {
    int64_t heads, columns;
    int head_lane, column_lane;
};

static void check_shard(const struct layer_shard *s, const struct layer_shard *whole,
                        struct walk *w)
{
    assert_int_equal(s->heads.start, w->heads);
    assert_int_equal(s->columns.start, w->columns);
    check_lanes(&s->head_lanes, s->heads.n * HEAD_DIM);
    check_lanes(&s->column_lanes, s->columns.n);
    for (int i = 0; i <= s->head_lanes.n; i++)
        assert_int_equal(s->head_lanes.start[i] + w->heads * HEAD_DIM,
                         whole->head_lanes.start[w->head_lane + i]);
    for (int i = 0; i <= s->column_lanes.n; i++)
        assert_int_equal(s->column_lanes.start[i] + w->columns,
                         whole->column_lanes.start[w->column_lane + i]);
    w->heads += s->heads.n;
    w->columns += s->columns.n;
    w->head_lane += s->head_lanes.n;
    w->column_lane += s->column_lanes.n;
}

static void check_kv(const struct layer_shard *s, int n_heads, int n_kv_heads)
{
    int group = n_heads / n_kv_heads;
    assert_true(s->kv_heads.start >= 0 && s->kv_heads.n >= 1);
    assert_true(s->kv_heads.start + s->kv_heads.n <= n_kv_heads);
    for (int h = 0; h < s->heads.n; h++) {
        int32_t kv = layer_shard_kv_of_head(s, n_heads, n_kv_heads, h);
        assert_true(kv >= 0 && kv < s->kv_heads.n);
        assert_int_equal(s->kv_heads.start + kv, (s->heads.start + h) / group);
    }
    /* and none is read for nothing */
    assert_int_equal(layer_shard_kv_of_head(s, n_heads, n_kv_heads, 0), 0);
    assert_int_equal(layer_shard_kv_of_head(s, n_heads, n_kv_heads, (int)s->heads.n - 1),
                     s->kv_heads.n - 1);
}

static void check_layout(int n_heads, int n_kv_heads, int64_t width, int T)
{
    struct layer_shard whole, s;
    struct error err = {0};
    struct walk w = {0};
    assert_int_equal(layer_shard_init(&whole, n_heads, n_kv_heads, HEAD_DIM, width, 0, 1, &err), 0);
    if (T > whole.head_lanes.n || T > whole.column_lanes.n) {
        char text[32];
        int n_lanes = T > whole.head_lanes.n ? whole.head_lanes.n : whole.column_lanes.n;
        assert_int_equal(layer_shard_init(&s, n_heads, n_kv_heads, HEAD_DIM, width, 0, T, &err),
                         -1);
        assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
        snprintf(text, sizeof(text), "size %d ", T);
        assert_non_null(strstr(err.msg, text));
        snprintf(text, sizeof(text), "the %d lanes", n_lanes);
        assert_non_null(strstr(err.msg, text));
        return;
    }
    for (int t = 0; t < T; t++) {
        assert_int_equal(layer_shard_init(&s, n_heads, n_kv_heads, HEAD_DIM, width, t, T, &err), 0);
        check_shard(&s, &whole, &w);
        check_kv(&s, n_heads, n_kv_heads);
    }
    assert_int_equal(w.heads, n_heads);
    assert_int_equal(w.columns, width);
    assert_int_equal(w.head_lane, whole.head_lanes.n);
    assert_int_equal(w.column_lane, whole.column_lanes.n);
}

static void test_layer_shards(void **state)
{
    (void)state;
    for (size_t a = 0; a < N_ATTENTIONS; a++)
        for (size_t i = 0; i < N_WIDTHS; i++)
            for (int T = 1; T <= 8; T *= 2)
                check_layout(attentions[a].n_heads, attentions[a].n_kv_heads, widths[i], T);
}

static void test_vocab(void **state)
{
    (void)state;
    static const int64_t sizes[] = {151674, 151936, 151655, 512, 7, 1};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        for (int T = 1; T <= 8; T *= 2) {
            int64_t n = shard_vocab(sizes[i], 0, T).n;
            for (int t = 0; t < T; t++) {
                struct range r = shard_vocab(sizes[i], t, T);
                assert_int_equal(r.start, t * n);
                assert_int_equal(r.n, n);
            }
            assert_true(n * T >= sizes[i] && n * T < sizes[i] + T);
        }
}

static void test_layers(void **state)
{
    (void)state;
    for (int n_layers = 1; n_layers <= 81; n_layers++)
        for (int P = 1; P <= n_layers; P++) {
            int64_t at = 0, n_before = n_layers;
            for (int p = 0; p < P; p++) {
                struct range r = shard_layers(n_layers, p, P);
                assert_int_equal(r.start, at);
                assert_true(r.n >= n_layers / P && r.n <= n_before);
                at += r.n;
                n_before = r.n;
            }
            assert_int_equal(at, n_layers);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lanes_of_heads),
        cmocka_unit_test(test_lanes_of_14_heads),
        cmocka_unit_test(test_lanes_of_columns),
        cmocka_unit_test(test_layer_shards),
        cmocka_unit_test(test_vocab),
        cmocka_unit_test(test_layers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
