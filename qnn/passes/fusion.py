"""What `torch.compile` folds into quantised layers: a pass over Inductor's post-grad graph.

It looks at the nodes that carry `scheme=` and, where the region's op can do more at once,

- quantises rows that several `int8` layers read once: one `int8_quantize`, and an
  `int8_rows_linear` for each layer;
- hands an activation that follows a layer, and a residual that is added after it, to the layer's
  op; of a convolution also a ReLU after the residual.

The op rounds where the separate nodes do, so ReLU, a residual and shared rows give the same bits; a
GELU or SiLU is torch's but for the last one. What does not match exactly is left alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from qnn.kernels import OPS, Op, torch_private
from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.formats import FLOATS
from qnn.kernels.op import on_trace
from qnn.kernels.torch_private import (
    append_post_grad_pass,
    inductor_matches_patterns,
    mistakes_dtypes,
    post_grad_form,
    statically_equal,
)
from qnn.passes import cast_fusion, chains, norms, padding, user_region
from qnn.passes.chains import RESHAPES
from qnn.passes.region import (
    Region,
    before_writes,
    call,
    match,
    read,
    takes_place,
    unwrap_gradients,
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
_SQUEEZES = frozenset([_aten.squeeze.dim, _aten.squeeze.dims])


@dataclass
class _Layer:
    """A quantised layer in the graph, and what is to be folded into it."""

    region: Region
    result: Node
    end: Node  # the last node that is folded
    views: list[Node] = field(default_factory=list)  # of the result, the last one first
    activation: str = "none"
    sum: Node | None = None  # with a residual
    residual: int = 0  # which argument of the sum it is
    last: str = "none"  # after the residual
    rows: tuple[Node, Node] | None = None  # the input, quantised


def fold(graph: Graph) -> None:
    """Rewrite the graph in place."""
    if not inductor_matches_patterns():
        return
    _drop_round_trips(graph)
    nodes = before_writes(graph)
    layers = [
        _Layer(region, result, result)
        for region in match(nodes, where=_takes_more)
        if (result := region.result) is not None
    ]
    if not layers:
        return
    doomed: set[Node] = set()
    _find_activations(nodes, {layer.result: layer for layer in layers}, doomed)
    free = set(nodes)
    for layer in layers:
        _find_residual(layer, free)
        _find_last(layer, doomed)
    shared = defaultdict(list)
    for layer in layers:
        if layer.region.op.name in SHARED and _can_share(layer.region):
            shared[_value(layer.region.arguments["x"])].append(layer)
    for group in shared.values():
        if len(group) > 1:
            _quantize_once(graph, group)
    for layer in layers:
        if layer.rows or layer.end is not layer.result:
            doomed |= {layer.region.node, *layer.region.node.all_input_nodes[:1]}  # with its body
            doomed |= {layer.result, layer.end, *(layer.views if layer.sum else ())}
            _replace(graph, layer)
    for node in reversed(list(graph.nodes)):
        if node in doomed and not node.users:
            graph.erase_node(node)


def _drop_round_trips(graph: Graph) -> None:
    """Take away reshapes that end at a shape which they came through, such as a sum in place of a
    convolution's result leaves: its axes are put back and taken away once more.
    """
    for node in before_writes(graph):
        source = node
        while source.target in RESHAPES:
            source = source.all_input_nodes[0]
            shapes = [_tensor(each).shape for each in (node, source)]
            if source.op == "call_function" and statically_equal(*shapes):
                node.replace_all_uses_with(source)
                break
        while node.target in RESHAPES and not node.users:
            unused, node = node, node.all_input_nodes[0]
            graph.erase_node(unused)


def _can_share(region: Region) -> bool:
    """Whether the sums of the op for quantised rows, whose codes may be −128, hold so many; and
    whether the op would get its dtype.
    """
    if mistakes_dtypes():
        return False
    limit = OPS[SHARED[region.op.name][1]].limits["k"]
    return bool(_tensor(region.arguments["w"]).shape[1] <= limit)


def _takes_more(region: Region) -> bool:
    """Whether it is a layer without activation and residual, whose op takes them. The reference,
    which runs where a device has no kernel, gains nothing.
    """
    op, given = region.op, region.arguments
    if region.scheme is None or "activation" not in op.choices:
        return False
    x, bare = _tensor(given.get("x")), (given["residual"], given["activation"]) == (None, "none")
    return bare and isinstance(x, torch.Tensor) and x.device.type.upper() in op.kernels


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
        if layer is None or name not in layer.region.op.choices["activation"]:
            continue
        if (not views or len(y.users) == 1) and layer.end is y:
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
        # `nn.ReLU6` ends at 6.0, `F.relu6` at 6.
        numbers = {type(want), type(got)} <= {int, float}
        return (numbers or type(want) is type(got)) and bool(want == got)

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
    end, views = layer.end, layer.views
    if end is layer.result:  # the axes that a convolution lacks are taken away first
        while len(end.users) == 1 and next(iter(end.users)).target in _SQUEEZES:
            (end,) = end.users
            views = [end, *views]
    if len(end.users) != 1 or (views and _squeezed(views) is None):
        return
    (add,) = end.users
    if add not in free or add.target is not _aten.add.Tensor or add.kwargs:
        return
    (other,) = [arg for arg in add.args if arg is not end] or [None]
    if not isinstance(other, Node):
        return
    mine, theirs, total = map(_tensor, (end, other, add))
    if (
        isinstance(theirs, torch.Tensor)
        and theirs.dtype == mine.dtype
        and theirs.device == mine.device
        and statically_equal(theirs.shape, mine.shape)
        and statically_equal(total.stride(), mine.stride())
    ):
        layer.residual, layer.sum, layer.end = add.args.index(other), add, add
        layer.views = views
        free.remove(add)


def _squeezed(views: list[Node]) -> list[int] | None:
    """The axes that each of the views, the last one first, takes away; None where one does more."""
    axes = []
    for view in views:
        axis: Any = view.args[1] if len(view.args) == 2 else None
        taken = sorted(axis) if isinstance(axis, list | tuple) else [axis]
        if view.target not in _SQUEEZES or not all(isinstance(a, int) and a >= 0 for a in taken):
            return None
        if _tensor(view).dim() + len(taken) != _tensor(view.all_input_nodes[0]).dim():
            return None
        axes += taken
    return axes


def _find_last(layer: _Layer, doomed: set[Node]) -> None:
    """A ReLU after the residual, where the op has one."""
    if layer.sum is None or "last" not in layer.region.op.choices:
        return
    for top in list(layer.end.users):
        form = post_grad_form(ACTIVATIONS["relu"], _tensor(layer.end).dtype)
        found = _match(form, top)
        if found is not None and found[0] is layer.end:
            if _only_within(layer.end, found[1] | {top}):
                doomed |= {*found[1], layer.end}
                layer.last, layer.end = "relu", top
            return


def _value(node: Node) -> Any:
    """A key that nodes with equal values share: the node, or the chain of views that it is."""
    if node.target in _VIEWS and isinstance(node.args[0], Node):
        return node.target, _value(node.args[0]), str(node.args[1:]), str(node.kwargs)
    return node


def _quantize_once(graph: Graph, group: list[_Layer]) -> None:
    first = group[0].region
    x = first.arguments["x"]
    op = OPS[SHARED[first.op.name][0]].overload
    with graph.inserting_before(first.node):
        pair = call(graph, op, x)
        rows = graph.call_function(operator.getitem, (pair, 0))
        scale = graph.call_function(operator.getitem, (pair, 1))
    rows.meta["val"], scale.meta["val"] = pair.meta["val"]
    for layer in group:
        layer.rows = (rows, scale)


def _replace(graph: Graph, layer: _Layer) -> None:
    """One call for the layer and all that is folded into it."""
    # Read now: it may be a layer that has been replaced.
    residual: Any = None if layer.sum is None else layer.sum.args[layer.residual]
    region = layer.region
    # After the residual, which may be computed later than the layer.
    with graph.inserting_before(region.node if residual is None else layer.end):
        if residual is not None:
            for axis in _squeezed(layer.views) or []:
                residual = call(graph, _aten.unsqueeze.default, residual, axis)
        given = {**region.arguments, "residual": residual, "activation": layer.activation}
        if layer.last != "none":
            given["last"] = layer.last
        op, args = region.op, tuple(given.values())
        if layer.rows is not None:
            op = OPS[SHARED[op.name][1]]
            args = (*layer.rows, *args[1:], _tensor(given["x"]).dtype)
        folded = call(graph, op.overload, *args)
        result = folded
        if residual is not None:
            for view in reversed(layer.views):
                result = graph.node_copy(view, {view.args[0]: result}.__getitem__)
    takes_place(folded, layer.result if layer.views else layer.end)
    if layer.views and residual is None:
        layer.result.replace_all_uses_with(folded)
        result = layer.views[0]
    layer.end.replace_all_uses_with(result)


def _copy_views(graph: Graph) -> None:
    """Have results that are views of a convolution's, with sizes that are not known, end in a copy.

    Inductor asks of a view that leaves the graph whether its strides are in order, and fails where
    channels are the last and the sizes are those after a stride: `ValueRangeError` of the
    remainder of 8 W and 8 H W, for H and W such as (s − 1) // 2 + 1. It does not ask of a copy.
    """
    output = graph.output_node()
    for node in output.all_input_nodes:
        source, strides = node, list(_tensor(node).stride()) if node.target in RESHAPES else []
        while source.target in (*RESHAPES, operator.getitem):
            source = source.all_input_nodes[0]
        last = len(strides) > 2 and isinstance(strides[1], int) and strides[1] == 1
        if last and any(isinstance(each, torch.SymInt) for each in strides) and read(source):
            with graph.inserting_before(output):
                copied = call(graph, _aten.clone.default, node)
            output.replace_input_with(node, copied)


def _spell_dtypes(graph: Graph) -> None:
    """Write the dtype into calls that leave it at its default: packages of AOTInductor keep that
    as a number, which no process can load.
    """
    for node, op in _calls_with_dtypes(graph):
        left = () if node.kwargs else op.tails[len(node.args)]
        node.args = (*node.args, *left)
        if left and "eager_input_vals" in node.meta:  # Inductor goes through both side by side
            values, _ = node.meta["eager_input_vals"]
            node.meta["eager_input_vals"] = ((*values, *left), {})


def _refuse_dtypes(graph: Graph) -> None:
    for node, _ in _calls_with_dtypes(graph):
        raise NotImplementedError(
            f"{node.target} has a dtype for an argument, and a package of AOTInductor would "
            f"call it with another one, in torch {torch.__version__}; package with torch 2.12 "
            "or newer."
        )


def _calls_with_dtypes(graph: Graph) -> list[tuple[Node, Op]]:
    takes = {
        op.overload: op for op in OPS.values() if any(arg.kind == "ScalarType" for arg in op.inputs)
    }
    return [(node, takes[node.target]) for node in graph.nodes if node.target in takes]


def _run(graph: Graph) -> None:
    if mistakes_dtypes():
        _refuse_dtypes(graph)
    user_region.settle(graph)
    unwrap_gradients(graph)
    fold(graph)
    padding.fold(graph)
    chains.join(graph)
    norms.join(graph)
    cast_fusion.unfold(graph)
    _copy_views(graph)
    _spell_dtypes(graph)


def _uuid() -> bytes:
    switches = (*sorted(cast_fusion.DEVICES), "norms", *sorted(norms.KINDS))
    return b" ".join([_digest(), *map(str.encode, switches)])


@functools.cache
def _digest() -> bytes:
    """Of the pass and of the ops that it calls: part of the key of Inductor's caches."""
    names = ("fusion", "padding", "chains", "norms", "cast_fusion", "region", "user_region")
    passes = (Path(__file__).with_name(f"{name}.py") for name in names)
    sources = [file.read_bytes() for file in (*passes, Path(str(torch_private.__file__)))]
    declared = "\n".join(f"{op.schema} {op.choices}" for op in OPS.values())
    return hashlib.sha256(b"\n".join([*sources, declared.encode()])).digest()


@on_trace
def install() -> None:
    """Append the pass to those that Inductor is set to run, unless it is there already.

    Called whenever a qnn op is traced, so that `import qnn` needs no Inductor, and so that the pass
    comes back when a setting is replaced or belongs to another thread.
    """
    append_post_grad_pass(_run, _uuid)
