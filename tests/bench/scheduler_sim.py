"""The 78B layout (T=8, P=2, V=2) in simulated time: the daemon's own scheduler against load, for several settings.

    python tests/bench/scheduler_sim.py BUILD [--seconds 300] [--csv FILE] [--plot FILE] [--trace FILE]

BUILD holds tests/bench/scheduler_sim; its head says what the cost model is. Arrivals are Poisson; the mix of requests
is made up (below) and the same at every load but for the times. --trace takes the requests of a file instead, its
times stretched to each load: a line a request, "seconds,prompt tokens,tiles,answer tokens". A request counts as good
when its first token came within 3 s and its others on average within 60 ms. Needs numpy; the plot, matplotlib.
"""
import argparse
import csv
import io
import pathlib
import subprocess
import tempfile

import numpy

ROOT = pathlib.Path(__file__).resolve().parents[2]
RATES = [2, 4, 6, 8, 10, 12, 14, 16, 20, 24]
SETTINGS = {
    "V=2, 2048 tokens a step": [],
    "V=2, 512 tokens a step": ["--max-num-batched-tokens", "512"],
    "V=2, 1024 tokens a step": ["--max-num-batched-tokens", "1024"],
    "V=2, 8192 tokens a step": ["--max-num-batched-tokens", "8192"],
    "V=4, 2048 tokens a step": ["--vision-ranks", "4"],
    "V=4, 1024 tokens a step": ["--vision-ranks", "4", "--max-num-batched-tokens", "1024"],
    "V=4, 2048 tokens a step, 1024 sequences": ["--vision-ranks", "4", "--max-num-seqs", "1024"],
}


def made_up(n):
    """A fifth text alone, three fifths one picture, the rest several pictures or a video's frames."""
    random = numpy.random.default_rng(1)
    rows = []
    for _ in range(n):
        kind = random.random()
        if kind < 0.2:
            tiles = 0
        elif kind < 0.8:
            tiles = int(random.choice([1, 3, 5, 7, 13], p=[0.15, 0.15, 0.2, 0.25, 0.25]))
        elif kind < 0.95:
            tiles = int(random.integers(2, 5)) * int(random.choice([1, 5, 7]))
        else:
            tiles = int(random.choice([8, 16, 32]))
        prompt = int(numpy.clip(random.lognormal(5.0 if tiles else 6.3, 1.0), 8, 8000))
        answer = int(numpy.clip(random.lognormal(5.2, 0.8), 4, 1500))
        rows.append((random.exponential(), prompt, tiles, answer))
    return rows  # first column: gap to the request before, in units of the mean


def of_file(path):
    rows = [line.split(",") for line in pathlib.Path(path).read_text().splitlines() if line and line[0] != "#"]
    times = [float(r[0]) for r in rows]
    mean = (times[-1] - times[0]) / max(len(times) - 1, 1) or 1
    gaps = [0] + [b - a for a, b in zip(times, times[1:])]
    return [(gap / mean, int(r[1]), int(r[2]), int(r[3])) for gap, r in zip(gaps, rows)]


def write_trace(path, rows, rate):
    now = 0.0
    with open(path, "w") as f:
        for gap, prompt, tiles, answer in rows:
            now += gap / rate
            f.write(f"{now:.6f},{prompt},{tiles},{answer}\n")


def plot(results, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True)
    panels = [("goodput_per_s", "requests a second that met both aims", False),
              ("ttft_p99_s", "time to first token, p99 (s)", True),
              ("tpot_p99_s", "time per further token, p99 (s)", False),
              ("vision_busy", "share of time that vision ranks are busy", False)]
    for axis, (column, title, log) in zip(axes.flat, panels):
        for name in SETTINGS:
            rows = [r for r in results if r["setting"] == name]
            axis.plot([float(r["offered_per_s"]) for r in rows], [float(r[column]) for r in rows], marker=".",
                      label=name)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if log:
            axis.set_yscale("log")
    axes[0, 0].plot(RATES, RATES, color="grey", linewidth=0.8, linestyle=":", label="all that is offered")
    axes[1, 0].set_xlabel("requests offered a second")
    axes[1, 1].set_xlabel("requests offered a second")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle("Simulated InternVL3-78B, T=8, P=2 on 16 modelled H200 and V more: the real scheduler, modelled steps",
                    fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build")
    parser.add_argument("--seconds", type=float, default=300, help="simulated, of arrivals")
    parser.add_argument("--trace")
    parser.add_argument("--csv")
    parser.add_argument("--plot")
    a = parser.parse_args()
    program = [f"{a.build}/tests/bench/scheduler_sim", "--model", str(ROOT / "tests/data/configs/internvl3-78b")]
    names = subprocess.run(program + ["--header"], check=True, capture_output=True, text=True).stdout.strip()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            trace = f"{folder}/trace"
            write_trace(trace, of_file(a.trace) if a.trace else made_up(int(rate * a.seconds)), rate)
            for setting, options in SETTINGS.items():
                out = subprocess.run(program + ["--trace", trace] + options, check=True, capture_output=True,
                                     text=True).stdout
                row = next(csv.DictReader(io.StringIO(names + "\n" + out)))
                results.append({"setting": setting, "offered_per_s": rate, **row})
                print(f"{rate:5} {setting:36} goodput {row['goodput_per_s']}, TTFT p50 {row['ttft_p50_s']} p99 "
                      f"{row['ttft_p99_s']}, TPOT p50 {row['tpot_p50_s']} p99 {row['tpot_p99_s']}, stages "
                      f"{row['stage_busy']}, vision {row['vision_busy']}, policy {row['policy_us_per_step']} us")
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, results[0])
            writer.writeheader()
            writer.writerows(results)
    if a.plot:
        plot(results, a.plot)


if __name__ == "__main__":
    main()
