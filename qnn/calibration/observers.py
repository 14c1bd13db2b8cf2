"""Observers: modules that see tensors go by and find the range to quantise them in, per-tensor or
per-channel.

Their statistics are buffers that are updated in place with plain tensor arithmetic, so observing
traces under `torch.compile(fullgraph=True)` and `torch.export` and needs no value on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qnn.calibration.spec import QuantSpec
from qnn.calibration.statistics import Observer
from qnn.functional import ranges
from qnn.kernels.reference.histogram import LEAST, SIDE, on_grid


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
        self._widen(*ranges.min_max(x))

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
        self._move(*ranges.min_max(x), self.constant)

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
        self._widen(*ranges.min_max(x))
        spec, n = self.spec, x.shape[1]
        low, high = ranges.of_values(
            x, spec.qmin, spec.qmax, symmetric=spec.symmetric, grid_of=spec.qparams
        )
        self._move(low, high, (n / (self.count + n).double()).float())


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

    def __init__(self, spec: QuantSpec, *, name: str = "", channels: int | None = None) -> None:
        super().__init__(spec, name=name, channels=channels)
        self._declare("low", (self._channels,), torch.float32, torch.inf)
        self._declare("high", (self._channels,), torch.float32, -torch.inf)
        self._declare("exponent", (self._channels,), torch.int32, LEAST)
        self._declare("histogram", (self._channels, 2 * SIDE), torch.int64, 0)

    def _update(self, x: torch.Tensor) -> None:
        own: Any = self._buffers  # each takes 1 µs as an attribute
        held = [own[name] for name in ("low", "high", "histogram", "exponent")]
        magnitudes = own["magnitudes"]
        if magnitudes is None:
            every = ranges.counted(x, *held, held[2].new_zeros(256))[:-1]
        else:
            held.append(magnitudes)
            every = ranges.counted(x, *held)
        for buffer, value in zip(held, every, strict=True):  # a body of `cond` takes no lists
            buffer.copy_(value)

    def _count_magnitudes(self, x: torch.Tensor, magnitudes: torch.Tensor) -> None:
        pass  # `_update` has done so

    def _merge(self, other: HistogramObserver) -> None:
        self.low.copy_(torch.minimum(self.low, other.low))
        self.high.copy_(torch.maximum(self.high, other.high))
        exponent = torch.maximum(self.exponent, other.exponent)
        mine, its = (on_grid(o.histogram, o.exponent, exponent) for o in (self, other))
        self.histogram.copy_(mine + its)
        self.exponent.copy_(exponent)

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.low, self.high

    def low_high(self) -> tuple[torch.Tensor, torch.Tensor]:
        steps = self.spec.qmax - self.spec.qmin
        return ranges.of_histogram(
            self.histogram, self.exponent, self.low, self.high, steps, symmetric=self.spec.symmetric
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
            end = ranges.quantile(magnitudes, share, _edges(self.bins.device))
            high = torch.minimum(end, torch.maximum(-self.low, self.high))
            low = -high
        else:
            edges = _edges(self.bins.device)
            edges = torch.cat([-edges.flip(0), edges[1:]])
            low = torch.maximum(ranges.quantile(self.bins, 1 - share, edges), self.low)
            high = torch.minimum(ranges.quantile(self.bins, share, edges), self.high)
        finite = self.low.isfinite() & self.high.isfinite()
        return torch.where(finite, low, self.low), torch.where(finite, high, self.high)


_HALF = 4096  # bins of a sign: of all float32 magnitudes, by their first 12 bits


def _edges(device: torch.device) -> torch.Tensor:
    """Where the bins of one sign begin and end, float64; from the infinite ones on all inf."""
    index = torch.arange(_HALF + 1, device=device, dtype=torch.int32)
    return (index.clamp_max(255 << 4) << 19).view(torch.float32).double()


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
