"""What the compiler makes of a converted graph, without freezing; the numbers are those of the list
of behaviours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from parameterized import parameterized
from torch import nn
from torch.nn import functional as F

import qnn
from qnn.pt2e import Int8Quantizer, convert_pt2e, prepare_pt2e

from . import test_chains
from .test_fusion import compiled
from .test_pt2e_norms import settled, trained

CONV, LINEAR = "int8_static_conv", "int8_static_linear"


class Layers(nn.Module):
    """A layer for each of several functions that read it."""

    def __init__(self, make: Callable[[], nn.Module], *functions: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.functions = nn.ModuleList(make() for _ in functions), functions

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(f(layer, x) for f, layer in zip(self.functions, self.layers, strict=True))


def after(act: Any) -> Any:
    return lambda layer, x: act(layer(x))


def graph_of(model: nn.Module, x: torch.Tensor, scheme: str = "int8_static", **options: Any) -> Any:
    """The converted graph."""
    program = torch.export.export(model.eval(), (x,), **options)
    return convert_pt2e(
        qnn.calibrate(prepare_pt2e(program, Int8Quantizer(scheme)), [x], progress=False)
        if scheme == "int8_static"
        else prepare_pt2e(program, Int8Quantizer(scheme))
    )


@torch.no_grad()
def check(graph: Any, x: torch.Tensor, calls: dict[str, int], **options: Any) -> None:
    got, found = compiled(graph, x, **options)
    assert found == Counter(calls)
    want = graph(x)
    for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
        bound = 8 * torch.finfo(other.dtype).eps
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * float(other.abs().max()))


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


class TestConvolutions:
    @parameterized.expand([(torch.float32,), (torch.bfloat16,)])
    def test_b183_activations(self, dtype: torch.dtype) -> None:
        """Bounds that are not ReLU6's make an operation of their own after the layer."""
        acts = (F.relu, F.relu6, F.hardswish, F.silu, nn.Hardtanh(0, 6), nn.Hardtanh(-1, 1))
        model = Layers(conv, *map(after, acts)).to(dtype)
        x = torch.randn(2, 4, 6, 6, dtype=dtype)
        calls = {f"{CONV}+{name}": 1 for name in ("relu", "hardswish", "silu")}
        check(graph_of(model, x), x, calls | {f"{CONV}+relu6": 2, CONV: 1})

    def test_b183_of_one_axis(self) -> None:
        model = Layers(lambda: nn.Conv1d(4, 4, 3), after(F.relu))
        check(graph_of(model, x := torch.randn(2, 4, 9)), x, {f"{CONV}+relu": 1})

    def test_b184_b185_b186_sums(self) -> None:
        model = Layers(
            conv,
            lambda layer, x: layer(x) + x,
            lambda layer, x: F.relu(layer(x) + x),
            lambda layer, x: layer(x) + x[:, :1],  # another shape
            lambda layer, x: layer(x) + 3,
        )
        graph = graph_of(model, x := torch.randn(2, 4, 6, 6))
        before = x.clone()
        check(graph, x, {f"{CONV}+residual": 2, CONV: 2})
        assert torch.equal(x, before)  # which all layers read

    def test_b155_b156_the_layer_with_one_reader_takes_the_sum(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.a, self.b = conv(), conv()

            def forward(self, x: torch.Tensor) -> Any:
                y = self.a(x)
                return F.relu(y + self.b(x)), y

        graph = graph_of(Net(), x := torch.randn(2, 4, 6, 6))
        check(graph, x, {CONV: 1, f"{CONV}+residual": 1})
        assert graph.b.input_scale.numel() == 1
        assert not [name for name in graph.state_dict() if "residual" in name]

    def test_b189_trained_as_calibrated(self) -> None:
        x = torch.randn(4, 4, 6, 6)
        model = settled(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), x)
        static = graph_of(model, x)
        done = convert_pt2e(trained(model, Int8Quantizer("int8_static"), x))
        for graph in (static, done):
            check(graph, x, {f"{CONV}+relu": 1})

    def test_b197_b157_a_residual_network_hands_codes_on(self) -> None:
        x = test_chains.image(2, 6, 9, 10)
        make, calls = test_chains.NETWORKS["ResNet"]
        torch.manual_seed(4)
        graph = graph_of(settled(make(), x), x)
        test_chains.check(graph, x, calls=calls)


class TestLinear:
    @parameterized.expand([("int8_static",), ("int8",)])
    def test_b187_b158_activations_sums_and_shapes(self, scheme: str) -> None:
        model = Layers(
            lambda: nn.Linear(8, 8, bias=False),
            after(F.relu),
            after(F.gelu),
            after(lambda y: F.gelu(y, approximate="tanh")),
            lambda layer, x: layer(x) + x,
            lambda layer, x: layer(x) * x,
            lambda layer, x: layer(x.mT).mT,
        )
        x = torch.randn(2, 8, 8)
        graph = graph_of(model, x, scheme)
        names = [f"+{name}" for name in ("relu", "gelu", "gelu_tanh", "residual")]
        if scheme == "int8":  # rows that five layers read are quantised once
            calls = {"int8_quantize": 1, "int8_linear": 1, "int8_rows_linear": 1}
            calls |= {f"int8_rows_linear{name}": 1 for name in names}
        else:
            calls = {LINEAR: 2} | {f"{LINEAR}{name}": 1 for name in names}
        check(graph, x, calls)

    def test_b187_b196_any_batch(self) -> None:
        model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
        x = torch.randn(2, 4, 6, 6)
        batch = torch.export.Dim("batch", min=1, max=64)
        graph = graph_of(model, x, dynamic_shapes=({0: batch},))
        check(graph, torch.randn(3, 4, 6, 6), {f"{CONV}+relu": 1, LINEAR: 1}, dynamic=True)

    def test_b159_called_twice(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.l = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.relu(self.l(F.relu(self.l(x)) * 2) + x)

        graph = graph_of(Net(), x := torch.randn(3, 8))
        assert [n.target for n in graph.graph.find_nodes(op="call_module")][1:] == ["l", "l"]
        check(graph, x, {f"{LINEAR}+relu": 1, f"{LINEAR}+residual": 1})
