"""--activation-quantization fp8 on the CUDA back end, emulated or real: an FP8 checkpoint multiplied in FP8.

    fp8_activations.py LAYOUT... [--OPTION of internvld]...    T x P x V

The demo model with FP8 linears, its vision tower's among them, but one that is left as floats. Every layout has the same
bits, in prompts and in recorded decode steps, and an answer the same alone and beside another. Beside the same weights with activations in bfloat16 only nearness is
asked: E4M3 keeps four bits of a number, so that each of the 33 products behind each other adds noise of 2.6 % of what it
yields (2^-3 / sqrt(12) / sqrt(2)), some 15 % in all, of log-probabilities that spread over a few units. What cannot be is
refused in one line.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import daemon
import quantized_files as files
from support import Client, at_once, chat, example, position_bits

OPTIONS = [x for x in sys.argv[1:] if x.startswith("--")]
LAYOUTS = [x for x in sys.argv[1:] if x not in OPTIONS]
EMULATED = "emulated" in daemon.program("INTERNVLD_DAEMON")
FP8 = ("--activation-quantization", "fp8")
K_PROJ = "language_model.model.layers.1.self_attn.k_proj.weight"  # and with it q_proj and v_proj: one product
LOGPROB_MEAN, LOGPROB_MAX = 0.15, 0.8
SKIPPED = 77


def config(**weights):
    weights = dict(num_bits=8, type="float", strategy="channel") | weights
    return dict(quant_method="compressed-tensors", format="float-quantized",
                config_groups=dict(group_0=dict(targets=["Linear"], weights=weights)))


def ask(model, layout, extra):
    """(answers, how many products of all were said to be in FP8 by each rank, what GetModel says)"""
    with daemon.Daemon(model=model, dtype="bfloat16", **daemon.layout_of(layout), extra=(
            "--device", "cuda", "--deterministic", "--max-num-seqs", 2, "--max-model-len", 1024, "--max-vision-tiles", 1,
            *OPTIONS, *extra)) as d:
        client = Client(d.address)
        runs = [lambda p=p: client.generate(p, timeout=300, temperature=0, max_tokens=4, prompt_logprobs=1)
                for p in (chat(example("scene-two.png"), "Describe it."), chat("Write rat in capitals."))]
        answers, alone = at_once(runs), runs[1]()
        assert bits([alone]) == bits(answers[1:]), f"{layout} {extra}: an answer has other bits alone"
        said = client.model().quantization
        client.close()
        counts = [x.split("activations in fp8: ")[1].split(" products")[0] for x in d.log().splitlines()
                  if "activations in fp8: " in x]
    return answers, counts, said


def bits(answers):
    return [(a.bits(), position_bits(a.prompt_logprobs)) for a in answers]


def check_layouts(model):
    floats, none, said = ask(model, LAYOUTS[0], ())
    if none or said != "compressed-tensors, fp8":
        yield f"without the option: {none}, {said}"
    right = None
    for layout in LAYOUTS:
        answers, counts, said = ask(model, layout, FP8)
        right = right or bits(answers)
        apart = [abs(x.chosen.logprob - y.chosen.logprob) for a, b in zip(answers, floats, strict=True)
                 for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True)]
        mean = sum(apart) / len(apart)
        print(f"  {layout} ({said}): {', '.join(counts)} products in FP8; {len(apart)} log-probabilities are {mean:.3f} "
              f"from those of bfloat16 activations in the mean, {max(apart):.3f} at most", flush=True)
        if bits(answers) != right:
            yield f"{layout}: not the bits of {LAYOUTS[0]}"
        if not 0 < mean <= LOGPROB_MEAN or max(apart) > LOGPROB_MAX:
            yield f"{layout}: {mean} in the mean and {max(apart)} at most from bfloat16 activations"
        if said != "compressed-tensors, fp8, activations too" or not counts:
            yield f"{layout}: {counts}, {said}"
        for in_fp8, of_all in (map(int, x.split(" of ")) for x in counts):
            if not 0 < in_fp8 < of_all:  # the convolution, lm_head or k_proj are floats
                yield f"{layout}: {in_fp8} products of {of_all} are in FP8"


def check_refusals(model, folder):
    def refused(what, words, *extra, model=model, env=None):
        done = subprocess.run([daemon.program("INTERNVLD_DAEMON"), "--model", str(model), "--listen", "127.0.0.1:0",
                               *FP8, *extra], capture_output=True, text=True, timeout=120, env=os.environ | (env or {}))
        lines = [x for x in done.stderr.splitlines() if "--activation-quantization fp8" in x]
        good = done.returncode != 0 and lines and all(x in lines[0] for x in words)
        print(f"  {what}: {lines[0] if lines else done.stderr}{'' if good else '  FAILED'}", flush=True)
        return [] if good else [f"refusal of {what}"]

    blocks, _ = files.make(pathlib.Path(folder) / "blocks", files.chosen(files.fp8),
                           config(strategy="block", block_structure=[128, 128]))
    bfloat16, cuda = ("--dtype", "bfloat16"), ("--device", "cuda")
    failures = refused("the CPU", ["--device cuda"], *bfloat16, "--device", "cpu")
    failures += refused("float32", ["--dtype bfloat16", "float32"], "--dtype", "float32", *cuda)
    failures += refused("floats", ["FP8", "none"], *bfloat16, *cuda, model=daemon.DEMO_MODEL)
    failures += refused("int8", ["FP8", "int8"], *bfloat16, *cuda, "--quantization", "int8", model=daemon.DEMO_MODEL)
    failures += refused("blocks", ["FP8", "groups of 128"], *bfloat16, *cuda, model=blocks)
    if EMULATED:
        failures += refused("a host without GPUs", ["--device cuda"], *bfloat16, env={"INTERNVLD_EMULATION_DEVICES": "0"})
        failures += refused("an older GPU", ["sm_89"], *bfloat16, *cuda, env={"INTERNVLD_EMULATION_SM": "80"})
    return failures


def main():
    with tempfile.TemporaryDirectory(prefix="internvld-fp8-") as folder:
        model, _ = files.make(folder, files.chosen(files.fp8, files.fp8, but=[K_PROJ]), config())
        try:
            failures = [*check_layouts(model), *check_refusals(model, folder)]
        except AssertionError as e:
            if EMULATED or "sm_89 or newer is needed" not in str(e):
                raise
            print("skipped: products in FP8 want a GPU of compute capability 8.9")
            sys.exit(SKIPPED)
    for failure in failures:
        print("FAILED", failure)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
