"""Quantised checkpoints and --quantization, served in float32: the bits of a daemon on floats of the same values.

The demo model is rewritten into the files of each format, and into float32 files of the values that these stand for
(quantized_files.py). Answers and log-probabilities of both must be equal, at one shard and at four, where borders of
shards cut groups; so must those of --quantization on the original, whose grids the files of fp8_of_rows, int8, int4
and bitsandbytes repeat.
"""

import pathlib
import subprocess
import sys
import tempfile

import numpy

import daemon
import quantized_files as files
from made_files import read_tensors, write_tensors
from support import SANITIZED, Client, answer_bits, at_once

K_PROJ = "language_model.model.layers.1.self_attn.k_proj.weight"  # left as floats: its q_proj and v_proj are not
CT = dict(quant_method="compressed-tensors")
INT8 = dict(num_bits=8, type="int", strategy="channel")
INT4 = dict(num_bits=4, type="int", strategy="group", group_size=64)
FP8 = dict(num_bits=8, type="float", strategy="channel")
NF4, FP4 = files.bitsandbytes("nf4"), files.bitsandbytes("fp4")
BITSANDBYTES = dict(quant_method="bitsandbytes", load_in_4bit=True)


def groups(*weights):
    return {f"group_{i}": dict(targets=["Linear"], weights=x) for i, x in enumerate(weights)}


# name: (which method a tensor gets, quantization_config, arguments of make(), numbers of shards, --quantization)
ROUND = dict(
    awq=(files.chosen(files.awq), dict(quant_method="awq", bits=4, group_size=128, version="gemm", zero_point=True),
         dict(where="text_config", half=True), [1, 4], None),
    gptq=(files.chosen(files.gptq), dict(quant_method="gptq", bits=4, group_size=32, desc_act=True), dict(half=True),
          [4], None),
    fp8=(files.chosen(files.fp8, but=[K_PROJ]),
         dict(CT, format="float-quantized", ignore=["re:.*vision.*", "lm_head"], config_groups=groups(FP8)), {}, [2], None),
    fp8_of_rows=(files.chosen(files.fp8_of_rows, files.fp8_of_rows),
                 dict(CT, format="float-quantized", config_groups=groups(FP8)), {}, [2], ["fp8"]),
    int8=(files.chosen(files.int8, files.int8, files.int8),
          dict(CT, format="int-quantized", config_groups=groups(INT8)), {}, [2], ["int8"]),
    int4=(files.chosen(files.int4, files.int8, files.int8),
          dict(CT, format="mixed-precision", config_groups=groups(INT4, INT8)), {}, [2],
          ["int4", "--quantization-group-size", 64]),
    nf4=(files.chosen(NF4, NF4),
         dict(BITSANDBYTES, bnb_4bit_quant_type="nf4"), {}, [2], ["bitsandbytes-nf4"]),
    fp4=(files.chosen(FP4, FP4), BITSANDBYTES, {}, [], ["bitsandbytes-fp4"]),
)


def told(address):
    """(bytes of weights of all ranks, what the weights are said to be held in)"""
    client = Client(address)
    model = client.model()
    client.close()
    return sum(x.weight_bytes for x in model.ranks), model.quantization


def planned_bytes(model, tensor):
    """The same by --plan."""
    plan = daemon.planned("--model", model, "--dtype", "float32", "--tensor-parallel-size", tensor)
    return sum(x["weights"] for x in plan)


def serve(model, **arguments):
    """(bits of an answer, bytes of weights, their quantization)"""
    with daemon.Daemon(model=model, dtype="float32", **arguments) as d:
        return answer_bits(d.address), *told(d.address)


def check(name, folder):
    """What was wrong."""
    method, config, options, shards, quantization = ROUND[name]
    quantised, floats = files.make(folder, method, config, **options)
    shards = shards[:1] if SANITIZED else shards
    runs = [lambda: serve(floats)] + [lambda t=t: serve(quantised, tensor=t) for t in shards]
    if quantization:
        runs.append(lambda: serve(daemon.DEMO_MODEL, extra=["--quantization", *quantization]))
    (expected, dense_bytes, none), *others = at_once(runs)
    failures = []
    for tensor, (got, held_bytes, said) in zip(shards, others):
        planned = planned_bytes(quantised, tensor)
        if got != expected:
            failures.append(f"{tensor} shards of the quantised checkpoint answer otherwise than its values")
        if not planned * 0.95 <= held_bytes <= planned * 1.1:  # q, k and v share an order; blocks of 16 rows
            failures.append(f"{held_bytes} bytes of weights, planned {planned:.0f}")
        if none != "none" or not said.startswith(config["quant_method"]):
            failures.append(f"quantization is said to be {said}, and {none} of floats")
        print(f"  {name} ({said}), {tensor} shards: {held_bytes} bytes of weights, {planned:.0f} planned, "
              f"{dense_bytes} as floats of one shard", flush=True)
    if quantization and others[-1][0] != expected:
        failures.append(f"--quantization {quantization[0]} answers otherwise than floats of its values")
    print(f"  {name}: {'; '.join(failures) or 'equal bits'}", flush=True)
    return failures


def check_refusals(model):
    """One line that names what is wrong, whether or not anything is loaded. `model` has AWQ's files."""
    failures = []
    tensors = read_tensors(model / "model.safetensors")
    o_proj = "language_model.model.layers.0.self_attn.o_proj"

    def refused(what, words, spoil=None, extra=()):
        if spoil:
            write_tensors(model / "model.safetensors", spoil)
        done = subprocess.run([daemon.program("INTERNVLD_DAEMON"), "--model", str(model), "--plan", *extra],
                              capture_output=True, text=True)
        good = done.returncode != 0 and all(x in done.stderr.splitlines()[0] for x in words)
        print(f"  {what}: {done.stderr.splitlines()[0] if done.stderr else 'no error'}{'' if good else '  FAILED'}")
        failures.extend([] if good else [what])

    refused("an option besides", ["--quantization int8", "awq"], extra=["--quantization", "int8"])
    refused("random weights", ["--load-format dummy", "quantization_config"], extra=["--load-format", "dummy"])
    bias = numpy.zeros(256, numpy.float16)
    write_tensors(model / "model.safetensors", tensors | {f"{o_proj}.bias": ("F16", bias)})
    planned_bytes(model, 1)  # zeros are taken
    refused("a bias that the model has not", [f"{o_proj}.bias", "not expected"],
            tensors | {f"{o_proj}.bias": ("F16", bias + 1)})
    refused("no zero points", [f"{o_proj}.qzeros"], {k: v for k, v in tensors.items() if k != f"{o_proj}.qzeros"})
    refused("an embedding of another type", ["embed_tokens.qweight", "float16"],
            {k.replace("embed_tokens.weight", "embed_tokens.qweight"): v for k, v in tensors.items()})
    return failures


def main():
    failures = []
    for name in sys.argv[1:] or ROUND:
        with tempfile.TemporaryDirectory(prefix="internvld-quantised-") as folder:
            failures += check(name, folder)
            if name == "awq":
                failures += check_refusals(pathlib.Path(folder) / "quantised")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
