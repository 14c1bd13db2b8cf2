"""Modules under the names that they had in 0.1, for a release: `from qnn.qlinear import QLinear`.

Modules that are called as a function of `qnn` is (`qnn.convert`) are not among them: importing one
would put it in the function's place.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "qnn.backends": "qnn.kernels.backends",
    "qnn.compressed_tensors": "qnn.integrations.compressed_tensors",
    "qnn.doctor": "qnn.verbs.doctor",
    "qnn.fake_quantize": "qnn.calibration.fake_quantize",
    "qnn.linear": "qnn.nn.linear.training",
    "qnn.observed_linear": "qnn.nn.linear.observed",
    "qnn.observers": "qnn.calibration.observers",
    "qnn.parts": "qnn.calibration.parts",
    "qnn.patterns": "qnn.verbs.patterns",
    "qnn.qlinear": "qnn.nn.linear.quantized",
    "qnn.qlstm": "qnn.nn.recurrent.qlstm",
    "qnn.quant_spec": "qnn.calibration.spec",
    "qnn.quantizable": "qnn.nn.recurrent.quantizable",
    "qnn.functional.cast_fusion": "qnn.passes.cast_fusion",
    "qnn.functional.fusion": "qnn.passes.fusion",
    "qnn.kernels.float8": "qnn.kernels.formats.float8",
    "qnn.kernels.float_ops": "qnn.kernels.declare.floats",
    "qnn.kernels.int8_static": "qnn.kernels.declare.int8",
    "qnn.kernels.mxfp8": "qnn.kernels.formats.mxfp8",
    "qnn.kernels.nvfp4": "qnn.kernels.formats.nvfp4",
    "qnn.kernels.spec": "qnn.kernels.op",
}


class _Finder:
    """Finds a module under its old name, and says the new one."""

    def __init__(self) -> None:
        self.own: ModuleSpec | None = None

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Finder()) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It ran under its own name; the import system has put the old one into it."""
        module.__spec__ = self.own


sys.meta_path.append(_Finder)
