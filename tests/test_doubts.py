"""What `convert` and `summary` say of grids that will cost accuracy, for every kind of layer."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn import CalibrationWarning, QuantSpec

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

KINDS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "LSTM": lambda: nn.LSTM(12, 8, 2, bidirectional=True),
    "GRU": lambda: nn.GRU(12, 8),
    "projection": lambda: nn.LSTM(12, 8, proj_size=4),
    "LSTM cell": lambda: nn.LSTMCell(12, 8),
    "GRU cell": lambda: nn.GRUCell(12, 8),
}


class One(nn.Module):
    """A layer inside a model; a cell takes the steps one by one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = KINDS[kind]()

    def forward(self, x: torch.Tensor) -> Any:
        if isinstance(self.layer, nn.Linear) or not type(self.layer).__name__.endswith("Cell"):
            return self.layer(x)
        state = None
        for step in x:
            state = self.layer(step, state)
        return state


def usual(steps: int = 40) -> torch.Tensor:
    return torch.randn(steps, 4, 12, generator=torch.Generator().manual_seed(0))


def heavy(steps: int = 40) -> torch.Tensor:
    """A spectrum: the median a thousandth of the largest value."""
    x = torch.exp(2.5 * usual(steps))
    return x / x.max()


def prepared(kind: str, x: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(0)
    return qnn.calibrate(qnn.prepare(One(kind).eval(), **options), [x])


def said(model: Any) -> tuple[nn.Module, str | None]:
    """The converted model, and what is said of its layer: by `convert` and `summary` alike."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = qnn.convert(model)
    words = [str(each.message) for each in caught if each.category is CalibrationWarning]
    (note,) = (row.note for row in qnn.summary(converted).rows if row.name == "layer")
    assert (note is None) == (not words)
    if note is not None:
        assert note in words[0]
        assert f"layer: {note}" in str(qnn.summary(converted))
        assert "layer: " in words[0]
        assert len(words) == 1
    return converted, note


class TestDoubts:
    @parameterized.expand([(kind, qat) for kind in KINDS for qat in (False, True)])
    def test_an_input_that_falls_to_zero(self, kind: str, qat: bool) -> None:
        model = prepared(kind, heavy(), qat=qat, parts={"input": QuantSpec(torch.uint8)})
        names = ("layer.input_quantize", "layer.points.input", "layer.points.input_l0")
        (step,) = (point.qparams()[0] for n, point in points(model).items() if n in names)
        share = (heavy() < step / 2).float().mean().item()
        _, note = said(model)
        assert "of the nonzero values of 'input" in str(note)
        percent = float(str(note).partition("%")[0].split()[-1])
        assert abs(percent - 100 * share) < 2
        assert "qnn.convert(model, 'int8', include=" in str(note)
        assert "'int8_weight'" in str(note)

    @parameterized.expand(KINDS)
    def test_nothing_is_said_of_usual_data(self, kind: str) -> None:
        for x in (usual(), usual().relu(), usual() * 1e-6 + 1e-6, torch.zeros(3, 4, 12)):
            assert said(prepared(kind, x))[1] is None

    @parameterized.expand(
        [
            (kind, spec, cut)
            for kind in KINDS
            for spec, cut in (
                (QuantSpec(torch.uint8, limit=1.0), True),
                (QuantSpec(torch.uint8, limit=3.5), False),
                (QuantSpec(torch.int8, symmetric=True, limit=1.0), True),
                (QuantSpec(torch.uint8, observer="percentile", percentile=90), True),
                (QuantSpec(torch.uint8, observer="percentile"), False),
                (QuantSpec(torch.uint8, scale=0.01, zero_point=128), False),
            )
        ]
    )
    def test_a_range_that_is_cut(self, kind: str, spec: QuantSpec, cut: bool) -> None:
        """By more than a quarter; a fixed grid has seen nothing."""
        model = qnn.prepare(One(kind).eval(), parts={"input": spec})
        model(usual())
        _, note = said(model)
        assert (note is not None) == cut, note
        if cut:
            assert re.search(r"the range -\d.* of 'input.*' is cut to -\d", str(note))

    @parameterized.expand(["mse", "histogram"])
    def test_an_outlier_that_was_clipped(self, observer: str) -> None:
        x = usual()
        x[0, 0, 0] = 200
        spec = QuantSpec(torch.int8, observer=observer, qmin=-7, qmax=7)
        model = prepared("LSTM", x, parts={"*_linear": spec})
        note = str(said(model)[1])
        assert re.search(
            f"_linear_l0' is cut to .*observer='{observer}'.*16 bits and no limit", note
        )

    def test_a_counter(self) -> None:
        """A cell beyond 16 that comes back: right by default, and said where 8 bits are asked."""
        model = One("LSTM")
        model.layer = counter()
        seq = torch.tensor([[1.0, 0.0]] * 40 + [[0.0, 1.0]] * 60).unsqueeze(1)
        want = model(seq)[0]
        wide, note = said(qnn.calibrate(qnn.prepare(model), [seq]))
        assert note is None
        assert qnn.sqnr(wide(seq)[0], want) > 40
        eight = qnn.calibrate(qnn.prepare(model, parts=qnn.parts.EIGHT_BIT), [seq])
        narrow, note = said(eight)
        assert qnn.sqnr(narrow(seq)[0], want) < 10
        assert re.search(r"-20.* of 'cell_state_l0' is cut to -15.* 16.* .limit=16.; ", str(note))
        assert "16 bits and no limit, the default" in str(note)

    @parameterized.expand(["linear", "GRU"])
    def test_what_is_known_survives(self, kind: str) -> None:
        """The state of the prepared model, and copies of the converted one; not its state dict."""
        spec = QuantSpec(torch.uint8, limit=0.7)
        model = prepared(kind, heavy(), parts={"input": spec})
        resumed = qnn.prepare(One(kind), parts={"input": spec})
        resumed.load_state_dict(model.state_dict())
        note = said(model)[1]
        assert "is cut" in str(note)
        assert "fall to zero" in str(note)
        converted, again = said(resumed)
        assert again == note
        for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert str(note) in str(qnn.summary(twin))
        assert not [key for key in converted.state_dict() if "note" in key]

    def test_old_states_say_nothing(self) -> None:
        model = prepared("linear", heavy(), parts={"input": QuantSpec(torch.uint8)})
        state = {k: v for k, v in model.state_dict().items() if not k.endswith("magnitudes")}
        fresh = qnn.prepare(One("linear"), parts={"input": QuantSpec(torch.uint8)})
        fresh.load_state_dict(state)
        assert said(fresh)[1] is None


def points(model: nn.Module) -> dict[str, qnn.FakeQuantize]:
    return {n: m for n, m in model.named_modules() if isinstance(m, qnn.FakeQuantize)}


def counter() -> nn.LSTM:
    """c grows by 1 with the first input and falls by 1 with the second."""
    layer = nn.LSTM(2, 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias_ih_l0[:] = torch.tensor([9.0, 9.0, 0.0, 9.0])  # i, f, o are open
        layer.weight_ih_l0[2] = torch.tensor([9.0, -9.0])
    return layer


class TestAccuracy:
    """The default beside 8 bits for all parts, on data that is not normal."""

    @parameterized.expand(
        [
            (data, kind)
            for data in ("spectrum", "counts", "long", "trending")
            for kind in ("LSTM", "GRU", "projection")
        ]
    )
    def test_the_default_is_better(self, data: str, kind: str) -> None:
        torch.manual_seed(1)
        layer = KINDS[kind]().eval()
        with torch.no_grad():  # as training leaves them: wider than at the start
            for parameter in layer.parameters():
                parameter.mul_(3)
        x = {
            "spectrum": torch.log1p(1e3 * heavy(80)),
            "counts": torch.poisson(torch.exp(usual(80))),
            "long": usual(600),
            "trending": usual(200).cumsum(0) / 8,
        }[data]
        with torch.no_grad():
            want = layer(x)[0]
            found = []
            for preset in (None, qnn.parts.EIGHT_BIT):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CalibrationWarning)
                    static = qnn.convert(qnn.calibrate(qnn.prepare(layer, parts=preset), [x]))
                found.append(qnn.sqnr(static(x)[0], want))
        assert found[0] > found[1]
