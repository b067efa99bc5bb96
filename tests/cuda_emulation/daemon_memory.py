"""The memory of emulated GPUs beside `internvld --plan --device cuda`, on the demo model through real ranks.

    daemon_memory.py

What each rank has allocated of its GPU at most is never above its plan, and below it by less than 1 %: not of all, for
with so small a model that is mostly the back end's own memory, but of the rest. Once the daemon is ready nothing is
allocated any more, and a step without features is one upload to each language rank.
"""

import sys
import tempfile

import daemon
from support import Client, Picture, chat
from usage import count_in, usage

BACK_END_BYTES = 288 << 20  # scratch and cuBLASLt's workspace
SHARE = 0.01
N_STEPS = 5  # of an answer: so many tokens, the prompt being one chunk
PRINTED_BYTES = 0.05 * (1 << 20)  # --plan rounds to tenths of a MiB
PICTURE = daemon.EXAMPLES / "scene-two.png"
CASES = [("1x1x1", "bfloat16", ()), ("2x2x1", "bfloat16", ("--deterministic",)),
         ("1x1x1", "bfloat16", ("--kv-cache-dtype", "int8")),
         ("2x1x1", "bfloat16", ("--quantization", "int4")), ("2x1x1", "bfloat16", ("--disable-custom-all-reduce",)),
         ("2x1x1", "bfloat16", ("--deterministic", "--quantization", "fp8", "--activation-quantization", "fp8")),
         ("1x1x1", "float32", ("--quantization", "int8"))]  # whose values become dense


def check(layout, dtype, options):
    failures = []
    with tempfile.TemporaryDirectory(prefix="internvld-memory-") as folder:
        count_in(folder)
        extra = ("--device", "cuda", "--max-model-len", 512, "--max-num-seqs", 4, "--kv-cache-memory-bytes", "2M",
                 *options)
        with daemon.Daemon(dtype=dtype, **daemon.layout_of(layout), extra=extra) as d:
            plan, ranks = daemon.planned(*d.command[1:]), d.ranks()
            ready = usage(folder, ranks)
            client = Client(d.address)
            client.generate(chat("What is it?", Picture(PICTURE.read_bytes())), timeout=300, temperature=0, max_tokens=3)
            before = usage(folder, ranks)
            for sampling in (dict(temperature=0), dict(temperature=1, top_p=0.5, seed=1)):
                client.generate(chat("Say one word."), timeout=300, max_tokens=N_STEPS, ignore_eos=True, **sampling)
            client.close()
            end = usage(folder, ranks)
        for rank, planned in enumerate(plan):
            n_bytes = planned["total"]
            if planned["role"] == "gateway":
                if rank in end or n_bytes:
                    failures.append("the gateway has memory of a GPU")
                continue
            peak, n_allocations = end[rank].peak, end[rank].n_allocations
            who = f"{layout} {' '.join((dtype, *options))}: rank {rank} ({planned['role']})"
            print(f"  {who}: {n_bytes / (1 << 20):.1f} MiB planned, {peak / (1 << 20):.2f} taken by {n_allocations} "
                  "allocations", flush=True)
            if peak > n_bytes + PRINTED_BYTES:
                failures.append(f"{who} has taken {peak} bytes, more than the {n_bytes:.0f} planned")
            if n_bytes - peak > SHARE * (n_bytes - BACK_END_BYTES) + PRINTED_BYTES:
                failures.append(f"{who} has taken {peak} bytes, much less than the {n_bytes:.0f} planned")
            if n_allocations != ready[rank].n_allocations:
                failures.append(f"{who} has allocated {n_allocations - ready[rank].n_allocations} times since READY")
            n_uploads = end[rank].n_uploads - before[rank].n_uploads
            if n_uploads != (2 * N_STEPS if planned["role"] == "language" else 0):
                failures.append(f"{who} was sent {n_uploads} uploads in {2 * N_STEPS} steps")
    return failures


def main():
    failures = [x for case in CASES for x in check(*case)]
    plans = {x: daemon.planned("--model", daemon.DEMO_MODEL, "--device", x) for x in ("auto", "cpu", "cuda")}
    if plans["auto"] != plans["cuda"] or plans["cpu"] == plans["cuda"]:
        failures.append("--device auto is not planned as what this host has")
    for failure in failures:
        print("FAILED", failure)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
