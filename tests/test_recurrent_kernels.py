"""The C++ kernels of the recurrent ops, tier by tier, against the references in
`kernels/recurrent.py`.

What they do with memory and on other CPUs is `test_kernels_cpp.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qnn.kernels import OPS
from qnn.kernels import recurrent as kernels
from qnn.kernels.cpu import native

from .common import DTYPES

TIERS = ("amx", "avx512_vnni", "avx_vnni", "avx2", "portable")
SCHEMES = kernels.SCHEMES
CELLS = tuple(kernels.CELLS)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    status = native.ensure()
    if not status.loaded:
        pytest.skip(status.reason)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    tiers = dict(pair.split(":", 1) for pair in torch.ops.qnn.cpu_tiers().split(","))
    why = tiers.get(request.param, "not in this library")
    if why != "ok":
        pytest.skip(f"{request.param}: {why}")
    return str(request.param)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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

    def run(self, tier: str, parts: int = 0) -> torch.Tensor:
        return torch.ops.qnn.cpu_recurrent(*vars(self).values(), tier, parts)

    @property
    def op(self) -> str:
        scheme = (
            "int8_weight" if self.weight_only else "int8" if self.table is None else "int8_static"
        )
        return f"{scheme}_{'gru' if self.c0 is None else 'lstm'}"

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


def make_table(parts: int, bits: int, draw: torch.Generator | None = None) -> torch.Tensor:
    """Random grids, 8 bits for what enters a product; one in six of the others is left out."""
    rows = []
    for part in range(parts):
        eight = part < 2 or part == 16
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
    lstm, width = cell == "lstm", outputs or hidden
    rows = hidden * (4 if lstm else 3)

    def weight(n: int, k: int) -> torch.Tensor:
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        if n and k:
            w[0], w[-1] = 127, -128
        return w

    def scale(n: int, k: int) -> torch.Tensor:
        return (torch.rand(n, 1) + 0.1) * 0.03 / math.sqrt(k + 1)

    x = torch.randn(steps, batch, inputs, dtype=torch.float64)
    h0, c0 = torch.rand(batch, width) * 2 - 1, torch.randn(batch, hidden)
    if odd:
        for rows_of in (x.view(-1, inputs) if inputs else (), h0.double(), c0.double()):
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
        make_table(17 if lstm else 11, bits) if scheme == "int8_static" else None,
        None if bias is None else torch.randn(rows).to(bias),
        None if bias is None else torch.randn(rows).to(bias),
        None if outputs is None else weight(outputs, hidden),
        None if outputs is None else scale(outputs, hidden),
        torch.randint(0, steps + 1, (batch,)) if lengths else None,
        direction,
        scheme == "int8_weight",
    )


SIZES = st.integers(1, 20) | st.sampled_from((31, 33, 48, 63, 64, 65, 80, 97, 127, 129, 257))


@st.composite
def calls(draw: st.DrawFn, schemes: tuple[str, ...] = ("int8", "int8_static")) -> Call:
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


def examples(short: int, long: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "examples", [short, pytest.param(long, marks=pytest.mark.long, id=f"{long}")]
    )


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    equal = (got == want) | (got.isnan() & want.isnan())
    if not bool(equal.all()):
        at = (~equal).nonzero().flatten()
        raise AssertionError(
            f"{len(at)} of {len(got)}; [{at[0]}]: {got[at[0]].item()!r} is not {want[at[0]].item()!r}"
        )


@pytest.mark.usefixtures("_threads")
@examples(100, 1500)
def test_equals_reference(examples: int) -> None:
    """Bit for bit, on every tier that runs, with one, two and three threads."""
    tiers = [name for name, state in native.ready().tiers if state == "ok"]

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(calls(), st.sampled_from((0, 1, 2, 3)))
    def run(call: Call, parts: int) -> None:
        want = call.reference()
        for tier in tiers:
            assert_same(call.run(tier, parts), want)

    torch.set_num_threads(3)

    run()
