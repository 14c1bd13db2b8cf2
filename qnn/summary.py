"""`summary`: what became of each layer, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qnn.backends import linear_backend, recurrent_backend
from qnn.convert import is_prepared
from qnn.linear import Linear
from qnn.qlinear import QLinear
from qnn.qlstm import QRecurrent
from qnn.quantizable import QuantizableRecurrent
from qnn.statistics import Statistics
from qnn.swap import REASON

# Layers that people expect to be quantised too, and why they are not.
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (
        nn.MultiheadAttention,
        "its q, k and v projections are one fused parameter, not linear layers",
    ),
    (nn.RNN, "there is no quantised nn.RNN, only LSTM and GRU"),
    (nn.RNNCellBase, "there is no quantised cell; a QLSTM or QGRU takes one step at a time"),
    (nn.Embedding, "embeddings are looked up, not multiplied: left in float"),
    (nn.EmbeddingBag, "embeddings are looked up, not multiplied: left in float"),
    (nn.modules.conv._ConvNd, "there is no quantised convolution yet"),
    (nn.LayerNorm, "normalisation stays in float"),
    (nn.modules.batchnorm._NormBase, "normalisation stays in float"),
    (nn.RMSNorm, "normalisation stays in float"),
    (nn.GroupNorm, "normalisation stays in float"),
)

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


class Summary:
    """The table that `summary` returns: `print` it, or read `.rows` and `.to_dict()`."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`."""
        return {
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        head = (
            "name",
            "layer",
            "scheme",
            "shape",
            "before",
            "after",
            "backend, or why it was left alone",
        )
        body = [
            (
                row.name or "(model)",
                row.layer,
                row.scheme or "-",
                "x".join(map(str, row.shape)) or "-",
                _size(row.bytes_before),
                _size(row.bytes_after),
                row.backend or row.reason or "",
            )
            for row in self.rows
        ]
        ratio = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        total = (
            "total",
            "",
            "",
            "",
            _size(self.bytes_before),
            _size(self.bytes_after),
            f"{ratio:.2f} of before",
        )
        widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in body
        ]
        first, last = (
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in (head, total)
        )
        rule = "-" * max(map(len, (first, *lines)))
        return "\n".join([first, rule, *lines, rule, last])

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
    return Summary(list(_rows(model)))


def _rows(model: nn.Module) -> Iterator[Row]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Statistics):
            continue
        tensors = [
            t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
        ]
        if not tensors:
            continue
        fresh = [t for t in tensors if id(t) not in seen]
        seen.update(map(id, tensors))
        after = sum(map(_nbytes, fresh))
        kind = type(module).__name__
        if isinstance(module, QLinear):
            held = [module.stored[0], module.bias]
            sizes = [module.in_features * module.out_features, module.out_features]
            before = module.dtype.itemsize * sum(
                size
                for tensor, size in zip(held, sizes, strict=True)
                if any(tensor is each for each in fresh)
            )
            shape = (module.out_features, module.in_features)
            yield Row(name, kind, module.scheme, shape, before, after, linear_backend(module), None)
        elif isinstance(module, QRecurrent):
            values = [t for t in fresh if t.dtype == torch.int8 or t.dim() == 1]
            before = module.dtype.itemsize * sum(map(torch.numel, values))
            shape = tuple(module._parameters["weight_hh_l0"].shape)  # type: ignore[union-attr]
            backend = recurrent_backend(module)
            yield Row(name, kind, module.scheme, shape, before, after, backend, None)
        elif isinstance(module, Linear):
            shape = (module.out_features, module.in_features)
            yield Row(name, kind, module.scheme, shape, after, after, _TRAINING, None)
        else:
            weight = module._parameters.get("weight")
            largest = tuple((weight if weight is not None else max(tensors, key=torch.numel)).shape)
            yield Row(name, kind, None, largest, after, after, None, _reason(module))


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _reason(module: nn.Module) -> str:
    told = getattr(module, REASON, None)
    if told is not None:
        return str(told)
    if is_prepared(module):
        return _PREPARED
    for kind, reason in _KINDS:
        if isinstance(module, kind):
            return reason
    if type(module) in (nn.Linear, nn.LSTM, nn.GRU) or isinstance(module, QuantizableRecurrent):
        return "not converted"
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} is a subclass of nn.Linear with a meaning of its own"
    return f"{type(module).__name__} has no quantised layer"


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"
