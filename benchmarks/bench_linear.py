"""One linear layer in many sizes: qnn against float32, bfloat16, its peers and the bare GEMM.

    python benchmarks/bench_linear.py                      # docs/benchmarks/bench_linear.*
    python benchmarks/bench_linear.py --dtype float32      # …/bench_linear_float32.*
    python benchmarks/bench_linear.py --only 'qnn|oneDNN'  # some variants, and the baseline
    python benchmarks/bench_linear.py --everywhere         # peers and tiers in every size
    python benchmarks/bench_linear.py --cliff              # exit status 1 if a size is far too slow
    python benchmarks/bench_linear.py --quick --out /tmp/bench

`GEMM only` is no peer but a lower bound: oneDNN's integer product alone, on a prepacked weight and
on activations that are quantised already. `--dtype` is that of the input and the output of the int8
layers; float layers are measured in both. `eager` is the layer as it stands in a model, on the best
tier; a `tier` row is another tier of the same kernels, called directly.

Counts. `y[m, n] = sum over k of x[m, k] * w[n, k]` takes M·N·K multiplications and as many
additions: the 2·M·N·K operations of the TOPS column. Bytes that move at least, in bfloat16: x,
2·M·K; the int8 weight, N·K; y, 2·M·N. With K = N = 4096 and M = 1 that is 16.8 MB for 0.034 G
operations, nearly all of it the weight: the time is that of reading it. With M = 1024 it is 34 MB
for 34.4 G operations: the time is that of computing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from statistics import median

import torch
from torch import nn

import qnn
from qnn.kernels.cpu import native

from harness import (
    DTYPES,
    Case,
    Grid,
    Measurement,
    Run,
    Variant,
    all_rows,
    argument_parser,
    measure_grid,
    only_where,
    over,
    progress,
    select,
)
from linear_parts import eager_overhead, gemm, one_row, scaling
from peaks import CACHE_BYTES, Peaks, last_level_cache, measure_peaks, memory_bytes
from report import (
    Aim,
    Pick,
    case_table,
    number,
    save,
    size_table,
    speedups_chart,
    table,
    times,
    without_time,
)
from roofline import Point, intensity, roofline_chart
from timing import Effort, OtherLoad, interleave
from variants import BASELINE, VARIANTS, Task, qnn_eager


@dataclass(frozen=True)
class Layer:
    model: str
    k: int
    n: int
    bias: bool = True

    def __str__(self) -> str:
        return f"{self.model}, {self.k}->{self.n}"


ROWS = (1, 8, 32, 128, 512, 1024)
# The projections and the MLP of each model; the vision transformer is one of width 1024 (ViT-L).
LAYERS = (
    Layer("BERT-base", 768, 768),
    Layer("BERT-base", 768, 3072),
    Layer("BERT-base", 3072, 768),
    Layer("ViT-L", 1024, 1024),
    Layer("ViT-L", 1024, 4096),
    Layer("ViT-L", 4096, 1024),
    Layer("Llama-3-8B", 4096, 1024, bias=False),
    Layer("Llama-3-8B", 4096, 4096, bias=False),
    Layer("Llama-3-8B", 4096, 14336, bias=False),
    Layer("Llama-3-8B", 14336, 4096, bias=False),
)
# Setting up and timing every peer in every size takes twice the time of all the rest: they are
# measured in these sizes only, and the slower tiers of qnn in fewer yet.
PEER_SIZES = ((768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 4096))
TIER_SIZES = ((768, 768), (1024, 4096), (4096, 4096))
QUICK_ROWS, QUICK_LAYERS = (1, 128), (LAYERS[0], LAYERS[3])

# The share of the bare GEMM's speed that the whole layer is to reach from so many rows on.
GOAL_ROWS, GOAL, GOAL_AMX = 128, 0.9, 1.3
OURS, BARE = Pick("qnn int8", "eager"), Pick("oneDNN int8", "GEMM only")

CLIFF_ROWS, CLIFF_SIZES = (1, 8, 32, 128, 1024), (64, 768, 4096)


# -- variants ------------------------------------------------------------------------------------


def tiers() -> list[str]:
    """What the machine runs, the best first."""
    return [name for name, state in native.ensure().tiers if state == "ok"]


def make_layer(layer: Layer) -> tuple[nn.Linear, tuple[torch.Tensor, ...]]:
    """A layer, and inputs to calibrate with."""
    torch.manual_seed(0)
    module = nn.Linear(layer.k, layer.n, bias=layer.bias).eval()
    return module, tuple(torch.randn(32, layer.k) for _ in range(8))


@lru_cache(maxsize=1)
def _converted(model: nn.Module, dtype: torch.dtype) -> qnn.QLinear:
    layer = qnn.convert(model, "int8").to(dtype)
    assert isinstance(layer, qnn.QLinear)
    return layer


def bare_gemm(task: Task, dtype: torch.dtype) -> Run:
    """oneDNN's GEMM; row scales and bias are for the check of its output only."""
    layer, x = _converted(task.model, dtype), task.input_in(dtype)
    _, sx = qnn.functional.quantize(x)
    bias = 0.0 if layer.bias is None else layer.bias
    return Run(gemm(layer, x), output=lambda y: y * sx + bias)


