/*
 * The ranks of a job that mpirun or srun started: MPI from start to end.
 *
 * Owns the only calls of MPI outside comm_mpi.c. Must not know roles or layouts.
 */
#include <limits.h>
#include <mpi.h>
#include <stdint.h>

#include "kernels/clock.h"
#include "kernels/log.h"
#include "parallel/launch_ops.h"

/* Of the leak sanitizer, when it is linked: MPI keeps memory. */
void __lsan_disable(void) __attribute__((weak));
void __lsan_enable(void) __attribute__((weak));

#define N_TIME_ROUNDS 8

static struct {
    int n_on_host, index_on_host;
} host;

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

static void mpi_init(int *rank, int *world)
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
    if (provided < MPI_THREAD_FUNNELED)
        die("this MPI library has no thread support");
    find_host_ranks(*rank);
}

static void mpi_host_ranks(int *n_on_host, int *index_on_host)
{
    *n_on_host = host.n_on_host;
    *index_on_host = host.index_on_host;
}

static void mpi_broadcast(void *x, size_t n_bytes)
{
    check(MPI_Bcast(x, mpi_count(n_bytes), MPI_BYTE, 0, MPI_COMM_WORLD), "MPI_Bcast");
}

static void mpi_all_gather(void *all, const void *mine, size_t n_bytes)
{
    int n = mpi_count(n_bytes);
    check(MPI_Allgather(mine, n, MPI_BYTE, all, n, MPI_BYTE, MPI_COMM_WORLD), "MPI_Allgather");
}

static void mpi_barrier(void)
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

static int64_t mpi_clock_offset(int rank, int world, int64_t *error_ns)
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

static void mpi_finalize(void)
{
    check(MPI_Finalize(), "MPI_Finalize");
}

static void mpi_abort(int status)
{
    int initialized = 0, finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (initialized && !finalized)
        MPI_Abort(MPI_COMM_WORLD, status);
}

const struct launch_ops launch_mpi_ops = {
    .init = mpi_init,
    .host_ranks = mpi_host_ranks,
    .broadcast = mpi_broadcast,
    .all_gather = mpi_all_gather,
    .barrier = mpi_barrier,
    .clock_offset = mpi_clock_offset,
    .finalize = mpi_finalize,
    .abort = mpi_abort,
};
