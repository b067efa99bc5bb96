/*
 * Beam search's arithmetic by hand: sequences that are few enough to be written down.
 *
 * Two beams over the tokens 1, 2 and the end token 9. What is expected was worked out from the
 * rules of Transformers' GenerationMixin._beam_search, not from the code.
 */
#include "daemon/engine/beam.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define END 9

static int is_end(const void *arg, int32_t id)
{
    (void)arg;
    return id == END;
}

static struct beam_search *search(int32_t max_tokens, float length_penalty,
                                  enum early_stopping early)
{
    return beam_search_new(&(struct beam_settings){.n_beams = 2,
                                                   .n_best = beams_needed(2, 1),
                                                   .max_tokens = max_tokens,
                                                   .length_penalty = length_penalty,
                                                   .early_stopping = early});
}

static void row(struct beam_search *b, int beam, int n, const struct token_logprob *top)
{
    memset(&b->rows[beam], 0, sizeof(b->rows[beam]));
    b->rows[beam].n_top = n;
    memcpy(b->rows[beam].top, top, (size_t)n * sizeof(*top));
}

static void test_needed(void **state)
{
    (void)state;
    assert_int_equal(beams_needed(4, 0), 8);
    assert_int_equal(beams_needed(4, 1), 8);
    assert_int_equal(beams_needed(4, 2), 12);
}

/* The better of two beginnings ends up behind: its continuations are unlikely. */
static void test_two_steps(void **state)
{
    (void)state;
    struct beam_search *b = search(2, 1, EARLY_STOPPING_FALSE);
    const int32_t *none[2] = {0}, first[] = {1}, second[] = {2};
    row(b, 0, 3, (struct token_logprob[]){{1, -0.5f, 1}, {2, -1, 2}, {END, -5, 3}});
    assert_int_equal(beam_search_step(b, 1, none, is_end, NULL), 0);
    assert_int_equal(b->parents[1], 0);
    assert_int_equal(b->tokens[0], 1);
    assert_int_equal(b->tokens[1], 2);
    row(b, 0, 2, (struct token_logprob[]){{1, -3, 1}, {2, -4, 2}});
    row(b, 1, 2, (struct token_logprob[]){{1, -1, 1}, {2, -2, 2}});
    const int32_t *outputs[] = {first, second};
    assert_int_equal(beam_search_step(b, 2, outputs, is_end, NULL), 1); // max_tokens
    assert_int_equal(b->finished[0].n_ids, 2);
    assert_int_equal(b->finished[0].ids[0], 2);
    assert_int_equal(b->finished[0].ids[1], 1);
    assert_true(b->finished[0].score == -1.0f); // (-1 - 1) / 2
    assert_true(b->finished[1].score == -1.5f); // (-1 - 2) / 2, before (-0.5 - 3) / 2
    assert_false(b->finished[0].ends_by_token);
    beam_search_free(b);
}

/* An end token among the best finishes; below the first n_beams it does not count. */
static void test_ends(void **state)
{
    (void)state;
    struct beam_search *b = search(10, 1, EARLY_STOPPING_FALSE);
    const int32_t *none[2] = {0};
    row(b, 0, 4, (struct token_logprob[]){{END, -0.5f, 1}, {1, -1, 2}, {2, -2, 3}, {3, -3, 4}});
    assert_int_equal(beam_search_step(b, 1, none, is_end, NULL), 0);
    assert_true(b->finished[0].is_complete && b->finished[0].ends_by_token);
    assert_false(b->finished[1].is_complete);
    assert_int_equal(b->tokens[0], 1); // the end token does not live on
    assert_int_equal(b->tokens[1], 2);
    beam_search_free(b);
    b = search(10, 1, EARLY_STOPPING_FALSE);
    row(b, 0, 4, (struct token_logprob[]){{1, -0.5f, 1}, {2, -1, 2}, {END, -2, 3}, {3, -3, 4}});
    assert_int_equal(beam_search_step(b, 1, none, is_end, NULL), 0);
    assert_false(b->finished[0].is_complete);
    beam_search_free(b);
}

/* Both places taken by good sequences, a running beam far behind: when is it over? */
static int steps_until_over(enum early_stopping early, float running)
{
    struct beam_search *b = search(100, 1, early);
    const int32_t *none[2] = {0}, ids[] = {1, 1, 1, 1, 1, 1, 1, 1};
    const int32_t *outputs[] = {ids, ids};
    int n = 1, over;
    row(b, 0, 4, (struct token_logprob[]){{END, -1, 1}, {1, -1.5f, 2}, {2, -2, 3}, {3, -9, 4}});
    over = beam_search_step(b, 1, none, is_end, NULL);
    assert_false(over);
    for (; !over && n < 8; n++) { // each beam: the end, or on
        for (int i = 0; i < 2; i++)
            row(b, i, 4,
                (struct token_logprob[]){
                    {END, n == 1 ? -0.5f : -20, 1}, {1, running, 2}, {2, -30, 3}, {3, -40, 4}});
        over = beam_search_step(b, 2, outputs, is_end, NULL);
    }
    beam_search_free(b);
    return n;
}

static void test_early_stopping(void **state)
{
    (void)state;
    /* After step 2 the finished ones are -1 and (-1.5 - 0.5) / 2 = -1. */
    assert_int_equal(steps_until_over(EARLY_STOPPING_TRUE, -0.01f), 2);
    assert_int_equal(steps_until_over(EARLY_STOPPING_FALSE, -9), 2);     // (-1.5 - 9) / 2 < -1
    assert_int_equal(steps_until_over(EARLY_STOPPING_FALSE, -0.01f), 8); // -1.51 / 2 > -1
    assert_int_equal(steps_until_over(EARLY_STOPPING_NEVER, -9), 8);     // -10.5 / 100 > -1
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_needed),
        cmocka_unit_test(test_two_steps),
        cmocka_unit_test(test_ends),
        cmocka_unit_test(test_early_stopping),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
