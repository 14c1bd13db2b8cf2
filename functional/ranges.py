"""From a range to a grid, and from values to the range in which a grid has the least error.

A grid is the floats that a scale and a zero point can give; `calibration` finds the statistics for
them. Nothing here has state. `[C]` are the channels of a per-channel grid; per-tensor is C = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.nn import functional as torch_F

from qnn.kernels import OPS
from qnn.kernels.formats.int8 import round_to_grid

Ends: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def qparams(
    low: torch.Tensor,
    high: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    symmetric: bool = False,
    limit: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point, float32 and int32, of the ranges `low … high`.

    With `lo = min(low, 0)` and `hi = max(high, 0)`, so that zero is exact:

        affine      scale = (hi − lo) / (qmax − qmin),
                    zero_point = clamp(round(qmin − lo / scale), qmin, qmax)
        symmetric   zero_point = (qmin + qmax + 1) // 2,
                    scale = max(−lo, hi) / min(qmax − zero_point, zero_point − qmin)

    in float32, with `low` and `high` cut at `±limit` before. The scale is at least float32's
    smallest normal number, and 1 where `lo = hi`. It is NaN where a range is NaN or infinite, or
    its length beyond float32.
    """
    low, high = _cut(low.float(), limit), _cut(high.float(), limit)
    # Not `clamp`: a NaN must stay.
    zero = torch.zeros_like(low)
    lo, hi = torch.minimum(low, zero), torch.maximum(high, zero)
    middle = (qmin + qmax + 1) // 2
    if symmetric:
        length = torch.maximum(-lo, hi)
        steps = min(qmax - middle, middle - qmin) or 1
    else:
        length, steps = hi - lo, qmax - qmin
    # By a tensor: on a GPU torch divides by a number as a product with its reciprocal.
    tiny = torch.finfo(torch.float32).tiny
    scale = (length / torch.full_like(length, steps)).clamp_min(tiny)
    scale = torch.where(length == 0, 1.0, scale)
    finite = length.isfinite()
    scale = torch.where(finite, scale, torch.nan)
    if symmetric:
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    zero_point = (qmin - torch.where(finite, lo / scale, 0)).round()
    return scale, zero_point.clamp(qmin, qmax).to(torch.int32)


def _cut(end: torch.Tensor, limit: float | None) -> torch.Tensor:
    """An end of a range, at most `limit` from zero; one that is not finite stays."""
    if limit is None:
        return end
    return torch.where(end.isfinite(), end.clamp(-limit, limit), end)


