"""Observers on the edges and outputs that annotations with specs name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.pt2e.constants import (
    Constants,
    attribute,
    destinations,
    root_of,
    writes,
)
from qnn.pt2e.graph import free_name, path, put, told
from qnn.pt2e.groups import Group, groups_of, specs_of, words
from qnn.pt2e.observers import make_observer
from qnn.pt2e.specs import (
    WHY_LEFT,
    EdgeOrNode,
    retarget_annotations,
    specs_on,
)

NOTES = "qnn_notes"
"""The key of `gm.meta` with what is to be said of a whole graph: a list of sentences."""

INSERTED = "qnn_observers"
"""The key of `gm.meta` with the names of the observers that were inserted."""

_DONE = "qnn_annotation_done"
_HUGE = 3e38  # what is as large makes the range of a product infinite

Callback = Callable[[GraphModule, dict[EdgeOrNode, nn.Module]], Any]


def insert_observers(
    gm: GraphModule, *, qat: bool, callback: Callback | None = None
) -> GraphModule:
    """Put observers on the edges and outputs of the nodes of `gm` that have specs; returns `gm`,
    whose results do not change unless an observer fake-quantises.

    An observer on an output is read by all that read the output; one on an edge by its consumer
    alone. One observer has one name, after the layer that it first observes (`c1.input_observer`),
    however many places share it. These stay without one: what is not a float tensor, what a buffer
    is written through, and all of a node that has an integer operand, or a constant near the end of
    float32: such a node has the reason in `node.meta`, under `WHY_LEFT`.

    Args:
        gm: from `torch.export.export(…).module()`, annotated.
        qat: whether qnn's own observers fake-quantise; others do what they do.
        callback: is called with `gm` and the observer of each place, before they are inserted, and
            may put others into the mapping.

    Raises:
        ValueError: an annotation with a key that is not a node, specs that share an observer and
            say nowhere which, a tensor passed as `out=`, or a graph without types.
    """
    if not any(node.meta.get(_DONE) for node in gm.graph.nodes):
        retarget_annotations(gm.graph)
    specs = {
        place: spec
        for place, spec in specs_of(gm.graph).items()
        if _is_new(place[1] if isinstance(place, tuple) else place)
    }
    if not specs:
        return gm
    if not any("val" in node.meta for node in gm.graph.nodes):
        raise ValueError(
            "qnn.pt2e: the graph has no types (node.meta['val']), so what is a float tensor is not "
            "known; export the model first: torch.export.export(model, inputs).module()."
        )
    groups = groups_of(specs)
    constants = Constants(gm)
    observers = _observers(groups, constants, qat)
    _note(gm, groups)
    if callback is not None:
        callback(gm, observers)
    _Inserter(gm, observers).run()
    return gm


def _is_new(node: Node) -> bool:
    """Whether an annotation has not been served yet."""
    return node.meta.get(_DONE) is not specs_on(node)


def _observers(
    groups: dict[EdgeOrNode, Group], constants: Constants, qat: bool
) -> dict[EdgeOrNode, nn.Module]:
    """The observer of each place, one for each group."""
    made: dict[Group, nn.Module] = {}
    pending: list[Group] = []

    def observer_of(group: Group) -> nn.Module:
        if group in made:
            return made[group]
        if group in pending:
            raise ValueError(
                "qnn.pt2e: derived specs go in a circle: "
                + ", from ".join(f"({words(each.at)})" for each in [*pending, group])
                + "."
            )
        pending.append(group)
        sources = []
        for place in getattr(group.spec, "derived_from", ()):
            if place not in groups:
                raise ValueError(
                    f"qnn.pt2e: the spec of ({words(group.at)}) is derived from ({words(place)}), "
                    "which is not annotated."
                )
            sources.append(observer_of(groups[place]))
        observed = [place[0] if isinstance(place, tuple) else place for place in group.places]
        constant = all(constants.value(node) is not None for node in observed)
        made[group] = make_observer(
            group.spec, qat=qat, constant=constant, name=words(group.at), sources=sources
        )
        pending.pop()
        return made[group]

    return {place: observer_of(group) for place, group in groups.items()}


def _note(gm: GraphModule, groups: dict[EdgeOrNode, Group]) -> None:
    """Say which observers were dropped, since an equal spec had another."""
    for group in dict.fromkeys(groups.values()):
        for place in group.others:
            gm.meta.setdefault(NOTES, []).append(
                f"({words(place)}) shares the observer of ({words(group.at)}), whose spec is equal "
                "but for the kind of observer; its own is dropped."
            )


class _Inserter:
    """One pass over the nodes of a graph, in their order."""

    def __init__(self, gm: GraphModule, observers: dict[EdgeOrNode, nn.Module]) -> None:
        self._gm, self._observers = gm, observers
        self._nodes = list(gm.graph.nodes)
        self._at = {node: at for at, node in enumerate(self._nodes)}
        self._written = writes(gm.graph)
        self._kept_edges, self._kept_outputs = destinations(gm.graph)
        self._names: dict[nn.Module, str] = {}
        self._observed: dict[Node, Node] = {}  # by the call of an observer: what it observes
        self._calls: dict[tuple[Node, nn.Module, int], Node] = {}
        self._first = [node for node in self._nodes if node.op == "placeholder"][-1:]

    def run(self) -> None:
        for node in self._nodes:
            annotation = specs_on(node)
            if annotation is None or not _is_new(node):
                continue
            node.meta[_DONE] = annotation
            if (reason := self._why_left(node)) is not None:
                node.meta[WHY_LEFT] = reason
                continue
            self._inputs(node)
            self._output(node)
        self._gm.graph.lint()
        self._gm.recompile()

    # -- what is left -----------------------------------------------------------------------------

    def _value(self, node: Node) -> Any:
        if "val" in node.meta:
            return node.meta["val"]
        return attribute(self._gm, str(node.target)) if node.op == "get_attr" else None

    def _is_float(self, node: Node) -> bool:
        value = self._value(node)
        return isinstance(value, torch.Tensor) and value.is_floating_point()

    def _why_left(self, node: Node) -> str | None:
        """Why an annotated node is left as it is, or None."""
        for source in node.all_input_nodes:
            producer, value = self._observed.get(source, source), self._value(source)
            of_integers = isinstance(value, torch.Tensor) and not value.is_floating_point()
            if of_integers and (producer, node) in self._observers:
                return f"its input {producer} is {value.dtype}"
            held: Any = None
            if producer.op == "get_attr":
                held = attribute(self._gm, str(producer.target))
            one = isinstance(held, torch.Tensor) and held.numel() == 1 and not held.is_meta
            if one and abs(float(held)) >= _HUGE:
                return f"its input {producer} is {float(held):g}, near the end of float32"
        for literal in (*node.args, *node.kwargs.values()):
            if isinstance(literal, float) and (abs(literal) >= _HUGE or math.isnan(literal)):
                return f"its argument {literal:g} is near the end of float32"
        return None

    # -- inputs and outputs -----------------------------------------------------------------------

    def _inputs(self, node: Node) -> None:
        out = node.kwargs.get("out")
        if isinstance(out, Node) and (out, node) in self._observers:
            raise ValueError(
                f"qnn.pt2e: {told(node)} writes to {out}, its argument out=, which cannot be "
                "quantised; call the form without out=."
            )
        observed = {source: self._input(node, source) for source in node.all_input_nodes}
        node.args, node.kwargs = torch.fx.map_arg(
            (node.args, node.kwargs), lambda source: observed[source]
        )

    def _input(self, node: Node, source: Node) -> Node:
        """What `node` reads in the place of `source`."""
        producer = self._observed.get(source, source)
        observer = self._observers.get((producer, node))
        if observer is None or not self._is_float(producer):
            return source
        if (producer, node) in self._kept_edges:
            return source
        if source is not producer and self._observers.get(producer) is observer:
            return source  # observed as an output, by the same
        written = [
            each
            for each in self._written.get(root_of(producer), ())
            if self._at[producer] < self._at[each] < self._at[node]
        ]
        key = source, observer, len(written)
        if key not in self._calls:
            name = self._name(observer, node, producer)
            # After a write, not before: the observer sees what its reader sees.
            self._calls[key] = self._call(name, source, producer, before=node if written else None)
        return self._calls[key]

    def _output(self, node: Node) -> None:
        observer = self._observers.get(node)
        if observer is None or not self._is_float(node) or node in self._kept_outputs:
            return
        name = self._name(observer, node, None)
        call = self._call(name, node, node)
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)

    def _call(self, name: str, source: Node, producer: Node, before: Node | None = None) -> Node:
        graph = self._gm.graph
        after = source
        if source.op == "placeholder":
            (after,) = self._first
        with graph.inserting_before(before) if before else graph.inserting_after(after):
            call = graph.call_module(name, (source,))
        kept = ("val", "tensor_meta", "nn_module_stack", "stack_trace", "from_node")
        call.meta.update({key: source.meta[key] for key in kept if key in source.meta})
        call.meta.setdefault("val", self._value(source))
        self._observed[call] = producer
        self._at[call] = self._at[producer]
        return call

    # -- names ------------------------------------------------------------------------------------

    def _name(self, observer: nn.Module, node: Node, producer: Node | None) -> str:
        """The name of an observer, given when it is first met: after the parameter or the layer
        that it observes.
        """
        if observer in self._names:
            return self._names[observer]
        if producer is None and node.op != "get_attr":
            wanted = self._layer(node) + "output_observer"
        elif (parameter := _parameter(producer or node)) is not None:
            wanted = f"{parameter}_observer"
        else:
            wanted = self._layer(node) + "input_observer"
        name = free_name(self._gm, wanted)
        if isinstance(value := self._value(producer or node), torch.Tensor) and not value.is_meta:
            observer = observer.to(value.device)
        put(self._gm, name, observer)
        self._gm.meta.setdefault(INSERTED, []).append(name)
        self._names[observer] = name
        return name

    def _layer(self, node: Node) -> str:
        """The path of the layer that a node is, with a dot; of a function that of the module which
        calls it, and the node's own name.
        """
        for source in node.all_input_nodes:
            source = self._observed.get(source, source)
            if source.op == "get_attr" and "." in str(source.target):
                return str(source.target).rpartition(".")[0] + "."
        name, kind = [("", ""), *path(node)][-1]
        if name and kind.startswith("torch.nn.modules."):
            return f"{name}."
        return f"{name}.{node.name}_" if name else f"{node.name}_"


def _parameter(node: Node) -> str | None:
    """The parameter that a node is, or is computed from alone."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return str(node.target) if node.op == "get_attr" else None
