"""int8 attention: what it computes, what it leaves out, and how near it is to float attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch.nn import functional as TF

from qnn.kernels import OPS
from qnn.kernels.reference import attention as meaning

from .common import DTYPES, same_bits

OP = OPS["int8_attention"]


def attend(*args: Any) -> torch.Tensor:
    """The op, with its result as torch has it, `[b, h, m, e]`."""
    return OP.overload(*args).transpose(1, 2)


def operands(
    b: int = 2, h: int = 3, m: int = 37, n: int = 41, d: int = 64, e: int = 64,
    g: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, m, d), (b, g or h, n, d), (b, g or h, n, e))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def exact(q: Any, k: Any, v: Any, *rest: Any) -> torch.Tensor:
    """Float attention in float64."""
    mask, scale, causal = (*rest, *(None, None, False)[len(rest) :])
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    q, k, v = (each.double() for each in (q, k, v))
    return TF.scaled_dot_product_attention(
        q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def sqnr(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(20 * torch.log10(want.double().norm() / (got.double() - want.double()).norm()))


def masks(m: int = 37, n: int = 41) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(2, 3, m, n, generator=generator) > 0.4
    seen[..., 0] = True
    return {
        "bool": seen,
        "bool of keys": seen[:, :1, :1],
        "bool of queries": seen[:1, :1],
        "added": torch.randn(1, 3, m, n, generator=generator),
        "added of keys": torch.zeros(2, 1, 1, n).masked_fill(~seen[:, :1, :1], -math.inf),
        "least": torch.zeros(2, 3, m, n).masked_fill(~seen, torch.finfo(torch.float32).min),
    }


class TestMeaning:
    @parameterized.expand(DTYPES)
    def test_near_float_attention(self, dtype: torch.dtype) -> None:
        for sizes in ({}, {"m": 1, "n": 300}, {"g": 1, "d": 80, "e": 96}, {"n": 1, "d": 1, "e": 1}):
            args = operands(dtype=dtype, **sizes)
            assert sqnr(attend(*args), exact(*args)) > 36

    def test_any_row_length_is_as_near(self) -> None:
        """15-bit weights: those of 8 bits lose 5 dB from 128 to 1500 keys."""
        for n in (128, 1500):
            args = operands(1, 2, 40, n)
            assert sqnr(attend(*args), exact(*args)) > 38.5

    @parameterized.expand(masks())
    def test_masks(self, name: str) -> None:
        args, mask = operands(), masks()[name]
        assert sqnr(attend(*args, mask), exact(*args, mask)) > 35
        whole = mask.expand(2, 3, 37, 41)
        assert same_bits(attend(*args, mask), attend(*args, whole.contiguous()))

    def test_causal_is_its_mask(self) -> None:
        for m, n in ((37, 41), (41, 37), (1, 5)):
            args = operands(m=m, n=n)
            mask = torch.ones(m, n, dtype=torch.bool).tril()[None, None]
            got = attend(*args, None, None, True)
            assert same_bits(got, attend(*args, mask))
            assert sqnr(got, exact(*args, None, None, True)) > 36

    def test_scale(self) -> None:
        args = operands()
        assert same_bits(attend(*args), attend(*args, None, 1 / 8))
        for scale in (0.03, 0.0, -0.2):
            got = attend(*args, None, scale)
            assert sqnr(got, exact(*args, None, scale)) > 33

    def test_grouped_heads_are_repeated_heads(self) -> None:
        q, k, v = operands(h=6, g=2)
        repeated = (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
        assert same_bits(attend(q, k, v), attend(*repeated))

    def test_blocks_of_any_size_and_threads_change_no_bit(self, monkeypatch: Any) -> None:
        args = operands()
        for rest in ((), (None, None, True), (masks()["added"],), (masks()["bool"],)):
            want = OP.reference(*args, *rest)
            for block in (1, 5 * 6 * 41):
                monkeypatch.setattr(meaning, "_BLOCK", block)
                assert same_bits(OP.reference(*args, *rest), want)
            # A query alone has the result that it has among others.
            mask = rest[0] if rest and rest[0] is not None else None
            if not rest or (mask is not None and mask.dtype != torch.bool):
                row = None if mask is None else mask[:, :, 5:6]
                one = attend(args[0][:, :, 5:6], *args[1:], row)
                assert same_bits(one, want[:, 5:6].transpose(1, 2))

    def test_the_weights(self) -> None:
        """Monotone, and 3.4 units of 1/32640 from the power of two."""
        d = torch.arange(40_000)
        a = meaning.weights_of(d)
        assert bool((a[1:] <= a[:-1]).all())
        error = (a.double() - meaning.ONE * 2.0 ** (-d.double() / 1024)).abs()
        assert error.max().item() < 3.4


class TestHardValues:
    """What is hidden has no part in a result; what is seen and is NaN makes a NaN."""

    def test_nothing_visible_is_zero(self) -> None:
        q, k, v = operands()
        seen = torch.ones(1, 1, 37, 41, dtype=torch.bool)
        seen[:, :, 3] = False
        added = torch.zeros(1, 1, 37, 41).masked_fill(~seen, -math.inf)
        for mask in (seen, added):
            y = attend(q, k, v, mask)
            assert not y[:, :, 3].any()
            assert sqnr(y, exact(q, k, v, mask)) > 36
        assert not attend(q, k[:, :, :0], v[:, :, :0]).any()

    def test_all_at_the_least_number_is_the_mean(self) -> None:
        """As in torch: it hides nothing."""
        args = operands()
        mask = torch.full((1, 1, 1, 41), torch.finfo(torch.float32).min)
        torch.testing.assert_close(
            attend(*args, mask), args[2].mean(2, keepdim=True).expand(2, 3, 37, 64),
            rtol=0.02, atol=0.02,
        )  # fmt: skip

    def test_a_mask_is_read_in_float32(self) -> None:
        """So the least number of float64 hides."""
        args = operands()
        mask = torch.zeros(1, 1, 37, 41, dtype=torch.float64)
        mask[..., 5:] = torch.finfo(torch.float64).min
        want = attend(*args, mask == 0)
        assert same_bits(attend(*args, mask), want)
        assert same_bits(OP.reference(*args, mask).transpose(1, 2), want)

    @parameterized.expand([("nan", math.nan), ("inf", math.inf), ("wild", 1e30)])
    def test_hidden_keys(self, _: str, value: float) -> None:
        """Keys that no query sees: their bits are those of zeros; so are those of padding."""
        q, k, v = operands()
        seen = torch.ones(1, 1, 1, 41, dtype=torch.bool)
        seen[..., 7] = seen[..., 40] = False
        want = attend(q, k, v, seen)
        k[:, :, (7, 40)], v[:, :, (7, 40)] = value, -value
        assert same_bits(attend(q, k, v, seen), want)
        added = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
        assert same_bits(attend(q, k, v, added), want)
        few = attend(q[:, :, :5], k, v, None, None, True)
        assert few.isfinite().all()  # 7 and 40 come after the fifth query

    @parameterized.expand([("nan", math.nan), ("inf", math.inf), ("minus inf", -math.inf)])
    def test_only_who_sees_it_is_nan(self, _: str, value: float) -> None:
        q, k, v = operands()
        for at in range(3):
            args = [each.clone() for each in (q, k, v)]
            args[at][0, 1, 20, 5] = value
            bad = attend(*args, None, None, True).isnan()
            want = torch.zeros_like(bad)
            want[0, 1, slice(20, 21) if at == 0 else slice(20, None)] = True
            assert torch.equal(bad, want)

    def test_nan_in_a_mask(self) -> None:
        args, mask = operands(), torch.zeros(1, 1, 37, 41)
        mask[..., 4, 9] = math.nan
        y = attend(*args, mask)
        assert y[:, :, 4].isnan().all()
        assert y[:, :, 5:].isfinite().all()

    def test_scores_beyond_any_limit(self) -> None:
        """The largest wins, and no integer wraps."""
        q, k, v = operands(m=1, n=4)
        for size in (50.0, 1e15, 1e18):
            y = attend(q * size, k * size, v)
            best = (q.double() @ k.double().mT).argmax(-1)
            want = v.gather(2, best[..., None].expand(2, 3, 1, 64))
            if size == 50.0:
                torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
            assert y.isfinite().all()

    def test_small_and_large_rows(self) -> None:
        q, k, v = operands()
        for size in (1e-35, 1e-30, 1e30):
            y = attend(q, k, v * size)
            assert sqnr(y.double() / size, exact(q, k, v)) > 36
        v[:, :, ::2] = 0
        assert sqnr(attend(q, k, v), exact(q, k, v)) > 33
        assert not attend(q, k, v * 0).any()

    @parameterized.expand(["b", "h", "m", "n", "e"])
    def test_empty(self, axis: str) -> None:
        args = operands(**{axis: 0})
        y = attend(*args)
        assert y.shape == (*args[0].shape[:3], args[2].shape[3])
        assert not y.any()


class TestStrides:
    def test_views(self) -> None:
        """`[b, m, h, d]` as models have it, a part of a packed projection, expanded heads."""
        q, k, v = operands(m=41)
        turned = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (q, k, v)]
        packed = torch.stack((q, k, v), -2).transpose(1, 2).contiguous().transpose(1, 2).unbind(-2)
        every_other = [torch.stack((each, each + 1), -1)[..., 0] for each in (q, k, v)]
        want = attend(q, k, v)
        for args in (turned, packed, every_other):
            assert not args[0].is_contiguous()
            y = attend(*args)
            assert same_bits(y, want)
            assert y.transpose(1, 2).is_contiguous()
        one = [each[:1].expand(2, -1, -1, -1) for each in (k, v)]
        assert same_bits(attend(q, *one), attend(q, *(each.contiguous() for each in one)))
        mask = masks(41, 41)["added"]
        turned_mask = mask.mT.contiguous().mT
        assert same_bits(attend(q, k, v, turned_mask), attend(q, k, v, mask))


class TestErrors:
    def test_words(self) -> None:
        q, k, v = operands(h=6, g=3)
        for args, words in (
            ((q, k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1)), "must divide"),
            ((q, k, v[:, :, :40]), r"v must be \[b, g, n, e\] with n = 41"),
            ((q[..., :0], k[..., :0], v), "d must be at least 1"),
            ((q, k, v, torch.ones(37, 41)), r"mask must be \[2, 6, 37, 41\], or 1 along"),
            ((q, k, v, torch.ones(2, 6, 37, 40)), "mask must be"),
            ((q, k, v, torch.ones(2, 6, 37, 41), None, True), "mask and is_causal exclude"),
        ):
            for call in (OP.overload, OP.call, OP.fake):
                with pytest.raises(ValueError, match=rf"qnn::int8_attention\(q=.*{words}"):
                    call(*args)

    def test_no_gradient_to_a_mask(self) -> None:
        args, mask = operands(), masks()["added"].requires_grad_()
        with pytest.raises(NotImplementedError, match="no gradient with respect to mask"):
            attend(*args, mask).sum().backward()


class TestGradient:
    @parameterized.expand([("", {}), ("grouped", {"h": 6, "g": 2}), ("causal", {}), ("mask", {})])
    def test_is_that_of_float_attention(self, name: str, sizes: dict[str, int]) -> None:
        args = [each.double().requires_grad_() for each in operands(**sizes)]
        mask = masks()["added of keys"] if name == "mask" else None
        rest = (mask, 0.2, name == "causal")
        dy = torch.randn(*args[0].shape[:3], 64, dtype=torch.float64)
        got = torch.autograd.grad(attend(*args, *rest), args, dy)
        for one, other in zip(got, torch.autograd.grad(exact(*args, *rest), args, dy), strict=True):
            torch.testing.assert_close(one, other)

    def test_nothing_visible(self) -> None:
        args = [each.requires_grad_() for each in operands()]
        mask = torch.zeros(1, 1, 37, 41, dtype=torch.bool)
        for gradient in torch.autograd.grad(attend(*args, mask).sum(), args):
            assert not gradient.any()

    def test_of_second_order(self) -> None:
        sizes = {"b": 1, "h": 2, "m": 3, "n": 4, "d": 3, "e": 2}
        args = [each.double().requires_grad_() for each in operands(**sizes)]

        def twice(attention: Any) -> tuple[torch.Tensor, ...]:
            y = attention(*args)
            first = torch.autograd.grad(y, args, torch.ones_like(y), create_graph=True)
            return torch.autograd.grad(sum(each.square().sum() for each in first), args)

        for one, other in zip(twice(attend), twice(exact), strict=True):
            torch.testing.assert_close(one, other)
