/*
 * What an evaluation came to: accuracy per category for people, as JSON, and as one HTML page that
 * needs nothing else (plots as SVG, pictures inside).
 */
#ifndef INTERNVL_CLIENT_EVAL_REPORT_H
#define INTERNVL_CLIENT_EVAL_REPORT_H

#include <stdio.h>

#include "client/command.h"
#include "client/eval_results.h"

struct eval_run { // of this process, not of earlier ones that it went on from
    double seconds;
    size_t n_asked;
    uint32_t concurrency;
};

void eval_report_table(FILE *f, const struct eval_results *r, const struct eval_run *run);
void eval_report_json(FILE *f, const struct eval_results *r, const struct eval_run *run);
/* Replaces `path` at once. `title` is the questions' file. */
int eval_report_html(const char *path, const char *title, const struct eval_results *r,
                     const struct eval_run *run, const struct command_options *o,
                     struct internvl_error *err);

#endif
