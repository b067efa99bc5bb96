"""Tokens a second of the demo model at 1, 4, 16 and 64 requests in flight, and how many times one stream's rate that is.

    python tests/bench/streams.py BUILD [--rounds 5] [--in-flight 1,4,16,64] [--words 4] [--tokens 256] [--csv FILE] [-- DAEMON OPTION...]

BUILD holds daemon/internvld and client/internvl. The loads take turns on one daemon, after one that has touched every
page of its KV cache; a ratio is the median of those of the rounds. The client is `internvl bench`, closed loop, on the
same processors.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/gateway"))
import daemon  # noqa: E402
import results_file  # noqa: E402

KV_BYTES = 32 << 20  # some 64 requests: soon touched whole
WARM_UP = 256  # requests


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build", type=pathlib.Path)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--in-flight", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 64])
    p.add_argument("--words", type=int, default=4, help="of a prompt")
    p.add_argument("--tokens", type=int, default=256, help="of an answer")
    p.add_argument("--warm-up", type=int, default=WARM_UP, help="requests")
    p.add_argument("--csv", type=pathlib.Path, help="lines are added")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    a = p.parse_args(sys.argv[1:end])
    a.daemon_options = sys.argv[end + 1:]
    return a


def load(a, address, in_flight, n_requests):
    """What the client printed."""
    command = [str(a.build / "client/internvl"), "bench", "--address", address, "--json", "--input-len", str(a.words),
               "--concurrency", str(in_flight), "--num-requests", str(n_requests), "--warm-up", str(in_flight),
               "--output-len", str(a.tokens)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    a = parse()
    os.environ["INTERNVLD_DAEMON"] = str(a.build / "daemon/internvld")
    rates, rows = {n: [] for n in a.in_flight}, []
    with daemon.Daemon(extra=["--kv-cache-memory-bytes", KV_BYTES, *a.daemon_options]) as d:
        load(a, d.address, max(a.in_flight), a.warm_up)
        for i in range(a.rounds):
            for n in a.in_flight:
                done = load(a, d.address, n, 8 + 6 * n)
                rates[n].append(done["output_tokens_per_second"])
                rows.append({"options": " ".join(a.daemon_options), "round": i + 1, "in_flight": n,
                             "tokens_per_second": round(rates[n][-1], 1), "ttft_ms_p50": round(done["ttft_ms"]["p50"], 3),
                             "itl_ms_p50": round(done["itl_ms"]["p50"], 3),
                             "itl_ms_p99": round(done["itl_ms"]["p99"], 3)})
            print(f"  {i + 1}: " + ", ".join(f"{n} in flight {rates[n][-1]:.0f}" for n in a.in_flight), flush=True)
    for n in a.in_flight:
        ratio = statistics.median(x / y for x, y in zip(rates[n], rates[a.in_flight[0]]))
        print(f"{n:3} in flight: {statistics.median(rates[n]):8.0f} tokens/s, {ratio:5.2f} times as many as with "
              f"{a.in_flight[0]}")
    if a.csv:
        results_file.append(a.csv, rows)


if __name__ == "__main__":
    main()
