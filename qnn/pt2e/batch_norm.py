"""BatchNorms of a graph, folded into the convolution or linear layer before each.

A fold is right only if every call of the layer goes into that BatchNorm, and nowhere else. One that
is not folded stays as it is, and `summary` has the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.functional import batch_norm
from qnn.nn.values import why_not_finite
from qnn.pt2e import graph as graphs
from qnn.pt2e.layers import Call, read

aten = torch.ops.aten
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)

# The module that a node calls.
Module = Callable[[Any], Any]


def fold_nodes(root: GraphModule) -> dict[str, str]:
    """Fold the `aten.batch_norm` of an exported graph; by the name of each layer that took one, the
    name of the BatchNorm. Those that stay have their reason in `meta["qnn_reason"]`.
    """

    def module(node: Any) -> Any:
        found = read(root, node) if isinstance(node, Node) else None
        return found.layer if isinstance(found, Call) else None

    def readers(call: Any, part: str) -> set[Any]:
        return _reading(root, getattr(module(call), part))

    groups: dict[int, list[Any]] = {}
    for norm in root.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        layer = module(norm.args[0])
        if isinstance(layer, _LAYERS) and _position_of_bias(norm.args[0]) is not None:
            groups.setdefault(id(layer.weight), []).append(norm)
        else:
            norm.meta["qnn_reason"] = "not folded: no convolution or linear layer is before it"
    folded: dict[str, str] = {}
    for norms in groups.values():
        if (reason := _why_not(norms, module, readers)) is not None:
            for norm in norms:
                norm.meta["qnn_reason"] = f"not folded: {reason}"
            continue
        layer, it = _fold_nodes(root, norms, module)
        folded[layer] = it
    if folded:
        _erase_unused(root)
        root.recompile()
    return folded


def fold_modules(root: GraphModule) -> dict[str, str]:
    """Fold the BatchNorm modules that were trained after layers of a lifted graph; by the name of
    each layer that took one, the name of the BatchNorm.

    Trained was `bn(conv(x, fq(w)))`. With a scale per channel `fq(s · w)` is `s · fq(w)`, up to the
    rounding of the scales, so what is folded here has the codes that were trained. Nothing is
    divided by s, and gamma = 0 does no harm.
    """
    graph, folded = root.graph, dict[str, str]()
    calls: dict[str, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)

    def module(node: Any) -> Any:
        is_call = isinstance(node, Node) and node.op == "call_module"
        return graphs.held(root, node) if is_call else None

    for name, norms in calls.items():
        if not isinstance(root.get_submodule(name), nn.modules.batchnorm._BatchNorm):
            continue
        if any(not isinstance(module(norm.args[0]), _LAYERS) for norm in norms):
            continue

        def readers(call: Any, part: str) -> set[Any]:
            held = getattr(module(call), part)
            inner = (_reading(graph, held) for graph in graphs.graphs(root))
            return set(calls[str(call.target)]).union(*inner)

        if _why_not(norms, module, readers) is not None:
            continue
        layer, trained = module(norms[0].args[0]), module(norms[0].args[0]).weight.requires_grad
        weight, bias = _folded(layer, module(norms[0]))
        layer.weight = nn.Parameter(weight, requires_grad=trained)
        layer.bias = nn.Parameter(bias, requires_grad=trained)
        folded[str(norms[0].args[0].target)] = name
        for norm in norms:
            norm.replace_all_uses_with(norm.args[0])
            graph.erase_node(norm)
        root.delete_submodule(name)
    if folded:
        root.recompile()
    return folded


def _reading(graph: GraphModule, tensor: torch.Tensor | None) -> set[Any]:
    """The nodes that read a tensor of the model."""
    reads = [node for node in graph.graph.nodes if node.op in ("get_attr", "placeholder")]
    held = [node for node in reads if tensor is not None and graphs.held(graph, node) is tensor]
    return {user for node in held for user in node.users}


def _why_not(
    norms: list[Any], module: Module, readers: Callable[[Any, str], set[Any]]
) -> str | None:
    """Why BatchNorms, each after a call of one layer, cannot go into that layer; `readers` are all
    that read its weight or bias.
    """
    calls = [norm.args[0] for norm in norms]
    for part in ("weight", "bias"):
        if others := readers(calls[0], part) - set(calls):
            names = ", ".join(sorted(map(str, others)))
            return f"the layer's {part} is also read by {names}, without this BatchNorm"
    first = module(norms[0])
    for norm, call in zip(norms, calls, strict=True):
        if others := set(call.users) - {norm}:
            return f"the layer's result is also read by {', '.join(sorted(map(str, others)))}"
        each, layer = module(norm), module(call)
        if each.running_mean is not first.running_mean or each.eps != first.eps:
            return "the layer's calls go into several BatchNorms"
        if each.running_mean is None:
            return "it has no running statistics, and so normalises by each batch's own"
        axes = 0 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2
        if graphs.value(norm).dim() != axes + 2:
            return "it normalises an axis that is not that of the layer's outputs"
    layer = module(calls[0])
    if any(why_not_finite(tensor) for tensor in _folded(layer, first)):
        return f"the folded weight would not be finite in {layer.weight.dtype}"
    return None


@torch.no_grad()
def _folded(layer: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias of a layer with a BatchNorm in them."""
    held = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    scale, shift = batch_norm.scale_and_shift(*held)
    groups = layer.groups if isinstance(layer, _TRANSPOSED) else None
    bias = None if layer.bias is None else layer.bias.detach()
    return batch_norm.fold(layer.weight.detach(), bias, scale, shift, transposed_groups=groups)


