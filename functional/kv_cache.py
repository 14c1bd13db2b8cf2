"""Attention over keys and values that are kept in int8 from call to call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from qnn.functional.invoke import op_region
from qnn.functional.linear import autocast
from qnn.functional.sdpa import attention_mask
from qnn.kernels import OPS, Op
from qnn.kernels.op import describe


class CachedRows(NamedTuple):
    """The keys, or the values, of the tokens of a cache.

    Attributes:
        codes: int8 `[B, G, S, D]`, of S places a sequence.
        scale: float32 `[B, G, S]`: a row is `codes · scale`. 0 where all codes are 0; of a key NaN
            where its row, or its value's, holds NaN or inf.
        length: int64 `[B]`, the tokens of each sequence, at its first places. What the others hold
            does not matter.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    length: torch.Tensor


def _call(op: Op, *args: Any) -> Any:
    """`op.call`. A kernel in C++ makes the checks itself, which saves 4 to 6 µs a call, and then
    cannot raise a TypeError: where it refuses, it is asked once more in Python.
    """
    try:
        return op.call(*args)
    except ValueError:
        op.require(*args)
        raise


def append_to_cache(
    key: torch.Tensor, value: torch.Tensor, keys: CachedRows, values: CachedRows
) -> None:
    """Write the codes and scales of L more tokens after those of each sequence, in place, and add L
    to the length, which keys and values share.

    A row has the code `round(x / s)` with its own scale `s = amax / 127`. Nothing that is there is
    touched, so that a step costs the same at any length. The op is declared as one that writes;
    compiled graphs append in place, and no number of a step is in them.

    Args:
        key, value: float32, bfloat16, float16 or float64, `[B, G, L, D]` and `[B, G, L, E]`; any
            strides.
        keys, values: of S places, at least the length + L.

    Raises:
        ValueError: shapes that do not fit, and a cache that has no room.
        NotImplementedError: a key or value that needs a gradient.
    """
    key, value = autocast(key), autocast(value)
    tensors = (key, value, keys.codes, keys.scale, values.codes, values.scale, keys.length)
    op = OPS["int8_kv_append"]
    if torch.compiler.is_compiling():
        op.overload(*tensors)
    else:
        _call(op, *tensors)


def cached_attention(
    query: torch.Tensor,
    keys: CachedRows,
    values: CachedRows,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """`scaled_dot_product_attention` over the tokens of a cache: the same integers, and so the same
    bits, as over the float rows that were appended to it.

    Args:
        query: float32, bfloat16, float16 or float64, `[B, H, L, D]`, where G divides H: each head
            of keys and values serves H / G of query.
        keys, values: their length is a tensor, so that a compiled graph serves every length.
        attn_mask: bool, True where a key is seen, or float, which is added to the scores; of a
            shape that broadcasts to `[B, H, L, N]`, for the first N of the S places. What lies
            after a sequence's tokens is hidden in any case.
        is_causal: the queries are the last L tokens, and each sees those up to itself. True by
            default where there is no mask. With one query it changes nothing.
        scale: 1/√D if None.

    Returns:
        `[B, H, L, E]` in the dtype of `query`.

    Raises:
        ValueError: shapes that do not fit, a mask together with `is_causal`, fewer tokens than
            causal queries.
        NotImplementedError: a query that needs a gradient.
    """
    who = "qnn.functional.cached_attention"
    q = autocast(query)
    if q.dim() != 4:
        raise ValueError(f"{who}: query must be [B, H, L, D], got {describe(q)}.")
    if torch.is_grad_enabled() and q.requires_grad:
        raise NotImplementedError(
            f"{who}: query needs a gradient, and a cache is for inference; call it under "
            "torch.no_grad(), or train without a cache."
        )
    if attn_mask is not None and is_causal:
        raise ValueError(
            f"{who}: attn_mask and is_causal exclude each other; take both into the mask."
        )
    causal = attn_mask is None and is_causal is not False
    mask = None
    if attn_mask is not None:
        places, columns = keys.codes.shape[2], attn_mask.shape[-1] if attn_mask.dim() else 1
        if columns != 1 and columns < places:
            keys, values = (
                CachedRows(each.codes[:, :, :columns], each.scale[:, :, :columns], each.length)
                for each in (keys, values)
            )
            places = columns
        mask = attention_mask(who, attn_mask, (*q.shape[:3], places))
    # In this order: a size that is a symbol must not become the flag.
    causal = q.shape[2] > 1 and causal
    operands = (q, keys.codes, keys.scale, values.codes, values.scale, keys.length, mask)
    op = OPS["int8_kv_attention"]
    if not torch.compiler.is_compiling():
        eager: torch.Tensor = _call(op, *operands, scale, causal)
        return eager.transpose(1, 2)

    def run(*tensors: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = op.overload(*tensors, scale, causal)
        return result

    return op_region(run, *operands, scheme="int8").transpose(1, 2)
