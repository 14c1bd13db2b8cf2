"""`summary`: what became of each layer, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from qnn import kinds
from qnn.calibration.doubts import NOTE
from qnn.calibration.statistics import Statistics
from qnn.kinds import kind_of, own_tensors, waits
from qnn.verbs.checks import WAITS, left_alone, require_module, why_not_plain
from qnn.verbs.inventory import nbytes
from qnn.verbs.inventory import size as _size
from qnn.verbs.plan import FOLDED, LEFT, REASON
from qnn.verbs.tables import aligned

# Layers that people expect to be quantised too, and why they are not.
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (
        nn.RNN,
        "there is no quantised nn.RNN, only LSTM and GRU; an nn.GRU in its place converts, and so "
        "do the two nn.Linear of each of its steps",
    ),
    (
        nn.RNNCell,
        "there is no quantised nn.RNNCell, only LSTMCell and GRUCell; two nn.Linear, for input and "
        "state, compute the same and convert",
    ),
    (
        nn.Bilinear,
        "there is no quantised nn.Bilinear; an nn.Linear(in1 * in2, out) with its weight.flatten(1)"
        ", of (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2), computes the same and converts",
    ),
    (nn.LayerNorm, "normalisation stays in float"),
    (nn.modules.batchnorm._NormBase, "normalisation stays in float"),
    (nn.RMSNorm, "normalisation stays in float"),
    (nn.GroupNorm, "normalisation stays in float"),
)

_LAST = "backend, or why it was left alone"
_PREPARED = "prepared: run it on data or qnn.calibrate it, then qnn.convert"
_TRAINING = "float parameters, quantised in each step; convert to deploy"


@dataclass(frozen=True)
class Row:
    """A layer that holds parameters or buffers. Bytes are those of its own tensors, shared ones
    counted at the first.
    """

    name: str
    layer: str
    scheme: str | None
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    backend: str | None
    reason: str | None
    note: str | None = None
    """What calibration has found that may make the layer inaccurate; not in a state dict."""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row in words."""
        name, scheme, shape = self.name or "(model)", self.scheme or "-", map(str, self.shape)
        before, after = _size(self.bytes_before), _size(self.bytes_after)
        told = self.backend or self.reason or ""
        return name, self.layer, scheme, "x".join(shape) or "-", before, after, told

    @property
    def kind_of_reason(self) -> str:
        """The reason without what is of this layer alone."""
        return _OF_ONE.sub("", self.reason or "")


# Names and sizes of one layer in a reason: `; gate [4, 64] (…) is probably a weight`.
_OF_ONE = re.compile(
    r"; BatchNorm .* folded in$|; .* is probably a weight.*$|(?<=tied to )'[^']*' "
    r"|; with this layer alone in .*$"
)


@dataclass(frozen=True)
class Total:
    """The layers that stay float for one reason, and their bytes."""

    reason: str
    layers: int
    bytes: int


