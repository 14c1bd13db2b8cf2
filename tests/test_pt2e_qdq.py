"""Quantise and dequantise nodes, folded weights and metadata; the numbers are those of the list of
behaviours.
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
from qnn.pt2e.qdq import write_qdq
from qnn.pt2e.specs import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
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
    observer_of,
    of_layers,
    ops,
    prepare,
)

qd = quantized_decomposed()
Q, DQ = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default
TAG = "quantization_tag"


def nothing(gm: Any) -> None:
    """A quantizer whose work is done."""


def calls(gm: Any, target: Any) -> list[Any]:
    return [node for node in gm.graph.nodes if node.target is target]


def linear(spec: Any = ACT, weight: Any = WEIGHT, **more: Any) -> Any:
    """An exported linear layer, prepared and shown data."""
    torch.manual_seed(0)
    gm = export(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4))
    prepare(gm, of_layers(spec, weight, **more))
    gm(torch.randn(50, 4)[:5])
    return gm


class TestNodes:
    def test_b82_literals_per_tensor_and_buffers_per_channel(self) -> None:
        gm = write_qdq(linear(out=SIGNED))
        first, second = calls(gm, Q)
        for q, low, high, dtype in (
            (first, 0, 255, torch.uint8),
            (second, -128, 127, torch.int8),
        ):
            assert [type(a) for a in q.args[1:]] == [float, int, int, int, torch.dtype]
            assert q.args[3:] == (low, high, dtype)
            (dq,) = q.users
            assert dq.target is DQ
            assert dq.args[1:] == q.args[1:]
        (weight,) = calls(gm, qd.dequantize_per_channel.default)
        parts = ["0.weight", "0.weight_scale", "0.weight_zero_point"]
        assert [n.target for n in weight.args[:3]] == parts
        assert weight.args[3:] == (0, -128, 127, torch.int8)
        assert {*gm.state_dict()} == {"0.weight", "0.weight_scale", "0.weight_zero_point", "0.bias"}

    def test_b4_float32_leaves_no_node(self) -> None:
        gm = write_qdq(linear(bias=QuantizationSpec(torch.float32)))
        (node,) = calls(gm, aten.linear.default)
        assert node.args[2].op == "get_attr"

    def test_b5_float16_is_a_cast_down_and_up(self) -> None:
        gm = linear(None, QuantizationSpec(torch.float16))
        x, weight = torch.randn(2, 4), gm.get_parameter("0.weight").detach()
        gm = write_qdq(gm)
        casts = calls(gm, qd.convert_element_type.no_fuse)
        assert [n.args[1] for n in casts] == [torch.float16, torch.float32]
        got = gm(torch.cat([x, x, x[:1]]))[:2]
        assert torch.equal(got, F.linear(x, weight.half().float(), gm.get_parameter("0.bias")))

    @pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [torch.int16, torch.float8_e4m3fn, torch.float8_e5m2])
    def test_b6_b7_dtypes_of_activations(self, dtype: Any, model: Any) -> None:
        from torch.ao.quantization.observer import MinMaxObserver

        top = {torch.int16: 32767, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}[dtype]
        spec = QuantizationSpec(dtype, MinMaxObserver, -top, top, torch.per_tensor_symmetric)
        if dtype == torch.int16:
            spec = dataclasses.replace(spec, observer_or_fake_quant_ctr=None)
        else:  # a scale that is known
            spec = FixedQParamsQuantizationSpec(dtype, 0.01, 0, -top, top)  # type: ignore[assignment]
        net = nn.Sequential(nn.Linear(4, 3)).to(model)
        x = torch.randn(5, 4, dtype=model)
        gm = export(net, x)
        prepare(gm, of_layers(spec, None, out=spec))
        wanted = gm(x)
        gm = write_qdq(gm)
        assert gm(x).dtype == model
        # One rounding of each input and one of the output, to half a step or half a last bit.
        error = {torch.int16: 2**-10, torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}[dtype]
        bound = (x.abs() @ net[0].weight.abs().T + wanted.abs()) * (error + 2**-7) + 0.02
        assert ((gm(x) - wanted).abs() <= bound).all()
        for dq in calls(gm, DQ):
            assert dq.args[-1] == dtype
            assert dq.meta["val"].dtype == model
            assert dq.kwargs == ({} if model == torch.float32 else {"out_dtype": model})

    def test_b8_a_narrow_range_bounds_the_codes(self) -> None:
        narrow = QuantizationSpec(torch.uint8, None, 0, 15, torch.per_tensor_affine)
        weight = dataclasses.replace(WEIGHT, quant_min=-7, quant_max=7)
        gm = write_qdq(linear(narrow, weight))
        assert calls(gm, Q)[0].args[3:5] == (0, 15)
        codes = gm.get_buffer("0.weight")
        assert codes.abs().max() == 7

    def test_b13_fixed_qparams_stand_as_they_are_given(self) -> None:
        spec = FixedQParamsQuantizationSpec(torch.uint8, 2**-8, 3, 0, 200)
        for qat in (False, True):
            gm = export(nn.Sigmoid(), torch.randn(3))
            annotate(node_of(gm, "sigmoid"), {}, spec)
            gm = write_qdq(prepare(gm, nothing, qat=qat))
            (q,) = calls(gm, Q)
            assert q.args[1:] == (2**-8, 3, 0, 200, torch.uint8)

    @pytest.mark.parametrize("per_channel", [False, True])
    def test_b16_b17_derived_qparams(self, per_channel: bool) -> None:
        seen = []

        def derive(observers: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append([o.dtype for o in observers])
            scales = [o.calculate_qparams()[0] for o in observers]
            scale = scales[0] * scales[1]
            return scale, torch.zeros_like(scale, dtype=torch.int32)

        weight = QuantizationSpec(torch.int8, qscheme=torch.per_tensor_symmetric)
        weight = WEIGHT if per_channel else weight
        gm = export(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4))
        node = node_of(gm, aten.linear.default)
        x, w, b = node.args
        qscheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
        low, high = -(2**31), 2**31 - 1
        derived = DerivedQuantizationSpec(
            [(x, node), (w, node)], derive, torch.int32, low, high, qscheme, 0
        )
        annotate(node, {b: derived, x: ACT, w: weight})
        prepare(gm, nothing)
        data = torch.randn(5, 4)
        wanted = gm(data)
        bias = gm.get_parameter("0.bias").detach().clone()
        copied = write_qdq(copy.deepcopy(gm))
        gm = write_qdq(gm)
        assert seen[-1] == [torch.uint8, torch.int8]
        assert gm.get_buffer("0.bias").dtype == torch.int32
        node = node_of(gm, aten.linear.default)
        dq = node.args[2]
        assert dq.args[-3:] == (low, high, torch.int32)  # type: ignore[union-attr]
        (q,) = calls(gm, Q)
        if not per_channel:
            scale = dq.args[1]  # type: ignore[union-attr]
            assert scale == pytest.approx(q.args[1] * node.args[1].args[1])  # type: ignore[union-attr]
            assert torch.allclose(gm.get_buffer("0.bias") * scale, bias, atol=scale)
        assert (gm(data) - wanted).abs().max() < 0.05
        assert torch.equal(copied(data), gm(data))

    def test_b20_tables_per_row_with_float_zero_points(self) -> None:
        from torch.ao.quantization.observer import PerChannelMinMaxObserver

        rows = QuantizationSpec(
            torch.uint8, PerChannelMinMaxObserver.with_args(eps=2**-12), 0, 255,
            torch.per_channel_affine_float_qparams, 0,
        )  # fmt: skip
        net = nn.Sequential(nn.Embedding(20, 8))
        ids = torch.arange(20)
        gm = export(net, ids)
        node = node_of(gm, aten.embedding.default)
        annotate(node, {node.args[0]: rows})  # type: ignore[dict-item]
        gm = write_qdq(prepare(gm, nothing))
        assert gm.get_buffer("0.weight").dtype == torch.uint8
        assert gm.get_buffer("0.weight_zero_point").is_floating_point()
        assert (gm(ids) - net(ids)).abs().max() < 0.02

    def test_b22_an_observer_that_writes_its_own_nodes(self) -> None:
        class Mine(nn.Module):
            dtype = torch.int8

            def __init__(self, **_: Any) -> None:
                super().__init__()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

            def calculate_qparams(self) -> None:
                raise NotImplementedError

            def convert(self, model: Any, node: Any) -> None:
                with model.graph.inserting_before(node):
                    new = model.graph.call_function(aten.neg.default, node.args)
                node.replace_all_uses_with(new)
                model.graph.erase_node(node)

        gm = export(nn.Sequential(nn.ReLU()), torch.randn(3))
        relu = node_of(gm, "relu")
        annotate(relu, {relu.args[0]: QuantizationSpec(torch.int8, Mine)})  # type: ignore[dict-item]
        gm = write_qdq(prepare(gm, nothing))
        x = torch.randn(3)
        assert torch.equal(gm(x), torch.relu(-x))
        (neg,) = calls(gm, aten.neg.default)
        assert neg.meta["val"].shape == (3,)
        assert "from_node" in neg.meta

    def test_b37_another_grid_is_quantised_anew(self) -> None:
        gm = export(ConvNet(), images())
        of_layers(ACT, out=SIGNED)(gm)
        conv, add = node_of(gm, "conv2d_1"), node_of(gm, "add")
        annotate(add, {conv: ACT})
        prepare(gm, nothing)
        gm(images())
        write_qdq(gm)
        dq = node_of(gm, "add").args[0]
        q = dq.args[0]  # type: ignore[union-attr]
        assert (dq.target, q.target, q.args[0].target) == (DQ, Q, DQ)  # type: ignore[union-attr]
        assert (q.args[-1], q.args[0].args[-1]) == (torch.uint8, torch.int8)  # type: ignore[union-attr]

    def test_b91_b146_dynamic(self) -> None:
        for qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            spec = dataclasses.replace(DYNAMIC, qscheme=qscheme)
            gm = export(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4))
            net = nn.Sequential(nn.Linear(4, 3))
            net.load_state_dict(gm.state_dict())
            gm = write_qdq(prepare(gm, of_layers(spec)))  # no data is needed
            choose = (
                qd.choose_qparams
                if qscheme == torch.per_tensor_affine
                else qd.choose_qparams_symmetric
            )
            (chosen,) = calls(gm, choose.tensor)
            (q,) = calls(gm, qd.quantize_per_tensor.tensor)
            (dq,) = calls(gm, qd.dequantize_per_tensor.tensor)
            assert [n.args[0] for n in q.args[1:3]] == [chosen, chosen]
            assert dq.meta["val"].dtype == torch.float32
            for size in (1e-3, 1.0, 1e3):
                x = torch.randn(5, 4) * size
                assert qnn.sqnr(net(x) - net[0].bias, gm(x) - net[0].bias) > 35  # type: ignore[operator]
            assert gm(torch.zeros(5, 4)).isfinite().all()

    def test_b149_a_dynamic_convolution_converts(self) -> None:
        gm = export(ConvNet(), images())
        gm = write_qdq(prepare(gm, of_layers(DYNAMIC)))
        assert ops(gm)["choose_qparams"] == 4
        x, net = images(), ConvNet().eval()
        for got, wanted in zip(gm(x), net(x), strict=True):
            assert qnn.sqnr(wanted, got) > 25

    def test_b94_after_an_observer_was_removed_by_hand(self) -> None:
        gm = export(ConvNet(), images())
        prepare(gm, of_layers(out=ACT))
        gm(images())
        before = node_of(gm, "conv2d_1").args[0]
        assert observer_of(gm, before)
        before.replace_all_uses_with(before.args[0])  # type: ignore[union-attr,arg-type]
        gm.graph.erase_node(before)  # type: ignore[arg-type]
        gm.recompile()
        write_qdq(gm)
        assert node_of(gm, "conv2d_1").args[0].target is aten.relu.default  # type: ignore[union-attr]
        assert not any("observer" in name for name in gm.state_dict())

    def test_b96_what_saw_nothing_is_an_error_with_its_names(self) -> None:
        gm = export(ConvNet(), images())
        prepare(gm, of_layers(out=ACT))
        with pytest.raises(
            ValueError, match=r"8 of 12 observers saw nothing: c\.input_observer, c\."
        ):
            write_qdq(copy.deepcopy(gm))
        fixed = FixedQParamsQuantizationSpec(torch.uint8, 0.1, 3)
        for spec in (fixed, DYNAMIC, None):
            ready = prepare(export(ConvNet(), images()), of_layers(spec))
            assert write_qdq(ready)(images())[0].isfinite().all()

    def test_b96_not_strict_is_as_the_library_says(self) -> None:
        from torch.ao.quantization.observer import MinMaxObserver

        spec = QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)
        gm = prepare(export(ConvNet(), images()), of_layers(spec))
        with pytest.warns(UserWarning, match="must run observer before"):
            write_qdq(gm, strict=False)
        assert calls(gm, Q)[0].args[1:3] == (1.0, 0)

    def test_b97_b98_what_cannot_be_written(self) -> None:
        from torch.ao.quantization.observer import PlaceholderObserver

        spec = QuantizationSpec(torch.bfloat16, PlaceholderObserver)
        with pytest.raises(
            ValueError, match=r"0.input_observer is for torch.bfloat16; nodes can be"
        ):
            write_qdq(linear(spec))
        for name in ("fold_quantize", "cancel", "strict"):
            with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
                write_qdq(linear(), **{name: "no"})

    def test_b27_cancelled_pairs(self) -> None:
        def made(cancel: bool) -> Any:
            torch.manual_seed(0)
            gm = export(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(5, 4))
            for node in calls(gm, aten.linear.default):
                annotate(node, {node.args[0]: ACT}, ACT, implicit=False)
            prepare(gm, nothing)
            gm(torch.randn(5, 4))
            return write_qdq(gm, cancel=cancel)

        kept, cancelled = made(False), made(True)
        assert (ops(kept)["quantize_per_tensor"], ops(cancelled)["quantize_per_tensor"]) == (4, 3)
        x = torch.randn(5, 4)
        assert torch.equal(kept(x), cancelled(x))


class TestFolding:
    def test_b83_b87_b89_integers_under_the_name_of_the_weight(self) -> None:
        gm = linear()
        weight = gm.get_parameter("0.weight").detach().clone()
        write_qdq(gm)
        codes, scale = gm.get_buffer("0.weight"), gm.get_buffer("0.weight_scale")
        assert not codes.requires_grad
        grid = scale, torch.zeros(3, dtype=torch.int32), 0, -128, 127, torch.int8
        assert torch.equal(codes, qd.quantize_per_channel(weight, *grid))
        assert [name for name, _ in gm.named_parameters()] == ["0.bias"]

    def test_b84_without_folding(self) -> None:
        gm = linear()
        other = copy.deepcopy(gm)
        x = torch.randn(5, 4)
        wanted = write_qdq(gm)(x)
        write_qdq(other, fold_quantize=False)
        assert other.get_parameter("0.weight").dtype == torch.float32
        assert len(calls(other, qd.quantize_per_channel.default)) == 1
        assert torch.equal(other(x), wanted)

    def test_b43_b85_b86_b88_chains(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(4, 3))
                self.v = nn.Parameter(torch.randn(3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x @ self.w.t().contiguous().t() + self.v.exp()

        net, x = Model(), torch.randn(2, 4)
        gm = export(net, x)
        matmul = node_of(gm, aten.matmul.default)
        get = node_of(gm, "w")
        get.meta[TAG] = "of w"
        source = get.meta["from_node"]
        annotate(matmul, {matmul.args[1]: SIGNED})  # type: ignore[dict-item]
        write_qdq(prepare(gm, nothing))
        node = node_of(gm, aten.matmul.default).args[1].args[0]  # type: ignore[union-attr]
        assert (node.op, node.target) == ("get_attr", "w")  # type: ignore[union-attr]
        assert node.meta["from_node"] == source  # type: ignore[union-attr]
        assert node.meta[TAG] == "of w"  # type: ignore[union-attr]
        assert node.meta["val"].dtype == torch.int8  # type: ignore[union-attr]
        assert not calls(gm, aten.t.default)
        assert calls(gm, aten.exp.default)  # constant, and not for a quantise node
        assert {*gm.state_dict()} == {"w", "v"}
        assert qnn.sqnr(net(x), gm(x)) > 30

    def test_b95_tied_weights_are_folded_once_under_both_names(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
                self.b.weight = self.a.weight

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.b(torch.relu(self.a(x)))

        net, x = Tied(), torch.randn(3, 8)
        gm = prepare(export(net, x), of_layers())
        gm(x)
        write_qdq(gm)
        state = gm.state_dict()
        assert state["a.weight"].dtype == state["b.weight"].dtype == torch.int8
        assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
        assert qnn.sqnr(net(x), gm(x)) > 30

    def test_a_weight_with_a_float_reader_stays(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.l = nn.Linear(8, 8, bias=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.l(x) + F.linear(x, self.l.weight * 2)

        net, x = Twice(), torch.randn(3, 8)
        gm = export(net, x)
        node = calls(gm, aten.linear.default)[0]
        annotate(node, {node.args[0]: ACT, node.args[1]: WEIGHT})
        prepare(gm, nothing)
        gm(x)
        write_qdq(gm)
        state = gm.state_dict()
        assert state["l.weight"].dtype == torch.float32
        assert state["l.weight_codes"].dtype == torch.int8
        assert qnn.sqnr(net(x), gm(x)) > 30

    def test_b147_weights_are_observed_as_they_are_at_the_end(self) -> None:
        from torch.ao.quantization.observer import PerChannelMinMaxObserver

        for constructor in (None, PerChannelMinMaxObserver):
            weight = dataclasses.replace(WEIGHT, observer_or_fake_quant_ctr=constructor)
            gm = export(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4))
            prepare(gm, of_layers(None, weight))
            with torch.no_grad():
                gm.get_parameter("0.weight").fill_(0.5)
            write_qdq(gm)
            assert gm.get_buffer("0.weight").unique().numel() == 1
            dq = gm.get_buffer("0.weight") * gm.get_buffer("0.weight_scale")[:, None]
            assert torch.allclose(dq, torch.full((3, 4), 0.5), atol=0.5 / 127)


class TestReaders:
    def shared(self) -> Any:
        """One output that two annotated nodes and two others read."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Conv2d(3, 4, 1)
                self.b = nn.Conv2d(4, 4, 1)

            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                y = self.a(x)
                return self.b(y), F.avg_pool2d(y, 2), y * 2, y.abs()

        return export(Net(), images())

    def test_b90_b93_a_dequantise_for_each_annotated_reader(self) -> None:
        gm = self.shared()
        of_layers(out=ACT)(gm)
        conv, pool = node_of(gm, "conv2d"), node_of(gm, aten.avg_pool2d.default)
        annotate(pool, {conv: ACT}, SharedQuantizationSpec((conv, pool)))
        prepare(gm, nothing)
        gm(images())
        write_qdq(gm)
        (q,) = [n for n in calls(gm, Q) if n.args[0].name == "conv2d"]
        readers = sorted(sorted(user.name for user in dq.users) for dq in q.users)
        assert readers == [["abs_1", "mul"], ["avg_pool2d"], ["conv2d_1"]]

    def test_b40_unannotated_readers_read_the_tensor_itself(self) -> None:
        gm = self.shared()
        second = node_of(gm, "conv2d_1")
        annotate(second, {second.args[0]: ACT})  # type: ignore[dict-item]
        prepare(gm, nothing)
        gm(images())
        write_qdq(gm)
        (q,) = calls(gm, Q)
        assert {user.name for user in node_of(gm, "conv2d").users} == {
            q.name,
            "mul",
            "avg_pool2d",
            "abs_1",
        }

    def test_b92_readers_of_sizes_do_not_count(self) -> None:
        class Sizes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.a(x)
                return self.b(y).view(y.shape[0], 2, 2)

        x = torch.randn(6, 4)
        gm = export(Sizes(), x, dynamic_shapes=({0: torch.export.Dim("b")},))
        prepare(gm, of_layers(out=ACT))
        gm(x)
        write_qdq(gm)
        (q,) = [n for n in calls(gm, Q) if n.args[0].name == "linear"]
        assert len(q.users) == 1
        assert gm(torch.randn(3, 4)).shape == (3, 2, 2)


