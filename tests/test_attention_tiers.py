"""int8 attention of the C++ kernels: the reference's bits in every tier and on any threads."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from qnn.kernels import OPS

from .common import DTYPES, examples, same_bits
from .tiers import TIERS, need

OP = OPS["int8_attention"]


def rows(r: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values of any strides, with rows that are zero, large, or hold a NaN or inf."""
    order = r.sample(range(3), 3)
    wide = [shape[i] for i in order]
    x = torch.randn(*wide, shape[3] + r.choice((0, 0, 3)))[..., : shape[3]]
    x = x.permute(*(order.index(i) for i in range(3)), 3)
    if r.random() < 0.1:
        x = x.mT.contiguous().mT
    if r.random() < 0.2:
        x = x[:1].expand(shape)
    x = x * r.choice((1.0, 1.0, 4.0, 30.0))
    for value in (0.0, 1e-38, 1e30, math.nan, -math.inf):
        if r.random() < 0.15 and x.numel():
            x = x.clone()
            x[r.randrange(shape[0]), :, r.randrange(shape[2]), r.randrange(shape[3])] = value
    if r.random() < 0.3 and x.numel():
        x = x.clone()
        x[:, r.randrange(shape[1]), r.randrange(shape[2])] = 0
    return x.to(dtype)


def call(r: random.Random) -> tuple[Any, ...]:
    dtype = r.choice(DTYPES)
    b, g, each = r.randint(1, 3), r.randint(1, 3), r.randint(1, 2)
    m, n = r.choice((1, r.randint(1, 70))), r.choice((r.randint(1, 150), r.randint(500, 1100)))
    d, e = (r.choice((64, 80, r.randint(1, 140))) for _ in range(2))
    q = rows(r, (b, g * each, m, d), dtype)
    k, v = rows(r, (b, g, n, d), dtype), rows(r, (b, g, n, e), dtype)
    mask, causal = None, r.random() < 0.3
    if not causal and r.random() < 0.7:
        shape = [size if r.random() < 0.6 else 1 for size in (b, g * each, m, n)]
        seen = torch.rand(shape) < r.choice((0.05, 0.5, 0.95))
        seen = seen.mT.contiguous().mT if r.random() < 0.2 else seen
        mask = seen
        if r.random() < 0.6:
            mask = torch.randn(shape).to(r.choice(DTYPES))
            hidden = r.choice((-math.inf, -math.inf, torch.finfo(mask.dtype).min, math.nan, 6e4))
            mask = mask.masked_fill(~seen, hidden)
    return q, k, v, mask, r.choice((None, None, 0.05, -1.0)), causal


@pytest.mark.usefixtures("library", "threads")
class TestTiers:
    @pytest.mark.parametrize("tier", TIERS)
    @examples(60, 500)
    def test_random_calls(self, tier: str, examples: int) -> None:
        need(tier)
        for seed in range(examples):
            r = random.Random(seed)
            torch.manual_seed(seed)
            args = call(r)
            torch.set_num_threads(r.choice((1, 2, 3)))
            got, want = torch.ops.qnn.cpu_attention(*args, tier), OP.reference(*args)
            bits = got.nan_to_num(7e7), want.nan_to_num(7e7)
            assert same_bits(*bits), (seed, (bits[0] != bits[1]).nonzero()[:3])

    @pytest.mark.parametrize("tier", TIERS)
    def test_threads_that_share_a_head(self, tier: str) -> None:
        """More threads than heads, and heads that threads do not divide."""
        need(tier)
        for heads in (1, 3, 5):
            args = [torch.randn(1, heads, 200, 64) for _ in range(3)]
            torch.set_num_threads(1)
            for causal in (False, True):
                want = torch.ops.qnn.cpu_attention(*args, None, None, causal, tier)
                assert same_bits(want, OP.reference(*args, None, None, causal))
                torch.set_num_threads(4)
                got = torch.ops.qnn.cpu_attention(*args, None, None, causal, tier)
                assert same_bits(got, want)

    def test_eager_calls_reach_it(self) -> None:
        args = [torch.randn(1, 2, 20, 64) for _ in range(3)]
        assert same_bits(OP.call(*args), OP.reference(*args))
        assert OP._direct is not None

    @pytest.mark.parametrize("tier", TIERS)
    def test_more_keys_than_32_bits_hold_the_sums_of(self, tier: str) -> None:
        need(tier)
        q, k = torch.zeros(1, 1, 2, 8), torch.randn(1, 1, 140_000, 8)
        v = torch.full((1, 1, 140_000, 3), 2.5)
        v[..., 1] *= -1
        got = torch.ops.qnn.cpu_attention(q, k, v, None, None, False, tier)
        assert same_bits(got, OP.reference(q, k, v))
        torch.testing.assert_close(got[0, 0, 0], v[0, 0, 0], rtol=1e-4, atol=0)
