"""The C++ convolutions on every tier that runs here, against the reference in plain torch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.reference import conv as reference
from qnn.kernels.reference import int16

from .tiers import TIERS, need

pytestmark = pytest.mark.usefixtures("library")
SCHEMES = ("int8", "int8_static", "int8_weight", "int16", "int16_static")
EXACT = ("none", "relu", "relu6", "hardswish", "hardsigmoid")
EACH = [
    pytest.param(40, 1, marks=pytest.mark.short),
    pytest.param(400, 10_000, marks=pytest.mark.long),
]


class Draw:
    """A convolution of 1, 2 or 3 axes, of any memory format, some samples with NaN or inf."""

    def __init__(self, seed: int, transposed: bool = False) -> None:
        self.transposed = transposed
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        draw = self.random
        while True:
            axes, groups = draw.choice([1, 2, 2, 3]), draw.choice([1, 1, 2, 3])
            none = 3 - axes
            self.kernel = [1] * none + [draw.choice([1, 2, 3, 5, 7]) for _ in range(axes)]
            self.stride = [1] * none + [draw.choice([1, 1, 2, 3]) for _ in range(axes)]
            self.dilation = [1] * none + [draw.choice([1, 1, 2]) for _ in range(axes)]
            self.padding = [0] * 2 * none + [draw.randint(0, 4) for _ in range(2 * axes)]
            self.image = [1] * none + [draw.randint(1, 20) for _ in range(axes)]
            self.groups, self.batch = groups, draw.choice([1, 1, 3])
            most = 130 // groups
            self.channels, self.outputs = (groups * draw.randint(1, most) for _ in range(2))
            if draw.random() < 0.25:
                self.channels = self.outputs = self.groups = draw.randint(1, 130)
            if transposed:  # what is cut off, or added
                self.padding = [p - 2 for p in self.padding]
            self.out = [
                (i - 1) * s + d * (k - 1) + 1 - p - q
                if transposed
                else (i + p + q - d * (k - 1) - 1) // s + 1
                for i, p, q, d, k, s in zip(
                    self.image, self.padding[::2], self.padding[1::2], self.dilation, self.kernel,
                    self.stride, strict=True,
                )
            ]  # fmt: skip
            window = self.channels // self.groups * torch.tensor(self.kernel).prod().item()
            work = self.outputs * window * torch.tensor(self.out).prod().item()
            if min(self.out) > 0 and work < 1e7:
                break
        self.dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        self.activation = draw.choice(list(ACTIVATIONS))
        self.last = draw.choice(["none", "relu"])
        self.parts = draw.randint(1, 4)

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        last = self.random.random() < 0.5
        return x.to(memory_format=torch.channels_last_3d) if last else x

    def x(self) -> torch.Tensor:
        x = torch.randn(self.batch, self.channels, *self.image).to(self.dtype)
        if self.random.random() < 0.2:
            x[0, self.random.randrange(self.channels), -1, -1, -1] = self.random.choice(
                [float("nan"), float("inf")]
            )
        return self.laid_out(x)

    def codes(self, *shape: int) -> torch.Tensor:
        return self.laid_out(torch.randint(0, 256, shape).to(torch.uint8))

    def weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.outputs, self.channels // self.groups, *self.kernel)
        if self.transposed:
            shape = (self.channels, self.outputs // self.groups, *self.kernel)
        w = torch.randint(-128, 128, shape).to(torch.int8)
        return self.laid_out(w), torch.rand(self.outputs, 1, 1, 1, 1) * 0.02

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        zero_point = torch.tensor([self.random.randint(-128, 127)]).to(torch.int8)
        return torch.tensor([self.random.choice([0.02, 0.05])]), zero_point

    def rest(self) -> list[Any]:
        """Geometry, bias and residual."""
        bias = torch.randn(self.outputs).to(self.dtype) if self.random.random() < 0.6 else None
        y = torch.randn(self.batch, self.outputs, *self.out).to(self.dtype)
        residual = self.laid_out(y) if self.random.random() < 0.4 else None
        return [self.stride, self.padding, self.dilation, self.groups, bias, residual]


def agrees(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def compare(draw: Draw, scheme: str, tier: str) -> None:
    """A call over floats, and its reference."""
    transposed = draw.transposed
    x, (w, sw), rest = draw.x(), draw.weight(), draw.rest()
    if scheme == "int8_weight":  # torch's own float convolutions differ in what inf becomes
        x.nan_to_num_(0, 0, 0)
    after = draw.activation, draw.last
    grid = draw.grid() if "static" in scheme else ()
    if scheme == "int16_static":
        grid = (grid[0] / 256,)
    of_scheme = {
        "int8": reference.conv_reference,
        "int8_static": reference.static_conv_reference,
        "int8_weight": reference.weight_conv_reference,
        "int16": int16.conv_reference,
        "int16_static": int16.static_conv_reference,
    }[scheme]
    want = of_scheme(x, w, sw, *grid, *rest, *after, transposed=transposed)
    given = (*grid, None, None)[:2]
    word = scheme.removesuffix("_static")
    run = torch.ops.qnn.cpu_conv_transpose if transposed else torch.ops.qnn.cpu_conv
    got = run(x, w, sw, *given, *rest, *after, word, tier, draw.parts)
    exact = scheme != "int8_weight" and draw.activation in EXACT
    agrees(got, want, 0 if exact else TOLERANCE[draw.dtype])
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    assert got.is_contiguous(
        memory_format=torch.channels_last_3d if last else torch.contiguous_format
    )


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("cases", "first"), EACH)
def test_of_floats(tier: str, cases: int, first: int) -> None:
    """To the bit, where sums are integers and the activation is rounded arithmetic alone."""
    need(tier)
    for seed in range(first, first + cases):
        compare(Draw(seed), SCHEMES[seed % len(SCHEMES)], tier)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("cases", "first"), EACH)
def test_transposed(tier: str, cases: int, first: int) -> None:
    """The same; strides beyond the kernel, of which some values of y see nothing of x, too."""
    need(tier)
    for seed in range(first, first + cases):
        compare(Draw(seed, True), SCHEMES[seed % len(SCHEMES)], tier)


@pytest.mark.parametrize("tier", TIERS)
def test_sums_that_32_bits_do_not_hold(tier: str) -> None:
    """More than 256 pairs of codes, in one run of the window and in several; of a depthwise layer
    too, whose kernel is as long.
    """
    need(tier)
    for channels, groups, kernel in ((1100, 1, 1), (90, 2, 25), (3, 1, 701), (20, 20, 1203)):
        x = torch.randint(-32767, 32768, (2, channels, 1, 1, kernel + 9)).float()
        x[0], x[1, :, ..., 0] = 32767, 32767
        w = torch.randint(-128, 128, (20, channels // groups, 1, 1, kernel)).to(torch.int8)
        w[0], w[1] = 127, -128
        rest = [[1, 1, 1], [0, 0, 0, 0, 4, 3], [1, 1, 1], groups, None, None]
        operands = x, w, torch.ones(20, 1, 1, 1, 1)
        got = torch.ops.qnn.cpu_conv(*operands, None, None, *rest, "none", "none", "int16", tier, 1)
        want = reference.exact_sums(x, None, w, *rest[:4])
        agrees(got, want.float(), 0)
        assert want.abs().max() > 2**31


@pytest.mark.parametrize(("cases", "first"), EACH)
def test_of_codes(cases: int, first: int) -> None:
    """A chain: quantise, convolve codes to codes and to floats, with a residual of codes."""
    for seed in range(first, first + cases):
        draw = Draw(seed)
        x, (w, sw), grid, rest = draw.x(), draw.weight(), draw.grid(), draw.rest()
        q, scale = torch.ops.qnn.int8_static_quantize(x, *grid)
        agrees(q, reference.static_quantize_reference(x, *grid)[0], 0)
        agrees(scale, reference.static_quantize_reference(x, *grid)[1], 0)
        others: tuple[Any, ...] = (None, None, None)
        if seed % 2:
            rq = draw.codes(draw.batch, draw.outputs, *draw.out)
            others = rq, torch.rand(draw.batch, 1, 1, 1, 1), draw.grid()[1]
        exact = draw.activation in EXACT
        after = *rest, *others, draw.activation, draw.last, draw.dtype
        operands = q, scale, grid[1], w, sw
        got = torch.ops.qnn.int8_codes_conv(*operands, *after)
        want = reference.codes_conv_reference(*operands, *after)
        agrees(got, want, 0 if exact else TOLERANCE[draw.dtype])
        onto = torch.tensor([0.3]), draw.grid()[1]
        codes, scales = torch.ops.qnn.int8_chain_conv(*operands, *onto, *after)
        want, want_scales = reference.chain_conv_reference(*operands, *onto, *after)
        agrees(scales, want_scales, 0)
        off = (codes.int() - want.int()).abs().max()
        assert off <= (0 if exact else 1), (seed, off)
        both = torch.ops.qnn.int8_fork_conv(*operands, *onto, *after)
        for one, other in zip(both, (got, codes, scales), strict=True):
            agrees(one, other, 0)
            assert one.stride() == other.stride()


LARGE = {
    "one pair at the end": lambda w: w[-1, -2:].fill_(127),
    "one pair of -128 at the start": lambda w: w[0, :2].fill_(-128),
    "pairs that fit alone": lambda w: w[:, ::2].fill_(127),
    "every other row": lambda w: w[::2].fill_(127),
    "all 127": lambda w: w.fill_(127),
    "all -128": lambda w: w.fill_(-128),
    "in turn": lambda w: w.fill_(127)[:, ::2].neg_(),
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("large", LARGE)
def test_weights_whose_products_do_not_fit_in_16_bits(tier: str, large: str) -> None:
    """Among small ones, which AVX2 multiplies as bytes; codes 0 and 255; every size of tails."""
    need(tier)
    torch.manual_seed(0)
    grid = torch.tensor([1.0]), torch.tensor([-128]).to(torch.int8)
    for channels, outputs in ((16, 8), (17, 1), (18, 9), (19, 31), (67, 16)):
        w = torch.randint(-25, 26, (outputs, 3 * channels))
        LARGE[large](w)
        w = w.to(torch.int8).reshape(outputs, 1, 1, 3, channels).permute(0, 4, 1, 2, 3)
        x = torch.randint(0, 2, (1, channels, 1, 3, 20)) * 255.0
        x[..., :7] = 255
        rest = [1, 1, 1], [0, 0, 0, 0, 1, 1], [1, 1, 1], 1, None, None, "none", "none"
        operands = x, w, torch.ones(outputs, 1, 1, 1, 1), *grid, *rest
        got = torch.ops.qnn.cpu_conv(*operands, "int8", tier, 1)
        agrees(got, reference.static_conv_reference(*operands), 0)


def test_the_result_does_not_depend_on_the_threads() -> None:
    for seed in range(6):
        draw = Draw(seed)
        x, (w, sw), rest = draw.x(), draw.weight(), draw.rest()
        tier = next(t for t in TIERS if f"{t}:ok" in torch.ops.qnn.cpu_tiers())
        for scheme in ("int8", "int8_weight", "int16"):
            first, *others = (
                torch.ops.qnn.cpu_conv(
                    x, w, sw, None, None, *rest, "none", "none", scheme, tier, parts
                )
                for parts in (1, 2, 3, 7)
            )
            for other in others:
                agrees(other, first, 0)
