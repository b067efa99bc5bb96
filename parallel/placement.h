/*
 * A rank's threads beside its GPU: which cores of this host are next to a PCI device, and the
 * binding to them.
 *
 * It knows the host by hwloc and the GPU by its PCI address, and nothing of CUDA. Who was bound
 * already (mpirun --bind-to, srun --cpu-bind, taskset) knows what it wants and stays there. Memory
 * follows the threads: Linux gives a page from the node of the core that first touches it, from
 * another node where that one is full, and a policy that numactl set holds. NCCL needs no help: it
 * finds the NICs nearest to each GPU in the PCI tree by itself, and its own threads stay inside the
 * cores that are set here.
 */
#ifndef INTERNVLD_PARALLEL_PLACEMENT_H
#define INTERNVLD_PARALLEL_PLACEMENT_H

#include <stddef.h>

struct hwloc_topology;
struct hwloc_bitmap_s;

enum placement {
    PLACEMENT_BIND,   // to the cores next to the GPU
    PLACEMENT_NEAR,   // every core in use is next to it already
    PLACEMENT_BOUND,  // bound before to cores not all of which are
    PLACEMENT_UNKNOWN // the device is not in the topology, or no core is next to it
};

/* What to do with a process that may use the cores `now`, when its GPU is at `pci_address`
 * ("0000:1b:00.0"). `near` <- the topology's cores next to the GPU, none where it is unknown. */
enum placement placement_choose(struct hwloc_topology *t, const char *pci_address,
                                const struct hwloc_bitmap_s *now, struct hwloc_bitmap_s *near);

/* Binds every thread of this process, and so those to come, to the cores next to the GPU, unless it
 * was bound before; says in one log line where it is. What cannot be found out or set is a line
 * too, for a rank in the wrong place is only slow. */
void placement_near(const char *pci_address);

#endif
