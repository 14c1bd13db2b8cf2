"""The float formats, bit for bit, against arithmetic that is written here a second time.

Codes are built from sign, exponent and mantissa in Python integers, and rounding is a search for
the nearest of them in float64, which holds every value, tie and float32 exactly. Scales are NumPy's
float32. None of it shares a line or a formula's shape with the package.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parameterized import parameterized

from qnn.kernels import OPS, Format
from qnn.kernels.formats import float8, mxfp8, nvfp4
from qnn.kernels.formats.float8 import FLOAT8
from qnn.kernels.formats.mxfp8 import MX

ROOT = Path(__file__).resolve().parent.parent
f32 = np.float32
FLT_MAX = np.finfo(f32).max
NVFP4 = {
    form.key: form
    for form in (
        nvfp4.ROWS,
        nvfp4.SQUARES,
        nvfp4.GRADIENT,
        nvfp4.TRANSFORMED,
        nvfp4.TRANSFORMED_GRADIENT,
    )
}
FORMATS: dict[str, Format] = {**FLOAT8, MX.key: MX, **NVFP4}
STEADY = {key: form for key, form in FORMATS.items() if not form.stochastic}
ROUNDED = {key: form for key, form in STEADY.items() if "hadamard" not in key}
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])

THREADS = torch.get_num_threads()


def setUpModule() -> None:
    torch.set_num_threads(1)  # tensors of this size only wait for each other: twice as fast


def tearDownModule() -> None:
    torch.set_num_threads(THREADS)


# --- What a code means.


def magnitudes(exponent_bits: int, mantissa_bits: int, specials: int) -> np.ndarray:
    """The values of the codes without a sign, in order; the last `specials` are no numbers."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits) - specials):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        whole = mantissa + ((1 << mantissa_bits) if exponent else 0)
        values.append(float(whole * Fraction(2) ** (max(exponent, 1) - bias - mantissa_bits)))
    return np.array(values)


E4M3 = magnitudes(4, 3, 1)  # 0x7f is NaN
E5M2 = magnitudes(5, 2, 4)  # 0x7c is inf, 0x7d to 0x7f are NaN
E2M1 = magnitudes(2, 1, 0)
GRIDS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
NAN = 0x7F


def nearest(x: np.ndarray, grid: np.ndarray, sign_bit: int) -> np.ndarray:
    """The code of each float32: to nearest, ties to the even code, clamped; NaN is left to the
    caller.
    """
    size = np.abs(x.astype(np.float64))
    below = np.clip(np.searchsorted(grid, size, side="right") - 1, 0, len(grid) - 1)
    above = np.minimum(below + 1, len(grid) - 1)
    middle = (grid[below] + grid[above]) / 2
    up = (size > middle) | ((size == middle) & (below % 2 == 1))
    return np.where(up, above, below).astype(np.uint8) | (np.signbit(x) * sign_bit).astype(np.uint8)


def decoded(codes: np.ndarray, grid: np.ndarray, sign_bit: int) -> np.ndarray:
    """float64, exactly; NaN for what is no number."""
    table = np.full(sign_bit, np.nan)
    table[: len(grid)] = grid
    return np.where(codes & sign_bit, -1.0, 1.0) * table[codes & (sign_bit - 1)]


# --- What a format does.


def amax(x: np.ndarray) -> np.float32:
    finite = np.abs(x[np.isfinite(x)])
    return finite.max() if finite.size else f32(0)


def over(top: float, value: np.float32) -> np.float32:
    """`top / value`, correctly rounded."""
    with np.errstate(over="ignore", divide="ignore"):
        return f32(top) / value


def blocks(shape: tuple[int, int], rows: int, columns: int) -> Iterator[Any]:
    """`(position of the scale, its values)`; 0 is the whole axis."""
    rows, columns = rows or max(shape[0], 1), columns or max(shape[1], 1)
    for i, r in enumerate(range(0, shape[0], rows)):
        for j, c in enumerate(range(0, shape[1], columns)):
            yield (i, j), (slice(r, r + rows), slice(c, c + columns))


