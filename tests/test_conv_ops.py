"""The int8 convolutions: values of the ops and functions, and their errors."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.nn import functional as T

import qnn.functional as F
from qnn.functional.layout import FILTERS
from qnn.kernels import OPS
from qnn.kernels.cpu.conv import float32_sums
from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.formats.int8 import INT8_MAX_K, INT8_STATIC_MAX_K
from qnn.kernels.reference import conv as reference
from qnn.kernels.schemes import get_scheme, schemes_of

from .common import DTYPES, examples, same_bits

SCHEMES = ("int8", "int8_static", "int8_weight")
CONVS = {1: T.conv1d, 2: T.conv2d, 3: T.conv3d}
TRANSPOSED = {1: T.conv_transpose1d, 2: T.conv_transpose2d, 3: T.conv_transpose3d}
GRID = {"input_scale": torch.tensor([0.04]), "input_zero_point": torch.tensor([5]).to(torch.int8)}


def grid_of(scheme: str) -> dict[str, torch.Tensor]:
    return GRID if scheme == "int8_static" else {}


class Case:
    """A convolution drawn at random, of integers: `x` whose codes are itself, and scales 1."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        make = torch.Generator().manual_seed(seed)
        self.axes, self.transposed = draw.randint(1, 3), draw.random() < 0.3
        most = {1: 7, 2: 5, 3: 3}[self.axes]
        self.kernel = [draw.randint(1, most) for _ in range(self.axes)]
        self.stride = [draw.randint(1, 3) for _ in range(self.axes)]
        self.dilation = [draw.randint(1, 2) for _ in range(self.axes)]
        self.padding = [draw.randint(0, 3) for _ in range(self.axes)]
        self.groups = draw.choice([1, 1, 2, 3])
        each, others = draw.randint(1, 9), draw.randint(1, 9)
        self.channels, self.outputs = each * self.groups, others * self.groups
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        sizes = [
            max(r - 2 * p, 1) + draw.randint(0, 4) for r, p in zip(reach, self.padding, strict=True)
        ]
        self.output_padding = [0] * self.axes
        if self.transposed:
            self.padding = [min(p, (r - 1) // 2) for p, r in zip(self.padding, reach, strict=True)]
            self.output_padding = [draw.randint(0, s - 1) for s in self.stride]
        batch = draw.randint(0, 3)
        shape = (batch, self.channels, *sizes)
        self.x = torch.randint(-127, 128, shape, generator=make).float()
        self.x.view(-1)[: 1 if batch else 0] = 127.0
        if batch:  # the scale of every sample is 1
            self.x.flatten(1)[:, 0] = 127.0
        if draw.random() < 0.4:
            self.x = self.x.movedim(1, -1).contiguous().movedim(-1, 1)
        first = (self.channels, others) if self.transposed else (self.outputs, each)
        self.w = torch.randint(-128, 128, (*first, *self.kernel), generator=make).to(torch.int8)
        self.bias = None
        if draw.random() < 0.5:
            self.bias = torch.randint(-999, 999, (self.outputs,), generator=make).float()

    def float64(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.double()
        given = (x.double(), self.w.double(), bias, self.stride, self.padding)
        if self.transposed:
            each = (self.output_padding, self.groups, self.dilation)
            return TRANSPOSED[self.axes](*given, *each)
        return CONVS[self.axes](*given, self.dilation, self.groups)

    def call(self, x: torch.Tensor, scheme: str, **given: Any) -> torch.Tensor:
        ones = torch.ones(self.outputs, *[1] * (self.axes + 1))
        operands = (x, (self.w, ones), None, self.bias, self.stride, self.padding)
        if self.transposed:
            each = (self.output_padding, self.groups, self.dilation)
            return F.conv_transpose(*operands, *each, scheme=scheme, **given)
        return F.conv(*operands, self.dilation, self.groups, scheme=scheme, **given)


@examples(60, 1000)
def test_integers_against_float64(examples: int) -> None:
    """Every scheme, exactly: codes are the integers themselves, and sums stay below 2^24."""
    one, drawn = torch.ones(1), Counter[Any]()
    for seed in range(examples):
        case = Case(seed)
        drawn[case.axes, case.transposed] += 1
        want = case.float64(case.x).float()
        for scheme in SCHEMES:
            if scheme == "int8_static":
                zero = torch.tensor([seed % 3 - 1]).to(torch.int8)
                x = case.x.clamp(-126, 126)
                got = case.call(x, scheme, input_scale=one, input_zero_point=zero)
                want_here = case.float64(x).float()
            else:
                got, want_here = case.call(case.x, scheme), want
            assert same_bits(got, want_here), (seed, scheme, vars(case))
            dense = case.x.is_contiguous() or not case.x.numel()
            channels = got.movedim(1, -1).is_contiguous()
            assert got.is_contiguous() if dense else channels, (seed, scheme)
    assert len(drawn) == 6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_is_cut_off_than_there_is(scheme: str) -> None:
    """Which leaves the values that no product reaches, and no gradient."""
    x, w = torch.randn(2, 3, 1, requires_grad=True), torch.randint(-9, 9, (3, 4, 1)).to(torch.int8)
    parts, bias = (w, torch.ones(4, 1, 1)), torch.randn(4)
    want = T.conv_transpose1d(x, w.float(), bias, 5, 2, 4)
    y = F.conv_transpose(x, parts, None, bias, 5, 2, 4, scheme=scheme, **grid_of(scheme))
    assert same_bits(y.detach(), want.detach())
    assert same_bits(y.detach(), bias.expand(2, 1, 4).mT)
    assert not torch.autograd.grad(y.sum(), x)[0].any()


@examples(40, 1000)
def test_float32_sums_are_those_of_float64(examples: int) -> None:
    """Sums beyond 2^24 too, in several parts."""
    for seed in range(examples):
        draw, make = random.Random(seed), torch.Generator().manual_seed(seed)
        groups, each, taps = draw.choice([1, 2]), draw.randint(1, 400), draw.choice([1, 3, 23])
        transposed = draw.random() < 0.4
        q = torch.randint(0, 256, (1, groups * each, 1, taps, 3), generator=make).to(torch.uint8)
        first = (groups * each, 2) if transposed else (2 * groups, each)
        w = torch.randint(-128, 128, (*first, 1, taps, 3), generator=make).to(torch.int8)
        if draw.random() < 0.5:
            q, w = q.fill_(255), w.fill_(-128)
        zero, rest = torch.tensor([-128]).to(torch.int8), ([1] * 3, [0] * 6, [1] * 3, groups)
        got = float32_sums(q, zero, w, *rest, transposed=transposed)
        want = reference.exact_sums(q, zero, w, *rest, transposed=transposed)
        assert torch.equal(got, want.float()), seed
        signed = (q.int() - 128).clamp(-127).to(torch.int8)
        got = float32_sums(signed, None, w, *rest, transposed=transposed)
        want = reference.exact_sums(signed, None, w, *rest, transposed=transposed)
        assert torch.equal(got, want.float()), seed


def drawn(
    axes: int = 2, groups: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """An image, a weight in parts, and a bias."""
    w = torch.randn(6, 4 // groups, *[3] * axes)
    return torch.randn(2, 4, *[7] * axes).to(dtype), FILTERS.quantize(w, "int8"), torch.randn(6)


class TestAgainstFloat:
    @parameterized.expand(itertools.product(SCHEMES, (1, 2, 3), (1, 2)))
    def test_near_the_float_layer(self, scheme: str, axes: int, groups: int) -> None:
        x, parts, bias = drawn(axes, groups)
        got = F.conv(x, parts, None, bias, 2, 1, 1, groups, scheme=scheme, **grid_of(scheme))
        weight = FILTERS.dequantize(parts, torch.float32, scheme)
        want = CONVS[axes](x, weight, bias, 2, 1, 1, groups)
        error = ((got - want).norm() / want.norm()).item()
        assert error < (1e-6 if scheme == "int8_weight" else 0.02)

    @parameterized.expand(itertools.product(SCHEMES, DTYPES))
    def test_dtypes(self, scheme: str, dtype: torch.dtype) -> None:
        x, parts, bias = drawn(dtype=dtype)
        got = F.conv(x, parts, None, bias, scheme=scheme, **grid_of(scheme))
        wide = F.conv(x.float(), parts, None, bias, scheme=scheme, **grid_of(scheme))
        assert got.dtype == dtype
        if scheme == "int8_weight":
            torch.testing.assert_close(got, wide.to(dtype), rtol=2e-2, atol=1e-2)
        else:
            assert torch.equal(got, wide.to(dtype))

    @parameterized.expand([("same",), ("valid",), (1,), ((2, 1),)])
    def test_padding(self, padding: Any) -> None:
        x, parts, _ = drawn()
        parts = (parts[0][..., :2].contiguous(), parts[1])  # an even kernel: more after than before
        weight = FILTERS.dequantize(parts, torch.float32, "int8")
        got = F.conv(x, parts, padding=padding, scheme="int8_weight")
        want = T.conv2d(x, weight, padding=padding)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    @parameterized.expand(["reflect", "replicate", "circular"])
    def test_padding_modes(self, mode: str) -> None:
        x, parts, bias = drawn()
        layer = nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode=mode)
        layer.weight.data, layer.bias.data = FILTERS.dequantize(parts, x.dtype, "int8"), bias
        got = F.conv(x, parts, None, bias, padding=(1, 2), padding_mode=mode, scheme="int8_weight")
        torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)

    def test_without_a_batch(self) -> None:
        x, parts, bias = drawn()
        assert torch.equal(F.conv(x[0], parts, None, bias), F.conv(x, parts, None, bias)[0])
        w = torch.ones(4, 3, 2, dtype=torch.int8), torch.ones(3, 1, 1)
        x = torch.randn(2, 4, 5)
        assert torch.equal(F.conv_transpose(x[0], w), F.conv_transpose(x, w)[0])

    @parameterized.expand(itertools.product(SCHEMES, (1, 3)))
    def test_a_sample_depends_on_itself_alone(self, scheme: str, axes: int) -> None:
        x, parts, bias = drawn(axes)
        if scheme == "int8_weight":
            x = x.round()  # whose float32 sums are exact, in any order
            parts = (parts[0], torch.ones_like(parts[1]))
        y = F.conv(x, parts, None, bias, scheme=scheme, **grid_of(scheme))
        assert torch.equal(
            F.conv(x[1:], parts, None, bias, scheme=scheme, **grid_of(scheme)), y[1:]
        )

    @parameterized.expand(["int8", "int8_static"])
    def test_a_sample_with_a_nan_or_inf_is_lost_and_no_other(self, scheme: str) -> None:
        x, parts, bias = drawn()
        clean = F.conv(x, parts, None, bias, scheme=scheme, **grid_of(scheme))
        for bad in (float("nan"), float("inf")):
            x[1, 2, 3, 3] = bad
            y = F.conv(x, parts, None, bias, scheme=scheme, **grid_of(scheme))
            assert not y[1].isfinite().any()
            assert torch.equal(y[0], clean[0])

    def test_a_grid_that_was_never_calibrated(self) -> None:
        x, parts, _ = drawn()
        none = {"input_scale": torch.zeros(1), "input_zero_point": GRID["input_zero_point"]}
        assert F.conv(x, parts, scheme="int8_static", **none).isnan().all()

    def test_autocast(self) -> None:
        x, parts, bias = drawn()
        with torch.autocast("cpu", torch.bfloat16):
            got = F.conv(x, parts, None, bias)
        assert torch.equal(got, F.conv(x.bfloat16(), parts, None, bias))


class TestEpilogue:
    """An activation, a residual and a last ReLU are the separate torch calls."""

    @parameterized.expand(itertools.product(SCHEMES, ACTIVATIONS, DTYPES[:2]))
    def test_of_floats(self, scheme: str, activation: str, dtype: torch.dtype) -> None:
        op = OPS[str(get_scheme(scheme).op("conv"))]
        (label, args) = next(each for each in op.samples() if each[0].startswith(str(dtype)[6:]))
        given = dict(zip((arg.name for arg in op.inputs), args, strict=True))
        plain = {**given, "residual": None, "activation": "none", "last": "none"}
        bare = op.overload(*plain.values())
        for last, residual in itertools.product(("none", "relu"), (None, torch.randn_like(bare))):
            mine = {**given, "residual": residual, "activation": activation, "last": last}
            want = ACTIVATIONS[activation](bare.clone())
            want = want if residual is None else want + residual
            want = ACTIVATIONS[last](want)
            got = op.overload(*mine.values())
            torch.testing.assert_close(
                got, want, rtol=torch.finfo(dtype).eps, atol=2e-6, equal_nan=True, msg=label
            )

    def test_of_codes(self) -> None:
        """Codes give what the layer of their floats gives, and codes again its codes."""
        x, (w, sw), bias = drawn()
        w, sw, x = w.unsqueeze(2), sw.unsqueeze(2), x.unsqueeze(2)
        geometry = ([1, 2, 1], [0, 0, 1, 1, 1, 0], [1, 1, 1], 1)
        sx, zx = GRID.values()
        x[1, 1, 0, 2, 2] = float("nan")
        q, scale = torch.ops.qnn.int8_static_quantize(x, sx, zx)
        want = torch.ops.qnn.int8_static_conv(x, w, sw, sx, zx, *geometry, bias)
        got = torch.ops.qnn.int8_codes_conv(q, scale, zx, w, sw, *geometry, bias)
        assert same_bits(got.nan_to_num(7), want.nan_to_num(7))
        assert got[1].isnan().all()
        so, zo = torch.tensor([0.05]), torch.tensor([-128]).to(torch.int8)
        of = (q, scale, zx, w, sw, so, zo, *geometry, bias)
        chain = torch.ops.qnn.int8_chain_conv(*of, activation="relu")
        both = torch.ops.qnn.int8_fork_conv(*of, activation="relu")
        quantised = torch.ops.qnn.int8_static_quantize(want.relu(), so, zo)
        for mine, other in zip((*chain, *both), (*quantised, want.relu(), *quantised), strict=True):
            assert torch.equal(mine.nan_to_num(7), other.nan_to_num(7))
        assert chain[1].flatten().isnan().tolist() == [False, True]
        codes, scales = torch.ops.qnn.int8_static_quantize(want.nan_to_num(), so, zo)
        other = (codes.float() - (zo.float() + 128)) * scales
        got = torch.ops.qnn.int8_codes_conv(
            q, scale, zx, w, sw, *geometry, bias, None, codes, scales, zo, last="relu"
        )
        assert torch.equal(got[0], (want + other).relu()[0])


class TestErrors:
    def image(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    @parameterized.expand(
        [
            ((2, 4, 2, 2), {}, "leave nothing of an image of \\[1, 2, 2\\]: the result would be"),
            ((2, 5, 9, 9), {}, "c"),
            ((2, 4, 9, 9), {"stride": 0}, "stride, dilation and groups must be at least 1"),
            ((2, 4, 9, 9), {"padding": -1}, "padding must not be negative"),
            ((2, 4, 9, 9), {"groups": 4}, "w must be"),
            ((2, 4, 0, 9), {"padding": 3}, "only the batch may be empty"),
            ((2, 4, 9, 9), {"padding": "full"}, "padding must be numbers, 'same' or 'valid'"),
            ((2, 4, 9, 9), {"padding": "same", "stride": 2}, "'same' needs stride 1"),
            ((2, 4, 9, 9), {"stride": (1, 1, 1)}, "stride must be one number or 2"),
            ((2, 4, 9, 9), {"padding_mode": "mirror"}, "padding_mode must be one of 'zeros'"),
            ((2, 2, 4, 9, 9), {}, "x must have 4 axes, or 3 without a batch"),
            ((2, 4, 9, 9), {"scheme": "fp8"}, "scheme 'fp8' has no convolutions; use one of"),
            ((2, 4, 9, 9), {"scheme": "int8_static"}, "needs input_scale and input_zero_point"),
            ((2, 4, 9, 9), {"input_scale": torch.ones(1)}, "takes no input_scale"),
        ]
    )  # fmt: skip
    def test_conv(self, shape: Sequence[int], given: dict[str, Any], words: str) -> None:
        _, parts, _ = drawn()
        with pytest.raises(ValueError, match=words):
            F.conv(self.image(*shape), parts, **given)

    def test_conv_transpose(self) -> None:
        w = torch.ones(4, 3, 2, 2, dtype=torch.int8), torch.ones(3, 1, 1, 1)
        for given, words in (
            ({"output_padding": 1}, "output_padding must be smaller than stride or dilation"),
            ({"padding": -1}, "padding must not be negative"),
            ({"padding": 9}, "leave nothing"),
            ({"groups": 3}, "groups must divide|sw must be"),
        ):
            with pytest.raises(ValueError, match=words):
                F.conv_transpose(torch.randn(1, 4, 3, 3), w, **given)

    @parameterized.expand([("int8", INT8_MAX_K), ("int8_static", INT8_STATIC_MAX_K)])
    def test_sums_that_int32_could_not_hold(self, scheme: str, limit: int) -> None:
        for transposed, products in itertools.product((False, True), (limit, limit + 1)):
            op = OPS[str(get_scheme(scheme).op("conv_transpose" if transposed else "conv"))]
            x = torch.empty(1, products, 1, 1, 1, device="meta")
            shape = (products, 1, 1, 1, 1) if transposed else (1, products, 1, 1, 1)
            w = torch.empty(shape, dtype=torch.int8, device="meta")
            sw, grid = torch.empty(1, 1, 1, 1, 1, device="meta"), ()
            if scheme == "int8_static":
                grid = tuple(each.to("meta") for each in GRID.values())
            args = (x, w, sw, *grid, [1] * 3, [0] * 6, [1] * 3, 1)
            if products == limit:
                op.require(*args)
                continue
            with pytest.raises(ValueError, match=f"at most {limit}, beyond which an int32 sum"):
                op.require(*args)

    def test_who_has_convolutions(self) -> None:
        sixteen = {"int16", "int16_static"}  # in test_int16_conv.py
        assert schemes_of("conv") == schemes_of("conv_transpose")
        assert {*schemes_of("conv")} == {*SCHEMES} | sixteen
