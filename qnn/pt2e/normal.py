"""An exported graph in the words that `layers` reads: weights that the graph computes become
parameters, and products and BatchNorms that were decomposed or spelt in another way become calls of
`aten.linear`, `aten.matmul` and `aten.batch_norm` again.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qnn.pt2e import graph as graphs
from qnn.pt2e.layers import is_turned, operators

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: 1, aten.matmul.default: 1, aten.addmm.default: 2}
_EXPANSIONS = (aten.expand.default, aten.view.default, aten._unsafe_view.default)
_CONV1D = "transformers.pytorch_utils.Conv1D"


def normalise(root: GraphModule) -> None:
    """Rewrite the graph in place; its outputs stay as they are."""
    for graph in graphs.graphs(root):
        for node in list(graph.graph.nodes):
            rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
            if rewrite is not None:
                rewrite(graph, node)
        for node, at in _operands(graph) if graph is not root else ():
            operand: Any = node.args[at]
            computed = isinstance(operand, Node) and operand.op == "call_function"
            if computed and _is_constant(graph, operand, {}) and not is_turned(operand):
                operand.meta["qnn_computed"] = f"computed by {operand.target} in the body"
        graph.recompile()
    _fold_constants(root)
    root.recompile()


# -- other spellings ------------------------------------------------------------------------------


def _replace(graph: GraphModule, old: Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.graph.inserting_before(old):
        new = graph.graph.call_function(target, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.graph.erase_node(old)


def _batch_norm(graph: GraphModule, node: Node) -> None:
    """`_native_batch_norm_legit_no_training` gives a tuple, of which the first is the output."""
    x, weight, bias, mean, var, momentum, eps = node.args
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return
    for user in list(node.users):
        _replace(
            graph, user, aten.batch_norm.default,
            (x, weight, bias, mean, var, False, momentum, eps, True),
        )  # fmt: skip
    graph.graph.erase_node(node)


def _bmm(graph: GraphModule, node: Node) -> None:
    """A matrix that was expanded over the batch is one matrix."""
    x, matrix = node.args
    while isinstance(matrix, Node) and matrix.target in _EXPANSIONS:
        matrix = matrix.args[0]
    if _is_constant(graph, matrix, {}) and _rank(matrix) == 2:
        same = list(graphs.value(matrix).shape) == list(graphs.value(node.args[1]).shape)[1:]
        if same:
            _replace(graph, node, aten.matmul.default, (x, matrix))
            _erase(graph, cast(Node, matrix))


def _erase(graph: GraphModule, node: Node) -> None:
    """Erase what was read of a node and is read no more."""
    for user in list(node.users):
        if user.target in _EXPANSIONS:
            _erase(graph, user)
            if not user.users:
                graph.graph.erase_node(user)


def _einsum(graph: GraphModule, node: Node) -> None:
    """`"...k,nk->...n"` is a linear layer, and `"...k,kn->...n"` a product."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    found = re.fullmatch(r"([a-zA-Z.]+),([a-zA-Z.]+)->([a-zA-Z.]+)", equation)
    if found is None:
        return
    left, right, out = found.groups()
    if _is_constant(graph, operands[0], {}):
        left, right, operands = right, left, operands[::-1]
    x, weight = operands
    rest, k, n = left[:-1], left[-1], out[-1]
    fits = out == rest + n and n not in left and k not in rest and "." not in right
    if not fits or _rank(weight) != 2 or not _is_constant(graph, weight, {}):
        return
    if right == n + k:
        _replace(graph, node, aten.linear.default, (x, weight))
    elif right == k + n:
        _replace(graph, node, aten.matmul.default, (x, weight))


_REWRITES: dict[Any, Any] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.bmm.default: _bmm,
    aten.einsum.default: _einsum,
}


def _rank(node: Any) -> int:
    return graphs.value(node).dim() if isinstance(graphs.value(node), torch.Tensor) else -1


# -- weights that the graph computes --------------------------------------------------------------


def _fold_constants(root: GraphModule) -> None:
    """Make parameters of weights and biases that the graph computes from the model's tensors alone,
    if nothing else reads these. Products take a weight `[in, out]`; theirs are turned.
    """
    memo, chains = dict[Node, bool](), set[Node]()
    written = set(graphs.written(root))
    for node in root.graph.find_nodes(op="get_attr"):
        if id(graphs.held(root, node)) in written:
            node.meta["qnn_computed"] = "a tensor that the graph writes to"
    for node, at in list(_operands(root)):
        operand: Any = node.args[at]
        turn = node.target in _PRODUCTS and at == _PRODUCTS[node.target]
        if turn and is_turned(operand):
            continue  # `t(weight)` is read as it is
        if not _is_constant(root, operand, memo) or not (turn or operand.op != "get_attr"):
            continue
        if turn and (_rank(operand) != 2 or _stack(node)[1] == _CONV1D):
            continue
        chain = _chain(operand)
        sources = {id(graphs.held(root, each)) for each in chain if each.op == "get_attr"}
        reader = _reader_of(root, sources, memo)
        if sources & written or reader is not None:
            why = "the graph writes to"
            if reader is not None and not sources & written:
                why = f"{reader.name} ({reader.target}) reads too"
            operand.meta["qnn_computed"] = f"from a tensor that {why}"
            continue
        chains |= chain
        _fold(root, node, at, turn=turn)
    for node in sorted(chains, reverse=True):
        if not node.users:
            root.graph.erase_node(node)
    graphs.delete_unread(root, {str(node.target) for node in chains if node.op == "get_attr"})


