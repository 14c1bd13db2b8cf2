"""Graph mode: exported models, quantised by qnn.pt2e and its peers.

    python benchmarks/bench_pt2e.py                       # docs/benchmarks/bench_pt2e.*
    python benchmarks/bench_pt2e.py --only 'qnn|float'    # some variants, and the baseline
    python benchmarks/bench_pt2e.py --case BERT --batches 64
    python benchmarks/bench_pt2e.py --quick --out /tmp/bench

The networks are those of bench_conv.py, the small ResNet of examples/convnet_int8.py on images of
8×8, and two layers of BERT, 256 wide, on 64 tokens; all with random weights (seed 0). The last two
are run with batches of 64.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bench_conv import WithInputs, cases_of, networks, settled
from graph_variants import VARIANTS
from torch import nn

from harness import all_rows, argument_parser, measure_grid, select
from report import Aim, Pick, aims_table, case_table, save, size_table, speedups_chart, without_time
from timing import Effort
from variants import Task

BASELINE = "float fp32 compiled"
SMALL_BATCH, TOKENS = 64, 64


class Words(nn.Module):
    """Two layers of BERT with a plain tensor as the result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=4 * width,
            vocab_size=2000,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids, return_dict=False)[0]


def digits_network() -> nn.Module:
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from convnet_int8 import FULL, resnet

    return resnet(FULL["width"])


def models(quick: bool, batches: Sequence[int]) -> Iterator[WithInputs]:
    torch.manual_seed(0)
    words = Words(32 if quick else 256).eval()
    of_words = [torch.randint(2000, (1, TOKENS)) for _ in range(8)]
    x = torch.randint(2000, (SMALL_BATCH, TOKENS))
    yield "BERT, 2 layers", Task(words, x, tuple(of_words), transformer=True), [x]
    images = torch.channels_last
    small = settled(digits_network(), 8, channels=1)
    x = torch.randn(SMALL_BATCH, 1, 8, 8)
    of_small = tuple(torch.randn(1, 1, 8, 8) for _ in range(8))
    yield "digits ResNet", Task(small, x, of_small, memory_format=images), [x]
    for name, model, side in networks(quick):
        if name == "ResNet-50":
            continue
        inputs = [torch.randn(batch, 3, side, side) for batch in batches]
        calibration = tuple(torch.randn(1, 3, side, side) for _ in range(8))
        task = Task(settled(model, side), inputs[0], calibration, memory_format=images)
        yield name, task, inputs


# Times over the peer's time, at most.
_OVER = {"torchao PT2E": 0.9, "OpenVINO int8": 1.1}
_WHERE = (
    "BERT, 2 layers, batch 64",
    "digits ResNet, batch 64",
    *(f"{name}, batch {batch}" for name in ("ResNet-18", "MobileNetV2") for batch in (1, 16)),
)
AIMS = [
    Aim(case, Pick("qnn int8_static", "compiled"), Pick(family), round(1 / most, 2), (case,))
    for case in _WHERE
    for family, most in _OVER.items()
]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--case", default="", help="a regular expression of what is measured")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="of the networks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    effort = Effort(rounds=3, seconds=5) if options.quick else Effort(rounds=11, seconds=40)
    grid = measure_grid(
        cases_of(models(options.quick, options.batches), options.case),
        select(VARIANTS, options.only, BASELINE),
        baseline=BASELINE,
        effort=effort,
        show=case_table,
        verbose=options.verbose,
    )
    rows = all_rows(grid)
    parts = [f"## {name}\n\n{size_table(each)}" for name, each in grid.items()]
    parts += [aims_table(AIMS, rows), without_time(rows)]
    print("", *parts, sep="\n\n")
    charts = {"bench_pt2e": lambda machine: speedups_chart(grid, "graph mode", BASELINE, machine)}
    save(options.out, "bench_pt2e", "graph mode", rows, parts, charts)


if __name__ == "__main__":
    main()
