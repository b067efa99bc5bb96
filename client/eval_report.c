/*
 * Tables, JSON and the HTML page. See eval_report.h. Only reads results.
 */
#include "client/eval_report.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "client/json_out.h"
#include "client/rpc.h"

#define SHOWN_MAX 60                        // questions with their pictures in the page
#define PICTURE_MAX_BYTES ((size_t)2 << 20) // a larger one is named, not shown
#define N_BINS 24                           // of the histogram of times

struct category {
    const char *name;
    size_t n_done, n_correct, n_failed;
    double score;
};

struct summary {
    struct category all;
    struct category *categories; // [n_categories] in the order they come
    size_t n_categories;
};

static void count(struct category *c, const struct eval_result *x)
{
    c->n_done++;
    c->n_correct += x->error.code == INTERNVL_OK && x->score >= 0.5;
    c->n_failed += x->error.code != INTERNVL_OK;
    c->score += x->score;
}

static struct category *category_named(struct summary *s, const char *name)
{
    for (size_t i = 0; i < s->n_categories; i++)
        if (strcmp(s->categories[i].name, name) == 0)
            return &s->categories[i];
    s->categories = command_grow(s->categories, s->n_categories, sizeof(*s->categories));
    s->categories[s->n_categories] = (struct category){.name = name};
    return &s->categories[s->n_categories++];
}

static struct summary summarise(const struct eval_results *r) // free(.categories)
{
    struct summary s = {.all.name = "overall"};
    for (size_t i = 0; i < r->set->n_questions; i++) {
        if (!r->results[i].is_done)
            continue;
        count(category_named(&s, r->set->questions[i].category), &r->results[i]);
        count(&s.all, &r->results[i]);
    }
    return s;
}

/* The mean score; with all-or-nothing scorers, the share of correct replies. */
static double accuracy(const struct category *c)
{
    return c->n_done ? c->score / (double)c->n_done : 0;
}

/* ---- for people ---- */

static void print_category(FILE *f, int width, const struct category *c)
{
    fprintf(f, "%-*s  %9zu  %7zu  %8.4f\n", width, c->name, c->n_done, c->n_correct, accuracy(c));
}

void eval_report_table(FILE *f, const struct eval_results *r, const struct eval_run *run)
{
    struct summary s = summarise(r);
    int width = (int)strlen("category");
    for (size_t i = 0; i < s.n_categories; i++)
        if ((int)strlen(s.categories[i].name) > width)
            width = (int)strlen(s.categories[i].name);
    fprintf(f, "%-*s  %9s  %7s  %8s\n", width, "category", "questions", "correct", "accuracy");
    for (size_t i = 0; i < s.n_categories; i++)
        print_category(f, width, &s.categories[i]);
    print_category(f, width, &s.all);
    fprintf(f, "%zu asked in %.1f s, %.1f questions a second, %u in flight\n", run->n_asked,
            run->seconds, run->seconds > 0 ? (double)run->n_asked / run->seconds : 0,
            run->concurrency);
    free(s.categories);
}

/* ---- JSON ---- */

static void write_category(struct json_out *j, const char *key, const struct category *c)
{
    json_object_begin(j, key);
    json_uint(j, "questions", c->n_done);
    json_uint(j, "correct", c->n_correct);
    json_uint(j, "failed", c->n_failed);
    json_double(j, "accuracy", accuracy(c));
    json_object_end(j);
}

void eval_report_json(FILE *f, const struct eval_results *r, const struct eval_run *run)
{
    struct summary s = summarise(r);
    struct json_out json = {.file = f}, *j = &json;
    json_object_begin(j, NULL);
    write_category(j, "overall", &s.all);
    json_object_begin(j, "categories");
    for (size_t i = 0; i < s.n_categories; i++)
        write_category(j, s.categories[i].name, &s.categories[i]);
    json_object_end(j);
    json_uint(j, "asked", run->n_asked);
    json_double(j, "seconds", run->seconds);
    json_uint(j, "concurrency", run->concurrency);
    json_object_end(j);
    json_end_line(j);
    free(s.categories);
}

