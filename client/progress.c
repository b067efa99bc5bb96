/* The progress bar; its only state is when it was last shown. */
#include "client/progress.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define BAR_WIDTH 30

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void progress_begin(struct progress *p, const char *what, size_t n_total)
{
    p->what = what;
    p->n_total = n_total;
    p->started_s = now_s();
    p->is_terminal = isatty(STDERR_FILENO);
    p->shown_s = p->is_terminal ? 0 : p->started_s;
}

double progress_elapsed_s(const struct progress *p)
{
    return now_s() - p->started_s;
}

static void draw_bar(const struct progress *p, size_t n_done)
{
    size_t n_full = p->n_total ? n_done * BAR_WIDTH / p->n_total : 0;
    char bar[BAR_WIDTH + 1];
    for (size_t i = 0; i < BAR_WIDTH; i++)
        bar[i] = i < n_full ? '#' : '.';
    bar[BAR_WIDTH] = '\0';
    fprintf(stderr, "\r\033[K%s [%s] ", p->what, bar);
}

void progress_show(struct progress *p, size_t n_done, const char *note)
{
    double now = now_s(), elapsed = now - p->started_s;
    if (now - p->shown_s < (p->is_terminal ? 0.1 : 60.0))
        return;
    p->shown_s = now;
    double rate = elapsed > 0 ? (double)n_done / elapsed : 0;
    if (p->is_terminal)
        draw_bar(p, n_done);
    else
        fprintf(stderr, "%s ", p->what);
    fprintf(stderr, "%zu/%zu, %s, %.1f/s", n_done, p->n_total, note, rate);
    if (rate > 0)
        fprintf(stderr, ", %.0f s left", (double)(p->n_total - n_done) / rate);
    if (!p->is_terminal)
        fputc('\n', stderr);
    fflush(stderr);
}

void progress_end(struct progress *p)
{
    if (p->is_terminal)
        fputs("\r\033[K", stderr);
}
