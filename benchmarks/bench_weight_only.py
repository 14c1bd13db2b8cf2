"""Layers over a quantised weight on a CPU, activations as they are, against bfloat16 `nn.Linear`.

    python benchmarks/bench_weight_only.py

The layers take turns, one call each, so that every weight comes from memory: together they are
larger than a last-level cache of 64 MB. Prints a table of medians in ms.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import qnn

from harness import Machine

SIZE = 4096
ROWS = {1: 60, 8: 60, 64: 15, 512: 7}  # rows of x, and rounds
SCHEMES = ("int8_weight", "fp8_weight", "nvfp4_weight", "fp8", "nvfp4")


@torch.no_grad()
def main() -> None:
    print(Machine.here())
    plain = nn.Linear(SIZE, SIZE, dtype=torch.bfloat16)
    layers = {"bfloat16": plain, **{s: qnn.QLinear.from_float(plain, s) for s in SCHEMES}}
    print("rows  " + "  ".join(f"{name:>12}" for name in layers))
    for rows, rounds in ROWS.items():
        x = torch.randn(rows, SIZE, dtype=torch.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in layers}
        for turn in range(rounds + 1):
            for name, layer in layers.items():
                start = time.perf_counter()
                layer(x)
                if turn:  # the first may build and test kernels
                    times[name].append(time.perf_counter() - start)
        cells = (f"{statistics.median(each) * 1e3:12.2f}" for each in times.values())
        print(f"{rows:4}  " + "  ".join(cells))


if __name__ == "__main__":
    main()
