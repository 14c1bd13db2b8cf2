"""`bench`: how long a model takes, and how large it is, beside another."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qnn import kinds
from qnn.verbs.calibrate import call
from qnn.verbs.checks import require_module
from qnn.verbs.inventory import size
from qnn.verbs.tables import aligned
from qnn.verbs.timing import CPU, Effort, interleave
from qnn.verbs.trial import bytes_of, undisturbed

_WHO = "qnn.bench"


@dataclass(frozen=True)
class Timing:
    """What a model takes.

    Attributes:
        name: `"model"` or `"other"`.
        layers: how many of its layers are quantised.
        ms: median latency of a call in milliseconds.
        fastest, slowest: the tenth and the ninetieth percentile.
        calls: how many were timed.
        bytes: of its parameters and buffers.
    """

    name: str
    layers: int
    ms: float
    fastest: float
    slowest: float
    calls: int
    bytes: int


class Bench:
    """The table that `bench` returns: `print` it, or read its `rows`."""

    def __init__(self, rows: list[Timing]) -> None:
        self.rows = rows

    @property
    def ratio(self) -> float | None:
        """Latency of `model` over that of `other`: below 1 where `model` is faster."""
        return self.rows[0].ms / self.rows[1].ms if len(self.rows) == 2 else None

    @property
    def bytes_ratio(self) -> float | None:
        """Bytes of `model` over those of `other`."""
        if len(self.rows) < 2 or not self.rows[1].bytes:
            return None
        return self.rows[0].bytes / self.rows[1].bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`."""
        rows = [asdict(row) for row in self.rows]
        return {"rows": rows, "ratio": self.ratio, "bytes_ratio": self.bytes_ratio}

    def __str__(self) -> str:
        table = [["", "quantised layers", "median ms", "10 % … 90 %", "calls", "bytes"]]
        for row in self.rows:
            spread = f"{row.fastest:.3g} … {row.slowest:.3g}"
            layers, calls = str(row.layers), str(row.calls)
            table.append([row.name, layers, f"{row.ms:.4g}", spread, calls, size(row.bytes)])
        lines = aligned(table)
        if self.ratio is not None and self.bytes_ratio is not None:
            lines.append(f"model / other: {self.ratio:.2f} of the time, {self.bytes_ratio:.2f} of "
                         "the bytes")  # fmt: skip
        return "\n".join(lines)

    __repr__ = __str__


def bench(
    model: nn.Module, inputs: Any, other: nn.Module | None = None, *, seconds: float = 10.0
) -> Bench:
    """Time `model` on `inputs`, and `other` in turns with it, so that what else the machine does
    meets both.

    They run in evaluation mode and without gradients. Each turn begins with calls that are not
    timed; there are three rounds of turns at least, so the first call, in which a compiled model is
    compiled and weights are packed, does not count. On a GPU a call is timed to the end of its last
    kernel, with a cold L2 cache.

    Args:
        model: any module, such as the quantised model; compiled ones too.
        inputs: one batch, as in `qnn.calibrate`, on the model's device.
        other: what it is compared with, such as the float model.
        seconds: after how long no further round begins.

    Returns:
        Latency, bytes of parameters and buffers, and the ratio. Caches of packed weights are not
        among the bytes.

    Raises:
        ValueError: `seconds` is not positive; observers of another library.
        TypeError: an argument of the wrong kind.

    Warns:
        UserWarning: the one with more quantised layers is the slower one, by its median and by its
            fastest calls.

    >>> model = nn.Linear(64, 64)
    >>> result = bench(qnn.convert(model), torch.randn(8, 64), model, seconds=0.1)
    >>> [row.bytes for row in result.rows]
    [4608, 16640]
    """
    models = {"model": model} if other is None else {"model": model, "other": other}
    for each in models.values():
        require_module(_WHO, each)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ValueError(f"{_WHO}: seconds must be a positive number, got {seconds!r}.")
    device = next((p.device for p in (*model.parameters(), *model.buffers())), CPU)
    with undisturbed(_WHO, *models.values()) as run:
        calls = {name: _caller(each, inputs) for name, each in models.items()}
        samples = run(lambda: interleave(calls, Effort(seconds=seconds), device))
    rows = []
    for name, each in models.items():
        ms = sorted(1e3 * value for value in samples[name].wall)
        tenth = len(ms) // 10
        layers = sum(map(kinds.is_quantized, each.modules()))
        rows.append(
            Timing(
                name,
                layers,
                statistics.median(ms),
                ms[tenth],
                ms[-1 - tenth],
                len(ms),
                bytes_of(each),
            )
        )
    if len(rows) == 2:
        _warn_of_loss(rows, inputs)
    return Bench(rows)


def _caller(model: nn.Module, inputs: Any) -> Any:
    return lambda: call(model, inputs)


def _warn_of_loss(rows: list[Timing], inputs: Any) -> None:
    more, less = sorted(rows, key=lambda row: -row.layers)
    if more.layers > less.layers and more.ms > less.ms and more.fastest > less.fastest:
        shapes = ", ".join(str(list(each.shape)) for each in _tensors(inputs))
        warnings.warn(
            f"{_WHO}: the model with {more.layers} quantised layers takes {more.ms / less.ms:.2f} "
            f"times as long as the one with {less.layers}, on inputs {shapes or type(inputs)}. "
            "Small layers and few rows gain nothing; torch.compile folds what stands around the "
            "layers; python -m qnn doctor and qnn.summary(model) say which kernels run.",
            stacklevel=3,
        )


def _tensors(inputs: Any) -> list[torch.Tensor]:
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    listed = values if isinstance(inputs, Mapping | tuple | list) else [inputs]
    return [each for each in listed if isinstance(each, torch.Tensor)]
