/*
 * The sampler, one setting at a time, against cases worked out by hand.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "daemon/model/sampler.h"
#include "tests/op/op_naive.h"

#define VOCAB 6

static struct sampler sampler;

static int set_up(void **state)
{
    (void)state;
    sampler_init(&sampler, VOCAB);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    sampler_release(&sampler);
    return 0;
}

static struct sample_row plain(float temperature)
{
    return (struct sample_row){
        .sampling = {
            .temperature = temperature, .top_p = 1, .repetition_penalty = 1, .n_logprobs = 5}};
}

static struct sample_result draw(const float *logits, const struct sample_row *row,
                                 const struct batch *b)
{
    struct sample_result r;
    struct batch none = {0};
    sampler_draw(&sampler, &r, logits, row, b ? b : &none);
    return r;
}

/* How often each id comes over many positions. */
static void count(const float *logits, struct sample_row row, int n, int counts[VOCAB])
{
    memset(counts, 0, VOCAB * sizeof(int));
    for (int i = 0; i < n; i++) {
        row.position = i;
        counts[draw(logits, &row, NULL).token.id]++;
    }
}

static void greedy_takes_the_lowest_of_equals(void **state)
{
    (void)state;
    const float logits[VOCAB] = {0, 2, 1, 2, -1, 0};
    struct sample_row row = plain(0);
    struct sample_result r = draw(logits, &row, NULL);
    assert_int_equal(r.token.id, 1);
    assert_int_equal(r.token.rank, 1);
    assert_int_equal(r.not_finite, 0);
}

/* The largest is found many at a time: against one at a time, with ties, wherever it is. */
static void greedy_over_many(void **state)
{
    enum { MANY = 101 };
    struct sampler many;
    float logits[MANY];
    uint32_t bits = 1;
    (void)state;
    sampler_init(&many, MANY);
    for (int round = 0; round < 1000; round++) {
        int32_t best = 0;
        for (int i = 0; i < MANY; i++) {
            bits = bits * 1664525u + 1013904223u;
            logits[i] = (float)(bits >> 24) - 300;
            best = logits[i] > logits[best] ? i : best;
        }
        struct sample_result r;
        struct sample_row row = plain(0);
        sampler_draw(&many, &r, logits, &row, &(struct batch){0});
        assert_int_equal(r.token.id, best);
    }
    sampler_release(&many);
}

static void logprobs_of_the_raw_distribution(void **state)
{
    (void)state;
    const float logits[VOCAB] = {0, 2, 1, 2, -1, 0};
    double sum = 2 * exp(2) + exp(1) + 2 + exp(-1);
    struct sample_row row = plain(0);
    row.sampling.n_logprobs = 4;
    row.sampling.repetition_penalty = 3; // changes the choice, not the log-probabilities
    const int32_t history[] = {1, 3};
    struct batch b = {.history = history};
    row.n_prompt = 2;
    struct sample_result r = draw(logits, &row, &b);
    assert_int_equal(r.token.id, 2); // 2/3 < 1
    assert_true(fabs(r.token.logprob - (1 - log(sum))) < 1e-6);
    assert_int_equal(r.token.rank, 3);
    assert_int_equal(r.n_top, 4);
    const int32_t order[4] = {1, 3, 2, 0};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(r.top[i].id, order[i]);
        assert_int_equal(r.top[i].rank, i + 1);
        assert_true(fabs(r.top[i].logprob - (logits[order[i]] - log(sum))) < 1e-6);
    }
    row.sampling.n_logprobs = 0;
    assert_int_equal(draw(logits, &row, &b).n_top, 0);
    row.sampling.n_logprobs = 50; // more than there are
    assert_int_equal(draw(logits, &row, &b).n_top, VOCAB);
}

