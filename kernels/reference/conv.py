"""What the convolution ops mean: convolutions of codes, transposed ones, and their gradients.

Images are `[b, c, i1, i2, i3]`, kernels `[n, c/groups, k1, k2, k3]`; those of a transposed
convolution are `[c, n/groups, k1, k2, k3]`, as torch has them. `padding` is `(before, after)` of
each axis in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from qnn.kernels.epilogue import finish
from qnn.kernels.formats.int8 import INT8_TENSOR, QMAX, round_to_grid

OFFSET = 128  # of a code in uint8 to the same code in int8
_TINY = torch.finfo(torch.float32).tiny
_SAMPLE = (1, 2, 3, 4)  # the axes that share a scale


def widened(x: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
    """`x` with zeros around it; negative numbers cut off, of the zeros too."""
    if min(padding) < 0 < max(padding):  # F.pad would cut first
        x, padding = widened(x, [max(each, 0) for each in padding]), [min(p, 0) for p in padding]
    return F.pad(x, [padding[at] for at in (4, 5, 2, 3, 0, 1)]) if any(padding) else x


def sums(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The convolution, in the dtype of both."""
    before = list(padding[::2])
    if before != list(padding[1::2]):
        x, before = widened(x, padding), [0, 0, 0]
    return F.conv3d(x, w, None, list(stride), before, list(dilation), groups)


def transposed_sums(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The transposed convolution, without the `padding` at its ends."""
    y = F.conv_transpose3d(x, w, None, list(stride), 0, 0, groups, list(dilation))
    return widened(y, [-each for each in padding])


def scaled(
    y: torch.Tensor,
    sw: torch.Tensor,
    sx: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`y · sw · sx + bias` in the dtype of `y`, then one cast, unless `y` is float64."""
    compute = y.dtype
    y = y * sw.to(compute).view(1, -1, 1, 1, 1)
    y = y if sx is None else y * sx.to(compute)
    y = y if bias is None else y + bias.to(compute).view(1, -1, 1, 1, 1)
    return y.to(dtype if compute == torch.float32 else compute)


def quantize_samples(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`int8_quantize` of each sample as one row: codes, and scales `[b, 1, 1, 1, 1]`."""
    if x.numel() == 0:
        return x.to(torch.int8), x.new_ones(x.shape[0], 1, 1, 1, 1, dtype=torch.float32)
    amax = x.abs().amax(_SAMPLE, keepdim=True).float()
    scale = (amax / torch.full_like(amax, QMAX)).clamp_min(_TINY)
    scale = torch.where(amax == 0, 1.0, scale)
    q = round_to_grid(x.float(), 1 / scale, -QMAX, QMAX)
    return torch.where(scale.isfinite(), q, 0).to(torch.int8), scale


def static_quantize_reference(
    x: torch.Tensor, sx: torch.Tensor, zx: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    zero_point = zx.float()
    good = x.float().isfinite().flatten(1).all(1).view(-1, 1, 1, 1, 1)
    good = good & (sx >= _TINY) & sx.isfinite()
    ends = INT8_TENSOR.qmin - zero_point, INT8_TENSOR.qmax - zero_point
    q = torch.where(good, round_to_grid(x.float(), 1 / sx, *ends), 0)
    return (q + (zero_point + OFFSET)).to(torch.uint8), torch.where(good, sx, torch.nan)


def product(transposed: bool) -> Callable[..., torch.Tensor]:
    return transposed_sums if transposed else sums


def exact_sums(
    q: torch.Tensor, zx: torch.Tensor | None, w: torch.Tensor, *rest: Any, transposed: bool = False
) -> torch.Tensor:
    """The sums over codes: int8, or with a zero point uint8; below 2^53, and so exact."""
    codes = q.double() if zx is None else q.double() - (zx.double() + OFFSET)
    return product(transposed)(codes, w.double(), *rest)


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
    integer_sums: Callable[..., torch.Tensor] = exact_sums,
) -> torch.Tensor:
    q, sx = quantize_samples(x)
    acc = integer_sums(q, None, w, stride, padding, dilation, groups, transposed=transposed)
    return finish(scaled(acc.to(compute), sw, sx, bias, x.dtype), residual, activation, last)


def static_conv_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    sx: torch.Tensor,
    zx: torch.Tensor,
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
    integer_sums: Callable[..., torch.Tensor] = exact_sums,
) -> torch.Tensor:
    q, scale = static_quantize_reference(x, sx, zx)
    acc = integer_sums(q, zx, w, stride, padding, dilation, groups, transposed=transposed)
    return finish(scaled(acc.to(compute), sw, scale, bias, x.dtype), residual, activation, last)


def weight_conv_reference(
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
) -> torch.Tensor:
    values = x.to(compute), w.to(compute)
    y = product(transposed)(*values, stride, padding, dilation, groups)
    return finish(scaled(y, sw, None, bias, x.dtype), residual, activation, last)


def codes_conv_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    zx: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    rq: torch.Tensor | None = None,
    rscale: torch.Tensor | None = None,
    rz: torch.Tensor | None = None,
    activation: str = "none",
    last: str = "none",
    dtype: torch.dtype = torch.float32,
    *,
    compute: torch.dtype = torch.float32,
    integer_sums: Callable[..., torch.Tensor] = exact_sums,
) -> torch.Tensor:
    acc = integer_sums(q, zx, w, stride, padding, dilation, groups)
    y = scaled(acc.to(compute), sw, scale, bias, dtype)
    if rq is not None and rscale is not None and rz is not None:
        other = ((rq.to(compute) - (rz.to(compute) + OFFSET)) * rscale.to(compute)).to(y.dtype)
        residual = other if residual is None else residual + other
    return finish(y, residual, activation, last)


def fork_conv_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    zx: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    so: torch.Tensor,
    zo: torch.Tensor,
    *rest: Any,
    integer_sums: Callable[..., torch.Tensor] = exact_sums,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = codes_conv_reference(q, scale, zx, w, sw, *rest, integer_sums=integer_sums)
    return y, *static_quantize_reference(y, so, zo)


def chain_conv_reference(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, codes, scale = fork_conv_reference(*args, **options)
    return codes, scale


def conv_dgrad_reference(
    dy: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    like: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    dz = dy.to(compute) * sw.to(compute).view(1, -1, 1, 1, 1)
    dx = transposed_sums(dz, w.to(compute), stride, [0] * 6, dilation, groups)
    cut = []
    for before, whole, size in zip(padding[::2], dx.shape[2:], like.shape[2:], strict=True):
        cut += [before, whole - before - size]
    dx = widened(dx, [-each for each in cut])
    return dx.to(dy.dtype if compute == torch.float32 else compute)


def conv_transpose_dgrad_reference(
    dy: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    dz = dy.to(compute) * sw.to(compute).view(1, -1, 1, 1, 1)
    dx = sums(widened(dz, padding), w.to(compute), stride, [0] * 6, dilation, groups)
    return dx.to(dy.dtype if compute == torch.float32 else compute)
