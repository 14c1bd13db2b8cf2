"""Fused experts: modules that an adapter describes, and those of transformers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import qnn
from qnn.passes import regions

from .common import same_bits

E = 4


class Mixture(nn.Module):
    """Experts of nobody's library: no gate in their class, biases, `[E, K, N]`."""

    def __init__(self, transposed: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.act_fn, self.transposed = nn.SiLU(), transposed
        for name, (rows, columns) in {"gate_up_proj": (2 * 32, 64), "down_proj": (64, 32)}.items():
            weight = torch.randn(E, rows, columns) / columns**0.5
            self.register_parameter(name, nn.Parameter(weight.mT if transposed else weight))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, rows)))

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        result = torch.zeros_like(hidden_states)
        for token, (chosen, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for e, weight in zip(chosen.tolist(), weights, strict=True):
                x = hidden_states[token]
                for name in ("gate_up_proj", "down_proj"):
                    w = getattr(self, name)[e]
                    x = x @ (w if self.transposed else w.mT)
                    x = x + getattr(self, f"{name}_bias", torch.zeros(E, 1))[e]
                    if name == "gate_up_proj":
                        gate, up = x.chunk(2)
                        x = self.act_fn(gate) * up
                result[token] += weight * x
        return result


@pytest.fixture(params=[True, False], ids=["transposed", "plain"])
def mixture(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    adapter = qnn.ExpertsAdapter(transposed=request.param, bias=True)
    qnn.register_adapter(Mixture, adapter)
    yield Mixture(request.param).eval()
    qnn.nn.unregister_adapter(Mixture)


def routed(tokens: int, experts: int = E, hidden: int = 64, k: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)] or [])
    return torch.randn(tokens, hidden), index, torch.rand(tokens, k)


