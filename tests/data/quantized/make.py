"""bitsandbytes.safetensors: small weights, and what bitsandbytes makes of them.

    make.py [OUT]        OUT: another file; --check: compare with the file that is there

For each case: NAME.weight float32, NAME.values float32: what quantize_4bit(weight, blocksize 64) keeps, by the default
back end's dequantize_4bit. (The AVX-512 one of 0.50.2 takes wrong scales where groups run over the ends of rows.)
Skipped (status 77) where PyTorch, safetensors or bitsandbytes is missing.
"""

import importlib.util
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
FILE = HERE / "bitsandbytes.safetensors"
SKIPPED = 77
SHAPES = {"even": (5, 128), "across_rows": (7, 80), "odd_rest": (3, 50)}  # columns: whole groups, across rows, a rest


def make():
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


def main():
    missing = [x for x in ("torch", "safetensors", "bitsandbytes") if importlib.util.find_spec(x) is None]
    if missing:
        print(f"skipped: python module {missing[0]} is not installed")
        return SKIPPED
    from safetensors import torch as files

    tensors = make()
    if "--check" not in sys.argv:
        files.save_file(tensors, sys.argv[1] if len(sys.argv) > 1 else FILE)
        return 0
    there = files.load_file(FILE)
    different = [n for n in tensors.keys() | there.keys() if n not in there or n not in tensors
                 or not tensors[n].equal(there[n])]
    print(f"{len(tensors)} tensors made, different from the recorded ones: {different or 'none'}")
    return 1 if different else 0


sys.exit(main())
