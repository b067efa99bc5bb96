/*
 * A thread that waits beside MPI, or the sockets of forked ranks. See launch_limit.h.
 *
 * Owns the thread, and the look at the other ranks of this host in /proc: they are told by the
 * environment that mpirun and srun give them, or by their parent and name. Must not call MPI, which
 * may be what hangs.
 */
#include "parallel/launch_limit.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/launch_ops.h"
#include "parallel/process.h"

#define OTHERS_WAIT_S 1             // for rank 0 to have spoken
#define ENVIRONMENT_BYTES (1 << 20) // of a process; a longer one is cut
#define STUCK_TEXT_BYTES 256

static struct {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int is_on;
    const char *what;
    int limit_s;
} limit = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

/* ---- the ranks of this host ---- */

static const char *value_of(const char *environment, size_t n_bytes, const char *name)
{
    size_t n_name = strlen(name);
    for (const char *at = environment; at < environment + n_bytes; at += strlen(at) + 1)
        if (strncmp(at, name, n_name) == 0 && at[n_name] == '=')
            return at + n_name + 1;
    return NULL;
}

/* NULL for a process that runs or sleeps. */
static const char *trouble_of(pid_t pid)
{
    char state = process_state(pid);
    return state == 'T' || state == 't' ? "stopped" : state == 'D' ? "stuck in the kernel" : NULL;
}

/* The rank that process `pid` is in this rank's job, as text in `buffer`; NULL when it is none. A
 * forked rank says it by its name. */
static const char *rank_of(const char *pid, char *buffer, size_t n_bytes)
{
    char path[64];
    const char *job = getenv("PMIX_NAMESPACE"), *its_job, *rank;
    if (launch_forked_rank() >= 0) {
        if (process_parent((pid_t)atoi(pid)) != getppid())
            return NULL;
        snprintf(path, sizeof(path), "/proc/%.16s/comm", pid);
        process_read(path, buffer, n_bytes);
        buffer[strcspn(buffer, "\n")] = '\0';
        return strncmp(buffer, FORKED_NAME, strlen(FORKED_NAME)) == 0 ? buffer + strlen(FORKED_NAME)
                                                                      : NULL;
    }
    snprintf(path, sizeof(path), "/proc/%.16s/environ", pid);
    size_t n = process_read(path, buffer, n_bytes);
    its_job = value_of(buffer, n, "PMIX_NAMESPACE");
    rank = value_of(buffer, n, "PMIX_RANK");
    return job && its_job && rank && strcmp(its_job, job) == 0 ? rank : NULL;
}

/* Appends ", rank 3 (process 123) is stopped" when `pid` is a rank of this job in trouble. */
static void look_at(const char *pid, char *buffer, char *text, size_t n_text)
{
    const char *trouble = trouble_of((pid_t)atoi(pid));
    const char *rank = trouble ? rank_of(pid, buffer, ENVIRONMENT_BYTES) : NULL;
    size_t used = strlen(text);
    if (rank)
        snprintf(text + used, n_text - used, "%s rank %.16s (process %.16s) is %s",
                 used ? "," : ":", rank, pid, trouble);
}

static void find_stuck(char *text, size_t n_text)
{
    DIR *processes = opendir("/proc");
    char *environment = xcalloc(1, ENVIRONMENT_BYTES);
    text[0] = '\0';
    for (struct dirent *e; processes && (e = readdir(processes));)
        if (isdigit((unsigned char)e->d_name[0]))
            look_at(e->d_name, environment, text, n_text);
    if (processes)
        closedir(processes);
    free(environment);
}

/* ---- the thread ---- */

static _Noreturn void give_up(void)
{
    char stuck[STUCK_TEXT_BYTES];
    find_stuck(stuck, sizeof(stuck));
    log_error("launch", "%s did not come to its end within %d s%s", limit.what, limit.limit_s,
              *stuck ? stuck : ": a rank hangs, and none on this host is stopped");
    _exit(1);
}

static void *wait_beside(void *unused)
{
    const char *rank = getenv("PMIX_RANK");
    int is_first = launch_forked_rank() == 0 || (rank && strcmp(rank, "0") == 0);
    struct timespec deadline;
    int rc = 0;
    (void)unused;
    pthread_mutex_lock(&limit.lock);
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += limit.limit_s + (is_first ? 0 : OTHERS_WAIT_S);
    while (limit.is_on && rc == 0)
        rc = pthread_cond_timedwait(&limit.changed, &limit.lock, &deadline);
    int is_over = limit.is_on;
    pthread_mutex_unlock(&limit.lock);
    if (is_over)
        give_up();
    return NULL;
}

void launch_limit(const char *what, int limit_s)
{
    sigset_t all, old;
    limit.what = what;
    limit.limit_s = limit_s;
    limit.is_on = 1;
    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(&limit.thread, NULL, wait_beside, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rc)
        die("pthread_create: %s", strerror(rc));
}

void launch_limit_off(void)
{
    if (!limit.is_on)
        return;
    pthread_mutex_lock(&limit.lock);
    limit.is_on = 0;
    pthread_cond_signal(&limit.changed);
    pthread_mutex_unlock(&limit.lock);
    pthread_join(limit.thread, NULL);
}
