"""Codes between static convolutions: a pass over Inductor's post-grad graph, after `fusion.fold`.

Where the result of an `int8_static_conv`, with what is folded into it, is read as the input of
such layers on one grid and by nothing else, it leaves as uint8 codes on that grid:

    y = int8_static_conv(x, …)            q, sq = int8_static_quantize(x, sx, zx)
    z = int8_static_conv(y, …, sy, zy)    p, sp = int8_chain_conv(q, sq, zx, …, sy, zy)
                                          z = int8_codes_conv(p, sp, zy, …)

The value is rounded to its dtype before it is quantised, as before, so no bit of z changes. What
another node reads, such as the sum of a residual block, stays in float.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from qnn.kernels import OPS, Op
from qnn.kernels.torch_private import inductor_matches_patterns, mistakes_dtypes, statically_equal
from qnn.passes.region import Region, before_writes, match

_QUANTIZE, _CHAIN, _CODES = (
    OPS[f"int8_{name}"] for name in ("static_quantize", "chain_conv", "codes_conv")
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
_Codes = tuple[Node, Node]  # and the scales of the samples


def join(graph: Graph) -> None:
    """Rewrite the graph in place."""
    if not inductor_matches_patterns() or mistakes_dtypes():
        return
    place = {node: i for i, node in enumerate(before_writes(graph))}
    found = match(place, op="int8_static_conv", where=_has_kernels)
    convs = [(region, y) for region in found if (y := region.result) is not None]
    readers = {region.node: region for region, _ in convs}
    links: dict[Node, _Grid] = {}  # results, and the grid that they are read on
    for region, y in convs:
        grid = _only_grid(y, readers)
        if grid is not None and all(place[each] < place[region.node] for each in grid):
            links[y] = grid
    codes: dict[Any, _Codes] = {}
    doomed: set[Node] = set()
    for region, y in convs:
        given = region.arguments
        source, between = _source(given["x"])
        if source not in links and y not in links:
            continue
        doomed |= {region.node, y, *between, *region.node.all_input_nodes[:1]}  # with its body
        with graph.inserting_before(region.node):
            key = source if source in links else (given["x"], given["sx"], given["zx"])
            if key not in codes:
                codes[key] = _two(_call(graph, _QUANTIZE, given))
            given |= {
                "q": codes[key][0],
                "scale": codes[key][1],
                "dtype": given["x"].meta["val"].dtype,
            }
            if y in links:
                given["so"], given["zo"] = links[y]
                codes[y] = _two(_call(graph, _CHAIN, given))
            else:
                call = _call(graph, _CODES, given)
                call.meta.update(y.meta)
                y.replace_all_uses_with(call)
    for node in reversed(list(graph.nodes)):
        if node in doomed and not node.users:
            graph.erase_node(node)


def _has_kernels(region: Region) -> bool:
    x = region.arguments["x"].meta.get("val")
    return isinstance(x, torch.Tensor) and x.device.type.upper() in _CHAIN.kernels


def _only_grid(y: Node, readers: Mapping[Node, Region]) -> _Grid | None:
    """The grid on which all that reads `y` quantises it."""
    grids: set[_Grid] = set()
    open_nodes = [y]
    while open_nodes:
        node = open_nodes.pop()
        for user in node.users:
            if user.target in RESHAPES:
                open_nodes.append(user)
                continue
            if user not in readers:
                return None
            given = readers[user].arguments
            others = (value for name, value in given.items() if name != "x")
            if given["x"] is not node or node in others or not _same_shape(node, y):
                return None
            grids.add((given["sx"], given["zx"]))
    return grids.pop() if len(grids) == 1 else None


def _same_shape(one: Node, other: Node) -> bool:
    return statically_equal(one.meta["val"].shape, other.meta["val"].shape)


def _source(x: Node) -> tuple[Node, list[Node]]:
    """Where `x` comes from, through reshapes, and these."""
    between = []
    while x.target in RESHAPES:
        between.append(x)
        x = x.all_input_nodes[0]
    return x, between


def _call(graph: Graph, op: Op, given: Mapping[str, Any]) -> Node:
    """A call of `op` with what it takes of `given`."""
    args = tuple(given.get(arg.name, op.default(arg)) for arg in op.inputs)
    node = graph.call_function(op.overload, args)
    fakes = torch.fx.map_arg(args, lambda each: each.meta["val"])
    with fakes[0].fake_mode:
        node.meta["val"] = op.overload(*fakes)
    return node


def _two(node: Node) -> _Codes:
    """The results of a node that has two."""
    first, second = (node.graph.call_function(operator.getitem, (node, i)) for i in range(2))
    first.meta["val"], second.meta["val"] = node.meta["val"]
    return first, second
