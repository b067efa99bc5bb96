"""The rows of a batch generated one at a time by Transformers: goldens/t-rope-dynamic-short/rows.json.

    python tests/data/reference/make_rows.py REFERENCE      needs torch and transformers; float32 on the CPU

REFERENCE is the larger set that has the checkpoint. Dynamic rope past the original length takes the length of the
batch's longest row, so a row's recorded answer is not its own; here every row runs by itself, without padding.
"""
import hashlib
import json
import pathlib
import sys

import torch
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

HERE = pathlib.Path(__file__).resolve().parent
NAME = "t-rope-dynamic-short"


def main():
    folder = pathlib.Path(sys.argv[1])
    model = InternVLForConditionalGeneration.from_pretrained(folder / "checkpoints" / NAME, dtype=torch.float32,
                                                             attn_implementation="eager").eval()
    record = json.loads((folder / "goldens" / NAME / "generate.json").read_text())["batch"]
    pixels = load_file(folder / "goldens" / NAME / "vision.safetensors")["pixel_values"].float()
    weights = hashlib.sha256((folder / "checkpoints" / NAME / "model.safetensors").read_bytes()).hexdigest()
    first_tile, rows = 0, []
    for row, padded in enumerate(record["input_ids"]):
        ids = [x for x, keep in zip(padded, record["attention_mask"][row]) if keep]
        n_tiles = ids.count(model.config.image_token_id) // model.config.image_seq_length
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        if n_tiles:
            inputs["pixel_values"] = pixels[first_tile:first_tile + n_tiles]
        first_tile += n_tiles
        out = model.generate(**inputs, do_sample=False, max_new_tokens=len(record["fp32"][row]["ids"]),
                             output_scores=True, return_dict_in_generate=True)
        best = [x[0].topk(2).values for x in out.scores]
        rows.append({"ids": out.sequences[0, len(ids):].tolist(),
                     "margins": [round(float(x[0] - x[1]), 6) for x in best]})
        print(row, rows[-1]["ids"] == record["fp32"][row]["ids"], rows[-1])
    to = HERE / "goldens" / NAME
    to.mkdir(exist_ok=True)
    (to / "rows.json").write_text(json.dumps({"model_sha256": weights, "batch": rows}) + "\n")


if __name__ == "__main__":
    main()
