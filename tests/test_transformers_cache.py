"""`Int8Cache`: keys and values of transformers' decoders in int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing

import qnn

from .common import same_bits

transformers = pytest.importorskip("transformers")
from qnn.integrations.transformers import Int8Cache  # noqa: E402  # it imports transformers

pytestmark = pytest.mark.usefixtures("qnn_in_transformers")
PROMPT, NEW = 12, 10


def model(implementation: str = "qnn_int8", **config: Any) -> Any:
    """A tiny Llama of random weights, whose logits are far apart."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config})).eval()
    made.set_attn_implementation(implementation)
    return made


def prompts(batch: int = 2) -> torch.Tensor:
    return torch.randint(1, 100, (batch, PROMPT), generator=torch.Generator().manual_seed(1))


def generate(llama: Any, cache: Any = None, ids: torch.Tensor | None = None, **options: Any) -> Any:
    given = {"max_new_tokens": NEW, "do_sample": False, **options}
    if cache is not None:
        given["past_key_values"] = cache
    return llama.generate(prompts() if ids is None else ids, **given)


class TestGenerate:
    def test_steps_are_near_the_whole_and_near_float(self) -> None:
        """A prompt in chunks, then a token at a time, against the whole at once."""
        llama, ids = model(), prompts()
        with torch.no_grad():
            whole = llama(ids, use_cache=False).logits
            cache = Int8Cache(llama.config, max_cache_len=20)
            pieces = [ids[:, :4], ids[:, 4:9], ids[:, 9:10], ids[:, 10:11], ids[:, 11:]]
            steps = torch.cat([llama(x, past_key_values=cache).logits for x in pieces], 1)
            llama.set_attn_implementation("sdpa")
            exact = llama(ids, use_cache=False).logits
        assert cache.get_seq_length() == PROMPT
        assert qnn.sqnr(steps, whole) > 45  # but for the unit of the values, of all keys given
        assert qnn.sqnr(steps, exact) > 28
        assert (steps.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9

    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}]
    )
    def test_the_tokens_of_a_float_cache(self, options: dict[str, Any]) -> None:
        llama = model()
        got = generate(llama, Int8Cache(llama.config, max_cache_len=24), **options)
        assert torch.equal(got, generate(llama, **options))

    def test_padding_on_the_left(self) -> None:
        llama, ids = model(), prompts()
        mask = torch.ones_like(ids)
        ids[0, :5], mask[0, :5] = 0, 0
        got = generate(llama, Int8Cache(llama.config, 24), ids, attention_mask=mask)
        assert torch.equal(got, generate(llama, None, ids, attention_mask=mask))

    def test_prompt_lookup_crops(self) -> None:
        llama, ids = model(), prompts(1)
        got = generate(llama, Int8Cache(llama.config, 32), ids, prompt_lookup_num_tokens=3)
        assert torch.equal(got, generate(llama, None, ids))

    def test_quantised_layers(self) -> None:
        llama = qnn.convert(model(), "int8")
        got = generate(llama, Int8Cache(llama.config, 24))
        assert torch.equal(got, generate(llama))

    def test_a_second_call_after_a_reset(self) -> None:
        llama = model()
        cache = Int8Cache(llama.config, 24)
        first = generate(llama, cache)
        cache.reset()
        assert torch.equal(generate(llama, cache), first)

    def test_cross_attention(self) -> None:
        torch.manual_seed(0)
        config = transformers.BartConfig(
            d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50,
            forced_eos_token_id=None, eos_token_id=None, init_std=0.5,
        )  # fmt: skip
        bart = transformers.BartForConditionalGeneration(config).eval()
        bart.set_attn_implementation("qnn_int8")
        ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(2))
        both = transformers.EncoderDecoderCache(
            Int8Cache(bart.config, 16), Int8Cache(bart.config, 9)
        )
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
        got = bart.generate(ids, past_key_values=both, **options)
        assert torch.equal(got, bart.generate(ids, **options))


class TestCache:
    def test_memory(self) -> None:
        llama = model(hidden_size=256)
        cache = Int8Cache(llama.config, max_cache_len=24)
        generate(llama, cache)
        held = sum(
            part.numel() * part.element_size()
            for layer in cache.layers
            for part in (*layer.keys[:2], *layer.values[:2])
        )
        floats = 2 * 2 * 2 * 2 * 24 * 64 * 4
        assert held / floats == (64 + 4) / (64 * 4)

    def test_one_graph_for_every_step(self) -> None:
        llama, ids = model(), prompts()
        frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        step = torch.compile(llama, backend=frames, fullgraph=True)
        results = []
        with torch.no_grad():
            for call in (step, llama):
                cache = Int8Cache(llama.config, max_cache_len=20)
                llama(ids[:, :6], past_key_values=cache)
                pieces = [ids[:, i : i + 1].contiguous() for i in range(6, PROMPT)]
                results.append([call(x, past_key_values=cache).logits for x in pieces])
        assert frames.frame_count == 1
        assert all(same_bits(*pair) for pair in zip(*results, strict=True))

    def test_batches(self) -> None:
        llama, ids = model(), prompts()
        cache = Int8Cache(llama.config, max_cache_len=20)
        with torch.no_grad():
            llama(ids, past_key_values=cache)
            kept = [part.clone() for part in cache.layers[1].cache.buffers()]
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0]))
        for now, before in zip(cache.layers[1].cache.buffers(), kept, strict=True):
            assert same_bits(now, before[[1, 0]])

    def test_errors(self) -> None:
        llama = model("sdpa")
        with pytest.raises(ValueError, match=r"set_attn_implementation\('qnn_int8'\) first"):
            Int8Cache(llama.config, 20)
        llama = model()
        with pytest.raises(ValueError, match="max_cache_len must be at least 1"):
            Int8Cache(llama.config, 0)
        sliding = transformers.MistralConfig(sliding_window=8, attn_implementation="qnn_int8")
        with pytest.raises(ValueError, match="MistralConfig has layers of sliding_attention"):
            Int8Cache(sliding, 20)
        with pytest.raises(ValueError, match="the cache holds 15 tokens at most"):
            generate(llama, Int8Cache(llama.config, 15))
        with pytest.raises(NotImplementedError, match=r"call it under torch\.no_grad"):
            llama(prompts(), past_key_values=Int8Cache(llama.config, 15))
        with pytest.raises(NotImplementedError, match="is not offloaded"):
            Int8Cache(llama.config, 15).layers[0].offload()
        cache = Int8Cache(llama.config, 20)
        with torch.no_grad():
            llama(prompts(), past_key_values=cache)
        llama.set_attn_implementation("sdpa")
        with torch.no_grad(), pytest.raises((AttributeError, TypeError)):
            llama(prompts()[:, :1], past_key_values=cache)  # not a wrong number
