/*
 * The threads of a CPU back end: started once, woken for one piece of work after another.
 *
 * A thread that has nothing to do spins for some microseconds, since the next op of a step usually
 * follows within one, and then sleeps: an idle rank costs nothing, and where ranks share cores a
 * waiting thread soon leaves its core to others. (An OpenMP team can be told to spin long or to
 * sleep at once, and only by the environment.) Owned by one thread, which is a member itself; knows
 * nothing of what it runs.
 *
 * Each piece of work is given to so many of the threads as its caller says; the others sleep until
 * a larger one comes.
 */
#ifndef INTERNVLD_KERNELS_CPU_TEAM_H
#define INTERNVLD_KERNELS_CPU_TEAM_H

struct cpu_team;

/* 1 <= n_threads <= CPU_TEAM_MAX, the caller among them. Dies when threads cannot be had. */
#define CPU_TEAM_MAX 4095
struct cpu_team *cpu_team_open(int n_threads);
void cpu_team_close(struct cpu_team *t); // accepts NULL

/* work(arg, thread, n_threads) on n_threads of the team's threads, 0 being the caller; returns when
 * all have. */
void cpu_team_run(struct cpu_team *t, int n_threads,
                  void (*work)(void *arg, int thread, int n_threads), void *arg);
/* Inside a piece of work: waits until each of its threads has come here. */
void cpu_team_barrier(struct cpu_team *t);

#endif
