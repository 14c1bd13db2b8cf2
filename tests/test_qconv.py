"""The quantised convolutions as modules, and their way through the verbs."""

from __future__ import annotations

import copy
import io
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qnn
from qnn.passes import regions

from .common import DTYPES, same_bits

SCHEMES = ("int8", "int8_static", "int8_weight")
# Every argument of torch's layers, and the sizes of an input after its batch.
CASES: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "1d": (nn.Conv1d, (6, 8, 3), {}, (6, 11)),
    "1d causal": (nn.Conv1d, (6, 6, 4), {"padding": 6, "dilation": 2, "groups": 6}, (6, 5)),
    "1d same": (nn.Conv1d, (6, 8, 4), {"padding": "same"}, (6, 9)),
    "2d": (nn.Conv2d, (3, 8, 3), {"stride": 2, "padding": 1}, (3, 9, 10)),
    "2d pointwise": (nn.Conv2d, (6, 4, 1), {"bias": False}, (6, 5, 7)),
    "2d depthwise": (nn.Conv2d, (6, 12, (3, 5)), {"groups": 6, "padding": (1, 2)}, (6, 7, 7)),
    "2d valid": (nn.Conv2d, (4, 6, 3), {"padding": "valid", "groups": 2}, (4, 5, 6)),
    "2d reflect": (nn.Conv2d, (4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (4, 5, 6)),
    "2d circular": (
        nn.Conv2d, (4, 6, (2, 3)), {"padding": "same", "padding_mode": "circular"}, (4, 5, 6),
    ),
    "2d replicate": (
        nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "replicate", "stride": 2}, (4, 5, 6),
    ),
    "3d": (nn.Conv3d, (3, 4, (1, 2, 3)), {"padding": (0, 1, 1), "stride": (1, 2, 1)}, (3, 4, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d, (6, 8, 4), {"stride": 2, "padding": 1}, (6, 7)),
    "transposed 2d": (
        nn.ConvTranspose2d, (6, 8, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, (6, 4, 5),
    ),
    "transposed 2d depthwise": (
        nn.ConvTranspose2d, (6, 6, 3), {"dilation": 2, "groups": 6, "bias": False}, (6, 4, 5),
    ),
    "transposed 3d": (nn.ConvTranspose3d, (4, 2, 2), {"stride": 2}, (4, 2, 3, 2)),
}  # fmt: skip
NAMES = [(name,) for name in CASES]


def plain(case: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind, sizes, options, _ = CASES[case]
    return kind(*sizes, **options, **more).eval()


def image(case: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *CASES[case][-1], generator=torch.Generator().manual_seed(1))


def converted(layer: nn.Module, scheme: str, x: torch.Tensor) -> Any:
    if scheme != "int8_static":
        return qnn.convert(layer, scheme)
    return qnn.convert(qnn.calibrate(qnn.prepare(layer), [x], progress=False))


class TestLayer:
    @parameterized.expand([(name, scheme) for name in CASES for scheme in SCHEMES])
    def test_is_torchs_layer_up_to_rounding(self, case: str, scheme: str) -> None:
        layer, x = plain(case), image(case)
        small = converted(layer, scheme, x)
        assert type(small).__name__ == "Q" + type(layer).__name__
        assert isinstance(small, type(layer))
        want, got = layer(x), small(x)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert qnn.sqnr(want, got) > 33
        # Exactly the dequantised layer, where no activation is rounded.
        if scheme == "int8_weight":
            torch.testing.assert_close(small.dequantize()(x), got, rtol=1e-5, atol=1e-5)
        assert torch.equal(small(x[0]), small(x[:1])[0])
        assert small(x[:0]).shape == (0, *want.shape[1:])

    @parameterized.expand(NAMES)
    def test_state(self, case: str) -> None:
        layer, x = plain(case), image(case)
        small = converted(layer, "int8_static", x)
        out, axes = layer.out_channels, layer.weight.dim()
        state = {k: (v.dtype, tuple(v.shape)) for k, v in small.state_dict().items()}
        assert state == {
            "weight": (torch.int8, tuple(layer.weight.shape)),
            "weight_scale": (torch.float32, (out, *[1] * (axes - 1))),
            "input_scale": (torch.float32, (1,)),
            "input_zero_point": (torch.int8, (1,)),
        } | ({} if layer.bias is None else {"bias": (torch.float32, (out,))})
        # The input channels are the last axis in memory, or the groups' of a transposed layer.
        inner = 0 if layer.transposed else 1
        assert layer.weight.shape[inner] == 1 or small.stored[0].stride(inner) == 1
        assert torch.equal(small.weight, small.dequantize().weight)
        assert qnn.sqnr(layer.weight, small.weight) > 40

    def test_scales_are_those_of_the_outputs(self) -> None:
        """Each output channel's largest weight has the code 127, also of a transposed layer."""
        layer = plain("transposed 2d")
        by_output = layer.weight.view(2, 3, 4, 3, 3).abs().amax((1, 3, 4)).flatten()
        small = qnn.QConvTranspose2d.from_float(layer)
        torch.testing.assert_close(small.weight_scale.flatten(), by_output.detach() / 127)

    @parameterized.expand([(name, dtype) for name in ("2d", "transposed 1d") for dtype in DTYPES])
    def test_dtypes(self, case: str, dtype: torch.dtype) -> None:
        layer, x = plain(case).to(dtype), image(case).to(dtype)
        for scheme in SCHEMES:
            small = converted(layer, scheme, x)
            assert small(x).dtype == dtype
            assert qnn.sqnr(layer(x), small(x)) > 30
            half = copy.deepcopy(small).half()
            assert half.weight_scale.dtype == torch.float32
            assert half.stored[0].dtype == torch.int8
            assert half.weight.dtype == torch.float16
            assert half(x.half()).dtype == torch.float16

    def test_memory_format(self) -> None:
        small, x = qnn.QConv2d.from_float(plain("2d")), image("2d")
        last = x.to(memory_format=torch.channels_last)
        assert small(x).is_contiguous()
        assert small(last).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(small(x), small(last))
        moved = small.to(memory_format=torch.channels_last)
        assert torch.equal(moved(x), small(x))

    def test_output_size(self) -> None:
        layer = nn.ConvTranspose2d(4, 6, 3, stride=3)
        small, x = qnn.QConvTranspose2d.from_float(layer, "int8_weight"), torch.randn(2, 4, 5, 5)
        for size in ([15, 16], (2, 6, 17, 15)):
            want = layer(x, output_size=size)
            torch.testing.assert_close(small(x, size), small.dequantize()(x, size))
            assert small(x, output_size=size).shape == want.shape
        with pytest.raises(ValueError, match="requested an output size"):
            small(x, [2, 2])

    def test_padding_is_exactly_zero(self) -> None:
        """On a grid whose zero is not code 0, and next to values that fill it."""
        layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        layer.weight.data.fill_(1.0)
        x = torch.full((1, 1, 4, 4), 8.0)
        small = converted(layer, "int8_static", torch.cat([x, x * 0 - 1.5]))
        assert int(small.input_zero_point) != 0
        torch.testing.assert_close(small(x), layer(x), rtol=1e-2, atol=0.1)

    def test_a_scale_for_each_sample(self) -> None:
        small, x = qnn.QConv2d.from_float(plain("2d")), image("2d")
        both = torch.cat([x, x * 1000])
        assert torch.equal(small(both)[:2], small(x))

    def test_not_finite(self) -> None:
        x = image("2d", 3)
        x[1, 0, 2, 2] = torch.inf
        for scheme in ("int8", "int8_static"):
            y = converted(plain("2d"), scheme, image("2d"))(x)
            assert not y[1].isfinite().any()
            assert bool(y[[0, 2]].isfinite().all())


class TestConstruction:
    @parameterized.expand([(name, scheme) for name in CASES for scheme in ("int8", "int8_static")])
    def test_torchs_arguments_and_draws(self, case: str, scheme: str) -> None:
        kind, sizes, options, _ = CASES[case]
        made: Any = getattr(qnn, "Q" + kind.__name__)
        torch.manual_seed(0)
        layer = made(*sizes, **options, scheme=scheme)
        twin = made.from_float(plain(case), scheme)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, twin.state_dict()[name]), name
        names = {n: getattr(qnn, n) for n in dir(qnn) if n.startswith("Q")}
        again = eval(repr(layer).split("  #")[0].replace(", not calibrated", ""), names)  # noqa: S307
        assert repr(again) == repr(layer)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in layer.state_dict().items()
        }

    def test_torchs_positional_arguments(self) -> None:
        args = (4, 6, 3, 2, 1, 1, 2, False, "zeros", "cpu", torch.bfloat16)
        assert qnn.QConv2d(*args).extra_repr() == (
            "4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False, "
            "dtype=torch.bfloat16, scheme='int8'"
        )
        up = qnn.QConvTranspose1d(4, 6, 3, 2, 1, 1, 2, False, 1, "zeros", "cpu", torch.bfloat16)
        assert "output_padding=(1,), groups=2, bias=False" in repr(up)

    @parameterized.expand(
        [
            ((4, 6, 3), {"scheme": "fp8"}, ValueError, "'fp8' has no convolution; use .*'int8_we"),
            ((4, 6, 3), {"scheme": "int9"}, ValueError, "known schemes"),
            ((4, 6, 3), {"groups": 3}, ValueError, "divisible by groups"),
            ((4, 6, 3), {"dtype": torch.int8}, TypeError, "dtype must be one of torch.float32"),
            ((4, 6, 0), {}, ValueError, "at least 1"),
            ((4, 6, 3), {"padding": "full"}, ValueError, "padding"),
            ((4, 6, 3), {"stride": 2, "padding": "same"}, ValueError, "same"),
            ((4, 6, 3), {"bais": True}, TypeError, "bais"),
            ((20000, 1, 3), {"device": "meta"}, ValueError, "at most 132104 products.*= 180000"),
        ]
    )
    def test_bad_arguments(self, sizes: Any, options: Any, kind: Any, message: str) -> None:
        with pytest.raises(kind, match=message):
            qnn.QConv2d(*sizes, **options)

    def test_from_float_refuses(self) -> None:
        with pytest.raises(TypeError, match=r"QConv2d.from_float takes an nn.Conv2d, got Conv1d"):
            qnn.QConv2d.from_float(nn.Conv1d(1, 1, 1))
        with pytest.raises(TypeError, match="got QConv2d"):
            qnn.QConv2d.from_float(qnn.QConv2d(1, 1, 1))
        with pytest.raises(TypeError, match=r"LazyConv2d is not initialised.*run one batch first"):
            qnn.QConv2d.from_float(nn.LazyConv2d(4, 3))
        with pytest.raises(
            TypeError, match=r"from_observed takes a qnn.ObservedConv2d, got Conv2d"
        ):
            qnn.QConv2d.from_observed(nn.Conv2d(1, 1, 1))
        bad = nn.ConvTranspose2d(2, 4, 3)
        bad.weight.data[1, 2] = torch.nan
        with pytest.raises(ValueError, match="weight holds NaN or inf"):
            qnn.QConvTranspose2d.from_float(bad)

    @parameterized.expand(
        [
            (
                torch.randn(2, 4, 9, 9),
                ValueError,
                r"must be \[batch, 3, h, w\] or \[3, h, w\], got",
            ),
            (torch.randn(3, 9), ValueError, r"got \(3, 9\)"),
            (torch.ones(2, 3, 9, 9, dtype=torch.int64), TypeError, r"got torch.int64.*\.float\(\)"),
            (torch.ones(2, 3, 9, 9, device="meta"), ValueError, "on meta, the layer on cpu"),
            (torch.randn(2, 3, 9, 9).to_sparse(), TypeError, r"sparse .*\.to_dense\(\)"),
            ([1], TypeError, "the input must be a tensor, got list"),
            (torch.nested.nested_tensor([torch.randn(3, 9, 9)]), TypeError, "to_padded_tensor"),
        ]
    )
    def test_bad_input(self, x: Any, kind: Any, message: str) -> None:
        with pytest.raises(kind, match=f"qnn.QConv2d.*{message}"):
            qnn.QConv2d(3, 4, 3)(x)

    def test_a_kernel_larger_than_the_image(self) -> None:
        with pytest.raises(ValueError, match="larger image"):
            qnn.QConv2d(3, 4, 5)(torch.randn(1, 3, 4, 4))


