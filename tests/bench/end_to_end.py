"""The whole daemon at a real model's shapes, random weights, beside the machine's limits and beside peers.

    python tests/bench/end_to_end.py BUILD [--model 1b] [--quantization none] [--activation-quantization none]
                                     [--rounds 5] [--only decode ...] [--transformers]
                                     [--llama-cpp FOLDER --gguf FOLDER] [--rounds-csv FILE] [--csv FILE]
    python tests/bench/end_to_end.py --medians-of FILE --csv FILE
    python tests/bench/end_to_end.py --csv FILE --plot FILE

BUILD holds daemon/internvld, client/internvl and tests/bench/op_bench. Measured are, at batch 1, a token of an answer
(against the weights' bytes at the measured memory bandwidth), the first token of prompts of 512 and 1024 tokens, a
picture of 1 and of 13 tiles (against their operations at the measured peak of bfloat16's products, or float32's where
those are faster; with --activation-quantization int8 those with weights against that of int8's), and 16 answers at
once. What the tables call int8-int8 and int4-int8 are int8 and int4 with that option.
INTERNVLD_ISA chooses the instruction set of the daemon and of the measured peaks.
Every round of a measure takes the daemon and the peers in turn, and the limits before and after each, of which the
higher counts: what disturbs a limit lowers it. A round whose limits lie more than a tenth apart is taken again, up to
three times, for a machine's memory may be half as fast from one second to the next. Medians are printed. --rounds-csv
keeps each round, so that several short runs in quiet minutes make one table (--medians-of).

Peers, where they are asked for: Transformers (with PyTorch, in bfloat16, by this Python), and llama.cpp, whose folder
of programs has llama-bench, llama-batched-bench (the streams) and llama-mtmd-cli (the pictures, the encoder's own time
as the program logs it); end_to_end_gguf.py makes its files. Its pictures have bfloat16 weights whatever --quantization;
with Q8_0 and Q4_0, its int8 and int4, it always rounds activations to 8 bits.
"""
import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/gateway"))
import daemon  # noqa: E402
import made_files  # noqa: E402
import results_file  # noqa: E402

PROMPTS, TILES, ANSWER, STREAMS = (512, 1024), (1, 13), 32, 16
MOVED_MAX, TRIES = 0.1, 4  # of a limit within a round, which is else taken again
# Of a weight, with its share of a scale.
BITS = {"none": 16, "int8": 8, "int4": 4.25, "bitsandbytes-nf4": 4.5, "bitsandbytes-fp4": 4.5}


