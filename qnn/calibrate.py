"""`calibrate`: show a prepared model its data."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sized
from typing import Any, TypeVar

import torch
from torch import nn

from qnn.fake_quantize import observation_points
from qnn.forking import return_threads

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
    if progress not in (True, False, "always"):
        raise ValueError(
            f"qnn.calibrate: progress must be True, False or 'always', got {progress!r}."
        )
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
    meter = _Meter(batches, progress)
    model.eval()
    for point in asleep:  # in evaluation such a point would record nothing
        point.training = True
    try:
        with torch.no_grad():
            for batch in meter:
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


class _Meter:
    """The batches, with a line on stderr that counts them."""

    def __init__(self, batches: Iterable[Any], progress: bool | str) -> None:
        self.batches, self.done = batches, 0
        self.total = f"/{len(batches)}" if isinstance(batches, Sized) else ""
        self.shown = progress == "always" or (bool(progress) and sys.stderr.isatty())

    def __iter__(self) -> Any:
        start = shown = time.monotonic()
        for batch in self.batches:
            yield batch
            self.done += 1
            now = time.monotonic()
            if self.shown and now - shown > 0.1:
                shown = now
                self._show(now - start)
        if self.shown and self.done:
            self._show(time.monotonic() - start)
            sys.stderr.write("\n")

    def _show(self, seconds: float) -> None:
        sys.stderr.write(f"\rqnn.calibrate: batch {self.done}{self.total}, {seconds:.1f} s")
        sys.stderr.flush()
