"""Integers from floats, and exact sums of their products.

Both operands are bytes with a zero point of 128. For signed weights ONNX Runtime has sums that
saturate, where activations are unsigned and the CPU has no VNNI, and no fast kernel where they are
signed: 512 rows of 384 times a weight of 384 × 1536 took 3.7 ms with wrong sums, and 42 ms; bytes
6.6 ms, and floats 15 ms (one thread of a Zen 3, a busy machine). What has 16 bits is two products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qnn.integrations.onnx.build import (
    DOUBLE,
    FLOAT,
    INT32,
    TINY,
    UINT8,
    Value,
    cast,
    const,
    ints,
    last_axis,
    not_finite,
    op,
)

OFFSET = 128  # of a byte to the signed integer that it stands for
# Sums bytes less a zero point, times a weight: of a linear layer, or of a convolution.
Sums = Callable[[Value, Value], Value]


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


def to_bytes(v: Value, zero_point: Value | None = None) -> tuple[Value, Value]:
    """`clamp(round(v) + zero_point, −128, 127)`, ties to even, as bytes; and their zero point."""
    point = zero() if zero_point is None else as_bytes(op.Reshape(zero_point, const([], np.int64)))
    return op.QuantizeLinear(v, const(1.0), point), point


def zero() -> Value:
    return const(OFFSET, np.uint8)


def as_bytes(w: Value) -> Value:
    """int8 as bytes with a zero point of 128."""
    return op.BitwiseXor(cast(w, UINT8), const(OFFSET, np.uint8))


def integers_of(v: Value, qmax: int) -> Value:
    """`round(clamp(v, ±qmax))`, as floats."""
    return op.Round(op.Clip(v, float(-qmax), float(qmax)))


def sums_of_16_bits(v: Value, sums: Sums) -> Value:
    """Exact sums, float32, of the integers `v`, floats of 16 bits: as 256 · high + low."""
    high = op.Floor(op.Mul(v, 1 / 256))
    low = op.Sub(v, op.Mul(high, 256.0))
    upper = cast(sums(cast(op.Add(high, float(OFFSET)), UINT8), zero()), DOUBLE)
    lower = cast(sums(cast(low, UINT8), const(0, np.uint8)), DOUBLE)
    return cast(op.Add(op.Mul(upper, const(256, np.float64)), lower), FLOAT)


def matrix_sums(wt: Value) -> Sums:
    """Sums over the rows of `wt`, bytes `[K, N]`."""
    return lambda q, point: op.MatMulInteger(q, wt, point, zero())


def shifted_sums(wt: Value, low: Value, k: int) -> Callable[[Value], Value]:
    """Exact sums, float32, of integers, floats from `low` to at most `low + 255`, for any `low`:
    those of `v − low`, and what that leaves out.
    """
    sums, none = matrix_sums(wt), const(0, np.uint8)
    rest = op.Mul(cast(low, INT32), sums(const(np.ones((1, k)), np.uint8), none))
    return lambda v: cast(op.Add(sums(cast(op.Sub(v, low), UINT8), none), rest), FLOAT)
