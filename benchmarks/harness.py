"""What the benchmarks share: cases, variants, the check of their outputs, and their rows.

A script declares cases and variants, hands them to `measure`, and the rows that come back to
`report.py`:

- all variants of a case are set up, checked, and timed in turns within one process, so that a
  machine whose speed drifts slows all of them alike; what counts is the median and its ratio to a
  baseline;
- a variant with an output whose SQNR against float32 is under the case's floor has failed: it gets
  no time;
- a peer that is not installed, or that cannot run a case, keeps its row and says why;
- every library gets the same number of threads;
- what other processes took of the CPU meanwhile stands in every row.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import io
import logging
import math
import os
import re
import shlex
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

import qnn

from machine import Machine as Machine
from timing import CPU, Effort, OtherLoad, Samples, clock_mhz, interleave, peak_megabytes

TaskT = TypeVar("TaskT")

MIN_SQNR = 20.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# -- variants ----------------------------------------------------------------------------------


class Unavailable(Exception):  # noqa: N818, it is an answer and no error
    """A variant cannot run here, and why. Its row stays in every table."""


def needs(module: str) -> Any:
    """An optional module, or `Unavailable` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed ({error.name})") from error


def first_tensor(output: Any) -> torch.Tensor:
    """The first output of a model, whichever library ran it."""
    while not isinstance(output, torch.Tensor) and not hasattr(output, "__array__"):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return torch.as_tensor(output)


@dataclass(frozen=True)
class Run:
    """A variant that is ready: `call()` is timed, and `output` of its result is checked.

    `output` gives what the case has a reference for: a tensor, or several. A call may do the task
    `repeats` times; all times are of one.
    """

    call: Callable[[], object]
    note: str = ""
    output: Callable[[Any], torch.Tensor | Sequence[torch.Tensor]] = first_tensor
    repeats: int = 1


@dataclass(frozen=True)
class Variant(Generic[TaskT]):
    """One way to run a task: `build(task, dtype)` returns a `Run` or raises `Unavailable`."""

    family: str
    precision: str
    mode: str
    build: Callable[[TaskT, torch.dtype], Run]

    @property
    def name(self) -> str:
        return f"{self.family} {self.precision} {self.mode}"


VariantT = TypeVar("VariantT", bound="Variant[Any]")


def named(variants: Iterable[VariantT], name: str) -> VariantT:
    return next(v for v in variants if v.name == name)


def select(variants: Sequence[VariantT], only: str, baseline: str) -> list[VariantT]:
    """The variants whose name matches the regular expression `only`, and always the baseline."""
    return [v for v in variants if v.name == _in_mode(baseline, v) or re.search(only, v.name)]


def _in_mode(baseline: str, variant: Variant[Any]) -> str:
    return baseline.format(mode=variant.mode)


LEFT_OUT = "left out in this case, to keep the run short; --everywhere adds it"


def only_where(variant: Variant[TaskT], wanted: Callable[[TaskT], bool]) -> Variant[TaskT]:
    """The variant, for the tasks that are `wanted`."""

    def build(task: TaskT, dtype: torch.dtype) -> Run:
        if not wanted(task):
            raise Unavailable(LEFT_OUT)
        return variant.build(task, dtype)

    return dataclasses.replace(variant, build=build)


@contextlib.contextmanager
def inductor_settings(**changes: Any) -> Iterator[None]:
    """With `changes` inside and nothing changed afterwards: torchao and qnn set some for good, and
    torchao the precision of float32 products.
    """
    from torch._inductor import config

    before, precision = config.get_config_copy(), torch.get_float32_matmul_precision()
    try:
        with config.patch(changes):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        now = config.get_config_copy()
        config.load_config({key: value for key, value in before.items() if now[key] != value})


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """`torch.compile` of a function of its own: Dynamo keeps compiled code with the code object
    that it is of, and tries what was compiled for other variants first.
    """

    def forward(*args: Any) -> Any:
        return function(*args)

    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, closure=forward.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)  # type: ignore[return-value]


