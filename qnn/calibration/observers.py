"""Observers: modules that see tensors go by and find the range to quantise them in.

Their statistics are buffers that are updated in place with plain tensor arithmetic, so observing
traces under `torch.compile(fullgraph=True)` and `torch.export` and needs no value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qnn.calibration.spec import QuantSpec
from qnn.calibration.statistics import Observer

# Of a histogram's grid: 2^e and 2^(11 − e) are normal float32 numbers from the least e on.
_SIDE_BITS = 11
_LEAST_EXPONENT, _GREATEST_EXPONENT = -115, 128


class _Range(Observer):
    """An observer whose statistics are a range."""

    low: torch.Tensor
    high: torch.Tensor
    start = (torch.inf, -torch.inf)

    def __init__(self, spec: QuantSpec, *, name: str = "", channels: int | None = None) -> None:
        super().__init__(spec, name=name, channels=channels)
        for end, value in zip(("low", "high"), self.start, strict=True):
            self._declare(end, (self._channels,), torch.float32, value)

    @torch.no_grad()
    def begin(self, low: torch.Tensor, high: torch.Tensor, count: int) -> None:
        self._grow(low.shape[0], self.who)
        self.low.copy_(low)
        self.high.copy_(high)
        self.count.fill_(count)

    def low_high(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.low, self.high

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Also the state of an observer that holds more than a range: of it the range, as `begin`
        takes it.
        """
        for kind, more in _MORE_THAN_A_RANGE.items():
            if all(prefix + name in state_dict for name in more) and not more <= self._rows.keys():
                other = OBSERVERS[kind](self.spec, name=self.name)
                other._load_from_state_dict(state_dict, prefix, {}, True, [], [], [])
                ends = zip(("low", "high"), other.low_high(), strict=True)
                mine = dict(state_dict)
                for name in more:
                    del mine[prefix + name]
                state_dict = mine | {prefix + name: end for name, end in ends}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


# What the state of an observer has besides a range, by the name of its kind.
_MORE_THAN_A_RANGE = {
    "histogram": {"exponent", "histogram"},
    "mse": {"least", "most"},
    "percentile": {"bins"},
}


class MinMaxObserver(_Range):
    """The smallest and the largest value seen."""

    def _update(self, x: torch.Tensor) -> None:
        self._widen(*_min_max(x))

    def _merge(self, other: MinMaxObserver) -> None:
        self._widen(other.low, other.high)

    def _widen(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))


class _Average(_Range):
    """A range for each batch, averaged. A merge weighs each observer with the values that it has
    seen.
    """

    start = (0.0, 0.0)

    def _move(self, low: torch.Tensor, high: torch.Tensor, weight: float | torch.Tensor) -> None:
        """Go to `low` and `high` by `weight` of the way, or all of it from nothing."""
        first = self.count == 0
        for mean, new in ((self.low, low), (self.high, high)):
            mean.copy_(torch.where(first, new, mean + (new - mean) * weight))

    def _join(self, other: _Average, weight: float | torch.Tensor) -> None:
        """`_move` to the range of `other`, unless that has seen nothing, and has zeros."""
        here = other.count > 0
        self._move(
            torch.where(here, other.low, self.low),
            torch.where(here, other.high, self.high),
            weight,
        )

    def _merge(self, other: _Average) -> None:
        total = (self.count + other.count).clamp_min(1)
        self._join(other, (other.count.double() / total).float())


class MovingAverageObserver(_Average):
    """The smallest and the largest value of each batch, averaged with weight `constant` for the
    newest: `low += (min(x) − low) · 0.01`. The first batch counts whole.
    """

    constant = 0.01

    def _update(self, x: torch.Tensor) -> None:
        self._move(*_min_max(x), self.constant)

    def _take(self, batch: MovingAverageObserver) -> None:
        self._join(batch, self.constant)


