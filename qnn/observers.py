"""Observers: modules that see tensors go by and find the range to quantise them in.

Their statistics are buffers that are updated in place with plain tensor arithmetic, so observing
traces under `torch.compile(fullgraph=True)` and `torch.export` and needs no value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from qnn.quant_spec import QuantSpec

# Of a histogram's grid: 2^e and 2^(11 − e) are normal float32 numbers from the least e on.
_SIDE_BITS = 11
_LEAST_EXPONENT, _GREATEST_EXPONENT = -115, 128

_Self = TypeVar("_Self", bound="Statistics")


class Statistics(nn.Module):
    """A module with a row of float32 and integer buffers for each channel, which keep their dtypes
    through `.half()`. Before the number of channels is known it is 0.
    """

    _rows: dict[str, float]
    """The buffers with an axis of channels, and what they begin with."""

    def __init__(self) -> None:
        super().__init__()
        self._rows = {}

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, value: float) -> None:
        self._rows[name] = value
        self.register_buffer(name, torch.full(shape, value, dtype=dtype))

    def _grow(self, channels: int, who: str) -> None:
        """Make room for `channels`, once."""
        for name in self._rows:
            old = getattr(self, name)
            if old.shape[0] == channels:
                continue
            if old.shape[0]:
                raise ValueError(
                    f"{who}: the tensor has {channels} channels, but {old.shape[0]} before."
                )
            value = self._rows[name]
            setattr(self, name, torch.full_like(old.new_empty(channels, *old.shape[1:]), value))

    def _apply(
        self: _Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> _Self:
        kept = {name: tensor.data for name, tensor in [*self._own()]}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, data in kept.items():
            tensor = getattr(self, name)
            if tensor.dtype != data.dtype:
                tensor.data = data.to(tensor.device)
        return self

    def _own(self) -> list[tuple[str, torch.Tensor]]:
        return [(k, v) for k, v in {**self._buffers, **self._parameters}.items() if v is not None]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self._rows:
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if own.shape[:1] == (0,) and given is not None and given.dim() == own.dim():
                setattr(self, name, own.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Observer(Statistics):
    """Finds the range of what it is shown; the base of the others.

    A subclass declares its statistics, and defines `_update(x)`, where `x` is `[C, n]` (C = 1 where
    there is one scale for the tensor), `_merge(other)`, and `low_high()`.

    Args:
        spec: the integers and the axis of the channels.
        name: of the part that is observed, for errors.
        channels: how many there are; found at the first observation if None.
    """

    count: torch.Tensor

    def __init__(self, spec: QuantSpec, *, name: str = "", channels: int | None = None) -> None:
        super().__init__()
        self.spec, self.name = spec, name
        self._channels = 1 if spec.channel_axis is None else channels or 0
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    # What subclasses define.

    def _update(self, x: torch.Tensor) -> None:
        raise NotImplementedError

    def _merge(self, other: Any) -> None:
        raise NotImplementedError

    def low_high(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The range for each channel, float32 `[C]`; NaN or infinite where such a value was seen,
        and without meaning where nothing was.
        """
        raise NotImplementedError

    # What they have.

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Take the values of `x`, which stays as it is, into the statistics; an empty one changes
        nothing. A NaN is remembered.
        """
        # A size that is traced is not zero: torch compiles empty tensors apart.
        if any(isinstance(size, int) and size == 0 for size in x.shape):
            return
        x = x.detach()
        axis = self.spec.channel_axis
        if axis is None:
            x = x.reshape(1, -1)
        else:
            if not -x.dim() <= axis < x.dim():
                raise ValueError(
                    f"{self.who}: channel_axis is {axis}, but the tensor is {list(x.shape)}."
                )
            x = x.movedim(axis, 0)
            self._grow(x.shape[0], self.who)
            x = x.reshape(x.shape[0], -1)
        self._update(x)
        self.count.copy_(self.count + x.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`observe`, and `x` itself."""
        self.observe(x)
        return x

    def qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, float32 and int32 `[C]`, by the rule of `QuantSpec.qparams`.

        Raises:
            ValueError: nothing was observed, or a NaN or an infinite value.
        """
        self.check()
        return self.spec.qparams(*self.low_high())

    def check(self) -> None:
        """Raise a ValueError, with the part's name, where there is no finite range."""
        if not int(self.count):
            raise ValueError(
                f"{self.who}: nothing was observed; run qnn.calibrate(model, batches) first."
            )
        low, high = self.low_high()
        bad = ~(low.isfinite() & high.isfinite())
        if not bool(bad.any()):
            scale, _ = self.spec.qparams(low, high)
            bad = ~scale.isfinite()
        if bool(bad.any()):
            (at, *_) = bad.nonzero().flatten().tolist()
            where = "" if self.spec.channel_axis is None else f" of channel {at}"
            what = "NaN" if bool(low[at].isnan() | high[at].isnan()) else "infinite values"
            raise ValueError(
                f"{self.who}: the range{where} is {low[at].item():g} … {high[at].item():g}, since "
                f"{what} were observed; leave out the batch that has them, or this part."
            )

    def merge(self: Any, other: Any) -> None:
        """Add what `other`, of the same kind, has seen, as if this one had."""
        if type(other) is not type(self) or other.spec != self.spec:
            raise ValueError(
                f"{self.who}.merge: the other must be a {type(self).__name__} of {self.spec}, got "
                f"{other!r}."
            )
        rows = next(iter(other._rows), None)
        channels = getattr(other, rows).shape[0] if rows else 0
        if not channels:
            return
        self._grow(channels, f"{self.who}.merge")
        with torch.no_grad():
            self._merge(other)
            self.count.copy_(self.count + other.count)

    def reset(self) -> None:
        """Forget everything."""
        self.count.zero_()
        for name, value in self._rows.items():
            getattr(self, name).fill_(value)

    @property
    def who(self) -> str:
        """The observer, for errors."""
        return f"{type(self).__name__} of {self.name!r}" if self.name else type(self).__name__

    def extra_repr(self) -> str:
        return f"{self.spec}"


