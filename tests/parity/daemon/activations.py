"""--activation-quantization: fp8 on the CUDA back end, emulated or real, or int8 on the CPU.

    activations.py fp8|int8 LAYOUT... [--OPTION of internvld]...    T x P x V

The demo model with weights in FP8 or integers; one of them, or the vision tower's, is left as floats. Every layout has
the same bits, in prompts and in recorded decode steps, and an answer the same alone and beside another. Beside the same
weights with activations in bfloat16 only nearness is asked: E4M3 keeps four bits of a number, so that each of the 33
products behind each other adds noise of 2.6 % of what it yields (2^-3 / sqrt(12) / sqrt(2)), some 15 % in all, of
log-probabilities that spread over a few units. A row in int8 has steps of a 127th of its largest number, some four
times the root mean square: noise of 0.9 % (4 / 127 / sqrt(12)), a third of that. What cannot be is refused in one line.
int8_layers.py holds the numbers themselves to Transformers.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import daemon
import made_files
import quantized_files as files
from support import SANITIZED, Client, at_once, chat, example, position_bits

FORMAT, *LAYOUTS = [x for x in sys.argv[1:] if not x.startswith("--")]
OPTIONS = [x for x in sys.argv[1:] if x.startswith("--")]
EMULATED = "emulated" in daemon.program("INTERNVLD_DAEMON")
ROUNDED = ("--activation-quantization", FORMAT)
DEVICE = dict(fp8=("--device", "cuda", "--deterministic"), int8=("--device", "cpu"))[FORMAT]
K_PROJ = "language_model.model.layers.1.self_attn.k_proj.weight"  # and with it q_proj and v_proj: one product
LOGPROB_MEAN, LOGPROB_MAX = dict(fp8=(0.15, 0.8), int8=(0.05, 0.3))[FORMAT]
SKIPPED = 77
BFLOAT16, CUDA = ("--dtype", "bfloat16"), ("--device", "cuda")


def fp8_config(**weights):
    weights = dict(num_bits=8, type="float", strategy="channel") | weights
    return dict(quant_method="compressed-tensors", format="float-quantized",
                config_groups=dict(group_0=dict(targets=["Linear"], weights=weights)))


def ask(model, layout, extra):
    """(answers, how many products of all were said to be rounded by each rank, what GetModel says)"""
    with daemon.Daemon(model=model, dtype="bfloat16", **daemon.layout_of(layout), extra=(
            *DEVICE, "--max-num-seqs", 2, "--max-model-len", 1024, "--max-vision-tiles", 1, *OPTIONS, *extra)) as d:
        client = Client(d.address)
        runs = [lambda p=p: client.generate(p, timeout=300, temperature=0, max_tokens=4, prompt_logprobs=1)
                for p in (chat(example("scene-two.png"), "Describe it."), chat("Write rat in capitals."))]
        answers, alone = at_once(runs), runs[1]()
        assert bits([alone]) == bits(answers[1:]), f"{layout} {extra}: an answer has other bits alone"
        said = client.model().quantization
        client.close()
        words = f"activations in {FORMAT}: "
        counts = [x.split(words)[1].split(" products")[0] for x in d.log().splitlines() if words in x]
    return answers, counts, said


def bits(answers):
    return [(a.bits(), position_bits(a.prompt_logprobs)) for a in answers]


def check_layouts(model, of, extra=(), all_of_them=False):
    """`of`: what the weights are said to be in. all_of_them: every product but the convolution's is rounded."""
    floats, none, said = ask(model, LAYOUTS[0], extra)
    if none or said != of:
        yield f"without the option: {none}, {said}"
    right = None
    for layout in LAYOUTS:
        answers, counts, said = ask(model, layout, (*extra, *ROUNDED))
        right = right or bits(answers)
        apart = [abs(x.chosen.logprob - y.chosen.logprob) for a, b in zip(answers, floats, strict=True)
                 for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True)]
        mean = sum(apart) / len(apart)
        print(f"  {layout} ({said}): {', '.join(counts)} products in {FORMAT}; {len(apart)} log-probabilities are "
              f"{mean:.3f} from those of bfloat16 activations in the mean, {max(apart):.3f} at most", flush=True)
        if bits(answers) != right:
            yield f"{of}, {layout}: not the bits of {LAYOUTS[0]}"
        if not 0 < mean <= LOGPROB_MEAN or max(apart) > LOGPROB_MAX:
            yield f"{of}, {layout}: {mean} in the mean and {max(apart)} at most from bfloat16 activations"
        if said != f"{of}, activations too" or not counts:
            yield f"{of}, {layout}: {counts}, {said}"
        numbers = [[int(n) for n in x.split(" of ")] for x in counts]
        if not any(rounded for rounded, _ in numbers) or any(
                of_all - rounded > 1 if all_of_them else of_all == rounded for rounded, of_all in numbers):
            yield f"{of}, {layout}: {', '.join(counts)} products are in {FORMAT}"


