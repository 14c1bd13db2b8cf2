"""The linear layers of `int16` and `int16_static`: 16-bit activations on int8 weights, whose other
ops are those of int8.

There is no zero point. Sums of products are exact, of any length. NaN and inf go where they go in
the layers of int8.
"""

from __future__ import annotations

from qnn.kernels.cpu import int16_linear as cpu
from qnn.kernels.declare.int8 import EPILOGUE, INT8, SCALE
from qnn.kernels.formats.base import FLOATS
from qnn.kernels.op import Op
from qnn.kernels.reference.int16 import linear_reference, static_linear_reference

int16_linear = Op(
    "int16_linear",
    "x: ... k, w: n k, sw: n 1, bias?: n, residual?: ... n, activation?: str -> ... n",
    doc="sx = amax(|x|) / 32767 of each row, q = clamp(round(x · (1/sx)), −32767, 32767); "
    "activation(float32(Σ q · wᵀ) · sw · sx + bias) + residual, with casts as in int8_linear",
    dtypes={"x": FLOATS, "w": INT8, "sw": SCALE, "bias": FLOATS, "residual": "x"},
    out=("x",),
    reference=linear_reference,
    kernels={"CPU": cpu.linear},
    native=True,
    backward={"x": "int8_linear_dgrad"},
    positive=("sw",),
    choices=EPILOGUE,
    products="... n k",
)

int16_static_linear = Op(
    "int16_static_linear",
    "x: ... k, w: n k, sw: n 1, sx: 1, bias?: n, residual?: ... n, activation?: str -> ... n",
    doc="q = clamp(round(x · (1/sx)), −32767, 32767); activation(float32(Σ q · wᵀ) · sw · sx + "
    "bias) + residual, with casts as in int8_linear",
    dtypes={"x": FLOATS, "w": INT8, "sw": SCALE, "sx": SCALE, "bias": FLOATS, "residual": "x"},
    out=("x",),
    reference=static_linear_reference,
    kernels={"CPU": cpu.static_linear},
    native=True,
    backward={"x": "int8_linear_dgrad"},
    positive=("sw", "sx"),
    choices=EPILOGUE,
    products="... n k",
)
