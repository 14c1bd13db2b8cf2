"""`torch.utils.flop_counter` counts a layer's products as those of its float twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qnn
from qnn.kernels import OPS, SCHEMES, Op

from .common import child


def count(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.endswith("_static")])
def test_linear(scheme: str) -> None:
    """The forward, and the gradient to the input: a frozen weight has none."""
    layer = nn.Linear(128, 96)
    layer.weight.requires_grad_(False)
    quantized = qnn.convert(nn.Sequential(layer), scheme)[0]
    x = torch.randn(2, 5, 128, requires_grad=True)
    assert count(lambda: quantized(x)) == count(lambda: layer(x)) == 2 * 10 * 128 * 96
    step = [count(lambda m=m: m(x).sum().backward()) for m in (layer, quantized)]
    assert step[0] == step[1] == 2 * 2 * 10 * 128 * 96


@pytest.mark.parametrize("scheme", [s.name for s in SCHEMES.values() if s.trainable])
def test_training(scheme: str) -> None:
    x = torch.randn(32, 64, requires_grad=True)  # whole groups: those of the last one count too
    layer = qnn.Linear(64, 96, scheme=scheme)
    assert count(lambda: layer(x).sum().backward()) == 3 * 2 * 32 * 64 * 96


@pytest.mark.parametrize(
    ("cell", "kwargs"),
    [
        (nn.LSTM, {}),
        (nn.LSTM, {"bidirectional": True, "num_layers": 2}),
        (nn.LSTM, {"proj_size": 4}),
        (nn.GRU, {"bidirectional": True}),
    ],
)
@pytest.mark.parametrize("scheme", ["int8", "int8_weight"])
def test_recurrent(cell: Any, kwargs: dict[str, Any], scheme: str) -> None:
    layer = cell(12, 10, **kwargs)
    quantized = qnn.convert(nn.ModuleList([layer]), scheme)[0]
    x = torch.randn(5, 3, 12)
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():  # oneDNN's has no formula
        want = count(lambda: layer(x))
    assert count(lambda: quantized(x)) == want
    # Backward: the forward again and back.
    x.requires_grad_()
    assert count(lambda: quantized(x)[0].sum().backward()) == 3 * want


def test_exported() -> None:
    layer, x = qnn.convert(nn.Sequential(nn.Linear(64, 96)), "int8"), torch.randn(5, 64)
    module = torch.export.export(layer, (x,)).module()
    with torch.no_grad():
        assert count(lambda: module(x)) == 2 * 5 * 64 * 96


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_op_is_registered_and_a_cast_a_lookup_or_a_count_counts_nothing(op: Op) -> None:
    _, args = next(op.samples())
    with torch.no_grad():
        total = count(lambda: op.overload(*args))
    nothing = "quantize" in op.name or "_embedding" in op.name
    nothing |= op.name.endswith("_norm")
    nothing |= op.name in ("histogram", "exponents", "int8_kv_append")
    assert (total == 0) is nothing


def test_the_first_call_of_a_process_counts() -> None:
    """Importing qnn does not import torch's counter, which imports Triton."""
    code = """
        import sys, torch, qnn
        assert "torch.utils.flop_counter" not in sys.modules
        layer, x = qnn.QLinear(64, 32), torch.randn(5, 64)
        layer.reset_parameters()
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        print(counter.get_total_flops())
    """
    assert int(child(code).split()[-1]) == 2 * 5 * 64 * 32
