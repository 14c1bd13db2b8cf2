"""The layers that hide in a model: what stays float says why, and what to do, and that is true."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.nn.utils import parametrizations, prune

import qnn


def reason(layer: nn.Module) -> str:
    """What summary says of a layer that stays float, converted beside a linear one."""
    model = qnn.convert(nn.ModuleDict({"layer": layer, "linear": nn.Linear(4, 4)}))
    return next(str(row.reason) for row in qnn.summary(model).rows if row.name == "layer")


class TestReasons:
    def test_bilinear(self) -> None:
        layer = nn.Bilinear(5, 6, 4)
        assert "nn.Linear(in1 * in2, out) with its weight.flatten(1)" in reason(layer)
        linear = nn.Linear(5 * 6, 4)
        linear.weight, linear.bias = nn.Parameter(layer.weight.flatten(1).detach()), layer.bias
        x1, x2 = torch.randn(3, 5), torch.randn(3, 6)
        outer = (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)
        torch.testing.assert_close(linear(outer), layer(x1, x2))
        assert qnn.sqnr(layer(x1, x2), qnn.convert(linear)(outer)) > 30

    @parameterized.expand([("tanh",), ("relu",)])
    def test_rnn(self, nonlinearity: str) -> None:
        layer = nn.RNN(5, 6, nonlinearity=nonlinearity)
        cell = nn.RNNCell(5, 6, nonlinearity=nonlinearity)
        assert "an nn.GRU in its place converts" in reason(layer)
        assert "two nn.Linear, for input and state, compute the same" in reason(cell)
        pair = nn.ModuleDict({"x": nn.Linear(5, 6), "h": nn.Linear(6, 6)})
        pair["x"].weight, pair["x"].bias = cell.weight_ih, cell.bias_ih
        pair["h"].weight, pair["h"].bias = cell.weight_hh, cell.bias_hh
        small = qnn.convert(pair)
        x, h = torch.randn(3, 5), torch.randn(3, 6)
        for found, bound in ((pair, 100), (small, 30)):
            got = getattr(torch, nonlinearity)(found["x"](x) + found["h"](h))
            assert qnn.sqnr(cell(x, h), got) > bound

    @pytest.mark.parametrize(
        ("wrap", "words", "undo"),
        [
            (
                parametrizations.weight_norm,
                "remove_parametrizations",
                lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
            ),
            (
                parametrizations.orthogonal,
                "remove_parametrizations",
                lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
            ),
            (nn.utils.weight_norm, "remove_weight_norm", nn.utils.remove_weight_norm),
            (nn.utils.spectral_norm, "remove_spectral_norm", nn.utils.remove_spectral_norm),
            (
                lambda m: prune.l1_unstructured(m, "weight", 0.5),
                r"prune.remove\(layer, name\)",
                lambda m: prune.remove(m, "weight"),
            ),
        ],
        ids=["weight_norm", "orthogonal", "old_weight_norm", "old_spectral_norm", "prune"],
    )
    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_parametrised(self, wrap: Any, words: str, undo: Any) -> None:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        wrap(model[0])
        with pytest.raises(ValueError, match=f"0: it .*call .*{words}"):
            qnn.convert(model)
        told = next(row.reason for row in qnn.summary(model).rows if row.name == "0")
        assert re.search(f"call .*{words}", str(told))
        undo(model[0])
        small, x = qnn.convert(model), torch.randn(3, 6)
        assert all(isinstance(layer, qnn.QLinear) for layer in small)
        assert qnn.sqnr(model(x), small(x)) > 25


class TestCellsInALoop:
    """A decoder as of Tacotron 2: two LSTM cells, most of its weights."""

    @parameterized.expand([("int8",), ("int8_weight",), ("int8_static",)])
    def test_share_of_the_weights(self, scheme: str) -> None:
        class Decoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.prenet = nn.Linear(8, 16)
                self.attention, self.decoder = nn.LSTMCell(32, 64), nn.LSTMCell(64, 64)
                self.frame = nn.Linear(64, 8)

            def forward(self, memory: torch.Tensor) -> torch.Tensor:
                first = second = None
                frame, frames = memory.new_zeros(memory.shape[1], 8), []
                for step in memory:
                    given = torch.cat([self.prenet(frame).relu(), step], -1)
                    first = self.attention(given, first)
                    second = self.decoder(first[0], second)
                    frame = self.frame(second[0])
                    frames.append(frame)
                return torch.stack(frames)

        model, memory = Decoder().eval(), torch.randn(6, 3, 16)
        if scheme == "int8_static":
            small = qnn.convert(qnn.calibrate(qnn.prepare(model), [memory]))
        else:
            small = qnn.convert(model, scheme)
        table = qnn.summary(small)
        assert all(row.scheme == scheme for row in table.rows)
        assert table.bytes_after < 0.32 * table.bytes_before
        assert qnn.sqnr(model(memory), small(memory)) > 20
