"""Lookups in quantised tables on a CPU against the float one.

    python benchmarks/bench_embedding.py
    python benchmarks/bench_embedding.py --ids 1,64 --schemes int8_weight

The layers take turns; each turn is so many calls, with other ids each time. Prints medians and
minima in µs, the latter over that of float32, and the bytes of each table over the float one's.
A row of D int8 values moves 5 D + 4 bytes, one of float32 8 D.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import qnn

from harness import Machine

SIZES = ((30522, 384), (50257, 768), (32000, 4096))
IDS = (1, 16, 128, 512, 4096)
SCHEMES = ("int8_weight", "fp8_weight", "nvfp4_weight", "int4_weight")
TURNS, SETS = 15, 8


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ids", default=",".join(map(str, IDS)))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    options = parser.parse_args()
    print(Machine.here())
    for rows, columns in SIZES:
        plain = nn.Embedding(rows, columns)
        layers = {
            "float32": plain,
            **{s: qnn.QEmbedding.from_float(plain, s) for s in options.schemes.split(",")},
        }
        whole = plain.weight.nbytes
        held = {n: sum(p.nbytes for p in layer.parameters()) / whole for n, layer in layers.items()}
        print(f"\n{rows} x {columns}; bytes " + ", ".join(f"{n} {r:.3f}" for n, r in held.items()))
        print("   ids  " + "  ".join(f"{name:>26}" for name in layers))
        for count in map(int, options.ids.split(",")):
            calls = max(1, 256 // count)
            sets = [torch.randint(rows, (count,)) for _ in range(SETS)]
            times: dict[str, list[float]] = {name: [] for name in layers}
            for turn in range(TURNS + 1):
                ids = sets[turn % SETS]
                for name, layer in layers.items():
                    start = time.perf_counter()
                    for _ in range(calls):
                        layer(ids)
                    if turn:  # the first may build and test kernels
                        times[name].append((time.perf_counter() - start) / calls * 1e6)
            least = min(times["float32"])
            cells = (
                f"{statistics.median(t):8.1f} {min(t):8.1f} {min(t) / least:7.2f}x"
                for t in times.values()
            )
            print(f"{count:6}  " + "  ".join(cells))


if __name__ == "__main__":
    main()
