from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any
from unittest import mock

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.kernels.cpu import native
from qnn.kernels.cpu.engines import self_test

from .common import DTYPES, forked, same_bits

SCHEMES = ("int8", "int8_weight")


def layer(scheme: str = "int8", **kwargs: Any) -> qnn.QLinear:
    torch.manual_seed(0)
    return qnn.QLinear(48, 64, scheme=scheme, **kwargs)


class TestConstruction:
    @parameterized.expand([(s, b) for s in SCHEMES for b in (True, False)])
    def test_draws_the_weights_of_nn_linear(self, scheme: str, bias: bool) -> None:
        torch.manual_seed(0)
        plain = nn.Linear(48, 64, bias)
        twin = qnn.QLinear.from_float(plain, scheme)
        for name, tensor in layer(scheme, bias=bias).state_dict().items():
            assert torch.equal(tensor, twin.state_dict()[name]), name
        step = twin.weight_scale / 2 * 1.001
        assert bool(((twin.dequantize().weight - plain.weight).abs() <= step).all())

    @parameterized.expand(
        [
            ((768, 3072), {}),
            ((3, 4, False), {"dtype": torch.bfloat16}),
            ((5, 6), {"scheme": "int8_weight"}),
        ]
    )
    def test_repr_rebuilds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = repr(qnn.QLinear(*args, **kwargs))
        twin = eval(text, {"QLinear": qnn.QLinear, "torch": torch})  # noqa: S307
        assert repr(twin) == text
        assert "cpu: " in text.split("#")[1]

    @parameterized.expand(
        [
            ((0, 4), {}, ValueError, "at least 1, got 0 and 4"),
            ((4, 0), {}, ValueError, "at least 1, got 4 and 0"),
            ((132_105, 4), {"device": "meta"}, ValueError, "at most 132104.*int8_weight"),
            ((4, 4), {"scheme": "int9"}, ValueError, "known schemes"),
            ((4, 4), {"scheme": torch.int8}, TypeError, "must be a string"),
            ((4, 4), {"dtype": torch.int8}, TypeError, "dtype must be one of torch.float32"),
        ]
    )
    def test_bad_arguments(self, args: Any, kwargs: Any, kind: Any, message: str) -> None:
        with pytest.raises(kind, match=message):
            qnn.QLinear(*args, **kwargs)

    def test_from_float_refuses(self) -> None:
        with pytest.raises(TypeError, match=r"takes an nn.Linear, got Conv2d"):
            qnn.QLinear.from_float(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="got QLinear"):
            qnn.QLinear.from_float(layer())
        bad = nn.Linear(4, 4)
        bad.weight.data[2, 1] = float("inf")
        with pytest.raises(ValueError, match="NaN or inf in row 2"):
            qnn.QLinear.from_float(bad)

    def test_from_float_keeps_mode_and_bias(self) -> None:
        plain = nn.Linear(4, 8).eval()
        plain.bias.requires_grad_(False)
        twin = qnn.QLinear.from_float(plain)
        assert not twin.training
        assert not twin.bias.requires_grad
        assert not any(part.requires_grad for part in (twin.stored[0], twin.weight_scale))

    def test_all_zero_weight_and_one_feature(self) -> None:
        plain = nn.Linear(1, 3)
        plain.weight.data.zero_()
        y = qnn.QLinear.from_float(plain)(torch.randn(2, 1))
        assert torch.equal(y, plain.bias.expand(2, 3))
        one = nn.Linear(1, 1)
        x = torch.randn(5, 1)
        torch.testing.assert_close(qnn.QLinear.from_float(one)(x), one(x))

    def test_dequantize(self) -> None:
        for dtype in DTYPES:
            quantised = layer(dtype=dtype)
            plain = quantised.dequantize()
            assert type(plain) is nn.Linear
            assert plain.weight.dtype == dtype
            assert plain.weight.requires_grad
            x = torch.randn(3, 48, dtype=dtype)
            assert qnn.sqnr(plain(x), quantised(x)) > 30


