"""The C++ kernels of a cache: the references' bits in every tier and on any threads."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from qnn.kernels import OPS

from .common import DTYPES, examples, same_bits
from .test_attention_tiers import rows
from .tiers import TIERS, need

APPEND, ATTEND = OPS["int8_kv_append"], OPS["int8_kv_attention"]


def alike(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.is_floating_point():
        got, want = got.nan_to_num(7e7), want.nan_to_num(7e7)
    return same_bits(got, want)


def parts(r: random.Random, b: int, g: int, s: int, d: int, e: int) -> list[torch.Tensor]:
    """A cache that holds anything, in some layout whose rows are dense."""

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        how = r.random()
        if how < 0.2:  # places before heads
            return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x
        if how < 0.4:  # the first places of a larger one
            return torch.cat([x, x], 2)[:, :, :s]
        return x

    codes = [torch.randint(-128, 128, (b, g, s, n), dtype=torch.int8) for n in (d, e)]
    scales = [torch.full((b, g, s), r.choice((math.nan, 1e30, 0.0))) for _ in range(2)]
    keys, key_scale, values, value_scale = map(laid_out, (codes[0], scales[0], codes[1], scales[1]))
    return [keys, key_scale, values, value_scale, torch.zeros(b, dtype=torch.int64)]


def call(r: random.Random) -> tuple[Any, ...]:
    """Rows to append in two steps, a cache, and what attends to it."""
    dtype = r.choice(DTYPES)
    b, g, each = r.randint(1, 3), r.randint(1, 3), r.choice((1, 1, 2, 3, 8, 25))
    n = r.choice((r.randint(1, 150), r.randint(500, 700)))
    m = min(n, r.choice((1, 1, 2, 3, r.randint(1, 60))))
    d, e = (r.choice((64, 80, 128, r.randint(1, 140))) for _ in range(2))
    s = n + r.choice((0, 1, r.randint(0, 90)))
    k, v = rows(r, (b, g, n, d), dtype), rows(r, (b, g, n, e), dtype)
    q = rows(r, (b, g * each, m, d), dtype)
    mask, causal = None, r.random() < 0.4
    if not causal and r.random() < 0.7:
        shape = [size if r.random() < 0.6 else 1 for size in (b, g * each, m, s)]
        seen = torch.rand(shape) < r.choice((0.05, 0.5, 0.95))
        mask = seen
        if r.random() < 0.6:
            mask = torch.randn(shape).to(r.choice(DTYPES))
            hidden = r.choice((-math.inf, -math.inf, torch.finfo(mask.dtype).min, math.nan, 6e4))
            mask = mask.masked_fill(~seen, hidden)
    return k, v, parts(r, b, g, s, d, e), q, mask, r.choice((None, None, 0.05, -1.0)), causal


@pytest.mark.usefixtures("library", "threads")
class TestTiers:
    @pytest.mark.parametrize("tier", TIERS)
    @examples(60, 500)
    def test_random_calls(self, tier: str, examples: int) -> None:
        need(tier)
        for seed in range(examples):
            r = random.Random(seed)
            torch.manual_seed(seed)
            k, v, cache, q, mask, scale, causal = call(r)
            torch.set_num_threads(r.choice((1, 2, 3)))
            wanted, first = [part.clone() for part in cache], k.shape[2] // 3
            for start, stop in ((0, first), (first, k.shape[2])):
                piece = k[:, :, start:stop], v[:, :, start:stop]
                torch.ops.qnn.cpu_kv_append(*piece, *cache, tier)
                APPEND.reference(*piece, *wanted)
            assert all(alike(got, want) for got, want in zip(cache, wanted, strict=True)), seed
            if not causal and mask is None:
                cache[4] -= torch.randint(0, k.shape[2] + 1, cache[4].shape)
            got = torch.ops.qnn.cpu_kv_attention(q, *cache, mask, scale, causal, tier)
            want = ATTEND.reference(q, *cache, mask, scale, causal)
            assert alike(got, want), (seed, (got != want).nonzero()[:3])

    @pytest.mark.parametrize("tier", TIERS)
    def test_any_codes(self, tier: str) -> None:
        """Also −128, which no quantiser makes, and scales from elsewhere."""
        need(tier)
        for seed in range(8):
            torch.manual_seed(seed)
            cache = parts(random.Random(1), 2, 2, 70, 64, 80)
            for scale in (cache[1], cache[3]):
                scale.copy_(torch.rand(scale.shape) * 10.0 ** (seed * 5 - 20))
            cache[4].fill_(66)
            q = torch.randn(2, 4, 1 + seed % 2 * 5, 64)
            got = torch.ops.qnn.cpu_kv_attention(q, *cache, None, None, False, tier)
            want = ATTEND.reference(q, *cache, None, None, False)
            assert alike(got, want), seed

    @pytest.mark.parametrize("tier", TIERS)
    def test_more_keys_than_32_bits_hold_the_sums_of(self, tier: str) -> None:
        need(tier)
        cache = parts(random.Random(3), 1, 1, 140_001, 8, 3)
        k, v = torch.randn(1, 1, 140_000, 8), torch.full((1, 1, 140_000, 3), 2.5)
        v[..., 1] *= -1
        torch.ops.qnn.cpu_kv_append(k, v, *cache, tier)
        for m in (1, 3):
            q = torch.zeros(1, 1, m, 8)
            got = torch.ops.qnn.cpu_kv_attention(q, *cache, None, None, False, tier)
            assert same_bits(got, ATTEND.reference(q, *cache, None, None, False))
            torch.testing.assert_close(got[0, 0, 0], v[0, 0, 0], rtol=1e-4, atol=0)

    def test_eager_calls_reach_it(self) -> None:
        cache = parts(random.Random(3), 1, 2, 20, 64, 64)
        k, v = torch.randn(1, 2, 10, 64), torch.randn(1, 2, 10, 64)
        APPEND.call(k, v, *cache)
        assert same_bits(
            ATTEND.call(k, *cache, None, None, True),
            OPS["int8_attention"].call(k, k, v, None, None, True),
        )
        assert APPEND._direct is not None
        assert ATTEND._direct is not None

    def test_what_is_written_must_lie_so(self) -> None:
        """A copy would be written, and lost."""
        cache = parts(random.Random(3), 2, 2, 20, 64, 64)
        k, v = torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64)
        for i, other, words in (
            (2, cache[2].mT.contiguous().mT, "values must be dense along the last axis"),
            (1, cache[1].mT.contiguous().mT, "keys must be dense along the last axis"),
            (4, torch.zeros(1, dtype=torch.int64).expand(2), "make it dense"),
        ):
            given = [*cache[:i], other, *cache[i + 1 :]]
            with pytest.raises(ValueError, match=words):
                APPEND.overload(k, v, *given)
            assert not cache[4].any()
