"""What a quantizer may choose, rewrite and refuse in a whole flow; the numbers are those of the
list of behaviours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.nn import functional as F

import qnn
from qnn import pt2e
from qnn.pt2e import Int8Quantizer, convert_pt2e, prepare_pt2e
from qnn.pt2e.specs import (
    OperatorConfig,
    QuantizationConfig,
    QuantizationSpec,
    SharedQuantizationSpec,
)

from .pt2e import ACT, DYNAMIC, SIGNED, WEIGHT, annotate, aten, node_of, observed, of_layers, ops
from .test_pt2e_graphs import leaves, schemes, why


class Annotates(pt2e.Quantizer):
    """Annotates a whole graph by a function."""

    def __init__(self, write: Any) -> None:
        self.write = write

    def annotate(self, model: Any) -> None:  # type: ignore[override]
        self.write(model)


def prepared(model: nn.Module, quantizer: Any, *args: torch.Tensor) -> Any:
    graph = prepare_pt2e(torch.export.export(model.eval(), args), quantizer)
    graph(*args)
    return graph


def converted(
    model: nn.Module, quantizer: Any, *args: torch.Tensor, db: float = 25, **options: Any
) -> Any:
    """The converted graph, whose float outputs are near those of the model."""
    graph = convert_pt2e(prepared(model, quantizer, *args), **options)
    for want, got in zip(leaves(model(*args)), leaves(graph(*args)), strict=True):
        assert qnn.sqnr(want, got) > db
    return graph


def taken(graph: Any) -> set[str]:
    return {name for name, scheme in schemes(graph).items() if scheme is not None}


class Sub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.more = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more(torch.relu(self.fc(x)))


class Outer(nn.Module):
    """A module, a layer and a function side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sub, self.fc, self.w = Sub(), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.relu(self.fc(self.sub(x))), self.w)


