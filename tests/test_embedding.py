"""Quantised tables: their rows, and the layer of one table."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
import qnn.functional as F
from qnn.kernels import OPS
from qnn.kernels.cpu import native
from qnn.kernels.formats import FLOATS
from qnn.kernels.reference.embedding import checked
from qnn.kernels.schemes import schemes_of
from qnn.passes import regions

from .common import same_bits

SCHEMES = schemes_of("embedding")
WEIGHT_ONLY = [scheme for scheme in SCHEMES if qnn.SCHEMES[scheme].activation is None]
ROWS = 37


def columns(scheme: str, about: int = 37) -> int:
    multiple = qnn.SCHEMES[scheme].weight.columns_multiple_of
    return max(1, about // multiple) * multiple


def table(scheme: str = "int8_weight", about: int = 37, **options: Any) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, columns(scheme, about), **options)


def saved(value: Any) -> Any:
    """What `torch.save` and `torch.load` make of it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestRows:
    @parameterized.expand(
        [(f"{s}, {d}, {n}", s, d, n) for s in WEIGHT_ONLY for d in FLOATS for n in (37, 700)]
    )
    def test_are_those_of_the_decoded_table(
        self, _: str, scheme: str, dtype: torch.dtype, about: int
    ) -> None:
        layer = qnn.QEmbedding.from_float(table(scheme, about).to(dtype), scheme)
        whole = layer.dequantize().weight
        for ids in (
            torch.randint(ROWS, (3, 5)),
            torch.randint(ROWS, (7,), dtype=torch.int32),
            torch.tensor(ROWS - 1),
            torch.randint(ROWS, (4, 6)).T,  # not contiguous
            torch.zeros(0, 3, dtype=torch.int64),
        ):
            y = layer(ids)
            assert y.shape == (*ids.shape, layer.embedding_dim)
            assert same_bits(y, whole[ids.long()].contiguous())
            assert not y.requires_grad

    @parameterized.expand(
        [
            (f"{scheme}, {tier}", scheme, tier)
            for scheme in WEIGHT_ONLY
            for tier in ("avx2", "portable")
        ]
    )
    def test_every_tier(self, _: str, scheme: str, tier: str) -> None:
        if dict(native.ready().tiers).get(tier) != "ok":
            pytest.skip(f"no {tier} kernels here")
        form = qnn.SCHEMES[scheme].weight
        name, ids = f"{form.key}_weight_embedding".replace("float8_e4m3", "fp8"), torch.arange(ROWS)
        assert name in OPS
        for about in (37, 520):
            parts = F.quantize(table(scheme, about).weight, scheme)
            for dtype in FLOATS:
                extra = parts[2] if len(parts) > 2 else None
                y = torch.ops.qnn.cpu_embedding(ids, *parts[:2], extra, name, dtype, tier)
                assert same_bits(y, F.dequantize(parts, dtype=dtype, scheme=scheme))

    def test_a_code_of_nan_is_one_value(self) -> None:
        q, scale = F.quantize(torch.randn(3, 40), "fp8_weight")
        q.view(torch.uint8)[1, 7] = 127
        y = F.embedding(torch.tensor([0, 1]), (q, scale), scheme="fp8_weight")
        assert y.isnan().nonzero().tolist() == [[1, 7]]
        want = F.dequantize((q[:2], scale[:2]), scheme="fp8_weight")
        torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)

    def test_threads_change_no_bit(self) -> None:
        layer, ids = qnn.QEmbedding(500, 512), torch.randint(500, (1000,))
        bags = qnn.QEmbeddingBag.from_pretrained(layer.weight.clone(), mode="sum")
        offsets = torch.tensor([0, 0, 1, 500, 500, 900, 1000, 1000])
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append((layer(ids), bags(ids, offsets)))
        finally:
            torch.set_num_threads(threads)
        for rows, sums in found[1:]:
            assert same_bits(rows, found[0][0])
            assert same_bits(sums, found[0][1])

    def test_no_float_table(self) -> None:
        layer = qnn.QEmbedding(2000, 64)
        with torch.profiler.profile(profile_memory=True) as profile:
            layer(torch.tensor([5, 6]))
        assert sum(max(0, event.cpu_memory_usage) for event in profile.events()) < 2000 * 64

    @pytest.mark.parametrize("bad", [-1, ROWS, 2**40])
    def test_an_id_that_is_no_row(self, bad: int) -> None:
        ids, words = (
            torch.tensor([[0, 1], [bad, 2]]),
            rf"id {bad}, at position 2.*table of {ROWS} rows",
        )
        layer, bag = qnn.QEmbedding(ROWS, 16), qnn.QEmbeddingBag(ROWS, 16)
        runs: list[Any] = [layer, bag]
        if bad < 0:
            runs.append(torch.compile(layer, fullgraph=True, backend="aot_eager"))
        for run in runs:
            with pytest.raises(IndexError, match=words):
                run(ids)
        op = OPS["int8_weight_embedding"]
        with pytest.raises(IndexError, match=words):  # without the library
            checked(op.name, op.reference)(ids, *layer.stored, torch.float32)

    def test_what_are_no_ids(self) -> None:
        layer = qnn.QEmbedding(ROWS, 16)
        for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            with pytest.raises(
                Exception, match=r"QEmbedding\(37, 16.*int64 or int32, got torch.float"
            ):
                run(torch.ones(3))
        with pytest.raises(TypeError, match="the input must be a tensor, got list"):
            layer([1, 2])

    def test_jagged(self) -> None:
        layer = qnn.QEmbedding(ROWS, 16)
        ids = torch.nested.nested_tensor(
            [torch.tensor([1, 2, 3]), torch.tensor([4])], layout=torch.jagged
        )
        rows = layer(ids).unbind()
        assert same_bits(rows[0], layer(torch.tensor([1, 2, 3])))
        assert same_bits(rows[1], layer(torch.tensor([4])))


