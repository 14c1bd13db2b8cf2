"""What `torch.compile` folds into quantised layers: a pass over Inductor's post-grad graph.

It looks at the nodes that carry `scheme=` and, where the region's op can do more at once,

- quantises rows that several `int8` layers read once: one `int8_quantize`, and an
  `int8_rows_linear` for each layer;
- hands an activation that follows a layer, and a residual that is added behind it, to the layer's
  op.

The op rounds where the separate nodes do, so ReLU, a residual and shared rows give the same bits; a
GELU or SiLU is torch's but for the last one. What does not match exactly is left alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from qnn.functional import cast_fusion, regions
from qnn.functional.regions import unwrap_gradients
from qnn.kernels import OPS, Op, torch_private
from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.formats import FLOATS
from qnn.kernels.spec import on_trace
from qnn.kernels.torch_private import (
    append_post_grad_pass,
    inductor_matches_patterns,
    invoke_quant,
    mistakes_dtypes,
    post_grad_form,
    statically_equal,
)

# The op that quantises the rows of a layer's input, and the layer's op for rows quantised already.
SHARED = {"int8_linear": ("int8_quantize", "int8_rows_linear")}
_aten = torch.ops.aten
_VIEWS = frozenset(
    [
        _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
        _aten.permute.default, _aten.transpose.int, _aten.unsqueeze.default,
        _aten.squeeze.dim, _aten.squeeze.dims,
    ]
)  # fmt: skip


@dataclass
class _Layer:
    """A quantised layer in the graph, and what is to be folded into it."""

    node: Node  # invoke_quant(region, …, scheme=…)
    result: Node  # the node itself or, where its value is a tuple, the only item of it
    op: Op
    operands: dict[str, Any]  # x, w, sw, bias, and what an op has between
    end: Node = field(init=False)  # the last node that is folded
    views: list[Node] = field(default_factory=list)  # between the layer and its activation
    activation: str = "none"
    residual: Node | None = None
    rows: tuple[Node, Node] | None = None  # the input, quantised

    def __post_init__(self) -> None:
        self.end = self.result


def fold(graph: Graph) -> None:
    """Rewrite the graph in place."""
    if not inductor_matches_patterns():
        return
    # The graph is functional up to the first write, which may stand at its end.
    nodes = list(itertools.takewhile(lambda node: not _writes(node), graph.nodes))
    layers = [layer for node in nodes for layer in _layers(graph, node)]
    if not layers:
        return
    doomed: set[Node] = set()
    _find_activations(nodes, {layer.result: layer for layer in layers}, doomed)
    free = set(nodes)
    for layer in layers:
        _find_residual(layer, free)
    shared = defaultdict(list)
    for layer in layers:
        if layer.op.name in SHARED and _can_share(layer):
            shared[_value(layer.operands["x"])].append(layer)
    for group in shared.values():
        if len(group) > 1:
            _quantize_once(graph, group)
    replaced: dict[Node, Node] = {}
    for layer in layers:
        if layer.rows or layer.end is not layer.result:
            doomed |= {layer.node, layer.node.args[0], layer.result, layer.end}  # type: ignore[arg-type]
            _replace(graph, layer, replaced)
    for node in reversed(list(graph.nodes)):
        if node in doomed and not node.users:
            graph.erase_node(node)


def _can_share(layer: _Layer) -> bool:
    """Whether the sums of the op for ready-made rows, whose codes may be −128, hold so many; and
    whether the op would get its dtype.
    """
    if mistakes_dtypes():
        return False
    limit = OPS[SHARED[layer.op.name][1]].limits["k"]
    return bool(_tensor(layer.operands["w"]).shape[1] <= limit)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _layers(graph: Graph, node: Node) -> Iterator[_Layer]:
    """`node` as a layer, if it is one whose op takes an activation and a residual."""
    if node.target is not invoke_quant or not isinstance(node.args[0], Node):
        return
    region = getattr(graph.owning_module, str(node.args[0].target)).graph
    call, *more = [inner for inner in region.nodes if inner.op == "call_function"]
    op = next((op for op in OPS.values() if op.overload is call.target), None)
    if more or call.kwargs or op is None or "activation" not in op.choices:
        return
    outer = dict(zip(region.find_nodes(op="placeholder"), node.args[1:], strict=True))
    names = [arg.name for arg in op.inputs]
    given = {name: outer.get(arg) for name, arg in zip(names, call.args, strict=False)}
    wanted = names[: names.index("residual")]
    if not set(given) <= set(wanted) or not isinstance(_tensor(given.get("x")), torch.Tensor):
        return
    operands = {name: given.get(name) for name in wanted}
    x = operands["x"]
    # The reference, which runs where a device has no kernel, gains nothing.
    if _tensor(x).device.type.upper() not in op.kernels:
        return
    if isinstance(_tensor(node), torch.Tensor):
        yield _Layer(node, node, op, operands)
    elif [user.target for user in node.users] == [operator.getitem]:
        yield _Layer(node, next(iter(node.users)), op, operands)


def _tensor(node: Node | None) -> Any:
    """What stands for the node's value, usually a fake tensor."""
    return None if node is None else node.meta.get("val")


def _find_activations(nodes: list[Node], layers: dict[Node, _Layer], doomed: set[Node]) -> None:
    for top, (name, function) in itertools.product(nodes, ACTIVATIONS.items()):
        value = _tensor(top)
        if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS or name == "none":
            continue
        found = _match(post_grad_form(function, value.dtype), top)
        if found is None:
            continue
        y, inside = found
        if not _only_within(y, inside | {top}):
            continue
        views = []
        while y not in layers and y.target in _VIEWS and isinstance(y.args[0], Node):
            views.append(y)
            y = y.args[0]
            if len(y.users) != 1:
                break
        layer = layers.get(y)
        if layer is not None and (not views or len(y.users) == 1) and layer.end is y:
            layer.activation, layer.end, layer.views = name, top, views
            doomed |= {*inside, top}