# -- cases -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case(Generic[TaskT]):
    """What all variants do.

    Args:
        section, name: the heading of its table, and its own name there.
        reference: the float32 output, or all outputs.
        operations: multiplications and additions, for `tops`.
        floor: by a variant's family, the lowest SQNR in dB that its outputs may have.
        training: gradients are computed.
    """

    section: str
    name: str
    task: TaskT
    reference: torch.Tensor | Sequence[torch.Tensor]
    operations: float
    floor: Callable[[str], float] = lambda _: MIN_SQNR
    training: bool = False
    device: torch.device = CPU

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.section, self.name)))


# -- rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """One variant in one case. Where `status` is not "ok" there is no time, and `note` says why.

    `tops` and `gb_s` are 10^12 operations and 10^9 bytes read, each a second. `sqnr_db` is the
    lowest of all outputs. `other_load` is how many cores other processes kept busy while the case
    was timed.
    """

    case: str
    variant: str
    family: str
    precision: str
    mode: str
    status: str
    note: str
    median_ms: float | None = None
    min_ms: float | None = None
    speedup: float | None = None
    sqnr_db: float | None = None
    tops: float | None = None
    gb_s: float | None = None
    megabytes: float | None = None
    samples: int = 0
    other_load: float | None = None

    @property
    def remark(self) -> str:
        """The note of a variant that was timed, or why it has no time."""
        return f"failed: {self.note}" if self.status == "failed" else self.note


@dataclass(frozen=True)
class GpuMeasurement(Measurement):
    """`median_ms` is of the wall time, `megabytes` what a call adds at its peak."""

    device_ms: float | None = None
    host_ms: float | None = None
    sm_mhz: int | None = None


RowT = TypeVar("RowT", bound=Measurement)


def row_of(case: str, variant: Variant[Any], status: str, note: str) -> Measurement:
    """A row without times."""
    v = variant
    return Measurement(case, v.name, v.family, v.precision, v.mode, status, note)


def timed(
    row: Measurement, samples: Samples, *, operations: float = 0.0, read: float = 0.0, per: int = 1
) -> Measurement:
    """The row with its times; a call does `operations`, and reads `read` bytes, `per` times."""
    median, on_device, host = (samples.median(kind) for kind in ("wall", "device", "host"))
    assert median is not None
    seconds = median / per
    row = dataclasses.replace(
        row,
        median_ms=seconds * 1e3,
        min_ms=min(samples.wall) / per * 1e3,
        tops=operations / seconds / 1e12 if operations else None,
        gb_s=read / seconds / 1e9 if read else None,
        samples=len(samples.wall),
    )
    if on_device is None or host is None:
        return row
    return GpuMeasurement(**vars(row), device_ms=on_device / per * 1e3, host_ms=host / per * 1e3)


def over(theirs: Measurement | None, ours: Measurement | None, kind: str = "median_ms") -> Any:
    """How many times as fast as `theirs` `ours` is: a float, or None where one has no time."""
    times = [getattr(row, kind, None) for row in (theirs, ours)]
    return None if None in times else times[0] / times[1]


# -- measuring ---------------------------------------------------------------------------------


def _settings() -> dict[str, Any]:
    """The process-wide settings through which one variant could change another."""
    from torch._inductor import config

    plain = (bool, int, float, str, list, tuple, dict, set, type(None))
    inductor = {
        f"torch._inductor.config.{key}": value if isinstance(value, plain) else type(value)
        for key, value in config.get_config_copy().items()
    }
    return {
        **inductor,
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "engine of quantised tensors": torch.backends.quantized.engine,
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "CPU affinity": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
    }


@contextlib.contextmanager
def _no_traces(variant: str) -> Iterator[None]:
    before = _settings()
    yield
    changed = [key for key, value in _settings().items() if before.get(key) != value]
    if changed:
        raise RuntimeError(f"{variant!r} changed what all variants share: {', '.join(changed)}.")


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Without the libraries' warnings and progress bars, unless they are wanted."""
    if verbose:
        yield
        return
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as sink:
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(sink):
                yield
    finally:
        logging.disable(logging.NOTSET)


