"""QLSTM and QGRU as modules: what they compute, in every mode, what they store, and what they
refuse. The kernels are held to the references in test_recurrent_kernels.py.
"""

import copy
import inspect
import io
import itertools
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parameterized import parameterized
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import qnn
from qnn.kernels.reference import recurrent
from qnn.kernels.schemes import schemes_of

from .common import forked, same_bits

CELLS = ((nn.LSTM, qnn.QLSTM), (nn.GRU, qnn.QGRU))
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


def flat(result: tuple[Any, Any]) -> list[torch.Tensor]:
    y, states = result
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    return [y, *(states if isinstance(states, tuple) else (states,))]


def alike(got: tuple[Any, Any], want: tuple[Any, Any]) -> bool:
    pairs = zip(flat(got), flat(want), strict=True)
    return all(same_bits(a, b) for a, b in pairs)


def twin(scheme: str, cell: int, *sizes: int, **options: Any) -> tuple[nn.Module, Any]:
    """A float layer and its quantised twin, seeded; a static one is calibrated."""
    torch.manual_seed(1)
    layer = CELLS[cell][0](*sizes, **options).eval()
    if not scheme.endswith("_static"):
        return layer, CELLS[cell][1].from_float(layer, scheme)
    prepared = qnn.prepare(layer, scheme)
    qnn.calibrate(prepared, [torch.randn(12, 3, sizes[0]) for _ in range(3)])
    return layer, qnn.convert(prepared)


def grid(*axes: Any) -> list[tuple[Any, ...]]:
    return list(itertools.product(schemes_of("lstm"), (0, 1), *axes))


