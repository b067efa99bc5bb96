"""Gaps between the tokens of running text streams, alone and with 15 pictures a second beside them.

    python tests/bench/beside_pictures.py BUILD [--rounds 5] [--streams 8] [--rate 15] [--csv FILE] [-- DAEMON OPTION...]

BUILD holds daemon/internvld and client/internvl. The two loads take turns on one daemon, so that both see the same
machine; every picture is encoded and its prompt computed (caches are off), its answer is one token. The question is by
how much the pictures raise the 99th percentile of the gaps, in units of one vision batch: the time that a vision rank
needed for a full one, beside the same streams, read from the daemon's timeline.
"""
import argparse
import collections
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/gateway"))
import daemon  # noqa: E402

PICTURE = ROOT / "deploy/demo/examples/scene-two.png"


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build", type=pathlib.Path)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--streams", type=int, default=8)
    p.add_argument("--requests", type=int, default=96, help="streams measured in a round")
    p.add_argument("--tokens", type=int, default=128, help="of a stream")
    p.add_argument("--rate", type=float, default=15, help="pictures a second")
    p.add_argument("--csv", type=pathlib.Path)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    a = p.parse_args(sys.argv[1:end])
    a.daemon_options = sys.argv[end + 1:]
    return a


class Load:
    def __init__(self, a, address):
        self.a, self.command = a, [str(a.build / "client/internvl"), "bench", "--address", address]

    def streams(self):
        """The percentiles of one round, milliseconds."""
        a = self.a
        done = subprocess.run([*self.command, "--json", "--input-len", "12", "--concurrency", str(a.streams),
                               "--num-requests", str(a.requests), "--warm-up", str(a.streams),
                               "--output-len", str(a.tokens)], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)["itl_ms"]

    def pictures(self):
        return subprocess.Popen([*self.command, "--request-rate", str(self.a.rate), "--num-requests", "1000000",
                                 "--max-tokens", "1", "--image", str(PICTURE)],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def beside_pictures(self):
        pictures = self.pictures()
        try:
            time.sleep(1)
            return self.streams()
        finally:
            pictures.terminate()
            pictures.wait()
            time.sleep(0.5)


def spans(path):
    """{name: [milliseconds]} of the timeline, and those of vision batches by their number of tiles."""
    by_name, by_tiles = collections.defaultdict(list), collections.defaultdict(list)
    for e in json.loads(path.read_text()):
        if e["ph"] == "X":
            by_name[e["name"]].append(e["dur"] / 1e3)
        if e["name"] == "encode tiles":
            by_tiles[e["args"]["tiles"]].append(e["dur"] / 1e3)
    return by_name, by_tiles


def percentile(values, share):
    values = sorted(values)
    return values[min(int(share * len(values)), len(values) - 1)]


def run(a, trace):
    os.environ["INTERNVLD_DAEMON"] = str(a.build / "daemon/internvld")
    os.environ["INTERNVLD_TRACE"] = str(trace)

    options = ["--vision-cache-bytes", "0", "--no-enable-prefix-caching", *a.daemon_options]
    rows = []
    with daemon.Daemon(extra=options) as d:
        load = Load(a, d.address)
        load.beside_pictures()  # warm-up
        for i in range(a.rounds):
            for kind, measure in (("alone", load.streams), ("with pictures", load.beside_pictures)):
                rows.append({"load": kind, "round": i + 1, **measure()})
                print(f"  {i + 1} {kind:14s} gaps p50 {rows[-1]['p50']:.2f}, p99 {rows[-1]['p99']:.2f} ms", flush=True)
    return rows


def main():
    a = parse()
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder, "trace.json")
        rows = run(a, trace)
        by_name, by_tiles = spans(trace)
    full = max(by_tiles)
    batch = statistics.median(by_tiles[full])
    p99 = {k: statistics.median(r["p99"] for r in rows if r["load"] == k) for k in ("alone", "with pictures")}
    print(f"{len(by_name['encode tiles'])} vision batches; one of {full} tiles: median {batch:.2f} ms, "
          f"p99 {percentile(by_tiles[full], 0.99):.2f} ms; a step: median {statistics.median(by_name['step']):.2f} ms, "
          f"p99 {percentile(by_name['step'], 0.99):.2f} ms")
    print(f"p99 gap, median of {a.rounds} rounds: {p99['alone']:.2f} ms alone, {p99['with pictures']:.2f} ms with "
          f"{a.rate:g} pictures a second: {(p99['with pictures'] - p99['alone']) / batch:+.2f} vision batches")
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            out = csv.DictWriter(f, ["load", "round", "mean", "p50", "p90", "p99", "vision_batch_ms"])
            out.writeheader()
            for r in rows:
                out.writerow({**{k: (round(v, 3) if isinstance(v, float) else v) for k, v in r.items()},
                              "vision_batch_ms": round(batch, 3)})


if __name__ == "__main__":
    main()
