"""What a later `os.fork` must not find: threads of the OpenMP runtime.

Torch's operators share their work by OpenMP. GCC's runtime keeps the threads of one parallel region
for the next, a pool for each thread that opens regions. `os.fork` copies the thread that calls it
and not its pool, so that in the child the next region waits for threads that are not there, for
ever. A server that prepares a model and then forks its workers is not to meet that: where qnn
works on the weights of a model, it returns the pool at the end. The next region makes a new one,
in about 0.1 ms.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

_SOFT = 1  # omp_pause_soft of OpenMP 5.0: the threads go, settings and data stay


def return_threads() -> None:
    """Let go of the calling thread's OpenMP threads, so that it may fork."""
    _pause()()


@functools.cache
def _pause() -> Callable[[], None]:
    """What the OpenMP runtime of torch offers for it; nothing where torch has another way to share
    its work, or a runtime from before OpenMP 5.0. (LLVM's and Intel's start afresh in a child.)
    """
    path = Path(torch.__path__[0], "lib", "libtorch_cpu.so")
    try:
        # No library is loaded, only the one that torch runs in is asked.
        runtime = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        pause, host = runtime.omp_pause_resource, int(runtime.omp_get_initial_device())
    except (OSError, AttributeError):  # Windows has no RTLD_NOLOAD
        return lambda: None

    def run() -> None:
        pause(_SOFT, host)  # does nothing inside of a parallel region, and says so

    return run
