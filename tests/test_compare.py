from __future__ import annotations

import json
import math
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qnn


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, shift: float = 0.0) -> Any:
        y = self.once(x) + shift
        return OrderedDict(a=self.twice(self.twice(y)), b=[y, torch.ones(1, dtype=torch.int64)])


class TestSqnr:
    def test_values(self) -> None:
        x = torch.tensor([3.0, 4.0])
        assert qnn.sqnr(x, x) == math.inf
        assert qnn.sqnr(x, x + torch.tensor([0.5, 0.0])) == pytest.approx(20.0, abs=0.5e-7)
        assert math.isnan(qnn.sqnr(x, x * math.nan))
        with pytest.raises(ValueError, match="differ in shape"):
            qnn.sqnr(x, x[:1])


class TestCompare:
    def setup_method(self) -> None:
        self.model = Reused()
        self.model.twice.weight.data[0, 0] = 9.0  # an outlier costs its row precision
        self.twin = qnn.convert(self.model)
        self.x = torch.randn(16, 32)

    def test_recurrent_layers(self) -> None:
        model = nn.ModuleDict({"rnn": nn.LSTM(8, 16, batch_first=True), "head": nn.Linear(16, 4)})
        model.forward = lambda x: model["head"](model["rnn"](x)[0])  # type: ignore[method-assign]
        twin = qnn.convert(model)
        twin.forward = lambda x: twin["head"](twin["rnn"](input=x)[0])  # type: ignore[method-assign]
        table = qnn.compare(model, twin, torch.randn(3, 5, 8))
        assert {row.name for row in table.rows} == {"rnn", "head", "(output)"}
        rnn = next(row for row in table.rows if row.name == "rnn")
        assert (rnn.scheme, rnn.sqnr) == ("int8", rnn.alone)
        assert rnn.sqnr > 30
        with pytest.raises(ValueError, match="has no recurrent layer 'rnn'"):
            qnn.compare(nn.ModuleDict({"head": nn.Linear(16, 4)}), twin, torch.randn(3, 5, 8))

    def test_rows_are_sorted_worst_first(self) -> None:
        table = qnn.compare(self.model, self.twin, self.x)
        values = [row.sqnr for row in table.rows]
        assert values == sorted(values)
        assert {row.name for row in table.rows} == {"once", "twice", "(output)"}
        once = next(row for row in table.rows if row.name == "once")
        assert once.sqnr == pytest.approx(
            qnn.sqnr(self.model.once(self.x), self.twin.once(self.x)), abs=0.5e-7
        )
        assert once.sqnr == once.alone
        assert table.output > 25
        assert "once" in str(table)
        assert len(table.to_dict()["rows"]) == 3

    def test_kinds_of_input_and_no_hook_stays(self) -> None:
        want = qnn.compare(self.model, self.twin, self.x).output
        assert qnn.compare(self.model, self.twin, (self.x,)).output == want
        assert qnn.compare(self.model, self.twin, {"x": self.x}).output == want
        for module in (*self.model.modules(), *self.twin.modules()):
            assert not module._forward_hooks

    def test_nan_comes_first(self) -> None:
        self.twin.once.bias.data[0] = math.nan
        table = qnn.compare(self.model, self.twin, self.x)
        assert math.isnan(table.rows[0].sqnr)

    def test_never_called(self) -> None:
        class Direct(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = self.a(x) @ self.b.weight.T.float()
                return y

        model = Direct()
        for twin in (qnn.convert(model), qnn.convert(model, "fp8", training=True)):
            twin.a.bias.data[0] = math.nan  # worse than any SQNR, but it was called
            table = qnn.compare(model, twin, torch.randn(3, 8))
            assert table.rows[0].name == "b"
            assert math.isnan(table.rows[0].sqnr)
            assert "never called: its weight may be read directly" in str(table)
            assert [row.note is None for row in table.rows] == [False, True, True]
            json.dumps(table.to_dict())

    def test_training_models_and_modes(self) -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 4))
        x = torch.randn(6, 8)
        for options in ({"scheme": "int8"}, {"scheme": "fp8", "training": True}):
            twin = qnn.convert(model, **options)
            twin[2].eval()
            modes = [m.training for m in (*model.modules(), *twin.modules())]
            table = qnn.compare(model, twin, x)
            assert {row.name for row in table.rows} == {"0", "3", "(output)"}
            assert table.output > 20  # without dropout
            assert [m.training for m in (*model.modules(), *twin.modules())] == modes
            assert int(twin[1].num_batches_tracked) == 0

    def test_a_layer_without_values_is_named(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
        with pytest.raises(ValueError, match=r"'1' .LazyLinear. has no values before its first"):
            qnn.compare(model, qnn.convert(model, exclude="1"), torch.randn(2, 8))

    def test_bad_models(self) -> None:
        with pytest.raises(ValueError, match="the second model has no quantised layer"):
            qnn.compare(self.model, self.model, self.x)
        with pytest.raises(ValueError, match="the float model has no linear layer 'once'"):
            qnn.compare(nn.Linear(2, 2), self.twin, self.x)
        with pytest.raises(TypeError, match=r"qnn\.compare takes an nn\.Module, got Tensor"):
            qnn.compare(self.model, self.x, self.twin)

    def test_other_call_counts_are_refused(self) -> None:
        class Once(Reused):
            def forward(self, x: torch.Tensor, shift: float = 0.0) -> Any:
                return self.twice(self.once(x))

        once = Once()
        for a, b, which in ((self.model, once, "float"), (once, self.model, "quantised")):
            with pytest.raises(ValueError, match=f"more often in the {which} "):
                qnn.compare(a, qnn.convert(b), self.x)

    def test_plot(self) -> None:
        pytest.importorskip("matplotlib", reason="needs the extra 'examples'")
        with tempfile.TemporaryDirectory() as folder:
            path = qnn.compare(self.model, self.twin, self.x).plot(Path(folder) / "c.png")
            assert path.stat().st_size > 5000
