"""The scheme `int8_static`: the op against its reference on every kernel, and the layer."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
import qnn.functional as F
from qnn.kernels import OPS, get_scheme
from qnn.kernels.cpu import int8_linear as cpu
from qnn.kernels.cpu.engines import ENGINES, self_test
from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.formats.int8 import INT8_STATIC_MAX_K
from qnn.kernels.reference.int8 import static_linear_reference
from qnn.nn.linear.observed import fake_quantize_weight

from .common import DTYPES, SIZES, python_kernels, same_bits, weights

POINTS = (0, 5, -128, 127)
SPECS = {
    "int8": None,
    "uint8": qnn.QuantSpec(torch.uint8),
    "symmetric int8": qnn.QuantSpec(torch.int8, symmetric=True, observer="mse"),
    "symmetric uint8": qnn.QuantSpec(torch.uint8, symmetric=True),
}


def grid(zero_point: int, scale: float = 0.03) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int8)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return same_bits(
        got.nan_to_num(77.5, math.inf, -math.inf), want.nan_to_num(77.5, math.inf, -math.inf)
    )


def calibrated(
    spec: qnn.QuantSpec | None = None, qat: bool = False, bias: bool = True
) -> tuple[qnn.ObservedLinear, qnn.QLinear]:
    torch.manual_seed(0)
    observed = qnn.ObservedLinear.from_float(nn.Linear(48, 32, bias), spec, qat)
    qnn.calibrate(observed, [torch.randn(64, 48) + 0.5 for _ in range(3)])
    return observed.eval(), qnn.QLinear.from_observed(observed)


class TestOp:
    @parameterized.expand(itertools.product(POINTS, ("op", *ENGINES)))
    def test_equals_reference(self, zero_point: int, kernel: str) -> None:
        """Bit for bit, on the C++ kernel of this CPU and on each engine."""
        if kernel != "op" and not self_test(kernel).usable:
            pytest.skip(self_test(kernel).reason)
        run = (
            torch.ops.qnn.int8_static_linear
            if kernel == "op"
            else lambda *args: cpu.static_linear(*args, engine=ENGINES[kernel])
        )
        for (m, k, n), dtype in itertools.product(SIZES, (torch.float32, torch.bfloat16)):
            w, sw = weights(n, k)
            x = torch.randn(m, k)
            x[-1] *= 1e20  # clamped to an end
            args = (x.to(dtype), w, sw, *grid(zero_point), torch.randn(n))
            assert same(run(*args), static_linear_reference(*args)), (m, k, n)

    def test_means_what_the_formula_says(self) -> None:
        """By NumPy's integers."""
        w, sw = weights(19, 37)
        (sx, zx), x = grid(-9), torch.randn(5, 37) * 2
        v = np.rint(x.numpy() * (np.float32(1) / sx.numpy()))
        q = np.clip(v.astype(np.int64) - 9, -128, 127)
        assert (q == -128).any()
        assert (q == 127).any()
        acc = (q + 9) @ w.numpy().astype(np.int64).T
        want = acc.astype(np.float32) * sw.numpy()[:, 0] * sx.numpy()
        got = torch.ops.qnn.int8_static_linear(x, w, sw, sx, zx)
        assert np.array_equal(got.numpy(), want)

    @parameterized.expand(itertools.product(DTYPES, OPS["int8_linear"].choices["activation"]))
    def test_epilogue(self, dtype: torch.dtype, activation: str) -> None:
        w, sw = weights(63, 37)
        op = torch.ops.qnn.int8_static_linear
        for lead in ((5,), (2, 3), (), (0,)):
            x, bias = torch.randn(*lead, 37).to(dtype), torch.randn(63)
            residual = torch.randn(*lead, 63).to(dtype)
            got = op(x, w, sw, *grid(4), bias, residual, activation)
            plain = op(x, w, sw, *grid(4), bias)
            want = ACTIVATIONS[activation](plain.clone()) + residual
            assert (got.dtype, got.shape) == (dtype, want.shape)
            rounding = torch.finfo(dtype).eps * want.abs().amax() if want.numel() else 0
            torch.testing.assert_close(got, want, rtol=0, atol=float(2 * rounding + 2e-6))

    @parameterized.expand([(bad,) for bad in (math.nan, math.inf, -math.inf)])
    def test_non_finite_rows(self, bad: float) -> None:
        """NaN in that row's outputs, whatever is behind them, and in no other's."""
        w, sw = weights(33, 64)
        w[3] = 0
        for kernel, point in itertools.product(("op", "python"), (0, 7)):
            x = torch.randn(40, 64)
            run = torch.ops.qnn.int8_static_linear if kernel == "op" else cpu.static_linear
            clean = run(x, w, sw, *grid(point), None)
            for at in (0, 63):
                dirty = x.clone()
                dirty[2, at] = bad
                y = run(dirty, w, sw, *grid(point), torch.zeros(33))
                assert bool(y[2].isnan().all())
                keep = torch.arange(40) != 2
                assert torch.equal(y[keep], clean[keep])

    @parameterized.expand([(s,) for s in (0.0, -0.1, 1e-40, math.nan, math.inf)])
    def test_a_scale_that_is_none(self, scale: float) -> None:
        w, sw = weights(9, 8)
        for run in (torch.ops.qnn.int8_static_linear, cpu.static_linear, static_linear_reference):
            y = run(torch.randn(3, 8), w, sw, *grid(3, scale), torch.ones(9))
            assert bool(y.isnan().all())

    def test_the_longest_row(self) -> None:
        """All sums of one sign, at their largest, as the scheme admits; 32 bits just hold them."""
        k = INT8_STATIC_MAX_K
        x, w = torch.full((2, k), 1e9), torch.full((3, k), -128, dtype=torch.int8)
        x[1] = -1e9
        for point in (-128, 127):
            args = (x, w, torch.ones(3, 1), *grid(point, 1.0))
            want = static_linear_reference(*args)
            assert want.abs().max().item() == np.float32(255 * 128 * k)
            for rows in (2, 40):
                wide = x.repeat(rows // 2, 1)
                got = torch.ops.qnn.int8_static_linear(wide, *args[1:])
                assert torch.equal(got, want.repeat(rows // 2, 1))
            assert torch.equal(cpu.static_linear(*args, None), want)
        assert 255 * 128 * (k + 1) > 2**31 - 1

    @parameterized.expand(
        [
            ({"sx": torch.ones(2)}, r"sx must be \[1\], got \[2\]"),
            ({"zx": torch.zeros((), dtype=torch.int8)}, r"zx must be \[1\], got \[\]"),
            ({"sx": torch.ones(1).double()}, r"sx must be one of torch.float32"),
            ({"zx": torch.zeros(1, dtype=torch.uint8)}, r"zx must be one of torch.int8"),
            ({"w": torch.ones(5, 7, dtype=torch.int8)}, r"w must be \[n, k\] with k = 8 as in x"),
        ]
    )
    def test_errors(self, wrong: dict[str, torch.Tensor], message: str) -> None:
        w = torch.ones(5, 8, dtype=torch.int8)
        sx, zx = grid(0)
        args = {"x": torch.randn(3, 8), "w": w, "sw": torch.ones(5, 1), "sx": sx, "zx": zx}
        with pytest.raises((ValueError, TypeError), match=message):
            torch.ops.qnn.int8_static_linear(*(args | wrong).values())

    def test_gradient(self) -> None:
        """Straight through: dy · (w · sw), to any order; the grid has none."""
        w, sw = weights(9, 16)
        x = torch.randn(4, 16, requires_grad=True)
        bias = torch.zeros(9, requires_grad=True)
        sx, zx = grid(3)
        y = F.linear(x, w, sw, bias, input_scale=sx, input_zero_point=zx, scheme="int8_static")
        dy = torch.randn(4, 9, requires_grad=True)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        torch.testing.assert_close(dx, dy @ (w * sw))
        (again,) = torch.autograd.grad(dx.square().sum(), dy)
        torch.testing.assert_close(again, 2 * (dy @ (w * sw)) @ (w * sw).T)
        (db,) = torch.autograd.grad(
            F.linear(x, w, sw, bias, input_scale=sx, input_zero_point=zx, scheme="int8_static"),
            bias, torch.ones(4, 9),
        )  # fmt: skip
        assert db.tolist() == [4.0] * 9

        def layer(x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, w, sw, input_scale=sx, input_zero_point=zx, scheme="int8_static")

        tangent = torch.randn(4, 16)
        _, got = torch.func.jvp(layer, (x.detach(),), (tangent,))
        torch.testing.assert_close(got, tangent @ (w * sw).T)

    def test_functional_errors(self) -> None:
        w, sw = weights(5, 8)
        sx, zx = grid(0)
        x = torch.randn(2, 8)
        with pytest.raises(ValueError, match="needs input_scale and input_zero_point"):
            F.linear(x, w, sw, input_scale=sx, scheme="int8_static")
        with pytest.raises(ValueError, match="scheme 'int8' takes no input_scale"):
            F.linear(x, w, sw, input_scale=sx, input_zero_point=zx)


def test_every_tier(tier: str) -> None:
    for (m, k, n), point in itertools.product(SIZES, POINTS):
        w, sw = weights(n, k)
        for dtype in DTYPES[:2] if point else DTYPES:
            x = torch.randn(m, 2 * k)[:, ::2] if point == 5 else torch.randn(m, k)
            args = (x.to(dtype), w, sw, *grid(point), torch.randn(n), torch.randn(m, n).to(dtype))
            got = torch.ops.qnn.cpu_static_linear(*args, "relu", tier)
            assert same(got, static_linear_reference(*args, "relu")), (m, k, n, point, dtype)


class TestLayer:
    @parameterized.expand(itertools.product(SPECS, (False, True), (False, True)))
    def test_from_observed(self, spec: str, qat: bool, bias: bool) -> None:
        """In evaluation the trained layer computes what the quantised one does."""
        observed, layer = calibrated(SPECS[spec], qat, bias)
        x = torch.randn(200, 48) * 1.5 + 0.5  # some beyond the range
        assert (layer.input_zero_point.item() == 0) == ("symmetric" in spec)
        assert qnn.sqnr(observed(x), layer(x)) > (60 if qat else 25)
        assert torch.equal(layer.stored[0], F.quantize(observed.weight)[0])
        assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")

    def test_float_while_observing(self) -> None:
        plain = nn.Linear(48, 32)
        observed = qnn.ObservedLinear.from_float(plain)
        x = torch.randn(5, 48)
        assert torch.equal(observed(x), plain(x))
        assert observed.weight is plain.weight
        assert observed.bias is plain.bias
        assert "qat=False" in repr(observed)

    @parameterized.expand([(dtype,) for dtype in DTYPES])
    def test_weights_are_those_that_are_stored(self, dtype: torch.dtype) -> None:
        weight = torch.randn(6, 9).to(dtype)
        weight[2] = 0
        weight.requires_grad_()
        got = fake_quantize_weight(weight)
        q, scale = F.quantize(weight.detach())
        assert torch.equal(got, F.dequantize(q, scale, dtype))
        got.sum().backward()
        assert torch.equal(weight.grad, torch.ones_like(weight))

    def test_training_lowers_the_loss(self) -> None:
        torch.manual_seed(1)
        observed = qnn.ObservedLinear.from_float(nn.Linear(16, 4), qat=True)
        x, target = torch.randn(64, 16), torch.randn(64, 4)
        optimizer = torch.optim.SGD(observed.parameters(), lr=0.1)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (observed(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        layer = qnn.QLinear.from_observed(observed)
        assert qnn.sqnr(observed.eval()(x), layer(x)) > 60

    @parameterized.expand(
        [
            (qnn.QuantSpec(torch.int16), "QuantSpec\\(torch.int16, symmetric=True\\), got"),
            (qnn.QuantSpec(torch.int8, channel_axis=0), "channel_axis must be None"),
            (qnn.QuantSpec(torch.uint8, qmax=127), "uses all of 0 … 255, got a spec of 0 … 127"),
        ]
    )
    def test_specs_without_a_form(self, spec: qnn.QuantSpec, message: str) -> None:
        with pytest.raises(ValueError, match=f"qnn.ObservedLinear: .*{message}"):
            qnn.ObservedLinear(4, 4, spec=spec)

    def test_needs_calibration(self) -> None:
        with pytest.raises(ValueError, match=r"'up.input': nothing was observed"):
            qnn.QLinear.from_observed(qnn.ObservedLinear.from_float(nn.Linear(4, 4), name="up"))
        with pytest.raises(TypeError, match=r"takes a qnn.ObservedLinear, got Linear"):
            qnn.QLinear.from_observed(nn.Linear(4, 4))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"takes an nn.Linear, got QLinear"):
            qnn.ObservedLinear.from_float(qnn.QLinear(4, 4))

    def test_not_calibrated(self) -> None:
        """An error, in every mode, and repr says why."""
        message = r"qnn.QLinear\(4, 3, .*\): the layer is not calibrated.*Load a state.*qnn.prepare"
        x = torch.randn(2, 4)
        for layer in (
            qnn.QLinear(4, 3, scheme="int8_static"),
            qnn.QLinear.from_float(nn.Linear(4, 3), "int8_static"),
        ):
            assert "not calibrated" in repr(layer)
            for call in (layer, torch.compile(layer, backend="eager")):
                with pytest.raises(RuntimeError, match=message):
                    call(x)
            torch._dynamo.reset()
            with pytest.raises(torch._dynamo.exc.Unsupported, match="not calibrated"):
                torch.compile(layer, backend="eager", fullgraph=True)(x)
            for strict in (False, True):
                with pytest.raises(Exception, match="not calibrated"):
                    torch.export.export(layer, (x,), strict=strict)
        assert "not calibrated" not in repr(calibrated()[1])

    @parameterized.expand([("convert", False), ("meta", True)])
    def test_a_saved_state_calibrates(self, _: str, meta: bool) -> None:
        """A static model is built without data, and filled from a state."""
        model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))
        x = torch.randn(5, 48)
        prepared = qnn.prepare(model)
        prepared(x)
        want = qnn.convert(prepared)
        with torch.device("meta" if meta else "cpu"):
            fresh = qnn.convert(
                nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8)), "int8_static"
            )
            assert (fresh(torch.randn(5, 48)).shape if meta else (5, 8)) == (5, 8)
        assert "not calibrated" in str(qnn.summary(fresh))
        fresh.load_state_dict(want.state_dict(), assign=meta)
        for twin in (fresh, copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
            assert torch.equal(twin(x), want(x))
            assert "not calibrated" not in repr(twin) + str(qnn.summary(twin))
        compiled = torch.compile(fresh, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), want(x))

    def test_a_grid_by_hand_calibrates(self) -> None:
        x, (_, done) = torch.randn(5, 48), calibrated()
        fresh = qnn.QLinear(48, 32, scheme="int8_static")
        with torch.no_grad():
            for name, parameter in fresh.named_parameters():
                parameter.copy_(dict(done.named_parameters())[name])
        assert torch.equal(fresh(x), done(x))
        other = qnn.QLinear.from_float(done.dequantize(), "int8_static")
        other.input_scale, other.input_zero_point = done.input_scale, done.input_zero_point
        assert "not calibrated" not in repr(other)
        other(x)

    def test_size(self) -> None:
        with pytest.raises(ValueError, match=f"at most {INT8_STATIC_MAX_K}"):
            qnn.QLinear(INT8_STATIC_MAX_K + 1, 2, device="meta", scheme="int8_static")
        qnn.QLinear(INT8_STATIC_MAX_K, 2, device="meta", scheme="int8_static")

    def test_state(self) -> None:
        _, layer = calibrated()
        x = torch.randn(5, 48)
        want = layer(x)
        state = layer.state_dict()
        assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
            "weight": (torch.int8, (32, 48)),
            "weight_scale": (torch.float32, (32, 1)),
            "input_scale": (torch.float32, (1,)),
            "input_zero_point": (torch.int8, (1,)),
            "bias": (torch.float32, (32,)),
        }
        with torch.device("meta"):
            loaded = qnn.QLinear(48, 32, scheme="int8_static")
        loaded.load_state_dict(state, assign=True)
        fresh = qnn.QLinear(48, 32, scheme="int8_static")
        fresh.load_state_dict(state)
        twins = [loaded, fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        for twin in twins:
            assert torch.equal(twin(x), want)
            assert not twin.input_scale.requires_grad
        half = copy.deepcopy(layer).half()
        assert torch.equal(half.input_scale, layer.input_scale)
        assert half.input_zero_point.dtype == torch.int8
        assert half(x.half()).dtype == torch.float16

    def test_safetensors(self) -> None:
        safetensors = pytest.importorskip("safetensors.torch", reason="needs the extra 'dev'")
        _, layer = calibrated()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "layer.safetensors"
            safetensors.save_file(layer.state_dict(), path)
            twin = qnn.QLinear(48, 32, scheme="int8_static")
            twin.load_state_dict(safetensors.load_file(path))
        x = torch.randn(5, 48)
        assert torch.equal(twin(x), layer(x))

    def test_foreign_states(self) -> None:
        """A scalar, a narrower float and no zero point are how others write a symmetric grid. What
        is missing may also be lost: the caller has to say that it is zero.
        """
        _, layer = calibrated(SPECS["symmetric int8"])
        state = layer.state_dict()
        del state["input_zero_point"]
        state["input_scale"] = state["input_scale"].to(torch.bfloat16)[0]
        twin = qnn.QLinear(48, 32, scheme="int8_static")
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"no input_zero_point; .*add zeros"):
                twin.load_state_dict(state, strict=strict)
        assert "not calibrated" in repr(twin)
        twin.load_state_dict({**state, "input_zero_point": torch.zeros(1, dtype=torch.int8)})
        assert twin.input_scale.item() == state["input_scale"].item()
        assert twin.input_zero_point.item() == 0

    @parameterized.expand(
        [
            ({"input_scale": None}, "the state has no input_scale; scheme 'int8_static' needs"),
            ({"input_scale": torch.zeros(1)}, "input_scale must be positive and finite"),
            ({"input_scale": torch.tensor([math.nan])}, "input_scale must be positive and finite"),
            ({"input_scale": torch.ones(2)}, r"input_scale must be float32 \[1\]"),
            ({"input_zero_point": torch.zeros(1)}, "input_zero_point is torch.float32"),
            ({"weight_scale": None}, "the state has no weight_scale"),
            (
                {"weight": torch.randn(32, 48), "weight_scale": None, "input_scale": None},
                "no input",
            ),
        ]
    )
    def test_states_that_are_refused(self, change: dict[str, Any], message: str) -> None:
        _, layer = calibrated()
        state = {**layer.state_dict(), **change}
        state = {name: value for name, value in state.items() if value is not None}
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_other_schemes_refuse_the_state(self) -> None:
        with pytest.raises(
            RuntimeError, match="input_scale, input_zero_point belongs to another scheme"
        ):
            qnn.QLinear(48, 32).load_state_dict(calibrated()[1].state_dict())

    def test_float_weights_are_quantised_on_the_way_in(self) -> None:
        _, layer = calibrated()
        weight = torch.randn(32, 48)
        state = {**layer.state_dict(), "weight": weight}
        del state["weight_scale"]
        layer.load_state_dict(state)
        assert torch.equal(layer.stored[0], F.quantize(weight)[0])

    def test_described(self) -> None:
        model = nn.Sequential(calibrated()[1])
        config = qnn.integrations.compressed_tensors.quantization_config(model)
        inputs = config["config_groups"]["group_0"]["input_activations"]
        assert inputs == {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False,
             "dynamic": False}  # fmt: skip
        assert "int8_static" in str(qnn.summary(model))
        compressed = pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
        compressed.quantization.QuantizationConfig.model_validate(config)

    def test_scheme(self) -> None:
        scheme = get_scheme("int8_static")
        assert scheme.static
        assert not scheme.trainable
        assert OPS[scheme.linear].backward == {"x": "int8_linear_dgrad"}
        assert scheme.activation is not None
        with pytest.raises(NotImplementedError):
            scheme.activation.quantize(torch.ones(1))

    def test_python_kernels_give_the_same(self) -> None:
        _, layer = calibrated()
        for rows in (1, 200):
            x = torch.randn(rows, 48)
            want = layer(x)
            with python_kernels():
                assert torch.equal(layer(x), want)


