"""Observation points and quantisation-aware training of the quantisable recurrent layers."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from qnn.calibration.fake_quantize import FakeQuantize, freeze_observers
from qnn.calibration.parts import DEFAULT, EIGHT_BIT, FIXED, SIXTEEN_BIT, PartSpecs
from qnn.calibration.spec import QuantSpec
from qnn.functional import dequantize, quantize
from qnn.kernels import OPS
from qnn.kernels.reference.recurrent import (
    CELLS as OP_CELLS,
)
from qnn.kernels.reference.recurrent import (
    round_to_part,
    split_result,
)
from qnn.nn.recurrent.quantizable import QuantizableGRU, QuantizableLSTM
from qnn.nn.recurrent.quantizable_cell import QuantizableGRUCell, QuantizableLSTMCell
from tests.test_quantizable import CELLS, EVERY, LAYERS, assert_close, states, tensors, with_states

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

MODES = [(cell, split, qat) for cell, split in EVERY for qat in (False, True)]


def layer_of(cell: str, *args: Any, **options: Any) -> Any:
    return LAYERS[cell][1](*args, **options)


def reference(
    layer: Any, x: torch.Tensor, given: tuple[torch.Tensor, ...], seen: dict[str, list[Any]] | None
) -> torch.Tensor:
    """One layer, forward, from the formulas alone: `y [T, B, P]`.

    `seen` collects every value of every part; without it the parts are rounded to their grids.
    """
    names = dict(layer.named_parameters())
    parts = layer.parts()

    def fq(name: str, value: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen.setdefault(name, []).append(value.detach())
            return value
        return round_to_part(value, parts[name].row()) if name in parts else value

    def weight(which: str) -> torch.Tensor:
        w = names[f"weight_{which}_l0"].detach()
        return w if seen is not None else dequantize(*quantize(w), w.dtype)

    def linears(which: str, value: torch.Tensor, gates: str) -> list[torch.Tensor]:
        w, b = weight(which), names[f"bias_{which}_l0"].detach()
        kind = "input" if which == "ih" else "hidden"
        rows = F.linear(value, w, b).chunk(len(gates), -1)
        if layer.split_gates:
            rows = [
                F.linear(value, *each)
                for each in zip(w.chunk(len(gates)), b.chunk(len(gates)), strict=True)
            ]
        return [fq(f"{kind}_linear_{gate}", row) for gate, row in zip(gates, rows, strict=True)]

    outputs = []
    of_inputs = zip(
        *linears("ih", fq("input", x), "ifgo" if layer.mode == "LSTM" else "rzn"), strict=True
    )
    h = fq("hidden_state", given[0][0])
    if layer.mode == "LSTM":
        c = fq("cell_state", given[1][0])
        for a in of_inputs:
            b = linears("hh", h, "ifgo")
            i = fq("input_gate", torch.sigmoid(a[0] + b[0]))
            f = fq("forget_gate", torch.sigmoid(a[1] + b[1]))
            g = fq("cell_gate", torch.tanh(a[2] + b[2]))
            o = fq("output_gate", torch.sigmoid(a[3] + b[3]))
            c = fq("cell_state", f * c + i * g)
            h = o * fq("cell_tanh", torch.tanh(c))
            if layer.proj_size:
                h = F.linear(fq("projection_input", h), weight("hr"))
            h = fq("hidden_state", h)
            outputs.append(h)
    else:
        for a in of_inputs:
            b = linears("hh", h, "rzn")
            r = fq("reset_gate", torch.sigmoid(a[0] + b[0]))
            z = fq("update_gate", torch.sigmoid(a[1] + b[1]))
            n = fq("new_gate", torch.tanh(a[2] + r * b[2]))
            h = fq("hidden_state", (h - n) * z + n)
            outputs.append(h)
    return torch.stack(outputs)


class TestObserving:
    @parameterized.expand([(*e, t) for e in EVERY for t in (False, True)])
    def test_changes_no_output_and_no_gradient(self, cell: str, split: bool, train: bool) -> None:
        """To the bit, also with dropout and the same seed."""
        options = {"num_layers": 2, "bidirectional": True, "dropout": 0.5}
        made = layer_of(cell, 16, 24, **options, split_gates=split).train(train)
        watched = copy.deepcopy(made).observe()
        x, lengths = torch.randn(5, 3, 16), torch.tensor([2, 5, 4])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        given = states(made, 3)
        calls: tuple[Callable[[Any], Any], ...] = (
            lambda layer: layer(x),
            lambda layer: with_states(layer, x, *given),
            lambda layer: with_states(layer, packed, *given),
            lambda layer: layer(x, lengths=lengths),
            lambda layer: layer(x[:, 0]),
        )
        for call in calls:
            results = []
            for layer in (made, watched):
                torch.manual_seed(2)
                layer.zero_grad()
                out = [tensor for tensor in tensors(call(layer)) if tensor.is_floating_point()]
                sum(tensor.square().sum() for tensor in out).backward()
                results.append(out + [p.grad for p in layer.parameters()] + [torch.rand(1)])
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
        for point in watched.parts(1, reverse=True).values():
            point.qparams()

    @parameterized.expand(EVERY)
    def test_cells(self, cell: str, split: bool) -> None:
        made = CELLS[cell][1](5, 7, split_gates=split)
        watched = copy.deepcopy(made).observe()
        x = torch.randn(3, 5)
        for a, b in zip(tensors(made(x)), tensors(watched(x)), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(tensors(made(x[0]))[0], tensors(watched(x[0]))[0])
        low, high = watched.parts()["input"].observer.low, watched.parts()["input"].observer.high
        assert (low.item(), high.item()) == (x.min().item(), x.max().item())
        (qat := copy.deepcopy(made).observe(qat=True))(x)
        error = (tensors(qat(x))[0] - tensors(made(x))[0]).abs().max()
        assert 0 < error < 0.05, error

    @parameterized.expand(
        [
            ("LSTM", True, {}),
            ("LSTM", True, {"proj_size": 3}),
            ("LSTM", False, {"proj_size": 3}),
            ("GRU", True, {}),
            ("GRU", False, {}),
        ]
    )
    def test_every_part_sees_its_values(
        self, cell: str, split: bool, options: dict[str, Any]
    ) -> None:
        observed = dict.fromkeys(["*"], QuantSpec(torch.uint8))
        made = layer_of(cell, 5, 7, **options, split_gates=split, dtype=torch.float64)
        # Far from 0, which is what stands behind the end of a sequence.
        x, given = 1 + torch.rand(4, 3, 5).double(), states(made, 3, torch.float64)
        seen: dict[str, list[torch.Tensor]] = {}
        reference(made, x, given, seen)
        for form in ("steps", "lengths", "packed", "reverse"):
            made.observe(observed)
            expected = seen
            if form == "steps":
                with_states(made, x, *given)
            elif form == "reverse":
                both = layer_of(
                    cell, 5, 7, **options, split_gates=split, bidirectional=True
                ).double()
                for name, parameter in made.named_parameters():
                    both.get_parameter(f"{name}_reverse").data.copy_(parameter)
                both.observe(observed)
                twice = [torch.cat([state, state]) for state in given]
                with_states(both, x.flip(0), *twice)
            else:
                # Past the end stands what must not be seen, and the states of an empty sequence.
                expected, longest = {}, torch.tensor([4, 2, 1])
                padded = x.clone()
                for row, length in enumerate(longest.tolist()):
                    one = tuple(state[:, row : row + 1] for state in given)
                    reference(made, x[:length, row : row + 1], one, expected)
                    padded[length:, row] = 1e6
                if form == "lengths":
                    with_states(made, padded, *given, lengths=longest)
                else:
                    with_states(made, pack_padded_sequence(padded, longest), *given)
            points = both.parts(0, reverse=True) if form == "reverse" else made.parts()
            for name, point in points.items():
                parts = [name]
                if not split and "_linear_" in name:
                    kind = name.rpartition("_")[0]
                    parts = [part for part in expected if part.startswith(kind)]
                values = torch.cat([v.flatten() for part in parts for v in expected[part]])
                low, high = point.observer.low, point.observer.high
                torch.testing.assert_close(low.item(), values.min().item(), atol=1e-6, rtol=0)
                torch.testing.assert_close(high.item(), values.max().item(), atol=1e-6, rtol=0)

    @parameterized.expand(EVERY)
    def test_frozen_points_see_nothing(self, cell: str, split: bool) -> None:
        made = layer_of(cell, 5, 7, split_gates=split).observe()
        made(torch.randn(4, 3, 5))
        freeze_observers(made)
        before = copy.deepcopy(made.state_dict())
        made(100 * torch.randn(4, 3, 5))
        for name, value in made.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_nothing_seen_is_an_error_that_names_the_part(self) -> None:
        made = QuantizableLSTM(5, 7, bidirectional=True).observe()
        with pytest.raises(ValueError, match="cell_state_l0_reverse"):
            made.parts(0, reverse=True)["cell_state"].row()

    @parameterized.expand(EVERY)
    def test_the_loop_over_steps(self, cell: str, split: bool) -> None:
        """Not to the bit: a BLAS adds a bias before or after the products, by their sizes."""
        options = {"proj_size": 3} if cell == "LSTM" else {}
        made = layer_of(cell, 5, 7, **options, split_gates=split)
        x, given = torch.randn(6, 3, 5), states(made, 3)
        y, _ = with_states(made, x, *given, lengths=torch.full((3,), 6))
        # Values below 1, sums of at most 14 products: some units in the last place.
        torch.testing.assert_close(y, reference(made, x, given, {}), rtol=0, atol=2e-6)


class TestParts:
    @parameterized.expand([(cell, s, p) for cell, s in EVERY for p in (0, 3)])
    def test_names_are_the_tables(self, cell: str, split: bool, projection: int) -> None:
        if cell == "GRU" and projection:
            return
        options = {"proj_size": projection} if projection else {}
        made = layer_of(cell, 5, 7, 2, **options, split_gates=split)
        assert made.parts() == {}
        made.observe()
        table = OP_CELLS[cell.lower()].parts
        expected = [part for part in table if projection or part != "projection_input"]
        assert list(made.parts(1)) == expected
        points = list(made.parts(1).values())
        fewer = 0 if split else 2 * len(made.parts()) and 2 * (4 if cell == "LSTM" else 3) - 2
        assert len(set(points)) == len(points) - fewer
        for point in points:
            assert isinstance(point, FakeQuantize)
        for index, reverse in ((2, False), (0, True)):
            with pytest.raises(IndexError, match="num_layers=2 and bidirectional=False"):
                made.parts(index, reverse)

    @parameterized.expand([("LSTM",), ("GRU",)])
    def test_fixed_parameters(self, cell: str) -> None:
        """16-bit linears and activations, int16 cell state, uint8 hidden state: no data but x's."""
        made = layer_of(cell, 5, 7, split_gates=True).observe(FIXED, qat=True).eval()
        linear = (2.0**-11, 2**15, 0, 2**16 - 1)
        sigmoid, tanh = (2.0**-16, 0, 0, 2**16 - 1), (2.0**-15, 2**15, 0, 2**16 - 1)
        expected = {"cell_state": (2.0**-11, 0, -(2**15), 2**15 - 1)}
        expected |= {"hidden_state": (2.0**-7, 2**7, 0, 255)}
        expected |= dict.fromkeys(("cell_gate", "new_gate", "cell_tanh"), tanh)
        for name, point in made.parts().items():
            if name == "input":
                with pytest.raises(ValueError, match="input_l0"):
                    point.row()
                continue
            want = expected.get(name, linear if "_linear_" in name else sigmoid)
            assert tuple(point.row().tolist()) == want, name
        x = torch.randn(20, 4, 5)
        y, plain = made(x)[0], made.to_float()(x)[0]
        assert torch.equal((y * 2**7).round(), y * 2**7)
        assert 20 * torch.log10(plain.norm() / (plain - y).norm()) > 30

    def test_presets(self) -> None:
        for preset, bits in ((EIGHT_BIT, 8), (SIXTEEN_BIT, 16), (None, 16), (DEFAULT, 16)):
            for cell, split in EVERY:
                made = layer_of(cell, 5, 7, split_gates=split).observe(preset)
                made(torch.randn(9, 4, 5))
                for name, point in made.parts().items():
                    want = 8 if name in ("input", "hidden_state") else bits
                    _, _, low, high = point.row().tolist()
                    assert high - low in (2**want - 1, 2**want - 2), name

    def test_the_last_key_that_matches_counts(self) -> None:
        a, b = QuantSpec(torch.int16), QuantSpec(torch.uint16)
        made = QuantizableLSTM(5, 7, split_gates=True)
        parts = made.observe({"*_linear*": a, "input_linear_i": b, "cell_*": None}).parts()
        assert parts["input_linear_i"].spec == b
        assert parts["hidden_linear_i"].spec == a
        assert "cell_state" not in parts
        assert "forget_gate" in parts
        parts = made.observe(SIXTEEN_BIT | {"*_gate": b, "cell_state": None}).parts()
        assert parts["cell_gate"].spec == b
        assert "cell_state" not in parts

    @parameterized.expand(
        [
            ("typo", {"cell_stat": None}, ValueError, r"'cell_stat', which .*'cell_state'"),
            ("other_cell", {"new_gate": None}, ValueError, "matches none"),
            ("no_projection", {"projection_input": None}, ValueError, "matches none"),
            ("not_split", {"input_linear_i": None}, ValueError, "only with split_gates=True"),
            ("preset", PartSpecs({"nothing*": None}), ValueError, r"'nothing\*', which"),
            ("input", {"input": None}, ValueError, "'input' enters an integer product.*got None"),
            ("hidden", {"hidden*": QuantSpec(torch.int16)}, ValueError, "'hidden_state' .*int16"),
            ("channels", {"cell_state": QuantSpec(channel_axis=0)}, ValueError, "one scale"),
            ("no_spec", {"cell_state": torch.int8}, TypeError, "QuantSpecs or None"),
            ("no_mapping", [("cell_state", None)], TypeError, "must map"),
        ]
    )
    def test_refused(self, _: str, parts: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            QuantizableLSTM(5, 7).observe(parts)
        with pytest.raises(error, match=message):
            QuantizableLSTMCell(5, 7).observe(parts)


class TestQat:
    @parameterized.expand(
        [
            (cell, split, options, preset)
            for cell, split in EVERY
            for options in ({}, {"proj_size": 3})
            for preset in (EIGHT_BIT, SIXTEEN_BIT, {"*_linear*": None, "*_gate": None})
            if cell == "LSTM" or not options
        ]
    )
    def test_arithmetic_to_the_bit(
        self, cell: str, split: bool, options: dict[str, Any], preset: Any
    ) -> None:
        made = layer_of(cell, 5, 7, **options, split_gates=split).observe(preset, qat=True)
        x, given = torch.randn(6, 3, 5), states(made, 3)
        with_states(made, x, *given)
        made.eval()
        x = 1.2 * x
        y, _ = with_states(made, x, *given)
        assert torch.equal(y, reference(made, x, given, None))

    @parameterized.expand([(*e, o) for e in EVERY for o in ({}, {"proj_size": 3})])
    def test_equals_the_integer_layer(
        self, cell: str, split: bool, options: dict[str, Any]
    ) -> None:
        """The converted layer's reference, both in float64, where no rounding tells them apart."""
        if cell == "GRU" and options:
            return
        made = layer_of(cell, 5, 7, **options, split_gates=split, dtype=torch.float64)
        made.observe(qat=True)
        x, given = torch.randn(6, 3, 5).double(), states(made, 3, torch.float64)
        with_states(made, x, *given)
        y, last = with_states(made.eval(), x, *given)
        parts = made.parts()
        rows = [
            parts[name].row() if name in parts else torch.zeros(4)
            for name in OP_CELLS[cell.lower()].parts
        ]
        names = dict(made.named_parameters())
        integers = [t for w in ("ih", "hh") for t in quantize(names[f"weight_{w}_l0"])]
        integers += [torch.stack(rows), names["bias_ih_l0"], names["bias_hh_l0"]]
        integers += [*quantize(names["weight_hr_l0"])] if options else []
        op = OPS[f"int8_static_{cell.lower()}"]
        args = (x, *(state[0] for state in given), *integers)
        flat = op.reference(*args, *op.tails[len(args)], compute=torch.float64)
        widths = [state.shape[-1] for state in given]
        for got, want in zip(
            [y, *(state[0] for state in tensors(last))],
            split_result(flat, 6, 3, *widths),
            strict=True,
        ):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=0)

    @parameterized.expand(EVERY)
    def test_steps_use_what_was_known_before_the_batch(self, cell: str, split: bool) -> None:
        made = layer_of(cell, 5, 7, split_gates=split).observe(qat=True)
        x = torch.randn(4, 3, 5)
        weights = {
            name: dequantize(*quantize(p)) if "weight" in name else p.detach()
            for name, p in made.named_parameters()
        }
        float_layer = made.to_float()
        want = torch.func.functional_call(float_layer, weights, x)
        fixed = [n for n, p in made.parts().items() if p.spec.fixed]
        assert fixed
        # No scale is known yet but the fixed ones of the gates.
        error = (made(x)[0] - want[0]).abs().max()
        assert error < 0.02
        known = copy.deepcopy(made)
        first = made(10 * x)[0]
        assert torch.equal(first, known.eval()(10 * x)[0])
        assert not torch.equal(first, made.eval()(10 * x)[0])

    @parameterized.expand(EVERY)
    def test_evaluation_changes_nothing(self, cell: str, split: bool) -> None:
        made = layer_of(cell, 5, 7, split_gates=split).observe(qat=True)
        made(torch.randn(4, 3, 5))
        before = copy.deepcopy(made.state_dict())
        made.eval()(9 * torch.randn(4, 3, 5))
        for name, value in made.state_dict().items():
            assert torch.equal(value, before[name]), name

    @parameterized.expand(EVERY)
    def test_gradients_are_close_to_floats(self, cell: str, split: bool) -> None:
        made = layer_of(cell, 5, 7, 2, bidirectional=True, split_gates=split)
        plain = copy.deepcopy(made)
        made.observe(SIXTEEN_BIT, qat=True)
        x, lengths = torch.randn(4, 3, 5), torch.tensor([4, 2, 3])
        # Twice the range, so that nothing of x is clipped.
        made(2 * x)
        for layer in (made, plain):
            layer(x, lengths=lengths)[0].square().sum().backward()
        for (name, a), b in zip(made.named_parameters(), plain.parameters(), strict=True):
            cosine = F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), 0)
            assert cosine > 0.98, name

    def test_learned_scales(self) -> None:
        parts = {"*_linear*": QuantSpec(torch.uint8, learnable=True)}
        made = QuantizableLSTM(5, 7).observe(parts, qat=True)
        x = torch.randn(4, 3, 5)
        made(x)
        made(x)[0].square().sum().backward()
        learned = [n for n, p in made.named_parameters() if n.endswith("scale")]
        assert len(learned) == 2
        for name in learned:
            assert made.get_parameter(name).grad.abs().max() > 0
        before = {n: made.get_parameter(n).clone() for n in learned}
        made.reset_parameters()
        for name, value in before.items():
            assert torch.equal(made.get_parameter(name), value)

    def test_it_learns(self) -> None:
        """A step of memory: the output is to be the input before."""
        torch.manual_seed(0)
        made = QuantizableGRU(4, 16, split_gates=True).observe(qat=True)
        head = nn.Linear(16, 4)
        optimizer = torch.optim.Adam([*made.parameters(), *head.parameters()], 0.02)
        losses = []
        for _ in range(60):
            x = torch.randn(5, 16, 4)
            loss = F.mse_loss(head(made(x)[0])[1:], x[:-1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])

    @parameterized.expand([(torch.bfloat16,), (torch.float64,)])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        for cell, split in EVERY:
            made = layer_of(cell, 5, 7, split_gates=split, dtype=dtype).observe(qat=True)
            x = torch.randn(4, 3, 5, dtype=dtype)
            for _ in range(2):
                y, last = made(x)
            assert {t.dtype for t in tensors((y, last))} == {dtype}
            plain = made.to_float()(x)[0]
            assert (y - plain).abs().max() < 0.05
            assert made.points["input_l0"].scale.dtype == torch.float32


