"""Quantised nodes of a graph: each form is read, and a region that is built is one of them."""

from __future__ import annotations

import copy
import io
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import qnn
from qnn.kernels import OPS
from qnn.passes import Region, build, match, read, regions

from .common import mlp

aten = torch.ops.aten
BATCH = ({0: torch.export.Dim("batch")},)
# What each layer of `mlp` is called with.
LAYERS = [("int8_linear", ("x", "w", "sw", "bias")), ("int8_linear", ("x", "w", "sw"))]


def told(found: list[Region]) -> list[tuple[str, tuple[str, ...]]]:
    """The op of each, and the names of the tensors that it is given."""
    return [
        (r.op.name, tuple(n for n, v in r.arguments.items() if isinstance(v, torch.fx.Node)))
        for r in found
    ]


def check(graph: Any, in_a_tuple: bool = True) -> None:
    """The two layers of `mlp`, in one of its graphs."""
    first, second = regions(graph)
    assert told([first, second]) == LAYERS
    assert first.scheme == second.scheme == "int8"
    assert list(first.arguments)[-2:] == ["residual", "activation"]
    assert first.arguments["activation"] == "none"
    assert first.arguments["residual"] is second.arguments["bias"] is None
    assert first.result is not None
    (relu,) = first.result.users
    assert second.arguments["x"] is relu
    assert (first.result.target is operator.getitem) == in_a_tuple
    assert (first.result is first.node) != in_a_tuple


@pytest.mark.parametrize("strict", [False, True])
def test_read_in_an_exported_graph(strict: bool) -> None:
    program = torch.export.export(mlp(), (torch.randn(5, 48),), strict=strict)
    for graph in (program, program.graph_module, program.run_decompositions(), program.module()):
        check(graph)


@torch.no_grad()
def test_read_in_dynamos_graph() -> None:
    seen = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        check(gm)
        seen.append(gm)
        return gm.forward

    torch.compile(mlp(), fullgraph=True, backend=backend)(torch.randn(5, 48))
    assert len(seen) == 1


@torch.no_grad()
def test_read_in_inductors_graph() -> None:
    torch._dynamo.reset()
    schemes = []

    def note(graph: torch.fx.Graph) -> None:
        schemes.append([region.scheme for region in regions(graph)])
        if schemes[-1] != [None]:
            check(graph, in_a_tuple=False)

    with config.patch(post_grad_custom_pre_pass=note):
        torch.compile(mlp(), fullgraph=True)(torch.randn(5, 48))
    assert schemes == [[None], [None], ["int8", "int8"]]  # the regions' own graphs come first


def test_the_bare_op_is_read_with_its_keywords() -> None:
    class Bare(nn.Module):
        def forward(self, x: Any, w: Any, sw: Any, y: Any) -> Any:
            codes, scale = torch.ops.qnn.int8_quantize(x)
            rows = torch.ops.qnn.int8_rows_linear(codes, scale, w, sw, residual=y)
            return rows + torch.ops.qnn.int8_linear(x, w, sw, activation="relu")

    given = next(iter(OPS["int8_linear"].samples()))[1]
    x, w, sw = given[:3]
    graph = torch.export.export(Bare(), (x, w, sw, torch.randn(len(x), len(w)))).graph
    pair, rows, layer = match(graph.nodes)
    assert {r.scheme for r in (pair, rows, layer)} == {None}
    assert all(r.result is r.node is r.call for r in (pair, rows, layer))
    assert [r.op.name for r in (pair, rows)] == ["int8_quantize", "int8_rows_linear"]
    assert rows.arguments["dtype"] is torch.float32
    assert str(rows.arguments["residual"]) == "y"
    assert layer.arguments["activation"] == "relu"
    assert match(graph.nodes, scheme="int8") == []
    assert read(next(iter(graph.nodes))) is None


