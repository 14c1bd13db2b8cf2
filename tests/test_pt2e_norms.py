"""BatchNorms before and after layers, and training in a whole flow; the numbers are those of the
list of behaviours.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import qnn
from qnn import pt2e
from qnn.pt2e import Int8Quantizer, convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from qnn.pt2e.specs import QuantizationSpec

from .pt2e import ACT, DYNAMIC, WEIGHT, annotate, aten, images, node_of, of_layers, ops
from .test_pt2e_rules import Annotates

NARROW = dataclasses.replace(WEIGHT, quant_min=-127)
PER_TENSOR = QuantizationSpec(torch.int8, None, -127, 127, torch.per_tensor_symmetric)
FORMS = [("layers",), ("qdq",)]


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """With running statistics and gains of its own."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model.train()(torch.randn_like(x))
    return model.eval()


def trained(model: nn.Module, quantizer: Any, x: torch.Tensor, **options: Any) -> Any:
    """Prepared for training, and after three batches."""
    gm = prepare_qat_pt2e(torch.export.export(model.eval(), (x,), **options), quantizer)
    for _ in range(3):
        gm(torch.randn_like(x)).square().mean().backward()
    return gm


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestFolded:
    def test_b113_b114_padded_to_the_same_size_without_a_bias(self) -> None:
        x = torch.randn(2, 3, 8, 8)
        conv = nn.Conv2d(3, 4, 3, padding="same", bias=False)
        model = settled(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()), x)
        gm = prepare_pt2e(torch.export.export(model, (x,)), Annotates(of_layers()))
        assert "batch_norm" not in ops(gm)
        bias = node_of(gm, aten.conv2d.padding).args[2]
        assert bias.target == "0.bias"
        assert (bias.meta["val"].shape, bias.meta["val"].dtype) == ((4,), torch.float32)
        torch.testing.assert_close(gm(x), model(x))

    @parameterized.expand(
        [
            ("conv", lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
            ("transposed", lambda: [nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)], (2, 3, 8, 8)),
            ("linear", lambda: [nn.Linear(6, 4)], (5, 6)),
        ]
    )
    def test_b119_inputs_on_the_first_and_the_output_on_the_last(
        self, _: str, make: Any, size: Any
    ) -> None:
        x = torch.randn(size)
        model = settled(nn.Sequential(*make(), nn.ReLU()), x)
        targets = (aten.conv2d.default, aten.conv_transpose2d.input, aten.linear.default)

        def write(gm: Any) -> None:
            for node in gm.graph.nodes:
                if node.target in targets:
                    axis = int(node.target is targets[1])
                    weight = dataclasses.replace(WEIGHT, ch_axis=axis)
                    annotate(node, {node.args[0]: ACT, node.args[1]: weight})
                if node.target is aten.relu.default:
                    annotate(node, {}, ACT)

        gm = prepare_pt2e(torch.export.export(model, (x,)), Annotates(write))
        gm(x)
        nodes = convert_pt2e(gm, form="qdq")
        (last,) = (node for node in nodes.graph.nodes if node.target is aten.relu.default)
        assert last.args[0].target in targets
        assert list(last.args[0].users) == [last]
        assert [n.name for n in last.users] == ["quantize_per_tensor_default_1"]
        assert qnn.sqnr(model(x), nodes(x)) > 25


