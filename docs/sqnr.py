"""The signal-to-quantisation-noise ratio of each format on three kinds of data, beside theory.

`python docs/sqnr.py` prints the table that `<!-- sqnr table -->` becomes in a page.
"""

from __future__ import annotations

import math

import numpy as np
import torch

import qnn
from qnn.kernels import Format
from qnn.kernels.formats import nvfp4
from qnn.kernels.formats.float8 import FLOAT8
from qnn.kernels.formats.int8 import INT8_CHANNEL
from qnn.kernels.formats.mxfp8 import MX

ROWS, COLUMNS = 128, 1024
FORMATS: tuple[Format, ...] = (INT8_CHANNEL, *FLOAT8.values(), MX, nvfp4.ROWS)
# The values of e2m1, and where two of them meet.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_EDGES = (_E2M1[:-1] + _E2M1[1:]) / 2


def data() -> dict[str, torch.Tensor]:
    """Three matrices, always the same."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(5, ROWS, COLUMNS, generator=generator)
    outlier = torch.rand(ROWS, COLUMNS, generator=generator) < 1e-3
    return {
        "normal": parts[0],
        "heavy tails": parts[0] * (3 / parts[1:4].square().sum(0)).sqrt(),
        "outliers": parts[4] * torch.where(outlier, 50.0, 1.0),
    }


def measured(form: Format, x: torch.Tensor) -> float:
    """In dB."""
    return qnn.sqnr(x, form.dequantize(form.quantize(x)))


def theory(form: Format) -> float:
    """In dB; `docs/numerics.md` derives it."""
    if form.name == "int8":
        return 10 * math.log10(12 * form.qmax**2 / _expected_amax_squared(COLUMNS))
    if form.name == "nvfp4":
        return 10 * math.log10(1 / _nvfp4_noise())
    mantissa_bits = -math.log2(torch.finfo(form.storage).eps)
    return 10 * math.log10(32 * math.log(2) * 4**mantissa_bits)


def _density(x: np.ndarray) -> np.ndarray:
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _share_below(m: np.ndarray) -> np.ndarray:
    """The probability of a normal magnitude below `m`."""
    return np.vectorize(math.erf)(m / math.sqrt(2))


def _amax_weights(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of the largest of `count` normal magnitudes, and their probabilities."""
    m = np.linspace(0.02, 7, 350)
    weight = _share_below(m) ** (count - 1) * _density(m)
    return m, weight / weight.sum()


def _expected_amax_squared(count: int) -> float:
    m, weight = _amax_weights(count)
    return float((m**2 * weight).sum())


def _nvfp4_noise() -> float:
    """The expected squared error of one of 16 normal values, whose largest is `m`.

    The block's scale is `m / 6` rounded to e4m3, and where it lies in its binade is even in log2.
    """
    m, weight = _amax_weights(16)
    place = np.exp2((np.arange(16) + 0.5) / 16)  # of the scale in its binade, [1, 2)
    ratio = np.round(place * 8) / 8 / place  # of the rounded scale to the scale
    scale = m[:, None] / 6 * ratio
    x = (np.arange(400) + 0.5) / 400 * m[:, None]  # the other 15
    density = _density(x) / _density(x).sum(1, keepdims=True)
    others = [(density * _squared_error(x, s[:, None])).sum(1) for s in scale.T]
    largest = _squared_error(np.broadcast_to(m[:, None], scale.shape), scale)
    noise = (15 * np.stack(others, 1) + largest).mean(1) / 16
    return float((noise * weight).sum())


def _squared_error(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (x - _E2M1[np.searchsorted(_EDGES, x / scale)] * scale) ** 2


def table() -> str:
    """A row for each format."""
    given = data()
    lines = [("format", *given, "theory"), ("---",) + ("---:",) * (len(given) + 1)]
    for form in FORMATS:
        figures = [measured(form, x) for x in given.values()]
        lines.append((f"`{form.key}`", *(f"{value:.1f}" for value in (*figures, theory(form)))))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(table())
