"""Files that tests and benches make or take apart: pictures, tensors, model directories without weights."""

import json
import shutil
import struct
import zlib

import numpy

KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "U8": "u1", "I8": "i1", "BOOL": "?",
         "F8_E4M3": "u1"}
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def png(width, height, rows):
    """A PNG file that says it has width x height RGB pixels; rows: its filtered rows, all or not."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


# ---- safetensors ----

def read_tensors(path):
    """{name: (safetensors' type, array)}; bfloat16 as the 16 bits it is."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    out = {}
    for name, x in json.loads(raw[8:8 + n]).items():
        if name != "__metadata__":
            start, end = x["data_offsets"]
            array = numpy.frombuffer(raw[8 + n + start:8 + n + end], KINDS[x["dtype"]])
            out[name] = x["dtype"], array.reshape(x["shape"])
    return out


def from_bfloat16(bits):
    """The values as float32."""
    return (bits.astype("<u4") << 16).view("<f4")


def write_tensors(path, tensors):
    header, at = {}, 0
    for name, (kind, x) in tensors.items():
        header[name] = dict(dtype=kind, shape=list(x.shape), data_offsets=[at, at + x.nbytes])
        at += x.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text +
                     b"".join(numpy.ascontiguousarray(x).tobytes() for _, x in tensors.values()))


# ---- models ----

def write_model(folder, base, config, side=None, max_patches=None):
    """The files of the model `base`, but no weights, around `config`: for --load-format dummy. side: pixels of a tile
    and max_patches: tiles of a picture, where they are not the base's."""
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config))
    for name in PROCESSORS:
        whole = json.loads((folder / name).read_text())
        for part in (whole, whole.get("image_processor", {}), whole.get("video_processor", {})):
            if side and "size" in part:
                part["size"] = {"height": side, "width": side}
            if max_patches and "max_patches" in part:
                part["max_patches"] = max_patches
        if "image_seq_length" in whole:
            whole["image_seq_length"] = config["image_seq_length"]
        (folder / name).write_text(json.dumps(whole))
