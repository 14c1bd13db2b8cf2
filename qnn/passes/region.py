"""A quantised node of a graph: read it, find it, build it.

A *region* is one node that carries `scheme=` and holds one op in a small graph of its own. It comes
in three forms, and `read` makes one `Region` of each:

    invoke_quant_packed(body, *operands, scheme=…)[0]   of Dynamo, of torch.export
    invoke_quant(body, *operands, scheme=…)             of Inductor, after its joint passes
    qnn.int8_linear(x, w, sw, bias)                     the bare op
"""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from qnn.kernels import OPS, Op, get_scheme
from qnn.kernels.torch_private import invoke_quant, invoke_quant_packed
from qnn.kernels.user_region import REGION_RESULT, REGION_START

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_OPERATORS: tuple[object, ...] = (invoke_quant, invoke_quant_packed)
_EDGES = ("placeholder", "output")
_MARKS: tuple[object, ...] = (REGION_START, REGION_RESULT)


@dataclass(frozen=True, eq=False)
class Region:
    """One call of a qnn op in a graph.

    Args:
        node: a region, or the call of the bare op.
        op: the declaration of the op; `op.overload` is what a graph calls.
        scheme: the name that the region carries; None for the bare op.
        call: the call of the op: in the region's own graph, or `node` itself.
    """

    node: Node
    op: Op
    scheme: str | None
    call: Node

    @property
    def arguments(self) -> dict[str, Any]:
        """What the op is called with now, by the names and in the order of its declaration: nodes
        of the same graph as `node`, and constants. What the call leaves out is at its default, and
        so None if it is a tensor.
        """
        names = [arg.name for arg in self.op.inputs]
        given = dict(zip(names, self.call.args, strict=False)) | self.call.kwargs
        if self.call is not self.node:
            placeholders = self.call.graph.find_nodes(op="placeholder")
            outer = dict(zip(placeholders, self.node.args[1:], strict=True))
            given = map_arg(given, outer.__getitem__)
        return {arg.name: given.get(arg.name, self.op.default(arg)) for arg in self.op.inputs}

    @property
    def result(self) -> Node | None:
        """The node whose value is what the op returns: `node`, or the only item of it where its
        value is a tuple of one tensor. None where such a tuple has no user, or several.
        """
        if self.call is self.node or isinstance(self.call.graph.output_node().args[0], Node):
            return self.node
        users = list(self.node.users)
        return users[0] if [user.target for user in users] == [operator.getitem] else None


def read(node: Node) -> Region | None:
    """The call of a qnn op that `node` is, or None: for any other node, and for a region that
    holds anything but one qnn op on its operands.

    Args:
        node: a node of a graph from Dynamo, AOTAutograd, `torch.export` or Inductor's passes.
    """
    call, scheme = node, None
    if node.target in _OPERATORS:
        body = body_of(node)
        nodes = () if body is None else body.graph.nodes
        inside = [n for n in nodes if n.op not in _EDGES and n.target not in _MARKS]
        if len(inside) != 1:
            return None
        call, scheme = inside[0], cast("str | None", node.kwargs.get("scheme"))
    op = None
    if call.op == "call_function" and isinstance(call.target, torch._ops.OpOverload):
        op = OPS.get(call.target.name().removeprefix("qnn::"))
    return Region(node, op, scheme, call) if op and op.overload is call.target else None


def match(
    nodes: Iterable[Node],
    *,
    op: str | Op | None = None,
    scheme: str | None = None,
    where: Callable[[Region], bool] | None = None,
) -> list[Region]:
    """The calls of qnn ops among `nodes`, in their order: what a pass over one graph rewrites.

    Args:
        nodes: `graph.nodes`, or some of them.
        op: only calls of this op, such as `"int8_linear"`.
        scheme: only regions that carry this name, and so no bare ops.
        where: only regions for which this is true.

    Raises:
        ValueError: no op is called `op`.
    """
    wanted = None if op is None else _op_named(op)
    return [
        found
        for found in map(read, nodes)
        if found is not None
        and wanted in (None, found.op)
        and scheme in (None, found.scheme)
        and (where is None or where(found))
    ]


