/*
 * MPI in a rank, from start to end.
 *
 * Owns the only calls of MPI outside comm_mpi.c. Must not know roles or layouts.
 */
#include "parallel/launch.h"

#include <limits.h>
#include <mpi.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/log.h"
#include "parallel/launch_limit.h"

/* Of the leak sanitizer, when it is linked. MPI keeps memory, and loads and unloads plug-ins, so
 * that its leaks can be told from ours by name only between its start and its end. */
void __lsan_disable(void) __attribute__((weak));
void __lsan_enable(void) __attribute__((weak));
void __lsan_do_leak_check(void) __attribute__((weak)); // now, and not at exit

#define N_TIME_ROUNDS 8
#define FINALIZE_LIMIT_S 10
#define ABORT_TIMEOUT_MS 300 // for MPI_Abort() to do its work, then the process just ends

static struct {
    int n_on_host, index_on_host;
} host;

int launch_is_job(void)
{
    return getenv("OMPI_COMM_WORLD_SIZE") != NULL || getenv("PMIX_RANK") != NULL;
}

static void check(int rc, const char *what)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int n;
    if (rc == MPI_SUCCESS)
        return;
    MPI_Error_string(rc, text, &n);
    die("%s: %s", what, text);
}

static int mpi_count(size_t n_bytes)
{
    if (n_bytes > INT_MAX)
        BUG("%zu bytes in one call of MPI", n_bytes);
    return (int)n_bytes;
}

static void find_host_ranks(int rank)
{
    MPI_Comm on_host;
    check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &on_host),
          "MPI_Comm_split_type");
    check(MPI_Comm_size(on_host, &host.n_on_host), "MPI_Comm_size");
    check(MPI_Comm_rank(on_host, &host.index_on_host), "MPI_Comm_rank");
    check(MPI_Comm_free(&on_host), "MPI_Comm_free");
}

void launch_init(int *rank, int *world)
{
    int provided;
    if (__lsan_disable)
        __lsan_disable();
    check(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
    if (__lsan_enable)
        __lsan_enable();
    check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(MPI_COMM_WORLD, rank), "MPI_Comm_rank");
    check(MPI_Comm_size(MPI_COMM_WORLD, world), "MPI_Comm_size");
    log_set_rank(*rank);
    log_set_die_hook(launch_abort);
    if (provided < MPI_THREAD_FUNNELED)
        die("this MPI library has no thread support");
    find_host_ranks(*rank);
}

void launch_host_ranks(int *n_on_host, int *index_on_host)
{
    *n_on_host = host.n_on_host;
    *index_on_host = host.index_on_host;
}

void launch_broadcast(void *x, size_t n_bytes)
{
    check(MPI_Bcast(x, mpi_count(n_bytes), MPI_BYTE, 0, MPI_COMM_WORLD), "MPI_Bcast");
}

void launch_all_gather(void *all, const void *mine, size_t n_bytes)
{
    int n = mpi_count(n_bytes);
    check(MPI_Allgather(mine, n, MPI_BYTE, all, n, MPI_BYTE, MPI_COMM_WORLD), "MPI_Allgather");
}

void launch_barrier(void)
{
    check(MPI_Barrier(MPI_COMM_WORLD), "MPI_Barrier");
}

/* One question about the time, answered by rank 0. */
static void ask_time(int64_t *offset, int64_t *shortest)
{
    int64_t asked = (int64_t)clock_now_ns(), theirs, answered;
    check(MPI_Send(&asked, 1, MPI_INT64_T, 0, 0, MPI_COMM_WORLD), "MPI_Send");
    check(MPI_Recv(&theirs, 1, MPI_INT64_T, 0, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE), "MPI_Recv");
    answered = (int64_t)clock_now_ns();
    if (answered - asked > *shortest)
        return;
    *shortest = answered - asked;
    *offset = theirs - (asked + answered) / 2;
}

int64_t launch_clock_offset(int rank, int world, int64_t *error_ns)
{
    int64_t offset = 0, shortest = INT64_MAX, time_of_asking;
    for (int i = 0; i < N_TIME_ROUNDS && rank > 0; i++)
        ask_time(&offset, &shortest);
    for (int i = 0; i < N_TIME_ROUNDS * (world - 1) && rank == 0; i++) {
        int asker = 1 + i / N_TIME_ROUNDS;
        check(
            MPI_Recv(&time_of_asking, 1, MPI_INT64_T, asker, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE),
            "MPI_Recv");
        int64_t now = (int64_t)clock_now_ns();
        check(MPI_Send(&now, 1, MPI_INT64_T, asker, 0, MPI_COMM_WORLD), "MPI_Send");
    }
    *error_ns = rank > 0 ? (shortest + 1) / 2 : 0;
    return offset;
}

int launch_shares_clock(void)
{
    char own[64] = "", first[64];
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (f && !fgets(own, sizeof(own), f))
        own[0] = '\0';
    if (f)
        fclose(f);
    memcpy(first, own, sizeof(first));
    launch_broadcast(first, sizeof(first));
    return own[0] && strcmp(own, first) == 0;
}

void launch_finalize(void)
{
    launch_limit_off();
    launch_limit("MPI's end", FINALIZE_LIMIT_S); /* a rank may have stopped when the others left */
    if (__lsan_do_leak_check)
        __lsan_do_leak_check();
    log_set_die_hook(NULL);
    check(MPI_Finalize(), "MPI_Finalize");
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
    int initialized = 0, finalized = 0;
    abort_status = status;
    signal(SIGALRM, leave);
    setitimer(ITIMER_REAL, &limit, NULL);
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (initialized && !finalized)
        MPI_Abort(MPI_COMM_WORLD, status);
    _exit(status);
}
