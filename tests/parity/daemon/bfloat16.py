"""Forward's logits in bfloat16 through the daemon, teacher-forced, against the float32 record of Transformers.

    bfloat16.py [--cuda] CHECKPOINT LAYOUT... [--OPTION of internvld]...

A layout is T x P x V: 2x2x1; on the CPU or, told so, on CUDA.

The tolerance is that of ../model/parity_test.c: bfloat16 keeps eight bits of each weight and product, so values of up
to 20 differ by tenths: worst <= 0.8, mean <= 0.1, and the best token is the same wherever it leads by 0.5. The error
of Transformers' own bfloat16 run is printed beside ours, and no more than twice its mean is accepted. Probabilities of
the first layer's attention are within 0.02. Between layouts not a bit may differ.
"""

import json
import sys

import numpy

import daemon
from made_files import from_bfloat16, read_tensors
from reference import SKIPPED, read_safetensors, reference_folder, token_prompt
from support import Client

WORST, MEAN, LEAD, TIMES_THEIRS, ATTENTION = 0.8, 0.1, 0.5, 2.0, 0.02


def wrong_best(logits, expected):
    """Rows whose best token is another one, though the record's leads by more than LEAD."""
    second, best = numpy.sort(expected, axis=1)[:, -2:].T
    return int(((best - second > LEAD) & (logits.argmax(1) != expected.argmax(1))).sum())


def main():
    on_cuda = "--cuda" in sys.argv
    name, *layouts = [x for x in sys.argv[1:] if not x.startswith("--")]
    options = [x for x in sys.argv[1:] if x.startswith("--") and x != "--cuda"]
    extra = ("--device", "cuda", "--deterministic", "--max-num-seqs", 4, "--max-model-len", 2048) if on_cuda else ("--device", "cpu")
    folder = reference_folder(name)
    if folder is None:
        print(f"skipped: no reference data has {name}")
        sys.exit(SKIPPED)
    config = json.loads((folder / "checkpoints" / name / "config.json").read_text())
    goldens = folder / "goldens" / name
    lm, vision = (read_safetensors(goldens / f"{x}.safetensors") for x in ("lm", "vision"))
    ids, expected = lm["input_ids"].reshape(-1), lm["logits"][0].astype(numpy.float64)
    theirs = numpy.abs(from_bfloat16(read_tensors(goldens / "lm.safetensors")["logits_bf16"][1])[0] - expected)
    n_tiles = int((ids == config["image_token_id"]).sum()) // config["image_seq_length"]
    prompt = token_prompt(ids, vision["pixel_values"][:n_tiles])
    first, n_failures = None, 0
    for layout in layouts:
        ranks = daemon.layout_of(layout)
        reason = daemon.refusal(folder / "checkpoints" / name, **ranks)
        if reason:
            print(f"  {layout}: skipped: {reason}")
            continue
        with daemon.Daemon(model=folder / "checkpoints" / name, dtype="bfloat16", extra=(*extra, *options), **ranks) as d:
            client = Client(d.address)
            tensors = client.forward(prompt, ["logits", "attentions"])[0]
            logits = tensors["logits"]
            client.close()
        error, n_wrong = numpy.abs(logits - expected), wrong_best(logits, expected)
        probs = numpy.abs(tensors["attentions.0"].ravel() - lm["attentions.0"].ravel()).max()
        first = logits if first is None else first
        good = (error.max() <= WORST and error.mean() <= min(MEAN, TIMES_THEIRS * theirs.mean()) and n_wrong == 0 and
                probs <= ATTENTION and first.tobytes() == logits.tobytes())
        n_failures += not good
        print(f"  {layout}: worst {error.max():.3f}, mean {error.mean():.4f} (Transformers' bfloat16: "
              f"{theirs.max():.3f}, {theirs.mean():.4f}); {n_wrong} other best tokens; attention within {probs:.4f}; "
              f"bits of the first layout: {first.tobytes() == logits.tobytes()}{'' if good else '  FAILED'}", flush=True)
    sys.exit(1 if n_failures or first is None else 0)


if __name__ == "__main__":
    main()
