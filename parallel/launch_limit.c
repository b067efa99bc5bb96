/*
 * A thread that waits beside MPI. See launch_limit.h.
 *
 * Owns the thread, and the look at the other ranks of this host in /proc: they are told by the
 * environment that mpirun and srun give them. Must not call MPI, which may be what hangs.
 */
#include "parallel/launch_limit.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/log.h"

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

/* Bytes read, with a NUL behind them; 0 when there is no such file any more. */
static size_t read_file(const char *path, char *to, size_t n_bytes)
{
    size_t n = 0;
    ssize_t got = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        while (n < n_bytes - 1 && (got = read(fd, to + n, n_bytes - 1 - n)) > 0)
            n += (size_t)got;
        close(fd);
    }
    to[n] = '\0';
    return n;
}

static const char *value_of(const char *environment, size_t n_bytes, const char *name)
{
    size_t n_name = strlen(name);
    for (const char *at = environment; at < environment + n_bytes; at += strlen(at) + 1)
        if (strncmp(at, name, n_name) == 0 && at[n_name] == '=')
            return at + n_name + 1;
    return NULL;
}

/* "T (stopped)" and the like from /proc/PID/stat, whose second word may hold anything in
 * parentheses; NULL for a process that runs or sleeps. */
static const char *trouble_of(const char *pid)
{
    char path[64], stat[512];
    snprintf(path, sizeof(path), "/proc/%.16s/stat", pid);
    read_file(path, stat, sizeof(stat));
    const char *name_end = strrchr(stat, ')');
    char state = name_end && name_end[1] == ' ' ? name_end[2] : '?';
    return state == 'T' || state == 't' ? "stopped" : state == 'D' ? "stuck in the kernel" : NULL;
}

/* Appends ", rank 3 (process 123) is stopped" when `pid` is a rank of `job` in trouble. */
static void look_at(const char *pid, const char *job, char *environment, char *text, size_t n_text)
{
    char path[64];
    const char *trouble = trouble_of(pid), *its_job, *rank;
    size_t n, used = strlen(text);
    if (!trouble)
        return;
    snprintf(path, sizeof(path), "/proc/%.16s/environ", pid);
    n = read_file(path, environment, ENVIRONMENT_BYTES);
    its_job = value_of(environment, n, "PMIX_NAMESPACE");
    rank = value_of(environment, n, "PMIX_RANK");
    if (its_job && rank && strcmp(its_job, job) == 0)
        snprintf(text + used, n_text - used, "%s rank %.16s (process %.16s) is %s",
                 used ? "," : ":", rank, pid, trouble);
}

static void find_stuck(char *text, size_t n_text)
{
    const char *job = getenv("PMIX_NAMESPACE");
    DIR *processes = job ? opendir("/proc") : NULL;
    char *environment = xcalloc(1, ENVIRONMENT_BYTES);
    text[0] = '\0';
    for (struct dirent *e; processes && (e = readdir(processes));)
        if (isdigit((unsigned char)e->d_name[0]))
            look_at(e->d_name, job, environment, text, n_text);
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
    struct timespec deadline;
    int rc = 0;
    (void)unused;
    pthread_mutex_lock(&limit.lock);
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += limit.limit_s + (rank && strcmp(rank, "0") == 0 ? 0 : OTHERS_WAIT_S);
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
