"""BatchNorms of a graph, folded into the convolution or linear layer before each.

A fold is right only if every call of the layer goes into that BatchNorm, and nowhere else. What is
not folded stays as it is, and `summary` has the reason.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.functional import batch_norm
from qnn.nn.values import why_not_finite
from qnn.pt2e import graph as graphs
from qnn.pt2e.layers import Call, read

aten = torch.ops.aten
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold_nodes(root: GraphModule) -> dict[str, str]:
    """Fold the `aten.batch_norm` of an exported graph; by the name of each layer that took one, the
    name of the BatchNorm. Those that stay have their reason in `meta["qnn_reason"]`.
    """
    norms = [n for n in root.graph.nodes if n.target is aten.batch_norm.default]
    groups: dict[tuple[int, ...], list[Node]] = {}
    for norm in norms:
        source = norm.args[0]
        call = read(root, source) if isinstance(source, Node) else None
        if not isinstance(call, Call) or not isinstance(call.layer, (*_LAYERS, *_TRANSPOSED)):
            norm.meta["qnn_reason"] = "not folded: no convolution or linear layer is before it"
            continue
        groups.setdefault((id(call.layer._parameters["weight"]),), []).append(norm)
    folded: dict[str, str] = {}
    for members in groups.values():
        reason = _why_not(root, members)
        if reason is None:
            layer, name = _fold(root, members)
            folded[layer] = name
        else:
            for norm in members:
                norm.meta["qnn_reason"] = f"not folded: {reason}"
    if folded:
        _erase_unused(root)
        root.recompile()
    return folded


def _why_not(root: GraphModule, norms: list[Node]) -> str | None:
    """Why these BatchNorms, all after calls with one weight, cannot go into it."""
    calls = [norm.args[0] for norm in norms]
    weight = _layer(root, calls[0]).weight
    readers = {
        user
        for node in root.graph.find_nodes(op="get_attr")
        if graphs.held(root, node) is weight
        for user in node.users
    }
    if len(readers) != len(set(calls)):
        others = ", ".join(sorted(user.name for user in readers - set(calls)))
        return f"the layer's weight is also read by {others}, without this BatchNorm"
    for norm, call in zip(norms, calls, strict=True):
        if len(call.users) > 1:
            others = ", ".join(sorted(u.name for u in call.users if u is not norm))
            return f"the layer's result is also read by {others}"
        if norm.args[1:5] != norms[0].args[1:5] or norm.args[7] != norms[0].args[7]:
            return "the layer's calls go into several BatchNorms"
        if norm.args[3] is None:
            return "it has no running statistics, and so normalises by each batch's own"
        axes = 0 if isinstance(_layer(root, call), nn.Linear) else weight.dim() - 2
        if graphs.value(norm).dim() != axes + 2:
            return "it normalises an axis that is not that of the layer's outputs"
    if _position_of_bias(calls[0]) is None:
        return f"{calls[0].target} takes no bias"
    folded = _folded_node(root, calls[0], norms[0])
    if any(why_not_finite(tensor) for tensor in folded):
        return f"the folded weight would not be finite in {weight.dtype}"
    return None


def _layer(root: GraphModule, node: Any) -> Any:
    """The layer that a node calls, of those that are one."""
    return cast(Call, read(root, node)).layer


def _folded_node(root: GraphModule, call: Node, norm: Node) -> tuple[torch.Tensor, torch.Tensor]:
    return folded(_layer(root, call), _layer(root, norm))


@torch.no_grad()
def folded(layer: nn.Module, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias of a layer with a BatchNorm in them."""
    of, it = cast(Any, layer), cast(Any, norm)
    scale, shift = batch_norm.scale_and_shift(
        it.running_mean, it.running_var, it.weight, it.bias, it.eps
    )
    groups = of.groups if isinstance(layer, _TRANSPOSED) else None
    bias = None if of.bias is None else of.bias.detach()
    return batch_norm.fold(of.weight.detach(), bias, scale, shift, transposed_groups=groups)


