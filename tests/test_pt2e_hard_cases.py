"""Small models in which a flow goes wrong easily, annotated by a vendor's quantizer, and faults of
other flows that must not come back. E3, E4 and E6 to E10 by schemes are in `test_pt2e_graphs`,
`test_pt2e_layers` and `test_pt2e_bodies`.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.nn import functional as F

import qnn
from qnn.pt2e import Int8Quantizer, convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from qnn.pt2e.specs import (
    WHY_LEFT,
    DerivedQuantizationSpec,
    QuantizationSpec,
    SharedQuantizationSpec,
)

from .pt2e import ACT, SIGNED, WEIGHT, annotate, aten, node_of, observed, of_layers, ops
from .test_fusion import compiled
from .test_pt2e_norms import settled, trained
from .test_pt2e_rules import Annotates, converted, prepared

BIAS = QuantizationSpec(torch.int32, None, -(2**31), 2**31 - 1, torch.per_channel_symmetric, 0)


def layer_of(gm: Any, at: int = 0) -> Any:
    return node_of(gm, aten.conv2d.default, at)


class E1(nn.Module):
    """One result in int8, pooled in uint8, multiplied in float, and read by a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x)
        return self.b(y), F.avg_pool2d(y, 2), y * 2


class E2(nn.Module):
    """All operators share input and output."""

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> Any:
        a = x.clone()
        c = torch.cat([a, a, w], 1)
        return torch.cat([c, x], 1), torch.maximum(a, x)


