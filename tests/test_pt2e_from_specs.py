"""Layers of qnn's from the annotations of others, and both kinds of annotation in one graph; the
numbers are those of the list of behaviours.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qnn
from qnn import pt2e
from qnn.kernels.torch_private import quantized_decomposed
from qnn.passes import regions
from qnn.pt2e import Int8Quantizer, convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from qnn.pt2e.from_specs import layers_of_specs
from qnn.pt2e.qdq import write_qdq
from qnn.pt2e.specs import (
    WHY_LEFT,
    DerivedQuantizationSpec,
    QuantizationSpec,
    SharedQuantizationSpec,
)

from .pt2e import (
    ACT,
    DYNAMIC,
    SIGNED,
    WEIGHT,
    ConvNet,
    annotate,
    aten,
    export,
    images,
    node_of,
    observed,
    of_layers,
    ops,
    prepare,
)

qd = quantized_decomposed()


class Specs(pt2e.Quantizer):
    """A quantizer of another vendor: specs on linear layers and convolutions."""

    def __init__(self, *specs: Any, **named: Any) -> None:
        self.write = of_layers(*specs, **named)

    def annotate(self, model: Any) -> None:  # type: ignore[override]
        self.write(model)


def both(gm: Any) -> tuple[Any, Any]:
    """A prepared graph as layers, and as nodes alone."""
    nodes = write_qdq(copy.deepcopy(gm))
    return write_qdq(layers_of_specs(gm), cancel=True), nodes


def shown(model: nn.Module, x: torch.Tensor, *specs: Any, **named: Any) -> Any:
    gm = prepare(export(model, x), of_layers(*specs, **named))
    for _ in range(3):
        gm(torch.randn_like(x))
    return gm


def left(gm: Any) -> dict[str, str]:
    return {n.name: n.meta[WHY_LEFT] for n in gm.graph.nodes if WHY_LEFT in n.meta}


PER_TENSOR = QuantizationSpec(torch.int8, qscheme=torch.per_tensor_symmetric)
SYMMETRIC = QuantizationSpec(torch.int8, qscheme=torch.per_tensor_symmetric)


class TestLayers:
    @pytest.mark.parametrize("act", [ACT, SIGNED, SYMMETRIC, None], ids=["u8", "s8", "sym", "none"])
    @pytest.mark.parametrize("weight", [WEIGHT, PER_TENSOR], ids=["channel", "tensor"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_integers_are_those_of_the_nodes(self, act: Any, weight: Any, dtype: Any) -> None:
        torch.manual_seed(1)
        x = images().to(dtype)
        layers, nodes = both(shown(ConvNet().to(dtype), x, act, weight, out=ACT))
        scheme = "int8_weight" if act is None else "int8_static"
        assert left(layers) == {}
        assert ops(layers)["QConv2d"] == ops(layers)["QLinear"] == 2
        for name in "cdlm":
            layer = layers.get_submodule(name)
            mine, its = layer.state_dict(), nodes.get_submodule(name).state_dict()
            assert layer.scheme == scheme
            assert torch.equal(mine["weight"], its["weight"])
            if weight is WEIGHT:
                assert torch.equal(mine["weight_scale"].flatten(), its["weight_scale"])
        if act is not None:
            for name, at in (("c", 0), ("d", 1), ("l", 0), ("m", 1)):
                target = aten.conv2d.default if name in "cd" else aten.linear.default
                call = [n for n in nodes.graph.nodes if n.target is target][at]
                scale, zero, *_ = call.args[0].args[0].args[1:]
                layer = layers.get_submodule(name)
                shift = 128 if act.dtype == torch.uint8 else 0
                assert float(layer.input_scale) == scale
                assert int(layer.input_zero_point) == zero - shift
        least = 100 if dtype == torch.float32 else 30
        for got, want in zip(layers(x), nodes(x), strict=True):
            assert qnn.sqnr(want, got) > least

    @pytest.mark.parametrize(
        ("net", "shape"),
        [
            (nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 9)),
            (nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), groups=2), (2, 4, 9, 5)),
            (nn.Conv3d(2, 3, 2, bias=False), (1, 2, 4, 5, 6)),
            (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9)),
            (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 5)),
            (nn.ConvTranspose3d(2, 3, 2, dilation=2, bias=False), (1, 2, 4, 5, 6)),
            (nn.Linear(6, 5), (2, 3, 4, 6)),
        ],
        ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else "",
    )
    def test_b120_b121_b122_arguments(self, net: nn.Module, shape: Any) -> None:
        axis = 1 if "Transpose" in type(net).__name__ else 0
        weight = dataclasses.replace(WEIGHT, ch_axis=axis)

        def write(gm: Any) -> None:
            (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
            annotate(node, {node.args[0]: ACT, node.args[1]: weight})

        x = torch.randn(shape)
        gm = prepare(export(nn.Sequential(net), x), write)
        gm(x)
        layers, nodes = both(gm)
        (kind,) = ops(layers)
        assert kind == f"Q{type(net).__name__}"
        assert torch.equal(layers.state_dict()["0.weight"], nodes.get_buffer("0.weight"))
        assert qnn.sqnr(nodes(x), layers(x)) > 100
        assert qnn.sqnr(net(x), layers(x)) > 30

    def test_sixteen_bits(self) -> None:
        spec = QuantizationSpec(torch.int16, None, -32767, 32767, torch.per_tensor_symmetric)
        net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(5, 8)
        layers, nodes = both(shown(net, x, spec))
        assert layers.get_submodule("0").scheme == "int16_static"
        assert qnn.sqnr(nodes(x), layers(x)) > 90

    def test_b132_a_quantised_bias_is_the_values_of_its_integers(self) -> None:
        def derive(of: list[Any]) -> Any:
            (sx, _), (sw, _) = (each.calculate_qparams() for each in of)
            return sx * sw * 1e4, torch.zeros_like(sw, dtype=torch.int32)  # coarse, to be seen

        def write(gm: Any) -> None:
            node = node_of(gm, aten.linear.default)
            x, w, b = node.args
            spec = DerivedQuantizationSpec(
                [(x, node), (w, node)], derive, torch.int32, -(2**31), 2**31 - 1,
                torch.per_channel_symmetric, 0,
            )  # fmt: skip
            annotate(node, {x: ACT, w: WEIGHT, b: spec})

        net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(5, 8)
        gm = prepare(export(net, x), write)
        gm(x)
        layers, nodes = both(gm)
        assert not torch.equal(layers.get_parameter("0.bias"), net[0].bias)
        assert qnn.sqnr(nodes(x), layers(x)) > 100

    def test_a_layer_called_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.l = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.l(torch.relu(self.l(x)) * 3)

        x = torch.randn(5, 8)
        layers, nodes = both(shown(Twice(), x, ACT))
        one, two = layers.get_submodule("l"), layers.get_submodule("l_1")
        assert one.weight_scale is two.weight_scale
        assert one.stored[0] is two.stored[0]
        assert one.bias is two.bias
        assert not torch.equal(one.input_scale, two.input_scale)
        assert qnn.sqnr(nodes(x), layers(x)) > 100

        class Same(Twice):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.l(x) - self.l(x).abs()

        layers, nodes = both(shown(Same(), x, ACT))
        assert ops(layers)["QLinear"] == 2
        assert [n for n, _ in layers.named_children() if n.startswith("l")] == ["l"]

    def test_tied_layers_share_their_codes(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
                self.b.weight = self.a.weight

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.b(torch.relu(self.a(x)))

        x = torch.randn(5, 8)
        layers, nodes = both(shown(Tied(), x))
        assert layers.a.stored[0] is layers.b.stored[0]
        assert (layers.a.bias is None, layers.b.bias is None) == (True, False)
        assert qnn.sqnr(nodes(x), layers(x)) > 100

    def test_functions_and_their_weights(self) -> None:
        class Functions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(8, 8))
                self.block = nn.Module()
                self.block.weight = nn.Parameter(torch.randn(8, 8))
                self.block.other = nn.Parameter(torch.randn(8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = F.linear(x, self.w)
                return F.linear(y * self.block.other, self.block.weight)

        x = torch.randn(5, 8)
        layers, nodes = both(shown(Functions(), x))
        assert ops(layers)["QLinear"] == 2
        assert {*layers.state_dict()} >= {"linear.weight", "block.linear_1.weight", "block.other"}
        assert "w" not in layers.state_dict()
        assert qnn.sqnr(nodes(x), layers(x)) > 100

    def test_written_in_place_between_observer_and_reader(self) -> None:
        class InPlace(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.l = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = x * 2
                z = self.l(y)
                y[:, 0] += 3
                return self.l(y) + z

        x = torch.randn(5, 8)
        net = InPlace()
        wanted = net(x)
        for model in both(shown(net, x)):
            assert qnn.sqnr(wanted, model(x)) > 25

    def test_state_and_every_way_to_run(self, tmp_path: Any) -> None:
        x = images(3)
        sizes = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(ConvNet().eval(), (images(),), dynamic_shapes=sizes)
        prepared = prepare_pt2e(program, Specs(ACT, out=ACT))
        for _ in range(3):
            prepared(images())
        model = convert_pt2e(prepared)
        wanted = model(x)
        for strict in (False, True):
            again = torch.export.export(model, (x,), strict=strict)
            assert len(regions(again)) == 4
            torch.export.save(again, tmp_path / "net.pt2")
            loaded = torch.export.load(tmp_path / "net.pt2").module()
            for other in (again.module(), loaded):
                assert all(map(torch.equal, other(x), wanted))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, compiled(x), wanted))
        fresh = convert_pt2e(copy.deepcopy(prepared))
        fresh.load_state_dict(model.state_dict())
        assert all(map(torch.equal, fresh(x), wanted))
        told = str(qnn.summary(model))
        assert "QConv2d" in told


class TestLeft:
    """What stays between quantise and dequantise nodes, and why."""

    @pytest.mark.parametrize(
        ("act", "weight", "why"),
        [
            (DYNAMIC, WEIGHT, "its input has a dynamic scale for the whole tensor"),
            (QuantizationSpec(torch.uint8, None, 0, 127, torch.per_tensor_affine), WEIGHT,
             r"the range of its input is (0, 127), not 0 … 255"),
            (ACT, None, "its weight is not annotated"),
            (ACT, dataclasses.replace(WEIGHT, ch_axis=1), "the scales of its weight lie along"),
            (ACT, QuantizationSpec(torch.int8, qscheme=torch.per_channel_affine, ch_axis=0),
             "its weight is torch.per_channel_affine, and the schemes have no zero points"),
            (ACT, QuantizationSpec(torch.int16, qscheme=torch.per_tensor_symmetric),
             "its weight is annotated as torch.int16"),
            (QuantizationSpec(torch.int16, qscheme=torch.per_tensor_symmetric), WEIGHT,
             "the range of its input is (-32768, 32767)"),
            (QuantizationSpec(torch.uint8, qscheme=torch.per_channel_affine, ch_axis=1), WEIGHT,
             "its input is annotated per channel"),
            (QuantizationSpec(torch.uint16, qscheme=torch.per_tensor_affine), WEIGHT,
             "its input is annotated as torch.uint16; no scheme has that"),
        ],
    )  # fmt: skip
    def test_b146_reasons(self, act: Any, weight: Any, why: str) -> None:
        net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(5, 8)
        layers, nodes = both(shown(net, x, act, weight))
        (reason,) = left(layers).values()
        assert reason.startswith(why)
        assert ops(layers) == ops(nodes)
        assert torch.equal(layers(x), nodes(x))

    def test_b22_observers_that_write_their_own_nodes(self) -> None:
        from qnn.pt2e.observers import ObservedPoint

        class Mine(ObservedPoint):
            def convert(self, model: Any, node: Any) -> None:
                node.replace_all_uses_with(node.args[0])
                model.graph.erase_node(node)

        x = torch.randn(5, 8)

        def make(**_: Any) -> Mine:
            return Mine(qnn.QuantSpec(torch.uint8))

        act = dataclasses.replace(ACT, observer_or_fake_quant_ctr=make)
        layers, _ = both(shown(nn.Sequential(nn.Linear(8, 4)), x, act))
        assert [*left(layers).values()] == ["the observer of its input writes nodes of its own"]

    def test_a_weight_that_is_read_as_floats_too(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.l = nn.Linear(8, 8, bias=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.l(x) + self.l.weight.sum()

        x = torch.randn(5, 8)
        layers, nodes = both(shown(Twice(), x))
        assert left(layers) == {"linear": "its weight is also read by sum_1"}
        assert torch.equal(layers(x), nodes(x))

    def test_a_weight_or_bias_that_is_computed(self) -> None:
        class Computed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(8, 8))
                self.b = nn.Parameter(torch.randn(8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.linear(F.linear(x, self.w * 2), self.w, self.b * 2)

        x = torch.randn(5, 8)
        layers, nodes = both(shown(Computed(), x))
        assert left(layers) == {
            "linear": "its weight is computed in the graph",
            "linear_1": "its bias is computed in the graph",
        }
        assert torch.equal(layers(x), nodes(x))

    def test_the_reasons_are_in_the_summary(self) -> None:
        x = torch.randn(5, 8)
        program = torch.export.export(nn.Sequential(nn.Linear(8, 4)).eval(), (x,))
        model = convert_pt2e(prepare_pt2e(program, Specs(DYNAMIC)))
        told = str(qnn.summary(model))
        assert "dynamic scale for the whole tensor" in told
        assert "linear (aten.linear.default) in '0'" in told

        # The sum keeps its integers.
        class Add(nn.Module):
            def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
                return torch.relu(x + n)

        class Adds(pt2e.Quantizer):
            def annotate(self, model: Any) -> None:  # type: ignore[override]
                for node in model.graph.nodes:
                    if node.op == "call_function":
                        annotate(node, dict.fromkeys(node.all_input_nodes, ACT), ACT)

        program = torch.export.export(Add(), (torch.randn(3), torch.tensor([1, 2, 3])))
        prepared = prepare_pt2e(program, Adds())
        assert "its input n is torch.int64" in str(qnn.summary(prepared))


class Mixed(nn.Module):
    """A layer of each kind, dropout between them, and a pool."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.l = nn.Linear(6, 6)
        self.m = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(torch.relu(self.c(x)), 2)
        y, _ = self.lstm(self.drop(y.flatten(2).transpose(1, 2)))
        return self.m(self.drop(torch.relu(self.l(y))))