/* ---- HTML ---- */

static void put_text(FILE *f, const char *s)
{
    for (; *s; s++)
        if (*s == '<')
            fputs("&lt;", f);
        else if (*s == '&')
            fputs("&amp;", f);
        else if (*s == '"')
            fputs("&quot;", f);
        else
            fputc(*s, f);
}

static void put_base64(FILE *f, const uint8_t *bytes, size_t n)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        uint32_t x = (uint32_t)bytes[i] << 16 | (uint32_t)(i + 1 < n ? bytes[i + 1] : 0) << 8 |
                     (i + 2 < n ? bytes[i + 2] : 0);
        fputc(digits[x >> 18], f);
        fputc(digits[x >> 12 & 63], f);
        fputc(i + 1 < n ? digits[x >> 6 & 63] : '=', f);
        fputc(i + 2 < n ? digits[x & 63] : '=', f);
    }
}

/* NULL when a browser would not show it. */
static const char *picture_type(const uint8_t *b, size_t n)
{
    if (n > 8 && memcmp(b, "\x89PNG", 4) == 0)
        return "image/png";
    if (n > 3 && memcmp(b, "\xff\xd8\xff", 3) == 0)
        return "image/jpeg";
    if (n > 12 && memcmp(b, "RIFF", 4) == 0 && memcmp(b + 8, "WEBP", 4) == 0)
        return "image/webp";
    return NULL;
}

static void put_part(FILE *f, const struct internvl_part *p)
{
    const char *type = p->kind == INTERNVL_IMAGE ? picture_type(p->data, p->n_bytes) : NULL;
    if (p->kind == INTERNVL_TEXT)
        return;
    if (!type || p->n_bytes > PICTURE_MAX_BYTES) {
        fprintf(f, "<span class=media>%s, %zu bytes</span>",
                p->kind == INTERNVL_VIDEO ? "video" : "picture", p->n_bytes);
        return;
    }
    fprintf(f, "<img alt=\"\" src=\"data:%s;base64,", type);
    put_base64(f, p->data, p->n_bytes);
    fputs("\">", f);
}

static void put_media(FILE *f, const struct eval_results *r, size_t i,
                      const struct command_options *o)
{
    struct conversation c = {0};
    struct internvl_error err;
    if (eval_set_conversation(r->set, &r->set->questions[i], &c, o, &err) == 0)
        for (size_t m = 0; m < c.n_messages; m++)
            for (size_t p = 0; p < c.messages[m].n_parts; p++)
                put_part(f, &c.messages[m].parts[p]);
    conversation_release(&c);
}

static void put_question(FILE *f, const struct eval_results *r, size_t i,
                         const struct command_options *o)
{
    const struct eval_question *q = &r->set->questions[i];
    const struct eval_result *x = &r->results[i];
    int failed = x->error.code != INTERNVL_OK;
    char *text = eval_question_text(q);
    fprintf(f, "<div class=\"q %s\"><div>", x->score >= 0.5 ? "right" : "wrong");
    put_media(f, r, i, o);
    fputs("</div><div><b>", f);
    put_text(f, q->id);
    fputs("</b> ", f);
    put_text(f, q->category);
    fputs("<p>", f);
    put_text(f, text);
    fputs("<p>expected: <q>", f);
    put_text(f, q->expected.answers[0]);
    fputs(failed ? "</q><br>failed: " : "</q><br>reply: <q>", f);
    put_text(f, failed ? x->error.msg : x->reply);
    fprintf(f, "%s<br>score %.3g (%s)</div></div>\n", failed ? "" : "</q>", x->score,
            eval_scorer_name(q->expected.scorer));
    free(text);
}

static void put_bar(FILE *f, const struct category *c)
{
    fputs("<tr><td>", f);
    put_text(f, c->name);
    fprintf(f,
            "<td class=n>%zu<td class=n>%zu<td class=n>%zu<td class=n>%.4f<td><svg width=200 "
            "height=12><rect width=200 height=12 fill=\"#ddd\"/><rect width=%.1f height=12 "
            "fill=\"#47a\"/></svg>\n",
            c->n_done, c->n_correct, c->n_failed, accuracy(c), 200 * accuracy(c));
}