class Summary:
    """The table that `summary` returns: `print` it, or read `.rows`, `.totals` and `.to_dict()`."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def totals(self) -> list[Total]:
        """What stays float, by reason, the most bytes first."""
        held: dict[str, list[int]] = {}
        for row in self.rows:
            if row.reason is not None:
                held.setdefault(row.kind_of_reason, []).append(row.bytes_after)
        totals = [Total(reason, len(each), sum(each)) for reason, each in held.items()]
        return sorted(totals, key=lambda total: (-total.bytes, -total.layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`."""
        return {
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "totals": [asdict(total) for total in self.totals],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        head = ("name", "layer", "scheme", "shape", "before", "after", _LAST)
        ratio = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        bytes_ = _size(self.bytes_before), _size(self.bytes_after)
        total = ("total", "", "", "", *bytes_, f"{ratio:.2f} of before")
        table = [head, *(row.cells for row in self.rows), total]
        first, *lines, last = aligned(table)
        rule = "-" * max(map(len, (first, *lines)))
        left = [
            f"  {_size(each.bytes):>8}  {each.layers:>4}  {each.reason}" for each in self.totals
        ]
        if left:
            left = ["", "in float:", "     bytes  layers, reason", *left]
        notes = [f"{row.name or '(model)'}: {row.note}" for row in self.rows if row.note]
        return "\n".join([first, rule, *lines, rule, last, *notes, *left])

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """A row for each layer of `model` that holds tensors: scheme, size before and after, backend,
    or why it was left alone.

    Nothing is computed and no tensor is copied or read, so a checkpoint that is memory-mapped stays
    so. The first call in a process runs the self-test of the CPU's int8 engines (some
    milliseconds).

    >>> print(qnn.summary(qnn.convert(nn.Linear(64, 32))))
    name     layer    scheme  shape  before  after   backend, or why it was left alone
    ...
    """
    require_module("qnn.summary", model)
    notes = {name: getattr(module, NOTE, None) for name, module in model.named_modules()}
    return Summary([replace(row, note=notes.get(row.name)) for row in _rows(model)])


def _rows(model: nn.Module) -> Iterator[Row]:
    seen: set[int] = set()
    remarks = {k: v for kind in kinds.known_kinds() for k, v in kind.remarks(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, Statistics) or not (tensors := own_tensors(module)):
            continue
        fresh = [t for t in tensors if id(t) not in seen]
        seen.update(map(id, tensors))
        after, remark = nbytes(fresh), remarks.get(name, "") + getattr(module, FOLDED, "")
        title, kind, layer = type(module).__name__, kind_of(module), cast(Any, module)
        if kind is not None and kind.is_quantized(module):
            before, backend = layer._bytes_in_float(fresh), layer._backend() + remark
            yield Row(name, title, layer.scheme, kind.shape(layer), before, after, backend, None)
        elif kind is not None and kind.is_training(module):
            yield Row(name, title, layer.scheme, kind.shape(layer), after, after, _TRAINING, None)
        else:
            reason = _reason(module) + remark
            yield Row(name, title, None, _shape(module), after, after, None, reason)
    left = getattr(model, "meta", {}).get(LEFT, {}) if isinstance(model, GraphModule) else {}
    for name, reason in left.items():
        yield Row(name, "operator", None, (), 0, 0, None, reason)


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of the weight, or of the largest tensor; nothing before the first batch."""
    tensors = [tensor for tensor in own_tensors(module) if not is_lazy(tensor)]
    weight = module._parameters.get("weight")
    if weight is not None and not is_lazy(weight):
        return tuple(weight.shape)
    return tuple(max(tensors, key=torch.numel).shape) if tensors else ()


def _reason(module: nn.Module) -> str:
    if waits(module):
        return WAITS
    told = getattr(module, REASON, None)
    if told is not None:
        return str(told)
    if kinds.is_prepared(module):
        return _PREPARED
    for kind, reason in _KINDS:
        if isinstance(module, kind):
            return reason
    if type(module) is nn.Module:  # where torch.export keeps the tensors of a layer
        return "the graph reads these tensors by operators that stay float"
    if kind_of(module) is not None:
        # A model that no verb has seen: as convert would say it.
        return left_alone(module, "int8") or why_not_plain(module) or "not converted"
    return f"{type(module).__name__} has no quantised layer{_probable_weights(module)}"


def _probable_weights(module: nn.Module) -> str:
    """Parameters that look like weights of products: two axes or more, and no table of positions or
    tokens.
    """
    held = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None
        and sum(length > 1 for length in parameter.shape) > 1
        and not any(word in name for word in _TABLES)
    }
    found = [f"{name} {list(p.shape)} ({_size(nbytes([p]))})" for name, p in held.items()]
    if not found:
        return ""
    what = "is probably a weight" if len(found) == 1 else "each is probably a weight"
    stacks = sum(parameter.dim() == 3 for parameter in held.values())
    hint = "; of fused experts qnn.register_adapter says how they are built" if stacks > 1 else ""
    return f"; {', '.join(found)} {what} that stays float{hint}"


_TABLES = ("embed", "pos", "token")
