"""QMultiheadAttention: what it computes, in every mode, what it stores, and how a model's attention
becomes one.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qnn
from qnn.functional.attention import linear_rows
from qnn.kernels import get_scheme
from qnn.nn.linear.observed import default_spec
from qnn.passes import regions

from .common import python_kernels, same_bits

WIDTH, HEADS = 32, 4
# Each tensor's own projections, of other widths, and what is added to keys and values.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "kdim": {"kdim": 96, "vdim": 64},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def floats(name: str = "batch first", **more: Any) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(WIDTH, HEADS, **(OPTIONS[name] | more)).eval()
    for key, parameter in layer.named_parameters():
        if "bias" in key:
            nn.init.normal_(parameter, std=0.3)
    return layer


def inputs(layer: nn.MultiheadAttention, same: int = 3) -> list[torch.Tensor]:
    """Query, key and value, of which the last `same` are one tensor."""
    if layer.kdim != layer.embed_dim:
        same = 1
    lengths = (7, 7, 7) if same == 3 else (7, 5, 5)
    made = []
    for steps, width in zip(lengths, (WIDTH, layer.kdim, layer.vdim), strict=True):
        x = torch.randn(2, steps, width)
        made.append(x if layer.batch_first else x.transpose(0, 1).contiguous())
    return made[: 3 - same] + [made[3 - same]] * same if same > 1 else made


def twin(layer: nn.MultiheadAttention, scheme: str, batch: list[torch.Tensor]) -> Any:
    """The quantised layer; a static one is calibrated on `batch`."""
    if not get_scheme(scheme).static:
        return qnn.QMultiheadAttention.from_float(layer, scheme)
    observed = qnn.ObservedMultiheadAttention.from_float(layer, default_spec(scheme, qat=False))
    observed(*batch)
    return qnn.QMultiheadAttention.from_observed(observed)


def near(layer: Any) -> nn.MultiheadAttention:
    """torch's layer with the rounded weights."""
    return layer.dequantize().eval()


def close(got: Any, want: Any, db: float = 25) -> bool:
    return all(
        (a is None and b is None) or (a.shape == b.shape and qnn.sqnr(b, a) > db)
        for a, b in zip(got, want, strict=True)
    )