def _tier(name: str, task: Task, dtype: torch.dtype) -> Run:
    layer, x = _converted(task.model, dtype), task.input_in(dtype)
    operands = (x, *layer.stored, layer.bias, None)
    return Run(partial(torch.ops.qnn.cpu_linear.default, *operands, "none", "int8", name))


def _variants_of(precision: str) -> list[Variant[Task]]:
    """From the registry: single layers run in eager mode, or as a peer has to be run.

    Float layers and OpenVINO in both precisions; int8 layers in `precision`, or in the one that a
    peer has.
    """
    has_precision = {v.family for v in VARIANTS if v.precision == precision}
    return [
        v
        for v in VARIANTS
        if v.mode != "compiled"
        and (v.family, v.mode) != ("torchao int8", "eager")  # 24 ms at 4096x4096 and one row
        and (
            v.family in ("float", "OpenVINO int8")
            or v.precision == precision
            or v.family not in has_precision
        )
    ]


def _has_size(task: Task, sizes: Sequence[tuple[int, int]]) -> bool:
    return (task.model.in_features, task.model.out_features) in sizes


def variants_for(precision: str, everywhere: bool) -> list[Variant[Task]]:
    """Float, qnn, qnn's other tiers, the peers, and the bare GEMM last."""
    known = _variants_of(precision)
    ours = [v for v in known if v.family in ("float", "qnn int8")]
    peers = [v for v in known if v not in ours]
    others = [
        Variant("qnn int8", precision, f"tier {name}", partial(_tier, name)) for name in tiers()[1:]
    ]
    if not everywhere:
        peers = [only_where(v, partial(_has_size, sizes=PEER_SIZES)) for v in peers]
        others = [only_where(v, partial(_has_size, sizes=TIER_SIZES)) for v in others]
    return [*ours, *others, *peers, Variant("oneDNN int8", precision, "GEMM only", bare_gemm)]


# -- measuring -----------------------------------------------------------------------------------


def linear_cases(layers: Sequence[Layer], rows: Sequence[int]) -> Iterator[Case[Task]]:
    """The cases of a layer share it, and what peers derive from it."""
    for layer in layers:
        module, calibration = make_layer(layer)
        for m in rows:
            task = Task(module, torch.randn(m, layer.k), calibration)
            with torch.no_grad():
                reference = module(task.input)
            yield Case(str(layer), f"M={m}", task, reference, 2 * m * layer.n * layer.k)


def points_of(layers: Sequence[Layer], grid: Grid, dtype: torch.dtype) -> list[Point]:
    """A point of the roofline for every timed call of a tier."""
    best, cache = tiers()[0], last_level_cache()
    points = []
    for layer, m in itertools.product(layers, ROWS):
        for row in grid[str(layer)].get(f"M={m}", ()):
            if row.family != "qnn int8" or row.tops is None:
                continue
            tier = best if row.mode == "eager" else row.mode.removeprefix("tier ")
            x = intensity(m, layer.n, layer.k, dtype.itemsize)
            points.append(Point(tier, m, x, row.tops, layer.n * layer.k <= cache))
    return points


