"""The number formats in ONNX operators: what stored parts stand for, and floats as a format rounds
them. `qnn.kernels.formats` is what they must agree with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from qnn.integrations.onnx.build import (
    E4M3,
    FLOAT,
    INT8,
    INT32,
    INT64,
    UINT8,
    UINT32,
    NotTranslatableError,
    Value,
    cast,
    columns,
    const,
    finite,
    ints,
    last_axis,
    node,
    op,
    size,
    transposed,
)
from qnn.integrations.onnx.integers import as_bytes
from qnn.kernels.formats import Format, mxfp8, nvfp4
from qnn.kernels.formats.float8 import MAX_RECIPROCAL, Float8
from qnn.kernels.formats.int4 import Int4
from qnn.kernels.formats.int8 import Int8
from qnn.kernels.formats.mxfp8 import MXFP8
from qnn.kernels.formats.nvfp4 import NVFP4

_FLT_MAX = float(torch.finfo(torch.float32).max)


def decode(form: Format, parts: Sequence[Value]) -> tuple[Value, Value | None]:
    """`Format.decode` of a weight or of rows of it: float32 values, and a scale or None."""
    if isinstance(form, Int8):
        return cast(parts[0], FLOAT), parts[1]
    if isinstance(form, Float8):
        q, scale = parts
        tall, wide = form.sides
        values = cast(q, FLOAT)
        if wide == 0:
            return values, scale
        each = spread(scale, wide, size(q, -1))
        if tall > 1:
            each = transposed(spread(transposed(each), tall, size(q, 0)))
        return op.Mul(values, each), None
    if isinstance(form, MXFP8):
        q, byte = parts
        powers = op.Gather(_powers(), cast(byte, INT32))
        return op.Mul(cast(q, FLOAT), spread(powers, mxfp8.BLOCK, size(q, -1))), None
    if isinstance(form, NVFP4):
        packed, b, s = parts
        values = op.Gather(const(_E2M1), cast(nibbles(packed, size(packed, -1)), INT32))
        each = spread(cast(b, FLOAT), nvfp4.BLOCK, 2 * size(packed, -1))
        return op.Mul(values, each), op.Reciprocal(s)
    if isinstance(form, Int4):
        words, scale, *zero = parts
        groups = size(scale, -1)
        codes = cast(nibbles(octets(words), 4 * size(words, -1)), INT8)
        codes = op.Reshape(codes, ints(-1, groups, form.group))
        codes = op.Sub(codes, _zero_point(zero))
        values = op.Mul(cast(codes, FLOAT), op.Unsqueeze(scale, ints(-1)))
        return op.Reshape(values, ints(-1, groups * form.group)), None
    raise NotTranslatableError(f"qnn.integrations.onnx: the format {form.key} has no translation.")


_E2M1 = [*nvfp4._VALUES, *(-value for value in nvfp4._VALUES)]


def _powers() -> Value:
    """What a byte of E8M0 stands for."""
    return const([*(2.0 ** (each - 127) for each in range(255)), math.nan])


def _zero_point(zero: Sequence[Value]) -> Value:
    return op.Unsqueeze(zero[0], ints(-1)) if zero else const(8, np.int8)


def dequantized(form: Format, parts: Sequence[Value]) -> Value:
    values, scale = decode(form, parts)
    return values if scale is None else op.Mul(values, scale)


def spread(scale: Value, block: int, count: int) -> Value:
    """A scale for each of `count` columns, `[rows, count]`, from those of `block` columns each."""
    groups = -(-count // block)
    each = op.Expand(op.Unsqueeze(scale, ints(-1)), ints(1, 1, block))
    return columns(op.Reshape(each, ints(-1, groups * block)), count, groups * block)


def octets(words: Value) -> Value:
    """The bytes `[rows, 4p]` of int32 `[rows, p]`, the lowest first."""
    words32 = cast(words, UINT32)
    shifted = [
        op.BitShift(words32, const(8 * i, np.uint32), direction="RIGHT") if i else words32
        for i in range(4)
    ]
    low = [op.BitwiseAnd(each, const(255, np.uint32)) for each in shifted]
    stacked = op.Concat(*(op.Unsqueeze(cast(each, UINT8), ints(-1)) for each in low), axis=-1)
    return op.Reshape(stacked, ints(-1, 4 * size(words, -1)))


def nibbles(packed: Value, count: int) -> Value:
    """The codes `[rows, 2p]`, uint8, of bytes `[rows, p]`, the low one first."""
    low = op.BitwiseAnd(packed, const(15, np.uint8))
    high = op.BitShift(packed, const(4, np.uint8), direction="RIGHT")
    stacked = op.Concat(*(op.Unsqueeze(each, ints(-1)) for each in (low, high)), axis=-1)
    return op.Reshape(stacked, ints(-1, 2 * count))


def int4_codes(form: Int4, words: Value, zero: Sequence[Value], groups: int) -> tuple[Value, Value]:
    """Codes, bytes `[groups, group, N]`, and the zero point that all of them have then."""
    codes = nibbles(octets(words), 4 * size(words, -1))
    codes, point = op.Reshape(codes, ints(-1, groups, form.group)), const(8, np.uint8)
    if zero:
        # Where each group has one of its own: up by what it lacks to 16.
        up = op.Sub(const(16, np.int32), cast(op.Unsqueeze(zero[0], ints(-1)), INT32))
        codes, point = cast(op.Add(cast(codes, INT32), up), UINT8), const(16, np.uint8)
    return transposed(codes, 1, 2, 0), point


# A scale serves so many columns where it serves a row: ONNX Runtime has them in blocks alone.
_BLOCK = 128


def int8_product(parts: Sequence[Value], k: int) -> Callable[[Value], Value]:
    """`x · wᵀ` by ONNX Runtime's operator for weights of 8 bits, in float32. Of `DequantizeLinear`
    and `MatMul` it makes the same operator, and lets that round `x` to 8 bits.
    """
    w, scale = parts
    rows = size(w, 0)
    block = min(_BLOCK, max(16, 1 << (k - 1).bit_length()))
    blocks = -(-k // block)
    codes = as_bytes(w)
    if missing := blocks * block - k:
        codes = op.Concat(codes, const(np.full((rows, missing), 128), np.uint8), axis=1)
    codes = op.Reshape(codes, ints(rows, blocks, block))
    scales = op.Expand(scale, ints(rows, blocks))
    return lambda x: node(
        "MatMulNBits", [x, codes, scales], domain="com.microsoft",
        K=k, N=rows, bits=8, block_size=block, accuracy_level=1,
    )  # fmt: skip


def int4_product(
    form: Int4, x: Value, words: Value, scale: Value, zero: Sequence[Value], k: int
) -> Value:
    """`x · wᵀ` by ONNX Runtime's operator for weights of 4 bits, whose bytes are those of the
    words.
    """
    rows, groups = size(scale, 0), size(scale, -1)
    blob = op.Reshape(octets(words), ints(rows, groups, form.group // 2))
    points = [_packed_points(zero[0], rows, groups)] if zero else []
    return node(
        "MatMulNBits", [x, blob, scale, *points], domain="com.microsoft",
        K=k, N=rows, bits=4, block_size=form.group, accuracy_level=1,
    )  # fmt: skip


def _packed_points(zero: Value, rows: int, groups: int) -> Value:
    """Zero points two a byte, the first low."""
    zero = cast(zero, UINT8)
    if groups % 2:
        zero = op.Concat(zero, const(np.zeros((rows, 1)), np.uint8), axis=-1)
    pairs = op.Reshape(zero, ints(rows, -1, 2))
    low, high = (op.Gather(pairs, const(i, np.int64), axis=2) for i in range(2))
    return op.BitwiseOr(low, op.BitShift(high, const(4, np.uint8), direction="LEFT"))


# -- rounding --------------------------------------------------------------------------------------


def through(form: Format, x: Value, k: int) -> tuple[Value, Value | None]:
    """`form.decode(form.quantize(x))` of activations `x`, float32 `[..., k]`; with the values of a
    format of groups a scale is in them already.
    """
    if isinstance(form, Float8):
        tall, wide = form.sides
        if wide == 0:
            axes = (last_axis(x),) if tall else None
            r = _reciprocal_scale(_finite_amax(x, axes), form.qmax)
            return _e4m3(x, r), op.Reciprocal(r)
        groups, restore = _grouped(x, wide, k)
        r = _power_of_two(_reciprocal_scale(_finite_amax(groups, (2,)), form.qmax))
        return restore(op.Mul(_e4m3(groups, r), op.Reciprocal(r))), None
    if isinstance(form, MXFP8):
        groups, restore = _grouped(x, mxfp8.BLOCK, k)
        byte = _exponent_byte(_finite_amax(groups, (2,)))
        back = op.Gather(_powers(), op.Sub(const(254, np.int64), byte))
        values = _e4m3(groups, back)
        return restore(op.Mul(values, op.Gather(_powers(), byte))), None
    if isinstance(form, NVFP4):
        groups, restore = _grouped(x, nvfp4.BLOCK, k)
        values, s = _nvfp4(groups)
        return restore(values), op.Reciprocal(s)
    raise NotTranslatableError(
        f"qnn.integrations.onnx: activations in {form.key} have no translation."
    )


def _grouped(x: Value, block: int, k: int) -> tuple[Value, Callable[[Value], Value]]:
    """`[rows, groups, block]`, with zeros after the end, and what gives the shape of `x` back."""
    missing, shape = -k % block, op.Shape(x)
    padded = x
    if missing:
        begin = op.Expand(const(0, np.int64), op.Shape(shape))
        end = op.Concat(op.Slice(begin, ints(1), ints(1 << 30)), ints(missing), axis=0)
        padded = op.Pad(x, op.Concat(begin, end, axis=0))
    groups = op.Reshape(padded, ints(-1, (k + missing) // block, block))

    def restore(y: Value) -> Value:
        return op.Reshape(columns(op.Reshape(y, ints(-1, k + missing)), k, k + missing), shape)

    return groups, restore


def _finite_amax(x: Value, axes: Sequence[int] | None) -> Value:
    magnitude = op.Where(finite(x), op.Abs(x), 0.0)
    if axes is None:  # with a zero, since nothing has no largest value
        magnitude = op.Concat(op.Reshape(magnitude, ints(-1)), const([0.0]), axis=0)
        return op.ReduceMax(magnitude, keepdims=0)
    return op.ReduceMax(magnitude, ints(*axes), keepdims=1)


def _reciprocal_scale(amax: Value, qmax: float) -> Value:
    r = op.Min(op.Div(float(qmax), amax), MAX_RECIPROCAL)
    return op.Where(op.Equal(amax, 0.0), 1.0, r)


def _e4m3(x: Value, r: Value) -> Value:
    """`x · r` rounded to float8_e4m3, as float32; NaN for what is not finite."""
    v = op.Clip(op.Mul(x, r), -448.0, 448.0)
    return op.Where(finite(x), cast(cast(v, E4M3), FLOAT), const(np.nan))


def _exponent(v: Value) -> tuple[Value, Value]:
    """The largest `e` with 2^e ≤ v, int64 from −127 to 127, and 2^e. A logarithm may be off."""
    e = op.Floor(op.Div(op.Log(v), math.log(2)))
    e = cast(op.Clip(e, -126.0, 126.0), INT64)
    p = op.Gather(_powers(), op.Add(e, const(127, np.int64)))
    one = const(1, np.int64)
    e = op.Where(op.Greater(p, v), op.Sub(e, one), e)
    e = op.Where(op.LessOrEqual(op.Mul(p, 2.0), v), op.Add(e, one), e)
    return e, op.Gather(_powers(), op.Add(e, const(127, np.int64)))


def _power_of_two(r: Value) -> Value:
    return _exponent(r)[1]


def _exponent_byte(amax: Value) -> Value:
    """`mxfp8.exponent_byte`, int64."""
    v = op.Div(amax, 448.0)
    e, p = _exponent(v)
    up = op.Where(op.Equal(p, v), e, op.Add(e, const(1, np.int64)))
    least = op.LessOrEqual(v, 2.0**-127)
    byte = op.Where(least, const(0, np.int64), op.Add(up, const(127, np.int64)))
    return op.Where(op.Equal(amax, 0.0), const(127, np.int64), byte)


def _nvfp4(x: Value) -> tuple[Value, Value]:
    """Values times the scales of their groups, of `[rows, groups, 16]`, and the divisor."""
    e2m1, e4m3 = nvfp4._E2M1_MAX, nvfp4._E4M3_MAX
    amax = _finite_amax(x, None)
    s = op.Min(op.Div(float(e4m3 * e2m1), amax), _FLT_MAX)
    s = op.Where(op.Equal(amax, 0.0), 1.0, s)
    bmax = _finite_amax(x, (2,))
    b = op.Min(op.Mul(bmax, op.Mul(s, float(1 / e2m1))), float(e4m3))
    b = op.Where(op.Equal(bmax, 0.0), 1.0, cast(cast(b, E4M3), FLOAT))
    r = op.Min(op.Reciprocal(op.Mul(b, op.Reciprocal(s))), _FLT_MAX)
    v = op.Clip(op.Mul(x, r), -float(e2m1), float(e2m1))
    m = op.Abs(v)
    fine, middle = op.Mul(op.Round(op.Mul(m, 2.0)), 0.5), op.Round(m)
    coarse = op.Mul(op.Round(op.Mul(m, 0.5)), 2.0)
    m = op.Where(op.Less(m, 2.0), fine, op.Where(op.Less(m, 4.0), middle, coarse))
    q = op.Mul(op.Sign(v), m)
    whole = op.ReduceMin(cast(finite(x), FLOAT), ints(2), keepdims=1)
    b = op.Where(op.Equal(whole, 1.0), b, const(np.nan))
    return op.Mul(op.Where(finite(x), q, 0.0), b), s