class OnlyLinear(pt2e.Quantizer):
    """Specs on linear layers, with shared ones around pools and behind dropout."""

    def annotate(self, model: Any) -> None:  # type: ignore[override]
        for node in model.graph.nodes:
            if node.target is aten.linear.default and "quantization_annotation" not in node.meta:
                annotate(node, {node.args[0]: ACT, node.args[1]: WEIGHT}, SIGNED)
            if node.target is aten.dropout.default:
                source = node.args[0]
                annotate(node, {source: ACT}, SharedQuantizationSpec((source, node)))


class TestMixed:
    def prepared(self, *quantizers: Any, qat: bool = False) -> Any:
        program = torch.export.export(Mixed().eval(), (images(),))
        make = prepare_qat_pt2e if qat else prepare_pt2e
        return make(program, pt2e.ComposableQuantizer([*quantizers]))

    @pytest.mark.parametrize("qat", [False, True])
    def test_b73_b74_b148_both_kinds_in_one_graph(self, qat: bool) -> None:
        first = Int8Quantizer().set_module_name("c", "int8_static").set_module_type(nn.LSTM, "int8")
        gm = self.prepared(first, OnlyLinear(), qat=qat)
        seen = {name for _, name in observed(gm)}
        assert seen >= {"l.weight_observer", "m.weight_observer", "l.output_observer"}
        assert not any(name.startswith("c.") for name in seen)
        # What reads a layer that was lifted reads its call; the annotations know that.
        dropout = [n for n in gm.graph.nodes if "drop" in str(n.target)]
        assert any("linear" in str(n.meta.get("qnn_node")) or n for n in dropout)
        for _ in range(4):
            gm(images())
        gm.eval()
        x = images()
        before = gm(x)
        model = convert_pt2e(gm)
        kinds = ops(model)
        assert (kinds["QConv2d"], kinds["QLSTM"], kinds["QLinear"]) == (1, 1, 2)
        assert qnn.sqnr(before, model(x)) > (25 if qat else 20)
        again = torch.export.export(model, (x,)).module()
        assert torch.equal(again(x), model(x))

    def test_the_first_annotation_stays(self) -> None:
        first = Int8Quantizer("int8_static").set_module_type(nn.LSTM, None)
        gm = self.prepared(first, OnlyLinear())
        assert not any(name.startswith(("l.", "m.")) for _, name in observed(gm))

    def test_specs_on_a_node_of_a_scheme_are_refused(self) -> None:
        class Rude(pt2e.Quantizer):
            def annotate(self, model: Any) -> None:  # type: ignore[override]
                pt2e.annotate_output_qspec(node_of(model, "linear"), ACT)

        with pytest.raises(
            RuntimeError, match=r"linear \(aten.linear.default\) in 'l'.* has the scheme"
        ):
            self.prepared(Int8Quantizer("int8"), Rude())

    def test_calibrate_with_observers_of_torch(self) -> None:
        from torch.ao.quantization.observer import HistogramObserver, PerChannelMinMaxObserver

        act = dataclasses.replace(ACT, observer_or_fake_quant_ctr=HistogramObserver)
        weight = dataclasses.replace(WEIGHT, observer_or_fake_quant_ctr=PerChannelMinMaxObserver)
        program = torch.export.export(ConvNet().eval(), (images(),))
        gm = prepare_pt2e(program, Specs(act, weight))
        with pytest.raises(ValueError, match="4 of 8 observers saw nothing"):
            convert_pt2e(gm)
        qnn.calibrate(gm, [images(), images()], progress=False)
        x = images()
        for got, want in zip(convert_pt2e(gm)(x), gm(x), strict=True):
            assert qnn.sqnr(want, got) > 20

    def test_an_annotated_module_is_copied_with_its_annotations(self) -> None:
        class Nothing(pt2e.Quantizer):
            def annotate(self, model: Any) -> None:  # type: ignore[override]
                pass

        gm = export(ConvNet(), images())
        of_layers(out=ACT)(gm)
        nodes = len(gm.graph.nodes)
        prepared = prepare_pt2e(gm, Nothing())
        assert len(observed(prepared)) == 12
        assert len(gm.graph.nodes) == nodes

    def test_b79_b75_b77_what_is_called(self) -> None:
        called = []

        class Told(OnlyLinear):
            def transform_for_annotation(self, model: Any) -> Any:
                called.append("transform")
                return model

            def validate(self, model: Any) -> None:
                assert not observed(model)
                called.append("validate")

            def prepare_obs_or_fq_callback(self, model: Any, observers: Any) -> None:
                assert observers
                called.append("callback")

        self.prepared(Told())
        assert called == ["transform", "validate", "callback"]


