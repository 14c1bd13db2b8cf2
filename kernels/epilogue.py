"""What a linear op or a convolution does after its cast: an activation, then a residual, then of a
convolution perhaps a ReLU, each in the dtype of the result, as the separate torch calls would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}
# What a convolution may have after the residual.
LAST = ("none", "relu")


def finish(
    y: torch.Tensor, residual: torch.Tensor | None, activation: str, last: str = "none"
) -> torch.Tensor:
    """`last(activation(y) + residual)`, for a `y` that may be overwritten.

    In bfloat16 and float16 torch computes each of the two in float32 and rounds once, so a value is
    rounded as often as in a graph that does not fold them.
    """
    if activation != "none":
        y = ACTIVATIONS[activation](y)
    y = y if residual is None else y.add_(residual)
    return y if last == "none" else ACTIVATIONS[last](y)
