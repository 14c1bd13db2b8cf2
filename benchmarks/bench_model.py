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
from harness import Case, Measurement, argument_parser, measure, over, select
from model_memory import model_at_rest, starts
from report import Pick, case_table, save, table, times, times_chart
from timing import Effort
from variants import BASELINE, VARIANTS

# Whose speed is divided by whose; without a precision, the better one's.
_QNN, _OPENVINO, _TORCHAO = "qnn int8", Pick("OpenVINO int8", "NNCF"), "torchao int8"
_PAIRS = (
    (Pick(_QNN, "compiled", "bf16"), _OPENVINO),
    (Pick(_QNN, "compiled", "bf16"), Pick(_TORCHAO, "compiled+frozen")),
    (Pick(_QNN, "compiled", "fp32"), Pick(_TORCHAO, "compiled+frozen", "fp32")),
    (Pick(_QNN, "eager", "bf16"), _OPENVINO),
    (Pick(_QNN, "eager", "fp32"), _OPENVINO),
    (Pick(_QNN, "eager", "fp32"), Pick("torch.ao int8", "eager", "fp32")),
)


def ratios(rows: list[Measurement]) -> str:
    """How many times as fast as its nearest peers qnn is: their time by its time."""
    found = [(our.best(rows), their.best(rows)) for our, their in _PAIRS]
    body = [
        (f"{ours.variant} over {theirs.variant}", times(over(theirs, ours)))
        for ours, theirs in found
        if ours is not None and theirs is not None
    ]
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
        Case("", str(size), task, reference, operations(task.model, size)),
        select(VARIANTS, options.only, BASELINE),
        baseline=BASELINE,
        effort=effort,
        verbose=options.verbose,
    )
    parts = [case_table(rows, BASELINE), ratios(rows)]
    more: list[Measurement] = []
    if not options.no_processes:
        for title, part in (("Memory at rest", model_at_rest), ("Start", starts)):
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
