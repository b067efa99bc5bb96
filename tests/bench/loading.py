"""From exec to READY, and what the ranks hold then.

    python tests/bench/loading.py BUILD [--rounds 7] [--csv FILE]

Two models take turns: the demo model (beside it: `internvld --map`, which starts the same ranks and loads nothing), and a
checkpoint of InternVL3-1B's shapes that is written to a temporary file first (random
bytes of bfloat16, 1.9 GB), beside a plain read of that file into new memory. All files are in the page cache. The
ranks' resident memory is compared with `--plan`.
"""
import argparse
import csv
import json
import os
import pathlib
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/gateway"))
import daemon  # noqa: E402
from end_to_end import make_model  # noqa: E402


def shapes(config):
    """{name: shape} of a checkpoint of these dimensions; the demo model's names, whose tower differs by norms alone."""
    t, v = config["text_config"], config["vision_config"]
    dim, inner, heads = t["hidden_size"], t["intermediate_size"], t["num_attention_heads"]
    kv = dim // heads * t["num_key_value_heads"]
    v_dim, v_inner, patches = v["hidden_size"], v["intermediate_size"], (v["image_size"][0] // v["patch_size"][0]) ** 2
    patch = v["patch_size"]
    language, vision, projector = "language_model.", "vision_tower.", "multi_modal_projector."
    found = {language + "lm_head.weight": [t["vocab_size"], dim], language + "model.norm.weight": [dim],
             language + "model.embed_tokens.weight": [t["vocab_size"], dim],
             projector + "layer_norm.weight": [4 * v_dim], projector + "layer_norm.bias": [4 * v_dim],
             projector + "linear_1.weight": [dim, 4 * v_dim], projector + "linear_1.bias": [dim],
             projector + "linear_2.weight": [dim, dim], projector + "linear_2.bias": [dim],
             vision + "embeddings.cls_token": [1, 1, v_dim],
             vision + "embeddings.position_embeddings": [1, patches + 1, v_dim],
             vision + "embeddings.patch_embeddings.projection.weight": [v_dim, 3, *patch],
             vision + "embeddings.patch_embeddings.projection.bias": [v_dim]}
    for i in range(t["num_hidden_layers"]):
        at = f"{language}model.layers.{i}."
        found |= {at + "self_attn.o_proj.weight": [dim, dim], at + "mlp.down_proj.weight": [dim, inner],
                  at + "input_layernorm.weight": [dim], at + "post_attention_layernorm.weight": [dim]}
        for name, n in (("q", dim), ("k", kv), ("v", kv)):
            found |= {f"{at}self_attn.{name}_proj.weight": [n, dim], f"{at}self_attn.{name}_proj.bias": [n]}
        found |= {f"{at}mlp.{name}_proj.weight": [inner, dim] for name in ("gate", "up")}
    for i in range(v["num_hidden_layers"]):
        at = f"{vision}encoder.layer.{i}."
        matrices = {"attention.q_proj": (v_dim, v_dim), "attention.k_proj": (v_dim, v_dim),
                    "attention.v_proj": (v_dim, v_dim), "attention.projection_layer": (v_dim, v_dim),
                    "mlp.fc1": (v_inner, v_dim), "mlp.fc2": (v_dim, v_inner)}
        for name, shape in matrices.items():
            found |= {f"{at}{name}.weight": list(shape), f"{at}{name}.bias": [shape[0]]}
        for name in ("layernorm_before", "layernorm_after"):
            found |= {f"{at}{name}.weight": [v_dim], f"{at}{name}.bias": [v_dim]}
        found |= {at + "lambda_1": [v_dim], at + "lambda_2": [v_dim]}
    return found


def write_checkpoint(path, config):
    table, at = {}, 0
    for name, shape in shapes(config).items():
        n_bytes = 2
        for n in shape:
            n_bytes *= n
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    pool = b"".join(struct.pack("<H", 0x3c00 + i * 37 % 256 + i % 2 * 0x8000) for i in range(1 << 19))
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, at, len(pool)):
            f.write(pool[:min(len(pool), at - start)])


def map_s(build, model):
    start = time.monotonic()
    subprocess.run([build / "daemon/internvld", "--model", model, "--map"], check=True, capture_output=True)
    return time.monotonic() - start


def read_s(path):
    """Into memory that the kernel has to find and clear first, as that of weights."""
    start = time.monotonic()
    buffer = bytearray(path.stat().st_size)
    with open(path, "rb", buffering=0) as f:
        at = 0
        while n := f.readinto(memoryview(buffer)[at:]):
            at += n
    return time.monotonic() - start


def start_s(model):
    """Seconds to READY, seconds of them that loading took, and the ranks' resident MiB."""
    start = time.monotonic()
    with daemon.Daemon(model=model) as d:
        ready = time.monotonic() - start
        while not (found := re.search(r"load (\d+) ms", d.log())):  # the port file comes before the line
            time.sleep(0.01)
        resident = {}
        for rank, pid in d.ranks().items():
            status = pathlib.Path(f"/proc/{pid}/status").read_text()
            resident[rank] = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024
    return ready, float(found[1]) / 1e3, resident


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=lambda x: pathlib.Path(x).resolve())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv")
    a = parser.parse_args()
    os.environ["INTERNVLD_DAEMON"] = str(a.build / "daemon/internvld")
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        large = pathlib.Path(name)
        config = make_model(large, "1b")
        file = large / "model.safetensors"
        write_checkpoint(file, config)
        for _ in range(a.rounds):
            for what, measure in (("start a job and load nothing", lambda: map_s(a.build, daemon.DEMO_MODEL)),
                                  ("demo: exec to READY", lambda: start_s(daemon.DEMO_MODEL)[0]),
                                  ("1b: read the file", lambda: read_s(file)),
                                  ("1b: load", lambda: start_s(large)[1])):
                seconds.setdefault(what, []).append(measure())
        resident = start_s(large)[2]
        plan = daemon.planned("--model", large)
        size = file.stat().st_size
    rows = [{"what": what, "value": round(statistics.median(v) * 1e3, 1), "unit": "ms"} for what, v in seconds.items()]
    for rank, planned in enumerate(plan):
        mib = (planned["weights"] + planned["scratch"]) / (1 << 20)
        rows.append({"what": f"1b: rank {rank} resident", "value": round(resident[rank], 1), "unit": "MiB"})
        rows.append({"what": f"1b: rank {rank} weights and scratch of the plan", "value": round(mib, 1), "unit": "MiB"})
    for r in rows:
        print(f"{r['what']:45s} {r['value']:9.1f} {r['unit']}")
    ratio = statistics.median(x / y for x, y in zip(seconds["1b: load"], seconds["1b: read the file"]))
    print(f"loading takes {ratio:.2f} times what reading {size / 1e9:.2f} GB takes")
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            out = csv.DictWriter(f, rows[0])
            out.writeheader()
            out.writerows(rows)


if __name__ == "__main__":
    main()
