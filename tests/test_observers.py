"""Observers: what they find, in which mode, and what they do with odd tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from parameterized import parameterized

import qnn.functional as F
from qnn import QuantSpec
from qnn.calibration.observers import (
    OBSERVERS,
    HistogramObserver,
    MSEObserver,
    Observer,
    make_observer,
)

from .common import DTYPES

NAMES = tuple(OBSERVERS)
AXES = (None, 0, -1)
GRID = tuple(itertools.product(NAMES, AXES))


def observer(name: str, axis: int | None = None, **kwargs: object) -> Observer:
    return make_observer(QuantSpec(observer=name, channel_axis=axis, **kwargs), name="cell_state")  # type: ignore[arg-type]


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(one: torch.nn.Module, two: torch.nn.Module, close: bool = False) -> None:
    for name, value in one.state_dict().items():
        other = two.state_dict()[name]
        assert value.dtype == other.dtype, name
        if close and value.is_floating_point():
            torch.testing.assert_close(other, value, rtol=1e-6, atol=0)
        else:
            assert torch.equal(value, other), name


def rows(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def batches(count: int = 4) -> list[torch.Tensor]:
    """Of different sizes and ranges; the last axis and the first are as long in all."""
    return [torch.randn(3, 7 + i, 5) * 4.0**i - i for i in range(count)]


class TestEvery:
    @parameterized.expand(GRID)
    def test_observing_leaves_no_trace(self, name: str, axis: int | None) -> None:
        """The input, its gradient and its version are as without an observer."""
        watcher = observer(name, axis)
        x = torch.randn(3, 4, 5, requires_grad=True)
        before = x.detach().clone()
        y = watcher(x)
        assert y is x
        assert x._version == 0
        assert torch.equal(x, before)
        y.square().sum().backward()
        assert torch.equal(x.grad, 2 * before)
        assert not any(value.requires_grad for value in watcher.state_dict().values())

    @parameterized.expand(GRID)
    def test_empty_tensors_change_nothing(self, name: str, axis: int | None) -> None:
        watcher = observer(name, axis)
        watcher(torch.randn(3, 4, 5))
        before = state(watcher)
        for shape in ((0, 4, 5), (3, 0, 5), (0,)):
            watcher(torch.empty(shape))
        for key, value in watcher.state_dict().items():
            assert torch.equal(value, before[key]), key

    @parameterized.expand(GRID)
    def test_nothing_observed_is_an_error(self, name: str, axis: int | None) -> None:
        watcher = observer(name, axis)
        message = "'cell_state': nothing was observed; run qnn.calibrate"
        with pytest.raises(ValueError, match=message):
            watcher.qparams()
        watcher(torch.empty(0, 4, 5))
        with pytest.raises(ValueError, match=message):
            watcher.qparams()

    @parameterized.expand(itertools.product(NAMES, AXES, (torch.nan, torch.inf, -torch.inf)))
    def test_what_is_not_finite_is_remembered(
        self, name: str, axis: int | None, bad: float
    ) -> None:
        for position in range(3):  # in the first batch, in the last
            watcher = observer(name, axis)
            for i in range(3):
                x = torch.randn(3, 4, 5)
                if i == position:
                    x[2, 1, 3] = bad
                watcher(x)
            channel = "" if axis is None else f" of channel {2 if axis == 0 else 3}"
            with pytest.raises(ValueError, match=f"'cell_state': the range{channel} is"):
                watcher.qparams()
            watcher.reset()
            watcher(torch.ones(3, 4, 5))
            watcher.qparams()

    def test_a_range_beyond_float32_is_an_error(self) -> None:
        watcher = observer("minmax")
        watcher(torch.tensor([-3e38, 3e38]))
        with pytest.raises(ValueError, match="'cell_state': the range is -3e"):
            watcher.qparams()
        watcher.reset()
        watcher(torch.tensor([1e300], dtype=torch.float64))
        with pytest.raises(ValueError, match="infinite values"):
            watcher.qparams()

    @parameterized.expand(itertools.product(NAMES, (0.0, 1e-45, 1e-30, 3e38)))
    def test_constant_tensors(self, name: str, value: float) -> None:
        """Zeros get scale 1; anything else a scale whose grid has it, or is too fine for it."""
        watcher = observer(name)
        watcher(torch.full((9,), value))
        scale, zero_point = watcher.qparams()
        assert bool(scale.isfinite())
        assert scale.item() > 0
        got = F.fake_quantize(torch.full((1,), value), scale, zero_point, 0, 255)
        assert got.item() / (value or 1) == pytest.approx(
            value / (value or 1) * (value > 1e-44), abs=0.5e-7
        )
        if value == 0:
            assert scale.item() == 1

    @parameterized.expand(itertools.product(NAMES, DTYPES))
    def test_dtypes(self, name: str, dtype: torch.dtype) -> None:
        """Statistics are those of the same values in float32."""
        x = torch.randn(40, 5).to(dtype)
        one, two = observer(name), observer(name)
        one(x)
        two(x.float())
        assert_same_state(one, two)

    @parameterized.expand(GRID)
    def test_layouts(self, name: str, axis: int | None) -> None:
        x = torch.randn(3, 4, 5)
        one, two, three = (observer(name, axis) for _ in range(3))
        one(x)
        two(x.permute(2, 1, 0).contiguous().permute(2, 1, 0))
        wide = torch.zeros(3, 4, 10)
        wide[..., ::2] = x
        three(wide[..., ::2])
        assert_same_state(one, two, close=True)
        assert_same_state(one, three, close=True)

    @parameterized.expand(GRID)
    def test_channels_are_apart(self, name: str, axis: int | None) -> None:
        """A channel's range is that of the channel alone."""
        if axis is None:
            return
        x = torch.randn(3, 40, 3) * torch.tensor([0.1, 1.0, 100.0])
        x = x.movedim(2, 0) if axis == 0 else x
        whole = observer(name, axis)
        whole(x)
        for i, channel in enumerate(x.movedim(axis, 0)):
            alone = observer(name)
            alone(channel)
            for got, want in zip(whole.qparams(), alone.qparams(), strict=True):
                torch.testing.assert_close(got[i], want[0])

    @parameterized.expand(GRID)
    def test_merge(self, name: str, axis: int | None) -> None:
        """As if one had seen all; a moving average has no order, so it is a weighted mean."""
        given = batches()
        one, two, both = (observer(name, axis) for _ in range(3))
        for x in given:
            both(x)
        for x in given[:2]:
            one(x)
        for x in given[2:]:
            two(x)
        low, high = (t.clone() for t in one.low_high())
        n, m = int(one.count), int(two.count)
        one.merge(two)
        assert int(one.count) == int(both.count)
        if name == "moving_average":
            for got, mine, theirs in zip(one.low_high(), (low, high), two.low_high(), strict=True):
                torch.testing.assert_close(got, (n * mine + m * theirs) / (n + m))
        else:
            assert_same_state(both, one, close=True)
        nothing = observer(name, axis)
        before = state(one)
        one.merge(nothing)
        for key, value in one.state_dict().items():
            assert torch.equal(value, before[key]), key
        nothing.merge(one)
        assert_same_state(nothing, one)
        with pytest.raises(ValueError, match=r"'cell_state'.merge: the other must be a"):
            one.merge(observer(name, axis, qmax=100))

    @parameterized.expand(GRID)
    def test_reset(self, name: str, axis: int | None) -> None:
        watcher, fresh = observer(name, axis), observer(name, axis)
        for x in batches():
            watcher(x)
        watcher.reset()
        last = torch.randn(3, 7, 5)
        watcher(last)
        fresh(last)
        assert_same_state(watcher, fresh)


