"""The int8 ops: quantise, dequantise, and the linear layer of the schemes `int8` and `int8_weight`.

The references are the meaning of the ops. Rounding is to nearest, ties to even; a scale times the
stored integer is the float; all scale arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import einsum, rearrange

from qnn.kernels.cpu import int8_linear as cpu
from qnn.kernels.cpu import native
from qnn.kernels.epilogue import ACTIVATIONS, finish
from qnn.kernels.formats import FLOATS, Format, Part
from qnn.kernels.spec import Op

INT8, SCALE = (torch.int8,), (torch.float32,)
EPILOGUE = {"activation": tuple(ACTIVATIONS)}
QMAX = 127


def int32_max_k(largest: int) -> int:
    """How many products of a code of at most `largest` and a weight's, at most 128, int32 sums
    exactly; a longer row could wrap around without a word.
    """
    return (2**31 - 1) // (largest * 128)


INT8_MAX_K = int32_max_k(QMAX)
INT8_ROWS_MAX_K = int32_max_k(QMAX + 1)  # rows from elsewhere may hold −128


@dataclass(frozen=True)
class Int8(Format):
    def quantize(
        self, x: torch.Tensor, seed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_reference(x)

    def decode(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = parts
        return q.to(compute), scale

    @property
    def compressed(self) -> dict[str, Any]:
        return {**super().compressed, "type": "int"}


INT8_CHANNEL = Int8(
    "int8",
    "int8",
    torch.int8,
    -QMAX,
    QMAX,
    "channel",
    (Part("", "{}q", torch.int8, "r c"), Part("_scale", "s{}", torch.float32, "r 1")),
)
INT8_TOKEN = replace(INT8_CHANNEL, granularity="token")


def row_scale(x: torch.Tensor) -> torch.Tensor:
    """The scale of each row: amax / 127, at least float32's smallest normal number; 1 for a zero
    row.
    """
    amax = x.abs().amax(-1, keepdim=True).float()
    # By a tensor: on a GPU torch divides by a number as a product with its reciprocal.
    scale = (amax / torch.full_like(amax, QMAX)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(amax == 0, 1.0, scale)


def quantize_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = row_scale(x)
    q = (x.float() * (1 / scale)).round().clamp(-QMAX, QMAX)
    return torch.where(scale.isfinite(), q, 0).to(torch.int8), scale


def dequantize_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    return (q.to(compute) * scale.to(compute)).to(dtype if compute == torch.float32 else compute)


def _scaled(
    y: torch.Tensor,
    sw: torch.Tensor,
    sx: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`y · sw · sx + bias` in the dtype of `y`, then one cast, unless `y` is float64."""
    compute = y.dtype
    y = y * rearrange(sw, "n 1 -> n").to(compute)
    y = y if sx is None else y * sx.to(compute)
    y = y if bias is None else y + bias.to(compute)
    return y.to(dtype if compute == torch.float32 else compute)


def linear_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    q, sx = quantize_reference(x)
    return rows_linear_reference(q, sx, w, sw, bias, residual, activation, x.dtype, compute=compute)


def rows_linear_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    # Exact: the sums stay below 2^53 for every K that the scheme admits.
    acc = einsum(q.double(), w.double(), "... k, n k -> ... n")
    return finish(_scaled(acc.to(compute), sw, scale, bias, dtype), residual, activation)


def weight_linear_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    y = einsum(x.to(compute), w.to(compute), "... k, n k -> ... n")
    return finish(_scaled(y, sw, None, bias, x.dtype), residual, activation)


def linear_dgrad_reference(
    dy: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, *, compute: torch.dtype = torch.float32
) -> torch.Tensor:
    dx = einsum(dy.to(compute), w.to(compute) * sw.to(compute), "... n, n k -> ... k")
    return dx.to(dy.dtype if compute == torch.float32 else compute)


int8_quantize = Op(
    "int8_quantize",
    "x: ... k -> q: ... k, scale: ... 1",
    doc="scale = amax(|x|) / 127 a row; q = clamp(round(x · (1/scale)), −127, 127)",
    dtypes={"x": FLOATS},
    out=(torch.int8, torch.float32),
    reference=quantize_reference,
    kernels={"CPU": cpu.quantize},
)

int8_dequantize = Op(
    "int8_dequantize",
    "q: ... k, scale: ... 1, dtype: dtype -> ... k",
    doc="q · scale, in float32, then one cast to dtype",
    dtypes={"q": INT8, "scale": SCALE, "dtype": FLOATS},
    out=("dtype",),
    reference=dequantize_reference,
    positive=("scale",),
)

int8_linear = Op(
    "int8_linear",
    "x: ... k, w: n k, sw: n 1, bias: n?, residual: ... n?, activation: str? -> ... n",
    doc="xq, sx = int8_quantize(x); activation(int32(xq · wᵀ) · sw · sx + bias) + residual, in "
    "float32, with one cast before the activation, one behind it, one behind the sum",
    dtypes={"x": FLOATS, "w": INT8, "sw": SCALE, "bias": FLOATS, "residual": "x"},
    out=("x",),
    reference=linear_reference,
    kernels={"CPU": native.preferred("int8_linear", cpu.linear)},
    backward={"x": "int8_linear_dgrad"},
    positive=("sw",),
    choices=EPILOGUE,
    products="... n k",
    limits={"k": INT8_MAX_K},
)

int8_rows_linear = Op(
    "int8_rows_linear",
    "q: ... k, scale: ... 1, w: n k, sw: n 1, bias: n?, residual: ... n?, activation: str?, "
    "dtype: dtype? -> ... n",
    doc="int8_linear of rows that int8_quantize has quantised: q, scale = int8_quantize(x)",
    dtypes={
        "q": INT8, "scale": SCALE, "w": INT8, "sw": SCALE, "bias": FLOATS, "residual": "dtype",
        "dtype": FLOATS,
    },
    out=("dtype",),
    reference=rows_linear_reference,
    kernels={"CPU": native.preferred("int8_rows_linear", cpu.rows_linear)},
    positive=("scale", "sw"),
    choices=EPILOGUE,
    products="... n k",
    limits={"k": INT8_ROWS_MAX_K},
)  # fmt: skip

int8_weight_linear = Op(
    "int8_weight_linear",
    "x: ... k, w: n k, sw: n 1, bias: n?, residual: ... n?, activation: str? -> ... n",
    doc="activation((x · wᵀ) · sw + bias) + residual, in float32, with casts as in int8_linear",
    dtypes={"x": FLOATS, "w": INT8, "sw": SCALE, "bias": FLOATS, "residual": "x"},
    out=("x",),
    reference=weight_linear_reference,
    kernels={"CPU": native.preferred("int8_weight_linear", cpu.weight_linear)},
    backward={"x": "int8_linear_dgrad"},
    positive=("sw",),
    choices=EPILOGUE,
    products="... n k",
)

int8_linear_dgrad = Op(
    "int8_linear_dgrad",
    "dy: ... n, w: n k, sw: n 1 -> ... k",
    doc="dy · (w · sw), straight through the quantisation of x",
    dtypes={"dy": FLOATS, "w": INT8, "sw": SCALE},
    out=("dy",),
    reference=linear_dgrad_reference,
    kernels={"CPU": cpu.linear_dgrad},
    backward={"dy": "int8_weight_linear"},
    products="... n k",
    positive=("sw",),
)

native.replaces(int8_quantize, int8_linear, int8_rows_linear, int8_weight_linear)
