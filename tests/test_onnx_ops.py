"""Each translated op in ONNX Runtime, on a sample of its own."""

from __future__ import annotations

import pytest
import torch
from parameterized import parameterized
from torch import nn

from qnn.kernels import OPS

pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from qnn.integrations.onnx.table import RULES

from .onnx_runs import decibels, exported


class _Calls(nn.Module):
    """Calls of ops: their first arguments are the model's inputs, and other tensors its buffers."""

    def __init__(self, calls: list[tuple[str, tuple[object, ...]]]) -> None:
        super().__init__()
        self.calls = []
        for i, (name, args) in enumerate(calls):
            rest: list[object] = []
            for j, arg in enumerate(args[1:]):
                if isinstance(arg, torch.Tensor):
                    self.register_buffer(f"b{i}_{j}", arg)
                rest.append(f"b{i}_{j}" if isinstance(arg, torch.Tensor) else [arg])
            self.calls.append((name, rest))

    def forward(self, *firsts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results: list[torch.Tensor] = []
        for first, (name, rest) in zip(firsts, self.calls, strict=True):
            args = [getattr(self, each) if isinstance(each, str) else each[0] for each in rest]
            found = OPS[name].overload(first, *args)
            results += found if isinstance(found, tuple) else [found]
        return tuple(results)


def _kind(name: str) -> str:
    """Which of the tests below has an op."""
    return next((k for k in ("conv", "lstm", "gru", "grouped", "embedding") if k in name), "other")


class TestOps:
    @parameterized.expand(["conv", "lstm", "gru", "grouped", "embedding", "other"])
    def test_samples(self, kind: str) -> None:
        """Each op on a sample of its own, with every epilogue that it has."""
        calls = []
        for name in (name for name in RULES if _kind(name) == kind):
            op = OPS[name]
            free = str(op.dtypes.get("dtype", op.dtypes[op.inputs[0].name])[0])
            samples = [
                (name, args)
                for label, args in op.samples()
                if label.startswith(f"{free.removeprefix('torch.')}-5")
            ]
            calls += samples if name == "int8_linear" else samples[:2][-1:]  # every epilogue
        assert {name for name, _ in calls} == {name for name in RULES if _kind(name) == kind}
        # numpy has no float8, and so no such input.
        calls = [(name, args) for name, args in calls if args[0].dtype != torch.float8_e4m3fn]
        firsts = [args[0] for _, args in calls]
        found = exported(_Calls(calls).eval(), firsts)(*firsts)
        at = 0
        for name, args in calls:
            wanted = OPS[name].overload(*args)
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            mine, at = found[at : at + len(wanted)], at + len(wanted)
            assert decibels(wanted, mine) > 60, name