def scales_of(shape: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    return -(-shape[0] // rows) if rows else 1, -(-shape[1] // columns) if columns else 1


def float8_parts(form: float8.Float8, x: np.ndarray) -> tuple[np.ndarray, ...]:
    grid = GRIDS[form.storage]
    codes = np.zeros(x.shape, np.uint8)
    scales = np.ones(scales_of(x.shape, *form.sides), f32)
    for where, values in blocks(x.shape, *form.sides):
        largest = amax(x[values])
        r = f32(1) if largest == 0 else min(over(grid[-1], largest), f32(2.0**126))
        if all(form.sides):
            r = f32(math.ldexp(1.0, math.frexp(float(r))[1] - 1))
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = x[values] * r
        codes[values] = np.where(np.isfinite(x[values]), nearest(scaled, grid, 128), NAN)
        scales[where] = f32(1) / r
    return codes, scales.reshape(1) if form.sides == (0, 0) else scales


def exponent(largest: np.float32) -> int:
    """The smallest e with 448 · 2^e >= largest, from -127 on; in integers."""
    if largest == 0:
        return 0
    e = max(-127, math.frexp(float(largest))[1] - 10)
    while 448 * Fraction(2) ** e < Fraction(float(largest)):
        e += 1
    return e


def mxfp8_parts(x: np.ndarray) -> tuple[np.ndarray, ...]:
    codes = np.zeros(x.shape, np.uint8)
    scales = np.zeros(scales_of(x.shape, 1, 32), np.uint8)
    for where, values in blocks(x.shape, 1, 32):
        e = exponent(amax(x[values]))
        scaled = np.ldexp(x[values].astype(np.float64), -e)  # a power of two: nothing is rounded
        codes[values] = np.where(np.isfinite(x[values]), nearest(scaled, E4M3, 128), NAN)
        scales[where] = e + 127
    return codes, scales


def nvfp4_parts(form: nvfp4.NVFP4, x: np.ndarray) -> tuple[np.ndarray, ...]:
    rows = 16 if form.tall else 1
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 16)))
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((x.shape[0], x.shape[1] // 16), np.uint8)
    largest = amax(x)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        s = f32(1) if largest == 0 else min(over(2688.0, largest), FLT_MAX)
        for (i, j), values in blocks(x.shape, rows, 16):
            bmax = amax(x[values])
            ideal = min(bmax * (s * f32(1 / 6)), f32(448))
            code = nearest(np.array(ideal), E4M3, 128) if bmax else np.uint8(0x38)
            b = f32(E4M3[code])
            r = min(f32(1) / (b * (f32(1) / s)), FLT_MAX)
            finite = np.isfinite(x[values])
            scaled = np.where(finite, x[values] * r, f32(0))
            codes[values] = nearest(scaled, E2M1, 8)
            scales[i * rows : (i + 1) * rows, j] = np.where(finite.all(1), code, NAN)
    return codes[:, ::2] + 16 * codes[:, 1::2], scales, np.array([s], f32)


def expected(form: Format, x: np.ndarray) -> tuple[np.ndarray, ...]:
    if isinstance(form, float8.Float8):
        return float8_parts(form, x)
    if isinstance(form, nvfp4.NVFP4):
        return nvfp4_parts(form, x)
    return mxfp8_parts(x)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """Codes as uint8, float32 as its bits."""
    as_what = torch.int32 if tensor.dtype == torch.float32 else torch.uint8
    return tensor.contiguous().view(as_what).numpy()


def check(form: Format, x: torch.Tensor) -> None:
    """Every part of `x [R, C]`, float32, is what it should be."""
    got = [bits(part) for part in form.quantize(x)]
    want = [a.view(np.int32) if a.dtype == f32 else a for a in expected(form, x.numpy())]
    for part, one, other in zip(form.parts, got, want, strict=True):
        np.testing.assert_array_equal(one, other, part.suffix or "values")


def values(form: Format, parts: Any) -> np.ndarray:
    """What the parts stand for, in float64, exactly."""
    q, *scales = (bits(part) for part in parts)
    if isinstance(form, nvfp4.NVFP4):
        codes = np.stack((q & 15, q >> 4), -1).reshape(*q.shape[:-1], -1)
        s = f32(1) / parts[2].numpy()
        b = decoded(scales[0], E4M3, 128).repeat(16, -1)[..., : codes.shape[-1]]
        return decoded(codes, E2M1, 8) * b * s.astype(np.float64)
    if form is MX:
        e = scales[0].astype(int).repeat(32, -1)[..., : q.shape[-1]] - 127
        return np.ldexp(decoded(q, E4M3, 128), e)
    q, s = decoded(q, GRIDS[form.storage], 128), parts[1].numpy().astype(np.float64)
    rows, columns = form.sides if all(form.sides) else (0, 0)
    s = s.repeat(rows, 0)[: q.shape[0]] if rows else s
    return q * (s.repeat(columns, -1)[..., : q.shape[-1]] if columns else s)


def grid(forms: dict[str, Format]) -> Callable[..., Any]:
    return parameterized.expand(list(forms.items()))


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different size, zeros, −0, subnormal numbers, and a few NaNs and infs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-6, 6, (rows, 1))
    x[rng.random(x.shape) < 0.05] = -0.0
    x[rng.random(x.shape) < 0.02] = 1e-42
    for i, value in enumerate((1e20, 1e-20, 1e-37, 1e-40, 0.0, -0.0, 3e38)):
        if rows > 4 * i + 3:
            x[4 * i + 3] = value * rng.uniform(-1, 1, columns)
    for value in (np.nan, np.inf, -np.inf):
        x[rng.random(x.shape) < 0.003] = value
    with np.errstate(over="ignore"):
        return torch.from_numpy(x.astype(f32))


class TestCodes:
    """What all the codes stand for, against the published tables."""

    def test_published_values(self) -> None:
        # "FP8 Formats for Deep Learning", table 1; OCP Microscaling 1.0, table 5.
        assert (E4M3[-1], E4M3[8], E4M3[7], E4M3[1]) == (448, 2**-6, 7 / 8 * 2**-6, 2**-9)
        assert (E5M2[-1], E5M2[4], E5M2[3]) == (57344, 2**-14, 3 / 4 * 2**-14)
        assert E5M2[1] == 2**-16
        assert E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        for form in FORMATS.values():
            assert form.qmax == {"float8_e5m2": 57344, "nvfp4": 6}.get(form.name, 448)

    @grid(FLOAT8)
    def test_every_float8_code(self, _: str, form: float8.Float8) -> None:
        codes = np.arange(256, dtype=np.uint8)
        q = torch.from_numpy(codes).view(form.storage)[None]
        one = torch.ones(scales_of((1, 256), *form.sides))
        got = form.dequantize((q, one.reshape(1) if form.sides == (0, 0) else one))[0].numpy()
        want = decoded(codes, GRIDS[form.storage], 128)
        if form.storage == torch.float8_e5m2:
            want[[0x7C, 0xFC]] = np.inf, -np.inf
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), codes[~np.isnan(got)] > 127)

    def test_every_e2m1_code(self) -> None:
        codes = torch.arange(16, dtype=torch.uint8)
        one = torch.ones(1)
        got = nvfp4.ROWS.dequantize((nvfp4.pack(codes), one.to(torch.float8_e4m3fn), one))
        want = decoded(codes.numpy(), E2M1, 8)
        np.testing.assert_array_equal(got.numpy(), want)
        assert np.signbit(got.numpy()[8:]).all()

    def test_every_e8m0_byte(self) -> None:
        power = mxfp8.power(torch.arange(256, dtype=torch.uint8)).numpy()
        np.testing.assert_array_equal(power[:255], np.ldexp(f32(1), np.arange(255) - 127))
        assert (power[:255] > 0).all()
        assert np.isnan(power[255])
        byte = torch.arange(256, dtype=torch.uint8)[:, None]
        q = torch.full((256, 32), -1.5).to(torch.float8_e4m3fn)
        for compute in (torch.float32, torch.float64):
            got = MX.dequantize((q, byte), compute)
            want = -1.5 * np.ldexp(1.0, np.arange(255) - 127)
            np.testing.assert_array_equal(got[:255, 0].numpy(), want)
            assert got[255].isnan().all()


def ties(grid: np.ndarray) -> np.ndarray:
    """Every value, the tie behind it, and the float32 on either side of both; both signs."""
    tie = (grid[:-1] + grid[1:]) / 2
    points = np.concatenate((grid, tie)).astype(f32)
    assert (points == np.concatenate((grid, tie))).all()
    points = np.concatenate((points, np.nextafter(points, f32(0)), np.nextafter(points, FLT_MAX)))
    return np.concatenate((points, -points))


