"""Timing on a GPU: what a call takes by the host's clock, and what it takes the device.

Both are measured in turns with the other variants, as `harness.interleave` does on a CPU, each
sample on a cold L2 cache: a buffer twice its size is written before it.

    wall      the device is idle; from the call to the end of its last kernel, by the host's clock.
              All that Python, dispatch and launches cost is in it.
    device    the device is kept busy until the whole call is in its queue; from its first kernel to
              its last, by events. That is what a call costs in a model whose host runs ahead, or in
              a CUDA graph.
    host      what it takes to put the call into the queue.

Clocks, power and whatever else can be set are left as they are found. Without a GPU there is the
wall time alone.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

import harness

Call = Callable[[], object]
ResultT = TypeVar("ResultT")

_MIN_ROUNDS, _MAX_BURST = 3, 20
# `torch.cuda._sleep` counts cycles of a clock that runs at 2 GHz at most: at less it sleeps longer.
_CYCLES = 2e9
_MAX_SLEEP = 0.05


@dataclass(frozen=True)
class Gpu:
    """The GPU of a row, as it was found."""

    gpu: str
    capability: str
    multiprocessors: int
    gpu_gib: float
    l2_mib: float
    cuda: str
    driver: str
    triton: str
    transformer_engine: str

    @classmethod
    def here(cls, device: torch.device) -> Gpu | None:
        """None without a GPU."""
        if device.type != "cuda":
            return None
        found = torch.cuda.get_device_properties(device)
        return cls(
            gpu=found.name,
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            gpu_gib=round(found.total_memory / 2**30, 1),
            l2_mib=round(found.L2_cache_size / 2**20, 1),
            cuda=str(torch.version.cuda),
            driver=_driver(),
            triton=harness._version("triton"),
            transformer_engine=harness._version("transformer-engine"),
        )

    def columns(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.gpu}, compute capability {self.capability}, {self.multiprocessors} "
            f"multiprocessors, {self.gpu_gib} GiB, L2 {self.l2_mib} MiB; CUDA {self.cuda}, driver "
            f"{self.driver}, Triton {self.triton}, TransformerEngine {self.transformer_engine}"
        )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"


@dataclass
class Samples:
    """Seconds of single calls."""

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def median(self, kind: str) -> float | None:
        times: list[float] = getattr(self, kind)
        return statistics.median(times) if times else None


def interleave(
    calls: Mapping[str, Call], effort: harness.Effort, device: torch.device
) -> dict[str, Samples]:
    """Samples of each call, in rounds that give each one turn, in a shuffled order."""
    if device.type != "cuda":
        timed = harness.interleave(calls, effort)
        return {name: Samples(wall=times) for name, times in timed.items()}
    timer = _Timer(device)
    first = {name: timer.turn(call, 3) for name, call in calls.items()}
    bursts = {
        name: max(1, min(_MAX_BURST, int(effort.turn / min(samples.wall))))
        for name, samples in first.items()
    }
    result = {name: Samples() for name in calls}
    shuffle, order = random.Random(0).shuffle, list(calls)
    end = time.perf_counter() + effort.seconds
    for done in range(effort.rounds):
        if done >= _MIN_ROUNDS and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            turn = timer.turn(calls[name], bursts[name])
            result[name].wall += turn.wall
            result[name].device += turn.device
            result[name].host += turn.host
    return result


class _Timer:
    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def turn(self, call: Call, count: int) -> Samples:
        """Two calls that bring clocks and allocator back to this variant, then `count` of each."""
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
