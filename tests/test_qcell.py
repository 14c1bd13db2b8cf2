"""QLSTMCell and QGRUCell: what they compute, in every mode, what they store, and how a model's
cells become them.
"""

import copy
import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.kernels.schemes import schemes_of

from .common import same_bits

CELLS: tuple[tuple[Any, Any, Any, Any], ...] = (
    (nn.LSTMCell, qnn.QuantizableLSTMCell, qnn.QLSTMCell, qnn.QLSTM),
    (nn.GRUCell, qnn.QuantizableGRUCell, qnn.QGRUCell, qnn.QGRU),
)


def grid(*axes: Any) -> list[tuple[Any, ...]]:
    return list(itertools.product(schemes_of("lstm"), (0, 1), *axes))


class Decoder(nn.Module):
    """A cell in a loop over the steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


def decoders(scheme: str, at: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A float decoder and its quantised twin, seeded; a static one is calibrated."""
    torch.manual_seed(1)
    model = Decoder(CELLS[at][0](6, 9, **options)).eval()
    if not scheme.endswith("_static"):
        return model, qnn.convert(model, scheme)
    batches = [torch.randn(12, 3, 6) for _ in range(3)]
    return model, qnn.convert(qnn.calibrate(qnn.prepare(model, scheme), batches))


def flat(state: Any) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def alike(got: Any, want: Any) -> bool:
    return all(same_bits(a, b) for a, b in zip(flat(got), flat(want), strict=True))


class TestValues:
    @parameterized.expand(grid((True, False)))
    def test_steps_are_the_sequence(self, scheme: str, at: int, bias: bool) -> None:
        model, quantized = decoders(scheme, at, bias=bias)
        x = torch.randn(12, 3, 6)
        state = {
            name.replace("table", "table_l0")
            if name == "table"
            else name.replace("_ih", "_ih_l0").replace("_hh", "_hh_l0"): value
            for name, value in quantized.cell.state_dict().items()
        }
        layer = CELLS[at][3](6, 9, bias=bias, scheme=scheme)
        layer.load_state_dict(state)
        with torch.no_grad():
            got = quantized(x)
            assert same_bits(got, layer(x)[0])
            assert qnn.sqnr(model(x), got) > 15

    @parameterized.expand(grid())
    def test_shapes_and_dtypes(self, scheme: str, at: int) -> None:
        _, quantized = decoders(scheme, at)
        cell, x = quantized.cell, torch.randn(3, 6)
        with torch.no_grad():
            zeros = torch.zeros(3, 9)
            whole = cell(x, (zeros, zeros) if at == 0 else zeros)
            assert alike(cell(x), whole)
            rows = [
                cell(row, tuple(s[0] for s in flat(zeros)) * 2 if at == 0 else zeros[0])
                for row in x
            ]
            assert all(alike(row, cell(x[i])) for i, row in enumerate(rows))
            for i, row in enumerate(rows):
                assert alike(row, tuple(s[i] for s in flat(whole)))
            assert flat(cell(x[:0]))[0].shape == (0, 9)
            for dtype in (torch.bfloat16, torch.float16, torch.float64):
                for state in flat(cell(x.to(dtype))):
                    assert (state.dtype, state.shape) == (dtype, (3, 9))

    @parameterized.expand(grid())
    def test_gradients(self, scheme: str, at: int) -> None:
        _, quantized = decoders(scheme, at)
        twin = Decoder(quantized.cell.dequantize())
        x = torch.randn(4, 3, 6)
        found = []
        for model in (quantized, twin):
            given = x.clone().requires_grad_()
            model(given).sum().backward()
            found.append((given.grad, model.cell.bias_hh.grad))
        for got, want in zip(*found, strict=True):
            assert qnn.sqnr(want, got) > 20

    @parameterized.expand(grid())
    def test_graphs(self, scheme: str, at: int) -> None:
        _, quantized = decoders(scheme, at)
        x = torch.randn(2, 3, 6)
        with torch.no_grad():
            want = quantized(x)
            program = torch.export.export(quantized, (x,))
            nodes = [n for n in program.graph.nodes if "invoke_quant" in str(n.target)]
            assert len(nodes) == 2
            assert same_bits(program.module()(x), want)
            torch._dynamo.reset()
            compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
            assert same_bits(compiled(x), want)


