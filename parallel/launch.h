/*
 * Becoming a job: a lone process forks its ranks or executes itself under mpirun; ranks find each
 * other, over MPI or the sockets between forked ones; die() ends every rank.
 */
#ifndef INTERNVLD_PARALLEL_LAUNCH_H
#define INTERNVLD_PARALLEL_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

/* 1 when this process was started by mpirun or srun (OMPI_COMM_WORLD_SIZE, PMIX_RANK, or SLURM with
 * PMIx). */
int launch_is_job(void);

/*
 * For a lone process: starts `mpirun -n n_ranks <argv>` as a child, stays as its parent, forwards
 * SIGTERM and SIGINT to it as SIGUSR1 (which mpirun hands to every rank at once; the gateway
 * drains), waits, and returns the exit status to leave with. A second SIGTERM or SIGINT kills the
 * job. An mpirun that stays when every rank has ended is killed after 3 s. Root and
 * oversubscription are allowed to mpirun; ranks are not bound (--bind-to none). Dies when mpirun is
 * not on PATH, with the package's name.
 */
int launch_mpirun(int n_ranks, char **argv);

/*
 * For a lone process whose ranks share no tensors (no communicator of more than one rank, no MPI):
 * forks n_ranks of them. Returns 1 in each, which goes on with launch_init(); in their parent 0,
 * when all have ended, with the exit status to leave with. Stops as above: SIGTERM or SIGINT become
 * SIGUSR1 to every rank, a second one kills. What still lives 0.5 s after rank 0 failed, or 1.5 s
 * after another rank did, is killed (at once where rank 0 is stopped); all are when the parent is.
 * Call it before there are threads.
 */
int launch_local(int n_ranks, int *status);

/* MPI_Init_thread (FUNNELED suffices: only the main thread of a worker enters MPI) but in a forked
 * rank, sets the log's rank and die hook. */
void launch_init(int *rank, int *world);
/* Ranks of this job on this host, and this rank's index among them (for thread counts and devices).
 */
void launch_host_ranks(int *n_on_host, int *index_on_host);
/* Every rank gets rank 0's n bytes. */
void launch_broadcast(void *x, size_t n_bytes);
/* all [world, n_bytes] <- mine [n_bytes]. */
void launch_all_gather(void *all, const void *mine, size_t n_bytes);
void launch_barrier(void);
/* Collective: what to add to this rank's CLOCK_MONOTONIC to get rank 0's, measured once by a few
 * round trips to rank 0; wrong by *error_ns at most, half of the shortest. ns */
int64_t launch_clock_offset(int rank, int world, int64_t *error_ns);
/* text [n_bytes] <- what tells the running kernel of this host from others', "" when it does not
 * say (at most 63 characters). */
void launch_kernel_id(char *text, size_t n_bytes);
/* Collective: 1 when this rank and rank 0 run on one kernel, and so have one clock. */
int launch_shares_clock(void);
/* The end of the job, for which all ranks wait. When others do not come within 10 s the process
 * ends with status 1. */
void launch_finalize(void);
/* MPI_Abort where there is MPI, or a plain exit when that takes longer than 0.3 s. */
_Noreturn void launch_abort(int status);

#endif
