"""The bodies of `torch.cond`, `while_loop`, `scan` and `map`.

A body reads the model's tensors as operands. Where one is always the same tensor of the model, its
placeholder is marked, and is read as that tensor. A layer of a body is registered in the model
itself, under the name of its parameters, and the body borrows it; operands that nothing reads any
more go.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.pt2e import graph as graphs

# By the operator: the lists of operands that change from turn to turn, and the one that does not.
_OPERANDS: dict[str, tuple[tuple[int, ...], int]] = {
    "cond": ((), 3),
    "while_loop": ((2,), 3),
    "scan": ((1, 2), 3),
    "map_impl": ((1,), 2),
}


CONDITION = "qnn_condition"
"""The key of `node.meta` of what says whether a `while_loop` goes on: it stays float, since another
number would be another count of turns."""


class Body(GraphModule):
    """A body with layers that the model owns: they are no submodules of it, so that the state dict
    has each under one name.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Body:
        result: Body = super().__deepcopy__(memo)  # type: ignore[assignment]
        _lend(result, [name for name, each in result._modules.items() if name in vars(self)])
        return result


def _lend(body: GraphModule, names: list[str]) -> None:
    for name in names:
        body.__dict__[name] = body._modules.pop(name)


def _calls(root: GraphModule) -> Iterator[tuple[GraphModule, Node, list[tuple[Node, GraphModule]]]]:
    """The nodes that call bodies, each with its graph and the bodies, the outermost first."""
    for graph in reversed(list(graphs.graphs(root))):
        for node in graph.graph.nodes:
            if node.op != "call_function" or _title(node) not in _OPERANDS:
                continue
            read = [each for each in node.args if isinstance(each, Node) and each.op == "get_attr"]
            bodies = [(each, graphs.held(graph, each)) for each in read]
            yield graph, node, [(n, b) for n, b in bodies if isinstance(b, GraphModule)]


def _places(node: Node, body: GraphModule) -> list[tuple[int, Any, Node]]:
    """The fixed operands of a call: each with its place and the body's placeholder."""
    varying, fixed = _OPERANDS[_title(node)]
    lists = cast(tuple[Any, ...], node.args)
    start = sum(len(lists[at]) for at in varying)
    placeholders = list(body.graph.find_nodes(op="placeholder"))[start:]
    operands: Any = node.args[fixed] if len(node.args) > fixed else ()
    return [(at, *pair) for at, pair in enumerate(zip(operands, placeholders, strict=True))]


def mark(root: GraphModule) -> None:
    """Tell the placeholders of bodies which tensor of the model they are, and their nodes in which
    body they are, and whether that says if a loop goes on.
    """
    for graph, node, bodies in _calls(root):
        for at, (attribute, body) in enumerate(bodies):
            if at == 0 and _title(node) == "while_loop":
                for inner in graphs.graphs(body):
                    for each in inner.graph.nodes:
                        each.meta[CONDITION] = True
            for each in body.graph.nodes:
                each.meta["qnn_body"] = str(attribute.target)
                each.meta["qnn_caller"] = graphs.source(node)
            for _, operand, placeholder in _places(node, body):
                held = graphs.held(graph, operand) if isinstance(operand, Node) else None
                if isinstance(held, torch.Tensor):
                    placeholder.meta["qnn_held"] = (graphs.name(operand), held)


def unmark(root: GraphModule) -> None:
    """Forget the tensors; their places may change."""
    for graph in graphs.graphs(root):
        for node in graph.graph.nodes:
            node.meta.pop("qnn_held", None)


# -- calls of bodies with layers ------------------------------------------------------------------
# In eager mode they are plain Python: the operators would run observers on tensors without values,
# and give the parameters of layers no gradients.


def cond(pred: Any, yes: Any, no: Any, operands: Any = ()) -> Any:
    """`torch.ops.higher_order.cond` of bodies that borrow layers."""
    if _is_traced():
        return _call(_OPS["cond"], [pred, yes, no, operands], 3)
    return (yes if pred else no)(*operands)


def while_loop(test: Any, body: Any, carried: Any, more: Any = ()) -> Any:
    """`torch.ops.higher_order.while_loop`, as `cond`."""
    if _is_traced():
        return _call(_OPS["while_loop"], [test, body, carried, more], 3)
    while test(*carried, *more):
        carried = tuple(body(*carried, *more))
    return carried


def scan(combine: Any, init: Any, xs: Any, more: Any = ()) -> Any:
    """`torch.ops.higher_order.scan`, as `cond`."""
    if _is_traced():
        return _call(_OPS["scan"], [combine, init, xs, more], 3)
    return scan_unrolled(combine, init, xs, more)


