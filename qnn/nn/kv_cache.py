"""A cache of keys and values in int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from qnn.functional.kv_cache import CachedRows, append_to_cache, cached_attention

CacheT = TypeVar("CacheT", bound="Int8KVCache")


class Int8KVCache(nn.Module):
    """Keys and values of one attention layer, in int8 with a scale for each token and head.

        cache = qnn.Int8KVCache(batch_size=1, max_seq_len=4096, num_kv_heads=8, head_dim=64)
        cache.update(key, value)    # [B, G, L, D]: a prompt, or one more token
        y = cache.attend(query)     # [B, H, L, D]; H may be a multiple of G

    All memory is there from the beginning: `2 · D + 8` bytes a place and head, 0.27 of float32 keys
    and values at D = 64 and 0.53 of bfloat16 ones. `update` writes in place, and `attend` gives the
    bits of `qnn.functional.scaled_dot_product_attention` over the float rows that were appended.
    Under `torch.compile` one graph serves every length, since the length is a tensor.

    The parts are buffers, which move with the module; they are not in its `state_dict`, and a cast
    of the module leaves them as they are. It is for inference: what needs a gradient is refused.

    Args:
        batch_size: B, the sequences.
        max_seq_len: S, the tokens that each may have.
        num_kv_heads: G.
        head_dim: D.
        value_dim: E, D if None.
        device: of the parts.

    Raises:
        ValueError: a size that is not positive.
    """

    keys: torch.Tensor
    key_scale: torch.Tensor
    values: torch.Tensor
    value_scale: torch.Tensor
    length: torch.Tensor

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {
            "batch_size": batch_size,
            "max_seq_len": max_seq_len,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"qnn.Int8KVCache: {name} must be at least 1, got {size}.")
        rows = (batch_size, num_kv_heads, max_seq_len)
        for name, shape, dtype in (
            ("keys", (*rows, head_dim), torch.int8),
            ("key_scale", rows, torch.float32),
            ("values", (*rows, value_dim), torch.int8),
            ("value_scale", rows, torch.float32),
            ("length", (batch_size,), torch.int64),
        ):
            part = torch.zeros(shape, dtype=dtype, device=device)
            self.register_buffer(name, part, persistent=False)

    def update(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Append tokens: `key [B, G, L, D]` and `value [B, G, L, E]`, of any float dtype.

        Raises:
            ValueError: shapes that do not fit, and more tokens than there is room for.
            NotImplementedError: a key or value that needs a gradient.
        """
        append_to_cache(key, value, *self.rows())

    def attend(
        self,
        query: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Attention of `query [B, H, L, D]`, the last L tokens, to all that are there; see
        `qnn.functional.cached_attention`.
        """
        return cached_attention(query, *self.rows(), attn_mask, is_causal, scale)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """`update`, then `attend`."""
        rows = self.rows()
        append_to_cache(key, value, *rows)
        return cached_attention(query, *rows, attn_mask, is_causal, scale)

    def rows(self) -> tuple[CachedRows, CachedRows]:
        """Keys and values as the functions of `qnn.functional` take them: the parts themselves."""
        parts = self._buffers  # attributes of a module take 1 µs each
        length = parts["length"]
        keys = CachedRows(parts["keys"], parts["key_scale"], length)  # type: ignore[arg-type]
        return keys, CachedRows(parts["values"], parts["value_scale"], length)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget all tokens."""
        self.length.zero_()

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of each sequence; a negative number says how many less."""
        if length < 0:
            self.length.add_(length).clamp_(min=0)
        else:
            self.length.clamp_(max=length)

    def reorder(self, index: torch.Tensor) -> None:
        """Let sequence i be what sequence `index[i]` was, as beam search wants it; in place where
        their number stays.
        """
        index = index.to(self.keys.device)
        if index.shape[0] != self.keys.shape[0]:
            for name, part in self.named_buffers():
                setattr(self, name, part.index_select(0, index))
            return
        held = int(self.length.max())
        for part in (self.keys, self.key_scale, self.values, self.value_scale):
            part[:, :, :held] = part[:, :, :held].index_select(0, index)
        self.length.copy_(self.length.index_select(0, index))

    def _apply(
        self: CacheT, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> CacheT:
        # A cast of the whole model would reach the scales, which stay float32.
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != part.dtype:
                self._buffers[name] = part.to(now.device)
        return self

    def extra_repr(self) -> str:
        batch, heads, places, columns = self.keys.shape
        text = f"{batch}, {places}, {heads}, {columns}"
        return text if self.values.shape[-1] == columns else f"{text}, {self.values.shape[-1]}"
