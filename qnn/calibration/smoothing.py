"""SmoothQuant of a layer whose input was observed: what its columns say.

Source: Xiao et al., SmoothQuant (2022), section 4. How far to go is not a constant of the model, as
there, but each layer's own: what leaves the least noise.
"""

from __future__ import annotations

import torch

from qnn.calibration.columns import COUNT, HIGH, LOW, SQUARES
from qnn.calibration.spec import QuantSpec

# How much less noise a multiplication of the input has to bring.
GAIN = 1.5
ALPHAS = tuple(i / 20 for i in range(10, 20))
# Of a factor, as a power of two.
_EXPONENTS = 12


def factors(
    weight: torch.Tensor,
    columns: torch.Tensor,
    spec: QuantSpec,
    *,
    alpha: float | None = None,
    gain: float = GAIN,
) -> torch.Tensor | None:
    """`pre_quant_scale` `[K]`, float32: what the columns of the input are multiplied with before
    they are quantised per-tensor, and the weight's are divided by. None where the noise of the
    result would not fall below 1 / `gain` of itself.

    1 / s_j of SmoothQuant, `s_j = max|x_j|^α / max|w_j|^(1−α)`, with the `alpha` given, whatever it
    brings, or the one of `ALPHAS` whose noise is the least. Rounded to powers of two, so that
    nothing else is rounded by them.
    """
    if not _known(columns):
        return None
    weight, columns = weight.detach().double(), columns.to(weight.device)
    if alpha is not None:
        return _factors(weight, columns, alpha).float()
    best, least = None, noise(weight, columns, spec, None) / gain
    for each in ALPHAS:
        found = _factors(weight, columns, each)
        if (got := noise(weight, columns, spec, found)) < least:
            best, least = found, got
    return None if best is None else best.float()


def noise(
    weight: torch.Tensor, columns: torch.Tensor, spec: QuantSpec, scale: torch.Tensor | None
) -> float:
    """The expected square of the error of a row of the result: `step² / 12` for each rounded
    number, of the input and of the weight, times the square of what it is multiplied with.
    """
    scale = torch.ones_like(columns[LOW]) if scale is None else scale.to(columns)
    weight = weight / scale
    low, high = ends(columns, scale)
    span = 2 * torch.maximum(-low, high) if spec.symmetric else high - low
    step = span / (spec.qmax - spec.qmin)
    steps = weight.abs().amax(1) / 127
    power = (columns[SQUARES] / columns[COUNT] * scale.square()).sum()
    return float(step.square() * weight.square().sum() + steps.square().sum() * power) / 12


def ends(columns: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of the input when its columns are multiplied with `scale`, with zero in it."""
    scale = scale.to(columns)
    low = (columns[LOW] * scale).amin().clamp(max=0)
    return low, (columns[HIGH] * scale).amax().clamp(min=0)


def _known(columns: torch.Tensor) -> bool:
    return not columns.is_meta and bool(columns.isfinite().all()) and bool(columns[COUNT].all())


def _factors(weight: torch.Tensor, columns: torch.Tensor, alpha: float) -> torch.Tensor:
    amax = torch.maximum(-columns[LOW], columns[HIGH])
    largest = weight.abs().amax(0)
    # A column that is zero, in the input or in the weight, needs no factor.
    live = (amax > 0) & (largest > 0)
    exponent = ((1 - alpha) * largest.log2() - alpha * amax.log2()).where(live, torch.nan)
    exponent = (exponent - exponent.nanmedian()).nan_to_num(0).round()
    exponent = exponent.clamp(-_EXPONENTS, _EXPONENTS)
    # No value becomes larger than the largest one was, which may be all that a dtype can hold.
    grown = (amax * exponent.exp2()).amax() / amax.amax()
    return (exponent - grown.log2().ceil().clamp(min=0).nan_to_num(0)).exp2()