def prepared(
    case: Case[TaskT], variant: Variant[TaskT], verbose: bool = False
) -> tuple[Run | None, Measurement]:
    """A variant that is ready, and its row without times. Whatever goes wrong in it is a result."""
    row = row_of(str(case), variant, "ok", "")
    try:
        with _quiet(verbose):
            run = variant.build(case.task, DTYPES[variant.precision])
            got = run.output(run.call())
            pairs = zip(_several(case.reference), _several(got), strict=True)
            levels = [qnn.sqnr(reference, value) for reference, value in pairs]
    except Unavailable as error:
        return None, dataclasses.replace(row, status="unavailable", note=str(error))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0][:160]
        note = f"{type(error).__name__}: {first_line}".rstrip(": ")
        return None, dataclasses.replace(row, status="failed", note=note)
    # Python's min passes over a NaN that is not the first.
    sqnr, floor = math.nan if any(map(math.isnan, levels)) else min(levels), case.floor(row.family)
    row = dataclasses.replace(row, note=run.note, sqnr_db=sqnr)
    if not sqnr >= floor:
        note = f"SQNR {sqnr:.1f} dB, under {floor:.0f}"
        return None, dataclasses.replace(row, status="failed", note=note)
    return run, dataclasses.replace(row, megabytes=peak_megabytes(run.call, case.device))


def _several(output: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else output


def measure(
    case: Case[TaskT],
    variants: Sequence[Variant[TaskT]],
    *,
    baseline: str,
    effort: Effort,
    verbose: bool = False,
) -> list[Measurement]:
    """A row for each variant: set up and checked one after the other, then timed in turns.

    `baseline` is the variant whose time is divided by the others' for `speedup`; with `{mode}` in
    its name it is one for each mode.
    """
    runs: dict[str, Run] = {}
    rows: dict[str, Measurement] = {}
    with torch.set_grad_enabled(case.training):
        for variant in variants:
            progress(f"{case}: {variant.name}")
            with _no_traces(variant.name):
                run, rows[variant.name] = prepared(case, variant, verbose)
            if run is not None:
                runs[variant.name] = run
        progress(f"{case}: timing")
        load = OtherLoad()
        calls = {name: run.call for name, run in runs.items()}
        samples = interleave(calls, effort, case.device)
    other_load = load.cores() if case.device.type == "cpu" else None
    clock = clock_mhz(case.device)
    for name, taken in samples.items():
        rows[name] = dataclasses.replace(
            timed(rows[name], taken, operations=case.operations, per=runs[name].repeats),
            other_load=other_load,
            **({} if clock is None else {"sm_mhz": clock}),
        )
    del runs, calls
    torch._dynamo.reset()  # between cases: no compiled variant outlives its case
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    return [
        dataclasses.replace(
            rows[v.name], speedup=over(rows.get(_in_mode(baseline, v)), rows[v.name])
        )
        for v in variants
    ]


Grid = dict[str, dict[str, list[Measurement]]]


def measure_grid(
    cases: Iterable[Case[TaskT]],
    variants: Sequence[Variant[TaskT]],
    *,
    baseline: str,
    effort: Effort,
    show: Callable[[list[Measurement], str], str],
    verbose: bool = False,
) -> Grid:
    """`{"BERT-base, 768->3072": {"M=1": rows}}`; what `show` makes of each case's is printed."""
    grid: Grid = {}
    for case in cases:
        rows = measure(case, variants, baseline=baseline, effort=effort, verbose=verbose)
        grid.setdefault(case.section, {})[case.name] = rows
        print(f"\n{case}\n{show(rows, baseline)}", flush=True)
    return grid


def all_rows(grid: Grid) -> list[Measurement]:
    return [row for column in grid.values() for rows in column.values() for row in rows]


# -- the command line --------------------------------------------------------------------------


_START = time.perf_counter()


def command_line() -> str:
    """How this script was called, without the folder of the results."""
    arguments = re.sub(r"--out[= ]\S+ ?", "", shlex.join(sys.argv[1:]))
    return f"python benchmarks/{Path(sys.argv[0]).name} {arguments}".strip()


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - _START:5.0f} s] {message}", file=sys.stderr, flush=True)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few repeats, small cases: a smoke test"
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="variants whose name matches")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/benchmarks"), help="where CSV, PNG and Markdown go"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of every library alike"
    )
    parser.add_argument("--verbose", action="store_true", help="with the libraries' own messages")
    return parser
