"""`attn_implementation="qnn_int8"` in models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qnn

transformers: Any = pytest.importorskip("transformers", reason="needs the extra 'examples'")
pytestmark = pytest.mark.usefixtures("qnn_in_transformers")

IDS = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones(2, 17, dtype=torch.int64)
PADDING[1, 11:] = 0


def model(name: str, implementation: str) -> Any:
    """A small one with weights that make attention matter, the same for every implementation."""
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "vocab_size": 100, "pad_token_id": 0,
    }  # fmt: skip
    grouped = {"num_key_value_heads": 2} if name in ("Llama", "Mistral") else {}
    window = {"sliding_window": 5} if name == "Mistral" else {}
    config = getattr(transformers, f"{name}Config")(**sizes, **grouped, **window)
    torch.manual_seed(0)
    cls = getattr(transformers, f"{name}Model")
    made = cls._from_config(config, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.dim() == 2:
            size = parameter.shape[1] ** -0.5
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return made.eval()


def sqnr(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(20 * torch.log10(want.norm() / (got - want).norm()))


@pytest.mark.parametrize("name", ["Bert", "Llama", "Mistral"])
class TestModels:
    def test_near_sdpa(self, name: str) -> None:
        """Whole and padded: tokens of the padding have results of their own, which count not."""
        quantised, float_ = model(name, "qnn_int8"), model(name, "sdpa")
        for mask in (None, PADDING):
            with torch.no_grad():
                got, want = (m(IDS, attention_mask=mask)[0] for m in (quantised, float_))
            there = torch.ones_like(IDS) if mask is None else mask
            assert sqnr(got[there.bool()], want[there.bool()]) > 33
            assert not torch.equal(got, want)

    def test_compiled_and_exported_graphs_have_a_node_a_layer(self, name: str) -> None:
        quantised = model(name, "qnn_int8")

        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = quantised

            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = self.model(ids, attention_mask=mask, use_cache=False)[0]
                return y

        with torch.no_grad():
            wrapped = Wrapped()
            want = wrapped(IDS, PADDING)
            program = torch.export.export(wrapped, (IDS, PADDING))
            torch.testing.assert_close(program.module()(IDS, PADDING), want)
            compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(IDS, PADDING), want)
        target = torch.ops.higher_order.invoke_quant_packed
        nodes = [n for n in program.graph.nodes if n.target is target]
        assert [n.kwargs["scheme"] for n in nodes] == ["int8", "int8"]


def test_with_quantised_layers_and_a_cache() -> None:
    """Tokens one at a time are those of the whole sequence, but for the unit of the values."""
    quantised = qnn.convert(model("Llama", "qnn_int8"), "int8")
    with torch.no_grad():
        want = quantised(IDS)[0]
        first = quantised(IDS[:, :9], use_cache=True)
        got, cache = [first[0]], first.past_key_values
        for at in range(9, IDS.shape[1]):
            step = quantised(IDS[:, at : at + 1], past_key_values=cache, use_cache=True)
            got.append(step[0])
            cache = step.past_key_values
    assert sqnr(torch.cat(got, 1), want) > 40


def test_set_in_a_model_that_is_there() -> None:
    plain = model("Bert", "sdpa")
    plain.set_attn_implementation("qnn_int8")
    with torch.no_grad():
        assert torch.equal(plain(IDS)[0], model("Bert", "qnn_int8")(IDS)[0])


def test_what_it_does_not_compute() -> None:
    from qnn.integrations.attention import int8_attention_forward as forward

    q = torch.randn(1, 2, 3, 8)
    layer = nn.Module()
    for name, value in (("softcap", 30.0), ("s_aux", q), ("cache", q), ("output_attentions", True)):
        with pytest.raises(ValueError, match=rf"'qnn_int8'.*\({name}\), which it does not compute"):
            forward(layer, q, q, q, None, **{name: value})
    with pytest.raises(NotImplementedError, match="dropout_p must be 0"):
        forward(layer, q, q, q, None, dropout=0.1)
    bias = torch.randn(1, 2, 3, 3)
    seen = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    want = forward(layer, q, q, q, None, position_bias=bias, is_causal=True)[0]
    assert torch.equal(forward(layer, q, q, q, seen, position_bias=bias)[0], want)
    added = torch.zeros(1, 1, 3, 3).masked_fill(~seen, -torch.inf)
    assert torch.equal(forward(layer, q, q, q, added, position_bias=bias)[0], want)
    assert forward(layer, q, q, q, None, position_bias=bias, is_causal=False)[0].shape == (
        1,
        3,
        2,
        8,
    )
