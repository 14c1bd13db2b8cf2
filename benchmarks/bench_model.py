"""Six layers of BERT-base on 4x128 tokens: qnn against float32, bfloat16 and the peers.

    python benchmarks/bench_model.py                       # docs/benchmarks/bench_model.*
    python benchmarks/bench_model.py --only 'qnn|torchao'  # some variants, and the baseline
    python benchmarks/bench_model.py --quick --out /tmp/bench

The weights are random (seed 0) and so are the tokens. The SQNR is that of `last_hidden_state`
against float32. `operations` derives the count that the TOPS column is made of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import qnn

from harness import Effort, Measurement, argument_parser, measure, select
from report import case_table, save, table, times_chart
from variants import BASELINE, VARIANTS, Task


@dataclass(frozen=True)
class Size:
    layers: int
    batch: int
    tokens: int
    calibration: int

    def __str__(self) -> str:
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"BertModel, {layers}, {self.batch}x{self.tokens} tokens"


FULL = Size(layers=6, batch=4, tokens=128, calibration=8)
QUICK = Size(layers=1, batch=2, tokens=32, calibration=2)


class Encoder(nn.Module):
    """`BertModel` with plain tensors as its outputs, which every exporter takes."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(num_hidden_layers=layers))

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.bert(input_ids)
        return output.last_hidden_state, output.pooler_output


def make_task(size: Size) -> Task:
    torch.manual_seed(0)
    model = Encoder(size.layers).eval()
    shape, words = (size.batch, size.tokens), model.bert.config.vocab_size
    calibration = tuple(torch.randint(words, shape) for _ in range(size.calibration))
    return Task(model, torch.randint(words, shape), calibration, transformer=True)


def operations(model: nn.Module, size: Size) -> int:
    """Of the linear layers, which are what is quantised.

    A layer [N, K] takes N·K multiplications and as many additions for each token. One of
    BERT-base's layers has four matrices of 768x768 and two of 768x3072, 7.08 M weights, so that six
    layers and 512 tokens take 2 · 6 · 7.08 M · 512 = 43.5 G operations. Left out: the attention's
    two products, which stay in float, 2 · 2 · 128 · 768 operations for each token and layer, 1.2 G
    in all; and the pooler, which sees four tokens. The weights are 170 MB in float32, 42 in int8.
    """
    layers = model.get_submodule("bert.encoder")
    weights = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    return 2 * weights * size.batch * size.tokens


def ratios(rows: list[Measurement]) -> str:
    """How qnn compares with its two nearest peers: the two figures that have goals."""

    def best(family: str, mode: str, precisions: tuple[str, ...]) -> Measurement | None:
        timed = [row for row in rows if (row.family, row.mode) == (family, mode)]
        timed = [r for r in timed if r.median_ms is not None and r.precision in precisions]
        return min(timed, key=lambda row: row.median_ms or 0.0, default=None)

    any_precision = ("fp32", "bf16")
    pairs = [
        (best("qnn int8", "eager", ("fp32",)), best("torch.ao int8", "eager", ("fp32",)), 1.6),
        (
            best("qnn int8", "compiled", any_precision),
            best("torchao int8", "compiled+frozen", any_precision),
            1.8,
        ),
    ]
    body = []
    for ours, theirs, goal in pairs:
        if ours is None or theirs is None or ours.median_ms is None or theirs.median_ms is None:
            body.append(("not measured", "-", f"{goal}", "-"))
            continue
        ratio = ours.median_ms / theirs.median_ms
        what = f"{ours.variant} / {theirs.variant}"
        body.append((what, f"{ratio:.2f}", f"{goal}", "yes" if ratio <= goal else "no"))
    return table(("ratio of times", "measured", "at most", "met"), body)


def bytes_at_rest(model: nn.Module) -> str:
    """What parameters and buffers take, by `qnn.summary`."""
    body = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        summary = qnn.summary(qnn.convert(model, "int8").to(dtype))
        linear = [row for row in summary.rows if row.scheme]
        before, after = (
            sum(getattr(r, f"bytes_{when}") for r in linear) for when in ("before", "after")
        )
        totals = (before, after, summary.bytes_before, summary.bytes_after)
        body.append((name, *(f"{count / 1e6:.1f}" for count in totals)))
    head = ("MB at rest", "linear, float", "linear, int8", "model, float", "model, int8")
    return table(head, body)


def main() -> None:
    options = argument_parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    effort = Effort(rounds=3, seconds=5) if options.quick else Effort(rounds=15, seconds=120)
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
    parts = [case_table(rows, BASELINE), ratios(rows), bytes_at_rest(task.model)]
    print("", *parts, sep="\n\n")
    save(
        options.out,
        "bench_model",
        str(size),
        rows,
        parts,
        lambda machine: times_chart(rows, str(size), machine),
    )


if __name__ == "__main__":
    main()
