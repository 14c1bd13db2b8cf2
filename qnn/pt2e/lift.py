"""The layers of an exported graph become layers again.

`torch.export` writes `aten.linear(x, fc_weight, fc_bias)` where the model called `self.fc(x)`.
`lift` puts a call of an `nn.Linear` there, under the name that its parameters have, and around
these parameters themselves. Then all that holds for layers of a model holds for those of a graph,
and the verbs do not know the difference. A layer that is called several times is one module again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.pt2e import bodies
from qnn.pt2e import graph as graphs
from qnn.pt2e.layers import Call, read


@dataclass
class Lifted:
    """What `lift` has made.

    Attributes:
        layers: the nodes that call each layer, by its name.
        reasons: why nodes that look like a layer's call are none, or stay as they are.
        read_elsewhere: of layers whose parameters the graph reads by another operator too, which.
    """

    layers: dict[str, list[Node]] = field(default_factory=dict)
    reasons: dict[Node, str] = field(default_factory=dict)
    read_elsewhere: dict[str, str] = field(default_factory=dict)


def lift(root: GraphModule, wanted: Callable[[Node], bool]) -> Lifted:
    """Put calls of float layers in the place of the nodes that are `wanted` and are such calls."""
    done, made = Lifted(), dict[tuple[Any, ...], str]()
    every = list(graphs.graphs(root))
    for graph in every:
        for node in list(graph.graph.nodes):
            found = read(graph, node) if wanted(node) else None
            if isinstance(found, str):
                done.reasons[node] = found
            if not isinstance(found, Call):
                continue
            key = _same(graph, node, found)
            if key not in made:
                made[key] = _place(root, node, found)
            new = _call(graph, node, bodies.borrow(root, graph, made[key]), found)
            done.layers.setdefault(made[key], []).append(new)
    for graph in every:
        _erase_unused(graph)
    bodies.settle(root)
    _erase_unused(root)
    _delete_unread(root)
    for name in done.layers:
        other = _other_reader(root, root.get_submodule(name))
        if other is not None:
            done.read_elsewhere[name] = other
    root.graph.lint()
    root.recompile()
    return done


def _same(graph: nn.Module, node: Node, call: Call) -> tuple[Any, ...]:
    """Equal for calls of one layer."""
    tensors = [id(graphs.held(graph, each)) for each in call.tensors.values()]
    return (_name(node, call), repr(call.layer), call.layer.training, *tensors)


def _name(node: Node, call: Call) -> str:
    """Where a layer belongs: at the module that the node comes from, if that is of its class, or at
    the owner of its parameters.
    """
    stack = graphs.path(node)
    kinds = {f"{k.__module__}.{k.__qualname__}" for k in type(call.layer).__mro__}
    if stack and stack[-1][0] and (stack[-1][1] in kinds or _alike(stack[-1][1], call.layer)):
        return stack[-1][0]
    if not call.tensors:
        inside = stack[-1][0] if stack else ""
        return f"{inside}.dropout" if inside else "dropout"
    owner, _, last = graphs.name(next(iter(call.tensors.values()))).rpartition(".")
    if last in call.tensors or last.startswith("weight_"):
        return owner or type(call.layer).__name__.lower()
    # `in_proj_weight` or `table` of another module: a layer of its own, inside of that.
    own = last.removesuffix("_weight")
    if own == last:
        own = f"{last}_{type(call.layer).__name__.lower()}"
    return ".".join(filter(None, (owner, own)))


def _alike(title: str, layer: nn.Module) -> bool:
    """Whether a class is by its name one of BatchNorm or Dropout, of any number of axes."""
    short = title.rpartition(".")[2].lower()
    return any(
        word in short and word in type(layer).__name__.lower() for word in ("batchnorm", "dropout")
    )


def _place(root: GraphModule, node: Node, call: Call) -> str:
    """Register the layer; its name."""
    name = _name(node, call)
    there = _module(root, name)
    if there is not None and _is_owned(there, call):
        for key, buffer in there._buffers.items():
            if key in call.layer._buffers and key not in call.tensors:
                call.layer._buffers[key] = buffer
    elif there is not None or _has(root, name):
        name = graphs.free_name(root, name)
    graphs.put(root, name, call.layer)
    return name


def _module(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _has(root: nn.Module, name: str) -> bool:
    return graphs.free_name(root, name) != name


def _is_owned(there: nn.Module, call: Call) -> bool:
    """Whether what torch.export has left in a layer's place is that layer's own: a bare module with
    no more than its tensors.
    """
    layer = call.layer
    names = {*layer._parameters, *layer._buffers}
    return (
        type(there) is nn.Module
        and not there._modules
        and ({*there._parameters, *there._buffers} <= names)
    )


def _call(root: GraphModule, node: Node, name: str, call: Call) -> Node:
    """The call of a layer in the place of a node."""
    graph = root.graph
    with graph.inserting_before(node):
        inputs: Any = list(call.inputs)
        while inputs and inputs[-1] is None:
            inputs.pop()
        new = graph.call_module(name, tuple(inputs))
        new.meta = dict(node.meta)
        new.meta["qnn_node"] = graphs.title(node)
    if not call.unpack:
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return new
    new.meta["val"] = _packed(node.meta["val"], call.unpack)
    new.meta.pop("tensor_meta", None)
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise AssertionError(f"{user} reads a tuple")
        if not user.users:
            graph.erase_node(user)
            continue
        value = new
        with graph.inserting_before(user):
            for index in call.unpack[user.args[1]]:  # type: ignore[index]
                meta = value.meta | {"val": value.meta["val"][index]}
                meta.pop(graphs.ANNOTATION, None)
                value = graph.call_function(operator.getitem, (value, index))
                value.meta = meta
        value.meta |= user.meta
        value.meta["qnn_node"] = user.name
        user.replace_all_uses_with(value)
        graph.erase_node(user)
    graph.erase_node(node)
    return new


def _packed(values: Any, paths: tuple[tuple[int, ...], ...]) -> Any:
    """An operator's results as a layer returns them: `((0,), (1, 0), (1, 1))` is `(a, (b, c))`."""
    if paths[0] == ():
        return values[0]
    firsts = dict.fromkeys(path[0] for path in paths)
    groups = [
        [(v, p[1:]) for v, p in zip(values, paths, strict=False) if p[0] == f] for f in firsts
    ]
    return tuple(_packed([v for v, _ in g], tuple(p for _, p in g)) for g in groups)


