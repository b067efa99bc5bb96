"""Beam searches of Transformers over the reference checkpoints: goldens/NAME/beam.json.

    python tests/data/reference/make_beam.py [NAME...]      needs torch and transformers; float32 on the CPU

The prompts are those of goldens/NAME/generate.json. The result is exact but for the last bits of the scores.
"""
import json
import pathlib
import sys

import torch
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

HERE = pathlib.Path(__file__).resolve().parent
SETTINGS = [
    {"num_beams": 2},
    {"num_beams": 3, "num_return_sequences": 3},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 2.0, "stop": 1},
    {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True, "stop": 2},
    {"num_beams": 5, "num_return_sequences": 3, "early_stopping": "never", "stop": 1},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "early_stopping": "never", "stop": 2},
    {"num_beams": 4, "num_return_sequences": 4, "repetition_penalty": 1.3, "stop": 1},
    {"num_beams": 3, "num_return_sequences": 3, "min_new_tokens": 6, "stop": 2},
    {"num_beams": 8, "num_return_sequences": 8},
]
MAX_NEW_TOKENS = 14


def main():
    for name in sys.argv[1:] or ("ln-1b-style", "rms-78b-style"):
        model = InternVLForConditionalGeneration.from_pretrained(HERE / "checkpoints" / name, dtype=torch.float32,
                                                                 attn_implementation="eager").eval()
        records = json.loads((HERE / "goldens" / name / "generate.json").read_text())
        pixels = load_file(HERE / "goldens" / name / "vision.safetensors")["pixel_values"].float()
        config = model.config
        eos = model.generation_config.eos_token_id
        out = []
        for record_name in ("image", "text_only"):
            record = records[record_name]
            ids = torch.tensor(record["input_ids"])
            n_tiles = int((ids == config.image_token_id).sum()) // config.image_seq_length
            inputs = {"input_ids": ids, "attention_mask": torch.tensor(record["attention_mask"])}
            if n_tiles:
                inputs["pixel_values"] = pixels[:n_tiles]
            first = None
            for settings in SETTINGS:
                settings = dict(settings)
                # Random weights never end by themselves: tokens of the first search are made end tokens.
                stops = [first["sequences"][0][3 + 2 * i] for i in range(settings.pop("stop", 0))]
                end = [eos] if isinstance(eos, int) else list(eos)
                result = model.generate(**inputs, **settings, do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
                                        eos_token_id=end + stops, pad_token_id=0, output_scores=True,
                                        return_dict_in_generate=True)
                sequences = []
                for row, beams in zip(result.sequences[:, ids.shape[1]:].tolist(), result.beam_indices.tolist()):
                    sequences.append(row[:sum(b >= 0 for b in beams)])
                out.append({"record": record_name, "settings": settings, "stop_token_ids": stops,
                            "max_tokens": MAX_NEW_TOKENS, "sequences": sequences,
                            "scores": result.sequences_scores.tolist()})
                first = first or out[-1]
                print(name, record_name, settings, stops, [len(s) for s in sequences], result.sequences_scores.tolist())
        (HERE / "goldens" / name / "beam.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
