"""GGUF files of random weights in a model's shapes, for llama.cpp's programs beside end_to_end.py.

    python tests/bench/end_to_end_gguf.py FOLDER [--model 1b] [--parts none vision] [--llama-cpp PROGRAMS]

Needs the gguf package. Written are none.gguf, the language part in BF16 (no vocabulary, the programs draw token numbers
of their own), vision.gguf, the vision tower with its projector in BF16, and with it stub.gguf: one layer over a
vocabulary of bytes, since llama-mtmd-cli wants a language model to hand the features to. With --llama-cpp, the folder
of its programs, none.gguf becomes int8.gguf and int4.gguf as its users make them: by llama-quantize to Q8_0 and Q4_0
(named as the daemon's --quantization that they are measured beside; `output` stays at 6 or 8 bits in both).
"""
import argparse
import json
import pathlib
import subprocess

import gguf
import numpy

ROOT = pathlib.Path(__file__).resolve().parents[2]
BF16 = gguf.GGMLQuantizationType.BF16
QUANTIZED = {"int8": "Q8_0", "int4": "Q4_0"}
MARKS = ["<|im_start|>", "<|im_end|>", "<img>", "</img>"]  # of the chat and around pictures
POOL = numpy.random.default_rng(1).standard_normal(1 << 20, dtype=numpy.float32) * 0.02


