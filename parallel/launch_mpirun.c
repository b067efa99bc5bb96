/*
 * A lone process becomes a job: mpirun as a child, this process as its parent.
 *
 * Owns the parent's signals, the folder for what mpirun and its ranks leave in files, and the end
 * of an mpirun that does not end. Must not know MPI, roles or layouts. What mpirun does with
 * signals was tried: SIGTERM to it ends the ranks before they can drain, SIGUSR1 to it reaches all
 * of them at once. Why it may not end: when a rank dies between its first words to mpirun and the
 * answer, PMIx 4.2 releases one object twice (ptl_base_connection_hdlr.c, at `error:`), and at its
 * own end mpirun waits for ever for the lock of what it has freed.
 */
#include "parallel/launch.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/launch_ops.h"
#include "parallel/process.h"

#define LOOK_MS 250
#define N_LOOKS_WITHOUT 12 // a rank, then mpirun is killed
#define N_OPEN_FOLDERS 16  // while removing

/* What becomes of a running mpirun. */
struct watched {
    pid_t pid;
    int had_ranks, n_looks_without;
};

/* ---- starting ---- */

static int n_cores(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (int)n;
}

/* A job that is killed leaves its files behind: in a folder of its own they go with it. In memory,
 * because shared memory is what they are; NULL where that cannot be had. */
static char *make_folder(void)
{
    char path[] = "/dev/shm/internvld-XXXXXX";
    return mkdtemp(path) ? xstrdup(path) : NULL;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *place)
{
    (void)st, (void)type, (void)place;
    remove(path);
    return 0;
}

static void remove_folder(char *folder)
{
    if (folder)
        nftw(folder, remove_one, N_OPEN_FOLDERS, FTW_DEPTH | FTW_PHYS);
    free(folder);
}

/* NULL-terminated; the words are borrowed, the array is the caller's. All ranks are on this host:
 * shared memory carries the tensors, mpirun and its ranks talk over loopback (though Open MPI 4's
 * mpirun opens a port of its own on every address, and has no setting against that). */
static char **mpirun_words(char *n_ranks, char *self, char *folder, int yield, char **argv)
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
    char *const files[] = {"--mca", "orte_tmpdir_base",
                           folder, //
                           "--mca", "btl_vader_backing_directory",
                           folder};
    size_t n_fixed = sizeof(fixed) / sizeof(fixed[0]), n_argv = 0, n = 0;
    size_t n_files = folder ? sizeof(files) / sizeof(files[0]) : 0;
    while (argv[n_argv])
        n_argv++;
    char **words = xcalloc(n_fixed + n_files + n_argv + 2, sizeof(*words));
    memcpy(words, fixed, sizeof(fixed));
    memcpy(words + n_fixed, files, n_files * sizeof(*words));
    words[n = n_fixed + n_files] = self;
    for (size_t i = 1; i < n_argv; i++)
        words[n + i] = argv[i];
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

/* ---- watching ---- */

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
    launch_log_stop(signal_number, n_asked);
    kill(child, forwarded[n_asked < 2 ? n_asked : 2]);
}

/* When the ranks have ended, mpirun has nothing left to do. */
static void look_after(struct watched *mpirun)
{
    struct process_children ranks = process_children(mpirun->pid);
    mpirun->had_ranks |= ranks.n_living + ranks.n_ended > 0;
    mpirun->n_looks_without =
        mpirun->had_ranks && ranks.n_living == 0 ? mpirun->n_looks_without + 1 : 0;
    if (mpirun->n_looks_without != N_LOOKS_WITHOUT)
        return;
    log_error("launch", "every rank has ended and mpirun has not: killing it");
    kill(mpirun->pid, SIGKILL);
}

/* The exit status, once mpirun has ended. */
static int wait_mpirun(struct watched *mpirun, const sigset_t *signals)
{
    const struct timespec look = {.tv_nsec = LOOK_MS * 1000000};
    int status, n_asked = 0;
    while ((status = mpirun_status(mpirun->pid)) < 0) {
        int signal_number = sigtimedwait(signals, NULL, &look);
        if (signal_number < 0)
            look_after(mpirun);
        else if (signal_number != SIGCHLD)
            forward_stop(mpirun->pid, signal_number, n_asked++);
    }
    return status;
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

    launch_block_signals(&set, &old);
    char *folder = make_folder();
    char **words = mpirun_words(n_text, self, folder, n_ranks > n_cores(), argv);
    struct watched mpirun = {.pid = start_mpirun(words, &old)};
    free(words);
    int status = wait_mpirun(&mpirun, &set);
    remove_folder(folder);
    sigprocmask(SIG_SETMASK, &old, NULL);
    return status;
}
