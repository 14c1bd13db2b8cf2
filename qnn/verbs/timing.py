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

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

Call = Callable[[], object]
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
    shuffle, order = random.Random(0).shuffle, list(calls)  # noqa: S311  # an order of turns
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
        return float(start.elapsed_time(end)) * 1e-3