class Normed(nn.Module):
    """Convolutions and a linear layer, with BatchNorms after them; a gain is zero, one negative."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.bc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=eps)
        self.d, self.bd = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, eps=eps)
        self.l, self.bl = nn.Linear(8, 5), nn.BatchNorm1d(5, eps=eps)
        with torch.no_grad():
            self.bc.weight[:3] = torch.tensor([0.0, -1.0, 2.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bd(self.d(torch.relu(self.bc(self.c(x))))))
        return self.bl(self.l(y.mean((2, 3))))


class TestTraining:
    # -128 has no negative
    WEIGHT = dataclasses.replace(WEIGHT, quant_min=-127)

    @pytest.mark.parametrize("form", ["layers", "qdq"])
    @pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
    def test_b123_b128_b129_trained_is_what_is_converted(self, eps: float, form: Any) -> None:
        program = torch.export.export(Normed(eps).eval(), (images(8),))
        gm = prepare_qat_pt2e(program, Specs(ACT, self.WEIGHT))
        optimizer = torch.optim.SGD(gm.parameters(), 1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            gm(images(8)).square().mean().backward()
            optimizer.step()
        assert gm.get_submodule("bc").eps == eps
        x = images(8)
        wanted = gm.eval()(x)
        model = convert_pt2e(gm, form=form)
        assert not any("batch_norm" in op or "BatchNorm" in op for op in ops(model))
        assert qnn.sqnr(wanted, model(x)) > 60
        again = torch.export.export(model, (x,)).module()
        assert torch.equal(again(x), model(x))
        assert {k.partition(".")[0] for k in model.state_dict()} == {"c", "d", "l"}
        if form == "layers":
            assert ops(model)["QConv2d"] == 2
            assert "BatchNorm bc folded in" in str(qnn.summary(model))

    def test_what_is_not_folded_stays_right(self) -> None:
        """A weight with one scale, and a result that is read twice."""

        class Twice(Normed):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.c(x)
                return self.bc(y) + y

        for kind, weight in ((Normed, PER_TENSOR), (Twice, self.WEIGHT)):
            for form in ("layers", "qdq"):
                program = torch.export.export(kind(1e-3).eval(), (images(8),))
                gm = prepare_qat_pt2e(program, Specs(ACT, weight))
                for _ in range(3):
                    gm(images(8))
                x = images(8)
                wanted = gm.eval()(x)
                assert qnn.sqnr(wanted, convert_pt2e(gm, form=form)(x)) > 60  # type: ignore[arg-type]


class TestInside:
    """Graphs that a graph calls."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x) * 2, (x,))
            return self.a(y)

    @pytest.mark.parametrize("weight", [WEIGHT, PER_TENSOR], ids=["channel", "tensor"])
    def test_b166_b168_b169_branches_are_annotated_and_converted(self, weight: Any) -> None:
        net, x = self.Branches().eval(), torch.randn(3, 8)
        gm = prepare_pt2e(torch.export.export(net, (x,)), Specs(ACT, weight, out=ACT))
        # Without gradients: with them torch traces the branches, and nothing in them runs.
        batches = [torch.randn(3, 8) for _ in range(4)]
        qnn.calibrate(gm, [*batches, *(-x for x in batches)], progress=False)
        model = convert_pt2e(gm)
        inner = [each for each in model.children() if isinstance(each, torch.fx.GraphModule)]
        assert [ops(each)["quantize_per_tensor"] for each in inner] == [
            2 + (weight is PER_TENSOR)
        ] * 2
        with torch.no_grad():
            for x in [*batches, *(-x for x in batches)]:
                assert qnn.sqnr(net(x), model(x)) > 25
        if weight is PER_TENSOR:  # torch.export loses tensors that a branch itself holds
            again = torch.export.export(model, (x,)).module()
            assert torch.equal(again(x), model(x))

    def test_b166_scan(self) -> None:
        class Scan(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.l = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                from torch._higher_order_ops.scan import scan

                def step(carry: torch.Tensor, x: torch.Tensor) -> Any:
                    y = torch.tanh(self.l(carry) + x)
                    return y + 0, y + 0

                return scan(step, torch.zeros(3, 8), x, dim=0)[1]

        net, x = Scan().eval(), torch.randn(5, 3, 8)
        with torch.no_grad():
            gm = prepare_pt2e(torch.export.export(net, (x,)), Specs(ACT))
            gm(x)
            model = convert_pt2e(gm)
            inner = [m for m in model.children() if isinstance(m, torch.fx.GraphModule)]
            assert ops(inner[0])["dequantize_per_channel"] == 1
            assert qnn.sqnr(net(x), model(x)) > 35