class TestLayer:
    @parameterized.expand([(scheme,) for scheme in SCHEMES])
    def test_state(self, scheme: str) -> None:
        """The state of a `QLinear` of these sizes."""
        layer = qnn.QEmbedding.from_float(table(scheme), scheme)
        linear = qnn.QLinear(layer.embedding_dim, ROWS, False, scheme=scheme)
        want = {k: v for k, v in linear.state_dict().items() if k.startswith("weight")}
        found = layer.state_dict()
        assert found.keys() == want.keys()
        assert all((found[k].shape, found[k].dtype) == (v.shape, v.dtype) for k, v in want.items())
        again = qnn.QEmbedding(ROWS, layer.embedding_dim, scheme=scheme)
        again.load_state_dict(saved(layer.state_dict()))
        ids = torch.arange(ROWS)
        assert same_bits(again(ids), layer(ids))
        fresh = qnn.QEmbedding(ROWS, layer.embedding_dim, scheme=scheme)
        fresh.load_state_dict(table(scheme).state_dict())  # quantised on the way in
        assert same_bits(fresh(ids), layer(ids))
        for other in (copy.deepcopy(layer), saved(layer)):
            assert same_bits(other(ids), layer(ids))
        assert same_bits(layer.weight[ids], layer(ids))

    def test_casts_and_meta(self) -> None:
        layer, ids = qnn.QEmbedding.from_float(table()), torch.arange(5)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            cast = copy.deepcopy(layer).to(dtype)
            assert cast(ids).dtype == cast.weight.dtype == cast.dtype == dtype
            assert cast.weight_scale.dtype == torch.float32
        meta = qnn.QEmbedding(ROWS, 16, device="meta")
        assert meta(ids.to("meta")).shape == (5, 16)
        assert "meta" in repr(meta)

    def test_padding_and_repr(self) -> None:
        layer = qnn.QEmbedding(ROWS, 8, padding_idx=-1)
        assert layer.padding_idx == ROWS - 1
        assert not layer(torch.tensor(ROWS - 1)).any()
        assert repr(layer).startswith("QEmbedding(37, 8, padding_idx=36, scheme='int8_weight')")
        bag = qnn.QEmbeddingBag(ROWS, 8, mode="max", scheme="int8", dtype=torch.bfloat16)
        assert repr(bag).startswith(
            "QEmbeddingBag(37, 8, mode='max', dtype=torch.bfloat16, scheme='int8')"
        )

    def test_back_to_float(self) -> None:
        given: dict[str, Any] = {"padding_idx": 3, "sparse": True, "scale_grad_by_freq": True}
        back = qnn.QEmbedding.from_float(table(**given).eval()).dequantize()
        assert type(back) is nn.Embedding
        assert not back.training
        assert {name: getattr(back, name) for name in given} == given
        bag = nn.EmbeddingBag(ROWS, 8, mode="sum", include_last_offset=True, padding_idx=2)
        back = qnn.QEmbeddingBag.from_float(bag).dequantize()
        assert (back.mode, back.include_last_offset, back.padding_idx) == ("sum", True, 2)

    def test_from_pretrained(self) -> None:
        weight = torch.randn(ROWS, 8)
        assert same_bits(
            qnn.QEmbedding.from_pretrained(weight, padding_idx=1)(torch.arange(ROWS)),
            F.dequantize(F.quantize(weight)),
        )
        with pytest.raises(ValueError, match="freeze=False: a quantised table cannot be trained"):
            qnn.QEmbedding.from_pretrained(weight, freeze=False)

    def test_refused(self) -> None:
        for call, words in (
            (lambda: qnn.QEmbedding(4, 8, max_norm=1.0), "max_norm=1.0 has each call write into"),
            (lambda: qnn.QEmbeddingBag.from_float(nn.EmbeddingBag(4, 8, max_norm=1.0)), "max_norm"),
            (lambda: qnn.QEmbedding(4, 8, scheme="mxfp8"), "scheme 'mxfp8' has no embedding; use"),
            (lambda: qnn.QEmbedding(4, 40, scheme="int4_weight_g32"), "multiple of 32, got 40"),
            (lambda: qnn.QEmbedding(0, 8), "num_embeddings must be an integer, at least 1, got 0"),
            (
                lambda: qnn.QEmbedding(4, 8, padding_idx=4),
                r"padding_idx must be a row, -4 … 3, got",
            ),
            (lambda: qnn.QEmbeddingBag(4, 8, mode="min"), "mode must be 'sum', 'mean' or 'max'"),
            (
                lambda: qnn.QEmbedding.from_pretrained(torch.full((2, 2), torch.nan)),
                "NaN or inf in",
            ),
        ):
            with pytest.raises(ValueError, match=words):
                call()
        with pytest.raises(TypeError, match=r"takes an nn.Embedding, got Linear"):
            qnn.QEmbedding.from_float(nn.Linear(2, 2))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="cannot be trained"):
            qnn.QEmbedding(4, 8).requires_grad_(True)

    @parameterized.expand([(scheme,) for scheme in ("int8", "nvfp4_weight")])
    def test_graphs(self, scheme: str) -> None:
        model = nn.Sequential(qnn.QEmbedding.from_float(table(scheme), scheme)).eval()
        ids = torch.randint(ROWS, (3, 5))
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for each in (ids, ids[:2, :4], ids[:0], torch.randint(ROWS, (6, 2))):
            assert same_bits(compiled(each), model(each))
        batch = torch.export.Dim("batch")
        for strict in (True, False):
            program = torch.export.export(
                model, (ids,), dynamic_shapes=({0: batch},), strict=strict
            )
            assert same_bits(program.module()(ids[:2]), model(ids[:2]))
            (region,) = regions(program)
            assert region.scheme == scheme
            assert region.op.name == qnn.SCHEMES[scheme].op("embedding")

    def test_inductor(self) -> None:
        model, ids = nn.Sequential(qnn.QEmbedding(ROWS, 32), nn.Tanh()), torch.randint(ROWS, (3, 5))
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(ids), model(ids))
        with pytest.raises(IndexError, match="id 99"):
            compiled(ids + 99 - ids)

    def test_vmap(self) -> None:
        layer, ids = qnn.QEmbedding(ROWS, 8), torch.randint(ROWS, (4, 3))
        assert same_bits(torch.vmap(layer)(ids), layer(ids))
