"""The C++ kernels of the recurrent ops, tier by tier, against the references in
`kernels/reference/recurrent.py`.

What they do with memory and on other CPUs is `test_kernels_cpp.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnn.kernels import OPS
from qnn.kernels.reference import recurrent as kernels
from qnn.kernels.schemes import schemes_of

from .common import DTYPES, examples, sum_bound
from .tiers import usable

SCHEMES = tuple(schemes_of("lstm"))
EXACT = tuple(scheme for scheme in SCHEMES if scheme != "int8_weight")
CELLS = tuple(kernels.CELLS)
pytestmark = pytest.mark.usefixtures("library")


# -- random calls ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The arguments of `cpu_recurrent`, in its order."""

    x: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor | None
    w_ih: torch.Tensor
    sw_ih: torch.Tensor
    w_hh: torch.Tensor
    sw_hh: torch.Tensor
    table: torch.Tensor | None = None
    b_ih: torch.Tensor | None = None
    b_hh: torch.Tensor | None = None
    w_hr: torch.Tensor | None = None
    sw_hr: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    direction: str = "forward"
    weight_only: bool = False
    wide: bool = False

    def run(self, tier: str, parts: int = 0) -> torch.Tensor:
        *values, wide = vars(self).values()
        return torch.ops.qnn.cpu_recurrent(*values, tier, parts, wide)

    @property
    def op(self) -> str:
        scheme = "int16" if self.wide else "int8"
        kind = "_weight" if self.weight_only else "" if self.table is None else "_static"
        return f"{scheme}{kind}_{'gru' if self.c0 is None else 'lstm'}"

    @property
    def args(self) -> tuple[object, ...]:
        """Those of the op itself."""
        names = [arg.name for arg in OPS[self.op].inputs]
        return tuple(getattr(self, name) for name in names)

    def reference(self, **options: torch.dtype) -> torch.Tensor:
        y: torch.Tensor = OPS[self.op].reference(*self.args, **options)
        return y

    def __repr__(self) -> str:
        def show(v: object) -> str:
            return f"{v.dtype} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else repr(v)

        return f"Call({', '.join(f'{name}={show(v)}' for name, v in vars(self).items())})"


def make_table(parts: int, bits: int, wide: bool) -> torch.Tensor:
    """Random grids, 8 bits for what enters a product, or for some of it; one in six of the others
    is left out.
    """
    rows = []
    for part in range(parts):
        eight = part < 2 or part == 16
        if eight and wide and torch.rand(()) < 0.7:
            rows.append([float(torch.rand(()) + 0.1) / 20000, 0.0, -32767.0, 32767.0])
            continue
        qmin, qmax = (0.0, 255.0) if eight or bits == 8 else (-32768.0, 32767.0)
        if torch.rand(()) < 0.5:  # symmetric
            qmin, qmax = (-127.0, 127.0) if eight or bits == 8 else (-32767.0, 32767.0)
            zero_point = 0.0
        else:
            zero_point = qmin + math.floor(float(torch.rand(())) * (qmax - qmin + 1))
        scale = 2 * float(torch.rand(()) + 0.1) / (qmax - qmin)
        scale *= 4 if 2 <= part < 11 else 1
        if not eight and torch.rand(()) < 1 / 6:
            scale = 0.0
        rows.append([scale, zero_point, qmin, qmax])
    return torch.tensor(rows)