# -- tables --------------------------------------------------------------------------------------


def against_gemm(grid: Grid) -> str:
    """How many times as fast as the bare GEMM the whole layer is, and whether that is the goal."""
    body, aimed, ratios = [], [], []
    for name, cases in grid.items():
        found = [over(BARE.best(rows), OURS.best(rows)) for rows in cases.values()]
        body.append((name, *map(times, found)))
        for case, rows, ratio in zip(cases, cases.values(), found, strict=True):
            if ratio is not None and int(case.removeprefix("M=")) >= GOAL_ROWS:
                aimed.append(rows[0].case)
                ratios.append(ratio)
    parts = [
        "## The whole layer against the bare GEMM",
        "The GEMM's time by the layer's: how many times as fast as oneDNN's integer product alone "
        "the layer is, which also quantises the rows and applies scales and bias.",
        table(("GEMM time / layer time", *next(iter(grid.values()))), body),
    ]
    if ratios:
        goal, where = (GOAL_AMX, "with") if tiers()[0] == "amx" else (GOAL, "without")
        aim = Aim("whole layer", OURS, BARE, goal, aimed)
        lowest, verdict = aim.judged(all_rows(grid))
        parts.append(
            f"From {GOAL_ROWS} rows on: {lowest} at least, {times(median(ratios))} in the middle. "
            f"The aim {where} AMX, {goal}x: {verdict}."
        )
    return "\n\n".join(parts)


def shares_of_peak(grid: Grid, peaks: Peaks) -> str:
    """The layer's TOPS, and how much that is of what the best tier's instruction does at most."""
    tier = tiers()[0]
    peak = peaks.int8.get(tier)
    body = []
    for name, cases in grid.items():
        found = [OURS.best(rows) for rows in cases.values()]
        cells = [
            "-"
            if row is None or row.tops is None
            else f"{number(row.tops, 2)}" + (f" ({row.tops / peak * 1e14:.0f}%)" if peak else "")
            for row in found
        ]
        body.append((name, *cells))
    return "\n\n".join(
        [
            "## Share of the machine's peak",
            _peaks_sentence(peaks),
            "![Roofline](ROOFLINE.png)",
            table((f"TOPS ({tier})", *next(iter(grid.values()))), body),
        ]
    )


def _peaks_sentence(peaks: Peaks) -> str:
    if peaks.missing:
        return f"The peaks of this machine were not measured: {peaks.missing}."
    products = [f"{rate / 1e12:.2f} TOPS with {name}" for name, rate in peaks.int8.items()]
    read = [f"{rate / 1e9:.0f} GB/s over {size / 1e6:.0f} MB" for size, rate in peaks.read.items()]
    return (
        f"Measured on this machine, all threads: int8 products on registers, "
        f"{', '.join(products) or 'none'}; reading, {', '.join(read)}."
    )


def peak_rows(peaks: Peaks, other_load: float | None) -> list[Measurement]:
    """For the CSV file."""

    def row(variant: str, mode: str, **figures: float) -> Measurement:
        return Measurement(
            *("peak", variant, "machine", "int8", mode, "ok", ""), other_load=other_load, **figures
        )

    return [
        *(row(name, "registers", tops=rate / 1e12) for name, rate in peaks.int8.items()),
        *(row(f"{size} B", "reading", gb_s=rate / 1e9) for size, rate in peaks.read.items()),
    ]


# -- cliffs --------------------------------------------------------------------------------------


