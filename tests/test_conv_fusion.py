"""What the compiler folds into convolutions."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
from parameterized import parameterized
from torch import nn

import qnn.functional as F
from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.schemes import get_scheme

from .common import DTYPES
from .test_conv_functions import Layer
from .test_conv_ops import SCHEMES
from .test_fusion import compiled


class Block(nn.Module):
    def __init__(self, scheme: str, act: Any, last: Any = None) -> None:
        super().__init__()
        self.layer, self.act, self.last = Layer(scheme, groups=1), act, last
        self.layer.function = self.one

    def one(self, x: torch.Tensor, parts: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return F.conv(x, parts, None, self.layer.bias, 1, 1, **{**kwargs, "groups": 1})

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = self.act(self.layer(x))
        y = y if residual is None else residual + y
        return y if self.last is None else self.last(y)


class TestFolding:
    @parameterized.expand(itertools.product([n for n in ACTIVATIONS if n != "none"], DTYPES[:2]))
    @torch.no_grad()
    def test_an_activation(self, name: str, dtype: torch.dtype) -> None:
        block, x = Block("int8", ACTIVATIONS[name]), torch.randn(2, 4, 6, 5).to(dtype)
        got, calls = compiled(block, x)
        assert calls == Counter({f"int8_conv+{name}": 1})
        # torch's own GELU is off by up to 1.2e-6 where it runs on AVX-512, and ours by 0.5e-6.
        rounding = 0 if name in ("relu", "relu6") else 12 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, block(x), rtol=rounding, atol=rounding)

    @parameterized.expand(itertools.product(SCHEMES, (False, True), (False, True)))
    @torch.no_grad()
    def test_a_residual_and_a_relu_after_it(
        self, scheme: str, channels_last: bool, dynamic: bool
    ) -> None:
        block = Block(scheme, nn.Identity(), torch.relu)
        x, residual = torch.randn(2, 4, 6, 5), torch.randn(2, 6, 6, 5)
        if channels_last:
            x, residual = (
                each.contiguous(memory_format=torch.channels_last) for each in (x, residual)
            )
        got, calls = compiled(block, x, residual, dynamic=dynamic)
        assert calls == Counter({f"{get_scheme(scheme).op('conv')}+residual": 1})
        want = block(x, residual)
        assert torch.equal(got, want)
        assert got.stride() == want.stride()

    @torch.no_grad()
    def test_an_activation_then_a_residual(self) -> None:
        block = Block("int8", torch.relu)
        x, residual = torch.randn(2, 4, 6, 5), torch.randn(2, 6, 6, 5)
        got, calls = compiled(block, x, residual)
        assert calls == Counter({"int8_conv+relu+residual": 1})
        assert torch.equal(got, block(x, residual))

    @torch.no_grad()
    def test_a_residual_that_is_a_layer_with_all_folded(self) -> None:
        first, second = (Block("int8", nn.Identity(), torch.relu) for _ in range(2))

        def fn(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return second(x, first(x, residual))

        x, residual = torch.randn(2, 4, 6, 5), torch.randn(2, 6, 6, 5)
        got, calls = compiled(fn, x, residual)
        assert calls == Counter({"int8_conv+residual": 2})
        assert torch.equal(got, fn(x, residual))

    @torch.no_grad()
    def test_a_sum_that_is_used_twice(self) -> None:
        block = Block("int8", nn.Identity())
        x, residual = torch.randn(2, 4, 6, 5), torch.randn(2, 6, 6, 5)

        def fn(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            y = block(x, residual)
            return y.relu() * y.sum()

        got, calls = compiled(fn, x, residual)
        assert calls == Counter({"int8_conv+residual": 1})
        torch.testing.assert_close(got, fn(x, residual))
