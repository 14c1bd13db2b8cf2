"""Writing ONNX operators from within a translation.

While torch's exporter translates a call it records the operators that onnxscript is asked for; `op`
asks the recorder at work. What has several results, a graph inside or a domain of its own is
appended to its list as a node.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import evaluator

# A tensor of the graph that is written: an `onnx_ir.Value`.
Value = Any

FLOAT, FLOAT16 = int(ir.DataType.FLOAT), int(ir.DataType.FLOAT16)
DOUBLE = int(ir.DataType.DOUBLE)
INT8, INT32, INT64 = int(ir.DataType.INT8), int(ir.DataType.INT32), int(ir.DataType.INT64)
UINT8, UINT32, BOOL = int(ir.DataType.UINT8), int(ir.DataType.UINT32), int(ir.DataType.BOOL)
E4M3 = int(ir.DataType.FLOAT8E4M3FN)
TINY = float(torch.finfo(torch.float32).tiny)
_NAMES = itertools.count()


class NotTranslatableError(NotImplementedError):
    """A call of a model that has no ONNX operators; it says which, and what to do."""


class _Operators:
    """The operators of the recorder at work, in the opset that is exported to."""

    def __getattr__(self, name: str) -> Any:
        return getattr(evaluator.default().opset, name)


op = _Operators()


def const(value: Any, dtype: Any = np.float32) -> Value:
    return op.Constant(value=ir.tensor(np.asarray(value, dtype=dtype)))


def ints(*values: int) -> Value:
    """A vector of int64: axes, or a shape."""
    return const(values, np.int64)


def node(
    name: str, inputs: Sequence[Value | None], outputs: int = 1, domain: str = "", **attributes: Any
) -> Any:
    """An operator that the recorder has no schema of; its results, or the only one."""
    made = ir.Node(
        domain,
        name,
        list(inputs),
        attributes=ir.convenience.convert_attributes(attributes),
        num_outputs=outputs,
        # Operators of other domains are at their first version.
        version=1 if domain else evaluator.default().opset.version,
    )
    evaluator.default().nodes.append(made)
    return made.outputs[0] if outputs == 1 else made.outputs


def body(run: Callable[..., Sequence[Value]], *dtypes: int, scalars: int = 0) -> ir.Graph:
    """The graph of `run`, for an operator that holds one, with inputs of these dtypes, of which the
    first are scalars. It sees the values around it, so its own names are its alone.
    """
    outer, prefix = evaluator.default(), f"qnn_body_{next(_NAMES)}"
    inputs = [
        ir.Value(name=f"{prefix}_in_{i}", type=ir.TensorType(ir.DataType(dtype)))
        for i, dtype in enumerate(dtypes)
    ]
    for each in inputs[:scalars]:
        shaped(each)
    inner = type(outer)(outer.opset, {})
    with evaluator.default_as(inner):
        outputs = [op.Identity(each) for each in run(*inputs)]
    made = [each for step in inner.nodes for each in step.outputs]
    for i, each in enumerate(made):
        each.name = f"{prefix}_{i}"
    return ir.Graph(inputs, outputs, nodes=inner.nodes, name=prefix)


# -- small things ----------------------------------------------------------------------------------


def cast(x: Value, dtype: int) -> Value:
    return op.Cast(x, to=dtype)


def widened(x: Value) -> Value:
    """`x` in float32."""
    return x if dtype_of(x) == FLOAT else shaped(cast(x, FLOAT), *x.shape)


def shaped(x: Value, *sizes: Any) -> Value:
    """`x`, of which the exporter knows the shape then; None for a size that may be any."""
    x.shape = ir.Shape(sizes)
    return x


def last_axis(x: Value) -> int:
    """Not −1, for which ONNX Runtime gives the reductions of an empty tensor a wrong shape."""
    return len(x.shape) - 1


def dtype_of(x: Value) -> int:
    """Of an argument of a translation, which the exporter knows."""
    return int(x.dtype)


def rounded(y: Value, dtype: int) -> Value:
    """Float32 values as they are after a cast to `dtype`."""
    return y if dtype == FLOAT else cast(cast(y, dtype), FLOAT)


def size(x: Value, axis: int) -> int:
    """A size that must be known when the model is exported."""
    found = x.shape[axis]
    if not isinstance(found, int):
        raise NotTranslatableError(
            f"qnn.integrations.onnx: axis {axis} of {x.name} has no fixed size, {x.shape}; export "
            "with this axis static."
        )
    return found


def transposed(w: Value, *axes: int) -> Value:
    return op.Transpose(w, perm=list(axes or (1, 0)))


def columns(x: Value, count: int, have: int) -> Value:
    """The first `count` columns of the `have` that there are."""
    return x if count == have else op.Slice(x, ints(0), ints(count), ints(-1))


def not_finite(x: Value, axes: Sequence[int]) -> Value:
    """NaN for each row of `x` along `axes`, which are kept, with a NaN or inf, and 0 for others:
    a largest value of ONNX may pass over a NaN.
    """
    return op.ReduceSum(op.Mul(x, 0.0), ints(*axes), keepdims=1)


def finite(x: Value) -> Value:
    """Where `x` is neither NaN nor inf."""
    return op.Equal(op.Mul(x, 0.0), 0.0)


_ROOT_HALF, _ROOT_2_PI = 0.7071067811865476, 0.7978845608028654


def _gelu_tanh(y: Value) -> Value:
    cubed = op.Mul(op.Mul(op.Mul(y, y), y), 0.044715)
    inner = op.Tanh(op.Mul(op.Add(y, cubed), _ROOT_2_PI))
    return op.Mul(op.Mul(y, 0.5), op.Add(inner, 1.0))


# By the names of `qnn.kernels.epilogue.ACTIVATIONS`.
ACTIVATIONS: dict[str, Callable[[Value], Value]] = {
    "none": lambda y: y,
    "relu": lambda y: op.Relu(y),
    "gelu": lambda y: op.Mul(op.Mul(y, 0.5), op.Add(op.Erf(op.Mul(y, _ROOT_HALF)), 1.0)),
    "gelu_tanh": _gelu_tanh,
    "silu": lambda y: op.Mul(y, op.Sigmoid(y)),
    "relu6": lambda y: op.Clip(y, 0.0, 6.0),
    "hardswish": lambda y: op.HardSwish(y),
    "hardsigmoid": lambda y: op.HardSigmoid(y, alpha=1 / 6, beta=0.5),
}


def finish(
    y: Value, dtype: int, residual: Value | None, activation: str, last: str = "none"
) -> Value:
    """`last(activation(y) + residual)`, with a cast to `dtype` after each, as the op has it."""
    if activation != "none":
        y = ACTIVATIONS[activation](rounded(y, dtype))
    if residual is not None:
        y = op.Add(rounded(y, dtype), widened(residual))
    if last != "none":
        y = ACTIVATIONS[last](rounded(y, dtype))
    return y if dtype == FLOAT else cast(y, dtype)