class TestModes:
    def setup_method(self) -> None:
        _, self.layer = calibrated()
        self.model = nn.Sequential(self.layer, nn.ReLU(), calibrated(bias=False)[0]).eval()
        self.model[2] = qnn.QLinear.from_observed(
            qnn.calibrate(qnn.ObservedLinear.from_float(nn.Linear(32, 8)), [torch.rand(9, 32)])
        )
        self.batches = [torch.randn(rows, 48) for rows in (4, 9, 33)]

    def test_compiled(self) -> None:
        """Fullgraph, dynamic; the activation is folded, and the values are eager's."""
        compiled = torch.compile(self.model, fullgraph=True, dynamic=True)
        with torch.no_grad():
            for x in self.batches:
                assert torch.equal(compiled(x), self.model(x))

    def test_compiled_gradients(self) -> None:
        compiled = torch.compile(self.model, fullgraph=True, backend="aot_eager")
        x, y = (self.batches[0].clone().requires_grad_() for _ in range(2))
        compiled(x).sum().backward()
        self.model(y).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)

    @parameterized.expand([(True,), (False,)])
    def test_export(self, strict: bool) -> None:
        rows = {0: torch.export.Dim("rows")}
        program = torch.export.export(
            self.model, (self.batches[0],), dynamic_shapes=(rows,), strict=strict
        )
        nodes = [n for n in program.graph.nodes if n.kwargs.get("scheme") == "int8_static"]
        assert len(nodes) == 2
        for x in self.batches:
            assert torch.equal(program.module()(x), self.model(x))

    def test_aot_inductor(self) -> None:
        rows = {0: torch.export.Dim("rows")}
        with torch.no_grad(), TemporaryDirectory() as folder:
            program = torch.export.export(self.model, (self.batches[0],), dynamic_shapes=(rows,))
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder) / "model.pt2")
            )
            run = torch._inductor.aoti_load_package(path)
            for x in self.batches:
                assert torch.equal(run(x), self.model(x))

    def test_vmap(self) -> None:
        x = torch.randn(3, 5, 48)
        got = torch.func.vmap(self.layer)(x)
        assert torch.equal(got, self.layer(x))

    def test_observed_layers_compile(self) -> None:
        """Calibrating and training, in one graph."""
        for qat in (False, True):
            one = qnn.ObservedLinear.from_float(nn.Linear(48, 8), qat=qat)
            two = copy.deepcopy(one)
            compiled = torch.compile(two, fullgraph=True, dynamic=True, backend="aot_eager")
            for x in self.batches:
                assert torch.equal(compiled(x), one(x))
            for name, value in one.state_dict().items():
                torch.testing.assert_close(two.state_dict()[name], value)