class TestValues:
    @parameterized.expand(itertools.product(OPTIONS, (1, 2, 3), (True, False)))
    def test_weight_only_is_torchs_layer(self, option: str, same: int, weights: bool) -> None:
        """To rounding, over the rounded weights: only the linear products differ."""
        layer = qnn.QMultiheadAttention.from_float(floats(option), "int8_weight")
        given = inputs(layer, same)
        torch.testing.assert_close(
            layer(*given, need_weights=weights), near(layer)(*given, need_weights=weights)
        )

    @parameterized.expand(itertools.product(qnn.SCHEMES, (1, 3)))
    def test_schemes(self, scheme: str, same: int) -> None:
        layer = nn.MultiheadAttention(128, 4, batch_first=True).eval()
        given = [torch.randn(2, 6, 128) for _ in range(3)]
        given = [given[0]] * 3 if same == 3 else given
        quantised = twin(layer, scheme, given)
        low = 10 if "nvfp4" in scheme else 15 if "4" in scheme else 22
        assert close(quantised(*given), layer(*given), low)
        assert quantised.scheme == quantised.out_proj.scheme == scheme

    @parameterized.expand([("int8_static",), ("int16_static",)])
    def test_prepared_for_a_scheme(self, scheme: str) -> None:
        x = torch.randn(2, 6, 128)
        layer = nn.MultiheadAttention(128, 4, batch_first=True).eval()
        prepared = qnn.prepare(layer, scheme)
        prepared(x, x, x)
        quantised = qnn.convert(prepared)
        assert quantised.scheme == quantised.out_proj.scheme == scheme
        assert close(quantised(x, x, x), layer(x, x, x), 22)

    @parameterized.expand(itertools.product(("int8", "int8_static"), (1, 2, 3)))
    def test_projections_are_linear_layers(self, scheme: str, same: int) -> None:
        """The same integers as of three `QLinear`: slices of the packed weight."""
        layer = floats()
        given = inputs(layer, same)
        quantised = twin(layer, scheme, given)
        for i, (x, got) in enumerate(zip(given, quantised._project(given), strict=True)):
            rows = slice(i * WIDTH, (i + 1) * WIDTH)
            linear = nn.Linear(WIDTH, WIDTH)
            linear.weight.data = layer.in_proj_weight[rows].detach()
            linear.bias.data = layer.in_proj_bias[rows].detach()
            single = qnn.QLinear.from_float(linear, scheme)
            if scheme == "int8_static":
                role = max(i, 3 - same) if i else 0
                role = {3: 0, 2: min(i, 1), 1: i}[same]
                name = ("query", "key", "value")[role]
                for end in ("_scale", "_zero_point"):
                    setattr(single, f"input{end}", getattr(quantised, name + end))
            assert same_bits(got, single(x))

    @parameterized.expand([("key_padding",), ("2-D",), ("3-D",), ("both",), ("causal",)])
    def test_masks(self, which: str) -> None:
        for option, weights, as_bool in itertools.product(
            ("batch first", "plain", "more keys"), (True, False), (True, False)
        ):
            layer = qnn.QMultiheadAttention.from_float(floats(option), "int8_weight")
            x = inputs(layer)[0]
            masks: dict[str, Any] = {}
            if which in ("key_padding", "both"):
                masks["key_padding_mask"] = torch.arange(7) >= torch.tensor([[7], [4]])
            if which in ("2-D", "both", "causal"):
                masks["attn_mask"] = torch.ones(7, 7).triu(1).bool()
            if which == "3-D":
                masks["attn_mask"] = torch.rand(2 * HEADS, 7, 7) > 0.7
                masks["attn_mask"][..., 0] = False
            if not as_bool:
                masks = {k: torch.zeros(m.shape).masked_fill(m, -9.0) for k, m in masks.items()}
            options = {**masks, "is_causal": which == "causal", "need_weights": weights}
            if which == "causal" and not as_bool:
                options["is_causal"] = False  # the hint would be wrong
            torch.testing.assert_close(layer(x, x, x, **options), near(layer)(x, x, x, **options))

    def test_without_a_batch(self) -> None:
        for option in ("batch first", "plain", "kdim", "more keys"):
            layer = qnn.QMultiheadAttention.from_float(floats(option), "int8_weight")
            given = [torch.randn(n, w) for n, w in ((7, WIDTH), (5, layer.kdim), (5, layer.vdim))]
            padding = torch.tensor([0, 0, 0, 1, 1]).bool()
            for average in (True, False):
                got, want = (
                    each(*given, key_padding_mask=padding, average_attn_weights=average)
                    for each in (layer, near(layer))
                )
                torch.testing.assert_close(got, want)

    def test_dropout_is_torchs(self) -> None:
        layer = qnn.QMultiheadAttention.from_float(floats(dropout=0.5), "int8_weight").train()
        x = inputs(layer)[0]
        found = []
        for each in (layer, near(layer).train()):
            torch.manual_seed(3)
            found.append(each(x, x, x))
        torch.testing.assert_close(*found)
        assert bool((found[0][1] == 0).any())
        assert not bool((layer.eval()(x, x, x)[1] == 0).any())

    @parameterized.expand([("int8",), ("int8_weight",), ("fp8",)])
    def test_dtypes_and_empty(self, scheme: str) -> None:
        layer = qnn.QMultiheadAttention.from_float(floats(), scheme)
        x = inputs(layer)[0]
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            y, weights = layer(*[x.to(dtype)] * 3)
            assert (y.dtype, weights.dtype) == (dtype, dtype)
            assert qnn.sqnr(layer(x, x, x)[0], y) > 20
        assert layer(*[x[:0]] * 3, need_weights=False)[0].shape == (0, 7, WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x, x, x, need_weights=False)[0].dtype == torch.bfloat16
        bad = x.clone()
        bad[0, 2, 3] = torch.nan
        y = layer(bad, bad, bad, need_weights=False)[0]
        assert bool(y[0].isnan().all())
        assert same_bits(y[1], layer(x, x, x, need_weights=False)[0][1])

    def test_without_the_native_kernels(self) -> None:
        layer = qnn.QMultiheadAttention.from_float(floats())
        given = inputs(layer, 2)
        want = layer(*given)[0]
        with python_kernels():
            torch.testing.assert_close(layer(*given)[0], want)
            torch.testing.assert_close(layer(given[0], given[0], given[0]), layer(*given[:1] * 3))

    def test_blocks_across_the_rows_of_two_projections(self) -> None:
        """fp8_block: where 128 rows have one scale, a slice of other rows is all rows, cut."""
        weight, x = torch.randn(96, 32), torch.randn(3, 32)
        for scheme in ("fp8_block", "int8", "int4_weight_asym_g32", "nvfp4", "fp8_tensor"):
            parts = qnn.functional.quantize(weight, scheme)
            whole = qnn.functional.linear(x, parts, scheme=scheme)
            for rows in ((0, 32), (32, 96), (64, 96), (0, 96)):
                got = linear_rows(x, parts, (), None, scheme, rows)
                torch.testing.assert_close(got, whole[:, slice(*rows)])
        form = qnn.SCHEMES["int8"].weight
        values, _ = form.rows(qnn.functional.quantize(weight, "int8"), 32, 64) or ((), ())
        assert values.untyped_storage().nbytes() == 96 * 32  # a view

    @parameterized.expand([("int8",), ("int8_weight",), ("int8_static",)])
    def test_gradients(self, scheme: str) -> None:
        for option, same in (("batch first", 3), ("batch first", 2), ("kdim", 1), ("more keys", 1)):
            float_layer = floats(option)
            given = inputs(float_layer, same)
            layer, found = twin(float_layer, scheme, given), []
            for each in (layer, near(layer)):
                xs = {id(x): x.clone().requires_grad_() for x in given}
                each(*(xs[id(x)] for x in given), need_weights=False)[0].square().sum().backward()
                biases = [p.grad for n, p in sorted(each.named_parameters()) if "bias" in n]
                found.append([*(x.grad for x in xs.values()), *biases])
            assert close(*found, db=20)
            assert all(p.grad is None for p in layer.parameters() if not p.requires_grad)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.attention(x, y, y, need_weights=False)[0]


