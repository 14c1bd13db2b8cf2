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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from harness import (
    Case,
    Grid,
    Measurement,
    all_rows,
    argument_parser,
    measure_grid,
    only_where,
    progress,
    select,
)
from lstm_memory import layer_at_rest, recurrent_task, split_gates
from lstm_variants import VARIANTS
from report import Aim, Pick, aims_table, case_table, save, size_table, speedups_chart, without_time
from timing import Effort
from variants import BASELINE, Task


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


def _compiled_in(task: Task) -> bool:
    return task.input.shape[1] == COMPILED_AT and task.model.num_layers == 1


def recurrent_cases(sizes: Sequence[Layers], steps: int) -> Iterator[Case[Task]]:
    """The cases of a size share the layer, and what peers derive from it."""
    for size in sizes:
        task = recurrent_task(size.inputs, size.hidden, size.count, steps, size.kind)
        for batch in size.batches:
            task = replace(task, input=torch.randn(steps, batch, size.inputs))
            with torch.no_grad():
                reference = task.model(task.input)[0]
            yield Case(str(size), f"B={batch}", task, reference, size.operations(steps, batch))


# Where, how fast what is, and what is aimed at with AMX and without; the best of a family.
_AIMS = (
    ("LSTM, 256->512, 1 layer, B=16", "float", "fp32", (5.0, 2.5)),
    ("LSTM, 256->512, 1 layer, B=16", "float", "bf16", (1.4, 1.3)),
    ("LSTM, 256->512, 1 layer, B=16", "torch.ao int8", "fp32", (2.2, 2.2)),
    ("LSTM, 256->512, 1 layer, B=1", "float", "fp32", (2.0, 2.0)),
    ("LSTM, 256->512, 1 layer, B=1", "torch.ao int8", "fp32", (1.0, 1.0)),
    ("GRU, 256->512, 1 layer, B=16", "float", "fp32", (4.0, 2.0)),
)


def aims(amx: bool) -> list[Aim]:
    """Of qnn in eager mode, against the same precision."""
    return [
        Aim(
            case,
            Pick(ours, "eager", precision),
            Pick(family, precision=precision, but="compiled"),
            goals[0] if amx else goals[1],
            (case,),
        )
        for case, family, precision, goals in _AIMS
        for ours in ("qnn int8", "qnn int8_static")
    ]


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
    variants = [
        v if v.mode != "compiled" or options.everywhere else only_where(v, _compiled_in)
        for v in VARIANTS
    ]
    sizes, steps = (QUICK, 4) if quick else (LAYERS, STEPS)
    grid = measure_grid(
        recurrent_cases(sizes, steps),
        select(variants, options.only, BASELINE),
        baseline=BASELINE,
        effort=effort,
        show=case_table,
        verbose=options.verbose,
    )
    measured = all_rows(grid)

    title = f"LSTM and GRU layers, {steps} steps"
    parts = [
        *(f"## {size}\n\n{size_table(cases, remarks=True)}" for size, cases in grid.items()),
    ]
    if not quick:
        parts.append(f"## Aims\n\n{aims_table(aims(torch.cpu._is_amx_tile_supported()), measured)}")
    more: list[Measurement] = []
    if not options.no_processes:
        for heading, part in (("Memory at rest", layer_at_rest), ("split_gates", split_gates)):
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
        parts,
        {"bench_lstm": lambda machine: speedups_chart(shown(grid), title, BASELINE, machine)},
    )


if __name__ == "__main__":
    main()
