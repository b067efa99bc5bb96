/*
 * A lone process becomes a job without MPI: it forks the ranks, and stays as their parent.
 *
 * For layouts whose ranks share no tensors. Owns the socket pairs between rank 0 and each other
 * rank, on which they agree before control is open, and in the parent the ranks' processes: their
 * signals, and the end of those that outlive the job. A rank is "internvld.rN" to ps and top. Must
 * not know roles or layouts.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/log.h"
#include "parallel/launch.h"
#include "parallel/launch_ops.h"
#include "parallel/process.h"

#define LOOK_MS 100
#define AFTER_END_MS 5000   // for the others to leave when rank 0 has, in order
#define AFTER_FIRST_MS 500  // when it has failed
#define AFTER_OTHER_MS 1500 // for rank 0 to end the calls when another has failed

/* Of a rank. */
static struct {
    int rank, world; // world 0: this process is no forked rank
    int *fds;        // [world] rank 0's: to each other rank; of another rank fds[0]: to rank 0
} local;

int launch_forked_rank(void)
{
    return local.world > 0 ? local.rank : -1;
}

/* ---- the verbs of a rank ---- */

/* When the other end is gone, its rank has said why, or the parent does. */
static _Noreturn void leave(void)
{
    _exit(1);
}

static void send_all(int fd, const void *x, size_t n_bytes)
{
    for (size_t done = 0; done < n_bytes;) {
        ssize_t n = send(fd, (const uint8_t *)x + done, n_bytes - done, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            leave();
        done += n > 0 ? (size_t)n : 0;
    }
}

static void recv_all(int fd, void *x, size_t n_bytes)
{
    for (size_t done = 0; done < n_bytes;) {
        ssize_t n = recv(fd, (uint8_t *)x + done, n_bytes - done, 0);
        if (n == 0 || (n < 0 && errno != EINTR))
            leave();
        done += n > 0 ? (size_t)n : 0;
    }
}

static void local_init(int *rank, int *world)
{
    *rank = local.rank;
    *world = local.world;
}

static void local_host_ranks(int *n_on_host, int *index_on_host)
{
    *n_on_host = local.world;
    *index_on_host = local.rank;
}

static void local_broadcast(void *x, size_t n_bytes)
{
    for (int r = 1; r < local.world && local.rank == 0; r++)
        send_all(local.fds[r], x, n_bytes);
    if (local.rank > 0)
        recv_all(local.fds[0], x, n_bytes);
}

/* Over rank 0, which reads from one after the other: all are as far as this call. */
static void local_all_gather(void *all, const void *mine, size_t n_bytes)
{
    if (local.rank > 0) {
        send_all(local.fds[0], mine, n_bytes);
    } else {
        memcpy(all, mine, n_bytes);
        for (int r = 1; r < local.world; r++)
            recv_all(local.fds[r], (uint8_t *)all + (size_t)r * n_bytes, n_bytes);
    }
    local_broadcast(all, (size_t)local.world * n_bytes);
}

static void local_barrier(void)
{
    uint8_t mine = 0, *all = xcalloc((size_t)local.world, sizeof(*all));
    local_all_gather(all, &mine, sizeof(mine));
    free(all);
}

/* One kernel, one clock. */
static int64_t local_clock_offset(int rank, int world, int64_t *error_ns)
{
    (void)rank, (void)world;
    *error_ns = 0;
    return 0;
}

static void local_finalize(void)
{
    local_barrier();
    for (int r = 0; r < local.world; r++)
        if (local.fds[r] >= 0)
            close(local.fds[r]);
    free(local.fds);
    local.fds = NULL;
}

/* The others see their connections close. */
static void local_abort(int status)
{
    (void)status;
}

const struct launch_ops launch_local_ops = {
    .init = local_init,
    .host_ranks = local_host_ranks,
    .broadcast = local_broadcast,
    .all_gather = local_all_gather,
    .barrier = local_barrier,
    .clock_offset = local_clock_offset,
    .finalize = local_finalize,
    .abort = local_abort,
};

/* ---- the parent ---- */

struct job {
    int n_ranks, n_living;
    pid_t *pids;      // [n_ranks] 0: has ended
    int status;       // of the first rank that failed, 0: none
    uint64_t kill_ns; // 0: rank 0 has not ended, and no other has failed
};

static void signal_ranks(const struct job *job, int signal_number)
{
    for (int r = 0; r < job->n_ranks; r++)
        if (job->pids[r])
            kill(job->pids[r], signal_number);
}

/* A rank that was ended by a signal could not say so itself. */
static void note_end(struct job *job, int rank, int status)
{
    int code = WIFSIGNALED(status) ? 1 : WEXITSTATUS(status);
    uint64_t left_ms = rank > 0 ? AFTER_OTHER_MS : code ? AFTER_FIRST_MS : AFTER_END_MS;
    uint64_t kill_ns = clock_now_ns() + left_ms * 1000000;
    job->pids[rank] = 0;
    job->n_living--;
    if (WIFSIGNALED(status) && job->status == 0)
        log_error("launch", "rank %d was ended by signal %d (%s)", rank, WTERMSIG(status),
                  strsignal(WTERMSIG(status)));
    if (job->status == 0)
        job->status = code;
    if ((code || rank == 0) && (job->kill_ns == 0 || kill_ns < job->kill_ns))
        job->kill_ns = kill_ns;
}

static void reap(struct job *job)
{
    for (int r = 0; r < job->n_ranks; r++) {
        int status;
        if (job->pids[r] && waitpid(job->pids[r], &status, WNOHANG) == job->pids[r])
            note_end(job, r, status);
    }
}

/* It will end nothing. */
static int is_stopped(pid_t pid)
{
    return pid && process_state(pid) == 'T';
}

static void wait_ranks(struct job *job, const sigset_t *heard)
{
    const struct timespec look = {.tv_nsec = LOOK_MS * 1000000};
    int n_asked = 0;
    while (job->n_living > 0) {
        int signal_number = sigtimedwait(heard, NULL, &look);
        if (signal_number > 0 && signal_number != SIGCHLD) {
            launch_log_stop(signal_number, n_asked);
            signal_ranks(job, n_asked == 0 ? SIGUSR1 : SIGKILL);
            job->status = n_asked == 0 ? job->status : 1;
            n_asked++;
        }
        reap(job);
        if (job->kill_ns && (clock_now_ns() > job->kill_ns || is_stopped(job->pids[0])))
            signal_ranks(job, SIGKILL);
    }
}

/* ---- the fork ---- */

/* Rank `rank` keeps its own of the pairs [n_ranks][2], whose first ends are rank 0's. */
static void become_rank(int rank, int n_ranks, int (*pairs)[2], pid_t parent, const sigset_t *mask)
{
    char name[32]; // the system keeps 15 bytes
    local.rank = rank;
    local.world = n_ranks;
    local.fds = xcalloc((size_t)n_ranks, sizeof(*local.fds));
    local.fds[0] = -1;
    for (int r = 1; r < n_ranks; r++) {
        int mine = rank == 0 ? 0 : 1;
        local.fds[r] = -1;
        if (rank == 0 || rank == r) {
            local.fds[rank == 0 ? r : 0] = pairs[r][mine];
            close(pairs[r][1 - mine]);
        } else {
            close(pairs[r][0]);
            close(pairs[r][1]);
        }
    }
    snprintf(name, sizeof(name), FORKED_NAME "%d", rank);
    prctl(PR_SET_NAME, name);
    setpgid(0, 0); /* the terminal's Ctrl-C is for the parent, which hands it on */
    sigprocmask(SIG_SETMASK, mask, NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
}

int launch_local(int n_ranks, int *status)
{
    struct job job = {.n_ranks = n_ranks};
    int(*pairs)[2] = xcalloc((size_t)n_ranks, sizeof(*pairs));
    sigset_t heard, old;
    pid_t parent = getpid();
    job.pids = xcalloc((size_t)n_ranks, sizeof(*job.pids));
    launch_block_signals(&heard, &old);
    for (int r = 1; r < n_ranks; r++)
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pairs[r]))
            die("socketpair: %s", strerror(errno));
    for (int r = 0; r < n_ranks; r++) {
        pid_t pid = fork();
        if (pid < 0) {
            int why = errno;
            signal_ranks(&job, SIGKILL);
            die("fork: %s", strerror(why));
        }
        if (pid == 0) {
            become_rank(r, n_ranks, pairs, parent, &old);
            free(job.pids);
            free(pairs);
            return 1;
        }
        job.pids[r] = pid;
        job.n_living++;
    }
    for (int r = 1; r < n_ranks; r++) {
        close(pairs[r][0]);
        close(pairs[r][1]);
    }
    wait_ranks(&job, &heard);
    sigprocmask(SIG_SETMASK, &old, NULL);
    free(job.pids);
    free(pairs);
    *status = job.status;
    return 0;
}
