"""Quantised tables: rows, bags of rows, and what is tied to them."""

from __future__ import annotations

import copy
import io
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
import qnn.functional as F
from qnn.integrations.compressed_tensors import quantization_config
from qnn.kernels import OPS
from qnn.kernels.cpu import native
from qnn.kernels.formats import FLOATS
from qnn.kernels.reference.embedding import checked
from qnn.kernels.schemes import schemes_of
from qnn.passes import regions

from .common import same_bits

SCHEMES = schemes_of("embedding")
WEIGHT_ONLY = [scheme for scheme in SCHEMES if qnn.SCHEMES[scheme].activation is None]
MODES = ("sum", "mean", "max")
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
        for run in (layer, bag, torch.compile(layer, fullgraph=True, backend="aot_eager")):
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

    @parameterized.expand([(scheme,) for scheme in ("int8_weight", "nvfp4_weight", "int8")])
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

    def test_compiled(self, case: tuple[Any, Any]) -> None:
        layer, _ = case
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


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(9, 32)
        self.middle, self.head = nn.Linear(32, 32), nn.Linear(32, 50)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        y: torch.Tensor = self.head(self.middle(x).tanh())
        return y


def tied(model: Any) -> bool:
    return all(a is b for a, b in zip(model.head.stored, model.words.stored, strict=True))


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in qnn.summary(model).rows if row.reason is not None}


