/*
 * A limit on what MPI may keep us waiting for: a rank that hangs before control is open, or after
 * it is closed, is seen by no heartbeat, and MPI waits for it for ever.
 *
 * When the limit is over the process says what did not end and which ranks on this host are stopped
 * or stuck in the kernel, and leaves with status 1, on which mpirun or srun ends the others. Rank 0
 * comes first, the others follow, so that one line is what there mostly is.
 */
#ifndef INTERNVLD_PARALLEL_LAUNCH_LIMIT_H
#define INTERNVLD_PARALLEL_LAUNCH_LIMIT_H

/* The job ends when launch_limit_off() does not come within limit_s seconds. `what` is "the start"
 * or the like, for the sentence. One at a time; main thread. */
void launch_limit(const char *what, int limit_s);
void launch_limit_off(void); // nothing when none is on

#endif
