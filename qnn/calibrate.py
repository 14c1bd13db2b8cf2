"""`calibrate`: show a prepared model its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any, TypeVar

import torch
from torch import nn

from qnn.fake_quantize import observation_points
from qnn.forking import return_threads
from qnn.progress import Meter, check_progress

ModelT = TypeVar("ModelT", bound=nn.Module)


def calibrate(model: ModelT, batches: Iterable[Any], *, progress: bool | str = True) -> ModelT:
    """Run `model` on `batches`, so that its observation points record their ranges.

    It runs in evaluation mode and without gradients; every module's mode is as before at the end.
    Nothing is moved between devices. A few hundred samples that are like those of use are enough.

    Args:
        model: with observation points, as `qnn.prepare` returns it.
        batches: for each call a tensor, a tuple or list (positional arguments), or a mapping
            (keyword arguments).
        progress: a line on stderr: True if stderr is a terminal, `"always"` in any case, False
            never.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no observation points or all are frozen or fixed, or there are no
            batches.

    >>> import qnn
    >>> layer = qnn.ObservedLinear.from_float(nn.Linear(4, 2))
    >>> _ = calibrate(layer, [torch.randn(8, 4) for _ in range(3)])
    >>> qnn.QLinear.from_observed(layer).scheme
    'int8_static'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"qnn.calibrate takes an nn.Module, got {type(model).__name__}.")
    check_progress("qnn.calibrate", progress)
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise TypeError(
            f"qnn.calibrate: batches is a {type(batches).__name__}, one batch; pass [batch]."
        )
    points = list(observation_points(model))
    if not points:
        raise ValueError(
            "qnn.calibrate: the model has no observation points; qnn.prepare(model) inserts them."
        )
    if not any(point.observing for point in points):
        raise ValueError(
            f"qnn.calibrate: all {len(points)} observation points are frozen or fixed."
        )
    asleep = [point for point in points if point.qat]
    modes = [(module, module.training) for module in model.modules()]
    total = len(batches) if isinstance(batches, Sized) else None
    meter = Meter("qnn.calibrate", "batch", total, progress)
    model.eval()
    for point in asleep:  # in evaluation such a point would record nothing
        point.training = True
    try:
        with torch.no_grad():
            for batch in meter.each(batches):
                _call(model, batch)
    finally:
        for module, training in modes:
            module.training = training
        return_threads()
    if not meter.done:
        raise ValueError("qnn.calibrate: there are no batches; nothing was observed.")
    return model


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
