"""The grouped linear ops, derived from those of linear layers: a stack of weights, and rows that
are sorted by the weight that they meet.

`offsets` are the ends of the groups, as those of torch's `grouped_mm`: group `e` has the rows
`offsets[e − 1] … offsets[e] − 1`, none where the two are equal. Rows after the last group belong to
none, and give zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qnn.kernels.cpu.grouped_linear import quantized_grouped_linear
from qnn.kernels.declare import floats, int8, int16  # noqa: F401  # the ops of linear layers
from qnn.kernels.formats import Format
from qnn.kernels.op import OPS, Op
from qnn.kernels.op.axes import Arg
from qnn.kernels.reference.grouped import by_group
from qnn.kernels.schemes import SCHEMES

_OFFSETS = {"offsets": (torch.int32,)}
# Of a sample: groups of 20, 0 and 15 rows, and two rows of none.
_ENDS = (20, 20, 35)


def grouped_name(linear: str) -> str:
    """Of the grouped form of an op: `int8_grouped_linear`, `int8_grouped_linear_dgrad`."""
    return linear.replace("_linear", "_grouped_linear")


def _stacked(args: list[Arg]) -> str:
    """The arguments with an axis of the groups in front."""
    return ", ".join(f"{arg.name}: e {' '.join(map(str, arg.tail))}" for arg in args)


def _at_least_one(x: torch.Tensor, w: torch.Tensor, *_: Any) -> str | None:
    return None if w.shape[0] else "there must be a group at least"


def _declare(
    one: Op,
    first: str,
    signature: str,
    weight: list[Arg],
    cpu: Callable[..., Any] | None = None,
    **declared: Any,
) -> None:
    """The op that does what `one` does, group by group, on a CPU by the kernel `cpu` if there is
    one; `first` is its float argument.
    """
    has_bias = "bias" in signature

    def call(*args: Any) -> Any:
        return one.overload(*args)

    loop = by_group(call, len(weight), bias=has_bias)
    names = {part.split(":")[0].strip(" ?") for part in signature.split(",")}
    Op(
        grouped_name(one.name),
        signature,
        doc=f"{one.name} on the rows of each group, with its weight",
        dtypes={n: d for n, d in one.dtypes.items() if n in names} | _OFFSETS,
        out=one.out,
        reference=by_group(one.reference, len(weight), bias=has_bias),
        kernels={"CPU": cpu or loop, "CUDA": loop},
        backward={first: grouped_name(one.backward[first])},
        positive=tuple(one.positive),
        rule=_at_least_one,
        sample={**one.sample, "e": len(_ENDS), "offsets": lambda sizes: torch.tensor(
            _ENDS, dtype=torch.int32
        )},
        limits=one.limits,
        multiples=one.multiples,
        **declared,
    )  # fmt: skip


def declare_grouped(linear: Op, activation: Format | None = None) -> None:
    """The grouped forms of the op of a linear layer and of its gradient; `activation` is that of a
    layer whose activations are cast before a product of floats.
    """
    dgrad = OPS[linear.backward["x"]]
    shared = {arg.name for arg in dgrad.inputs}
    weight = [arg for arg in linear.inputs if arg.name in shared]
    grid = [arg for arg in linear.inputs if arg.name in ("sx", "zx")]
    known = f"{_stacked(weight)}, offsets: e"
    of_grid = "".join(f", {arg.name}: {' '.join(map(str, arg.tail))}" for arg in grid)
    cpu = None
    if activation is not None:
        cpu = quantized_grouped_linear(activation, grouped_name(dgrad.backward["dy"]))
    _declare(
        linear, "x", f"x: m k, {known}{of_grid}, bias?: e n -> m n", weight, cpu,
        products="m n k", native=linear.native,
    )  # fmt: skip
    if grouped_name(dgrad.name) not in OPS:
        stored = dgrad.inputs[1:]
        columns = dgrad.outputs[0].tail[-1]
        _declare(
            dgrad, "dy", f"dy: m n, {_stacked(list(stored))}, offsets: e -> m {columns}",
            list(stored), products=f"m n {columns}",
        )  # fmt: skip


for _scheme in SCHEMES.values():
    _linear = OPS[_scheme.linear]
    _plain = OPS[OPS[_linear.backward["x"]].backward["dy"]]
    _cast = _scheme.activation if _scheme.weight.number == "float" else None
    for _op, _activation in ((_linear, _cast), (_plain, None)):
        if grouped_name(_op.name) not in OPS:
            declare_grouped(_op, _activation)
