"""Quantise and dequantise in float, with straight-through gradients."""

from __future__ import annotations

from typing import TypeAlias

import torch

from qnn.kernels.formats.int8 import round_to_grid


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | int,
    qmin: int,
    qmax: int,
    *,
    channel_axis: int | None = None,
) -> torch.Tensor:
    """`round(clamp(x · (1/scale), qmin − zero_point, qmax − zero_point)) · scale`, ties to even, in
    float32 (float64 for a float64 `x`), then one cast to the dtype of `x`.

    These are the floats that the integers `q = clamp(round(x / scale) + zero_point, qmin, qmax)`
    stand for. NaN stays NaN; an infinite value becomes the end of the range.

    The gradient is that of the expression with `round` taken as the identity: to `x` it is 1 inside
    the range and 0 outside; to `scale` `round(v) − v` inside, for `v = x / scale`, and the end of
    the range outside, which is LSQ's (Esser et al., "Learned Step Size Quantization", 2020).

    Args:
        x: float, any shape.
        scale, zero_point: per-tensor `[1]`, or per-channel `[C]`; scales are positive.
        qmin, qmax: the integers' range.
        channel_axis: the axis of `x` with C elements, a scale for each; per-tensor if None.

    >>> fake_quantize(torch.tensor([-9.0, 0.24, 0.26, 9.0]), torch.tensor([0.5]), 2, 0, 7)
    tensor([-1.0000,  0.0000,  0.5000,  2.5000])
    """
    grid = grid_of(scale, zero_point, qmin, qmax, x, channel_axis)
    return on_grid(x, grid)


Grid: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def grid_of(
    scale: torch.Tensor,
    zero_point: torch.Tensor | int,
    qmin: int,
    qmax: int,
    like: torch.Tensor,
    channel_axis: int | None = None,
) -> Grid:
    """What `on_grid` needs, for tensors with the dtype and the axes of `like`: `1/scale`, both ends
    of the range, and `scale`.
    """
    compute = torch.float64 if like.dtype == torch.float64 else torch.float32
    if channel_axis is not None:
        shape = [1] * like.dim()
        shape[channel_axis] = -1
        scale = scale.reshape(shape)
        zero_point = (
            zero_point.reshape(shape) if isinstance(zero_point, torch.Tensor) else zero_point
        )
    scale = scale.to(compute)
    if not isinstance(zero_point, torch.Tensor):
        zero_point = torch.full_like(scale, zero_point)
    zero_point = zero_point.to(compute)
    return 1 / scale, qmin - zero_point, qmax - zero_point, scale


def on_grid(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """`fake_quantize` of `x`, many times with one grid: the steps of a recurrent layer."""
    inverse, low, high, scale = grid
    q = round_to_grid(
        x.to(scale.dtype), inverse, low, high, straight_through=torch.is_grad_enabled()
    )
    return (q * scale).to(x.dtype)
