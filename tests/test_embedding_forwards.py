"""Quantised tables of classes that have a forward of their own around `nn.Embedding`'s."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qnn
from qnn.passes import regions

from .common import same_bits
from .test_embedding import saved

TABLES = {nn.Embedding: "int8_weight"}


class Scaled(nn.Embedding):
    """With a float as its scale, as Bart's."""

    def __init__(self, rows: int, columns: int, scale: float) -> None:
        super().__init__(rows, columns, padding_idx=0)
        self.embed_scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class Buffered(nn.Embedding):
    """With a buffer that is not saved, as Gemma's."""

    embed_scale: torch.Tensor

    def __init__(self, rows: int, columns: int, scale: float) -> None:
        super().__init__(rows, columns)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class Places(nn.Embedding):
    """With an offset, and a row of its own that is trained."""

    def __init__(self, rows: int, columns: int, scale: float) -> None:
        super().__init__(rows + 2, columns)
        self.offset, self.first = 2, nn.Parameter(torch.full((columns,), scale))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = super().forward(ids.to(self.weight.device) + self.offset)
        return torch.where(ids.unsqueeze(-1) == 0, self.first, y)


CLASSES = [Scaled, Buffered, Places]


class ReadsTheTable(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + self.weight.mean()


class PastSuper(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(input, self.weight) * 2


class HoldsModule(nn.Embedding):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.norm = nn.LayerNorm(columns)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(super().forward(input))
        return y


class OtherState(Scaled):
    def extra_repr(self) -> str:
        return "mine"


def made(kind: Any, scheme: str = "int8_weight") -> tuple[nn.Module, Any, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(kind(50, 32, 5.5), nn.Identity()).eval()
    return model, qnn.convert(model, {nn.Embedding: scheme}), torch.randint(50, (3, 4))


@pytest.mark.parametrize("kind", CLASSES)
class TestTaken:
    @pytest.mark.parametrize("scheme", ["int8_weight", "nvfp4_weight"])
    def test_as_the_float_class_over_the_decoded_table(self, kind: Any, scheme: str) -> None:
        model, out, ids = made(kind, scheme)
        layer: Any = out[0]
        assert isinstance(layer, kind)
        assert isinstance(layer, qnn.QEmbedding)
        back = layer.dequantize()
        assert type(back) is kind
        assert not isinstance(back, qnn.QEmbedding)
        assert same_bits(layer(ids), back(ids))
        assert qnn.sqnr(model(ids), out(ids)) > (40 if "int8" in scheme else 10)
        assert type(model[0]) is kind  # type: ignore[index]
        (row,) = qnn.summary(out).rows
        assert (row.scheme, row.reason) == (scheme, None)
        half = copy.deepcopy(out).bfloat16()
        assert half(ids).dtype == torch.bfloat16
        assert same_bits(half(ids), half[0].dequantize()(ids))

    def test_copies_and_state(self, kind: Any) -> None:
        model, out, ids = made(kind)
        for each in (copy.deepcopy(out), saved(out), qnn.convert(copy.deepcopy(model), TABLES)):
            assert type(each[0]) is type(out[0])
            assert same_bits(each(ids), out(ids))
        assert out.state_dict().keys() == {*model.state_dict(), "0.weight_scale"}
        fresh: Any = qnn.convert(nn.Sequential(kind(50, 32, 5.5)), TABLES)
        for state in (out.state_dict(), model.state_dict()):  # floats are quantised on the way in
            fresh.load_state_dict(state)
            assert same_bits(fresh(ids), out(ids))
        inplace: Any = qnn.convert(model, TABLES, inplace=True)
        assert same_bits(inplace(ids), out(ids))

    def test_graphs(self, kind: Any) -> None:
        _, out, ids = made(kind)
        compiled = torch.compile(out, fullgraph=True, dynamic=True, backend="aot_eager")
        for each in (ids, ids[:2]):
            assert same_bits(compiled(each), out(each))
        for strict in (True, False):
            program = torch.export.export(out, (ids,), strict=strict)
            assert same_bits(program.module()(ids), out(ids))
            # What asks for a dtype alone leaves a node without users.
            (region,) = regions(program.run_decompositions())
            assert region.scheme == "int8_weight"
        names = {str(node.target) for node in program.run_decompositions().graph.nodes}
        assert not [name for name in names if "dequantize" in name]

    def test_the_forward_runs_once(self, kind: Any) -> None:
        """Where the layer is a leaf of torch.fx, and of jagged ids."""
        _, out, ids = made(kind)
        traced = torch.fx.symbolic_trace(out)
        assert same_bits(traced(ids), out(ids))
        if kind is Places:
            return  # `where` of jagged tensors
        rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
        jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
        assert same_bits(out(jagged).values(), out(torch.cat(rows)))


class TestLeft:
    def test_the_reasons(self) -> None:
        model = nn.ModuleDict(
            {
                "reads": ReadsTheTable(8, 8),
                "past": PastSuper(8, 8),
                "holds": HoldsModule(8, 8),
                "state": OtherState(8, 8, 2.0),
                "plain": nn.Embedding(8, 8),
            }
        )
        out = qnn.convert(model, TABLES)
        reasons = {row.name: row.reason for row in qnn.summary(out).rows if row.reason}
        del reasons["holds.norm"]
        for name, words in (
            ("reads", "ReadsTheTable reads the table by itself"),
            ("past", "PastSuper is a subclass of nn.Embedding with a forward that does not call"),
            ("holds", "HoldsModule is a subclass of nn.Embedding that holds 'norm'"),
            ("state", "OtherState is a subclass of nn.Embedding that has its own extra_repr"),
        ):
            assert words in reasons.pop(name)
        assert not reasons

    def test_not_by_surprise(self) -> None:
        out = qnn.convert(nn.Sequential(Scaled(8, 8, 2.0), nn.Linear(8, 8)), "int8")
        assert type(out[0]) is Scaled  # type: ignore[index]


def _bart(transformers: Any) -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "vocab_size": 90}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "scale_embedding": True}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads))


def _gemma(transformers: Any) -> Any:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 90, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))


class TestTransformers:
    @pytest.mark.parametrize("build", [_bart, _gemma])
    def test_tied_through_a_file(self, build: Any) -> None:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        model = build(transformers).eval()
        ids = torch.randint(3, 90, (2, 7))
        out: Any = qnn.convert(model, {"*": "int8", nn.Embedding: "int8_weight"}, progress=False)
        tables = [m for m in out.modules() if isinstance(m, nn.Embedding)]
        assert all(isinstance(table, qnn.QEmbedding) for table in tables)
        with tempfile.TemporaryDirectory() as folder:
            out.save_pretrained(folder)
            again = qnn.load_pretrained(type(model), Path(folder))
        with torch.no_grad():
            want, got = model(ids).logits, out(ids).logits
            assert qnn.sqnr(want, got) > 20
            assert same_bits(again(ids).logits, got)
        for each in (out, again):
            words, head = each.get_input_embeddings(), each.get_output_embeddings()
            assert all(a is b for a, b in zip(words.stored, head.stored, strict=True))
            scales = [m.embed_scale for m in each.modules() if hasattr(m, "embed_scale")]
            assert all(abs(float(scale) - 32**0.5) < 1e-6 for scale in scales)
            assert len(scales) >= 1