def scan_unrolled(combine: Any, init: Any, xs: Any, more: Any = ()) -> Any:
    """`scan` as a loop in any mode, for bodies with observers: operators may not write to these."""
    carry, taken = list(init), []
    for turn in range(xs[0].shape[0]):
        result = combine(*carry, *(x[turn] for x in xs), *more)
        carry = list(result[: len(carry)])
        taken.append(result[len(carry) :])
    return (*carry, *(torch.stack(each) for each in zip(*taken, strict=True)))


def map_impl(body: Any, xs: Any, more: Any = ()) -> Any:
    """`torch.ops.higher_order.map_impl`, as `cond`."""
    if _is_traced():
        return _call(_OPS["map_impl"], [body, xs, more], 2)
    return scan_unrolled(body, (), xs, more)


def _with_layers(bodies: Iterable[Any]) -> list[Body]:
    """Those of the bodies, and of the bodies in them, that borrow layers."""
    graphs_ = [body for body in bodies if isinstance(body, GraphModule)]
    return [each for body in graphs_ for each in body.modules() if isinstance(each, Body)]


def _is_traced() -> bool:
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def _call(operator: Any, args: list[Any], fixed: int) -> Any:
    """torch.compile makes operands of the layers' tensors; export that is not strict takes them for
    constants, and so they become operands here.
    """
    if torch.compiler.is_dynamo_compiling():
        return operator(*args)
    layers = {
        id(layer): layer
        for body in _with_layers(args)
        for part in vars(body).values()
        if isinstance(part, nn.Module)
        for layer in part.modules()
    }
    places: list[tuple[dict[str, Any], str]] = [
        (held, name)
        for layer in layers.values()
        for held in cast(Any, (layer._parameters, layer._buffers))
        for name, tensor in held.items()
        if tensor is not None
    ]
    args[fixed] = (*args[fixed], *(held[name] for held, name in places))

    def lifted(body: Any) -> Any:
        def call(*operands: Any) -> Any:
            before = [held[name] for held, name in places]
            last = len(operands) - len(places)
            try:
                for (held, name), tensor in zip(places, operands[last:], strict=True):
                    held[name] = tensor
                return body(*operands[:last])
            finally:
                for (held, name), tensor in zip(places, before, strict=True):
                    held[name] = tensor

        return call

    return operator(*(lifted(each) if isinstance(each, GraphModule) else each for each in args))


_OPS = {name: getattr(torch.ops.higher_order, name) for name in _OPERANDS}
_CALLS: dict[str, Any] = {
    "cond": cond,
    "while_loop": while_loop,
    "scan": scan,
    "map_impl": map_impl,
}


def _title(node: Node) -> str:
    name = str(getattr(node.target, "__name__", ""))
    return "scan" if node.target is scan_unrolled else name


def watch(root: GraphModule, *, observed: bool) -> None:
    """Have bodies with layers run so that observers in them see values, or as they are."""
    for graph, node, bodies in _calls(root):
        if _with_layers(body for _, body in bodies):
            title = _title(node)
            target: Any = scan_unrolled if title == "scan" and observed else _CALLS[title]
            node.target = target
            graph.recompile()


# -- layers of bodies -----------------------------------------------------------------------------


def borrow(root: GraphModule, graph: GraphModule, name: str) -> str:
    """The name by which a graph calls a layer that is registered in the model."""
    if graph is root:
        return name
    layer, flat = root.get_submodule(name), name.replace(".", "_")
    while getattr(graph, flat, layer) is not layer:
        flat += "_"
    graph.__dict__[flat] = layer
    return flat


def settle(root: GraphModule) -> None:
    """Drop the operands that no body reads any more, and make bodies that borrow layers `Body`s."""
    for _, node, bodies in list(_calls(root))[::-1]:
        _drop_operands(node, [body for _, body in bodies])
    for graph, _, bodies in list(_calls(root)):
        for attribute, body in bodies:
            names = [str(each.target) for each in body.graph.find_nodes(op="call_module")]
            lent = [name for name in names if name in vars(body)]
            if lent and not isinstance(body, Body):
                made = Body(body, body.graph)
                made.meta = copy.copy(body.meta)
                _lend(made, list(dict.fromkeys(lent)))
                graphs.put(graph, str(attribute.target), made)
            else:
                body.recompile()
    root.recompile()


def _drop_operands(node: Node, bodies: list[GraphModule]) -> None:
    _, fixed = _OPERANDS[_title(node)]
    places = [_places(node, body) for body in bodies]
    unread = [
        at
        for at, (each, *more) in enumerate(zip(*places, strict=True))
        if "qnn_held" in each[2].meta and not any(p.users for _, _, p in (each, *more))
    ]
    for body, of in zip(bodies, places, strict=True):
        for at in unread:
            body.graph.erase_node(of[at][2])
    if unread:
        operands: Any = node.args[fixed]
        kept = [operand for at, operand in enumerate(operands) if at not in unread]
        node.update_arg(fixed, type(operands)(kept))