class TestState:
    @parameterized.expand([(name,) for name in ("1d", "2d depthwise", "3d", "transposed 2d")])
    def test_round_trips(self, case: str) -> None:
        x = image(case)
        for scheme in SCHEMES:
            module = converted(plain(case), scheme, x)
            want, file = module(x), io.BytesIO()
            torch.save(module.state_dict(), file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            kind, sizes, options, _ = CASES[case]
            made: Any = getattr(qnn, "Q" + kind.__name__)
            fresh = made(*sizes, **options, scheme=scheme)
            fresh.load_state_dict(state)
            on_meta = made(*sizes, **options, scheme=scheme, device="meta")
            on_meta.load_state_dict(state, assign=True)
            for twin in (fresh, on_meta, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(twin(x), want)
                assert twin.stored[0].stride() == module.stored[0].stride()
                assert not twin.stored[0].requires_grad

    def test_safetensors(self) -> None:
        files = pytest.importorskip("safetensors.torch")
        model = qnn.convert(nn.Sequential(plain("2d"), nn.ConvTranspose2d(8, 3, 2)))
        x = image("2d")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.safetensors")
            files.save_model(model, path)
            other = qnn.convert(nn.Sequential(plain("2d"), nn.ConvTranspose2d(8, 3, 2)))
            files.load_model(other, path)
        assert torch.equal(other(x), model(x))

    @parameterized.expand([("2d",), ("transposed 2d",)])
    def test_a_float_state_is_quantised_on_the_way_in(self, case: str) -> None:
        source = plain(case)
        for assign in (False, True):
            module = qnn.convert(nn.Sequential(copy.deepcopy(source)))
            module[0].weight = torch.zeros_like(source.weight)
            module.load_state_dict(
                {f"0.{k}": v for k, v in source.state_dict().items()}, assign=assign
            )
            want = qnn.convert(source)
            assert torch.equal(module[0].stored[0], want.stored[0])
            assert torch.equal(module[0].weight_scale, want.weight_scale)

    @parameterized.expand(
        [
            ({"weight_scale": None}, "the state has no weight_scale"),
            ({"weight_scale": torch.zeros(8, 1, 1, 1)}, "must be positive and finite"),
            ({"weight_scale": torch.ones(8, 1)}, r"must be float32 \[8, 1, 1, 1\]"),
            ({"weight": torch.zeros(8, 3, 3, 1, dtype=torch.int8)}, r"int8 \[8, 3, 3, 3\]"),
            ({"input_scale": torch.ones(1)}, "belongs to another scheme"),
        ]
    )
    def test_bad_state(self, change: Any, message: str) -> None:
        module = qnn.QConv2d.from_float(plain("2d"))
        before = copy.deepcopy(module.state_dict())
        state = {k: v for k, v in {**before, **change}.items() if v is not None}
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(state, strict=False)
        assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())

    def test_the_weight_view(self) -> None:
        for case in ("2d", "transposed 2d"):
            module = qnn.convert(plain(case))
            module.weight = torch.zeros_like(module.weight)
            module.weight.data += 1
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            with pytest.raises(TypeError, match="takes floats"):
                module.weight = torch.zeros(3, dtype=torch.int8)
            with pytest.raises(TypeError, match="cannot be trained"):
                module.requires_grad_()

    def test_static_without_a_grid(self) -> None:
        module = qnn.QConv2d(3, 4, 3, scheme="int8_static")
        assert "not calibrated" in repr(module)
        with pytest.raises(RuntimeError, match="the layer is not calibrated"):
            module(torch.randn(1, 3, 5, 5))


class TestGraphs:
    @parameterized.expand(
        [
            ("1d same", "int8", False),
            ("2d reflect", "int8_static", True),
            ("transposed 2d", "int8_weight", False),
        ]
    )
    def test_compiled_and_exported(self, case: str, scheme: str, strict: bool) -> None:
        x = image(case)
        small = converted(plain(case), scheme, x)
        want = small(x)
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want)
        exported = torch.export.export(small, (x,), strict=strict)
        assert torch.equal(exported.module()(x), want)
        (region,) = regions(exported)
        assert region.scheme == scheme

    def test_dynamic_sizes(self) -> None:
        torch._dynamo.reset()
        small = qnn.convert(nn.Sequential(plain("2d"), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, 2)))
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(small, fullgraph=True, backend=counter, dynamic=True)
        for b, h, w in ((2, 9, 10), (3, 17, 8), (4, 12, 31)):
            x = torch.randn(b, 3, h, w)
            assert torch.equal(compiled(x), small(x))
        assert counter.frame_count == 1

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        small, x = qnn.convert(nn.Sequential(plain("2d"), nn.ReLU())), image("2d")
        assert torch.equal(torch.compile(small, fullgraph=True)(x), small(x))

    @parameterized.expand([("1d",), ("2d circular",), ("3d",), ("transposed 1d",)])
    def test_gradient_to_the_input(self, case: str) -> None:
        for scheme in SCHEMES:
            x = image(case).requires_grad_()
            small = converted(plain(case), scheme, image(case))
            line = small.dequantize()
            dy = torch.randn_like(line(x))
            (want,) = torch.autograd.grad(line(x), x, dy)
            runs = [small]
            if (case, scheme) in (("2d circular", "int8"), ("transposed 1d", "int8_static")):
                runs.append(torch.compile(small, fullgraph=True, backend="aot_eager"))
            for run in runs:
                (got,) = torch.autograd.grad(run(x), x, dy)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_gradient_to_the_bias(self) -> None:
        for case in ("2d", "transposed 1d"):
            small = qnn.convert(plain(case))
            y = small(image(case))
            y.sum().backward()
            count = float(y.numel() / y.shape[1])
            torch.testing.assert_close(small.bias.grad, torch.full_like(small.bias, count))

    def test_leaves_of_symbolic_trace_and_jit_trace(self) -> None:
        x = image("2d")
        for module in (qnn.convert(plain("2d")), qnn.prepare(plain("2d"))):
            model = nn.Sequential(module, nn.ReLU())
            graph = torch.fx.symbolic_trace(model)
            assert [n.op for n in graph.graph.nodes][1:3] == ["call_module", "call_module"]
            assert torch.equal(graph(x), model(x))
        traced = torch.jit.trace(qnn.convert(nn.Sequential(plain("2d"))), x)
        assert torch.equal(traced(x + 1), qnn.convert(nn.Sequential(plain("2d")))(x + 1))

    def test_meta(self) -> None:
        with torch.device("meta"):
            model = qnn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2)))
            y = model(torch.empty(2, 3, 8, 8, dtype=torch.bfloat16))
        assert (y.shape, y.dtype, y.device.type) == ((2, 2, 7, 7), torch.bfloat16, "meta")

    def test_operations_are_counted(self) -> None:
        for case in ("2d depthwise", "transposed 1d"):
            counts = []
            for module in (plain(case), qnn.convert(plain(case))):
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    module(image(case))
                counts.append(counter.get_total_flops())
            assert counts[0] == counts[1]

    def test_autocast(self) -> None:
        small, x = qnn.convert(plain("2d")), image("2d")
        with torch.autocast("cpu", torch.bfloat16):
            assert small(x).dtype == torch.bfloat16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.up(self.body(self.stem(x))).mean((2, 3)))
        return y


