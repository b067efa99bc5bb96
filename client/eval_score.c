/*
 * The four ways to score. See eval_score.h; the rules for letters follow what the multiple-choice
 * benchmarks' own scripts accept, the tolerance is ChartQA's, ANLS is DocVQA's with its threshold.
 */
#include "client/eval_score.h"

#include <ctype.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "client/command.h"

#define ANLS_THRESHOLD 0.5
#define SIMILARITY_MAX_CHARACTERS 4096 // of each; the rest is not looked at

static const char *const names[] = {"auto", "exact", "choice", "number", "anls"};

int eval_scorer_parse(const char *name, enum eval_scorer *out)
{
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (strcmp(names[i], name) == 0) {
            *out = (enum eval_scorer)i;
            return 0;
        }
    return -1;
}

const char *eval_scorer_name(enum eval_scorer s)
{
    return names[s];
}

static int is_space(char c)
{
    return isspace((unsigned char)c) != 0;
}

/* Skips white space in front; the length without white space behind. */
static size_t strip(const char **s)
{
    while (is_space(**s))
        (*s)++;
    size_t n = strlen(*s);
    while (n && is_space((*s)[n - 1]))
        n--;
    return n;
}

/* Without partial credit; lowercasing is ASCII. */
static int is_exact(const char *a, const char *b)
{
    size_t n = strip(&a), m = strip(&b);
    return n == m && strncasecmp(a, b, n) == 0;
}

/* ---- letters ---- */

static int is_word(char c)
{
    return isalnum((unsigned char)c) || (c & 0x80) || c == '\'' || c == '_';
}

/* Index of the letter at `s` when it stands alone and is a choice; lower case only if allowed. */
static int letter_at(const char *start, const char *s, size_t n_choices, int lower_too)
{
    int upper = toupper((unsigned char)*s), index = upper - 'A';
    if (index < 0 || index >= (int)n_choices || (*s != upper && !lower_too))
        return -1;
    if (is_word(s[1]) || (s > start && is_word(s[-1])))
        return -1;
    return index;
}

/* "answer is B", "Answer: (b)", "option C": the letter after the last such words. */
static int letter_after_words(const char *reply, size_t n_choices)
{
    static const char *const words[] = {"answer is", "answer:", "option", "choice", "answer"};
    int found = -1;
    for (const char *s = reply; *s; s++)
        for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
            size_t n = strlen(words[i]);
            if (strncasecmp(s, words[i], n) != 0 || (s > reply && is_word(s[-1])))
                continue;
            const char *at = s + n + strspn(s + n, " \t\n:*(\"'`");
            int index = *at ? letter_at(reply, at, n_choices, at[-1] == '(') : -1;
            /* "The answer is a dog": an article is no letter. */
            if (index >= 0)
                found = index;
        }
    return found;
}

/* The only letter that stands alone. "A" before a word is taken for an article. */
static int only_letter(const char *reply, size_t n_choices)
{
    int found = -1;
    for (const char *s = reply; *s; s++) {
        int index = letter_at(reply, s, n_choices, 0);
        if (index < 0 || index == found)
            continue;
        if (index == 0 && s[1] == ' ' && is_word(s[2]))
            continue;
        if (found >= 0)
            return -1;
        found = index;
    }
    return found;
}

static int contains(const char *text, const char *part)
{
    size_t n = strip(&part);
    for (const char *s = text; n && *s; s++)
        if (strncasecmp(s, part, n) == 0 && !(s > text && is_word(s[-1]) && is_word(part[0])) &&
            !(is_word(s[n]) && is_word(part[n - 1])))
            return 1;
    return 0;
}

static int only_text(const char *reply, const char *const *choices, size_t n_choices)
{
    int found = -1;
    for (size_t i = 0; i < n_choices; i++) {
        if (is_exact(reply, choices[i]) && *choices[i])
            return (int)i;
        if (!contains(reply, choices[i]))
            continue;
        if (found >= 0)
            return -1;
        found = (int)i;
    }
    return found;
}

int eval_choice_of(const char *reply, const char *const *choices, size_t n_choices)
{
    const char *s = reply + strspn(reply, " \t\r\n([{*\"'`");
    int index = *s ? letter_at(s, s, n_choices, 1) : -1;
    if (index >= 0 && s[1 + strspn(s + 1, " \t\r\n)]}*\"'`.,:;")] == '\0')
        return index;
    if (index >= 0 && toupper((unsigned char)*s) == *s && strchr(".:)", s[1]) && s[1])
        return index; /* "B. because …" */
    if ((index = letter_after_words(reply, n_choices)) >= 0)
        return index;
    if ((index = only_letter(reply, n_choices)) >= 0)
        return index;
    return only_text(reply, choices, n_choices);
}