class TestRounding:
    @parameterized.expand([("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
    def test_every_tie_of_float8(self, _: str, storage: torch.dtype) -> None:
        grid = GRIDS[storage]
        more = [grid[-1] * 1.01, grid[-1] * 2, 1e30, FLT_MAX, 1e-30, 1e-45]
        points = np.concatenate((ties(grid), np.array([*more, *(-v for v in more)], f32)))
        got = bits(float8.cast(torch.from_numpy(points), torch.ones(()), storage))
        np.testing.assert_array_equal(got, nearest(points, grid, 128))
        assert set(got.tolist()) == {*range(len(grid)), *range(128, 128 + len(grid))}

    def test_every_tie_of_e2m1(self) -> None:
        points = ties(E2M1)
        points = np.clip(points, -6, 6)
        got = nvfp4.e2m1(torch.from_numpy(points)).numpy()
        np.testing.assert_array_equal(got, nearest(points, E2M1, 8))
        assert set(got.tolist()) == set(range(16))

    def test_published_ties_of_e2m1(self) -> None:
        ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}
        got = E2M1[nvfp4.e2m1(torch.tensor(list(ties))).numpy()]
        assert got.tolist() == list(ties.values())

    @grid(ROUNDED)
    def test_every_tie_through_the_format(self, _: str, form: Format) -> None:
        """Each block has the largest value in it, and so the scale 1."""
        grid = E2M1 if isinstance(form, nvfp4.NVFP4) else GRIDS[form.storage]
        points = ties(grid)
        points = points[np.abs(points) <= grid[-1]]
        points = np.resize(points, (-(-len(points) // 15), 15))
        x = np.concatenate((points, np.full_like(points[:, :1], grid[-1])), 1)
        parts = form.quantize(torch.from_numpy(x))
        if isinstance(form, nvfp4.NVFP4):
            assert (parts[1].float() == 448).all()
            codes = nvfp4.unpack(parts[0]).numpy()
        else:
            assert (parts[1] == (127 if form is MX else 1)).all()
            codes = bits(parts[0])
        np.testing.assert_array_equal(codes, nearest(x, grid, (len(grid) <= 8 and 8) or 128))

    @grid(ROUNDED)
    def test_minus_zero_keeps_its_sign(self, _: str, form: Format) -> None:
        x = torch.zeros(16, 32)
        x[:, ::2] = -0.0
        for filled in (x, x.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(3.0))):
            back = form.dequantize(form.quantize(filled))
            assert torch.equal(back.signbit(), filled.signbit())

    @parameterized.expand([(f"{key}_{value}", key, value) for key in ROUNDED
                           for value in (float("nan"), float("inf"), -float("inf"))])  # fmt: skip
    def test_what_is_not_finite(self, _: str, key: str, value: float) -> None:
        form = ROUNDED[key]
        x = torch.randn(32, 64)
        x[3, 20] = 0.0
        clean = form.quantize(x)
        x[3, 20] = value
        spoiled = form.quantize(x)
        hit = np.zeros(x.shape, bool)
        if isinstance(form, nvfp4.NVFP4):
            hit[3, 16:32] = True
            assert bits(spoiled[1])[3, 1] & NAN == NAN
            other = np.ones((32, 4), bool)
            other[3, 1] = False
            np.testing.assert_array_equal(bits(spoiled[1])[other], bits(clean[1])[other])
            np.testing.assert_array_equal(bits(spoiled[2]), bits(clean[2]))
            assert nvfp4.unpack(spoiled[0])[3, 20].item() == 0
        else:
            hit[3, 20] = True
            assert bits(spoiled[0])[3, 20] == NAN
            np.testing.assert_array_equal(bits(spoiled[1]), bits(clean[1]))
        one, other = form.dequantize(spoiled).numpy(), form.dequantize(clean).numpy()
        assert np.isnan(one[hit]).all()
        np.testing.assert_array_equal(one[~hit], other[~hit])

    @grid(ROUNDED)
    def test_nothing_finite(self, _: str, form: Format) -> None:
        x = torch.full((16, 32), float("inf"))
        x[::2] = float("nan")
        check(form, x)
        assert form.dequantize(form.quantize(x)).isnan().all()

    def test_float64_beyond_float32_is_infinite(self) -> None:
        x = torch.randn(4, 32, dtype=torch.float64)
        x[1, 2] = 1e300
        for form in ROUNDED.values():
            for got, want in zip(form.quantize(x), form.quantize(x.float()), strict=True):
                np.testing.assert_array_equal(bits(got), bits(want))
            if not isinstance(form, nvfp4.NVFP4):
                back = form.dequantize(form.quantize(x))
                assert (~back.isfinite()).nonzero().tolist() == [[1, 2]]


SIZES = (1e-45, 1e-41, 1e-37, 5e-36, 1e-35, 1e-20, 1.0, 1e20, 1e38, 3e38)
SHAPES = ((1, 1), (1, 16), (5, 37), (16, 16), (37, 63), (33, 128), (130, 150))


class TestScales:
    @parameterized.expand([(f"{key}-{rows}x{columns}", key, rows, columns) for key in ROUNDED
                           for rows, columns in SHAPES])  # fmt: skip
    def test_equals_the_second_reference(self, _: str, key: str, rows: int, columns: int) -> None:
        check(ROUNDED[key], matrix(rows, columns))

    @parameterized.expand([(f"{key}-{size}", key, size) for key in ROUNDED for size in SIZES])
    def test_every_size(self, _: str, key: str, size: float) -> None:
        """All of one size; the rule at amax below 1e-36, where the reciprocal is bounded, too."""
        form = ROUNDED[key]
        x = torch.rand(33, 50) * 2 - 1
        x[7, 11] = -1.0
        x = (x.double() * size).float()
        check(form, x)
        parts = form.quantize(x)
        assert all(part.float().isfinite().all() for part in parts[1:])
        back = form.dequantize(parts).numpy()
        assert np.isfinite(back).all()
        if size >= 1e-37:
            error = np.abs(back[:, :50] - x.numpy()).max() / size
            assert error < {"float8_e5m2": 0.126, "nvfp4": 0.2}.get(form.name, 0.0626)

    @grid(ROUNDED)
    def test_zeros(self, _: str, form: Format) -> None:
        """A block, row or tensor of zeros has scale 1, and leaves its neighbours as they are."""
        for x in (torch.zeros(16, 32), torch.cat((torch.zeros(128, 64), torch.randn(5, 64)))):
            check(form, x)
            zeros = form.dequantize(form.quantize(x))[: min(128, x.shape[0])]
            assert (zeros == 0).all()
        parts = form.quantize(torch.zeros(16, 32))
        assert (parts[0].view(torch.uint8) == 0).all()
        for scale in parts[1:]:
            assert (scale.float() == (127 if form is MX else 1)).all()

    @parameterized.expand([
        ("float8_e4m3_tensor", (1,), (130, 260)), ("float8_e4m3", (130, 1), (1, 260)),
        ("float8_e4m3_group", (130, 3), (1, 128)), ("float8_e4m3_block", (2, 3), (128, 128)),
        ("mxfp8", (130, 9), (1, 32)), ("nvfp4", (130, 17), (1, 16)),
    ])  # fmt: skip
    def test_what_shares_a_scale(self, key: str, shape: tuple[int, ...], block: Any) -> None:
        form = FORMATS[key]
        x = torch.rand(130, 260) + 0.5
        x[0, 0] = 10.0  # so that nvfp4's scale of the tensor stays
        scale = form.quantize(x)[1]
        assert scale.shape == shape
        x[129, 259] = 8.0
        moved = form.quantize(x)[1].float() != scale.float()
        assert moved.sum().item() == (0 if shape == (1,) else 1)
        if shape != (1,):
            assert moved[129 // block[0], 259 // block[1]]

    @parameterized.expand([("float8_e4m3_group", 448), ("float8_e4m3_block", 448),
                           ("float8_e5m2_group", 57344)])  # fmt: skip
    def test_block_scales_are_powers_of_two(self, key: str, top: int) -> None:
        form = FORMATS[key]
        # Up to 2^126, beyond which the reciprocal of amax is subnormal.
        e = np.arange(-125, 126 - math.frexp(top)[1])
        edges = np.ldexp(f32(top), e)
        for sizes, want in ((edges, e), (np.nextafter(edges, f32(0)), e),
                            (np.nextafter(edges, FLT_MAX), e + 1)):  # fmt: skip
            for size, power in zip(sizes, want, strict=True):
                q, scale = form.quantize(torch.tensor([[float(size)]]))
                assert scale.item() == 2.0**power, size
                assert q.float().item() <= top

    def test_mxfp8_rounds_its_exponent_up(self) -> None:
        """At 448 · 2^k, on both sides of it, and down to where the scale ends."""
        edges = np.ldexp(f32(448), np.arange(-126, 120))
        sizes = np.concatenate((edges, np.nextafter(edges, f32(0)), np.nextafter(edges, FLT_MAX)))
        small = np.ldexp(f32(448), -127) * np.array([0.5, 0.999, 1, 1.001, 1.5, 1.999], f32)
        sizes = np.concatenate((sizes, small, np.array([1e38, FLT_MAX, 1e-45, 1e-40], f32)))
        got = mxfp8.exponent_byte(torch.from_numpy(sizes)).tolist()
        assert got == [exponent(size) + 127 for size in sizes]
        q, byte = MX.quantize(torch.from_numpy(sizes)[:, None])
        cut = MX.dequantize((q, byte), torch.float64)[:, 0].numpy() - sizes
        assert (np.abs(cut) <= np.maximum(sizes / 16, 2.0**-137)).all()

    def test_nvfp4_scale_of_the_tensor(self) -> None:
        for amax, want in ((2688.0, 1.0), (1e-45, FLT_MAX), (7e-36, FLT_MAX), (448.0, 6.0)):
            assert nvfp4.ROWS.quantize(torch.full((2, 16), amax))[2].item() / want == pytest.approx(
                1, abs=1e-6
            )
        s = nvfp4.ROWS.quantize(torch.full((2, 16), 7e-36))[2]
        assert s.item() == FLT_MAX

    def near_ties(self, at: np.ndarray) -> np.ndarray:
        """`[ties, 17]`: the float32s around each."""
        steps = np.arange(-8, 9)
        return (at.astype(f32).view(np.int32)[:, None] + steps).astype(np.int32).view(f32)

    @parameterized.expand([(3.7,), (0.0123,), (41.3,), (1.9e6,)])
    def test_nvfp4_order_of_the_blocks_scale(self, amax: float) -> None:
        """`bmax · (S · (1/6))`: beside the ties of e4m3 other orders give other codes."""
        s = over(2688.0, f32(amax))
        bmax = self.near_ties((E4M3[64:-2] + E4M3[65:-1]) / 2 * 6 / s).ravel()
        bmax = bmax[bmax < f32(amax)]
        want = nearest(bmax * (s * f32(1 / 6)), E4M3, 128)
        for other in (
            bmax / f32(6) * s,
            bmax * f32(1 / 6) * s,
            bmax * s * f32(1 / 6),
            bmax * s / f32(6),
        ):
            assert (nearest(other, E4M3, 128) != want).any()
        x = np.zeros((len(bmax) + 1, 16), f32)
        x[:-1, 3], x[-1, 0] = bmax, amax
        got = nvfp4.ROWS.quantize(torch.from_numpy(x))
        assert got[2].item() == s
        np.testing.assert_array_equal(bits(got[1])[:-1, 0], want)

    @parameterized.expand([(3.7,), (0.0123,), (41.3,), (1.9e6,)])
    def test_nvfp4_order_of_the_reciprocal(self, amax: float) -> None:
        """`1 / (b · (1/S))`: beside the ties of e2m1 other orders give other codes."""
        s = over(2688.0, f32(amax))
        rows, wanted, others = [[amax] + [0] * 15], [], 0
        for code in range(64, 120):
            b = f32(E4M3[code])
            r = f32(1) / (b * (f32(1) / s))
            points = self.near_ties((E2M1[:-1] + E2M1[1:]) / 2 / r).ravel()
            want = nearest(points * r, E2M1, 8)
            others += (nearest(points * (s / b), E2M1, 8) != want).any()
            for i in range(0, len(points), 15):
                rows.append([*np.resize(points[i : i + 15], 15).tolist(), float(b * 6 / s)])
                wanted.append(np.resize(want[i : i + 15], 15))
        assert others > 0
        got = nvfp4.ROWS.quantize(torch.tensor(rows))
        np.testing.assert_array_equal(nvfp4.unpack(got[0])[1:, :15].numpy(), np.array(wanted))

    def test_nvfp4_blocks_that_vanish(self) -> None:
        """A block whose scale rounds to zero is zeros, not NaN."""
        x = torch.cat((torch.full((1, 16), 1e5), torch.full((1, 16), -1e-3), torch.zeros(1, 16)))
        check(nvfp4.ROWS, x)
        back = nvfp4.ROWS.dequantize(nvfp4.ROWS.quantize(x))
        assert (back[1:] == 0).all()

    @parameterized.expand([(16, 16), (32, 48), (48, 16), (33, 20), (130, 37)])
    def test_squares(self, rows: int, columns: int) -> None:
        """16 rows share their scales, and both orientations of a weight have the same codes."""
        w = torch.randn(rows, columns) * torch.rand(rows, 1).exp2()
        packed, b, s = nvfp4.SQUARES.quantize(w)
        turned = nvfp4.SQUARES.quantize(w.mT)
        one = nvfp4.unpack(packed)[:, :columns]
        other = nvfp4.unpack(turned[0])[:, :rows]
        assert torch.equal(one, other.mT)
        assert s.item() == turned[2].item()
        np.testing.assert_array_equal(bits(b), bits(b)[np.arange(rows) // 16 * 16])
        np.testing.assert_array_equal(bits(b)[::16], bits(turned[1])[::16].T)
        back = nvfp4.SQUARES.dequantize((packed, b, s))[:, :columns]
        assert torch.equal(back, nvfp4.SQUARES.dequantize(turned)[:, :rows].mT)

    def test_packing(self) -> None:
        """The even element in the low nibble."""
        x = torch.tensor([[0.5, 1.0, -1.5, 6.0, *[0.0] * 12]])
        assert nvfp4.ROWS.quantize(x)[0][0, :3].tolist() == [0x21, 0x7B, 0x00]
        codes = torch.randint(0, 16, (3, 32), dtype=torch.uint8)
        packed = nvfp4.pack(codes)
        assert torch.equal(packed & 15, codes[:, ::2])
        assert torch.equal(packed >> 4, codes[:, 1::2])
        assert torch.equal(nvfp4.unpack(packed), codes)


def sylvester() -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < 16:
        h = np.block([[h, h], [h, -h]])
    return h


class TestHadamard:
    def setup_method(self) -> None:
        unit = nvfp4.hadamard(torch.eye(16)).double().numpy()
        self.matrix = unit.T  # hadamard(x) = matrix · x

    def test_is_sylvesters_matrix_behind_signs(self) -> None:
        """Always the same signs: what was quantised with others has no meaning with these."""
        signs = [-1.0 if sign == "-" else 1.0 for sign in "+++-+------+-+--"]
        np.testing.assert_array_equal(self.matrix, sylvester() @ np.diag(signs) / 4)

    def test_is_orthogonal(self) -> None:
        np.testing.assert_array_equal(self.matrix @ self.matrix.T, np.eye(16))
        a, b = torch.randn(5, 48), torch.randn(7, 48)
        got = nvfp4.hadamard(a).double() @ nvfp4.hadamard(b).double().mT
        torch.testing.assert_close(got, a.double() @ b.double().mT, rtol=0, atol=1e-5)

    def test_equals_the_matrix(self) -> None:
        whole = torch.randint(-1000, 1000, (3, 5, 64)).float()  # sums that float32 holds
        want = whole.double().numpy().reshape(3, 5, 4, 16) @ self.matrix.T
        np.testing.assert_array_equal(nvfp4.hadamard(whole).numpy(), want.reshape(3, 5, 64))
        x = torch.randn(64, 64)
        want = (x.double().numpy().reshape(64, 4, 16) @ self.matrix.T).reshape(64, 64)
        error = np.abs(nvfp4.hadamard(x).numpy() - want).max()
        assert error < 8 * 2.0**-24 * np.abs(x.numpy()).max() * 4

    @parameterized.expand([(1,), (15,), (17,), (20,), (37,)])
    def test_a_partial_group_ends_in_zeros(self, columns: int) -> None:
        x = torch.randn(3, columns)
        filled = torch.nn.functional.pad(x, (0, -columns % 16))
        assert torch.equal(nvfp4.hadamard(x), nvfp4.hadamard(filled))
        assert nvfp4.hadamard(x).shape == filled.shape

    def test_format(self) -> None:
        """`nvfp4_hadamard` is `nvfp4` of the transformed rows, with their amax, and stays so."""
        x = torch.randn(5, 40)
        x[2, 3] = float("nan")
        parts = nvfp4.TRANSFORMED.quantize(x)
        for got, want in zip(parts, nvfp4.ROWS.quantize(nvfp4.hadamard(x)), strict=True):
            np.testing.assert_array_equal(bits(got), bits(want))
        back = nvfp4.TRANSFORMED.dequantize(parts)
        assert back.isnan().sum(-1).tolist() == [0, 0, 16, 0, 0]
        near = torch.nan_to_num(back - nvfp4.hadamard(x))
        assert near.norm().item() < 0.2 * x.nan_to_num().norm().item()


def chi_squared(observed: np.ndarray, wanted: np.ndarray) -> float:
    """Pearson's statistic in standard deviations from its mean, for that many free cells."""
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    free = observed.size - 1
    return float((statistic - free) / math.sqrt(2 * free))


class TestStochasticRounding:
    """A distribution, drawn from one seed: limits of 4 standard deviations, nothing by chance."""

    DRAWS = 4000
    FRACTIONS = (1 / 64, 0.125, 0.3, 0.5, 0.75, 0.9, 63 / 64)

    def draw(self, points: np.ndarray, seed: torch.Tensor = SEED) -> np.ndarray:
        """`[points, draws]`: what the format makes of them where each block has the scale 1."""
        x = torch.from_numpy(points.astype(f32))[:, None].expand(-1, self.DRAWS // 8 * 8)
        x = x.unflatten(1, (-1, 8)).repeat_interleave(2, -1)
        x[..., ::2] = 6.0  # the scale of each block, at every even place
        parts = OPS["nvfp4_stochastic_quantize"].overload(x.flatten(1), seed)
        assert (parts[1].float() == 448).all()
        back = decoded(nvfp4.unpack(parts[0]).numpy(), E2M1, 8)
        np.testing.assert_array_equal(back[:, ::2], 6.0)
        return back[:, 1::2]

    def test_up_with_the_right_probability(self) -> None:
        low, high, share = [], [], []
        for below, above in itertools.pairwise(E2M1):
            for fraction in self.FRACTIONS:
                low += [below, -below]
                high += [above, -above]
                share += [fraction, fraction]
        low, high, share = np.array(low), np.array(high), np.array(share)
        points = low + share * (high - low)
        share = (points.astype(f32) - low) / (high - low)  # of the float32
        drawn = self.draw(points)
        up = drawn == high[:, None]
        assert (up | (drawn == low[:, None])).all()  # only the two neighbours
        z = (up.sum(1) - self.DRAWS * share) / np.sqrt(self.DRAWS * share * (1 - share))
        assert np.abs(z).max() < 4.5  # the largest of some hundred
        spread = ((z**2).sum() - z.size) / math.sqrt(2 * z.size)
        assert abs(spread) < 4  # neither too far off nor too good
        # The mean is exact: of each point, and over all of them.
        deviation = np.sqrt(share * (1 - share)) * np.abs(high - low)
        error = (drawn - points[:, None]).sum(1)
        np.testing.assert_array_less(np.abs(error), 4.5 * deviation * math.sqrt(self.DRAWS))
        assert abs(error.sum()) < 4 * math.sqrt((deviation**2).sum() * self.DRAWS)

    def test_to_nearest_would_fail(self) -> None:
        """The statistic above tells the two apart."""
        points = np.full(7, 1.125)
        assert np.abs(self.draw(points).mean() - 1.0) > 0.1
        back = nvfp4.ROWS.dequantize(nvfp4.ROWS.quantize(torch.tensor([[6.0, *points]])))
        assert (back[0, 1:8] == 1.0).all()

    def test_exact_codes_never_move(self) -> None:
        """Not even with the largest noise, which a rounded sum would turn into one more step."""
        codes = torch.arange(16, dtype=torch.uint8)
        x = torch.from_numpy(decoded(codes.numpy(), E2M1, 8)).float()
        for noise in (0.0, 0.5, 1 - 2.0**-23, 1 - 2.0**-24):
            got = nvfp4.e2m1(x, torch.full_like(x, noise))
            assert torch.equal(got, codes), noise
        np.testing.assert_array_equal(self.draw(E2M1), E2M1[:, None].repeat(self.DRAWS, 1))

    def test_the_extremes_of_the_noise(self) -> None:
        """Up at noise 0, however small the fraction; down at the largest, unless it is larger."""
        for below, above in itertools.pairwise(E2M1):
            x = torch.tensor([np.nextafter(f32(below), f32(9)), np.nextafter(f32(above), f32(0))])
            up, down = torch.zeros(2), torch.full((2,), 1 - 2.0**-24)
            for sign in (1, -1):
                assert E2M1[nvfp4.e2m1(sign * x, up) & 7].tolist() == [above, above]
                got = E2M1[nvfp4.e2m1(sign * x, down) & 7].tolist()
                assert got == [below, below]

    def test_scales_are_those_of_nearest(self) -> None:
        x = matrix(37, 63)
        for one, other in ((nvfp4.GRADIENT, nvfp4.ROWS),
                           (nvfp4.TRANSFORMED_GRADIENT, nvfp4.TRANSFORMED)):  # fmt: skip
            got, want = one.quantize(x, SEED), other.quantize(x)
            np.testing.assert_array_equal(bits(got[1]), bits(want[1]))
            np.testing.assert_array_equal(bits(got[2]), bits(want[2]))
            steps = np.abs(bits(nvfp4.unpack(got[0])).astype(int) - bits(nvfp4.unpack(want[0])))
            assert set(steps.ravel()) == {0, 1}

    def test_a_seed_repeats_itself_and_no_other(self) -> None:
        x = torch.randn(32, 64)
        first = nvfp4.GRADIENT.quantize(x, SEED)[0]
        assert torch.equal(first, nvfp4.GRADIENT.quantize(x, SEED.clone())[0])
        for other in (1, 2**32, -1, 2**61):
            again = nvfp4.GRADIENT.quantize(x, SEED + other)[0]
            assert (again != first).float().mean().item() > 0.2


class TestNoise:
    N = 2**15

    def noise(self, seed: int, count: int = N) -> np.ndarray:
        return nvfp4.hashed(count, torch.tensor([seed])).double().numpy()

    def test_equals_integers_of_python(self) -> None:
        def mix(h: int) -> int:
            h = (h ^ h >> 16) * 0x21F0AAAD % 2**32
            h = (h ^ h >> 15) * 0x735A2D97 % 2**32
            return h ^ h >> 15

        for seed in (0, 1, 2**31, 2**32 - 1, 2**32, 2**62 - 1, SEED.item()):
            low, high = seed % 2**32, seed >> 32
            want = [
                (mix((mix(i ^ low) + high + mix(low)) % 2**32) >> 8) / 2**24 for i in range(200)
            ]
            assert self.noise(seed, 200).tolist() == want

    def test_depends_on_the_position_alone(self) -> None:
        np.testing.assert_array_equal(self.noise(5, 1000)[:37], self.noise(5, 37))

    @parameterized.expand([(0,), (1,), (2**32,), (2**61 + 12345,)])
    def test_is_uniform(self, seed: int) -> None:
        whole = (self.noise(seed) * 2**24).astype(int)
        assert (whole / 2**24).tolist() == self.noise(seed).tolist()
        assert 0 <= whole.min() <= whole.max() < 2**24
        for shift in (16, 8, 0):  # the high bits, those in the middle, the low ones
            counts = np.bincount(whole >> shift & 255, minlength=256)
            assert abs(chi_squared(counts, np.full(256, self.N / 256))) < 4, shift

    @parameterized.expand([(0, 1), (6, 7), (0, 2**32), (0, 2**31), (5, 2**32 + 4), (9, 2**61)])
    def test_seeds_are_independent(self, one: int, other: int) -> None:
        a, b = self.noise(one), self.noise(other)
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(self.N)
        # Nor do they share numbers at other positions: 64 by chance, of 2^15 numbers out of 2^24.
        assert len(np.intersect1d(a, b)) < 64 + 4 * 8
        joint = np.bincount((a * 16).astype(int) * 16 + (b * 16).astype(int), minlength=256)
        assert abs(chi_squared(joint, np.full(256, self.N / 256))) < 4

    @parameterized.expand([(1,), (2,), (3,), (16,), (64,), (4096,)])
    def test_positions_are_independent(self, lag: int) -> None:
        a = self.noise(3)
        assert abs(np.corrcoef(a[lag:], a[:-lag])[0, 1]) < 4 / math.sqrt(self.N - lag)
        pairs = np.bincount((a[lag:] * 16).astype(int) * 16 + (a[:-lag] * 16).astype(int))
        assert abs(chi_squared(pairs, np.full(256, (self.N - lag) / 256))) < 4


class TestInputs:
    def alike(self, form: Format, x: torch.Tensor, y: torch.Tensor) -> None:
        for got, want in zip(form.quantize(x, SEED), form.quantize(y, SEED), strict=True):
            assert got.shape == want.shape
            np.testing.assert_array_equal(bits(got), bits(want))

    @parameterized.expand([(f"{key}-{dtype}", key, dtype) for key in FORMATS for dtype in
                           (torch.float16, torch.bfloat16, torch.float64)])  # fmt: skip
    def test_dtypes(self, _: str, key: str, dtype: torch.dtype) -> None:
        x = matrix(33, 50).to(dtype)
        form = FORMATS[key]
        seed = SEED if form.stochastic else None
        for got, want in zip(form.quantize(x, seed), form.quantize(x.float(), seed), strict=True):
            np.testing.assert_array_equal(bits(got), bits(want))

    @grid(FORMATS)
    def test_not_contiguous(self, _: str, form: Format) -> None:
        seed = SEED if form.stochastic else None
        x = matrix(66, 100)
        for view in (x.mT, x[::2], x[:, ::2], x[:1].expand(20, -1), x.flip(0)):
            for got, want in zip(
                form.quantize(view, seed), form.quantize(view.clone(), seed), strict=True
            ):
                np.testing.assert_array_equal(bits(got), bits(want))

    @grid(FORMATS)
    def test_empty(self, _: str, form: Format) -> None:
        seed = SEED if form.stochastic else None
        for rows, columns in ((0, 32), (0, 37), (3, 0)):
            parts = form.quantize(torch.zeros(rows, columns), seed)
            assert [tuple(p.shape) for p in parts] == [
                part.shape(rows, columns) for part in form.parts
            ]
            assert [p.dtype for p in parts] == [part.dtype for part in form.parts]
            assert form.dequantize(parts)[:, :columns].shape == (rows, columns)

    @grid({key: form for key, form in FORMATS.items() if not form.tall})
    def test_leading_axes(self, _: str, form: Format) -> None:
        """One row alone, and more axes than two, are the rows of a matrix."""
        seed = SEED if form.stochastic else None
        x = torch.randn(2, 3, 40)
        for view in (x, x[1], x[1, 2]):
            flat = view.reshape(-1, 40)
            for part, got, want in zip(
                form.parts, form.quantize(view, seed), form.quantize(flat, seed), strict=True
            ):
                assert got.dim() == (1 if part.axes == "1" else view.dim())
                np.testing.assert_array_equal(bits(got).ravel(), bits(want).ravel())

    @grid({key: form for key, form in FORMATS.items() if form.rowwise})
    def test_rows_are_independent(self, _: str, form: Format) -> None:
        x = matrix(33, 50)
        whole = form.quantize(x)
        for i in range(len(x)):
            for part, alone in zip(whole, form.quantize(x[i : i + 1]), strict=True):
                np.testing.assert_array_equal(bits(part[i : i + 1]), bits(alone))

    def test_which_formats_have_independent_rows(self) -> None:
        rowwise = {key for key, form in FORMATS.items() if form.rowwise}
        assert rowwise == {"float8_e4m3", "float8_e4m3_group", "float8_e5m2",
                                   "float8_e5m2_group", "mxfp8"}  # fmt: skip


class TestReferencesInFloat64:
    """`compute=torch.float64` is exact to the last bits, and float32 near it."""

    @grid(STEADY)
    def test_dequantize(self, _: str, form: Format) -> None:
        parts = form.quantize(matrix(37, 63))
        want = values(form, parts)
        got = OPS[f"{form.key}_dequantize"].reference(*parts, torch.float32, compute=torch.float64)
        assert got.dtype == torch.float64
        np.testing.assert_array_equal(got.numpy(), want)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(form.dequantize(parts).numpy(), want.astype(f32))

    @parameterized.expand([
        ("fp8_matmul", "float8_e4m3", "float8_e4m3"),
        ("fp8_matmul", "float8_e5m2", "float8_e4m3"),
        ("fp8_tensor_matmul", "float8_e5m2_tensor", "float8_e4m3_tensor"),
        ("fp8_block_matmul", "float8_e4m3_group", "float8_e4m3_block"),
        ("fp8_block_wgrad", "float8_e4m3_group", "float8_e4m3_group"),
        ("mxfp8_matmul", "mxfp8", "mxfp8"),
        ("nvfp4_matmul", "nvfp4", "nvfp4_square"),
        ("nvfp4_matmul", "nvfp4_hadamard", "nvfp4_hadamard"),
    ])  # fmt: skip
    def test_matmul(self, op: str, left: str, right: str) -> None:
        x, w = torch.randn(5, 150), torch.randn(7, 150)
        xq, wq = FORMATS[left].quantize(x), FORMATS[right].quantize(w)
        bias = torch.randn(7)
        xv, wv = values(FORMATS[left], xq), values(FORMATS[right], wq)
        want = np.array([
            [sum(Fraction(a) * Fraction(b) for a, b in zip(i, j, strict=True)) + Fraction(c)
             for j, c in zip(wv.tolist(), bias.tolist(), strict=True)] for i in xv.tolist()
        ]).astype(np.float64)  # fmt: skip
        reference = OPS[op].reference
        exact = reference(*xq, *wq, bias, torch.float32, compute=torch.float64)
        np.testing.assert_allclose(exact.numpy(), want, rtol=0, atol=1e-13)
        near = reference(*xq, *wq, bias, torch.float32)
        assert near.dtype == torch.float32
        bound = (np.abs(xv) @ np.abs(wv).T + np.abs(bias.numpy())) * (150 + 4) * 2.0**-24
        assert (np.abs(near.numpy() - want) <= bound).all()

    @parameterized.expand([("fp8", "float8_e4m3"), ("fp8_tensor", "float8_e4m3_tensor"),
                           ("nvfp4", "nvfp4")])  # fmt: skip
    def test_order_of_the_scales(self, scheme: str, key: str) -> None:
        """`acc · sw · sx + bias` in float32, in this order: the sums of small integers are exact,
        so that nothing else is rounded.
        """
        form = FORMATS[key]
        sums = []
        q = [torch.randint(-2, 3, (n, 32)).float() for n in (6, 9)]
        for whole in q:
            if isinstance(form, nvfp4.NVFP4):
                one = torch.ones(len(whole), 2).to(torch.float8_e4m3fn)
                sums.append((nvfp4.pack(nvfp4.e2m1(whole)), one, torch.rand(1) + 0.1))
            else:
                shape = 1 if form.sides == (0, 0) else (len(whole), 1)
                sums.append((whole.to(form.storage), torch.rand(shape) + 0.1))
        acc = (q[0] @ q[1].mT).numpy()
        scales = [1 / parts[-1].numpy() if len(parts) == 3 else parts[-1].numpy() for parts in sums]
        bias = torch.randn(9)
        want = acc * scales[1].ravel() * scales[0] + bias.numpy()
        got = OPS[f"{scheme}_matmul"].overload(*sums[0], *sums[1], bias, torch.float32)
        np.testing.assert_array_equal(got.numpy(), want)
        other = acc * scales[0] * scales[1].ravel() + bias.numpy()
        assert (other != want).any()


def step(size: np.ndarray, form: Format) -> np.ndarray:
    """Between the two codes around `size`, in units of the scale."""
    bits, least = {"float8_e5m2": (2, -14), "nvfp4": (1, 0)}.get(form.name, (3, -6))
    with np.errstate(divide="ignore"):
        binade = np.floor(np.log2(np.maximum(size, 2.0**least)))
    return 2.0 ** (binade - bits)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
NEAR_ONE = st.floats(-4, 4, width=32)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Floats of every size, or all near one, with repetitions."""
    some = draw(st.lists(draw(st.sampled_from((FLOATS, NEAR_ONE))), min_size=1, max_size=40))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 50))
    return torch.from_numpy(np.resize(np.array(some, f32), shape))


FEW = settings(max_examples=60)


class TestRoundTrip:
    @grid(ROUNDED)
    def test_equals_the_second_reference(self, _: str, form: Format) -> None:
        @FEW
        @given(matrices())
        def run(x: torch.Tensor) -> None:
            check(form, x)

        run()

    @grid(ROUNDED)
    def test_within_half_a_step(self, _: str, form: Format) -> None:
        """Of the grid at that place; what nvfp4's rounded scale leaves beyond 6 is clamped."""

        @FEW
        @given(matrices())
        def run(x: torch.Tensor) -> None:
            parts = form.quantize(x)
            back, given = values(form, parts)[:, : x.shape[1]], x.double().numpy()
            one = torch.ones(()).to(form.storage).view(torch.uint8) if form.packing == 1 else 0x22
            ones = torch.full_like(parts[0].view(torch.uint8), int(one)).view(form.storage)
            scale = values(form, (ones, *parts[1:]))[:, : x.shape[1]]
            wanted = given
            if isinstance(form, nvfp4.NVFP4):
                wanted = np.clip(given, -6 * scale, 6 * scale)
                held = scale * parts[2].item() >= 2.0**-6  # the block's scale has all its bits
                assert (np.abs(given) <= 6.4001 * scale)[held].all()
            with np.errstate(invalid="ignore", divide="ignore"):
                size = np.where(scale > 0, np.abs(wanted) / scale, 0)
            error = np.abs(back - wanted)
            bound = step(size, form) * scale / 2 + np.abs(wanted) * 2.0**-21
            assert (error <= bound).all(), (error - bound).max()

        run()

    @grid(ROUNDED)
    def test_idempotent(self, _: str, form: Format) -> None:
        """What has been quantised stays as it is: exactly, where the scale is a power of two."""
        exactly = form is MX or (isinstance(form, float8.Float8) and all(form.sides))

        @FEW
        @given(matrices())
        @example(torch.tensor([[3.2965e38]]))
        @example(torch.tensor([[3.191e38]]))
        def run(x: torch.Tensor) -> None:
            parts = form.quantize(x)
            once = form.dequantize(parts)
            if not once.isfinite().all():  # the next number is 2^128, which float32 has not
                assert x[~once.isfinite()].abs().min() >= 2.0**128 * 15 / 16
                return
            twice = form.dequantize(form.quantize(once))
            if len(parts) == 3:  # e4m3 holds the block's scale to 3 bits from 2^-6 on, not below
                b = parts[1].float().repeat_interleave(16, -1)
                kept = (b == 0) | (b >= 2.0**-6)
                once, twice = once[kept], twice[kept]
            if exactly:
                assert torch.equal(twice, once)
            else:
                torch.testing.assert_close(twice, once, rtol=2.0**-21, atol=0)

        run()


class TestTheoryInTheDocs:
    """The table of `docs/sqnr.py`: what is measured is what its theory says."""

    @classmethod
    def setup_class(cls) -> None:
        spec = importlib.util.spec_from_file_location("sqnr", ROOT / "docs" / "sqnr.py")
        assert spec is not None
        assert spec.loader is not None
        cls.sqnr = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cls.sqnr)
        cls.data = cls.sqnr.data()

    def test_every_format_has_a_row(self) -> None:
        keys = {form.key for form in self.sqnr.FORMATS}
        assert keys == {"int8", *FLOAT8, "mxfp8", "nvfp4"}

    def test_data(self) -> None:
        """Normal; Student's t with 3 degrees of freedom; normal with 0.1% of outliers."""
        normal, tails, outliers = self.data.values()
        assert normal.square().mean().item() == pytest.approx(1, abs=0.02)
        for x, share in ((1.638, 0.2), (2.353, 0.1), (5.841, 0.01), (12.924, 0.001)):
            assert (tails.abs() > x).float().mean().item() / share == pytest.approx(1, abs=0.2)
        assert (outliers.abs() > 6).float().mean().item() == pytest.approx(9e-4, abs=2e-4)

    @parameterized.expand([("normal", 0.2), ("heavy tails", 0.7), ("outliers", None)])
    def test_measured_is_theory(self, kind: str, within: float | None) -> None:
        for form in self.sqnr.FORMATS:
            measured, theory = self.sqnr.measured(form, self.data[kind]), self.sqnr.theory(form)
            if form.name == "int8" and kind != "normal":
                assert measured < theory - 8, form.key  # amax is not that of normal values
            elif within is not None:
                assert measured == pytest.approx(theory, abs=within), form.key
            else:
                assert measured > theory - 0.5, form.key

    def test_closed_form(self) -> None:
        """The mean over a log-uniform binade, numerically, with e4m3's own rounding."""
        for form, grid in ((FLOAT8["float8_e4m3"], E4M3), (FLOAT8["float8_e5m2"], E5M2)):
            x = np.exp2((np.arange(2**16) + 0.5) / 2**16).astype(f32)
            error = decoded(nearest(x, grid, 128), grid, 128) - x
            ratio = 1 / np.mean((error / x) ** 2)
            assert 10 * math.log10(ratio) == pytest.approx(self.sqnr.theory(form), abs=0.1)
