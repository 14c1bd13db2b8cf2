"""Casts as arithmetic in Inductor's graph: the default on a GPU, tried here on the CPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from parameterized import parameterized
from torch._inductor.utils import run_and_get_code

import qnn
from qnn.passes import cast_fusion

from .common import same_bits
from .test_training import gradients, operands

ON_CPU = mock.patch.object(cast_fusion, "DEVICES", {"cpu"})


def compiled_code(function: Any, *args: Any) -> tuple[Any, str]:
    result, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    return result, "\n".join(codes)


class TestCastFusion:
    def test_on_a_gpu_alone(self) -> None:
        assert {"cuda"} == cast_fusion.DEVICES
        (op, _) = next(iter(cast_fusion.CASTS.items()))
        _, code = compiled_code(op, torch.randn(5, 64))
        assert f"torch.ops.qnn.{op._schema.name.removeprefix('qnn::')}" in code

    @parameterized.expand([(op._schema.name.removeprefix("qnn::"),) for op in cast_fusion.CASTS])
    @ON_CPU
    def test_codes_of_a_given_tensor_are_eagers(self, name: str) -> None:
        op = getattr(torch.ops.qnn, name).default
        x = torch.randn(37, 70)
        x[3], x[5, 7], x[6, 1] = 0, torch.nan, x[6, 1] * 1e20
        parts, code = compiled_code(lambda x: op(x), x)
        assert f"torch.ops.qnn.{name}" not in code
        for got, want in zip(parts, op(x), strict=True):
            assert same_bits(got, want)
            assert got.stride() == want.stride()

    @parameterized.expand([("fp8",), ("fp8_tensor",)])
    @ON_CPU
    def test_a_training_step(self, scheme: str) -> None:
        def step(x: Any, w: Any, b: Any) -> Any:
            return qnn.functional.training_linear(x, w, b, scheme=scheme)

        call = torch.compile(step, fullgraph=True)
        for rows in (5, 7, 40):
            given = operands((rows,))
            with torch._dynamo.config.patch(error_on_recompile=rows == 40):
                got = gradients(call, *given)
            *same, dbias = zip(got, gradients(step, *given), strict=True)
            for mine, eager in same:
                assert torch.equal(mine, eager)
            torch.testing.assert_close(*dbias)  # a float sum, in another order

    @ON_CPU
    def test_behind_a_bfloat16_producer_few_codes_move_and_none_with_inductors_switch(self) -> None:
        op = torch.ops.qnn.float8_e4m3_quantize.default
        x = torch.randn(512, 512, dtype=torch.bfloat16)

        def produced(x: torch.Tensor) -> Any:
            return op(torch.nn.functional.silu(x) * 1.7)

        want = produced(x)[0].float()
        moved = (compiled_code(produced, x)[0][0].float() != want).float().mean().item()
        assert moved > 0
        assert moved < 0.1
        if torch.__version__ < "2.13":
            pytest.skip("Inductor's switch does nothing for a CPU before torch 2.13")
        torch._dynamo.reset()
        with torch._inductor.config.patch(emulate_precision_casts=True):
            kept = compiled_code(produced, x)[0][0].float()
        assert torch.equal(kept, want)
