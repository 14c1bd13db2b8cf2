"""Bags of rows of quantised tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qnn
from qnn.kernels import OPS
from qnn.kernels.reference.embedding import checked
from qnn.passes import regions

from .common import same_bits
from .test_embedding import ROWS, columns

MODES = ("sum", "mean", "max")


class TestBags:
    @pytest.fixture(
        params=[
            (s, m)
            for s in ("int8_weight", "fp8_weight", "nvfp4_weight", "int4_weight_asym_g32")
            for m in MODES
        ],
        ids=str,
    )
    def case(self, request: pytest.FixtureRequest) -> tuple[Any, Any]:
        """A layer and the float one over the table that its codes stand for."""
        scheme, mode = request.param
        layer = qnn.QEmbeddingBag.from_float(
            nn.EmbeddingBag(ROWS, columns(scheme), mode=mode, padding_idx=4), scheme
        )
        return layer, layer.dequantize()

    def test_as_torch(self, case: tuple[Any, Any]) -> None:
        layer, plain = case
        ids = torch.randint(ROWS, (24,))
        ids[:6] = 4  # padding alone in some bags
        for given in (
            (ids, torch.tensor([0, 3, 3, 6, 7, 24])),
            (ids.int(), torch.tensor([0, 5], dtype=torch.int32)),
            (ids.view(4, 6),),
            (ids[:0], torch.tensor([0, 0])),
            (ids[:0].view(0, 6),),
        ):
            torch.testing.assert_close(layer(*given), plain(*given))
        for each in (layer, plain):
            each.include_last_offset = True
        offsets = torch.tensor([0, 3, 3, 6, 24])
        torch.testing.assert_close(layer(ids, offsets), plain(ids, offsets))
        offsets[-1] = 20  # what comes after the last bag is in none
        assert same_bits(layer(ids, offsets)[3:], layer(ids[6:20], torch.tensor([0, 14])))

    def test_low_precision(self, case: tuple[Any, Any]) -> None:
        layer, plain = case
        ids = torch.randint(ROWS, (4, 6))
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            layer.to(dtype)
            y = layer(ids)
            assert y.dtype == dtype
            torch.testing.assert_close(y, plain(ids).to(dtype), rtol=0.01, atol=1e-3)

    @pytest.mark.parametrize(
        ("scheme", "mode"),
        [("int8_weight", "sum"), ("nvfp4_weight", "mean"), ("int4_weight_asym_g32", "max")],
    )
    def test_compiled(self, scheme: str, mode: str) -> None:
        layer = qnn.QEmbeddingBag(ROWS, columns(scheme), mode=mode, padding_idx=4, scheme=scheme)
        ids, offsets = torch.randint(ROWS, (24,)), torch.tensor([0, 3, 3, 6, 24])
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        assert same_bits(compiled(ids, offsets), layer(ids, offsets))
        assert same_bits(compiled(ids[:9], offsets[:3]), layer(ids[:9], offsets[:3]))
        program = torch.export.export(layer, (ids, offsets))
        assert same_bits(program.module()(ids, offsets), layer(ids, offsets))
        assert [region.scheme for region in regions(program)] == [layer.scheme]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_the_gradient_of_weights(self, dtype: torch.dtype) -> None:
        layer = qnn.QEmbeddingBag(ROWS, 24, mode="sum", padding_idx=4, dtype=dtype)
        plain, ids = layer.dequantize().double(), torch.randint(ROWS, (20,))
        offsets, ids[3] = torch.tensor([0, 3, 3, 11]), 4
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        dy = torch.randn(4, 24, dtype=dtype)
        weights, want = torch.rand(20, dtype=dtype), None
        for run in (plain, layer, compiled):
            w = (weights.double() if run is plain else weights).detach().clone().requires_grad_()
            y = run(ids, offsets, w)
            y.backward(dy.to(y.dtype))
            assert w.grad is not None
            want = (y, w.grad) if want is None else want
            for got, exact in zip((y, w.grad), want, strict=True):
                tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
                torch.testing.assert_close(
                    got.double(), exact.double(), rtol=tolerance, atol=tolerance
                )
        assert want is not None
        assert want[1][3] == 0

    def test_refused(self) -> None:
        layer, ids = qnn.QEmbeddingBag(ROWS, 8), torch.arange(6)
        for given, words in (
            ((ids,), r"input \[N\] needs offsets"),
            ((ids.view(2, 3), torch.tensor([0])), "has a bag in each row; leave offsets out"),
            ((ids, torch.tensor([1, 3])), "offsets must begin with 0, not fall, and end at 6"),
            ((ids, torch.tensor([0, 4, 3])), "offsets must begin with 0, not fall"),
            ((ids, torch.tensor([0, 7])), "offsets must begin with 0, not fall"),
            ((ids.view(2, 3), None, torch.rand(2, 3)), "for mode='sum' alone, got mode='mean'"),
        ):
            with pytest.raises(ValueError, match=words):
                layer(*given)
        layer.mode = "sum"
        with pytest.raises(
            ValueError, match=r"must be torch.float32 as the result, got torch.float16"
        ):
            layer(ids.view(2, 3), None, torch.rand(2, 3).half())
        op, offsets = OPS["int8_weight_embedding_bag"], torch.tensor([0, 4, 3])
        with pytest.raises(ValueError, match="not fall"):  # without the library
            checked(op.name, op.reference, bags=True)(
                ids, offsets, *layer.stored, None, "sum", -1, torch.float32
            )
