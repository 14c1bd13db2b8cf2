"""Zeros that a model puts around an image: a pass over Inductor's post-grad graph.

A convolution adds the zeros itself, of which it has as many as wanted before and after each axis:

    p = constant_pad_nd(x, [0, 1, 0, 1])
    y = int8_conv(p, …, [0, 0, 0, 0, 0, 0])    y = int8_conv(x, …, [0, 0, 0, 1, 0, 1])

Zero has the code of zero, so no bit of y changes; and codes reach a layer that its zeros kept them
from (`chains`).
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from qnn.kernels.torch_private import inductor_matches_patterns, statically_equal
from qnn.passes.region import Region, before_writes, call, call_op, match, takes_place

_aten = torch.ops.aten
_VIEWS = frozenset([_aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims])


def fold(graph: Graph) -> None:
    """Rewrite the graph in place."""
    if not inductor_matches_patterns():
        return
    for region in match(before_writes(graph), where=_is_padded_by_itself):
        _fold(graph, region)


def _is_padded_by_itself(region: Region) -> bool:
    """Whether it is a convolution; transposed ones cut their padding off."""
    return region.op.name.endswith("_conv") and "x" in region.arguments


def _fold(graph: Graph, region: Region) -> None:
    given, result = region.arguments, region.result
    padded, views = given["x"], []
    while padded.target in _VIEWS and len(padded.users) == 1:
        views.append(padded)
        padded = padded.all_input_nodes[0]
    zeros = _zeros(padded, given["x"])
    if zeros is None or result is None:
        return
    with graph.inserting_before(region.node):
        made = [padded.all_input_nodes[0]]
        for view in reversed(views):
            made.append(call(graph, view.target, made[-1], *view.args[1:]))
        padding = [own + more for own, more in zip(given["padding"], zeros, strict=True)]
        conv = call_op(graph, region.op, {**given, "x": made[-1], "padding": padding})
    unused = [conv, *reversed(made[1:])]
    # The zeros may have moved the image to another layout, and y with it.
    if conv.meta["val"].stride() == result.meta["val"].stride():
        takes_place(conv, result)
        result.replace_all_uses_with(conv)
        body = region.node.all_input_nodes[:1]
        unused = [result, region.node, *body, *views, padded]
    for node in dict.fromkeys(unused):
        if not node.users:
            graph.erase_node(node)


def _zeros(padded: Node, x: Node) -> list[int] | None:
    """How many zeros `padded` has before and after each axis of the image `x` that it is."""
    if padded.target is not _aten.constant_pad_nd.default or len(padded.users) != 1:
        return None
    counts, value = padded.args[1], padded.args[2] if len(padded.args) > 2 else 0
    if not isinstance(counts, list | tuple) or value != 0 or len(x.users) != 1:
        return None
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return None
    pairs = [list(counts[i : i + 2]) for i in range(0, len(counts), 2)]  # the last axis first
    while pairs and pairs[-1] == [0, 0]:
        pairs.pop()
    axes = len(pairs)
    sizes = [node.meta["val"].shape[-axes:] for node in (padded, x)]
    if not 1 <= axes <= 3 or not statically_equal(*sizes):
        return None
    pairs += [[0, 0]] * (3 - axes)
    return [count for pair in reversed(pairs) for count in pair]
