"""Where there is no memory for a call, the error says so, and how much was wanted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from parameterized import parameterized

from qnn import functional as F
from qnn.kernels.cpu import native

from .common import child

HUGE = 1 << 42
WORDS = r"qnn::\w+\(.*\): DefaultCPUAllocator: can't allocate memory: you tried to allocate (\d+) "
int8 = torch.ones(1, 1, dtype=torch.int8)
one = torch.ones(1, 1)


def many(value: torch.Tensor, *, dense: bool) -> torch.Tensor:
    """So many rows without memory of their own; dense ones have no column."""
    return value.new_empty(0).view(HUGE, 0) if dense else value.expand(HUGE, 1)


def _linear(name: str, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    k = x.shape[-1]
    ops: dict[str, tuple[Any, ...]] = {
        "int8_linear": (x, int8[:, :k], one, None, None, "none"),
        "int8_weight_linear": (x, int8[:, :k], one, None, None, "none"),
        "int8_static_linear": (x, int8[:, :k], one, one[0], int8[0], None, None, "none"),
        "fp8_weight_linear": (x, one[:, :k].to(torch.float8_e4m3fn), one, None),
        "nvfp4_weight_linear": (
            x, torch.ones(1, 8 if k else 0, dtype=torch.uint8),
            torch.ones(1, 1 if k else 0).to(torch.float8_e4m3fn), one[0], None,
        ),
    }  # fmt: skip
    return getattr(torch.ops.qnn, name)(*ops[name])


LINEAR = (
    "int8_linear",
    "int8_weight_linear",
    "int8_static_linear",
    "fp8_weight_linear",
    "nvfp4_weight_linear",
)


class TestOutOfMemory:
    def setup_method(self) -> None:
        if not native.ensure().loaded:
            pytest.skip("torch's own operators have words of their own")

    def wanted(self, call: Any) -> int:
        with pytest.raises(RuntimeError) as caught:
            call()
        found = re.match(WORDS, str(caught.value))
        assert found is not None, caught.value
        return int(found[1])

    @parameterized.expand(LINEAR)
    def test_a_copy(self, name: str) -> None:
        assert self.wanted(lambda: _linear(name, one.expand(HUGE, 1))) == 4 * HUGE

    @parameterized.expand(LINEAR)
    def test_a_result(self, name: str) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.empty(HUGE, 0, dtype=dtype)
            bytes_ = HUGE * torch.empty(0, dtype=dtype).element_size()
            assert self.wanted(lambda x=x: _linear(name, x)) == bytes_

    def test_codes(self) -> None:
        rows = torch.empty(HUGE, 0, dtype=torch.int8)
        wanted = self.wanted(
            lambda: torch.ops.qnn.int8_rows_linear(
                rows, one.expand(HUGE, 1), int8[:, :0], one, None, None, "none", torch.float32
            )
        )
        assert wanted == 4 * HUGE
        assert self.wanted(lambda: F.quantize(torch.empty(HUGE, 0), "int8")) == 4 * HUGE

    @parameterized.expand(["int8", "int8_weight"])
    def test_recurrent(self, scheme: str) -> None:
        weights = [torch.ones(4, 0, dtype=torch.int8), torch.ones(4, 1), int8.expand(4, 1).clone()]
        state = torch.zeros(1, 1)
        x = torch.empty(HUGE, 1, 0)
        op = getattr(torch.ops.qnn, f"{scheme}_lstm")
        wanted = self.wanted(
            lambda: op(x, state, state, *weights, torch.ones(4, 1), *[None] * 5, "forward")
        )
        assert wanted == 4 * (HUGE + 2)

    def test_what_a_thread_needs(self) -> None:
        """Of two threads, where the address space is all used."""
        said = child(
            """
            import resource, torch, qnn
            x, w = torch.ones(256, 100_000), torch.ones(48, 100_000, dtype=torch.int8)
            ones = torch.ones(2048, 1)
            h, hh = torch.zeros(1, 512), torch.ones(2048, 512, dtype=torch.int8)
            steps = torch.zeros(16, 1, 512)
            def linear():
                torch.ops.qnn.int8_linear(x, w, ones[:48], None, None, "none")
            def lstm():
                torch.ops.qnn.int8_lstm(
                    steps, h, h, hh, ones, hh, ones, *[None] * 5, "forward")
            torch.set_num_threads(2)
            torch.ops.qnn.int8_quantize(torch.ones(1024, 1024))  # the threads are there
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 17), -1))
            for call in (linear, lstm):
                try:
                    call()
                except RuntimeError as error:
                    print(error)
                else:
                    raise AssertionError(f"{call} had memory")
            """,
            OMP_NUM_THREADS="2",
        )
        for line, op in zip(said.splitlines(), ("int8_linear", "int8_lstm"), strict=True):
            assert re.search(rf"^qnn::{op}.* allocate \d+ bytes for the memory of a thread", line)
