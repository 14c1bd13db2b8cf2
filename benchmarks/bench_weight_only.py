"""Layers over a quantised weight on a CPU, activations as they are, against bfloat16 and float32
`nn.Linear` and torchao's int4.

    python benchmarks/bench_weight_only.py
    python benchmarks/bench_weight_only.py --rows 1 --schemes int8_weight,int4_weight
    python benchmarks/bench_weight_only.py --sizes 768x768 --rows 16,64 --tier avx512_vnni

`--tier` adds `int8_weight` by the kernels of one tier, beside those that qnn has chosen.

The layers take turns, one call each, so that every weight comes from memory: together they are
larger than a last-level cache of 64 MB. Prints a table of medians in ms for each size.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import qnn

from harness import Machine

SIZES = "4096x4096,4096x14336"  # in and out features
ROWS = {1: 60, 8: 60, 64: 15, 512: 7}  # rows of x, and rounds
SCHEMES = (
    "int8_weight", "fp8_weight", "nvfp4_weight", "int4_weight", "int4_weight_asym_g32", "fp8",
    "nvfp4",
)  # fmt: skip


def torchao_int4(plain: nn.Linear) -> dict[str, nn.Module]:
    """The one layout of int4 that torchao has on a CPU, groups of 128 as of `int4_weight`: its
    `Int4OpaqueTensor`, over torch's own kernel. The layouts of `Int4WeightOnlyConfig` refuse a CPU.
    """
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig as Config
        from torchao.quantization import quantize_
    except ImportError as error:
        print(f"without torchao's int4: {error}")
        return {}
    model = nn.Sequential(nn.Linear(plain.in_features, plain.out_features, dtype=torch.bfloat16))
    model.load_state_dict({f"0.{name}": tensor for name, tensor in plain.state_dict().items()})
    quantize_(model, Config(group_size=128))
    return {"torchao int4": model}


class ByTier(nn.Module):
    """`int8_weight` by the kernels of a tier that is named."""

    def __init__(self, layer: qnn.QLinear, tier: str) -> None:
        super().__init__()
        self.state, self.tier = layer.state_dict(), tier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.state[name] for name in ("weight", "weight_scale", "bias"))
        return torch.ops.qnn.cpu_linear(x, *parts, None, "none", "int8_weight", self.tier)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--sizes", default=SIZES, help="in x out features, and commas")
    parser.add_argument("--tier", help="of the C++ kernels, such as avx512_vnni")
    options = parser.parse_args()
    print(Machine.here())
    for columns, out in (map(int, size.split("x")) for size in options.sizes.split(",")):
        plain = nn.Linear(columns, out, dtype=torch.bfloat16)
        layers = {
            "bfloat16": plain,
            "float32": nn.Linear(columns, out),
            **{s: qnn.QLinear.from_float(plain, s) for s in options.schemes.split(",")},
            **torchao_int4(plain),
        }
        if options.tier:
            layers[options.tier] = ByTier(
                qnn.QLinear.from_float(plain, "int8_weight"), options.tier
            )
        print(f"\n{columns} x {out}\nrows  " + "  ".join(f"{name:>12}" for name in layers))
        for rows in map(int, options.rows.split(",")):
            x = torch.randn(rows, columns, dtype=torch.bfloat16)
            times: dict[str, list[float]] = {name: [] for name in layers}
            for turn in range(ROWS.get(rows, 15) + 1):
                for name, layer in layers.items():
                    given = x.float() if name == "float32" else x
                    start = time.perf_counter()
                    layer(given)
                    if turn:  # the first may build and test kernels
                        times[name].append(time.perf_counter() - start)
            cells = (
                f"{statistics.median(each) * 1e3:>{max(12, len(name))}.2f}"
                for name, each in times.items()
            )
            print(f"{rows:4}  " + "  ".join(cells))


if __name__ == "__main__":
    main()
