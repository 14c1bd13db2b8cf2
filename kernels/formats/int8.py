"""The int8 formats: per-channel and per-token scales, from a row's largest magnitude, and a
per-tensor scale and zero point that calibration has found.

Rounding is to nearest, ties to even; a scale times the stored integer is the float; all scale
arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qnn.kernels.formats.base import Format, Part

QMAX = 127


def int32_max_k(largest: int) -> int:
    """How many products of a code of at most `largest` and a weight's, at most 128, int32 sums
    exactly; a longer row could wrap around without a word.
    """
    return (2**31 - 1) // (largest * 128)


INT8_MAX_K = int32_max_k(QMAX)
INT8_STATIC_MAX_K = int32_max_k(255)  # of q − zero_point
INT8_ROWS_MAX_K = int32_max_k(QMAX + 1)  # rows from elsewhere may hold −128


def round_to_grid(
    x: torch.Tensor,
    inverse: torch.Tensor,
    low: Any,
    high: Any,
    *,
    straight_through: bool = False,
) -> torch.Tensor:
    """The integers that `x` has on a grid, less its zero point: `round(clamp(x · inverse, low,
    high))`, ties to even, for `inverse = 1/scale`, `low = qmin − zero_point` and `high = qmax −
    zero_point`; as floats, and NaN stays NaN.

    With `straight_through` the gradient is that of the identity for `round`; else it is zero.
    """
    v = x * inverse
    if not straight_through:
        return v.clamp_(low, high).round_()  # in its own memory, which is what takes the time
    v = v.clamp(low, high)
    # Minus an exact zero, not plus: the sign of a zero stays.
    return v.detach().round() - (v.detach() - v)


def row_scale(x: torch.Tensor, qmax: int = QMAX) -> torch.Tensor:
    """The scale of each row: amax / qmax, at least float32's smallest normal number; 1 for a zero
    row.
    """
    amax = x.abs().amax(-1, keepdim=True).float()
    # By a tensor: on a GPU torch divides by a number as a product with its reciprocal.
    scale = (amax / torch.full_like(amax, qmax)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(amax == 0, 1.0, scale)


def quantize_rows(
    x: torch.Tensor, qmax: int = QMAX, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of the rows of `x [..., K]`: int8 `[..., K]` and float32 `[..., 1]`."""
    scale = row_scale(x, qmax)
    q = round_to_grid(x.float(), 1 / scale, -qmax, qmax)
    return torch.where(scale.isfinite(), q, 0).to(dtype), scale


@dataclass(frozen=True)
class Int8(Format):
    def quantize(
        self, x: torch.Tensor, seed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_rows(x)

    def decode(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = parts
        return q.to(compute), scale


INT8_CHANNEL = Int8(
    "int8",
    "int8",
    "int",
    torch.int8,
    -QMAX,
    QMAX,
    "channel",
    (Part("", "{}q", torch.int8, "r c"), Part("_scale", "s{}", torch.float32, "r 1")),
)
INT8_TOKEN = replace(INT8_CHANNEL, granularity="token")


@dataclass(frozen=True)
class Int8Static(Int8):
    """int8 on a grid for the whole tensor that is known beforehand."""

    def quantize(
        self, x: torch.Tensor, seed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("int8_static: the scale comes from calibration, not from x.")

    def decode(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale, zero_point = parts
        return q.to(compute) - zero_point.to(compute), scale


INT8_TENSOR = Int8Static(
    "int8",
    "int8_static",
    "int",
    torch.int8,
    -QMAX - 1,
    QMAX,
    "tensor",
    (
        Part("", "{}q", torch.int8, "r c"),
        Part("_scale", "s{}", torch.float32, "1"),
        Part("_zero_point", "z{}", torch.int8, "1"),
    ),
)
