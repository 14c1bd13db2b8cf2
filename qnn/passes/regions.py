"""Regions that Inductor cannot lower are taken apart before it sees them.

A region of qnn's has one op and one result. The module of an exported program differentiates its
nodes by themselves, though: each gives a region of all of its gradients, and Inductor's lowering of
a region takes one result only.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from qnn.kernels.torch_private import invoke_quant


def unwrap_gradients(graph: Graph) -> None:
    """Put what is inside of the regions with several results in their place."""
    for node in graph.find_nodes(op="call_function", target=invoke_quant):
        region = _region(graph, node)
        if region is not None and len(_results(region)) > 1:
            _inline(graph, node, region)


def _region(graph: Graph, node: Node) -> Graph | None:
    held = node.args[0]
    if not isinstance(held, Node) or graph.owning_module is None:
        return None
    module = getattr(graph.owning_module, str(held.target))
    return module.graph if isinstance(module, torch.fx.GraphModule) else None


def _results(region: Graph) -> tuple[object, ...]:
    (result,) = region.output_node().args
    return tuple(result) if isinstance(result, list | tuple) else (result,)


def _inline(graph: Graph, node: Node, region: Graph) -> None:
    users = list(node.users)
    if any(inner.op == "get_attr" for inner in region.nodes) or any(
        user.target is not operator.getitem for user in users
    ):
        return
    placeholders = region.find_nodes(op="placeholder")
    made: dict[Node, Node] = dict(zip(placeholders, node.args[1:], strict=True))  # type: ignore[arg-type]
    with graph.inserting_before(node):
        for inner in region.nodes:
            if inner.op == "call_function":
                made[inner] = graph.node_copy(inner, lambda old: made[old])
    results = _results(region)
    for user in users:
        result = results[user.args[1]]  # type: ignore[index]
        if isinstance(result, Node):
            user.replace_all_uses_with(made[result])
            graph.erase_node(user)
    if not node.users:
        graph.erase_node(node)
