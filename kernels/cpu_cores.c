/*
 * Claims on shared cores (cpu_cores.h). A share may be out of date by the time it is used: two
 * ranks that begin at once both see themselves alone, for one op.
 */
#include "kernels/cpu_cores.h"

#include <stddef.h>

void cpu_cores_claim(const struct cpu_cores *c)
{
    if (c->claims)
        atomic_store_explicit(&c->claims[c->mine].until_ns, UINT64_MAX, memory_order_relaxed);
}

void cpu_cores_release(const struct cpu_cores *c, uint64_t now_ns)
{
    if (c->claims)
        atomic_store_explicit(&c->claims[c->mine].until_ns, now_ns + CPU_CORES_LINGER_NS,
                              memory_order_relaxed);
}

int cpu_cores_share(const struct cpu_cores *c, uint64_t now_ns)
{
    int n_at_work = 1;

    for (int i = 0; c->claims && i < c->n_ranks; i++)
        n_at_work += i != c->mine &&
                     atomic_load_explicit(&c->claims[i].until_ns, memory_order_relaxed) > now_ns;
    return c->n_cores > n_at_work ? c->n_cores / n_at_work : 1;
}
