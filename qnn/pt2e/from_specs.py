"""Layers of qnn's in the place of linear and convolution nodes, whose observers together are a
scheme.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.kernels.torch_private import quantized_decomposed
from qnn.nn.conv import quantized as convs
from qnn.nn.conv.geometry import why_not_conv
from qnn.nn.linear.quantized import QLinear
from qnn.nn.values import frozen
from qnn.pt2e import graph as graphs
from qnn.pt2e.constants import (
    attribute,
    erase_unread,
    erase_with_inputs,
    forget,
    names_of,
    root_of,
    writes,
)
from qnn.pt2e.observers import PER_CHANNEL, SYMMETRIC, is_observer, range_of, underlying
from qnn.pt2e.qdq import drop_observers, observers_in, require_observed, run_on_constants
from qnn.pt2e.specs import WHY_LEFT, specs_on

_aten = torch.ops.aten
_LAYERS: dict[Any, type[nn.Module]] = {_aten.linear.default: QLinear}
for _axes, _plain, _transposed in (
    (1, convs.QConv1d, convs.QConvTranspose1d),
    (2, convs.QConv2d, convs.QConvTranspose2d),
    (3, convs.QConv3d, convs.QConvTranspose3d),
):
    for _overload in ("default", "padding"):
        _LAYERS[getattr(getattr(_aten, f"conv{_axes}d"), _overload)] = _plain
    _packet = getattr(_aten, f"conv_transpose{_axes}d")
    _LAYERS[getattr(_packet, "default" if _axes == 1 else "input")] = _transposed

_WHOLE = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-32767, 32767)}


class _LeftError(Exception):
    """Why a node does not become a layer."""


@dataclass(eq=False)
class _Plan:
    """What a node becomes."""

    node: Node
    kind: type[nn.Module]
    scheme: str
    x: Node  # what the layer reads
    grid: Any  # the observer of x, or None
    weight: Node
    observer: Any  # of the weight
    parameter: torch.Tensor
    bias: Node | None
    arguments: dict[str, Any]


def layers_of_specs(gm: GraphModule, *, strict: bool = True) -> GraphModule:
    """Put quantised layers in the place of the linear and convolution nodes of `gm` that are
    annotated as a scheme; returns `gm`.

    With a symmetric int8 weight, per channel of the output or per tensor:

    - an input on a static grid of all of uint8 or int8 makes a layer of `int8_static`, on one of
      ±32767 in int16 a linear layer of `int16_static`;
    - an input that is not observed makes one of `int8_weight`.

    Codes, scales and zero points are those of the observers, the same that `write_qdq` gives. A
    layer stands where the weight's module is, under its name. All other nodes stay, and have the
    reason in `node.meta`, under `WHY_LEFT`: so with a dynamic scale per tensor, since the scheme
    `int8` has a scale for each token.

    Raises:
        ValueError: with `strict`, observers that saw nothing, by name.
    """
    erase_unread(gm)
    run_on_constants(gm)
    if strict:
        require_observed(gm)
    observers = observers_in(gm).keys()
    plans: dict[Node, _Plan] = {}
    reader = _Reader(gm)
    for node in gm.graph.nodes:
        if specs_on(node) is None or node.target not in _LAYERS:
            continue
        try:
            plans[node] = reader.plan(node)
        except _LeftError as reason:
            node.meta[WHY_LEFT] = str(reason)
    _leave_float_weights(gm, plans)
    builder = _Builder(gm)
    places = {plan: builder.place(plan) for plan in plans.values()}
    for plan, place in places.items():
        builder.put(plan, place)
    builder.tidy(plans.values(), observers)
    gm.graph.lint()
    gm.recompile()
    return gm


class _Reader:
    """Reads what the observers around a node say."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._at = {node: at for at, node in enumerate(gm.graph.nodes)}
        self._writes = writes(gm.graph)

    def _observer(self, node: Any) -> Any:
        if not isinstance(node, Node) or node.op != "call_module":
            return None
        module = attribute(self._gm, str(node.target))
        return module if is_observer(module) else None

    def plan(self, node: Node) -> _Plan:
        given = {a.name: a.default_value for a in node.target._schema.arguments}  # type: ignore[union-attr]
        given |= dict(zip(given, node.args, strict=False)) | node.kwargs
        x, weight, bias = (given.pop(name) for name in ("input", "weight", "bias"))
        observer = self._observer(weight)
        if observer is None:
            raise _LeftError("its weight is not annotated")
        source = weight.args[0]
        parameter = attribute(self._gm, str(source.target)) if source.op == "get_attr" else None
        if not isinstance(parameter, torch.Tensor):
            raise _LeftError("its weight is computed in the graph")
        if bias is not None and not isinstance(self._plain(bias), nn.Parameter):
            raise _LeftError("its bias is computed in the graph")
        kind = _LAYERS[node.target]
        _check_weight(observer, axis=1 if _is_transposed(kind) else 0)
        grid, scheme, read = self._observer(x), "int8_weight", x
        if grid is not None:
            read = x.args[0]
            grid = None if _is_float(grid) else grid
        if grid is not None:
            scheme = _scheme_of_input(grid)
        for root in {root_of(read), root_of(x)}:
            if any(self._at[x] < self._at[w] < self._at[node] for w in self._writes.get(root, ())):
                raise _LeftError("its input is written to before it is read")
        arguments = _arguments(kind, parameter, given)
        if (reason := _why_not(kind, scheme, arguments)) is not None:
            raise _LeftError(reason)
        return _Plan(node, kind, scheme, read, grid, weight, observer, parameter, bias, arguments)

    def _plain(self, node: Node) -> Any:
        if self._observer(node) is not None:
            node = node.args[0]  # type: ignore[assignment]
        return attribute(self._gm, str(node.target)) if node.op == "get_attr" else None


