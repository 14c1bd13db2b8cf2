"""The C++ kernels as torch ops, tier by tier, against the references in `kernels/declare/int8.py`.

Random shapes, layouts, dtypes and epilogues; what the kernels do with memory and on other CPUs is
`test_kernels_cpp.py`.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnn.kernels import OPS
from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.reference import int8

from .common import DTYPES, examples, sum_bound

pytestmark = pytest.mark.usefixtures("library")
SCHEMES = ("int8", "int8_weight")
REFERENCES = {"int8": int8.linear_reference, "int8_weight": int8.weight_linear_reference}
EPS = torch.finfo(torch.float32).eps

# |error| of an activation in EPS · |x|, against float64, over 2,000,000 float32 values from 0 to
# the largest: gelu 2.57 (torch's own 2.94), gelu_tanh 0.95 (0.91), silu 0.99 (0.99).
ERRORS = {"gelu": 3.0, "gelu_tanh": 1.1, "silu": 1.1}  # the others are torch's own to the bit


# -- random calls ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    x: torch.Tensor
    w: torch.Tensor
    sw: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: str = "none"

    def run(self, scheme: str, tier: str) -> torch.Tensor:
        return torch.ops.qnn.cpu_linear(*vars(self).values(), scheme, tier)

    def reference(self, scheme: str, **options: torch.dtype) -> torch.Tensor:
        # Without columns there is nothing to take a scale of.
        scheme = scheme if self.x.shape[-1] else "int8_weight"
        return REFERENCES[scheme](*vars(self).values(), **options)

    def __repr__(self) -> str:
        def show(t: torch.Tensor | None) -> str:
            return "None" if t is None else f"{t.dtype} {tuple(t.shape)} strides {t.stride()}"

        values = {name: v if name == "activation" else show(v) for name, v in vars(self).items()}
        return f"Call({values})"


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t


def _sliced(t: torch.Tensor) -> torch.Tensor:
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 3)
    view = wide[..., 3::2]
    return view.copy_(t)


def _shifted(t: torch.Tensor) -> torch.Tensor:
    """Dense, but not at the start of its memory, so aligned to an element only."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _reversed_axes(t: torch.Tensor) -> torch.Tensor:
    axes = list(reversed(range(t.dim())))
    return t.permute(axes).contiguous().permute(axes)


LAYOUTS = {
    "dense": lambda t: t,
    "transposed": _transposed,
    "sliced": _sliced,
    "shifted": _shifted,
    "axes reversed": _reversed_axes,
    "zero stride": lambda t: t[..., :1].expand(t.shape) if t.shape[-1] else t,
    "one row for all": lambda t: t[:1].expand(t.shape) if t.shape[0] else t,
    "negative": lambda t: torch._neg_view(t) if t.is_floating_point() else t,
}

SMALL = st.integers(0, 20)
EDGES = (15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 129, 191, 193, 255, 257)
LONG = (511, 512, 513, 1023, 1024, 1025, 1100)