class E5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
        self.d = nn.Dropout(0.1)
        nn.init.zeros_(self.b.weight[:1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.b(self.c(x)).relu())


class E7(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("n", torch.tensor([100]))
        self.l = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.l(x)[:, torch.arange(4) + 0]
        return (y + self.n) * 3.4e38, torch.eq(x, 0), y.shape[0] - 1


class E10(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.b = nn.ConvTranspose2d(2, 6, 3), nn.BatchNorm2d(6)
        self.d = nn.Conv2d(6, 4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.b(self.c(x)))


class TestCases:
    @parameterized.expand([("output",), ("edge",)])
    def test_e1_readers_with_other_grids(self, of: str) -> None:
        def write(gm: Any) -> None:
            a, b = layer_of(gm), layer_of(gm, 1)
            output = SIGNED if of == "output" else None
            annotate(a, {a.args[0]: ACT, a.args[1]: WEIGHT}, output)
            annotate(b, {b.args[0]: SIGNED, b.args[1]: WEIGHT})
            pool = node_of(gm, aten.avg_pool2d.default)
            annotate(pool, {pool.args[0]: ACT})

        x = torch.randn(2, 3, 4, 4)
        nodes = converted(E1(), Annotates(write), x, form="qdq")
        raw, read = layer_of(nodes), node_of(nodes, aten.mul.Tensor).args[0]
        pooled = node_of(nodes, aten.avg_pool2d.default).args[0]
        assert pooled.args[-1] == torch.uint8
        assert layer_of(nodes, 1).args[0].args[-1] == torch.int8
        if of == "output":  # what is not annotated reads what the others read
            assert read.args[-1] == torch.int8
            assert read.args[0].args[0] is raw
        else:
            assert read is raw

    @parameterized.expand([(at,) for at in range(3)])
    def test_e2_whatever_place_has_the_spec(self, at: int) -> None:
        def write(gm: Any) -> None:
            first, last = (n for n in gm.graph.nodes if n.target is aten.cat.default)
            maximum, clone = node_of(gm, aten.maximum.default), first.args[0][0]
            places = [(clone, first), (clone.args[0], last), (clone.args[0], maximum)]
            anchor, shared = places[at], SharedQuantizationSpec(places[at])
            for node in (clone, first, last, maximum):
                inputs = {n: ACT if (n, node) == anchor else shared for n in node.all_input_nodes}
                annotate(node, inputs, shared)

        args = (torch.randn(2, 3), torch.randn(2, 2))
        gm = prepared(E2(), Annotates(write), *args)
        assert len({name for _, name in observed(gm)}) == 1
        first = node_of(gm, aten.cat.default)
        assert first.args[0][0] is first.args[0][1]
        done = convert_pt2e(gm)
        for want, got in zip(E2()(*args), done(*args), strict=True):
            assert qnn.sqnr(want, got) > 35

    @parameterized.expand([("scheme",), ("specs",)])
    def test_e5_training_and_evaluating_twice(self, by: str) -> None:
        quantizer: Any = Int8Quantizer("int8_static")
        if by == "specs":
            quantizer = Annotates(of_layers(ACT, QuantizationSpec(
                torch.int8, None, -127, 127, torch.per_channel_symmetric, 0
            )))  # fmt: skip
        gm = trained(E5(), quantizer, x := torch.randn(6, 3, 8, 8))
        for _ in range(2):
            gm.eval()
            before = copy.deepcopy(gm.state_dict())
            want = gm(x * 3)
            assert all(torch.equal(value, before[k]) for k, value in gm.state_dict().items())
            gm.train()(x)
        assert (gm.b.eps, gm.b.momentum, gm.d.p) == (1e-3, 0.03, 0.1)
        gm.eval()
        want = gm(x)
        assert want.isfinite().all()
        assert qnn.sqnr(want, convert_pt2e(gm)(x)) > 60

    def test_e7_integers_and_what_would_overflow(self) -> None:
        def write(gm: Any) -> None:
            of_layers(ACT, WEIGHT, out=ACT)(gm)
            for node in gm.graph.nodes:
                if node.target in (aten.add.Tensor, aten.mul.Tensor, aten.eq.Scalar):
                    annotate(node, dict.fromkeys(node.all_input_nodes, ACT), ACT)

        x = torch.randn(3, 4)
        batch = torch.export.Dim("batch", min=2, max=9)
        program = torch.export.export(E7(), (x,), dynamic_shapes=({0: batch},))
        gm = prepare_pt2e(program, Annotates(write))
        gm(x)
        left = {n.name: n.meta[WHY_LEFT] for n in gm.graph.nodes if WHY_LEFT in n.meta}
        assert "int64" in left["add_1"]
        assert "near the end of float32" in left["mul"]
        assert {name for name, _ in observed(gm)} == {"x", "linear", "l_weight"}
        big, equal, size = convert_pt2e(gm)(torch.zeros(5, 4))
        assert big.isinf().all()
        assert equal.all()
        assert size == 4

    def test_e10_a_bias_derived_after_the_fold(self) -> None:
        def write(gm: Any) -> None:
            node = node_of(gm, aten.conv_transpose2d.input)
            x, weight, bias = node.args[:3]
            spec = QuantizationSpec(torch.int8, None, -127, 127, torch.per_channel_symmetric, 1)

            def derive(observers: Any) -> Any:
                (a, _), (w, _) = (each.calculate_qparams() for each in observers)
                return a * w, torch.zeros_like(w, dtype=torch.int32)

            derived = DerivedQuantizationSpec(
                [(x, node), (weight, node)], derive, torch.int32, BIAS.quant_min, BIAS.quant_max,
                torch.per_channel_symmetric, 0,
            )  # fmt: skip
            annotate(node, {x: ACT, weight: spec, bias: derived})
            of_layers(ACT, WEIGHT, bias=BIAS)(gm)

        x = torch.randn(3, 2, 5, 5)
        model = settled(E10(), x)
        gm = prepared(model, Annotates(write), x)
        nodes = convert_pt2e(gm, form="qdq")
        state = nodes.state_dict()
        assert state["c.bias"].dtype == torch.int32
        scale = state["c.bias_scale"]
        (static, *_) = node_of(nodes, aten.conv_transpose2d.input).args[0].args[1:]
        torch.testing.assert_close(scale, state["c.weight_scale"] * static)
        assert "d.bias" not in state
        assert qnn.sqnr(model(x), nodes(x)) > 25


class TestFaults:
    """The number is that of the fault."""

    @parameterized.expand([(True,), (False,)])
    def test_1_integers_without_freezing_in_either_grad_mode(self, grad: bool) -> None:
        x = torch.randn(4, 16)
        net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        graph = converted(net, Int8Quantizer("int8_static"), x)
        with torch.set_grad_enabled(grad):
            got, calls = compiled(graph, x)
            torch.testing.assert_close(got, graph(x))
        assert sum(n for op, n in calls.items() if op.startswith("int8_static_linear")) == 2

    def test_3_one_copy_of_the_weights(self) -> None:
        net, x = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)), None
        x = torch.randn(2, 8, 8, 8)
        for quantizer in (Int8Quantizer("int8_static"), Annotates(of_layers(ACT, WEIGHT))):
            for form in ("layers", "qdq"):
                files = [io.BytesIO(), io.BytesIO()]
                graph = converted(net, quantizer, x, form=form)
                torch.save(net.state_dict(), files[0])
                torch.save(graph.state_dict(), files[1])
                small, large = (len(f.getvalue()) for f in reversed(files))
                assert small < 0.3 * large

    @parameterized.expand([(True,), (False,)])
    def test_6_no_odd_layer_aborts_the_model(self, qat: bool) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.a = nn.Conv2d(3, 3, 3, padding="same")
                self.c, self.n = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.a(self.a(x))
                return self.n(self.c(y)) + F.conv2d(y, self.c.weight * 2)

        x = torch.randn(4, 3, 6, 6)
        prepare = prepare_qat_pt2e if qat else prepare_pt2e
        for quantizer in (Int8Quantizer("int8_static"), Annotates(of_layers(ACT, WEIGHT))):
            gm = prepare(torch.export.export(settled(Odd(), x), (x,)), quantizer)
            gm(x)
            want = gm.eval()(x)
            done = convert_pt2e(gm)
            assert qnn.sqnr(want, done(x)) > (60 if qat else 20)
            assert ops(done)["QConv2d"] >= 2

    def test_layers_one_after_another_and_called_twice(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.b(self.a(self.a(x)))

        graph = converted(Net(), Annotates(of_layers(ACT, WEIGHT)), torch.randn(8, 4))
        assert ops(graph)["QLinear"] == 3

    @parameterized.expand(
        [(q, f, t) for q in (False, True) for f in ("layers", "qdq") for t in ("weight", "bias")]
    )
    def test_a_folded_layer_whose_parts_others_read(self, qat: bool, form: Any, part: str) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.c, self.n = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
                self.d = nn.Conv2d(3, 3, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.d(self.n(self.c(x))) + getattr(self.c, part).sum()

        x = torch.randn(4, 3, 6, 6)
        weight = QuantizationSpec(torch.int8, None, -127, 127, torch.per_channel_symmetric, 0)
        for quantizer in (Int8Quantizer("int8"), Annotates(of_layers(ACT, weight))):
            prepare = prepare_qat_pt2e if qat else prepare_pt2e
            gm = prepare(torch.export.export(settled(Net(), x), (x,)), quantizer)
            gm(x)
            want = gm.eval()(x)
            assert qnn.sqnr(want, convert_pt2e(gm, form=form)(x)) > 35

    def test_8_and_14_errors_say_what_to_do(self) -> None:
        program = torch.export.export(E1(), (torch.randn(2, 3, 4, 4),))
        for quantizer, name in (
            (Int8Quantizer("int8_static"), "a"),
            (Annotates(of_layers(ACT, WEIGHT)), "a.input_observer"),
        ):
            with pytest.raises(ValueError, match=name):
                convert_pt2e(prepare_pt2e(program, quantizer))
