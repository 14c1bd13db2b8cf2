"""The linear layer of the scheme `int8_static`: activations on one grid that calibration has found.

`zx` is the integer that stands for 0.0, as `input_zero_point` of the compressed-tensors convention.
The sums of products are exact. A row of `x` with a NaN or inf gives a row of NaN, and so does every
row where `sx` is not a positive normal number, such as the 0 of a layer that was never calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qnn.kernels.cpu import int8_linear as cpu
from qnn.kernels.cpu import native
from qnn.kernels.formats import FLOATS, Part
from qnn.kernels.int8 import (
    EPILOGUE,
    INT8,
    QMAX,
    SCALE,
    Int8,
    int32_max_k,
    rows_linear_reference,
)
from qnn.kernels.spec import Op

INT8_STATIC_MAX_K = int32_max_k(255)  # of q − zx


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

    @property
    def compressed(self) -> dict[str, Any]:
        return {**super().compressed, "symmetric": False}


INT8_TENSOR = Int8Static(
    "int8",
    "int8_static",
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


def static_linear_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    sx: torch.Tensor,
    zx: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    rows, zero_point = x.float(), zx.float()
    tiny = torch.finfo(torch.float32).tiny
    good = rows.isfinite().all(-1, keepdim=True) & (sx >= tiny) & sx.isfinite()
    q = ((rows * (1 / sx)).round() + zero_point).clamp(INT8_TENSOR.qmin, INT8_TENSOR.qmax)
    q = torch.where(good, q - zero_point, 0)
    scale = torch.where(good, sx, torch.nan)
    return rows_linear_reference(
        q, scale, w, sw, bias, residual, activation, x.dtype, compute=compute
    )


int8_static_linear = Op(
    "int8_static_linear",
    "x: ... k, w: n k, sw: n 1, sx: 1, zx: 1, bias: n?, residual: ... n?, activation: str? "
    "-> ... n",
    doc="q = clamp(round(x · (1/sx)) + zx, −128, 127); activation(int32((q − zx) · wᵀ) · sw · sx + "
    "bias) + residual, with casts as in int8_linear",
    dtypes={
        "x": FLOATS, "w": INT8, "sw": SCALE, "sx": SCALE, "zx": INT8, "bias": FLOATS,
        "residual": "x",
    },
    out=("x",),
    reference=static_linear_reference,
    kernels={"CPU": native.preferred("int8_static_linear", cpu.static_linear)},
    backward={"x": "int8_linear_dgrad"},
    positive=("sw", "sx"),
    choices=EPILOGUE,
    products="... n k",
    limits={"k": INT8_STATIC_MAX_K},
)  # fmt: skip

native.replaces(int8_static_linear)