static void scores_of_a_given_token(void **state)
{
    (void)state;
    float logits[VOCAB] = {0, 2, 1, 2, -1, 0};
    double sum = 2 * exp(2) + exp(1) + 2 + exp(-1);
    struct token_logprob out[3];
    const int32_t rank[VOCAB] = {4, 1, 3, 2, 6, 5}; // of equals the lower id is first
    for (int32_t id = 0; id < VOCAB; id++) {
        sampler_score(out, 2, logits, VOCAB, id);
        assert_int_equal(out[0].id, id);
        assert_int_equal(out[0].rank, rank[id]);
        assert_true(fabs(out[0].logprob - (logits[id] - log(sum))) < 1e-6);
        assert_true(out[1].id == 1 && out[2].id == 3 && out[2].rank == 2);
    }
    sampler_score(out, 0, logits, VOCAB, VOCAB);
    assert_true(isnan(out[0].logprob));
    logits[4] = NAN;
    sampler_score(out, 2, logits, VOCAB, 1);
    assert_true(isnan(out[0].logprob) && isnan(out[1].logprob) && isnan(out[2].logprob));
}

static void penalties(void **state)
{
    (void)state;
    /* prompt 0, 4; output 1, 1, 5. Repetition 2: logits of 0, 1, 4, 5 halve or double. Then 1 loses
     * 2 * 0.25 + 0.5 and 5 loses 0.25 + 0.5. */
    const float logits[VOCAB] = {3.0f, 4.0f, 1.4f, 0.9f, -1.0f, 4.6f};
    const int32_t history[] = {0, 4, 1, 1, 5, 99, -3}; // ids outside the vocabulary are ignored
    struct batch b = {.history = history};
    struct sample_row row = plain(0);
    row.n_prompt = 2;
    row.n_output = 5;
    row.sampling.repetition_penalty = 2;
    assert_int_equal(draw(logits, &row, &b).token.id, 5); // 2.3 against 2.0
    row.sampling.frequency_penalty = 0.25f;
    row.sampling.presence_penalty = 0.5f;
    assert_int_equal(draw(logits, &row, &b).token.id, 5); // 1.55 against 1.5 of id 0
    row.sampling.presence_penalty = 0.6f;
    assert_int_equal(draw(logits, &row, &b).token.id, 0);
    row.sampling.frequency_penalty = row.sampling.presence_penalty = 0;
    row.sampling.repetition_penalty = 1;
    row.sampling.presence_penalty = 2;
    assert_int_equal(draw(logits, &row, &b).token.id, 0); // prompt ids are not penalised
    row.sampling.presence_penalty = -1;
    assert_int_equal(draw(logits, &row, &b).token.id, 5);
    for (int i = 0; i < VOCAB; i++) // scratch is clean again
        assert_true(sampler.counts[i] == 0 && sampler.seen[i] == 0);
}

static void bans_and_bias(void **state)
{
    (void)state;
    const float logits[VOCAB] = {0, 5, 4, 3, 2, 1};
    const int32_t banned[] = {9, 1, 2}, bias_ids[] = {0, 100};
    const float bias[] = {3.5f, 50};
    struct batch b = {.banned = banned, .bias_ids = bias_ids, .bias_values = bias};
    struct sample_row row = plain(0);
    row.banned_start = 1;
    row.n_banned = 2;
    assert_int_equal(draw(logits, &row, &b).token.id, 3);
    row.n_bias = 2;
    assert_int_equal(draw(logits, &row, &b).token.id, 0);
    row.sampling.temperature = 1; // banned ids have probability 0
    for (int i = 0; i < 500; i++) {
        row.position = i;
        int32_t id = draw(logits, &row, &b).token.id;
        assert_true(id != 1 && id != 2);
    }
}

