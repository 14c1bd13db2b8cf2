"""transformers: `attn_implementation="qnn_int8"`, attention in 8 bits.

Importing `qnn.integrations.transformers` registers it; masks are those of `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qnn.functional import CachedRows, cached_attention, scaled_dot_product_attention

NAME = "qnn_int8"


def int8_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | CachedRows,
    value: torch.Tensor | CachedRows,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`qnn.functional.scaled_dot_product_attention` as a model of transformers calls it.

    Args:
        module: the layer, of which `num_key_value_groups` and `is_causal` are read.
        query, key, value: `[B, H, L, D]`, `[B, G, S, D]` and `[B, G, S, E]`; or key and value of an
            `Int8Cache`, of S places.
        attention_mask: of `sdpa`'s form: bool, or added to the scores; None for none, or a causal
            one where the layer is causal and L is more than 1.
        scaling: 1/√D if None.
        position_bias: added to the scores, `[1, H, L, S]`.

    Returns:
        `[B, L, H, E]`, and None for the weights, which there are not.

    Raises:
        ValueError: what it does not compute: capped scores, sinks, paged caches, weights to return.
        NotImplementedError: dropout.
    """
    refused = {
        "softcap": "capped scores", "s_aux": "sinks", "cache": "a paged cache",
        "output_attentions": "weights to return",
    }  # fmt: skip
    for name, what in refused.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(
                f"attn_implementation={NAME!r}: {type(module).__name__} asks for {what} ({name}), "
                "which it does not compute; use 'sdpa' or 'eager'."
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # In this order: a size that is a symbol must not become the flag.
    causal = query.shape[2] > 1 and attention_mask is None and causal
    if position_bias is not None:
        attention_mask = _joined(position_bias, attention_mask, causal, query, key)
        causal = False
    if isinstance(key, CachedRows):
        assert isinstance(value, CachedRows)  # noqa: S101  # a cache returns both
        if dropout != 0.0:
            raise NotImplementedError(
                f"attn_implementation={NAME!r}: a cache in int8 is for inference, got dropout "
                f"{dropout}; call model.eval()."
            )
        y = cached_attention(query, key, value, attention_mask, causal, scaling)
        return y.transpose(1, 2), None
    assert isinstance(value, torch.Tensor)  # noqa: S101  # as key
    y = scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        getattr(module, "num_key_value_groups", 1) > 1,
    )
    return y.transpose(1, 2), None


def _joined(
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    query: torch.Tensor,
    key: torch.Tensor | CachedRows,
) -> torch.Tensor:
    """One mask that is added to the scores."""
    if mask is None:
        if not causal:
            return bias
        if isinstance(key, CachedRows):
            raise ValueError(
                f"attn_implementation={NAME!r}: a position bias over a cache in int8 needs a mask."
            )
        size = (query.shape[2], key.shape[2])
        mask = torch.ones(size, dtype=torch.bool, device=bias.device).tril()
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def register() -> None:
    """Make `attn_implementation="qnn_int8"` known to transformers."""
    AttentionInterface.register(NAME, int8_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