def _is_transposed(kind: type[nn.Module]) -> bool:
    return issubclass(kind, convs.QConvTranspose)


def _is_float(observer: Any) -> bool:
    dynamic = getattr(observer, "is_dynamic", False)
    return not dynamic and getattr(observer, "dtype", None) == torch.float32


def _check_weight(observer: Any, axis: int) -> None:
    """Raise unless the weight is symmetric int8, per channel of the output or per tensor."""
    if callable(getattr(observer, "convert", None)):
        raise _LeftError("the observer of its weight writes nodes of its own")
    if underlying(observer.dtype) != torch.int8 or getattr(observer, "is_dynamic", False):
        raise _LeftError(f"its weight is annotated as {observer.dtype}, and the schemes have int8")
    if observer.qscheme not in SYMMETRIC:
        raise _LeftError(f"its weight is {observer.qscheme}, and the schemes have no zero points")
    if observer.qscheme in PER_CHANNEL and int(observer.ch_axis) != axis:
        raise _LeftError(f"the scales of its weight lie along axis {observer.ch_axis}, not {axis}")
    if bool(observer.calculate_qparams()[1].any()):
        raise _LeftError("its weight has a zero point")


def _scheme_of_input(observer: Any) -> str:
    if callable(getattr(observer, "convert", None)):
        raise _LeftError("the observer of its input writes nodes of its own")
    dtype = underlying(observer.dtype)
    if getattr(observer, "is_dynamic", False):
        raise _LeftError(
            "its input has a dynamic scale for the whole tensor, and the scheme int8 one for each "
            "token (each sample of a convolution): it stays as annotated"
        )
    if observer.qscheme in PER_CHANNEL:
        raise _LeftError("its input is annotated per channel")
    if dtype not in _WHOLE:
        raise _LeftError(f"its input is annotated as {observer.dtype}; no scheme has that")
    if range_of(observer) != _WHOLE[dtype]:
        least, most = _WHOLE[dtype]
        raise _LeftError(f"the range of its input is {range_of(observer)}, not {least} … {most}")
    if dtype == torch.int16 and int(observer.calculate_qparams()[1]):
        raise _LeftError("its input of 16 bits has a zero point")
    return "int16_static" if dtype == torch.int16 else "int8_static"