class TestConvert:
    def test_taken_when_named(self) -> None:
        named = "embeddings are taken when named"
        for model in (Tied(), qnn.convert(Tied(), "int8"), qnn.convert(Tied(), {"*": "int8"})):
            assert named in reasons(model)["words"]
            assert named in reasons(model)["places"]
        assert "tied to 'words' (Embedding), which stays in float" in reasons(model)["head"]
        for rules in (
            {"*": "int8", nn.Embedding: "int8_weight"},
            {"*": "int8", "words": "int8", "places": "int8"},
        ):
            assert reasons(qnn.convert(Tied(), rules)) == {}
        some = qnn.convert(Tied(), {nn.Embedding: "int8_weight", "head": "int8"})
        assert reasons(some) == {"middle": "matches no pattern of the scheme map"}
        some = qnn.convert(Tied(), "int8", include=["pl*", "middle"])
        assert set(reasons(some)) == {"words", "head"}
        some = qnn.convert(Tied(), {"*": "int8", nn.Embedding: "int8"}, exclude="places")
        assert reasons(some) == {"places": "matches the exclude pattern 'places'"}
        some = qnn.convert(Tied(), {"*": "int8", nn.Embedding: "int8", "places": None})
        assert set(reasons(some)) == {"places"}
        assert type(qnn.convert(nn.Embedding(4, 4), "fp8")) is qnn.QEmbedding

    def test_a_callable_does_not_name_one(self) -> None:
        """It may be older than the kind, and read what a table does not have."""
        some = qnn.convert(Tied(), "int8", include=lambda name, module: module.in_features == 32)
        assert set(reasons(some)) == {"words", "places", "head"}
        rules = {"*": "int8", nn.Embedding: "int8_weight"}
        some = qnn.convert(Tied(), rules, exclude=lambda name, module: name == "places")
        assert set(reasons(some)) == {"places"}

    def test_what_stays_float(self) -> None:
        class Scaled(nn.Embedding):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return super().forward(input) * 2

        class Same(nn.Embedding):
            pass

        model = nn.ModuleDict({"a": Scaled(8, 8), "b": nn.Linear(8, 8), "c": Same(8, 8)})
        out = qnn.convert(model, {"*": "int8", nn.Embedding: "int8_weight"})
        assert set(reasons(out)) == {"a"}
        assert "Scaled is a subclass of nn.Embedding with a forward" in reasons(out)["a"]
        model = nn.ModuleDict({"a": nn.Embedding(8, 8), "b": nn.Linear(32, 8)})
        out = qnn.convert(model, {"*": "mxfp8", nn.Embedding: "mxfp8"})
        assert "scheme 'mxfp8' has no embedding; 'int8'" in reasons(out)["a"]
        with pytest.raises(ValueError, match=r"a: max_norm=2.0 has each call write"):
            qnn.convert(nn.ModuleDict({"a": nn.Embedding(8, 8, max_norm=2.0)}), {"a": "int8"})
        with pytest.raises(ValueError, match="no embedding layer that trains"):
            qnn.convert(model, "fp8", include=nn.Embedding, training=True)

    @pytest.mark.parametrize(
        "schemes",
        [("int8", "int8_weight"), ("fp8", "fp8"), ("nvfp4_weight",) * 2, ("int4_weight_g32",) * 2],
    )
    @pytest.mark.parametrize("inplace", [False, True])
    def test_ties_are_kept(self, schemes: tuple[str, str], inplace: bool) -> None:
        linear, table = schemes
        model, ids = Tied().eval(), torch.randint(50, (2, 7))
        want = model(ids)
        out: Any = qnn.convert(model, {"*": linear, nn.Embedding: table}, inplace=inplace)
        assert tied(out)
        assert qnn.sqnr(want, out(ids)) > (10 if "4" in table else 20)
        assert same_bits(out.words.weight[ids], out.words(ids))
        for other in (copy.deepcopy(out), saved(out)):
            assert tied(other)
            assert same_bits(other(ids), out(ids))
        assert tied(copy.deepcopy(out).half())
        again: Any = qnn.convert(Tied().eval(), {"*": linear, nn.Embedding: table})
        again.load_state_dict(out.state_dict())
        assert tied(again)
        assert same_bits(again(ids), out(ids))
        rows = {row.name: row for row in qnn.summary(out).rows}
        assert rows["words"].bytes_before == 50 * 32 * 4
        assert rows["head"].bytes_before == 50 * 4  # its bias; the weight is counted once

    def test_ties_of_two_formats_are_refused(self) -> None:
        with pytest.raises(ValueError, match="share one weight but would get the schemes"):
            qnn.convert(Tied(), {"*": "fp8", nn.Embedding: "int8_weight"})

    def test_tying_afterwards(self) -> None:
        """`head.weight = words.weight`, as transformers' `tie_weights` does it."""
        words, head = qnn.QEmbedding(50, 32), qnn.QLinear(32, 50)
        head.weight = words.weight  # type: ignore[assignment]
        assert tied(nn.ModuleDict({"words": words, "head": head}))
        other = qnn.QLinear(32, 50, scheme="fp8")
        other.weight = words.weight  # type: ignore[assignment]  # another format: quantised anew
        assert other.stored[0] is not words.stored[0]
        assert qnn.sqnr(words.weight.clone(), other.weight.clone()) > 20

    def test_described_and_compared(self) -> None:
        model, ids = Tied().eval(), torch.randint(50, (2, 7))
        out = qnn.convert(model, {"*": "int8", nn.Embedding: "int8_weight"})
        groups = quantization_config(out)["config_groups"].values()
        assert "qnn.QEmbedding" in next(g["format"] for g in groups if "words" in g["targets"])
        assert {row.name for row in qnn.compare(model, out, ids).rows} >= {"words", "head"}


class TestTransformers:
    @pytest.mark.parametrize("scheme", ["int8", "nvfp4_weight", "int4_weight_asym_g32"])
    def test_tied_through_a_file(self, scheme: str) -> None:
        transformers = pytest.importorskip("transformers")
        sizes = {"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 600, "n_positions": 32}
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).bfloat16().eval()
        total = sum(p.numel() for p in model.parameters()) * 4
        out = qnn.convert(model, {"*": scheme, nn.Embedding: scheme}, progress=False)
        held = sum(p.numel() * p.itemsize for p in out.parameters())
        assert held <= 0.28 * total
        out.tie_weights()
        assert out.get_input_embeddings().weight.dtype == torch.bfloat16
        with tempfile.TemporaryDirectory() as folder:
            out.save_pretrained(folder)
            again = qnn.load_pretrained(transformers.GPT2LMHeadModel, Path(folder))
        ids = torch.randint(600, (2, 9))
        for each in (out, again):
            pair = nn.ModuleDict({"words": each.transformer.wte, "head": each.lm_head})
            assert tied(pair)
            each.tie_weights()
            assert tied(pair)
        with torch.no_grad():
            assert same_bits(again(ids).logits, out(ids).logits)
