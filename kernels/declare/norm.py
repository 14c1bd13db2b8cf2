"""A residual, a norm, and codes, in one op: what a pass of `torch.compile` puts before the int8
layers that read a norm. `reference/norm.py` says what it computes, and in which order.

An op for each choice of results: the codes and their scales; the normalised floats too (`fork`);
and the sum with the residual too (`sum`). On a grid for all rows they are `int8_static_…`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from qnn.kernels.op import Op
from qnn.kernels.reference.norm import KINDS, int8_norm_reference, int8_static_norm_reference

_Reference = Callable[..., tuple[torch.Tensor, ...]]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_GRIDS: dict[str, tuple[str, str, _Reference]] = {
    "int8": ("", "int8_quantize(y)", int8_norm_reference),
    "int8_static": (
        "sx: 1, zx: 1, ",
        "q = clamp(round(y · (1/sx)) + zx, −128, 127), scale = sx, or NaN for a row with a NaN or "
        "inf",
        int8_static_norm_reference,
    ),
}


def _picked(*args: Any, of: _Reference, which: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    results = of(*args)
    return tuple(results[i] for i in which)


def name_of(grid: str, *, sums: bool, fork: bool) -> str:
    """The op that gives codes on a grid, `"int8"` or `"int8_static"`, and floats beside them."""
    return f"{grid}_{'sum_' * sums}{'fork_' * fork}norm"


NORMS: dict[str, Op] = {}
for (_grid, (_given, _codes, _reference)), _sums, _fork in itertools.product(
    _GRIDS.items(), (False, True), (False, True)
):
    _results = ["s: ... k"] * _sums + ["y: ... k"] * _fork + ["q: ... k", "scale: ... 1"]
    _name = name_of(_grid, sums=_sums, fork=_fork)
    NORMS[_name] = Op(
        _name,
        f"x: ... k, {_given}eps: float, weight?: k, bias?: k, residual?: ... k, kind?: str -> "
        + ", ".join(_results),
        doc="s = x + residual; y = (s − mean(s)) · 1/√(var(s) + eps) · weight + bias, or, of the "
        f"kinds rms, s · 1/√(mean(s²) + eps) · weight + bias; {_codes}. float32, with a cast to "
        "the dtype of x of s, of y, and of kind rms_rounded before the weight",
        dtypes={
            "x": _FLOATS, "sx": (torch.float32,), "zx": (torch.int8,), "weight": _FLOATS,
            "bias": _FLOATS, "residual": "x",
        },
        out=("x",) * (_sums + _fork) + (torch.int8, torch.float32),
        reference=functools.partial(
            _picked, of=_reference, which=(0,) * _sums + (1,) * _fork + (2, 3)
        ),
        native=True,
        positive=("sx",),
        choices={"kind": KINDS},
        sample={"eps": 1e-5},
        inference=True,
    )  # fmt: skip

__all__ = ["NORMS", "name_of"]
