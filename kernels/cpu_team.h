/*
 * The threads of a CPU back end: started once, woken for one piece of work after another.
 *
 * A thread that has nothing to do spins for some microseconds, since the next op of a step usually
 * follows within one, and then sleeps: an idle rank costs nothing, and where ranks share cores a
 * waiting thread soon leaves its core to others. (An OpenMP team can be told to spin long or to
 * sleep at once, and only by the environment.) Owned by one thread, which is a member itself; knows
 * nothing of what it runs.
 */
#ifndef INTERNVLD_KERNELS_CPU_TEAM_H
#define INTERNVLD_KERNELS_CPU_TEAM_H

struct cpu_team;

/* n_threads >= 1, the caller among them. Dies when threads cannot be had. */
struct cpu_team *cpu_team_open(int n_threads);
void cpu_team_close(struct cpu_team *t); // accepts NULL

/* work(arg, thread, n_threads) on every thread, 0 being the caller; returns when all have. */
void cpu_team_run(struct cpu_team *t, void (*work)(void *arg, int thread, int n_threads),
                  void *arg);
/* Inside a piece of work: waits until every thread of the team has come here. */
void cpu_team_barrier(struct cpu_team *t);

#endif