def _erase_unused(root: GraphModule) -> None:
    """Erase reads of tensors that nothing uses any more, and the counts of BatchNorms, which count
    by themselves.
    """
    graph = root.graph
    norms = {
        id(module.num_batches_tracked)
        for module in root.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.add_.Tensor and _reads(root, node.args[0], norms):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if not node.users and (
            node.op == "get_attr" or (node.op == "call_function" and _is_turn(node))
        ):
            graph.erase_node(node)


def _delete_unread(root: GraphModule) -> None:
    """Delete parameters where they were, if a layer holds them now."""
    named = {str(node.target) for node in root.graph.nodes if node.op == "get_attr"}
    layers = [m for m in root.modules() if type(m) is not nn.Module and m is not root]
    held = {id(t) for module in layers for t in module._parameters.values()}
    for name, module in list(root.named_modules()):
        if type(module) is nn.Module or module is root:
            for key, tensor in list(module._parameters.items()):
                full = f"{name}.{key}" if name else key
                if id(tensor) in held and full not in named:
                    del module._parameters[key]


def _is_turn(node: Node) -> bool:
    aten = torch.ops.aten
    turns = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
    return node.target in turns


def _reads(root: nn.Module, node: Any, tensors: Iterable[int]) -> bool:
    is_read = isinstance(node, Node) and node.op == "get_attr"
    return is_read and id(graphs.held(root, node)) in tensors


def _other_reader(root: GraphModule, layer: nn.Module) -> str | None:
    """What else in the graph reads a layer's parameters."""
    mine = {id(tensor) for tensor in layer._parameters.values() if tensor is not None}
    for graph in graphs.graphs(root):
        for node in graph.graph.nodes:
            read = node.op in ("get_attr", "placeholder") and id(graphs.held(graph, node)) in mine
            for user in node.users if read else ():
                if not isinstance(user.target, torch._ops.HigherOrderOperator):
                    return graphs.told(user)
    return None
