/*
 * Log lines, die() and BUG(). Owns the level, the subsystem filter, the rank and the die hook; each
 * line is one write(2), so that lines of several ranks on one terminal do not mix. See log.h.
 */
#include "kernels/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LINE_MAX_BYTES 2048
#define MAX_SUBSYSTEMS 16

static enum log_level log_min_level = LOG_LEVEL_INFO;
static char log_subsystems[MAX_SUBSYSTEMS][24];
static int log_n_subsystems;
static int log_rank = -1;
static void (*log_die_hook)(int status);
static atomic_flag log_dying = ATOMIC_FLAG_INIT;

static const char *const level_names[] = {"debug", "info", "warn", "error"};

void log_init(void)
{
    const char *env = getenv("INTERNVLD_LOG");
    char copy[256];
    char *save = NULL;

    log_min_level = LOG_LEVEL_INFO;
    log_n_subsystems = 0;
    if (!env)
        return;
    snprintf(copy, sizeof(copy), "%s", env);
    for (char *word = strtok_r(copy, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
        int is_level = 0;

        for (int i = 0; i < 4; i++)
            if (!strcmp(word, level_names[i])) {
                log_min_level = (enum log_level)i;
                is_level = 1;
            }
        if (is_level)
            continue;
        if (log_n_subsystems == MAX_SUBSYSTEMS || strlen(word) >= sizeof(log_subsystems[0])) {
            log_warn("log", "INTERNVLD_LOG: \"%s\" is left out", word);
            continue;
        }
        strcpy(log_subsystems[log_n_subsystems++], word);
    }
}

void log_set_rank(int rank)
{
    log_rank = rank;
}

void log_set_die_hook(void (*hook)(int status))
{
    log_die_hook = hook;
}

int log_enabled(enum log_level level, const char *subsystem)
{
    if (level < log_min_level)
        return 0;
    if (level >= LOG_LEVEL_WARN || log_n_subsystems == 0)
        return 1;
    for (int i = 0; i < log_n_subsystems; i++)
        if (!strcmp(subsystem, log_subsystems[i]))
            return 1;
    return 0;
}

static void write_line(const char *kind, const char *subsystem, const char *fmt, va_list ap)
{
    char line[LINE_MAX_BYTES];
    struct timespec now;
    struct tm tm;
    size_t n;

    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &tm);
    n = strftime(line, sizeof(line), "%Y-%m-%dT%H:%M:%S", &tm);
    n += (size_t)snprintf(line + n, sizeof(line) - n, ".%03ldZ ", now.tv_nsec / 1000000);
    if (log_rank >= 0)
        n += (size_t)snprintf(line + n, sizeof(line) - n, "r%d ", log_rank);
    n += (size_t)snprintf(line + n, sizeof(line) - n, "%s %s: ", kind, subsystem);
    int m = vsnprintf(line + n, sizeof(line) - n - 1, fmt, ap);
    if (m > 0)
        n += (size_t)m < sizeof(line) - n - 1 ? (size_t)m : sizeof(line) - n - 2;
    line[n++] = '\n';
    while (write(STDERR_FILENO, line, n) < 0 && errno == EINTR)
        ;
}

void log_write(enum log_level level, const char *subsystem, const char *fmt, ...)
{
    va_list ap;

    if (!log_enabled(level, subsystem))
        return;
    va_start(ap, fmt);
    write_line(level_names[level], subsystem, fmt, ap);
    va_end(ap);
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash ? slash + 1 : path;
}

/* The place stands in the subsystem's field, so that a fatal line has the shape of every other. */
static void write_fatal(const char *kind, const char *file, int line, const char *fmt, va_list ap)
{
    char place[96];

    snprintf(place, sizeof(place), "%s:%d", base_name(file), line);
    write_line(kind, place, fmt, ap);
}

void log_die(const char *file, int line, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    write_fatal("fatal", file, line, fmt, ap);
    va_end(ap);
    if (!atomic_flag_test_and_set(&log_dying) && log_die_hook)
        log_die_hook(1);
    _exit(1);
}

void log_bug(const char *file, int line, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    write_fatal("BUG", file, line, fmt, ap);
    va_end(ap);
    abort();
}

static size_t checked_size(size_t n, size_t size)
{
    if (size && n > SIZE_MAX / size)
        die("%zu elements of %zu bytes do not fit the address space", n, size);
    return n * size;
}

void *xcalloc(size_t n, size_t size)
{
    size_t n_bytes = checked_size(n, size);
    void *p = calloc(1, n_bytes ? n_bytes : 1);

    if (!p)
        die("out of memory: %zu bytes", n_bytes);
    return p;
}

void *xrealloc(void *p, size_t n, size_t size)
{
    size_t n_bytes = checked_size(n, size);

    p = realloc(p, n_bytes ? n_bytes : 1);
    if (!p)
        die("out of memory: %zu bytes", n_bytes);
    return p;
}

char *xstrdup(const char *s)
{
    size_t n = strlen(s) + 1;

    return memcpy(xcalloc(n, 1), s, n);
}