def test_nested_graphs_once_and_in_order() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.last = (
                qnn.convert(nn.Linear(8, 8), s) for s in ("int8", "int8_weight", "fp8")
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.cond(x.sum() > 0, self.one, self.other, (x,)))

    with torch.no_grad():
        program = torch.export.export(Choice().eval(), (torch.randn(2, 8),))
    assert [r.scheme for r in regions(program)] == ["int8", "int8_weight", "fp8"]
    assert [r.scheme for r in match(program.graph.nodes)] == ["fp8"]


def test_selection() -> None:
    graph = torch.export.export(mlp(), (torch.randn(5, 48),)).graph
    assert len(match(graph.nodes, op="int8_linear", scheme="int8")) == 2
    assert len(match(graph.nodes, op=OPS["int8_linear"])) == 2
    assert regions(graph, op="int8_weight_linear") == regions(graph, scheme="fp8") == []
    (found,) = regions(graph, where=lambda region: region.arguments["bias"] is None)
    assert str(found.arguments["x"]) == "relu"
    with pytest.raises(ValueError, match=r"no op 'int8_linar'.* 'int8_linear'"):
        match(graph.nodes, op="int8_linar")


def test_a_region_of_something_else_is_none() -> None:
    def two(x: torch.Tensor) -> torch.Tensor:
        return x.sin().cos()

    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(regions(gm))
        return gm.forward

    call = qnn.functional.invoke_quant
    torch.compile(lambda x: call(two, x, scheme="s"), backend=backend)(torch.ones(2))
    assert found == []


# Building: an exported MLP in float is lowered to the layers that `convert` makes of it.


def lowered(scheme: str = "int8", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """The converted MLP, and its float twin exported with regions in the place of its layers."""
    torch.manual_seed(3)
    layers = nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 32, bias=False)
    model = nn.Sequential(*layers).to(dtype).eval()
    module = torch.export.export(
        model, (torch.randn(5, 48, dtype=dtype),), dynamic_shapes=BATCH
    ).module()
    want, graph = qnn.convert(copy.deepcopy(model), scheme), module.graph
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        x, w, *bias = node.args
        name = w.target.rpartition(".")[0]
        layer = module.get_submodule(name)
        state = want.get_submodule(name).state_dict()
        layer.register_buffer("codes", state["weight"])
        layer.register_buffer("scale", state["weight_scale"])
        with graph.inserting_before(node):
            parts = [graph.get_attr(f"{name}.{each}") for each in ("codes", "scale")]
            op = OPS[qnn.SCHEMES[scheme].linear]
            given = dict(zip([arg.name for arg in op.inputs], (x, *parts, *bias), strict=False))
            y = build(graph, op, given, scheme=scheme)
        assert y.meta["val"].shape == node.meta["val"].shape
        assert y.meta["val"].dtype == dtype
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        graph.erase_node(w)
        del layer.weight
    graph.lint()
    module.recompile()
    return want, module


