"""Grouped linear layers: a stack of weights over rows sorted by the weight that they meet, and the
fused experts that are made of two.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from parameterized import parameterized
from torch import nn

import qnn
from qnn import functional as F
from qnn.kernels import OPS, SCHEMES
from qnn.passes import regions

from .common import same_bits

E, N, K = 4, 48, 128
STATIC = {
    "input_scale": torch.tensor([0.03]),
    "input_zero_point": torch.tensor([3], dtype=torch.int8),
}
DYNAMIC = [name for name, scheme in SCHEMES.items() if not scheme.static]
# One of each way to store and to compute.
SOME = ("int8", "int8_weight", "fp8_tensor", "nvfp4", "int4_weight_asym")


def ends(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def grid(scheme: str) -> dict[str, torch.Tensor]:
    """The parts of a static scheme's grid, as arguments and as a layer's parameters."""
    activation = SCHEMES[scheme].activation
    if not SCHEMES[scheme].static or activation is None:
        return {}
    return {name: STATIC[name] for name in ("input" + p.suffix for p in activation.parts[1:])}


def stack(scheme: str) -> tuple[tuple[torch.Tensor, ...], list[tuple[torch.Tensor, ...]]]:
    """The parts of a stack of weights, and those of each."""
    torch.manual_seed(0)
    each = [F.quantize(w, scheme) for w in torch.randn(E, N, K)]
    return tuple(map(torch.stack, zip(*each, strict=True))), each


def one_by_one(
    x: torch.Tensor, each: Any, offsets: torch.Tensor, bias: torch.Tensor | None, scheme: str
) -> torch.Tensor:
    """The layers themselves, each on its rows."""
    y, begin = torch.zeros(len(x), N, dtype=x.dtype), 0
    for e, end in enumerate(offsets.tolist()):
        own = None if bias is None else bias[e]
        y[begin:end] = F.linear(x[begin:end], each[e], bias=own, scheme=scheme, **grid(scheme))
        begin = end
    return y


class TestOp:
    @parameterized.expand(itertools.product(SCHEMES, (torch.float32, torch.bfloat16)))
    def test_is_the_layer_of_each_group_bit_for_bit(self, scheme: str, dtype: torch.dtype) -> None:
        parts, each = stack(scheme)
        x, bias = torch.randn(23, K).to(dtype), torch.randn(E, N)
        for offsets in (ends(5, 5, 22, 23), ends(0, 1, 1, 20), ends(23, 23, 23, 23)):
            for b in (bias, None):
                got = F.grouped_linear(x, parts, offsets, b, scheme=scheme, **grid(scheme))
                assert same_bits(got, one_by_one(x, each, offsets, b, scheme))

    @parameterized.expand(SCHEMES)
    def test_no_rows(self, scheme: str) -> None:
        parts, _ = stack(scheme)
        for rows in (0, 3):  # of no group
            x = torch.randn(rows, K)
            got = F.grouped_linear(x, parts, ends(0, 0, 0, 0), scheme=scheme, **grid(scheme))
            assert same_bits(got, torch.zeros(rows, N))

    @parameterized.expand(SOME)
    def test_nan_stays_in_its_rows(self, scheme: str) -> None:
        parts, _ = stack(scheme)
        x = torch.randn(9, K)
        x[2, 7], x[8, 0] = torch.nan, torch.inf
        got = F.grouped_linear(x, parts, ends(4, 6, 6, 8), scheme=scheme)
        assert not got[2].isfinite().any()
        # A row of no group has no values to spoil; a scale for all rows ties those of a group.
        group = 4 if scheme == "fp8_tensor" else 0
        assert got[max(3, group) :].isfinite().all()

    @parameterized.expand(
        itertools.product(("int8", "fp8"), (ends(3, 2, 5, 6), ends(-1, 2, 3, 4), ends(1, 2, 3, 99)))
    )
    def test_offsets_that_are_none_are_refused(self, scheme: str, offsets: torch.Tensor) -> None:
        parts, _ = stack(scheme)
        with pytest.raises(ValueError, match="offsets must be the end of each group, from 0 to"):
            F.grouped_linear(torch.randn(9, K), parts, offsets, scheme=scheme)

    def test_wrong_arguments(self) -> None:
        parts, _ = stack("int8")
        x, offsets = torch.randn(9, K), ends(1, 2, 3, 4)
        for bad in (
            (x[None], parts, offsets),
            (x, parts, offsets[:3]),
            (x, parts, offsets.long()),
            (x, [part[0] for part in parts], offsets),
            (x, parts, offsets, torch.randn(N)),
            (x, [part[:0] for part in parts], offsets[:0]),
        ):
            with pytest.raises((ValueError, TypeError), match="qnn::int8_grouped_linear"):
                F.grouped_linear(*bad)
        with pytest.raises(ValueError, match="takes no input_scale"):
            F.grouped_linear(x, parts, offsets, **STATIC)
        with pytest.raises(ValueError, match="needs input_scale"):
            F.grouped_linear(x, parts, offsets, scheme="int8_static")

    def test_every_scheme_of_linear_layers_has_one(self) -> None:
        for scheme in SCHEMES.values():
            op = OPS[str(scheme.op("grouped_linear"))]
            (gradient,) = op.backward.values()
            assert gradient == OPS[scheme.linear].backward["x"].replace("_lin", "_grouped_lin")

    @parameterized.expand(itertools.product(SOME, (False, True)))
    def test_gradients(self, scheme: str, compiled: bool) -> None:
        parts, each = stack(scheme)
        offsets = ends(5, 5, 9, 10)
        x, bias = torch.randn(12, K), torch.randn(E, N)
        dy = torch.randn(12, N)

        def run(call: Any, *more: Any) -> tuple[torch.Tensor, ...]:
            leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
            y = call(leaves[0], *more, offsets, leaves[1], scheme=scheme)
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))

        call: Any = F.grouped_linear
        if compiled:
            call = torch.compile(call, backend="aot_eager", fullgraph=True)
        got, want = run(call, parts), run(one_by_one, each)
        assert same_bits(got[0], want[0])
        for one, other in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(one, other)
        assert got[2][1].eq(0).all()  # of a group without rows

    def test_second_derivatives(self) -> None:
        parts, _ = stack("int8")
        x = torch.randn(6, K, requires_grad=True)
        w = F.dequantize(parts)
        y = F.grouped_linear(x, parts, ends(2, 2, 5, 5))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        group = torch.tensor([0, 0, 2, 2, 2])
        gram = 2 * w[group].mT @ w[group]  # dx = gram · x, but for the rounding of x
        want = 2 * gram.mT @ (gram @ x[:5, :, None])
        assert qnn.sqnr(want[..., 0], ddx[:5]) > 30
        assert ddx[5].eq(0).all()

    def test_func_transforms(self) -> None:
        parts, each = stack("int8")
        x, offsets, bias = torch.randn(6, K), ends(2, 2, 5, 6), torch.randn(E, N)
        call = lambda x, b: F.grouped_linear(x, parts, offsets, b)  # noqa: E731
        both = torch.vmap(call, in_dims=(0, None))(torch.stack([x, 2 * x]), bias)
        assert same_bits(both[1], one_by_one(2 * x, each, offsets, bias, "int8"))
        _, moved = torch.func.jvp(lambda b: call(x, b), (bias,), (torch.ones(E, N),))
        assert moved.eq(1).all()
        grad = torch.func.grad(lambda x: call(x, bias).sum())
        compiled = torch.compile(grad, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), grad(x))


class TestSorting:
    def test_there_and_back(self) -> None:
        torch.manual_seed(0)
        groups = torch.randint(0, 7, (13, 3))
        order, offsets = F.sort_by_group(groups, 7)
        assert groups.flatten()[order].diff().ge(0).all()
        assert offsets.tolist() == [int((groups <= e).sum()) for e in range(7)]
        rows = torch.randn(39, 5)
        assert torch.equal(F.unsort(rows[order], order), rows)

    def test_a_group_of_none_comes_last(self) -> None:
        order, offsets = F.sort_by_group(torch.tensor([2, 0, 9, 1, 2]), 2)
        assert order.tolist() == [1, 3, 0, 4, 2]
        assert offsets.tolist() == [1, 2]
        assert offsets.dtype == torch.int32

    def test_none(self) -> None:
        order, offsets = F.sort_by_group(torch.empty(0, 2, dtype=torch.int64), 3)
        assert (order.tolist(), offsets.tolist()) == ([], [0, 0, 0])


def layers(scheme: str, bias: bool = True) -> tuple[qnn.GroupedLinear, qnn.QGroupedLinear]:
    torch.manual_seed(0)
    layer = qnn.GroupedLinear(E, K, N, bias)
    return layer, qnn.QGroupedLinear.from_float(layer, scheme)


X = torch.randn(10, K, generator=torch.Generator().manual_seed(1))
OFFSETS = ends(3, 3, 8, 9)


class TestFloatLayer:
    def test_is_a_linear_layer_for_each_group(self) -> None:
        layer, _ = layers("int8")
        want, begin = torch.zeros(10, N), 0
        for e, end in enumerate(OFFSETS.tolist()):
            want[begin:end] = nn.functional.linear(X[begin:end], layer.weight[e], layer.bias[e])
            begin = end
        torch.testing.assert_close(layer(X, OFFSETS), want)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X, OFFSETS), want)


class TestLayer:
    @parameterized.expand(itertools.product(DYNAMIC, (True, False)))
    def test_stands_for_the_float_one(self, scheme: str, bias: bool) -> None:
        layer, small = layers(scheme, bias)
        model = qnn.convert(nn.ModuleList([layer]), scheme)
        assert type(model[0]) is qnn.QGroupedLinear
        y = small(X, OFFSETS)
        assert same_bits(y, model[0](X, OFFSETS))
        assert qnn.sqnr(layer(X, OFFSETS), y) > 15
        back = small.dequantize()
        assert torch.equal(back.weight, small.weight.clone())
        assert qnn.sqnr(back(X, OFFSETS), y) > (15 if SCHEMES[scheme].activation else 90)
        again = qnn.QGroupedLinear.from_float(layer.weight, scheme, bias=layer.bias)
        assert same_bits(again(X, OFFSETS), y)
        assert "a call for each group" in repr(small)

    @parameterized.expand(SCHEMES)
    def test_state(self, scheme: str) -> None:
        layer, small = layers(scheme)
        if SCHEMES[scheme].static:
            with pytest.raises(RuntimeError, match="not calibrated"):
                small(X, OFFSETS)
            for name, value in grid(scheme).items():
                setattr(small, name, nn.Parameter(value, requires_grad=False))
        y = small(X, OFFSETS)
        state = small.state_dict()
        assert all(tensor.shape[0] == E for name, tensor in state.items() if "input" not in name)
        fresh = qnn.QGroupedLinear(E, K, N, scheme=scheme)
        fresh.load_state_dict(state)
        empty = qnn.QGroupedLinear(E, K, N, scheme=scheme, device="meta")
        empty.load_state_dict(state, assign=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        read = qnn.QGroupedLinear(E, K, N, scheme=scheme)
        read.load_state_dict(torch.load(buffer, weights_only=True))
        others = [fresh, empty, read, copy.deepcopy(small)]
        if scheme.startswith("int"):  # torch pickles no storage of float8
            others.append(pickle.loads(pickle.dumps(small)))
        for other in others:
            assert same_bits(other(X, OFFSETS), y)
        if not SCHEMES[scheme].static:
            floats = qnn.QGroupedLinear(E, K, N, scheme=scheme)
            floats.load_state_dict(layer.state_dict())
            assert same_bits(floats(X, OFFSETS), y)
        with pytest.raises(RuntimeError, match=r"truncated|has a"):
            fresh.load_state_dict({k: v for k, v in state.items() if not k.endswith("_scale")})

    def test_casts(self) -> None:
        _, small = layers("int8")
        half = copy.deepcopy(small).to(torch.bfloat16)
        assert half.weight_scale.dtype == torch.float32
        assert half.bias.dtype == half.weight.dtype == torch.bfloat16
        y = half(X.bfloat16(), OFFSETS)
        assert y.dtype == torch.bfloat16
        assert qnn.sqnr(small(X, OFFSETS), y.float()) > 30

    def test_the_weight_reads_as_floats_and_takes_writes(self) -> None:
        _, small = layers("int8")
        before = small(X, OFFSETS)
        assert small.weight.shape == (E, N, K)
        assert small.weight.dtype == torch.float32
        small.weight = small.weight * 2
        torch.testing.assert_close(small(X, OFFSETS)[3:8] + small.bias[2], 2 * before[3:8])
        with torch.no_grad():
            small.weight.zero_()
        assert torch.equal(small(X, OFFSETS)[3:8], small.bias[2].expand(5, N))
        with pytest.raises(TypeError, match="quantised"):
            small.requires_grad_()

    @parameterized.expand(
        [
            ((X[None], OFFSETS), ValueError, "the input must be \\[rows, 128\\]"),
            ((X[:, 1:], OFFSETS), ValueError, "the input must be \\[rows, 128\\]"),
            ((X.int(), OFFSETS), TypeError, "the input must be float32"),
            ((X, OFFSETS.long()), ValueError, "offsets must be int32 \\[4\\]"),
            ((X, OFFSETS[1:]), ValueError, "offsets must be int32 \\[4\\]"),
            ((X, [3, 3, 8, 9]), TypeError, "offsets must be a tensor"),
            ((X, OFFSETS + 9), ValueError, "from 0 to at most 10"),
        ]
    )
    def test_what_it_cannot_take(self, given: Any, error: type[Exception], words: str) -> None:
        _, small = layers("int8")
        with pytest.raises(error, match=words):
            small(*given)

    def test_sizes_that_it_cannot_have(self) -> None:
        with pytest.raises(ValueError, match="num_groups must be an integer of at least 1, got 0"):
            qnn.QGroupedLinear(0, 4, 4)
        with pytest.raises(ValueError, match="multiple of 16, got 8"):
            qnn.QGroupedLinear(2, 8, 4, scheme="nvfp4")
        with pytest.raises(TypeError, match=r"a weight \[E, N, K\], got Tensor \[2, 3\]"):
            qnn.QGroupedLinear.from_float(torch.randn(2, 3))
        with pytest.raises(ValueError, match=r"bias must be \[2, 3\]"):
            qnn.QGroupedLinear.from_float(torch.randn(2, 3, 4), bias=torch.randn(3))
        with pytest.raises(ValueError, match="NaN"):
            qnn.QGroupedLinear.from_float(torch.full((2, 3, 4), torch.nan))

    @parameterized.expand(SOME)
    def test_graphs(self, scheme: str) -> None:
        """One node, the same bits, and nothing compiled anew for other rows and offsets."""
        _, small = layers(scheme)
        y = small(X, OFFSETS)
        for strict in (True, False):
            program = torch.export.export(small, (X, OFFSETS), strict=strict)
            (region,) = regions(program)
            assert (region.op.name, region.scheme) == (SCHEMES[scheme].op("grouped_linear"), scheme)
            assert same_bits(program.module()(X, OFFSETS), y)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(small, backend=counter, fullgraph=True)
        for rows in (10, 7, 3, 5):
            x, offsets = X[:rows], OFFSETS.clamp(max=rows)
            assert same_bits(compiled(x, offsets), small(x, offsets))
        assert counter.frame_count <= 2

    def test_inductor(self) -> None:
        _, small = layers("int8")
        compiled = torch.compile(lambda x, o: small(x.relu(), o).relu(), fullgraph=True)
        assert same_bits(compiled(X, OFFSETS), small(X.relu(), OFFSETS).relu())

    def test_trace(self) -> None:
        _, small = layers("int8")
        traced = torch.fx.symbolic_trace(Around(small))
        assert [node.op for node in traced.graph.nodes].count("call_module") == 1
        assert same_bits(traced(X, OFFSETS), small(X, OFFSETS))

    def test_summary_and_reasons(self) -> None:
        layer, _ = layers("int8")
        model = nn.ModuleDict({"experts": layer, "linear": nn.Linear(8, 8)})
        row = qnn.summary(qnn.convert(model)).rows[0]
        assert (row.layer, row.scheme, row.shape) == ("QGroupedLinear", "int8", (E, N, K))
        with pytest.warns(UserWarning, match="0.3% of the parameters' bytes"):
            static = qnn.convert(model, "int8_static")
        assert "its input is not observed" in str(qnn.summary(static).rows[0].reason)
        with pytest.raises(ValueError, match="no grouped linear layer that trains"):
            qnn.convert(nn.ModuleList([layer]), "fp8", training=True)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> Any:
        return self.layer(x, offsets)


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


def transformer(name: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY, **MODELS[name])
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

    def test_bytes(self) -> None:
        model = transformer("Mixtral")
        small = qnn.convert(model, exclude="*embed*")
        rows = [row for row in qnn.summary(small).rows if row.scheme]
        before, after = (
            sum(getattr(row, f"bytes_{w}") for row in rows) for w in ("before", "after")
        )
        assert after <= 0.28 * before

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