class MinMaxObserver(Observer):
    """The smallest and the largest value seen."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, spec: QuantSpec, *, name: str = "", channels: int | None = None) -> None:
        super().__init__(spec, name=name, channels=channels)
        self._declare("low", (self._channels,), torch.float32, torch.inf)
        self._declare("high", (self._channels,), torch.float32, -torch.inf)

    def _update(self, x: torch.Tensor) -> None:
        low, high = _min_max(x)
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def _merge(self, other: MinMaxObserver) -> None:
        self.low.copy_(torch.minimum(self.low, other.low))
        self.high.copy_(torch.maximum(self.high, other.high))

    def low_high(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.low, self.high


class _Average(Observer):
    """A range for each batch, averaged. A merge weighs each observer with the values that it has
    seen.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, spec: QuantSpec, *, name: str = "", channels: int | None = None) -> None:
        super().__init__(spec, name=name, channels=channels)
        self._declare("low", (self._channels,), torch.float32, 0.0)
        self._declare("high", (self._channels,), torch.float32, 0.0)

    def _move(self, low: torch.Tensor, high: torch.Tensor, weight: float | torch.Tensor) -> None:
        """Go to `low` and `high` by `weight` of the way, or all of it from nothing."""
        first = self.count == 0
        for mean, new in ((self.low, low), (self.high, high)):
            mean.copy_(torch.where(first, new, mean + (new - mean) * weight))

    def _merge(self, other: _Average) -> None:
        total = (self.count + other.count).clamp_min(1)
        weight = (other.count.double() / total).float()
        # Nothing of an observer that has seen nothing, and its zeros.
        here = other.count > 0
        self._move(
            torch.where(here, other.low, self.low),
            torch.where(here, other.high, self.high),
            weight,
        )

    def low_high(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.low, self.high


class MovingAverageObserver(_Average):
    """The smallest and the largest value of each batch, averaged with weight `constant` for the
    newest: `low += (min(x) − low) · 0.01`. The first batch counts whole.
    """

    constant = 0.01

    def _update(self, x: torch.Tensor) -> None:
        self._move(*_min_max(x), self.constant)


class MSEObserver(_Average):
    """For each batch the range in which fake-quantising it errs least in the mean square, averaged
    over all values seen.

    The candidates are the batch's own range with first its upper and then its lower end (for a
    symmetric spec both together) times 2^(−i/4), i < 24: down to a 54th. An outlier is clipped
    where that serves the rest.
    """

    def _update(self, x: torch.Tensor) -> None:
        low, high = _min_max(x)
        finite = low.isfinite() & high.isfinite()
        # An outlier of float64 has been infinite in float32 above.
        values = torch.where(finite[:, None], x, 0).float()
        lo, hi = torch.where(finite, low, 0), torch.where(finite, high, 0)
        if self.spec.symmetric:
            end = torch.maximum(-lo, hi)
            hi = end * self._best(values, lambda factor: (-end * factor, end * factor))
            lo = -hi
        else:
            start = hi
            hi = start * self._best(values, lambda factor: (lo, start * factor))
            bottom = lo
            lo = bottom * self._best(values, lambda factor: (bottom * factor, hi))
        n = x.shape[1]
        weight = (n / (self.count + n).double()).float()
        self._move(torch.where(finite, lo, low), torch.where(finite, hi, high), weight)

    def _best(
        self,
        x: torch.Tensor,
        candidate: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        best = torch.ones_like(x[:, 0])
        least = torch.full_like(best, torch.inf)
        for step in range(24):
            factor = torch.full_like(best, 2.0 ** (-step / 4))
            scale, point = self.spec.qparams(*candidate(factor))
            scale, point = scale[:, None], point[:, None].float()
            # `fake_quantize`, in place: memory is what takes the time here.
            q = (x * (1 / scale)).clamp_(self.spec.qmin - point, self.spec.qmax - point).round_()
            error = q.mul_(scale).sub_(x).square_().mean(1)
            best = torch.where(error < least, factor, best)
            least = torch.minimum(error, least)
        return best


class HistogramObserver(Observer):
    """The range in which fake-quantising all that was seen errs least, by a histogram.

    The grid is fixed: 4,096 bins over `−2^e … 2^e`. Where a value lies beyond it, `e` grows and
    bins are added up by 2, 4, 8 and so on, exactly; so the histogram is the same in whatever order
    batches come, and merging is adding. A zero is exact in every range and is not counted.

    A range `lo … hi` with scale `s` is taken to err by `s²/12` for each value inside and by the
    distance from `lo` or `hi`, squared, outside. The candidates for both ends are the smallest and
    the largest value times 2^(−i/8), i < 64: down to a 235th.
    """

    low: torch.Tensor
    high: torch.Tensor
    exponent: torch.Tensor
    histogram: torch.Tensor
    side = 2**_SIDE_BITS  # bins on each side of zero

    def __init__(self, spec: QuantSpec, *, name: str = "", channels: int | None = None) -> None:
        super().__init__(spec, name=name, channels=channels)
        self._declare("low", (self._channels,), torch.float32, torch.inf)
        self._declare("high", (self._channels,), torch.float32, -torch.inf)
        self._declare("exponent", (self._channels,), torch.int32, _LEAST_EXPONENT)
        self._declare("histogram", (self._channels, 2 * self.side), torch.int64, 0)

    def _update(self, x: torch.Tensor) -> None:
        low, high = _min_max(x)
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))
        # What is not finite falls into some bin: the range remembers it, and is then an error.
        finite = low.isfinite() & high.isfinite()
        amax = torch.where(finite, torch.maximum(-low, high), 0)
        exponent = torch.maximum(self.exponent, _exponent(amax))
        bins = _power(_SIDE_BITS - exponent)[:, None]
        index = (x.float() * bins).floor_().to(torch.int64).add_(self.side)
        index = index.clamp_(0, 2 * self.side - 1)
        one = torch.ones((), dtype=torch.int64, device=x.device).expand_as(index)
        new = torch.zeros_like(self.histogram).scatter_add_(1, index, one)
        new[:, self.side] -= (x == 0).sum(1)
        self.histogram.copy_(self._on_grid(exponent) + new)
        self.exponent.copy_(exponent)

    def _on_grid(self, exponent: torch.Tensor) -> torch.Tensor:
        """The histogram on the grid of a larger exponent."""
        shift = (exponent - self.exponent).clamp(0, 31)[:, None]
        bins = torch.arange(2 * self.side, device=exponent.device) - self.side
        index = (bins[None] >> shift) + self.side  # rounds down: to the bin that holds it
        return torch.zeros_like(self.histogram).scatter_add(1, index, self.histogram)

    def _merge(self, other: HistogramObserver) -> None:
        self.low.copy_(torch.minimum(self.low, other.low))
        self.high.copy_(torch.maximum(self.high, other.high))
        exponent = torch.maximum(self.exponent, other.exponent)
        self.histogram.copy_(self._on_grid(exponent) + other._on_grid(exponent))
        self.exponent.copy_(exponent)

    def low_high(self) -> tuple[torch.Tensor, torch.Tensor]:
        finite = self.low.isfinite() & self.high.isfinite()
        # In units of a bin, float64; `count`, `first` and `second` are the moments of the bins
        # before each bin.
        unit = torch.exp2(self.exponent.double() - _SIDE_BITS)[:, None]
        centre = torch.arange(2 * self.side, device=unit.device) - self.side + 0.5
        moments = [self.histogram * centre.double() ** power for power in range(3)]
        before = [nn.functional.pad(moment.cumsum(1), (1, 0)) for moment in moments]
        factor = torch.exp2(torch.arange(64, device=unit.device, dtype=torch.float64) / -8)

        def outside(end: torch.Tensor, sign: int) -> tuple[torch.Tensor, torch.Tensor]:
            """For each candidate, how many values lie beyond it and the sum of their squared
            distances.
            """
            at = (end - 0.5).ceil().to(torch.int64) + self.side  # centres before `end`
            at = at.clamp(0, 2 * self.side)
            n, first, second = (moment.gather(1, at) for moment in before)
            if sign > 0:
                n, first, second = (
                    moment[:, -1:] - part
                    for moment, part in zip(before, (n, first, second), strict=True)
                )
            return n, (second - 2 * end * first + end.square() * n).clamp_min(0)

        zero = torch.zeros_like(unit)
        bottom = torch.where(finite, self.low, 0).double()[:, None].minimum(zero) / unit
        top = torch.where(finite, self.high, 0).double()[:, None].maximum(zero) / unit
        total, steps = before[0][:, -1:], self.spec.qmax - self.spec.qmin
        if self.spec.symmetric:
            end = torch.maximum(-bottom, top) * factor
            n_low, error_low = outside(-end, -1)
            n_high, error_high = outside(end, 1)
            scale = 2 * end / steps
            error = error_low + error_high + (total - n_low - n_high) * scale.square() / 12
            best = end.gather(1, error.argmin(1, keepdim=True))
            low, high = -best * unit, best * unit
        else:
            lows, highs = bottom * factor, top * factor
            n_low, error_low = (part[:, :, None] for part in outside(lows, -1))
            n_high, error_high = (part[:, None] for part in outside(highs, 1))
            scale = (highs[:, None] - lows[:, :, None]) / steps
            inside = total[:, :, None] - n_low - n_high
            error = error_low + error_high + inside * scale.square() / 12
            best = error.flatten(1).argmin(1, keepdim=True)
            low = lows.gather(1, best // factor.numel()) * unit
            high = highs.gather(1, best % factor.numel()) * unit
        return (
            torch.where(finite, low[:, 0].float(), self.low),
            torch.where(finite, high[:, 0].float(), self.high),
        )


OBSERVERS: Mapping[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "histogram": HistogramObserver,
    "mse": MSEObserver,
}


def make_observer(spec: QuantSpec, *, name: str = "", channels: int | None = None) -> Observer:
    """The observer that `spec` asks for."""
    kind = OBSERVERS[spec.observer] if isinstance(spec.observer, str) else spec.observer
    if not issubclass(kind, Observer):
        raise TypeError(
            f"qnn.QuantSpec: observer must be a subclass of qnn.observers.Observer, got {kind!r}."
        )
    return kind(spec, name=name, channels=channels)


def _min_max(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest of each row, float32; both NaN where the row has one."""
    if x.shape[0] == 1:
        low, high = torch.aminmax(x)  # on all cores, unlike that along an axis
        return low.reshape(1).float(), high.reshape(1).float()
    return x.amin(1).float(), x.amax(1).float()


def _exponent(amax: torch.Tensor) -> torch.Tensor:
    """The least e with amax < 2^e, within the limits of a grid, from the bits of a float32."""
    return ((amax.view(torch.int32) >> 23) - 126).clamp(_LEAST_EXPONENT, _GREATEST_EXPONENT)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, −126 … 127, in float32 by its bits."""
    return ((exponent + 127) << 23).view(torch.float32)
