"""Recorded steps on the CUDA back end, emulated or real: the same bits as op by op, in every layout, and really replayed.

    daemon_graphs.py LAYOUT... [--OPTION of internvld]...    T x P x V; the first is also run op by op

Three requests at once, a picture among them, so that steps of one to three sequences are padded; seeded sampling. The
timeline says what was replayed.
"""

import json
import os
import pathlib
import sys
import tempfile

import daemon
from support import Client, at_once, chat, example

N_SEQUENCES = 3
OPTIONS = [x for x in sys.argv[1:] if x.startswith("--")]
LAYOUTS = [x for x in sys.argv[1:] if x not in OPTIONS]
CASES = [(LAYOUTS[0], ["--enforce-eager"]), *((x, []) for x in LAYOUTS)]  # the first says what is right


def ask(layout, extra, trace):
    os.environ["INTERNVLD_TRACE"] = str(trace)
    with daemon.Daemon(dtype="bfloat16", **daemon.layout_of(layout), extra=(
            "--device", "cuda", "--deterministic", "--max-num-seqs", N_SEQUENCES, "--max-model-len", 1024,
            "--max-vision-tiles", 1, *OPTIONS, *extra)) as d:
        client = Client(d.address)
        prompts = [chat(example("scene-two.png"), "Describe the image."), chat("Write stop in capital letters."),
                   chat("Write rat in capital letters.")]
        answers = at_once([
            lambda p=p, i=i: client.generate(p, timeout=300, temperature=0.7, seed=i, max_tokens=6 + i, logprobs=2)
            for i, p in enumerate(prompts)])
        client.close()
    del os.environ["INTERNVLD_TRACE"]
    return [a.bits() for a in answers]


def replays(trace):
    """How many steps and runs of tiles of the timeline were replayed."""
    spans = [e["args"] for e in json.loads(trace.read_text()) if e["ph"] == "X" and e["name"] == "replay"]
    return sum("rows" in x for x in spans), sum("tiles" in x for x in spans)


def main():
    failures, right = [], None
    for layout, extra in CASES:
        with tempfile.TemporaryDirectory() as folder:
            trace = pathlib.Path(folder) / "trace.json"
            bits = ask(layout, extra, trace)
            steps, runs = replays(trace)
        right = right or bits
        print(f"  {layout} {' '.join(extra)}: {steps} steps and {runs} runs of tiles replayed, "
              f"bits of the first: {bits == right}", flush=True)
        if bits != right:
            failures.append(f"{layout}: not the bits of {CASES[0]}")
        if (steps > 0 and runs > 0) == bool(extra):
            failures.append(f"{layout} {extra}: {steps} steps, {runs} runs of tiles replayed")
    for failure in failures:
        print("FAILED", failure)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
