"""Codes between static convolutions: a pass over Inductor's post-grad graph, after `fusion.fold`.

Where the result of an `int8_static_conv`, with what is folded into it, is read as the input of
such layers on one grid and by nothing else, it leaves as uint8 codes on that grid:

    y = int8_static_conv(x, …)            q, sq = int8_static_quantize(x, sx, zx)
    z = int8_static_conv(y, …, sy, zy)    p, sp = int8_chain_conv(q, sq, zx, …, sy, zy)
                                          z = int8_codes_conv(p, sp, zy, …)

What another node reads too, such as the sum of a residual block, leaves as both, from
`int8_fork_conv`: y, p and sp. Results that are concatenated along the channels leave as codes on
the grid of what reads them together, and the codes are concatenated.

The value is rounded to its dtype before it is quantised, as before, so no bit of y and z changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qnn.kernels import OPS, Op
from qnn.kernels.torch_private import inductor_matches_patterns, mistakes_dtypes, statically_equal
from qnn.passes.region import Region, before_writes, call, call_op, items, match, takes_place

_QUANTIZE, _CHAIN, _FORK, _CODES = (
    OPS[f"int8_{name}"] for name in ("static_quantize", "chain_conv", "fork_conv", "codes_conv")
)
_aten = torch.ops.aten
# They keep the order of the elements, so that one of them, or several, of an equal shape as a
# whole is the same tensor.
RESHAPES = frozenset(
    [
        _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
        _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims,
    ]
)  # fmt: skip
_Grid = tuple[Node, Node]  # scale and zero point


@dataclass(frozen=True)
class _Link:
    """A result that leaves as codes."""

    grid: _Grid
    op: Op  # that gives the codes, and y where it is read as well


_Links = dict[Node, _Link]
_Parts = dict[Node, list[Node]]  # of a concatenation


def join(graph: Graph) -> None:
    """Rewrite the graph in place."""
    if not inductor_matches_patterns() or mistakes_dtypes():
        return
    place = {node: i for i, node in enumerate(before_writes(graph))}
    found = match(place, op="int8_static_conv", where=_has_kernels)
    convs = {y: region for region in found if (y := region.result) is not None}
    parts = {node: of for node in place if (of := _parts_of(node, convs))}
    links = _links(convs, parts, place)
    codes: dict[Any, list[Node]] = {}  # and the scales of the samples
    doomed: set[Node] = set()
    for y, region in convs.items():
        given = region.arguments
        grid = given["sx"], given["zx"]
        source, between = _source(given["x"])
        linked = source in links and links[source].grid == grid
        if not linked and y not in links:
            continue
        doomed |= {region.node, y, *between, *region.node.all_input_nodes[:1]}  # with its body
        with graph.inserting_before(region.node):
            key = source if linked else (given["x"], *grid)
            if key not in codes and linked:  # a concatenation
                codes[key] = _concatenated(graph, [codes[part] for part in parts[source]])
                doomed |= {source, *_views_within(source)}
            elif key not in codes:
                codes[key] = items(call_op(graph, _QUANTIZE, given))
            q, scale = codes[key]
            given |= {"q": q, "scale": scale, "dtype": given["x"].meta["val"].dtype}
            if y not in links:
                floats = call_op(graph, _CODES, given)
            else:
                given["so"], given["zo"] = links[y].grid
                *kept, q, scale = items(call_op(graph, links[y].op, given))
                codes[y] = [q, scale]
                if not kept:
                    continue
                (floats,) = kept
                links[floats], codes[floats] = links[y], codes[y]
        takes_place(floats, y)
        y.replace_all_uses_with(floats)
    for node in reversed(list(graph.nodes)):
        if node in doomed and not node.users:
            graph.erase_node(node)


def _has_kernels(region: Region) -> bool:
    x = region.arguments["x"].meta.get("val")
    return isinstance(x, torch.Tensor) and x.device.type.upper() in _CHAIN.kernels


def _views_within(concatenation: Node) -> list[Node]:
    return [view for part in concatenation.all_input_nodes for view in _source(part)[1]]


def _parts_of(node: Node, convs: Mapping[Node, Region]) -> list[Node]:
    """The results of `convs` that a node concatenates along the channels; none if one is not."""
    if node.target is not _aten.cat.default or node.args[1:] != (1,):
        return []
    given: Any = node.args[0]
    parts = [_source(part)[0] for part in given]
    whole = all(y in convs and _is_image(y, part) for y, part in zip(parts, given, strict=True))
    return parts if whole else []


def _links(convs: Mapping[Node, Region], parts: _Parts, place: Mapping[Node, int]) -> _Links:
    readers = {region.node: region for region in convs.values()}
    parts = dict(parts)
    while True:
        links = {node: link for node in parts if (link := _link_of(node, readers, {}))}
        for y, region in convs.items():
            link = _link_of(y, readers, links)
            if link is not None and all(place[each] < place[region.node] for each in link.grid):
                links[y] = link
        apart = [
            node
            for node, of in parts.items()
            if node in links
            and any(y not in links or links[y].grid != links[node].grid for y in of)
        ]
        if not apart:
            return links
        for node in apart:
            del parts[node]


def _link_of(y: Node, readers: Mapping[Node, Region], links: _Links) -> _Link | None:
    """The first grid on which a layer quantises `y`, alone or in a concatenation with a link, and
    whether anything else reads it.
    """
    grids: dict[_Grid | None, None] = {}
    open_nodes = [y]
    while open_nodes:
        node = open_nodes.pop()
        for user in node.users:
            if user.target in RESHAPES:
                open_nodes.append(user)
            elif user in links:
                grids[links[user].grid] = None
                if links[user].op is _FORK:
                    grids[None] = None
            else:
                given = readers[user].arguments if user in readers else {}
                as_input = given.pop("x", None) is node and _is_image(node, y)
                if as_input:
                    grids[given["sx"], given["zx"]] = None
                if not as_input or node in given.values():
                    grids[None] = None
    first = next(filter(None, grids), None)
    return first and _Link(first, _CHAIN if len(grids) == 1 else _FORK)


def _is_image(one: Node, other: Node) -> bool:
    """Whether two forms of one tensor have the same batch, channels and last axes."""
    long, short = sorted((one.meta["val"].shape, other.meta["val"].shape), key=len, reverse=True)
    axes = len(short) - 2
    return (
        axes > 0
        and statically_equal(long[:2], short[:2])
        and statically_equal(long[len(long) - axes :], short[2:])
    )


def _concatenated(graph: Graph, codes: list[list[Node]]) -> list[Node]:
    """Codes and scales of a concatenation. A sample is lost where a part of it is."""
    (q, scale), *more = codes
    whole = call(graph, _aten.cat.default, [q, *(each for each, _ in more)], 1)
    for _, other in more:
        scale = call(graph, _aten.maximum.default, scale, other)
    return [whole, scale]


def _source(x: Node) -> tuple[Node, list[Node]]:
    """Where `x` comes from, through reshapes, and these."""
    between = []
    while x.target in RESHAPES:
        between.append(x)
        x = x.all_input_nodes[0]
    return x, between
