"""Convolutions in ONNX: `ConvInteger` for int8 and int16 activations, `Conv` over a weight that is
dequantised for others.

ONNX has no transposed convolution of integers. There the codes are multiplied as floats: products
are exact, and sums to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qnn.integrations.onnx.build import (
    FLOAT,
    NotTranslatableError,
    Value,
    cast,
    dtype_of,
    finish,
    ints,
    op,
    size,
    widened,
)
from qnn.integrations.onnx.integers import (
    as_bytes,
    dynamic_scale,
    integers_of,
    scaled_by,
    static_scale,
    sums_of_16_bits,
    to_bytes,
    zero,
)
from qnn.integrations.onnx.layers import Arguments, Rule, grid_of
from qnn.kernels.formats.int8 import INT8_STATIC_MAX_K
from qnn.kernels.formats.int8 import QMAX as INT8_QMAX
from qnn.kernels.formats.int16 import QMAX as INT16_QMAX
from qnn.kernels.formats.int16 import Int16
from qnn.kernels.schemes import Scheme

_AXES = 3  # of the images that the ops take


def conv(scheme: Scheme, *, transposed: bool = False) -> Rule:
    def rule(given: Arguments) -> Value:
        x, w, form = given["x"], given["w"], scheme.activation
        spare = _spare_axes(given)
        squeezed = ints(*range(2, 2 + spare))
        image = op.Squeeze(widened(x), squeezed) if spare else widened(x)
        kernels = op.Squeeze(w, squeezed) if spare else w
        options, axes = _options(given, spare, transposed), _AXES - spare
        sample = tuple(range(1, axes + 2))
        grid, sx = grid_of(given), None
        wide = isinstance(form, Int16)
        if form is None:
            acc = _float_sums(image, kernels, options, transposed)
        else:
            if grid:
                sx = static_scale(image, op.Reshape(grid[0], ints(*[1] * (axes + 2))), sample)
                v = scaled_by(image, grid[0])
            else:
                sx = dynamic_scale(image, INT16_QMAX if wide else INT8_QMAX, sample)
                v = scaled_by(image, sx)
            zero_point = grid[1] if len(grid) > 1 else None
            acc = _sums(v, kernels, zero_point, options, wide, transposed)
        of_channel = ints(1, -1, *[1] * axes)
        y = op.Mul(acc, op.Reshape(given["sw"], of_channel))
        y = y if sx is None else op.Mul(y, sx)
        if given["bias"] is not None:
            y = op.Add(y, op.Reshape(widened(given["bias"]), of_channel))
        y = op.Unsqueeze(y, squeezed) if spare else y
        return finish(y, dtype_of(x), given["residual"], given["activation"], given["last"])

    return rule


def _spare_axes(given: Arguments) -> int:
    """How many of the first axes an image of fewer lacks."""
    x, w, spare = given["x"], given["w"], 0
    while (
        spare < _AXES - 1
        and x.shape[2 + spare] == 1
        and size(w, 2 + spare) == 1
        and given["stride"][spare] == 1
        and not any(given["padding"][2 * spare : 2 * spare + 2])
    ):
        spare += 1
    return spare


def _options(given: Arguments, spare: int, transposed: bool) -> dict[str, Any]:
    before, after = given["padding"][2 * spare :: 2], given["padding"][2 * spare + 1 :: 2]
    options = {
        "strides": list(given["stride"][spare:]),
        "dilations": list(given["dilation"][spare:]),
        "group": given["groups"],
    }
    if transposed:  # what is cut off is negative where it is added
        options["output_padding"] = [max(-each, 0) for each in after]
        after = [max(each, 0) for each in after]
    return {**options, "pads": [*before, *after]}


def _float_sums(x: Value, w: Value, options: dict[str, Any], transposed: bool) -> Value:
    floats = cast(w, FLOAT)
    return (op.ConvTranspose if transposed else op.Conv)(x, floats, **options)


def _sums(
    v: Value,
    w: Value,
    zero_point: Value | None,
    options: dict[str, Any],
    wide: bool,
    transposed: bool,
) -> Value:
    """Sums over the codes of `v`, less their zero point, in float32."""

    kernels = as_bytes(w)

    def of_codes(q: Value, point: Value) -> Value:
        return op.ConvInteger(q, kernels, point, zero(), **options)

    _require_length(w, options["group"], wide, transposed)
    if transposed:
        codes = integers_of(v, INT16_QMAX) if wide else _codes(v, zero_point)
        return _float_sums(codes, w, options, True)
    if wide:
        return sums_of_16_bits(integers_of(v, INT16_QMAX), of_codes)
    return cast(of_codes(*to_bytes(v, zero_point)), FLOAT)


def _codes(v: Value, zero_point: Value | None) -> Value:
    """int8 codes less their zero point, as floats."""
    codes, point = to_bytes(v, zero_point)
    return op.Sub(cast(codes, FLOAT), cast(point, FLOAT))


def _require_length(w: Value, groups: int, wide: bool, transposed: bool) -> None:
    shape: Sequence[int] = [size(w, axis) for axis in range(len(w.shape or ()))]
    depth = 1
    for each in shape[1:]:
        depth *= each
    if wide and not transposed and depth > INT8_STATIC_MAX_K:
        raise NotTranslatableError(
            f"qnn.integrations.onnx: a sum over {depth} products of 16 bits needs more than int32; "
            f"at most {INT8_STATIC_MAX_K} are translated. Convert this layer to int8_weight."
        )