def _fold_nodes(root: GraphModule, norms: list[Any], module: Module) -> tuple[str, str]:
    """Fold, and name the layer and the BatchNorm."""
    calls = [norm.args[0] for norm in norms]
    found: Any = read(root, calls[0])
    trained = found.layer.weight.requires_grad
    weight, bias = _folded(found.layer, module(norms[0]))
    target = str(found.tensors["weight"].target)
    owner, _, last = target.rpartition(".")
    if "bias" in found.tensors:
        name = str(found.tensors["bias"].target)
    elif last == "weight":
        name = f"{owner}.bias" if owner else "bias"
    else:
        name = graphs.free_name(root, f"{target}_bias")
    for key, tensor in ((target, weight), (name, bias)):
        place, _, leaf = key.rpartition(".")
        root.get_submodule(place)._parameters[leaf] = nn.Parameter(tensor, requires_grad=trained)
    with root.graph.inserting_before(next(iter(root.graph.nodes))):
        attribute = root.graph.get_attr(name)
    mode = graphs.value(calls[0]).fake_mode
    attribute.meta["val"] = mode.from_tensor(graphs.held(root, attribute), static_shapes=True)
    at = _position_of_bias(calls[0])
    for norm, call in zip(norms, calls, strict=True):
        args = [*call.args, *[None] * (at + 1 - len(call.args))]  # type: ignore[operator]
        args[at] = attribute  # type: ignore[index]
        call.args = tuple(args)
        call.kwargs = {key: value for key, value in call.kwargs.items() if key != "bias"}
        norm.replace_all_uses_with(call)
    told = str(norms[0].args[3].target).rpartition(".")[0]
    for norm in norms:
        root.graph.erase_node(norm)
    return owner or target, told


def _position_of_bias(call: Any) -> int | None:
    names = [argument.name for argument in call.target._schema.arguments]
    return names.index("bias") if "bias" in names else None


def _erase_unused(root: GraphModule) -> None:
    """Erase the reads of what was folded, the counts of BatchNorms, and the tensors themselves."""
    graph, gone = root.graph, set[str]()
    for node in reversed(list(graph.nodes)):
        counts = node.target is aten.add_.Tensor and str(node.args[0].target).endswith(
            "num_batches_tracked"
        )
        if (counts or node.op == "get_attr") and not node.users:
            if node.op == "get_attr":
                gone.add(str(node.target))
            graph.erase_node(node)
    for target in gone - {str(node.target) for node in graph.find_nodes(op="get_attr")}:
        owner, _, name = target.rpartition(".")
        module = root.get_submodule(owner)
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)


__all__ = ["fold_modules", "fold_nodes"]
