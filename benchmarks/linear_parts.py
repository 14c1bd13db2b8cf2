"""What bench_linear.py measures besides its grid: one row, from cache and from memory; one thread
against all; and a layer so small that only the way to the kernel counts.

Each function returns its rows, for the CSV file, and a table of them.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

import qnn

from harness import Measurement, Run, Variant, progress, row_of, timed
from machine import counted
from peaks import Peaks
from report import Part, number, table
from timing import Effort, OtherLoad, interleave

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_QNN, _GEMM, _FLOAT = ("qnn int8", "eager"), ("oneDNN int8", "GEMM only"), ("float", "eager")


def int8_layer(k: int, n: int, dtype: torch.dtype, *, bias: bool = True) -> qnn.QLinear:
    torch.manual_seed(0)
    layer = qnn.convert(nn.Linear(k, n, bias=bias).eval(), "int8").to(dtype)
    assert isinstance(layer, qnn.QLinear)
    return layer


def gemm(layer: qnn.QLinear, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """oneDNN's GEMM of `layer` alone: rows that are quantised already, a prepacked weight and its
    scales; no scales of the rows, no bias; float32 out, which took it as long as bfloat16.
    """
    q, _ = qnn.functional.quantize(x)
    pack = torch.ops.onednn.qlinear_prepack(layer.stored[0], None)
    scales, zeros = layer.weight_scale.view(-1), torch.zeros(layer.out_features, dtype=torch.int32)
    return partial(
        torch.ops.onednn.qlinear_pointwise.default,
        *((q.int() + 128).to(torch.uint8), 1.0, 128),  # x, its scale and zero point
        *(pack, scales, zeros, None),  # w, its scales and zero points; bias
        *(1.0, 0, torch.float32),  # scale, zero point and dtype of y
        *("none", [], ""),  # nothing after the product
    )


@dataclass(frozen=True)
class _Call:
    """One call to time, and the row that it will be."""

    case: str
    family: tuple[str, str]
    precision: str
    call: Callable[[], object]
    operations: float
    bytes_read: float = 0.0

    @property
    def variant(self) -> Variant[None]:
        family, mode = self.family
        return Variant(family, self.precision, mode, lambda *_: Run(self.call))


def _in_turns(calls: Mapping[str, _Call], effort: Effort) -> dict[str, Measurement]:
    load = OtherLoad()
    samples = interleave({name: each.call for name, each in calls.items()}, effort)
    other_load = load.cores()
    rows = {}
    for name, each in calls.items():
        row = row_of(each.case, each.variant, "ok", "")
        row = timed(row, samples[name], operations=each.operations, read=each.bytes_read)
        rows[name] = replace(row, other_load=other_load)
    return rows


def _ms(row: Measurement) -> float:
    return row.median_ms or math.nan


# -- one row -------------------------------------------------------------------------------------


def _in_turn(calls: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """Each call goes to the next of `calls`, round and round."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def one_row(
    sizes: Sequence[tuple[int, int]],
    far_sizes: Sequence[tuple[int, int]],
    far: int,
    dtype: torch.dtype,
    peaks: Peaks,
    effort: Effort,
) -> Part:
    """M = 1, where the time is that of reading the weight.

    A call reads N·K bytes of w, 4·N of its scales, the bias and the row, N + K values of 2 or 4
    bytes. One of 4096x4096 reads 16.8 MB and computes 0.03 G operations. `sizes` take the same
    weight again and again; `far_sizes` take turns of so many copies that `far` bytes lie between
    two uses of one. The limit is a plain loop that reads as many bytes over and over.
    """
    calls: dict[str, _Call] = {}
    cases = [(k, n, 1, n * k) for k, n in sizes]
    cases += [(k, n, math.ceil(far / (n * k)), far) for k, n in far_sizes]
    for k, n, copies, _ in cases:
        progress(f"one row: K={k}, N={n}, {copies} copies")
        layer = int8_layer(k, n, dtype)
        layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
        x = torch.randn(1, k).to(dtype)
        case = f"K={k}, N={n}, M=1, {'the same weight' if copies == 1 else f'{copies} weights'}"
        bytes_read = n * k + 4 * n + (n + k) * x.element_size()
        work = (2 * n * k, bytes_read)
        precision = _PRECISIONS[dtype]
        ours = _in_turn([partial(each, x) for each in layers])
        theirs = _in_turn([gemm(each, x) for each in layers])
        calls[f"qnn {k} {n} {copies}"] = _Call(case, _QNN, precision, ours, *work)
        calls[f"gemm {k} {n} {copies}"] = _Call(case, _GEMM, precision, theirs, *work)
    rows = _in_turns(calls, effort)
    body = []
    for k, n, copies, spread in cases:
        ours, theirs = (rows[f"{name} {k} {n} {copies}"] for name in ("qnn", "gemm"))
        limit = peaks.read.get(spread)
        shares = [
            f"{number(r.gb_s)} ({100e9 * (r.gb_s or 0) / limit:.0f}%)" if limit else number(r.gb_s)
            for r in (ours, theirs)
        ]
        source = "cache: the same weight again" if copies == 1 else f"memory: {copies} copies"
        read = None if limit is None else limit / 1e9
        size = f"{n * k / 1e6:.1f}"
        body.append((f"{k}->{n}", source, size, number(_ms(ours)), *shares, number(read)))
    head = ("layer", "weight from", "MB", "qnn ms", "qnn GB/s", "GEMM only GB/s", "loop GB/s")
    return list(rows.values()), table(head, body, left=(0, 1))


