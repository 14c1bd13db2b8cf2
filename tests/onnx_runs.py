"""Running exported models in ONNX Runtime, for the tests."""

from __future__ import annotations

import collections
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import qnn

DYNAMIC = torch.export.Dim.DYNAMIC
# What ONNX Runtime multiplies integers with.
INTEGERS = ("MatMulInteger", "ConvInteger", "MatMulNBits")


class Exported:
    """A model in ONNX Runtime: what it gives, and the operators that are left when the session has
    optimised its graph.
    """

    def __init__(self, program: Any) -> None:
        import onnx
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path, optimised = Path(folder) / "model.onnx", Path(folder) / "optimised.onnx"
            program.save(path)
            self.bytes = sum(each.stat().st_size for each in Path(folder).iterdir())
            options = onnxruntime.SessionOptions()
            options.optimized_model_filepath = str(optimised)
            options.log_severity_level = 3
            self.session = onnxruntime.InferenceSession(str(path), options)
            self.operators = collections.Counter(_operators(onnx.load(str(optimised)).graph))

    def __call__(self, *args: Any) -> list[np.ndarray[Any, Any]]:
        names = [each.name for each in self.session.get_inputs()]
        given = [each.numpy() for each in pytree.tree_leaves(args)]
        found: list[np.ndarray[Any, Any]] = self.session.run(
            None, dict(zip(names, given, strict=True))
        )
        return found

    @property
    def integers(self) -> dict[str, int]:
        return {name: self.operators[name] for name in INTEGERS if self.operators[name]}


def _operators(graph: Any) -> list[str]:
    """Their types, with those of graphs inside."""
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for each in node.attribute:
            found += _operators(each.g) if each.HasField("g") else []
    return found


def exported(
    model: nn.Module, args: Sequence[Any], dynamic: Any = None, **options: Any
) -> Exported:
    from qnn.integrations import onnx as qnn_onnx

    options.setdefault("verbose", False)
    return Exported(qnn_onnx.export(model, tuple(args), dynamic_shapes=dynamic, **options))


def decibels(wanted: Any, found: Any) -> float:
    """The least signal-to-error ratio of all results."""
    each = []
    wanted = pytree.tree_leaves(wanted)
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found, strict=True):
        x, y = a.detach().double().numpy(), b.astype(np.float64)
        assert x.shape == y.shape
        assert x.size == 0 or np.ptp(x) > 0  # else the ratio would say nothing
        error, signal = np.linalg.norm(x - y), np.linalg.norm(x)
        each.append(math.inf if error == 0 else 20 * math.log10(signal / error))
    return min(each)


def compared(model: nn.Module, run: Exported, *args: Any) -> float:
    with torch.no_grad():
        return decibels(model(*args), run(*args))


def static(model: nn.Module, *batch: Any, scheme: str = "int8_static") -> nn.Module:
    """The model converted with grids of one batch."""
    prepared = qnn.prepare(model.eval(), scheme=scheme)
    qnn.calibrate(prepared, [batch if len(batch) > 1 else batch[0]], progress=False)
    converted: nn.Module = qnn.convert(prepared)
    return converted


class Each(nn.Module):
    """What each of several layers gives for the same input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        return tuple(layer(x) for layer in self.layers)
