"""What emulated GPUs are asked for, as tests/cuda_emulation/runtime.cc counts it (struct usage)."""

import os
import pathlib
import struct
import typing


class Usage(typing.NamedTuple):
    n_bytes: int  # allocated now
    peak: int
    n_allocations: int
    n_uploads: int
    downloaded: int  # bytes


def count_in(folder):
    """Processes started from now on count there."""
    os.environ["INTERNVLD_EMULATION_MEMORY"] = str(folder)


def usage(folder, ranks):
    """{rank: Usage} of the ranks {rank: pid} that have asked for any."""
    files = {rank: pathlib.Path(folder) / str(pid) for rank, pid in ranks.items()}
    return {rank: Usage(*struct.unpack("QQQQQ", file.read_bytes())) for rank, file in files.items() if file.exists()}