class TestForward:
    @parameterized.expand([(s, d) for s in SCHEMES for d in DTYPES])
    def test_shapes_and_dtypes(self, scheme: str, dtype: torch.dtype) -> None:
        module = layer(scheme, dtype=dtype)
        plain = module.dequantize()
        inputs = {
            "rank 1": torch.randn(48),
            "rank 4": torch.randn(2, 3, 4, 48),
            "one row": torch.randn(1, 48),
            "no rows": torch.randn(0, 48),
            "transposed": torch.randn(48, 5).T,
            "expanded": torch.randn(1, 48).expand(5, 48),
            "sliced": torch.randn(5, 96)[:, ::2],
        }
        for name, x in inputs.items():
            x = x.to(dtype)
            y = module(x)
            assert (y.shape, y.dtype) == ((*x.shape[:-1], 64), dtype), name
            assert y.is_contiguous(), name
            assert y._base is None, name
            if x.numel():
                assert qnn.sqnr(plain(x), y) > 30, name

    @parameterized.expand(
        [
            (torch.randn(3, 47), ValueError, r"must be \[\.\.\., 48\], got \(3, 47\)"),
            (torch.tensor(1.0), ValueError, r"got \(\)"),
            (torch.ones(3, 48, dtype=torch.int64), TypeError, r"got torch.int64.*\.float\(\)"),
            (torch.ones(3, 48, dtype=torch.complex64), TypeError, "got torch.complex64"),
            (
                torch.ones(3, 48).to(torch.float8_e4m3fn),
                TypeError,
                "torch.float8_e4m3fn, a storage dtype",
            ),
            (torch.ones(3, 48, dtype=torch.int8), TypeError, "a storage dtype"),
            (
                torch.ones(3, 48, device="meta"),
                ValueError,
                "the input is on meta, the layer on cpu",
            ),
        ]
    )
    def test_bad_input(self, x: torch.Tensor, kind: Any, message: str) -> None:
        """The same words in eager mode, in a compiled graph and in one that must not break."""
        module = layer()
        name = r"qnn.QLinear\(48, 64, scheme='int8'\): the input .*"
        with pytest.raises(kind, match=name + message.removeprefix("the input ")):
            module(x)
        with pytest.raises(kind, match=message):
            torch.compile(module, backend="aot_eager")(x)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            torch.compile(module, backend="aot_eager", fullgraph=True)(x)


