/*
 * op_top_k: ids and values exactly those of a naive loop, sums within the rounding of float64; a
 * row's bits are the same alone.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/log.h"
#include "tests/cuda_emulation/cuda_op_case.h"
#include "tests/op/op_naive.h"

/* Rows [n_rows, vocab] as the shards' parts [n_parts, n_rows, part], the rest full of NaN. */
static float *in_parts(const float *rows, int n_parts, int n_rows, int part, int vocab)
{
    size_t n = (size_t)n_parts * (size_t)n_rows * (size_t)part;
    float *parts = xcalloc(n, sizeof(*parts));

    for (size_t i = 0; i < n; i++)
        parts[i] = NAN;
    for (int r = 0; r < n_rows; r++)
        for (int id = 0; id < vocab; id++)
            parts[(id / part * n_rows + r) * part + id % part] = rows[r * vocab + id];
    return parts;
}

static void check_row(const struct top_k *got, const float *row, int vocab, float temperature)
{
    struct top_k want = naive_top_k(row, vocab, temperature);

    assert_int_equal(got->finite, 1);
    assert_int_equal(got->n, want.n);
    for (int k = 0; k < want.n; k++) {
        assert_int_equal(got->ids[k], want.ids[k]);
        assert_true(got->values[k] == want.values[k]);
    }
    assert_true(fabs(got->log_sum - want.log_sum) <= 1e-12 * (1 + fabs(want.log_sum)));
    assert_true(fabs(got->weight_sum - want.weight_sum) <= 1e-12 * want.weight_sum);
}

/* The bits of a row whose logits are `row` in a call of its own, of other parts. */
static void check_alone(struct backend *b, const struct top_k *got, const float *row, int vocab,
                        float temperature)
{
    struct top_k alone, *out = op_alloc(b, sizeof(*out));
    int part = vocab / 3 + 1;
    float *parts = in_parts(row, 3, 1, part, vocab);

    op_top_k(b, out, case_upload(b, parts, 3 * part), 3, 1, part, vocab,
             case_upload(b, &temperature, 1));
    op_download(b, &alone, out, sizeof(alone));
    assert_int_equal(alone.n, got->n);
    assert_memory_equal(alone.ids, got->ids, (size_t)got->n * sizeof(got->ids[0]));
    assert_memory_equal(alone.values, got->values, (size_t)got->n * sizeof(got->values[0]));
    assert_memory_equal(&alone.log_sum, &got->log_sum, sizeof(alone.log_sum));
    assert_memory_equal(&alone.weight_sum, &got->weight_sum, sizeof(alone.weight_sum));
    op_free(b, out);
    free(parts);
}

/* steps: logits are whole multiples of 1 / steps, so that there are ties; 0: as drawn. */
static void check(struct backend *b, int n_parts, int n_rows, int part, int vocab, float steps)
{
    float *rows = case_floats(n_rows * vocab, 1, DTYPE_F32),
          *temperature = case_floats(n_rows, 0, DTYPE_F32);
    struct top_k *got = xcalloc((size_t)n_rows, sizeof(*got));

    for (int i = 0; i < n_rows * vocab; i++)
        rows[i] = steps > 0 ? rintf(rows[i] * steps) / steps : rows[i] * 10;
    rows[0] = -0.0f; // is no less than 0
    for (int r = 0; r < n_rows; r++)
        temperature[r] = 0.5f + (float)r;
    float *parts = in_parts(rows, n_parts, n_rows, part, vocab);
    struct top_k *out = op_alloc(b, (size_t)n_rows * sizeof(*out));
    op_top_k(b, out, case_upload(b, parts, n_parts * n_rows * part), n_parts, n_rows, part, vocab,
             case_upload(b, temperature, n_rows));
    op_download(b, got, out, (size_t)n_rows * sizeof(*got));
    for (int r = 0; r < n_rows; r++) {
        check_row(&got[r], rows + r * vocab, vocab, temperature[r]);
        check_alone(b, &got[r], rows + r * vocab, vocab, temperature[r]);
    }
    rows[vocab - 1] = INFINITY; // of the first row alone
    free(parts);
    parts = in_parts(rows, n_parts, n_rows, part, vocab);
    op_top_k(b, out, case_upload(b, parts, n_parts * n_rows * part), n_parts, n_rows, part, vocab,
             case_upload(b, temperature, n_rows));
    op_download(b, got, out, (size_t)n_rows * sizeof(*got));
    assert_int_equal(got[0].finite, 0);
    for (int r = 1; r < n_rows; r++)
        check_row(&got[r], rows + r * vocab, vocab, temperature[r]);
    op_free(b, out);
    free(parts);
    free(got);
    case_clear(b);
}

static void test_top_k(void **state)
{
    struct backend *b = case_open(DTYPE_BF16, 0);

    (void)state;
    case_seed(60);
    check(b, 1, 3, 1000, 1000, 0);
    check(b, 1, 2, 1000, 1000, 4); // a handful of values: the best end within a tie
    check(b, 2, 3, 301, 601, 2);
    check(b, 4, 2, 700, 2100, 0);  // a part that nothing is left for
    check(b, 1, 2, 9000, 9000, 0); // slices with more than the best
    check(b, 2, 3, 5003, 10001, 3);
    check(b, 1, 2, TOP_K, TOP_K, 0);
    check(b, 1, 2, 7, 7, 3);
    backend_close(b);
}

int cuda_top_k_tests(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_top_k)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
