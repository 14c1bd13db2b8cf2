"""Which nodes of an exported graph are the calls of a layer, and the float layer that each calls.

`read(root, node)` gives a `Call`, or in words why there is none, or None for any other operator.
The layer is built around the model's own parameters, with the arguments of the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from qnn.pt2e import attention
from qnn.pt2e.graph import held, path, value

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Call:
    """A node as the call of a float layer.

    Args:
        layer: with the parameters and buffers of the model themselves.
        inputs: what the layer is called with.
        tensors: by the layer's names, the nodes of the parameters and buffers.
        unpack: how the node's results lie in the layer's: paths of indices, for an operator with
            several.
    """

    layer: nn.Module
    inputs: tuple[Any, ...]
    tensors: dict[str, Node]
    unpack: tuple[tuple[int, ...], ...] = ()


class Refused(Exception):  # noqa: N818, it is an answer and no error
    """Why a node that looks like a layer's call is none."""


Reader = Callable[[nn.Module, Node, dict[str, Any]], Call]
_READERS: dict[Any, Reader] = {}

ACTIVATIONS = "no int8 op multiplies two activations"

# Products of which neither operand is a weight, and layers that no kind takes.
NO_OP = {
    aten.bmm.default: ACTIVATIONS,
    aten.baddbmm.default: ACTIVATIONS,
    aten.einsum.default: "it is not a product of an activation and a weight `[out, in]`",
    attention.OPERATOR: attention.LEFT,
    aten.rnn_tanh.input: "there is no quantised nn.RNN, only LSTM and GRU",
    aten.rnn_relu.input: "there is no quantised nn.RNN, only LSTM and GRU",
    aten.lstm.data: "sequences are packed in the graph; export with padded ones",
    aten.gru.data: "sequences are packed in the graph; export with padded ones",
    aten.bilinear.default: "there is no quantised nn.Bilinear",
}


def read(root: nn.Module, node: Node) -> Call | str | None:
    """The call of a layer that `node` is, why there is none, or None for any other node."""
    if node.op != "call_function":
        return None
    if node.target in NO_OP:
        return NO_OP[node.target]
    reader = _READERS.get(node.target)
    if reader is None:
        return None
    try:
        return reader(root, node, _arguments(node))
    except Refused as reason:
        return str(reason)


