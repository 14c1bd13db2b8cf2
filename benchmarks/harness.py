"""What the benchmarks share: fair timing and the check of the outputs.

A script picks variants (`variants.py`), hands each case to `measure`, and the rows that come back
to `report.py`:

- all variants of a case are set up, checked, and timed in turns within one process, so that a
  machine whose speed drifts slows all of them alike; what counts is the median and its ratio to a
  baseline;
- a variant whose output has an SQNR of less than 20 dB against float32 has failed: it gets no time;
- a peer that is not installed, or that cannot run a case, keeps its row and says why;
- every library gets the same number of threads;
- what other processes took of the machine meanwhile stands in every row.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import io
import logging
import os
import platform
import random
import re
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

import qnn

TaskT = TypeVar("TaskT")

MIN_SQNR = 20.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PACKAGES = ("torch", "qnn", "torchao", "onnxruntime", "openvino", "nncf", "transformers")


# -- variants ----------------------------------------------------------------------------------


class Unavailable(Exception):  # noqa: N818, it is an answer and no error
    """A variant cannot run here, and why. Its row stays in every table."""


def first_tensor(output: Any) -> torch.Tensor:
    """The first output of a model, whichever library ran it."""
    if not isinstance(output, torch.Tensor) and not hasattr(output, "__array__"):
        output = output[0]
    return torch.as_tensor(output)


@dataclass(frozen=True)
class Run:
    """A variant that is ready: `call()` is timed, and `output` of its result is checked."""

    call: Callable[[], object]
    note: str = ""
    output: Callable[[Any], torch.Tensor] = first_tensor


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


# -- the machine -------------------------------------------------------------------------------


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first CPU; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Machine:
    """Where and with what a row was measured."""

    cpu: str
    cores: int
    threads: int
    amx: bool
    vnni: bool
    date: str
    python: str
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> Machine:
        info = _cpuinfo()
        return cls(
            cpu=info.get("model name", platform.processor() or platform.machine()),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            amx=torch.cpu._is_amx_tile_supported(),
            vnni=not {"avx512_vnni", "avx_vnni"}.isdisjoint(info.get("flags", "").split()),
            date=datetime.date.today().isoformat(),
            python=platform.python_version(),
            versions={name: _version(name) for name in _PACKAGES},
        )

    def columns(self) -> dict[str, Any]:
        """The cells that every CSV row ends with."""
        fields = dataclasses.asdict(self)
        versions = fields.pop("versions")
        return {**fields, **versions}

    def missing(self) -> str:
        """The peers that are not installed, in a sentence; empty if all are."""
        names = [name for name, version in self.versions.items() if version == "not installed"]
        return f"Not installed, and so not measured: {', '.join(names)}." if names else ""

    def __str__(self) -> str:
        features = ["AMX" if self.amx else "no AMX", "VNNI" if self.vnni else "no VNNI"]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        where = f"{self.cpu}, {counted(self.cores, 'core')}, {counted(self.threads, 'thread')}"
        return f"{where}, {', '.join(features)}; Python {self.python}, {versions}; {self.date}"


# -- timing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """Three to `rounds` rounds, none begun after `seconds`, with turns of `turn` seconds each."""

    rounds: int = 15
    seconds: float = 60.0
    turn: float = 0.02


_MIN_ROUNDS = 3
_MAX_BURST = 50
# OpenMP's idle threads spin on after a call, and hold a core that the next variant needs.
_PAUSE = 0.002


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    """Seconds of single calls, in rounds that give each variant one turn, in a shuffled order.

    A turn is a pause, one or two calls that wake the threads and fill the caches with the variant's
    own weight, and then a burst of timed calls, the more the shorter they are.
    """
    shortest = {name: min(_timed(call) for _ in range(3)) for name, call in calls.items()}
    bursts = {
        name: max(1, min(_MAX_BURST, int(effort.turn / seconds)))
        for name, seconds in shortest.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffle, order = random.Random(0).shuffle, list(calls)
    end = time.perf_counter() + effort.seconds
    for done in range(effort.rounds):
        if done >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            call, burst = calls[name], bursts[name]
            time.sleep(_PAUSE)
            for _ in range(min(burst, 2)):
                call()
            samples[name] += [_timed(call) for _ in range(burst)]
    return samples


def _cpu_seconds() -> tuple[float, float] | None:
    """Core seconds spent so far by anyone, and by this process with the children that it has
    waited for; None where there is no /proc.
    """
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, path.read_text().split()[1:9]
    )
    anyone = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return anyone, own.user + own.system + own.children_user + own.children_system


class OtherLoad:
    """Cores that other processes keep busy, on average since this object was made."""

    def __init__(self) -> None:
        self._wall, self._spent = time.perf_counter(), _cpu_seconds()

    def cores(self) -> float | None:
        wall, spent = time.perf_counter() - self._wall, _cpu_seconds()
        if spent is None or self._spent is None:
            return None
        anyone, own = (now - then for now, then in zip(spent, self._spent, strict=True))
        return max(0.0, anyone - own) / wall


def fastest(candidates: Mapping[str, Callable[[], object]]) -> tuple[str, str]:
    """The fastest candidate's name, and a note with the time of each."""
    times = interleave(candidates, Effort(rounds=5, seconds=3.0))
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    best = min(medians, key=lambda name: medians[name])
    listed = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in medians.items())
    return best, f"{best}, the best of {listed}" if len(medians) > 1 else best


