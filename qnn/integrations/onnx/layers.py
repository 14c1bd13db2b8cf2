"""Linear layers, experts, tables and casts: what their ops are in ONNX.

A rule takes the arguments of an op by their names, with defaults, and returns its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qnn.integrations.onnx.build import (
    BOOL,
    E4M3,
    FLOAT,
    FLOAT16,
    INT64,
    NotTranslatableError,
    Value,
    body,
    cast,
    const,
    dtype_of,
    finish,
    ints,
    node,
    op,
    shaped,
    size,
    widened,
)
from qnn.integrations.onnx.formats import dequantized
from qnn.integrations.onnx.integers import dynamic_scale, scaled_by
from qnn.integrations.onnx.products import product
from qnn.kernels.formats import Format
from qnn.kernels.formats.int8 import QMAX
from qnn.kernels.schemes import Scheme

Arguments = Mapping[str, Any]
Rule = Callable[[Arguments], Any]


def grid_of(given: Arguments) -> list[Value]:
    """The scale and the zero point of a static scheme, as far as the op has them."""
    return [given[name] for name in ("sx", "zx") if name in given]


def weight_of(form: Format, given: Arguments) -> list[Value]:
    """The parts of a weight; ops of int8 call the first `w`, and not `wq`."""
    first, *others = form.names("w")
    return [given[first] if first in given else given["w"], *(given[name] for name in others)]


def added(y: Value, bias: Value | None) -> Value:
    return y if bias is None else op.Add(y, widened(bias))


def linear(scheme: Scheme) -> Rule:
    def rule(given: Arguments) -> Value:
        x, weight = given["x"], scheme.weight
        parts = weight_of(weight, given)
        times = product(weight, parts, scheme.activation, size(x, -1), grid_of(given))
        y = added(times(widened(x)), given["bias"])
        after = given.get("residual"), given.get("activation", "none")
        return finish(y, dtype_of(x), *after)

    return rule


def grouped_linear(scheme: Scheme) -> Rule:
    """A loop over the groups: each multiplies its rows with its weight."""

    def rule(given: Arguments) -> Value:
        x, weight, bias = given["x"], scheme.weight, given["bias"]
        stacks, k = weight_of(weight, given), size(x, -1)
        groups, rows = size(stacks[0], 0), size(stacks[0], 1)
        wide, ends = widened(x), cast(given["offsets"], INT64)

        def step(i: Value, more: Value, y: Value, begin: Value) -> Sequence[Value]:
            at = op.Reshape(i, ints(1))
            end = op.Gather(ends, at)
            parts = [_taken(stack, i) for stack in stacks]
            times = product(weight, parts, scheme.activation, k, grid_of(given))
            mine = times(shaped(op.Slice(wide, begin, end, ints(0)), None, k))
            mine = mine if bias is None else op.Add(mine, op.Gather(widened(bias), i))
            return op.Identity(more), op.Concat(y, mine, axis=0), end

        start = [const(np.zeros((0, rows))), ints(0)]
        count = [const(groups, np.int64), const(True, np.bool_)]
        loop = body(step, INT64, BOOL, FLOAT, INT64, scalars=2)
        y, end = node("Loop", [*count, *start], outputs=2, body=loop)
        rest = op.Sub(op.Slice(op.Shape(x), ints(0), ints(1)), end)
        zeros = op.Expand(const(0.0), op.Concat(rest, ints(rows), axis=0))
        return finish(op.Concat(y, zeros, axis=0), dtype_of(x), None, "none")

    return rule


def _taken(stored: Value, index: Value, *lead: int | None) -> Value:
    """What `index` picks along the first axis, whose sizes are known then too."""
    sizes = list(stored.shape)[1:]
    if dtype_of(stored) == E4M3:  # there is no Gather of it; float16 has all of its values
        stored = cast(stored, FLOAT16)
        dtype = ir.DataType.FLOAT16
    else:
        dtype = stored.dtype
    found = op.Gather(stored, index)
    found.dtype = dtype
    return shaped(found, *lead, *sizes)


def embedding(scheme: Scheme) -> Rule:
    """The rows that are asked for, decoded."""

    def rule(given: Arguments) -> Value:
        ids = given["ids"]
        rows = looked_up(scheme.weight, op.Reshape(ids, ints(-1)), given)
        shape = op.Concat(op.Shape(ids), ints(-1), axis=0)
        return finish(op.Reshape(rows, shape), given["dtype"], None, "none")

    return rule


def looked_up(form: Format, ids: Value, given: Arguments) -> Value:
    parts = [
        _taken(stored, ids, None) if part.axes.startswith("r ") else stored
        for part, stored in zip(form.parts, weight_of(form, given), strict=True)
    ]
    return dequantized(form, parts)


def embedding_bag(scheme: Scheme) -> Rule:
    def rule(given: Arguments) -> Value:
        ids, offsets, weights = given["ids"], given["offsets"], given["weights"]
        mode = given["mode"]
        rows = looked_up(scheme.weight, ids, given)
        if weights is not None:
            rows = op.Mul(rows, op.Unsqueeze(widened(weights), ints(-1)))
        one = const(1, np.int64)
        count = op.Reshape(op.Shape(ids), const([], np.int64))
        places = op.Unsqueeze(op.Range(const(0, np.int64), count, one), ints(0))
        begins = op.Unsqueeze(op.Slice(offsets, ints(0), ints(-1)), ints(1))
        ends = op.Unsqueeze(op.Slice(offsets, ints(1), ints(1 << 62)), ints(1))
        # Which ids a bag has, [bags, ids].
        member = op.And(op.GreaterOrEqual(places, begins), op.Less(places, ends))
        kept = op.Not(op.Equal(cast(ids, INT64), const(given["padding"], np.int64)))
        member = op.And(member, op.Unsqueeze(kept, ints(0)))
        number = op.ReduceSum(cast(member, FLOAT), ints(1), keepdims=1)
        if mode == "max":
            inside = op.Unsqueeze(member, ints(-1))
            spread = op.Where(inside, op.Unsqueeze(rows, ints(0)), const(-np.inf))
            none = op.Expand(const(-np.inf), op.Shape(op.Slice(spread, ints(0), ints(1), ints(1))))
            y = op.ReduceMax(op.Concat(spread, none, axis=1), ints(1), keepdims=0)
            y = op.Where(op.Greater(number, 0.0), y, 0.0)
        else:
            y = op.MatMul(cast(member, FLOAT), rows)
            y = op.Div(y, op.Max(number, 1.0)) if mode == "mean" else y
        return finish(y, given["dtype"], None, "none")

    return rule


def dequantize(form: Format) -> Rule:
    def rule(given: Arguments) -> Value:
        parts = [given[name] for name in form.names("")]
        if len(parts[0].shape) != 2:
            raise NotTranslatableError(
                f"qnn.integrations.onnx: {form.key}_dequantize of {len(parts[0].shape)} axes has "
                "no translation; a matrix has."
            )
        return finish(dequantized(form, parts), given["dtype"], None, "none")

    return rule


def int8_quantize(given: Arguments) -> tuple[Value, Value]:
    x = widened(given["x"])
    scale = dynamic_scale(x, QMAX)
    codes = op.QuantizeLinear(scaled_by(x, scale), const(1.0), const(0, np.int8))
    return codes, scale


def int8_dequantize(given: Arguments) -> Value:
    y = op.Mul(cast(given["q"], FLOAT), given["scale"])
    return finish(y, given["dtype"], None, "none")
