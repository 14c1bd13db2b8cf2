"""What counting values means: the histograms that observers keep."""

from __future__ import annotations

import torch

SIDE_BITS = 11
SIDE = 1 << SIDE_BITS  # bins on each side of zero
# Of a grid's ends: 2^e and 2^(11 − e) are normal float32 numbers.
LEAST, GREATEST = -115, 128


def histogram_reference(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    counts: torch.Tensor,
    exponent: torch.Tensor,
    magnitudes: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Each row of `x` taken into its statistics: the least and the greatest value, both NaN where
    one is; the counts of bins over `−2^exponent … 2^exponent`, without zeros; the exponent that has
    room for all; and, of all rows together, those of `exponents_reference`.

    What is not finite falls into some bin: the range remembers it, and is then an error.
    """
    least, most = _ends(x)
    finite = least.isfinite() & most.isfinite()
    amax = torch.where(finite, torch.maximum(-least, most), 0)
    larger = torch.maximum(exponent, _exponent(amax)).clamp(LEAST, GREATEST)
    # 2^(11 − larger), by its bits.
    bins = ((SIDE_BITS - larger + 127) << 23).view(torch.float32)[:, None]
    index = (x * bins).floor_().clamp_(-SIDE, SIDE - 1).nan_to_num_().to(torch.int64).add_(SIDE)
    y = _counted(index, on_grid(counts, exponent, larger))
    y[:, SIDE] -= (x == 0).sum(1)
    low, high = torch.minimum(low, least), torch.maximum(high, most)
    return low, high, y, larger, exponents_reference(x, magnitudes)


def _ends(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not x.shape[1]:
        return x.new_full((len(x),), torch.inf), x.new_full((len(x),), -torch.inf)
    return x.amin(1), x.amax(1)


def _exponent(amax: torch.Tensor) -> torch.Tensor:
    """The least e with amax < 2^e, within the limits of a grid, from the bits of a float32."""
    return ((amax.view(torch.int32) >> 23) - 126).clamp(LEAST, GREATEST)


def on_grid(counts: torch.Tensor, exponent: torch.Tensor, larger: torch.Tensor) -> torch.Tensor:
    """A histogram on the grid of a larger exponent: bins are added up by 2, 4, 8 and so on,
    exactly.
    """
    shift = (larger - exponent).clamp(0, 31)[:, None]
    bins = torch.arange(2 * SIDE, device=counts.device) - SIDE
    index = (bins[None] >> shift) + SIDE  # rounds down: to the bin that holds it
    return torch.zeros_like(counts).scatter_add(1, index, counts)


def exponents_reference(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """`counts`, and the values of `x` added to them by float32's exponent."""
    exponent = (x.flatten().view(torch.int32) >> 23) & 255
    return _counted(exponent.long()[None], counts[None])[0]


def _counted(index: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    one = torch.ones((), dtype=torch.int64, device=index.device).expand_as(index)
    return counts.scatter_add(1, index, one)