def _arguments(
    kind: type[nn.Module], weight: torch.Tensor, given: dict[str, Any]
) -> dict[str, Any]:
    """The constructor's arguments, from a weight and the literals of a node."""
    if kind is QLinear:
        return {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    rows, columns, *kernel = weight.shape
    groups = given["groups"]
    sizes = (rows, columns * groups) if _is_transposed(kind) else (columns * groups, rows)
    named = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in given.items()}
    return {
        "in_channels": sizes[0], "out_channels": sizes[1], "kernel_size": tuple(kernel), **named,
    }  # fmt: skip


def _why_not(kind: type[nn.Module], scheme: str, arguments: dict[str, Any]) -> str | None:
    if kind is not QLinear:
        float_kind: Any = next(base for base in kind.__mro__ if base.__module__.startswith("torch"))
        return why_not_conv(scheme, float_kind(**arguments, bias=False, device="meta"))
    try:
        QLinear(**arguments, bias=False, device="meta", scheme=scheme)
    except ValueError as error:
        return str(error)
    return None


def _leave_float_weights(gm: GraphModule, plans: dict[Node, _Plan]) -> None:
    """Drop the plans for weights that something else reads."""
    gets = [node for node in gm.graph.nodes if node.op == "get_attr"]
    known = {node: attribute(gm, str(node.target)) for node in gets}
    for plan in list(plans.values()):
        held = [node for node, value in known.items() if value is plan.parameter]
        readers = [reader for node in held for reader in node.users]
        taken = {each.weight for each in plans.values() if each.parameter is plan.parameter}
        others = [reader for reader in readers if reader not in taken]
        others += [user for each in taken for user in each.users if user not in plans]
        if others:
            plan.node.meta[WHY_LEFT] = f"its weight is also read by {others[0]}"
            for each in [p for p in plans.values() if p.parameter is plan.parameter]:
                each.node.meta[WHY_LEFT] = plan.node.meta[WHY_LEFT]
                del plans[each.node]


