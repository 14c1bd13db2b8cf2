"""Recurrent layers over other formats of weights than int8's: all of it follows from the format."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qnn
from qnn.kernels import OPS, SCHEMES, Scheme, get_scheme
from qnn.kernels.declare import recurrent
from qnn.kernels.reference.recurrent import CELLS

# A scale per channel, per tensor, exponents per group, two values a byte with a second scale, and
# eight a word with zero points.
FORMATS = ("fp8_weight", "fp8_tensor", "mxfp8", "nvfp4_weight", "int4_weight_asym_g32")
LAYERS: dict[str, tuple[Any, Any]] = {"LSTM": (nn.LSTM, qnn.QLSTM), "GRU": (nn.GRU, qnn.QGRU)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"num_layers": 2, "bidirectional": True, "bias": False},
    "projected": {"proj_size": 32},
}
CASES = [
    (base, cell, options)
    for base in FORMATS
    for cell in LAYERS
    for options in OPTIONS
    if cell == "LSTM" or options != "projected"
]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


@pytest.fixture(scope="module", autouse=True)
def _schemes() -> Iterator[None]:
    """For each format a scheme `test_…` of weights alone with recurrent layers, in this file."""
    before = set(OPS)
    for base in FORMATS:
        known, name = get_scheme(base), f"test_{base}"
        linear = OPS[OPS[known.linear].backward["x"]].backward["dy"]  # activations as they are
        ops = {"linear": linear, **{cell: f"{name}_{cell}" for cell in CELLS}}
        SCHEMES[name] = Scheme(name, known.weight, None, ops, known.compressed_format)
        for cell in CELLS.values():
            recurrent.declare(cell, SCHEMES[name])
    yield
    for base in FORMATS:
        del SCHEMES[f"test_{base}"]
    for name in set(OPS) - before:
        del OPS[name]


def pair(base: str, cell: str, options: str = "plain", sizes: tuple[int, int] = (32, 64)) -> Any:
    """A quantised layer, and the float one with the weights that it stands for."""
    float_class, quantized = LAYERS[cell]
    made = quantized.from_float(float_class(*sizes, **OPTIONS[options]).eval(), f"test_{base}")
    return made, made.dequantize()


def assert_close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


class TestLayers:
    @pytest.mark.parametrize(("base", "cell", "options"), CASES)
    def test_is_the_float_layer_over_decoded_weights(
        self, base: str, cell: str, options: str
    ) -> None:
        layer, plain = pair(base, cell, options)
        x = torch.randn(7, 3, 32)
        got, want = layer(x), plain(x)
        assert_close(got, want)
        assert_close(layer(x[:, 0], None), plain(x[:, 0], None))

    @pytest.mark.parametrize("cell", LAYERS)
    def test_odd_sizes(self, cell: str) -> None:
        layer, plain = pair("fp8_weight", cell, sizes=(19, 37))
        x = torch.randn(5, 2, 19)
        assert_close(layer(x), plain(x))

    @pytest.mark.parametrize(("base", "cell", "options"), CASES)
    def test_gradients(self, base: str, cell: str, options: str) -> None:
        """To the input, the states and the biases, those of the float layer."""
        layer, plain = pair(base, cell, options)
        x, found = torch.randn(4, 3, 32), []
        _, states = plain(x)
        for each in (layer, plain):
            given, hx = x.clone().requires_grad_(), []
            for state in states if isinstance(states, tuple) else (states,):
                hx.append(torch.full_like(state, 0.5, requires_grad=True))
            y, _ = each(given, tuple(hx) if cell == "LSTM" else hx[0])
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            biases = [p.grad for n, p in each.named_parameters() if n.startswith("bias")]
            found.append([given.grad, *(state.grad for state in hx), *biases])
        for got, want in zip(*found, strict=True):
            assert_close(got, want)

    @pytest.mark.parametrize("cell", LAYERS)
    @pytest.mark.parametrize("base", FORMATS)
    def test_state(self, base: str, cell: str) -> None:
        """Under the format's own names, there and back; a float state is quantised."""
        layer, plain = pair(base, cell)
        form = get_scheme(layer.scheme).weight
        want = {f"weight_{w}_l0{part.suffix}" for w in ("ih", "hh") for part in form.on_disk}
        state = layer.state_dict()
        assert set(state) == want | {"bias_ih_l0", "bias_hh_l0"}
        for part in form.on_disk:
            held = state[f"weight_hh_l0{part.suffix}"]
            assert (held.dtype, tuple(held.shape)) == (part.dtype, part.shape(*layer.matrix))
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other = LAYERS[cell][1](32, 64, scheme=layer.scheme)
        other.load_state_dict(torch.load(file, weights_only=True))
        x = torch.randn(4, 3, 32)
        assert torch.equal(other(x)[0], layer(x)[0])
        half = copy.deepcopy(layer).half()
        assert half.bias_ih_l0.dtype == half.weight_ih_l0.dtype == torch.float16
        assert all(torch.equal(half.state_dict()[name], state[name]) for name in want)
        assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])
        other.load_state_dict(plain.state_dict())
        assert_close(other(x), plain(x))
        wrong = LAYERS[cell][1](32, 64)
        with pytest.raises(RuntimeError, match="with the scheme that the checkpoint was saved"):
            wrong.load_state_dict(state)

    @pytest.mark.parametrize("cell", LAYERS)
    @pytest.mark.parametrize("base", FORMATS)
    def test_weight_view(self, base: str, cell: str) -> None:
        layer, plain = pair(base, cell)
        assert torch.equal(layer.weight_ih_l0.clone(), plain.weight_ih_l0)
        layer.weight_ih_l0 = torch.zeros(layer.weight_ih_l0.shape)
        assert not layer.weight_ih_l0.clone().any()
        with pytest.raises(ValueError, match="weight_ih_l0 holds NaN or inf in row 0"):
            layer.weight_ih_l0.data = torch.full(layer.weight_ih_l0.shape, torch.nan)

    @pytest.mark.parametrize("cell", LAYERS)
    @pytest.mark.parametrize("base", ["fp8_weight", "int4_weight_asym_g32"])
    def test_graphs(self, base: str, cell: str) -> None:
        layer, _ = pair(base, cell)
        x = torch.randn(4, 3, 32)
        y = layer(x)[0]
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x)[0], y)
        given = x.clone().requires_grad_()
        compiled(given)[0].sum().backward()
        want = x.clone().requires_grad_()
        layer(want)[0].sum().backward()
        assert_close(given.grad, want.grad)
        exported = torch.export.export(layer, (x,))
        assert torch.equal(exported.module()(x)[0], y)
        assert sum("invoke_quant" in str(node.target) for node in exported.graph.nodes) == 1

    def test_refuses(self) -> None:
        layer, _ = pair("int4_weight_asym_g32", "LSTM")
        with pytest.raises(TypeError, match="int8, a storage dtype"):
            layer(torch.ones(4, 3, 32, dtype=torch.int8))
        with pytest.raises(ValueError, match="weight_ih_l0: in_features must be a multiple of 32"):
            qnn.QLSTM(33, 64, scheme="test_int4_weight_asym_g32")
        layer.weight_ih_l0_scale.requires_grad = True
        with pytest.raises(TypeError, match="weight_ih_l0_scale is quantised and cannot be train"):
            layer(torch.ones(4, 3, 32))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(32, 64), nn.GRU(64, 32)
        self.cell, self.head = nn.LSTMCell(32, 64), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.gru(self.lstm(x)[0])
        h, _ = self.cell(y[-1])
        result: torch.Tensor = self.head(h)
        return result


