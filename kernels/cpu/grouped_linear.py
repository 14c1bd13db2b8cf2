"""The CPU kernel of grouped layers whose activations are cast in torch operations."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qnn.kernels.formats import Format
from qnn.kernels.formats.base import finite_amax
from qnn.kernels.reference.grouped import spans


def quantized_grouped_linear(activation: Format, product: str) -> Callable[..., torch.Tensor]:
    """The layer with quantised activations: all rows of `x` are cast at once, and the op
    `qnn::<product>`, which takes activations as they are, multiplies what the codes stand for. The
    bits are those of the linear layer on each group: formats quantise a row, or a part of it, by
    itself, and where one has a scale of the tensor, the rows of each group have that of their own.
    """

    def kernel(x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        *parts, offsets, bias = args
        groups = list(spans(offsets, x.shape[0]))
        end = groups[-1][1].stop if groups else 0
        rows = x[:end]
        if activation.rowwise:
            cast = activation.quantize(rows)
        else:
            cast = activation.quantize_beside(rows, _amax_of_groups(rows, groups))
        values, scale = activation.decode(cast, torch.float32)
        values = values[..., : x.shape[-1]]
        y: torch.Tensor = getattr(torch.ops.qnn, product).default(values, *parts, offsets, None)
        if scale is not None:
            y *= scale
        if bias is not None:
            for group, some in groups:
                y[some] += bias[group]
        y = y.to(x.dtype)
        return y if end == len(x) else torch.cat([y, y.new_zeros(len(x) - end, y.shape[1])])

    return kernel


def _amax_of_groups(x: torch.Tensor, groups: list[tuple[int, slice]]) -> torch.Tensor:
    """For each row the largest finite magnitude in its group."""
    amax = finite_amax(x, -1)
    for _, rows in groups:
        amax[rows] = amax[rows].amax()
    return amax