def operators() -> list[Any]:
    """The operators that are read as calls of layers."""
    return list(_READERS)


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator by the names of its schema, defaults included."""
    given = dict(node.kwargs)
    result: dict[str, Any] = {}
    for at, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = argument.default_value if argument.has_default_value() else None
        result[argument.name] = (
            node.args[at] if at < len(node.args) else given.get(argument.name, default)
        )
    return result


def _reads(*targets: Any) -> Callable[[Reader], Reader]:
    def register(reader: Reader) -> Reader:
        _READERS.update(dict.fromkeys(targets, reader))
        return reader

    return register


# -- operands -------------------------------------------------------------------------------------


def _tensor(root: nn.Module, node: Any, what: str = "weight") -> torch.Tensor:
    """The tensor of the model that a node names."""
    if not isinstance(node, Node):
        raise Refused(f"its {what} is not a tensor of the model")
    found = held(root, node) if node.op in ("get_attr", "placeholder") else None
    if not isinstance(found, torch.Tensor) or "qnn_computed" in node.meta:
        by = "an input of the graph" if node.op == "placeholder" else f"computed by {node.target}"
        raise Refused(f"its {what} is {node.meta.get('qnn_computed', by)}, and not a parameter")
    if not found.is_floating_point():
        raise Refused(f"its {what} is {found.dtype}")
    return found


def _fill(root: nn.Module, layer: nn.Module, nodes: dict[str, Any]) -> dict[str, Node]:
    """Give a layer the model's tensors, by its names; the nodes that are there."""
    present = {name: node for name, node in nodes.items() if isinstance(node, Node)}
    for name, node in present.items():
        tensor = _tensor(root, node, name)
        if name in layer._buffers:
            layer._buffers[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            layer._parameters[name] = tensor
        else:
            layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return present


def _meta(weight: torch.Tensor) -> dict[str, Any]:
    return {"device": "meta", "dtype": weight.dtype}


# -- products -------------------------------------------------------------------------------------


@_reads(aten.linear.default)
def _linear(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    return _linear_of(root, node, args["input"], args["weight"], args["bias"])


@_reads(aten.addmm.default)
def _addmm(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    if args["beta"] != 1 or args["alpha"] != 1:
        raise Refused("alpha and beta scale its summands")
    if not isinstance(args["self"], Node) or _rank(args["self"]) != 1:
        raise Refused("its summand is not a bias of one axis")
    return _transposed(root, node, args["mat1"], args["mat2"], args["self"])


@_reads(aten.mm.default, aten.matmul.default)
def _mm(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    x, other = list(args.values())[:2]
    if _rank(other) != 2:
        raise Refused(ACTIVATIONS)
    return _transposed(root, node, x, other, None)


def _transposed(root: nn.Module, node: Node, x: Any, other: Any, bias: Any) -> Call:
    """`x · other + bias`, with `other` the transpose of a weight `[out, in]`."""
    if is_turned(other):
        return _linear_of(root, node, x, other.args[0], bias)
    if not isinstance(held(root, other), torch.Tensor) and "qnn_computed" not in other.meta:
        raise Refused(ACTIVATIONS)
    weight = _tensor(root, other)
    title = path(node)[-1][1] if path(node) else ""
    if title == "transformers.pytorch_utils.Conv1D" and bias is not None:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            conv = Conv1D(weight.shape[1], weight.shape[0])
        return Call(conv, (x,), _fill(root, conv, {"weight": other, "bias": bias}))
    why = other.meta.get("qnn_computed")
    raise Refused(f"its weight is [in, out]{f', {why},' if why else ''} and is not turned")


def is_turned(node: Any) -> bool:
    """Whether a node swaps the two axes of a matrix of the model."""
    source = node.args[0] if isinstance(node, Node) and node.op == "call_function" else None
    if not isinstance(source, Node) or source.op not in ("get_attr", "placeholder"):
        return False
    rest = tuple(node.args[1:])
    return _rank(source) == 2 and (
        node.target in (aten.t.default, aten.numpy_T.default)
        or (node.target is aten.transpose.int and sorted(a % 2 for a in rest) == [0, 1])
        or (node.target is aten.permute.default and [a % 2 for a in rest[0]] == [1, 0])
    )


def _linear_of(root: nn.Module, node: Node, x: Any, weight: Any, bias: Any) -> Call:
    held_weight = _tensor(root, weight)
    out, columns = held_weight.shape
    layer = nn.Linear(columns, out, bias is not None, **_meta(held_weight))
    return Call(layer, (x,), _fill(root, layer, {"weight": weight, "bias": bias}))


def _rank(node: Any) -> int:
    return value(node).dim() if isinstance(value(node), torch.Tensor) else -1


# -- convolutions ---------------------------------------------------------------------------------

_PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@_reads(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)
def _conv(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    weight = _tensor(root, args["weight"])
    axes, groups = weight.dim() - 2, args["groups"]
    transposed = args.get("transposed", "transpose" in str(node.target))

    def each(name: str) -> Any:
        given = args[name]
        return given if isinstance(given, str) else (*given,) * (axes if len(given) == 1 else 1)

    sizes = {name: each(name) for name in ("stride", "padding", "dilation")}
    first, second = weight.shape[0], weight.shape[1] * groups
    if transposed:
        sizes["output_padding"] = each("output_padding")
    channels = (first, second) if transposed else (second, first)
    kind: Any = (_TRANSPOSED if transposed else _PLAIN)[axes]
    options = {**sizes, "groups": groups, "bias": args["bias"] is not None, **_meta(weight)}
    layer = kind(*channels, tuple(weight.shape[2:]), **options)
    tensors = _fill(root, layer, {"weight": args["weight"], "bias": args["bias"]})
    return Call(layer, (args["input"],), tensors)


# -- tables ---------------------------------------------------------------------------------------


@_reads(aten.embedding.default)
def _embedding(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    weight = _tensor(root, args["weight"])
    padding = None if args["padding_idx"] == -1 else args["padding_idx"]
    options = {name: args[name] for name in ("scale_grad_by_freq", "sparse")}
    rows, columns = weight.shape
    layer = nn.Embedding(rows, columns, padding, **options, **_meta(weight))
    return Call(layer, (args["indices"],), _fill(root, layer, {"weight": args["weight"]}))


@_reads(aten.embedding_bag.padding_idx, aten.embedding_bag.default)
def _embedding_bag(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    weight = _tensor(root, args["weight"])
    if any(user.args[1] != 0 and user.users for user in node.users):
        raise Refused("more than the bags are read of it")
    rows, columns = weight.shape
    layer = nn.EmbeddingBag(
        rows,
        columns,
        scale_grad_by_freq=args["scale_grad_by_freq"],
        mode=("sum", "mean", "max")[args["mode"]],
        sparse=args["sparse"],
        include_last_offset=args["include_last_offset"],
        padding_idx=None if args.get("padding_idx", -1) == -1 else args["padding_idx"],
        **_meta(weight),
    )
    inputs = (args["indices"], args["offsets"], args["per_sample_weights"])
    tensors = _fill(root, layer, {"weight": args["weight"]})
    return Call(layer, inputs, tensors, unpack=((),))


# -- recurrent layers -----------------------------------------------------------------------------


@_reads(aten.lstm.input, aten.gru.input)
def _recurrent(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    gates, kind = (4, nn.LSTM) if node.target is aten.lstm.input else (3, nn.GRU)
    params, layers = list(args["params"]), args["num_layers"]
    directions = 2 if args["bidirectional"] else 1
    each = len(params) // (layers * directions)
    has_bias = args["has_biases"]
    projects = each == 3 + 2 * has_bias
    first = _tensor(root, params[0])
    hidden = first.shape[0] // gates
    more = {"proj_size": _tensor(root, params[each - 1]).shape[0]} if projects else {}
    layer = kind(
        first.shape[1],
        hidden,
        layers,
        has_bias,
        args["batch_first"],
        args["dropout"],
        directions == 2,
        **more,
        **_meta(first),
    )
    names = [name for group in layer._all_weights for name in group]
    tensors = _fill(root, layer, dict(zip(names, params, strict=True)))
    layer._init_flat_weights()  # the list of those that it was made with
    layer.train(args["train"])
    states = args["hx"]
    if kind is nn.GRU:
        return Call(layer, (args["input"], states), tensors, unpack=((0,), (1,)))
    return Call(layer, (args["input"], tuple(states)), tensors, unpack=((0,), (1, 0), (1, 1)))


@_reads(aten.lstm_cell.default, aten.gru_cell.default)
def _cell(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    is_lstm = node.target is aten.lstm_cell.default
    weight = _tensor(root, args["w_ih"])
    hidden = _tensor(root, args["w_hh"]).shape[1]
    kind: Any = nn.LSTMCell if is_lstm else nn.GRUCell
    layer = kind(weight.shape[1], hidden, args["b_ih"] is not None, **_meta(weight))
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    tensors = _fill(root, layer, {ours: args[its] for ours, its in names.items()})
    states = tuple(args["hx"]) if is_lstm else args["hx"]
    return Call(layer, (args["input"], states), tensors)


# -- layers whose arithmetic depends on the mode --------------------------------------------------

_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@_reads(aten.batch_norm.default)
def _batch_norm(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    x = value(args["input"])
    tracked = args["running_mean"] is not None
    if x.dim() not in _NORMS:
        raise Refused(f"there is no BatchNorm over {x.dim()} axes")
    layer = _NORMS[x.dim()](
        int(x.shape[1]),
        args["eps"],
        args["momentum"],
        args["weight"] is not None,
        tracked,
        device="meta",
        dtype=x.dtype,
    )
    nodes = {name: args[name] for name in ("weight", "bias", "running_mean", "running_var")}
    tensors = _fill(root, layer, nodes)
    if tracked:
        layer.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    return Call(layer.train(args["training"]), (args["input"],), tensors)


_DROPOUTS = {
    aten.dropout.default: nn.Dropout,
    aten.dropout_.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.feature_dropout_.default: nn.Dropout2d,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.alpha_dropout_.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    aten.feature_alpha_dropout_.default: nn.FeatureAlphaDropout,
}
_FEATURES = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


@_reads(*_DROPOUTS)
def _dropout(root: nn.Module, node: Node, args: dict[str, Any]) -> Call:
    target: Any = node.target
    kind: Any = _DROPOUTS[target]
    in_place = "self" in args
    x = args["self" if in_place else "input"]
    if kind is nn.Dropout2d:
        if (rank := _rank(x)) not in _FEATURES:
            raise Refused(f"there is no feature dropout over {rank} axes")
        kind = _FEATURES[rank]
    return Call(kind(args["p"], in_place).train(args["train"]), (x,), {})


# Whose mode the graph has as a constant.
BY_MODE = frozenset({aten.batch_norm.default, *_DROPOUTS})
