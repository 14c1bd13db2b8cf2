"""Decoding on a CPU: one query over the keys and values of a cache in int8, against torch's
attention over a cache in float32 and in bfloat16.

    python benchmarks/bench_kv_cache.py
    python benchmarks/bench_kv_cache.py --keys 512 --layers 1

Layers take turns, one call each, as in a model, so that a cache of several comes from the
last-level cache or from memory; with one layer a small one stays in the second-level cache. Each
writes a token to its place and attends. Prints medians in µs of a layer's call, and how many times
as fast `int8` is, with a query in the same dtype.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as TF

import qnn

from harness import Machine

# Heads of queries, of keys, and columns.
SHAPES = ((8, 8, 64), (8, 8, 128), (32, 8, 64), (32, 8, 128))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def calls(
    heads: int, of_keys: int, columns: int, keys: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """One layer, a call a variant."""
    k, v = (torch.randn(1, of_keys, keys, columns) for _ in range(2))
    cache = qnn.Int8KVCache(1, keys, of_keys, columns)
    cache.update(k, v)
    made: dict[str, Callable[[], torch.Tensor]] = {}
    for name, dtype in DTYPES.items():
        q, token = (torch.randn(1, n, 1, columns, dtype=dtype) for n in (heads, of_keys))
        floats = k.to(dtype), v.to(dtype)

        def torchs(
            q: torch.Tensor = q,
            token: torch.Tensor = token,
            floats: tuple[torch.Tensor, ...] = floats,
        ) -> torch.Tensor:
            for each in floats:
                each[:, :, keys - 1 :] = token
            return TF.scaled_dot_product_attention(q, *floats, enable_gqa=heads != of_keys)

        def ours(q: torch.Tensor = q, token: torch.Tensor = token) -> torch.Tensor:
            return cache(q, token, token)

        made[f"torch {name}"], made[f"int8, {name} query"] = torchs, ours
    made["before"] = lambda: cache.length.fill_(keys - 1)
    return made


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keys", default="512,4096")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    print(Machine.here(), f"{torch.get_num_threads()} threads, {options.layers} layers")
    for heads, of_keys, columns in SHAPES:
        for keys in map(int, options.keys.split(",")):
            layers = [calls(heads, of_keys, columns, keys) for _ in range(options.layers)]
            before = [layer.pop("before") for layer in layers]
            times: dict[str, list[float]] = {name: [] for name in layers[0]}
            end, turn = time.perf_counter() + options.seconds, 0
            while turn < 4 or time.perf_counter() < end:
                for name in times:  # all layers of a variant, as a model's step has them
                    for layer, make_room in zip(layers, before, strict=True):
                        make_room()
                        start = time.perf_counter()
                        layer[name]()
                        if turn:  # the first may build and test kernels
                            times[name].append(time.perf_counter() - start)
                turn += 1
            medians = {name: statistics.median(each) * 1e6 for name, each in times.items()}
            cells = "  ".join(f"{name} {each:.0f}" for name, each in medians.items())
            factors = "  ".join(
                f"{name} {medians[f'torch {name}'] / medians[f'int8, {name} query']:.2f}"
                for name in DTYPES
            )
            print(f"{heads}/{of_keys} x {columns}, {keys} keys: {cells}; times as fast: {factors}")


if __name__ == "__main__":
    main()
