"""Formats and schemes: the only place where the facts about a number format stand.

A `Format` says how floats become stored values; a `Scheme` combines a weight format and an
activation format under the name that users write and graph nodes carry as `scheme=`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

import torch

Granularity = Literal["tensor", "token", "channel", "group", "block"]

# The dtypes that a quantised layer accepts for its activations. Scale arithmetic is float32 for all
# of them.
FLOATS: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Format:
    """A number format: float = stored value x scale.

    `token` and `channel` granularity are the same arithmetic, one scale for each row: a token is a
    row of the activations `[..., K]`, a channel is an output row of the weight `[N, K]`.
    """

    name: str
    storage: torch.dtype
    qmin: int
    qmax: int
    granularity: Granularity
    scale_dtype: torch.dtype = torch.float32

    @property
    def bytes_per_value(self) -> int:
        return self.storage.itemsize


INT8_CHANNEL = Format("int8", torch.int8, -127, 127, "channel")
INT8_TOKEN = Format("int8", torch.int8, -127, 127, "token")

# int32 holds a sum of 127 * 128 * K exactly up to this K; a longer row could wrap around without a
# word.
INT8_MAX_K = (2**31 - 1) // (127 * 128)


@dataclass(frozen=True)
class Scheme:
    """What a layer stores and computes.

    `activation` is None where activations stay as they are. `linear` names the op of a linear
    layer's forward; the op of the gradient to its input is found through that op's own declaration.
    """

    name: str
    weight: Format
    activation: Format | None
    linear: str
    max_in_features: int | None = None
    trainable: bool = False

    def why_not_linear(self, in_features: int, out_features: int) -> str | None:
        """Why a linear layer of this size cannot be held in this scheme, or None."""
        if in_features < 1 or out_features < 1:
            return (
                "in_features and out_features must be at least 1, "
                f"got {in_features} and {out_features}; leave such a layer in float"
            )
        if self.max_in_features is not None and in_features > self.max_in_features:
            return (
                f"in_features must be at most {self.max_in_features}, beyond which the int32 sum "
                f"of a row can overflow, got {in_features}; use scheme='int8_weight' or leave the "
                "layer in float"
            )
        return None


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", INT8_CHANNEL, INT8_TOKEN, "int8_linear", max_in_features=INT8_MAX_K),
        Scheme("int8_weight", INT8_CHANNEL, None, "int8_weight_linear"),
    )
}


def get_scheme(name: str) -> Scheme:
    """The scheme called `name`; a `ValueError` that lists the known ones, or a `TypeError` for what
    is no string.
    """
    if not isinstance(name, str):
        known = ", ".join(map(repr, SCHEMES))
        raise TypeError(
            f"scheme must be a string, one of {known}; got {type(name).__name__} {name!r}."
        )
    if name not in SCHEMES:
        close = difflib.get_close_matches(name, SCHEMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        known = ", ".join(map(repr, SCHEMES))
        raise ValueError(f"unknown scheme {name!r}: the known schemes are {known}.{hint}")
    return SCHEMES[name]
