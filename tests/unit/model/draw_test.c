/*
 * Rows drawn by several threads, from shards, give what the sampler gives of each row whole.
 */
#include "daemon/model/draw.h"
#include "tests/op/op_naive.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

enum {
    VOCAB = 6001,  // two shards of 3008 columns: padding behind the second's
    PART = 3008,   //
    N_TOKENS = 40, // of them every other row is wanted
    N_ROWS = N_TOKENS / 2,
    N_SAMPLES = N_ROWS + 5, // some rows draw twice
    N_TARGETS = 7,
    TOPS = 3,
};

static float whole[N_ROWS][VOCAB];

struct case_batch {
    struct batch b;
    int32_t rows[N_ROWS], targets[N_TOKENS], history[12], banned[2];
    uint8_t target_tops[N_TOKENS];
    struct sample_row samples[N_SAMPLES];
};

static uint32_t random_state = 5;

static uint32_t random_bits(void)
{
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

static void make_batch(struct case_batch *c)
{
    memset(c, 0, sizeof(*c));
    for (int j = 0; j < N_ROWS; j++) {
        c->rows[j] = 2 * j + 1;
        for (int i = 0; i < VOCAB; i++)
            whole[j][i] = (float)(random_bits() % 4000) / 200.0f; // ties among them
    }
    whole[3][17] = NAN;
    for (int r = 0; r < N_TOKENS; r++)
        c->targets[r] = -1;
    for (int i = 0; i < N_TARGETS; i++) {
        c->targets[c->rows[2 * i]] = (int32_t)(random_bits() % VOCAB);
        c->target_tops[c->rows[2 * i]] = (uint8_t)(i % 2 ? TOPS : 0);
    }
    for (int i = 0; i < 12; i++)
        c->history[i] = (int32_t)(random_bits() % VOCAB);
    c->banned[0] = 11, c->banned[1] = 12;
    for (int i = 0; i < N_SAMPLES; i++)
        c->samples[i] =
            (struct sample_row){.row = c->rows[i % N_ROWS],
                                .sequence = i,
                                .sampling = {.temperature = i % 3 ? 0.5f + (float)(i % 3) : 0,
                                             .top_p = i % 4 ? 1 : 0.8f,
                                             .top_k = i % 5 ? 0 : 40,
                                             .repetition_penalty = i % 6 ? 1 : 1.3f,
                                             .seed = 77,
                                             .n_logprobs = i % 7 - 1,
                                             .n_beam_best = i % 9 ? 0 : 4},
                                .candidate = i,
                                .position = i * i,
                                .n_prompt = 8,
                                .n_output = 4,
                                .n_banned = 2};
    c->b = (struct batch){.n_tokens = N_TOKENS,
                          .n_samples = N_SAMPLES,
                          .targets = c->targets,
                          .target_tops = c->target_tops,
                          .samples = c->samples,
                          .history = c->history,
                          .banned = c->banned};
}

/* The sampler's own, row by row. */
static void draw_whole(const struct case_batch *c, struct sample_result *samples,
                       struct token_logprob *targets)
{
    struct sampler sampler;
    sampler_init(&sampler, VOCAB);
    for (int j = 0; j < N_ROWS; j++) {
        int32_t row = c->rows[j];
        if (c->targets[row] >= 0) {
            sampler_score(targets, c->target_tops[row], whole[j], VOCAB, c->targets[row]);
            targets += 1 + c->target_tops[row];
        }
    }
    for (int i = 0; i < N_SAMPLES; i++)
        sampler_draw(&sampler, &samples[i], whole[i % N_ROWS], &c->samples[i], &c->b);
    sampler_release(&sampler);
}

static void check(const struct case_batch *c, int n_shards, int n_threads)
{
    static struct sample_result want[N_SAMPLES], got[N_SAMPLES];
    struct token_logprob want_targets[N_TARGETS * (1 + TOPS)] = {0};
    struct token_logprob got_targets[N_TARGETS * (1 + TOPS)] = {0};
    int64_t part = n_shards == 1 ? VOCAB : PART;
    float *data = xcalloc((size_t)(n_shards * N_ROWS * part), sizeof(*data));
    struct backend *backend = backend_cpu_open(n_threads, "scalar");
    struct logits l = {data, n_shards, N_ROWS, part, VOCAB};
    struct draw d;
    uint8_t drawn[N_SAMPLES] = {0};

    for (int64_t t = 0; t < n_shards; t++)
        for (int64_t j = 0; j < N_ROWS; j++)
            for (int64_t i = 0; i < part; i++)
                data[(t * N_ROWS + j) * part + i] =
                    t * part + i < VOCAB ? whole[j][t * part + i] : 1e30f;
    memset(got, 0x55, sizeof(got));
    draw_whole(c, want, want_targets);
    draw_init(&d, VOCAB, n_threads);
    assert_int_equal(draw_n_targets(&c->b, c->rows, N_ROWS), N_TARGETS + 3 * TOPS);
    draw_rows(&d, backend, &c->b, c->rows, &l, drawn, got, got_targets);
    assert_memory_equal(got, want, sizeof(want));
    assert_memory_equal(got_targets, want_targets, sizeof(want_targets));
    draw_release(&d);
    backend_close(backend);
    free(data);
}

static void whatever_the_shards_and_threads(void **state)
{
    static struct case_batch c;
    (void)state;
    make_batch(&c);
    for (int n_threads = 1; n_threads <= DRAW_THREADS_MAX + 1; n_threads += 4)
        for (int n_shards = 1; n_shards <= 2; n_shards++)
            check(&c, n_shards, n_threads);
}

/* Half of the samples want more than the best of their rows: those are left, the others get what
 * the device drew, which is the sampler's, and no thread draws them again. Rows are taken in two
 * runs, as a step takes them. */
static void from_the_best_where_they_suffice(void **state)
{
    enum { SPLIT = 7 };
    static struct case_batch c;
    static struct sample_result want[N_SAMPLES], got[N_SAMPLES];
    struct token_logprob targets[N_TARGETS * (1 + TOPS)] = {0};
    struct top_k best[N_ROWS];
    struct draw_params params[N_SAMPLES];
    struct drawn drawn[N_SAMPLES];
    float temperature[N_ROWS];
    uint8_t is_drawn[N_SAMPLES] = {0};
    uint8_t all_drawn[N_SAMPLES];
    int n_drawn = 0;
    (void)state;
    make_batch(&c);
    for (int i = 0; i < N_SAMPLES; i++)
        c.samples[i].n_banned = i % 2;
    c.samples[N_ROWS + 1].sampling.temperature = 0.1f; // another than the first of its row
    c.samples[N_ROWS + 1].n_banned = 0;
    memset(all_drawn, 1, sizeof(all_drawn));
    whole[3][17] = 1; // nothing that is not finite
    draw_prepare(&c.b, c.rows, N_ROWS, temperature, params);
    assert_int_equal(params[N_ROWS + 1].row, -1);
    for (int j = 0; j < N_ROWS; j++)
        best[j] = naive_top_k(whole[j], VOCAB, temperature[j]);
    draw_whole(&c, want, targets);
    for (int i = 0; i < N_SAMPLES; i++)
        if (params[i].row >= 0) {
            assert_int_equal(c.rows[params[i].row], c.samples[i].row);
            drawn[i] = naive_draw(&params[i], &best[params[i].row], VOCAB);
        }
    draw_take(&c.b, c.rows, 0, SPLIT, params, drawn, best, got, is_drawn);
    for (int i = SPLIT; i < N_ROWS; i++)
        assert_int_equal(is_drawn[i], 0);
    draw_take(&c.b, c.rows + SPLIT, SPLIT, N_ROWS - SPLIT, params, drawn, best + SPLIT, got,
              is_drawn);
    for (int j = 0; j < N_ROWS; j++) {
        int wants = c.b.targets[c.rows[j]] >= 0;
        for (int i = 0; i < N_SAMPLES; i++)
            wants |= c.samples[i].row == c.rows[j] && !is_drawn[i];
        assert_int_equal(draw_wants_row(&c.b, c.rows[j], is_drawn), wants);
        assert_int_equal(draw_wants_row(&c.b, c.rows[j], all_drawn), c.b.targets[c.rows[j]] >= 0);
    }
    for (int i = 0; i < N_SAMPLES; i++) {
        n_drawn += is_drawn[i];
        assert_true(!is_drawn[i] || c.samples[i].n_banned == 0);
        if (!is_drawn[i])
            continue;
        assert_int_equal(got[i].token.id, want[i].token.id);
        assert_int_equal(got[i].token.rank, want[i].token.rank);
        assert_int_equal(got[i].n_top, want[i].n_top);
        for (int32_t k = 0; k < want[i].n_top; k++)
            assert_int_equal(got[i].top[k].id, want[i].top[k].id);
    }
    assert_in_range(n_drawn, 1, N_SAMPLES / 2);
    struct backend *backend = backend_cpu_open(1, "scalar");
    struct logits l = {whole[0], 1, N_ROWS, VOCAB, VOCAB};
    struct draw d;
    draw_init(&d, VOCAB, 1);
    for (int i = 0; i < N_SAMPLES; i++)
        if (is_drawn[i])
            got[i].token.id = -7; // whoever draws it again overwrites that
    draw_rows(&d, backend, &c.b, c.rows, &l, is_drawn, got, targets);
    for (int i = 0; i < N_SAMPLES; i++)
        assert_int_equal(got[i].token.id, is_drawn[i] ? -7 : want[i].token.id);
    draw_release(&d);
    backend_close(backend);
}

/* What the host has to fetch is known before: nothing, tokens, or the best too. */
static void what_rows_want(void **state)
{
    static struct case_batch c;
    struct draw_params params[N_SAMPLES];
    float temperature[N_ROWS];
    (void)state;
    make_batch(&c);
    c.b.n_samples = N_ROWS; // one a row
    for (int i = 0; i < N_ROWS; i++) {
        c.samples[i] = (struct sample_row){.row = c.rows[i],
                                           .sampling = {.top_p = 1, .repetition_penalty = 1}};
        c.samples[i].sampling.n_logprobs = i < 10 ? -1 : i < 12 ? 0 : 1;
        c.samples[i].n_bias = i < 5;
    }
    draw_prepare(&c.b, c.rows, N_ROWS, temperature, params);
    assert_int_equal(draw_wants(&c.b, c.rows, 5, params), DRAW_NOTHING);
    assert_int_equal(draw_wants(&c.b, c.rows, 6, params), DRAW_TOKENS);
    assert_int_equal(draw_wants(&c.b, c.rows + 6, 6, params), DRAW_TOKENS);
    assert_int_equal(draw_wants(&c.b, c.rows + 6, 7, params), DRAW_TOKENS_AND_BEST);
    assert_int_equal(draw_wants(&c.b, c.rows + 12, N_ROWS - 12, params), DRAW_TOKENS_AND_BEST);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(whatever_the_shards_and_threads),
                                       cmocka_unit_test(what_rows_want),
                                       cmocka_unit_test(from_the_best_where_they_suffice)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
