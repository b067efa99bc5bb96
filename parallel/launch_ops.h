/*
 * The two ways in which ranks are one job before control is open: MPI (launch_mpi.c), and sockets
 * between processes that a lone internvld forked (launch_local.c). Private to parallel/launch*.c.
 */
#ifndef INTERNVLD_PARALLEL_LAUNCH_OPS_H
#define INTERNVLD_PARALLEL_LAUNCH_OPS_H

#include <signal.h>
#include <stddef.h>
#include <stdint.h>

/* Of every rank, with the contracts of launch.h. */
struct launch_ops {
    void (*init)(int *rank, int *world);
    void (*host_ranks)(int *n_on_host, int *index_on_host);
    void (*broadcast)(void *x, size_t n_bytes);
    void (*all_gather)(void *all, const void *mine, size_t n_bytes);
    void (*barrier)(void);
    int64_t (*clock_offset)(int rank, int world, int64_t *error_ns);
    void (*finalize)(void);
    void (*abort)(int status); // returns, or ends the process
};

extern const struct launch_ops launch_mpi_ops, launch_local_ops;

/* Of a rank that launch_local() forked; -1: this process is none. */
int launch_forked_rank(void);
/* What such a process is called, before its rank. */
#define FORKED_NAME "internvld.r"

/* What a job's parent hears, blocked: SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGCHLD. `old` is what a
 * child goes back to. */
void launch_block_signals(sigset_t *heard, sigset_t *old);
/* Says what the n_asked'th request to stop does to the job, for the log. */
void launch_log_stop(int signal_number, int n_asked);

#endif