@pytest.mark.parametrize("base", FORMATS)
def test_verbs(base: str) -> None:
    model, x = Model().eval(), torch.randn(6, 3, 32)
    with torch.no_grad():
        converted = qnn.convert(model, f"test_{base}")
        assert type(converted.lstm) is qnn.QLSTM
        assert type(converted.cell) is qnn.QLSTMCell
        assert qnn.sqnr(model(x), converted(x)) > 10
    words = str(qnn.summary(converted))
    assert words.count(f"test_{base}") >= 4
    assert "reference, step by step; not native: there is no native kernel for it" in words
    compared = str(qnn.compare(model, converted, x))
    assert all(name in compared for name in ("lstm", "gru", "cell"))


def test_blocks_of_rows_are_refused() -> None:
    """A scale that rows share is of no whole number of gates."""
    known = get_scheme("fp8_block")
    made = Scheme("test_blocks", known.weight, None, {"linear": known.linear, "lstm": "test_lstm"})
    with pytest.raises(ValueError, match=r"'h\*4/128' of sw_ih is not an axis"):
        recurrent.declare(CELLS["lstm"], made)


def test_layers_name_no_format() -> None:
    for file in Path(qnn.__file__).parent.glob("nn/recurrent/*.py"):
        text = file.read_text()
        assert "int8" not in text, file
        assert "_scale" not in text, file