def cliff(dtype: torch.dtype, effort: Effort) -> int:
    """No call may cost more than 3 · GEMM + 30 µs. How many do.

    Besides the GEMM a layer reads x, writes the quantised x and scales y, which should cost no more
    than twice the GEMM; 30 µs are for what eager mode takes to call it all.
    """
    body, worst, load = [], 0.0, OtherLoad()
    for k, n, m in itertools.product(CLIFF_SIZES, CLIFF_SIZES, CLIFF_ROWS):
        progress(f"K={k}, N={n}, M={m}")
        layer, calibration = make_layer(Layer("", k, n))
        task = Task(layer, torch.randn(m, k), calibration)
        calls = {"layer": qnn_eager(task, dtype).call, "gemm": bare_gemm(task, dtype).call}
        taken = {name: median(s.wall) for name, s in interleave(calls, effort).items()}
        ratio = taken["layer"] / (3 * taken["gemm"] + 30e-6)
        worst = max(worst, ratio)
        micros = [number(taken[name] * 1e6) for name in ("layer", "gemm")]
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
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the int8 layers' input",
    )
    parser.add_argument("--everywhere", action="store_true", help="peers and tiers in every size")
    parser.add_argument("--cliff", action="store_true", help="the layer against the bare GEMM")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    precision = {"float32": "fp32", "bfloat16": "bf16"}[options.dtype]
    dtype = DTYPES[precision]
    quick = options.quick
    effort = Effort(rounds=3, seconds=1) if quick else Effort(rounds=12, seconds=2.5)
    if options.cliff:
        with torch.no_grad():
            raise SystemExit(min(1, cliff(dtype, replace(effort, seconds=2))))

    layers, rows = (QUICK_LAYERS, QUICK_ROWS) if quick else (LAYERS, ROWS)
    near = ((768, 768),) if quick else ((768, 768), (1024, 4096), (4096, 4096))
    far = ((1024, 1024),) if quick else ((4096, 4096), (4096, 14336))
    threaded = ((768, 768),) if quick else ((768, 3072), (1024, 4096), (4096, 4096))
    memory = memory_bytes()
    progress("the machine's peaks")
    load = OtherLoad()
    peaks = measure_peaks(options.threads, (CACHE_BYTES, memory, *(n * k for k, n in near)))
    if peaks.missing:
        progress(f"no peaks: {peaks.missing}")
    peaks_load = load.cores()
    longer = replace(effort, seconds=2 * effort.seconds)
    with torch.no_grad():
        overhead, overhead_table = eager_overhead(64, effort)
        single, single_table = one_row(near, far, memory, dtype, peaks, longer)
        threads, threads_table = scaling(threaded, 512, dtype, longer)
    variants = select(variants_for(precision, options.everywhere), options.only, BASELINE)
    grid = measure_grid(
        linear_cases(layers, rows),
        variants,
        baseline=BASELINE,
        effort=effort,
        show=case_table,
        verbose=options.verbose,
    )

    suffix = "" if precision == "bf16" else f"_{options.dtype}"
    name, roofline = f"bench_linear{suffix}", f"roofline{suffix}"
    title = f"One linear layer, {options.dtype}"
    measured = all_rows(grid)
    points = points_of(layers, grid, dtype)
    roofs = replace(
        peaks, read={size: peaks.read[size] for size in (CACHE_BYTES, memory) if size in peaks.read}
    )
    parts = [
        *(f"## {size}\n\n{size_table(cases)}" for size, cases in grid.items()),
        against_gemm(grid),
        shares_of_peak(grid, peaks).replace("ROOFLINE", roofline),
        f"## One row: share of the read bandwidth\n\n{single_table}",
        f"## Threads\n\n{threads_table}",
        f"## Eager overhead\n\n{overhead_table}",
        without_time(measured),
    ]
    shown = {
        size: cases
        for layer, (size, cases) in zip(layers, grid.items(), strict=True)
        if options.everywhere or (layer.k, layer.n) in PEER_SIZES
    }

    save(
        options.out,
        name,
        title,
        [*measured, *single, *threads, *overhead, *peak_rows(peaks, peaks_load)],
        parts,
        {
            name: lambda machine: speedups_chart(shown, title, BASELINE, machine),
            roofline: lambda machine: roofline_chart(
                points, roofs, machine, f"Roofline of {title[0].lower()}{title[1:]}"
            ),
        },
    )


if __name__ == "__main__":
    main()