class TestAdapter:
    def test_one_takes_a_class(self, mixture: Mixture) -> None:
        model = qnn.convert(nn.ModuleList([mixture]))
        (small,) = model
        assert type(small) is qnn.QExperts
        for tokens in (1, 9):
            given = routed(tokens)
            assert qnn.sqnr(mixture(*given), small(*given)) > 30
        assert {name: tuple(t.shape) for name, t in small.state_dict().items()} == {
            "gate_up_proj_bias": (E, 64),
            "gate_up_proj": (E, 64, 64),
            "gate_up_proj_scale": (E, 64, 1),
            "down_proj_bias": (E, 64),
            "down_proj": (E, 64, 32),
            "down_proj_scale": (E, 64, 1),
        }
        assert small.down_proj.dtype == torch.float32  # a view
        assert qnn.summary(model).rows[0].scheme == "int8"
        given = routed(5)
        y = small(*given)
        back = small.dequantize()
        assert type(back) is Mixture
        assert back.state_dict().keys() == mixture.state_dict().keys()
        assert qnn.sqnr(back(*given), y) > 30
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same_bits(other[0](*given), y)
        again = qnn.convert(nn.ModuleList([Mixture(mixture.transposed)]))
        again.load_state_dict(model.state_dict())
        assert same_bits(again[0](*given), y)
        again = qnn.convert(nn.ModuleList([Mixture(mixture.transposed)]))
        again[0].load_state_dict(mixture.state_dict())  # floats, as the float module has them
        assert same_bits(again[0](*given), y)

    def test_an_expert_elsewhere_adds_nothing(self, mixture: Mixture) -> None:
        small = qnn.QExperts.from_float(mixture)
        x, index, weights = routed(6)
        here = weights.masked_fill(index == 1, 0)
        want = small(x, index, here)
        got = small(x, index.where(index != 1, E), weights)
        torch.testing.assert_close(got, want)

    def test_no_tokens(self, mixture: Mixture) -> None:
        small = qnn.QExperts.from_float(mixture)
        none = small(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
        assert none.shape == (0, 64)

    def test_gradient_to_the_input_and_the_router(self, mixture: Mixture) -> None:
        small = qnn.QExperts.from_float(mixture)
        x, index, weights = routed(6)

        def gradients(module: Any) -> tuple[torch.Tensor, ...]:
            leaves = (x.clone().requires_grad_(), weights.clone().requires_grad_())
            y = module(leaves[0], index, leaves[1])
            return torch.autograd.grad(y.square().sum(), leaves)

        for got, want in zip(gradients(small), gradients(mixture), strict=True):
            assert qnn.sqnr(want, got) > 25

    def test_what_it_refuses(self, mixture: Mixture) -> None:
        small = qnn.QExperts.from_float(mixture)
        x, index, weights = routed(6)
        for given, words in (
            ((x[None], index, weights), r"must be \[tokens, 64\]"),
            ((x, index[:5], weights), r"\[tokens, k\] for the 6 tokens"),
            ((x,), "takes hidden_states, top_k_index and top_k_weights"),
        ):
            with pytest.raises((TypeError, ValueError), match=words):
                small(*given)
        with pytest.raises(ValueError, match=r"an adapter for .*Mixture already"):
            qnn.register_adapter(Mixture, qnn.ExpertsAdapter())
        with pytest.raises(TypeError, match="a class or its qualified name"):
            qnn.register_adapter(Mixture, "transposed")  # type: ignore[arg-type]

    def test_a_module_that_is_built_otherwise_stays_float(self, mixture: Mixture) -> None:
        other = Mixture(not mixture.transposed)
        with pytest.raises(ValueError, match="does not follow its gate_up_proj"):
            qnn.convert(nn.ModuleList([other]))
        with pytest.raises(ValueError, match="its gate_up_proj_bias is not a bias"):
            qnn.convert(nn.ModuleList([Mixture(mixture.transposed, bias=False)]))

    @pytest.mark.parametrize("scheme", ["int8_static", "int16_static"])
    def test_calibrated(self, mixture: Mixture, scheme: str) -> None:
        model, given = nn.ModuleList([mixture]), routed(40)
        prepared = qnn.prepare(model, scheme)
        (observed,) = prepared
        assert type(observed) is qnn.ObservedExperts
        with pytest.raises(ValueError, match=r"0\.gate_up_proj\.input"):
            qnn.convert(prepared)
        want = mixture(*given)
        assert qnn.sqnr(want, observed(*given)) > 100
        made = qnn.convert(prepared)
        (small,) = made
        assert (type(small), small.scheme) == (qnn.QExperts, scheme)
        y = small(*given)
        assert qnn.sqnr(want, y) > (36 if "16" in scheme else 25)
        names = {name: tuple(t.shape) for name, t in small.state_dict().items() if "input" in name}
        suffixes = ["scale"] if "16" in scheme else ["scale", "zero_point"]
        assert names == {
            f"{w}_input_{s}": (1,) for w in ("gate_up_proj", "down_proj") for s in suffixes
        }
        empty = qnn.convert(nn.ModuleList([Mixture(mixture.transposed)]), scheme)
        with pytest.raises(RuntimeError, match="not calibrated"):
            empty[0](*given)
        empty.load_state_dict(made.state_dict())
        for other in (empty, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert same_bits(other[0](*given), y)
        for other in (prepared, pickle.loads(pickle.dumps(prepared))):
            assert {*other.state_dict()} > {*model.state_dict()}
        assert type(small.dequantize()) is Mixture
        with pytest.raises(RuntimeError, match="belongs to another scheme"):
            qnn.convert(model)[0].load_state_dict(small.state_dict())
        graph = torch.export.export(small, given, strict=False)
        assert [region.scheme for region in regions(graph)] == [scheme] * 2
        assert same_bits(graph.module()(*given), y)

    def test_tokens_of_experts_elsewhere_are_not_observed(self, mixture: Mixture) -> None:
        spec = qnn.QuantSpec(torch.int8)
        x, index, weights = routed(20)
        one, other = (qnn.ObservedExperts.from_float(mixture, spec) for _ in range(2))
        one(x[:12], index[:12], weights[:12])
        x[12:], index[12:] = 1e4, E
        other(x, index, weights)
        for weight, point in one.points().items():
            for a, b in zip(point.qparams(), other.points()[weight].qparams(), strict=True):
                assert torch.equal(a, b)

    def test_trained(self, mixture: Mixture) -> None:
        """What is trained is what is converted, to float32's rounding."""
        given = routed(40)
        calibrated = qnn.prepare(nn.ModuleList([mixture]))
        calibrated[0](*given)
        prepared = qnn.prepare(calibrated, qat=True).train()
        assert prepared[0].qat
        optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            prepared[0](*given).square().mean().backward()
            assert all(p.grad is not None for p in prepared.parameters())
            optimizer.step()
        assert not torch.equal(prepared[0].gate_up_proj, mixture.gate_up_proj)  # a copy
        y = prepared.eval()[0](*given)
        assert qnn.sqnr(y, qnn.convert(prepared)[0](*given)) > 60

    def test_without_an_adapter_the_reason_says_what_to_do(self) -> None:
        (row,) = qnn.summary(nn.ModuleList([Mixture()])).rows
        assert "is probably a weight that stays float" in str(row.reason)
        assert "qnn.register_adapter" in str(row.reason)


TINY = {
    "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128,
}  # fmt: skip
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}


def transformer(name: str, **more: int) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**TINY, **MODELS[name], **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # some leave it to the checkpoint
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


IDS = torch.arange(3, 40).view(1, -1)


def experts_of(model: nn.Module) -> Any:
    return next(each for each in model.modules() if isinstance(each, qnn.QExperts))


class TestTransformers:
    @pytest.mark.parametrize("name", MODELS)
    def test_the_whole_model_there_and_back(self, name: str, tmp_path: Any) -> None:
        model = transformer(name)
        small = qnn.convert(model)
        with torch.no_grad():
            y = small(IDS).logits
            assert qnn.sqnr(model(IDS).logits, y) > 20
            small.save_pretrained(tmp_path)
            again = qnn.load_pretrained(type(model), tmp_path)
            assert same_bits(again(IDS).logits, y)
        assert isinstance(experts_of(again), qnn.QExperts)
        float_layers = [m for m in small.modules() if type(m).__name__ == f"{name}Experts"]
        assert not float_layers

    @pytest.mark.parametrize("scheme", ["fp8_block", "nvfp4", "int4_weight_asym_g32"])
    def test_other_schemes(self, scheme: str, tmp_path: Any) -> None:
        model = transformer("Mixtral")
        (name,) = [n for n, m in model.named_modules() if type(m).__name__ == "MixtralExperts"]
        small = qnn.convert(model, scheme, include=name)
        with torch.no_grad():
            y = small(IDS).logits
            assert qnn.sqnr(model(IDS).logits, y) > 15
            small.save_pretrained(tmp_path)
            assert same_bits(qnn.load_pretrained(type(model), tmp_path)(IDS).logits, y)

    def test_bytes_of_a_whole_model(self) -> None:
        """All but norms and biases: with the router, which stays float, and all scales."""
        model = transformer("Mixtral", num_local_experts=2)
        small = qnn.convert(model, {"*": "int8", nn.Embedding: "int8_weight"})

        def size(model: nn.Module) -> int:
            return sum(
                p.numel() * p.element_size()
                for name, p in model.named_parameters()
                if "norm" not in name and not name.endswith("bias")
            )

        assert 0.25 * size(model) < size(small) <= 0.28 * size(model)
        left = {row.name.rpartition(".")[2] for row in qnn.summary(small).rows if not row.scheme}
        norms = {"input_layernorm", "post_attention_layernorm", "norm"}
        assert left == {*norms, "gate", "rotary_emb"}

    @pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
    def test_calibrated(self, name: str, tmp_path: Any) -> None:
        model = transformer(name)
        prepared = qnn.prepare(model)
        with torch.no_grad():
            want = model(IDS).logits
            assert qnn.sqnr(want, prepared(IDS).logits) > 90
            small = qnn.convert(prepared)
            y = small(IDS).logits
            assert qnn.sqnr(want, y) > 18
            experts = experts_of(small)
            assert experts.scheme == "int8_static"
            small.save_pretrained(tmp_path)
            again = qnn.load_pretrained(type(model), tmp_path)
            assert same_bits(again(IDS).logits, y)

    def test_compiled_experts(self) -> None:
        """In one graph, one node a product, and nothing compiled anew for other token counts."""
        small = experts_of(qnn.convert(transformer("Mixtral")))
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        compiled = torch.compile(small, backend=counter, fullgraph=True)
        with torch.no_grad():
            for tokens in (9, 6, 2, 31):
                given = routed(tokens)
                torch.testing.assert_close(compiled(*given), small(*given))
        assert counter.frame_count <= 2
        assert len(regions(torch.export.export(small, routed(9)))) == 2

    def test_generate_with_one_token_at_a_time(self) -> None:
        small = qnn.convert(transformer("Mixtral"))
        kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        one = small.generate(IDS, use_cache=True, **kwargs)
        assert torch.equal(one, small.generate(IDS, use_cache=False, **kwargs))
