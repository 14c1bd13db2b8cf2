"""CUDA kernels. What runs where stands in `backends.py`; Triton is imported by the first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qnn.kernels.cuda.backends import has_kernel, kernel


def kernels_for(op: str) -> dict[str, Callable[..., Any]]:
    """The kernels of `op`, as `Op` takes them: one for CUDA, or none."""
    return {"CUDA": kernel(op)} if has_kernel(op) else {}
