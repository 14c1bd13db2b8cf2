"""Rows of a quantised table, and bags of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch

from qnn.functional.invoke import op_region
from qnn.functional.quantize import stored_parts
from qnn.kernels import OPS, Op, get_scheme
from qnn.kernels.schemes import schemes_of


def embedding(
    input: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    weight_scale: torch.Tensor | None = None,
    *,
    weight_global_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    scheme: str = "int8_weight",
) -> torch.Tensor:
    """`y[...] = dequantize(weight)[input[...]]`: only the rows that are asked for are decoded.

    Args:
        input: ids, int64 or int32, of any shape.
        weight: the parts of the table `[V, D]` that `quantize` returns, in one tuple; or the
            stored values alone, with
        weight_scale, weight_global_scale: their scales.
        dtype: of the result.
        scheme: what the table was quantised in. Its activations, where it quantises some, have no
            part here.

    Returns:
        `[*input.shape, D]`, without a gradient: ids and quantised values have none.

    Raises:
        IndexError: an id that is not a row of the table.
        ValueError: a scheme without tables, or parts of another one.

    >>> table = qnn.functional.quantize(torch.tensor([[0.0, 0.0], [127.0, -1.0]]))
    >>> embedding(torch.tensor([1, 0, 1]), table)
    tensor([[127.,  -1.],
            [  0.,   0.],
            [127.,  -1.]])
    """
    parts = stored_parts(scheme, weight, _scale=weight_scale, _global_scale=weight_global_scale)
    return embedding_of(input, parts, dtype, scheme)


def embedding_of(
    input: torch.Tensor, parts: Sequence[torch.Tensor], dtype: torch.dtype, scheme: str
) -> torch.Tensor:
    """`embedding` of the parts of a table."""
    op = _op(scheme, "embedding")
    if not torch.compiler.is_compiling():
        result: torch.Tensor = op.call(input, *parts, dtype)
        return result
    return op_region(
        lambda ids, *stored: op.overload(ids, *stored, dtype), input, *parts, scheme=scheme
    )


def embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    weight_scale: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    *,
    weight_global_scale: torch.Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: torch.dtype = torch.float32,
    scheme: str = "int8_weight",
) -> torch.Tensor:
    """The sum, mean or largest value of the rows of each bag, as `nn.functional.embedding_bag`.

    Args:
        input: ids, int64 or int32: `[B, L]`, a bag a row; or `[N]`, cut by
        offsets: where each bag begins, `[B]`, from 0 on; `[B + 1]` with `include_last_offset`.
        weight, weight_scale, weight_global_scale, dtype, scheme: as in `embedding`.
        mode: `"sum"`, `"mean"` or `"max"`.
        per_sample_weights: what each row is multiplied by, of the shape of `input` and in `dtype`;
            for `"sum"` alone. It has a gradient.
        padding_idx: the id of rows that take no part in their bags.

    Returns:
        `[B, D]`; zeros for a bag without rows.

    Raises:
        IndexError: an id that is not a row of the table.
        ValueError: a scheme without tables, an unknown mode, weights for another one than
            `"sum"`, or offsets that are missing, given twice, or no bounds of bags.

    >>> table = qnn.functional.quantize(torch.tensor([[1.0, 127.0], [127.0, 2.0]]))
    >>> embedding_bag(torch.tensor([[0, 1], [1, 1]]), table, mode="sum")
    tensor([[128., 129.],
            [254.,   4.]])
    """
    parts = stored_parts(scheme, weight, _scale=weight_scale, _global_scale=weight_global_scale)
    return embedding_bag_of(
        input, parts, offsets, mode, per_sample_weights, include_last_offset, padding_idx, dtype,
        scheme,
    )  # fmt: skip


def embedding_bag_of(
    ids: torch.Tensor,
    parts: Sequence[torch.Tensor],
    offsets: torch.Tensor | None,
    mode: str,
    per_sample_weights: torch.Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    dtype: torch.dtype,
    scheme: str,
) -> torch.Tensor:
    """`embedding_bag` of the parts of a table."""
    op, weights = _op(scheme, "embedding_bag"), per_sample_weights
    if (why := _why_not_bags(ids, offsets, mode, weights, dtype)) is not None:
        raise ValueError(f"qnn.functional.embedding_bag: {why}.")
    if offsets is None:
        bags, length = ids.shape
        offsets = torch.arange(0, bags + 1, device=ids.device) * length
        ids, weights = ids.reshape(-1), None if weights is None else weights.reshape(-1)
    else:
        if offsets.dtype != torch.int64:  # to() takes 1.5 µs to find that there is nothing to do
            offsets = offsets.to(torch.int64)
        if not include_last_offset:
            end = torch.full((1,), ids.shape[0], dtype=torch.int64, device=ids.device)
            offsets = torch.cat((offsets, end))
    padding = -1 if padding_idx is None else padding_idx

    operands = (ids, offsets, *parts, weights)
    if not torch.compiler.is_compiling():
        result: torch.Tensor = op.call(*operands, mode, padding, dtype)
        return result

    def run(*given: torch.Tensor | None) -> Any:
        return op.overload(*given, mode, padding, dtype)

    if weights is not None and torch.is_grad_enabled() and weights.requires_grad:
        return cast(torch.Tensor, run(*operands))  # by the op's own gradient; the node has none
    return op_region(run, *operands, scheme=scheme)


def _why_not_bags(
    input: torch.Tensor,
    offsets: torch.Tensor | None,
    mode: str,
    weights: torch.Tensor | None,
    dtype: torch.dtype,
) -> str | None:
    if mode not in ("sum", "mean", "max"):
        return f"mode must be 'sum', 'mean' or 'max', got {mode!r}"
    if input.dim() not in (1, 2):
        return f"input must be [B, L] or [N], got {list(input.shape)}"
    if input.dim() == 2 and offsets is not None:
        return f"input {list(input.shape)} has a bag in each row; leave offsets out"
    if input.dim() == 1 and (offsets is None or offsets.dim() != 1):
        return "input [N] needs offsets [B], where each bag begins; or pass ids [B, L]"
    if weights is None:
        return None
    if mode != "sum":
        return f"per_sample_weights are for mode='sum' alone, got mode={mode!r}"
    if weights.shape != input.shape:
        return f"per_sample_weights must be {list(input.shape)} as input, got {list(weights.shape)}"
    if weights.dtype != dtype:
        return f"per_sample_weights must be {dtype} as the result, got {weights.dtype}; cast them"
    return None


@functools.cache
def _op(scheme: str, kind: str) -> Op:
    name = get_scheme(scheme).op(kind)
    if name is None:
        able = ", ".join(map(repr, schemes_of(kind)))
        raise ValueError(
            f"qnn.functional.{kind}: scheme {scheme!r} has no {kind}; use one of {able}."
        )
    return OPS[name]