def _fold(root: GraphModule, norms: list[Node]) -> tuple[str, str]:
    """Fold, and name the layer and the BatchNorm."""
    first, mean = cast(Node, norms[0].args[0]), cast(Node, norms[0].args[3])
    found = cast(Call, read(root, first))
    weight, bias = _folded_node(root, first, norms[0])
    trained = cast(Any, found.layer).weight.requires_grad
    target = str(found.tensors["weight"].target)
    owner = target.rpartition(".")[0]
    _set(root, target, nn.Parameter(weight, requires_grad=trained))
    name = f"{owner}.bias" if owner else "bias"
    if "bias" in found.tensors:
        name = str(found.tensors["bias"].target)
    elif target.rpartition(".")[2] != "weight":
        name = graphs.free_name(root, f"{target}_bias")
    _set(root, name, nn.Parameter(bias, requires_grad=trained))
    with root.graph.inserting_before(next(iter(root.graph.nodes))):
        attribute = root.graph.get_attr(name)
    mode = graphs.value(first).fake_mode
    attribute.meta["val"] = mode.from_tensor(graphs.held(root, attribute), static_shapes=True)
    at = cast(int, _position_of_bias(first))
    for norm in norms:
        call = cast(Node, norm.args[0])
        args = list(call.args)
        args += [None] * (at + 1 - len(args))
        args[at] = attribute
        call.args = tuple(args)
        call.kwargs = {key: value for key, value in call.kwargs.items() if key != "bias"}
        norm.replace_all_uses_with(call)
        root.graph.erase_node(norm)
    return owner or target, str(mean.target).rpartition(".")[0]


def _position_of_bias(call: Any) -> int | None:
    names = [argument.name for argument in call.target._schema.arguments]
    return names.index("bias") if "bias" in names else None


def _set(root: GraphModule, target: str, parameter: nn.Parameter) -> None:
    owner, _, name = target.rpartition(".")
    module = root.get_submodule(owner)
    module._parameters[name] = parameter


def _erase_unused(root: GraphModule) -> None:
    graph = root.graph
    gone: set[str] = set()
    for node in reversed(list(graph.nodes)):
        counts = node.target is aten.add_.Tensor and str(node.args[0].target).endswith(  # type: ignore[union-attr]
            "num_batches_tracked"
        )
        if (counts or node.op == "get_attr") and not node.users:
            if node.op == "get_attr":
                gone.add(str(node.target))
            graph.erase_node(node)
    still = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for target in gone - still:
        owner, _, name = target.rpartition(".")
        module = root.get_submodule(owner)
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)


def fold_modules(root: GraphModule) -> dict[str, str]:
    """Fold the BatchNorm modules that were trained after convolution and linear layers of a lifted
    graph; by the name of each layer that took one, the name of the BatchNorm.

    Before, the layer trains `bn(conv(x, fq(w)))`. With a scale per channel `fq(s · w)` is
    `s · fq(w)`, up to the rounding of the scales, so what is folded here has the codes that were
    trained: there is no division, and gamma = 0 does no harm.
    """
    graph, done = root.graph, dict[str, str]()
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for name, norms in list(calls.items()):
        norm = root.get_submodule(name)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
            continue
        sources = {each.args[0] for each in norms}
        targets = {str(each.target) for each in sources if getattr(each, "op", "") == "call_module"}
        if len(targets) != 1 or any(getattr(each, "op", "") != "call_module" for each in sources):
            continue
        (target,) = targets
        layer: Any = root.get_submodule(target)
        rank = graphs.value(norms[0]).dim()
        if (
            not isinstance(layer, (*_LAYERS, *_TRANSPOSED))
            or set(calls[target]) != sources
            or any(len(each.users) > 1 for each in sources)  # type: ignore[union-attr]
            or rank != (2 if isinstance(layer, nn.Linear) else layer.weight.dim())
        ):
            continue
        weight, bias = folded(layer, norm)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        for each in norms:
            each.replace_all_uses_with(each.args[0])  # type: ignore[arg-type]
            graph.erase_node(each)
        root.delete_submodule(name)
        done[target] = name
    if done:
        root.recompile()
    return done
