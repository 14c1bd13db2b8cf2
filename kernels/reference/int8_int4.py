"""What the layers of `int8_int4` mean: int8 rows of activations over int4 weights in groups.

The sum of a group's products is an exact integer. Times the group's scale it is added in float32, a
group after the other; then come the row's scale and the bias:

    y = (Σ over groups: float32(Σ q · (code − zero point)) · scale) · sx + bias
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qnn.kernels.formats.base import Format
from qnn.kernels.formats.int4 import Int4


def linear_reference(activation: Format, weight: Int4) -> Callable[..., torch.Tensor]:
    def reference(
        x: torch.Tensor, *args: Any, compute: torch.dtype = torch.float32
    ) -> torch.Tensor:
        *parts, bias = args
        codes, scale = weight.integers(parts)
        q, sx = activation.quantize(x)
        # A sum of up to 128 products of at most 127 · 15 is exact in float32.
        rows = q.float().unflatten(-1, (scale.shape[-1], weight.group))
        y: torch.Tensor = x.new_zeros(*x.shape[:-1], codes.shape[0], dtype=compute)
        for group in range(scale.shape[-1]):
            sums = rows[..., group, :] @ codes[:, group].float().mT
            y = y + sums.to(compute) * scale[:, group].to(compute)
        y = y * sx.to(compute)
        y = y if bias is None else y + bias.to(compute)
        return y.to(x.dtype if compute == torch.float32 else compute)

    return reference