class TestState:
    def test_names_shapes_and_dtypes(self) -> None:
        state = {k: (v.dtype, tuple(v.shape)) for k, v in layer().state_dict().items()}
        assert state == {
            "weight": (torch.int8, (64, 48)),
            "weight_scale": (torch.float32, (64, 1)),
            "bias": (torch.float32, (64,)),
        }
        assert [n for n, p in layer().named_parameters() if p.requires_grad] == ["bias"]
        assert list(layer().buffers()) == []

    def test_round_trips(self) -> None:
        module, x = layer(), torch.randn(3, 48)
        want = module(x)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        fresh = qnn.QLinear(48, 64)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        twins = [fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        on_meta = qnn.QLinear(48, 64, device="meta")
        on_meta.load_state_dict(module.state_dict(), assign=True)
        emptied = qnn.QLinear(48, 64, device="meta").to_empty(device="cpu")
        emptied.load_state_dict(module.state_dict())
        for twin in (*twins, on_meta, emptied):
            assert torch.equal(twin(x), want)
            assert not any(part.requires_grad for part in (twin.stored[0], twin.weight_scale))

    @parameterized.expand([(True,), (False,)])
    def test_a_float_state_is_quantised_on_the_way_in(self, strict: bool) -> None:
        plain = nn.Linear(48, 64)
        for dtype in DTYPES:
            for assign in (False, True):
                module = layer(device="meta" if assign else None)
                state = {k: v.to(dtype) for k, v in plain.state_dict().items()}
                module.load_state_dict(state, strict=strict, assign=assign)
                want = qnn.QLinear.from_float(copy.deepcopy(plain).to(dtype))
                assert torch.equal(module.stored[0], want.stored[0])
                assert torch.equal(module.weight_scale, want.weight_scale)
                assert state["weight"].dtype == dtype  # the caller's dict is its own

    @parameterized.expand([(torch.bfloat16,), (torch.float16,), (torch.float64,)])
    def test_a_scale_of_another_dtype_is_read_as_float32(self, dtype: torch.dtype) -> None:
        state = layer().state_dict()
        state["weight_scale"] = state["weight_scale"].to(dtype)
        for assign in (False, True):
            module = qnn.QLinear(48, 64)
            module.load_state_dict(state, assign=assign)
            assert module.weight_scale.dtype == torch.float32
            assert not module.weight_scale.requires_grad

    @parameterized.expand(
        [
            ("no scale", {"weight_scale": None}, "no weight_scale: the checkpoint is truncated"),
            ("no weight", {"weight": None}, "a weight_scale but no weight"),
            ("shape", {"weight": torch.zeros(3, 48, dtype=torch.int8)}, r"must be int8 \[64, 48\]"),
            ("scale shape", {"weight_scale": torch.ones(64)}, r"float32 \[64, 1\], got .*\[64\]"),
            (
                "scale dtype",
                {"weight_scale": torch.ones(64, 1).int()},
                "is torch.int32, but scheme .int8. stores torch.float32",
            ),
            ("negative", {"weight_scale": -torch.ones(64, 1)}, "positive and finite.*row 0 and 63"),
            ("zero", {"weight_scale": torch.zeros(64, 1)}, "positive and finite"),
            ("nan", {"weight_scale": torch.full((64, 1), torch.nan)}, "positive and finite"),
            ("fp8", {"weight": torch.zeros(64, 48).to(torch.float8_e4m3fn)}, "stores torch.int8"),
            ("packed", {"weight_packed": torch.zeros(1)}, "belongs to another scheme"),
            ("float and scale", {"weight": torch.zeros(64, 48)}, "has a weight_scale too"),
            ("no bias", {"bias": None}, "Missing key.*bias"),
        ]
    )
    def test_bad_state(self, _: str, change: dict[str, Any], message: str) -> None:
        module = layer()
        before = copy.deepcopy(module.state_dict())
        state = {k: v for k, v in {**before, **change}.items() if v is not None}
        for strict in (True, False):
            if "bias" in change and not strict:
                continue
            with pytest.raises(RuntimeError, match=message):
                nn.ModuleDict({"head": module}).load_state_dict(
                    {f"head.{k}": v for k, v in state.items()}, strict=strict
                )
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_nan_in_a_float_state_is_named(self) -> None:
        state = nn.Linear(48, 64).state_dict()
        state["weight"][5, 3] = float("nan")
        with pytest.raises(RuntimeError, match="proj: weight holds NaN or inf in row 5"):
            nn.ModuleDict({"proj": layer()}).load_state_dict(
                {f"proj.{k}": v for k, v in state.items()}
            )

    @parameterized.expand([(torch.bfloat16,), (torch.float16,), (torch.float64,)])
    def test_casts_keep_the_scale(self, dtype: torch.dtype) -> None:
        module = layer()
        scale = module.weight_scale.detach().clone()
        parent = nn.Sequential(module, nn.LayerNorm(64)).to(dtype)
        assert torch.equal(module.weight_scale, scale)
        assert (module.stored[0].dtype, module.bias.dtype) == (torch.int8, dtype)
        assert parent(torch.randn(3, 48, dtype=dtype)).dtype == dtype
        assert module.dequantize().weight.dtype == dtype
        assert str(dtype) in repr(module)
        parent.float()
        assert torch.equal(module.weight_scale, scale)

    def test_type_keeps_the_weight(self) -> None:
        module = layer()
        codes = module.stored[0].clone()
        module.type(torch.float16)
        assert torch.equal(module.stored[0], codes)
        assert module(torch.randn(3, 48).half()).dtype == torch.float16

    @pytest.mark.skipif(not native.ensure().loaded, reason=native.ensure().reason)
    def test_repr_names_the_tier(self) -> None:
        best = next(name for name, state in native.ready().tiers if state == "ok")
        for scheme in ("int8", "int8_weight"):
            text = repr(qnn.QLinear(256, 256, scheme=scheme))
            assert f"cpu: {best}: passed the known-answer test" in text

    def test_repr_names_the_engine_where_there_are_no_kernels(self) -> None:
        if not self_test("onednn").usable:
            pytest.skip("one engine runs all sizes on this CPU")
        absent = native.Status("absent", reason="no C++ compiler")
        with mock.patch.object(native, "ready", return_value=absent):
            small, middle, large = layer(), qnn.QLinear(256, 256), qnn.QLinear(512, 512)
            assert "cpu: exact up to 128 rows, then onednn:" in repr(small)
            assert "cpu: exact up to 8 rows, then onednn:" in repr(middle)
            assert re.search("cpu: onednn: .*; not native: no C.. compiler", repr(large))

    def test_casts_on_meta_and_with_swapped_parameters(self) -> None:
        module = nn.Sequential(qnn.QLinear(4, 4, device="meta")).half()
        assert module[0].weight_scale.dtype == torch.float32
        forked(
            """
            import torch, qnn
            torch.__future__.set_swap_module_params_on_conversion(True)
            layer = torch.nn.Sequential(qnn.QLinear(4, 4)).half()
            assert layer[0].weight_scale.dtype == torch.float32
            assert layer[0].bias.dtype == torch.float16
            """
        )

    def test_reset_parameters(self) -> None:
        module = layer()
        before = module.weight.clone()
        torch.manual_seed(7)
        module.reset_parameters()
        assert not torch.equal(module.weight, before)
        assert qnn.sqnr(module.dequantize()(torch.ones(1, 48)), module(torch.ones(1, 48))) > 30


class TestWhatIsRefused:
    """Strict means strict, in every scheme: what is no number is not loaded or converted."""

    def refused(self, module: nn.Module, state: dict[str, torch.Tensor], message: str) -> None:
        before = copy.deepcopy(module.state_dict())
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=message):
                module.load_state_dict(state, assign=assign)
        for name, tensor in module.state_dict().items():
            assert same_bits(tensor, before[name]), name

    @parameterized.expand([(scheme,) for scheme in qnn.SCHEMES])
    def test_nan_in_any_tensor(self, scheme: str) -> None:
        module = qnn.QLinear.from_float(nn.Linear(128, 16), scheme)
        if scheme.endswith("_static"):
            module.input_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        state = copy.deepcopy(module.state_dict())
        nan = {
            torch.float32: lambda t: t.view(-1)[-1].fill_(torch.nan),
            torch.float8_e4m3fn: lambda t: t.view(torch.uint8).view(-1)[-1].fill_(0xFF),
            torch.uint8: lambda t: t.view(-1)[-1].fill_(255),
        }
        spoilt = 0
        for name, tensor in state.items():
            if tensor.dtype not in nan or name == "weight_packed":
                continue  # every code is a number
            bad = {**state, name: tensor.clone()}
            nan[tensor.dtype](bad[name])
            self.refused(module, bad, f"{name} ")
            spoilt += 1
        assert spoilt >= 2
        module.load_state_dict(state)
        for name in state.keys() - {"weight_shape"}:  # which the layer knows
            missing = {key: value for key, value in state.items() if key != name}
            self.refused(module, missing, name)

    @parameterized.expand([("int8",), ("fp8",), ("nvfp4",)])
    def test_beyond_float32(self, scheme: str) -> None:
        for part in ("weight", "bias"):
            plain = nn.Linear(16, 4, dtype=torch.float64)
            plain._parameters[part].data[1] = 1e300  # type: ignore[union-attr]
            module = qnn.QLinear(16, 4, dtype=torch.float64, scheme=scheme)
            message = "beyond float32, in which scales and sums are, in row 1"
            self.refused(module, plain.state_dict(), f"{part} holds values {message}")
            with pytest.raises(ValueError, match=message):
                qnn.QLinear.from_float(plain, scheme)
            model = nn.Sequential(nn.Linear(16, 16, dtype=torch.float64), plain)
            with pytest.raises(ValueError, match=f"1: its {part} holds values {message}"):
                qnn.convert(model, scheme, inplace=True)
            assert type(model[0]) is nn.Linear

    def test_a_bias_of_another_kind(self) -> None:
        state = layer().state_dict()
        self.refused(layer(), {**state, "bias": torch.ones(64).int()}, "bias must be float")
        self.refused(layer(), {**state, "bias": torch.ones(3)}, r"bias must be \[64\], got \[3\]")