class TestContract:
    @parameterized.expand([(0,), (1,)])
    def test_errors_are_torchs(self, at: int) -> None:
        float_class, observed, quantised, _ = CELLS[at]
        x, h = torch.randn(3, 6), torch.randn(3, 9)

        def state(h: torch.Tensor) -> Any:
            return (h, h) if at == 0 else h

        calls: list[Any] = [
            lambda cell: cell(x[None]),
            lambda cell: cell(x[:, :5]),
            lambda cell: cell(x, state(h[:2])),
            lambda cell: cell(x, state(h[:, :5])),
            lambda cell: cell(x, state(h[None])),
        ]
        for call in calls:
            with pytest.raises((ValueError, RuntimeError)) as want:
                call(float_class(6, 9))
            for made in (observed(6, 9), quantised(6, 9)):
                with pytest.raises(type(want.value)) as got:
                    call(made)
                assert str(got.value) == str(want.value)

    def test_errors(self) -> None:
        cases: list[tuple[Any, type[Exception], str]] = [
            (lambda: qnn.QLSTMCell(6, 9)(torch.ones(3, 6).int()), TypeError, "cast it with .float"),
            (lambda: qnn.QLSTMCell(6, 9)(torch.ones(3, 6, device="meta")), ValueError, "on meta"),
            (lambda: qnn.QLSTMCell(6, 9, scheme="fp8"), ValueError, "one of 'int8', 'int8_stat"),
            (lambda: qnn.QLSTMCell.from_float(nn.GRUCell(6, 9)), TypeError, "takes an nn.LSTMCell"),
            (lambda: qnn.QLSTMCell.from_float(qnn.QLSTMCell(6, 9)), TypeError, "got QLSTMCell"),
            (lambda: qnn.QLSTM.from_float(qnn.QLSTM(6, 9)), TypeError, "got QLSTM"),
            (
                lambda: qnn.QGRUCell.from_float(nn.GRUCell(6, 9), "int8_static")(torch.ones(3, 6)),
                RuntimeError,
                "the layer is not calibrated",
            ),
            (lambda: qnn.QGRUCell.from_observed(nn.GRUCell(6, 9)), TypeError, "QuantizableGRUCell"),
            (
                lambda: qnn.QGRUCell.from_observed(qnn.QuantizableGRUCell(6, 9)),
                ValueError,
                "no observation points",
            ),
            (
                lambda: qnn.convert(qnn.prepare(Decoder(nn.GRUCell(6, 9)))),
                ValueError,
                "cell: .*'input'.*nothing was observed",
            ),
        ]
        for call, kind, words in cases:
            with pytest.raises(kind, match=words):
                call()

    @parameterized.expand([(0,), (1,)])
    def test_other_code_sees_a_cell(self, at: int) -> None:
        float_class, observed, quantised, _ = CELLS[at]
        for bias in (True, False):
            cell = float_class(6, 9, bias)
            for made in (observed(6, 9, bias), quantised(6, 9, bias)):
                assert isinstance(made, float_class)
                missing = [name for name in dir(cell) if not hasattr(made, name)]
                assert missing == []
                assert (made.bias_ih is None) == (not bias)


class TestState:
    @parameterized.expand(grid((True, False)))
    def test_round_trips(self, scheme: str, at: int, bias: bool) -> None:
        model, quantized = decoders(scheme, at, bias=bias)
        cell, x = quantized.cell, torch.randn(3, 6)
        want = cell(x)
        again = type(cell)(6, 9, bias, scheme=scheme)
        again.load_state_dict(cell.state_dict())
        meta = type(cell)(6, 9, bias, scheme=scheme, device="meta")
        meta.load_state_dict(cell.state_dict(), assign=True)
        for made in (again, meta, copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            assert alike(made(x), want)
        floats = set(model.cell.state_dict())
        scales = {f"{name}_scale" for name in floats if name.startswith("weight")}
        tables = {"table"} if scheme.endswith("_static") else set()
        assert set(cell.state_dict()) == floats | scales | tables
        if not scheme.endswith("_static"):
            again.reset_parameters()
            again.load_state_dict(model.cell.state_dict())
            assert alike(again(x), want)
        back = cell.dequantize()
        assert type(back) is CELLS[at][0]
        assert qnn.sqnr(model.cell.weight_hh, back.weight_hh) > 35

    @parameterized.expand(grid())
    def test_casts_keep_codes_scales_and_tables(self, scheme: str, at: int) -> None:
        _, quantized = decoders(scheme, at)
        before = {n: t.clone() for n, t in quantized.state_dict().items() if "bias" not in n}
        state = quantized.half().state_dict()
        assert all(same_bits(state[name], value) for name, value in before.items())
        assert state["cell.bias_ih"].dtype == torch.float16

    def test_repr(self) -> None:
        assert re.search(
            r"^QGRUCell\(6, 9, bias=False, scheme='int8'\)  #", repr(qnn.QGRUCell(6, 9, bias=False))
        )


class TestModels:
    @parameterized.expand(grid())
    def test_verbs(self, scheme: str, at: int) -> None:
        model, quantized = decoders(scheme, at)
        assert type(quantized.cell) is CELLS[at][2]
        (row,) = qnn.summary(quantized).rows
        assert (row.scheme, row.shape) == (scheme, tuple(model.cell.weight_hh.shape))
        assert re.search("^cpu: ", row.backend)
        found = qnn.compare(model, quantized, torch.randn(4, 3, 6))
        assert {row.name for row in found.rows} == {"cell", "(output)"}
        assert all(row.sqnr > 15 for row in found.rows)
        with pytest.raises(ValueError, match="converted already"):
            qnn.convert(quantized)

    def test_observed_in_place_of_torchs(self) -> None:
        model = Decoder(qnn.QuantizableLSTMCell(6, 9))
        assert type(qnn.convert(model).cell) is qnn.QLSTMCell
        prepared = qnn.prepare(model, split_gates=True, parts=qnn.parts.SIXTEEN_BIT)
        assert "input_linear_f" in prepared.cell.parts()
        qnn.calibrate(prepared, [torch.randn(5, 3, 6)])
        converted = qnn.convert(prepared)
        assert converted.cell.split_gates

    def test_quantisation_aware(self) -> None:
        torch.manual_seed(0)
        prepared = qnn.prepare(Decoder(nn.GRUCell(6, 9)), qat=True).train()
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
        for _ in range(3):
            prepared(torch.randn(5, 3, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        converted, x = qnn.convert(prepared.eval()), torch.randn(5, 3, 6)
        assert qnn.sqnr(prepared(x), converted(x)) > 100