# -- threads -------------------------------------------------------------------------------------


def _with_threads(count: int, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        torch.set_num_threads(count)  # takes less than a µs
        return call()

    return run


def scaling(sizes: Sequence[tuple[int, int]], m: int, dtype: torch.dtype, effort: Effort) -> Part:
    """One thread against all of them at `m` rows."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [], "Not measured: there is one thread only."
    calls: dict[str, _Call] = {}
    names = {"qnn": _QNN, "GEMM only": _GEMM, "nn.Linear": _FLOAT}
    for k, n in sizes:
        progress(f"threads: K={k}, N={n}")
        layer, x = int8_layer(k, n, dtype), torch.randn(m, k).to(dtype)
        plain = partial(nn.Linear(k, n).to(dtype), x)
        runs = {"qnn": partial(layer, x), "GEMM only": gemm(layer, x), "nn.Linear": plain}
        for (name, run), count in itertools.product(runs.items(), (1, threads)):
            case = f"K={k}, N={n}, M={m}, {counted(count, 'thread')}"
            calls[f"{name} {k} {n} {count}"] = _Call(
                case, names[name], _PRECISIONS[dtype], _with_threads(count, run), 2 * m * n * k
            )
    try:
        rows = _in_turns(calls, effort)
    finally:
        torch.set_num_threads(threads)
    body = []
    for k, n in sizes:
        cells = []
        for name in names:
            alone, together = (_ms(rows[f"{name} {k} {n} {count}"]) for count in (1, threads))
            cells.append(f"{number(alone)} / {number(together)} = {alone / together:.2f}x")
        body.append((f"{k}->{n}", *cells))
    head = (f"ms with 1 / {threads} threads, M={m}", *names)
    return list(rows.values()), table(head, body)


# -- the way to the kernel -----------------------------------------------------------------------


def eager_overhead(size: int, effort: Effort) -> Part:
    """One row through a layer of `size` x `size`, which computes next to nothing."""
    calls: dict[str, _Call] = {}
    work = 2 * size * size
    for dtype, precision in _PRECISIONS.items():
        case = f"K={size}, N={size}, M=1, eager overhead"
        x, plain = torch.randn(1, size).to(dtype), nn.Linear(size, size).to(dtype)
        layer = int8_layer(size, size, dtype)
        calls[f"nn.Linear {precision}"] = _Call(case, _FLOAT, precision, partial(plain, x), work)
        calls[f"qnn {precision}"] = _Call(case, _QNN, precision, partial(layer, x), work)
    rows = _in_turns(calls, effort)
    body = []
    for precision in _PRECISIONS.values():
        plain, ours = (_ms(rows[f"{name} {precision}"]) * 1e3 for name in ("nn.Linear", "qnn"))
        body.append((precision, number(plain), number(ours), f"{ours - plain:+.1f}"))
    head = (f"µs, {size}x{size}, M=1", "nn.Linear", "qnn", "difference")
    return list(rows.values()), table(head, body)
