"""A kind of layer that is registered from outside goes through all verbs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn import functional as F
from qnn.integrations.compressed_tensors import quantization_config
from qnn.kinds import known_kinds, unregister_kind

from .common import same_bits


class QEmbedding(qnn.Quantized):
    """Looks up rows of a quantised table."""

    def __init__(self, rows: int, columns: int, scheme: str = "int8_weight") -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.scheme = rows, columns, scheme
        self.dtype = torch.get_default_dtype()
        self._empty_weights(None)

    def _weight_shapes(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.num_embeddings, self.embedding_dim)}

    def _backend(self) -> str:
        return "rows decoded in torch operations"

    @property
    def _who(self) -> str:
        return f"QEmbedding({self.num_embeddings}, {self.embedding_dim})"

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = [self._parameters[name][tokens] for name, _ in self._parts_of("weight")]  # type: ignore[index]
        return F.dequantize(*parts, self.dtype, scheme=self.scheme)


class EmbeddingKind(qnn.Kind):
    name = "embedding"
    floats = (nn.Embedding,)
    titles = ("nn.Embedding",)
    quantized = (QEmbedding,)

    def names(self, module: nn.Module) -> tuple[str, ...]:
        return ("weight",)

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        if scheme != "int8_weight" and not training:
            return f"scheme {scheme!r} has no embedding"
        return super().why_left(module, scheme, named=named, training=training)

    def quantize(self, layer: Any, scheme: str, own: Any) -> QEmbedding:
        made = QEmbedding(*layer.weight.shape, scheme)
        made.weight = layer.weight.detach()
        return made.train(layer.training)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.table(tokens))
        return y


class TestRegistered:
    @pytest.fixture(autouse=True)
    def _registered(self) -> Iterator[None]:
        kind = qnn.register_kind(EmbeddingKind())
        self.model, self.tokens = Model().eval(), torch.randint(30, (4, 7))
        yield
        unregister_kind(kind)

    def test_convert_summary_compare(self) -> None:
        converted = qnn.convert(self.model, "int8_weight")
        assert isinstance(converted.table, QEmbedding)
        assert isinstance(self.model.table, nn.Embedding)
        table, _ = qnn.summary(converted).rows
        row = table.layer, table.scheme, table.shape
        assert row == ("QEmbedding", "int8_weight", (30, 16))
        assert (table.bytes_before, table.bytes_after) == (30 * 16 * 4, 30 * (16 + 4))
        assert table.backend == "rows decoded in torch operations"
        comparison = qnn.compare(self.model, converted, self.tokens)
        assert {row.name for row in comparison.rows} == {"table", "head", "(output)"}
        assert all(row.sqnr > 35 for row in comparison.rows if not math.isnan(row.sqnr))
        assert "rows decoded" in repr(converted)

    def test_what_a_scheme_has_not(self) -> None:
        converted = qnn.convert(self.model, "fp8")
        assert isinstance(converted.table, nn.Embedding)
        reason = next(r.reason for r in qnn.summary(converted).rows if r.name == "table")
        assert reason == "scheme 'fp8' has no embedding"
        trained = qnn.convert(self.model, "fp8", training=True)
        reason = next(r.reason for r in qnn.summary(trained).rows if r.name == "table")
        assert reason == "there is no embedding layer that trains in low precision"

    def test_prepare_leaves_it(self) -> None:
        prepared = qnn.calibrate(qnn.prepare(self.model), [self.tokens], progress=False)
        converted = qnn.convert(prepared)
        assert isinstance(converted.table, nn.Embedding)
        assert isinstance(converted.head, qnn.QLinear)
        reason = next(r.reason for r in qnn.summary(prepared).rows if r.name == "table")
        assert reason == "there is no observed embedding layer"

    def test_save_and_load(self) -> None:
        converted = qnn.convert(self.model, "int8_weight")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "state.pt")
            torch.save(converted.state_dict(), path)
            torch.manual_seed(1)
            other = qnn.convert(Model().eval(), "int8_weight")
            other.load_state_dict(torch.load(path, weights_only=True))
        assert same_bits(other(self.tokens), converted(self.tokens))
        torch.manual_seed(1)
        again = qnn.convert(Model().eval(), "int8_weight")
        again.load_state_dict(self.model.state_dict())  # quantised on the way in
        assert same_bits(again(self.tokens), converted(self.tokens))
        state = converted.state_dict()
        del state["table.weight_scale"]
        with pytest.raises(RuntimeError, match="the state has no weight_scale"):
            again.load_state_dict(state, strict=False)

    def test_described_as_what_others_do_not_know(self) -> None:
        described = quantization_config(qnn.convert(self.model, "int8_weight"))
        kinds = {tuple(g["targets"]): g["format"] for g in described["config_groups"].values()}
        assert "QEmbedding" in kinds[("table",)]
        assert "QEmbedding" not in kinds[("head",)]

    def test_tied_layers_stay_float(self) -> None:
        model = nn.ModuleDict({"a": nn.Embedding(16, 16), "b": nn.Linear(16, 16, bias=False)})
        model["b"].weight = model["a"].weight
        with pytest.raises(ValueError, match="its weight is tied to 'b'"):
            qnn.convert(model, "int8_weight")

    def test_the_weight_view(self) -> None:
        layer = qnn.convert(self.model, "int8_weight").table
        assert (layer.weight.dtype, layer.weight.shape) == (torch.float32, (30, 16))
        layer.weight = torch.zeros(30, 16)
        assert not layer(self.tokens).any()

    def test_compiled(self) -> None:
        converted = qnn.convert(self.model, "int8_weight")
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(self.tokens), converted(self.tokens))

    def test_errors_name_it(self) -> None:
        with pytest.raises(ValueError, match=r"no nn.Linear, .*nn.GRU or nn.Embedding"):
            qnn.convert(nn.Sequential(nn.ReLU()))


class TestRegistry:
    def test_refused(self) -> None:
        with pytest.raises(TypeError, match=r"takes a qnn.Kind, got type"):
            qnn.register_kind(EmbeddingKind)  # type: ignore[arg-type]
        for known in known_kinds():
            with pytest.raises(ValueError, match=f"there is a kind '{known.name}' already"):
                qnn.register_kind(known)

    @parameterized.expand([(kind.name, kind) for kind in known_kinds()])
    def test_known(self, _: str, kind: qnn.Kind) -> None:
        assert kind.quantized
        assert all(issubclass(each, qnn.Quantized) for each in kind.quantized)

    def test_verbs_name_no_layer(self) -> None:
        """They ask the kind: only torch's own classes that need another treatment are named."""
        folder = Path(qnn.__file__).parent / "verbs"
        for path in folder.glob("*.py"):
            text = path.read_text()
            for name in ("QLinear", "QLSTM", "QRecurrent", "ObservedLinear", "is_recurrent"):
                asked = [line for line in text.splitlines() if "isinstance(" in line]
                assert [line for line in asked if name in line] == [], path.name
            assert "from qnn.nn.linear" not in text, path.name
            assert "from qnn.nn.recurrent" not in text, path.name
