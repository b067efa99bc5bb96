/*
 * How good a reply is. Pure functions of texts; nothing here knows where they come from.
 */
#ifndef INTERNVL_CLIENT_EVAL_SCORE_H
#define INTERNVL_CLIENT_EVAL_SCORE_H

#include <stddef.h>

enum eval_scorer {
    SCORE_AUTO,   // choice where there are choices, else exact
    SCORE_EXACT,  // equal after stripping white space and lowercasing: 0 or 1
    SCORE_CHOICE, // the letter that the reply names: 0 or 1
    SCORE_NUMBER, // within a relative tolerance (ChartQA's relaxed accuracy): 0 or 1
    SCORE_ANLS,   // average normalised Levenshtein similarity (DocVQA): 0, or 0.5 … 1
};
#define EVAL_CHOICES_MAX 26

struct eval_expected { // texts are borrowed
    enum eval_scorer scorer;
    const char **answers; // [n_answers] any of them will do
    size_t n_answers;
    const char *choices[EVAL_CHOICES_MAX]; // of A, B, …; "" where there is none
    size_t n_choices;
};

/* -1 when it is no scorer's name. "auto", "exact", "choice", "number", "anls". */
int eval_scorer_parse(const char *name, enum eval_scorer *out);
const char *eval_scorer_name(enum eval_scorer s);

/* 0 … 1; `tolerance` is SCORE_NUMBER's, 0.05 is 5 %. */
double eval_score(const struct eval_expected *e, const char *reply, double tolerance);

/* Index of the choice that a reply names, or -1: a letter alone ("B", "(b)."), after "answer is"
 * or "option", the only letter standing alone, or the only choice whose text occurs. */
int eval_choice_of(const char *reply, const char *const *choices, size_t n_choices);
/* The last number in a text ("1,234.5 %", "-3"); 0 when there is none. */
int eval_number_in(const char *text, double *number);
/* 1 - distance / the longer one's length, over characters, case and white space set aside. */
double eval_similarity(const char *a, const char *b);

#endif
