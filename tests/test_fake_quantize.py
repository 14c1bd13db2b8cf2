"""Fake quantisation, and the observation point that does it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parameterized import parameterized
from torch import nn

import qnn
import qnn.functional as F
from qnn import FakeQuantize, QuantSpec

from .common import DTYPES, same_bits

INT8 = QuantSpec(torch.int8, symmetric=True)
ODD = np.array(
    [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 1e-45, -1e-39, 3e38, -3e38, np.nan, np.inf, -np.inf],
    np.float32,
)


def oracle(x: np.ndarray, scale: np.ndarray, point: np.ndarray, qmin: int, qmax: int) -> np.ndarray:
    one = np.float32(1)
    with np.errstate(all="ignore"):
        v = x * (one / scale)
        v = np.minimum(np.maximum(v, np.float32(qmin) - point), np.float32(qmax) - point)
        return np.asarray(np.rint(v) * scale)


class TestFunction:
    @settings(max_examples=200)
    @given(
        bits=st.sampled_from([(0, 255), (-128, 127), (-127, 127), (0, 65535), (-3, 4)]),
        exponent=st.integers(-120, 120),
        mantissa=st.floats(1, 2, exclude_max=True, width=32),
        where=st.floats(0, 1),
        channels=st.none() | st.integers(1, 5),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_equals_numpy(
        self, bits: Any, exponent: int, mantissa: float, where: float, channels: int | None,
        seed: int,
    ) -> None:  # fmt: skip
        qmin, qmax = bits
        random = np.random.default_rng(seed)
        count = channels or 1
        scale = np.float32(mantissa) * np.exp2(random.integers(-3, 4, count), dtype=np.float32)
        scale *= np.float32(2.0**exponent)
        point = np.full(count, round(qmin + where * (qmax - qmin)), np.float32)
        point[-1] = qmin
        x = random.normal(size=(7, count)).astype(np.float32) * scale * np.float32(min(qmax, 300))
        x[0] = (random.integers(-300, 300, count) + np.float32(0.5)) * scale  # ties
        x[1] = random.choice(ODD, count)
        got = F.fake_quantize(
            torch.from_numpy(x), torch.from_numpy(scale), torch.from_numpy(point).int(), qmin, qmax,
            channel_axis=None if channels is None else 1,
        )  # fmt: skip
        want = torch.from_numpy(oracle(x, scale, point, qmin, qmax))
        assert torch.equal(got.isnan(), torch.from_numpy(x).isnan())
        assert torch.equal(got.nan_to_num(9), want.nan_to_num(9))
        # Where an end of the range is zero, either zero may come out.
        signed = torch.from_numpy((point > qmin) & (point < qmax)).expand(got.shape) & ~got.isnan()
        assert same_bits(got[signed], want[signed])

    @parameterized.expand([(dtype,) for dtype in DTYPES])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        """Narrow floats are widened and cast once; float64 stays float64."""
        x = torch.randn(40, 3, dtype=torch.float64).to(dtype)
        scale, point = torch.tensor([0.013]), torch.tensor([7], dtype=torch.int32)
        got = F.fake_quantize(x, scale, point, -100, 100)
        assert got.dtype == dtype
        wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
        q = (wide * (1 / scale.to(wide.dtype))).round().clamp(-107, 93)
        assert torch.equal(got, (q * scale.to(wide.dtype)).to(dtype))

    def test_values_of_the_integers(self) -> None:
        x = torch.linspace(-3, 3, 1001)
        q = torch.clamp((x / 0.03125).round() + 5, -20, 90)
        got = F.fake_quantize(x, torch.tensor([0.03125]), 5, -20, 90)
        assert torch.equal(got, (q - 5) * 0.03125)

    @parameterized.expand([(None,), (0,), (-1,)])
    def test_gradients(self, axis: int | None) -> None:
        """1 inside and 0 outside to x; to the scale round(v) - v inside, and the end outside."""
        count = 1 if axis is None else (6, 50)[axis]
        scale = (torch.rand(count) * 0.02 + 0.01).double().requires_grad_()
        point = torch.arange(count, dtype=torch.int32) % 4
        x = torch.randn(6, 50, dtype=torch.float64, requires_grad=True)
        dy = torch.randn(6, 50, dtype=torch.float64)
        F.fake_quantize(x, scale, point, -40, 30, channel_axis=axis).backward(dy)
        assert x.grad is not None
        assert scale.grad is not None
        shape = (-1, 1) if axis == 0 else (-1,)
        v = (x / scale.view(shape)).detach()
        low, high = -40 - point.view(shape), 30 - point.view(shape)
        inside = (v >= low) & (v <= high)
        assert 0.05 < inside.double().mean() < 0.95
        torch.testing.assert_close(x.grad, dy * inside, rtol=1e-15, atol=0)
        step = torch.where(inside, v.round() - v, torch.where(v < low, low, high))
        want = dy * step
        want = want.sum().view(1) if axis is None else want.sum(1 if axis == 0 else 0)
        torch.testing.assert_close(scale.grad, want)

    def test_compiled_is_the_same(self) -> None:
        compiled = torch.compile(F.fake_quantize, fullgraph=True, dynamic=True)
        scale = torch.tensor([0.02, 0.03, 0.5])
        point = torch.tensor([3, -5, 0], dtype=torch.int32)
        for rows in (5, 33):
            x = torch.randn(rows, 3)
            x[0], x[1, 0], x[2, 0] = torch.tensor([0.01, -0.001, 0.25]), torch.nan, -torch.inf
            got = compiled(x, scale, point, -128, 127, channel_axis=1)
            want = F.fake_quantize(x, scale, point, -128, 127, channel_axis=1)
            assert same_bits(got.nan_to_num(9), want.nan_to_num(9))
            assert want[0].signbit().any()  # of a zero too


class TestSpec:
    def test_limit(self) -> None:
        spec = QuantSpec(limit=16.0)
        ends = torch.tensor([-300.0, -3.0, torch.nan, -torch.inf])
        scale, _ = spec.qparams(ends, torch.tensor([94.0, 1.0, 1.0, 1.0]))
        assert scale[:2].tolist() == (torch.tensor([32.0, 4.0]) / 255).tolist()
        assert scale[2:].isnan().all()
        for bad in (0, -1.0, torch.inf, "16"):
            with pytest.raises(ValueError, match="limit must be a positive number"):
                QuantSpec(limit=bad)  # type: ignore[arg-type]

    @parameterized.expand(
        [
            (QuantSpec(),),
            (QuantSpec(torch.int8, symmetric=True),),
            (QuantSpec(torch.int8, qmin=-100, observer="mse"),),
            (QuantSpec(torch.int32, qmin=0, qmax=100, learnable=True),),
            (QuantSpec(torch.uint16, scale=0.5, zero_point=3),),
        ]
    )
    def test_repr_makes_it_again(self, spec: QuantSpec) -> None:
        assert eval(repr(spec)) == spec  # noqa: S307  # it is ours

    @parameterized.expand(
        [
            ({}, 0, 255),
            ({"dtype": torch.int8}, -128, 127),
            ({"dtype": torch.int8, "symmetric": True}, -127, 127),
            ({"dtype": torch.uint8, "symmetric": True}, 0, 255),
            ({"dtype": torch.int16, "symmetric": True}, -32767, 32767),
            ({"dtype": torch.uint16}, 0, 65535),
            ({"dtype": torch.int32, "qmin": -(2**20), "qmax": 2**20}, -(2**20), 2**20),
            ({"qmax": 127}, 0, 127),
        ]
    )
    def test_range(self, kwargs: dict[str, Any], qmin: int, qmax: int) -> None:
        spec = QuantSpec(**kwargs)
        assert (spec.qmin, spec.qmax) == (qmin, qmax)
        assert eval(repr(spec), {"QuantSpec": QuantSpec, "torch": torch}) == spec  # noqa: S307
        hash(spec)

    @parameterized.expand(
        [
            ({"dtype": torch.float32}, TypeError, "dtype must be one of torch.uint8"),
            ({"dtype": torch.int32}, ValueError, "int32 needs qmin and qmax"),
            ({"symmetric": 1}, ValueError, "symmetric must be True or False"),
            ({"channel_axis": 0.5}, ValueError, "channel_axis must be an int or None, got 0.5"),
            ({"qmin": -1}, ValueError, r"qmin must lie in 0 … 255, got -1"),
            ({"qmax": 2.5}, ValueError, "qmax must be an int"),
            ({"qmin": 9, "qmax": 9}, ValueError, "qmin must be below qmax"),
            ({"observer": "max"}, ValueError, "observer must be one of 'minmax'.*got 'max'"),
            ({"observer": 3}, TypeError, "observer must be a name or a class"),
            ({"zero_point": 3}, ValueError, "zero_point is given and scale is not"),
            ({"scale": 0.0}, ValueError, "scale must be positive and finite"),
            ({"scale": float("nan")}, ValueError, "scale must be positive and finite"),
            ({"scale": "x"}, TypeError, "scale must be float"),
            ({"scale": 1.0, "zero_point": 256}, ValueError, "zero_point must lie in qmin … qmax"),
            ({"scale": 1.0, "zero_point": 0.5}, TypeError, "zero_point must be int"),
            (
                {"scale": 1.0, "zero_point": 3, "symmetric": True},
                ValueError,
                "symmetric spec is 128",
            ),
            ({"scale": [1.0, 2.0]}, ValueError, "needs a channel_axis"),
            (
                {"scale": [1.0, 2.0], "zero_point": [1, 2, 3], "channel_axis": 0},
                ValueError,
                "2 values and zero_point 3",
            ),
            ({"qmin": 0, "qmax": 1, "learnable": None}, ValueError, "learnable must be True"),
        ]
    )
    def test_errors(self, kwargs: dict[str, Any], kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=f"qnn.QuantSpec: .*{message}"):
            QuantSpec(**kwargs)

    @parameterized.expand([(s, d) for s in (False, True) for d in (torch.uint8, torch.int16)])
    def test_qparams(self, symmetric: bool, dtype: torch.dtype) -> None:
        spec = QuantSpec(dtype, symmetric=symmetric)
        low = torch.tensor([-1.0, 0.5, -7.0, 0.0, -1e-45, -3e38, torch.nan, -torch.inf])
        high = torch.tensor([3.0, 4.0, -2.0, 0.0, 1e-45, 3e38, 1.0, 1.0])
        scale, point = spec.qparams(low, high)
        assert (scale.dtype, point.dtype) == (torch.float32, torch.int32)
        lo, hi = low[:5].double().clamp(max=0), high[:5].double().clamp(min=0)
        steps = spec.qmax - spec.qmin
        want = torch.maximum(-lo, hi) / (steps // 2) if symmetric else (hi - lo) / steps
        want = want.clamp_min(torch.finfo(torch.float32).tiny)
        want[3] = 1
        torch.testing.assert_close(scale[:5].double(), want, rtol=1e-7, atol=0)
        assert bool(scale[6:].isnan().all())
        assert scale[5].isnan() == (not symmetric)  # 6e38 has no float32
        if symmetric:
            assert set(point.tolist()) == {spec.middle}
        else:
            assert point[1].item() == spec.qmin
            assert point[2].item() == spec.qmax
            assert point[0].item() == round(spec.qmin + steps / 4)
        # Zero is on the grid, and the range is covered to half a step.
        ends = ((torch.tensor([spec.qmin, spec.qmax]) - point[:3, None]) * scale[:3, None]).double()
        assert bool((ends[:, 0] <= lo[:3] + scale[:3] * 0.501).all())
        assert bool((ends[:, 1] >= hi[:3] - scale[:3] * 0.501).all())


class TestPoint:
    def test_only_observing_returns_the_input_itself(self) -> None:
        point = FakeQuantize(INT8, name="input")
        for mode in (True, False):
            x = torch.randn(4, 5) * (1 if mode else 3)
            assert point.train(mode)(x) is x
            assert point.quantize(x) is x
            assert point.qparams()[0].item() == (x.abs().max() / 127).item()

    def test_training(self) -> None:
        """In training it records and quantises, in evaluation it only quantises."""
        point = FakeQuantize(INT8, qat=True)
        x = torch.randn(30, 5)
        scale = x.abs().max().view(1) / 127
        assert torch.equal(point(x), F.fake_quantize(x, scale, 0, -127, 127))
        before = copy.deepcopy(point.state_dict())
        wide = 10 * x
        got = point.eval()(wide)
        assert torch.equal(got, F.fake_quantize(wide, scale, 0, -127, 127))
        for name, value in point.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert point.train()(wide).abs().max() == wide.abs().max()

    def test_before_anything_was_seen(self) -> None:
        for axis in (None, -1):
            point = FakeQuantize(QuantSpec(channel_axis=axis), qat=True, channels=axis and 5).eval()
            x = torch.randn(3, 5, requires_grad=True)
            y = point(x)
            assert torch.equal(y, x)
            y.sum().backward()
            assert torch.equal(x.grad, torch.ones(3, 5))
            with pytest.raises(ValueError, match="nothing was observed"):
                point.qparams()

    def test_quantises_with_what_was_known_before(self) -> None:
        """As a recurrent layer does: a step quantises, and one look at the end."""
        point = FakeQuantize(INT8, qat=True)
        point.observe(torch.tensor([1.27]))
        steps = [point.quantize(torch.tensor([value])) for value in (0.504, 5.0)]
        point.observe(torch.cat(steps) * 2)
        torch.testing.assert_close(torch.cat(steps), torch.tensor([0.5, 1.27]))
        assert point.qparams()[0].item() == pytest.approx(2.54 / 127, abs=0.5e-6)

    def test_fixed(self) -> None:
        point = FakeQuantize(QuantSpec(scale=2**-16, zero_point=3), name="gate", qat=True)
        x = torch.rand(50)
        want = F.fake_quantize(x, torch.tensor([2**-16]), 3, 0, 255)
        assert torch.equal(point(x), want)
        assert point.row().tolist() == [2**-16, 3, 0, 255]
        assert not point.observing
        spec = QuantSpec(torch.int8, scale=(0.5, 0.25), zero_point=(1, 2), channel_axis=1)
        rows = FakeQuantize(spec, qat=True)(torch.tensor([[0.3, 0.3], [99.0, 99.0]]))
        assert rows.tolist() == [[0.5, 0.25], [63.0, 31.25]]

    def test_row(self) -> None:
        point = FakeQuantize(QuantSpec(torch.int16), name="cell_state")
        with pytest.raises(ValueError, match="'cell_state': nothing was observed"):
            point.row()
        point(torch.tensor([-1.0, 3.0]))
        scale, zero_point = point.qparams()
        assert point.row().tolist() == [scale.item(), float(zero_point.item()), -32768.0, 32767.0]
        assert point.row().dtype == torch.float32
        rows = FakeQuantize(QuantSpec(channel_axis=0))
        rows(torch.randn(3, 4))
        with pytest.raises(ValueError, match="3 scales"):
            rows.row()

    @parameterized.expand([("nan", torch.nan), ("inf", torch.inf), ("-inf", -torch.inf)])
    def test_what_is_not_finite(self, _: str, bad: float) -> None:
        """An error that names the part, later batches or not, and NaN while training."""
        for qat in (False, True):
            point = FakeQuantize(INT8, name="new_gate", qat=qat)
            point(torch.tensor([1.0, bad]))
            y = point(torch.ones(2))
            with pytest.raises(ValueError, match=r"'new_gate': the range is .* observed"):
                point.qparams()
            assert bool(y.isnan().all()) == qat

    def test_frozen(self) -> None:
        model = nn.Sequential(FakeQuantize(INT8), nn.ReLU(), FakeQuantize(INT8, qat=True))
        model(torch.randn(9))
        assert qnn.freeze_observers(model) is model
        before = copy.deepcopy(model.state_dict())
        model(100 * torch.randn(9))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert "frozen" in repr(model)
        assert qnn.unfreeze_observers(model) is model
        assert "frozen" not in repr(model)
        model(torch.full((1,), 500.0))
        assert model[0].qparams()[0].item() > 3.9
        assert model[2].qparams()[0].item() > before["2.scale"].item()
        for function in (qnn.freeze_observers, qnn.unfreeze_observers):
            with pytest.raises(ValueError, match="no observation points"):
                function(nn.ReLU())

    @parameterized.expand(
        [(qat, observer) for qat in (False, True) for observer in ("minmax", "mse", "percentile")]
    )
    def test_frozen_is_in_the_state(self, qat: bool, observer: str) -> None:
        """Resumed from a file, also one with `assign=True`; and files without it load."""
        spec = QuantSpec(observer=observer)
        point = FakeQuantize(spec, qat=qat)
        point(torch.ones(9))
        before = point.state_dict()
        for name in ("frozen", "observer.magnitudes", "observer.least", "observer.most"):
            before.pop(name, None)  # as written before these were there
        for frozen in (True, False):
            state = copy.deepcopy(qnn.freeze_observers(point).state_dict())
            if not frozen:
                state = qnn.unfreeze_observers(point).state_dict()
            for assign in (False, True):
                resumed = FakeQuantize(spec, qat=qat)
                qnn.freeze_observers(resumed)
                resumed.load_state_dict(state, assign=assign)
                resumed(torch.full((9,), 50.0))
                assert (resumed.qparams()[0].item() < 1 / 250) == frozen
            old = FakeQuantize(spec, qat=qat)
            old.freeze(frozen)
            old.load_state_dict(before)
            assert old.observing == (not frozen)
            torch.testing.assert_close(old.qparams(), point.qparams())
        fixed = FakeQuantize(QuantSpec(scale=0.5), qat=qat)
        qnn.unfreeze_observers(fixed)
        assert not fixed.observing
        assert "frozen" not in fixed.state_dict()

    @parameterized.expand([(axis, qat) for axis in (None, 1) for qat in (False, True)])
    def test_state(self, axis: int | None, qat: bool) -> None:
        """Saved and loaded, copied, pickled, cast: the statistics stay as they are."""
        spec = QuantSpec(observer="histogram", channel_axis=axis)
        point = FakeQuantize(spec, name="a", qat=qat)
        point(torch.randn(8, 5))
        x = torch.randn(6, 5)
        buffer = io.BytesIO()
        torch.save(point.state_dict(), buffer)
        buffer.seek(0)
        loaded = FakeQuantize(spec, name="a", qat=qat)
        loaded.load_state_dict(torch.load(buffer, weights_only=True))
        twins = [
            loaded,
            copy.deepcopy(point),
            pickle.loads(pickle.dumps(point)),
            copy.deepcopy(point).half(),
            copy.deepcopy(point).to(torch.bfloat16).double(),
        ]
        scale, zero_point = point.qparams()
        for twin in twins:
            assert torch.equal(twin.qparams()[0], scale)
            assert torch.equal(twin.qparams()[1], zero_point)
            assert torch.equal(twin.eval().quantize(x), point.quantize(x))
            for name, value in twin.state_dict().items():
                assert value.dtype == point.state_dict()[name].dtype, name

    def test_meta(self) -> None:
        with torch.device("meta"):
            point = FakeQuantize(QuantSpec(), qat=True)
            assert point(torch.randn(3)).is_meta
        real = FakeQuantize(QuantSpec(), qat=True)
        real(torch.randn(30))
        point.to_empty(device="cpu").load_state_dict(real.state_dict())
        assert torch.equal(point.qparams()[0], real.qparams()[0])

    def test_merge_and_reset(self) -> None:
        one, two, both = (FakeQuantize(INT8, qat=True) for _ in range(3))
        a, b = torch.randn(9), 4 * torch.randn(9)
        one(a), two(b), both(a), both(b)
        one.merge(two)
        assert torch.equal(one.eval()(b), both.eval()(b))
        one.reset()
        assert torch.equal(one(b), b)
        with pytest.raises(ValueError, match="must be a MinMaxObserver of"):
            one.merge(FakeQuantize(QuantSpec(), qat=True))
        with pytest.raises(ValueError, match="one of the two is fixed"):
            one.merge(FakeQuantize(QuantSpec(scale=1.0)))

    def test_refuses(self) -> None:
        with pytest.raises(TypeError, match="takes a QuantSpec, got dtype"):
            FakeQuantize(torch.uint8)  # type: ignore[arg-type]
        with pytest.raises(
            TypeError, match=r"must be a subclass of qnn.calibration.observers.Observer"
        ):
            FakeQuantize(QuantSpec(observer=int))
        point = FakeQuantize(QuantSpec(channel_axis=1), name="w", qat=True)
        point(torch.randn(2, 3))
        with pytest.raises(ValueError, match="'w': the tensor has 4 channels, but 3 before"):
            point(torch.randn(2, 4))
        with pytest.raises(ValueError, match=r"channel_axis is 1, but the tensor is \[3\]"):
            point(torch.randn(3))


class TestLearnedScale:
    SPEC = QuantSpec(torch.int8, symmetric=True, learnable=True)

    def test_begins_with_what_was_seen_first_and_stays(self) -> None:
        point = FakeQuantize(self.SPEC, qat=True)
        assert [name for name, _ in point.named_parameters()] == ["scale"]
        point(torch.tensor([1.27]))
        assert point.scale.item() == pytest.approx(0.01, abs=0.5e-7)
        point(torch.tensor([127.0]))
        assert point.scale.item() == pytest.approx(0.01, abs=0.5e-7)
        assert point.qparams()[0].item() == pytest.approx(0.01, abs=0.5e-7)

    def test_gradient_factor(self) -> None:
        """1 / sqrt(values · qmax), where the values share the scale."""
        for axis, values in ((None, 60), (0, 20)):
            spec = QuantSpec(torch.int8, symmetric=True, learnable=True, channel_axis=axis)
            point = FakeQuantize(spec, qat=True, channels=None if axis is None else 3)
            x = torch.randn(3, 20)
            point(x).sum().backward()
            scale = point.scale.detach().clone().requires_grad_()
            F.fake_quantize(x, scale, 0, -127, 127, channel_axis=axis).sum().backward()
            assert point.scale.grad is not None
            assert scale.grad is not None
            torch.testing.assert_close(point.scale.grad, scale.grad / (values * 127) ** 0.5)

    def test_learns(self) -> None:
        """Of normal data with an outlier, 4 bits: the clipped range errs less."""
        torch.manual_seed(0)
        x = torch.randn(4000)
        x[0] = 30.0
        spec = QuantSpec(torch.int8, symmetric=True, qmin=-7, qmax=7, learnable=True)
        point = FakeQuantize(spec, qat=True)
        first = (point(x) - x).square().mean().item()
        optimizer = torch.optim.Adam(point.parameters(), lr=0.05)
        for _ in range(120):
            optimizer.zero_grad()
            (point(x) - x).square().mean().backward()
            optimizer.step()
        assert (point(x) - x).square().mean().item() < 0.5 * first

    def test_from_a_given_scale(self) -> None:
        spec = QuantSpec(torch.int8, symmetric=True, learnable=True, scale=0.5)
        point = FakeQuantize(spec, qat=True)
        y = point(torch.tensor([0.6]))
        assert y.item() == 0.5
        y.sum().backward()
        assert point.scale.grad is not None

    def test_channels_are_needed(self) -> None:
        with pytest.raises(ValueError, match=r"'w': a learnable scale .* needs channels="):
            FakeQuantize(QuantSpec(learnable=True, channel_axis=0), name="w", qat=True)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("axis", [None, 1])
def test_compiled_training(axis: int | None, learnable: bool) -> None:
    """One graph whatever the batch, and the same values, gradients and statistics as in eager."""
    spec = QuantSpec(channel_axis=axis, learnable=learnable)
    one, two = (FakeQuantize(spec, qat=True, channels=axis and 5) for _ in range(2))
    compiled = torch.compile(two, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 8, 5):
        x = torch.randn(rows, 5)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = compiled(a), one(b)
        assert torch.equal(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
        assert torch.equal(a.grad, b.grad)
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value), name
    if learnable:
        torch.testing.assert_close(two.scale.grad, one.scale.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    point = FakeQuantize(QuantSpec(torch.int8, observer="moving_average"), qat=True)
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(
        point, (torch.randn(4, 3),), dynamic_shapes=(rows,), strict=strict
    )
    module, twin = program.module(), copy.deepcopy(point)
    for count in (4, 9):
        x = torch.randn(count, 3)
        assert torch.equal(module(x), twin(x))
