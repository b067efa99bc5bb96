/*
 * The outcomes of an evaluation, in memory and in a file that survives anything.
 *
 * The file is JSONL. A result is appended by one write(2) when its question is over, in whatever
 * order they end; a run that is killed leaves at most one torn line, which the next run drops. A
 * finished run puts the lines into the questions' order, replacing the file at once. Results of a
 * file are taken up again only when they are of the same questions and settings.
 */
#ifndef INTERNVL_CLIENT_EVAL_RESULTS_H
#define INTERNVL_CLIENT_EVAL_RESULTS_H

#include "client/answer.h"
#include "client/eval_set.h"

struct eval_result {
    int is_done;                 // answered, or failed for good
    struct internvl_error error; // code INTERNVL_OK when answered
    char *reply;
    uint32_t *token_ids; // [n_tokens]
    size_t n_tokens;
    uint32_t prompt_tokens;
    uint64_t total_us;
    double score; // 0 … 1
};

struct eval_results { // {0} is empty
    const struct eval_set *set;
    const char *settings; // borrowed; see eval_results_init()
    double tolerance;
    struct eval_result *results; // [set->n_questions]
    int fd;                      // of the file, -1: none
    const char *path;            // borrowed
    size_t n_beyond;             // lines of the file for questions past --limit: kept as they are
};

/* `settings` are the words that answers depend on (sampling, tiling): part of each line's key. */
void eval_results_init(struct eval_results *r, const struct eval_set *set, const char *settings,
                       double tolerance);
/* Takes in the answers of a file; failures are left out, so that they are asked again. INVALID_
 * ARGUMENT when a whole line is none of ours, or of another question or other settings. */
int eval_results_read(struct eval_results *r, const char *path, struct internvl_error *err);
/* Reads `path` if it is there, drops a torn last line, and opens it for appending. FAILED_
 * PRECONDITION while another process has it open. */
int eval_results_open(struct eval_results *r, const char *path, struct internvl_error *err);
/* Scores and appends. `a` is NULL when the question failed with `why`. */
int eval_results_add(struct eval_results *r, size_t question, const struct answer *a,
                     const struct internvl_error *why, struct internvl_error *err);
/* The file again, in the questions' order, without what was superseded; a file with results of more
 * questions than these stays as it is. */
int eval_results_finish(struct eval_results *r, struct internvl_error *err);
void eval_results_release(struct eval_results *r);

#endif
