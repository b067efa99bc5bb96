/*
 * The results file. See eval_results.h.
 */
#include "client/eval_results.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "client/json_out.h"
#include "client/rpc.h"

#define KEY_BYTES 24

void eval_results_init(struct eval_results *r, const struct eval_set *set, const char *settings,
                       double tolerance)
{
    *r = (struct eval_results){.set = set, .settings = settings, .tolerance = tolerance, .fd = -1};
    r->results = command_alloc(set->n_questions, sizeof(*r->results));
}

static void write_key(const struct eval_results *r, size_t question, char key[KEY_BYTES])
{
    uint64_t hash = r->set->questions[question].key;
    for (const char *s = r->settings; *s; s++)
        hash = (hash ^ (unsigned char)*s) * 0x100000001b3u;
    snprintf(key, KEY_BYTES, "%016" PRIx64, hash);
}

static void score(struct eval_results *r, size_t question)
{
    struct eval_result *x = &r->results[question];
    const struct eval_question *q = &r->set->questions[question];
    x->score = x->error.code == INTERNVL_OK && x->reply
                   ? eval_score(&q->expected, x->reply, r->tolerance)
                   : 0;
}

/* ---- writing ---- */

static void write_result(const struct eval_results *r, size_t question, FILE *f)
{
    const struct eval_question *q = &r->set->questions[question];
    const struct eval_result *x = &r->results[question];
    struct json_out json = {.file = f}, *j = &json;
    char key[KEY_BYTES];
    write_key(r, question, key);
    json_object_begin(j, NULL);
    json_string(j, "id", q->id);
    json_string(j, "category", q->category);
    json_string(j, "answer", q->expected.answers[0]);
    if (x->error.code != INTERNVL_OK) {
        json_string(j, "error", internvl_code_name(x->error.code));
        json_string(j, "message", x->error.msg);
    } else {
        json_string(j, "reply", x->reply);
        json_array_begin(j, "token_ids");
        for (size_t i = 0; i < x->n_tokens; i++)
            json_uint(j, NULL, x->token_ids[i]);
        json_array_end(j);
        json_uint(j, "prompt_tokens", x->prompt_tokens);
        json_uint(j, "total_us", x->total_us);
    }
    json_string(j, "scorer", eval_scorer_name(q->expected.scorer));
    json_double(j, "score", x->score);
    json_bool(j, "correct", x->score >= 0.5);
    json_uint(j, "question", question);
    json_string(j, "key", key);
    json_object_end(j);
    json_end_line(j);
}

static int cannot_write(const struct eval_results *r, struct internvl_error *err)
{
    return rpc_error(err, INTERNVL_INTERNAL, "%s cannot be written: %s", r->path, strerror(errno));
}

static int append(const struct eval_results *r, size_t question, struct internvl_error *err)
{
    char *line = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&line, &n);
    if (!f)
        return cannot_write(r, err);
    write_result(r, question, f);
    fclose(f);
    ssize_t written = write(r->fd, line, n); /* whole, or the disk is full */
    free(line);
    if (written == (ssize_t)n)
        return 0;
    errno = written < 0 ? errno : ENOSPC;
    return cannot_write(r, err);
}

int eval_results_add(struct eval_results *r, size_t question, const struct answer *a,
                     const struct internvl_error *why, struct internvl_error *err)
{
    struct eval_result *x = &r->results[question];
    x->is_done = 1;
    if (a) {
        const struct answer_candidate *c = a->n_candidates ? &a->candidates[0] : NULL;
        x->reply = strdup(answer_text(a));
        x->n_tokens = c ? c->n_ids : 0;
        x->token_ids = command_alloc(x->n_tokens + 1, sizeof(*x->token_ids));
        if (x->n_tokens)
            memcpy(x->token_ids, c->ids, x->n_tokens * sizeof(*x->token_ids));
        x->prompt_tokens = a->usage.prompt_tokens;
        x->total_us = a->timing.total_us;
    } else {
        x->error = *why;
    }
    score(r, question);
    return r->fd < 0 ? 0 : append(r, question, err);
}

