"""What the int16 ops mean: linear layers and convolutions of 16-bit activations over int8 weights.

A sum of products is an exact integer, of more than 32 bits. It becomes float32 once, rounded to
nearest, and goes on as that of int8: `float32(Σ q · w) · sw · sx + bias`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import einsum

from qnn.kernels.epilogue import finish
from qnn.kernels.formats.int8 import round_to_grid
from qnn.kernels.formats.int16 import INT16_TOKEN, QMAX
from qnn.kernels.reference import conv
from qnn.kernels.reference.int8 import scaled


def linear_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    q, sx = INT16_TOKEN.quantize(x)
    y = scaled(exact_sums(q, w).to(compute), sw, sx, bias, x.dtype)
    return finish(y, residual, activation)


def static_linear_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    sx: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    q, scale = on_grid(x, sx)
    y = scaled(exact_sums(q, w).to(compute), sw, scale, bias, x.dtype)
    return finish(y, residual, activation)


def on_grid(x: torch.Tensor, sx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of `x`, int16, and the scale of each row: NaN where it holds NaN or inf, and where
    `sx` is not a positive normal number.
    """
    rows, tiny = x.float(), torch.finfo(torch.float32).tiny
    good = rows.isfinite().all(-1, keepdim=True) & (sx >= tiny) & sx.isfinite()
    q = torch.where(good, round_to_grid(rows, 1 / sx, -QMAX, QMAX), 0)
    return q.to(torch.int16), torch.where(good, sx, torch.nan)


def exact_sums(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Σ q · w in float64, which holds every such sum of up to 2³¹ products."""
    return einsum(q.double(), w.double(), "... k, n k -> ... n")


def conv_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    last: str = "none",
    *,
    compute: torch.dtype = torch.float32,
    transposed: bool = False,
    integer_sums: Callable[..., torch.Tensor] = conv.exact_sums,
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = INT16_TOKEN.quantize,
) -> torch.Tensor:
    q, sx = quantize(x.flatten(1))  # each sample as one row
    geometry = stride, padding, dilation, groups
    acc = integer_sums(q.view(x.shape), None, w, *geometry, transposed=transposed)
    y = conv.scaled(acc.to(compute), sw, sx.view(-1, 1, 1, 1, 1), bias, x.dtype)
    return finish(y, residual, activation, last)


def static_conv_reference(
    x: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, sx: torch.Tensor, *rest: Any, **options: Any
) -> torch.Tensor:
    return conv_reference(x, w, sw, *rest, quantize=lambda rows: on_grid(rows, sx), **options)