def make(
    cell: str,
    scheme: str,
    steps: int,
    batch: int,
    inputs: int,
    hidden: int,
    outputs: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    bias: torch.dtype | None = torch.float32,
    lengths: bool = False,
    bits: int = 8,
    direction: str = "forward",
    odd: bool = False,
) -> Call:
    """A call whose gates stand between their ends; with `odd`, some rows are zero, huge or not
    finite.
    """
    lstm, width, wide = cell == "lstm", outputs or hidden, scheme.startswith("int16")
    rows = hidden * (4 if lstm else 3)

    def weight(n: int, k: int) -> torch.Tensor:
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        if n and k:
            w[0], w[-1] = 127, -128
        return w

    def scale(n: int, k: int) -> torch.Tensor:
        return (torch.rand(n, 1) + 0.1) * 0.03 / math.sqrt(k + 1)

    x = torch.randn(steps, batch, inputs, dtype=torch.float64)
    h0 = torch.rand(batch, width, dtype=torch.float64) * 2 - 1
    c0 = torch.randn(batch, hidden, dtype=torch.float64)
    if odd:
        for rows_of in (x.view(-1, inputs) if inputs else (), h0, c0):
            for row in rows_of:
                kind = int(torch.randint(30, ()))
                if kind < 4:
                    row *= (0.0, 1e-45, 1e-20, 1e300)[kind]
                elif kind < 6 and len(row):
                    row[int(torch.randint(len(row), ()))] = (math.nan, math.inf)[kind - 4]
    return Call(
        x.to(dtype),
        h0.to(dtype),
        c0.to(dtype) if lstm else None,
        weight(rows, inputs),
        scale(rows, inputs),
        weight(rows, width),
        scale(rows, width),
        make_table(17 if lstm else 11, bits, wide) if scheme.endswith("_static") else None,
        None if bias is None else torch.randn(rows).to(bias),
        None if bias is None else torch.randn(rows).to(bias),
        None if outputs is None else weight(outputs, hidden),
        None if outputs is None else scale(outputs, hidden),
        torch.randint(0, steps + 1, (batch,)) if lengths else None,
        direction,
        scheme == "int8_weight",
        wide,
    )


SIZES = st.integers(1, 20) | st.sampled_from((31, 33, 48, 63, 64, 65, 80, 97, 127, 129, 257))


