"""What the formats' own libraries make of small weights; tests read the files, not the libraries.

    make.py            writes both files beside this one
    make.py --check    makes them again and compares with the files that are there

bitsandbytes.safetensors, quantising at load: for each case NAME.weight float32, NAME.values float32, what
quantize_4bit(weight, blocksize 64) keeps, by the default back end's dequantize_4bit. (The AVX-512 one of 0.50.2 takes
wrong scales where groups run over the ends of rows.)

stored.safetensors, quantised checkpoints: for each case the tensors under the names that a checkpoint gives them, and
NAME.values float32. Those of bitsandbytes and compressed-tensors are written and read back by these libraries, with
float32 as the type of the result. AWQ's and GPTQ's libraries want a GPU: packed_awq() and packed_gptq() below say in
numpy what their files hold.

Skipped (status 77) where PyTorch, safetensors, bitsandbytes or compressed_tensors is missing.
"""

import importlib.util
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
SKIPPED = 77
SHAPES = {"even": (5, 128), "across_rows": (7, 80), "odd_rest": (3, 50)}  # columns: whole groups, across rows, a rest
OUT, IN, GROUP = 16, 48, 16
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds column AWQ_ORDER[i] of eight


def at_load():
    import torch
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as dequantize

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for kind in ("nf4", "fp4"):
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator) * 0.05
            weight[0, :4] = torch.tensor([0.0, -0.0, 0.2, -0.2])
            codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
            tensors[f"{kind}.{name}.weight"] = weight
            values = dequantize(codes.reshape(-1), state.absmax, state.code, 64, shape, torch.float32)
            tensors[f"{kind}.{name}.values"] = values.reshape(shape).contiguous()
    return tensors


# ---- AWQ and GPTQ, by the description of their files ----

def words(codes, bits, axis, order=None):
    """int32: 32 / bits codes along `axis`, the first (or order's first) in the lowest bits."""
    import numpy

    n = 32 // bits
    codes = numpy.moveaxis(codes, axis, -1)
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // n, n).astype(numpy.uint32)
    packed = sum(codes[..., (order or range(n))[i]] << (bits * i) for i in range(n))
    return numpy.moveaxis(packed.astype(numpy.uint32), -1, axis).copy().view(numpy.int32)


def drawn(draw, bits, n_groups):
    import numpy

    codes = draw.integers(0, 2**bits, (IN, OUT))
    zeros = draw.integers(0, 2**bits, (n_groups, OUT))
    scales = (draw.random((n_groups, OUT)) * 0.01 + 0.001).astype(numpy.float16)
    return codes, zeros, scales


def values_of(codes, zeros, scales, groups):
    """[OUT, IN] float32."""
    import numpy

    return ((codes - zeros[groups]).astype(numpy.float32) * scales[groups].astype(numpy.float32)).T.copy()


def packed_awq(draw, group_size):
    import numpy

    codes, zeros, scales = drawn(draw, 4, IN // group_size)
    return {"qweight": words(codes, 4, 1, AWQ_ORDER), "qzeros": words(zeros, 4, 1, AWQ_ORDER), "scales": scales,
            "values": values_of(codes, zeros, scales, numpy.arange(IN) // group_size)}


def packed_gptq(draw, bits, is_first_format, is_ordered):
    import numpy

    codes, zeros, scales = drawn(draw, bits, IN // GROUP)
    groups = numpy.arange(IN) // GROUP
    if is_ordered:
        groups = draw.permutation(groups)
    stored = (zeros - is_first_format) % 2**bits
    return {"qweight": words(codes, bits, 0), "qzeros": words(stored, bits, 1), "scales": scales,
            "g_idx": groups.astype(numpy.int32), "values": values_of(codes, zeros, scales, groups)}


# ---- by the libraries ----

def saved_by_bitsandbytes(kind, is_nested, generator):
    import torch
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as dequantize

    shape = (264, 64) if is_nested else (5, 80)
    weight = torch.randn(shape, generator=generator) * 0.05
    codes, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=is_nested)
    tensors = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()} | {"weight": codes}
    absmax = state.absmax
    if is_nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = dequantize(codes.reshape(-1), absmax, state.code, 64, shape, torch.float32).reshape(shape)
    return tensors | {"values": values[:9].contiguous()}  # of a large one the first rows


def saved_by_llm_int8(generator):
    import torch
    from bitsandbytes import functional

    weight = (torch.randn((OUT, IN), generator=generator) * 0.05).half()
    codes, scales, _ = functional.int8_vectorwise_quant(weight)
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8),
            "values": functional.int8_vectorwise_dequant(codes, scales)}