/* How long the daemon took for each answer. */
static void put_times(FILE *f, const struct eval_results *r)
{
    size_t bins[N_BINS] = {0}, most = 1;
    uint64_t longest = 1;
    for (size_t i = 0; i < r->set->n_questions; i++)
        if (r->results[i].total_us > longest)
            longest = r->results[i].total_us;
    for (size_t i = 0; i < r->set->n_questions; i++)
        if (r->results[i].is_done && r->results[i].error.code == INTERNVL_OK) {
            size_t bin = (size_t)(r->results[i].total_us * N_BINS / (longest + 1));
            if (++bins[bin] > most)
                most = bins[bin];
        }
    fprintf(f, "<h2>Time of an answer</h2><svg width=%d height=120>", N_BINS * 20);
    for (int i = 0; i < N_BINS; i++) {
        double height = 100.0 * (double)bins[i] / (double)most;
        fprintf(f,
                "<rect x=%d y=%.1f width=18 height=%.1f fill=\"#47a\"><title>%zu "
                "answers</title></rect>",
                i * 20, 100 - height, height, bins[i]);
    }
    fprintf(f,
            "<text y=116 font-size=12>0</text><text x=%d y=116 font-size=12 "
            "text-anchor=end>%.2f s</text></svg>\n",
            N_BINS * 20, (double)longest * 1e-6);
}

static const char style[] =
    "<style>body{font:14px sans-serif;max-width:70em;margin:2em auto}table{border-collapse:"
    "collapse}td,th{padding:2px 8px;text-align:left}.n{text-align:right}.q{display:flex;gap:1em;"
    "border-left:6px solid;padding:6px;margin:8px 0;white-space:pre-wrap}.right{border-color:"
    "#4a7}.wrong{border-color:#c54}img{max-width:16em;max-height:16em}p{margin:4px 0}</style>\n";

static void put_page(FILE *f, const char *title, const struct eval_results *r,
                     const struct eval_run *run, const struct command_options *o)
{
    struct summary s = summarise(r);
    size_t n_shown = 0;
    fputs("<!doctype html><meta charset=utf-8><title>", f);
    put_text(f, title);
    fprintf(f, "</title>%s<h1>", style);
    put_text(f, title);
    fprintf(f,
            "</h1><p>%zu of %zu questions, %zu of them asked in the last run (%.1f s, %u in "
            "flight)\n<table><tr><th>category<th>questions<th>correct<th>failed<th>accuracy<th>\n",
            s.all.n_done, r->set->n_questions, run->n_asked, run->seconds, run->concurrency);
    for (size_t i = 0; i < s.n_categories; i++)
        put_bar(f, &s.categories[i]);
    put_bar(f, &s.all);
    fputs("</table>\n", f);
    put_times(f, r);
    fprintf(f, "<h2>Questions</h2><p>The wrong ones first, at most %d.\n", SHOWN_MAX);
    for (int right = 0; right < 2; right++)
        for (size_t i = 0; i < r->set->n_questions && n_shown < SHOWN_MAX; i++)
            if (r->results[i].is_done && (r->results[i].score >= 0.5) == right) {
                put_question(f, r, i, o);
                n_shown++;
            }
    free(s.categories);
}

int eval_report_html(const char *path, const char *title, const struct eval_results *r,
                     const struct eval_run *run, const struct command_options *o,
                     struct internvl_error *err)
{
    char temporary[4096];
    if (snprintf(temporary, sizeof(temporary), "%s.tmp", path) >= (int)sizeof(temporary))
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "%s: the path is too long", path);
    FILE *f = fopen(temporary, "w");
    if (!f)
        return rpc_error(err, INTERNVL_NOT_FOUND, "%s: %s", temporary, strerror(errno));
    put_page(f, title, r, run, o);
    int failed = ferror(f);
    if (fclose(f) != 0 || failed || rename(temporary, path) != 0)
        return rpc_error(err, INTERNVL_INTERNAL, "%s cannot be written", path);
    return 0;
}
