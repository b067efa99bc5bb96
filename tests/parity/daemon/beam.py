"""Beam search through RPC against Transformers' recorded searches (goldens/NAME/beam.json).

    beam.py CHECKPOINT

Sequences equal, scores within SCORE_ABS: a score is a sum of at most 14 log-probabilities over a power of its length,
measured: 2e-5. All searches of a checkpoint run one after the other, then all at
once beside sampled requests, in chunks, on a KV cache that cannot hold them (so that beams are preempted), and at
T=2 P=2: not a bit of a score may differ.
"""

import concurrent.futures
import json
import pathlib
import sys

import daemon
import reference
from support import Client, pb

SCORE_ABS = 1e-4
EARLY = {False: pb.EARLY_STOPPING_FALSE, True: pb.EARLY_STOPPING_TRUE, "never": pb.EARLY_STOPPING_NEVER}
TWELVE_PAGES = {"ln-1b-style": 12 * 12288, "rms-78b-style": 12 * 32768}  # bytes
WAYS = {
    "one by one": ("1x1x1", (), 1),
    "all at once, in chunks": ("1x1x1", ("--max-num-batched-tokens", "24", "--max-num-seqs", "24"), 8),
    "with too few pages": ("1x1x1", ("--kv-cache-memory-bytes", TWELVE_PAGES, "--max-model-len", "96",
                                      "--max-num-seqs", "10"), 8),
    "T=2 P=2": ("2x2x1", (), 4),
}


def sampling(case):
    s = case["settings"]
    fields = {"num_beams": s["num_beams"], "n": s.get("num_return_sequences", 1), "max_tokens": case["max_tokens"],
              "early_stopping": EARLY[s.get("early_stopping", False)], "stop_token_ids": case["stop_token_ids"]}
    for ours, theirs in (("length_penalty", "length_penalty"), ("repetition_penalty", "repetition_penalty"),
                         ("min_tokens", "min_new_tokens")):
        if theirs in s:
            fields[ours] = s[theirs]
    return fields


def search(client, prompt, case):
    """[(ids, score)] of one search."""
    answer = client.generate(prompt, 300, **sampling(case))
    found = [(answer.candidates[i].ids, answer.candidates[i].score) for i in range(len(answer.candidates))]
    assert answer.done.usage.completion_tokens == sum(len(ids) for ids, _ in found), answer.done.usage
    return found


def run_all(way, name, folder, cases, prompts):
    layout, extra, workers = WAYS[way]
    with daemon.Daemon(model=folder / "checkpoints" / name, dtype="float32", **daemon.layout_of(layout),
                       extra=[x[name] if isinstance(x, dict) else x for x in extra]) as d:
        client = Client(d.address)
        with concurrent.futures.ThreadPoolExecutor(workers + 2) as pool:
            others = [pool.submit(client.generate, prompts["text_only"], temperature=1.0, seed=i, max_tokens=20)
                      for i in range(4 if workers > 1 else 0)]
            found = list(pool.map(lambda case: search(client, prompts[case["record"]], case), cases))
            for other in others:
                other.result()
        client.wait_idle()
        client.close()
        preemptions = d.log().count("preempted 0 times"), d.log().count(" times, ")
    return found, preemptions[1] - preemptions[0]


def main():
    name = sys.argv[1]
    folder = reference.reference_folder(name)
    if folder is None or not (folder / "goldens" / name / "beam.json").exists():
        folder = pathlib.Path(__file__).resolve().parents[2] / "data/reference"
    cases = json.loads((folder / "goldens" / name / "beam.json").read_text())
    records = json.loads((folder / "goldens" / name / "generate.json").read_text())
    config = json.loads((folder / "checkpoints" / name / "config.json").read_text())
    pixels = reference.read_safetensors(folder / "goldens" / name / "vision.safetensors")["pixel_values"]
    prompts = {}
    for record in ("image", "text_only"):
        ids = records[record]["input_ids"][0]
        n_tiles = ids.count(config["image_token_id"]) // config["image_seq_length"]
        prompts[record] = reference.token_prompt(ids, pixels[:n_tiles] if n_tiles else None)
    failures, worst, first = 0, 0.0, None
    for way in WAYS:
        found, n_preempted = run_all(way, name, folder, cases, prompts)
        for case, sequences in zip(cases, found):
            what = f"{way}: {case['record']} {case['settings']}"
            if [ids for ids, _ in sequences] != case["sequences"]:
                failures += 1
                print(f"{what}: {sequences} instead of {case['sequences']}, {case['scores']}")
                continue
            error = max(abs(score - expected) for (_, score), expected in zip(sequences, case["scores"]))
            worst = max(worst, error)
            failures += error > SCORE_ABS
        if first is not None and first != found:
            failures += 1
            print(f"{way}: not the bits of searches one by one")
        first = first or found
        if way == "with too few pages" and n_preempted == 0:
            failures += 1
            print("with too few pages: nothing was preempted, so nothing was shown")
        print(f"{name}: {len(cases)} searches {way}: {n_preempted} requests preempted, largest error of a score "
              f"{worst:.2g}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
