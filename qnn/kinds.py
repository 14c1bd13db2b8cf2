"""Which layers the verbs know, and which of other libraries compute what `nn.Linear` computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.rnn import RNNBase
from torch.nn.parameter import is_lazy

# `y = x · weight + bias`: a linear layer whose weight is [in, out].
CONV1D = "transformers.pytorch_utils.Conv1D"
# Their forward is their own and computes `x · weightᵀ + bias`, of a weight [out, in].
_AS_LINEAR = {
    "timm.layers.linear.Linear",
    "torch_geometric.nn.dense.linear.Linear",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
}


def qualified(kind: type) -> str:
    """`torch.nn.modules.conv.Conv2d`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_conv1d(module: nn.Module) -> bool:
    return qualified(type(module)) == CONV1D


def is_transposed(module: nn.Module) -> bool:
    """Whether a float layer holds its weight as `[in, out]`: a `Conv1D`, or what stands for it."""
    return any(qualified(kind) in (CONV1D, _OBSERVED) for kind in type(module).__mro__)


_OBSERVED = "qnn.conv1d.ObservedConv1D"


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is an LSTM or GRU, a layer or a cell, in any form."""
    if isinstance(module, RNNBase):
        return module.mode in ("LSTM", "GRU")
    return isinstance(module, nn.LSTMCell | nn.GRUCell)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is of a kind that may be quantised: linear, or an LSTM or GRU."""
    if is_recurrent(module) or isinstance(module, nn.Linear):
        return True
    return is_conv1d(module) or qualified(type(module)) in _AS_LINEAR


def why_not_as_linear(
    module: nn.Module, named: bool, forwards: tuple[Callable[..., Any], ...]
) -> str | None:
    """Why a layer that is no plain `nn.Linear` does not become a quantised one; None if it does.

    One that computes the same, by one of `forwards`, becomes one when it is named: it might mean
    more by its class.
    """
    name, kind = qualified(type(module)), "a subclass of nn.Linear"
    if not isinstance(module, nn.Linear):
        kind = "a layer"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return f"{name} is {kind} whose weight nn.MultiheadAttention reads, without calling it"
    same = type(module).forward in forwards or qualified(type(module)) in _AS_LINEAR
    if not same:
        return f"{name} is {kind} with a forward, and so a meaning of its own"
    if named:
        return None
    return f"{name} is {kind} that computes what nn.Linear does: name it in include to convert it"


def as_linear(module: nn.Module) -> nn.Linear:
    """The `nn.Linear` of what computes as one, around the same parameters; of a `Conv1D` around a
    view of its weight, transposed.
    """
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None  # noqa: S101  # why_not_convert refuses layers without one
    if is_transposed(module):
        weight = nn.Parameter(weight.detach().t(), requires_grad=False)
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, False, device="meta", dtype=weight.dtype)
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear.train(module.training)


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the values; a parameter that waits for its first batch has none yet."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None and not is_lazy(t))


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of the module itself."""
    held = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def waits(module: nn.Module) -> bool:
    """Whether the module takes its sizes from an input that it has not seen yet."""
    return any(map(is_lazy, own_tensors(module)))


def size(count: float) -> str:
    """Bytes in words: `1.2 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def inventory(modules: Iterable[nn.Module]) -> str:
    """The kinds of modules that hold something or have no children, by qualified name, the largest
    first: `torch.nn.modules.conv.Conv2d (3, 1.2 MB), torch.nn.modules.activation.ReLU (2)`.
    """
    count, held = dict[str, int](), dict[str, int]()
    seen = set[int]()
    for module in {id(module): module for module in modules}.values():
        tensors = [t for t in own_tensors(module) if id(t) not in seen]
        seen.update(map(id, tensors))
        if tensors or not module._modules:
            kind = qualified(type(module))
            count[kind] = count.get(kind, 0) + 1
            held[kind] = held.get(kind, 0) + nbytes(tensors)
    order = sorted(count, key=lambda kind: (-held[kind], kind))
    return ", ".join(
        f"{kind} ({count[kind]}{f', {size(held[kind])}' if held[kind] else ''})" for kind in order
    )
