/* Scorers: what counts as the right letter, number or text; base64 and TSV are in test_eval_set. */
#include "client/eval_score.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include <cmocka.h>

static const char *const colors[] = {"red", "blue", "dark blue", "a red car"};

static int choice(const char *reply)
{
    return eval_choice_of(reply, colors, 4);
}

static void letters(void **state)
{
    (void)state;
    assert_int_equal(choice("B"), 1);
    assert_int_equal(choice(" (b). "), 1);
    assert_int_equal(choice("**C**"), 2);
    assert_int_equal(choice("C. dark blue"), 2);
    assert_int_equal(choice("The answer is D."), 3);
    assert_int_equal(choice("Answer: (a)"), 0);
    assert_int_equal(choice("I think option C fits, not A"), 2);
    assert_int_equal(choice("It must be B because A car is big"), 1);
    assert_int_equal(choice("Either A, or B."), -1);
    assert_int_equal(choice("E"), -1);
    assert_int_equal(choice("Blue"), 1);
    assert_int_equal(choice("It is dark blue"), -1); /* two choices occur in it */
    assert_int_equal(choice("red"), 0);
    assert_int_equal(choice("Bored"), -1);
    assert_int_equal(choice(""), -1);
}

static double scored(enum eval_scorer how, const char *answer, const char *reply)
{
    struct eval_expected e = {.scorer = how, .answers = &answer, .n_answers = 1};
    for (size_t i = 0; i < 4; i++)
        e.choices[i] = colors[i];
    e.n_choices = 4;
    return eval_score(&e, reply, 0.05);
}

static void choices(void **state)
{
    (void)state;
    assert_true(scored(SCORE_CHOICE, "B", "(B) blue") == 1);
    assert_true(scored(SCORE_CHOICE, "blue", "B") == 1); /* the answer as text */
    assert_true(scored(SCORE_CHOICE, "A", "B") == 0);
    assert_true(scored(SCORE_CHOICE, "A", "no idea") == 0);
}

static void exact(void **state)
{
    (void)state;
    assert_true(scored(SCORE_EXACT, "Red ", "\tred\n") == 1);
    assert_true(scored(SCORE_EXACT, "red", "reds") == 0);
}

static void numbers(void **state)
{
    double x = 0;
    (void)state;
    assert_true(eval_number_in("It was 1,234.5 %.", &x) && x == 1234.5);
    assert_true(eval_number_in("-3e2", &x) && x == -300);
    assert_true(eval_number_in("from 3 to 4", &x) && x == 4);
    assert_true(eval_number_in("1,2", &x) && x == 2);
    assert_false(eval_number_in("B2 or none", &x));
    assert_true(scored(SCORE_NUMBER, "100", "about 104") == 1);
    assert_true(scored(SCORE_NUMBER, "100", "106") == 0);
    assert_true(scored(SCORE_NUMBER, "0", "0.0") == 1);
    assert_true(scored(SCORE_NUMBER, "0", "0.01") == 0);
    assert_true(scored(SCORE_NUMBER, "none", "None") == 1);
    assert_true(scored(SCORE_NUMBER, "7", "seven") == 0);
}

static void similarity(void **state)
{
    (void)state;
    assert_true(eval_similarity("", "") == 1);
    assert_true(eval_similarity("Hello  World", "hello world") == 1);
    assert_true(eval_similarity("kitten", "sitting") == 1.0 - 3.0 / 7.0);
    assert_true(eval_similarity("größe", "grösse") == 1.0 - 2.0 / 6.0);
    assert_true(scored(SCORE_ANLS, "hello", "hallo") == 0.8);
    assert_true(scored(SCORE_ANLS, "hello", "bye") == 0);
}

static void best_of_several(void **state)
{
    const char *answers[] = {"two", "2"};
    struct eval_expected e = {.scorer = SCORE_EXACT, .answers = answers, .n_answers = 2};
    (void)state;
    assert_true(eval_score(&e, "2", 0) == 1);
    assert_true(eval_score(&e, "3", 0) == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(letters), cmocka_unit_test(choices),    cmocka_unit_test(exact),
        cmocka_unit_test(numbers), cmocka_unit_test(similarity), cmocka_unit_test(best_of_several),
    };
    return cmocka_run_group_tests_name("eval_score", tests, NULL, NULL);
}
