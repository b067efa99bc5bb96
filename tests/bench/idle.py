"""What an idle daemon costs, and how soon it works again: CPU time of every rank, arrival of a call to its first step.

    python tests/bench/idle.py BUILD [--seconds 20] [--calls 60] [--csv FILE]

BUILD holds daemon/internvld. A call comes to a daemon that had nothing to do for 0.2 s; from the daemon's timeline: its
arrival, and when a language rank began the step. Beside it the machine's own limit, in the same pauses: a byte to
another process and back, both asleep in between.
"""
import argparse
import collections
import csv
import json
import os
import pathlib
import socket
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/gateway"))
import daemon  # noqa: E402
import support  # noqa: E402

LAYOUTS = {"4 ranks": dict(tensor=2), "7 ranks": dict(tensor=2, pipeline=2, vision=2)}
PAUSE_S = 0.2


def echo_ms(n):
    """A byte there and back, n times after a pause: milliseconds."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        while theirs.recv(1):
            theirs.send(b"x")
        os._exit(0)
    theirs.close()
    times = []
    for _ in range(n):
        time.sleep(PAUSE_S)
        begin = time.monotonic()
        ours.send(b"x")
        ours.recv(1)
        times.append((time.monotonic() - begin) * 1000)
    ours.close()
    os.wait()
    return times


def wake_ms(path):
    """Of each request: arrival to the begin of the first step after it, on the first rank that began it."""
    events = json.loads(path.read_text())
    arrivals = sorted(e["ts"] for e in events if e["ph"] == "b" and e["name"] == "request")
    steps = collections.defaultdict(list)
    for e in events:
        if e["name"] == "step":
            steps[e["args"]["step"]].append(e["ts"])
    begins = sorted(min(times) for times in steps.values())
    return [(next(b for b in begins if b >= a) - a) / 1000 for a in arrivals]


def measure(layout, seconds, n_calls, trace):
    os.environ["INTERNVLD_TRACE"] = str(trace)
    with daemon.Daemon(**layout) as d:
        client = support.Client(d.address)
        roles = {r.rank: r.role for r in client.model().ranks}
        for _ in range(n_calls + 1):  # the first is warm-up
            client.generate(support.chat("Write rat in capital letters."), max_tokens=1)
            time.sleep(PAUSE_S)
        client.close()
        ranks = sorted(d.ranks().items())
        shares = daemon.cpu_shares([pid for _, pid in ranks], seconds)
    return {f"{rank} {roles[rank]}": shares[pid] for rank, pid in ranks}, wake_ms(trace)[1:]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build", type=pathlib.Path)
    p.add_argument("--seconds", type=float, default=20)
    p.add_argument("--calls", type=int, default=60)
    p.add_argument("--csv", type=pathlib.Path)
    a = p.parse_args()
    os.environ["INTERNVLD_DAEMON"] = str(a.build / "daemon/internvld")

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in LAYOUTS.items():
            shares, wake = measure(layout, a.seconds, a.calls, pathlib.Path(folder, "trace.json"))
            echo = echo_ms(a.calls)
            median, limit = statistics.median(wake), statistics.median(echo)
            p90 = sorted(wake)[int(0.9 * len(wake))]
            print(f"{name}: idle, the busiest rank {100 * max(shares.values()):.2f} % of a core "
                  f"({', '.join(f'{k} {100 * v:.2f}' for k, v in shares.items())})")
            print(f"{name}: arrival to first step, median {median:.2f} ms, p90 {p90:.2f} ms; a byte to a process and back "
                  f"{limit:.3f} ms: {median / limit:.1f} times that")
            rows += [(name, f"idle share of a core, {k}", f"{v:.5f}") for k, v in shares.items()]
            rows += [(name, "arrival to first step, median ms", f"{median:.3f}"),
                     (name, "arrival to first step, p90 ms", f"{p90:.3f}"),
                     (name, "a byte to a process and back, median ms", f"{limit:.3f}")]
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            csv.writer(f).writerows([("layout", "what", "value"), *rows])


if __name__ == "__main__":
    main()