class Mixed(nn.Module):
    """A table, a transposed convolution, and products with a weight and without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.c = nn.Embedding(9, 4), nn.ConvTranspose2d(3, 4, 2)
        self.w = nn.Parameter(torch.randn(4, 6))

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> Any:
        y = self.e(ids)
        return y @ self.w, self.c(x), y @ y.mT


class TestFilters:
    @parameterized.expand([(Sub,), (f"{Sub.__module__}.Sub",)])
    def test_b64_b65_a_class_takes_what_is_in_it_and_nothing_else(self, kind: Any) -> None:
        quantizer = Int8Quantizer().set_module_type(kind, "int8")
        graph = converted(Outer(), quantizer, torch.randn(3, 8))
        assert taken(graph) == {"sub.fc", "sub.more.0"}
        assert why(graph, "fc") == why(graph, "w_linear") == "no rule is for it"

    def test_b68_the_layer_is_asked_and_not_the_activation_after_it(self) -> None:
        """The ReLU of `sub.fc` stands in `sub`, that of `fc` in the model."""
        quantizer = Int8Quantizer().set_module_type(nn.Linear, "int8")
        graph = converted(Outer(), quantizer, torch.randn(3, 8))
        assert taken(graph) == {"sub.fc", "sub.more.0", "fc"}

    @parameterized.expand(
        [
            (F.embedding, "e"),
            (aten.conv_transpose2d.input, "c"),
            (torch.conv_transpose2d, "c"),
            (torch.matmul, "w_0"),
        ]
    )
    def test_b69_operators_by_function_or_overload(self, op: Any, name: str) -> None:
        args = (torch.tensor([[1, 2]]), torch.randn(2, 3, 4, 4))
        graph = converted(Mixed(), Int8Quantizer().set_op_type(op, "int8_weight"), *args)
        assert taken(graph) == {name}
        assert why(graph, "matmul_1 (") == "no int8 op multiplies two activations"

    def test_b71_a_predicate(self) -> None:
        quantizer = Int8Quantizer("int8").set_filter_function(lambda n: "relu" not in str(n.args))
        graph = converted(Outer(), quantizer, torch.randn(3, 8))
        assert taken(graph) == {"sub.fc", "fc"}
        assert why(graph, "sub.more.0") == "the filter function says no"

    def test_b72_inputs_and_outputs_alone(self) -> None:
        def write(gm: Any) -> None:
            (output,) = gm.graph.find_nodes(op="output")
            annotate(next(iter(gm.graph.find_nodes(op="placeholder"))), {}, ACT)
            annotate(output, dict.fromkeys(output.args[0], SIGNED))

        net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        graph = converted(net, Annotates(write), torch.randn(5, 4))
        assert ops(graph)["quantize_per_tensor"] == ops(graph)["dequantize_per_tensor"] == 2
        (first,) = next(iter(graph.graph.find_nodes(op="placeholder"))).users
        ((last,),) = (node.args[0] for node in graph.graph.find_nodes(op="output"))
        assert (first.args[-1], last.args[-1]) == (torch.uint8, torch.int8)


WORDS = {
    "int8_weight": (None, WEIGHT),
    "int8": (DYNAMIC, WEIGHT),
    "int8_static": (ACT, WEIGHT),
    "int16_static": (QuantizationSpec(torch.int16, qscheme=torch.per_tensor_symmetric), WEIGHT),
}


class TestConfigs:
    @parameterized.expand(WORDS.items())
    def test_a_config_is_the_scheme_of_its_dtypes(self, scheme: str, specs: Any) -> None:
        config = QuantizationConfig(specs[0], None, specs[1], None)
        both = (Int8Quantizer(), Int8Quantizer().set_module_name_qconfig("fc", None))
        both[0].set_global(config)
        both[1].set_operator_type(F.linear, OperatorConfig(config, [[F.linear]]))
        for quantizer in both:
            graph = converted(Outer(), quantizer, torch.randn(3, 8))
            assert schemes(graph)["sub.fc"] == scheme

    def test_what_no_scheme_has(self) -> None:
        wide = QuantizationSpec(torch.int32, qscheme=torch.per_tensor_symmetric)
        with pytest.raises(ValueError, match=r"set_global: no scheme has weights as .*int32"):
            Int8Quantizer().set_global(QuantizationConfig(ACT, None, wide, None))
        with pytest.raises(TypeError, match="the name of a scheme"):
            Int8Quantizer().set_global(3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


def in_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


class Decomposes(Annotates):
    """Writes attention as products before it annotates."""

    def transform_for_annotation(self, model: Any) -> Any:
        values = [n.meta["val"] for n in model.graph.find_nodes(op="placeholder")]
        args = tuple(torch.randn(each.shape) for each in values)
        program = torch.export.export(model, args)
        table = {aten.scaled_dot_product_attention.default: in_products}
        return program.run_decompositions(table).module()


def products(gm: Any) -> None:
    of_layers(ACT, WEIGHT)(gm)
    for node in gm.graph.nodes:
        if node.target is aten.matmul.default:
            annotate(node, dict.fromkeys(node.args, SIGNED))


class TestHooks:
    def test_b46_literals_stay_unless_a_quantizer_makes_tensors_of_them(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.l = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor, at: torch.Tensor) -> Any:
                return self.l(x) + 3, at * 2 + 1

        class Lifts(Annotates):
            def transform_for_annotation(self, model: Any) -> Any:
                node = node_of(model, aten.add.Tensor)
                model.register_buffer("three", torch.tensor(float(node.args[1])))
                with model.graph.inserting_before(node):
                    held = model.graph.get_attr("three")
                held.meta["val"] = node.meta["val"].fake_mode.from_tensor(model.three)
                node.args = (node.args[0], held)
                model.recompile()
                return model

        def write(gm: Any) -> None:
            node = node_of(gm, aten.add.Tensor)
            annotate(node, dict.fromkeys(node.args, ACT))

        args = (torch.randn(3, 4), torch.arange(3))
        graph = converted(Net(), Int8Quantizer("int8"), *args)
        assert node_of(graph, aten.add.Tensor).args[1] == 3
        assert graph(*args)[1].dtype == torch.int64
        lifted = converted(Net(), Lifts(write), *args)
        assert lifted.three.dtype == torch.uint8

    def test_b76_b165_what_transform_for_annotation_returns_counts(self) -> None:
        x = torch.randn(2, 5, 8)
        graph = converted(Attention(), Decomposes(products), x)
        assert "scaled_dot_product_attention" not in ops(graph)
        assert ops(graph)["matmul"] == 2
        assert ops(graph)["quantize_per_tensor"] == 2 * 2

    def test_b164_one_quantised_input_and_both_operands_of_products(self) -> None:
        x = torch.randn(2, 5, 8)
        gm = prepared(Attention(), Decomposes(products), x)
        nodes = convert_pt2e(gm, form="qdq")
        read = next(iter(nodes.graph.find_nodes(op="placeholder"))).users
        assert [n.name for n in read if n.name != "_guards_fn"] == ["quantize_per_tensor_default"]
        assert ops(nodes)["quantize_per_tensor"] == 1 + 2 * 2
        own = converted(Attention(), Int8Quantizer("int8_static"), x)
        assert len({float(own.get_submodule(name).input_scale) for name in "qkv"}) == 1

    def test_b78_validate_comes_after_annotate_and_before_anything_is_inserted(self) -> None:
        seen = []

        class Checks(Annotates):
            def validate(self, model: Any) -> None:
                seen.append((len(observed(model)), node_of(model, aten.linear.default).meta))
                raise ValueError("two devices in one operator")

        with pytest.raises(ValueError, match="two devices"):
            prepared(Outer(), Checks(of_layers()), torch.randn(3, 8))
        ((count, meta),) = seen
        assert count == 0
        assert "quantization_annotation" in meta

    def test_b160_a_product_by_a_number_or_another_shape_is_the_quantizers_matter(self) -> None:
        def write(gm: Any) -> None:
            for node in gm.graph.nodes:
                if node.target is aten.mul.Tensor and all(map(_is_like(node), node.args)):
                    annotate(node, dict.fromkeys(node.args, ACT), ACT)

        class Net(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return (x * x.sigmoid()) * 2 * x[:1]

        graph = converted(Net(), Annotates(write), torch.randn(3, 4))
        muls = [n for n in graph.graph.nodes if n.target is aten.mul.Tensor]
        read = [["dequantize" in str(each) for each in n.all_input_nodes] for n in muls]
        assert read == [[True, True], [True], [False, False]]

    def test_b163_shared_over_what_is_annotated_so(self) -> None:
        """Own layers share codes only where values are moved; a quantizer may share more."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.c = nn.Conv2d(3, 4, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = F.hardtanh(self.c(x)).permute(0, 2, 3, 1)
                return y[:, 1:].unsqueeze(1).squeeze(1).mean(1).flatten(1).view(-1)

        targets = (
            aten.hardtanh.default, aten.permute.default, aten.slice.Tensor, aten.unsqueeze.default,
            aten.squeeze.dim, aten.mean.dim, aten.flatten.using_ints, aten.view.default,
        )  # fmt: skip

        def write(gm: Any) -> None:
            of_layers(ACT, WEIGHT, out=ACT)(gm)
            for node in gm.graph.nodes:
                if node.target in targets:
                    shared = SharedQuantizationSpec(node.args[0])
                    annotate(node, {node.args[0]: shared}, shared)

        x = torch.randn(2, 3, 8, 8)
        gm = prepared(Net(), Annotates(write), x)
        passed = [n for n in gm.graph.nodes if n.target in targets]
        assert {n.target for n in passed} == set(targets)
        names = {str(user.target) for n in passed for user in n.users}
        assert names == {"c.output_observer"}
        assert qnn.sqnr(Net()(x), convert_pt2e(gm)(x)) > 20