def regions(
    graph: ExportedProgram | GraphModule | Graph,
    *,
    op: str | Op | None = None,
    scheme: str | None = None,
    where: Callable[[Region], bool] | None = None,
) -> list[Region]:
    """The calls of qnn ops in a graph and in the graphs that it calls (`torch.cond`, checkpoints,
    submodules), in the order of the calls. A graph that is called twice gives its regions once; the
    op inside of a region is that region.

    Args:
        graph: an exported program, a module of `torch.fx`, or its graph.
        op, scheme, where: as for `match`.

    Raises:
        ValueError: no op is called `op`.
    """
    top = graph if isinstance(graph, Graph) else graph.graph
    return match(_nodes(top, set()), op=op, scheme=scheme, where=where)


def build(graph: Graph, op: str | Op, arguments: Mapping[str, Any], *, scheme: str) -> Node:
    """Insert a region at the graph's insertion point, as `torch.export` writes it; the node of its
    result, with the shape and dtype that the op's fake gives.

        with graph.inserting_before(linear):
            y = build(graph, "int8_linear", {"x": x, "w": w, "sw": sw}, scheme="int8")

    The module then runs, is exported again, saved and compiled. Arguments that are tensors of the
    module are `graph.get_attr(name)` of its buffers and parameters.

    Args:
        graph: of an exported program or its `module()`, or of AOTAutograd.
        op: the name of an op with one result.
        arguments: by the op's names, a Node for each tensor, a constant for a dtype or a name. What
            may be left out of the op's call may be left out here, or None.
        scheme: the name of a scheme, which the node carries.

    Raises:
        ValueError: an unknown op or scheme; an argument that the op does not have, or lacks; shapes
            that do not fit, in the words of the op; a graph without a module.
        TypeError: an argument that is not a Node of this graph where the op takes a tensor, or that
            is one where it takes none; wrong dtypes, in the words of the op.
    """
    op = _op_named(op)
    get_scheme(scheme)
    given = _checked(graph, op, arguments)
    root = graph.owning_module
    if root is None:
        _fail(op, "the graph belongs to no GraphModule, which would hold the region's body")
    args = tuple(given.values())
    operands = list(dict.fromkeys(each for each in args if isinstance(each, Node)))
    mode = _fake(op, operands)
    with mode, torch.no_grad():
        result = op.overload(*map_arg(args, lambda node: node.meta["val"]))

    body = Graph()
    inner = {node: body.placeholder(f"arg{i}_1") for i, node in enumerate(operands)}
    for node, placeholder in inner.items():
        placeholder.meta["val"] = node.meta["val"]
    call = body.call_function(op.overload, map_arg(args, inner.__getitem__))
    call.meta["val"] = result
    body.output((call,))
    name = next(n for n in map("subgraph{}".format, itertools.count()) if not hasattr(root, n))
    root.add_submodule(name, GraphModule({}, body))
    options: dict[str, Any] = {"scheme": scheme, "quant_options": None}
    node = graph.call_function(invoke_quant_packed, (graph.get_attr(name), *operands), options)
    item = graph.call_function(operator.getitem, (node, 0))
    node.meta["val"], item.meta["val"] = (result,), result
    return item


def call(graph: Graph, target: Any, *args: Any) -> Node:
    """Insert a call, with a fake tensor as those have that it is given. Inductor keeps the strides
    of what a custom op is given, channels-last say, only where the node says what they are.
    """
    node = graph.call_function(target, args)
    values = map_arg(args, lambda each: each.meta["val"])
    with node.all_input_nodes[0].meta["val"].fake_mode:
        node.meta["val"] = target(*values)
    node.meta["eager_input_vals"] = (values, {})
    return node


def takes_place(new: Node, old: Node) -> None:
    """Give `new` what is known of `old`, but for its own value and operands."""
    known = {key: value for key, value in old.meta.items() if key != "eager_input_vals"}
    new.meta = known | new.meta


def call_op(graph: Graph, op: Op, given: Mapping[str, Any]) -> Node:
    """Insert a call of the bare op with what it takes of `given`."""
    return call(graph, op.overload, *(given.get(arg.name, op.default(arg)) for arg in op.inputs))


def items(node: Node) -> list[Node]:
    """The results of a node that has several."""
    items = []
    for i, value in enumerate(node.meta["val"]):
        items.append(node.graph.call_function(operator.getitem, (node, i)))
        items[-1].meta["val"] = value
    return items


