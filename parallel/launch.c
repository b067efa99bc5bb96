/*
 * A rank's way into its job and out of it, whichever way the job was started: the front doors over
 * struct launch_ops, the hook of die(), and the limits on the end.
 *
 * Must not know MPI, sockets, roles or layouts.
 */
#include "parallel/launch.h"

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/launch_limit.h"
#include "parallel/launch_ops.h"

/* Of the leak sanitizer, when it is linked: now, and not at exit, where MPI has unloaded plug-ins
 * and its leaks can no longer be told from ours by name. */
void __lsan_do_leak_check(void) __attribute__((weak));

#define FINALIZE_LIMIT_S 10
#define ABORT_TIMEOUT_MS 300 // for the others to be told, then the process just ends

static const struct launch_ops *ops(void)
{
    return launch_forked_rank() >= 0 ? &launch_local_ops : &launch_mpi_ops;
}

int launch_is_job(void)
{
    return getenv("OMPI_COMM_WORLD_SIZE") != NULL || getenv("PMIX_RANK") != NULL;
}

void launch_init(int *rank, int *world)
{
    ops()->init(rank, world);
    log_set_rank(*rank);
    log_set_die_hook(launch_abort);
}

void launch_host_ranks(int *n_on_host, int *index_on_host)
{
    ops()->host_ranks(n_on_host, index_on_host);
}

void launch_broadcast(void *x, size_t n_bytes)
{
    ops()->broadcast(x, n_bytes);
}

void launch_all_gather(void *all, const void *mine, size_t n_bytes)
{
    ops()->all_gather(all, mine, n_bytes);
}

void launch_barrier(void)
{
    ops()->barrier();
}

int64_t launch_clock_offset(int rank, int world, int64_t *error_ns)
{
    return ops()->clock_offset(rank, world, error_ns);
}

void launch_kernel_id(char *text, size_t n_bytes)
{
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re");
    memset(text, 0, n_bytes);
    if (f && !fgets(text, (int)n_bytes, f))
        text[0] = '\0';
    if (f)
        fclose(f);
}

int launch_shares_clock(void)
{
    char own[64], first[64];
    launch_kernel_id(own, sizeof(own));
    memcpy(first, own, sizeof(first));
    launch_broadcast(first, sizeof(first));
    return own[0] && strcmp(own, first) == 0;
}

void launch_finalize(void)
{
    launch_limit_off();
    launch_limit("the job's end", FINALIZE_LIMIT_S); /* a rank may have stopped when others left */
    if (__lsan_do_leak_check)
        __lsan_do_leak_check();
    log_set_die_hook(NULL);
    ops()->finalize();
    launch_limit_off();
}

static volatile sig_atomic_t abort_status;

static void leave(int signal_number)
{
    (void)signal_number;
    _exit(abort_status);
}

_Noreturn void launch_abort(int status)
{
    /* mpirun may be gone, or be ending the job already: it hears nobody while it waits for ranks to
     * die, and kills those that wait for it only seconds later. */
    const struct itimerval limit = {.it_value = {.tv_usec = ABORT_TIMEOUT_MS * 1000}};
    abort_status = status;
    signal(SIGALRM, leave);
    setitimer(ITIMER_REAL, &limit, NULL);
    ops()->abort(status);
    _exit(status);
}

void launch_block_signals(sigset_t *heard, sigset_t *old)
{
    sigemptyset(heard);
    sigaddset(heard, SIGTERM);
    sigaddset(heard, SIGINT);
    sigaddset(heard, SIGHUP);
    sigaddset(heard, SIGUSR1);
    sigaddset(heard, SIGCHLD);
    sigprocmask(SIG_BLOCK, heard, old);
}

void launch_log_stop(int signal_number, int n_asked)
{
    log_info("launch", "%s: %s", strsignal(signal_number),
             n_asked == 0 ? "the job drains (once more to kill it)" : "killing the job");
}
