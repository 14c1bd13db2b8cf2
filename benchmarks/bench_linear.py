"""One linear layer in many sizes: qnn against float32, bfloat16, its peers and the bare GEMM.

    python benchmarks/bench_linear.py                      # docs/benchmarks/bench_linear.*
    python benchmarks/bench_linear.py --dtype bfloat16     # …/bench_linear_bfloat16.*
    python benchmarks/bench_linear.py --only 'qnn|oneDNN'  # some variants, and the baseline
    python benchmarks/bench_linear.py --cliff              # exit status 1 if a size is far too slow
    python benchmarks/bench_linear.py --quick --out /tmp/bench

`GEMM only` is no peer but a lower bound: oneDNN's integer product alone, on a prepacked weight and
on activations that are quantised already. `--dtype` is that of the input and the output of the int8
layers; float layers in bfloat16 always get bfloat16, as they would inside a bfloat16 model.

Counts. `y[m, n] = sum over k of x[m, k] * w[n, k]` takes M·N·K multiplications and as many
additions: the 2·M·N·K operations of the TOPS column. Bytes that move at least, in float32: x,
4·M·K; the int8 weight, N·K; y, 4·M·N; the quantised x, written and read, 2·M·K. With K = N = 4096
and M = 1 that is 16.8 MB for 0.034 G operations, nearly all of it the weight: the time is that of
reading memory. With M = 1024 it is 59 MB for 34.4 G operations: the time is that of computing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import nn

import qnn

from harness import (
    DTYPES,
    Effort,
    Measurement,
    OtherLoad,
    Run,
    Variant,
    argument_parser,
    interleave,
    measure,
    progress,
    select,
)
from report import (
    case_table,
    number,
    save,
    speedup,
    speedups_chart,
    table,
)
from variants import BASELINE, VARIANTS, Task, qnn_eager

ROWS = (1, 8, 32, 128, 512, 1024)
# (K, N): a small layer; BERT-base's projections and its MLP; a projection of an 8B language model.
SIZES = ((64, 64), (768, 768), (768, 3072), (3072, 768), (4096, 4096))
QUICK_ROWS, QUICK_SIZES = (1, 128), ((64, 64), (768, 768))

CLIFF_ROWS, CLIFF_SIZES = (1, 8, 32, 128, 1024), (64, 768, 4096)


def make_layer(k: int, n: int) -> tuple[nn.Linear, tuple[torch.Tensor, ...]]:
    """A layer, and inputs to calibrate with."""
    torch.manual_seed(0)
    layer = nn.Linear(k, n).eval()
    return layer, tuple(torch.randn(32, k) for _ in range(8))


def bare_gemm(task: Task, dtype: torch.dtype) -> Run:
    """oneDNN's GEMM with the weight's scales; row scales and bias are for the check only."""
    layer = qnn.convert(task.model, "int8")
    assert isinstance(layer, qnn.QLinear)
    q, sx = qnn.functional.quantize(task.input_in(dtype))
    xq = (q.int() + 128).to(torch.uint8)
    pack = torch.ops.onednn.qlinear_prepack(layer.weight, None)
    sw, zeros = layer.weight_scale.view(-1), torch.zeros(layer.out_features, dtype=torch.int32)
    return Run(
        partial(
            torch.ops.onednn.qlinear_pointwise.default,
            *(xq, 1.0, 128),  # scale and zero point of x
            *(pack, sw, zeros, None),  # scales and zero points of w, bias
            *(1.0, 0, torch.float32),  # scale, zero point and dtype of y
            *("none", [], ""),  # nothing after the product
        ),
        output=lambda y: y * sx + layer.bias,
    )


def variants_for(precision: str) -> list[Variant[Task]]:
    """Float layers in both precisions; int8 ones in `precision`, or in the one that a peer has."""
    gemm = Variant("oneDNN int8", precision, "GEMM only", bare_gemm)
    families = {v.family for v in VARIANTS if v.precision == precision}
    return [
        *(
            v
            for v in VARIANTS
            if v.family == "float" or v.precision == precision or v.family not in families
        ),
        gemm,
    ]


Grid = dict[str, dict[str, list[Measurement]]]


def measure_all(
    sizes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    variants: list[Variant[Task]],
    effort: Effort,
    verbose: bool,
) -> Grid:
    """`{"K=768, N=3072": {"M=1": measurements}}`; each table is printed as soon as it is there."""
    grid: Grid = {}
    for k, n in sizes:
        layer, calibration = make_layer(k, n)
        column = grid.setdefault(f"K={k}, N={n}", {})
        for m in rows:
            task = Task(layer, torch.randn(m, k), calibration)
            with torch.no_grad():
                reference = layer(task.input)
            case = f"K={k}, N={n}, M={m}"
            column[f"M={m}"] = measure(
                case,
                variants,
                task,
                reference=reference,
                baseline=BASELINE,
                operations=2 * m * n * k,
                effort=effort,
                verbose=verbose,
            )
            print(f"\n{case}\n{case_table(column[f'M={m}'], BASELINE)}", flush=True)
    return grid


def size_table(cases: dict[str, list[Measurement]]) -> str:
    """A row a variant, a column a number of rows M: median ms and speed-up; the lowest SQNR."""
    body = []
    for measurements in zip(*cases.values(), strict=True):
        cells = [
            row.status if row.median_ms is None else f"{number(row.median_ms)} ({speedup(row)})"
            for row in measurements
        ]
        noise = [row.sqnr_db for row in measurements if row.sqnr_db is not None]
        body.append((measurements[0].variant, *cells, f"{min(noise):.1f}" if noise else "-"))
    return table(("median ms (speed-up)", *cases, "SQNR dB"), body)


def without_time(rows: list[Measurement]) -> str:
    """Every variant that has no time somewhere, why, and in how many cases."""
    counts = Counter((row.variant, row.remark) for row in rows if row.median_ms is None)
    listed = [
        f"- {variant}: {remark} (cases: {count})" for (variant, remark), count in counts.items()
    ]
    return "\n".join(["## Without a time", "", *(listed or ["None."])])


def cliff(dtype: torch.dtype, effort: Effort) -> int:
    """No call may cost more than 3 · GEMM + 30 µs. How many do.

    Besides the GEMM a layer reads x, writes the quantised x and scales y, which should cost no more
    than twice the GEMM; 30 µs are for what eager mode takes to call it all.
    """
    body, worst, load = [], 0.0, OtherLoad()
    for k, n, m in itertools.product(CLIFF_SIZES, CLIFF_SIZES, CLIFF_ROWS):
        progress(f"K={k}, N={n}, M={m}")
        layer, calibration = make_layer(k, n)
        task = Task(layer, torch.randn(m, k), calibration)
        calls = {"layer": qnn_eager(task, dtype).call, "gemm": bare_gemm(task, dtype).call}
        times = {name: median(samples) for name, samples in interleave(calls, effort).items()}
        ratio = times["layer"] / (3 * times["gemm"] + 30e-6)
        worst = max(worst, ratio)
        micros = [number(times[name] * 1e6) for name in ("layer", "gemm")]
        body.append(
            (str(k), str(n), str(m), *micros, f"{ratio:.2f}", "**yes**" if ratio > 1 else "")
        )
    head = ("K", "N", "M", "layer µs", "GEMM µs", "layer / (3 GEMM + 30 µs)", "cliff")
    print(table(head, body, left=()))
    print(f"\nworst: {worst:.2f}; at most 1 is allowed")
    print(f"cores that other processes kept busy meanwhile: {number(load.cores(), 2)}")
    return sum(1 for row in body if row[-1])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the int8 layers' input",
    )
    parser.add_argument("--cliff", action="store_true", help="the layer against the bare GEMM")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    precision = {"float32": "fp32", "bfloat16": "bf16"}[options.dtype]
    effort = Effort(rounds=3, seconds=1) if options.quick else Effort(rounds=15, seconds=4)
    if options.cliff:
        with torch.no_grad():
            raise SystemExit(min(1, cliff(DTYPES[precision], replace(effort, seconds=2))))

    sizes, rows = (QUICK_SIZES, QUICK_ROWS) if options.quick else (SIZES, ROWS)
    variants = select(variants_for(precision), options.only, BASELINE)
    grid = measure_all(sizes, rows, variants, effort, options.verbose)
    name = "bench_linear" if precision == "fp32" else f"bench_linear_{options.dtype}"
    title = f"One linear layer, {options.dtype}"
    parts = [f"## {size}\n\n{size_table(cases)}" for size, cases in grid.items()]
    measured = [row for cases in grid.values() for rows in cases.values() for row in rows]
    save(
        options.out,
        name,
        title,
        measured,
        [*parts, without_time(measured)],
        lambda machine: speedups_chart(grid, title, BASELINE, machine),
    )


if __name__ == "__main__":
    main()
