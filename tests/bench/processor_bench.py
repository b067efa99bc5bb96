"""The processor beside Transformers' own, in one run: a 12-tile picture from JPEG bytes to pixel values, and text
to ids.

    python tests/bench/processor_bench.py BUILD [--rounds 15] [--csv FILE]

BUILD holds tests/bench/processor_bench. Needs torch, torchvision, transformers and pillow. The two take turns, each
round one picture; medians are printed, and the ratio. Ours runs on one thread, Transformers' on as many as torch
takes. The vocabulary is Qwen2's where the reference set has it (INTERNVLD_REFERENCE), else the demo model's.
"""
import argparse
import csv
import io
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import time

import numpy
import torch
import transformers
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

ROOT = pathlib.Path(__file__).resolve().parents[2]
TILE = 448
SIZES = [(1792, 1344), (4000, 3000)]  # both become a grid of 4 x 3 and a thumbnail


def picture(width, height):
    """A photograph's statistics, roughly: smooth fields, edges and some noise."""
    random = numpy.random.default_rng(0)
    small = random.integers(0, 256, (height // 50, width // 50, 3), dtype=numpy.uint8)
    smooth = numpy.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC), dtype=numpy.int16)
    noisy = smooth + random.integers(-12, 13, smooth.shape, dtype=numpy.int16)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(numpy.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_checkpoint(folder):
    demo = ROOT / "deploy/demo/model"
    qwen2 = pathlib.Path(os.environ.get("INTERNVLD_REFERENCE", ROOT.parent / "shared/reference")) / "tokenizer/qwen2"
    source = qwen2 if (qwen2 / "tokenizer.json").exists() else demo
    shutil.copy(demo / "chat_template.jinja", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    settings = json.loads((demo / "preprocessor_config.json").read_text())
    settings.update(size={"height": TILE, "width": TILE}, min_patches=1, max_patches=12, crop_to_patches=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 256}))
    return source


def reference_ms(processor, jpeg):
    start = time.perf_counter()
    image = decode_image(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), ImageReadMode.RGB)
    values = processor(image, return_tensors="pt")["pixel_values"]
    return (time.perf_counter() - start) * 1e3, values.shape[0]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("build")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--csv")
    a = arguments.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp())
    rows = []
    try:
        vocabulary = make_checkpoint(folder)
        text = "".join(p.read_text() for folder in ("daemon", "parallel", "kernels", "client", "tests")
                       for p in sorted((ROOT / folder).glob("**/*.[ch]")))
        (folder / "text").write_text(text)
        reference = transformers.AutoImageProcessor.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        print(f"{type(reference).__name__} of transformers {transformers.__version__}, torch "
              f"{torch.__version__} with {torch.get_num_threads()} threads; vocabulary of {vocabulary.name}, "
              f"{len(text.encode()) / 1e6:.2f} MB of text")
        for size in SIZES:
            jpeg = picture(*size)
            (folder / "picture").write_bytes(jpeg)
            ours, theirs, speeds = [], [], []
            for i in range(a.rounds + 2):
                out = subprocess.run([f"{a.build}/tests/bench/processor_bench", folder, folder / "picture",
                                      folder / "text", "2"], check=True, capture_output=True, text=True).stdout
                line = json.loads(out.splitlines()[-1])  # the first round warms up
                ms, tiles = reference_ms(reference, jpeg)
                assert tiles == line["tiles"] == 13, (tiles, line)
                if i >= 2:
                    ours.append(line["tiles_ms"] + line["patches_ms"])
                    theirs.append(ms)
                    speeds.append(line["text_mb_per_s"])
            start = time.perf_counter()
            tokenizer.encode(text)
            their_speed = len(text.encode()) / 1e6 / (time.perf_counter() - start)
            rows.append({"picture": f"{size[0]}x{size[1]}", "jpeg_bytes": len(jpeg),
                         "internvld_ms": round(statistics.median(ours), 1),
                         "transformers_ms": round(statistics.median(theirs), 1),
                         "ratio": round(statistics.median(theirs) / statistics.median(ours), 2),
                         "tokenizer_mb_per_s": round(statistics.median(speeds), 1),
                         "transformers_tokenizer_mb_per_s": round(their_speed, 1)})
            print(rows[-1])
    finally:
        shutil.rmtree(folder)
    if a.csv:
        with open(a.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
