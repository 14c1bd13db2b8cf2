"""Codes from a norm: a pass over Inductor's post-grad graph, after `fusion.fold`.

Where int8 linear layers read a LayerNorm or an RMSNorm, one op does the norm and quantises its
rows, which the layers take as they are. What is read in float too leaves as both:

    y = layer_norm(x, …)                      y, q, scale = int8_fork_norm(x, …)
    h = int8_linear(y, …, gelu)               h = int8_rows_linear(q, scale, …, gelu)
    z = int8_linear(h, …) + y                 z = int8_linear(h, …, residual=y)

An addition before the norm that no layer has taken goes into the op as well. Layers of
`int8_static` get codes on their grid: all that share the grid's tensors with the first one, while
the others read floats.

The op has an order of its own for the sums of a row (`kernels/reference/norm.py`), where
Inductor's code and torch's kernels have theirs, so that a float may differ in its last bit, and a
code now and then by one. `KINDS.clear()` leaves all norms to Inductor.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from qnn.kernels import OPS
from qnn.kernels.declare.norm import NORMS, name_of
from qnn.kernels.torch_private import (
    contiguous_strides,
    inductor_matches_patterns,
    invoke_quant,
    mistakes_dtypes,
    statically_equal,
)
from qnn.passes.chains import RESHAPES
from qnn.passes.region import Region, before_writes, call_op, items, read, takes_place

# The norms that become ops: LayerNorm and RMSNorm.
KINDS = {"layer", "rms"}
# The layer's op, and that for rows in codes.
ROWS = {"int8_linear": "int8_rows_linear", "int8_static_linear": "int8_static_rows_linear"}
_aten, _prims = torch.ops.aten, torch.ops.prims
_DTYPES = NORMS["int8_norm"].dtypes["x"]
# What they give is in memory, whether or not an addition reads it; most else would be computed
# where it is added.
_IN_MEMORY = frozenset(
    [
        _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default,
        _aten.convolution.default, invoke_quant,
        *(op.overload for op in OPS.values()),
    ]
)  # fmt: skip
_Grid = tuple[Node, Node] | None  # scale and zero point; None: a scale for each row


@dataclass
class _Norm:
    x: Node
    kind: str
    eps: float
    weight: Node | None = None
    bias: Node | None = None
    inside: set[Node] = field(default_factory=set)  # which nothing else reads


def join(graph: Graph) -> None:
    """Rewrite the graph in place."""
    if not KINDS or not inductor_matches_patterns() or mistakes_dtypes():
        return
    place = {node: i for i, node in enumerate(before_writes(graph))}
    for top in place:
        users = [user for user in top.users if user in place]
        readers = [found for user in users if (found := _reader(user, top)) is not None]
        norm = _norm_of(top) if readers else None
        if norm is not None and norm.kind.split("_")[0] in KINDS:
            _replace(graph, top, norm, readers, place)


# -- what reads it ---------------------------------------------------------------------------------


def _reader(node: Node, y: Node) -> Region | None:
    """The quantise, or the layer, that `node` is, if it reads the rows of `y`."""
    found = read(node)
    if found is None or found.op.name not in ("int8_quantize", *ROWS):
        return None
    given = found.arguments
    if given["x"] is not y:
        return None
    if found.op.name == "int8_quantize":
        bare = found.call is node and all(user.target is operator.getitem for user in node.users)
        return found if bare else None
    limit = OPS[ROWS[found.op.name]].limits["k"]
    return found if found.result is not None and given["w"].meta["val"].shape[1] <= limit else None


def _grid(reader: Region) -> _Grid:
    given = reader.arguments
    return (given["sx"], given["zx"]) if "sx" in given else None


# -- what it is ------------------------------------------------------------------------------------


def _norm_of(top: Node) -> _Norm | None:
    """The norm that ends in `top`, if the op gives what it gives."""
    value = top.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in _DTYPES or value.dim() < 2:
        return None
    found = _norm_in_float(top, value.dtype) or _rounded_norm(top, value.dtype)
    if found is None:
        return None
    x = found.x.meta["val"]
    usable = x.dtype == value.dtype and x.device.type.upper() in NORMS["int8_norm"].kernels
    usable &= statically_equal(x.shape, value.shape)
    usable &= statically_equal(x.stride(), value.stride())
    usable &= statically_equal(value.stride(), contiguous_strides(value.shape))
    within = found.inside | {top}
    return found if usable and all(set(each.users) <= within for each in found.inside) else None


def _norm_in_float(top: Node, dtype: torch.dtype) -> _Norm | None:
    """`cast(norm · weight + bias)`."""
    inside: set[Node] = set()
    end = _before_cast(top, dtype)
    if end is None:
        return None
    bias, rest = _with_vector(_aten.add.Tensor, end)
    weight, middle = _with_vector(_aten.mul.Tensor, rest)
    found = _plain_norm(middle, inside)
    if found is None:
        return None
    found.weight, found.bias = weight, bias
    found.inside |= {end, rest, middle} - {top}
    return found


def _rounded_norm(top: Node, dtype: torch.dtype) -> _Norm | None:
    """`weight · cast(norm)`, in a dtype of fewer bits than float32."""
    weight, middle = _with_vector(_aten.mul.Tensor, top)
    end = _before_cast(middle, dtype)
    if weight is None or end is None or weight.meta["val"].dtype != dtype or end is middle:
        return None
    found = _plain_norm(end, set())
    if found is None or found.kind != "rms":
        return None
    found.weight, found.kind = weight, "rms_rounded"
    found.inside |= {middle, end}
    return found


def _plain_norm(node: Node, inside: set[Node]) -> _Norm | None:
    """`(v − mean) · rsqrt(var + eps)`, or `v · rsqrt(mean(v²) + eps)`."""
    if node.target is not _aten.mul.Tensor or node.kwargs:
        return None
    for centred, root in (node.args, node.args[::-1]):
        if not isinstance(centred, Node) or not isinstance(root, Node):
            continue
        if root.target is not _aten.rsqrt.default:
            continue
        plus = root.args[0]
        if not isinstance(plus, Node) or plus.kwargs or len(plus.args) != 2:
            continue
        if plus.target not in (_aten.add.Tensor, _aten.add.Scalar):
            continue
        power, eps = plus.args
        if not isinstance(power, Node) or isinstance(eps, bool) or not isinstance(eps, int | float):
            continue
        found = _layer(centred, power) or _rms(centred, power)
        if found is not None:
            kind, v, between = found
            x = _wide_source(v)
            inside = inside | between | {root, plus, power}
            return None if x is None else _Norm(x, kind, float(eps), inside=inside)
    return None


_Found = tuple[str, Node, set[Node]]


def _layer(centred: Node, variance: Node) -> _Found | None:
    if centred.target is not _aten.sub.Tensor or centred.kwargs or len(centred.args) != 2:
        return None
    v, mean = centred.args
    both = variance.args[0] if variance.target is operator.getitem else None
    if not isinstance(v, Node) or not isinstance(both, Node):
        return None
    moments = both.target is _aten.var_mean.correction and both.args[0] is v
    if not moments or both.kwargs != {"correction": 0, "keepdim": True}:
        return None
    same = isinstance(mean, Node) and mean.target is operator.getitem and mean.args == (both, 1)
    if not same or variance.args[1] != 0 or not _is_last(both.args[1:], v):
        return None
    return "layer", v, {centred, both, mean}  # type: ignore[arg-type]


def _rms(v: Node, power: Node) -> _Found | None:
    if power.target is not _aten.mean.dim or power.kwargs or power.args[2:] != (True,):
        return None
    square = power.args[0]
    if not isinstance(square, Node) or not _is_last(power.args[1:2], v):
        return None
    by_power = square.target is _aten.pow.Tensor_Scalar and square.args == (v, 2)
    by_product = square.target is _aten.mul.Tensor and square.args == (v, v)
    return ("rms", v, {square}) if by_power or by_product else None


def _is_last(args: tuple[Any, ...], v: Node) -> bool:
    """Whether the one argument is the list of the last axis."""
    return len(args) == 1 and list(args[0]) in ([-1], [v.meta["val"].dim() - 1])


def _before_cast(node: Node, dtype: torch.dtype) -> Node | None:
    """The float32 value that `node` rounds to `dtype`; itself, where that is float32."""
    if dtype == torch.float32:
        return node
    source = node.args[0] if node.target is _prims.convert_element_type.default else None
    wide = isinstance(source, Node) and source.meta["val"].dtype == torch.float32
    return source if wide else None  # type: ignore[return-value]


def _wide_source(v: Node) -> Node | None:
    """What `v`, float32, is a cast of, or itself."""
    if v.target is _prims.convert_element_type.default and isinstance(v.args[0], Node):
        given = v.args[0].meta["val"].dtype
        return v.args[0] if given in _DTYPES else None
    return v if v.meta["val"].dtype == torch.float32 else None


def _with_vector(target: Any, node: Node) -> tuple[Node | None, Node]:
    """The operand `[K]` of `node`, if it is a call of `target` with one, and the other operand."""
    if node.target is target and not node.kwargs and len(node.args) == 2:
        for vector, other in (node.args, node.args[::-1]):
            if not isinstance(vector, Node) or not isinstance(other, Node):
                continue
            value, beside = vector.meta["val"], other.meta["val"]
            fits = value.dim() == 1 and beside.dim() > 1 and value.dtype in _DTYPES
            if fits and statically_equal(value.shape, beside.shape[-1:]):
                return vector, other
    return None, node


# -- what becomes of it ----------------------------------------------------------------------------


def _replace(
    graph: Graph, top: Node, norm: _Norm, readers: list[Region], place: dict[Node, int]
) -> None:
    grid = _grid(min(readers, key=lambda region: place[region.node]))
    given: dict[str, Any] = {
        "x": norm.x, "eps": norm.eps, "weight": norm.weight, "bias": norm.bias, "kind": norm.kind,
    }  # fmt: skip
    if grid is not None:
        given |= dict(zip(("sx", "zx"), grid, strict=True))
    at = _into_op(top, norm, given, place)
    if at is None:
        return
    taken = [reader for reader in readers if _grid(reader) == grid]
    nodes = {reader.node for reader in taken}
    again = any(list(reader.arguments.values()).count(top) > 1 for reader in taken)
    fork = again or not nodes.issuperset(top.users)
    total = norm.x if given.get("residual") is not None else None
    within = norm.inside | {top, *(_casts(total, norm) if total is not None else ())}
    sums = total is not None and not within.issuperset(total.users)
    with graph.inserting_after(at) if total is not None else graph.inserting_before(at):
        op = NORMS[name_of("int8" if grid is None else "int8_static", sums=sums, fork=fork)]
        *floats, q, scale = items(call_op(graph, op, given))
    dtype = top.meta["val"].dtype
    for reader in taken:
        _read_codes(graph, reader, {"q": q, "scale": scale, "dtype": dtype})
    if fork:
        takes_place(floats[-1], top)
        top.replace_all_uses_with(floats[-1])
    if total is not None and sums:
        takes_place(floats[0], total)
        total.replace_all_uses_with(floats[0])
    dead = within if total is None else {*within, total}
    _erase(graph, sorted(dead, key=lambda node: place[node], reverse=True))


def _casts(total: Node, norm: _Norm) -> Iterable[Node]:
    """The casts to float32 of a sum that the norm alone reads."""
    for user in total.users:
        if user.target is _prims.convert_element_type.default and norm.inside.issuperset(
            user.users
        ):
            yield user


def _into_op(top: Node, norm: _Norm, given: dict[str, Any], place: dict[Node, int]) -> Node | None:
    """Where the op goes: before `top`, or after an addition that it takes over; None where an
    operand comes later. Adds the addition's operands to what is `given`.
    """
    last = len(place)
    operands = [each for each in given.values() if isinstance(each, Node) and each is not norm.x]

    def before(node: Node) -> bool:
        return all(place.get(each, last) < place[node] for each in operands)

    add = norm.x
    if add in place and add.target is _aten.add.Tensor and not add.kwargs and before(add):
        whole, terms = add.meta["val"], [each for each in add.args if isinstance(each, Node)]
        if len(terms) == 2 and all(_is_like(each, whole) and _in_memory(each) for each in terms):
            given |= {"x": terms[0], "residual": terms[1]}
            return add
    return top if before(top) else None


def _is_like(node: Node, whole: torch.Tensor) -> bool:
    value = node.meta["val"]
    return (
        value.dtype == whole.dtype
        and value.device == whole.device
        and statically_equal(value.shape, whole.shape)
        and statically_equal(value.stride(), whole.stride())
    )


def _in_memory(node: Node) -> bool:
    while node.target in RESHAPES or node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr") or node.target in _IN_MEMORY


def _read_codes(graph: Graph, reader: Region, codes: dict[str, Any]) -> None:
    """The layer, or what another quantise gave to layers, from codes."""
    node = reader.node
    if reader.op.name == "int8_quantize":
        for item in list(node.users):
            item.replace_all_uses_with((codes["q"], codes["scale"])[item.args[1]])  # type: ignore[index]
        _erase(graph, [*node.users, node])
        return
    result: Any = reader.result
    with graph.inserting_before(node):
        rows = call_op(graph, OPS[ROWS[reader.op.name]], {**reader.arguments, **codes})
    takes_place(rows, result)
    result.replace_all_uses_with(rows)
    body = [] if reader.call is node else node.all_input_nodes[:1]
    _erase(graph, [*dict.fromkeys((result, node)), *body])


def _erase(graph: Graph, nodes: Iterable[Node]) -> None:
    """Those that nothing reads, in this order."""
    for node in list(nodes):
        if not node.users:
            graph.erase_node(node)
