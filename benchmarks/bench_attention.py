"""Attention in int8 against torch's scaled_dot_product_attention in float32 and bfloat16.

    python benchmarks/bench_attention.py                    # docs/benchmarks/bench_attention.*
    python benchmarks/bench_attention.py --only 'tier'      # qnn's other tiers, and the baseline
    python benchmarks/bench_attention.py --case 'BERT|ViT'
    python benchmarks/bench_attention.py --quick --out out/bench

Sizes are B×H×L×D; q, k and v are views `[B, H, L, D]` of `[B, L, H, D]`, as models have them.
Quantising and packing them is part of every call. "decoding" has one row of queries, and all of its
keys and values are quantised for it.

Counts. Two products of B·H·M·N·D: 4·B·H·M·N·D operations, half of them where attention is causal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from bench_linear import tiers

import qnn

from harness import (
    Case,
    Grid,
    Measurement,
    Run,
    Variant,
    all_rows,
    argument_parser,
    measure_grid,
    over,
    select,
)
from report import (
    Aim,
    Pick,
    aims_table,
    case_table,
    number,
    save,
    size_table,
    speedups_chart,
    table,
    times,
    without_time,
)
from timing import Effort
from variants import BASELINE

SECTION = "attention"


@dataclass(frozen=True)
class Shape:
    """So many heads of rows of queries and of keys."""

    name: str
    batch: int
    heads: int
    rows: int
    keys: int
    width: int
    causal: bool = False

    def __str__(self) -> str:
        rows = str(self.keys) if self.rows == self.keys else f"{self.rows} of {self.keys}"
        causal = ", causal" if self.causal else ""
        return f"{self.name} {self.batch}×{self.heads}×{rows}×{self.width}{causal}"

    @property
    def operations(self) -> int:
        all_of_them = 4 * self.batch * self.heads * self.rows * self.keys * self.width
        return all_of_them // 2 if self.causal else all_of_them


SIZES = (
    Shape("BERT", 4, 12, 128, 128, 64),
    Shape("BERT", 1, 12, 128, 128, 64),
    Shape("ViT", 1, 12, 197, 197, 64),
    Shape("prompt", 2, 32, 128, 128, 128),
    Shape("Whisper", 1, 12, 1500, 1500, 64),
    Shape("long", 1, 8, 4096, 4096, 64),
    Shape("long", 1, 8, 4096, 4096, 64, causal=True),
    Shape("decoding", 1, 12, 1, 4096, 64),
)
QUICK = (Shape("small", 1, 2, 5, 5, 16), Shape("small", 1, 2, 1, 70, 16))


@dataclass(frozen=True, eq=False)
class Heads:
    """What all variants are given, in float32."""

    size: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def drawn(cls, size: Shape) -> Heads:
        lengths = (size.rows, size.keys, size.keys)
        return cls(
            size,
            *(torch.randn(size.batch, n, size.heads, size.width).transpose(1, 2) for n in lengths),
        )

    def cast(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (x.transpose(1, 2).to(dtype).transpose(1, 2) for x in (self.q, self.k, self.v))
        return q, k, v


def torch_attention(task: Heads, dtype: torch.dtype) -> Run:
    attention = torch.nn.functional.scaled_dot_product_attention
    return Run(partial(attention, *task.cast(dtype), is_causal=task.size.causal))


def int8_attention(task: Heads, dtype: torch.dtype) -> Run:
    attention = qnn.functional.scaled_dot_product_attention
    return Run(partial(attention, *task.cast(dtype), is_causal=task.size.causal))


def _tier_attention(tier: str, task: Heads, dtype: torch.dtype) -> Run:
    """The op of a tier, which gives [B, L, H, D]."""
    args = (*task.cast(dtype), None, None, task.size.causal, tier)
    return Run(partial(torch.ops.qnn.cpu_attention, *args), output=lambda y: y.transpose(1, 2))


def variants() -> list[Variant[Heads]]:
    """torch's function, qnn's, and qnn's other tiers, in each precision."""
    return [
        variant
        for precision in ("fp32", "bf16")
        for variant in (
            Variant("float", precision, "eager", torch_attention),
            Variant("qnn int8", precision, "eager", int8_attention),
            *(
                Variant("qnn int8", precision, f"tier {name}", partial(_tier_attention, name))
                for name in tiers()[1:]
            ),
        )
    ]


def attention_cases(sizes: Sequence[Shape], only: str) -> Iterator[Case[Heads]]:
    torch.manual_seed(0)
    for size in sizes:
        if not re.search(only, str(size)):
            continue
        task = Heads.drawn(size)
        reference = torch.nn.functional.scaled_dot_product_attention(
            task.q.double(), task.k.double(), task.v.double(), is_causal=size.causal
        )
        yield Case(SECTION, str(size), task, reference.float(), size.operations)


def ratios_table(cases: Mapping[str, Sequence[Measurement]]) -> str:
    """int8 against torch's function in the same precision."""
    body = []
    for name, rows in cases.items():
        cells = []
        for precision in ("fp32", "bf16"):
            theirs = Pick("float", "eager", precision).best(rows)
            ours = Pick("qnn int8", "eager", precision).best(rows)
            cells += [number(row and row.median_ms) for row in (theirs, ours)]
            cells.append(times(over(theirs, ours)))
        body.append((name, *cells))
    head = ("median ms", "torch fp32", "int8", "", "torch bf16", "int8", "")
    return table(head, body)


# Where, in which precision, and how many times as fast as torch at least.
_AIMS = [
    *((str(size), "fp32", 2.3) for size in SIZES if size.rows > 1),
    *((str(size), "bf16", 1.0) for size in SIZES),
]
AIMS = [
    Aim(
        f"{case}, {precision}",
        Pick("qnn int8", "eager", precision),
        Pick("float", "eager", precision),
        goal,
        (f"{SECTION}, {case}",),
    )
    for case, precision, goal in _AIMS
]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--case", default="", help="a regular expression of what is measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick = options.quick
    effort = Effort(rounds=3, seconds=0.2, turn=0) if quick else Effort(rounds=15, seconds=8)
    grid: Grid = measure_grid(
        attention_cases(QUICK if quick else SIZES, options.case),
        select(variants(), options.only, BASELINE),
        baseline=BASELINE,
        effort=effort,
        show=case_table,
        verbose=options.verbose,
    )
    rows = all_rows(grid)
    parts = []
    for cases in grid.values():
        parts += [f"## int8 against torch\n\n{ratios_table(cases)}"]
        parts += [f"## All variants\n\n{size_table(cases)}"]
    if not quick:
        parts.append(f"## Aims\n\n{aims_table(AIMS, rows)}")
    parts.append(without_time(rows))
    print("", *parts, sep="\n\n")
    save(
        options.out,
        "bench_attention",
        "attention",
        rows,
        parts,
        {"bench_attention": lambda machine: speedups_chart(grid, "attention", BASELINE, machine)},
    )


if __name__ == "__main__":
    main()