static void temperature_shapes_the_distribution(void **state)
{
    (void)state;
    const float logits[VOCAB] = {logf(1), logf(2), logf(4), logf(1), -100, -100};
    int counts[VOCAB];
    count(logits, plain(1), 8000, counts); // 1/8, 2/8, 4/8, 1/8
    assert_in_range(counts[0], 850, 1150);
    assert_in_range(counts[1], 1850, 2150);
    assert_in_range(counts[2], 3800, 4200);
    assert_in_range(counts[3], 850, 1150);
    count(logits, plain(0.5f), 8000, counts); // squares: 1, 4, 16, 1 of 22
    assert_in_range(counts[2], 5600, 6040);
    assert_int_equal(counts[4] + counts[5], 0);
}

static void top_k(void **state)
{
    (void)state;
    const float logits[VOCAB] = {1, 3, 2, 0, 3, 2};
    int counts[VOCAB];
    struct sample_row row = plain(1);
    row.sampling.top_k = 1; // ties with the last kept one stay, as in vLLM
    count(logits, row, 400, counts);
    assert_int_equal(counts[1] + counts[4], 400);
    assert_true(counts[1] > 100 && counts[4] > 100);
    row.sampling.top_k = 3;
    count(logits, row, 400, counts);
    assert_int_equal(counts[0] + counts[3], 0);
    assert_true(counts[2] > 0 && counts[5] > 0);
    row.sampling.top_k = 100;
    count(logits, row, 4000, counts);
    assert_true(counts[3] > 0);
}

static void top_p(void **state)
{
    (void)state;
    const float logits[VOCAB] = {logf(4), logf(3), logf(2), logf(1), -100, -100};
    int counts[VOCAB];
    struct sample_row row = plain(1);
    row.sampling.top_p = 0.39f; // the first token alone has 0.4
    count(logits, row, 200, counts);
    assert_int_equal(counts[0], 200);
    row.sampling.top_p = 0.65f; // 0.4 < 0.65: the second is in; 0.7 is not: the third is out
    count(logits, row, 1400, counts);
    assert_int_equal(counts[0] + counts[1], 1400);
    assert_in_range(counts[0], 720, 880); // 4/7
    row.sampling.top_k = 3;               // of 9: 4/9 < 0.5, so two stay
    row.sampling.top_p = 0.5f;
    count(logits, row, 400, counts);
    assert_int_equal(counts[0] + counts[1], 400);
    row.sampling.top_k = 0;
    row.sampling.top_p = 0; // at least one
    count(logits, row, 50, counts);
    assert_int_equal(counts[0], 50);
}

static void min_p(void **state)
{
    (void)state;
    const float logits[VOCAB] = {logf(4), logf(3), logf(2), logf(1), -100, -100};
    int counts[VOCAB];
    struct sample_row row = plain(1);
    row.sampling.min_p = 0.6f; // 0.6 * 4 = 2.4
    count(logits, row, 700, counts);
    assert_int_equal(counts[0] + counts[1], 700);
    assert_in_range(counts[0], 340, 460);
    row.sampling.min_p = 1;
    count(logits, row, 50, counts);
    assert_int_equal(counts[0], 50);
}

static void seeds_make_it_repeatable(void **state)
{
    (void)state;
    const float logits[VOCAB] = {0};
    struct sample_row row = plain(1);
    int differ_seed = 0, differ_candidate = 0;
    for (int i = 0; i < 200; i++) {
        struct sample_row a = row, b = row, c = row;
        a.position = b.position = c.position = i;
        b.sampling.seed = (uint64_t)1 << 40;
        c.candidate = 1;
        int32_t id = draw(logits, &a, NULL).token.id;
        assert_int_equal(id, draw(logits, &a, NULL).token.id);
        differ_seed += id != draw(logits, &b, NULL).token.id;
        differ_candidate += id != draw(logits, &c, NULL).token.id;
    }
    assert_in_range(differ_seed, 140, 190);
    assert_in_range(differ_candidate, 140, 190);
}

