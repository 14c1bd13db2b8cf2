"""The CUDA kernels against the references: on a GPU, or on the CPU through Triton's interpreter.

The interpreter is chosen by an environment variable before Triton is first imported, and Inductor
imports Triton too. So without a GPU the tests run in a process of their own, which
`TestInterpreter` starts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from parameterized import parameterized

from qnn.kernels import OPS, SCHEMES
from qnn.kernels.cuda import backends, kernels_for
from qnn.kernels.formats import Format, nvfp4
from qnn.kernels.formats.float8 import FLOAT8
from qnn.kernels.formats.mxfp8 import MX
from qnn.kernels.reference.floats import linear_reference, matmul_reference, quantize_reference

from .common import child


def version(package: str) -> tuple[int, ...]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_GPU = torch.cuda.is_available()
# Triton 3.6's interpreter calls int() on arrays of one element, which NumPy refuses from 2.4 on.
TOO_NEW = HAS_TRITON and version("triton") < (3, 7) and version("numpy") >= (2, 4) and not ON_GPU
RUNS = HAS_TRITON and (ON_GPU or (os.environ.get("TRITON_INTERPRET") == "1" and not TOO_NEW))
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

if RUNS:
    from qnn.kernels.cuda import cast, gemm, weight_only

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_kernels = pytest.mark.skipif(
    not RUNS,
    reason="triton is not installed"
    if not HAS_TRITON
    else "this Triton's interpreter needs NumPy below 2.4"
    if TOO_NEW
    else "no GPU: run by TestInterpreter, with TRITON_INTERPRET=1",
)

# The interpreter's arithmetic is NumPy's, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

FORMS = (
    *FLOAT8.values(), MX, nvfp4.ROWS, nvfp4.SQUARES, nvfp4.GRADIENT, nvfp4.TRANSFORMED,
    nvfp4.TRANSFORMED_GRADIENT,
)  # fmt: skip
E4M3, GROUP = FLOAT8["float8_e4m3"], FLOAT8["float8_e4m3_group"]
PAIRS = (
    (E4M3, E4M3),
    (FLOAT8["float8_e4m3_tensor"], FLOAT8["float8_e4m3_tensor"]),
    (FLOAT8["float8_e5m2_tensor"], FLOAT8["float8_e5m2_tensor"]),
    (GROUP, GROUP),
    (FLOAT8["float8_e4m3_block"], FLOAT8["float8_e4m3_block"]),
    (MX, MX),
    (nvfp4.ROWS, nvfp4.TRANSFORMED),
    (nvfp4.GRADIENT, nvfp4.TRANSFORMED_GRADIENT),
)
CASTS = (
    *((form.key, form, None) for form in FORMS),
    *((f"{rows.key}_both", rows, columns) for rows, columns in PAIRS),
    *((f"{rows.key}_columns", None, columns) for rows, columns in PAIRS),
)
SHAPES = ((1, 1), (37, 199), (128, 160), (199, 37), (160, 128))
PRODUCTS = (
    ("fp8", E4M3, E4M3),
    ("fp8_tensor", FLOAT8["float8_e5m2_tensor"], FLOAT8["float8_e4m3_tensor"]),
    ("fp8_block", GROUP, FLOAT8["float8_e4m3_block"]),
    ("fp8_block_wgrad", GROUP, GROUP),
    ("mxfp8", MX, MX),
    ("nvfp4", nvfp4.ROWS, nvfp4.SQUARES),
    ("nvfp4_wgrad", nvfp4.TRANSFORMED_GRADIENT, nvfp4.TRANSFORMED),
)
WEIGHTS = tuple(
    (name, SCHEMES[name].weight) for name in ("fp8", "fp8_tensor", "fp8_block", "mxfp8", "nvfp4")
)
SEED = 2**40 - 3


def awkward(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of all sizes with every special value, in rows and in columns of their own."""
    x = torch.randn(m, k)
    special = (0.0, -0.0, torch.nan, torch.inf, -torch.inf, 448.0, 1e-45)
    for i, factor in enumerate((0.0, 1e20, 1e-20, 1e-38, -0.0)):
        if m > 30:
            x[3 + 2 * i] *= factor
        if k > 30:
            x[:, 20 + 2 * i] *= factor
    flat = x.flatten()
    if len(flat) > 30:
        flat[torch.randperm(len(flat))[: len(special)]] = torch.tensor(special)
    return flat.view(m, k).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def seeds(*forms: Format | None) -> tuple[torch.Tensor, ...]:
    stochastic = any(form is not None and form.stochastic for form in forms)
    return (torch.tensor([SEED]),) if stochastic else ()


