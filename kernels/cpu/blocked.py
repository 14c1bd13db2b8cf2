"""CPU kernels that are their op's reference, where the library of the C++ kernels is not loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Values of a weight that are widened at a time.
_WIDEN_BLOCK = 1 << 19


def by_rows_of_weight(reference: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`reference(x, *weight, bias)`, which widens the whole weight at once, of one block of the
    weight's rows after the other: each is a layer of its own.
    """

    def kernel(x: torch.Tensor, *args: Any) -> torch.Tensor:
        *weight, bias = args
        rows, columns = weight[0].shape[0], x.shape[-1]
        step = max(1, _WIDEN_BLOCK // max(1, columns))
        if rows <= step:
            return reference(x, *args)
        y = x.new_empty(*x.shape[:-1], rows)
        for begin in range(0, rows, step):
            block = slice(begin, begin + step)
            some = None if bias is None else bias[block]
            y[..., block] = reference(x, *(part[block] for part in weight), some)
        return y

    return kernel