static void uniform_is_philox(void **state)
{
    (void)state;
    /* Random123's known answer for philox4x32-10 with counter and key 0: 6627e8d5 e169c58d … */
    uint64_t bits = (uint64_t)0x6627e8d5u << 32 | 0xe169c58du;
    assert_true(sampler_uniform(0, 0, 0) == (double)(bits >> 11) * 0x1p-53);
    double sum = 0;
    for (uint32_t i = 0; i < 10000; i++) {
        double u = sampler_uniform(7, 3, i);
        assert_true(u >= 0 && u < 1);
        sum += u;
    }
    assert_true(fabs(sum / 10000 - 0.5) < 0.02);
}

static void not_finite(void **state)
{
    (void)state;
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++)
        for (int n_logprobs = -1; n_logprobs < 1; n_logprobs++) {
            float logits[VOCAB] = {0, 1, 2, bad[i], 1, 0};
            struct sample_row row = plain(0);
            row.sampling.n_logprobs = n_logprobs;
            assert_int_equal(draw(logits, &row, NULL).not_finite, 1);
        }
}

static void extreme_logits(void **state)
{
    (void)state;
    const float logits[VOCAB] = {3e38f, -3e38f, 0, 1, 2, 3};
    struct sample_row row = plain(1e-3f); // 3e38 / 1e-3 overflows float
    struct sample_result r = draw(logits, &row, NULL);
    assert_int_equal(r.token.id, 0);
    assert_true(r.token.logprob == 0);
}

/* ---- from the best alone ---- */

enum { WIDE = 300 }; // a vocabulary of which TOP_K is a part

/* A row whose spread says how much of it the best hold; rounded, so that there are ties. */
static void make_row(float *logits, int32_t n, uint32_t seed)
{
    float spread = (float)(1 << seed % 6);
    for (int32_t i = 0; i < n; i++)
        logits[i] = rintf(8 * spread * (float)sampler_uniform(seed, 7, (uint32_t)i)) / 8;
}

static struct sampling setting(uint32_t i)
{
    static const struct sampling settings[] = {
        {.temperature = 0, .top_p = 1},
        {.temperature = 1, .top_p = 1},
        {.temperature = 0.3f, .top_p = 1},
        {.temperature = 0.7f, .top_p = 0.9f},
        {.temperature = 1, .top_p = 0.2f, .top_k = 5},
        {.temperature = 1, .top_p = 1, .top_k = 20},
        {.temperature = 1.5f, .top_p = 0.95f, .min_p = 0.1f},
        {.temperature = 1, .top_p = 1, .top_k = TOP_K},
        {.temperature = 0.5f, .top_p = 0.01f},
    };
    struct sampling p = settings[i % (sizeof(settings) / sizeof(settings[0]))];
    p.repetition_penalty = 1;
    p.n_logprobs = (int32_t)(i / 3 % 4) - 1;
    return p;
}

/* As op_draw() and what follows on the host: 0 where only the whole row can tell. */
static int draw_from_best(struct sample_result *out, const struct top_k *best, int32_t vocab,
                          const struct sample_row *row)
{
    struct draw_params p = sampler_draw_params(row, 5);
    if (p.row < 0)
        return 0;
    assert_int_equal(p.row, 5);
    struct drawn d = naive_draw(&p, best, vocab);
    if (d.id == DRAWN_TOO_FEW)
        return 0;
    sampler_take(out, row, &d, best);
    return 1;
}

