"""The demo model as the quantised checkpoints of several formats, and as floats of the same values.

Every method takes a weight [out, in] float32 and gives the tensors that stand for it, by the suffix that replaces
"weight" in its name, and its values as float32. The tensors of a file are (safetensors' type, array) pairs.
"""

import json
import pathlib
import shutil

import numpy

import daemon
from made_files import from_bfloat16, read_tensors, write_tensors

LANGUAGE = ("self_attn.", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
VISION = ("attention.", "mlp.fc", "linear_")
NF4 = numpy.array([-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                   -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725,
                   0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                   0.7229568362236023, 1], numpy.float32)
FP4_HALF = numpy.array([0, 0.0625, 8, 12, 4, 6, 2, 3], numpy.float32) / numpy.float32(12)
FP4 = numpy.concatenate([FP4_HALF, -FP4_HALF])
E4M3 = numpy.array([m / 512 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127],
                   numpy.float32)  # without the code that is no number
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


# ---- methods ----

def words(codes, axis, order=range(8)):
    codes = numpy.moveaxis(codes, axis, -1)
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8).astype(numpy.uint32)
    packed = sum(codes[..., order[i]] << numpy.uint32(4 * i) for i in range(8))
    return ("I32", numpy.moveaxis(packed, -1, axis).copy().view(numpy.int32))


def grid(weight, groups, n_groups):
    """16 steps from the least to the largest of each group: codes [out, in], zeros and scales [out, n_groups]."""
    low = numpy.stack([weight[:, groups == g].min(1) for g in range(n_groups)], 1).clip(max=0)
    high = numpy.stack([weight[:, groups == g].max(1) for g in range(n_groups)], 1).clip(min=0)
    scales = ((high - low) / 15).astype(numpy.float16)
    zeros = numpy.rint(-low / scales.astype(numpy.float32)).clip(0, 15).astype(int)
    codes = numpy.rint(weight / scales.astype(numpy.float32)[:, groups] + zeros[:, groups]).clip(0, 15).astype(int)
    values = (codes - zeros[:, groups]).astype(numpy.float32) * scales.astype(numpy.float32)[:, groups]
    return codes, zeros, scales, values


def awq(weight):
    groups = numpy.arange(weight.shape[1]) // 128
    codes, zeros, scales, values = grid(weight, groups, groups[-1] + 1)
    return {"qweight": words(codes.T, 1, AWQ_ORDER), "qzeros": words(zeros.T, 1, AWQ_ORDER),
            "scales": ("F16", scales.T)}, values


