"""`x · wᵀ` of a quantised weight, with activations as a scheme has them: what linear layers,
experts and the steps of recurrent layers share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qnn.integrations.onnx.build import (
    FLOAT,
    NotTranslatableError,
    Value,
    cast,
    columns,
    ints,
    op,
    size,
    transposed,
)
from qnn.integrations.onnx.formats import decode, int4_codes, int4_product, int8_product, through
from qnn.integrations.onnx.integers import (
    as_bytes,
    dynamic_scale,
    integers_of,
    matrix_sums,
    scaled_by,
    shifted_sums,
    static_scale,
    sums_of_16_bits,
    to_bytes,
)
from qnn.kernels.formats import Format
from qnn.kernels.formats.int4 import Int4
from qnn.kernels.formats.int8 import INT8_STATIC_MAX_K, Int8
from qnn.kernels.formats.int8 import QMAX as INT8_QMAX
from qnn.kernels.formats.int16 import QMAX as INT16_QMAX
from qnn.kernels.formats.int16 import Int16

# `x` float32 `[..., K]` to `x · wᵀ` float32 `[..., N]`.
Product = Callable[[Value], Value]


def product(
    weight: Format,
    parts: Sequence[Value],
    activation: Format | None,
    k: int,
    grid: Sequence[Value] = (),
) -> Product:
    """The product with a weight `[N, k]`; `grid` are the scale and the zero point of a static
    scheme. What depends on the weight alone is written here, outside of any loop.
    """
    if isinstance(weight, Int8):
        if activation is None:
            return int8_product(parts, k)
        return _integer_product(parts, activation, k, grid)
    if isinstance(weight, Int4):
        words, scale, *zero = parts
        if activation is None:
            return lambda x: int4_product(weight, x, words, scale, zero, k)
        return _grouped_integer_product(weight, words, scale, zero)
    return _float_product(weight, parts, activation, k)


def _float_product(
    weight: Format, parts: Sequence[Value], activation: Format | None, k: int
) -> Product:
    values, sw = decode(weight, parts)
    have = size(parts[0], -1) * weight.packing
    wt = transposed(columns(values, k, have))
    sw = None if sw is None else op.Reshape(sw, ints(-1))

    def run(x: Value) -> Value:
        x, sx = (x, None) if activation is None else through(activation, x, k)
        y = op.MatMul(x, wt)
        for scale in (sw, sx):
            y = y if scale is None else op.Mul(y, scale)
        return y

    return run


def _integer_product(
    parts: Sequence[Value], activation: Format, k: int, grid: Sequence[Value]
) -> Product:
    w, sw = parts
    wide = isinstance(activation, Int16)
    if wide and k > INT8_STATIC_MAX_K:
        raise NotTranslatableError(
            f"qnn.integrations.onnx: a sum over {k} products of 16 bits needs more than int32; at "
            f"most {INT8_STATIC_MAX_K} are translated. Convert this layer to int8_weight."
        )
    sums, sw = matrix_sums(as_bytes(transposed(w))), op.Reshape(sw, ints(-1))

    def run(x: Value) -> Value:
        if grid:
            scale = static_scale(x, grid[0])
            v = scaled_by(x, grid[0])
        else:
            scale = dynamic_scale(x, INT16_QMAX if wide else INT8_QMAX)
            v = scaled_by(x, scale)
        if wide:
            acc = sums_of_16_bits(integers_of(v, INT16_QMAX), sums)
        else:
            acc = cast(sums(*to_bytes(v, grid[1] if grid else None)), FLOAT)
        return op.Mul(op.Mul(acc, sw), scale)

    return run


def product_on_grid(parts: Sequence[Value], bits: int, k: int, row: Sequence[Value]) -> Product:
    """The product of int8 weights with `x` on the grid of a part of a cell, `row`: its scale, and
    the ends of its codes less its zero point.
    """
    w, sw = parts
    scale, low, high = row
    wt, sw = as_bytes(transposed(w)), op.Reshape(sw, ints(-1))
    matrix = matrix_sums(wt)
    sums = shifted_sums(wt, low, k) if bits <= 8 else lambda v: sums_of_16_bits(v, matrix)

    def run(x: Value) -> Value:
        v = op.Round(op.Min(op.Max(scaled_by(x, scale), low), high))
        return op.Mul(op.Mul(sums(v), sw), static_scale(x, scale))

    return run


def _grouped_integer_product(
    weight: Int4, words: Value, scale: Value, zero: Sequence[Value]
) -> Product:
    """int8 rows with weights of 4 bits: an exact sum for each group, times its scale."""
    groups, rows = size(scale, -1), size(scale, 0)
    codes, point = int4_codes(weight, words, zero, groups)
    each = op.Unsqueeze(transposed(scale), ints(1))

    def run(x: Value) -> Value:
        sx = dynamic_scale(x, INT8_QMAX)
        q, middle = to_bytes(scaled_by(x, sx))
        q = transposed(op.Reshape(q, ints(-1, groups, weight.group)), 1, 0, 2)
        sums = cast(op.MatMulInteger(q, codes, middle, point), FLOAT)
        y = op.ReduceSum(op.Mul(sums, each), ints(0), keepdims=0)
        lead = op.Slice(op.Shape(x), ints(0), ints(-1))
        return op.Mul(op.Reshape(y, op.Concat(lead, ints(rows), axis=0)), sx)

    return run
