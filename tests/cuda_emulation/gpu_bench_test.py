"""gpu_bench on the emulated back end: every case is there, what it counts is what the config says, and nothing is timed.

    gpu_bench_test.py GPU_BENCH CHECKPOINT

Operations and bytes are worked out here from config.json alone: matrices, caches and attention, for shard 0 of 2. A row
of codes may end in up to ROW_BYTES of padding.
"""

import csv
import json
import pathlib
import subprocess
import sys
import tempfile

ROW_BYTES = 64
T, CONTEXT, PREFILL, BATCHES, TILES = 2, 40, 32, (1, 2, 3), (1, 2)
FORMATS = ("bfloat16", "fp8", "fp8-fp8", "int4")
TIMED = ("ms", "gb_per_s", "limit_gb_per_s", "tflop_per_s", "limit_tflop_per_s", "bound", "share")


def rounded(n, to=256):
    return -(-n // to) * to


def held(format, n_out, n_in, kind, has_bias=False, row_bytes=1):
    """Bytes of a matrix on the device: codes or bfloat16, scales of rows or groups, a bfloat16 bias."""
    if format == "bfloat16" or (format in ("fp8", "fp8-fp8") and kind == "lm_head"):
        n = rounded(2 * n_out * n_in)
    else:
        is_int4 = format == "int4" and kind == "language"
        n_codes, n_groups = ((n_in + 1) // 2, -(-n_in // 128)) if is_int4 else (n_in, 1)
        n = rounded(n_out * rounded(n_codes, row_bytes)) + rounded(4 * n_out * n_groups)
    return n + 2 * n_out * has_bias


def columns_of_half(n):
    """The first four of eight lanes, which are whole units of the largest power of two that leaves each lane one."""
    unit = next(u for u in (128, 64, 32, 16) if n % u == 0 and n // u >= 8)
    return unit * sum(n // unit // 8 + (lane < n // unit % 8) for lane in range(4))


def language(c, format, n_rows, pairs, cached, n_sampled, row_bytes):
    t = c["text_config"]
    d, dim = t["hidden_size"] // t["num_attention_heads"], t["hidden_size"]
    heads, kv_heads = t["num_attention_heads"] // T, t["num_key_value_heads"] // T
    inner = columns_of_half(t["intermediate_size"])
    matrices = [(d * (heads + 2 * kv_heads), dim, True), (dim, heads * d, False), (2 * inner, dim, False),
                (dim, inner, False)]
    flops = sum(2 * n_rows * o * i for o, i, _ in matrices) + 4 * pairs * heads * d
    n_bytes = sum(held(format, o, i, "language", bias, row_bytes) for o, i, bias in matrices)
    n_bytes += 2 * 2 * cached * kv_heads * d
    vocab = -(-t["vocab_size"] // T)
    lm_head = held(format, vocab, dim, "lm_head", False, row_bytes) if n_sampled else 0
    return flops * t["num_hidden_layers"] + 2 * n_sampled * vocab * dim, n_bytes * t["num_hidden_layers"] + lm_head


def vision(c, format, n, row_bytes):
    v, text = c["vision_config"], c["text_config"]["hidden_size"]
    dim, inner, bias = v["hidden_size"], v["intermediate_size"], v["attention_bias"]
    n_patches = (v["image_size"][0] // v["patch_size"][0]) * (v["image_size"][1] // v["patch_size"][1])
    rows, pixels = n * (n_patches + 1), v["num_channels"] * v["patch_size"][0] * v["patch_size"][1]
    layer = [(3 * dim, dim, bias), (dim, dim, True), (inner, dim, True), (dim, inner, True)]
    ends = [(text, 4 * dim, True), (text, text, True)]
    flops = v["num_hidden_layers"] * (sum(2 * rows * o * i for o, i, _ in layer) + 4 * n * (n_patches + 1) ** 2 * dim)
    flops += 2 * n * n_patches * dim * pixels + sum(2 * n * c["image_seq_length"] * o * i for o, i, _ in ends)
    n_bytes = sum(held(format, o, i, "vision", b, row_bytes) for o, i, b in layer * v["num_hidden_layers"] + ends)
    return flops, n_bytes + held("bfloat16", dim, pixels, "", True)


def expected(c, row_bytes):
    for format in FORMATS:
        for n in BATCHES:
            for what, n_sampled in (("decode", 0), ("decode_sampled", n)):
                yield (("language", what, format, n, CONTEXT),
                       language(c, format, n, n * CONTEXT, n * CONTEXT, n_sampled, row_bytes))
        yield (("language", "prefill", format, PREFILL, PREFILL),
               language(c, format, PREFILL, PREFILL * (PREFILL + 1) // 2, PREFILL, 0, row_bytes))
    for format in FORMATS:
        for n in TILES:
            yield ("vision", "encode", format, n, 65), vision(c, format, n, row_bytes)


def main():
    program, checkpoint = sys.argv[1], pathlib.Path(sys.argv[2])
    config = json.loads((checkpoint / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        table = pathlib.Path(folder) / "gpu_bench.csv"
        done = subprocess.run([program, "--small", "--model", checkpoint, "--shards", str(T), "--rounds", "1",
                               "--csv", table], capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="")
        assert done.returncode == 0, done.returncode
        with open(table, newline="") as f:
            rows = list(csv.DictReader(f))
    least, most = (list(expected(config, n)) for n in (1, ROW_BYTES))
    assert len(rows) == len(least), (len(rows), len(least))
    for row, (key, (flops, n_least)), (_, (_, n_most)) in zip(rows, least, most, strict=True):
        assert (row["part"], row["what"], row["format"], int(row["n"]), int(row["context"])) == key, (row, key)
        assert round(float(row["tflop"]) * 1e12) == flops, (row, flops)
        assert n_least <= round(float(row["gb"]) * 1e9) <= n_most, (row, n_least, n_most)
        assert not any(row[name] for name in TIMED), f"an emulated time: {row}"
        assert "emulated" in row["device"], row
    for word in ("/s", " ms"):
        assert word not in done.stdout, f"an emulated speed was printed: {word}"


if __name__ == "__main__":
    main()
