"""The int8 ops: quantise, dequantise, and the linear layers of `int8`, `int8_static` and
`int8_weight`.

`zx` of `int8_static` is the integer that stands for 0.0, as `input_zero_point` of the
compressed-tensors convention. The sums of products are exact. A row of `x` with a NaN or inf gives
a row of NaN, and so does every row where `sx` is not a positive normal number, such as the 0 of a
layer that was never calibrated.
"""

from __future__ import annotations

import torch

from qnn.kernels.cpu import int8_linear as cpu
from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.formats.base import FLOATS
from qnn.kernels.formats.int8 import INT8_MAX_K, INT8_ROWS_MAX_K, INT8_STATIC_MAX_K
from qnn.kernels.op import Op
from qnn.kernels.reference.int8 import (
    dequantize_reference,
    linear_dgrad_reference,
    linear_reference,
    quantize_reference,
    rows_linear_reference,
    static_linear_reference,
    static_rows_linear_reference,
    weight_linear_reference,
)

INT8, SCALE = (torch.int8,), (torch.float32,)
EPILOGUE = {"activation": tuple(ACTIVATIONS)}

int8_quantize = Op(
    "int8_quantize",
    "x: ... k -> q: ... k, scale: ... 1",
    doc="scale = amax(|x|) / 127 of each row; q = clamp(round(x · (1/scale)), −127, 127)",
    dtypes={"x": FLOATS},
    out=(torch.int8, torch.float32),
    reference=quantize_reference,
    kernels={"CPU": cpu.quantize},
    native=True,
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
    "x: ... k, w: n k, sw: n 1, bias?: n, residual?: ... n, activation?: str -> ... n",
    doc="xq, sx = int8_quantize(x); activation(int32(xq · wᵀ) · sw · sx + bias) + residual, in "
    "float32, with one cast before the activation, one after it, one after the sum",
    dtypes={"x": FLOATS, "w": INT8, "sw": SCALE, "bias": FLOATS, "residual": "x"},
    out=("x",),
    reference=linear_reference,
    kernels={"CPU": cpu.linear},
    native=True,
    backward={"x": "int8_linear_dgrad"},
    positive=("sw",),
    choices=EPILOGUE,
    products="... n k",
    limits={"k": INT8_MAX_K},
)

int8_rows_linear = Op(
    "int8_rows_linear",
    "q: ... k, scale: ... 1, w: n k, sw: n 1, bias?: n, residual?: ... n, activation?: str, "
    "dtype?: dtype -> ... n",
    doc="int8_linear of rows that int8_quantize has quantised: q, scale = int8_quantize(x)",
    dtypes={
        "q": INT8, "scale": SCALE, "w": INT8, "sw": SCALE, "bias": FLOATS, "residual": "dtype",
        "dtype": FLOATS,
    },
    out=("dtype",),
    reference=rows_linear_reference,
    kernels={"CPU": cpu.rows_linear},
    native=True,
    positive=("scale", "sw"),
    choices=EPILOGUE,
    products="... n k",
    limits={"k": INT8_ROWS_MAX_K},
)  # fmt: skip

int8_weight_linear = Op(
    "int8_weight_linear",
    "x: ... k, w: n k, sw: n 1, bias?: n, residual?: ... n, activation?: str -> ... n",
    doc="activation((x · wᵀ) · sw + bias) + residual, in float32, with casts as in int8_linear",
    dtypes={"x": FLOATS, "w": INT8, "sw": SCALE, "bias": FLOATS, "residual": "x"},
    out=("x",),
    reference=weight_linear_reference,
    kernels={"CPU": cpu.weight_linear},
    native=True,
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

int8_static_linear = Op(
    "int8_static_linear",
    "x: ... k, w: n k, sw: n 1, sx: 1, zx: 1, bias?: n, residual?: ... n, activation?: str "
    "-> ... n",
    doc="q = clamp(round(x · (1/sx)) + zx, −128, 127); activation(int32((q − zx) · wᵀ) · sw · sx + "
    "bias) + residual, with casts as in int8_linear",
    dtypes={
        "x": FLOATS, "w": INT8, "sw": SCALE, "sx": SCALE, "zx": INT8, "bias": FLOATS,
        "residual": "x",
    },
    out=("x",),
    reference=static_linear_reference,
    kernels={"CPU": cpu.static_linear},
    native=True,
    backward={"x": "int8_linear_dgrad"},
    positive=("sw", "sx"),
    choices=EPILOGUE,
    products="... n k",
    limits={"k": INT8_STATIC_MAX_K},
)  # fmt: skip

int8_static_rows_linear = Op(
    "int8_static_rows_linear",
    "q: ... k, scale: ... 1, w: n k, sw: n 1, zx: 1, bias?: n, residual?: ... n, activation?: str, "
    "dtype?: dtype -> ... n",
    doc="int8_static_linear of rows that are on its grid already: q as there, and scale = sx, or "
    "NaN for a row that was not finite",
    dtypes={
        "q": INT8, "scale": SCALE, "w": INT8, "sw": SCALE, "zx": INT8, "bias": FLOATS,
        "residual": "dtype", "dtype": FLOATS,
    },
    out=("dtype",),
    reference=static_rows_linear_reference,
    kernels={"CPU": cpu.static_rows_linear},
    native=True,
    positive=("scale", "sw"),
    choices=EPILOGUE,
    products="... n k",
    limits={"k": INT8_STATIC_MAX_K},
)  # fmt: skip