class TestGraphs:
    @parameterized.expand(
        [("int8", 1), ("int8", 3), ("int8_static", 2), ("int8_weight", 3), ("nvfp4_weight", 2)]
    )
    def test_nodes(self, scheme: str, same: int) -> None:
        float_layer = floats()
        given = inputs(float_layer, same)
        layer = twin(float_layer, scheme, given).eval()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = layer

            def forward(self, *xs: torch.Tensor) -> Any:
                return self.attention(*xs[: 3 - same], *xs[3 - same :] * same)

        model, few = Model(), tuple(given[: 4 - same])
        with torch.no_grad():
            want = model(*few)
            for strict in (True, False) if same == 3 else (False,):
                exported = torch.export.export(model, few, strict=strict)
                assert [r.scheme for r in regions(exported)] == [scheme] * (5 - same)
                for got, expected in zip(exported.module()(*few), want, strict=True):
                    assert same_bits(got, expected)
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            for got, expected in zip(compiled(*few), want, strict=True):
                assert same_bits(got, expected)

    def test_dynamic_with_gradients(self) -> None:
        self.dynamic("aot_eager", nn.Sequential(Cross()))

    @pytest.mark.long
    def test_inductor(self) -> None:
        self.dynamic("inductor", nn.TransformerDecoderLayer(WIDTH, HEADS, 64, 0.0))

    def dynamic(self, backend: str, model: nn.Module) -> None:
        layer = qnn.convert(model)
        layer = layer[0] if isinstance(layer, nn.Sequential) else layer
        compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
        for batch, steps in ((2, 7), (3, 5)):
            x, y = torch.randn(steps, batch, WIDTH), torch.randn(steps + 1, batch, WIDTH)
            dy, found = torch.randn(steps, batch, WIDTH), []
            for call in (layer, compiled):
                given = x.clone().requires_grad_()
                out = call(given, y)
                out.backward(dy)
                found.append((out, given.grad))
            assert close(*found, db=35)

    def test_operations_are_counted(self) -> None:
        layer = floats("plain")
        x, counts = inputs(layer)[0], []
        for each in (layer.train(), qnn.QMultiheadAttention.from_float(layer)):
            with FlopCounterMode(display=False) as mode:
                each(x, x, x)
            counts.append(mode.get_total_flops())
        assert counts[0] == counts[1] > 0

    def test_leaf_of_symbolic_trace(self) -> None:
        model = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, 0.0).self_attn
        quantised = qnn.QMultiheadAttention.from_float(model)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = quantised

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.attention(x, x, x, None, False)[0]

        graph, x = torch.fx.symbolic_trace(Model()), torch.randn(3, 2, WIDTH)
        assert "call_module" in [node.op for node in graph.graph.nodes]
        assert same_bits(graph(x), quantised(x, x, x, need_weights=False)[0])

    def test_meta(self) -> None:
        with torch.device("meta"):
            layer, x = qnn.QMultiheadAttention(WIDTH, HEADS, scheme="fp8"), torch.ones(3, 2, WIDTH)
        assert layer(x, x, x)[0].shape == x.shape