class TestCompiled:
    def check(self, made: Any, backend: str, x: torch.Tensor, **options: Any) -> None:
        """Three steps of training, compiled and not: outputs, weights and observers agree."""
        other = copy.deepcopy(made)
        compiled = torch.compile(other, fullgraph=True, backend=backend)
        for step in range(3):
            results = []
            for layer, call in ((made, made), (other, compiled)):
                layer.zero_grad()
                y, _ = call((step + 1) * x, **options)
                y.square().sum().backward()
                results.append(y)
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter -= 0.01 * parameter.grad
            assert_close(results[1:], results[:1])
        assert_close(list(other.parameters()), list(made.parameters()))
        for (name, a), (_, b) in zip(made.named_buffers(), other.named_buffers(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)

    # Each traces for seconds: of cell, split_gates and qat, every value with every other.
    @parameterized.expand(
        [("LSTM", False, True), ("LSTM", True, False), ("GRU", True, True), ("GRU", False, False)]
    )
    def test_training_steps(self, cell: str, split: bool, qat: bool) -> None:
        made = layer_of(cell, 5, 7, split_gates=split).observe(qat=qat)
        self.check(made, "aot_eager", torch.randn(2, 3, 5))

    def test_training_steps_with_lengths(self) -> None:
        made = QuantizableGRU(5, 7, bidirectional=True).observe({"*_gate": None}, qat=True)
        self.check(made, "aot_eager", torch.randn(2, 3, 5), lengths=torch.tensor([2, 1, 1]))

    def test_training_steps_in_inductor(self) -> None:
        made = QuantizableGRU(5, 7).observe(qat=True)
        self.check(made, "inductor", torch.randn(1, 3, 5))

    def test_backward_uses_the_scales_of_its_forward(self) -> None:
        """Inductor would recompute the mask of what was clipped from buffers that observing has
        changed since.
        """
        for observer in ("minmax", "moving_average"):
            made = FakeQuantize(QuantSpec(observer=observer), qat=True)

            def step(point: FakeQuantize, x: torch.Tensor) -> torch.Tensor:
                y = point.quantize(x.sin())
                point.observe(x)
                return y * x

            other = copy.deepcopy(made)
            compiled = torch.compile(step, fullgraph=True)
            for size in (0.5, 0.6, 3.0, 0.1):
                gradients = []
                for call, point in ((step, made), (compiled, other)):
                    x = torch.linspace(-size, 2 * size, 33, requires_grad=True)
                    call(point, x).sum().backward()
                    gradients.append(x.grad)
                torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)

    @parameterized.expand([("LSTM", True, True), ("GRU", False, True), ("LSTM", True, False)])
    def test_evaluation(self, cell: str, split: bool, qat: bool) -> None:
        made = layer_of(cell, 5, 7, split_gates=split).observe(qat=qat)
        x = torch.randn(2, 3, 5)
        made(x)
        freeze_observers(made.eval())
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x)[0], made(x)[0])