@pytest.mark.parametrize("scheme", ["int8", "int8_weight", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_in_an_exported_model(scheme: str, dtype: torch.dtype) -> None:
    want, module = lowered(scheme, dtype)
    assert {region.op.name for region in regions(module)} == {qnn.SCHEMES[scheme].linear}
    assert [len(names) for _, names in told(regions(module))] == [4, 3]
    again = torch.export.export(module, (torch.randn(5, 48, dtype=dtype),), dynamic_shapes=BATCH)
    stored = io.BytesIO()
    torch.export.save(again, stored)
    stored.seek(0)
    loaded = torch.export.load(stored)
    assert told(regions(loaded)) == told(regions(again)) == told(regions(module))
    assert [r.scheme for r in regions(loaded)] == [scheme, scheme]
    runs = [module, again.module(), again.run_decompositions().module(), loaded.module()]
    runs.append(torch.compile(module, fullgraph=True, backend="aot_eager"))
    with torch.no_grad():
        for size in (5, 7):
            x = torch.randn(size, 48, dtype=dtype)
            assert all(torch.equal(run(x), want(x)) for run in runs)


def test_built_and_compiled_by_inductor() -> None:
    """Which folds the ReLU, as into the region of a layer."""
    want, module = lowered()
    x = torch.randn(5, 48)
    torch._dynamo.reset()
    with torch.no_grad(), config.patch(fx_graph_cache=False):
        y, (code,) = run_and_get_code(torch.compile(module, fullgraph=True), x)
        assert torch.equal(y, want(x))
    assert "'relu'" in code


def test_built_in_the_program_itself() -> None:
    """As a lowering of `dequantize -> linear` does, whose tensors are inputs of the graph."""
    layer = qnn.convert(nn.Linear(48, 32), "int8").eval()

    class Float(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            state = layer.state_dict()
            self.register_buffer("w", state["weight"])
            self.register_buffer("sw", state["weight_scale"])
            self.register_buffer("bias", state["bias"])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.w * self.sw, self.bias).relu()

    program = torch.export.export(Float(), (torch.randn(5, 48),))
    (linear,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    x, product, bias = linear.args
    given = {"x": x, "w": product.args[0], "sw": product.args[1], "bias": bias}
    with program.graph.inserting_before(linear):
        linear.replace_all_uses_with(build(program.graph, "int8_linear", given, scheme="int8"))
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    x = torch.randn(5, 48)
    for each in (program, torch.export.load(stored)):
        assert told(regions(each)) == LAYERS[:1]
        assert torch.equal(each.module()(x), layer(x).relu())


Change = Callable[[torch.fx.Graph, dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("op", "scheme", "change", "kind", "said"),
    [
        ("int8_linar", "int8", lambda g, a: a, ValueError, "did you mean 'int8_linear'?"),
        ("int8_linear", "int9", lambda g, a: a, ValueError, "Did you mean 'int8'?"),
        ("int8_linear", "int8", lambda g, a: a.pop("sw"), ValueError,
         "build('int8_linear'): the argument 'sw' is missing; the op takes x, w, sw, bias?"),
        ("int8_linear", "int8", lambda g, a: a.update(biass=a["x"]), ValueError,
         "there is no argument 'biass' (did you mean 'bias'?)"),
        ("int8_linear", "int8", lambda g, a: a.update(bias=torch.ones(96)), TypeError,
         "bias must be a Node, such as graph.get_attr(name), got a Tensor"),
        ("int8_linear", "int8", lambda g, a: a.update(activation=a["x"]), TypeError,
         "activation must be a constant, got a Node"),
        ("int8_linear", "int8", lambda g, a: a.update(activation="tanh"), ValueError,
         "activation must be one of 'none'"),
        ("int8_linear", "int8", lambda g, a: a.update(w=a["sw"], sw=a["w"]), TypeError,
         "qnn::int8_linear(x=float32[5, 48], w=float32[96, 1]"),
        ("int8_linear", "int8", lambda g, a: a.update(x=torch.fx.Graph().placeholder("z")),
         TypeError, "x = z is a node of another graph"),
        ("int8_linear", "int8", lambda g, a: a["x"].meta.clear(), ValueError,
         "has no fake tensor in meta['val']; export the model first"),
        ("int8_quantize", "int8", lambda g, a: [a.pop(n) for n in ("w", "sw")], ValueError,
         "a region has one result, and the op has 2; call the bare op"),
        ("int8_linear", "int8", lambda g, a: setattr(g, "owning_module", None), ValueError,
         "the graph belongs to no GraphModule"),
    ],
)  # fmt: skip
def test_errors(op: str, scheme: str, change: Change, kind: type[Exception], said: str) -> None:
    graph = torch.export.export(mlp(), (torch.randn(5, 48),)).graph
    (first,) = regions(graph, where=lambda region: region.arguments["bias"] is not None)
    given = {name: first.arguments[name] for name in ("x", "w", "sw")}
    change(graph, given)
    before = str(graph)
    with graph.inserting_before(first.node), pytest.raises(kind, match=re.escape(said)):
        build(graph, op, given, scheme=scheme)
    assert str(graph) == before
