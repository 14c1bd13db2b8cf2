"""`correct_bias`: what quantising took from the means of results, back into the biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from qnn.kinds import kind_of
from qnn.nn.base import Quantized
from qnn.verbs.calibrate import call, is_namedtuple, kept_of
from qnn.verbs.checks import require_module
from qnn.verbs.compare import evaluating
from qnn.verbs.plan import FOLDED

ModelT = TypeVar("ModelT", bound=nn.Module)

_SHARE = 1 / 20


def correct_bias(model: ModelT, reference: nn.Module, batches: Iterable[Any]) -> ModelT:
    """Add to the bias of each quantised linear layer and convolution the mean of what its result
    lacks, per channel, over the batches:

        bias += mean(float_layer(x) − quantised_layer(x)),   x the float model's input of the layer

    Only channels whose mean is a twentieth or more of the error's mean square are corrected: a mean
    that comes from a few values which the grid cuts off is not one of the others. Rounding errs to
    one side where many values of an input, or of a weight's row, share a value,
    as after a GELU. The float model runs once; each layer is measured alone, so their order does
    not matter. Rows that an `attention_mask` `[B, T]` of a batch shows to be padding do not count.
    A layer without a bias gets none, and one that the float model does not call, as the `out_proj`
    of an `nn.MultiheadAttention`, keeps its own. `qnn.summary` says which were corrected.

    Args:
        model: from `qnn.convert`; changed in place.
        reference: the float model that it was made from.
        batches: as in `qnn.calibrate`.

    Returns:
        `model`.

    Raises:
        ValueError: no layer with a bias, a layer that the reference does not have or has with
            another weight, as before a BatchNorm was folded, a bias that two layers share, no layer
            that was called, or a mean that is not finite. Nothing has been changed then.
        TypeError: one of the two is not an `nn.Module`, or `batches` is one batch.

    >>> reference = nn.Sequential(nn.Linear(64, 8))
    >>> model = correct_bias(qnn.convert(reference), reference, [torch.rand(32, 64)])
    """
    who = "qnn.correct_bias"
    require_module(who, model)
    require_module(who, reference)
    if isinstance(batches, (torch.Tensor, Mapping)) or is_namedtuple(batches):
        raise TypeError(f"{who}: batches is a {type(batches).__name__}, one batch; pass [batch].")
    layers = {name: m for name, m in model.named_modules() if _axis(m) is not None}
    if not layers:
        raise ValueError(f"{who}: the model has no quantised linear layer or convolution with a "
                         "bias; convert it first.")  # fmt: skip
    floats = dict(reference.named_modules(remove_duplicate=False))
    if missing := [name for name in layers if name not in floats]:
        raise ValueError(f"{who}: the reference has no {missing[0]!r}; pass the float model that "
                         "was converted.")  # fmt: skip
    if strange := [name for name in layers if _is_another(layers[name], floats[name])]:
        raise ValueError(
            f"{who}: the reference's {strange[0]!r} has another weight than the quantised layer. "
            "Where a BatchNorm was folded into it, pass qnn.fuse(model), or the graph of "
            "qnn.pt2e.prepare_pt2e."
        )
    if len({id(m.bias) for m in layers.values()}) < len(layers):
        raise ValueError(f"{who}: several layers share one bias, and each would need its own.")
    means = {name: _Mean() for name in layers}
    kept: list[torch.Tensor | None] = [None]

    def watch(name: str) -> Any:
        layer: Any = layers[name]

        def look(_: nn.Module, args: Any, kwargs: Any, y: torch.Tensor) -> None:
            means[name].add(y - layer.forward(*args, **kwargs), _axis(layer) or 0, kept[0])

        return look

    with ExitStack() as stack:
        for name in layers:
            handle = floats[name].register_forward_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(reference))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for batch in batches:
            kept[0] = kept_of(batch)
            call(reference, batch)
    called = {name: mean for name, mean in means.items() if mean.count}
    if not called:
        raise ValueError(
            f"{who}: there are no batches, or the reference calls none of the layers on them."
        )
    for name, mean in called.items():
        if not bool(mean.squares.isfinite().all()):
            raise ValueError(f"{who}: the results of {name!r} hold NaN or inf.")
    with torch.no_grad():
        for name, mean in called.items():
            layer: Any = layers[name]
            layer.bias.copy_(layer.bias.double() + mean.value())
            told = getattr(layer, FOLDED, "")
            if "bias corrected" not in told:
                layer.__dict__[FOLDED] = f"{told}; bias corrected"
    return model


def _is_another(layer: Any, reference: Any) -> bool:
    """Whether a reference is not what a layer was quantised from; 4 bits leave a tenth of error."""
    if (weight := reference._parameters.get("weight")) is None or layer.weight.is_meta:
        return False
    with torch.no_grad():
        want, got = weight.double(), layer.weight.double()
        off = want.shape != got.shape or bool((got - want).norm() > 0.5 * want.norm())
    return off or reference._parameters.get("bias") is None


def _axis(layer: nn.Module) -> int | None:
    """The channels' axis of a layer's results, counted from the end; None for what has no bias that
    can be corrected.
    """
    kind = kind_of(layer)
    if not isinstance(layer, Quantized) or kind is None or layer._parameters.get("bias") is None:
        return None
    if kind.name in ("linear", "Conv1D"):
        return -1
    if kind.name not in ("conv", "conv_transpose"):
        return None
    return 1 - len(layer._weight_shapes()["weight"])


class _Mean:
    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, error: torch.Tensor, axis: int, kept: torch.Tensor | None) -> None:
        rows = error.movedim(axis, -1)
        if kept is not None and kept.device == rows.device and rows.shape[:-1] == kept.shape:
            rows = rows[kept]
        rows = rows.reshape(-1, rows.shape[-1]).double()
        self.total = self.total.to(rows.device) + rows.sum(0)
        self.squares = self.squares.to(rows.device) + rows.square().sum(0)
        self.count += rows.shape[0]

    def value(self) -> torch.Tensor:
        """The mean of each channel, 0 where it is little beside the mean square."""
        mean = self.total / self.count
        return mean.where(mean.square() > _SHARE * self.squares / self.count, 0)


__all__ = ["correct_bias"]