def saved_by_compressed_tensors(generator, packed=False, ordered=False, **arguments):
    import torch
    from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    args = scheme.weights
    weight = torch.randn((OUT, IN), generator=generator) * 0.05
    parts = {"tensor": lambda x: x.reshape(1, -1), "channel": lambda x: x,
             "group": lambda x: x.reshape(OUT, IN // GROUP, GROUP)}[args.strategy](weight)
    if ordered:
        groups = torch.randperm(IN, generator=generator) // GROUP
        parts = torch.stack([weight[:, groups == g] for g in range(IN // GROUP)], 1)
    low, high = parts.amin(-1, keepdim=args.strategy == "channel"), parts.amax(-1, keepdim=args.strategy == "channel")
    scale, zero = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale.bfloat16().float(), "weight_zero_point": zero}
    if ordered:
        state["weight_g_idx"] = groups.int()
    compressor = PackedQuantizationCompressor if packed else IntQuantizationCompressor
    if ordered:  # quantised in the order of groups, stored in that of columns
        order = torch.argsort(groups, stable=True)
        state["weight"] = weight[:, order]
        kept = compressor.compress({k: v for k, v in state.items() if k != "weight_g_idx"}, scheme)
        values = compressor.decompress(kept, scheme)["weight"][:, torch.argsort(order)]
        state["weight"] = values
        kept = recompressed(state, scheme, groups)
    else:
        kept = compressor.compress(state, scheme)
        values = compressor.decompress(kept, scheme)["weight"]
    return {**kept, "weight_scale": kept["weight_scale"].bfloat16(), "values": values}


def recompressed(state, scheme, groups):
    """Codes of values that are on their groups' grids, packed by the library."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.round(state["weight"] / state["weight_scale"][:, groups]).to(torch.int8)
    return {"weight_packed": pack_to_int32(codes, scheme.weights.num_bits), "weight_g_idx": groups.int(),
            "weight_scale": state["weight_scale"], "weight_shape": torch.tensor(codes.shape)}


def stored():
    import numpy
    import torch

    generator, draw = torch.Generator().manual_seed(2), numpy.random.default_rng(3)
    int4, int8 = dict(num_bits=4, type="int"), dict(num_bits=8, type="int")
    fp8 = dict(num_bits=8, type="float")
    cases = {
        "awq.groups": packed_awq(draw, GROUP), "awq.rows": packed_awq(draw, IN),
        "gptq.v1": packed_gptq(draw, 4, True, False), "gptq.v2": packed_gptq(draw, 4, False, False),
        "gptq.order": packed_gptq(draw, 4, True, True), "gptq.bits8": packed_gptq(draw, 8, True, False),
        "bnb.nf4": saved_by_bitsandbytes("nf4", False, generator),
        "bnb.fp4": saved_by_bitsandbytes("fp4", False, generator),
        "bnb.nested": saved_by_bitsandbytes("nf4", True, generator),
        "bnb.int8": saved_by_llm_int8(generator),
        "ct.fp8_tensor": saved_by_compressed_tensors(generator, **fp8, strategy="tensor"),
        "ct.fp8_channel": saved_by_compressed_tensors(generator, **fp8, strategy="channel"),
        "ct.int8": saved_by_compressed_tensors(generator, **int8, strategy="channel"),
        "ct.int8_zeros": saved_by_compressed_tensors(generator, **int8, strategy="channel", symmetric=False),
        "ct.packed8": saved_by_compressed_tensors(generator, True, **int8, strategy="channel"),
        "ct.packed4": saved_by_compressed_tensors(generator, True, **int4, strategy="group", group_size=GROUP),
        "ct.packed4_zeros": saved_by_compressed_tensors(generator, True, **int4, strategy="group", group_size=GROUP,
                                                        symmetric=False),
        "ct.packed4_rows": saved_by_compressed_tensors(generator, True, **int4, strategy="channel", symmetric=False),
        "ct.packed4_order": saved_by_compressed_tensors(generator, True, True, **int4, strategy="group",
                                                        group_size=GROUP),
    }
    return {f"{case}.{name}": torch.as_tensor(x).contiguous() for case, parts in cases.items()
            for name, x in parts.items()}


FILES = {"bitsandbytes.safetensors": at_load, "stored.safetensors": stored}


def different(path, tensors):
    from safetensors import torch as files

    there = files.load_file(path)
    return [n for n in tensors.keys() | there.keys() if n not in there or n not in tensors or
            tensors[n].dtype != there[n].dtype or not tensors[n].float().equal(there[n].float())]


def main():
    needed = ("torch", "safetensors", "bitsandbytes", "compressed_tensors")
    missing = [x for x in needed if importlib.util.find_spec(x) is None]
    if missing:
        print(f"skipped: python module {missing[0]} is not installed")
        return SKIPPED
    from safetensors import torch as files

    n_different = 0
    for name, make in FILES.items():
        tensors = make()
        if "--check" not in sys.argv:
            files.save_file(tensors, HERE / name)
            continue
        others = different(HERE / name, tensors)
        n_different += len(others)
        print(f"{name}: {len(tensors)} tensors made, different from the recorded ones: {others or 'none'}")
    return 1 if n_different else 0


sys.exit(main())