# -- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """One variant in one case. Where `status` is not "ok" there is no time, and `note` says why.

    `tops` and `gb_s` are 10^12 operations and 10^9 bytes read, each a second. `other_load` is how
    many cores other processes kept busy while the case was timed.
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
class _Prepared:
    run: Run | None
    status: str
    note: str
    sqnr_db: float | None = None


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


def _prepare(
    variant: Variant[TaskT], task: TaskT, reference: torch.Tensor, verbose: bool
) -> _Prepared:
    """Build a variant and check its output. Whatever goes wrong in a peer is a result."""
    try:
        with _quiet(verbose):
            run = variant.build(task, DTYPES[variant.precision])
            sqnr = qnn.sqnr(reference, run.output(run.call()))
    except Unavailable as error:
        return _Prepared(None, "unavailable", str(error))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0][:160]
        return _Prepared(None, "failed", f"{type(error).__name__}: {first_line}".rstrip(": "))
    if not sqnr >= MIN_SQNR:  # NaN fails too
        return _Prepared(None, "failed", f"SQNR {sqnr:.1f} dB, under {MIN_SQNR:.0f}", sqnr)
    return _Prepared(run, "ok", run.note, sqnr)


@torch.no_grad()
def measure(
    case: str,
    variants: Sequence[Variant[TaskT]],
    task: TaskT,
    *,
    reference: torch.Tensor,
    baseline: str,
    operations: float,
    effort: Effort,
    verbose: bool = False,
) -> list[Measurement]:
    """A row for each variant: set up and checked one after the other, then timed in turns.

    Args:
        reference: the float32 output.
        baseline: the variant whose time is divided by the others' for `speedup`.
        operations: multiplications and additions of a call, for `tops`.
    """
    prepared: dict[str, _Prepared] = {}
    for variant in variants:
        progress(f"{case}: {variant.name}")
        with _no_traces(variant.name):
            prepared[variant.name] = _prepare(variant, task, reference, verbose)
    progress(f"{case}: timing")
    calls = {name: p.run.call for name, p in prepared.items() if p.run is not None}
    load = OtherLoad()
    samples = interleave(calls, effort)
    other_load = load.cores()
    medians = {name: statistics.median(times) for name, times in samples.items()}

    rows = []
    for v in variants:
        p = prepared[v.name]
        row = Measurement(
            case, v.name, v.family, v.precision, v.mode, p.status, p.note, sqnr_db=p.sqnr_db
        )
        if v.name in medians:
            median = medians[v.name]
            row = dataclasses.replace(
                row,
                median_ms=median * 1e3,
                min_ms=min(samples[v.name]) * 1e3,
                speedup=medians[baseline] / median if baseline in medians else None,
                tops=operations / median / 1e12,
                samples=len(samples[v.name]),
                other_load=other_load,
            )
        rows.append(row)
    del prepared, calls
    torch._dynamo.reset()  # between cases: no compiled variant outlives its case
    gc.collect()
    return rows


_START = time.perf_counter()


def command_line() -> str:
    """How this script was called, without the folder of the results."""
    arguments = re.sub(r"--out[= ]\S+ ?", "", shlex.join(sys.argv[1:]))
    return f"python benchmarks/{Path(sys.argv[0]).name} {arguments}".strip()


def progress(message: str) -> None:
    print(f"[{time.perf_counter() - _START:5.0f} s] {message}", file=sys.stderr, flush=True)


# -- the command line --------------------------------------------------------------------------


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


def select(variants: Sequence[Variant[TaskT]], only: str, baseline: str) -> list[Variant[TaskT]]:
    """The variants whose name matches the regular expression `only`, and always the baseline."""
    return [v for v in variants if v.name == baseline or re.search(only, v.name)]