static int is_right_choice(const struct eval_expected *e, const char *reply)
{
    int given = eval_choice_of(reply, e->choices, e->n_choices);
    for (size_t i = 0; given >= 0 && i < e->n_answers; i++) {
        const char *answer = e->answers[i];
        size_t n = strip(&answer);
        int index = n == 1 ? toupper((unsigned char)*answer) - 'A' : -1;
        if (index == given || (n > 1 && is_exact(answer, e->choices[given])))
            return 1;
    }
    return 0;
}

/* ---- numbers ---- */

/* A number at `s` ("1,234.5", "-3e5"), thousands set apart by commas; its length, 0 for none. */
static size_t number_at(const char *s, double *number)
{
    char digits[64];
    size_t n = 0, i = 0;
    if (s[i] == '-' || s[i] == '+')
        digits[n++] = s[i++];
    if (!isdigit((unsigned char)s[i]) && !(s[i] == '.' && isdigit((unsigned char)s[i + 1])))
        return 0;
    for (; n < sizeof(digits) - 1; i++) {
        int is_digit = isdigit((unsigned char)s[i]) != 0;
        int exponent = (s[i] == 'e' || s[i] == 'E') &&
                       (isdigit((unsigned char)s[i + 1]) ||
                        ((s[i + 1] == '-' || s[i + 1] == '+') && isdigit((unsigned char)s[i + 2])));
        int sign = (s[i] == '-' || s[i] == '+') && i > 0 && (s[i - 1] == 'e' || s[i - 1] == 'E');
        int point = s[i] == '.' && isdigit((unsigned char)s[i + 1]);
        if (s[i] == ',' && isdigit((unsigned char)s[i + 1]) && isdigit((unsigned char)s[i + 2]) &&
            isdigit((unsigned char)s[i + 3]) && !isdigit((unsigned char)s[i + 4]))
            continue;
        if (!is_digit && !exponent && !sign && !point)
            break;
        digits[n++] = s[i];
    }
    digits[n] = '\0';
    char *end;
    *number = strtod(digits, &end);
    return end == digits ? 0 : i;
}

int eval_number_in(const char *text, double *number)
{
    int found = 0;
    for (const char *s = text; *s;) {
        size_t n = s > text && is_word(s[-1]) ? 0 : number_at(s, number);
        found |= n > 0;
        s += n ? n : 1;
    }
    return found;
}

static int is_near(const char *reply, const char *answer, double tolerance)
{
    double x = 0, y = 0;
    if (!eval_number_in(answer, &y))
        return is_exact(reply, answer);
    return eval_number_in(reply, &x) && fabs(x - y) <= tolerance * fabs(y) + 1e-9 * fabs(y);
}

/* ---- similarity ---- */

/* Lower-case characters, white space as one space; [return value], at most `n_max`. */
static size_t characters_of(const char *s, uint32_t *out, size_t n_max)
{
    size_t n = 0, left = strip(&s);
    while (left > 0 && n < n_max) {
        unsigned char c = (unsigned char)*s;
        size_t length = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
        uint32_t character = c < 0x80 ? (uint32_t)tolower(c) : c;
        if (length > left)
            length = left;
        for (size_t i = 1; i < length; i++)
            character = character << 8 | (unsigned char)s[i]; /* any one-to-one number will do */
        s += length;
        left -= length;
        if (is_space((char)character) && character < 0x80) {
            if (n && out[n - 1] == ' ')
                continue;
            character = ' ';
        }
        out[n++] = character;
    }
    return n;
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t distance(const uint32_t *a, size_t n, const uint32_t *b, size_t m, size_t *row)
{
    for (size_t j = 0; j <= m; j++)
        row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = smaller(replaced, 1 + smaller(row[j], row[j - 1]));
        }
    }
    return row[m];
}

double eval_similarity(const char *a, const char *b)
{
    size_t n_max = SIMILARITY_MAX_CHARACTERS;
    uint32_t *x = command_alloc(2 * n_max, sizeof(*x)), *y = x + n_max;
    size_t n = characters_of(a, x, n_max), m = characters_of(b, y, n_max);
    size_t longer = n > m ? n : m, *row = command_alloc(m + 1, sizeof(*row));
    double s = longer ? 1.0 - (double)distance(x, n, y, m, row) / (double)longer : 1.0;
    free(row);
    free(x);
    return s;
}

/* ---- all ---- */

static double score_one(const struct eval_expected *e, const char *answer, const char *reply,
                        double tolerance)
{
    if (e->scorer == SCORE_NUMBER)
        return is_near(reply, answer, tolerance);
    if (e->scorer != SCORE_ANLS)
        return is_exact(reply, answer);
    double s = eval_similarity(reply, answer);
    return s < ANLS_THRESHOLD ? 0 : s;
}

double eval_score(const struct eval_expected *e, const char *reply, double tolerance)
{
    double best = 0;
    if (e->scorer == SCORE_CHOICE)
        return is_right_choice(e, reply);
    for (size_t i = 0; i < e->n_answers; i++) {
        double s = score_one(e, e->answers[i], reply, tolerance);
        best = s > best ? s : best;
    }
    return best;
}
