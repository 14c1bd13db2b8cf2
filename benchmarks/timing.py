"""Fair timing: the variants of a case take turns, on a CPU and on a GPU.

Three times are known of a call:

    wall      by the host's clock, from the call to the end of its last kernel. On a GPU the device
              is idle before, so all that Python, dispatch and launches cost is in it.
    device    on a GPU that is kept busy until the whole call is in its queue: from its first kernel
              to its last, by events. That is what a call costs in a model whose host runs ahead, or
              in a CUDA graph.
    host      on a GPU: what it takes to put the call into the queue.

Each sample on a GPU meets a cold L2 cache: a buffer twice its size is written before it. Clocks,
power and whatever else can be set are left as they are found.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch

Call = Callable[[], object]
ResultT = TypeVar("ResultT")
CPU = torch.device("cpu")

_MIN_ROUNDS = 3
# OpenMP's idle threads spin on after a call, and hold a core that the next variant needs.
_PAUSE = 0.002
# `torch.cuda._sleep` counts cycles of a clock that runs at 2 GHz at most: at less it sleeps longer.
_CYCLES = 2e9
_MAX_SLEEP = 0.05


@dataclass(frozen=True)
class Effort:
    """Three to `rounds` rounds, none begun after `seconds`, with turns of `turn` seconds each."""

    rounds: int = 15
    seconds: float = 60.0
    turn: float = 0.02


@dataclass
class Samples:
    """Seconds of single calls."""

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def __iadd__(self, more: Samples) -> Samples:
        self.wall += more.wall
        self.device += more.device
        self.host += more.host
        return self

    def median(self, kind: str = "wall") -> float | None:
        times: list[float] = getattr(self, kind)
        return statistics.median(times) if times else None


def interleave(
    calls: Mapping[str, Call], effort: Effort, device: torch.device = CPU
) -> dict[str, Samples]:
    """Samples of each call, in rounds that give each one turn, in a shuffled order.

    A turn is one or two calls that bring caches, threads, clocks and allocator back to this
    variant, and then a burst of timed calls, the more the shorter they are.
    """
    timer: Timer = GpuTimer(device) if device.type == "cuda" else HostTimer()
    bursts = {
        name: max(1, min(timer.longest, int(effort.turn / min(timer.turn(call, 3).wall))))
        for name, call in calls.items()
    }
    result = {name: Samples() for name in calls}
    shuffle, order = random.Random(0).shuffle, list(calls)
    end = time.perf_counter() + effort.seconds
    for done in range(effort.rounds):
        if done >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            result[name] += timer.turn(calls[name], bursts[name])
    return result


class Timer(Protocol):
    longest: int  # burst

    def turn(self, call: Call, count: int) -> Samples: ...


class HostTimer:
    """A CPU's, with the wall time alone."""

    longest = 50

    def turn(self, call: Call, count: int) -> Samples:
        time.sleep(_PAUSE)
        for _ in range(min(count, 2)):
            call()
        return Samples(wall=[seconds(call) for _ in range(count)])


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class GpuTimer:
    """Two calls, then `count` samples of each time."""

    longest = 20

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def turn(self, call: Call, count: int) -> Samples:
        with torch.cuda.device(self._device):
            for _ in range(2):
                call()
            samples = Samples()
            for _ in range(count):
                wall, host = self._idle(call)
                samples.wall.append(wall)
                samples.host.append(host)
            ahead = min(_MAX_SLEEP, 2 * max(samples.host) + 20e-6)
            samples.device = [self._queued(call, ahead) for _ in range(count)]
        return samples

    def _idle(self, call: Call) -> tuple[float, float]:
        self._flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        return time.perf_counter() - start, queued - start

    def _queued(self, call: Call, ahead: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(math.ceil(ahead * _CYCLES))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3


def fastest(candidates: Mapping[str, Call]) -> tuple[str, str]:
    """The fastest candidate's name, and a note with the time of each."""
    samples = interleave(candidates, Effort(rounds=5, seconds=3.0))
    medians = {name: statistics.median(each.wall) for name, each in samples.items()}
    best = min(medians, key=lambda name: medians[name])
    listed = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in medians.items())
    return best, f"{best}, the best of {listed}" if len(medians) > 1 else best


# -- what else the machine does ------------------------------------------------------------------


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


# -- of a GPU alone ------------------------------------------------------------------------------


def peak_megabytes(call: Call, device: torch.device) -> float | None:
    """How far a call rises above the memory that is taken before it, in 10^6 bytes."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def clock_mhz(device: torch.device) -> int | None:
    """The multiprocessors' clock at this moment, read only; None where it cannot be read."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.clock_rate(device)
    except Exception:  # no pynvml, or no access: its errors are classes of its own
        return None


def captured(call: Callable[[], ResultT]) -> tuple[Call, ResultT]:
    """The replay of a CUDA graph of `call`, which must have run before; and the result, whose
    tensors each replay writes anew.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
