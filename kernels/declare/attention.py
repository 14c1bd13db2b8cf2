"""Attention in integers from end to end, and its gradient: that of float attention, straight
through the rounding. `reference/attention.py` says what it computes.

Heads of keys and values may serve several heads of queries each (`g` divides `h`). A mask has four
axes, any of which may be 1; False, or −inf, hides a key from a query. Heads come last but one in
the result, as models join them.

A cache holds codes and scales of keys and values as attention reads them, `[b, g, s, …]`: of each
sequence the first `length` tokens are there.
"""

from __future__ import annotations

from typing import Any

import torch

from qnn.kernels.formats.base import FLOATS
from qnn.kernels.formats.int8 import INT8_MAX_K
from qnn.kernels.op import Op
from qnn.kernels.reference.attention import (
    attention_gradient_reference,
    attention_reference,
    kv_append_reference,
    kv_attention_reference,
    split_attention_gradients,
    why_not_attention,
    why_not_kv_attention,
)

_OPERANDS = "q: b h m d, k: b g n d, v: b g n e, mask?: ..., scale?: float, is_causal?: bool=False"
_DTYPES = {"q": FLOATS, "k": "q", "v": "q", "mask": (torch.bool, *FLOATS)}


def _rule(*names: str) -> Any:
    return lambda *args: why_not_attention(dict(zip(names, args, strict=True)))


_NAMES = ("q", "k", "v", "mask", "scale", "is_causal")
_COMMON: dict[str, Any] = {
    "sample": {
        **{"b": 2, "h": 6, "g": 3, "m": 5, "n": 7, "d": 16, "e": 12},
        "mask": lambda sizes: torch.randn(
            1, sizes["h"], 1, sizes["n"], generator=torch.Generator().manual_seed(1)
        ),
    },
    "rowwise": False,
}

int8_attention = Op(
    "int8_attention",
    f"{_OPERANDS} -> b m h e",
    doc="softmax(int32(qq · kqᵀ) · sk · sq · scale + mask) · vq · sv, with the int8_quantize of "
    "each row of q, k and v; scores in 2^−10 of a power of two, 15-bit weights, and exact sums. "
    "scale is 1/√d by default; a query that sees no key has 0",
    dtypes=_DTYPES,
    out=("q",),
    reference=attention_reference,
    backward=dict.fromkeys(("q", "k", "v"), "attention_dgrad"),
    split=split_attention_gradients,
    rule=_rule(*_NAMES),
    limits={"d": INT8_MAX_K},
    native=True,
    products="b h m n d+b h m n e",
    **_COMMON,
)

_CACHE = {
    **dict.fromkeys(("keys", "values"), (torch.int8,)),
    **dict.fromkeys(("key_scale", "value_scale"), (torch.float32,)),
    "length": (torch.int64,),
}

int8_kv_append = Op(
    "int8_kv_append",
    "k: b g n d, v: b g n e, keys!: b g s d, key_scale!: b g s, values!: b g s e, "
    "value_scale!: b g s, length!: b -> ()",
    doc="codes and scales of n more tokens, as int8_attention has them, to places length to "
    "length + n − 1 of each sequence; length += n",
    dtypes={"k": FLOATS, "v": "k", **_CACHE},
    out=(),
    reference=kv_append_reference,
    sample={"b": 2, "g": 3, "n": 2, "s": 9, "d": 16, "e": 12, "length": (0, 8)},
    rowwise=False,
    inference=True,
    native=True,
)


def _kv_rule(*args: Any) -> str | None:
    names = (arg.name for arg in int8_kv_attention.inputs)
    return why_not_kv_attention(dict(zip(names, args, strict=True)))


int8_kv_attention = Op(
    "int8_kv_attention",
    "q: b h m d, keys: b g s d, key_scale: b g s, values: b g s e, value_scale: b g s, length: b, "
    "mask?: ..., scale?: float, is_causal?: bool=False -> b m h e",
    doc="int8_attention over the first `length` tokens of each sequence of a cache, whose codes "
    "and scales are there; with is_causal the last m of them are those of q",
    dtypes={"q": FLOATS, **_CACHE, "mask": (torch.bool, *FLOATS)},
    out=("q",),
    reference=kv_attention_reference,
    positive=("key_scale", "value_scale"),
    sample={
        **{"b": 2, "h": 6, "g": 3, "m": 5, "s": 9, "d": 16, "e": 12, "length": (5, 10)},
        "mask": lambda sizes: torch.randn(
            1, sizes["h"], 1, sizes["s"], generator=torch.Generator().manual_seed(1)
        ),
    },
    rule=_kv_rule,
    limits={"d": INT8_MAX_K},
    rowwise=False,
    native=True,
    products="b h m s d+b h m s e",
)
attention_dgrad = Op(
    "attention_dgrad",
    f"dy: b m h e, {_OPERANDS} -> b*h*m*d+b*g*n*d+b*g*n*e",
    doc="the gradients of float attention to q, k and v, one after the other",
    dtypes={**_DTYPES, "dy": FLOATS, **dict.fromkeys(("q", "k", "v"), "dy")},
    out=("dy",),
    reference=attention_gradient_reference,
    differentiable=True,
    rule=_rule("dy", *_NAMES),
    products="b h m n d+b h m n e+b h m n d+b h m n d+b h m n e",
    **_COMMON,
)
