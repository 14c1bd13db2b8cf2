"""What is known of a graph without running it: which values are constant, and which are written
to."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.pt2e.graph import put
from qnn.pt2e.observers import is_observer

# Between the codes of a weight and what reads it: these stay in the graph.
_KEPT = (
    "quantized_decomposed::dequantize",
    "quantized_decomposed::convert_element_type",
    "torchao::dequantize",
)


def attribute(module: nn.Module, target: str) -> Any:
    """`module.a.b` for the target `a.b`; None where there is no such thing."""
    at: Any = module
    for name in target.split("."):
        at = getattr(at, name, None)
    return at


def register(module: nn.Module, target: str, tensor: torch.Tensor) -> None:
    """Hold a tensor as the buffer `target`, in the place of what has that name."""
    path, _, name = target.rpartition(".")
    if path and attribute(module, path) is None:
        put(module, path, nn.Module())
    owner = attribute(module, path) if path else module
    owner._parameters.pop(name, None)
    owner._buffers.pop(name, None)
    owner.register_buffer(name, tensor)


def forget(module: nn.Module, target: str) -> None:
    """Take away a parameter, buffer or module."""
    path, _, name = target.rpartition(".")
    owner = attribute(module, path) if path else module
    for held in (owner._parameters, owner._buffers, owner._modules):
        held.pop(name, None)
    owner.__dict__.pop(name, None)


def names_of(gm: GraphModule, tensor: torch.Tensor) -> list[str]:
    """All names of a parameter or buffer."""
    named = [
        *gm.named_parameters(remove_duplicate=False),
        *gm.named_buffers(remove_duplicate=False),
    ]
    return [name for name, each in named if each is tensor]


def erase_with_inputs(gm: GraphModule, node: Node) -> None:
    """Erase a node that nothing reads, and what was computed for it alone."""
    pending, erased = [node], set()
    while pending:
        node = pending.pop()
        if node.users or node in erased or node.op in ("placeholder", "output"):
            continue
        if node.op == "call_module" and not is_observer(attribute(gm, str(node.target))):
            continue
        if (schema := schema_of(node)) is not None and schema.is_mutable:
            continue
        pending += node.all_input_nodes
        gm.graph.erase_node(node)
        erased.add(node)


def erase_unread(gm: GraphModule) -> None:
    """Erase the reads of parameters that nothing uses, such as of the second name of a tied one."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if not node.users:
            gm.graph.erase_node(node)


def schema_of(node: Node) -> Any:
    """The schema of the op that a node calls, also where it names an op without an overload; or
    None.
    """
    if node.op != "call_function":
        return None
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()
        target = getattr(target, overloads[0]) if len(overloads) == 1 else None
    return getattr(target, "_schema", None)


def base_of(node: Node) -> Node | None:
    """The node whose memory `node` is a view of, or has written to; None for most."""
    schema = schema_of(node)
    if schema is None or not schema.arguments or not node.args:
        return None
    source = node.args[0]
    aliased = schema.arguments[0].alias_info is not None
    return source if aliased and isinstance(source, Node) else None


def root_of(node: Node) -> Node:
    """The base of the base of … `node`; itself for most."""
    while (source := base_of(node)) is not None:
        node = source
    return node


def writes(graph: torch.fx.Graph) -> dict[Node, list[Node]]:
    """The nodes that write to the memory of each root, in the order of the graph."""
    found: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if (schema := schema_of(node)) is None or not schema.is_mutable:
            continue
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
        given |= node.kwargs
        for argument in schema.arguments:
            value = given.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Node):
                    found.setdefault(root_of(each), []).append(node)
    return found


def destinations(graph: torch.fx.Graph) -> tuple[set[tuple[Node, Node]], set[Node]]:
    """The edges and the outputs that must not become other tensors, since something is written
    through them: to a buffer, or to a view of which others read the base.
    """
    edges: set[tuple[Node, Node]] = set()
    outputs: set[Node] = set()
    for writers in writes(graph).values():
        for writer in writers:
            chain = [writer]
            while isinstance(source := base_of(chain[-1]), Node):
                chain.append(source)
            views = any(not schema_of(node).is_mutable for node in chain[1:-1])
            if views or chain[-1].op == "get_attr":
                edges |= set(zip(chain[1:], chain, strict=False))
                outputs |= set(chain[1:] if chain[-1].op == "get_attr" else chain[1:-1])
    return edges, outputs


class Constants:
    """The values of nodes that depend on parameters and buffers alone, computed once each.

    What the graph writes to is not constant, and neither is what is drawn at random, dequantised,
    or made of no tensor.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._values: dict[Node, torch.Tensor | None] = {}
        roots = (attribute(gm, str(n.target)) for n in writes(gm.graph) if n.op == "get_attr")
        self._written = {_memory(each) for each in roots if isinstance(each, torch.Tensor)}

    def value(self, node: Node) -> torch.Tensor | None:
        """The value of a node, or None where it is not constant."""
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: Node) -> torch.Tensor | None:
        if node.op == "get_attr":
            held = attribute(self._gm, str(node.target))
            known = isinstance(held, torch.Tensor) and _memory(held) not in self._written
            return held.detach() if known else None
        if node.op == "call_module" and is_observer(attribute(self._gm, str(node.target))):
            source = node.args[0]
            return self.value(source) if isinstance(source, Node) else None
        if not self._is_pure(node) or not node.all_input_nodes:
            return None
        values = {source: self.value(source) for source in node.all_input_nodes}
        if any(value is None for value in values.values()):
            return None
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
        target: Any = node.target
        with torch.no_grad():
            result: torch.Tensor = target(*args, **kwargs)
        return result

    def _is_pure(self, node: Node) -> bool:
        if node.op == "call_function" and node.target is operator.getitem:
            return True
        if (schema := schema_of(node)) is None or schema.is_mutable:
            return False
        tags = getattr(node.target, "tags", ())
        return torch.Tag.nondeterministic_seeded not in tags and not schema.name.startswith(_KEPT)


def _memory(tensor: torch.Tensor) -> tuple[str, int]:
    if tensor.is_meta:
        return "meta", id(tensor)
    return str(tensor.device), tensor.untyped_storage().data_ptr()