def quantized(form: Format, *shape: int) -> tuple[torch.Tensor, ...]:
    return quantize_reference(form)(torch.randn(shape), *seeds(form))


def on_device(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(part.to(DEVICE) for part in parts)


@needs_triton
@pytest.mark.skipif(TOO_NEW, reason="this Triton's interpreter needs NumPy below 2.4")
@pytest.mark.skipif(RUNS, reason="the tests below run here")
class TestInterpreter:
    def test_all_that_is_below(self) -> None:
        pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
        done = subprocess.run(
            [*pytest, "-k", "not TestTable and not TestCompiles", __file__],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
class TestCasts:
    """Bit for bit."""

    def setup_method(self) -> None:
        torch.manual_seed(1)

    def check(
        self, rows: Format | None, columns: Format | None, x: torch.Tensor, label: object
    ) -> None:
        seed = seeds(rows, columns)
        wanted = quantize_reference(rows, columns)(x, *seed)
        given = cast.quantize(rows, columns)(*on_device((x, *seed)))
        assert len(given) == len(wanted)
        for i, (got, want) in enumerate(zip(given, wanted, strict=True)):
            assert (got.shape, got.dtype) == (want.shape, want.dtype), label
            assert got.is_contiguous(), label
            wrong = (bits(got) != bits(want)).sum().item()
            assert wrong == 0, f"{label}: {wrong} bytes of part {i} differ"

    @parameterized.expand(CASTS)
    def test_sizes_and_dtypes(self, _: str, rows: Format | None, columns: Format | None) -> None:
        for shape in SHAPES:
            self.check(rows, columns, awkward(*shape, torch.float32), shape)
        for dtype in (torch.bfloat16, torch.float16):
            self.check(rows, columns, awkward(37, 199, dtype), dtype)

    @parameterized.expand(CASTS)
    def test_strides_and_nothing_but_zeros(
        self, _: str, rows: Format | None, columns: Format | None
    ) -> None:
        self.check(rows, columns, awkward(37, 160, torch.float32).mT, "transposed")
        self.check(rows, columns, awkward(37, 160, torch.bfloat16)[::2, 1::3], "strided")
        self.check(rows, columns, torch.zeros(37, 48), "zeros")
        self.check(rows, columns, torch.full((5, 48), torch.nan), "nan")
        self.check(rows, columns, torch.zeros(0, 16), "no rows")
        self.check(rows, columns, torch.zeros(3, 0), "no columns")
        if not ON_GPU:  # left to the reference, whose divisions CUDA rounds in its own way
            self.check(rows, columns, awkward(5, 48, torch.float64), "float64")

    @parameterized.expand([(form.key, form) for form in FORMS if not form.tall])
    def test_leading_axes(self, _: str, form: Format) -> None:
        self.check(form, None, torch.randn(2, 3, 48), "[2, 3, 48]")
        self.check(form, None, torch.randn(48), "[48]")

    def test_a_row_longer_than_registers_hold(self) -> None:
        with mock.patch.object(cast, "WHOLE_ROW", 64):
            self.check(E4M3, None, awkward(37, 199, torch.bfloat16), "in parts")

    def test_another_seed_is_another_draw(self) -> None:
        x = torch.randn(16, 64, device=DEVICE)
        kernel = cast.quantize(nvfp4.GRADIENT)
        one, two = (kernel(x, torch.tensor([s], device=DEVICE))[0] for s in (1, 2))
        assert not torch.equal(one, two)


@needs_kernels
class TestProducts:
    """Within the error of a float32 sum, and of the last cast."""

    def setup_method(self) -> None:
        torch.manual_seed(2)

    def near(self, got: torch.Tensor, want: torch.Tensor, terms: torch.Tensor, last: float) -> None:
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.is_contiguous()
        error = (got.cpu().float() - want.float()).abs()
        limit = terms * 2**-20 + want.float().abs() * last + 1e-30
        assert (error / limit).max().item() <= 1.0

    def operands(
        self, x: Format, w: Format, m: int, n: int, k: int
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        left, right, bias = quantized(x, m, k), quantized(w, n, k), torch.randn(n)
        values = x.dequantize(left).abs(), w.dequantize(right).abs()
        columns = min(v.shape[1] for v in values)
        terms = values[0][:, :columns] @ values[1][:, :columns].mT + bias.abs()
        return (*left, *right), bias, terms

    @parameterized.expand(PRODUCTS)
    def test_triton(self, _: str, x: Format, w: Format) -> None:
        for m, n, k in ((1, 1, 1), (5, 70, 199), (20, 60, 1100), (70, 100, 128)):
            parts, bias, terms = self.operands(x, w, m, n, k)
            for given, dtype, last in ((bias, torch.float32, 0.0), (None, torch.bfloat16, 2**-8)):
                want = matmul_reference(x, w)(*parts, given, dtype)
                end = None if given is None else given.to(DEVICE)
                got = gemm.triton_matmul(x, w)(*on_device(parts), end, dtype)
                self.near(got, want, terms, last)

    @parameterized.expand(PRODUCTS[3:])
    def test_room_for_two_groups(self, _: str, x: Format, w: Format) -> None:
        parts, _bias, terms = self.operands(x, w, 5, 37, 16)
        parts = tuple(
            torch.cat([p, torch.full_like(p, 1)], 1) if p.dim() == 2 and p.shape[1] == 1 else p
            for p in parts
        )
        want = matmul_reference(x, w)(*parts, None, torch.float32)
        got = gemm.triton_matmul(x, w)(*on_device(parts), None, torch.float32)
        self.near(got, want, terms, 0.0)

    @parameterized.expand(PRODUCTS)
    def test_no_rows_and_float64(self, _: str, x: Format, w: Format) -> None:
        for m, dtype in ((0, torch.float32), (3, torch.float64)):
            parts, bias, _terms = self.operands(x, w, m, 16, 32)
            want = matmul_reference(x, w)(*parts, bias, dtype)
            for make in (gemm.triton_matmul, gemm.scaled_matmul):
                got = make(x, w)(*on_device(parts), bias.to(DEVICE), dtype)
                torch.testing.assert_close(got.cpu(), want)

    @parameterized.expand(WEIGHTS)
    def test_weight_only(self, _: str, weight: Format) -> None:
        for m, n, k in ((1, 37, 199), (2, 3, 2200), (3, 130, 160), (7, 5, 1100), (40, 70, 64)):
            parts, bias = quantized(weight, n, k), torch.randn(n)
            terms = weight.dequantize(parts).abs()[:, :k]
            for dtype, last in ((torch.float32, 0.0), (torch.bfloat16, 2**-8)):
                x = torch.randn(m, k, dtype=dtype)
                want = linear_reference(None, weight)(x, *parts, bias)
                args = on_device((x.view(1, m, k), *parts, bias))
                got = weight_only.linear(weight)(*args)
                self.near(got[0], want, x.float().abs() @ terms.mT + bias.abs(), last)

    @parameterized.expand(WEIGHTS)
    def test_weight_only_of_float16_and_infinite_values(self, _: str, weight: Format) -> None:
        parts = quantized(weight, 37, 96)
        for m in (1, 9):
            x = torch.randn(m, 96, dtype=torch.float16)
            x[0, 3] = torch.inf
            want = linear_reference(None, weight)(x, *parts, None)
            got = weight_only.linear(weight)(*on_device((x, *parts)), None).cpu()
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-3, equal_nan=True)

    @parameterized.expand([("fp8",), ("fp8_tensor",), ("fp8_block",), ("mxfp8",), ("nvfp4",)])
    def test_linear(self, name: str) -> None:
        scheme = SCHEMES[name]
        activation, weight = scheme.activation, scheme.weight
        assert activation is not None
        kernel = gemm.linear(
            activation, weight, cast.quantize(activation), gemm.triton_matmul(activation, weight)
        )
        parts, bias = quantized(weight, 37, 160), torch.randn(37)
        for shape in ((2, 5, 160), (160,), (0, 160)):
            x = torch.randn(shape)
            want = linear_reference(activation, weight)(x, *parts, bias)
            got = kernel(*on_device((x, *parts, bias)))
            torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=1e-4)


@needs_kernels
class TestScaledMM:
    def setup_method(self) -> None:
        torch.manual_seed(3)

    # The CPU knows scales of rows and tensors; a GPU is left to the self-test.
    @parameterized.expand(PRODUCTS[:2])
    @pytest.mark.skipif(ON_GPU, reason="the CPU's")
    @pytest.mark.skipif(
        not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"),
        reason=f"torch {torch.__version__} has no aten::_scaled_mm_v2 on the CPU",
    )
    def test_padding_and_scales(self, _: str, x: Format, w: Format) -> None:
        for m, n, k in ((5, 37, 199), (64, 128, 96)):
            parts, bias = (*quantized(x, m, k), *quantized(w, n, k)), torch.randn(n)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for given in (None, bias):
                    want = matmul_reference(x, w)(*parts, given, dtype)
                    got = gemm.scaled_matmul(x, w)(*parts, given, dtype)
                    assert (got.shape, got.dtype) == (want.shape, want.dtype)
                    assert got.is_contiguous()
                    # Twice the rounding of one cast: the bias comes behind the first.
                    near = 4 * torch.finfo(dtype).eps
                    torch.testing.assert_close(got, want, atol=40 * near, rtol=near)

    @parameterized.expand(PRODUCTS)
    def test_torch_accepts_the_layouts(self, _: str, x: Format, w: Format) -> None:
        # What torch says of meta tensors is what it demands of CUDA's.
        for m, n, k in ((5, 37, 199), (64, 256, 384), (1, 1, 16)):
            parts = [p.to("meta") for p in (*quantized(x, m, k), *quantized(w, n, k))]
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                y = gemm.scaled_matmul(x, w)(*parts, torch.empty(n, device="meta"), dtype)
                assert (y.shape, y.dtype) == ((m, n), dtype)

    def test_order_of_swizzled_scales(self) -> None:
        scale = torch.randint(0, 256, (200, 6), dtype=torch.uint8)
        given = gemm.swizzled(scale).view(2, 2, 512)
        for row, group in ((0, 0), (31, 3), (33, 1), (127, 4), (130, 5), (199, 2)):
            down, r = divmod(row, 128)
            right, c = divmod(group, 4)
            at = r % 32 * 16 + r // 32 * 4 + c
            assert given[down, right, at].item() == scale[row, group].item()

    def test_fast_accumulation_is_for_outputs(self) -> None:
        e4m3, e5m2 = (FLOAT8[f"float8_{kind}_tensor"] for kind in ("e4m3", "e5m2"))
        for x, w, fast, wanted in (
            (E4M3, E4M3, False, False),
            (E4M3, E4M3, True, True),
            (e4m3, e4m3, False, True),
            (e5m2, e4m3, False, False),
        ):
            parts = (*quantized(x, 16, 16), *quantized(w, 16, 16))
            with mock.patch.object(gemm.F, "scaled_mm", return_value=torch.zeros(16, 16)) as call:
                gemm.scaled_matmul(x, w, fast)(*parts, None, torch.bfloat16)
            assert call.call_args.kwargs["use_fast_accum"] == wanted


class TestTable:
    @parameterized.expand(
        [
            ("fp8_matmul", (None, "triton", "scaled_mm", "scaled_mm", "scaled_mm", "scaled_mm")),
            ("fp8_tensor_linear", (None, "triton", *["scaled_mm"] * 4)),
            ("fp8_block_wgrad", (None, "triton", "triton", "scaled_mm", "triton", "triton")),
            ("mxfp8_wgrad", (None, "triton", "triton", "triton", "scaled_mm", "triton")),
            ("nvfp4_linear", (None, "triton", "triton", "triton", "scaled_mm", "scaled_mm")),
            ("nvfp4_weight_linear", (None, *["weight_only"] * 5)),
            ("float8_e4m3_group_quantize_both", (None, *["cast"] * 5)),
            ("nvfp4_stochastic_quantize_columns", (None, *["cast"] * 5)),
            ("fp8_linear_dgrad", (None,) * 6),
            ("mxfp8_dequantize", (None,) * 6),
            ("int8_weight_linear", (None,) * 6),
        ]
    )
    def test_choose(self, op: str, wanted: tuple[str | None, ...]) -> None:
        capabilities = ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
        assert tuple(backends.choose(op, c).kernel for c in capabilities) == wanted

    def test_an_older_cuda(self) -> None:
        assert backends.choose("fp8_block_matmul", (9, 0), (12, 8)).kernel == "triton"
        assert backends.choose("fp8_block_matmul", (9, 0), (12, 9)).kernel == "scaled_mm"
        assert backends.choose("nvfp4_matmul", (10, 0), (12, 6)).kernel == "triton"

    def test_every_op_ends_in_the_reference_and_has_a_reason(self) -> None:
        for op in OPS:
            last = backends.candidates(op, (9, 0))[-1]
            assert last.kernel is None
        assert all(all(row) for row in backends.table())

    def test_ops_with_a_kernel_are_those_that_have_a_role(self) -> None:
        with_kernel = {op for op in OPS if kernels_for(op)}
        assert with_kernel == set(backends.roles())
        # A grouped product is, on a GPU, the dense op of each group.
        loops = {op for op in OPS if "_grouped_linear" in op}
        registered = {op for op in OPS if "CUDA" in OPS[op].kernels}
        assert registered - loops == with_kernel

    def test_importing_qnn_imports_no_triton_and_starts_no_cuda(self) -> None:
        child("""
            import sys, torch, qnn
            from qnn.kernels.cuda import backends
            backends.choose("fp8_matmul", (9, 0)), backends.table()
            assert "triton" not in sys.modules and not torch.cuda.is_initialized()
        """)


@needs_kernels
class TestSelfTest:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        backends.state.cache_clear()
        capability = torch.cuda.get_device_capability() if ON_GPU else (9, 0)
        monkeypatch.setattr(backends, "_gpu", lambda *_: (capability, (13, 0)))
        if not ON_GPU:  # small: the interpreter is slow
            sizes = ((37, 61, 199), (1, 16, 32))
            monkeypatch.setattr(backends, "_SIZES", sizes[:1])
            monkeypatch.setattr(backends, "_PRODUCT_SIZES", sizes)
        yield
        backends.state.cache_clear()

    # Without a GPU, scaled_mm is missing for blocks and Triton serves.
    @parameterized.expand(sorted(backends.roles()))
    def test_a_kernel_passes(self, op: str) -> None:
        state = backends.state(op, DEVICE)
        assert state.entry.kernel is not None, state.passed_over
        if ON_GPU:
            assert state.passed_over == ()

    def test_a_wrong_kernel_is_passed_over_with_the_reason(self) -> None:
        def wrong(x: Format, w: Format, fast: bool = False) -> object:
            right = gemm.triton_matmul(x, w)
            return lambda *args: right(*args) * 1.5

        with mock.patch.object(gemm, "scaled_matmul", wrong):
            state = backends.state("fp8_matmul", DEVICE)
        assert state.entry.kernel == "triton"
        ((entry, reason),) = state.passed_over
        assert entry.kernel == "scaled_mm"
        assert re.search(r"ArithmeticError: \d+ of \d+ wrong at \[37, 61, 199\]|256", reason)

    def test_one_wrong_code_is_enough(self) -> None:
        def wrong(*forms: Format | None) -> object:
            def run(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
                first, *rest = on_device(quantize_reference(*forms)(*(a.cpu() for a in args)))
                first.view(torch.uint8)[-1, -1] ^= 1
                return (first, *rest)

            return run

        with mock.patch.object(cast, "quantize", wrong):
            state = backends.state("mxfp8_quantize", DEVICE)
        assert state.entry.kernel is None
        assert re.search("ArithmeticError: 1 of", state.passed_over[0][1])

    def test_what_raises_leaves_the_reference(self) -> None:
        with mock.patch.object(backends, "build", side_effect=RuntimeError("no such\ninstruction")):
            state = backends.state("fp8_matmul", DEVICE)
            parts = on_device((*quantized(E4M3, 3, 16), *quantized(E4M3, 5, 16)))
            y = backends.kernel("fp8_matmul")(*parts, None, torch.float32)
        assert [reason for _, reason in state.passed_over] == ["RuntimeError: no such"] * 2
        assert state.entry.kernel is None
        assert y.shape == (3, 5)


# Launches nothing: Triton compiles for a GPU that is not there, with the arguments of real calls.
# The interpreter takes much that the compiler does not.
_COMPILE = """
    import sys, torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    capability = {capability}

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        def get_current_device(self):
            return 0
        def get_current_stream(self, device):
            return 0

    compiled = []

    def launch(self, grid):
        def run(*args, **kwargs):
            kernel = JITFunction.run(self, *args, grid=grid, warmup=True, **kwargs)
            compiled.append((self.__name__, kernel.asm["ptx"]))
        return run

    driver.set_active(Driver())
    JITFunction.__getitem__ = launch
    torch.cuda.get_device_capability = lambda device=None: capability

    from qnn.kernels import SCHEMES
    from qnn.kernels.cuda import cast, gemm, weight_only

    x = torch.randn(64, 256, dtype=torch.bfloat16)
    t = SCHEMES["fp8"].training
    cast.quantize(t.x)(x)
    cast.quantize(t.x, t.x)(x)
    cast.quantize(SCHEMES["nvfp4"].weight)(x)
    for name in ("fp8_block", "nvfp4"):
        t, w = SCHEMES[name].training, SCHEMES[name].weight
        parts = [p.contiguous() for p in w.quantize(torch.randn(64, 256))]
        gemm.triton_matmul(t.x, t.weight)(*t.x.quantize(x), *parts, None, torch.bfloat16)
        weight_only.linear(w)(x[:1], *parts, None)
    names = {{name for name, _ in compiled}}
    assert len(names) >= 6, names
    for name, ptx in compiled:
        assert "div.full" not in ptx and "div.approx" not in ptx, name  # IEEE divisions only
        assert "fma.rn.f32" not in ptx or "gem" in name or "finish" in name, name  # none in casts
"""


@needs_triton
class TestCompiles:
    @parameterized.expand([("8.0", (8, 0)), ("9.0", (9, 0))])
    def test_for_a_gpu(self, _: str, capability: tuple[int, int]) -> None:
        child(_COMPILE.format(capability=capability), TRITON_INTERPRET="0")
