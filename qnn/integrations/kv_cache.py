"""transformers: `past_key_values` in int8, for `attn_implementation="qnn_int8"`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from qnn.functional.kv_cache import CachedRows
from qnn.integrations.attention import NAME
from qnn.nn.kv_cache import Int8KVCache


class Int8CacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types here
    """The `Int8KVCache` of one layer, whose sizes it learns from the first call, as transformers'
    `StaticLayer`.

    Attributes:
        keys, values: `CachedRows`, which `update` returns in the place of tensors.
    """

    is_compileable = True
    is_sliding = False
    is_croppable = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cache: Int8KVCache | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, columns = key_states.shape
        self._hold(
            Int8KVCache(
                batch, self.max_cache_len, heads, columns, value_states.shape[-1],
                device=self.device,
            )
        )  # fmt: skip

    def _hold(self, cache: Int8KVCache) -> None:
        self.cache = cache
        self.keys, self.values = cache.rows()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[CachedRows, CachedRows]:
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        assert self.cache is not None  # noqa: S101  # it is there now
        self.cache.update(key_states, value_states)
        return self.cache.rows()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        return 0 if self.cache is None else self.cache.length[0]

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        if self.cache is not None:
            self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"qnn.integrations.transformers.Int8Cache.crop({tokens_to_remove}): a negative "
                "number says how many tokens to remove."
            )
        if self.cache is not None and tokens_to_remove < 0:
            self.cache.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.cache is not None:
            self.cache.reorder(beam_idx)
            self._hold(self.cache)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.cache is not None:
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self.cache.reorder(indices)
            self._hold(self.cache)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            batch = torch.arange(self.cache.keys.shape[0], device=self.device)
            self.batch_select_indices(batch.repeat_interleave(repeats))

    def offload(self) -> None:
        raise NotImplementedError("qnn.integrations.transformers.Int8Cache is not offloaded.")


class Int8Cache(Cache):  # type: ignore[misc]
    """Keys and values of a decoder in int8, with a scale for each token and head.

        cache = Int8Cache(model.config, max_cache_len=4096)
        model.generate(**inputs, past_key_values=cache)

    It takes 0.27 of the memory of a float32 cache and 0.53 of a bfloat16 one (heads of 64; 0.26 and
    0.52 of 128), all of it at the first call, as `StaticCache`. The model must have been made, or
    set, with `attn_implementation="qnn_int8"`: attention reads the integers as they are. Beam
    search, batches with padding on the left, grouped-query heads, chunks of a prompt and
    `torch.compile` of the model work; one graph serves every length.

    Args:
        config: of the model.
        max_cache_len: the tokens that a sequence may have, the prompt and what is generated.

    Raises:
        ValueError: a model with another `attn_implementation`; layers with a sliding window or in
            chunks, whose cache is another one; a length that is not positive.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int) -> None:
        who = f"{type(self).__name__}(max_cache_len={max_cache_len})"
        decoder = config.get_text_config(decoder=True)
        chosen = decoder._attn_implementation
        if chosen != NAME:
            raise ValueError(
                f"{who}: it is read by attn_implementation={NAME!r} alone, and the model has "
                f"{chosen!r}; call model.set_attn_implementation({NAME!r}) first."
            )
        if max_cache_len < 1:
            raise ValueError(f"{who}: max_cache_len must be at least 1.")
        types, _ = get_layer_types_and_kwargs(decoder)
        others = sorted(set(types) - {"full_attention"})
        if others:
            raise ValueError(
                f"{who}: {type(config).__name__} has layers of {', '.join(others)}, and a cache in "
                "int8 keeps all tokens of full attention; use transformers' own cache."
            )
        super().__init__(layers=[Int8CacheLayer(max_cache_len) for _ in types])