class TestVerbs:
    def test_convert_summary_compare(self) -> None:
        torch.manual_seed(0)
        model, x = Net().eval(), torch.randn(4, 3, 9, 9)
        small = qnn.convert(model)
        rows = {row.name: row for row in qnn.summary(small).rows}
        kinds = [type(small.get_submodule(name)).__name__ for name in rows]
        assert kinds == ["QConv2d", "QConv2d", "BatchNorm2d", "QConvTranspose2d", "QLinear"]
        assert rows["stem"].shape == (8, 3, 3, 3)
        assert rows["stem"].bytes_after == 8 * 27 + 8 * 4 + 8 * 4
        assert {row.name for row in qnn.compare(model, small, x).rows} >= {"stem", "up"}
        assert qnn.sqnr(model(x), small(x)) > 25

    def test_fuse_calibrate_convert(self) -> None:
        torch.manual_seed(0)
        model, x = Net().eval(), torch.randn(4, 3, 9, 9)
        small = qnn.convert(qnn.calibrate(qnn.prepare(qnn.fuse(model)), [x], progress=False))
        rows = {row.name: row for row in qnn.summary(small).rows}
        assert {row.scheme for row in rows.values()} == {"int8_static"}
        assert "body.2" not in rows
        assert (rows["body.1"].backend or "").endswith("; BatchNorm body.2 folded in")
        assert qnn.sqnr(model(x), small(x)) > 25

    def test_trained_for_the_grid(self) -> None:
        torch.manual_seed(0)
        model, x = qnn.fuse(Net().eval()), torch.randn(4, 3, 9, 9)
        prepared = qnn.prepare(model, qat=True).train()
        assert type(prepared.up) is qnn.ObservedConvTranspose2d
        optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            prepared(x).square().mean().backward()
            assert all(p.grad is not None for p in prepared.parameters())
            optimizer.step()
        prepared.eval()
        small = qnn.convert(prepared)
        assert qnn.sqnr(prepared(x), small(x)) > 60

    def test_prepared_goes_on_to_training(self) -> None:
        model, x = nn.Sequential(nn.Conv1d(3, 4, 3)), torch.randn(2, 3, 8)
        calibrated = qnn.calibrate(qnn.prepare(model), [x], progress=False)
        assert torch.equal(calibrated(x), model(x))
        trained = qnn.prepare(calibrated, qat=True)
        assert not torch.equal(trained.eval()(x), model(x))
        assert isinstance(qnn.convert(trained)[0], qnn.QConv1d)

    def test_other_schemes_leave_them(self) -> None:
        small = qnn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(32, 4)), "fp8")
        reasons = {row.name: row.reason for row in qnn.summary(small).rows}
        assert reasons["0"] == (
            "scheme 'fp8' has no convolution; use one of 'int8', 'int8_static', 'int16', "
            "'int16_static', 'int8_weight'"
        )
        with pytest.raises(ValueError, match="no convolution that trains in low precision"):
            qnn.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "fp8", training=True)

    def test_subclasses(self) -> None:
        class Built(nn.Conv2d):
            def __init__(self) -> None:
                super().__init__(3, 3, 3)

        class More(Built):
            def area(self) -> int:
                return 9

        class Same(nn.Conv2d):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))

        model = nn.Sequential(Built(), More(), Same(3, 3, 2))
        small = qnn.convert(model)
        assert [type(layer) for layer in small] == [qnn.QConv2d, More, Same]
        reasons = {row.name: row.reason or "" for row in qnn.summary(small).rows}
        assert "name it in include to convert it" in reasons["1"]
        assert "with a forward, and so a meaning of its own" in reasons["2"]
        assert isinstance(qnn.convert(model, include=More)[1], qnn.QConv2d)

    @parameterized.expand(
        [
            (lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3)), "parametrized"),
            (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(3, 4, 3)), "parametrized"),
            (
                lambda: nn.utils.weight_norm(nn.Conv1d(3, 4, 3)),
                "weight_v, weight_g.*remove_weight_norm",
            ),
            (lambda: nn.LazyConv1d(4, 3), "not initialised.*run one batch first"),
        ]
    )
    @pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
    def test_unsupported(self, make: Any, message: str) -> None:
        model = nn.Sequential(make(), nn.Conv1d(4, 4, 1))
        lazy = "Lazy" in repr(model)
        for verb in (qnn.convert, qnn.prepare):
            with pytest.raises(ValueError, match=f"0: .*{message}"):
                verb(model, include=None if lazy else ["0", "1"])
        if not lazy:
            skipped = qnn.convert(model, inplace=True)
            assert isinstance(skipped[1], qnn.QConv1d)
            first, *_ = qnn.summary(skipped).rows
            assert re.search(message, first.reason or "")

    def test_tied(self) -> None:
        model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in "ab"), nn.ConvTranspose2d(4, 4, 3))
        model[1].weight = model[0].weight
        small = qnn.convert(model)
        assert small[1].stored[0] is small[0].stored[0]
        model[2].weight = model[0].weight
        with pytest.raises(ValueError, match="holds it in another form"):
            qnn.convert(model)

    def test_in_place_and_on_other_codes(self) -> None:
        x = torch.randn(2, 3, 9, 9)
        model = Net().eval()
        want = qnn.convert(model)(x)
        assert same_bits(qnn.convert(model, inplace=True)(x), want)