def refused(what, words, *extra, model=daemon.DEMO_MODEL, env=None):
    done = subprocess.run([daemon.program("INTERNVLD_DAEMON"), "--model", str(model), "--listen", "127.0.0.1:0",
                           *ROUNDED, *extra], capture_output=True, text=True, timeout=120, env=os.environ | (env or {}))
    lines = [x for x in done.stderr.splitlines() if f"--activation-quantization {FORMAT}" in x]
    good = done.returncode != 0 and lines and all(x in lines[0] for x in words)
    print(f"  {what}: {lines[0] if lines else done.stderr}{'' if good else '  FAILED'}", flush=True)
    return [] if good else [f"refusal of {what}"]


def check_fp8(folder):
    model, _ = files.make(folder / "fp8", files.chosen(files.fp8, files.fp8, but=[K_PROJ]), fp8_config())
    yield from check_layouts(model, "compressed-tensors, fp8")
    blocks, _ = files.make(folder / "blocks", files.chosen(files.fp8),
                           fp8_config(strategy="block", block_structure=[128, 128]))
    yield from refused("the CPU", ["--device cuda"], *BFLOAT16, "--device", "cpu", model=model)
    yield from refused("float32", ["--dtype bfloat16", "float32"], "--dtype", "float32", *CUDA, model=model)
    yield from refused("floats", ["FP8", "none"], *BFLOAT16, *CUDA)
    yield from refused("int8", ["FP8", "int8"], *BFLOAT16, *CUDA, "--quantization", "int8")
    yield from refused("blocks", ["FP8", "groups of 128"], *BFLOAT16, *CUDA, model=blocks)
    if EMULATED:
        yield from refused("a host without GPUs", ["--device cuda"], *BFLOAT16, model=model,
                           env={"INTERNVLD_EMULATION_DEVICES": "0"})
        yield from refused("an older GPU", ["sm_89"], *BFLOAT16, *CUDA, model=model,
                           env={"INTERNVLD_EMULATION_SM": "80"})


def make_cut(folder):
    """The demo model without weights; its down_proj has eight lanes that begin at multiples of four columns."""
    config = json.loads((daemon.DEMO_MODEL / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 4
    folder.mkdir()
    made_files.write_model(folder, daemon.DEMO_MODEL, config)
    return folder


def check_int8(folder):
    int8, cpu = ("--quantization", "int8"), ("--device", "cpu")
    awq, _ = files.make(folder / "awq", files.chosen(files.awq, but=[K_PROJ]), half=True, config=dict(
        quant_method="awq", bits=4, group_size=128, version="gemm", zero_point=True))
    gptq, _ = files.make(folder / "gptq", files.chosen(files.gptq), half=True, config=dict(
        quant_method="gptq", bits=4, group_size=32, desc_act=True))
    yield from check_layouts(daemon.DEMO_MODEL, "int8", int8, all_of_them=True)
    if not SANITIZED:
        yield from check_layouts(daemon.DEMO_MODEL, "int4 (groups of 64)", (
            "--quantization", "int4", "--quantization-group-size", 64), all_of_them=True)
    yield from check_layouts(awq, "awq, int4 (groups of 128)")
    yield from refused("CUDA", ["--device cpu"], *BFLOAT16, *CUDA, *int8)
    yield from refused("float32", ["--dtype bfloat16", "float32"], "--dtype", "float32", *cpu, *int8)
    yield from refused("floats", ["int8 or int4", "none"], *BFLOAT16, *cpu)
    yield from refused("nf4", ["int8 or int4", "nf4"], *BFLOAT16, *cpu, "--quantization", "bitsandbytes-nf4")
    yield from refused("columns in no order", ["desc_act", "gptq"], *BFLOAT16, *cpu, model=gptq)
    yield from refused("lanes that cut groups", ["layers.0.mlp.down_proj.weight", "multiples of 8 columns", "groups of 32"],
                       *BFLOAT16, *cpu, "--quantization", "int4", "--quantization-group-size", "32",
                       "--load-format", "dummy", model=make_cut(folder / "cut"))


def main():
    with tempfile.TemporaryDirectory(prefix="internvld-activations-") as folder:
        try:
            failures = [*dict(fp8=check_fp8, int8=check_int8)[FORMAT](pathlib.Path(folder))]
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