def _match(pattern: Node, node: Node) -> tuple[Node, set[Node]] | None:
    """The input of the subgraph that ends in `node` and equals the one that ends in `pattern`, and
    the nodes between the two; None where they differ, or where what is between has other users.
    """
    bound: dict[Node, Node] = {}

    def same(want: Any, got: Any) -> bool:
        if isinstance(want, Node):
            if not isinstance(got, Node) or bound.setdefault(want, got) is not got:
                return False
            if want.op == "placeholder":
                return True
            return (
                want.target == got.target
                and want.kwargs == got.kwargs
                and len(want.args) == len(got.args)
                and all(map(same, want.args, got.args))
            )
        return type(want) is type(got) and bool(want == got)

    if not same(pattern, node):
        return None
    (y,) = (got for want, got in bound.items() if want.op == "placeholder")
    inside = {got for got in bound.values() if got is not y and got is not node}
    if not all(_only_within(each, inside | {node}) for each in inside):
        return None
    return y, inside


def _only_within(node: Node, users: Iterable[Node]) -> bool:
    return set(node.users) <= set(users)


def _find_residual(layer: _Layer, free: set[Node]) -> None:
    """Look for an addition among the `free` nodes, and take it from them."""
    if layer.views or len(layer.end.users) != 1:
        return
    (add,) = layer.end.users
    if add not in free or add.target is not _aten.add.Tensor or add.kwargs:
        return
    (other,) = [arg for arg in add.args if arg is not layer.end] or [None]
    if not isinstance(other, Node):
        return
    mine, theirs, total = map(_tensor, (layer.end, other, add))
    if (
        isinstance(theirs, torch.Tensor)
        and theirs.dtype == mine.dtype
        and theirs.device == mine.device
        and statically_equal(theirs.shape, mine.shape)
        and statically_equal(total.stride(), mine.stride())
    ):
        layer.residual, layer.end = other, add
        free.remove(add)


def _value(node: Node) -> Any:
    """A key that nodes with equal values share: the node, or the chain of views that it is."""
    if node.target in _VIEWS and isinstance(node.args[0], Node):
        return node.target, _value(node.args[0]), str(node.args[1:]), str(node.kwargs)
    return node


def _quantize_once(graph: Graph, group: list[_Layer]) -> None:
    x = group[0].operands["x"]
    op = OPS[SHARED[group[0].op.name][0]].overload
    with graph.inserting_before(group[0].node):
        pair = graph.call_function(op, (x,))
        rows = graph.call_function(operator.getitem, (pair, 0))
        scale = graph.call_function(operator.getitem, (pair, 1))
    with _tensor(x).fake_mode:
        pair.meta["val"] = op(_tensor(x))
    rows.meta["val"], scale.meta["val"] = pair.meta["val"]
    for layer in group:
        layer.rows = (rows, scale)


def _replace(graph: Graph, layer: _Layer, replaced: dict[Node, Node]) -> None:
    """One call for the layer and all that is folded into it; `replaced` maps the ends of earlier
    layers to what stands for them now.
    """
    given = (*layer.operands.values(), layer.residual)
    x, *rest = (replaced.get(each, each) for each in given)
    op, args = layer.op, (x, *rest, layer.activation)
    if layer.rows is not None:
        op = OPS[SHARED[op.name][1]]
        args = (*layer.rows, *args[1:], _tensor(x).dtype)
    # Behind the residual, which may be computed later than the layer.
    with graph.inserting_before(layer.end if layer.residual is not None else layer.node):
        call = graph.call_function(op.overload, args)
    call.meta.update((layer.result if layer.views else layer.end).meta)
    replaced[layer.end] = call
    if layer.views:
        replaced[layer.end] = layer.views[0]
        layer.result.replace_all_uses_with(call)
    layer.end.replace_all_uses_with(replaced[layer.end])


def _refuse_dtypes(graph: Graph) -> None:
    takes_dtype = {
        op.overload for op in OPS.values() if any(arg.kind == "ScalarType" for arg in op.inputs)
    }
    for node in graph.nodes:
        if node.target in takes_dtype:
            raise NotImplementedError(
                f"{node.target} has a dtype for an argument, and a package of AOTInductor would "
                f"call it with another one, in torch {torch.__version__}; package with torch 2.12 "
                "or newer."
            )


def _run(graph: Graph) -> None:
    if mistakes_dtypes():
        _refuse_dtypes(graph)
    unwrap_gradients(graph)
    fold(graph)
    cast_fusion.unfold(graph)


def _uuid() -> bytes:
    return b" ".join([_digest(), *map(str.encode, sorted(cast_fusion.DEVICES))])


@functools.cache
def _digest() -> bytes:
    """Of the pass and of the ops that it calls: part of the key of Inductor's caches."""
    files = (__file__, cast_fusion.__file__, regions.__file__, torch_private.__file__)
    sources = [Path(str(file)).read_bytes() for file in files]
    declared = "\n".join(f"{op.schema} {op.choices}" for op in OPS.values())
    return hashlib.sha256(b"\n".join([*sources, declared.encode()])).digest()


@on_trace
def install() -> None:
    """Append the pass to those that Inductor is set to run, unless it is there already.

    Called whenever a qnn op is traced, so that `import qnn` needs no Inductor, and so that the pass
    comes back when a setting is replaced or belongs to another thread.
    """
    append_post_grad_pass(_run, _uuid)
