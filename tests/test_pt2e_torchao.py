"""torchao's own quantizers drive qnn's prepare and convert: the same nodes, codes and results as
torchao's; the numbers are those of the list of behaviours.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

import qnn
from qnn.pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

from .pt2e import ConvNet, aten, export, images, observed, ops

pytest.importorskip("torchao", reason="needs torchao, whose quantizers these are")
import torchao.quantization.pt2e.quantize_pt2e as ao
from torchao.quantization.pt2e.observer import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer import (
    ComposableQuantizer,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.embedding_quantizer import EmbeddingQuantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
)
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    get_default_x86_inductor_quantization_config as x86_config,
)
from torchao.testing.pt2e._xnnpack_quantizer import (
    XNNPACKQuantizer,
)
from torchao.testing.pt2e._xnnpack_quantizer import (
    get_symmetric_quantization_config as xnnpack_config,
)

ACT = QuantizationSpec(torch.uint8, HistogramObserver, 0, 255, torch.per_tensor_affine)
WEIGHT = QuantizationSpec(
    torch.int8, PerChannelMinMaxObserver, -128, 127, torch.per_channel_symmetric, 0
)


class Tower(nn.Module):
    """In-place activations, two branches that meet in a cat, pools, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.c = nn.Conv2d(16, 8, 1)
        self.l = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([F.relu_(self.a(x)), F.hardtanh(self.b(x))], 1)
        y = F.avg_pool2d(F.max_pool2d(self.c(y), 2), 2)
        y = self.l(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return self.l(F.silu(y)) + y * 2


def listed(gm: GraphModule) -> list[Any]:
    """What a graph computes: each call with its operands, by place, and its other arguments."""
    places: dict[Any, Any] = {}

    def told(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return places[value]
        if isinstance(value, list | tuple):
            return [told(each) for each in value]
        return value

    def parameters(node: Any) -> Any:
        held: Any = gm
        for part in node.target.split("."):
            held = getattr(held, part)
        return (str(held.dtype), held.detach().float().flatten().tolist())

    lines = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            places[node] = parameters(node)
        elif node.op == "placeholder":
            places[node] = node.name
        elif node.op == "call_function" or node.op == "output":
            line = (str(node.target), told(node.args), told(dict(node.kwargs).items()))
            places[node] = hash(str(line)) if node.target is not operator.getitem else line
            lines.append(str(line))
    return lines


def both(
    model: nn.Module, make: Any, x: torch.Tensor, *, qat: bool = False, exact: bool = True
) -> tuple[GraphModule, GraphModule]:
    """A model through torchao and through qnn, after three batches each; both converted to nodes,
    which are compared.
    """
    theirs = (ao.prepare_qat_pt2e if qat else ao.prepare_pt2e)(export(model, x), make())
    prepare = prepare_qat_pt2e if qat else prepare_pt2e
    mine = prepare(export(model, x), make())
    for _ in range(3):
        batch = torch.randn_like(x) if x.is_floating_point() else x
        assert same(theirs(batch), mine(batch))
    theirs, nodes = ao.convert_pt2e(theirs), convert_pt2e(mine, form="qdq")
    assert sorted(listed(nodes)) == sorted(listed(theirs))
    assert same(theirs(x), nodes(x))
    return mine, nodes


def same(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(torch.equal(a, b) for a, b in pairs)


def x86(**options: Any) -> Any:
    return lambda: X86InductorQuantizer().set_global(x86_config(**options))


def xnnpack(**options: Any) -> Any:
    return lambda: XNNPACKQuantizer().set_global(xnnpack_config(**options))


QUANTIZERS = {
    "x86": x86(),
    "x86_reduced": x86(reduce_range=True),
    "x86_dynamic": x86(is_dynamic=True),
    "xnnpack": xnnpack(is_per_channel=True),
    "xnnpack_tensor": xnnpack(),
    "xnnpack_dynamic": xnnpack(is_per_channel=True, is_dynamic=True),
}


class TestVendors:
    @pytest.mark.parametrize("name", QUANTIZERS)
    @pytest.mark.parametrize("kind", [ConvNet, Tower])
    def test_the_same_nodes_codes_and_results(self, kind: Any, name: str) -> None:
        model, x = kind().eval(), images()
        mine, nodes = both(model, QUANTIZERS[name], x)
        layers = convert_pt2e(mine)
        assert sum(ops(nodes)[op] for op in ("conv2d", "linear")) >= 4
        made = sum(count for op, count in ops(layers).items() if op in ("QConv2d", "QLinear"))
        assert bool(made) == (name in ("x86", "xnnpack", "xnnpack_tensor"))
        pairs = zip(nodes(x), layers(x), strict=True)
        if kind is Tower:
            pairs = zip([nodes(x)], [layers(x)], strict=True)
        for want, got in pairs:
            assert qnn.sqnr(want, got) > (100 if not made else 35)

    @pytest.mark.parametrize("name", ["x86", "xnnpack"])
    def test_training(self, name: str) -> None:
        make = {"x86": x86(is_qat=True), "xnnpack": xnnpack(is_qat=True, is_per_channel=True)}
        both(ConvNet().eval(), make[name], images(), qat=True)

    def test_the_names_are_those_of_layers(self) -> None:
        gm = prepare_pt2e(export(ConvNet(), images()), x86()())
        names = {name for _, name in observed(gm)}
        assert names >= {"c.input_observer", "c.weight_observer", "l.input_observer"}
        assert not any("activation_post_process" in name for name in names)
        gm(images())
        state = convert_pt2e(gm).state_dict()
        assert {k.partition(".")[0] for k in state} == {"c", "d", "l", "m"}

    def test_b61_b67_names_and_types(self) -> None:
        def make() -> Any:
            config = x86_config()
            return (
                X86InductorQuantizer()
                .set_global(config)
                .set_module_name_qconfig("c", None)
                .set_module_name_qconfig("m", None)
            )

        both(ConvNet().eval(), make, images())

    def test_b73_b74_composed_of_torchaos_own(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.e, self.l = nn.Embedding(20, 8), nn.Linear(8, 4)

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.l(self.e(ids))

        def make() -> Any:
            dynamic = XNNPACKQuantizer().set_global(
                xnnpack_config(is_per_channel=True, is_dynamic=True)
            )
            return ComposableQuantizer([EmbeddingQuantizer(), dynamic])

        both(Model().eval(), make, torch.arange(12).reshape(2, 6))


class Recipes(nn.Module):
    """Layers with the parts that a recipe of a quantizer of torchao's looks for."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.l, self.m = nn.Linear(3, 3), nn.Linear(3, 3)
        self.write = write

    def forward(self, x: torch.Tensor) -> Any:
        return self.write(self, x)


def sums(net: Any, x: torch.Tensor) -> Any:
    y = net.a(x)
    return F.relu(y + net.b(x)), y


def blocks(net: Any, x: torch.Tensor) -> Any:
    y = F.relu(net.a(x) + net.b(x))
    return F.relu(net.c(y) + y)


def activations(net: Any, x: torch.Tensor) -> Any:
    x = x.mean((2, 3))
    y = F.leaky_relu(net.l(F.relu(net.m(x))))
    return F.gelu(net.m(F.gelu(net.l(y), approximate="tanh")))


def reused(net: Any, x: torch.Tensor) -> Any:
    x = x.mean((2, 3))
    return F.relu(net.l(net.l(x) + x))


def read_by_nothing_in_int8(net: Any, x: torch.Tensor) -> Any:
    y = net.a(x)
    return F.relu(y + net.b(y)), y.flatten(1).t()


def read_in_int8(net: Any, x: torch.Tensor) -> Any:
    return net.l(F.max_pool2d(net.a(x), 8).flatten(1))


RECIPES = [sums, blocks, activations, reused, read_by_nothing_in_int8, read_in_int8]


class TestRecipes:
    """What `X86InductorQuantizer` looks for, node for node as torchao makes it."""

    @pytest.mark.parametrize("write", RECIPES)
    @pytest.mark.parametrize("options", [{}, {"is_dynamic": True}], ids=["static", "dynamic"])
    def test_b155_b156_b157_b158_b159_b162(self, write: Any, options: Any) -> None:
        _, nodes = both(Recipes(write).eval(), x86(**options), images())
        quantised = {
            node.target
            for node in nodes.graph.nodes
            if any("dequantize" in str(each.target) for each in node.all_input_nodes)
        }
        assert (aten.flatten.using_ints in quantised) == (write is read_in_int8)
        for node in nodes.graph.nodes:
            if node.target in (aten.leaky_relu.default, aten.gelu.default):
                assert node.args[0].target is aten.linear.default

    def test_b160_products_of_two_tensors_of_one_shape(self) -> None:
        def write(net: Any, x: torch.Tensor) -> Any:
            y = net.a(x)
            return (y * net.b(x)) * 2, y * y[:1]

        def make() -> Any:
            config = x86_config()
            return X86InductorQuantizer().set_function_type_qconfig(torch.mul, config)

        _, nodes = both(Recipes(write).eval(), make, images())
        muls = [node for node in nodes.graph.nodes if node.target is aten.mul.Tensor]
        read = ["dequantize" in str(node.args[0].target) for node in muls]
        assert sorted(read) == [False, False, True]


class Annotates(Quantizer):
    """A quantizer of torchao's base, from a function over nodes."""

    def __init__(self, write: Any) -> None:
        self.write = write

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in list(model.graph.nodes):
            if node.op == "call_function":
                self.write(node)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def put(node: Any, inputs: dict[Any, Any], output: Any = None, implicit: bool = True) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, output, implicit, True)


LAYERS = (aten.conv2d.default, aten.linear.default)


class TestAnnotations:
    """Shapes of annotations that tests of torchao's pin down."""

    def check(self, write: Any, model: nn.Module | None = None, x: Any = None) -> GraphModule:
        x = images() if x is None else x
        return both(model or ConvNet().eval(), lambda: Annotates(write), x)[1]

    def test_b24_b161_pools_share_both_sides(self) -> None:
        def write(node: Any) -> None:
            if node.target in LAYERS:
                put(node, {node.args[0]: ACT, node.args[1]: WEIGHT}, ACT)
            if node.target in (aten.max_pool2d.default, aten.avg_pool2d.default):
                put(node, {node.args[0]: ACT}, SharedQuantizationSpec((node.args[0], node)))

        self.check(write, Tower().eval())

    def test_b28_cats_share_all_inputs(self) -> None:
        def write(node: Any) -> None:
            if node.target in LAYERS:
                put(node, {node.args[0]: ACT, node.args[1]: WEIGHT}, ACT)
            if node.target is aten.cat.default:
                first, *rest = dict.fromkeys(node.args[0])
                shared = SharedQuantizationSpec((first, node))
                put(node, {first: ACT, **dict.fromkeys(rest, shared)}, shared)

        for model in (ConvNet(), Tower()):
            self.check(write, model.eval())

    def test_b30_without_implicit_sharing(self) -> None:
        def write(node: Any) -> None:
            if node.target in LAYERS:
                put(node, {node.args[0]: ACT, node.args[1]: WEIGHT}, ACT, implicit=False)

        nodes = self.check(
            write, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
        )
        assert ops(nodes)["quantize_per_tensor"] == 4

    def test_b37_b90_readers_with_other_specs(self) -> None:
        signed = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)

        def write(node: Any) -> None:
            if node.target in LAYERS:
                put(node, {node.args[0]: ACT, node.args[1]: WEIGHT}, signed)
            if node.target is aten.add.Tensor:
                put(node, {node.args[0]: ACT, node.args[1]: signed}, ACT)
            if node.target is aten.mean.dim:
                put(node, {node.args[0]: signed}, None)

        self.check(write)
        self.check(write, Tower().eval())

    def test_b13_b14_fixed(self) -> None:
        fixed = FixedQParamsQuantizationSpec(
            torch.uint8, 1.0 / 256, 0, 0, 255, torch.per_tensor_affine
        )

        class Gated(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = torch.sigmoid(x)
                return y * torch.tanh(y)

        def write(node: Any) -> None:
            if node.target is aten.sigmoid.default:
                put(node, {node.args[0]: ACT}, fixed)
            if node.target in (aten.tanh.default, aten.mul.Tensor):
                put(node, {node.args[0]: copy.deepcopy(fixed)}, None)

        nodes = self.check(write, Gated(), torch.randn(4, 4))
        assert ops(nodes)["quantize_per_tensor"] == 2

    def test_b21_b22_tokens_and_groups(self) -> None:
        from torchao.quantization.granularity import PerGroup, PerToken
        from torchao.quantization.pt2e._affine_quantization import (
            AffineQuantizedMinMaxObserver,
            AffineQuantizedPlaceholderObserver,
        )
        from torchao.quantization.quant_primitives import MappingType

        act = QuantizationSpec(
            torch.uint8,
            AffineQuantizedPlaceholderObserver.with_args(
                target_dtype=torch.uint8, mapping_type=MappingType.ASYMMETRIC, eps=2**-12,
                granularity=PerToken(), quant_min=0, quant_max=255,
            ),
            0, 255, None, None, True,
        )  # fmt: skip
        weight = QuantizationSpec(
            torch.int8,
            AffineQuantizedMinMaxObserver.with_args(
                target_dtype=torch.int8, mapping_type=MappingType.SYMMETRIC,
                granularity=PerGroup(8), eps=2**-12,
            ),
            -8, 7, None, None, False,
        )  # fmt: skip

        def write(node: Any) -> None:
            if node.target is aten.linear.default:
                put(node, {node.args[0]: act, node.args[1]: weight})

        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(32, 8)).eval(), torch.randn(3, 32)
        theirs = ao.prepare_pt2e(export(net, x), Annotates(write))
        mine = prepare_pt2e(export(net, x), Annotates(write))
        theirs(x), mine(x)
        nodes, layers = convert_pt2e(mine, form="qdq"), convert_pt2e(mine)
        theirs = ao.convert_pt2e(theirs)
        assert same(theirs(x), nodes(x))
        assert ops(theirs) == ops(nodes) == ops(layers)
        assert same(layers(x), nodes(x))
        assert "writes nodes of its own" in str(layers.meta["qnn_left"])

    def test_b12_b121_another_axis_in_training(self) -> None:
        """torchao's fake-quantise would take axis 0."""
        from torchao.quantization.pt2e.fake_quantize import FakeQuantize
        from torchao.quantization.pt2e.observer import MovingAveragePerChannelMinMaxObserver

        fake = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver)
        weight = QuantizationSpec(torch.int8, fake, -128, 127, torch.per_channel_symmetric, 1)

        def write(node: Any) -> None:
            if node.target is aten.conv_transpose2d.input:
                put(node, {node.args[0]: ACT, node.args[1]: weight})

        net, x = nn.Sequential(nn.ConvTranspose2d(3, 5, 2)), images()
        gm = prepare_qat_pt2e(export(net, x), Annotates(write))
        gm(x)
        model = convert_pt2e(gm)
        assert model.state_dict()["0.weight_scale"].shape == (5, 1, 1, 1)
        assert qnn.sqnr(net(x), model(x)) > 30

    def test_b99_observers_of_torch_and_of_torchao_in_one_graph(self) -> None:
        from torch.ao.quantization.observer import MinMaxObserver as TorchObserver

        other = QuantizationSpec(torch.uint8, TorchObserver, 0, 255, torch.per_tensor_affine)

        def write(node: Any) -> None:
            if node.target is aten.conv2d.default:
                put(node, {node.args[0]: ACT, node.args[1]: WEIGHT})
            if node.target is aten.linear.default:
                put(node, {node.args[0]: other, node.args[1]: WEIGHT})

        x = images()
        net = ConvNet().eval()
        gm = prepare_pt2e(export(net, x), Annotates(write))
        gm(x)
        model = convert_pt2e(gm)
        assert (ops(model)["QConv2d"], ops(model)["QLinear"]) == (2, 2)
        for want, got in zip(net(x), model(x), strict=True):
            assert qnn.sqnr(want, got) > 30
