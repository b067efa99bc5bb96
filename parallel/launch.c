/*
 * MPI from start to end, and a lone process's way to become a job.
 *
 * Owns the only calls of MPI outside comm_mpi.c, and the signals of the process that stays as
 * mpirun's parent. Must not know roles or layouts. What mpirun does with signals was tried: SIGTERM
 * to it ends the ranks before they can drain, SIGUSR1 to it reaches all of them at once.
 */
#include "parallel/launch.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <mpi.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
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
#define ABORT_TIMEOUT_S 2 // for MPI_Abort() to do its work, then the process just ends

static struct {
    int n_on_host, index_on_host;
} host;

int launch_is_job(void)
{
    return getenv("OMPI_COMM_WORLD_SIZE") != NULL || getenv("PMIX_RANK") != NULL;
}

/* ---- the parent of mpirun ---- */

static int n_cores(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (int)n;
}

/* NULL-terminated; the words are borrowed, the array is the caller's. All ranks are on this host:
 * shared memory carries the tensors, mpirun and its ranks talk over loopback (though Open MPI 4's
 * mpirun opens a port of its own on every address, and has no setting against that). */
static char **mpirun_words(char *n_ranks, char *self, int yield, char **argv)
{
    char *const fixed[] = {
        "mpirun", "-n", n_ranks, "--oversubscribe", "--bind-to", "none", "--stdin", "none",
        "--quiet",
        /* When a rank is dead the others get SIGTERM after this many seconds, SIGKILL after twice
         * as many: a moment for the gateway to end its streams. */
        "--mca", "odls_base_sigkill_timeout", "1", //
        "--mca", "btl", "self,vader",              //
        "--mca", "oob_tcp_if_include", "lo",       //
        /* Containers forbid a process to read another's memory. */
        "--mca", "btl_vader_single_copy_mechanism", "none", //
        "--mca", "mpi_yield_when_idle", yield ? "1" : "0"};
    size_t n_fixed = sizeof(fixed) / sizeof(fixed[0]), n_argv = 0;
    while (argv[n_argv])
        n_argv++;
    char **words = xcalloc(n_fixed + n_argv + 2, sizeof(*words));
    memcpy(words, fixed, sizeof(fixed));
    words[n_fixed] = self;
    for (size_t i = 1; i < n_argv; i++)
        words[n_fixed + i] = argv[i];
    return words;
}

/* In the child: never returns. Its own process group keeps the terminal's Ctrl-C from mpirun, which
 * would end the job at once; PDEATHSIG ends it when this process's parent is killed. */
static _Noreturn void exec_mpirun(char **words, const sigset_t *mask, pid_t parent, int report_fd)
{
    int null_fd = open("/dev/null", O_RDONLY);
    if (null_fd >= 0)
        dup2(null_fd, STDIN_FILENO);
    setpgid(0, 0);
    setenv("HOME", "/", 0); /* PMIx 4 follows a null pointer to the home of an unknown user */
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    sigprocmask(SIG_SETMASK, mask, NULL);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent)
        _exit(1);
    execvp(words[0], words);
    int error = errno;
    if (write(report_fd, &error, sizeof(error)) < 0)
        _exit(126);
    _exit(127);
}

static pid_t start_mpirun(char **words, const sigset_t *mask)
{
    int fds[2], error = 0;
    pid_t parent = getpid();
    if (pipe2(fds, O_CLOEXEC))
        die("pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child < 0)
        die("fork: %s", strerror(errno));
    if (child == 0)
        exec_mpirun(words, mask, parent, fds[1]);
    close(fds[1]);
    ssize_t n;
    do
        n = read(fds[0], &error, sizeof(error));
    while (n < 0 && errno == EINTR);
    close(fds[0]);
    if (n == 0) /* closed by a successful exec */
        return child;
    waitpid(child, NULL, 0);
    if (error == ENOENT)
        die("mpirun is not on PATH: install Open MPI (Debian: openmpi-bin)");
    die("mpirun cannot be started: %s", strerror(error));
}

/* Exit status to leave with, or -1 while mpirun runs. */
static int mpirun_status(pid_t child)
{
    int status;
    pid_t pid = waitpid(child, &status, WNOHANG);
    if (pid < 0)
        die("waitpid: %s", strerror(errno));
    if (pid == 0)
        return -1;
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static void forward_stop(pid_t child, int signal_number, int n_asked)
{
    static const int forwarded[] = {SIGUSR1, SIGTERM, SIGKILL}; // drain; kill; kill mpirun itself
    int as = forwarded[n_asked < 2 ? n_asked : 2];
    log_info("launch", "%s: %s", strsignal(signal_number),
             n_asked == 0 ? "the job drains (once more to kill it)" : "killing the job");
    kill(child, as);
}

int launch_mpirun(int n_ranks, char **argv)
{
    char n_text[16], self[PATH_MAX];
    sigset_t set, old;
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    if (n < 0)
        die("/proc/self/exe: %s", strerror(errno));
    self[n] = '\0';
    snprintf(n_text, sizeof(n_text), "%d", n_ranks);

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, &old);
    char **words = mpirun_words(n_text, self, n_ranks > n_cores(), argv);
    pid_t child = start_mpirun(words, &old);
    free(words);

    int status, n_asked = 0;
    while ((status = mpirun_status(child)) < 0) {
        int signal_number;
        if (sigwait(&set, &signal_number) == 0 && signal_number != SIGCHLD)
            forward_stop(child, signal_number, n_asked++);
    }
    sigprocmask(SIG_SETMASK, &old, NULL);
    return status;
}

/* ---- a rank ---- */

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

_Noreturn void launch_abort(int status)
{
    int initialized = 0, finalized = 0;
    signal(SIGALRM, SIG_DFL);
    alarm(ABORT_TIMEOUT_S); /* mpirun may be gone */
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (initialized && !finalized)
        MPI_Abort(MPI_COMM_WORLD, status);
    _exit(status);
}
