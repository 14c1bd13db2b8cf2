"""`QuantSpec`: how one tensor is quantised, and how its range is found."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import torch

from qnn.functional.ranges import qparams

DTYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
OBSERVERS = ("minmax", "moving_average", "histogram", "mse", "percentile")
# Tables hold the range as float32, which is exact up to here.
_EXACT = 2**24


@dataclass(frozen=True, repr=False)
class QuantSpec:
    """How one tensor is quantised: `q = clamp(round(x / scale) + zero_point, qmin, qmax)`.

    Args:
        dtype: uint8, int8, uint16, int16, or int32 with `qmin` and `qmax`.
        symmetric: the zero point is the middle of the range, 0 for a signed dtype; otherwise it is
            found with the scale.
        channel_axis: per-channel: the axis with a scale for each element; per-tensor if None.
        qmin, qmax: the range of `q`; that of `dtype` if None, and −127 … 127 (−32767 … 32767) for a
            symmetric int8 (int16).
        observer: what finds the range: `"minmax"`, `"moving_average"`, `"histogram"`, `"mse"`,
            `"percentile"`, or a subclass of `qnn.calibration.observers.Observer`.
        percentile: of `"percentile"`, above 50 and up to 100; 99.99 if None.
        learnable: the scale is trained (LSQ), from what was observed first or from `scale`.
        limit: an observed range is cut at ±limit, for what may grow without meaning more; not cut
            if None.
        scale, zero_point: fixed, and nothing is observed; a number, or one for each channel.

    Raises:
        ValueError, TypeError: an argument that makes no sense, by name.

    >>> QuantSpec(torch.int8, symmetric=True).qmin
    -127
    >>> QuantSpec(torch.uint16, observer="mse")
    QuantSpec(torch.uint16, observer='mse')
    """

    dtype: torch.dtype = torch.uint8
    _: KW_ONLY
    symmetric: bool = False
    channel_axis: int | None = None
    qmin: int = None  # type: ignore[assignment]  # an int after the constructor
    qmax: int = None  # type: ignore[assignment]
    observer: str | type[Any] = "minmax"
    percentile: float | None = None
    learnable: bool = False
    limit: float | None = None
    scale: float | tuple[float, ...] | None = None
    zero_point: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            accepted = ", ".join(map(str, DTYPES))
            raise TypeError(f"qnn.QuantSpec: dtype must be one of {accepted}; got {self.dtype!r}.")
        for name in ("symmetric", "learnable"):
            if not isinstance(getattr(self, name), bool):
                self._fail(f"{name} must be True or False, got {getattr(self, name)!r}")
        axis = self.channel_axis
        if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
            self._fail(f"channel_axis must be an int or None, got {axis!r}")
        self._set_range()
        self._check_observer()
        if self.limit is not None and not (
            isinstance(self.limit, int | float) and 0 < self.limit < math.inf
        ):
            self._fail(f"limit must be a positive number or None, got {self.limit!r}")
        if self.learnable and self.qmax < 1:
            self._fail(f"learnable needs qmax to be at least 1, got {self.qmax}")
        if self.scale is None:
            if self.zero_point is not None:
                self._fail("zero_point is given and scale is not; fix both, or neither")
            return
        self._set_fixed()

    def __repr__(self) -> str:
        """The call that makes it: what is not at its default."""
        given = [str(self.dtype)]
        if (self.qmin, self.qmax) != self._whole:
            given += [f"qmin={self.qmin}", f"qmax={self.qmax}"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("dtype", "qmin", "qmax") and value != field.default:
                name = value.__name__ if isinstance(value, type) else repr(value)
                given.append(f"{field.name}={name}")
        return f"QuantSpec({', '.join(given)})"

    @property
    def _whole(self) -> tuple[int, int]:
        """The range where none is given; that of a symmetric signed dtype is symmetric."""
        info = torch.iinfo(self.dtype)
        return info.min + (self.symmetric and info.min < 0), info.max

    def _set_range(self) -> None:
        if self.dtype == torch.int32 and (self.qmin is None or self.qmax is None):
            self._fail("dtype int32 needs qmin and qmax, both within ±2**24")
        least, most = self._whole
        qmin = least if self.qmin is None else self.qmin
        qmax = most if self.qmax is None else self.qmax
        info = torch.iinfo(self.dtype)
        for name, value in (("qmin", qmin), ("qmax", qmax)):
            if not isinstance(value, int) or isinstance(value, bool):
                self._fail(f"{name} must be an int, got {value!r}")
            low, high = max(info.min, -_EXACT), min(info.max, _EXACT)
            if not low <= value <= high:
                self._fail(f"{name} must lie in {low} … {high}, got {value}")
        if qmin >= qmax:
            self._fail(f"qmin must be below qmax, got {qmin} and {qmax}")
        object.__setattr__(self, "qmin", qmin)
        object.__setattr__(self, "qmax", qmax)

    def _check_observer(self) -> None:
        observer = self.observer
        if isinstance(observer, str):
            if observer not in OBSERVERS:
                known = ", ".join(map(repr, OBSERVERS))
                self._fail(f"observer must be one of {known}, or a class; got {observer!r}")
        elif not isinstance(observer, type):
            raise TypeError(f"qnn.QuantSpec: observer must be a name or a class, got {observer!r}.")
        if self.percentile is None:
            return
        if isinstance(observer, str) and observer != "percentile":
            self._fail(f"percentile belongs to observer='percentile', got observer={observer!r}")
        if not (isinstance(self.percentile, int | float) and 50 < self.percentile <= 100):
            self._fail(f"percentile must be above 50 and up to 100, got {self.percentile!r}")

    def _set_fixed(self) -> None:
        scale = _tuple(self.scale, float, "scale")
        given = self.middle if self.symmetric else 0
        point = given if self.zero_point is None else self.zero_point
        zero_point = _tuple(point, int, "zero_point")
        if not all(math.isfinite(s) and s >= torch.finfo(torch.float32).tiny for s in scale):
            self._fail(f"scale must be positive and finite in float32, got {self.scale!r}")
        if not all(self.qmin <= z <= self.qmax for z in zero_point):
            self._fail(
                f"zero_point must lie in qmin … qmax = {self.qmin} … {self.qmax}, got {point!r}"
            )
        if self.symmetric and any(z != self.middle for z in zero_point):
            self._fail(f"zero_point of a symmetric spec is {self.middle}, got {point!r}")
        if self.channel_axis is None and len(scale) + len(zero_point) > 2:
            self._fail("scale and zero_point have several values; that needs a channel_axis")
        if len(zero_point) not in (1, len(scale)):
            self._fail(f"scale has {len(scale)} values and zero_point {len(zero_point)}")
        object.__setattr__(self, "scale", scale if len(scale) > 1 else scale[0])
        object.__setattr__(self, "zero_point", zero_point if len(zero_point) > 1 else zero_point[0])

    def _fail(self, reason: str) -> None:
        raise ValueError(f"qnn.QuantSpec: {reason}.")

    @property
    def middle(self) -> int:
        """The zero point of a symmetric range: 0 for −127 … 127, 128 for uint8."""
        return (self.qmin + self.qmax + 1) // 2

    @property
    def fixed(self) -> bool:
        """Whether scale and zero point are given."""
        return self.scale is not None

    def qparams(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and zero point, float32 and int32, of the ranges `low … high`, as
        `qnn.functional.ranges.qparams` says.
        """
        return qparams(low, high, self.qmin, self.qmax, symmetric=self.symmetric, limit=self.limit)


def _tuple(value: Any, kind: type, name: str) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    try:
        if values and all(kind(v) == v or v != v for v in values):
            return tuple(map(kind, values))
    except (TypeError, ValueError):
        pass
    raise TypeError(
        f"qnn.QuantSpec: {name} must be {kind.__name__} or one for each channel, got {value!r}."
    )
