/*
 * A rank's threads beside its GPU. See placement.h.
 *
 * Owns the topology while it looks. placement_choose() is arithmetic on one, this host's or a
 * test's.
 */
#include "parallel/placement.h"

#include <errno.h>
#include <hwloc.h>
#include <string.h>

#include "kernels/log.h"

#define CORES_TEXT_BYTES 128 // of "0-31,64-95"

enum placement placement_choose(hwloc_topology_t t, const char *pci_address,
                                hwloc_const_bitmap_t now, hwloc_bitmap_t near)
{
    hwloc_obj_t device = hwloc_get_pcidev_by_busidstring(t, pci_address);

    hwloc_bitmap_zero(near);
    if (device)
        hwloc_bitmap_copy(near, hwloc_get_non_io_ancestor_obj(t, device)->cpuset);
    if (hwloc_get_nbobjs_by_type(t, HWLOC_OBJ_NUMANODE) > 1 &&
        hwloc_bitmap_isequal(near, hwloc_topology_get_topology_cpuset(t)))
        hwloc_bitmap_zero(near); /* it hangs on the whole machine: nobody knows where */
    if (hwloc_bitmap_iszero(near))
        return PLACEMENT_UNKNOWN;
    if (hwloc_bitmap_isincluded(now, near))
        return PLACEMENT_NEAR;
    /* The topology's cores are those that the host, or this job's part of it, allows at all. */
    return hwloc_bitmap_isincluded(hwloc_topology_get_topology_cpuset(t), now) ? PLACEMENT_BIND
                                                                               : PLACEMENT_BOUND;
}

/* This host with its PCI devices; NULL, with a line, where hwloc cannot tell. Without OS devices,
 * for which plug-ins would open drivers. */
static hwloc_topology_t look(void)
{
    hwloc_topology_t t;

    if (hwloc_topology_init(&t) != 0)
        die("hwloc: no memory for a topology");
    hwloc_topology_set_type_filter(t, HWLOC_OBJ_BRIDGE, HWLOC_TYPE_FILTER_KEEP_IMPORTANT);
    hwloc_topology_set_type_filter(t, HWLOC_OBJ_PCI_DEVICE, HWLOC_TYPE_FILTER_KEEP_IMPORTANT);
    if (hwloc_topology_load(t) == 0)
        return t;
    log_warn("placement", "hwloc cannot read this host's topology: %s", strerror(errno));
    hwloc_topology_destroy(t);
    return NULL;
}

static void say(enum placement p, const char *gpu, hwloc_const_bitmap_t now,
                hwloc_const_bitmap_t near)
{
    char now_text[CORES_TEXT_BYTES], near_text[CORES_TEXT_BYTES];

    hwloc_bitmap_list_snprintf(now_text, sizeof(now_text), now);
    hwloc_bitmap_list_snprintf(near_text, sizeof(near_text), near);
    if (p == PLACEMENT_BIND)
        log_info("placement", "GPU %s: bound to cores %s, next to it", gpu, near_text);
    else if (p == PLACEMENT_NEAR)
        log_info("placement", "GPU %s: on cores %s, next to it", gpu, now_text);
    else if (p == PLACEMENT_UNKNOWN)
        log_info("placement", "GPU %s: no core is known to be next to it, on cores %s", gpu,
                 now_text);
    else if (hwloc_bitmap_intersects(now, near))
        log_info("placement", "GPU %s: bound before to cores %s, next to it are %s", gpu, now_text,
                 near_text);
    else
        log_warn("placement", "GPU %s: bound before to cores %s, away from it: next to it are %s",
                 gpu, now_text, near_text);
}

void placement_near(const char *pci_address)
{
    hwloc_topology_t t = look();
    hwloc_bitmap_t now = hwloc_bitmap_alloc(), near = hwloc_bitmap_alloc();

    if (!now || !near)
        die("hwloc: no memory for sets of cores");
    if (!t)
        goto out;
    if (hwloc_get_cpubind(t, now, HWLOC_CPUBIND_PROCESS) != 0) {
        log_warn("placement", "which cores this rank may use is not known: %s", strerror(errno));
        goto out;
    }
    enum placement p = placement_choose(t, pci_address, now, near);
    if (p == PLACEMENT_BIND && hwloc_set_cpubind(t, near, HWLOC_CPUBIND_PROCESS) != 0)
        log_warn("placement", "GPU %s: cannot bind to the cores next to it: %s", pci_address,
                 strerror(errno));
    else
        say(p, pci_address, now, near);
out:
    hwloc_bitmap_free(near);
    hwloc_bitmap_free(now);
    if (t)
        hwloc_topology_destroy(t);
}