class TestMinMax:
    @parameterized.expand([(axis,) for axis in AXES])
    def test_range(self, axis: int | None) -> None:
        watcher = observer("minmax", axis)
        given = batches()
        for x in given:
            watcher(x)
        every = torch.cat([rows(x, axis) for x in given], 1)
        low, high = watcher.low_high()
        assert torch.equal(low, every.amin(1))
        assert torch.equal(high, every.amax(1))


class TestMovingAverage:
    @parameterized.expand([(axis,) for axis in AXES])
    def test_range(self, axis: int | None) -> None:
        """The first batch whole, then a hundredth of each."""
        watcher = observer("moving_average", axis)
        given = batches()
        for x in given:
            watcher(x)
        low, high = rows(given[0], axis).amin(1).double(), rows(given[0], axis).amax(1).double()
        for x in given[1:]:
            low += 0.01 * (rows(x, axis).amin(1) - low)
            high += 0.01 * (rows(x, axis).amax(1) - high)
        for got, want in zip(watcher.low_high(), (low, high), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def error(x: torch.Tensor, low: float, high: float, spec: QuantSpec) -> float:
    scale, point = spec.qparams(torch.tensor([low]), torch.tensor([high]))
    fq = F.fake_quantize(x.double(), scale, point, spec.qmin, spec.qmax)
    return float((fq - x.double()).square().mean())


def distributions() -> dict[str, torch.Tensor]:
    normal = torch.randn(4_000)
    outlier = normal.clone()
    outlier[0] = 30.0
    return {
        "normal": normal,
        "one outlier": outlier,
        "after a ReLU": normal.relu() * (1 + 20 * (torch.rand(4_000) < 3e-3)),
        "heavy tails": torch.distributions.StudentT(3.0).sample((4_000,)) - 1,
        "uniform": torch.rand(4_000) * 3 + 1,
    }


class TestPercentile:
    @parameterized.expand(
        itertools.product(distributions(), (60.0, 99.0, 99.9, 100), (False, True), (1e-20, 1, 1e20))
    )
    def test_range(self, name: str, percentile: float, symmetric: bool, size: float) -> None:
        """torch's quantiles, in whatever batches and order the values come."""
        torch.manual_seed(5)
        x = distributions()[name]
        # A bin is a 16th of its value wide at most, and a place between two values goes to one.
        share, place = percentile / 100, 1.5 / len(x)
        ends = [(share, x.abs() if symmetric else x)]
        if not symmetric:
            ends.append((share, -x))
        for order in (x, x.flip(0)):
            watcher = observer("percentile", symmetric=symmetric, percentile=percentile)
            for batch in order.split((1, 1500, 2499)):
                watcher(batch * size)
            low, high = (end.item() / size for end in watcher.low_high())
            for got, (at, values) in zip((high, -low), ends, strict=not symmetric):
                near = torch.tensor([at - place, at + place]).clamp(0, 1)
                least, most = values.double().quantile(near.double()).tolist()
                assert got >= least - abs(least) / 16 - 1e-6
                assert got <= most + abs(most) / 16 + 1e-6
            if symmetric:
                assert low == -high
            if percentile == 100:
                assert watcher.low_high()[1] == (ends[0][1] * size).max()
        assert int(watcher.bins.sum()) == 4000

    def test_default_and_refused(self) -> None:
        x = torch.cat([torch.rand(99_990), torch.full((10,), 50.0)])
        watcher = observer("percentile")
        watcher(x)
        assert watcher.low_high()[1].item() < 51
        watcher(torch.rand(200_000))
        assert watcher.low_high()[1].item() < 1.1
        assert watcher.seen()[1].item() == 50
        for wrong in (50, 101, "99", float("nan")):
            with pytest.raises(ValueError, match="percentile must be above 50 and up to 100"):
                QuantSpec(observer="percentile", percentile=wrong)
        with pytest.raises(ValueError, match="percentile belongs to observer='percentile'"):
            QuantSpec(percentile=99.0)
        assert (
            repr(QuantSpec(observer="percentile", percentile=99.0))
            == "QuantSpec(torch.uint8, observer='percentile', percentile=99.0)"
        )


class TestErrs:
    """The observers that look for the range which errs least."""

    @parameterized.expand(
        itertools.product((HistogramObserver, MSEObserver), (False, True), (4, 8), distributions())
    )
    def test_nearly_the_best_range(
        self, kind: type[Observer], symmetric: bool, bits: int, name: str
    ) -> None:
        torch.manual_seed(5)
        x = distributions()[name]
        top = 2 ** (bits - 1) - 1
        spec = QuantSpec(
            torch.int8, symmetric=symmetric, qmin=-top - (not symmetric), qmax=top, observer=kind
        )
        watcher = make_observer(spec)
        watcher(x)
        low, high = (t.item() for t in watcher.low_high())
        got = error(x, low, high, spec)
        least, most = float(x.min()), float(x.max())
        fine = [2.0 ** (-i / 6) for i in range(40)]
        if symmetric:
            end = max(-least, most)
            best = min(error(x, -end * f, end * f, spec) for f in fine)
        else:
            best = min(error(x, least * f, most * g, spec) for f in fine[::3] for g in fine[::3])
        assert got <= 1.15 * best
        plain = error(x, least, most, spec)
        assert got <= 1.001 * plain
        if bits == 4 and name == "one outlier":
            assert got < 0.4 * plain

    def test_wide_integers_are_not_clipped(self) -> None:
        for name, symmetric in itertools.product(("histogram", "mse"), (False, True)):
            x = torch.randn(5000)
            watcher = observer(name, dtype=torch.int16, symmetric=symmetric)
            watcher(x)
            low, high = (t.item() for t in watcher.low_high())
            end = float(x.abs().max())
            least, most = (-end, end) if symmetric else (float(x.min()), float(x.max()))
            assert low / least == pytest.approx(1, abs=0.5e-5)
            assert high / most == pytest.approx(1, abs=0.5e-5)


class TestHistogram:
    def test_counts(self) -> None:
        """Those of a histogram made at once on the last grid, in any order of the batches."""
        given = [torch.randn(3000) * 10.0**i for i in (-3, 0, 2, -1)] + [torch.zeros(9)]
        every = torch.cat(given)
        exponent = 2.0 ** torch.ceil(torch.log2(every.abs().max())).item()
        want, _ = torch.histogram(
            every[every != 0].double(), 4096, range=(-exponent, exponent)
        )  # zeros are exact in every range
        for order in itertools.permutations(given):
            watcher = observer("histogram")
            for x in order:
                watcher(x)
            assert 2.0 ** watcher.exponent.item() == exponent
            assert torch.equal(watcher.histogram[0].double(), want)

    def test_extremes(self) -> None:
        watcher = observer("histogram")
        for value in (0.0, 1e-45, 1e-38, 1e-20, 1.0, 3.4e38):
            watcher(torch.tensor([value, -value / 2]))
        assert int(watcher.histogram.sum()) == 9  # 1e-45 / 2 is 0
        low, high = watcher.low_high()
        assert bool(low.isfinite())
        assert bool(high.isfinite())


@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name in NAMES for axis in (None, -1)][:-1]
)
def test_compiled(name: str, axis: int | None) -> None:
    """One graph for every batch, and the statistics of eager mode."""
    spec = QuantSpec(observer=name, channel_axis=axis)
    one, two = (make_observer(spec, channels=axis and 5) for _ in range(2))
    backend = "eager" if name == "mse" else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(two, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in batches():
            compiled(x)
            one(x)
    assert_same_state(one, two)


@pytest.mark.parametrize("name", ["minmax", "moving_average", "histogram"])
def test_export(name: str) -> None:
    watcher, eager = observer(name), observer(name)
    rows = {0: torch.export.Dim("rows", min=2)}
    module = torch.export.export(
        watcher, (torch.randn(4, 3),), dynamic_shapes=(rows,), strict=False
    ).module()
    for count in (4, 9):
        x = torch.randn(count, 3) * count
        module(x)
        eager(x)
    for key, value in module.state_dict().items():
        assert torch.equal(value, eager.state_dict()[key]), key


def test_compiled_by_inductor() -> None:
    """The histogram's bits and integer arithmetic, through generated code."""
    one, two = observer("histogram"), observer("histogram")
    compiled = torch.compile(two, fullgraph=True)
    for i in range(2):
        x = torch.randn(500) * 8.0**i
        x[0] = 0
        compiled(x)
        one(x)
    assert_same_state(one, two)


def test_a_class_as_observer() -> None:
    class Fixed(Observer):
        def _update(self, x: torch.Tensor) -> None:
            pass

        def low_high(self) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(1), torch.full((1,), 255.0)

    watcher = make_observer(QuantSpec(observer=Fixed))
    watcher(torch.randn(3))
    assert watcher.qparams()[0].item() == 1.0