class MSEObserver(_Average):
    """For each batch the range in which fake-quantising it errs least in the mean square, averaged
    over all values seen.

    The candidates are the batch's own range with first its upper and then its lower end (for a
    symmetric spec both together) times 2^(−i/4), i < 24: down to a 54th. An outlier is clipped
    where that serves the rest.
    """

    least: torch.Tensor
    most: torch.Tensor
    _later = (*Observer._later, "least", "most")

    def __init__(self, spec: QuantSpec, *, name: str = "", channels: int | None = None) -> None:
        super().__init__(spec, name=name, channels=channels)
        self._declare("least", (self._channels,), torch.float32, torch.inf)
        self._declare("most", (self._channels,), torch.float32, -torch.inf)

    def _merge(self, other: MSEObserver) -> None:  # type: ignore[override]
        super()._merge(other)
        self._widen(other.least, other.most)

    def _widen(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.least.copy_(torch.minimum(self.least, low))
        self.most.copy_(torch.maximum(self.most, high))

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        # A range from a file that did not have these, or from `begin`, may be alone.
        known = self.least <= self.most
        low, high = self.low_high()
        return torch.where(known, self.least, low), torch.where(known, self.most, high)

    def _update(self, x: torch.Tensor) -> None:
        low, high = _min_max(x)
        self._widen(low, high)
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

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.low, self.high

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


class PercentileObserver(MinMaxObserver):
    """The range that leaves out the outermost values: `spec.percentile` percent of all that was
    seen, zeros too, lie below the upper end, and as many above the lower one; for a symmetric spec
    below in magnitude. 99.99 if the spec has none.

    The values are counted by sign, exponent and the first 4 bits of the mantissa, 8,192 bins, so
    that an end is known to a 16th of itself however far the outermost values are, and mostly to
    less: within a bin they are taken to lie evenly. Merging is adding.
    """

    bins: torch.Tensor

    def __init__(self, spec: QuantSpec, *, name: str = "", channels: int | None = None) -> None:
        super().__init__(spec, name=name, channels=channels)
        self._declare("bins", (self._channels, 2 * _HALF), torch.int64, 0)

    def _update(self, x: torch.Tensor) -> None:
        super()._update(x)
        bits = x.float().view(torch.int32)
        index = (bits & 0x7FFFFFFF) >> 19
        # Below zero the magnitudes fall.
        index = torch.where(bits < 0, _HALF - 1 - index, _HALF + index).long()
        one = torch.ones((), dtype=torch.int64, device=x.device).expand_as(index)
        self.bins.copy_(self.bins + torch.zeros_like(self.bins).scatter_add_(1, index, one))

    def _merge(self, other: PercentileObserver) -> None:  # type: ignore[override]
        super()._merge(other)
        self.bins.copy_(self.bins + other.bins)

    def begin(self, low: torch.Tensor, high: torch.Tensor, count: int) -> None:
        pass  # the range alone is not enough

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.low, self.high

    def low_high(self) -> tuple[torch.Tensor, torch.Tensor]:
        share = (99.99 if self.spec.percentile is None else self.spec.percentile) / 100
        if self.spec.symmetric:
            magnitudes = self.bins[:, _HALF:] + self.bins[:, :_HALF].flip(1)
            end = _quantile(magnitudes, share, _edges(self.bins.device))
            high = torch.minimum(end, torch.maximum(-self.low, self.high))
            low = -high
        else:
            edges = _edges(self.bins.device)
            edges = torch.cat([-edges.flip(0), edges[1:]])
            low = torch.maximum(_quantile(self.bins, 1 - share, edges), self.low)
            high = torch.minimum(_quantile(self.bins, share, edges), self.high)
        finite = self.low.isfinite() & self.high.isfinite()
        return torch.where(finite, low, self.low), torch.where(finite, high, self.high)


_HALF = 4096  # bins of a sign: of all float32 magnitudes, by their first 12 bits


def _edges(device: torch.device) -> torch.Tensor:
    """Where the bins of one sign begin and end, float64; from the infinite ones on all inf."""
    index = torch.arange(_HALF + 1, device=device, dtype=torch.int32)
    return (index.clamp_max(255 << 4) << 19).view(torch.float32).double()


def _quantile(counts: torch.Tensor, share: float, edges: torch.Tensor) -> torch.Tensor:
    """The value at `share` of the way from the least to the largest that was counted, float32
    `[C]`.
    """
    if share in (0, 1):  # clamped to what was seen
        return torch.full_like(counts[:, 0], torch.inf if share else -torch.inf, dtype=torch.float)
    before = counts.cumsum(1).double()
    place = share * (before[:, -1:] - 1).clamp_min(0)
    index = torch.searchsorted(before, place, right=True).clamp_max(counts.shape[1] - 1)
    inside = counts.gather(1, index).double().clamp_min(1)
    offset = place - before.gather(1, index) + inside + 0.5
    bottom, top = edges[index], edges[index + 1]
    value = bottom + (top - bottom) * (offset / inside).clamp(0, 1)
    # A bin at zero has zeros, and numbers that are hardly more.
    return torch.where((bottom == 0) | (top == 0), 0, value)[:, 0].float()


OBSERVERS: Mapping[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "histogram": HistogramObserver,
    "mse": MSEObserver,
    "percentile": PercentileObserver,
}


def make_observer(spec: QuantSpec, *, name: str = "", channels: int | None = None) -> Observer:
    """The observer that `spec` asks for."""
    kind = OBSERVERS[spec.observer] if isinstance(spec.observer, str) else spec.observer
    if not issubclass(kind, Observer):
        raise TypeError(
            f"qnn.QuantSpec: observer must be a subclass of "
            f"qnn.calibration.observers.Observer, got {kind!r}."
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


__all__ = [
    "OBSERVERS",
    "HistogramObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "make_observer",
]
