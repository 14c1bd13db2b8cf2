"""Engines for the int8 GEMM of a CPU, and the choice between them.

An engine computes `float32((xq − zero_point − offset) · wᵀ) · sw` for `xq [M, K]`, int8 with zero
point 0 or uint8 with 128, int8 `w [N, K]` and float32 `sw [N]`; `offset` is an int8, the zero point
of a static grid. The integer sums must be exact, and on many
CPUs the fast one's are not, so an engine is used only after it has passed a known-answer test here.
"""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass
from typing import Protocol

import torch

from qnn.kernels.cpu.pack import packed
from qnn.kernels.torch_private import plain_dispatch


class Engine(Protocol):
    name: str

    @property
    def zero_point(self) -> int:
        """Added to the codes of x: 0, or 128 where they are uint8."""

    def why_not(self) -> str | None:
        """Why this engine cannot run here at all, or None."""

    def matmul(
        self, xq: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, offset: int = 0
    ) -> torch.Tensor:
        """float32((xq - zero_point - offset) · wᵀ) · sw."""


def _prepack(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """oneDNN's blocked copy of the weight, and its zero points, which are zero."""
    zero_points = w.new_zeros(w.shape[0], dtype=torch.int32)
    return torch.ops.onednn.qlinear_prepack(w, None), zero_points


def _onednn_uses_amx() -> bool:
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    allowed = most in ("ALL", "DEFAULT") or "AMX" in most
    return allowed and bool(torch.cpu.get_capabilities().get("amx_int8"))


class OneDNN:
    """oneDNN's int8 GEMM on a prepacked weight.

    Without AMX the activations go in as uint8 with zero point 128: the integers are the same, and
    signed ones run in oneDNN's reference kernel, 500 to 1,500 times slower. With AMX its kernel for
    uint8 rounds the sums to float32 before it takes the zero point away, which is off by one where
    they are beyond 2^24; the one for int8 is exact, from 16 rows on (under which the reference
    kernel runs), so fewer rows are filled up.
    """

    name = "onednn"
    _SIGNED_ROWS = 16

    @functools.cached_property
    def zero_point(self) -> int:
        return 0 if _onednn_uses_amx() else 128

    def why_not(self) -> str | None:
        if not torch.backends.mkldnn.is_available():
            return "this build of torch has no oneDNN"
        if not hasattr(torch.ops.onednn, "qlinear_prepack"):
            return "this build of torch has no onednn::qlinear_prepack"
        return None

    def matmul(
        self, xq: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, offset: int = 0
    ) -> torch.Tensor:
        rows = xq.shape[0]
        if self.zero_point == 0 and rows < self._SIGNED_ROWS:
            xq = torch.nn.functional.pad(xq, (0, 0, 0, self._SIGNED_ROWS - rows))
        pack, zero_points = packed(w, _prepack)
        sw = sw.contiguous()  # oneDNN reads the scales by their address, whatever the strides
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
            xq,
            1.0,
            self.zero_point + offset,
            pack,
            sw,
            zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return y[:rows]


class Exact:
    """float32 GEMMs over at most 1,024 of K, 512 with an offset, whose sums stay below 2^24 and so
    are integers; right on every CPU.

    Lower float32 matmul precisions do not harm: int8 values, and their differences, are exact in
    bfloat16 and TF32, and sums are kept in float32.
    """

    name = "exact"
    zero_point = 0
    _DEPTH = 1024
    _BLOCK = (
        1 << 20
    )  # values of the weight widened at a time: 4 MB, a share of the last-level cache

    def why_not(self) -> str | None:
        return None

    def matmul(
        self, xq: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, offset: int = 0
    ) -> torch.Tensor:
        (m, k), n = xq.shape, w.shape[0]
        depth = min(k, self._DEPTH // 2 if offset else self._DEPTH)
        if k <= depth and w.numel() <= self._BLOCK:
            x = xq.float().sub_(offset) if offset else xq.float()
            return (x @ w.float().T).mul_(sw)
        acc = w.new_zeros(m, n, dtype=torch.int32)
        width = max(1, self._BLOCK // depth)
        for k0 in range(0, k, depth):
            x = xq[:, k0 : k0 + depth].float()
            x = x.sub_(offset) if offset else x
            for n0 in range(0, n, width):
                block = w[n0 : n0 + width, k0 : k0 + depth].float()
                acc[:, n0 : n0 + width] += (x @ block.T).int()
        return acc.float().mul_(sw)


ENGINES: dict[str, Engine] = {engine.name: engine for engine in (OneDNN(), Exact())}


@dataclass(frozen=True)
class Report:
    """Whether an engine may be used, and why or why not."""

    engine: str
    usable: bool
    reason: str


def _known_answers() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands over the full range, where saturating kernels go wrong, in sizes that pick different
    kernels.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    full_range = functools.partial(
        torch.randint, dtype=torch.int8, generator=generator, device="cpu"
    )
    pairs = []
    for m, k, n in ((1, 256, 32), (7, 256, 64), (64, 260, 48), (130, 1024, 96), (16, 4096, 32)):
        x, w = full_range(-127, 128, (m, k)), full_range(-128, 128, (n, k))
        x[0], w[0], w[-1] = 127, 127, -128
        pairs.append((x, w))
    return pairs


@functools.cache
@plain_dispatch()
def self_test(name: str) -> Report:
    """Run an engine on operands whose product is known; once a process."""
    engine = ENGINES[name]
    reason = engine.why_not()
    if reason is not None:
        return Report(name, False, reason)
    for (x, w), offset in itertools.product(_known_answers(), (0, -77)):
        expected = ((x.double() - offset) @ w.double().T).float()
        try:
            xq = (x.int() + engine.zero_point).to(torch.uint8 if engine.zero_point else torch.int8)
            got = engine.matmul(xq, w, w.new_ones(w.shape[0], dtype=torch.float32), offset)
        except (RuntimeError, NotImplementedError) as error:
            return Report(name, False, f"raised {type(error).__name__}: {error}")
        if not torch.equal(got, expected):
            wrong = (got != expected).float().mean().item()
            return Report(
                name,
                False,
                f"wrong integers in the known-answer test ({wrong:.2%} of them at "
                f"{x.shape[0]}x{x.shape[1]}x{w.shape[0]}); without VNNI instructions its sums "
                "saturate",
            )
    return Report(name, True, "passed the known-answer test")


# Layers that run faster in float32, both casts included, since oneDNN's call alone costs 20 µs: up
# to so many rows, up to so many weights. Whole layer, µs, onednn / exact, one 2.6 GHz Zen 4 core:
# 64x64 at M=1 76/32, M=128 85/56, M=1024 122/124; 64x768 at M=1 77/50, M=8 80/65, M=32 89/89;
# 768x768 at M=1 87/116.
_TINY = ((8, 1 << 16), (128, 1 << 12))


@functools.cache
def _usable_engines() -> list[Engine]:
    usable = [engine for name, engine in ENGINES.items() if self_test(name).usable]
    if not usable:
        reasons = "; ".join(f"{name}: {self_test(name).reason}" for name in ENGINES)
        raise RuntimeError(f"no int8 engine gives right integers on this CPU ({reasons}).")
    return usable


def engine_choice(weights: int) -> list[tuple[int | None, Engine]]:
    """The engines of a layer of so many weights: `(most rows, engine)`; the last has no limit."""
    usable = _usable_engines()
    limit = max((rows for rows, most in _TINY if weights <= most), default=0)
    small = [(limit, usable[-1])] if limit and usable[-1] is not usable[0] else []
    return [*small, (None, usable[0])]


def best_engine(rows: int, w: torch.Tensor) -> Engine:
    """The first engine that passes its self-test, or for a tiny layer the last."""
    tiny = any(rows <= most_rows and w.numel() <= most_weights for most_rows, most_weights in _TINY)
    return _usable_engines()[-1 if tiny else 0]
