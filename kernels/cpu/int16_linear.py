"""CPU kernels of the int16 ops where the library of the C++ kernels is not loaded. Their meaning is
`kernels/reference/int16.py`.
"""

from __future__ import annotations

import torch

from qnn.kernels.cpu.blocked import by_rows_of_weight
from qnn.kernels.epilogue import finish
from qnn.kernels.reference.int16 import linear_reference, static_linear_reference


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    return finish(by_rows_of_weight(linear_reference)(x, w, sw, bias), residual, activation)


def static_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    sx: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    def on_grid(
        x: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return static_linear_reference(x, w, sw, sx, bias)

    return finish(by_rows_of_weight(on_grid)(x, w, sw, bias), residual, activation)