@st.composite
def calls(draw: st.DrawFn, whole: bool = False) -> Call:
    """Whole: numbers whose sums are exact in float32, in any order."""
    k = draw(SMALL | st.sampled_from(EDGES + LONG))
    n = draw(SMALL | st.sampled_from(EDGES))
    most = 4_000_000 // (k * n + 1)
    m = min(draw(SMALL | st.sampled_from(EDGES)), most)
    outer = draw(st.sampled_from([(), (1,), (2,), (1, 2), (0,)]))
    leading = draw(st.sampled_from([(), (m,), (*outer, m)]))
    dtype = draw(st.sampled_from(DTYPES))
    lay_out = [LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))] for _ in range(5)]
    bias_dtype = draw(st.none() | st.sampled_from(DTYPES))
    with_residual = draw(st.booleans())
    activation = draw(st.sampled_from(OPS["int8_linear"].choices["activation"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
        x = torch.randint(-8, 9, (*leading, k)).to(dtype) if whole else _rows(leading, k, dtype)
        w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        if n:
            w[0], w[-1] = 127, -128
        sw = torch.rand(n, 1) * 0.02 + 1e-3
        bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
        residual = torch.randn(*leading, n).to(dtype) if with_residual else None
    return Call(
        lay_out[0](x),
        lay_out[1](w),
        lay_out[2](sw),
        bias if bias is None else lay_out[3](bias),
        residual if residual is None else lay_out[4](residual),
        activation,
    )


def _rows(leading: tuple[int, ...], k: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary rows, and with some chance zero, tiny, huge and non-finite ones."""
    x = torch.randn(*leading, k, dtype=torch.float64)
    for row in x.view(math.prod(leading), k) if k else ():
        kind = int(torch.randint(24, ()))
        if kind < 6:
            row *= (0.0, 1e-45, 1e-39, 1e-20, 1e30, 1e300)[kind]
        elif kind < 9:
            row[int(torch.randint(k, ()))] = (math.nan, math.inf, -math.inf)[kind - 6]
    return x.to(dtype)


def for_all(strategy: st.SearchStrategy[Call], examples: int, check) -> None:  # type: ignore[no-untyped-def]
    """Check so many calls; the same ones each time."""

    @settings(max_examples=examples)
    @given(strategy)
    def run(call: Call) -> None:
        check(call)

    run()


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.is_contiguous()
    equal = (got == want) | (got.isnan() & want.isnan())
    if not bool(equal.all()):
        at = tuple(int(i) for i in (~equal).nonzero()[0])
        raise AssertionError(f"{at}: {got[at].item()!r} is not {want[at].item()!r}")


def assert_close(got: torch.Tensor, want: torch.Tensor, error: torch.Tensor | float) -> None:
    """Within `error`, and what the cast to the dtype of `got` rounds."""
    dtype, got = got.dtype, got.double()
    info = torch.finfo(dtype)
    rounding = info.eps * (want.abs() / 2 + info.smallest_normal)
    wrong = (
        ~((got - want).abs() <= error + rounding) & ~(got.isnan() & want.isnan()) & (got != want)
    )
    # Around the largest number either side may round to inf.
    wrong &= ~(want.abs() > info.max * 0.99) | want.isnan()
    if bool(wrong.any()):
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(f"{at}: {got[at].item()!r} is too far from {want[at].item()!r}")


@pytest.mark.parametrize("scheme", SCHEMES)
@examples(200, 400)
def test_equals_reference(tier: str, scheme: str, examples: int) -> None:
    """Bit for bit up to the activation's argument, and from its value on."""

    def check(call: Call) -> None:
        linear = replace(call, residual=None, activation="none")
        argument = linear.run(scheme, tier)
        assert_same(argument, linear.reference(scheme))
        activated = replace(call, residual=None).run(scheme, tier)
        x = argument.double()
        if call.activation in ERRORS:
            error = ERRORS[call.activation] * EPS * x.abs().nan_to_num(0, 0)
            assert_close(activated, ACTIVATIONS[call.activation](x), error)
        else:
            assert_same(activated, ACTIVATIONS[call.activation](argument))
        got = call.run(scheme, tier)
        assert_same(got, activated if call.residual is None else activated + call.residual)

    for_all(calls(whole=scheme == "int8_weight"), examples, check)


@examples(100, 200)
def test_weight_only_within_rounding(tier: str, examples: int) -> None:
    """K products, each added with one rounding, in any order."""

    def check(call: Call) -> None:
        call = replace(call, activation="none", residual=None)
        got = call.run("int8_weight", tier)
        assert (got.dtype, got.shape) == (call.x.dtype, (*call.x.shape[:-1], call.w.shape[0]))
        want = call.reference("int8_weight", compute=torch.float64)
        sizes = call.x.double().abs() @ call.w.double().abs().T
        scaled = sizes * call.sw.double().abs().view(-1)
        scaled += 0 if call.bias is None else call.bias.double().abs()
        error = sum_bound(scaled, call.x.shape[-1] + 3)  # and the scale, and the bias
        # Where float32 may overflow on the way, or x does, anything goes that is not finite too.
        dead = ~call.x.float().isfinite().all(-1)
        skip = ~(sizes < torch.finfo(torch.float32).max / 2) | dead.unsqueeze(-1)
        finite = torch.where(skip, 0, want)
        assert_close(torch.where(skip, 0, got), finite, torch.where(skip, 0, error))
        assert not bool(got[dead].isfinite().any())

    for_all(calls(), examples, check)


# -- activations on every number of 16 bits --------------------------------------------------------


def identity(x: torch.Tensor, activation: str, tier: str) -> torch.Tensor:
    """`activation(x)` by a layer of one weight, 1."""
    one = torch.ones(1, 1, dtype=torch.int8)
    y = Call(x.view(-1, 1), one, torch.ones(1, 1), activation=activation)
    return y.run("int8_weight", tier).view(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("activation", OPS["int8_linear"].choices["activation"])
def test_every_half(tier: str, activation: str, dtype: torch.dtype) -> None:
    """All 65,536 numbers. Those that differ from torch's own, on AVX-512: bfloat16 gelu 661 (of
    which 129 where torch overflows, nearly all others subnormal), gelu_tanh 31, silu 0; float16
    gelu 1, gelu_tanh 400 (-5.1 < x < -3.7, where 1 + tanh cancels), silu 0.
    """
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = identity(x, activation, tier)
    wide = x.double()
    torchs = ACTIVATIONS[activation](x)
    differ = (got != torchs) & ~(got.isnan() & torchs.isnan())
    assert int(differ.sum()) <= 700 * (activation in ERRORS)
    if activation in ERRORS:
        want = ACTIVATIONS[activation](wide)
        assert_close(got, want, ERRORS[activation] * EPS * wide.abs().nan_to_num(0, 0))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_float32_activations(tier: str, activation: str) -> None:
    spread = torch.randn(200_000) * torch.exp(10 * torch.randn(200_000))
    x = torch.cat([torch.linspace(-20, 20, 400_001), torch.randn(200_000), spread])
    got, wide = identity(x, activation, tier), x.double()
    want = ACTIVATIONS[activation](wide)
    assert_close(got, want, ERRORS[activation] * EPS * wide.abs())
    if activation == "silu":  # no cancellation: 1.46 measured, as torch's own
        relative = (got - want).abs() / want.abs()
        assert float(relative[want.abs() > 1e-30].max()) <= 1.6 * EPS


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_what_is_not_finite(tier: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -1000.0, 1000.0, 0.0], dtype=dtype)
    for activation in ("gelu", "gelu_tanh", "silu"):
        y = identity(x, activation, tier)
        assert y[0] == math.inf, activation
        assert bool(y[1:3].isnan().all()), activation
        assert y[3:].tolist() == [0.0, 1000.0, 0.0], activation
    assert identity(x, "relu", tier)[[0, 1, 3]].tolist() == [math.inf, 0.0, 0.0]
    assert bool(identity(x, "relu", tier)[2].isnan())


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("m", [1, 7, 70, 257])
def test_thread_counts_change_no_bit(tier: str, scheme: str, m: int) -> None:
    k, n = 700, 1100
    call = Call(
        torch.randn(m, k), torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n, 1),
        torch.randn(n), torch.randn(m, n), "gelu",
    )  # fmt: skip
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(call.run(scheme, tier))
    for result in results[1:]:
        assert_same(result, results[0])


def test_calls_at_the_same_time(tier: str) -> None:
    """Threads of Python do not share what a call works in."""
    layers = []
    for m, k, n in ((1, 300, 500), (3, 1030, 97), (40, 64, 200), (129, 513, 65)):
        w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        layers.append(Call(torch.randn(m, k), w, torch.rand(n, 1), torch.randn(n)))
    alone = [call.run("int8", tier) for call in layers]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: call.run("int8", tier), layers * 50))
    for i, got in enumerate(together):
        assert_same(got, alone[i % len(layers)])


# -- errors ----------------------------------------------------------------------------------------

X, W, SW = torch.randn(3, 8), torch.ones(5, 8, dtype=torch.int8), torch.ones(5, 1)


def test_wrong_scheme_and_tier() -> None:
    with pytest.raises(
        ValueError, match=r"scheme must be one of 'int8', 'int16', 'int8_weight', got"
    ):
        Call(X, W, SW).run("int4", "portable")
    with pytest.raises(ValueError, match=r"unknown tier 'avx10'"):
        Call(X, W, SW).run("int8", "avx10")
    for pair in torch.ops.qnn.cpu_tiers().split(","):
        name, why = pair.split(":", 1)
        if why != "ok":
            with pytest.raises(ValueError, match=rf"tier '{name}' cannot run: {why}"):
                Call(X, W, SW).run("int8", name)
