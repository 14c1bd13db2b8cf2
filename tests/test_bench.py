from __future__ import annotations

import copy
import json
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import qnn
from qnn.verbs import timing


class Slow(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(8, 8), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        result: torch.Tensor = self.layer(x) + shift
        return result


def timed(model: list[float], other: list[float]) -> Any:
    """`qnn.bench` meets these seconds."""
    found = {"model": timing.Samples(wall=model), "other": timing.Samples(wall=other)}
    return mock.patch.dict(qnn.bench.__globals__, interleave=lambda *_: found)


class TestBench:
    def setup_method(self) -> None:
        self.model, self.x = Slow(), torch.randn(3, 8)
        self.twin = qnn.convert(self.model)

    def test_runs_both_and_leaves_no_trace(self) -> None:
        state = copy.deepcopy(self.model.state_dict())
        result = qnn.bench(self.twin, self.x, self.model, seconds=0.01)
        model, other = result.rows
        assert (model.name, model.layers, other.name, other.layers) == ("model", 1, "other", 0)
        assert model.bytes == 8 * 8 + 8 * 4 + 8 * 4 + 4
        assert other.bytes == 4 * (8 * 8 + 8 + 1)
        assert min(model.calls, other.calls) >= 3
        assert 0 < model.fastest <= model.ms <= model.slowest
        assert result.ratio == model.ms / other.ms
        assert result.bytes_ratio == model.bytes / other.bytes
        assert all(torch.equal(t, state[k]) for k, t in self.model.state_dict().items())
        assert self.model.training
        assert self.model.drop.training

    def test_kinds_of_input_and_one_model(self) -> None:
        for inputs in ((self.x,), {"x": self.x, "shift": 1.0}):
            result = qnn.bench(self.model, inputs, seconds=0.01)
            assert (len(result.rows), result.ratio, result.bytes_ratio) == (1, None, None)
            assert "of the time" not in str(result)

    def test_statistics_and_table(self) -> None:
        times = [float(i) for i in range(1, 22)]
        with timed([t / 1e3 for t in times], [0.022]):
            result = qnn.bench(self.twin, self.x, self.model)
        model = result.rows[0]
        assert (model.ms, model.fastest, model.slowest, model.calls) == pytest.approx(
            (11.0, 3.0, 19.0, 21)
        )
        assert result.ratio == pytest.approx(0.5)
        lines = str(result).splitlines()
        assert len(lines) == 4
        assert lines[-1].startswith("model / other: 0.50 of the time, 0.")
        json.dumps(result.to_dict())

    def test_a_warning_where_quantised_layers_lose(self) -> None:
        slow, fast = [0.003, 0.003, 0.004], [0.002, 0.002, 0.002]
        words = r"with 1 quantised layers takes 1\.50 times .* inputs \[3, 8\]"
        with timed(slow, fast), pytest.warns(UserWarning, match=words):
            qnn.bench(self.twin, self.x, self.model)
        with timed(fast, slow), pytest.warns(UserWarning, match=r"takes 1\.50 times as long"):
            qnn.bench(self.model, {"x": self.x}, self.twin)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with timed(fast, slow):
                qnn.bench(self.twin, self.x, self.model)
            with timed([0.001, 0.003, 0.003], fast):  # the median alone, by chance
                qnn.bench(self.twin, self.x, self.model)
            with timed(slow, fast):  # neither is quantised
                qnn.bench(self.model, self.x, copy.deepcopy(self.model))

    def test_wrong_arguments(self) -> None:
        with pytest.raises(TypeError, match=r"qnn\.bench takes an nn\.Module, got Tensor"):
            qnn.bench(self.x, self.model)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"qnn\.bench takes an nn\.Module, got Tensor"):
            qnn.bench(self.model, self.x, self.x)  # type: ignore[arg-type]
        for seconds in (0, -1, float("nan"), "1", True):
            with pytest.raises(ValueError, match="seconds must be a positive number"):
                qnn.bench(self.model, self.x, seconds=seconds)  # type: ignore[arg-type]

    def test_a_prepared_model_records_nothing(self) -> None:
        prepared = qnn.prepare(self.model)
        qnn.bench(prepared, self.x, seconds=0.01)
        assert int(prepared.layer.input_quantize.observer.count) == 0
        assert prepared.layer.input_quantize.observing