def _checked(graph: Graph, op: Op, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call in the op's order, up to the last that is not at its default."""
    declared = ", ".join(arg.name + "?" * arg.optional for arg in op.inputs)
    names = [arg.name for arg in op.inputs]
    if len(op.outputs) > 1:
        _fail(op, f"a region has one result, and the op has {len(op.outputs)}; call the bare op")
    for name in arguments:
        if name not in names:
            _fail(op, f"there is no argument {name!r}{_hint(name, names)}; the op takes {declared}")
    given: dict[str, Any] = {}
    for arg in op.inputs:
        value = arguments.get(arg.name)
        if value is None and not arg.optional:
            _fail(op, f"the argument {arg.name!r} is missing; the op takes {declared}")
        if value is not None and isinstance(value, Node) != (arg.axes is not None):
            wanted = "a constant" if arg.axes is None else "a Node, such as graph.get_attr(name)"
            _fail(op, f"{arg.name} must be {wanted}, got a {type(value).__name__}", TypeError)
        if isinstance(value, Node) and value.graph is not graph:
            _fail(op, f"{arg.name} = {value} is a node of another graph", TypeError)
        given[arg.name] = op.default(arg) if value is None else value
    for arg in reversed(op.inputs):  # as torch writes a call
        if not arg.optional or given[arg.name] != op.default(arg):
            break
        del given[arg.name]
    return given


def _fake(op: Op, operands: Iterable[Node]) -> Any:
    """The mode of the operands' fake tensors. Tensors of the module that have none get one."""
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in operands)
    mode = next((each for each in modes if each is not None), None)
    for node in operands:
        value = node.meta.get("val")
        if value is None and mode is not None and isinstance(_held(node), torch.Tensor):
            node.meta["val"] = value = mode.from_tensor(_held(node))
        if not hasattr(value, "fake_mode"):
            _fail(op, f"{node} has no fake tensor in meta['val']; export the model first")
    return mode


def _fail(op: Op, reason: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"qnn.passes.build({op.name!r}): {reason}.")


def before_writes(graph: Graph) -> list[Node]:
    """The nodes up to the first that writes to a tensor, which may stand at the end of what is
    functional otherwise.
    """
    return list(itertools.takewhile(lambda node: not _writes(node), graph.nodes))


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def unwrap_gradients(graph: Graph) -> None:
    """Put what is inside of the regions with several results in their place.

    The module of an exported program differentiates its nodes by themselves: each gives a region of
    all of its gradients, and Inductor's lowering of a region takes one result only.
    """
    for node in graph.find_nodes(op="call_function", target=invoke_quant):
        body = body_of(node)
        if body is not None and len(_results(body)) > 1:
            _inline(node, body)


def _inline(node: Node, body: GraphModule) -> None:
    graph, users = node.graph, list(node.users)
    if any(inner.op == "get_attr" for inner in body.graph.nodes) or any(
        user.target is not operator.getitem for user in users
    ):
        return
    placeholders = body.graph.find_nodes(op="placeholder")
    made: dict[Node, Node] = dict(zip(placeholders, node.args[1:], strict=True))  # type: ignore[arg-type]
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                made[inner] = graph.node_copy(inner, lambda old: made[old])
    results = _results(body)
    for user in users:
        result = results[user.args[1]]  # type: ignore[index]
        if isinstance(result, Node):
            user.replace_all_uses_with(made[result])
            graph.erase_node(user)
    if not node.users:
        graph.erase_node(node)


def _held(node: object) -> Any:
    """What a node of the kinds get_attr and call_module names in its graph's module."""
    if not isinstance(node, Node) or node.op not in ("get_attr", "call_module"):
        return None
    root = node.graph.owning_module
    return None if root is None else operator.attrgetter(str(node.target))(root)


def body_of(node: Node) -> GraphModule | None:
    """The graph of a region, whatever it holds; None for another node."""
    held = _held(node.args[0]) if node.target in _OPERATORS else None
    return held if isinstance(held, GraphModule) else None


def _results(body: GraphModule) -> tuple[object, ...]:
    (result,) = body.graph.output_node().args
    return tuple(result) if isinstance(result, list | tuple) else (result,)


def _nodes(graph: Graph, seen: set[Graph]) -> Iterator[Node]:
    """The nodes of a graph, and after each those of the graphs that it calls."""
    seen.add(graph)
    for node in graph.nodes:
        yield node
        if read(node) is None:
            for held in (node, *node.all_input_nodes) if node.op != "get_attr" else ():
                inner = getattr(_held(held), "graph", None)
                if isinstance(inner, Graph) and inner not in seen:
                    yield from _nodes(inner, seen)


def _op_named(op: str | Op) -> Op:
    if isinstance(op, Op):
        return op
    if op not in OPS:
        raise ValueError(f"qnn.passes: there is no op {op!r}{_hint(op, OPS)}.")
    return OPS[op]


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
