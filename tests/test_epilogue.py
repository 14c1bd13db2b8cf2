"""Activation and residual inside a linear op: the same values as the separate torch calls."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch.nn import functional as F

from qnn.kernels import OPS as REGISTRY
from qnn.kernels.cpu import int8_linear as cpu
from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.reference import int8

from .common import DTYPES, weights

OPS = ("int8_linear", "int8_rows_linear", "int8_weight_linear")
EVERY = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}
# Those that linear layers have.
UNFUSED = {name: EVERY[name] for name in REGISTRY["int8_linear"].choices["activation"]}


# Of the ReLU every kernel has torch's own bits. C++ kernels compute the other activations otherwise
# than torch, whose own float32 GELU errs by 1e-6.
def same(got: torch.Tensor, want: torch.Tensor, activation: str) -> bool:
    if activation in ("none", "relu"):
        return torch.equal(got, want)
    rounding = torch.finfo(want.dtype).eps * want.abs().amax() if want.numel() else 0
    return torch.allclose(got, want, rtol=0, atol=float(2 * rounding + 2e-6))


def call(op: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if op == "int8_rows_linear":
        q, scale = torch.ops.qnn.int8_quantize(x)
        return torch.ops.qnn.int8_rows_linear(q, scale, *args, **kwargs, dtype=x.dtype)
    return getattr(torch.ops.qnn, op)(x, *args, **kwargs)


class TestEpilogue:
    def test_every_activation_is_tested(self) -> None:
        assert set(EVERY) == set(ACTIVATIONS)

    @parameterized.expand(itertools.product(OPS, UNFUSED, DTYPES))
    def test_equals_the_separate_calls(self, op: str, activation: str, dtype: torch.dtype) -> None:
        w, sw = weights(63, 37)
        for lead in ((5,), (2, 3), (), (0,)):
            x, bias = torch.randn(*lead, 37).to(dtype), torch.randn(63).to(dtype)
            residual = torch.randn(*lead, 63).to(dtype)
            for given_bias, given in itertools.product((None, bias), (None, residual)):
                kept = residual.clone()
                got = call(op, x, w, sw, given_bias, given, activation)
                want = UNFUSED[activation](call(op, x, w, sw, given_bias))
                want = want if given is None else want + given
                assert got.dtype == dtype
                assert same(got, want, activation), lead
                assert torch.equal(residual, kept)

    @parameterized.expand(itertools.product(UNFUSED, DTYPES))
    def test_kernels_in_python_equal_the_separate_calls(
        self, activation: str, dtype: torch.dtype
    ) -> None:
        w, sw = weights(63, 37)
        x, bias, residual = (torch.randn(5, n).to(dtype) for n in (37, 63, 63))
        q, scale = cpu.quantize(x)
        rest = (w, sw, bias[0])
        for kernel, args in (
            (cpu.linear, (x, *rest)),
            (cpu.weight_linear, (x, *rest)),
            (functools.partial(cpu.rows_linear, dtype=dtype), (q, scale, *rest)),
        ):
            got = kernel(*args, residual=residual, activation=activation)
            assert torch.equal(got, UNFUSED[activation](kernel(*args)) + residual)

    @parameterized.expand([(dtype,) for dtype in DTYPES])
    def test_quantised_rows_equal_the_layer(self, dtype: torch.dtype) -> None:
        for m, k, n in ((4, 64, 64), (200, 300, 700)):  # both engines
            w, sw = weights(n, k)
            x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
            x[1] = 0
            got = call("int8_rows_linear", x, w, sw, bias)
            assert torch.equal(got, torch.ops.qnn.int8_linear(x, w, sw, bias))
            assert torch.equal(got, int8.linear_reference(x, w, sw, bias))

    @parameterized.expand(itertools.product(OPS, UNFUSED))
    def test_no_columns(self, op: str, activation: str) -> None:
        w, sw, bias = torch.empty(9, 0, dtype=torch.int8), torch.ones(9, 1), torch.randn(9)
        got = call(op, torch.empty(3, 0), w, sw, bias, torch.ones(3, 9), activation)
        assert same(got, UNFUSED[activation](bias.expand(3, 9)) + 1, activation)

    @parameterized.expand(UNFUSED)
    def test_non_finite_rows_of_quantised_input(self, activation: str) -> None:
        w, sw = weights(33, 64)
        x = torch.randn(4, 64)
        clean = call("int8_rows_linear", x, w, sw, None, None, activation)
        for bad in (float("nan"), float("inf"), -float("inf")):
            dirty = x.clone()
            dirty[2, 7] = bad
            y = call("int8_rows_linear", dirty, w, sw, None, None, activation)
            assert not bool(y[2].isfinite().any())
            assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])

    def test_quantised_rows_and_scales_of_any_stride(self) -> None:
        w, sw = weights(9, 8)
        q = torch.randint(-127, 128, (8, 2, 3), dtype=torch.int8).movedim(0, -1)
        scale = torch.rand(3, 2, 1).transpose(0, 1)
        got = torch.ops.qnn.int8_rows_linear(q, scale, w, sw)
        want = torch.ops.qnn.int8_rows_linear(q.contiguous(), scale.contiguous(), w, sw)
        assert torch.equal(got, want)

    @parameterized.expand(OPS)
    def test_errors(self, op: str) -> None:
        w, sw = weights(9, 8)
        x = torch.randn(2, 3, 8).bfloat16()
        named = {"w": w, "sw": sw, "bias": None}
        first = {"x": x}
        if op == "int8_rows_linear":
            first = dict(zip(("q", "scale"), torch.ops.qnn.int8_quantize(x), strict=True))
            named["dtype"] = x.dtype
        lender = "dtype" if op == "int8_rows_linear" else "x"
        names = "'none', 'relu', 'gelu', 'gelu_tanh', 'silu', 'relu6', 'hardswish', 'hardsigmoid'"
        for message, wrong in {
            f"residual must be torch.bfloat16 as {lender}, got torch.float32; cast it": {
                "residual": torch.ones(2, 3, 9)
            },
            r"residual must begin with \(2, 3\), got \[6, 9\]": {
                "residual": torch.ones(6, 9).bfloat16()
            },
            r"residual must be \[..., n\] with n = 9 as in w": {
                "residual": torch.ones(2, 3, 8).bfloat16()
            },
            f"activation must be one of {names}, got 'swish'": {"activation": "swish"},
        }.items():
            given = {"residual": None, "activation": "none", **first, **named, **wrong}
            args = [given[arg.name] for arg in REGISTRY[op].inputs]
            with pytest.raises((TypeError, ValueError), match=message):
                REGISTRY[op].check(*args)
            # A kernel in C++ has words of its own.
            with pytest.raises(
                (TypeError, ValueError), match=rf"qnn::{op}.*: {next(iter(wrong))} "
            ):
                REGISTRY[op].overload(*args)