class TestFollowsTheState:
    @parameterized.expand(
        [(bias, quantised) for bias in (True, False) for quantised in (True, False)]
    )
    def test_assigned_dtype(self, bias: bool, quantised: bool) -> None:
        source = nn.Sequential(nn.Linear(48, 64, bias)).bfloat16()
        state = (qnn.convert(source) if quantised else source).state_dict()
        module = qnn.convert(nn.Sequential(nn.Linear(48, 64, bias)))
        module.load_state_dict(state, assign=True)
        want = torch.float32 if quantised and not bias else torch.bfloat16  # nothing says another
        assert (module[0].dtype, module[0].weight.dtype) == (want, want)
        plain = module[0].dequantize()
        assert plain(torch.randn(2, 48, dtype=want)).dtype == want
        copied = qnn.convert(nn.Sequential(nn.Linear(48, 64, bias)))
        copied.load_state_dict(dict(state))  # assign=True is noted in a state's metadata
        assert {copied[0].dtype, copied[0].dequantize().weight.dtype} == {torch.float32}

    def test_pre_hooks_may_rename(self) -> None:
        module, calls = layer(), []

        def rename(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            calls.append(prefix)
            state[prefix + "weight"] = state.pop(prefix + "kernel")

        module.register_load_state_dict_pre_hook(rename)
        plain = nn.Linear(48, 64)
        state = {"0.kernel": plain.weight.detach(), "0.bias": plain.bias.detach()}
        nn.Sequential(module).load_state_dict(state)
        assert calls == ["0."]
        assert torch.equal(module.stored[0], qnn.QLinear.from_float(plain).stored[0])
        assert len(module._load_state_dict_pre_hooks) == 1


class TestOtherInputs:
    """What `nn.Linear` takes besides dense tensors with values."""

    @parameterized.expand(
        [
            (s, t)
            for t in (False, True)
            for s in qnn.SCHEMES
            if not t or qnn.kernels.SCHEMES[s].trainable
        ]
    )
    def test_meta(self, scheme: str, training: bool) -> None:
        with torch.device("meta"):
            model = qnn.convert(nn.Sequential(nn.Linear(128, 64)), scheme, training=training)
            x = torch.empty(3, 128, dtype=torch.bfloat16)
        y = model(x)
        assert (y.shape, y.dtype, y.device.type) == ((3, 64), torch.bfloat16, "meta")

    def layers(self) -> list[nn.Module]:
        calibrated = qnn.prepare(nn.Sequential(nn.Linear(32, 16)))
        calibrated(torch.randn(4, 32))
        return [
            qnn.QLinear(32, 16),
            qnn.QLinear(32, 16, scheme="fp8_weight"),
            qnn.Linear(32, 16, scheme="fp8"),
            qnn.convert(calibrated)[0],
        ]

    def test_jagged(self) -> None:
        parts = [torch.randn(3, 32), torch.randn(5, 32), torch.randn(0, 32)]
        for module in self.layers():
            x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
            want = torch.cat([module(part) for part in parts])
            compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
            for call in (module, compiled) if type(module) is qnn.Linear else (module,):
                y = call(x)
                assert y.layout == torch.jagged
                torch.testing.assert_close(y.values(), want)
                (gradient,) = torch.autograd.grad((y + y).values().sum(), x)
                assert gradient.values().abs().sum().item() > 0
            with pytest.raises(ValueError, match=r"must be .*32.*its last axis"):
                module(x.transpose(1, 2))

    def test_sparse_and_strided_nested_are_refused(self) -> None:
        x = torch.randn(2, 32)
        for module in self.layers():
            name = rf"qnn.{type(module).__name__}\(32, 16, .*the input is "
            for bad in (x.to_sparse(), x.to_sparse_csr()):
                with pytest.raises(TypeError, match=name + r"sparse .*\.to_dense\(\)"):
                    module(bad)
            with pytest.raises(TypeError, match=name + "a nested tensor of strided.*jagged"):
                module(torch.nested.nested_tensor([x, x]))

    def test_leaves_of_symbolic_trace(self) -> None:
        x = torch.randn(4, 32)
        for module in (*self.layers(), qnn.prepare(nn.Sequential(nn.Linear(32, 16)))[0]):
            model = nn.Sequential(module, nn.ReLU())
            graph = torch.fx.symbolic_trace(model)
            kinds = [node.op for node in graph.graph.nodes]
            assert kinds == ["placeholder", "call_module", "call_module", "output"]
            assert graph.get_submodule("0") is module
            assert torch.equal(graph(x), model(x))

    def test_jit_trace_with_its_check(self) -> None:
        x = torch.randn(4, 32)
        for module in self.layers():
            if isinstance(module, qnn.QLinear):
                traced = torch.jit.trace(nn.Sequential(module, nn.ReLU()), x)
                assert torch.equal(traced(x + 1), module(x + 1).relu())