@st.composite
def calls(draw: st.DrawFn, schemes: tuple[str, ...] = EXACT) -> Call:
    cell, scheme = draw(st.sampled_from(CELLS)), draw(st.sampled_from(schemes))
    inputs, hidden = draw(SIZES), draw(SIZES)
    outputs = draw(st.none() | SIZES) if cell == "lstm" else None
    batch = draw(st.integers(0, 9) | st.sampled_from((1, 1, 16, 17, 19, 37)))
    most = 3_000_000 // (hidden * 4 * (inputs + hidden) * (batch + 1))
    steps = min(draw(st.integers(0, 6) | st.sampled_from((1, 2, 13))), most + 1)
    seed = draw(st.integers(0, 2**32 - 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(
            cell, scheme, steps, batch, inputs, hidden, outputs,
            dtype=draw(st.sampled_from(DTYPES)),
            bias=draw(st.none() | st.sampled_from(DTYPES)),
            lengths=draw(st.booleans()),
            bits=draw(st.sampled_from((8, 16))),
            direction=draw(st.sampled_from(kernels.DIRECTIONS)),
            odd=scheme != "int8_weight" and draw(st.booleans()),
        )  # fmt: skip


def widest(call: Call) -> tuple[torch.Tensor, int]:
    """The sizes of what a projection adds up, of |o tanh c| ≤ 1, at most; and how many."""
    if call.w_hr is None or call.sw_hr is None:
        return torch.ones(()), 0
    sizes = call.w_hr.double().abs().sum(1) * call.sw_hr.double()[:, 0]
    return sizes.amax(), call.w_hr.shape[1]


def moved(call: Call, sign: int) -> torch.Tensor:
    """The exact result if each gate's sum were off by what float32 may round in it: all upwards,
    all downwards, or at random. So the bound knows how errors grow from step to step.
    """
    hidden, projected = widest(call)
    rows = torch.zeros(1, call.x.shape[2]), call.x.abs().flatten(0, 1)  # there may be no row
    x, h = torch.cat(rows).double().amax(0), call.h0.double().abs()
    h = torch.cat([hidden.double().expand(1, h.shape[1]), h]).amax(0)
    sizes = call.sw_ih.double()[:, 0] * (call.w_ih.double().abs() @ x)
    sizes += call.sw_hh.double()[:, 0] * (call.w_hh.double().abs() @ h)
    for bias in (call.b_ih, call.b_hh):
        sizes += 0 if bias is None else bias.double().abs()
    by = sum_bound(sizes + 1, call.w_ih.shape[1] + call.w_hh.shape[1] + projected + 5)
    signs = torch.rand(len(by)).sub(0.5).sign() if sign == 0 else sign
    bias = 0 if call.b_ih is None else call.b_ih.double()
    other = torch.zeros(len(by)).double() if call.b_hh is None else call.b_hh
    changed = replace(call, b_ih=bias + signs * by, b_hh=other)
    return changed.reference(compute=torch.float64).double()


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    equal = (got == want) | (got.isnan() & want.isnan())
    if not bool(equal.all()):
        wrong = (~equal).nonzero().flatten()
        at = int(wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {len(got)}; [{at}]: {got[at].item()!r} is not {want[at].item()!r}"
        )


def for_all(strategy: st.SearchStrategy[Call], examples: int, check: Callable[..., None]) -> None:
    """Check so many calls, each with a number of parts; the same ones each time."""

    @settings(max_examples=examples)
    @given(strategy, st.sampled_from((0, 1, 1, 2, 3)))
    def run(call: Call, parts: int) -> None:
        check(call, parts)

    torch.set_num_threads(3)
    run()


@pytest.mark.usefixtures("threads")
@examples(200, 800)
def test_equals_reference(examples: int) -> None:
    """Bit for bit, on every tier that runs, in one, two and three parts."""

    def check(call: Call, parts: int) -> None:
        want = call.reference()
        for name in usable():
            assert_same(call.run(name, parts), want)

    for_all(calls(), examples, check)


@pytest.mark.usefixtures("threads")
@examples(60, 300)
def test_weight_only_within_rounding(examples: int) -> None:
    """Four times what comes of biases that are off by what the sums of a gate may round."""

    def check(call: Call, parts: int) -> None:
        want = call.reference(compute=torch.float64).double()
        off = [(moved(call, sign) - want).abs().amax() for sign in (1, -1, 0)] if len(want) else [0]
        eps = torch.finfo(call.x.dtype if call.x.dtype != torch.float64 else torch.float32).eps
        limit = 4 * max(off) + 4 * eps * (1 + want.abs())
        limit += sum_bound(*widest(call))
        for name in usable():
            got = call.run(name, parts)
            assert (got.dtype, got.shape) == (call.x.dtype, want.shape)
            over = (got.double() - want).abs() / limit
            assert bool((over <= 1).all()), f"{name}: {over.max():.3g} times the bound"

    for_all(calls(("int8_weight",)), examples, check)


def test_the_op_is_the_kernel() -> None:
    """By its own name, with defaults left out, and from views that are not dense."""
    for cell, scheme in itertools.product(CELLS, EXACT):
        call = make(cell, scheme, 5, 3, 19, 21, bias=None)
        op = getattr(torch.ops.qnn, call.op)
        given = call.args[: 8 if cell == "lstm" else 7]
        given = given if scheme.endswith("_static") else given[: 7 if cell == "lstm" else 6]
        assert_same(op(*given), call.reference())
        wide = torch.empty(3, 5, 40)[..., ::2][..., :19].transpose(0, 1).copy_(call.x)
        assert_same(op(wide, *given[1:]), call.reference())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_that_are_not_finite(tier: str, cell: str, scheme: str) -> None:
    """Such a row is NaN from its step on, and no other row knows of it."""
    steps, batch, hidden = 6, 5, 37
    call = make(cell, scheme, steps, batch, 20, hidden)
    clean = call.run(tier)
    for value, parts in ((math.nan, 1), (math.inf, 2), (-math.inf, 1)):
        x = call.x.clone()
        x[2, 1, 7] = value
        x[:, 3] = 0
        zero = call.x.clone()
        zero[:, 3] = 0
        got, want = replace(call, x=x).run(tier, parts), replace(call, x=zero).run(tier)
        y, expected = (r[: steps * batch * hidden].view(steps, batch, hidden) for r in (got, want))
        others = [0, 2, 3, 4]
        assert torch.equal(y[:, others], expected[:, others])
        assert torch.equal(y[:2], expected[:2])
        if scheme != "int8_weight":  # where an inf saturates a gate, it may stay finite
            assert bool(y[2:, 1].isnan().all())
    assert bool(clean.isfinite().all())


@pytest.mark.parametrize("cell", CELLS)
def test_gates_at_their_ends(tier: str, cell: str) -> None:
    """An inf in x leaves gates of 0 and 1 where the weights take it as it is, and no NaN; nor does
    one come of the lanes behind the last unit.
    """
    call = make(cell, "int8_weight", 4, 3, 20, 37)
    call.w_ih[:, 7] = torch.randint(1, 127, (len(call.w_ih),), dtype=torch.int8)
    call.x[1, 2, 7] = math.inf
    got, want = call.run(tier), call.reference()
    assert bool(want.isfinite().all())
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_to_do(tier: str, cell: str, scheme: str) -> None:
    """No steps, no rows, or no columns of x."""
    for steps, batch, inputs in ((0, 3, 5), (4, 0, 5), (0, 0, 5), (1, 1, 1), (3, 2, 0)):
        call = make(cell, scheme, steps, batch, inputs, 18)
        # Of no columns there is no largest one to take a scale of; the kernel adds nothing.
        same = make(cell, scheme, steps, batch, 1, 18) if inputs == 0 else call
        if inputs == 0:
            same = replace(call, x=torch.zeros(steps, batch, 1), w_ih=same.w_ih)
        got, want = call.run(tier), same.reference()
        if scheme != "int8_weight":
            assert_same(got, want)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("cell", CELLS)
def test_thread_counts_change_no_bit(cell: str) -> None:
    for scheme, batch in itertools.product(SCHEMES, (1, 20)):
        call = make(cell, scheme, 7, batch, 70, 300)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [call.run(usable()[0], parts) for parts in (0, threads)]
        for result in results[1:]:
            assert_same(result, results[0])


@pytest.mark.usefixtures("threads")
def test_calls_at_the_same_time() -> None:
    """Threads of Python share neither memory nor the places where parts meet."""
    torch.set_num_threads(2)
    layers = [
        make(cell, scheme, 5, batch, 40, hidden, lengths=True)
        for cell, scheme, batch, hidden in (
            ("lstm", "int8", 1, 130),
            ("gru", "int8_static", 3, 70),
            ("lstm", "int8_static", 20, 33),
            ("lstm", "int16", 3, 40),
        )
    ]
    name = usable()[0]
    alone = [call.run(name) for call in layers]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: call.run(name, 2), layers * 10))
    for i, got in enumerate(together):
        assert_same(got, alone[i % len(layers)])


# -- errors ----------------------------------------------------------------------------------------

STATIC = make("lstm", "int8_static", 2, 3, 4, 5)


def table_with(row: int, *values: float) -> torch.Tensor:
    assert STATIC.table is not None
    table = STATIC.table.clone()
    table[row] = torch.tensor(values)
    return table


def test_wrong_tables() -> None:
    assert STATIC.table is not None
    for table, message in (
        (table_with(0, 0, 0, 0, 255), "part input a positive scale"),
        (table_with(1, math.nan, 0, 0, 255), "part hidden_state a positive scale"),
        (table_with(1, 1e-3, 0, -32768, 32767), "part hidden_state 8 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(STATIC, table=table).run("portable")
    with pytest.raises(ValueError, match="unknown tier 'avx10'"):
        STATIC.run("avx10")