class TestAccuracy:
    """Signal to noise of the outputs and last states against float32."""

    @parameterized.expand(
        [
            ("one layer", {}, 37, 28, 34),
            ("two layers, both directions", {"num_layers": 2, "bidirectional": True}, 34, 25, 31),
        ]
    )
    def test_sqnr(
        self, _: str, options: dict[str, Any], dynamic: float, static: float, wide: float
    ) -> None:
        torch.manual_seed(0)
        layer = nn.LSTM(96, 128, **options).eval()
        batches, x = [torch.randn(100, 4, 96) for _ in range(2)], torch.randn(100, 4, 96)
        found = {"int8": qnn.QLSTM.from_float(layer)}
        for name, parts in (("static", qnn.parts.EIGHT_BIT), ("wide", None)):
            found[name] = qnn.convert(qnn.calibrate(qnn.prepare(layer, parts=parts), batches))
        with torch.no_grad():
            want = flat(layer(x))
            for (name, quantized), least in zip(
                found.items(), (dynamic, static, wide), strict=True
            ):
                for got, each in zip(flat(quantized(x)), want, strict=True):
                    assert qnn.sqnr(got, each) > least, name

    def test_fixed_parameters(self) -> None:
        """Of torch's own tests: 16-bit linears and gates, int16 cell state, uint8 hidden state."""
        torch.manual_seed(0)
        layer = nn.LSTM(96, 128).eval()
        prepared = qnn.prepare(layer, parts=qnn.parts.FIXED)
        qnn.calibrate(prepared, [torch.randn(100, 4, 96)])
        quantized, x = qnn.convert(prepared), torch.randn(100, 4, 96)
        rows = dict(zip(recurrent.LSTM_PARTS, quantized.table_l0.tolist(), strict=True))
        assert rows["input_linear_g"] == [2**-11, 2**15, 0, 65535]
        assert rows["cell_state"] == [2**-11, 0, -32768, 32767]
        assert rows["hidden_state"] == [2**-7, 128, 0, 255]
        assert rows["forget_gate"] == [2**-16, 0, 0, 65535]
        assert rows["cell_tanh"] == [2**-15, 2**15, 0, 65535]
        y, (h, c) = quantized(x)
        for got, want in zip((y, h, c), flat(layer(x)), strict=True):
            assert qnn.sqnr(got, want) > 30
        for values, scale in ((y, 2**-7), (c, 2**-11)):
            codes = values / scale
            assert torch.equal(codes, codes.round())

    @settings(max_examples=60)
    @given(
        steps=st.integers(1, 6), batch=st.integers(0, 4),
        sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
        layers=st.integers(1, 2), flags=st.tuples(*[st.booleans()] * 4), cell=st.integers(0, 1),
        dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 9),
    )  # fmt: skip
    def test_weights_alone_is_the_float_layer_over_the_same_weights(
        self, steps: int, batch: int, sizes: tuple[int, int], layers: int,
        flags: tuple[bool, bool, bool, bool], cell: int, dtype: torch.dtype, seed: int,
    ) -> None:  # fmt: skip
        bias, bidirectional, batch_first, projected = flags
        torch.manual_seed(seed)
        options: dict[str, Any] = {"bias": bias, "bidirectional": bidirectional}
        if cell == 0 and projected and sizes[1] > 1:
            options["proj_size"] = sizes[1] // 2
        layer = CELLS[cell][0](*sizes, layers, batch_first=batch_first, **options, dtype=dtype)
        quantized = CELLS[cell][1].from_float(layer, "int8_weight")
        x = torch.randn((batch, steps, sizes[0]) if batch_first else (steps, batch, sizes[0]))
        got, want = quantized(x.to(dtype)), quantized.dequantize()(x.to(dtype))
        for a, b in zip(flat(got), flat(want), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestContract:
    """Shapes and options as in nn.LSTM and nn.GRU."""

    @parameterized.expand(grid((torch.float32, torch.bfloat16, torch.float16, torch.float64)))
    def test_states_and_outputs_have_the_dtype_of_the_input(
        self, scheme: str, cell: int, dtype: torch.dtype
    ) -> None:
        layer, quantized = twin(scheme, cell, 6, 9)
        x = torch.randn(5, 2, 6)
        got, want = quantized.to(dtype)(x.to(dtype)), layer(x)
        for a, b in zip(flat(got), flat(want), strict=True):
            assert (a.shape, a.dtype) == (b.shape, dtype)
            torch.testing.assert_close(a.float(), b, rtol=0, atol=0.05)

    @parameterized.expand(grid())
    def test_packed_sequences_are_lengths(self, scheme: str, cell: int) -> None:
        _, quantized = twin(scheme, cell, 6, 9, 2, bidirectional=True)
        x, lengths = torch.randn(7, 4, 6), torch.tensor([3, 7, 1, 5])
        states = torch.randn(4, 4, 9).tanh()
        hx = states if cell else (states, states.flip(0))
        y, last = quantized(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        padded, found = pad_packed_sequence(y)
        assert found.tolist() == lengths.tolist()
        assert alike((padded, last), quantized(x, hx, lengths))
        for b, length in enumerate(lengths.tolist()):
            one = tuple(s[:, b : b + 1] for s in hx) if cell == 0 else hx[:, b : b + 1]
            alone, _ = quantized(x[:length, b : b + 1], one)
            assert same_bits(alone, padded[:length, b : b + 1])
            assert not padded[length:, b].any()

    @parameterized.expand(grid())
    def test_unbatched_and_empty(self, scheme: str, cell: int) -> None:
        layer, quantized = twin(scheme, cell, 6, 9, batch_first=True)
        x = torch.randn(5, 6)
        for a, b in zip(flat(quantized(x)), flat(quantized(x[None])), strict=True):
            assert same_bits(a, b.squeeze(0 if a is not None and b.dim() == 3 else 1))
        assert [t.shape for t in flat(quantized(x))] == [t.shape for t in flat(layer(x))]
        none = x.new_zeros(0, 5, 6)
        assert [t.shape for t in flat(quantized(none))] == [t.shape for t in flat(layer(none))]
        with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
            quantized(x.new_zeros(2, 0, 6))

    def test_a_projection(self) -> None:
        for scheme in schemes_of("lstm"):
            layer, quantized = twin(scheme, 0, 8, 12, 2, proj_size=5, bidirectional=True)
            x = torch.randn(6, 3, 8)
            for a, b in zip(flat(quantized(x)), flat(layer(x)), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0.05)

    def test_dropout_between_layers_in_training_only(self) -> None:
        _, quantized = twin("int8", 0, 6, 9, 2, dropout=0.5)
        x = torch.randn(5, 3, 6)
        assert alike(quantized(x), quantized(x))
        quantized.train()
        torch.manual_seed(0)
        one = quantized(x)
        assert not alike(one, quantized(x))
        torch.manual_seed(0)
        assert alike(one, quantized(x))

    @parameterized.expand(grid())
    def test_a_stream_is_the_whole_sequence(self, scheme: str, cell: int) -> None:
        _, quantized = twin(scheme, cell, 6, 9, 2)
        x, pieces, hx = torch.randn(9, 3, 6), [], None
        for piece in x.split([1, 1, 4, 3]):
            y, hx = quantized(piece, hx)
            pieces.append(y)
        assert alike((torch.cat(pieces), hx), quantized(x))

    @parameterized.expand(grid((float("nan"), float("inf"), -float("inf"))))
    def test_what_is_not_finite_spoils_what_it_enters(
        self, scheme: str, cell: int, value: float
    ) -> None:
        _, quantized = twin(scheme, cell, 6, 9)
        x = torch.randn(5, 3, 6)
        clean = quantized(x)[0]
        x[2, 1, 4] = value
        y = quantized(x)[0]
        assert same_bits(y[:, ::2], clean[:, ::2])
        assert same_bits(y[:2], clean[:2])
        if scheme != "int8_weight" or value != value:
            assert not y[2:, 1].isfinite().any()
        if scheme.endswith("_static"):
            states = torch.zeros(1, 3, 9)
            states[0, 1, 0] = value
            y = quantized(x[:2], states if cell else (states, torch.zeros(1, 3, 9)))[0]
            assert not y[:, 1].isfinite().any()
            assert y[:, ::2].isfinite().all()

    def test_errors(self) -> None:
        _, quantized = twin("int8", 0, 6, 9)
        _, gru = twin("int8", 1, 6, 9)
        x = torch.randn(5, 3, 6)
        cases: list[tuple[Any, type[Exception], str]] = [
            (lambda: quantized(x[0, 0]), ValueError, "Expected input to be 2D or 3D, got 1D"),
            (lambda: quantized(x[..., :5]), RuntimeError, "Expected 6, got 5"),
            (lambda: quantized(x.int()), TypeError, r"QLSTM\(6, 9, scheme='int8'\): the input mus"),
            (lambda: quantized(x.to("meta")), ValueError, "input is on meta, the layer on cpu"),
            (lambda: quantized(x, (x[:1], x[:1])), RuntimeError, r"hidden\[0\] size \(1, 3, 9\)"),
            (lambda: quantized(x, (x[0], x[0])), RuntimeError, "3-D but got .2-D, 2-D. tensors"),
            (lambda: gru(x, x[0]), RuntimeError, "hx should also be 3-D but got 2-D tensor"),
            (lambda: gru(x, x[:1]), RuntimeError, "Expected hidden size"),
            (lambda: quantized(x, None, torch.tensor([6, 1, 1])), ValueError, "0 … 5.*got 1 … 6"),
            (
                lambda: quantized(x, None, torch.tensor([1, 1])),
                ValueError,
                r"3 whole numbers.*\[2\]",
            ),
            (lambda: quantized(x, None, torch.ones(3)), ValueError, "got torch.float32"),
            (
                lambda: quantized(pack_padded_sequence(x, [5, 5, 5]), None, torch.ones(3)),
                ValueError,
                "a PackedSequence has its own lengths",
            ),
            (lambda: qnn.QLSTM(6, 9, scheme="fp8"), ValueError, "one of 'int8', 'int8_static'"),
            (lambda: qnn.QLSTM(6, 0), ValueError, "hidden_size must be greater than zero"),
            (lambda: qnn.QLSTM(6, 9, proj_size=9), ValueError, "smaller than hidden_size"),
            (lambda: qnn.QLSTM(6, 9, dropout=2), ValueError, "number in range"),
            (
                lambda: qnn.QLSTM(66000, 9, scheme="int8_static"),
                ValueError,
                "weight_ih_l0: in_features must be at most 65793, beyond which the int32 sum",
            ),
            (lambda: qnn.QLSTM.from_float(nn.GRU(6, 9)), TypeError, "takes an nn.LSTM or a qnn.Qu"),
            (lambda: qnn.QGRU.from_float(nn.Linear(6, 9)), TypeError, "got Linear"),
            (lambda: qnn.QLSTM.from_observed(nn.LSTM(6, 9)), TypeError, "qnn.QuantizableLSTM, got"),
            (
                lambda: qnn.QLSTM.from_observed(qnn.QuantizableLSTM(6, 9)),
                ValueError,
                "no observation points",
            ),
        ]
        for call, kind, words in cases:
            with pytest.raises(kind, match=words):
                call()
        broken = nn.LSTM(6, 9)
        with torch.no_grad():
            broken.weight_hh_l0[3, 2] = torch.nan
        with pytest.raises(ValueError, match="weight_hh_l0 holds NaN or inf"):
            qnn.QLSTM.from_float(broken)


class TestAsTorchs:
    """What other code finds on a layer that it takes for torch's."""

    @parameterized.expand(
        [(cell, options, bias) for cell in (0, 1) for options in LAYERS for bias in (True, False)]
    )
    def test_everything_that_torchs_layer_has(self, cell: int, options: str, bias: bool) -> None:
        layer: Any = CELLS[cell][0](6, 9, bias=bias, **LAYERS[options])
        observed: Any = (qnn.QuantizableLSTM, qnn.QuantizableGRU)[cell]
        x, batch = torch.randn(3, 2, 6), torch.tensor([2])
        order = torch.tensor([1, 0])
        for kind in (observed, CELLS[cell][1]):
            made = kind(6, 9, bias=bias, **LAYERS[options])
            assert isinstance(made, nn.RNNBase)
            assert [name for name in dir(layer) if not hasattr(made, name)] == []
            for name in dir(layer):
                mine, other = getattr(made, name), getattr(layer, name)
                assert callable(mine) == callable(other), name
                if isinstance(other, int | str | float | tuple) and name not in _OWN:
                    assert mine == other, name
                if callable(other) and not name.startswith("_") and hasattr(other, "__self__"):
                    given = list(inspect.signature(other).parameters)
                    own = list(inspect.signature(mine).parameters)
                    assert own[: len(given)] == given, name
            assert made.flatten_parameters() is None
            assert made._flat_weights_names == layer._flat_weights_names
            assert made._all_weights == layer._all_weights
            assert [[w.shape for w in each] for each in made.all_weights] == [
                [w.shape for w in each] for each in layer.all_weights
            ]
            assert len(made._flat_weights) == len(layer._flat_weights)
            state = torch.randn(layer.get_expected_hidden_size(x, None))
            given: Any = (state, state) if cell == 0 else state
            for call in (
                lambda m: m.permute_hidden(given, order),  # noqa: B023
                lambda m: m.check_forward_args(x, given, None),  # noqa: B023
                lambda m: m.get_expected_hidden_size(x[0], batch),
            ):
                got, want = call(made), call(layer)
                if want is None or isinstance(want[0], int):
                    assert got == want
                else:
                    assert alike((got[0], got), (want[0], want))
            assert torch.equal(made(input=x, hx=given)[0], made(x, given)[0])

    @parameterized.expand(grid())
    def test_one_tensor_may_be_both_states_and_the_input(self, scheme: str, cell: int) -> None:
        _, quantized = twin(scheme, cell, 9, 9)
        x = torch.randn(1, 3, 9)
        state: Any = (x, x) if cell == 0 else x
        with torch.no_grad():
            want = quantized(x, state)
            torch._dynamo.reset()
            compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
            assert alike(compiled(x, state), want)

    def test_lengths_in_every_form(self) -> None:
        for made in (qnn.QLSTM(6, 9), qnn.QGRU(6, 9), qnn.QuantizableGRU(6, 9)):
            x = torch.randn(3, 2, 6)
            want = made(x, None, torch.tensor([3, 2]))
            forms = [[3, 2], (3, 2), torch.tensor([3, 2], dtype=torch.int32)]
            for lengths in (*forms, torch.tensor([3, 2], dtype=torch.uint8)):
                assert alike(made(x, None, lengths), want)
            bad = [[3], [3.0, 2.0], [True, False], "32", 3, np.array([3, 2]), torch.ones(2) > 0]
            for lengths in (*bad, torch.tensor([3.0, 2.0]), torch.tensor([[3], [2]])):
                with pytest.raises(ValueError, match="lengths must be 2 whole numbers"):
                    made(x, None, lengths)

    @parameterized.expand(
        [(scheme, kind) for scheme in ("int8", "int8_weight") for kind in range(4)]
    )
    def test_converted_on_meta(self, scheme: str, at: int) -> None:
        kind: Any = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)[at]
        with torch.device("meta"):
            empty = qnn.convert(nn.Sequential(kind(6, 8), nn.Linear(8, 2)), scheme)
        torch.manual_seed(0)
        full = qnn.convert(nn.Sequential(kind(6, 8), nn.Linear(8, 2)), scheme)
        assert all(p.is_meta for p in empty.parameters())
        empty.load_state_dict(full.state_dict(), assign=True)
        x = torch.randn(4, 6)
        assert all(map(same_bits, _leaves(empty[0](x)), _leaves(full[0](x))))


class Encoder(nn.Module):
    """Serves LSTM and GRU in one class, by asking which it has."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.rnn(x)[1])

    def last(self, state: Any) -> Any:
        return (state[0] if isinstance(self.rnn, nn.LSTM) else state)[-1]


class Asking(Encoder):
    def last(self, state: Any) -> Any:
        return (state[0] if self.rnn.mode == "LSTM" else state)[-1]


class TestClassChecks:
    @parameterized.expand([(0,), (1,)])
    def test_said_where_the_class_is_asked_for(self, cell: int) -> None:
        model = nn.Sequential(Encoder(CELLS[cell][0](6, 9)), nn.Linear(9, 2))
        for verb in (qnn.prepare, qnn.convert):
            with pytest.warns(UserWarning, match=r"Encoder.last asks.*'0.rnn'.*layer.mode == "):
                swapped = verb(model)
            rows = {row.name: row.backend or row.reason for row in qnn.summary(swapped).rows}
            assert re.search("is False here, and Encoder.last asks", rows["0.rnn"])
            assert "asks" not in rows["1"]

    @parameterized.expand([(0,), (1,)])
    def test_nothing_said_where_the_mode_is(self, cell: int) -> None:
        x = torch.randn(4, 2, 6)
        for model in (Asking(CELLS[cell][0](6, 9)), nn.Sequential(nn.Linear(6, 9))):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                swapped = [qnn.prepare(model), qnn.convert(model)]
                rows = qnn.summary(swapped[1]).rows
            assert not any("asks" in (row.backend or "") for row in rows)
            for made in swapped:
                assert made(x).shape == model(x).shape

    def test_dynamo_takes_no_layer_that_is_one(self) -> None:
        # The reason why the layers are none: once it is gone, they can be.
        for kind in (nn.LSTM, nn.GRU):
            torch._dynamo.reset()
            mine = type("Mine", (kind,), {"forward": lambda self, x: x + 1})(6, 9)
            with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
                torch.compile(nn.Sequential(mine), backend="eager", fullgraph=True)(torch.ones(2))


_KINDS = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)


def _options(kind: Any) -> dict[str, Any]:
    return {"num_layers": 2} if issubclass(kind, nn.RNNBase) else {}


def _one(kind: Any, scheme: str) -> tuple[Any, Any]:
    """A float layer or cell and its quantised twin, seeded; a static one is calibrated."""
    torch.manual_seed(1)
    layer = kind(6, 9, **_options(kind)).eval()
    if not scheme.endswith("_static"):
        return layer, qnn.convert(layer, scheme)
    return layer, qnn.convert(qnn.calibrate(qnn.prepare(layer, scheme), [torch.randn(12, 6)]))


def _with(values: torch.Tensor, at: Any, value: Any) -> torch.Tensor:
    changed = values.clone()
    changed[at] = value
    return changed


_OWN = {"__doc__", "__module__", "__annotations__"}


def _leaves(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in _leaves(v)]


class TestModes:
    """Compiled, exported and packaged: the same bits, one node a layer and direction."""

    @parameterized.expand(grid())
    def test_compiled_with_any_length_and_batch(self, scheme: str, cell: int) -> None:
        _, quantized = twin(scheme, cell, 6, 9, 2, bidirectional=True)
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(quantized, fullgraph=True, dynamic=True, backend=backend)
        with torch.no_grad():
            compiled(torch.randn(5, 3, 6))
            frames = backend.frame_count
            for steps, batch in ((9, 2), (4, 6)):
                x = torch.randn(steps, batch, 6)
                assert alike(compiled(x), quantized(x))
            assert backend.frame_count == frames
            lengths = torch.tensor([1, 4, 0, 2, 3, 4])
            assert alike(compiled(x, None, lengths), quantized(x, None, lengths))
            hx = quantized(x)[1]
            assert alike(compiled(x, hx), quantized(x, hx))

    @parameterized.expand([(s, c) for s, c in grid() if (s, c) != ("int8_weight", 1)])
    def test_inductor(self, scheme: str, cell: int) -> None:
        _, quantized = twin(scheme, cell, 6, 9)
        compiled, x = torch.compile(quantized, fullgraph=True), torch.randn(5, 3, 6)
        with torch.no_grad():
            assert alike(compiled(x), quantized(x))

    def test_a_stream_is_compiled_once(self) -> None:
        _, quantized = twin("int8", 0, 6, 9)
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(quantized, fullgraph=True, backend=backend)
        x, want = torch.randn(6, 3, 6), None
        with torch.no_grad():
            _, hx = quantized(x[:1])
            for step in x[1:]:
                _, want = quantized(step[None], hx)
                _, hx = compiled(step[None], hx)
        assert alike((x, hx), (x, want))
        assert backend.frame_count == 1

    @parameterized.expand([(*case, i % 2 == 0) for i, case in enumerate(grid())])
    def test_exported(self, scheme: str, cell: int, strict: bool) -> None:
        _, quantized = twin(scheme, cell, 6, 9, 2, bidirectional=True)
        x, lengths = torch.randn(5, 3, 6), torch.tensor([2, 5, 4])
        steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
        shapes = {"input": {0: steps, 1: batch}, "hx": None, "lengths": {0: batch}}
        program = torch.export.export(
            quantized, (x, None, lengths), dynamic_shapes=shapes, strict=strict
        )
        assert [r.scheme for r in qnn.passes.regions(program)] == [scheme] * 4
        stored = io.BytesIO()
        torch.export.save(program, stored)
        stored.seek(0)
        loaded = torch.export.load(stored).module()
        x, lengths = torch.randn(8, 2, 6), torch.tensor([8, 3])
        assert alike(loaded(x, None, lengths), quantized(x, None, lengths))

    def test_packaged_and_run_in_a_fresh_process(self) -> None:
        _, quantized = twin("int8", 0, 6, 9)
        x = torch.randn(5, 3, 6)
        dynamic = {"input": {0: torch.export.Dim("steps", min=2)}, "hx": None}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            program = torch.export.export(quantized, (x, None), dynamic_shapes=dynamic)
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=f"{folder}/lstm.pt2"
            )
            x = torch.randn(7, 3, 6)
            torch.save((x, flat(quantized(x))), f"{folder}/io.pt")
            torch.save(quantized.state_dict(), f"{folder}/state.pt")
            code = f"""
                import torch, qnn
                x, want = torch.load({folder!r} + "/io.pt")
                def check(result):
                    y, states = result
                    for a, b in zip((y, *states), want, strict=True):
                        assert torch.equal(a, b)
                check(torch._inductor.aoti_load_package({path!r})(x))
                lstm = qnn.QLSTM(6, 9, device="meta").to_empty(device="cpu")
                lstm.load_state_dict(torch.load({folder!r} + "/state.pt", weights_only=True))
                check(lstm(x))
                print("equal")
            """
            assert "equal" in forked(code)

    @parameterized.expand(grid())
    def test_gradients(self, scheme: str, cell: int) -> None:
        """Those of the float layer over the dequantised weights."""
        _, quantized = twin(scheme, cell, 6, 9)
        layer = quantized.dequantize().double()
        x = torch.randn(5, 3, 6)
        hx = torch.randn(1, 3, 9).tanh()
        lengths = torch.tensor([5, 2, 4])
        mine, theirs = self.backward(quantized, x, hx, lengths), None
        packed = self.backward(layer, x.double(), hx.double(), lengths)
        for a, b in zip(mine, packed, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        compiled: Any = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        theirs = self.backward(compiled, x, hx, lengths)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)

    def backward(
        self, layer: Any, x: torch.Tensor, h: torch.Tensor, lengths: torch.Tensor
    ) -> list[torch.Tensor]:
        x, h, c = (t.clone().requires_grad_() for t in (x, h, h))
        float_layer = isinstance(layer, nn.LSTM | nn.GRU)
        module = getattr(layer, "_orig_mod", layer)
        lstm = getattr(module, "mode", "") == "LSTM"
        hx = (h, c) if lstm else h
        if float_layer:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, states = layer(packed, hx)
            y = pad_packed_sequence(y)[0]
        else:
            y, states = layer(x, hx, lengths)
        states = states if isinstance(states, tuple) else (states,)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        total = (y * weight).sum() + sum((s * 0.3).sum() for s in states)
        wanted = [x, h, *([c] if lstm else []), module.bias_ih_l0, module.bias_hh_l0]
        return list(torch.autograd.grad(total, wanted))

    @parameterized.expand(itertools.product((False, True), (False, True), (False, True)))
    def test_only_what_is_asked_for_has_a_gradient(self, x_: bool, h_: bool, bias: bool) -> None:
        _, quantized = twin("int8", 1, 6, 9)
        quantized.bias_ih_l0.requires_grad_(bias)
        quantized.bias_hh_l0.requires_grad_(False)
        x, h = torch.randn(5, 3, 6, requires_grad=x_), torch.randn(1, 3, 9, requires_grad=h_)
        y, _ = quantized(x, h)
        assert y.requires_grad == (x_ or h_ or bias)
        if y.requires_grad:
            y.sum().backward()
        wanted = [x.grad, h.grad, quantized.bias_ih_l0.grad, quantized.bias_hh_l0.grad]
        assert [g is not None for g in wanted] == [x_, h_, bias, False]
        assert not any(p.grad is not None for n, p in quantized.named_parameters() if "we" in n)

    @parameterized.expand([("eager",), ("aot_eager",)])
    def test_activation_checkpointing(self, backend: str) -> None:
        _, quantized = twin("int8", 0, 6, 9)
        torch._dynamo.reset()

        def run(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = checkpoint(lambda t: quantized(t)[0], x, use_reentrant=False)
            return y.square().sum()

        fn: Any = run if backend == "eager" else torch.compile(run, backend=backend, fullgraph=True)
        x = torch.randn(5, 3, 6, requires_grad=True)
        (got,) = torch.autograd.grad(fn(x), x)
        (want,) = torch.autograd.grad(quantized(x)[0].square().sum(), x)
        torch.testing.assert_close(got, want)


class TestState:
    @parameterized.expand(grid(("plain", "stack")))
    def test_round_trips(self, scheme: str, cell: int, options: str) -> None:
        sizes = (6, 9)
        layer, quantized = twin(scheme, cell, *sizes, **LAYERS[options])
        x = torch.randn(5, 3, 6)
        want = quantized(x)
        again = type(quantized)(*sizes, **LAYERS[options], scheme=scheme)
        again.load_state_dict(quantized.state_dict())
        assert alike(again(x), want)
        assert alike(copy.deepcopy(quantized)(x), want)
        assert alike(pickle.loads(pickle.dumps(quantized))(x), want)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lstm.safetensors"
            save_file(quantized.state_dict(), path)
            meta = type(quantized)(*sizes, **LAYERS[options], scheme=scheme, device="meta")
            meta.load_state_dict(load_file(path), assign=True)
        assert alike(meta(x), want)
        assert not any(p.requires_grad for n, p in meta.named_parameters() if "bias" not in n)
        names = {n for n in quantized.state_dict() if not n.startswith("table")}
        floats = set(layer.state_dict())
        scales = {f"{n}_scale" for n in floats if n.startswith("weight")}
        assert names == floats | scales
        if not scheme.endswith("_static"):
            again.reset_parameters()
            again.load_state_dict(layer.state_dict())
            assert alike(again(x), want)
        assert {n: t.shape for n, t in quantized.dequantize().state_dict().items()} == {
            n: t.shape for n, t in layer.state_dict().items()
        }

    def test_casts_keep_codes_scales_and_tables(self) -> None:
        _, quantized = twin("int8_static", 0, 6, 9)
        kept = {n: t.clone() for n, t in quantized.state_dict().items() if "bias" not in n}
        parent = nn.Sequential(quantized).to(torch.bfloat16)
        state = parent[0].state_dict()
        assert all(same_bits(state[name], value) for name, value in kept.items())
        assert state["bias_ih_l0"].dtype == torch.bfloat16
        assert parent[0].dtype == torch.bfloat16

    def test_bad_states(self) -> None:
        for scheme, kind in itertools.product(("int8", "int8_static"), _KINDS):
            layer, quantized = _one(kind, scheme)
            end = "_l1" if isinstance(layer, nn.RNNBase) else ""
            good = {name: t.clone() for name, t in quantized.state_dict().items()}
            x = torch.randn(5, 6)
            want = [t.clone() for t in _leaves(quantized(x))]
            for words, change in self._bad(good, end, layer, scheme):
                state = change(dict(good))
                for strict in (True, False):
                    with pytest.raises(RuntimeError, match=words):
                        quantized.load_state_dict(state, strict=strict)
                    assert all(map(same_bits, _leaves(quantized(x)), want)), (kind, words)

    def _bad(
        self, good: dict[str, torch.Tensor], end: str, layer: nn.Module, scheme: str
    ) -> Iterator[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]]:
        """What an error says, and what makes a good state bad."""
        hh, scale, bias = f"weight_hh{end}", f"weight_hh{end}_scale", f"bias_ih{end}"

        def put(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
            return lambda state: {**state, name: value}

        def drop(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
            return lambda state: {n: t for n, t in state.items() if n not in names}

        yield f"{hh} must be .*got", put(hh, good[hh][:, :5])
        yield f"{hh} is torch.int32, but scheme '{scheme}' st", put(hh, good[hh].int())
        yield f"yet the state has a {scale}", put(hh, layer.state_dict()[hh])
        yield f"has a {scale} but no {hh}", drop(hh)
        yield f"no {scale}", drop(scale)
        yield f"has a weight_.* but no {hh}", drop(hh, scale)
        yield f"but no {bias}.*whole", drop(bias)
        yield f"{scale} must be positive and finite", put(scale, -good[scale])
        yield f"{scale} must be positive and finite", put(scale, good[scale] * torch.nan)
        yield f"{scale} must be float32", put(scale, good[scale][1:])
        for dtype in (torch.bool, torch.int32, torch.float8_e4m3fn):
            yield f"{scale} is {dtype}", put(scale, good[scale].to(dtype))
        yield f"{bias} must be float", put(bias, good[bias].int())
        yield f"{bias} holds NaN or inf in row 3", put(bias, _with(good[bias], 3, torch.inf))
        yield f"{bias} must be ", put(bias, good[bias][1:])
        table = f"table{end}"
        if scheme == "int8":
            yield f"{table} belongs to another scheme", put(table, torch.zeros(17, 4))
            return
        values = good[table]
        yield f"no {table}", drop(table)
        yield "no table", lambda _: layer.state_dict()
        for dtype in (torch.int8, torch.bool, torch.float8_e5m2):
            yield f"{table} is {dtype}", put(table, values.to(dtype))
        yield f"{table} must be float32", put(table, values[1:])
        yield f"{table} must be finite", put(table, _with(values, (3, 0), torch.nan))
        yield "the part input must have a positive", put(table, _with(values, (0, 0), 0.0))
        yield "must have a positive, finite scale", put(table, _with(values, (1, 0), -1.0))
        yield "whole zero point and whole ends", put(table, _with(values, (3, 1), 0.5))
        yield "must have qmin ≤ qmax", put(table, _with(values, (3, 2), values[3, 3] + 1))
        yield "hidden_state enters an integer product", put(table, _with(values, (1, 3), 4000.0))

    @parameterized.expand([(dtype,) for dtype in (torch.float16, torch.float64, torch.bfloat16)])
    def test_float32_is_read_from_any_float(self, dtype: torch.dtype) -> None:
        _, quantized = _one(nn.LSTM, "int8_static")
        good = quantized.state_dict()
        quantized.load_state_dict(
            {
                n: t.to(dtype) if t.is_floating_point() else t
                for n, t in good.items()
                if not n.startswith("table")
            }
            | {n: t.double() for n, t in good.items() if n[0] == "t"}
        )
        assert {t.dtype for t in quantized.state_dict().values()} == {torch.int8, torch.float32}

    @parameterized.expand([(at,) for at in range(4)])
    def test_a_static_layer_without_ranges(self, at: int) -> None:
        layer, calibrated = _one(_KINDS[at], "int8_static")
        x = torch.randn(5, 6)
        for made in (
            type(calibrated)(6, 9, scheme="int8_static", **_options(_KINDS[at])),
            type(calibrated).from_float(layer, "int8_static"),
            qnn.convert(layer, "int8_static"),
        ):
            assert "not calibrated" in repr(made)
            with pytest.raises(RuntimeError, match=r"is not calibrated.*Load a state.*prepare"):
                made(x)
            made.load_state_dict(calibrated.state_dict())
            assert "not calibrated" not in repr(made)
            assert all(map(same_bits, _leaves(made(x)), _leaves(calibrated(x))))

    @parameterized.expand([(at, scheme) for at in range(4) for scheme in schemes_of("lstm")])
    def test_weights_read_as_floats_and_take_writes(self, at: int, scheme: str) -> None:
        layer, quantized = _one(_KINDS[at], scheme)
        back, x = quantized.dequantize(), torch.randn(5, 6)

        def run() -> list[torch.Tensor]:
            states = quantized(x) if at > 1 else quantized(x)[1]
            return _leaves(quantized(x, states))

        want = run()
        for name in [n for n, _ in layer.named_parameters() if n.startswith("weight")]:
            view = getattr(quantized, name)
            assert (view.dtype, view.shape) == (torch.float32, getattr(layer, name).shape)
            assert torch.equal(view + 0, getattr(back, name))
            codes = quantized.state_dict()[name].clone()
            with torch.no_grad():
                view.mul_(2)
            assert torch.equal(getattr(quantized, name) + 0, getattr(back, name) * 2)
            with pytest.raises(ValueError, match=f"{name} holds NaN"):
                setattr(quantized, name, nn.Parameter(getattr(layer, name).detach() * torch.nan))
            with pytest.raises(TypeError, match="a write to a part or a view"):
                getattr(quantized, name)[0].zero_()
            getattr(quantized, name).data = getattr(layer, name).detach()
            assert torch.equal(quantized.state_dict()[name], codes)
            setattr(quantized, name, nn.Parameter(getattr(layer, name).detach() / 2))
            assert not same_bits(run()[0], want[0])
            setattr(quantized, name, nn.Parameter(getattr(layer, name).detach()))
            assert quantized.state_dict()[name].dtype == torch.int8
        assert all(map(same_bits, run(), want))

    def test_resident_bytes(self) -> None:
        layer, quantized = twin("int8", 0, 256, 512)
        before, after = (
            sum(p.numel() * p.element_size() for n, p in m.named_parameters() if "weight" in n)
            for m in (layer, quantized)
        )
        assert after / before < 0.3
        (row,) = qnn.summary(quantized).rows
        assert (row.scheme, row.shape) == ("int8", (2048, 512))
        assert row.bytes_after / row.bytes_before < 0.3

    def test_repr(self) -> None:
        _, quantized = twin("int8", 0, 6, 9, 2, proj_size=4)
        assert re.search(
            r"^QLSTM\(6, 9, proj_size=4, num_layers=2, scheme='int8'\)  # cpu: ", repr(quantized)
        )