class Blocks(nn.Module):
    """BatchNorm of one axis and of two, after layers with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.bc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3)
        self.d, self.bd = nn.Conv1d(8, 6, 3, bias=False), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bd(self.d(torch.relu(self.bc(self.c(x))).flatten(2)))


def transposed(gm: Any, weight: Any) -> None:
    for node in gm.graph.nodes:
        if node.target is aten.conv_transpose2d.input:
            annotate(node, {node.args[0]: ACT, node.args[1]: weight})


class TestTraining:
    @parameterized.expand(
        [(w, g, f) for w in ("channel", "tensor") for g in (1, 2) for (f,) in FORMS]
    )
    def test_b127_transposed_with_other_channels_out(
        self, weight: str, groups: int, form: Any
    ) -> None:
        spec = dataclasses.replace(NARROW, ch_axis=1) if weight == "channel" else PER_TENSOR
        torch.manual_seed(0)
        conv = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups)
        model = nn.Sequential(conv, nn.BatchNorm2d(6, eps=1e-3), nn.ReLU())
        with torch.no_grad():
            model[1].weight[:3] = torch.tensor([0.0, -1.0, 2.0])
        x = torch.randn(3, 4, 5, 5)
        gm = trained(model, Annotates(lambda gm: transposed(gm, spec)), x)
        want = gm.eval()(x)
        done = convert_pt2e(gm, form=form)
        kept = form == "qdq" and groups > 1  # whose channels share scales
        assert ("BatchNorm2d" in ops(done)) == kept
        assert qnn.sqnr(want, done(x)) > 60

    @parameterized.expand([(w, f) for w in ("channel", "tensor") for (f,) in FORMS])
    def test_b126_b131_per_tensor_and_per_channel(self, weight: str, form: Any) -> None:
        spec = NARROW if weight == "channel" else PER_TENSOR
        gm = trained(Blocks(), Annotates(of_layers(ACT, spec)), x := images(6))
        assert "add_" not in ops(gm)
        counts = [int(gm.get_submodule(n).num_batches_tracked) for n in ("bc", "bd")]
        assert counts == [3, 3]
        want = gm.eval()(x)
        done = convert_pt2e(gm, form=form)
        assert not any("atchNorm" in op or "batch_norm" in op for op in ops(done))
        assert qnn.sqnr(want, done(x)) > 60

    @parameterized.expand(FORMS)
    def test_b130_converted_before_or_after_eval(self, form: Any) -> None:
        for quantizer in (Int8Quantizer("int8_static"), Annotates(of_layers(ACT, NARROW))):
            gm = trained(Blocks(), quantizer, x := images(6))
            one, other = copy.deepcopy(gm), gm.eval()
            a, b = convert_pt2e(one, form=form), convert_pt2e(other, form=form)
            assert a.training is b.training is False
            assert same_state(a, b)
            assert torch.equal(a(x), b(x))

    def test_b133_a_weight_in_32_bits(self) -> None:
        spec = QuantizationSpec(torch.int32, None, 0, 2**24, torch.per_channel_affine, ch_axis=0)
        gm = trained(nn.Sequential(nn.Conv2d(3, 4, 3)), Annotates(of_layers(ACT, spec)), images())
        done, x = convert_pt2e(gm), images()
        state = done.state_dict()
        assert (state["0.weight"].dtype, state["0.weight_scale"].shape) == (torch.int32, (4,))
        assert state["0.weight"].max() == 2**24
        assert qnn.sqnr(gm.eval()(x), done(x)) > 60

    @parameterized.expand(FORMS)
    def test_b135_a_batch_norm_before_the_layer_stays(self, form: Any) -> None:
        model = nn.Sequential(nn.BatchNorm2d(3, eps=1e-3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        for quantizer in (Int8Quantizer("int8_static"), Annotates(of_layers(ACT, NARROW))):
            gm = trained(copy.deepcopy(model), quantizer, x := images(6)).eval()
            want, done = gm(x), convert_pt2e(gm, form=form)
            assert [n for n, m in done.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["0"]
            assert done.get_submodule("0").eps == 1e-3
            assert qnn.sqnr(want, done(x)) > 60

    def test_b136_a_part_is_trained_and_the_rest_is_calibrated(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
                self.b = nn.Conv2d(4, 4, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.b(self.a(x))

        model, x = settled(Two(), images(6)), images(6)
        want = model(x)
        part = trained(model.a, Int8Quantizer("int8_static"), x)
        model.a = convert_pt2e(part)
        codes = model.a.get_submodule("0").state_dict()["weight"].clone()
        program = torch.export.export(model, (x,))
        gm = qnn.calibrate(prepare_pt2e(program, Int8Quantizer("int8_static")), [x], progress=False)
        done = convert_pt2e(gm)
        assert len(qnn.passes.regions(torch.export.export(done, (x,)))) == 2
        assert torch.equal(done.state_dict()["a.0.weight"], codes)
        assert type(done.b).__name__ == "QConv2d"
        assert qnn.sqnr(want, done(x)) > 20

    def test_b138_a_table_by_rows(self) -> None:
        class Words(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.e, self.l = nn.Embedding(20, 8), nn.Linear(8, 4)

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.l(self.e(ids))

        ids = torch.arange(20).reshape(2, 10)
        first = Int8Quantizer().set_module_type(nn.Embedding, "int8_weight")
        both = pt2e.ComposableQuantizer([first, Int8Quantizer("int8_static")])
        gm = prepare_qat_pt2e(torch.export.export(Words(), (ids,)), both)
        for _ in range(2):
            gm(ids).square().mean().backward()
        assert gm.e.weight.grad is not None
        done = convert_pt2e(gm)
        assert done.e.weight_scale.shape == (20, 1)
        assert (done.e.scheme, done.l.scheme) == ("int8_weight", "int8_static")
        assert qnn.sqnr(gm.eval()(ids), done(ids)) > 35


class TestModes:
    def test_b143_the_same_mode_twice_compiles_once(self) -> None:
        gm, x = trained(Blocks(), Int8Quantizer("int8_static"), images(6)), images(6)
        counter = CompileCounterWithBackend("eager")
        torch._dynamo.reset()
        step = torch.compile(gm, fullgraph=True, backend=counter)
        seen = []
        for mode in (False, False, True, True, False, True):
            (pt2e.move_exported_model_to_train if mode else pt2e.move_exported_model_to_eval)(gm)
            step(x)
            seen.append(counter.frame_count)
        assert seen == [1, 1, 2, 2, 2, 2]

    @parameterized.expand([(True,), (False,)])
    def test_b144_dropout_and_batch_norm_switch_with_what_they_have(self, in_place: bool) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.l, self.b = nn.Linear(6, 64), nn.BatchNorm1d(64, 1e-3, 0.3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.dropout(self.b(self.l(x)) + 1, 0.25, self.training, in_place)

        x = torch.randn(50, 6)
        program = torch.export.export(Net().train(), (x,))
        gm = prepare_qat_pt2e(program, Int8Quantizer("int8_static"))
        for _ in range(2):
            kept = float((pt2e.move_exported_model_to_train(gm)(x) != 0).float().mean())
            assert 0.7 < kept < 0.8
            before = gm.b.running_mean.clone()
            pt2e.move_exported_model_to_eval(gm)
            assert torch.equal(gm(x), gm(x))
            assert (gm(x) != 0).all()
            assert torch.equal(gm.b.running_mean, before)
        assert (gm.b.eps, gm.b.momentum) == (1e-3, 0.3)


class Mixed(nn.Module):
    """A layer of each kind that is trained with fake-quantised weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.lstm = nn.Conv1d(3, 6, 1), nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.c(x).mT)[0])


