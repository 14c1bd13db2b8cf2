"""Layers over a quantised weight, activations as they are, where a tier multiplies in bfloat16:
no product is rounded, rows of any magnitude keep their digits, few rows take the float32 kernels.
"""

from __future__ import annotations

import math

import pytest
import torch

from qnn.kernels.formats import nvfp4
from qnn.kernels.formats.float8 import FLOAT8
from qnn.kernels.formats.int4 import INT4
from qnn.kernels.formats.int8 import INT8_CHANNEL

from .common import sum_bound
from .tiers import need

pytestmark = pytest.mark.usefixtures("library")
TIER = "amx"
FORMS = {
    "int8": INT8_CHANNEL, "fp8": FLOAT8["float8_e4m3"], "nvfp4": nvfp4.ROWS,
    "int4_g32": INT4["int4_g32"], "int4_asym": INT4["int4_asym"],
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY = (13, 16, 33, 70)


def linear(form: str, x: torch.Tensor, *parts: torch.Tensor, tier: str = TIER) -> torch.Tensor:
    if form == "int8":
        return torch.ops.qnn.cpu_linear(x, *parts, None, None, "none", "int8_weight", need(tier))
    extra = parts[2] if len(parts) == 3 else None
    op = f"{form}_weight_linear"
    return torch.ops.qnn.cpu_weight_linear(x, *parts[:2], extra, None, op, need(tier))


def weight(form: str, n: int, k: int) -> tuple[torch.Tensor, ...]:
    return tuple(FORMS[form].quantize(torch.randn(n, k) * 0.05))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_few_rows_are_those_of_the_float32_kernels(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    parts = weight(form, 77, 640)
    for m in (1, 2, 5, 12):
        x = torch.randn(m, 640).to(dtype)
        want = linear(form, x, *parts, tier="avx512_vnni")
        assert torch.equal(linear(form, x, *parts), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_exact(dtype: torch.dtype) -> None:
    """A sum of one product is that product, with all digits of x, and integers add up exactly."""
    torch.manual_seed(2)
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
    w = torch.randint(0, 7, (40, 256)).exp2().to(torch.int8)
    one = torch.ones(40, 1)
    for m in MANY:
        rows, at = torch.arange(m), torch.randint(0, 256, (m,))
        x = torch.zeros(m, 256)
        x[rows, at] = torch.randint(2 ** (digits - 1), 2**digits, (m,)).float() / 2**digits
        given = x.to(dtype)
        assert torch.equal(given.float(), x)
        got = linear("int8", given, w, one)
        assert torch.equal(got.float(), x[rows, at, None] * w[:, at].T)

        whole = torch.randint(-63, 64, (m, 256)).to(dtype)
        codes = torch.randint(-1, 2, (40, 256), dtype=torch.int8)
        got = linear("int8", whole, codes, one / 64)
        want = (whole.double() @ codes.T.double() / 64).to(dtype)
        assert torch.equal(got, want)


@pytest.mark.parametrize("power", [-149, -140, -126, -100, -41, 59, 61, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_magnitude(form: str, dtype: torch.dtype, power: int) -> None:
    """Subnormal rows and huge ones, beside others: a row's error is a share of its own values."""
    torch.manual_seed(3)
    k, n = 384, 40
    parts = weight(form, n, k)
    w = FORMS[form].dequantize(parts, torch.float64)[:, :k]
    if form not in INT4:  # whose last scale comes after the sum, which is to stay in range
        power = min(power, 105)
    for m in MANY:
        x = torch.randn(m, k)
        x[::2] *= 2.0 ** (power // 2)
        x[::2] *= 2.0 ** (power - power // 2)
        given = x.to(dtype)
        exact = given.double() @ w.T
        got = linear(form, given, *parts)
        info, narrow = torch.finfo(dtype), 2.0**-133 if dtype == torch.bfloat16 else 2.0**-149
        sizes = given.double().abs() @ w.abs().T
        roundings = 8 * math.sqrt(k + k // 8 + 8)  # of independent signs: see `sum_bound`
        limit = sizes * roundings * 2.0**-24 + info.eps / 2 * exact.abs() + narrow
        limit += 2.0**-86 * given.double().abs().amax(-1, keepdim=True) * 1000
        over = ((got.double() - exact).abs() / limit).max()
        assert over <= 1, f"the error is {over:.3g} times what rounding explains"


@pytest.mark.parametrize("form", FORMS)
def test_a_value_far_below_its_row(form: str) -> None:
    """What the documents say of it: at most 2⁻⁸⁶ of the row's largest, for each term."""
    x = torch.zeros(20, 128)
    x[:, 0], x[:, 1:] = 1.0, 2.0**-130
    parts = weight(form, 5, 128)
    w = FORMS[form].dequantize(parts, torch.float64)
    got = linear(form, x, *parts).double()
    limit = sum_bound(x.double().abs() @ w.abs().T, 150) + 2.0**-86 * 1000
    assert bool(((got - x.double() @ w.T).abs() <= limit).all())
