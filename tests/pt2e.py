"""What the tests of graph mode share: exported graphs, small quantizers, and what is in a graph."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.pt2e.constants import schema_of
from qnn.pt2e.graph import is_annotated
from qnn.pt2e.insert import insert_observers
from qnn.pt2e.observers import is_observer
from qnn.pt2e.specs import (
    QuantizationAnnotation,
    QuantizationSpec,
    annotate_input_qspec_map,
    annotate_output_qspec,
)

aten = torch.ops.aten
ACT = QuantizationSpec(torch.uint8, qscheme=torch.per_tensor_affine)
SIGNED = QuantizationSpec(torch.int8, qscheme=torch.per_tensor_affine)
WEIGHT = QuantizationSpec(torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=0)
DYNAMIC = QuantizationSpec(torch.int8, qscheme=torch.per_tensor_affine, is_dynamic=True)
LAYERS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding)


def export(model: nn.Module, *inputs: Any, **options: Any) -> GraphModule:
    """The exported module, in evaluation."""
    return torch.export.export(model.eval(), inputs, **options).module()


def prepare(
    gm: GraphModule, quantizer: Any, *, qat: bool = False, callback: Any = None
) -> GraphModule:
    """Annotate, with a function or an object with the methods of a quantizer, and insert."""
    if hasattr(quantizer, "annotate"):
        gm = quantizer.transform_for_annotation(gm)
        quantizer.annotate(gm)
        quantizer.validate(gm)
        callback = quantizer.prepare_obs_or_fq_callback
    else:
        quantizer(gm)
    return insert_observers(gm, qat=qat, callback=callback)


def of_layers(
    act: Any = ACT, weight: Any = WEIGHT, out: Any = None, bias: Any = None
) -> Callable[[GraphModule], None]:
    """Annotates linear layers and convolutions."""

    def annotate(gm: GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.target not in LAYERS or is_annotated(node):
                continue
            annotate_input_qspec_map(node, node.args[0], act)
            annotate_input_qspec_map(node, node.args[1], weight)
            if bias is not None and len(node.args) > 2 and node.args[2] is not None:
                annotate_input_qspec_map(node, node.args[2], bias)
            annotate_output_qspec(node, out)

    return annotate


def annotate(
    node: Node, inputs: dict[Node, Any], output: Any = None, implicit: bool = True
) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, output, implicit)


def node_of(gm: GraphModule, target: Any, at: int = 0) -> Node:
    """A node by its target or by its name."""
    found = [n for n in gm.graph.nodes if target in (n.target, n.name)]
    return found[at]


def observer_of(gm: GraphModule, node: Any) -> Any:
    """The observer that a node calls; None where it calls none."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    return module if is_observer(module) else None


def observed(gm: GraphModule) -> list[tuple[str, str]]:
    """The observers in a graph, with the node that each observes."""
    return [(n.args[0].name, str(n.target)) for n in gm.graph.nodes if observer_of(gm, n)]


def ops(gm: GraphModule) -> Counter[str]:
    """The functions in a graph, with how often each is called, and layers by their class."""
    names: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            names[schema_of(node).name.partition("::")[2]] += 1
        elif node.op == "call_module" and node.name != "_guards_fn":
            names[type(gm.get_submodule(str(node.target))).__name__] += 1
    return names


class ConvNet(nn.Module):
    """A residual block, pooling, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 8, 1, bias=False)
        self.l = nn.Linear(8, 5)
        self.m = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.relu(self.c(x))
        z = nn.functional.max_pool2d(torch.relu(self.d(y) + y), 2)
        y = self.l(z.mean((2, 3)))
        return self.m(torch.relu(y)), y, torch.cat([z, z], 1)


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8)
