"""CPU kernels of the int16 ops where the library of the C++ kernels is not loaded. Their meaning is
`kernels/reference/int16.py`, which widens the whole weight at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qnn.kernels.reference.int16 import linear_reference, static_linear_reference

# Values of a weight that are widened to float64 at a time.
_WIDEN_BLOCK = 1 << 19


def blocked(reference: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`reference`, a block of rows of the weight after the other: each is a layer of its own."""

    def kernel(
        x: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, *rest: torch.Tensor | str | None
    ) -> torch.Tensor:
        *grid, bias, residual, activation = rest
        step = max(1, _WIDEN_BLOCK // max(1, w.shape[1]))
        if w.shape[0] <= step:
            return reference(x, w, sw, *rest)
        y = x.new_empty(*x.shape[:-1], w.shape[0])
        for begin in range(0, w.shape[0], step):
            block = slice(begin, begin + step)
            some = [None if part is None else part[..., block] for part in (bias, residual)]
            y[..., block] = reference(x, w[block], sw[block], *grid, *some, activation)
        return y

    return kernel


linear, static_linear = blocked(linear_reference), blocked(static_linear_reference)
