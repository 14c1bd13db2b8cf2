"""What the machine can do at most: int8 operations on registers, bytes read from cache and memory.

    python benchmarks/peaks.py

builds peaks.cpp with the compiler that also builds qnn's kernels, runs it and prints its figures.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qnn.kernels.cpu.toolchain import NoCompilerError, find_compiler

SOURCE = Path(__file__).with_name("peaks.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-pthread")
# Together they stay in the last-level cache of most servers.
CACHE_BYTES = 16_000_000


@dataclass(frozen=True)
class Peaks:
    """Operations a second by instruction set, bytes a second by bytes read; or why there are none.

    The names of the instruction sets are those of qnn's tiers.
    """

    int8: Mapping[str, float] = field(default_factory=dict)
    read: Mapping[int, float] = field(default_factory=dict)
    missing: str = ""


def last_level_cache() -> int:
    """Bytes of the largest cache that the first CPU sees; 32 MB where Linux does not say."""
    sizes = [
        int(found[1]) * {"K": 1 << 10, "M": 1 << 20}[found[2]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (found := re.fullmatch(r"(\d+)([KM])", path.read_text().strip()))
    ]
    return max(sizes, default=32 << 20)


def memory_bytes() -> int:
    """A working set of which next to nothing stays in the caches from one pass to the next."""
    return max(400_000_000, 4 * last_level_cache())


def measure_peaks(threads: int, read: Sequence[int]) -> Peaks:
    """Build peaks.cpp and run it with working sets of `read` bytes; takes about 10 s."""
    with tempfile.TemporaryDirectory(prefix="qnn-peaks-") as folder:
        program = Path(folder) / "peaks"
        try:
            build = [*find_compiler().command, *FLAGS, SOURCE, "-o", program]
            subprocess.run(build, check=True, capture_output=True, text=True)
            done = subprocess.run(
                [program, str(threads), *map(str, read)], check=True, capture_output=True, text=True
            )
        except NoCompilerError as error:
            return Peaks(missing=str(error))
        except subprocess.CalledProcessError as error:
            first = next(iter(error.stderr.splitlines()), f"exit status {error.returncode}")
            return Peaks(missing=f"peaks.cpp: {first.replace(folder, '')}")
    lines = [line.split() for line in done.stdout.splitlines()]
    return Peaks(
        {name: float(rate) for kind, name, rate in lines if kind == "int8"},
        {int(size): float(rate) for kind, size, rate in lines if kind == "read"},
    )


if __name__ == "__main__":
    found = measure_peaks(torch.get_num_threads(), (CACHE_BYTES, memory_bytes()))
    for name, rate in found.int8.items():
        print(f"int8 on registers, {name}: {rate / 1e12:.3f} TOPS")
    for size, rate in found.read.items():
        print(f"reading {size / 1e6:.0f} MB: {rate / 1e9:.1f} GB/s")
    sys.exit(found.missing)