class Work:
    """What one token, one prompt and one tile cost, from config.json."""

    def __init__(self, config, quantization, products):
        """`products`: which of the machine's rates those with weights have."""
        t, v, self.products = config["text_config"], config["vision_config"], products
        dim, heads, kv = t["hidden_size"], t["num_attention_heads"], t["num_key_value_heads"]
        head = t.get("head_dim", dim // heads)
        self.layers, self.width = t["num_hidden_layers"], heads * head
        rest = 2 * dim * heads * head + 3 * dim * t["intermediate_size"]  # of a layer but keys and values
        self.body = self.layers * (2 * dim * kv * head + rest)
        self.prompt_body = self.body - rest  # the last layer's answers are wanted of one token
        self.logits = dim * t["vocab_size"]
        v_dim, self.v_layers = v["hidden_size"], v["num_hidden_layers"]
        self.tile_rows, self.v_width = (v["image_size"][0] // v["patch_size"][0]) ** 2 + 1, v_dim
        self.vision = self.v_layers * (4 * v_dim * v_dim + 2 * v_dim * v["intermediate_size"])
        self.projector = 4 * v_dim * dim + dim * dim
        logits_bits = 8 if quantization == "int4" else 16 if quantization.startswith("bits") else BITS[quantization]
        self.token_bytes = self.body * BITS[quantization] / 8 + self.logits * logits_bits / 8

    def token_s(self, machine, n):
        """Seconds that the limits of `machine` need: of each of n answers' tokens, of a prompt, of tiles."""
        return max(self.token_bytes / machine["bytes"], 2 * n * (self.body + self.logits) / machine[self.products]) / n

    def prompt_s(self, machine, n):
        attention = 2 * n * n * self.width * (self.layers - 1)
        return 2 * (n * self.prompt_body + self.logits) / machine[self.products] + attention / machine["bfloat16"]

    def tiles_s(self, machine, n):
        n_tokens = (self.tile_rows - 1) // 4
        attention = 4 * self.tile_rows ** 2 * self.v_width * self.v_layers
        return n * (2 * (self.tile_rows * self.vision + n_tokens * self.projector) / machine[self.products]
                    + attention / machine["bfloat16"])


def make_model(folder, name):
    """The demo model's tokenizer and templates around the shapes of `name`."""
    config = json.loads((ROOT / f"tests/data/configs/internvl3-{name}/config.json").read_text())
    own = json.loads((daemon.DEMO_MODEL / "config.json").read_text())
    config["image_token_id"] = own["image_token_id"]
    made_files.write_model(folder, daemon.DEMO_MODEL, config, side=448, max_patches=12)
    return config


def make_pictures(folder):
    """{tiles: path} of pictures that both ours and llama.cpp's tiling cuts into so many."""
    paths = {}
    for n, (width, height) in {1: (448, 448), 13: (1792, 1344)}.items():
        row = b"\0" + bytes(i % 251 for i in range(3 * width))
        paths[n] = folder / f"{n}.png"
        paths[n].write_bytes(made_files.png(width, height, row * height))
    return paths


def limits(build, folder):
    """A second: bytes read, and operations on factors of each format."""
    table = folder / "limits.csv"
    subprocess.run([build / "tests/bench/op_bench", "--op", "limits", "--model", "1b", "--csv", table], check=True,
                   stdout=subprocess.DEVNULL)
    rows = results_file.read(table)
    found = {row["format"]: float(row["limit_gflop_per_s"]) * 1e9 for row in rows}
    return {**found, "bytes": statistics.median(float(row["limit_gb_per_s"]) for row in rows) * 1e9}


class Ours:
    name = "internvld"

    def __init__(self, build, address, pictures, trace):
        self.command = [build / "client/internvl", "bench", "--address", address, "--json"]
        self.pictures, self.trace = pictures, trace
        few, many = (self.bench("--input-len", n)["prompt_tokens"] for n in (110, 160))
        self.per_word = (many - few) / 50  # from the 101st on: the words are numbers, a token a digit
        self.base = few - 110 * self.per_word

    def bench(self, *options, requests=1):
        words = [*self.command, "--warm-up", 0, "--num-requests", requests, "--concurrency", requests, *options]
        done = subprocess.run([str(x) for x in words], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def decode_s(self):
        return self.bench("--input-len", 5, "--output-len", ANSWER)["itl_ms"]["p50"] / 1e3

    def prefill_s(self, n):
        """Of a prompt of almost n tokens, scaled to n."""
        done = self.bench("--input-len", int((n - self.base) / self.per_word), "--output-len", 1)
        return done["ttft_ms"]["p50"] / 1e3 * n / done["prompt_tokens"]

    def tiles_s(self, n):
        """What the vision rank needed for one picture, read from the timeline."""
        seen = len(self.spans())
        self.bench("--image", self.pictures[n], "--input-len", 2, "--output-len", 1)
        end = time.monotonic() + 10
        while sum(e["args"]["tiles"] for e in self.spans()[seen:]) < n and time.monotonic() < end:
            time.sleep(0.1)
        return sum(e["dur"] for e in self.spans()[seen:]) / 1e6

    def streams_s(self):
        done = self.bench("--input-len", 5, "--output-len", ANSWER, requests=STREAMS)
        return done["itl_ms"]["p50"] / 1e3 / STREAMS

    def spans(self):
        lines = self.trace.read_text().splitlines()
        found = [json.loads(x.rstrip(",")) for x in lines if '"encode tiles"' in x]
        return [e for e in found if e.get("ph") == "X"]


class Transformers:
    name = "Transformers"

    def __init__(self, folder, n_threads):
        import torch
        import transformers
        self.torch = torch
        torch.set_num_threads(n_threads)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.bfloat16)
        config = transformers.AutoConfig.from_pretrained(folder)
        self.model = transformers.InternVLForConditionalGeneration(config).eval()

    def run(self, ids, cache=None):
        start = time.monotonic()
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.monotonic() - start, out

    def prompt(self, n, rows=1):
        return self.torch.arange(n).repeat(rows, 1) % 500 + 10

    def decode_s(self, rows=1):
        _, out = self.run(self.prompt(32, rows))
        times = []
        for _ in range(ANSWER // 2):
            seconds, out = self.run(out.logits[:, -1:].argmax(-1), out.past_key_values)
            times.append(seconds)
        return statistics.median(times)

    def prefill_s(self, n):
        return self.run(self.prompt(n))[0]

    def tiles_s(self, n):
        pixels = self.torch.zeros(n, 3, 448, 448)
        start = time.monotonic()
        self.model.model.get_image_features(pixel_values=pixels)
        return time.monotonic() - start

    def streams_s(self):
        return self.decode_s(STREAMS) / STREAMS


class LlamaCpp:
    """Each measure starts a program anew, which warms up and then times its own work."""
    name = "llama.cpp"

    def __init__(self, programs, files, quantization, pictures, n_threads):
        self.programs, self.files, self.pictures = programs, files, pictures
        self.language, self.threads = files / f"{quantization}.gguf", n_threads

    def run(self, program, *options):
        """What it prints and what it logs."""
        words = [self.programs / program, "-t", self.threads, *options]
        done = subprocess.run([str(x) for x in words], capture_output=True, text=True, check=True)
        return done.stdout, done.stderr

    def rate(self, *options):
        out, _ = self.run("llama-bench", "-m", self.language, "-o", "json", "-r", 1, *options)
        return json.loads(out)[-1]["avg_ts"]

    def decode_s(self):
        return 1 / self.rate("-p", 0, "-n", ANSWER)

    def prefill_s(self, n):
        return n / self.rate("-p", n, "-n", 0, "-ub", 1024, "-b", 1024)

    def tiles_s(self, n):
        _, log = self.run("llama-mtmd-cli", "-m", self.files / "stub.gguf", "--mmproj", self.files / "vision.gguf",
                          "--chat-template", "chatml", "-c", 4096, "-n", 0, "-p", "a", "--image", self.pictures[n])
        assert sum(map(int, re.findall(r"encoding mtmd batch, n_chunks = (\d+)", log))) == n, log
        return sum(map(int, re.findall(r"mtmd batch encoding done in (\d+) ms", log))) / 1e3

    def streams_s(self):
        out, log = self.run("llama-batched-bench", "-m", self.language, "-c", 2048, "-npp", 32, "-ntg", ANSWER, "-npl",
                            STREAMS, "--output-format", "jsonl")
        line = next(x for x in (out + log).splitlines() if '"speed_tg"' in x)
        return 1 / json.loads(line[line.index("{"):])["speed_tg"]


MEASURES = {"decode, a token": lambda engine: engine.decode_s(),
            **{f"prefill, {n} tokens": lambda engine, n=n: engine.prefill_s(n) for n in PROMPTS},
            **{f"vision, {n} tiles": lambda engine, n=n: engine.tiles_s(n) for n in TILES},
            f"{STREAMS} streams, a token": lambda engine: engine.streams_s()}


def limit_of(work, measure, machine):
    """Seconds that the machine's limit needs."""
    n = next((int(x) for x in measure.replace(",", " ").split() if x.isdigit()), 1)
    if measure.startswith("prefill"):
        return work.prompt_s(machine, n)
    if measure.startswith("vision"):
        return work.tiles_s(machine, n)
    return work.token_s(machine, n)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build", nargs="?", type=lambda x: pathlib.Path(x).resolve())
    p.add_argument("--model", default="1b", choices=["1b", "2b", "8b"])
    p.add_argument("--quantization", default="none", choices=list(BITS))
    p.add_argument("--activation-quantization", default="none", choices=["none", "int8"])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--only", nargs="+", default=[""], help="measures whose names begin so")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds-csv", type=pathlib.Path, help="every round's lines are added")
    p.add_argument("--csv", type=pathlib.Path, help="lines of medians are added")
    p.add_argument("--medians-of", type=pathlib.Path, help="take the rounds of this --rounds-csv and measure nothing")
    p.add_argument("--plot", type=pathlib.Path, help="draw the lines of --csv and measure nothing")
    p.add_argument("--transformers", action="store_true")
    p.add_argument("--llama-cpp", type=pathlib.Path, help="folder of its programs")
    p.add_argument("--gguf", type=pathlib.Path, help="folder that end_to_end_gguf.py has filled")
    return p.parse_args()


def measure(a, folder):
    """A line for every engine in every round."""
    config = make_model(folder, a.model)
    pictures = make_pictures(folder)
    trace = folder / "trace.json"
    os.environ.update(INTERNVLD_DAEMON=str(a.build / "daemon/internvld"), INTERNVLD_TRACE=str(trace))
    peers = []
    if a.transformers:
        peers.append(Transformers(folder, a.threads))
    if a.llama_cpp:
        peers.append(LlamaCpp(a.llama_cpp, a.gguf, a.quantization, pictures, a.threads))
    activations = a.activation_quantization
    quantization = a.quantization if activations == "none" else f"{a.quantization}-{activations}"
    options = ["--load-format", "dummy", "--quantization", a.quantization, "--activation-quantization", activations,
               "--threads", a.threads, "--max-num-batched-tokens", max(PROMPTS), "--max-vision-tiles", max(TILES),
               "--vision-cache-bytes", 0, "--no-enable-prefix-caching"]
    rows = []
    with daemon.Daemon(model=folder, dtype="bfloat16", extra=options) as d:
        engines = [Ours(a.build, d.address, pictures, trace), *peers]
        work = Work(config, a.quantization, "bfloat16" if activations == "none" else activations)
        for name in [name for name in MEASURES for _ in range(a.rounds) if name.startswith(tuple(a.only))]:
            for _ in range(TRIES):
                lines, moved = one_round(name, engines, work, lambda: limits(a.build, folder))
                if moved < MOVED_MAX:
                    break
                print(f"  {name}: the limit moved by {moved:.2f}", flush=True)
            lines = [{"model": a.model, "quantization": quantization, **line} for line in lines]
            if a.rounds_csv:
                results_file.append(a.rounds_csv, lines)
            rows += lines
    return rows


def one_round(name, engines, work, look):
    """A line for every engine, and by what part the measure's limit moved meanwhile."""
    begun, lines, looks = round(time.time()), [], [look()]
    for engine in engines:
        seconds = MEASURES[name](engine)
        looks.append(look())
        machine = {what: max(looks[-2][what], rate) for what, rate in looks[-1].items()}
        share = limit_of(work, name, machine) / seconds
        lines.append({"measure": name, "round": begun, "engine": engine.name, "ms": round(seconds * 1e3, 3),
                      "share_of_limit": round(share, 4), "limit_gb_per_s": round(machine["bytes"] / 1e9, 1),
                      "limit_gflop_per_s": round(machine[work.products] / 1e9, 1)})
        print(f"  {engine.name:12s} {name:22s} {seconds * 1e3:9.1f} ms, {share:.2f} of the limit", flush=True)
    needed = [limit_of(work, name, machine) for machine in looks]
    return lines, max(needed) / min(needed) - 1


def medians(rounds):
    """The table of results: a line for each engine's measure, over its rounds."""
    lines, ours = {}, {}
    for r in rounds:
        lines.setdefault((r["model"], r["quantization"], r["engine"], r["measure"]), []).append(r)
        if r["engine"] == Ours.name:
            ours[r["model"], r["quantization"], r["measure"], r["round"]] = float(r["ms"])
    for (model, quantization, engine, name), found in lines.items():
        ratios = [float(r["ms"]) / ours[model, quantization, name, r["round"]] for r in found]
        yield {"model": model, "quantization": quantization, "engine": engine, "measure": name,
               "ms": round(statistics.median(float(r["ms"]) for r in found), 2),
               "share_of_limit": round(statistics.median(float(r["share_of_limit"]) for r in found), 3),
               "ours_faster": round(statistics.median(ratios), 2), "rounds": len(found)}


def plot(table, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results_file.read(table)
    labels = list(dict.fromkeys((r["model"], r["quantization"], r["measure"]) for r in rows))
    figure, axis = pyplot.subplots(figsize=(9, 1.2 + 0.33 * len(labels)))
    for i, (engine, colour) in enumerate((("internvld", "tab:blue"), ("llama.cpp", "tab:orange"),
                                          ("Transformers", "tab:green"))):
        points = [(labels.index((r["model"], r["quantization"], r["measure"])) + 0.25 * (i - 1),
                   float(r["share_of_limit"])) for r in rows if r["engine"] == engine]
        axis.barh([y for y, _ in points], [x for _, x in points], height=0.25, color=colour, label=engine)
    names = {"none": "bfloat16"}
    axis.set_yticks(range(len(labels)), [f"{m}, {names.get(q, q)}: {what}" for m, q, what in labels], fontsize=8)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.05)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("share of the machine's limit, memory's (decode) or arithmetic's; longer is faster")
    axis.set_title("InternVL3 on two cores, random weights; llama.cpp: the nearest format of its own", fontsize=10)
    figure.legend(fontsize=8, loc="lower center", ncols=3)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=90)


def main():
    a = parse()
    if a.plot:
        return plot(a.csv, a.plot)
    if a.medians_of:
        rounds = results_file.read(a.medians_of)
    else:
        with tempfile.TemporaryDirectory() as name:
            rounds = measure(a, pathlib.Path(name))
    rows = list(medians(rounds))
    for r in rows:
        print(f"{r['engine']:12s} {r['measure']:22s} {r['ms']:9.1f} ms  {r['share_of_limit']:5.2f} of the limit, "
              f"internvld is {r['ours_faster']:.2f} times as fast")
    if a.csv:
        results_file.append(a.csv, rows)


if __name__ == "__main__":
    main()
