/*
 * What /proc tells about processes of this host. Knows no job; needs no rights over processes of
 * the same user.
 */
#ifndef INTERNVLD_PARALLEL_PROCESS_H
#define INTERNVLD_PARALLEL_PROCESS_H

#include <stddef.h>
#include <sys/types.h>

/* The file's bytes with a NUL behind them, n_bytes - 1 at most; returns how many, 0 when it cannot
 * be read (any more). */
size_t process_read(const char *path, char *to, size_t n_bytes);

/* The letter of /proc/PID/stat: R, S, D (stuck in the kernel), T or t (stopped), Z (ended, not
 * reaped); '\0' when there is no such process. */
char process_state(pid_t pid);
pid_t process_parent(pid_t pid); // 0 when there is no such process

struct process_children {
    int n_living, n_ended; // n_ended: not reaped
};

/* Of all threads of a process; none for a process that is no more, and where the kernel does not
 * tell (no CONFIG_PROC_CHILDREN). */
struct process_children process_children(pid_t pid);

#endif
