"""The C++ kernels over a weight that is not int8 as torch ops, tier by tier, and the Python kernels
that serve without them, against the references in `kernels/declare/floats.py`.

What the kernels do with memory and on other CPUs is `test_kernels_cpp.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnn.kernels.cpu.float_linear import weight_linear
from qnn.kernels.formats import Format, nvfp4
from qnn.kernels.formats.float8 import FLOAT8
from qnn.kernels.formats.int4 import INT4, Int4, pack

from .common import DTYPES, child, sum_bound
from .tiers import TIERS, need

pytestmark = pytest.mark.usefixtures("library")
FORMS = {"fp8": FLOAT8["float8_e4m3"], "nvfp4": nvfp4.ROWS, **INT4}
# Of int4, a group of less than a step of some tiers, and one of more.
SOME = ("fp8", "nvfp4", "int4_g32", "int4_asym_g32", "int4_asym")
E4M3 = torch.float8_e4m3fn
# Columns of x: both sides of blocks and vectors; those of nvfp4 files are multiples of 16.
COLUMNS = {"fp8": (1, 37, 63, 760), "nvfp4": (16, 48, 752, 37)}
for key, int4 in INT4.items():
    COLUMNS[key] = tuple(int4.group * groups for groups in (1, 2, 3, 7))
ROWS = (1, 3, 4, 7, 12, 13, 32, 70)

Parts = tuple[torch.Tensor, ...]
Run = Callable[..., torch.Tensor]


def forced(tier: str) -> Run:
    """The kernels of one tier, called as the ops are."""

    def run(x: torch.Tensor, *args: torch.Tensor | None) -> torch.Tensor:
        *parts, bias = args
        extra = parts[2] if len(parts) == 3 else None
        op = f"{name_of(form_of(parts))}_weight_linear"
        y: torch.Tensor = torch.ops.qnn.cpu_weight_linear(x, *parts[:2], extra, bias, op, tier)
        return y

    return run


def form_of(parts: Sequence[Any]) -> Format:
    if parts[0].dtype != torch.int32:
        return FORMS["fp8" if len(parts) == 2 else "nvfp4"]
    groups = parts[1].shape[1]
    group = 8 * parts[0].shape[1] // groups if groups else 32
    return next(f for f in INT4.values() if f.group == group and len(f.parts) == len(parts))


def name_of(form: Format) -> str:
    return next(name for name, each in FORMS.items() if each is form)


def in_python(x: torch.Tensor, *args: torch.Tensor | None) -> torch.Tensor:
    return weight_linear(form_of(args[:-1]))(x, *args)


@pytest.fixture(params=[*TIERS, "python"])
def run(request: pytest.FixtureRequest) -> Run:
    return in_python if request.param == "python" else forced(need(request.param))


def codes(form: str, n: int, k: int) -> Parts:
    """A weight of any codes but NaN, and its scales."""
    if form == "fp8":
        return finite(n, k), torch.rand(n, 1) * 0.02 + 1e-3
    if form == "nvfp4":
        blocks = -(-k // 16)
        packed = torch.randint(0, 256, (n, 8 * blocks), dtype=torch.uint8)
        return packed, finite(n, blocks), torch.tensor([37.0])
    int4 = INT4[form]
    groups = k // int4.group
    parts = pack(torch.randint(0, 16, (n, k))), torch.rand(n, groups) * 0.02 + 1e-3
    zeros = torch.randint(0, 16, (n, groups), dtype=torch.int8)
    return parts if int4.symmetric else (*parts, zeros)


def columns(form: str, k: int) -> int:
    """So many or more, as the form has them."""
    multiple = FORMS[form].columns_multiple_of if form in INT4 else 1
    return -(-k // multiple) * multiple


def finite(*shape: int) -> torch.Tensor:
    bits = torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.where(bits & 127 == 127, bits ^ 1, bits).view(E4M3)


def assert_within(
    got: torch.Tensor, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None
) -> None:
    """What a float32 sum in any order may round, and the cast to the dtype of `x`."""
    form, k = form_of(parts), x.shape[-1]
    w = form.dequantize(parts, torch.float64)[:, :k]
    added = 0 if bias is None else bias.double()
    exact = x.double() @ w.T + added
    sizes = x.double().abs() @ w.abs().T + abs(added)
    assert (got.dtype, got.shape) == (x.dtype, exact.shape)
    assert got.is_contiguous()
    info = torch.finfo(x.dtype)
    cast = info.eps * (exact.abs() / 2 + info.smallest_normal)
    # Beside the sum: two scales of the weight, the unit of its codes, the bias.
    limit = sum_bound(sizes, k + 4) + cast
    if isinstance(form, Int4):  # few rows are rounded, to a share of the largest of eight values
        largest = x.double().abs().unflatten(-1, (k // 8, 8)).amax(-1).repeat_interleave(8, -1)
        limit += 2.0**-23 * largest @ w.abs().T
    over = (got.double() - exact).abs() / limit
    assert bool((over <= 1).all()), f"the error is {over.max():.3g} times what rounding explains"


# -- codes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 32])
def test_every_e4m3_code(run: Run, m: int) -> None:
    """A code a row, behind and before zeros: nothing is rounded, NaN stays NaN."""
    every = torch.arange(256, dtype=torch.uint8)
    for k in (1, 2, 17, 40):
        for at in {0, k // 2, k - 1}:
            w = torch.zeros(256, k, dtype=torch.uint8)
            w[:, at] = every
            x = torch.ones(m, k) * (torch.arange(m)[:, None] + 1)
            got = run(x, w.view(E4M3), torch.ones(256, 1), None)
            want = every.view(E4M3).float() * x[:, at, None]
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("m", [1, 32])
def test_every_e2m1_code(run: Run, m: int) -> None:
    """All bytes at each place of a block, and each finite block scale."""
    every = torch.arange(256, dtype=torch.uint8)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    low, high = values[(every & 15).int()], values[(every >> 4).int()]
    x = torch.randint(-8, 9, (m, 48)).float()
    one = torch.ones(1)
    for at in range(24):
        w = torch.zeros(256, 24, dtype=torch.uint8)
        w[:, at] = every
        scale = torch.ones(256, 3).to(E4M3)
        got = run(x, w, scale, one, None)
        want = low * x[:, 2 * at, None] + high * x[:, 2 * at + 1, None]
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    ones = torch.full((256, 24), 0x22, dtype=torch.uint8)
    scale = torch.zeros(256, 3, dtype=torch.uint8)
    scale[:, 1] = every
    got = run(torch.ones(m, 48), ones, scale.view(E4M3), torch.tensor([4.0]), None)
    want = (every.view(E4M3).float() * 16 / 4).expand(m, 256)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("m", [1, 32])
@pytest.mark.parametrize("form", INT4)
def test_every_int4_code(run: Run, form: str, m: int) -> None:
    """Each code at each place of a word and a step, with each zero point; other columns meet 0."""
    group, symmetric = INT4[form].group, INT4[form].symmetric
    zero = torch.full((16,), 8) if symmetric else torch.arange(16)
    k = 3 * group
    for at in (*range(9), *range(group - 1, k, 31), k - 1):
        code = torch.randint(0, 16, (16, 16, k))
        code[:, :, at] = torch.arange(16)[:, None]
        scales = torch.rand(256, 3) + 0.5
        x = torch.zeros(m, k)
        x[:, at] = torch.arange(m) % 5 - 2
        zeros = zero.repeat(16)[:, None].expand(256, 3).to(torch.int8).contiguous()
        parts = (pack(code.view(256, k)), scales, *(() if symmetric else (zeros,)))
        want = (code.view(256, k)[:, at] - zero.repeat(16)) * scales[:, at // group]
        torch.testing.assert_close(run(x, *parts, None), x[:, at, None] * want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("m", [1, 32])
def test_int4_of_zeros_is_zero(run: Run, m: int) -> None:
    """A code that is its zero point counts for nothing, whatever meets it."""
    x = torch.randn(m, 96) * torch.tensor([1e-30, 1.0, 1e30]).repeat(32)
    for zero in (0, 8, 15):
        words = pack(torch.full((5, 96), zero))
        zeros = torch.full((5, 3), zero, dtype=torch.int8)
        assert not bool(run(x, words, torch.ones(5, 3), zeros, None).any())


@pytest.mark.parametrize("unit", [1e-30, 1e-15, 1e15, 1e35, 4e37])
@pytest.mark.parametrize("m", [1, 32])
def test_int4_over_rows_of_any_size(run: Run, unit: float, m: int) -> None:
    torch.manual_seed(5)
    x, parts = torch.randn(m, 256), codes("int4_asym_g64", 33, 256)
    y = run(x * unit, *parts, None)
    torch.testing.assert_close(y / unit, run(x, *parts, None), rtol=1e-4, atol=1e-4)


# -- calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", SOME)
def test_sizes(run: Run, form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for k in COLUMNS[form]:
        for n in (5, 67):
            parts = codes(form, n, k)
            for m in ROWS:
                bias = torch.randn(n).to(DTYPES[m % 4]) if m % 2 else None
                x = torch.randn(m, k).to(dtype)
                assert_within(run(x, *parts, bias), x, parts, bias)


@pytest.mark.parametrize("m", [1, 8, 40])
@pytest.mark.parametrize("form", SOME)
def test_long_rows(run: Run, form: str, m: int) -> None:
    torch.manual_seed(2)
    x, parts = torch.randn(m, 4096), codes(form, 96, 4096)
    assert_within(run(x, *parts, None), x, parts, None)


@pytest.mark.parametrize("form", SOME)
def test_leading_axes_and_layouts(run: Run, form: str) -> None:
    torch.manual_seed(3)
    k, n = columns(form, 48), 21
    parts, bias = codes(form, n, k), torch.randn(2 * n)[::2]
    for x in (
        torch.randn(k), torch.randn(2, 3, k), torch.randn(k, 5).T, torch.randn(4, 2 * k)[:, ::2],
        torch.randn(1, k).expand(20, k), torch.randn(3, k, 2).mT,
    ):  # fmt: skip
        strided = tuple(
            torch.stack([part, part], -1)[..., 0] if part.dim() == 2 else part for part in parts
        )
        got = run(x, *strided, bias)
        assert_within(got, x, parts, bias)
        # Torch's own product may sum in another order.
        assert run is in_python or torch.equal(got, run(x.contiguous(), *parts, bias))


@pytest.mark.parametrize("form", FORMS)
def test_empty(run: Run, form: str) -> None:
    k = columns(form, 16)
    parts, bias = codes(form, 5, k), torch.randn(5)
    for lead in ((0,), (2, 0), (0, 3)):
        assert run(torch.randn(*lead, k), *parts, bias).shape == (*lead, 5)
    assert run(torch.randn(3, k), *codes(form, 0, k), None).shape == (3, 0)
    nothing = run(torch.randn(3, 0), *codes(form, 5, 0), bias)
    assert torch.equal(nothing, bias.expand(3, 5))


@pytest.mark.parametrize("m", [3, 30])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_reaches_its_outputs_only(run: Run, form: str, m: int) -> None:
    torch.manual_seed(4)
    k, n = columns(form, 300), 40
    for row, column, where in ((1, 7, 0), (0, 0, k - 1), (m - 1, n - 1, 155)):
        for poison in (math.nan, math.inf, -math.inf):
            for code in (0x7F, 0xFF):
                parts, x = codes(form, n, k), torch.randn(m, k)
                x[row, where] = poison
                if form in INT4:
                    parts[1][column, where // INT4[form].group] = math.nan
                else:
                    holder, at = (parts[0], where) if form == "fp8" else (parts[1], where // 16)
                    holder.view(torch.uint8)[column, at] = code
                y = run(x, *parts, None)
                assert not bool(y[row].isfinite().any())
                assert bool(y[:, column].isnan().all())
                y[row], y[:, column] = 0, 0
                assert bool(y.isfinite().all())


def test_zeros(run: Run) -> None:
    """-0 is no sign, and what lies behind the last column counts for nothing."""
    zeros = torch.tensor([0, 128], dtype=torch.uint8).repeat(3, 20)
    for m in (1, 20):
        x = torch.full((m, 40), -0.0)
        assert not bool(run(x, zeros.view(E4M3), torch.ones(3, 1), None).any())
        packed = torch.full((3, 24), 0x77, dtype=torch.uint8)
        packed[:, :20] = 0x80
        scales = torch.full((3, 3), 448.0).to(E4M3)
        assert not bool(run(torch.randn(m, 40), packed, scales, torch.ones(1), None).any())


@pytest.mark.parametrize("form", SOME)
def test_random_calls(run: Run, form: str) -> None:
    @settings(max_examples=60)
    @given(
        m=st.integers(0, 40), n=st.integers(1, 130), k=st.integers(1, 600),
        dtype=st.sampled_from(DTYPES), bias=st.none() | st.sampled_from(DTYPES),
        unit=st.sampled_from((1.0, 1e-6, 1e3)), seed=st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def check(
        m: int, n: int, k: int, dtype: torch.dtype, bias: torch.dtype | None, unit: float, seed: int
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            k = columns(form, k)
            parts = codes(form, n, k)
            x = (torch.randn(m, k) * unit).to(dtype)
            added = None if bias is None else torch.randn(n).to(bias)
        if dtype == torch.float16 and unit > 1:
            return  # beyond its largest number
        if m == 0:
            assert run(x, *parts, added).shape == (0, n)
            return
        assert_within(run(x, *parts, added), x, parts, added)

    check()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("m", [1, 7, 70, 257])
def test_thread_counts_change_no_bit(run: Run, form: str, m: int) -> None:
    if run is in_python:
        pytest.skip("torch's own product")
    k, n = columns(form, 700), 1100
    parts, x, results = codes(form, n, k), torch.randn(m, k), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(x, *parts, None))
    assert all(torch.equal(result, results[0]) for result in results[1:])


# -- ops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_op_runs_the_best_tier(form: str) -> None:
    best = next(p.split(":")[0] for p in torch.ops.qnn.cpu_tiers().split(",") if p.endswith(":ok"))
    k = columns(form, 48)
    x, parts, bias = torch.randn(2, 3, k), codes(form, 9, k), torch.randn(9)
    op = getattr(torch.ops.qnn, f"{form}_weight_linear")
    assert torch.equal(op(x, *parts, bias), forced(best)(x, *parts, bias))
    assert torch.equal(op(x, *parts), forced(best)(x, *parts, None))


def test_without_the_library() -> None:
    """The Python kernels serve where nothing can be built, with no word about it."""
    out = child(
        """
        import os, torch, qnn
        from qnn.kernels import OPS
        from qnn.kernels.formats import Format, nvfp4
        from qnn.kernels.cpu import native
        x, w = torch.randn(3, 48), torch.randn(7, 48)
        parts = nvfp4.ROWS.quantize(w)
        y = torch.ops.qnn.nvfp4_weight_linear(x, *parts, None)
        want = OPS["nvfp4_weight_linear"].reference(x, *parts, None)
        torch.testing.assert_close(y, want)
        print(native.status().state, "CPU" in OPS["nvfp4_weight_linear"].kernels)
        """,
        XDG_CACHE_HOME="/nowhere/at/all",
        CXX="no-such-compiler",
    )
    assert out.strip() == "absent True", out


def test_unknown_tier() -> None:
    with pytest.raises(ValueError, match=r"unknown tier 'avx10'"):
        forced("avx10")(torch.ones(3, 40), torch.ones(5, 40).to(E4M3), torch.ones(5, 1), None)
