"""`compare`: how far a quantised model is from its float one, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

from qnn import kinds
from qnn.kinds import kind_of, waits
from qnn.verbs.calibrate import is_namedtuple
from qnn.verbs.checks import require_module
from qnn.verbs.tables import chart


def sqnr(reference: torch.Tensor, value: torch.Tensor) -> float:
    """Signal to quantisation noise ratio in dB: `10 log10(sum(reference²) / sum((reference −
    value)²))`; inf where equal.
    """
    power = _Power()
    power.add(reference, value)
    return power.db


@dataclass
class _Power:
    signal: float = 0.0
    noise: float = 0.0

    def add_all(self, reference: Any, value: Any) -> None:
        """What two calls returned: a tensor, or tensors in tuples, lists and mappings."""
        for expected, got in zip(_tensors(reference), _tensors(value), strict=True):
            self.add(expected, got)

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        if reference.shape != value.shape:
            raise ValueError(
                f"qnn.compare: outputs differ in shape, {list(reference.shape)} and "
                f"{list(value.shape)}."
            )
        reference, value = reference.detach().double(), value.detach().double()
        self.signal += reference.square().sum().item()
        self.noise += (reference - value).square().sum().item()

    @property
    def db(self) -> float:
        if math.isnan(self.signal) or math.isnan(self.noise):
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf


@dataclass(frozen=True)
class Row:
    """A layer's SQNR in dB: `sqnr` where it stands in the quantised model, with the noise that
    comes in from the layers before it; `alone`, fed with the float model's input. The row named
    `(output)` is the model's. A layer that was never called has NaN, and a note.
    """

    name: str
    scheme: str | None
    sqnr: float
    alone: float | None
    note: str | None = None


class Comparison:
    """The table that `compare` returns, worst layer first; before it those never called."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = sorted(
            rows, key=lambda row: (row.note is None, not math.isnan(row.sqnr), row.sqnr)
        )

    @property
    def output(self) -> float:
        """SQNR of the model's output, in dB."""
        return next(row.sqnr for row in self.rows if row.name == OUTPUT)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'layer'.ljust(width)}  scheme       SQNR dB  alone dB"]
        for row in self.rows:
            alone = "-" if row.alone is None else f"{row.alone:.1f}"
            within = f"{row.sqnr:7.1f}  {alone:>8}" if row.note is None else row.note
            lines.append(f"{row.name.ljust(width)}  {row.scheme or '-':11}  {within}")
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, path: str | Path) -> Path:
        """Write a bar chart, worst layer on top; the format follows the file's ending. Needs
        matplotlib.
        """
        rows = [row for row in self.rows if math.isfinite(row.sqnr)][::-1]
        figure, axes = chart("qnn.Comparison.plot", len(rows))
        axes.barh(
            [row.name for row in rows],
            [row.sqnr for row in rows],
            color="#4477aa",
            label="in the model",
        )
        alone = [
            (row.name, row.alone)
            for row in rows
            if row.alone is not None and math.isfinite(row.alone)
        ]
        axes.plot([value for _, value in alone], [name for name, _ in alone], "k|", label="alone")
        axes.set_xlabel("SQNR against float, dB")
        axes.legend(loc="lower right")
        figure.savefig(path)
        return Path(path)


OUTPUT = "(output)"
_NEVER = "never called: its weight may be read directly"
_FUNCTION = "the float model calls a function here: compare with the prepared graph"


def compare(
    float_model: nn.Module,
    quantised_model: nn.Module,
    inputs: torch.Tensor | tuple[Any, ...] | Mapping[str, Any],
) -> Comparison:
    """Run both models on `inputs` and give the SQNR of each quantised layer and of the output,
    worst first.

    They run in evaluation mode and without gradients; every module's mode is as before at the end.

    Args:
        float_model, quantised_model: the model before and after `convert`, also with
            `training=True`; or a graph of `qnn.pt2e` before and after `convert_pt2e`. Where a graph
            is compared with the model that it was exported from, a layer that is a function there
            has a note.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ValueError: `quantised_model` has no quantised layer, or one that the float model does not
            have or does not call as often; a layer of either has no values before its first batch.
    """
    require_module("qnn.compare", float_model)
    require_module("qnn.compare", quantised_model)
    inside = kinds.owners(quantised_model.modules())  # the float model's is not called
    layers: dict[str, Any] = {
        name: module
        for name, module in quantised_model.named_modules()
        if (kinds.is_quantized(module) or kinds.is_training(module)) and id(module) not in inside
    }
    if not layers:
        raise ValueError(
            "qnn.compare: the second model has no quantised layer; pass what qnn.convert returned."
        )
    originals = dict(float_model.named_modules())
    of_graph = isinstance(quantised_model, GraphModule)
    missing = [name for name in layers if of_graph and name not in originals]
    functions = {name: layers.pop(name) for name in missing}
    for name, layer in layers.items():
        kind, original = cast(kinds.Kind, kind_of(layer)), originals.get(name)
        if original is None or kind_of(original) is not kind:
            raise ValueError(
                f"qnn.compare: the float model has no {kind.name} layer {name!r}; are the models "
                "the same?"
            )
    for model in (float_model, quantised_model):
        for name, module in model.named_modules():
            if waits(module):
                raise ValueError(
                    f"qnn.compare: {name!r} ({type(module).__name__}) has no values before its "
                    "first batch, and would draw others in each model; run one batch before "
                    "qnn.convert."
                )

    alone = {name: _Power() for name in layers}
    within = {name: _Power() for name in layers}
    outputs: dict[str, list[Any]] = {name: [] for name in layers}
    called = set[str]()

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            called.add(name)
            outputs[name].append(output)
            alone[name].add_all(output, layers[name].forward(*args, **kwargs))

        return hook

    def judge(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not outputs[name]:
                raise ValueError(
                    f"qnn.compare: {name!r} is called more often in the quantised model than in "
                    "the float one."
                )
            within[name].add_all(outputs[name].pop(0), output)

        return hook

    with torch.no_grad(), evaluating(float_model, quantised_model):
        reference = _run(float_model, inputs, {originals[name]: record(name) for name in layers})
        value = _run(
            quantised_model, inputs, {layer: judge(name) for name, layer in layers.items()}
        )
    unmatched = next((name for name, held in outputs.items() if held), None)
    if unmatched is not None:
        raise ValueError(
            f"qnn.compare: {unmatched!r} is called more often in the float model than in the "
            "quantised one."
        )
    total = _Power()
    total.add_all(reference, value)
    rows = [
        Row(name, layer.scheme, within[name].db, alone[name].db)
        if name in called
        else Row(name, layer.scheme, math.nan, None, _NEVER)
        for name, layer in layers.items()
    ]
    rows += [Row(n, layer.scheme, math.nan, None, _FUNCTION) for n, layer in functions.items()]
    return Comparison([*rows, Row(OUTPUT, None, total.db, None)])


def _run(model: nn.Module, inputs: Any, hooks: dict[nn.Module, Any]) -> Any:
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        several = isinstance(inputs, tuple) and not is_namedtuple(inputs)
        return model(*inputs) if several else model(inputs)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and every module's own mode again afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _tensors(output: Any) -> list[torch.Tensor]:
    """The float tensors of a model's output, in order: of tuples, lists, mappings and transformers'
    outputs.
    """
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for part in output.values() for t in _tensors(part)]
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in _tensors(part)]
    return []