class TestState:
    @parameterized.expand(
        itertools.product(("int8", "int8_static", "nvfp4", "int4_weight_asym_g32"), OPTIONS)
    )
    def test_round_trips(self, scheme: str, option: str) -> None:
        float_layer = nn.MultiheadAttention(128, 4, **OPTIONS[option]).eval()
        given = [torch.randn(3, 2, w) for w in (128, float_layer.kdim, float_layer.vdim)]
        layer = twin(float_layer, scheme, given)
        want = layer(*given)[0]
        again = qnn.QMultiheadAttention(128, 4, **OPTIONS[option], scheme=scheme)
        again.load_state_dict(layer.state_dict())
        meta = qnn.QMultiheadAttention(128, 4, **OPTIONS[option], scheme=scheme, device="meta")
        meta.load_state_dict(layer.state_dict(), assign=True)
        copies = [copy.deepcopy(layer)]
        if scheme != "nvfp4":  # pickle takes no float8 without torch.save
            copies.append(pickle.loads(pickle.dumps(layer)))
        for made in (again, meta, *copies):
            assert same_bits(made.eval()(*given)[0], want)
            assert not made._qkv_same_embed_dim
        names = set(float_layer.state_dict())
        assert names <= {n.replace("_packed", "") for n in layer.state_dict()}
        if scheme != "int8_static":
            again.reset_parameters()
            assert not same_bits(again(*given)[0], want)
            again.load_state_dict(float_layer.state_dict())  # quantised on the way in
            assert same_bits(again(*given)[0], want)
        back = layer.dequantize()
        assert type(back) is nn.MultiheadAttention
        assert set(back.state_dict()) == names
        for name, value in back.named_parameters():
            assert qnn.sqnr(float_layer.get_parameter(name), value) > 15

    def test_strict(self) -> None:
        layer = qnn.QMultiheadAttention(WIDTH, HEADS)
        state = layer.state_dict()
        for name in state:
            with pytest.raises(RuntimeError, match=name.removeprefix("out_proj.")):
                layer.load_state_dict({k: v for k, v in state.items() if k != name})
        for name, value in state.items():
            if value.is_floating_point():
                with pytest.raises(RuntimeError, match=name.removeprefix("out_proj.")):
                    layer.load_state_dict({**state, name: value * torch.nan})
        with pytest.raises(RuntimeError, match="query_scale belongs to another scheme"):
            layer.load_state_dict({**state, "query_scale": torch.ones(1)})

    def test_the_weight_view(self) -> None:
        layer, other = floats(), floats()
        nn.init.normal_(other.in_proj_weight)
        quantised = qnn.QMultiheadAttention.from_float(layer)
        assert (quantised.in_proj_weight.dtype, quantised.in_proj_weight.shape) == (
            torch.float32, (3 * WIDTH, WIDTH),
        )  # fmt: skip
        assert qnn.sqnr(layer.in_proj_weight, quantised.in_proj_weight) > 35
        assert quantised.q_proj_weight is None
        quantised.in_proj_weight = other.in_proj_weight.detach()
        want = qnn.QMultiheadAttention.from_float(other).state_dict()["in_proj_weight"]
        assert torch.equal(quantised.state_dict()["in_proj_weight"], want)
        with pytest.raises(TypeError, match="in_proj_weight is quantised and cannot be param"):
            del quantised.in_proj_weight

    def test_casts_keep_codes_and_scales(self) -> None:
        layer = qnn.QMultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
        before = {n: t.clone() for n, t in layer.state_dict().items() if "bias" not in n}
        state = layer.half().state_dict()
        assert all(same_bits(state[name], value) for name, value in before.items())
        assert {state[n].dtype for n in state if "bias" in n} == {torch.float16}

    def test_repr_rebuilds(self) -> None:
        for option in OPTIONS.values():
            layer = qnn.QMultiheadAttention(WIDTH, HEADS, dropout=0.5, **option)
            made = eval(repr(layer).partition("  #")[0], vars(qnn))  # noqa: S307
            assert made.extra_repr() == layer.extra_repr()
            assert made.state_dict().keys() == layer.state_dict().keys()
        assert "(out_proj): QLinear(" in repr(layer)


