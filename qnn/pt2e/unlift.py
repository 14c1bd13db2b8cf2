"""Quantised layers of a graph, written as float operators between quantise and dequantise nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.kernels.torch_private import quantized_decomposed
from qnn.kinds import is_quantized
from qnn.nn.conv.geometry import ends
from qnn.nn.conv.quantized import QConv
from qnn.nn.linear.quantized import QLinear
from qnn.pt2e import graph as graphs
from qnn.pt2e.qdq import Writer

_aten = torch.ops.aten
_CODES = (-128, 127, torch.int8)


def nodes_of_layers(gm: GraphModule) -> dict[str, str]:
    """Put nodes in the place of the linear layers and convolutions of `gm` that are quantised in
    int8; the others, by their names, with the reason for which they stay.

    The codes of the weights, their scales and the grid of the input are those of the layer. A scale
    for each token is written with `choose_qparams_per_token`, whose scales are at least 1e-5 / 127.
    """
    writer, left = Writer(gm, quantized_decomposed()), dict[str, str]()
    done: dict[str, Any] = {}
    for node in list(gm.graph.nodes):
        layer = graphs.held(gm, node) if node.op == "call_module" else None
        if layer is None or not is_quantized(layer):
            continue
        if (reason := _why_not(layer)) is not None:
            left[str(node.target)] = f"stays a layer: {reason}"
            continue
        name = str(node.target)
        if name not in done:
            done[name] = layer
        _write(gm, writer, node, layer)
    for name, layer in done.items():
        _hold(gm, name, layer)
    if done:
        gm.graph.lint()
        gm.recompile()
    return left


def _why_not(layer: Any) -> str | None:
    if type(layer) is not QLinear and not isinstance(layer, QConv):
        return f"there are no operators with quantise nodes for {type(layer).__name__}"
    if layer.scheme not in ("int8_static", "int8_weight", "int8"):
        return f"no quantise nodes have the numbers of {layer.scheme}"
    if isinstance(layer, QConv) and layer.scheme == "int8":
        return "no quantise node has a scale for each sample; use 'int8_static' or 'int8_weight'"
    if isinstance(layer, QConv) and layer.transposed and layer.groups > 1:
        return "no quantise node has a scale for each group and channel of a transposed weight"
    if isinstance(layer, QConv) and layer.padding_mode != "zeros":
        return f"its padding_mode is {layer.padding_mode!r}"
    return None


def _write(gm: GraphModule, writer: Writer, node: Node, layer: Any) -> None:
    """The nodes of one call of a layer."""
    name, held = str(node.target), layer._parameters
    with gm.graph.inserting_before(node):
        x: Any = node.args[0]
        if layer.scheme == "int8_static":
            grid = (float(held["input_scale"]), int(held["input_zero_point"]), *_CODES)
            x = writer.pair(node, x, "per_tensor", "default", grid)
        elif layer.scheme == "int8":
            x = writer.per_token(node, x)
        axis = 1 if isinstance(layer, QConv) and layer.transposed else 0
        scale = held["weight_scale"].detach().reshape(-1)
        parts = [
            writer.attribute(f"{name}.{part}", value)
            for part, value in (
                ("weight", held["weight"].detach()),
                ("weight_scale", scale),
                ("weight_zero_point", torch.zeros_like(scale, dtype=torch.int32)),
            )
        ]
        dtype = {} if layer.dtype == torch.float32 else {"out_dtype": layer.dtype}
        dequantize = writer.ops.dequantize_per_channel.default
        weight = writer.call(dequantize, *parts, axis, *_CODES, of=node, **dtype)
        bias = held["bias"]
        bias = None if bias is None else writer.attribute(f"{name}.bias", bias)
        result = writer.call(*_operator(layer, x, weight, bias), of=node)
    result.meta.update({key: value for key, value in node.meta.items() if key != "val"})
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _operator(layer: Any, x: Node, weight: Node, bias: Any) -> tuple[Any, ...]:
    """The operator of a layer and its arguments."""
    if isinstance(layer, QLinear):
        return _aten.linear.default, x, weight, bias
    axes = len(layer.kernel_size)
    stride, dilation = list(layer.stride), list(layer.dilation)
    if layer.transposed:
        packet = getattr(_aten, f"conv_transpose{axes}d")
        more = list(layer.output_padding)
        at = [list(layer.padding), more, layer.groups, dilation]
        return (packet.default if axes == 1 else packet.input), x, weight, bias, stride, *at
    packet = getattr(_aten, f"conv{axes}d")
    if isinstance(layer.padding, str):
        return packet.padding, x, weight, bias, stride, layer.padding, dilation, layer.groups
    padding = [*ends(layer)[::2]]
    return packet.default, x, weight, bias, stride, padding, dilation, layer.groups


def _hold(gm: GraphModule, name: str, layer: Any) -> None:
    """A bare module in the place of a layer, with the tensors that the nodes read."""
    bare = nn.Module()
    held = layer._parameters
    scale = held["weight_scale"].detach().reshape(-1)
    if held["bias"] is not None:
        bare.register_parameter("bias", held["bias"])
    bare.register_buffer("weight", held["weight"].detach())
    bare.register_buffer("weight_scale", scale)
    bare.register_buffer("weight_zero_point", torch.zeros_like(scale, dtype=torch.int32))
    graphs.put(gm, name, bare)


__all__ = ["nodes_of_layers"]
