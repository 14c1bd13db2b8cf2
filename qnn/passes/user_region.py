"""Regions of a user's own functions in Inductor's graph: what `region_result` says is done."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule

from qnn.kernels.torch_private import InvokeQuant, invoke_quant
from qnn.kernels.user_region import REGION_RESULT, options_of
from qnn.passes.region import body_of

_clone = torch.ops.aten.clone.default


def settle(graph: Graph) -> None:
    """Set the options of each region, and put a copy in the place of its `region_result`, which
    Inductor makes part of the code before it.

    A copy is needed: Inductor lowers a region whose result is a tensor of its own, and not a view,
    such as a sum is whose axes are dropped.
    """
    for node in graph.find_nodes(op="call_function", target=invoke_quant):
        body = body_of(node)
        for call in _ends(body) if body is not None else ():
            low, _ = options_of(call.args, call.kwargs)
            node.meta["quant_options"] = InvokeQuant(codegen_low_precision=low)
            call.target, call.args, call.kwargs = _clone, call.args[:1], {}


def _ends(body: GraphModule) -> list[torch.fx.Node]:
    return list(body.graph.find_nodes(op="call_function", target=REGION_RESULT))