def min_max(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest of each row of `[C, n]`, float32 `[C]`; both NaN where the row has
    one.
    """
    if x.shape[0] == 1:
        low, high = torch.aminmax(x)  # on all cores, unlike that along an axis
        return low.reshape(1).float(), high.reshape(1).float()
    return x.amin(1).float(), x.amax(1).float()


def counted(x: torch.Tensor, *statistics: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The statistics of histograms with `x` `[C, n]` in them.

    Args:
        statistics: the least and the greatest value, float32 `[C]`; int64 `[C, 4096]`, bins over
            `−2^e … 2^e`; `e`, int32 `[C]`, −115 … 128, which grows where a value lies beyond; and
            those of `counted_by_exponent`.
    """
    result: tuple[torch.Tensor, ...] = _run("histogram", x, *statistics)
    return result


def counted_by_exponent(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`counts` of values by float32's exponent, int64 `[256]`, with those of `x` `[C, n]` in it."""
    result: torch.Tensor = _run("exponents", x, counts)
    return result


def _run(name: str, x: torch.Tensor, *args: torch.Tensor) -> Any:
    op = OPS[name]
    run = op.overload if torch.compiler.is_compiling() else op.call
    return run(x.float(), *args)


def _least_error(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    grid_of: Callable[[torch.Tensor, torch.Tensor], Ends],
    candidate: Callable[[torch.Tensor], Ends],
) -> torch.Tensor:
    """Of the factors 2^(−i/4), i < 24, the one whose `candidate` range errs least, `[C]`."""
    best = torch.ones_like(x[:, 0])
    least = torch.full_like(best, torch.inf)
    for step in range(24):
        factor = torch.full_like(best, 2.0 ** (-step / 4))
        scale, point = grid_of(*candidate(factor))
        scale, point = scale[:, None], point[:, None].float()
        q = round_to_grid(x, 1 / scale, qmin - point, qmax - point)
        error = q.mul_(scale).sub_(x).square_().mean(1)
        best = torch.where(error < least, factor, best)
        least = torch.minimum(error, least)
    return best


def of_values(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    symmetric: bool,
    grid_of: Callable[[torch.Tensor, torch.Tensor], Ends],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each row of `[C, n]` in which fake-quantising it errs least in the mean square,
    float32 `[C]`.

    The candidates are the row's own range with first its upper and then its lower end (of a
    symmetric grid both together) times 2^(−i/4), i < 24. A row with a NaN or an infinite value has
    the range of its values.
    """
    low, high = min_max(x)
    finite = low.isfinite() & high.isfinite()
    # An outlier of float64 has been infinite in float32 above.
    values = torch.where(finite[:, None], x, 0).float()
    lo, hi = torch.where(finite, low, 0), torch.where(finite, high, 0)

    def best(
        candidate: Callable[[torch.Tensor], Ends],
    ) -> torch.Tensor:
        return _least_error(values, qmin, qmax, grid_of, candidate)

    if symmetric:
        end = torch.maximum(-lo, hi)
        hi = end * best(lambda factor: (-end * factor, end * factor))
        lo = -hi
    else:
        start = hi
        hi = start * best(lambda factor: (lo, start * factor))
        bottom = lo
        lo = bottom * best(lambda factor: (bottom * factor, hi))
    return torch.where(finite, lo, low), torch.where(finite, hi, high)


def of_histogram(
    counts: torch.Tensor,
    exponent: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    steps: int,
    *,
    symmetric: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each row in which fake-quantising all that was counted errs least, float32
    `[C]`.

    Args:
        counts: int64 `[C, 2·side]`, of bins over `−2^exponent … 2^exponent`.
        exponent: int32 `[C]`.
        low, high: the range of the values; a row where it is not finite keeps it.
        steps: of the grid, `qmax − qmin`.
        symmetric: whether the grid's ends are as far from zero.
    """
    side = counts.shape[1] // 2
    finite = low.isfinite() & high.isfinite()
    # In units of a bin, float64; `count`, `first` and `second` are the moments of the bins
    # before each bin.
    unit = torch.exp2(exponent.double() - int(math.log2(side)))[:, None]
    centre = torch.arange(2 * side, device=unit.device) - side + 0.5
    moments = [counts * centre.double() ** power for power in range(3)]
    before = [torch_F.pad(moment.cumsum(1), (1, 0)) for moment in moments]
    factor = torch.exp2(torch.arange(64, device=unit.device, dtype=torch.float64) / -8)

    def outside(end: torch.Tensor, sign: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For each candidate, how many values lie beyond it and the sum of their squared
        distances.
        """
        at = (end - 0.5).ceil().to(torch.int64) + side  # centres before `end`
        at = at.clamp(0, 2 * side)
        n, first, second = (moment.gather(1, at) for moment in before)
        if sign > 0:
            n, first, second = (
                moment[:, -1:] - part
                for moment, part in zip(before, (n, first, second), strict=True)
            )
        return n, (second - 2 * end * first + end.square() * n).clamp_min(0)

    zero = torch.zeros_like(unit)
    bottom = torch.where(finite, low, 0).double()[:, None].minimum(zero) / unit
    top = torch.where(finite, high, 0).double()[:, None].maximum(zero) / unit
    total = before[0][:, -1:]
    if symmetric:
        end = torch.maximum(-bottom, top) * factor
        n_low, error_low = outside(-end, -1)
        n_high, error_high = outside(end, 1)
        scale = 2 * end / steps
        error = error_low + error_high + (total - n_low - n_high) * scale.square() / 12
        best = end.gather(1, error.argmin(1, keepdim=True))
        first, last = -best * unit, best * unit
    else:
        lows, highs = bottom * factor, top * factor
        n_low, error_low = (part[:, :, None] for part in outside(lows, -1))
        n_high, error_high = (part[:, None] for part in outside(highs, 1))
        scale = (highs[:, None] - lows[:, :, None]) / steps
        inside = total[:, :, None] - n_low - n_high
        error = error_low + error_high + inside * scale.square() / 12
        best = error.flatten(1).argmin(1, keepdim=True)
        first = lows.gather(1, best // factor.numel()) * unit
        last = highs.gather(1, best % factor.numel()) * unit
    return (
        torch.where(finite, first[:, 0].float(), low),
        torch.where(finite, last[:, 0].float(), high),
    )


def quantile(counts: torch.Tensor, share: float, edges: torch.Tensor) -> torch.Tensor:
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
