"""BatchNorms after layers that are quantised already, folded into scales and bias: the codes stay,
but for their sign.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.functional.batch_norm import scale_and_shift
from qnn.kernels.torch_private import quantized_decomposed
from qnn.kinds import is_quantized
from qnn.nn.conv.quantized import QConv
from qnn.nn.linear.quantized import QLinear
from qnn.pt2e import graph as graphs
from qnn.pt2e.constants import attribute, erase_unread, register, schema_of
from qnn.pt2e.qdq import Writer

# By the operator: the axes that follow the channels, and which axis of the weight is that of the
# output.
_AT = {"linear": (0, 0)} | {
    f"conv{kind}{n}d": (n, axis) for n in (1, 2, 3) for kind, axis in (("", 0), ("_transpose", 1))
}
_SOURCE = ("nn_module_stack", "source_fn_stack", "stack_trace")


def fold_codes(gm: GraphModule) -> dict[str, str]:
    """Fold the BatchNorms of `gm` that were trained after annotated layers; by the name of each
    BatchNorm that went, that of its layer.

    With `s = gamma / √(var + eps)`: the scales per channel become `scale · |s|`, the codes of a
    negative `s` change sign, and `bias = beta + (bias − mean) · s`. What was trained is
    `bn(conv(x, fq(w)))`, which this is. One scale of a weight becomes one for each channel. A
    BatchNorm stays where its layer's result is read elsewhere, the layer is called twice, or a code
    that would change its sign is −128.
    """
    folded = {}
    for norm in list(gm.graph.nodes):
        module = graphs.held(gm, norm) if norm.op == "call_module" else None
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
            continue
        call = norm.args[0]
        if not isinstance(call, Node) or len(call.users) > 1 or _calls(gm, norm.target) > 1:
            continue
        name = _into_layer(gm, call, norm, module) or _into_nodes(gm, call, norm, module)
        if name is None:
            continue
        folded[str(norm.target)] = name
        norm.replace_all_uses_with(call)
        gm.graph.erase_node(norm)
        gm.delete_submodule(str(norm.target))
    if folded:
        erase_unread(gm)
        gm.graph.lint()
        gm.recompile()
    return folded


def _calls(gm: GraphModule, target: Any) -> int:
    return sum(node.op == "call_module" and node.target == target for node in gm.graph.nodes)


def _fits(norm: Node, axes: int) -> bool:
    """Whether a BatchNorm normalises the channels of the layer before it."""
    value = graphs.value(norm)
    return isinstance(value, torch.Tensor) and value.dim() == axes + 2


@torch.no_grad()
def _gains(module: Any, codes: torch.Tensor, transposed_groups: int | None) -> Any:
    """What multiplies the scales, the folded codes, and `s` and `beta − mean · s`."""
    held = module.running_mean, module.running_var, module.weight, module.bias, module.eps
    scale, shift = scale_and_shift(*held)
    groups = transposed_groups or 1
    shape = [groups, 1, -1] if transposed_groups else [1, -1, 1]
    sign = torch.sign(scale).to(codes.dtype).reshape(*shape, *[1] * (codes.dim() - 2))
    rows = codes.reshape(groups, codes.shape[0] // groups, *codes.shape[1:])
    if bool(((rows == -128) & (sign < 0)).any()):
        return None  # has no negative
    gain = torch.where(scale == 0, 1.0, scale.abs().float())  # of a channel that is all zeros
    return gain, (rows * sign).reshape(codes.shape), scale, shift


def _into_layer(gm: GraphModule, call: Node, norm: Node, module: Any) -> str | None:
    layer: Any = graphs.held(gm, call) if call.op == "call_module" else None
    if not isinstance(layer, QConv | QLinear) or not is_quantized(layer):
        return None
    if layer.stored[0].dtype != torch.int8 or _calls(gm, call.target) > 1:
        return None
    if not _fits(norm, len(layer.kernel_size) if isinstance(layer, QConv) else 0):
        return None
    groups = layer.groups if isinstance(layer, QConv) and layer.transposed else None
    if _reads(gm, layer.bias):
        return None  # that of other layers is not theirs by name
    codes, weight_scale = (part.detach() for part in layer.stored)
    if (gains := _gains(module, codes, groups)) is None:
        return None
    gain, codes, scale, shift = gains
    bias = shift if layer.bias is None else layer.bias.detach() * scale + shift
    layer._set_parts("weight", (codes, weight_scale * gain.reshape(weight_scale.shape)))
    layer.bias = nn.Parameter(bias.to(layer.dtype))
    return str(call.target)


def _reads(gm: GraphModule, tensor: torch.Tensor | None) -> int:
    """How often the graph itself reads a tensor."""
    nodes = gm.graph.find_nodes(op="get_attr") if tensor is not None else ()
    return sum(len(node.users) for node in nodes if attribute(gm, str(node.target)) is tensor)


def _into_nodes(gm: GraphModule, call: Node, norm: Node, module: Any) -> str | None:
    schema = schema_of(call)
    axes, axis = _AT.get(schema.name.removeprefix("aten::"), (-1, 0)) if schema else (-1, 0)
    if axes < 0 or not _fits(norm, axes):
        return None
    arguments = dict(zip((each.name for each in schema.arguments), call.args, strict=False))
    if axis and {**arguments, **call.kwargs}.get("groups", 1) != 1:
        return None  # channels of several groups have one scale
    weight: Any = call.args[1]
    ops = quantized_decomposed()
    one = weight.target is ops.dequantize_per_tensor.default
    if len(weight.users) > 1 or not (one or weight.target is ops.dequantize_per_channel.default):
        return None
    parts = weight.args[:1] if one else weight.args[:3]
    if any(part.op != "get_attr" or len(part.users) > 1 for part in parts):
        return None
    codes = attribute(gm, str(parts[0].target))
    if one:
        weight_scale, zero = (torch.tensor(each) for each in weight.args[1:3])
    else:
        weight_scale, zero = (attribute(gm, str(part.target)) for part in parts[1:])
    given = call.args[2] if len(call.args) > 2 else None
    held = attribute(gm, str(given.target)) if isinstance(given, Node) else None
    if bool(zero.any()) or (given is not None and not isinstance(held, nn.Parameter)):
        return None
    if codes.dtype != torch.int8 or (not one and weight.args[3] != axis):
        return None
    if (gains := _gains(module, codes, axis or None)) is None:
        return None
    gain, codes, scale, shift = gains
    name = str(parts[0].target)
    register(gm, name, codes)
    if one:
        _per_channel(gm, weight, axis, weight_scale.float() * gain)
    else:
        register(gm, str(parts[1].target), weight_scale * gain)
    bias = shift if held is None else held.detach() * scale + shift
    owner = name.rpartition(".")[0]
    name = str(given.target) if isinstance(given, Node) else f"{owner}.bias" if owner else "bias"
    if given is None or _reads(gm, held) > 1:
        name = graphs.free_name(gm, name)
    place, _, last = name.rpartition(".")
    like = graphs.value(call)
    held = nn.Parameter(bias.to(like.dtype))
    gm.get_submodule(place)._parameters[last] = held
    with gm.graph.inserting_before(call):
        made = gm.graph.get_attr(name)
    made.meta |= {key: call.meta[key] for key in _SOURCE if key in call.meta}
    made.meta["val"] = like.fake_mode.from_tensor(held, static_shapes=True)
    call.args = (*call.args[:2], made, *call.args[3:])
    return owner


def _per_channel(gm: GraphModule, weight: Any, axis: int, scale: torch.Tensor) -> None:
    """A scale for each channel in the place of the one of a dequantise node."""
    writer = Writer(gm, quantized_decomposed())
    codes, grid = weight.args[0], []
    with gm.graph.inserting_before(weight):
        for part, value in (("scale", scale), ("zero_point", torch.zeros_like(scale).long())):
            name = graphs.free_name(gm, f"{codes.target}_{part}")
            register(gm, name, value)
            grid.append(writer.attribute(name, value))
        dequantize = writer.ops.dequantize_per_channel.default
        made = writer.call(
            dequantize, codes, *grid, axis, *weight.args[3:], of=weight, **weight.kwargs
        )
    made.meta |= {key: value for key, value in weight.meta.items() if key != "from_node"}
    weight.replace_all_uses_with(made)
    gm.graph.erase_node(weight)
