"""Fair timing: turns as `qnn.bench` gives them, and what else a benchmark asks of its machine."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from qnn.verbs.timing import CPU, Call, Effort, Samples, interleave, seconds

ResultT = TypeVar("ResultT")
__all__ = [
    "CPU",
    "Call",
    "Effort",
    "OtherLoad",
    "Samples",
    "captured",
    "clock_mhz",
    "fastest",
    "interleave",
    "peak_megabytes",
    "seconds",
]


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