class TestMetadata:
    def tagged(self, gm: Any) -> Any:
        for node in gm.graph.nodes:
            if node.op == "call_function":
                node.meta[TAG] = node.name
        return gm

    def tags(self, gm: Any, target: Any) -> list[Any]:
        return [node.meta.get(TAG) for node in calls(gm, target)]

    @pytest.mark.parametrize("copied", [False, True])
    def test_b102_b103_static(self, copied: bool) -> None:
        """Also where the graph was copied after it was prepared."""
        gm = self.tagged(export(ConvNet(), images()))
        of_layers(out=ACT)(gm)
        prepare(gm, nothing)
        gm(images())
        gm = write_qdq(copy.deepcopy(gm) if copied else gm)
        names = ["conv2d", "conv2d_1", "linear", "linear_1"]
        # A layer's are the dequantise node before it and the quantise node after it.
        assert self.tags(gm, Q) == [
            None,
            "conv2d",
            None,
            "conv2d_1",
            None,
            "linear",
            None,
            "linear_1",
        ]
        assert self.tags(gm, DQ) == [
            "conv2d",
            None,
            "conv2d_1",
            None,
            "linear",
            None,
            "linear_1",
            None,
        ]
        assert sorted(self.tags(gm, qd.dequantize_per_channel.default)) == names
        for node in (*calls(gm, Q), *calls(gm, DQ)):
            tag = node.meta.get(TAG)
            same = node_of(gm, tag).meta if tag else {}
            assert node.meta.get("stack_trace") == same.get("stack_trace")
            assert node.meta.get("nn_module_stack") == same.get("nn_module_stack")

    def test_b104_dynamic_belongs_to_the_reader(self) -> None:
        gm = self.tagged(export(ConvNet(), images()))
        of_layers(ACT, out=ACT)(gm)
        last = calls(gm, aten.linear.default)[-1]
        del last.meta["quantization_annotation"]
        annotate(last, {last.args[0]: DYNAMIC, last.args[1]: WEIGHT})
        prepare(gm, nothing)
        gm(images())
        write_qdq(gm)
        for op in (qd.choose_qparams, qd.quantize_per_tensor, qd.dequantize_per_tensor):
            assert self.tags(gm, op.tensor) == ["linear_1"]

    def test_b105_no_tags_no_tags(self) -> None:
        gm = export(ConvNet(), images())
        prepare(gm, of_layers(out=ACT))
        gm(images())
        write_qdq(gm)
        assert not any(TAG in node.meta for node in gm.graph.nodes)

    def test_b106_no_tag_flows_back_through_an_op_that_computes(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(4, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.linear(x, self.w.exp()) + F.linear(x, self.w.t())

        gm = self.tagged(export(Model(), torch.randn(2, 4)))
        node_of(gm, "w").meta[TAG] = "of w"
        prepare(gm, of_layers(None))
        write_qdq(gm, fold_quantize=False)
        computed, moved = calls(gm, qd.quantize_per_channel.default)
        assert (computed.args[0].name, computed.meta.get(TAG)) == ("exp", None)
        assert (moved.args[0].name, moved.meta.get(TAG)) == ("t", "of w")

    def test_b108_b109_handles(self) -> None:
        gm = export(ConvNet(), images())
        prepare(gm, of_layers(out=ACT))
        conv = node_of(gm, "conv2d")
        (observer,) = conv.users
        assert observer.meta["from_node"] == conv.meta["from_node"]
        gm(images())
        write_qdq(gm)
        (q,) = conv.users
        (source,) = q.meta["from_node"]
        assert source.name == observer.name
        assert source.from_node == conv.meta["from_node"]
        ids = [(s.graph_id, s.name) for n in calls(gm, Q) for s in n.meta["from_node"]]
        assert len(set(ids)) == len(ids)

    def test_every_node_has_a_value(self) -> None:
        for act in (ACT, DYNAMIC):
            gm = export(ConvNet(), images())
            prepare(gm, of_layers(act, out=ACT))
            gm(images())
            write_qdq(gm)
            for node in gm.graph.nodes:
                if node.op in ("call_function", "get_attr"):
                    assert "val" in node.meta, node


class TestTools:
    @pytest.mark.parametrize("act", [ACT, DYNAMIC])
    def test_b176_export_save_load_and_compile(self, act: Any, tmp_path: Any) -> None:
        gm = export(ConvNet(), images(), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        prepare(gm, of_layers(act, out=ACT))
        for _ in range(3):
            gm(images())
        write_qdq(gm)
        x = images(3)
        wanted = gm(x)
        program = torch.export.export(gm, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        torch.export.save(program, tmp_path / "net.pt2")
        loaded = torch.export.load(tmp_path / "net.pt2").module()
        compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
        for again in (program.module(), loaded, compiled, copy.deepcopy(gm)):
            for got, want in zip(again(x), wanted, strict=True):
                assert torch.equal(got, want)

    def test_b179_the_state_of_another_converted_one(self) -> None:
        def made() -> Any:
            gm = prepare(export(ConvNet(), images()), of_layers(out=ACT))
            torch.manual_seed(3)
            gm(images())
            return write_qdq(gm)

        one, two = made(), made()
        with torch.no_grad():
            for tensor in two.state_dict().values():
                tensor.zero_()
        two.load_state_dict(one.state_dict())
        x = images()
        for got, want in zip(two(x), one(x), strict=True):
            assert torch.equal(got, want)


class TestForm:
    """`convert_pt2e(…, form="qdq")` of what qnn's own quantizer has prepared."""

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=(1, 2), stride=(2, 1), bias=False),
            nn.Conv2d(8, 8, 2, padding="same", groups=4),
            nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, dilation=2),
            nn.Flatten(2),
            nn.Conv1d(4, 4, 3, dilation=2),
            nn.Flatten(),
            nn.LazyLinear(5),
        ).eval()

    @pytest.mark.parametrize("scheme", ["int8_static", "int8_weight"])
    def test_the_codes_and_the_results_are_those_of_the_layers(self, scheme: str) -> None:
        net, x = self.net(), images()
        net(x)
        gm = pt2e.prepare_pt2e(torch.export.export(net, (x,)), pt2e.Int8Quantizer(scheme))
        if scheme == "int8_static":
            qnn.calibrate(gm, [x], progress=False)
        layers, nodes = (pt2e.convert_pt2e(gm, form=form) for form in ("layers", "qdq"))  # type: ignore[arg-type]
        assert not any(name.startswith("Q") for name in ops(nodes))
        mine, its = nodes.state_dict(), layers.state_dict()
        for name, value in its.items():
            if "input_" not in name:
                assert torch.equal(mine[name].reshape(value.shape), value), name
        assert qnn.sqnr(layers(x), nodes(x)) > 100
        again = torch.export.export(nodes, (x,)).module()
        assert torch.equal(again(x), nodes(x))

    def test_b150_a_scale_for_each_token(self) -> None:
        net, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(3, 5, 16)
        x[0, 0] = 0
        gm = pt2e.prepare_pt2e(torch.export.export(net, (x,)), pt2e.Int8Quantizer("int8"))
        layers, nodes = (pt2e.convert_pt2e(gm, form=form) for form in ("layers", "qdq"))  # type: ignore[arg-type]
        assert ops(nodes)["choose_qparams_per_token"] == 1
        assert qnn.sqnr(layers(x), nodes(x)) > 100

    def test_what_stays_a_layer_says_why(self) -> None:
        net = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.LSTM(64, 4, batch_first=True)
        ).eval()
        x = images()
        gm = pt2e.prepare_pt2e(torch.export.export(net, (x,)), pt2e.Int8Quantizer("int8"))
        layers, nodes = (pt2e.convert_pt2e(gm, form=form) for form in ("layers", "qdq"))  # type: ignore[arg-type]
        left = nodes.meta["qnn_left"]
        assert left["0"].startswith("stays a layer: no quantise node has a scale for each sample")
        assert left["2"].startswith(
            "stays a layer: there are no operators with quantise nodes for QL"
        )
        assert torch.equal(layers(x)[0], nodes(x)[0])
        told = str(qnn.summary(nodes))
        assert "stays a layer" in told