class File:
    """A GGUF file: keys by `writer`, then tensors, then close()."""

    def __init__(self, path, architecture):
        self.writer = gguf.GGUFWriter(path, architecture)

    def linear(self, name, n, k, bias=True):
        """A matrix [n, k] in BF16, and its bias."""
        values = gguf.quants.quantize(numpy.resize(POOL, (n, k)), BF16)
        self.writer.add_tensor(f"{name}.weight", values, raw_dtype=BF16)
        if bias:
            self.floats(f"{name}.bias", n)

    def floats(self, name, *shape, value=None):
        """float32, random or all `value`."""
        values = numpy.resize(POOL, shape) if value is None else numpy.full(shape, value, numpy.float32)
        self.writer.add_tensor(name, values)

    def layer_norm(self, name, n):
        self.floats(f"{name}.weight", n, value=1)
        self.floats(f"{name}.bias", n)

    def close(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def byte_tokens():
    """The characters that byte-level BPE writes the 256 bytes with."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def write_language(path, c, stub=False):
    """The decoder of text_config `c`; a stub has one layer and words for bytes and marks."""
    out = File(path, "qwen2")
    dim, inner, n_layers = c["hidden_size"], c["intermediate_size"], 1 if stub else c["num_hidden_layers"]
    kv = dim // c["num_attention_heads"] * c["num_key_value_heads"]
    out.writer.add_block_count(n_layers)
    out.writer.add_context_length(c["max_position_embeddings"])
    out.writer.add_embedding_length(dim)
    out.writer.add_feed_forward_length(inner)
    out.writer.add_head_count(c["num_attention_heads"])
    out.writer.add_head_count_kv(c["num_key_value_heads"])
    out.writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    out.writer.add_rope_freq_base(c["rope_theta"])
    if stub:
        words = byte_tokens() + MARKS
        vocab = len(words)
        out.writer.add_tokenizer_model("gpt2")
        out.writer.add_tokenizer_pre("qwen2")
        out.writer.add_token_list(words)
        out.writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(MARKS))
        out.writer.add_token_merges(["a b"])
        out.writer.add_eos_token_id(words.index("<|im_end|>"))
        out.writer.add_add_bos_token(False)
    else:
        vocab = c["vocab_size"]
        out.writer.add_tokenizer_model("none")
    out.writer.add_vocab_size(vocab)
    out.linear("token_embd", vocab, dim, bias=False)
    out.linear("output", vocab, dim, bias=False)
    out.floats("output_norm.weight", dim, value=1)
    for i in range(n_layers):
        out.linear(f"blk.{i}.attn_q", dim, dim)
        out.linear(f"blk.{i}.attn_k", kv, dim)
        out.linear(f"blk.{i}.attn_v", kv, dim)
        out.linear(f"blk.{i}.attn_output", dim, dim, bias=False)
        out.linear(f"blk.{i}.ffn_gate", inner, dim, bias=False)
        out.linear(f"blk.{i}.ffn_up", inner, dim, bias=False)
        out.linear(f"blk.{i}.ffn_down", dim, inner, bias=False)
        out.floats(f"blk.{i}.attn_norm.weight", dim, value=1)
        out.floats(f"blk.{i}.ffn_norm.weight", dim, value=1)
    out.close()


def write_vision(path, config):
    """The vision tower and the projector, 2 x 2 patches a feature."""
    c, text_dim = config["vision_config"], config["text_config"]["hidden_size"]
    dim, inner, side, patch = c["hidden_size"], c["intermediate_size"], c["image_size"][0], c["patch_size"][0]
    out = File(path, "clip")
    out.writer.add_clip_has_vision_encoder(True)
    out.writer.add_clip_projector_type("internvl")
    out.writer.add_vision_embedding_length(dim)
    out.writer.add_vision_feed_forward_length(inner)
    out.writer.add_vision_block_count(c["num_hidden_layers"])
    out.writer.add_vision_head_count(c["num_attention_heads"])
    out.writer.add_vision_projection_dim(text_dim)
    out.writer.add_vision_attention_layernorm_eps(c["layer_norm_eps"])
    out.writer.add_vision_image_size(side)
    out.writer.add_vision_patch_size(patch)
    out.writer.add_vision_image_mean([0.485, 0.456, 0.406])
    out.writer.add_vision_image_std([0.229, 0.224, 0.225])
    out.writer.add_vision_use_gelu(True)
    out.writer.add_vision_projector_scale_factor(2)
    out.writer.add_vision_preproc_min_tiles(1)
    out.writer.add_vision_preproc_max_tiles(12)
    out.floats("v.class_embd", dim)
    out.floats("v.patch_embd.weight", dim, 3, patch, patch)
    out.floats("v.patch_embd.bias", dim)
    out.floats("v.position_embd.weight", (side // patch) ** 2 + 1, dim)
    for i in range(c["num_hidden_layers"]):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            out.linear(f"v.blk.{i}.{name}", dim, dim)
        out.linear(f"v.blk.{i}.ffn_up", inner, dim)
        out.linear(f"v.blk.{i}.ffn_down", dim, inner)
        out.layer_norm(f"v.blk.{i}.ln1", dim)
        out.layer_norm(f"v.blk.{i}.ln2", dim)
        out.floats(f"v.blk.{i}.ls1.weight", dim, value=0.1)
        out.floats(f"v.blk.{i}.ls2.weight", dim, value=0.1)
    out.layer_norm("mm.model.mlp.0", 4 * dim)
    out.linear("mm.model.mlp.1", text_dim, 4 * dim)
    out.linear("mm.model.mlp.3", text_dim, text_dim)
    out.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--model", default="1b")
    parser.add_argument("--parts", nargs="+", default=["none", "vision"], choices=["none", "vision"])
    parser.add_argument("--llama-cpp", type=pathlib.Path)
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((ROOT / f"tests/data/configs/internvl3-{a.model}/config.json").read_text())
    whole = a.folder / "none.gguf"
    if "none" in a.parts:
        write_language(whole, config["text_config"])
    if "vision" in a.parts:
        write_vision(a.folder / "vision.gguf", config)
        write_language(a.folder / "stub.gguf", config["text_config"], stub=True)
    for name, kind in QUANTIZED.items() if a.llama_cpp else ():
        subprocess.run([a.llama_cpp / "llama-quantize", whole, a.folder / f"{name}.gguf", kind], check=True)


if __name__ == "__main__":
    main()
