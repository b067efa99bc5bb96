"""Checkpoints that Transformers itself quantised and saved by bitsandbytes, served, against its own logits in float32.

The demo model is loaded with each BitsAndBytesConfig, saved, and asked a question of text: rows of its vision tower's
weights have 160 columns, which bitsandbytes' kernel for AVX-512 takes wrong scales of (0.50.2). 4 bits: equal to 1e-3.
LLM.int8() rounds its inputs to 8 bits too, which the daemon does not: equal to 0.5, the best token where it leads.
Skipped (status 77) where one of the packages is missing.
"""

import importlib.util
import logging
import pathlib
import shutil
import sys
import tempfile

import numpy

import daemon
from support import SANITIZED, Client, chat

SKIPPED = 77
NEEDED = ("torch", "transformers", "bitsandbytes", "accelerate")
QUESTION = "What is the opposite of old?"
OF_PROCESSOR = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
CASES = {
    "nf4, nested scales": (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), 1e-3),
    "fp4": (dict(load_in_4bit=True), 1e-3),
    "LLM.int8()": (dict(load_in_8bit=True), 0.5),
}


def save(folder, arguments):
    """The quantised demo model in `folder`; its logits [tokens, vocabulary] for QUESTION."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.BitsAndBytesConfig(**arguments)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        daemon.DEMO_MODEL, quantization_config=config, device_map="cpu", dtype=torch.float32)
    model.save_pretrained(folder)
    for name in OF_PROCESSOR:
        shutil.copy(daemon.DEMO_MODEL / name, folder)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else it computes in bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(daemon.DEMO_MODEL)
    text = tokenizer.apply_chat_template([dict(role="user", content=QUESTION)], tokenize=False,
                                         add_generation_prompt=True)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0].float().numpy()


def main():
    missing = [x for x in NEEDED if importlib.util.find_spec(x) is None]
    if missing or SANITIZED:
        print(f"skipped: {f'python module {missing[0]} is not installed' if missing else 'the release build runs it'}")
        return SKIPPED
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    n_failures = 0
    for name, (arguments, limit) in CASES.items():
        with tempfile.TemporaryDirectory(prefix="internvld-saved-") as folder:
            theirs = save(pathlib.Path(folder), arguments)
            with daemon.Daemon(model=folder, dtype="float32", tensor=2) as d:
                client = Client(d.address)
                ours = client.forward(chat(QUESTION), ["logits"])[0]["logits"]
                client.close()
        error = float(numpy.abs(ours - theirs).max())
        good = ours.shape == theirs.shape and error <= limit and ours[-1].argmax() == theirs[-1].argmax()
        n_failures += not good
        print(f"  {name}: largest error of a logit {error:.3g} (largest logit {theirs.max():.3g}, at most {limit:g})"
              f"{'' if good else '  FAILED'}", flush=True)
    return 1 if n_failures else 0


if __name__ == "__main__":
    sys.exit(main())
