"""Convolutions: single layers and whole networks, qnn against float32, bfloat16 and the peers.

    python benchmarks/bench_conv.py                       # docs/benchmarks/bench_conv.*
    python benchmarks/bench_conv.py --only 'qnn|float'    # some variants, and the baseline
    python benchmarks/bench_conv.py --what transposed     # docs/benchmarks/bench_conv_transposed.*
    python benchmarks/bench_conv.py --quick --out /tmp/bench

The networks are transformers' ResNet-18, ResNet-50 and MobileNetV2 on 224×224, with random weights
(seed 0); the statistics of their BatchNorm layers come from random images, as training would leave
them. Every library gets the network in eval mode and folds BatchNorm in its own way. Layers are
those of the networks, and of a stack for speech. Transposed layers are a group of their own, which
runs in eager mode: on images as torch makes them, and in channels-last memory.

Counts. A convolution takes 2 · (elements of the output) · (input channels of a group) · (elements
of the kernel) operations, a transposed one 2 · (elements of the input) · (output channels of a
group) · (elements of the kernel); a network all of its convolutions and linear layers, counted by
hooks: 3.63 G for ResNet-18 on one image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from conv_variants import TRANSPOSED, VARIANTS
from harness import Case, all_rows, argument_parser, measure_grid, select
from report import (
    Aim,
    Pick,
    aims_table,
    case_table,
    save,
    size_table,
    speedups_chart,
    without_time,
)
from timing import Effort
from variants import Task

BASELINE = "float fp32 compiled"
EAGER = "float fp32 eager"  # the baseline of transposed layers
# int8 of random weights, whose activations are spread as of no trained network.
FLOOR = 8.0
WithInputs = tuple[str, Task, Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Convolution:
    """One convolution on an image `size`."""

    name: str
    make: type[nn.Module]
    channels: tuple[int, int]
    kernel: int
    size: tuple[int, ...]
    options: tuple[tuple[str, int], ...] = ()

    def build(self) -> nn.Module:
        options = {"padding": self.kernel // 2, **dict(self.options)}
        make: Any = self.make
        return make(*self.channels, self.kernel, **options)

    def input(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, self.channels[0], *self.size)


LAYERS = (
    Convolution("ResNet 3x3 64, 56²", nn.Conv2d, (64, 64), 3, (56, 56)),
    Convolution("ResNet 3x3 256, 14²", nn.Conv2d, (256, 256), 3, (14, 14)),
    Convolution("ResNet 1x1 256->64, 56²", nn.Conv2d, (256, 64), 1, (56, 56)),
    Convolution("ResNet 7x7/2 3->64, 224²", nn.Conv2d, (3, 64), 7, (224, 224), (("stride", 2),)),
    Convolution(
        "MobileNetV2 depthwise 144, 56²", nn.Conv2d, (144, 144), 3, (56, 56), (("groups", 144),)
    ),
    Convolution("MobileNetV2 1x1 24->144, 56²", nn.Conv2d, (24, 144), 1, (56, 56)),
    Convolution("speech 1-D k=3/2 512, T=400", nn.Conv1d, (512, 512), 3, (400,), (("stride", 2),)),
)
_DOUBLED = (("stride", 2), ("padding", 1))
_TILED = (("stride", 2), ("padding", 0))
_VOCODER = (("stride", 8), ("padding", 4))
TRANSPOSED_LAYERS = (
    Convolution("4x4/2 64->32, 64²", nn.ConvTranspose2d, (64, 32), 4, (64, 64), _DOUBLED),
    Convolution("4x4/2 64->32, 28²", nn.ConvTranspose2d, (64, 32), 4, (28, 28), _DOUBLED),
    Convolution("2x2/2 128->64, 64²", nn.ConvTranspose2d, (128, 64), 2, (64, 64), _TILED),
    Convolution("3x3 256->256, 28²", nn.ConvTranspose2d, (256, 256), 3, (28, 28)),
    Convolution("1-D k=16/8 256->128, T=200", nn.ConvTranspose1d, (256, 128), 16, (200,), _VOCODER),
)
QUICK_TRANSPOSED = (
    Convolution("4x4/2 8->4, 5²", nn.ConvTranspose2d, (8, 4), 4, (5, 5), _DOUBLED),
    Convolution("1-D k=16/8 8->4, T=9", nn.ConvTranspose1d, (8, 4), 16, (9,), _VOCODER),
)
QUICK_LAYERS = (Convolution("3x3 8, 8²", nn.Conv2d, (8, 8), 3, (8, 8)),)


class Logits(nn.Module):
    """A network of transformers that gives a plain tensor, which every exporter takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values, return_dict=False)[0]


def networks(quick: bool) -> Iterator[tuple[str, nn.Module, int]]:
    """Each with the side of its images."""
    from transformers import (
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
    )

    basic = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    if quick:
        small = ResNetConfig(**{**basic, "hidden_sizes": [8, 16], "depths": [1, 1]})
        yield "small ResNet", Logits(ResNetForImageClassification(small)), 32
        return
    classes = {"num_labels": 1000}  # an SQNR of two logits would be a matter of luck
    resnet18 = ResNetConfig(**basic, **classes)
    yield "ResNet-18", Logits(ResNetForImageClassification(resnet18)), 224
    yield "ResNet-50", Logits(ResNetForImageClassification(ResNetConfig(**classes))), 224
    mobilenet = MobileNetV2ForImageClassification(MobileNetV2Config(**classes))
    yield "MobileNetV2", Logits(mobilenet), 224


