"""Integers from floats, and exact sums of their products.

Codes are int8, and so are weights: of uint8 times int8 some CPUs saturate the sums of two products,
which ONNX Runtime lets happen. What has 16 bits is two products of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qnn.integrations.onnx.build import (
    DOUBLE,
    FLOAT,
    INT8,
    INT32,
    TINY,
    Value,
    cast,
    const,
    ints,
    last_axis,
    not_finite,
    op,
)

# Sums codes less a zero point: of a linear layer, or of a convolution.
Sums = Callable[[Value, Value | None], Value]


def dynamic_scale(x: Value, qmax: int, axes: Sequence[int] = ()) -> Value:
    """`row_scale` of the int8 format: amax / qmax of each row, or of what shares other axes than
    the last; NaN for one that is not finite.
    """
    axes = axes or (last_axis(x),)
    amax = op.ReduceMax(op.Abs(x), ints(*axes), keepdims=1)
    scale = op.Max(op.Div(amax, float(qmax)), TINY)
    scale = op.Where(op.Equal(amax, 0.0), 1.0, scale)
    return op.Add(scale, not_finite(x, axes))


def static_scale(x: Value, sx: Value, axes: Sequence[int] = ()) -> Value:
    """`sx` for each row; NaN for one that is not finite, and where `sx` is no normal number."""
    axes = axes or (last_axis(x),)
    good = op.Where(op.GreaterOrEqual(sx, TINY), sx, const(np.nan))
    return op.Add(good, not_finite(x, axes))


def scaled_by(x: Value, scale: Value) -> Value:
    return op.Mul(x, op.Reciprocal(scale))


def to_int8(v: Value, zero_point: Value | None = None) -> Value:
    """`clamp(round(v) + zero_point, −128, 127)`, ties to even."""
    zero = const(0, np.int8) if zero_point is None else scalar(zero_point)
    return op.QuantizeLinear(v, const(1.0), zero)


def scalar(x: Value) -> Value:
    return op.Reshape(x, const([], np.int64))


def sums_of_16_bits(v: Value, sums: Sums) -> Value:
    """Exact sums, float32, of the integers `v`, floats from −32768 to 32767: as 256 · high + low.
    """
    high = op.Floor(op.Mul(v, 1 / 256))
    low = op.Sub(op.Sub(v, op.Mul(high, 256.0)), 128.0)  # a byte less 128
    upper = cast(sums(cast(high, INT8), None), DOUBLE)
    lower = cast(sums(cast(low, INT8), const(-128, np.int8)), DOUBLE)
    return cast(op.Add(op.Mul(upper, const(256, np.float64)), lower), FLOAT)


def integers_of(v: Value, qmax: int) -> Value:
    """`round(clamp(v, ±qmax))`, as floats."""
    return op.Round(op.Clip(v, float(-qmax), float(qmax)))


def matrix_sums(wt: Value) -> Sums:
    """Sums over the rows of `wt`, int8 `[K, N]`."""
    return lambda q, zero: op.MatMulInteger(q, wt, *([] if zero is None else [zero]))


def shifted_sums(wt: Value, low: Value) -> Callable[[Value], Value]:
    """Exact sums, float32, of integers, floats from `low` to at most `low + 255`, for any `low`:
    those of `v − low − 128`, and what that leaves out.
    """
    offset = op.Add(low, 128.0)
    rest = op.Mul(cast(offset, INT32), op.ReduceSum(cast(wt, INT32), ints(0), keepdims=0))
    return lambda v: cast(
        op.Add(op.MatMulInteger(cast(op.Sub(v, offset), INT8), wt), rest), FLOAT
    )
