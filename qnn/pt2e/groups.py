"""Which edges and outputs of a graph share one observer.

Groups are formed first, and the spec that a group has is found after: so it does not matter which
place names which, or in what order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from qnn.pt2e.graph import told
from qnn.pt2e.specs import EdgeOrNode, specs_on

# Specs are equal by these, whatever finds their ranges.
_SAME = (
    "dtype", "is_dynamic", "quant_min", "quant_max", "qscheme", "ch_axis", "scale", "zero_point",
    "derive_qparams_fn", "derived_from",
)  # fmt: skip
_ABSENT = object()


@dataclass(eq=False)
class Group:
    """Places with one observer: `spec` is that of the first place which has one of its own, and
    `others` are equal ones with another observer, which it replaces.
    """

    places: list[EdgeOrNode] = field(default_factory=list)
    spec: Any = None
    at: EdgeOrNode | None = None
    others: list[EdgeOrNode] = field(default_factory=list)


def words(place: Any) -> str:
    """A place as errors name it: `conv2d -> relu` for an edge, `relu` for an output."""
    if isinstance(place, tuple):
        return " -> ".join(map(str, place))
    return str(place)


def specs_of(graph: torch.fx.Graph) -> dict[EdgeOrNode, Any]:
    """The specs of all places, in the order of the graph, a node's inputs before its output.

    Raises:
        ValueError: the key of an input map is not a node.
    """
    found: dict[EdgeOrNode, Any] = {}
    for node in graph.nodes:
        if (annotation := specs_on(node)) is None:
            continue
        for producer, spec in (annotation.input_qspec_map or {}).items():
            if not isinstance(producer, Node):
                inputs = ", ".join(map(str, node.all_input_nodes))
                raise ValueError(
                    f"qnn.pt2e: the annotation of {told(node)} has the key {producer!r} in "
                    "input_qspec_map; keys are the nodes that produce its inputs: "
                    f"{inputs or 'it has none'}."
                )
            if spec is not None:
                found[producer, node] = spec
        if annotation.output_qspec is not None:
            found[node] = annotation.output_qspec
    return found


def groups_of(specs: dict[EdgeOrNode, Any]) -> dict[EdgeOrNode, Group]:
    """The group of each place.

    Two places are in one group where a shared spec names the other, and where an edge with
    `allow_implicit_sharing` has a spec that equals the one of another reader of the same tensor or
    of its producer's output; and so on along chains.

    Raises:
        ValueError: a group in which no place has a spec of its own, with the chain of places; a
            shared spec that names neither an edge nor a node.
    """
    parent: dict[EdgeOrNode, EdgeOrNode] = {}

    def root(place: EdgeOrNode) -> EdgeOrNode:
        parent.setdefault(place, place)
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for place, spec in specs.items():
        if (other := shared_with(spec, place)) is not None:
            parent[root(place)] = root(other)

    order = {place: at for at, place in enumerate(specs)}
    first: dict[EdgeOrNode, EdgeOrNode] = {}  # by root: the first place with a spec of its own
    for place, spec in specs.items():
        if shared_with(spec, place) is None:
            first.setdefault(root(place), place)

    for place in specs:
        if not isinstance(place, tuple) or not _shares(place[1]):
            continue
        for other in _of_the_same_tensor(*place):
            mine, its = root(place), root(other) if other in specs else None
            if its is None or mine == its or mine not in first or its not in first:
                continue
            if _same(specs[first[mine]], specs[first[its]]):
                parent[its] = mine
                first[mine] = min(first[mine], first[its], key=order.__getitem__)

    groups: dict[EdgeOrNode, Group] = {}
    for place in specs:
        group = groups.setdefault(root(place), Group())
        group.places.append(place)
        if group.at is None:
            group.at = first.get(root(place))
            if group.at is None:
                raise ValueError(
                    f"qnn.pt2e: the places {_chain(specs, place)} share one observer, and none of "
                    "them has a spec that says how to quantise; annotate one of them with a "
                    "QuantizationSpec."
                )
            group.spec = specs[group.at]
        if shared_with(specs[place], place) is None and not _same_observer(
            specs[place], group.spec
        ):
            group.others.append(place)
    return {place: groups[root(place)] for place in specs}


def shared_with(spec: Any, place: Any) -> EdgeOrNode | None:
    """The place that a shared spec names; None for one that is not shared."""
    other = getattr(spec, "edge_or_node", None)
    if other is None and not hasattr(spec, "edge_or_node"):
        return None
    pair = isinstance(other, tuple) and len(other) == 2 and all(isinstance(n, Node) for n in other)
    if not pair and not isinstance(other, Node):
        raise ValueError(
            f"qnn.pt2e: the shared spec of {words(place)} must name an edge, as (producer, "
            f"consumer), or a node; got {other!r}."
        )
    return other


def _shares(consumer: Node) -> bool:
    return bool(getattr(specs_on(consumer), "allow_implicit_sharing", True))


def _of_the_same_tensor(producer: Node, consumer: Node) -> Iterable[EdgeOrNode]:
    yield from ((producer, user) for user in producer.users if user is not consumer)
    yield producer


def _same(one: Any, other: Any) -> bool:
    return all(getattr(one, name, _ABSENT) == getattr(other, name, _ABSENT) for name in _SAME)


def _same_observer(one: Any, other: Any) -> bool:
    made = [getattr(spec, "observer_or_fake_quant_ctr", None) for spec in (one, other)]
    return made[0] is made[1] or _call_of(made[0]) == _call_of(made[1])


def _call_of(made: Any) -> tuple[Any, dict[str, Any]]:
    """The class that a constructor makes, and the keywords that it holds."""
    kwargs: dict[str, Any] = {}
    while (inner := getattr(made, "p", None) or getattr(made, "func", None)) is not None:
        kwargs = {**(getattr(made, "keywords", None) or {}), **kwargs}
        made = inner
    return made, kwargs


def innermost(constructor: Any) -> Any:
    """The class that a constructor makes, which may be a `with_args` of a `with_args`."""
    return _call_of(constructor)[0]


def _chain(specs: dict[EdgeOrNode, Any], place: EdgeOrNode) -> str:
    seen: list[EdgeOrNode] = []
    at: EdgeOrNode | None = place
    while at is not None and at not in seen:
        seen.append(at)
        at = shared_with(specs[at], at) if at in specs else None
    end = f" and back to ({words(at)})" if at is not None else ""
    last = "" if at is not None or seen[-1] in specs else ", which is not annotated"
    return ", then ".join(f"({words(each)})" for each in seen) + end + last
