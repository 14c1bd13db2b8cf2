"""LayerNorm and RMSNorm whose result is quantised, and the order of their sums.

Everything is float32, one operation at a time, each of them rounded; a sum along a row is added up
in an order that is part of the definition (`row_sums`), so that every kernel gives the same bits.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from qnn.kernels.formats.int8 import quantize_rows
from qnn.kernels.reference.int8 import centred_codes

KINDS = ("layer", "rms", "rms_rounded")
# A sum along a row has so many partial sums.
SUMS = 64


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """Σ along the last axis of `x [..., K]`, `[..., 1]`: 64 partial sums, the j-th that of the
    columns j, j + 64, j + 128, … in this order; then of these the second half is added to the
    first, until one is left.
    """
    blocks = -(-x.shape[-1] // SUMS)
    parts = F.pad(x, (0, blocks * SUMS - x.shape[-1])).unflatten(-1, (blocks, SUMS))
    total = x.new_zeros(*x.shape[:-1], SUMS)
    for block in range(blocks):
        total = total + parts[..., block, :]
    while total.shape[-1] > 1:
        first, second = total.chunk(2, -1)
        total = first + second
    return total


def norm_reference(
    x: torch.Tensor,
    eps: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    kind: str = "layer",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x + residual`, and its norm, both rounded to the dtype of `x`."""
    total = x.clone() if residual is None else x + residual
    v = total.float()
    # By a tensor: on a GPU torch divides by a number as a product with its reciprocal.
    k = torch.full_like(v[..., :1], v.shape[-1]) if v.shape[-1] else v.sum(-1, keepdim=True)
    v = v - row_sums(v) / k if kind == "layer" else v
    variance = row_sums(v * v) / k
    # By way of float64: torch's root of float32, where it is MKL's, is not always the nearest.
    v = v * (1 / (variance + eps).double().sqrt().float())
    v = v.to(x.dtype).float() if kind == "rms_rounded" else v
    v = v if weight is None else v * weight.float()
    v = v if bias is None else v + bias.float()
    return total, v.to(x.dtype)


def int8_norm_reference(
    x: torch.Tensor,
    eps: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    kind: str = "layer",
) -> tuple[torch.Tensor, ...]:
    """The sum, its norm, and codes and scales of that."""
    total, y = norm_reference(x, eps, weight, bias, residual, kind)
    if x.shape[-1] == 0:  # no largest magnitude
        return total, y, y.to(torch.int8), y.new_ones(*y.shape[:-1], 1, dtype=torch.float32)
    return total, y, *quantize_rows(y)


def int8_static_norm_reference(
    x: torch.Tensor,
    sx: torch.Tensor,
    zx: torch.Tensor,
    eps: float,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    kind: str = "layer",
) -> tuple[torch.Tensor, ...]:
    """The sum, its norm, and codes and scales of that, on the grid of `sx` and `zx`."""
    total, y = norm_reference(x, eps, weight, bias, residual, kind)
    centred, scale = centred_codes(y, sx, zx)
    return total, y, (centred + zx.to(torch.int16)).to(torch.int8), scale
