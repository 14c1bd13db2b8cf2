"""Attention over projections: what `nn.MultiheadAttention` computes around its linear products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as TF

from qnn.functional.linear import linear_of
from qnn.kernels import get_scheme

ROLES = ("query", "key", "value")


def runs(inputs: Sequence[torch.Tensor], *, packed: bool) -> list[tuple[int, int]]:
    """The projections of query, key and value that are one product: those of the same tensor, where
    their weights are packed into one.

    >>> x, y = torch.ones(2), torch.ones(2)
    >>> runs((x, x, x), packed=True), runs((x, y, y), packed=True)
    ([(0, 3)], [(0, 1), (1, 3)])
    """
    query, key, value = inputs
    if not packed or key is not value:
        return [(0, 1), (1, 2), (2, 3)]
    return [(0, 3)] if query is key else [(0, 1), (1, 3)]


def linear_rows(
    x: torch.Tensor,
    parts: Sequence[torch.Tensor],
    grid: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    scheme: str,
    rows: tuple[int, int],
) -> torch.Tensor:
    """`linear` with some rows of a quantised weight, which is not copied.

    Where rows inside and outside share a scale (fp8_block), all rows are multiplied and those left
    out are dropped.
    """
    start, stop = rows
    whole = rows == (0, parts[0].shape[0])
    some = None if whole else get_scheme(scheme).weight.rows(parts, start, stop)
    if some is None:
        y = linear_of(x, (*parts, *grid), bias, scheme)
        return y if whole else y[..., start:stop]
    return linear_of(x, (*some, *grid), None if bias is None else bias[start:stop], scheme)


def attend(
    projected: Sequence[torch.Tensor],
    heads: int,
    *,
    batch_first: bool,
    more_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    add_zero: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    need_weights: bool = False,
    average: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`softmax(q · kᵀ / √D + mask) · v`, for each head, without the output projection.

    Without the weights it is `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        projected: q `[B, L, E]`, k and v `[B, S, E]`, or `[L, B, E]` and `[S, B, E]` unless
            `batch_first`.
        heads: H; a head has D = E / H columns.
        more_keys: a key and a value `[1, 1, E]` after all others.
        add_zero: a key and a value of zeros at the end.
        key_padding_mask, attn_mask, is_causal: as `masks` returns them.
        dropout: of the weights.
        need_weights: return the weights too, `[B, H, L, S]`, or `[B, L, S]` with `average`.

    Returns:
        the values in the shape of q, and the weights or None.
    """
    if more_keys is not None:
        end = 1 if batch_first else 0
        batch = projected[1].shape[1 - end]
        sizes = (batch, 1, -1) if batch_first else (1, batch, -1)
        more = [each.to(projected[1].dtype).expand(sizes) for each in more_keys]
        projected = [
            projected[0],
            *(torch.cat(pair, end) for pair in zip(projected[1:], more, strict=True)),
        ]
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    q, k, v = (each.unflatten(-1, (heads, -1)).permute(order) for each in projected)
    if add_zero:
        k, v = (torch.cat((each, torch.zeros_like(each[:, :, :1])), 2) for each in (k, v))
    mask = _joined(key_padding_mask, attn_mask, heads, (more_keys is not None) + add_zero)
    weights = None
    if need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
        weights = TF.softmax(scores if mask is None else scores + mask, -1)
        weights = TF.dropout(weights, dropout) if dropout > 0.0 else weights
        y = weights @ v
        weights = weights.mean(1) if average else weights
    else:
        y = TF.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    return y.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(-2), weights


def masks(
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    dtype: torch.dtype,
    *,
    need_weights: bool,
) -> dict[str, Any]:
    """The masks as `attend` takes them: what is added to the scores; without `attn_mask` where the
    hint that it is causal is enough.
    """
    if is_causal and key_padding_mask is None and not need_weights:
        return {"is_causal": True}
    return {
        "key_padding_mask": _added(key_padding_mask, dtype),
        "attn_mask": _added(attn_mask, dtype),
    }


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _joined(
    padding: torch.Tensor | None, mask: torch.Tensor | None, heads: int, more: int
) -> torch.Tensor | None:
    """Both masks in one that spreads to `[B, H, L, S]`; `more` keys at the end are never masked."""
    if padding is not None:
        padding = TF.pad(padding, (0, more))[:, None, None]
    if mask is not None:
        mask = TF.pad(mask, (0, more))
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, heads))
    if padding is None or mask is None:
        return mask if padding is None else padding
    return mask + padding