int eval_results_finish(struct eval_results *r, struct internvl_error *err)
{
    char path[4096];
    if (r->fd < 0 || r->n_beyond)
        return 0;
    if (snprintf(path, sizeof(path), "%s.tmp", r->path) >= (int)sizeof(path))
        return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "%s: the path is too long", r->path);
    FILE *f = fopen(path, "w");
    if (!f)
        return cannot_write(r, err);
    for (size_t i = 0; i < r->set->n_questions; i++)
        if (r->results[i].is_done)
            write_result(r, i, f);
    int failed = fflush(f) != 0 || ferror(f) || fsync(fileno(f)) != 0;
    if (fclose(f) != 0 || failed || rename(path, r->path) != 0)
        return cannot_write(r, err);
    return 0;
}

/* ---- reading ---- */

static const char *text_of(const cJSON *line, const char *name)
{
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(line, name));
}

static uint64_t number_of(const cJSON *line, const char *name)
{
    const cJSON *x = cJSON_GetObjectItemCaseSensitive(line, name);
    return cJSON_IsNumber(x) && x->valuedouble >= 0 ? (uint64_t)x->valuedouble : 0;
}

static void release_result(struct eval_result *x)
{
    free(x->reply);
    free(x->token_ids);
    *x = (struct eval_result){0};
}

static void take(struct eval_results *r, size_t question, const cJSON *line, const char *reply)
{
    struct eval_result *x = &r->results[question];
    const cJSON *ids = cJSON_GetObjectItemCaseSensitive(line, "token_ids"), *id;
    release_result(x);
    x->is_done = 1;
    x->reply = strdup(reply);
    x->token_ids = command_alloc((size_t)cJSON_GetArraySize(ids) + 1, sizeof(*x->token_ids));
    cJSON_ArrayForEach(id, ids)
    {
        x->token_ids[x->n_tokens++] = cJSON_IsNumber(id) ? (uint32_t)id->valuedouble : 0;
    }
    x->prompt_tokens = (uint32_t)number_of(line, "prompt_tokens");
    x->total_us = number_of(line, "total_us");
    score(r, question);
}

/* What keeps a line from being taken up, or NULL. */
static const char *take_line(struct eval_results *r, const char *text)
{
    char key[KEY_BYTES];
    const char *why = NULL, *reply;
    cJSON *line = cJSON_Parse(text);
    const char *has_key = text_of(line, "key");
    uint64_t question = number_of(line, "question");
    if (!has_key) {
        why = "not a result";
    } else if (question >= r->set->n_questions) {
        r->n_beyond++;
    } else {
        write_key(r, question, key);
        reply = text_of(line, "reply");
        if (strcmp(key, has_key) != 0)
            why = "a result of another question or other settings";
        else if (reply)
            take(r, question, line, reply);
    }
    cJSON_Delete(line);
    return why;
}

/* Sets *n_whole to the bytes of whole lines. */
static int read_lines(struct eval_results *r, const char *path, size_t *n_whole,
                      struct internvl_error *err)
{
    size_t n_bytes, line_number = 0;
    char *text = read_file(path, &n_bytes, err), *line = text, *end;
    int rc = 0;
    *n_whole = 0;
    if (!text)
        return -1;
    for (; rc == 0 && (end = strchr(line, '\n')); line = end + 1) {
        *end = '\0';
        line_number++;
        *n_whole = (size_t)(end + 1 - text);
        const char *why = *line ? take_line(r, line) : NULL;
        if (why)
            rc = rpc_error(err, INTERNVL_INVALID_ARGUMENT,
                           "%s:%zu: %s; give another file, or remove it", path, line_number, why);
    }
    free(text);
    return rc;
}

int eval_results_read(struct eval_results *r, const char *path, struct internvl_error *err)
{
    size_t n_whole;
    return read_lines(r, path, &n_whole, err);
}

int eval_results_open(struct eval_results *r, const char *path, struct internvl_error *err)
{
    size_t n_whole;
    r->path = path;
    r->fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (r->fd < 0)
        return rpc_error(err, INTERNVL_NOT_FOUND, "%s: %s", path, strerror(errno));
    if (flock(r->fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return rpc_error(err, INTERNVL_FAILED_PRECONDITION, "%s: another evaluation writes it",
                         path);
    if (read_lines(r, path, &n_whole, err))
        return -1;
    if (ftruncate(r->fd, (off_t)n_whole) != 0)
        return cannot_write(r, err);
    return 0;
}

void eval_results_release(struct eval_results *r)
{
    for (size_t i = 0; r->set && i < r->set->n_questions; i++)
        release_result(&r->results[i]);
    free(r->results);
    if (r->set && r->fd >= 0)
        close(r->fd);
    *r = (struct eval_results){0};
}
