"""Declaring an operator: notation, checks, gradient, registration."""

from qnn.kernels.op.axes import Arg, Axis, describe, parse_axis, parse_signature, size_of
from qnn.kernels.op.declaration import Declaration, too_long
from qnn.kernels.op.op import LIBRARY, OPS, Op, on_first_call, on_trace, run_trace_hooks

__all__ = [
    "LIBRARY",
    "OPS",
    "Arg",
    "Axis",
    "Declaration",
    "Op",
    "describe",
    "on_first_call",
    "on_trace",
    "parse_axis",
    "parse_signature",
    "run_trace_hooks",
    "size_of",
    "too_long",
]
