"""Low precision on a GPU: training a linear layer and a Llama-style block, and deployed weights.

    python benchmarks/bench_fp8.py                      # docs/benchmarks/bench_fp8.{csv,md}
    python benchmarks/bench_fp8.py --everywhere         # compiled variants in every size
    python benchmarks/bench_fp8.py --budget 300         # begin no case after so many seconds
    python benchmarks/bench_fp8.py --only 'fp8|torchao' # some variants, and bfloat16
    python benchmarks/bench_fp8.py --tiny               # a CPU: that it runs, and nothing else

A training row is one step: the forward and the gradients to the input and to every parameter, all
casts included. `products` is no layer but what cannot be left out of one: its three scaled products
alone, on operands that are quantised already. An inference row reads each weight from memory: the
calls go through so many copies that each has left the L2 cache before its next turn; `graph` is the
replay of a CUDA graph of them.

A variant has no time where its output or a gradient is too far from float32, or where the self-test
of a kernel that it would use is red on this GPU. Without a GPU float8 is emulated: sizes are tiny,
no aim is judged, and nothing is written unless `--out` says where.

Counts. A step of `y = x · wᵀ` takes three products of 2·M·N·K operations: at M = 16384 and
K = N = 8192 that is 6.6 T. At M = 1 a layer reads N·K weights, 2 bytes each in bfloat16, 1 in
float8 with 4 a row for the scale, and 0.5 + 1/16 in nvfp4: at best 2 and 3.6 times as fast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qnn

from fp8_variants import (
    BFLOAT16,
    DEPLOYED,
    EMULATED,
    ENGINE,
    ROWWISE,
    TENSORWISE,
    TRAINED,
    WEIGHT_ONLY,
    Decode,
    Deployed,
    Llama,
    Size,
    Step,
    bytes_read,
    deployed_case,
    deployed_variants,
    training_case,
    training_variants,
)
from harness import GpuMeasurement, Measurement, argument_parser, measure, over, progress, select
from machine import Gpu, Machine
from report import Aim, Pick, aims_table, number, table, times, without_time, write
from timing import Effort

BASELINE = f"{BFLOAT16} bf16 {{mode}}"
# The torchao variant that a qnn scheme stands against: that of the same granularity, or else the
# nearest that torchao trains with on Hopper.
PEERS = {f"qnn {scheme}": ROWWISE for scheme in TRAINED} | {
    "qnn fp8_tensor": TENSORWISE,
    ENGINE: TENSORWISE,
    **{f"qnn {scheme}": WEIGHT_ONLY for scheme in DEPLOYED},
    **{peer: peer for peer in (ROWWISE, TENSORWISE, WEIGHT_ONLY)},
}


# -- cases ---------------------------------------------------------------------------------------

AIMED = Step(16384, 8192, 8192)
_DECODE_ROWS = (1, 2, 4, 8, 16, 64)
_DECODE_SIZES = ((8192, 8192), (4096, 14336), (4096, 4096))


def sizes() -> tuple[Size, ...]:
    """The most telling ones first: a run may have to end before the last."""
    first = (
        AIMED,
        Llama(4, 2048, hidden=4096, heads=32, kv_heads=8, ffn=14336),
        *(Decode(m, *_DECODE_SIZES[0]) for m in _DECODE_ROWS),
        Step(1024, 1024, 1024),
        Step(8192, 4096, 14336),
        *(Decode(m, *_DECODE_SIZES[1]) for m in _DECODE_ROWS),
        Step(2048, 4096, 4096),
        Step(512, 512, 512, compiled=False),
    )
    grid = [
        Step(m, k, n, compiled=False)
        for m in (2048, 8192, 16384)
        for k, n in ((4096, 4096), (8192, 8192), (4096, 14336))
    ]
    known = {(c.m, c.k, c.n) for c in first if isinstance(c, Step)}
    last = [Decode(m, *_DECODE_SIZES[2]) for m in _DECODE_ROWS]
    return (*first, *(c for c in grid if (c.m, c.k, c.n) not in known), *last)


TINY: tuple[Size, ...] = (
    Step(16, 64, 64),
    Llama(1, 16, hidden=64, heads=2, kv_heads=1, ffn=64, compiled=False),
    Decode(1, 64, 64),
)


_FEW_ROWS = [
    f"{Decode.section}, {Decode(m, k, n)}" for k, n in _DECODE_SIZES for m in _DECODE_ROWS if m <= 8
]
AIMS = tuple(
    Aim(what, Pick(family, mode), Pick(BFLOAT16, mode), goal, cases)
    for what, family, mode, goal, cases in (
        ("row-wise float8", "qnn fp8", "compiled", 1.5, [f"{Step.section}, {AIMED}"]),
        ("tensor-wise float8", "qnn fp8_tensor", "compiled", 1.6, [f"{Step.section}, {AIMED}"]),
        ("block-wise float8", "qnn fp8_block", "compiled", 1.4, [f"{Step.section}, {AIMED}"]),
        ("weights in nvfp4, M = 1 to 8", "qnn nvfp4_weight", "graph", 2.5, _FEW_ROWS),
        ("weights in float8, M = 1 to 8", "qnn fp8_weight", "graph", 1.7, _FEW_ROWS),
    )
)


# -- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row(GpuMeasurement):
    """Ratios are to bfloat16 and torchao in the same case and mode."""

    section: str = ""
    tokens_s: float | None = None
    device_speedup: float | None = None
    over_torchao: float | None = None
    device_over_torchao: float | None = None


def measure_size(size: Size, device: torch.device, effort: Effort, options: Any) -> list[Row]:
    backend = options.backend
    if isinstance(size, Decode):
        case: Any = deployed_case(size, device, backend)
        variants = deployed_variants()
    else:
        case = training_case(size, device, backend)
        variants = training_variants(size, options.everywhere)
    rows = measure(
        case,
        select(variants, options.only, BASELINE),
        baseline=BASELINE,
        effort=effort,
        verbose=options.verbose,
    )
    read = gigabytes_read(case.task) if isinstance(size, Decode) else {}
    return with_ratios(rows, size, read)


def with_ratios(rows: Sequence[Measurement], size: Size, read: dict[str, float]) -> list[Row]:
    """With each time's ratio to bfloat16's and to torchao's, where both have one; and with the
    bytes of `read` by the time on the device.
    """
    by_variant = {(row.family, row.mode): row for row in rows}

    def more(row: Measurement) -> dict[str, Any]:
        seconds = None if row.median_ms is None else row.median_ms / 1e3
        on_device = getattr(row, "device_ms", None) or row.median_ms
        count = read.get(row.family)
        plain = by_variant.get((BFLOAT16, row.mode))
        peer = by_variant.get((PEERS.get(row.family, ""), row.mode))
        return {
            "section": size.section,
            "tokens_s": None if seconds is None else size.tokens / seconds,
            "gb_s": None if count is None or on_device is None else count / on_device * 1e3,
            "device_speedup": over(plain, row, "device_ms"),
            "over_torchao": over(peer, row),
            "device_over_torchao": over(peer, row, "device_ms"),
        }

    return [Row(**{**vars(row), **more(row)}) for row in rows]


def gigabytes_read(task: Deployed) -> dict[str, float]:
    """By family, the bytes of one layer and its input."""
    made: dict[str, nn.Module] = {
        f"qnn {scheme}": qnn.QLinear.from_float(task.module, scheme) for scheme in DEPLOYED
    }
    layers = {BFLOAT16: task.module, WEIGHT_ONLY: made["qnn fp8_weight"], **made}
    return {family: bytes_read(layer, task.x) / 1e9 for family, layer in layers.items()}


# -- tables --------------------------------------------------------------------------------------


def figures(size: Size, rows: Sequence[Row]) -> str:
    return (_inference_table if isinstance(size, Decode) else _training_table)(rows)


def _training_table(rows: Sequence[Row]) -> str:
    products = {row.family: row for row in rows if row.mode == "products"}
    head = [
        *("variant", "ms", "device ms", "launch ms", "bf16 / this", "torchao / this"),
        *("tokens/s", "TFLOP/s", "peak MB", "SQNR dB", "remark"),
    ]
    body = []
    for row in rows:
        if row.mode == "products":
            continue
        cells = [
            f"{row.family} {row.mode}",
            number(row.median_ms),
            number(row.device_ms),
            number(row.host_ms),
            times(row.speedup),
            times(row.over_torchao),
            "-" if row.tokens_s is None else f"{row.tokens_s:,.0f}",
            number(row.tops),
            number(row.megabytes),
            number(row.sqnr_db),
            row.remark,
        ]
        if products:
            alone = products.get(row.family)
            cells[6:6] = [_products_cell(alone)]
        body.append(cells)
    if products:
        head[6:6] = ["products alone ms (bf16 / this)"]
    return table(head, body, left=(0, len(head) - 1))


def _products_cell(row: Row | None) -> str:
    if row is None or row.median_ms is None:
        return "-" if row is None or row.status == "unavailable" else row.status
    if row.device_ms is None:
        return f"{number(row.median_ms)} ({times(row.speedup)})"
    return f"{number(row.device_ms)} ({times(row.device_speedup)})"


def _inference_table(rows: Sequence[Row]) -> str:
    def micro(milliseconds: float | None) -> str:
        return number(None if milliseconds is None else milliseconds * 1e3)

    head = (
        *("variant", "µs", "device µs", "launch µs", "bf16 / this", "torchao / this"),
        *("GB/s read", "SQNR dB", "remark"),
    )
    body = [
        (
            f"{row.family} {row.mode}",
            *map(micro, (row.median_ms, row.device_ms, row.host_ms)),
            times(row.speedup),
            times(row.over_torchao),
            number(row.gb_s),
            number(row.sqnr_db),
            row.remark,
        )
        for row in rows
    ]
    return table(head, body, left=(0, 8))


_LEGEND = (
    "`ms` is the median of a call by the host's clock, from an idle device to the end of its last "
    "kernel; `device` the same from kernel to kernel, with the whole call in the queue before; "
    "`launch` what it takes to get it there. `bf16 / this` and `torchao / this` are ratios of `ms` "
    "to the same mode of bfloat16 and of torchao's nearest recipe: over 1 this row is faster. "
    "`products alone` is the three scaled products of a step on quantised operands, on the device."
)


def save_all(
    out: Path, done: dict[Size, list[Row]], left_out: Sequence[Size], gpu: Gpu | None
) -> None:
    """`bench_fp8.csv` with a row a measurement, the machine and the GPU; and `bench_fp8.md`."""
    rows = [row for found in done.values() for row in found]
    clocks = [row.sm_mhz for row in rows if row.sm_mhz is not None]
    clock = f" Multiprocessor clock {min(clocks)} to {max(clocks)} MHz." if clocks else ""
    where = f"{gpu or f'No GPU: {EMULATED}, quote no figure'}.{clock} {Machine.here()}."
    parts = [where, _LEGEND]
    if gpu is not None:
        parts.append(f"## Aims\n\n{aims_table(AIMS, rows)}")
    for section in dict.fromkeys(size.section for size in done):
        parts.append(f"## {section}")
        parts += [
            f"### {size}\n\n{figures(size, found)}"
            for size, found in done.items()
            if size.section == section
        ]
    parts.append(without_time(rows))
    if left_out:
        listed = "\n".join(f"- {size.section}: {size}" for size in left_out)
        parts.append(f"## Not begun\n\nThe time was up before these cases:\n\n{listed}")
    columns = {"gpu": "none"} if gpu is None else gpu.columns()
    write(out, "bench_fp8", "Low precision on a GPU", rows, parts, columns)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.set_defaults(out=None)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU; nothing to quote")
    parser.add_argument("--everywhere", action="store_true", help="compiled in every size")
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="then begin no case"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    gpu = Gpu.here(device)
    if gpu is None:
        print(f"No GPU: {EMULATED}. Tiny sizes, to see that everything runs; quote no figure.")
    tiny = options.tiny or gpu is None
    cases = TINY if tiny else sizes()[:3] if options.quick else sizes()
    short = tiny or options.quick
    effort = Effort(3, 1.0, 0.001) if short else Effort(rounds=7, seconds=10.0, turn=0.05)
    # Tracing is what tiny sizes test: Inductor would spend a minute in the compiler of C++.
    options.backend = "aot_eager" if tiny else "inductor"
    out = options.out or (Path("docs/benchmarks") if gpu is not None and not tiny else None)

    done: dict[Size, list[Row]] = {}
    end = time.perf_counter() + options.budget
    for i, size in enumerate(cases):
        if time.perf_counter() > end:
            progress(f"the time is up before {len(cases) - i} of {len(cases)} cases")
            break
        done[size] = measure_size(size, device, effort, options)
        print(f"\n{size.section}: {size}\n{figures(size, done[size])}", flush=True)
        if out is not None:  # each time: whoever ends the run early keeps what there is
            save_all(out, done, cases[i + 1 :], gpu)
    rows = [row for found in done.values() for row in found]
    print(f"\n{without_time(rows)}")
    if gpu is not None:
        print(f"\n{aims_table(AIMS, rows)}")
    print(f"\n{gpu or 'no GPU'}\n{Machine.here()}")
    print(f"written: {out / 'bench_fp8.csv'}, {out / 'bench_fp8.md'}" if out else "nothing written")


if __name__ == "__main__":
    main()
