/*
 * How far a long run is, on standard error: a bar that is redrawn on a terminal, a line a minute
 * elsewhere (so that a batch job's log stays short).
 */
#ifndef INTERNVL_CLIENT_PROGRESS_H
#define INTERNVL_CLIENT_PROGRESS_H

#include <stddef.h>

struct progress {
    const char *what;
    size_t n_total;
    double started_s, shown_s; // CLOCK_MONOTONIC
    int is_terminal;
};

void progress_begin(struct progress *p, const char *what, size_t n_total);
/* `note` is a few words of the caller's ("accuracy 0.78"). Cheap: call it as often as you like. */
void progress_show(struct progress *p, size_t n_done, const char *note);
/* Takes the bar away. */
void progress_end(struct progress *p);
double progress_elapsed_s(const struct progress *p);

#endif