class TestContract:
    def test_errors(self) -> None:
        layer, x = qnn.QMultiheadAttention(WIDTH, HEADS, batch_first=True), torch.ones(2, 3, WIDTH)
        of, nested = qnn.QMultiheadAttention.from_float, torch.nested.nested_tensor([x[0], x[1]])
        cases: list[tuple[Any, type[Exception], str]] = [
            (lambda: layer(x[None], x, x), ValueError, r"query must be \[L, E\].* got 4 axes"),
            (lambda: layer(x, x, x[..., :5]), ValueError, r"value must have .* 32 columns; got"),
            (lambda: layer(x, x[0], x[0]), ValueError, "key must have 3 axes"),
            (lambda: layer(x, x, x[:, :2]), ValueError, "key and value must agree"),
            (lambda: layer(x[:1], x, x), ValueError, "one batch size, got 1 and 2; batch_first"),
            (lambda: layer(x, x, x, is_causal=True), ValueError, "is_causal is a hint about attn_"),
            (lambda: layer(x, x, x, torch.ones(2, 3).int()), ValueError, "must be bool or float"),
            (lambda: layer(x, x, x, torch.ones(3, 2)), ValueError, r"must be \[2, 3\], got \[3, "),
            (
                lambda: layer(x, x, x, attn_mask=torch.ones(2, 3, 3)),
                ValueError,
                r"must be \[3, 3\] or \[8, 3, 3\], got \[2, 3, 3\]",
            ),
            (lambda: layer(x.int(), x, x), TypeError, "query: the input must be float32"),
            (lambda: layer(x, x.to("meta"), x), ValueError, "key: the input is on meta"),
            (lambda: layer(nested, nested, nested), TypeError, "nested tensor; pad it"),
            (lambda: layer([x], x, x), TypeError, "the input must be a tensor, got list"),
            (lambda: qnn.QMultiheadAttention(WIDTH, HEADS, scheme="int9"), ValueError, "int9"),
            (
                lambda: qnn.QMultiheadAttention(24, 4, kdim=32, scheme="mxfp8"),
                ValueError,
                "q_proj_weight: in_features must be a multiple of 32, got 24",
            ),
            (lambda: qnn.QMultiheadAttention(5, 2), AssertionError, "divisible by num_heads"),
            (lambda: of(nn.Linear(3, 3)), TypeError, "takes an nn.MultiheadAttention, got Linear"),
            (lambda: of(layer), TypeError, "got QMultiheadAttention"),
            (lambda: of(floats(), "int8_static")(x, x, x), RuntimeError, "is not calibrated"),
            (
                lambda: qnn.QMultiheadAttention.from_observed(floats()),
                TypeError,
                "takes a qnn.ObservedMultiheadAttention",
            ),
            (
                lambda: qnn.QMultiheadAttention.from_observed(
                    qnn.ObservedMultiheadAttention(WIDTH, HEADS)
                ),
                ValueError,
                "query.*nothing was observed",
            ),
        ]
        for call, kind, words in cases:
            with pytest.raises(kind, match=words):
                call()

    def test_other_code_sees_an_attention(self) -> None:
        for option in OPTIONS.values():
            layer = nn.MultiheadAttention(WIDTH, HEADS, **option)
            for made in (qnn.QMultiheadAttention, qnn.ObservedMultiheadAttention):
                same = made(WIDTH, HEADS, **option)
                assert isinstance(same, nn.MultiheadAttention)
                assert [name for name in dir(layer) if not hasattr(same, name)] == []
