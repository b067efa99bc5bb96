"""Products with a model's weights beside oneDNN's and OpenBLAS': how far op_matmul() is from libraries made for it.

    python tests/bench/yardsticks.py BUILD [--model 1b] [--rows 1 16 512] [--rounds 5] [--csv FILE]

BUILD holds tests/bench/op_bench, whose products and limits are one side. The other: oneDNN by PyTorch, in bfloat16 and
float32, with the weight in the layout it chooses for so many rows; and OpenBLAS by NumPy, in float32, whose interface
takes weights as they are. All have weights in copies that together outgrow the caches, and as many threads as there are
processors. Each round takes one after the other; medians are printed, and times as fast as each library.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", str(os.cpu_count()))  # before NumPy is loaded
import numpy  # noqa: E402
import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
import results_file  # noqa: E402

COPIES_BYTES, WINDOW_S = 192 << 20, 2e-3  # as op_bench has them


def products(build, model, rows):
    """{(weight, format): line} of op_bench, one round."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bfloat16", "float32"):
            table = pathlib.Path(folder) / name
            command = [build / "tests/bench/op_bench", "--model", model, "--op", "matmul", "--format", name, "--rows", rows,
                       "--rounds", 1, "--csv", table]
            subprocess.run([str(x) for x in command], check=True, stdout=subprocess.DEVNULL)
            found.update({(line["what"], name): line for line in results_file.read(table)})
    return found


def microseconds(call, n_copies):
    """Of one call(copy), over WINDOW_S at least, after each copy was used once."""
    for i in range(n_copies):
        call(i)
    n, begun = 0, time.perf_counter()
    while n == 0 or time.perf_counter() - begun < WINDOW_S:
        call(n % n_copies)
        n += 1
    found = (time.perf_counter() - begun) / n * 1e6
    time.sleep(0.1)  # until the library's threads no longer spin
    return found


def onednn(out_dim, in_dim, rows, dtype):
    x = torch.randn(rows, in_dim).to(dtype)
    weight = torch.randn(out_dim, in_dim).to(dtype)
    n = COPIES_BYTES // (out_dim * in_dim * dtype.itemsize) + 1
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight.clone(), rows) for _ in range(n)]
    return microseconds(lambda i: torch.ops.mkldnn._linear_pointwise(x, packed[i], None, "none", [], ""), n)


def openblas(out_dim, in_dim, rows):
    x = numpy.ones((rows, in_dim), numpy.float32)
    n = COPIES_BYTES // (out_dim * in_dim * 4) + 1
    weights = [numpy.full((out_dim, in_dim), 0.5, numpy.float32) for _ in range(n)]
    y = numpy.empty((rows, out_dim), numpy.float32)
    return microseconds(lambda i: numpy.matmul(x, weights[i].T, out=y), n)


def one_round(build, model, rows, shapes):
    """{(weight, format, side): microseconds}, and the products' shares of their limits."""
    found, shares = {}, {}
    for (what, name), line in products(build, model, rows).items():
        out_dim, in_dim = shapes[what]
        found[what, name, "internvld"] = float(line["us"])
        shares[what, name] = float(line["share"])
        found[what, name, "oneDNN"] = onednn(out_dim, in_dim, rows, getattr(torch, name))
        if name == "float32":
            found[what, name, "OpenBLAS"] = openblas(out_dim, in_dim, rows)
    return found, shares


def shapes_of(model):
    """{what op_bench calls it: (out_dim, in_dim)}"""
    config = json.loads((ROOT / f"tests/data/configs/internvl3-{model}/config.json").read_text())
    t, v = config["text_config"], config["vision_config"]
    dim, heads, inner = t["hidden_size"], t["num_attention_heads"], t["intermediate_size"]
    head, v_dim, v_inner = dim // heads, v["hidden_size"], v["intermediate_size"]
    return {"qkv": ((heads + 2 * t["num_key_value_heads"]) * head, dim), "o": (dim, dim), "gate_up": (2 * inner, dim),
            "down": (dim, inner), "lm_head": (t["vocab_size"], dim), "vision_qkv": (3 * v_dim, v_dim),
            "vision_o": (v_dim, v_dim), "vision_fc1": (v_inner, v_dim), "vision_fc2": (v_dim, v_inner),
            "projector": (dim, 4 * v_dim)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build", type=pathlib.Path)
    p.add_argument("--model", default="1b", choices=["1b", "8b"])
    p.add_argument("--rows", type=int, nargs="+", default=[1, 16, 512])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--csv", type=pathlib.Path, help="lines are added")
    a = p.parse_args()
    torch.set_num_threads(os.cpu_count())
    torch.set_grad_enabled(False)
    for rows in a.rows:
        rounds = [one_round(a.build, a.model, rows, shapes_of(a.model)) for _ in range(a.rounds)]
        lines = []
        for what, name in rounds[0][1]:
            us = {side: statistics.median(found[what, name, side] for found, _ in rounds)
                  for side in ("internvld", "oneDNN", "OpenBLAS") if (what, name, side) in rounds[0][0]}
            ratios = {side: statistics.median(found[what, name, side] / found[what, name, "internvld"]
                                              for found, _ in rounds) for side in us}
            share = statistics.median(shares[what, name] for _, shares in rounds)
            lines.append({"model": a.model, "weight": what, "format": name, "rows": rows, "us": round(us["internvld"], 1),
                          "share_of_limit": round(share, 3), "faster_than_onednn": round(ratios["oneDNN"], 2),
                          "faster_than_openblas": round(ratios["OpenBLAS"], 2) if "OpenBLAS" in us else ""})
            print(" ".join(f"{key} {value}" for key, value in lines[-1].items() if value != ""), flush=True)
        if a.csv:
            results_file.append(a.csv, lines)


if __name__ == "__main__":
    main()
