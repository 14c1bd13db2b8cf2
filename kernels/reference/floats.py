"""What the ops of the float formats mean, from the formats alone.

Stored values are multiplied as float32, which holds the products exactly, and summed in float32;
then `acc · sw · sx + bias` in float32 and one cast, with the scales of blocks inside the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qnn.kernels.formats.base import Format

Reference = Callable[..., Any]


def quantize_reference(form: Format | None, transposed: Format | None = None) -> Reference:
    """The parts of `x` in `form`, those of `xᵀ` in `transposed`, or both, one after the other."""

    def reference(x: torch.Tensor, seed: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        parts = () if form is None else form.quantize(x, seed)
        if transposed is not None:
            # Another draw: the two forms of an element are rounded independently.
            parts += transposed.quantize(x.mT, None if seed is None else seed + 1)
        return tuple(p.contiguous() if p.numel() else p.new_empty(p.shape) for p in parts)

    return reference


def dequantize_reference(form: Format) -> Reference:
    def reference(*args: Any, compute: torch.dtype = torch.float32) -> torch.Tensor:
        *parts, dtype = args
        return form.dequantize(parts, compute).to(dtype if compute == torch.float32 else compute)

    return reference


def product(
    x: tuple[torch.Tensor, torch.Tensor | None],
    w: tuple[torch.Tensor, torch.Tensor | None],
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`x · wᵀ + bias` of decoded operands, in the dtype of their values; one cast, unless that is
    float64. A packed weight may have zeros after the columns of `x`.
    """
    (xv, sx), (wv, sw) = x, w
    compute = wv.dtype
    y = xv.to(compute) @ wv[:, : xv.shape[-1]].mT
    if sw is not None:
        y = y * sw.flatten().to(compute)
    if sx is not None:
        y = y * sx.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(dtype if compute == torch.float32 else compute)


def matmul_reference(x: Format, w: Format) -> Reference:
    split = len(x.parts), len(x.parts) + len(w.parts)

    def reference(*args: Any, compute: torch.dtype = torch.float32) -> torch.Tensor:
        given, weight, (bias, dtype) = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
        return product(x.decode(given, compute), w.decode(weight, compute), bias, dtype)

    return reference


def linear_reference(activation: Format | None, weight: Format) -> Reference:
    def reference(
        x: torch.Tensor, *args: Any, compute: torch.dtype = torch.float32
    ) -> torch.Tensor:
        *parts, bias = args
        left = (
            (x.to(compute), None)
            if activation is None
            else activation.decode(activation.quantize(x), compute)
        )
        return product(left, weight.decode(parts, compute), bias, x.dtype)

    return reference


def linear_dgrad_reference(weight: Format) -> Reference:
    def reference(
        dy: torch.Tensor, *parts: torch.Tensor, compute: torch.dtype = torch.float32
    ) -> torch.Tensor:
        w = weight.dequantize(parts, compute)
        return (dy.to(compute) @ w).to(dy.dtype if compute == torch.float32 else compute)

    return reference
