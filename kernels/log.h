/*
 * Log lines, and the two failures that no client can cause.
 *
 *   BUG(…)  our own mistake: prints file and line, aborts (core dump).
 *   die(…)  the machine or the deployment: prints the rank, file and line, calls the die hook
 * (which ends the MPI job) and exits with status 1.
 *
 * INTERNVLD_LOG=debug|info|warn|error[,subsystem…] is read by log_init() alone. A line reads
 *   2026-11-24T05:46:12.123Z r2 info control: message
 * and is written by one write(2) to standard error. Nothing here knows MPI: launch installs the
 * rank and the hook.
 */
#ifndef INTERNVLD_KERNELS_LOG_H
#define INTERNVLD_KERNELS_LOG_H

#include <stddef.h>

enum log_level { LOG_LEVEL_DEBUG, LOG_LEVEL_INFO, LOG_LEVEL_WARN, LOG_LEVEL_ERROR };

/* Reads INTERNVLD_LOG (default "info", every subsystem). An unknown word is one warning line. */
void log_init(void);
void log_set_rank(int rank); // -1: no rank yet, the field is left out
int log_enabled(enum log_level level, const char *subsystem);
void log_write(enum log_level level, const char *subsystem, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#define log_debug(sub, ...)                                                                        \
    do {                                                                                           \
        if (log_enabled(LOG_LEVEL_DEBUG, sub))                                                     \
            log_write(LOG_LEVEL_DEBUG, sub, __VA_ARGS__);                                          \
    } while (0)
#define log_info(sub, ...) log_write(LOG_LEVEL_INFO, sub, __VA_ARGS__)
#define log_warn(sub, ...) log_write(LOG_LEVEL_WARN, sub, __VA_ARGS__)
#define log_error(sub, ...) log_write(LOG_LEVEL_ERROR, sub, __VA_ARGS__)

/* `hook` runs once, after the line is written and before exit(1); it may not return (MPI_Abort).
 * NULL: none. */
void log_set_die_hook(void (*hook)(int status));
_Noreturn void log_die(const char *file, int line, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
_Noreturn void log_bug(const char *file, int line, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
#define die(...) log_die(__FILE__, __LINE__, __VA_ARGS__)
#define BUG(...) log_bug(__FILE__, __LINE__, __VA_ARGS__)

/* Host memory: zeroed, never NULL (dies), freed with free(). n * size is checked for overflow. */
void *xcalloc(size_t n, size_t size) __attribute__((returns_nonnull));
/* The new part is not zeroed. */
void *xrealloc(void *p, size_t n, size_t size) __attribute__((returns_nonnull));
char *xstrdup(const char *s) __attribute__((returns_nonnull));

#endif
