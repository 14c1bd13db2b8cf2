"""What the int8 ops mean: quantise, dequantise, and the linear layers."""

from __future__ import annotations

import torch
from einops import einsum, rearrange

from qnn.kernels.epilogue import finish
from qnn.kernels.formats.int8 import INT8_TENSOR, quantize_rows, round_to_grid

quantize_reference = quantize_rows


def dequantize_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    return (q.to(compute) * scale.to(compute)).to(dtype if compute == torch.float32 else compute)


def scaled(
    y: torch.Tensor,
    sw: torch.Tensor,
    sx: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`y · sw · sx + bias` in the dtype of `y`, then one cast, unless `y` is float64."""
    compute = y.dtype
    y = y * rearrange(sw, "n 1 -> n").to(compute)
    y = y if sx is None else y * sx.to(compute)
    y = y if bias is None else y + bias.to(compute)
    return y.to(dtype if compute == torch.float32 else compute)


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
    q, sx = quantize_reference(x)
    return rows_linear_reference(q, sx, w, sw, bias, residual, activation, x.dtype, compute=compute)


def rows_linear_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    # Exact: the sums stay below 2^53 for every K that the scheme admits.
    acc = einsum(q.double(), w.double(), "... k, n k -> ... n")
    return finish(scaled(acc.to(compute), sw, scale, bias, dtype), residual, activation)


def weight_linear_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    y = einsum(x.to(compute), w.to(compute), "... k, n k -> ... n")
    return finish(scaled(y, sw, None, bias, x.dtype), residual, activation)


def linear_dgrad_reference(
    dy: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, *, compute: torch.dtype = torch.float32
) -> torch.Tensor:
    dx = einsum(dy.to(compute), w.to(compute) * sw.to(compute), "... n, n k -> ... k")
    return dx.to(dy.dtype if compute == torch.float32 else compute)


def static_linear_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    sx: torch.Tensor,
    zx: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    q, scale = centred_codes(x, sx, zx)
    return rows_linear_reference(
        q, scale, w, sw, bias, residual, activation, x.dtype, compute=compute
    )


def centred_codes(
    x: torch.Tensor, sx: torch.Tensor, zx: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`q − zx` of `x` on a grid, int16, and the scale of each row: that of the grid, or NaN for a
    row with a NaN or inf, whose codes are that of zero, and for all rows where `sx` is no scale.
    """
    rows, zero_point = x.float(), zx.float()
    tiny = torch.finfo(torch.float32).tiny
    good = rows.isfinite().all(-1, keepdim=True) & (sx >= tiny) & sx.isfinite()
    ends = INT8_TENSOR.qmin - zero_point, INT8_TENSOR.qmax - zero_point
    q = torch.where(good, round_to_grid(rows, 1 / sx, *ends), 0).to(torch.int16)  # no −0
    return q, torch.where(good, sx, torch.nan)


def static_rows_linear_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    zx: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    centred = q.to(torch.int16) - zx.to(torch.int16)
    return rows_linear_reference(
        centred, scale, w, sw, bias, residual, activation, dtype, compute=compute
    )
