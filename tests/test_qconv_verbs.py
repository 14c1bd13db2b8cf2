"""The way of convolutions through the verbs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

from .common import same_bits


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
                "weight_g, weight_v.*remove_weight_norm",
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