class TestSwitches:
    @parameterized.expand(
        [
            ("own", lambda: Int8Quantizer("int8_static")),
            ("specs", lambda: Annotates(of_layers(ACT, WEIGHT))),
            ("dynamic", lambda: Annotates(of_layers(DYNAMIC, WEIGHT))),
        ]
    )
    def test_b139_observing_and_rounding(self, _: str, make: Any) -> None:
        x = torch.randn(4, 3, 7)
        gm = trained(model := Mixed(), make(), x)
        assert qnn.sqnr(model(x), gm(x)) < 60
        gm.apply(pt2e.disable_fake_quant)
        assert qnn.sqnr(model(x), gm(x)) > 100
        before = copy.deepcopy(gm.state_dict())
        gm(x * 9)
        changed = {k for k, value in gm.state_dict().items() if not torch.equal(value, before[k])}
        assert changed  # ranges are recorded all the same
        gm.apply(pt2e.disable_observer)
        before = copy.deepcopy(gm.state_dict())
        gm(x * 99)
        assert all(torch.equal(value, before[k]) for k, value in gm.state_dict().items())
        assert {k.rpartition(".")[2] for k, _ in gm.named_buffers()} >= {"passing"}
        other = prepare_qat_pt2e(torch.export.export(model, (x,)), make())
        other.load_state_dict(gm.state_dict())
        assert torch.equal(gm(x), other(x))
        torch._dynamo.reset()
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        for each in (gm, other):
            each.apply(pt2e.enable_fake_quant)
        assert qnn.sqnr(model(x), gm(x)) < 60
        torch.testing.assert_close(compiled(x), gm(x))
        other.apply(pt2e.disable_fake_quant)
        torch.testing.assert_close(compiled(x), model(x))

    def test_b140_learned_ranges(self) -> None:
        spec = qnn.QuantSpec(torch.int8, observer="minmax", learnable=True)
        x = torch.randn(4, 3, 7)
        program = torch.export.export(Mixed(), (x,))
        gm = prepare_qat_pt2e(program, Int8Quantizer("int8_static"), parts={"input": spec})
        gm(x).square().mean().backward()
        scale = gm.c.input_quantize.scale
        assert isinstance(scale, nn.Parameter)
        assert scale.grad.isfinite().all()
        assert scale.grad.any()
        first = scale.detach().clone()
        gm(x * 9)  # a range that was seen later does not move it
        assert torch.equal(scale, first)
        with torch.no_grad():
            scale.fill_(-0.02)  # trained too far
        other = prepare_qat_pt2e(program, Int8Quantizer("int8_static"), parts={"input": spec})
        other.load_state_dict(gm.state_dict())
        assert torch.equal(gm.eval()(x), other.eval()(x))
        done = convert_pt2e(other)
        assert float(done.c.input_scale) == pytest.approx(0.02)
        assert done.c.input_zero_point.dtype == torch.int8

    def test_b153_the_parts_of_an_lstm_fixed_and_in_16_bits(self) -> None:
        fixed = qnn.QuantSpec(torch.int16, symmetric=True, scale=2**-13, zero_point=0)
        gate = qnn.QuantSpec(torch.uint8, scale=2**-8, zero_point=0)
        parts = {"cell_state": fixed, "*_gate": gate, "cell_gate": fixed}
        x = torch.randn(4, 3, 7)
        program = torch.export.export(model := Mixed(), (x,))
        gm = prepare_pt2e(program, Int8Quantizer("int8_static"), parts=parts)
        gm(x)
        assert gm.lstm.parts()["cell_state"].spec == fixed
        assert gm.lstm.parts()["forget_gate"].spec == gate
        done = convert_pt2e(gm)
        assert qnn.sqnr(model(x), done(x)) > 25
        other = qnn.prepare(Mixed(), parts=parts)
        other(x)
        assert same_state(done, qnn.convert(other))


