"""A GGUF file of random weights in the shapes of a model's language part, for llama-bench beside end_to_end.py.

    python tests/bench/end_to_end_gguf.py FILE [--model 1b] [--type bf16|q8_0|q4_0]

Needs the gguf package. The file has no vocabulary; llama-bench draws its own token numbers.
"""
import argparse
import json
import pathlib

import gguf
import numpy

ROOT = pathlib.Path(__file__).resolve().parents[2]
TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0,
         "q4_0": gguf.GGMLQuantizationType.Q4_0}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--model", default="1b")
    parser.add_argument("--type", default="bf16", choices=list(TYPES))
    a = parser.parse_args()
    c = json.loads((ROOT / f"tests/data/configs/internvl3-{a.model}/config.json").read_text())["text_config"]
    dim, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = dim // c["num_attention_heads"] * c["num_key_value_heads"]
    random = numpy.random.default_rng(1)
    pool = random.standard_normal(1 << 20, dtype=numpy.float32) * 0.02
    writer = gguf.GGUFWriter(a.file, "qwen2")
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")

    def matrix(name, n, k):
        values = numpy.resize(pool, (n, k))
        writer.add_tensor(name, gguf.quants.quantize(values, TYPES[a.type]), raw_dtype=TYPES[a.type])

    def vector(name, n, value=None):
        writer.add_tensor(name, pool[:n].copy() if value is None else numpy.full(n, value, numpy.float32))

    matrix("token_embd.weight", vocab, dim)
    matrix("output.weight", vocab, dim)
    vector("output_norm.weight", dim, 1)
    for i in range(c["num_hidden_layers"]):
        for name, n in (("attn_q", dim), ("attn_k", kv), ("attn_v", kv)):
            matrix(f"blk.{i}.{name}.weight", n, dim)
            vector(f"blk.{i}.{name}.bias", n)
        matrix(f"blk.{i}.attn_output.weight", dim, dim)
        matrix(f"blk.{i}.ffn_gate.weight", inner, dim)
        matrix(f"blk.{i}.ffn_up.weight", inner, dim)
        matrix(f"blk.{i}.ffn_down.weight", dim, inner)
        vector(f"blk.{i}.attn_norm.weight", dim, 1)
        vector(f"blk.{i}.ffn_norm.weight", dim, 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
