"""Where the ranks of a daemon run whose emulated GPUs are next to one core each.

Two of this machine's cores are told to hwloc as two sockets. The vision rank has GPU 0, next to the first, the language
rank GPU 1, next to the second. Every thread of theirs must be there; the gateway, and all ranks on the CPU, stay on both.
A job that was bound before stays as it was.
"""

import os
import pathlib
import sys
import tempfile

import daemon

GPUS = ("fffe:a0:00.0", "fffe:a1:00.0")  # runtime.cc
SKIPPED = 77


def sets(cores, nodes):
    mask = f"0x{sum(1 << c for c in cores):08x}"
    return (f'cpuset="{mask}" complete_cpuset="{mask}" nodeset="{nodes}" complete_nodeset="{nodes}"')


def topology(cores):
    sockets = "".join(
        f'<object type="Package" os_index="{i}" {sets([core], 1 << i)}>'
        f'<object type="NUMANode" os_index="{i}" {sets([core], 1 << i)} local_memory="1073741824"/>'
        f'<object type="PU" os_index="{core}" {sets([core], 1 << i)}/>'
        f'<object type="Bridge" bridge_type="0-1" depth="0" bridge_pci="fffe:[a{i}-a{i}]">'
        f'<object type="PCIDev" pci_busid="{GPUS[i]}" pci_type="0302 [10de:2330] [10de:16c1] a1" pci_link_speed="63"/>'
        "</object></object>" for i, core in enumerate(cores))
    return ('<?xml version="1.0"?><!DOCTYPE topology SYSTEM "hwloc2.dtd"><topology version="2.0">'
            f'<object type="Machine" os_index="0" {sets(cores, 3)}>{sockets}</object></topology>')


def cores_by_rank(device):
    """{rank: cores that some thread of it may use}"""
    with daemon.Daemon(dtype="float32", extra=("--device", device, "--enforce-eager", "--max-model-len", 64)) as d:
        found = {rank: set().union(*(os.sched_getaffinity(int(t)) for t in os.listdir(f"/proc/{pid}/task")))
                 for rank, pid in d.ranks().items()}
    return found


def main():
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2 or cores[1] > 31:
        print("skipped: two cores among the first 32 are needed")
        sys.exit(SKIPPED)
    both = set(cores)
    os.sched_setaffinity(0, both)
    with tempfile.TemporaryDirectory() as folder:
        xml = pathlib.Path(folder) / "topology.xml"
        xml.write_text(topology(cores))
        os.environ |= {"HWLOC_XMLFILE": str(xml), "HWLOC_THISSYSTEM": "1"}
        assert (got := cores_by_rank("cuda")) == {0: both, 1: {cores[0]}, 2: {cores[1]}}, got
        assert (got := cores_by_rank("cpu")) == {0: both, 1: both, 2: both}, got
        os.sched_setaffinity(0, {cores[1]})
        assert (got := cores_by_rank("cuda")) == {r: {cores[1]} for r in range(3)}, got


if __name__ == "__main__":
    main()