class _Builder:
    """Puts layers into a graph."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._layers: dict[Any, str] = {}
        self._stored: dict[Any, nn.Module] = {}
        self._calls: dict[Node, Node] = {}  # by the node: what stands in its place

    def put(self, plan: _Plan, place: str) -> None:
        """A layer in the place of a node, under a name."""
        alike = (id(plan.parameter), plan.observer, plan.bias, plan.grid, str(plan.arguments))
        if (alike, place) not in self._layers:
            self._layers[alike, place] = self._register(self._layer(plan), place)
        name = self._layers[alike, place]
        with self._gm.graph.inserting_before(plan.node):
            call = self._gm.graph.call_module(name, (self._calls.get(plan.x, plan.x),))
        call.meta = dict(plan.node.meta)
        self._calls[plan.node] = call
        plan.node.replace_all_uses_with(call)
        erase_with_inputs(self._gm, plan.node)

    def place(self, plan: _Plan) -> str:
        """The path of the module that has the weight; of a function's weight the node's name."""
        inside, _ = [("", ""), *graphs.path(plan.node)][-1]
        names = names_of(self._gm, plan.parameter)
        paths = [name.rpartition(".")[0] for name in names if name.endswith(".weight")]
        path = inside if inside in paths else (paths or [""])[0]
        if not path:
            return plan.node.name
        owner = attribute(self._gm, path)
        own = {name for name, each in owner.named_children() if not is_observer(each)}
        if own or not {*owner._parameters, *owner._buffers} <= {"weight", "bias"}:
            return f"{path}.{plan.node.name}"
        return path

    def _register(self, layer: nn.Module, place: str) -> str:
        there = attribute(self._gm, place)
        if place in self._layers.values() or (there is not None and type(there) is not nn.Module):
            place = graphs.free_name(self._gm, place)
            there = None
        for name, each in there.named_children() if there is not None else ():
            layer.add_module(name, each)  # observers that other places share
        graphs.put(self._gm, place, layer)
        return place

    def _layer(self, plan: _Plan) -> nn.Module:
        made: Any = plan.kind
        dtype = plan.parameter.dtype
        layer = made(**plan.arguments, bias=False, device="meta", dtype=dtype, scheme=plan.scheme)
        bias = self._bias(plan)
        state = self._weight(plan)
        if plan.grid is not None:
            scale, zero = plan.grid.calculate_qparams()
            state["input_scale"] = scale.detach().float().reshape(1)
            if plan.scheme == "int8_static":
                shift = 128 if underlying(plan.grid.dtype) == torch.uint8 else 0
                state["input_zero_point"] = (zero.detach().reshape(1) - shift).to(torch.int8)
        layer.load_state_dict(state, assign=True)
        stored = self._stored.setdefault((id(plan.parameter), plan.observer), layer)
        if stored is not layer:
            for name in ("weight", "weight_scale"):
                layer._parameters[name] = stored._parameters[name]
        layer.bias = bias
        layer.train(self._gm.training)
        return layer  # type: ignore[no-any-return]

    def _weight(self, plan: _Plan) -> dict[str, torch.Tensor]:
        """Codes and scales, as the nodes of `write_qdq` have them."""
        ops, observer = quantized_decomposed(), plan.observer
        weight = plan.parameter.detach()
        scale, zero = observer.calculate_qparams()
        rest = (*range_of(observer), torch.int8)
        if observer.qscheme in PER_CHANNEL:
            axis = int(observer.ch_axis)
            codes = ops.quantize_per_channel(weight, scale, zero, axis, *rest)
        else:
            codes = ops.quantize_per_tensor(weight, float(scale), int(zero), *rest)
        rows = plan.arguments.get("out_features") or plan.arguments["out_channels"]
        scale = scale.detach().float().reshape(-1)
        scale = scale.repeat(rows // scale.numel())  # of a transposed layer, for each group
        return {"weight": codes, "weight_scale": scale.reshape(rows, *[1] * (weight.dim() - 1))}

    def _bias(self, plan: _Plan) -> nn.Parameter | None:
        """The bias itself, or the values that its integers stand for."""
        if plan.bias is None:
            return None
        source: Any = plan.bias
        if source.op == "get_attr":
            found: nn.Parameter = attribute(self._gm, str(source.target))
            return found
        observer = attribute(self._gm, str(source.target))
        value: nn.Parameter = attribute(self._gm, str(source.args[0].target))
        if _is_float(observer):
            return value
        scale, zero = observer.calculate_qparams()
        ops, rest = quantized_decomposed(), (*range_of(observer), underlying(observer.dtype))
        if observer.qscheme in PER_CHANNEL:
            grid: tuple[Any, ...] = (scale, zero, int(observer.ch_axis), *rest)
            q = ops.quantize_per_channel(value.detach(), *grid)
            return frozen(ops.dequantize_per_channel(q, *grid).to(value.dtype))
        grid = (float(scale), int(zero), *rest)
        q = ops.quantize_per_tensor(value.detach(), *grid)
        return frozen(ops.dequantize_per_tensor(q, *grid).to(value.dtype))

    def tidy(self, plans: Iterable[_Plan], observers: Set[str]) -> None:
        """Drop the float weights of the layers, under all their names, and what observed them."""
        for plan in plans:
            for name in names_of(self._gm, plan.parameter):
                forget(self._gm, name)
        drop_observers(self._gm, observers - observers_in(self._gm).keys())
