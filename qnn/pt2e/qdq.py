"""Quantise and dequantise nodes in the place of observers: `torch.ops.quantized_decomposed`, as
torchao writes them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.traceback import NodeSource, NodeSourceAction

from qnn.calibration.fake_quantize import FakeQuantize
from qnn.kernels.torch_private import quantized_decomposed
from qnn.pt2e.constants import (
    Constants,
    attribute,
    erase_unread,
    erase_with_inputs,
    forget,
    names_of,
    register,
    schema_of,
    writes,
)
from qnn.pt2e.graph import free_name
from qnn.pt2e.insert import INSERTED
from qnn.pt2e.observers import (
    FLOAT8,
    INTEGERS,
    PER_CHANNEL,
    SYMMETRIC,
    WeightPoint,
    is_observer,
    range_of,
    saw_nothing,
    underlying,
)
from qnn.pt2e.specs import is_valid_annotation, specs_on

_POINT = "qnn_observer"  # of a quantise node: the name of the observer that it was
_QUANTIZE = ("quantized_decomposed::quantize", "torchao::quantize_affine")
_DEQUANTIZE = ("quantized_decomposed::dequantize", "torchao::dequantize_affine")
_CHOOSE = ("quantized_decomposed::choose_qparams", "torchao::choose_qparams_affine")
_TAGS = ("nn_module_stack", "stack_trace", "quantization_tag")
# Between a weight and its quantise node, what takes the weight's metadata with it.
_VIEWS = (
    "flatten",
    "permute",
    "slice",
    "squeeze",
    "t",
    "transpose",
    "unsqueeze",
    "view",
    "reshape",
)


def write_qdq(
    gm: GraphModule, *, fold_quantize: bool = True, cancel: bool = False, strict: bool = True
) -> GraphModule:
    """Put quantise and dequantise nodes in the place of the observers of `gm`; returns `gm`.

    Per-tensor scales and zero points are literals of the nodes, per-channel ones buffers beside the
    weight (`c1.weight_scale`), dynamic ones are chosen in the graph. A dequantised tensor has the
    dtype that it had. An observer with a method `convert(gm, node)` writes its own nodes.

    Each annotated reader of a dequantised tensor has a dequantise node of its own, unless it is
    dynamic.

    Args:
        gm: what `insert_observers` returned, calibrated or trained.
        fold_quantize: hold the integers of weights, under the names of the weights, in the place of
            the floats; a weight that something reads in float stays, and its integers are beside it
            under `<name>_codes`.
        cancel: leave out a quantise node that has the same grid as the dequantise node before it.
        strict: an observer that saw nothing is an error; else it is as its library says.

    Raises:
        ValueError: observers that saw nothing, by name; a dtype that no node can hold; a flag that
            is not a bool.
    """
    for name, flag in (("fold_quantize", fold_quantize), ("cancel", cancel), ("strict", strict)):
        if not isinstance(flag, bool):
            raise ValueError(f"qnn.pt2e: {name} must be True or False, got {flag!r}.")
    ops = quantized_decomposed()
    erase_unread(gm)
    run_on_constants(gm)
    if strict:
        require_observed(gm)
    writer = Writer(gm, ops)
    observers = observers_in(gm)
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and node.target in observers:
            writer.replace(node)
    drop_observers(gm, [*observers, *gm.meta.pop(INSERTED, ())])
    _erase_unread(gm)
    if cancel:
        cancel_pairs(gm)
    _one_for_each_reader(gm)
    _port_metadata(gm)
    if fold_quantize:
        _fold(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def observers_in(gm: GraphModule) -> dict[str, nn.Module]:
    """The observers that the graph calls, by name."""
    called = [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]
    found = {name: attribute(gm, name) for name in called}
    return {name: module for name, module in found.items() if is_observer(module)}


@torch.no_grad()
def run_on_constants(gm: GraphModule) -> None:
    """Show weights to their observers: to those that saw nothing yet, as of a dynamic or
    weight-only layer, and the weights as they now are to qnn's own.
    """
    constants = Constants(gm)
    for node in gm.graph.nodes:
        if node.op != "call_module" or not node.all_input_nodes:
            continue
        observer = attribute(gm, str(node.target))
        if not is_observer(observer) or (value := constants.value(node)) is None:
            continue
        own = isinstance(observer, WeightPoint)
        own = own or (isinstance(observer, FakeQuantize) and observer.observing)
        if own and all(
            call.op != "call_module" or call.target != node.target or constants.value(call) is value
            for call in gm.graph.nodes
        ):
            observer.observer.reset()
            observer.observer.observe(value)
            observer.refresh(anew=True)
        elif saw_nothing(observer):
            observer(value)


def require_observed(gm: GraphModule) -> None:
    """Raise a ValueError that names the observers which saw nothing."""
    missing = [name for name, observer in observers_in(gm).items() if saw_nothing(observer)]
    if missing:
        raise ValueError(
            f"qnn.pt2e: {len(missing)} of {len(observers_in(gm))} observers saw nothing: "
            f"{', '.join(missing)}. Run the prepared model on calibration data, or pass "
            "strict=False."
        )


class Writer:
    """Writes nodes with their metadata."""

    def __init__(self, gm: GraphModule, ops: Any) -> None:
        self._gm, self.ops = gm, ops
        values = (node.meta.get("val") for node in gm.graph.nodes)
        modes = (getattr(value, "fake_mode", None) for value in values)
        self._mode = next((mode for mode in modes if mode is not None), None)
        self._buffers: dict[tuple[str, str], str] = {}

    def call(self, target: Any, *args: Any, of: Node, **kwargs: Any) -> Node:
        """A node in the place of the observer `of`."""
        made = self._gm.graph.call_function(target, args, kwargs)
        source = NodeSource(of, "qnn.pt2e.write_qdq", [NodeSourceAction.CREATE])
        made.meta["from_node"] = [source]
        inputs = made.all_input_nodes
        if self._mode is not None and all("val" in node.meta for node in inputs):
            given, named = torch.fx.map_arg((args, kwargs), lambda node: node.meta["val"])
            with self._mode:
                made.meta["val"] = target(*given, **named)
        return made

    def buffer(self, node: Node, name: str, value: torch.Tensor) -> Node:
        """A scale or zero point per channel, one buffer for an observer."""
        point = str(node.target)
        if (point, name) not in self._buffers:
            target = free_name(self._gm, f"{_place(point)}_{name}")
            register(self._gm, target, value.detach().clone())
            self._buffers[point, name] = target
        return self.attribute(self._buffers[point, name], value)

    def attribute(self, target: str, value: torch.Tensor) -> Node:
        """A tensor that the module has, or will have, under this name."""
        made = self._gm.graph.create_node("get_attr", target)
        if self._mode is not None:
            made.meta["val"] = self._mode.from_tensor(value.detach(), static_shapes=True)
        return made

    def replace(self, node: Node) -> None:
        """Quantise and dequantise where `node` observes."""
        observer = attribute(self._gm, str(node.target))
        before = set(self._gm.graph.nodes)
        if callable(convert := getattr(observer, "convert", None)):
            convert(self._gm, node)
            for made in self._gm.graph.nodes:
                if made not in before:
                    self._complete(made, node)
            return
        dtype = underlying(observer.dtype)
        source = cast(Node, node.args[0])
        with self._gm.graph.inserting_before(node):
            if getattr(observer, "is_dynamic", False):
                read = self._dynamic(node, observer, source, dtype)
            elif dtype in (*INTEGERS, *FLOAT8):
                read = self._static(node, observer, source, dtype)
            elif dtype == torch.float16:
                cast_to = self.ops.convert_element_type.no_fuse
                half = self.call(cast_to, source, torch.float16, of=node)
                read = self.call(cast_to, half, _dtype(source), of=node)
            elif dtype == torch.float32:
                read = source
            else:
                able = ", ".join(map(str, (*INTEGERS, *FLOAT8, torch.float16, torch.float32)))
                raise ValueError(
                    f"qnn.pt2e: the observer {node.target} is for {observer.dtype}; nodes can be "
                    f"written for {able}."
                )
        node.replace_all_uses_with(read)
        self._gm.graph.erase_node(node)

    def _static(self, node: Node, observer: Any, source: Node, dtype: torch.dtype) -> Node:
        scale, zero = observer.calculate_qparams()
        rest = (*range_of(observer), dtype)
        if observer.qscheme in PER_CHANNEL:
            grid = (self.buffer(node, "scale", scale), self.buffer(node, "zero_point", zero))
            return self.pair(
                node, source, "per_channel", "default", (*grid, int(observer.ch_axis), *rest)
            )
        return self.pair(node, source, "per_tensor", "default", (float(scale), int(zero), *rest))

    def _dynamic(self, node: Node, observer: Any, source: Node, dtype: torch.dtype) -> Node:
        qscheme = getattr(observer, "qscheme", None) or torch.per_tensor_affine
        if dtype not in (torch.int8, torch.uint8) or qscheme in PER_CHANNEL:
            raise ValueError(
                f"qnn.pt2e: the observer {node.target} is dynamic, for {observer.dtype} and "
                f"{qscheme}; a scale is chosen in the graph for int8 and uint8, per-tensor."
            )
        symmetric = qscheme in SYMMETRIC
        choose = self.ops.choose_qparams_symmetric if symmetric else self.ops.choose_qparams
        eps = float(getattr(observer, "eps", torch.finfo(torch.float32).eps))
        qmin, qmax = range_of(observer)
        both = self.call(choose.tensor, source, qmin, qmax, eps, dtype, of=node)
        grid = [self.call(operator.getitem, both, at, of=node) for at in range(2)]
        return self.pair(node, source, "per_tensor", "tensor", (*grid, qmin, qmax, dtype))

    def pair(self, node: Node, x: Node, kind: str, overload: str, grid: tuple[Any, ...]) -> Node:
        """Quantise and dequantise `x`, as it was, with the ops of a kind."""
        quantize, dequantize = (
            getattr(getattr(self.ops, f"{name}_{kind}"), overload)
            for name in ("quantize", "dequantize")
        )
        q = self.call(quantize, x, *grid, of=node)
        q.meta[_POINT] = str(node.target)
        was = _dtype(x)
        as_it_was = {} if was == torch.float32 else {"out_dtype": was}
        return self.call(dequantize, q, *grid, of=node, **as_it_was)

    def per_token(self, node: Node, x: Node) -> Node:
        """Quantise and dequantise `x` with a scale for each of its rows, found in the graph."""
        both = self.call(self.ops.choose_qparams_per_token.default, x, torch.int8, of=node)
        grid = [self.call(operator.getitem, both, at, of=node) for at in range(2)]
        rest = (*grid, -127, 127, torch.int8)
        q = self.call(self.ops.quantize_per_token.default, x, *rest, of=node)
        return self.call(self.ops.dequantize_per_token.default, q, *rest, _dtype(x), of=node)

    def _complete(self, made: Node, node: Node) -> None:
        """Metadata of a node that an observer has written."""
        made.meta.setdefault(
            "from_node", [NodeSource(node, "qnn.pt2e.write_qdq", [NodeSourceAction.CREATE])]
        )
        if "val" in made.meta or self._mode is None:
            return
        if made.op == "get_attr":
            held = attribute(self._gm, str(made.target))
            if isinstance(held, torch.Tensor):
                made.meta["val"] = self._mode.from_tensor(held.detach(), static_shapes=True)
        elif made.op == "call_function" and all("val" in n.meta for n in made.all_input_nodes):
            given, named = torch.fx.map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
            target: Any = made.target
            with self._mode:
                made.meta["val"] = target(*given, **named)


def _dtype(node: Node) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else torch.float32


def _place(observer: str) -> str:
    """The tensor that an observer is named after: `c1.weight` for `c1.weight_observer`."""
    head, _, number = observer.rpartition("_observer")
    return head + number if head else observer


def _calls(node: Any, names: tuple[str, ...]) -> bool:
    """Whether a node calls an op whose name begins so."""
    schema = schema_of(node) if isinstance(node, Node) else None
    return schema is not None and schema.name.startswith(names)


def drop_observers(gm: GraphModule, names: Iterable[str]) -> None:
    """Take the observers out of the module, and submodules that were made to hold them."""
    for name in names:
        if not is_observer(attribute(gm, name)):
            continue
        forget(gm, name)
        path = name.rpartition(".")[0]
        while path and type(at := attribute(gm, path)) is nn.Module and _is_empty(at):
            forget(gm, path)
            path = path.rpartition(".")[0]


def _is_empty(module: nn.Module) -> bool:
    return not (module._modules or module._parameters or module._buffers)


def _erase_unread(gm: GraphModule) -> None:
    """Erase quantise and dequantise nodes that nothing reads."""
    written = (*_QUANTIZE, *_DEQUANTIZE, *_CHOOSE)
    for node in reversed(gm.graph.nodes):
        if node.users:
            continue
        source = node.args[0] if node.args else None
        part = node.target is operator.getitem and _calls(source, _CHOOSE)
        if _calls(node, written) or part:
            gm.graph.erase_node(node)


def cancel_pairs(gm: GraphModule) -> None:
    """Leave out quantise nodes that have the grid of the dequantise node before them: of integers
    up to 16 bits the codes are the same.
    """
    for node in list(gm.graph.nodes):
        before: Any = node.args[0] if _calls(node, _QUANTIZE[:1]) else None
        if not _calls(before, _DEQUANTIZE[:1]) or node.args[1:] != before.args[1:]:
            continue
        if any(isinstance(each, Node) for each in node.args[1:]) or node.args[-1].itemsize > 2:
            continue
        node.replace_all_uses_with(before.args[0])
        gm.graph.erase_node(node)
    _erase_unread(gm)


def _is_dynamic(dequantize: Node) -> bool:
    scale = dequantize.args[1]
    chosen = isinstance(scale, Node) and scale.target is operator.getitem
    return chosen and _calls(cast(Node, scale).args[0], _CHOOSE)


def _readers(node: Node) -> list[Node]:
    """What reads the values of a node, and not its sizes alone."""
    return [user for user in node.users if not _calls(user, ("aten::sym_size",))]


def _one_for_each_reader(gm: GraphModule) -> None:
    """A dequantise node for each annotated reader, unless one of them writes to it."""
    written = writes(gm.graph)
    for node in list(gm.graph.nodes):
        if not _calls(node, _DEQUANTIZE[:1]) or _is_dynamic(node) or node in written:
            continue
        if len(readers := _readers(node)) < 2:
            continue
        for reader in readers:
            if is_valid_annotation(specs_on(reader)):
                with gm.graph.inserting_after(node):
                    own = gm.graph.node_copy(node)
                reader.replace_input_with(node, own)
    _erase_unread(gm)


def _port_metadata(gm: GraphModule) -> None:
    """Dequantise nodes have the metadata of what reads them, quantise nodes of what they quantise,
    where that is annotated; what is chosen dynamically belongs to its reader.
    """
    for node in gm.graph.nodes:
        if (annotation := specs_on(node)) is None:
            continue
        # By name: a copied graph's annotations still name the nodes that it was copied from.
        named = {
            source.name
            for source, spec in (annotation.input_qspec_map or {}).items()
            if spec is not None
        }
        for dequantize in node.all_input_nodes:
            if _calls(dequantize, _DEQUANTIZE) and _producer(dequantize).name in named:
                _port_input(dequantize, node)
        if annotation.output_qspec is not None:
            for reader in node.users:
                if _calls(reader, _QUANTIZE) and not _is_dynamic(reader):
                    _port(reader, node)


def _producer(node: Node) -> Node:
    """What was quantised and dequantised, once or several times."""
    while _calls(node, (*_QUANTIZE, *_DEQUANTIZE)):
        node = cast(Node, node.args[0])
    return node


def _port_input(dequantize: Node, node: Node) -> None:
    quantize = cast(Node, dequantize.args[0])
    _port(dequantize, node)
    if _is_dynamic(dequantize):
        _port(quantize, node)
        _port(cast(Any, dequantize.args[1]).args[0], node)
        return
    passed = [quantize]
    source = cast(Node, quantize.args[0]) if quantize.args else quantize
    while _is_view(source):
        passed.append(source)
        source = cast(Node, source.args[0])
    if source.op == "get_attr":
        for each in passed:
            _port(each, source)


def _is_view(node: Node) -> bool:
    schema = schema_of(node)
    return schema is not None and schema.name.removeprefix("aten::").removesuffix("_copy") in _VIEWS


def _port(to: Node, source: Node) -> None:
    to.meta.update({key: source.meta[key] for key in _TAGS if key in source.meta})


def _fold(gm: GraphModule) -> None:
    """Hold the codes of constants in the place of the floats."""
    constants = Constants(gm)
    folded: list[tuple[Node, Node | None, str, torch.Tensor]] = []
    for node in list(gm.graph.nodes):
        if not _calls(node, _QUANTIZE) or (codes := constants.value(node)) is None:
            continue
        source = node
        while source.op == "call_function" and isinstance(source.args[0], Node):
            source = source.args[0]
        wanted = _place(str(node.meta.get(_POINT, node.name)))
        leaf = source if source.op == "get_attr" else None
        with gm.graph.inserting_before(node):
            made = gm.graph.create_node("get_attr", wanted)  # named below
        made.meta.update((leaf or node).meta)
        made.meta.pop("tensor_meta", None)
        if "val" in node.meta:
            made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made)
        erase_with_inputs(gm, node)
        folded.append((made, leaf, wanted, codes))
    mine = {made for made, _, _, _ in folded}
    floats = {leaf: attribute(gm, str(leaf.target)) for _, leaf, _, _ in folded if leaf is not None}
    others = (node for node in gm.graph.nodes if node.op == "get_attr" and node not in mine)
    read = {id(attribute(gm, str(node.target))) for node in others}
    for made, leaf, wanted, codes in folded:
        held = None if leaf is None else floats[leaf]
        target = wanted if leaf is None else str(leaf.target)
        if held is not None and id(held) not in read:
            for name in names_of(gm, held):
                forget(gm, name)
                if name != target and codes.shape == held.shape:
                    register(gm, name, codes)  # tied: one weight, under all its names
        elif held is not None:
            target += "_codes"
        there = attribute(gm, target)
        alike = isinstance(there, torch.Tensor) and there.dtype == codes.dtype
        if not alike or not torch.equal(there, codes):
            target = free_name(gm, target)
            register(gm, target, codes)
        made.target = target