class TestMetadata:
    def test_b107_tags_go_through_decompositions(self) -> None:
        def write(gm: Any) -> None:
            of_layers(ACT, WEIGHT)(gm)
            for node in gm.graph.nodes:
                if node.target is aten.conv2d.default:
                    node.meta["quantization_tag"] = "tagged"

        net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images()
        gm = prepare_pt2e(torch.export.export(net.eval(), (x,)), Annotates(write))
        gm(x)
        program = torch.export.export(convert_pt2e(gm, form="qdq"), (x,))
        tags = {
            n.name: n.meta.get("quantization_tag") for n in program.run_decompositions().graph.nodes
        }
        tagged = ("dequantize_per_channel", "dequantize_per_tensor", "convolution")
        assert {tags[name] for name in tagged} == {"tagged"}
        assert tags["quantize_per_tensor"] is tags["relu"] is None

    @parameterized.expand([(False,), (True,)])
    def test_b111_a_layer_and_its_bias_have_one_source(self, bias: bool) -> None:
        """Where torch.export says the source, in its strict form."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.c, self.bc = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4)
                self.d, self.bd = nn.Conv2d(4, 4, 3, bias=bias), nn.BatchNorm2d(4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.bd(self.d(self.bc(self.c(x))))

        gm = trained(Net(), Annotates(of_layers(ACT, NARROW)), images(6), strict=True)
        nodes = convert_pt2e(gm, form="qdq")
        convs = [n for n in nodes.graph.nodes if n.target is aten.conv2d.default]
        sources = [n.meta["source_fn_stack"] for n in convs]
        assert sources[0] != sources[1]
        assert [n.args[2].meta.get("source_fn_stack") for n in convs] == sources
