"""What the forms of a convolution share: the arguments of torch's layers, and their checks."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from qnn.functional.layout import FILTERS, Layout, TransposedFilters
from qnn.kernels import get_scheme
from qnn.kernels.schemes import schemes_of

CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[nn.Module], ...] = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def plain_class(layer: nn.Module | type[nn.Module]) -> Any:
    """The class of torch's that a convolution of any form stands for."""
    kind = layer if isinstance(layer, type) else type(layer)
    return next(each for each in (*CONVS, *TRANSPOSED) if issubclass(kind, each))


def geometry(layer: Any) -> dict[str, Any]:
    """The arguments that make a convolution of the same sizes, without bias, device and dtype."""
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
    names += ["groups", "padding_mode"]
    if layer.transposed:
        names.append("output_padding")
    return {name: getattr(layer, name) for name in names}


def words(layer: Any) -> str:
    """Its sizes, as they stand in errors: `3, 8, kernel_size=(3, 3)`."""
    return f"{layer.in_channels}, {layer.out_channels}, kernel_size={tuple(layer.kernel_size)}"


def layout_of(layer: Any) -> Layout:
    """How its weight is stored."""
    return TransposedFilters(layer.groups) if layer.transposed else FILTERS


def op_of(layer: Any) -> str:
    """What schemes call the op of such a layer."""
    return "conv_transpose" if layer.transposed else "conv"


def why_not_conv(scheme: str, layer: Any) -> str | None:
    """Why a convolution of these sizes cannot be held in a scheme, or None."""
    known = get_scheme(scheme)
    if known.op(op_of(layer)) is None:
        able = ", ".join(map(repr, schemes_of(op_of(layer))))
        return f"scheme {scheme!r} has no convolution; use one of {able}"
    sizes = layer.in_channels, layer.out_channels, *layer.kernel_size
    if min(sizes) < 1:
        return f"channels and kernel_size must be at least 1, got {words(layer)}"
    products = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    limit = known.max_in_features
    if limit is not None and products > limit:
        return (
            f"an output must be the sum of at most {limit} products, beyond which int32 can "
            f"overflow, got in_channels / groups · kernel = {products}; use scheme='int8_weight' "
            "or leave the layer in float"
        )
    return None


def require_conv(who: str, layer: Any, kind: type[nn.Module], other: type[nn.Module]) -> None:
    """Raise a TypeError for what is not a float layer of `kind` with its sizes; `other` is the
    class that is asked.
    """
    if not isinstance(layer, kind) or isinstance(layer, other):
        raise TypeError(f"{who} takes an nn.{kind.__name__}, got {type(layer).__name__}.")
    if is_lazy(cast(Any, layer.weight)):
        raise TypeError(
            f"{who}: {type(layer).__name__} is not initialised: its sizes come from its first "
            "input; run one batch first."
        )


def ends(layer: Any) -> tuple[int, ...]:
    """What a convolution adds before and after each axis, `padding="same"` in numbers."""
    if isinstance(layer.padding, str):
        reverse = layer._reversed_padding_repeated_twice
        pairs = [reverse[at : at + 2] for at in range(0, len(reverse), 2)]
        return tuple(each for pair in reversed(pairs) for each in pair)
    return tuple(each for each in layer.padding for _ in range(2))


def padded(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """`x` with the border of a `padding_mode` other than zeros."""
    return nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
