"""Quantised tables in models: which are taken, what is tied to them, files, bytes."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qnn
from qnn.integrations.compressed_tensors import quantization_config

from .common import same_bits
from .test_embedding import saved


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
        class Same(nn.Embedding):
            pass

        class Bag(nn.EmbeddingBag):
            def forward(self, *given: Any) -> torch.Tensor:
                return super().forward(*given) * 2

        model = nn.ModuleDict({"a": Bag(8, 8), "b": nn.Linear(8, 8), "c": Same(8, 8)})
        rules = {"*": "int8", nn.Embedding: "int8_weight", nn.EmbeddingBag: "int8_weight"}
        out = qnn.convert(model, rules)
        assert set(reasons(out)) == {"a"}
        assert "Bag is a subclass of nn.EmbeddingBag with a forward" in reasons(out)["a"]
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
