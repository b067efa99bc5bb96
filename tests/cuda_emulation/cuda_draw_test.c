/*
 * op_draw: the tokens of kernels/draw_best.h as the host computes it, whatever else is drawn.
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

enum { N_ROWS = 24, N_DRAWS = 40 * N_ROWS };

static float uniform(void)
{
    return (float)case_integer(1 << 20) / (float)(1 << 20);
}

/* A row of every spread, some with ties, one that is not finite. */
static struct top_k make_best(int row, int vocab, float temperature)
{
    float *logits = case_floats(vocab, (float)(1 << row % 6), DTYPE_F32);
    for (int i = 0; row % 3 && i < vocab; i++)
        logits[i] = rintf(8 * logits[i]) / 8;
    for (int i = 0; row % 4 == 1 && i + 1 < vocab; i += 2) // that a temperature makes equal
        logits[i] = nextafterf(logits[i + 1], INFINITY);
    return row == 7 ? (struct top_k){0} : naive_top_k(logits, vocab, temperature);
}

static struct draw_params make_params(int i, int first, float temperature)
{
    static const float top_ps[] = {1, 0.9f, 0.5f, 0.01f}, min_ps[] = {0, 0, 0.02f, 0.5f, 1};
    static const int top_ks[] = {0, 1, 5, 40, TOP_K, TOP_K + 9};

    return (struct draw_params){.u = i % 11 ? uniform() : 1 - 0x1p-53,
                                .temperature = i % 5 ? temperature : 0,
                                .top_p = top_ps[i % 4],
                                .min_p = min_ps[i / 4 % 5],
                                .top_k = top_ks[i / 3 % 6],
                                .row = i % 13 ? first + case_integer(N_ROWS) : -1};
}

static int is_same(const struct drawn *a, const struct drawn *b)
{
    return a->id == b->id && a->rank == b->rank && a->logprob == b->logprob;
}

/* All at once, then a few of them alone. Draws of other rows stay as they were. */
static void check(struct backend *b, int vocab, int first)
{
    struct top_k best[N_ROWS];
    float temperature[N_ROWS];
    static struct draw_params params[N_DRAWS];
    static struct drawn got[N_DRAWS];
    const struct drawn nothing = {-77, -77, -77};
    int n_host = 0, n_drawn = 0;

    for (int r = 0; r < N_ROWS; r++) {
        temperature[r] = r % 2 ? 1 : 0.3f + uniform();
        best[r] = make_best(r, vocab, temperature[r]);
    }
    for (int i = 0; i < N_DRAWS; i++) {
        params[i] = make_params(i, first, 1);
        if (params[i].temperature > 0 && params[i].row >= 0)
            params[i].temperature = temperature[params[i].row - first];
        got[i] = nothing;
    }
    struct top_k *best_there = op_alloc(b, sizeof(best));
    struct draw_params *params_there = op_alloc(b, sizeof(params));
    struct drawn *there = op_alloc(b, sizeof(got));
    op_upload(b, best_there, best, sizeof(best));
    op_upload(b, params_there, params, sizeof(params));
    op_upload(b, there, got, sizeof(got));
    op_draw(b, there, params_there, N_DRAWS, best_there, first, N_ROWS - 1, vocab);
    op_download(b, got, there, sizeof(got));
    for (int i = 0; i < N_DRAWS; i++) {
        int row = params[i].row - first;
        struct drawn want = nothing;
        if (params[i].row >= 0 && row < N_ROWS - 1) // the last row was not among them
            want = naive_draw(&params[i], &best[row], vocab);
        assert_true(is_same(&got[i], &want));
        assert_int_equal(got[i].id == DRAWN_NOT_FINITE, want.id != -77 && row == 7);
        n_host += got[i].id == DRAWN_TOO_FEW;
        n_drawn += got[i].id >= 0;
    }
    assert_true(n_drawn > N_DRAWS / 4);
    assert_true(vocab <= TOP_K ? n_host == 0 : n_host > N_DRAWS / 20);
    for (int i = 1; i < N_DRAWS; i += N_DRAWS / 10) {
        struct drawn alone = nothing;
        op_upload(b, there, &alone, sizeof(alone));
        op_draw(b, there, params_there + i, 1, best_there, first, N_ROWS - 1, vocab);
        op_download(b, &alone, there, sizeof(alone));
        assert_true(is_same(&alone, &got[i]));
    }
    op_free(b, best_there);
    op_free(b, params_there);
    op_free(b, there);
    case_clear(b);
}

static void test_draw(void **state)
{
    struct backend *b = case_open(DTYPE_BF16, 0);

    (void)state;
    case_seed(70);
    check(b, 900, 0);
    check(b, 300, 64);
    check(b, TOP_K, 0);
    check(b, 7, 3);
    backend_close(b);
}

int cuda_draw_tests(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_draw)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
