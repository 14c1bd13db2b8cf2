"""What the forms of `nn.MultiheadAttention` share: what they take, and their forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from qnn.functional.attention import ROLES, attend, masks
from qnn.nn.values import can_take, of_other_kind, require_input

# The parameters of the input projections, where query, key and value have one size, and where not.
PACKED = ("in_proj_weight",)
APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
ARGUMENTS = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")


class Attention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` around projections that are called; a subclass has `_project`.

    `_qkv_same_embed_dim` is False: torch's encoder layers ask it before they read `in_proj_weight`
    for a fused kernel of float weights.
    """

    def _project(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """q, k and v of query, key and value."""
        raise NotImplementedError

    @property
    def _packed(self) -> bool:
        """Whether one weight holds the three input projections."""
        return bool(self.kdim == self.embed_dim and self.vdim == self.embed_dim)

    @property
    def _names(self) -> tuple[str, ...]:
        """Of the weights of the input projections."""
        return PACKED if self._packed else APART

    @property
    def _at(self) -> torch.device:
        return next(p.device for p in self._parameters.values() if p is not None)

    @property
    def _who(self) -> str:
        return f"qnn.{type(self).__name__}({self.extra_repr()})"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(query, torch.Tensor):
            given = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return cast(Any, of_other_kind(self, query, key, value, *given))
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        projected = self._project((query, key, value))
        batched = query.dim() == 3
        if not batched:
            projected = [each.unsqueeze(0) for each in projected]
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        more_keys = self.bias_k, self.bias_v
        y, weights = attend(
            projected,
            self.num_heads,
            batch_first=self.batch_first or not batched,
            more_keys=None if more_keys[0] is None else cast(Any, more_keys),
            add_zero=self.add_zero_attn,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            average=average_attn_weights,
            **masks(key_padding_mask, attn_mask, is_causal, query.dtype, need_weights=need_weights),
        )
        if not batched:
            y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
        return self.out_proj(y), weights

    def _check(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> None:
        """Raise a TypeError or ValueError for what the layer cannot take."""
        device, axes = self._at, query.dim()
        if axes not in (2, 3):
            raise ValueError(
                f"{self._who}: query must be [L, E], [L, B, E] or, with batch_first, [B, L, E]; "
                f"got {axes} axes."
            )
        widths = (self.embed_dim, self.kdim, self.vdim)
        for name, x, width in zip(ROLES, (query, key, value), widths, strict=True):
            if not can_take(x, device):
                if x.is_nested:
                    raise TypeError(
                        f"{self._who}: {name} is a nested tensor; pad it with "
                        ".to_padded_tensor(0.0) and pass a key_padding_mask."
                    )
                require_input(f"{self._who}: {name}", x, device)
            if x.dim() != axes or x.shape[-1] != width:
                raise ValueError(
                    f"{self._who}: {name} must have {axes} axes, as query has, and {width} "
                    f"columns; got {tuple(x.shape)}."
                )
        along = 1 if self.batch_first and axes == 3 else 0
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{self._who}: key and value must agree in all axes but the last, got "
                f"{tuple(key.shape)} and {tuple(value.shape)}."
            )
        if axes == 3 and query.shape[1 - along] != key.shape[1 - along]:
            raise ValueError(
                f"{self._who}: query and key must have one batch size, got "
                f"{query.shape[1 - along]} and {key.shape[1 - along]}; batch_first is "
                f"{self.batch_first}."
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                f"{self._who}: is_causal is a hint about attn_mask, and there is none; pass "
                "nn.Transformer.generate_square_subsequent_mask(L) too."
            )
        steps, keys = query.shape[along], key.shape[along]
        batch = query.shape[1 - along] if axes == 3 else 1
        heads = (batch * self.num_heads, steps, keys)
        padding = (batch, keys) if axes == 3 else (keys,)
        self._require_mask("key_padding_mask", key_padding_mask, (padding,))
        self._require_mask("attn_mask", attn_mask, ((steps, keys), heads))

    def _require_mask(
        self, name: str, mask: torch.Tensor | None, shapes: Sequence[tuple[Any, ...]]
    ) -> None:
        if mask is None:
            return
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"{self._who}: {name} must be bool or float, got {mask.dtype}; use .bool()."
            )
        if tuple(mask.shape) not in shapes:
            able = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{self._who}: {name} must be {able}, got {list(mask.shape)}.")

    def _reset_parameters(self) -> None:
        # As torch's, which goes by `_qkv_same_embed_dim`. transformers calls it of loaded layers,
        # and has the functions of nn.init pass over what was loaded.
        for name in self._names:
            nn.init.xavier_uniform_(getattr(self, name))
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for more in (self.bias_k, self.bias_v):
            if more is not None:
                nn.init.xavier_normal_(more)

    def merge_masks(self, *args: Any) -> Any:
        """Of the fused kernel of float weights alone."""
        raise TypeError(f"{self._who}: its weights are not for torch's fused kernel; call it.")

    def extra_repr(self) -> str:
        words = [f"{self.embed_dim}, {self.num_heads}"]
        if self.dropout:
            words.append(f"dropout={self.dropout}")
        if self.in_proj_bias is None:
            words.append("bias=False")
        if self.bias_k is not None:
            words.append("add_bias_kv=True")
        if self.add_zero_attn:
            words.append("add_zero_attn=True")
        if not self._packed:
            words.append(f"kdim={self.kdim}, vdim={self.vdim}")
        if self.batch_first:
            words.append("batch_first=True")
        return ", ".join(words)


def arguments_of(layer: nn.MultiheadAttention) -> dict[str, Any]:
    """What makes a layer of the same sizes."""
    found = {name: getattr(layer, name) for name in ARGUMENTS}
    return found | {
        "bias": layer.in_proj_bias is not None,
        "add_bias_kv": layer.bias_k is not None,
    }
