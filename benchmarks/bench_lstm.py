"""LSTM and GRU layers: qnn against float32, bfloat16 and the peers.

    python benchmarks/bench_lstm.py                      # docs/benchmarks/bench_lstm.*
    python benchmarks/bench_lstm.py --only 'qnn|torch'   # some variants, and the baseline
    python benchmarks/bench_lstm.py --everywhere         # compiled variants in every case
    python benchmarks/bench_lstm.py --quick --out out/bench

A call runs T = 100 steps from a zero state. All variants of a case are set up, checked against
float32 and timed in turns; those whose outputs `[T, B, D·H]` are off get no time.

Counts. A step of a layer multiplies `[B, I] @ [I, G·H]` and `[B, H] @ [H, G·H]`, with G = 4 gates
in an LSTM and 3 in a GRU: 2·T·B·G·H·(I + H) operations a layer. The second product of a step waits
for the step before it, so with B = 1 each step reads the whole weight for one row: 4·512·512 bytes
in int8, 1 MB, and four times that in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from harness import (
    Effort,
    Measurement,
    Run,
    Unavailable,
    Variant,
    argument_parser,
    measure,
    progress,
    select,
)
from lstm_memory import at_rest, make_task, split_gates
from lstm_variants import BASELINE, VARIANTS
from report import QUIET, case_table, number, save, speedup, speedups_chart, table
from variants import Task

Grid = dict[str, dict[str, list[Measurement]]]


@dataclass(frozen=True)
class Layers:
    """Recurrent layers of one size, and the batches that they are measured with."""

    kind: type[nn.RNNBase]
    inputs: int
    hidden: int
    count: int
    batches: tuple[int, ...]

    def __str__(self) -> str:
        layers = "1 layer" if self.count == 1 else f"{self.count} layers"
        return f"{self.kind.__name__}, {self.inputs}->{self.hidden}, {layers}"

    def operations(self, steps: int, batch: int) -> int:
        gates = 4 if self.kind is nn.LSTM else 3
        widths = self.inputs + self.hidden + (self.count - 1) * 2 * self.hidden
        return 2 * steps * batch * gates * self.hidden * widths


STEPS = 100
BATCHES = (1, 8, 16, 64)
LARGE, SMALL = (256, 512), (96, 128)
LAYERS = (
    *(Layers(nn.LSTM, *size, count, BATCHES) for size in (LARGE, SMALL) for count in (1, 2)),
    *(Layers(nn.GRU, *size, 1, (1, 16)) for size in (LARGE, SMALL)),
)
QUICK = (Layers(nn.LSTM, 16, 32, 1, (1, 2)), Layers(nn.GRU, 16, 32, 1, (2,)))
# Compiling takes longer than all of the timing: once a size.
COMPILED_AT = 16
_LEFT_OUT = "left out in this case, to keep the run short; --everywhere adds it"


# -- measuring -----------------------------------------------------------------------------------


def _in_cases(variant: Variant[Task], everywhere: bool, quick: bool) -> Variant[Task]:
    if variant.mode != "compiled" or everywhere:
        return variant

    def build(task: Task, dtype: torch.dtype) -> Run:
        if quick or task.input.shape[1] != COMPILED_AT or task.model.num_layers != 1:
            raise Unavailable(_LEFT_OUT)
        return variant.build(task, dtype)

    return replace(variant, build=build)


def measure_all(
    sizes: Sequence[Layers],
    steps: int,
    variants: list[Variant[Task]],
    effort: Effort,
    verbose: bool,
) -> Grid:
    """`{"LSTM, 256->512, 1 layer": {"B=1": measurements}}`; each table is printed when it is there.

    The tasks of a size share the layer and what peers derive from it.
    """
    grid: Grid = {}
    for size in sizes:
        task = make_task(size.inputs, size.hidden, size.count, steps, size.kind)
        column = grid.setdefault(str(size), {})
        for batch in size.batches:
            task = replace(task, input=torch.randn(steps, batch, size.inputs))
            with torch.no_grad():
                reference = task.model(task.input)[0]
            case = f"{size}, B={batch}"
            column[f"B={batch}"] = measure(
                case,
                variants,
                task,
                reference=reference,
                baseline=BASELINE,
                operations=size.operations(steps, batch),
                effort=effort,
                verbose=verbose,
            )
            print(f"\n{case}\n{case_table(column[f'B={batch}'], BASELINE)}", flush=True)
    return grid


# -- tables --------------------------------------------------------------------------------------


def size_table(cases: dict[str, list[Measurement]]) -> str:
    """A row a variant, a column a batch: median ms and speed-up; the lowest SQNR; the remark."""
    body = []
    for rows in zip(*cases.values(), strict=True):
        if all(row.status == "unavailable" for row in rows):
            continue
        cells = [
            ("-" if row.status == "unavailable" else row.status)
            if row.median_ms is None
            else f"{number(row.median_ms)} ({speedup(row)})"
            for row in rows
        ]
        noise = [row.sqnr_db for row in rows if row.sqnr_db is not None]
        remark = "; ".join(dict.fromkeys(r.remark for r in rows if r.median_ms is not None))
        body.append((rows[0].variant, *cells, f"{min(noise):.1f}" if noise else "-", remark))
    head = ("median ms (speed-up)", *cases, "SQNR dB", "remark")
    return table(head, body, left=(0, len(head) - 1))


def without_time(rows: list[Measurement]) -> str:
    """Every variant that was tried and has no time, and why."""
    absent = [row for row in rows if row.median_ms is None and row.note != _LEFT_OUT]
    listed = [f"- {row.variant}, {row.case}: {row.remark}" for row in absent]
    return "\n".join(["## Without a time", "", *(listed or ["None."])])


# Whose time is divided by whose, and what is aimed at with AMX and without; the best of a family.
_AIMS = (
    ("LSTM, 256->512, 1 layer", "B=16", ("float", "fp32"), (5.0, 2.5)),
    ("LSTM, 256->512, 1 layer", "B=16", ("float", "bf16"), (1.4, 1.3)),
    ("LSTM, 256->512, 1 layer", "B=16", ("torch.ao int8", "fp32"), (2.2, 2.2)),
    ("LSTM, 256->512, 1 layer", "B=1", ("float", "fp32"), (2.0, 2.0)),
    ("LSTM, 256->512, 1 layer", "B=1", ("torch.ao int8", "fp32"), (1.0, 1.0)),
    ("GRU, 256->512, 1 layer", "B=16", ("float", "fp32"), (4.0, 2.0)),
)
_OURS = ("qnn int8", "qnn int8_static")


def _best(rows: Sequence[Measurement], family: str, precision: str) -> Measurement | None:
    timed = [
        row
        for row in rows
        if (row.family, row.precision) == (family, precision) and row.median_ms is not None
    ]
    return min(timed, key=lambda row: row.median_ms or 0.0, default=None)


def ratios(grid: Grid, amx: bool) -> str:
    """How many times as fast as float and as torch.ao qnn is in eager mode, both in one precision,
    and whether that is what is aimed at.
    """
    body = []
    for size, batch, (family, precision), aims in _AIMS:
        rows = grid.get(size, {}).get(batch, [])
        theirs = _best([row for row in rows if row.mode != "compiled"], family, precision)
        if theirs is None or theirs.median_ms is None:
            continue
        cells, found = [], []
        for name in _OURS:
            ours = _best([row for row in rows if row.mode == "eager"], name, precision)
            ratio = None if ours is None else theirs.median_ms / (ours.median_ms or 1.0)
            found.append(ratio)
            cells.append("-" if ratio is None else f"{ratio:.2f}x")
        aim = aims[0] if amx else aims[1]
        loud = (theirs.other_load or 0.0) > QUIET
        reached = [each for each in found if each is not None]
        verdict = "reached" if reached and min(reached) >= aim else "**not reached**"
        verdict = "not judged, on a machine that was not quiet" if loud else verdict
        body.append((f"{size}, {batch}", theirs.variant, *cells, f"{aim:g}x", verdict))
    if not body:
        return ""
    head = ("times as fast", "as", *(f"`{name.split()[1]}`" for name in _OURS), "aim", "verdict")
    return f"## Times as fast\n\n{table(head, body, left=(0, 1, 5))}"


def shown(grid: Grid) -> Grid:
    """The variants that were timed anywhere in a size, for the chart."""
    result: Grid = {}
    for size, cases in grid.items():
        timed = {row.variant for rows in cases.values() for row in rows if row.median_ms}
        result[size] = {
            batch: [row for row in rows if row.variant in timed] for batch, rows in cases.items()
        }
    return result


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--everywhere", action="store_true", help="compile in every case")
    parser.add_argument("--no-processes", action="store_true", help="without the memory figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick = options.quick
    effort = Effort(rounds=3, seconds=0.2, turn=0) if quick else Effort(rounds=12, seconds=6)
    variants = [_in_cases(v, options.everywhere, quick) for v in VARIANTS]
    sizes, steps = (QUICK, 4) if quick else (LAYERS, STEPS)
    grid = measure_all(
        sizes, steps, select(variants, options.only, BASELINE), effort, options.verbose
    )
    measured = [row for cases in grid.values() for rows in cases.values() for row in rows]

    title = f"LSTM and GRU layers, {steps} steps"
    parts = [
        *(f"## {size}\n\n{size_table(cases)}" for size, cases in grid.items()),
        ratios(grid, torch.cpu._is_amx_tile_supported()),
    ]
    more: list[Measurement] = []
    if not options.no_processes:
        for heading, part in (("Memory at rest", at_rest), ("split_gates", split_gates)):
            progress(heading)
            rows, text = part(quick)
            more += rows
            parts.append(f"## {heading}\n\n{text}")
            print(f"\n{heading}\n{text}", flush=True)
    parts.append(without_time(measured))
    save(
        options.out,
        "bench_lstm",
        title,
        [*measured, *more],
        [part for part in parts if part],
        {"bench_lstm": lambda machine: speedups_chart(shown(grid), title, BASELINE, machine)},
    )


if __name__ == "__main__":
    main()