/* Whenever the best suffice the answer is the whole row's; and they suffice often. */
static void test_best_draw_what_the_row_draws(void **state)
{
    struct sampler wide;
    struct batch b = {0};
    float logits[WIDE];
    int n_sufficed = 0, n_all = 4000;
    (void)state;
    sampler_init(&wide, WIDE);
    for (uint32_t i = 0; i < (uint32_t)n_all; i++) {
        struct sample_row row = {.sequence = 3, .sampling = setting(i), .position = (int32_t)i};
        struct sample_result whole, short_one;
        row.sampling.seed = i;
        make_row(logits, WIDE, i);
        for (int32_t j = 0; i % 2 && j + 1 < WIDE;
             j += 2) // neighbours that a temperature makes equal
            logits[j] = nextafterf(logits[j + 1], INFINITY);
        float t = row.sampling.temperature > 0 ? row.sampling.temperature : 1;
        struct top_k best = naive_top_k(logits, WIDE, t);
        if (!draw_from_best(&short_one, &best, WIDE, &row))
            continue;
        n_sufficed++;
        sampler_draw(&wide, &whole, logits, &row, &b);
        assert_int_equal(short_one.token.id, whole.token.id);
        assert_int_equal(short_one.sequence, whole.sequence);
        assert_int_equal(short_one.n_top, whole.n_top);
        if (row.sampling.n_logprobs < 0)
            continue;
        assert_int_equal(short_one.token.rank, whole.token.rank);
        assert_true(fabsf(short_one.token.logprob - whole.token.logprob) < 1e-5f);
        for (int32_t k = 0; k < whole.n_top; k++)
            assert_int_equal(short_one.top[k].id, whole.top[k].id);
    }
    sampler_release(&wide);
    assert_in_range(n_sufficed, n_all / 2, n_all - 1);
}

/* What needs other tokens than the best is left to the whole row. */
static void test_best_that_do_not_suffice(void **state)
{
    struct sample_result out;
    float flat[WIDE];
    (void)state;
    for (int32_t i = 0; i < WIDE; i++)
        flat[i] = (float)i / WIDE;
    struct top_k best = naive_top_k(flat, WIDE, 1);
    struct sample_row row = {
        .sampling = {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .n_logprobs = -1}};
    row.sampling.top_p = 0.9f;
    assert_int_equal(draw_from_best(&out, &best, WIDE, &row), 0); // the nucleus is larger
    row.sampling.top_p = 1;
    row.sampling.min_p = 0.5f; // most of the row
    assert_int_equal(draw_from_best(&out, &best, WIDE, &row), 0);
    row.sampling.min_p = 0;
    row.sampling.top_k = TOP_K + 1;
    assert_int_equal(draw_from_best(&out, &best, WIDE, &row), 0);
    row.sampling.top_k = 2;
    assert_int_equal(draw_from_best(&out, &best, WIDE, &row), 1);
    row.n_bias = 1;
    assert_int_equal(draw_from_best(&out, &best, WIDE, &row), 0);
    row.n_bias = 0;
    row.sampling.presence_penalty = 0.5f;
    assert_int_equal(draw_from_best(&out, &best, WIDE, &row), 0);
    row.sampling.presence_penalty = 0;
    best.finite = 0;
    assert_int_equal(draw_from_best(&out, &best, WIDE, &row), 1);
    assert_true(out.not_finite);
    for (int32_t i = 0; i < WIDE; i++)
        flat[i] = 1; // top_k keeps ties, and these may go on
    best = naive_top_k(flat, WIDE, 1);
    assert_int_equal(draw_from_best(&out, &best, WIDE, &row), 0);
    best = naive_top_k(flat, VOCAB, 1); // a vocabulary that the best hold whole
    assert_int_equal(draw_from_best(&out, &best, VOCAB, &row), 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_best_draw_what_the_row_draws),
        cmocka_unit_test(test_best_that_do_not_suffice),
        cmocka_unit_test(greedy_takes_the_lowest_of_equals),
        cmocka_unit_test(greedy_over_many),
        cmocka_unit_test(logprobs_of_the_raw_distribution),
        cmocka_unit_test(scores_of_a_given_token),
        cmocka_unit_test(penalties),
        cmocka_unit_test(bans_and_bias),
        cmocka_unit_test(temperature_shapes_the_distribution),
        cmocka_unit_test(top_k),
        cmocka_unit_test(top_p),
        cmocka_unit_test(min_p),
        cmocka_unit_test(seeds_make_it_repeatable),
        cmocka_unit_test(uniform_is_philox),
        cmocka_unit_test(not_finite),
        cmocka_unit_test(extreme_logits),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
