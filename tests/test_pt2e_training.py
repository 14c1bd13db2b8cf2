"""Quantisation-aware training of an exported graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parameterized import parameterized
from torch import nn

import qnn
from qnn import pt2e
from qnn.pt2e import Int8Quantizer

from .test_pt2e import Net, exported, images, settled


class LinearNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


PAIRS: list[tuple[str, Any, Any, tuple[int, ...]]] = [
    ("conv1d", lambda: nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d, (5, 4, 9)),
    ("conv2d", lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (5, 4, 7, 7)),
    ("conv3d", lambda: nn.Conv3d(4, 6, 2), nn.BatchNorm3d, (5, 4, 4, 4, 4)),
    ("transposed1d", lambda: nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d, (5, 4, 9)),
    (
        "transposed2d",
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False),
        nn.BatchNorm2d,
        (5, 4, 5, 5),
    ),
    ("transposed3d", lambda: nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d, (5, 4, 3, 3, 3)),
    ("linear", lambda: nn.Linear(4, 6), nn.BatchNorm1d, (5, 4)),
]


def prepared(model: nn.Module, args: Any, scheme: str = "int8_static") -> Any:
    return pt2e.prepare_qat_pt2e(exported(model, args), Int8Quantizer(scheme))


def trained(graph: Any, args: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.SGD(graph.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        graph(*args()).square().mean().backward()
        optimizer.step()
    return graph


class TestPairs:
    @parameterized.expand(PAIRS)
    def test_b124_b125_b127_trained_apart_and_folded(
        self, _: str, layer: Any, norm: Any, size: Any
    ) -> None:
        def args() -> tuple[torch.Tensor]:
            return (torch.randn(size),)

        model = nn.Sequential(layer(), norm(6, eps=1e-3, momentum=0.2), nn.ReLU())
        graph = trained(prepared(model, args()), args).eval()
        assert isinstance(graph.get_submodule("1"), norm)
        x = args()
        want, float_state = graph(*x), set(model.state_dict())
        done = pt2e.convert_pt2e(graph)
        assert qnn.sqnr(want, done(*x)) > 60
        assert "BatchNorm 1 folded in" in str(qnn.summary(done))
        assert {key for key in done.state_dict() if key.startswith("1.")} == set()
        assert {"0.weight", "1.running_mean"} <= float_state

    @parameterized.expand(PAIRS)
    def test_b113_b117_folded_after_training(
        self, _: str, layer: Any, norm: Any, size: Any
    ) -> None:
        x = (torch.randn(size),)
        model = nn.Sequential(layer(), norm(6), nn.ReLU())
        for _ in range(3):
            model(*x)
        graph = pt2e.prepare_pt2e(exported(model.eval(), x), Int8Quantizer("int8_static"))
        assert "batch_norm" not in graph.code
        assert qnn.sqnr(model(*x), graph(*x)) > 100

    def test_what_may_not_be_folded(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(4, 4)
                self.na, self.nb = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
                self.nc = nn.BatchNorm1d(2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.a(x)  # read again
                z = self.nb(self.b(self.na(y) + y)) + self.b(x)  # one call of b without nb
                return self.nc(self.c(z[:, :, 0]))  # over another axis than that of the outputs

        x = (torch.randn(3, 2, 4, 4),)
        model = settled_with(Net(), x)
        graph = pt2e.prepare_pt2e(exported(model, x), Int8Quantizer("int8"))
        assert qnn.sqnr(model(*x), graph(*x)) > 100
        reasons = {row.name: row.reason or "" for row in qnn.summary(graph).rows}
        assert "not folded: the layer's result is also read by" in reasons["na"]
        assert "not folded: the layer's weight is also read by" in reasons["nb"]
        assert "not folded: it normalises an axis" in reasons["nc"]
        graph = prepared(model, x)
        graph(*x)
        want = graph.eval()(*x)
        done = pt2e.convert_pt2e(graph)
        assert {"na", "nb", "nc"} <= {name for name, _ in done.named_modules()}
        assert qnn.sqnr(want, done(*x)) > 60


def settled_with(model: nn.Module, x: tuple[torch.Tensor]) -> nn.Module:
    for _ in range(3):
        model(*x)
    return model.eval()


class TestModes:
    def test_b141_b142_b145_train_and_eval_are_those_of_a_module(self) -> None:
        graph, x = prepared(settled(Net()), images()), images()
        assert graph.training
        assert graph.drop.training
        graph.eval()
        assert not any(module.training for module in graph.modules())
        assert torch.equal(graph(*x), graph(*x))
        graph.train()
        assert not torch.equal(graph(*x), graph(*x))  # dropout
        for move in (pt2e.move_exported_model_to_eval, pt2e.move_exported_model_to_train):
            assert move(graph) is graph
        assert graph.training
        assert pt2e.model_is_exported(graph)
        assert pt2e.allow_exported_model_train_eval(graph) is graph

    def test_synchronised_batch_norms(self) -> None:
        graph = nn.SyncBatchNorm.convert_sync_batchnorm(prepared(settled(Net()), images()))
        assert isinstance(graph.b1, nn.SyncBatchNorm)
        graph.eval()
        done = pt2e.convert_pt2e(trained_in_eval(graph))
        assert "BatchNorm b1 folded in" in str(qnn.summary(done))

    @parameterized.expand([("aot_eager",), ("inductor",)])
    def test_compiled_training(self, backend: str) -> None:
        graph = prepared(settled(Net()), images())
        graph.drop.p = 0.0
        other = copy.deepcopy(graph)
        step = torch.compile(other, fullgraph=True, backend=backend)
        for _ in range(2):
            x = images(8)
            graph(*x).square().mean().backward()
            step(*x).square().mean().backward()
        for (name, want), got in zip(graph.named_parameters(), other.parameters(), strict=True):
            if want.grad is None:
                assert got.grad is None, name
            else:
                # A bias before a BatchNorm has a gradient of zero and some rounding.
                assert torch.allclose(want.grad, got.grad, rtol=0.02, atol=1e-6), name
        for (name, want), got in zip(graph.named_buffers(), other.buffers(), strict=True):
            assert torch.allclose(want.float(), got.float(), rtol=1e-3, atol=1e-4), name
        x = images(8)
        graph.eval(), other.eval()
        assert qnn.sqnr(graph(*x), step(*x)) > 40

    def test_freeze(self) -> None:
        graph = trained(prepared(settled(Net()), images()), lambda: images(8))
        qnn.freeze_observers(graph), qnn.freeze_bn(graph)
        before = copy.deepcopy(dict(graph.named_buffers()))
        trained(graph.train(), lambda: images(8))
        for name, value in graph.named_buffers():
            assert torch.equal(value, before[name]), name
        assert graph.b1.weight.grad is not None
        graph.drop.p = 0.0
        x = images(16)
        want = graph.train()(*x)  # what is trained now is what is deployed
        assert qnn.sqnr(want, pt2e.convert_pt2e(graph)(*x)) > 60
        qnn.unfreeze_bn(graph)(*x)
        assert not torch.equal(graph.b1.running_mean, before["b1.running_mean"])
        with pytest.raises(ValueError, match="no frozen BatchNorm"):
            qnn.unfreeze_bn(graph)
        with pytest.raises(ValueError, match="no BatchNorm with statistics"):
            qnn.freeze_bn(nn.Linear(2, 2))

    def test_switches(self) -> None:
        graph = prepared(settled(Net()), images())
        graph.apply(pt2e.disable_observer)
        before = copy.deepcopy(graph.state_dict())
        graph.eval()(*images())
        graph.apply(pt2e.enable_observer)
        graph.train()(*images())
        assert not torch.equal(
            graph.state_dict()["fc.input_quantize.scale"], before["fc.input_quantize.scale"]
        )

    def test_state_goes_on_in_another_prepared_graph(self) -> None:
        model = settled(Net())
        graph = trained(prepared(model, images()), lambda: images(8))
        other = prepared(settled(Net()), images())
        other.load_state_dict(graph.state_dict())
        x = images()
        assert torch.equal(graph.eval()(*x), other.eval()(*x))
        got, want = pt2e.convert_pt2e(other).state_dict(), pt2e.convert_pt2e(graph).state_dict()
        assert all(torch.equal(got[key], want[key]) for key in want)


def trained_in_eval(graph: Any) -> Any:
    """Synchronised BatchNorms train in several processes only; the observers see data here."""
    for point in qnn.calibration.fake_quantize.observation_points(graph):
        point.training = True
    graph(*images(8))
    return graph


class TestSchemes:
    def test_what_has_no_grid_is_converted_only(self) -> None:
        graph = trained(prepared(settled(Net()), images(), "int8"), lambda: images(8))
        done = pt2e.convert_pt2e(graph)
        assert {row.scheme for row in qnn.summary(done).rows if row.scheme} == {"int8"}

    def test_an_lstm(self) -> None:
        class Tagger(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(F.relu(self.lstm(x)[0]))

        def args() -> tuple[torch.Tensor]:
            return (torch.randn(4, 7, 6),)

        graph = trained(prepared(Tagger(), args()), args).eval()
        x = args()
        assert qnn.sqnr(graph(*x), pt2e.convert_pt2e(graph)(*x)) > 35
