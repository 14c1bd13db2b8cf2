"""Calls of `scaled_dot_product_attention` in a graph: in 8 bits where a rule names the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from qnn.functional.sdpa import SCHEMES, scaled_dot_product_attention

OPERATOR = torch.ops.aten.scaled_dot_product_attention.default
# In the meta of a node: its scheme.
SCHEME = "qnn_attention"
LEFT = (
    "attention stays float where no rule names it: "
    "set_op_type(torch.nn.functional.scaled_dot_product_attention, 'int8')"
)


def why_not(node: Node, scheme: str) -> str | None:
    """Why a call cannot be quantised, or None."""
    if scheme not in SCHEMES:
        able = ", ".join(map(repr, SCHEMES))
        return f"scheme {scheme!r} has no attention; its schemes are {able}"
    dropout: Any = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    if dropout != 0.0:
        return f"it drops weights at random, dropout_p={dropout}; export the model in eval mode"
    return None


def quantize(graph: GraphModule) -> None:
    """Have the calls that a rule named computed by qnn's function of the same signature."""
    for node in graph.graph.find_nodes(op="call_function", target=OPERATOR):
        if (scheme := node.meta.pop(SCHEME, None)) is not None:
            node.target = scaled_dot_product_attention
            node.kwargs = {**node.kwargs, "scheme": scheme}
    graph.recompile()