class TestState:
    @parameterized.expand(MODES)
    def test_state_dict(self, cell: str, split: bool, qat: bool) -> None:
        plain = layer_of(cell, 5, 7, split_gates=split)
        made = copy.deepcopy(plain).observe(qat=qat)
        made(torch.randn(4, 3, 5))
        state = made.state_dict()
        extra = [key for key in state if key not in plain.state_dict()]
        assert extra
        assert all(key.startswith("points.") for key in extra)
        with pytest.raises(RuntimeError, match=r"Missing key\(s\).*points\.input_l0"):
            made.load_state_dict(plain.state_dict())
        made.load_state_dict(plain.state_dict(), strict=False)
        made.parts()["hidden_state"].row()
        for key in extra:
            assert torch.equal(made.state_dict()[key], state[key]), key

        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        other = layer_of(cell, 5, 7, split_gates=split).observe(qat=qat)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        for name, point in made.parts().items():
            assert torch.equal(point.row(), other.parts()[name].row())

    @parameterized.expand(MODES)
    def test_copies(self, cell: str, split: bool, qat: bool) -> None:
        made = layer_of(cell, 5, 7, split_gates=split).observe(qat=qat)
        x = torch.randn(4, 3, 5)
        made(x)
        made.eval()
        for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(copied(x)[0], made(x)[0])
            assert copied.qat == qat
        meta = layer_of(cell, 5, 7, split_gates=split, device="meta").observe(qat=qat)
        meta(x.to("meta"))
        meta.load_state_dict(made.state_dict(), assign=True)
        assert torch.equal(meta.eval()(x)[0], made(x)[0])

    def test_observing_anew_starts_over(self) -> None:
        made = QuantizableLSTM(5, 7).observe()
        made(torch.randn(4, 3, 5))
        assert made.observe(qat=True) is made
        with pytest.raises(ValueError, match="input_l0"):
            made.parts()["input"].row()

    @parameterized.expand(itertools.product(("LSTM", "GRU"), (False, True)))
    def test_to_float_leaves_the_points_behind(self, cell: str, split: bool) -> None:
        made = layer_of(cell, 5, 7, split_gates=split).observe(qat=True)
        back = made.to_float()
        assert type(back) is LAYERS[cell][0]
        assert back.weight_ih_l0 is made.weight_ih_l0
        cell_made = (QuantizableLSTMCell if cell == "LSTM" else QuantizableGRUCell)(5, 7)
        assert len(cell_made.observe().to_float().state_dict()) == 4