def _operands(root: GraphModule) -> Iterator[tuple[Node, int]]:
    """The weights and biases of nodes that are read as layers, by their places."""
    known = set(operators())
    for node in root.graph.nodes:
        if node.op != "call_function" or node.target not in known:
            continue
        for at, argument in enumerate(node.target._schema.arguments[: len(node.args)]):
            place = _PRODUCTS.get(node.target)
            if argument.name in ("weight", "bias") or at == place:
                yield node, at


def _is_constant(root: GraphModule, node: Any, memo: dict[Node, bool]) -> bool:
    """Whether a value depends on the model's tensors alone, and is always the same."""
    if not isinstance(node, Node):
        return False
    if node not in memo:
        target: Any = node.target
        pure = target is operator.getitem or (
            isinstance(target, torch._ops.OpOverload)
            and not target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in target.tags
        )
        memo[node] = (
            isinstance(graphs.held(root, node), torch.Tensor)
            if node.op in ("get_attr", "placeholder")
            else node.op == "call_function"
            and pure
            and bool(node.all_input_nodes)
            and all(_is_constant(root, each, memo) for each in node.all_input_nodes)
        )
    return memo[node]


def _chain(node: Node) -> set[Node]:
    found = {node}
    for each in node.all_input_nodes:
        found |= _chain(each)
    return found


def _reader_of(root: GraphModule, sources: set[int], memo: dict[Node, bool]) -> Node | None:
    """What reads these tensors besides computed weights."""
    places = set(_operands(root))
    front = [n for n in root.graph.find_nodes(op="get_attr") if id(graphs.held(root, n)) in sources]
    seen = set(front)
    while front:
        node = front.pop()
        for user in node.users:
            if _is_constant(root, user, memo):
                if user not in seen:
                    seen.add(user)
                    front.append(user)
                continue
            at = [at for at, arg in enumerate(user.args) if arg is node]
            product = user.target in _PRODUCTS and at == [_PRODUCTS[user.target]]
            weight = node.op != "get_attr" and all((user, each) in places for each in at) and at
            if not (weight or product):
                reader: Node = user
                return reader
    return None


@torch.no_grad()
def _fold(root: GraphModule, node: Node, at: int, *, turn: bool) -> None:
    done: dict[Node, Any] = {}

    def run(each: Node) -> Any:
        if each not in done:
            target: Any = each.target
            args, kwargs = map_arg((each.args, each.kwargs), run)
            held = each.op == "get_attr"
            done[each] = graphs.held(root, each) if held else target(*args, **kwargs)
        return done[each]

    operand: Any = node.args[at]
    value = run(operand)
    if not value.is_floating_point():
        return
    trained = any(getattr(graphs.held(root, n), "requires_grad", False) for n in _chain(operand))
    plain = (value.t() if turn else value).detach().clone(memory_format=torch.contiguous_format)
    name = _name(root, node, operand, at)
    owner, _, last = name.rpartition(".")
    graphs.owner_of(root, owner).register_parameter(last, nn.Parameter(plain, trained))
    with root.graph.inserting_before(operand):
        new: Node = root.graph.get_attr(name)
    mode = graphs.value(operand).fake_mode
    new.meta["val"] = mode.from_tensor(graphs.held(root, new), static_shapes=True)
    if turn:
        with root.graph.inserting_before(node):
            matrix, new = new, root.graph.call_function(aten.t.default, (new,))
        new.meta = dict(operand.meta) | {"val": mode.from_tensor(plain, static_shapes=True).t()}
        matrix.meta["qnn_turned"] = True
    node.update_arg(at, new)


def _name(root: GraphModule, node: Node, operand: Node, at: int) -> str:
    """`fc.weight` of what parametrizes it, `in_proj_0_weight` of a part of `in_proj_weight`."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    kind = arguments[at].name if arguments[at].name == "bias" else "weight"
    first = min(n for n in _chain(operand) if n.op == "get_attr")
    owner, _, last = str(first.target).rpartition(".")
    base, parametrized, _ = str(first.target).partition(".parametrizations.")
    stack = _stack(node)
    if parametrized:
        name = f"{base}.{kind}"
    elif stack[0] == owner and stack[1].startswith("torch.nn.modules.") and last != kind:
        name = ".".join(filter(None, (owner, kind)))  # weight_g and weight_v of weight_norm
    else:
        name = ""
    if name and graphs.free_name(root, name) == name and "_proj_" not in last:
        return name
    stem = last.removesuffix("_weight").removesuffix("_bias")
    stem = "computed" if stem.startswith(("weight", "bias")) else stem
    count = 0
    while True:
        name = ".".join(filter(None, (owner, f"{stem}_{count}_{kind}")))
        if graphs.free_name(root, name) == name:
            return name
        count += 1


def _stack(node: Node) -> tuple[str, str]:
    return (graphs.path(node) or [("", "")])[-1]
