"""Six layers of BERT-base on 4x128 tokens: qnn against float32, bfloat16 and the peers.

    python benchmarks/bench_model.py                       # docs/benchmarks/bench_model.*
    python benchmarks/bench_model.py --only 'qnn|torchao'  # some variants, and the baseline
    python benchmarks/bench_model.py --quick --out /tmp/bench

The weights are random (seed 0) and so are the tokens. The SQNR is that of `last_hidden_state`
against float32. The TOPS column counts what `bert.operations` derives. Compiled always means
`fullgraph=True`, which changes no code: it proves that nothing is left outside of the graph.
"""

from __future__ import annotations

import torch

from bert import FULL, QUICK, make_task, operations
from fresh_process import at_rest, starts
from harness import Effort, Measurement, argument_parser, measure, select
from report import case_table, save, table, times_chart
from variants import BASELINE, VARIANTS

# Whose speed is divided by whose: (family, mode, precision), or the better precision for "".
_QNN, _OPENVINO = "qnn int8", ("OpenVINO int8", "NNCF", "")
_PAIRS = (
    ((_QNN, "compiled", "bf16"), _OPENVINO),
    ((_QNN, "compiled", "bf16"), ("torchao int8", "compiled+frozen", "")),
    ((_QNN, "compiled", "fp32"), ("torchao int8", "compiled+frozen", "fp32")),
    ((_QNN, "eager", "bf16"), _OPENVINO),
    ((_QNN, "eager", "fp32"), _OPENVINO),
    ((_QNN, "eager", "fp32"), ("torch.ao int8", "eager", "fp32")),
)


def ratios(rows: list[Measurement]) -> str:
    """How many times as fast as its nearest peers qnn is: their time by its time."""

    def best(family: str, mode: str, precision: str) -> Measurement | None:
        timed = [
            r for r in rows if (r.family, r.mode) == (family, mode) and r.median_ms is not None
        ]
        timed = [r for r in timed if r.precision == precision or not precision]
        return min(timed, key=lambda row: row.median_ms or 0.0, default=None)

    body = []
    for ours, theirs in ((best(*our), best(*their)) for our, their in _PAIRS):
        if ours is None or theirs is None or not ours.median_ms or not theirs.median_ms:
            continue
        what = f"{ours.variant} over {theirs.variant}"
        body.append((what, f"{theirs.median_ms / ours.median_ms:.2f}x"))
    if not body:
        return "No two variants to compare were measured."
    return table(("times as fast", "measured"), body)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--no-processes", action="store_true", help="without memory and start, in fresh processes"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    effort = Effort(rounds=3, seconds=5) if options.quick else Effort(rounds=15, seconds=100)
    task = make_task(size)
    with torch.no_grad():
        reference = task.model(task.input)[0]
    rows = measure(
        str(size),
        select(VARIANTS, options.only, BASELINE),
        task,
        reference=reference,
        baseline=BASELINE,
        operations=operations(task.model, size),
        effort=effort,
        verbose=options.verbose,
    )
    parts = [case_table(rows, BASELINE), ratios(rows)]
    more: list[Measurement] = []
    if not options.no_processes:
        for title, part in (("Memory at rest", at_rest), ("Start", starts)):
            measured, text = part(str(size), options.quick)
            more += measured
            parts.append(f"## {title}\n\n{text}")
    print("", *parts, sep="\n\n")
    save(
        options.out,
        "bench_model",
        str(size),
        [*rows, *more],
        parts,
        {"bench_model": lambda machine: times_chart(rows, str(size), machine)},
    )


if __name__ == "__main__":
    main()
