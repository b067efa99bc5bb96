"""Every op beside the limits of the machine it runs on: runs op_bench, keeps its table, draws the shares.

    python tests/bench/op_bench.py BUILD [--csv FILE] [--plot FILE] [--before CSV] [OP_BENCH_OPTION...]

BUILD holds tests/bench/op_bench; its head says what is measured and how. --before draws an older table's shares as
hollow marks beside the new ones. The plot needs matplotlib.
"""
import argparse
import pathlib
import subprocess
import tempfile

import results_file

FORMATS = {"float32": "tab:blue", "bfloat16": "tab:orange", "int8": "tab:green", "int8-int8": "lime", "int4": "tab:red",
           "int4-int8": "darkred", "fp8": "tab:pink", "nf4": "tab:purple", "fp4": "plum", "uint8": "tab:brown"}
TITLES = {"1b": "InternVL3-1B", "8b": "InternVL3-8B", "78b": "InternVL3-78B, one shard of 8"}
LARGEST = 1.5  # a share past this (a cache's speed) is drawn at the edge


def label(row):
    name = row["what"] if row["op"] == "matmul" else " ".join(filter(None, [row["op"], row["what"]]))
    return f"{name}, {row['rows']}"


def draw(axis, rows, labels, filled):
    for name, colour in FORMATS.items():
        points = [(min(float(r["share"]), LARGEST), labels.index(label(r))) for r in rows
                  if r["format"] == name and label(r) in labels]
        if points:
            axis.scatter(*zip(*points), s=26, linewidths=0.9, label=name if filled else None, edgecolors=colour,
                         facecolors=colour if filled else "none")


def plot(rows, before, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes = pyplot.subplots(1, len(models), figsize=(max(5.6 * len(models), 8), 10.5), squeeze=False)
    for axis, model in zip(axes.flat, models):
        mine = [r for r in rows if r["model"] == model]
        labels = list(dict.fromkeys(label(r) for r in mine))
        draw(axis, [r for r in before if r["model"] == model], labels, False)
        draw(axis, mine, labels, True)
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, LARGEST + 0.05)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.set_title(TITLES.get(model, model), fontsize=10)
        axis.set_xlabel("share of the limit, memory's or arithmetic's")
        axis.margins(y=0.01)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="lower center", ncols=len(names))
    figure.suptitle(f"Ops beside this machine's limits, {rows[0]['isa']}, {rows[0]['threads']} threads; op, rows"
                    + ("; hollow: before" if before else ""), fontsize=11)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build")
    parser.add_argument("--csv")
    parser.add_argument("--plot")
    parser.add_argument("--before")
    a, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        table = pathlib.Path(folder) / "op_bench.csv"
        subprocess.run([f"{a.build}/tests/bench/op_bench", "--csv", table, *options], check=True)
        rows = results_file.read(table)
        if a.csv:
            pathlib.Path(a.csv).write_bytes(table.read_bytes())
    if a.plot:
        plot(rows, results_file.read(a.before) if a.before else [], a.plot)


if __name__ == "__main__":
    main()
