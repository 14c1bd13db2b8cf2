"""`calibrate`: batches of every form, modes, progress, errors."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import qnn
from qnn import FakeQuantize, QuantSpec

SPEC = QuantSpec(torch.int8, symmetric=True)


class Scaled(nn.Module):
    def __init__(self, qat: bool = False) -> None:
        super().__init__()
        self.point = FakeQuantize(SPEC, name="scaled", qat=qat)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return self.norm(self.dropout(self.point(x * factor)))


class TestCalibrate:
    @parameterized.expand(
        [
            ("tensors", [torch.ones(2, 3), torch.full((1, 3), 2.54)]),
            ("tuples", [(torch.ones(2, 3),), (torch.full((1, 3), 1.27), 2.0)]),
            ("lists", [[torch.full((1, 3), 1.27), 2.0]]),
            ("dicts", [{"x": torch.full((1, 3), 1.27), "factor": 2.0}]),
        ]
    )
    def test_batches(self, _: str, batches: list[Any]) -> None:
        for given in (batches, iter(batches)):
            model = Scaled()
            assert qnn.calibrate(model, given) is model
            assert model.point.qparams()[0].item() == pytest.approx(0.02, abs=0.5e-6)

    def test_a_namedtuple_is_one_argument(self) -> None:
        class Packed(Scaled):
            def forward(self, x: Any, factor: float = 1.0) -> torch.Tensor:
                return super().forward(pad_packed_sequence(x)[0].flatten(0, 1), factor)

        batch = pack_sequence([torch.full((n, 3), 1.27 / n) for n in (2, 1)], enforce_sorted=False)
        for given in (batch, (batch, 1.0), {"x": batch}):
            model = Packed()
            qnn.calibrate(model, [given])
            assert model.point.qparams()[0].item() == pytest.approx(0.01, abs=0.5e-6)
        with pytest.raises(TypeError, match=r"a PackedSequence, one batch; pass \[batch\]"):
            qnn.calibrate(Packed(), batch)
        assert isinstance(batch, PackedSequence)

    @parameterized.expand([(False,), (True,)])
    def test_modes(self, qat: bool) -> None:
        """Evaluation, no gradients; then every module as it was, and no statistics moved."""
        model = Scaled(qat)
        model.norm.eval()
        qnn.calibrate(model, [torch.ones(2, 3)])
        assert model.calls == [(False, False)]
        modes = [module.training for module in (model, model.point, model.dropout, model.norm)]
        assert modes == [True, True, True, False]
        assert model.norm.num_batches_tracked.item() == 0
        assert model.point.qparams()[0].item() == pytest.approx(1 / 127, abs=0.5e-8)

    def test_modes_are_restored_after_an_error(self) -> None:
        model = Scaled()
        with pytest.raises(RuntimeError):
            qnn.calibrate(model, [torch.ones(2, 3), torch.ones(2, 4)])
        assert model.training
        assert model.point.training

    def test_batches_come_one_at_a_time(self) -> None:
        model = Scaled()

        def batches() -> Iterator[torch.Tensor]:
            for i in range(3):
                assert len(model.calls) == i
                yield torch.ones(2, 3)

        qnn.calibrate(model, batches())

    def test_progress(self) -> None:
        for progress, terminal, shown in (
            (True, True, True), (True, False, False), (False, True, False), ("always", False, True),
        ):  # fmt: skip
            stream = io.StringIO()
            with (
                mock.patch.object(sys, "stderr", stream),
                mock.patch.object(stream, "isatty", lambda terminal=terminal: terminal),
            ):
                qnn.calibrate(Scaled(), [torch.ones(2, 3)] * 2, progress=progress)
            assert ("qnn.calibrate: batch 2/2" in stream.getvalue()) == shown
            assert bool(stream.getvalue()) == shown

    def test_errors(self) -> None:
        one = [torch.ones(2, 3)]
        with pytest.raises(ValueError, match=r"no observation points; qnn.prepare\(model\)"):
            qnn.calibrate(nn.Linear(3, 3), one)
        for empty in ([], iter([])):
            with pytest.raises(ValueError, match="no batches"):
                qnn.calibrate(Scaled(), empty)
        with pytest.raises(ValueError, match="all 1 observation points are frozen or fixed"):
            qnn.calibrate(qnn.freeze_observers(Scaled()), one)
        with pytest.raises(TypeError, match=r"batches is a Tensor, one batch; pass \[batch\]"):
            qnn.calibrate(Scaled(), one[0])
        with pytest.raises(TypeError, match="batches is a dict"):
            qnn.calibrate(Scaled(), {"x": one[0]})
        with pytest.raises(TypeError, match=r"takes an nn.Module, got str"):
            qnn.calibrate("model", one)  # type: ignore[type-var]
        with pytest.raises(ValueError, match="progress must be True, False or 'always'"):
            qnn.calibrate(Scaled(), one, progress="never")
