/*
 * Cores that several ranks of a host compute on: whoever is at work shares them evenly, and who
 * works alone has them all.
 *
 * A rank is at work while an op of its runs and CPU_CORES_LINGER_NS after it, so that the pauses
 * between steps do not count. Owns nothing: the claims lie in memory that all these ranks map
 * (parallel/host_memory.h), each written by its rank alone. It knows no ranks, no threads, and who
 * asks for its share is expected to take no more.
 */
#ifndef INTERNVLD_KERNELS_CPU_CORES_H
#define INTERNVLD_KERNELS_CPU_CORES_H

#include <stdatomic.h>
#include <stdint.h>

#define CPU_CORES_LINGER_NS 2000000

/* Of one rank: it is at work until then (CLOCK_MONOTONIC); 0: not yet. */
struct core_claim {
    _Alignas(64) _Atomic uint64_t until_ns;
};

struct cpu_cores {
    struct core_claim *claims; // [n_ranks], shared; NULL: the cores are this rank's alone
    int n_ranks, mine;         // those with these cores; this rank's claim
    int n_cores;
};

/* An op begins that may take long, or has ended. */
void cpu_cores_claim(const struct cpu_cores *c);
void cpu_cores_release(const struct cpu_cores *c, uint64_t now_ns);
/* How many cores are this rank's at now_ns, at least 1: all, divided by the ranks at work, itself
 * among them. */
int cpu_cores_share(const struct cpu_cores *c, uint64_t now_ns);

#endif