@torch.no_grad()
def settled(model: nn.Module, side: int, channels: int = 3) -> nn.Module:
    """`model` in eval mode, its BatchNorm layers with the statistics of random images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    model.train()
    for _ in range(3):
        model(torch.randn(4, channels, side, side))
    return model.eval()


@torch.no_grad()
def counted_operations(model: nn.Module, x: torch.Tensor) -> int:
    """Of the convolutions and linear layers of one call."""
    counted = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal counted
        weight: Any = module.weight
        each = inputs[0] if isinstance(module, transposed) else output
        counted += 2 * each.numel() * math.prod(weight.shape[1:])

    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear, *transposed)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    model(x)
    for hook in hooks:
        hook.remove()
    return counted


def tasks(quick: bool, what: str, batches: Sequence[int]) -> Iterator[WithInputs]:
    task_of = partial(Task, memory_format=torch.channels_last)
    torch.manual_seed(0)
    if what == "transposed":
        for layer in QUICK_TRANSPOSED if quick else TRANSPOSED_LAYERS:
            model, calibration = layer.build().eval(), tuple(layer.input(1) for _ in range(4))
            inputs = [layer.input(batch) for batch in batches]
            yield layer.name, Task(model, inputs[0], calibration), inputs
            if len(layer.size) == 2:
                task = task_of(model, inputs[0], calibration)
                yield f"{layer.name}, channels-last", task, inputs
        return
    if what != "networks":
        for layer in QUICK_LAYERS if quick else LAYERS:
            calibration = tuple(layer.input(1) for _ in range(4))
            inputs = [layer.input(batch) for batch in batches]
            yield layer.name, task_of(layer.build().eval(), inputs[0], calibration), inputs
    if what != "layers":
        for name, model, side in networks(quick):
            model = settled(model, side)
            calibration = tuple(torch.randn(1, 3, side, side) for _ in range(8))
            inputs = [torch.randn(batch, 3, side, side) for batch in batches]
            yield name, task_of(model, inputs[0], calibration), inputs


def cases_of(tasks: Iterable[WithInputs], only: str) -> Iterator[Case[Task]]:
    for name, task, inputs in list(tasks):  # drawn before anything runs
        for x in inputs if re.search(only, name) else ():
            with torch.no_grad():
                reference = task.model(x)
            count = counted_operations(task.model, x)
            of_batch = replace(task, input=x)
            yield Case(name, f"batch {len(x)}", of_batch, reference, count, lambda _: FLOOR)


# Where, over whom, and how many times as fast at least.
_STATIC = (
    ("ResNet-18, batch 1", "torchao PT2E", 1 / 0.8),
    ("ResNet-18, batch 16", "torchao PT2E", 1 / 0.9),
    ("ResNet-18, batch 1", "ONNX Runtime int8", 1 / 0.85),
    ("ResNet-18, batch 16", "ONNX Runtime int8", 1 / 0.85),
    ("ResNet-18, batch 1", "OpenVINO int8", 1 / 1.1),
    ("ResNet-18, batch 16", "OpenVINO int8", 1 / 1.05),
    ("MobileNetV2, batch 1", "torchao PT2E", 1 / 0.3),
    ("MobileNetV2, batch 16", "torchao PT2E", 1 / 0.4),
    ("MobileNetV2, batch 1", "ONNX Runtime int8", 1 / 0.95),
    ("MobileNetV2, batch 16", "ONNX Runtime int8", 1 / 0.7),
    ("MobileNetV2, batch 1", "OpenVINO int8", 1 / 1.05),
    ("MobileNetV2, batch 16", "OpenVINO int8", 1 / 1.05),
)
_DYNAMIC = tuple(
    (f"{name}, batch {batch}", "float", 1 / 0.45)
    for name in ("ResNet-18", "MobileNetV2")
    for batch in (1, 16)
)


AIMS = [
    Aim(case, Pick("qnn int8_static", "compiled"), Pick(family), round(goal, 2), (case,))
    for case, family, goal in _STATIC
] + [
    Aim(case, Pick("qnn int8", "compiled"), Pick(family, "compiled", "fp32"), goal, (case,))
    for case, family, goal in _DYNAMIC
]


CHOICES = ("layers", "networks", "both", "transposed")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--what", choices=CHOICES, default="both")
    parser.add_argument("--case", default="", help="a regular expression of what is measured")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    effort = Effort(rounds=3, seconds=5) if options.quick else Effort(rounds=11, seconds=40)
    transposed = options.what == "transposed"
    name, title = "bench_conv", "convolutions"
    if transposed:
        name, title = "bench_conv_transposed", "transposed convolutions"
    variants, baseline = (TRANSPOSED, EAGER) if transposed else (VARIANTS, BASELINE)
    grid = measure_grid(
        cases_of(tasks(options.quick, options.what, options.batches), options.case),
        select(variants, options.only, baseline),
        baseline=baseline,
        effort=effort,
        show=case_table,
        verbose=options.verbose,
    )
    rows = all_rows(grid)
    parts = [f"## {layer}\n\n{size_table(each)}" for layer, each in grid.items()]
    parts += [*([] if transposed else [aims_table(AIMS, rows)]), without_time(rows)]
    print("", *parts, sep="\n\n")
    save(
        options.out,
        name,
        title,
        rows,
        parts,
        {name: lambda machine: speedups_chart(grid, title, baseline, machine)},
    )


if __name__ == "__main__":
    main()