def gptq(weight):
    """The first format, with columns in no order; and the bias of zeros that its writers add."""
    n_groups = weight.shape[1] // 32
    groups = numpy.random.default_rng(weight.shape[1]).permutation(numpy.arange(weight.shape[1]) // 32)
    codes, zeros, scales, values = grid(weight, groups, n_groups)
    return {"qweight": words(codes.T, 0), "qzeros": words((zeros.T - 1) % 16, 1), "scales": ("F16", scales.T),
            "g_idx": ("I32", groups.astype(numpy.int32)),
            "bias": ("F16", numpy.zeros(len(weight), numpy.float16))}, values


def bitsandbytes(kind):
    table = NF4 if kind == "nf4" else FP4
    order = numpy.argsort(table[:16], kind="stable")
    if kind == "fp4":  # of its two zeros the other is never written
        order = order[order != 8]
    middles = (table[order][:-1] + table[order][1:]) / numpy.float32(2)

    def quantise(weight):
        blocks = weight.reshape(-1, 64)
        absmax = numpy.abs(blocks).max(1)
        codes = order[numpy.searchsorted(middles, blocks * (numpy.float32(1) / absmax)[:, None], side="left")]
        values = (table[codes] * absmax[:, None]).reshape(weight.shape)
        flat = codes.reshape(-1).astype(numpy.uint8)
        state = json.dumps(dict(quant_type=kind, blocksize=64, dtype="bfloat16", shape=weight.shape)).encode()
        return {"weight": ("U8", (flat[::2] << 4 | flat[1::2]).reshape(-1, 1)), "weight.absmax": ("F32", absmax),
                "weight.quant_map": ("F32", table),
                f"weight.quant_state.bitsandbytes__{kind}": ("U8", numpy.frombuffer(state, numpy.uint8))}, values
    return quantise


def e4m3(weight, scales):
    """Codes and values of weight / scales [out], to the nearest, ties to even."""
    x = weight / scales[:, None]
    middles = (E4M3[:-1] + E4M3[1:]) / 2
    codes = numpy.searchsorted(middles, numpy.abs(x)).astype(numpy.uint8)
    codes += (numpy.append(middles, numpy.inf)[codes] == numpy.abs(x)) & (codes % 2 == 1)
    values = numpy.where(x < 0, -E4M3[codes], E4M3[codes]) * scales[:, None]
    return ("F8_E4M3", codes | numpy.uint8(128) * (x < 0)), values


def fp8(weight):
    scales = numpy.abs(weight).max(1) / numpy.float32(448)
    scales = (scales.view(numpy.uint32) + 0x8000 & 0xffff0000).view(numpy.float32)  # bfloat16
    codes, values = e4m3(weight, scales)
    return {"weight": codes, "weight_scale": ("BF16", (scales.view(numpy.uint32) >> 16).astype(numpy.uint16)[:, None]),
            "input_scale": ("F32", numpy.ones(1, numpy.float32))}, values


def fp8_of_rows(weight):
    """On the grid of --quantization fp8."""
    scales = numpy.abs(weight).max(1) / numpy.float32(448)
    codes, values = e4m3(weight, scales)
    return {"weight": codes, "weight_scale": ("F32", scales[:, None])}, values


def int8(weight):
    """Of compressed-tensors, on the grid of --quantization int8."""
    scales = numpy.abs(weight).max(1) / numpy.float32(127)
    codes = numpy.rint(weight / scales[:, None]).astype(numpy.int8)
    return {"weight": ("I8", codes), "weight_scale": ("F32", scales[:, None])}, codes * scales[:, None]


def int4(weight):
    """pack-quantized, on the grid of --quantization int4 in groups of 64."""
    groups = weight.reshape(len(weight), -1, 64)
    largest = numpy.take_along_axis(groups, numpy.abs(groups).argmax(2)[..., None], 2)
    scales = largest / numpy.float32(-8)
    codes = numpy.rint(groups / scales).clip(max=7).astype(int)
    values = (codes.astype(numpy.float32) * scales).reshape(weight.shape)
    return {"weight_packed": words(codes.reshape(weight.shape) + 8, 1), "weight_scale": ("F32", scales[..., 0]),
            "weight_shape": ("I64", numpy.array(weight.shape))}, values


# ---- checkpoints ----

def is_one_of(name, kinds):
    return name.endswith(".weight") and any(k in name for k in kinds) and "norm" not in name


def chosen(language, vision=None, vocabulary=None, but=()):
    """Which method a tensor of the demo model gets; None: it stays as it is."""
    def method(name):
        if name in but:
            return None
        if name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
            return vocabulary
        if name.startswith("language_model."):
            return language if is_one_of(name, LANGUAGE) else None
        return vision if is_one_of(name, VISION) else None
    return method


def make(folder, method, config, where=None, half=False):
    """folder/quantised and folder/floats. `config` is the quantization_config, in the object `where` of config.json;
    half: what is not quantised is kept in float16."""
    stored = read_tensors(daemon.DEMO_MODEL / "model.safetensors")
    names = {name: from_bfloat16(x) for name, (_, x) in stored.items()}
    quantised, floats = {}, {}
    for name, x in names.items():
        as_floats = ("F16", x.astype(numpy.float16)) if half else ("F32", x)
        quantised[name] = floats[name] = as_floats
        if method(name):
            parts, values = method(name)(x)
            del quantised[name]
            base = name.removesuffix("weight")
            quantised |= {base + suffix: tensor for suffix, tensor in parts.items()
                          if suffix != "bias" or base + suffix not in names}
            floats[name] = ("F32", values)
    made = []
    for kind, tensors in (("quantised", quantised), ("floats", floats)):
        to = pathlib.Path(folder) / kind
        shutil.copytree(daemon.DEMO_MODEL, to)
        write_tensors(to / "model.safetensors", tensors)
        made.append(to)
    text = json.loads((daemon.DEMO_MODEL / "config.json").read_text())
    (text[where] if where else text)["quantization_config"] = config
    (made[0] / "config.json").write_text(json.dumps(text))
    return made
