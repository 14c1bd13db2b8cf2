"""BatchNorm as what it is in evaluation mode: a scale and a shift per channel, which a layer before
it can take into its own weight and bias.
"""

from __future__ import annotations

import torch


def scale_and_shift(
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale` and `shift`, float64 `[C]`, with `batch_norm(x) = x · scale + shift` per channel:

    scale = weight / √(var + eps),   shift = bias − mean · scale
    """
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def fold(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    transposed_groups: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias of the layer that computes `layer(x) · scale + shift`, in the dtype and
    memory format of `weight`; the arithmetic is float64.

    Args:
        weight: `[out, …]`; with transposed_groups `[in, out / groups, …]`, as a transposed
            convolution has it.
        bias: `[out]`.
        scale, shift: float64 `[out]`.
        transposed_groups: of a transposed convolution, its groups.
    """
    factor = scale.reshape(-1, *[1] * (weight.dim() - 1))
    if transposed_groups is not None:
        # Rows of group g lead to its own outputs alone.
        factor = scale.reshape(transposed_groups, -1)
        factor = factor.repeat_interleave(weight.shape[0] // transposed_groups, 0)
        factor = factor.reshape(*factor.shape, *[1] * (weight.dim() - 2))
    folded = torch.empty_like(weight).copy_(weight.double() * factor)
    moved = shift if bias is None else shift + bias.double() * scale
    return folded, moved.to(weight.dtype)
