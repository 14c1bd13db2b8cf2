"""Where observers go in a graph, and how they are called; the numbers are those of the list of
behaviours.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qnn.pt2e.insert import insert_observers
from qnn.pt2e.qdq import write_qdq
from qnn.pt2e.specs import (
    WHY_LEFT,
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
    observed,
    observer_of,
    of_layers,
    ops,
    prepare,
)


def nothing(gm: Any) -> None:
    """A quantizer whose work is done."""


class TestPlaces:
    def test_b1_b2_b3_edges_are_independent(self) -> None:
        model, x = nn.Conv2d(3, 4, 1), images()
        for wanted, given in (
            (("input", "weight", "bias"), (ACT, WEIGHT, SIGNED)),
            (("weight",), (None, WEIGHT, None)),
            (("input",), (ACT, None, None)),
            (("weight", "bias"), (None, WEIGHT, SIGNED)),
        ):
            gm = export(model, x)
            conv = node_of(gm, aten.conv2d.default)
            annotate(conv, dict(zip(conv.args, given, strict=False)))
            prepare(gm, nothing)
            assert {name.removesuffix("_1") for name, _ in observed(gm)} == {*wanted}
            assert not any(observer_of(gm, user) for user in conv.users)

    def test_b24_b39_an_output_observer_takes_over_all_readers(self) -> None:
        class Many(nn.Module):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                y = x + 1
                return y, y * 2, y - 3

        gm = export(Many(), torch.randn(2, 2))
        add = node_of(gm, "add")
        annotate(add, {}, ACT)
        prepare(gm, nothing)
        (call,) = add.users
        assert observer_of(gm, call)
        assert {user.name for user in call.users} == {"mul", "sub", "output"}

    def test_b40_an_input_observer_serves_its_edge_alone(self) -> None:
        gm = export(ConvNet(), images())
        prepare(gm, of_layers())
        relu, conv = node_of(gm, "relu"), node_of(gm, "conv2d_1")
        assert observer_of(gm, conv.args[0])
        assert conv.args[0].args[0] is relu  # type: ignore[union-attr]
        assert node_of(gm, "add").args[1] is relu

    def test_b41_one_call_for_readers_of_a_group(self) -> None:
        class Three(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x)

        for act in (ACT, DYNAMIC):
            gm = export(Three(), torch.randn(5, 8))
            q, k, v = (n for n in gm.graph.nodes if n.target is aten.linear.default)
            of_layers(act)(gm)
            del k.meta["quantization_annotation"]
            prepare(gm, nothing)
            assert q.args[0] is v.args[0]
            assert k.args[0] is q.args[0].args[0]  # type: ignore[union-attr]

    def test_b37_another_spec_on_an_observed_tensor(self) -> None:
        gm = export(ConvNet(), images())
        of_layers(ACT, out=SIGNED)(gm)
        conv, add = node_of(gm, "conv2d_1"), node_of(gm, "add")
        annotate(add, {conv: ACT})
        prepare(gm, nothing)
        second = add.args[0]
        first = second.args[0]  # type: ignore[union-attr]
        assert observer_of(gm, second).dtype == torch.uint8
        assert observer_of(gm, first).dtype == torch.int8
        assert first.args[0] is conv

    def test_b42_b43_parameters_buffers_and_what_ops_make_of_them(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("w", torch.randn(4, 3))
                self.v = nn.Parameter(torch.randn(4, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.linear(x @ self.w.t(), self.v)

        gm = export(Model(), torch.randn(2, 3))
        matmul = node_of(gm, aten.matmul.default)
        annotate(matmul, {matmul.args[1]: SIGNED})
        prepare(gm, of_layers(None))
        assert observed(gm) == [("v", "v_observer"), ("t", "w_observer")]

    def test_b44_lists_are_walked(self) -> None:
        class Cat(nn.Module):
            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return torch.cat([x, y], 1)

        gm = export(Cat(), torch.randn(2, 2), torch.randn(2, 2))
        cat = node_of(gm, "cat")
        x, y = cat.args[0]  # type: ignore[misc]
        annotate(cat, {x: ACT, y: SIGNED})
        prepare(gm, nothing)
        assert [observer_of(gm, n).dtype for n in cat.args[0]] == [torch.uint8, torch.int8]  # type: ignore[union-attr]

    def test_b45_a_constant_as_a_key(self) -> None:
        class Add(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + 3

        gm = export(Add(), torch.randn(2))
        annotate(node_of(gm, "add"), {3: ACT})  # type: ignore[dict-item]
        with pytest.raises(
            ValueError, match=r"annotation of add \(aten.add.Tensor\).* has the key 3"
        ) as e:
            prepare(gm, nothing)
        assert "return x + 3" in str(e.value)

    def test_b47_b48_b49_keywords(self) -> None:
        class Keywords(nn.Module):
            def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
                y = torch.conv2d(input=x, weight=w, padding=1)
                return y.clone(memory_format=torch.channels_last)

        gm = export(Keywords(), images(), torch.randn(4, 3, 3, 3))
        conv, clone = node_of(gm, aten.conv2d.default), node_of(gm, "clone")
        assert conv.args[1].name == "w"  # type: ignore[union-attr]
        annotate(conv, {conv.args[0]: ACT, conv.args[1]: WEIGHT})
        annotate(clone, {conv: ACT})
        prepare(gm, nothing)
        assert {name for name, _ in observed(gm)} == {"x", "w", "conv2d"}
        assert clone.kwargs == {"memory_format": torch.channels_last}

    def test_b49_a_tensor_in_a_keyword_is_an_edge_and_out_is_refused(self) -> None:
        gm = export(ConvNet(), images())
        add = node_of(gm, "add")
        one, two = add.args
        add.args, add.kwargs = (one,), {"other": two}
        annotate(add, {two: ACT})  # type: ignore[dict-item]
        with gm.graph.inserting_after(add):
            out = gm.graph.call_function(aten.add.out, (one, two), {"out": one})
        out.meta = dict(add.meta)
        refused = copy.deepcopy(gm)
        del out.meta["quantization_annotation"]
        prepare(gm, nothing)
        assert observer_of(gm, add.kwargs["other"])
        out = node_of(refused, aten.add.out)
        annotate(out, {out.kwargs["out"]: ACT})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match=r"writes to conv2d_1, its argument out="):
            prepare(refused, nothing)

    def test_b50_a_graph_without_types_is_refused(self) -> None:
        class Add(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.relu(x)

        gm = torch.fx.symbolic_trace(Add())
        annotate(node_of(gm, "relu"), {}, ACT)
        with pytest.raises(ValueError, match="export the model first"):
            prepare(gm, nothing)
        assert insert_observers(torch.fx.symbolic_trace(Add()), qat=False) is not None


class TestLeft:
    def test_b51_b52_what_is_no_float_tensor(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("n", torch.tensor([100]))
                self.l = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
                y = self.l(x)[:, torch.arange(4) + 0]
                first, second = torch.split(y, 2, 1)
                return (y + self.n) * 2, torch.eq(x, 0), y.shape[0] - 1, first - second

        x = torch.randn(3, 4)
        gm = export(Model(), x, dynamic_shapes=({0: torch.export.Dim("b")},))
        functions = [n for n in gm.graph.nodes if n.op == "call_function"]
        for node in functions:
            annotate(node, dict.fromkeys(node.all_input_nodes, ACT), ACT)
        prepare(gm, nothing)
        values = [gm.graph, *[n for n in gm.graph.nodes if observer_of(gm, n)]][1:]
        assert all(n.args[0].meta["val"].is_floating_point() for n in values)
        assert all(isinstance(n.args[0].meta["val"], torch.Tensor) for n in values)
        with_integer = next(n for n in functions if "n" in map(str, n.args))
        assert with_integer.meta[WHY_LEFT] == "its input n is torch.int64"
        assert not any(observer_of(gm, source) for source in with_integer.args)
        got, wanted = gm(x), Model.forward(_with(gm, Model()), x)
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(got, wanted, strict=True)
        )

    @pytest.mark.parametrize("kind", ["literal", "buffer"])
    def test_b53_a_constant_near_the_end_of_float32(self, kind: str) -> None:
        class Huge(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("f", torch.tensor(3.4e38))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * (3.4e38 if kind == "literal" else self.f)

        gm = export(Huge(), torch.randn(2))
        mul = node_of(gm, aten.mul.Tensor)
        annotate(mul, dict.fromkeys(mul.all_input_nodes, ACT), ACT)
        prepare(gm, nothing)
        assert observed(gm) == []
        assert "is 3.4e+38" in mul.meta[WHY_LEFT] or "argument 3.4e+38" in mul.meta[WHY_LEFT]

    def test_b52_b28_a_place_that_is_left_still_has_its_spec(self) -> None:
        """What shares the spec of one has it."""

        class Model(nn.Module):
            def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
                return torch.relu(x + n)

        gm = export(Model(), torch.randn(2), torch.tensor([3, 4]))
        add, relu = node_of(gm, "add"), node_of(gm, "relu")
        annotate(add, dict.fromkeys(add.all_input_nodes, ACT), ACT)
        annotate(relu, {add: SharedQuantizationSpec(add)}, SharedQuantizationSpec(add))
        prepare(gm, nothing)
        assert [name for name, _ in observed(gm)] == ["add", "relu"]

    def test_b54_in_place_twins(self) -> None:
        class Twins(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.c = nn.Conv2d(3, 4, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.c(x)
                return F.silu(F.hardtanh_(F.relu_(y.add_(1))), inplace=True) + y.sum()

        x = images()
        gm = export(Twins(), x)
        model = Twins()
        model.load_state_dict(gm.state_dict())
        for node in gm.graph.nodes:
            if node.op == "call_function":
                annotate(node, dict.fromkeys(node.all_input_nodes, ACT), ACT)
        prepare(gm, nothing)
        assert torch.equal(gm(x), model(x))
        # x, weight and bias; the convolution, its twins, the sum, and both together
        assert len({name for _, name in observed(gm)}) == 3 + 5 + 2
        for _ in range(8):
            gm(images())
        got = write_qdq(gm)(x)
        wanted = model(x)
        assert (got - wanted).abs().max() / wanted.abs().max() < 0.05

    def test_b55_unused_values_and_no_result(self) -> None:
        class Unused(nn.Module):
            def forward(self, x: torch.Tensor) -> None:
                torch.relu(x + 1)

        gm = export(Unused(), torch.randn(2))
        relus = [n for n in gm.graph.nodes if n.op == "call_function"]
        for node in relus:
            annotate(node, dict.fromkeys(node.all_input_nodes, ACT), ACT)
        prepare(gm, nothing)
        assert gm(torch.randn(2)) is None
        assert write_qdq(gm)(torch.randn(2)) is None


def _with(gm: Any, model: nn.Module) -> Any:
    model.load_state_dict({k: v for k, v in gm.state_dict().items() if "observer" not in k})
    return model


class TestBuffers:
    def test_b170_b171_what_writes_to_a_buffer(self) -> None:
        class Cache(nn.Module):
            kv: torch.Tensor

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("kv", torch.zeros(2, 8))
                self.l = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
                self.kv.select(0, 0).index_put_((i,), self.l(x)[0, :2])
                return self.l(self.kv)

        x, i = torch.randn(1, 8), torch.tensor([1, 3])
        model = Cache()
        gm = export(model, x, i)
        put = node_of(gm, aten.index_put_.default)
        for node in gm.graph.nodes:
            if node.op == "call_function":
                floats = [n for n in node.all_input_nodes if n.meta["val"].is_floating_point()]
                annotate(node, dict.fromkeys(floats, ACT), None)
        destination = put.args[0]
        prepare(gm, nothing)
        assert put.args[0] is destination
        assert observer_of(gm, put.args[2])
        # The observer of the buffer sees what the layer reads: after it was written to.
        last = [n for n in gm.graph.nodes if n.target is aten.linear.default][-1]
        order = list(gm.graph.nodes)
        assert observer_of(gm, last.args[0])
        assert order.index(last.args[0]) > order.index(put)
        wanted = model(x, i)
        kept = model.kv.clone()
        gm.kv.zero_()
        assert torch.equal(gm(x, i), wanted)
        assert torch.equal(gm.kv, kept)
        gm.kv.zero_()
        write_qdq(gm)
        got = gm(x, i)
        assert (got - wanted).abs().max() < 0.05
        assert (gm.kv - kept).abs().max() < 0.05
        assert gm.kv.dtype == torch.float32
        program = torch.export.export(gm, (x, i)).run_decompositions()
        assert [*program.graph_signature.buffers_to_mutate.values()] == ["kv"]
        gm.kv.zero_()
        assert torch.equal(program.module()(x, i), got)


class TestObservers:
    def test_b56_every_node_has_meta(self) -> None:
        gm = export(ConvNet(), images())
        prepare(gm, of_layers(out=ACT))
        for node in gm.graph.nodes:
            if observer_of(gm, node):
                assert node.meta["val"].shape == node.args[0].meta["val"].shape
                assert node.meta.keys() >= {"val", "from_node"}

    def test_b57_the_results_are_those_in_float(self) -> None:
        model, x = ConvNet(), images()
        gm = export(model, x)
        for node in gm.graph.nodes:
            if node.op == "call_function":
                annotate(node, dict.fromkeys(node.all_input_nodes, SIGNED), SIGNED)
        prepare(gm, nothing)
        for got, wanted in zip(gm(x), model(x), strict=True):
            assert torch.equal(got, wanted)

    def test_b58_b180_names_are_those_of_layers(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = ConvNet()
                self.act = nn.ReLU()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.act(self.net(x)[0]) + self.net(x)[1]

        gm = export(Model(), images())
        of_layers(out=ACT)(gm)
        relus = [n for n in gm.graph.nodes if n.target is aten.relu.default]
        relu = next(n for n in relus if "act" in str(n.meta["nn_module_stack"]))
        annotate(relu, {}, SIGNED)
        add = node_of(gm, aten.add.Tensor, -1)
        annotate(add, dict.fromkeys(add.all_input_nodes, SIGNED), ACT)
        prepare(gm, nothing)
        names = {name for _, name in observed(gm)}
        layers = {f"net.{layer}" for layer in "cdlm"}
        assert names >= {
            f"{layer}.{what}_observer" for layer in layers for what in ("weight", "input")
        }
        assert names >= {
            f"{layer}.output_observer{call}" for layer in layers for call in ("", "_1")
        }
        assert "act.output_observer" in names
        assert f"{add.name}_output_observer" in names
        assert f"{add.name}_input_observer" in names

    def test_b36_one_name_for_one_observer(self) -> None:
        gm = export(ConvNet(), images())
        conv, relu = node_of(gm, "conv2d"), node_of(gm, "relu")
        pool, cat = node_of(gm, aten.max_pool2d.default), node_of(gm, "cat")
        annotate(conv, {conv.args[1]: WEIGHT}, ACT)
        shared = SharedQuantizationSpec(conv)
        annotate(relu, {conv: shared}, shared)
        annotate(pool, {}, shared)
        annotate(cat, {pool: shared}, shared)
        prepare(gm, nothing)
        names = [name for _, name in observed(gm)]
        assert sorted(names) == ["c.output_observer"] * 4 + ["c.weight_observer"]
        state = [key for key in gm.state_dict() if "output_observer" in key]
        assert all(key.startswith("c.output_observer.") for key in state)

    def test_b35_a_callback_may_replace_observers(self) -> None:
        gm = export(ConvNet(), images())
        mine = nn.ReLU()
        mine.calculate_qparams = lambda: None  # type: ignore[assignment]

        def callback(model: Any, observers: dict[Any, nn.Module]) -> None:
            assert model is gm
            old = observers[node_of(gm, "conv2d")]
            for place, observer in observers.items():
                if observer is old:
                    observers[place] = mine

        of_layers()(gm)
        conv, relu = node_of(gm, "conv2d"), node_of(gm, "relu")
        annotate(conv, {}, ACT)
        annotate(relu, {conv: ACT}, SharedQuantizationSpec(conv))
        prepare(gm, nothing, callback=callback)
        calls = [
            n
            for n in gm.graph.nodes
            if n.op == "call_module" and gm.get_submodule(n.target) is mine
        ]
        assert [n.args[0].name for n in calls] == ["conv2d", "relu"]

    def test_b59_b95_the_meta_of_the_model_and_a_second_time(self) -> None:
        gm = export(ConvNet(), images())
        gm.meta["mine"] = 3
        prepare(gm, of_layers(out=ACT))
        before = observed(gm)
        insert_observers(gm, qat=False)
        assert observed(gm) == before
        assert gm.meta["mine"] == 3
        gm(images())
        write_qdq(gm)
        after = ops(gm)
        assert gm.meta["mine"] == 3
        insert_observers(gm, qat=False)
        assert ops(gm) == after

    def test_a_copy_of_an_annotated_graph(self) -> None:
        """Whose annotations name nodes of the graph that it is a copy of."""
        gm = export(ConvNet(), images())
        of_layers(out=ACT)(gm)
        conv, pool = node_of(gm, "conv2d"), node_of(gm, aten.max_pool2d.default)
        annotate(pool, {}, SharedQuantizationSpec(conv))
        copied = copy.deepcopy(gm)
        assert observed(prepare(copied, nothing)) == observed(prepare(gm, nothing))
        assert len(observed(gm)) == 13

    def test_b177_b178_copies_and_states_of_prepared_models(self) -> None:
        gm = prepare(export(ConvNet(), images()), of_layers(out=ACT))
        for _ in range(3):
            gm(images())
        copied, fresh = copy.deepcopy(gm), prepare(export(ConvNet(), images()), of_layers(out=ACT))
        missing = fresh.load_state_dict(gm.state_dict())
        assert not missing.missing_keys
        x = images()
        wanted = write_qdq(gm)(x)
        for other in (copied, fresh):
            for got, want in zip(write_qdq(other)(x), wanted, strict=True):
                assert torch.equal(got, want)

    def test_qat_fake_quantises_and_trains(self) -> None:
        fixed = FixedQParamsQuantizationSpec(torch.uint8, 2**-8, 0)
        gm = export(
            nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)), torch.randn(3, 4)
        )
        of_layers(ACT, WEIGHT)(gm)
        annotate(node_of(gm, "sigmoid"), {}, fixed)
        prepare(gm, nothing, qat=True)
        x = torch.randn(3, 4)
        optimiser = torch.optim.SGD(gm.parameters(), 0.1)
        losses = []
        for _ in range(20):
            loss = gm(x).square().mean()
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert losses[-1] < losses[0] / 2
        for module in gm.modules():
            if hasattr(module, "observing"):
                module.freeze()  # type: ignore[operator]
        trained = gm(x)
        converted = write_qdq(gm)(x)
        assert (trained - converted).abs().max() < 2e-2 * trained.abs().max()

    def test_b182_an_observer_is_where_its_tensor_is(self) -> None:
        model = ConvNet()
        gm = export(model, images())
        prepare(gm, of_layers(DYNAMIC))
        assert {t.device.type for t in gm.state_dict().values()} == {"cpu"}

    def test_spec_without_an_observer_for_float_dtypes(self) -> None:
        gm = export(ConvNet(), images())
        float32 = QuantizationSpec(torch.float32)
        prepare(gm, of_layers(ACT, WEIGHT, bias=float32))
        assert ("c_bias", "c.bias_observer") in observed(gm)
        gm(images())
        assert ops(write_qdq(gm))["quantize_per_tensor"] == 4