def _is_like(node: Any) -> Any:
    shape = node.meta["val"].shape
    return lambda each: getattr(each, "meta", {}).get("val", torch.tensor(0)).shape == shape


class Pooled(nn.Module):
    """Two branches that meet, pooled and flattened before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.l = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3), nn.Linear(54, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.l(F.max_pool2d(y, 2).flatten(1))


def on_one_grid(gm: Any) -> None:
    """What moves values or takes the largest shares the grid of the first branch."""
    of_layers(ACT, WEIGHT)(gm)
    moved = (aten.max_pool2d.default, aten.flatten.using_ints)
    relus = [node for node in gm.graph.nodes if node.target is aten.relu.default]
    shared = SharedQuantizationSpec(relus[0])
    annotate(relus[0], {}, ACT)
    annotate(relus[1], {}, shared)
    for node in gm.graph.nodes:
        if node.target is aten.cat.default or node.target in moved:
            annotate(node, dict.fromkeys(node.all_input_nodes, shared), shared)


class TestOneGrid:
    def test_b38_b190_b191_cat_pool_and_flatten_move_codes(self) -> None:
        """Between layers they run on floats, whose codes are those that they would move."""
        gm = prepared(Pooled(), Annotates(on_one_grid), x := torch.randn(2, 3, 8, 8))
        nodes = convert_pt2e(gm, form="qdq")
        seen: dict[str, torch.Tensor] = {}

        class Note(torch.fx.Interpreter):
            def run_node(self, node: Any) -> Any:
                seen[node.name] = super().run_node(node)
                return seen[node.name]

        Note(nodes).run(x)
        quantised = [
            n for n in nodes.graph.nodes if "quantize_per_tensor" in n.name and n.name[0] == "q"
        ]
        first, *rest = quantised
        assert first.args[0].op == "placeholder"
        assert len({n.args[1:] for n in rest}) == 1
        codes = {
            n.args[0].target: seen[n.name]
            for n in rest
            if n.args[0].target is not aten.relu.default
        }
        branches = [seen[n.name] for n in rest if n.args[0].target is aten.relu.default]
        assert torch.equal(codes[aten.cat.default], torch.cat(branches, 1))
        pooled = F.max_pool2d(codes[aten.cat.default].float(), 2).to(torch.uint8)
        assert torch.equal(codes[aten.max_pool2d.default], pooled)
        assert torch.equal(codes[aten.flatten.using_ints], pooled.flatten(1))
        layers = convert_pt2e(gm)
        assert ops(layers)["quantize_per_tensor"] < len(quantised)
        assert qnn.sqnr(nodes(x), layers(x)) > 100


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.gru = nn.Linear(6, 4), nn.GRU(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.l(x))[0]


class TestRecurrent:
    def test_b151_b152_a_gru_by_a_rule_and_by_its_edges(self) -> None:
        x = torch.randn(7, 2, 6)
        graph = converted(Gated(), Int8Quantizer("int8_static"), x)
        assert taken(graph) == {"l", "gru"}
        assert len(qnn.passes.regions(torch.export.export(graph, (x,)))) == 2

        def write(gm: Any) -> None:
            of_layers(ACT, WEIGHT)(gm)
            gru = node_of(gm, aten.gru.input)
            annotate(gru, {gru.args[0]: ACT})
            (first,) = (user for user in gru.users if user.args[1] == 0)
            annotate(first, {}, ACT)

        graph = converted(Gated(), Annotates(write), x)
        assert type(graph.l).__name__ == "QLinear"
        gru = node_of(graph, aten.gru.input)
        assert "dequantize_per_tensor" in str(gru.args[0].target)
        (first,) = (user for user in gru.users if user.args[1] == 0)
        assert ["quantize_per_tensor" in str(user.target) for user in first.users] == [True]


class TestKept:
    def test_b181_attributes_of_the_user(self) -> None:
        module = torch.export.export(Outer().eval(), (torch.randn(3, 8),)).module()
        module.labels, module.meta["note"] = ["a", "b"], 3
        graph = prepare_pt2e(module, Int8Quantizer("int8"))
        done = convert_pt2e(graph)
        assert graph.labels == done.labels == ["a", "b"]
        assert done.meta["note"] == 3

    def test_b100_the_reference_representation_is_refused(self) -> None:
        gm = prepared(Outer(), Int8Quantizer("int8"), torch.randn(3, 8))
        with pytest.raises(ValueError, match="arithmetic of a qnn op is that of integers already"):
            convert_pt2e(gm, use_reference_representation=True)

    def test_b110_float_and_converted_are_compared_by_layers(self) -> None:
        x = torch.randn(9, 8)
        gm = prepared(Outer(), Int8Quantizer("int8"), x)
        done = convert_pt2e(gm)
        before = done(x)
        names = {"sub.fc", "sub.more.0", "fc", "w_linear", "(output)"}
        graphs = {row.name: row for row in qnn.compare(gm, done, x).rows}
        module = {row.name: row for row in qnn.compare(Outer().eval(), done, x).rows}
        assert graphs.keys() == module.keys() == names
        assert all(row.sqnr > 30 for row in graphs.values())
        assert [row.name for row in module.values() if row.note] == ["w_linear"]
        assert "compare with the prepared graph" in str(module["w_linear"].note)
        assert torch.equal(done(x), before)
