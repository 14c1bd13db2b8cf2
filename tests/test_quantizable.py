"""QuantizableLSTM, QuantizableGRU and their cells in float: `nn.LSTM`'s contract, in full."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from parameterized import parameterized
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
)
from torch.utils._python_dispatch import TorchDispatchMode

import qnn
from qnn.nn.recurrent.quantizable import QuantizableGRU, QuantizableLSTM
from qnn.nn.recurrent.quantizable_cell import QuantizableGRUCell, QuantizableLSTMCell
from tests.common import forked

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

LAYERS = {"LSTM": (nn.LSTM, QuantizableLSTM), "GRU": (nn.GRU, QuantizableGRU)}
CELLS = {"LSTM": (nn.LSTMCell, QuantizableLSTMCell), "GRU": (nn.GRUCell, QuantizableGRUCell)}
# What float results may err by, over the larger of 1 and the largest value.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}
BOTH = [("LSTM",), ("GRU",)]
EVERY = [(cell, split) for cell in LAYERS for split in (False, True)]


def pair(
    cell: str, *args: Any, split_gates: bool = False, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """torch's layer and qnn's with the same weights, each with its own."""
    torch_class, qnn_class = LAYERS[cell]
    plain = torch_class(*args, **options)
    made = qnn_class(*args, **options, split_gates=split_gates)
    made.load_state_dict(plain.state_dict())
    return plain, made


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, whatever holds them."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result if part is not None for tensor in tensors(part)]


def assert_close(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor], what: str = "") -> None:
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (what, index, a.shape, b.shape)
        if a.numel() == 0 or not a.is_floating_point():
            continue
        bound = TOLERANCE[a.dtype] * max(1.0, b.abs().max().item())
        error = (a - b).abs().max().item()
        assert error <= bound, f"{what}: tensor {index} errs by {error:.2e}"


def run(layer: nn.Module, inputs: list[torch.Tensor], call: Callable[..., Any]) -> Any:
    """The results, and the gradients of the inputs and of all parameters."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    layer.zero_grad()
    result = tensors(call(layer, *inputs))
    floats = [tensor for tensor in result if tensor.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (tensor * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)).sum()
        for tensor in floats
    )
    loss.backward()
    used = [tensor.grad for tensor in inputs if tensor.grad is not None]
    return result, used + [parameter.grad for parameter in layer.parameters()]


def assert_same_layer(
    plain: nn.Module, made: nn.Module, inputs: list[torch.Tensor], call: Callable[..., Any]
) -> None:
    """Results and gradients agree."""
    got, got_gradients = run(made, inputs, call)
    want, want_gradients = run(plain, inputs, call)
    assert_close(got, want, "results")
    assert_close(got_gradients, want_gradients, "gradients")


def states(
    layer: Any, batch: int | None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Random initial states; without a batch axis if `batch` is None."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    middle = () if batch is None else (batch,)
    h = torch.randn(rows, *middle, layer.proj_size or layer.hidden_size, dtype=dtype)
    if layer.mode == "GRU":
        return (h,)
    return h, torch.randn(rows, *middle, layer.hidden_size, dtype=dtype)


def with_states(layer: nn.Module, x: torch.Tensor, *given: torch.Tensor, **options: Any) -> Any:
    if not given:
        return layer(x, **options)
    return layer(x, given[0] if len(given) == 1 else tuple(given), **options)


class TestGrid:
    """Outputs, states and gradients equal torch's over every option."""

    @parameterized.expand(
        [
            (cell, split, dtype)
            for cell, split in EVERY
            for dtype in (torch.float64, torch.float32, torch.bfloat16)
        ]
    )
    def test_b154_equals_torch(self, cell: str, split: bool, dtype: torch.dtype) -> None:
        flags = itertools.product((1, 2), *[(False, True)] * 5)
        for layers, bias, batch_first, bidirectional, projected, initial in flags:
            if projected and cell == "GRU":
                continue
            # The other dtypes differ in rounding alone: a quarter of the grid, with every option.
            if dtype != torch.float64 and (initial != bias or batch_first != bidirectional):
                continue
            options: dict[str, Any] = {"num_layers": layers, "bias": bias, "dtype": dtype}
            options |= {"batch_first": batch_first, "bidirectional": bidirectional}
            options |= {"proj_size": 3} if projected else {}
            plain, made = pair(cell, 5, 7, split_gates=split, **options)
            x = torch.randn(2, 4, 5, dtype=dtype)
            given = states(plain, 4 if not batch_first else 2, dtype) if initial else ()
            assert_same_layer(plain, made, [x, *given], with_states)

    @parameterized.expand([(cell, split, d) for cell, split in EVERY for d in (1, 2)])
    def test_cells_equal_torch(self, cell: str, split: bool, axes: int) -> None:
        torch_class, qnn_class = CELLS[cell]
        for bias, dtype, initial in itertools.product(
            (True, False), (torch.float64, torch.float32), (False, True)
        ):
            plain = torch_class(5, 7, bias, dtype=dtype)
            made = qnn_class(5, 7, bias, dtype=dtype, split_gates=split)
            made.load_state_dict(plain.state_dict())
            middle = (3,) if axes == 2 else ()
            given = [
                torch.randn(*middle, 7, dtype=dtype) for _ in range(2 if cell == "LSTM" else 1)
            ]
            x = torch.randn(*middle, 5, dtype=dtype)
            assert_same_layer(plain, made, [x, *given] if initial else [x], with_states)

    @parameterized.expand([(cell,) for cell in LAYERS])
    def test_without_split_gates_the_kernel_is_torchs(self, cell: str) -> None:
        """So the bits are the same."""
        plain, made = pair(cell, 16, 32, num_layers=2, bidirectional=True)
        x = torch.randn(9, 4, 16)
        for a, b in zip(tensors(plain(x)), tensors(made(x)), strict=True):
            assert torch.equal(a, b)

    @parameterized.expand(EVERY)
    def test_non_contiguous_input(self, cell: str, split: bool) -> None:
        plain, made = pair(cell, 5, 7, split_gates=split, bidirectional=True)
        x = torch.randn(5, 6, 4).permute(2, 1, 0)
        given = [state.transpose(0, 1).contiguous().transpose(0, 1) for state in states(plain, 6)]
        assert_same_layer(plain, made, [x, *given], with_states)
        x, given = (
            torch.randn(4, 12, 5)[:, ::2],
            [state.expand(-1, 6, -1) for state in states(plain, 1)],
        )
        assert_close(tensors(with_states(made, x, *given)), tensors(with_states(plain, x, *given)))


class TestLengths:
    @parameterized.expand(EVERY)
    def test_packed_sequence(self, cell: str, split: bool) -> None:
        for ordered, initial in itertools.product((True, False), (True, False)):
            plain, made = pair(cell, 5, 7, 2, bidirectional=True, split_gates=split)
            lengths = torch.tensor([6, 4, 4, 1] if ordered else [4, 1, 6, 4])
            given = states(plain, 4) if initial else ()

            def call(layer: nn.Module, x: torch.Tensor, *given: torch.Tensor) -> Any:
                packed = pack_padded_sequence(x, lengths, enforce_sorted=ordered)  # noqa: B023
                y, last = with_states(layer, packed, *given)
                assert isinstance(y, PackedSequence)
                return y, last

            assert_same_layer(plain, made, [torch.randn(6, 4, 5), *given], call)

    @parameterized.expand(EVERY)
    def test_lengths_are_the_padded_form(self, cell: str, split: bool) -> None:
        for batch_first in (False, True):
            plain, made = pair(
                cell, 5, 7, 2, bidirectional=True, batch_first=batch_first, split_gates=split
            )
            lengths = torch.tensor([4, 1, 6, 4])
            x = torch.randn(4, 6, 5) if batch_first else torch.randn(6, 4, 5)
            given = states(plain, 4)

            def packed(layer: nn.Module, x: torch.Tensor, *given: torch.Tensor) -> Any:
                data = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)  # noqa: B023
                y, last = with_states(layer, data, *given)
                return pad_packed_sequence(y, batch_first)[0], last  # noqa: B023

            def padded(layer: nn.Module, x: torch.Tensor, *given: torch.Tensor) -> Any:
                return with_states(layer, x, *given, lengths=lengths)  # noqa: B023

            got, want = run(made, [x, *given], padded), run(plain, [x, *given], packed)
            assert_close(got[0], want[0], "results")
            assert_close(got[1], want[1], "gradients")

    @parameterized.expand(EVERY)
    def test_padding_is_never_seen(self, cell: str, split: bool) -> None:
        """Not even as a NaN, in outputs or gradients."""
        _, made = pair(cell, 5, 7, 2, bidirectional=True, split_gates=split)
        lengths, x = torch.tensor([2, 3]), torch.randn(3, 2, 5)
        call = lambda layer, x: layer(x, lengths=lengths)  # noqa: E731
        want = run(made, [x], call)
        x[2, 0] = torch.nan
        got = run(made, [x], call)
        assert_close(got[0], want[0])
        assert_close(got[1][1:], want[1][1:])
        assert got[0][0][2, 0].abs().max() == 0

    @parameterized.expand(EVERY)
    def test_an_empty_sequence_keeps_its_states(self, cell: str, split: bool) -> None:
        _, made = pair(cell, 5, 7, split_gates=split)
        given = states(made, 2)
        y, last = with_states(made, torch.randn(3, 2, 5), *given, lengths=torch.tensor([0, 3]))
        assert y[:, 0].abs().max() == 0
        for state, first in zip(tensors(last), given, strict=True):
            assert torch.equal(state[:, 0], first[:, 0])

    def test_refused(self) -> None:
        lstm, x = QuantizableLSTM(5, 7), torch.randn(3, 2, 5)
        packed = pack_padded_sequence(x, torch.tensor([3, 2]))
        for call, message in (
            (
                lambda: lstm(x, lengths=torch.tensor([3])),
                r"QuantizableLSTM\(5, 7\): lengths .*\[1\]",
            ),
            (
                lambda: lstm(x, lengths=torch.tensor([3.0, 1.0])),
                "lengths must be 2 whole numbers.*float32",
            ),
            (lambda: lstm(x, lengths=torch.tensor([4, 1])), r"0 … 3, .*; got 1 … 4"),
            (lambda: lstm(x, lengths=torch.tensor([-1, 1])), r"0 … 3, .*; got -1 … 1"),
            (lambda: lstm(x[:, 0], lengths=torch.tensor([3])), "needs a batch"),
            (lambda: lstm(packed, lengths=torch.tensor([3, 2])), "has its own lengths"),
        ):
            with pytest.raises(ValueError, match=message):
                call()


@settings(max_examples=100)
@given(st.data())
def test_random_options(data: st.DataObject) -> None:
    """Shapes and options at random, both cells, against torch; lengths against PackedSequence."""
    flag = lambda: data.draw(st.booleans())  # noqa: E731
    size = lambda most: data.draw(st.integers(1, most))  # noqa: E731
    cell = data.draw(st.sampled_from(["LSTM", "GRU"]))
    hidden = data.draw(st.integers(2, 9))
    options: dict[str, Any] = {"num_layers": size(3), "bias": flag(), "batch_first": flag()}
    options |= {"bidirectional": flag()}
    options |= {"proj_size": data.draw(st.integers(0, hidden - 1))} if cell == "LSTM" else {}
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    steps, batch, width = size(5), data.draw(st.integers(0, 4)), size(9)
    form = data.draw(st.sampled_from(["padded", "packed", "lengths", "unbatched"]))
    torch.manual_seed(steps + 10 * batch)
    split = flag()
    plain, made = pair(cell, width, hidden, split_gates=split, dtype=dtype, **options)
    lengths = None
    first = options["batch_first"]
    if form in ("packed", "lengths"):
        batch = max(batch, 1)
        lengths = torch.tensor([data.draw(st.integers(1, steps)) for _ in range(batch)])
        lengths[data.draw(st.integers(0, batch - 1))] = steps
    x = torch.randn(*((batch, steps) if first else (steps, batch)), width, dtype=dtype)
    if form == "unbatched":
        x = torch.randn(steps, width, dtype=dtype)
    given = states(plain, None if form == "unbatched" else batch, dtype) if flag() else ()

    def call(layer: nn.Module, x: torch.Tensor, *given: torch.Tensor) -> Any:
        if lengths is None:
            return with_states(layer, x, *given)
        if form == "lengths" and layer is made:
            return with_states(layer, x, *given, lengths=lengths)
        packed = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
        y, last = with_states(layer, packed, *given)
        return pad_packed_sequence(y, first)[0], last

    assert_same_layer(plain, made, [x, *given], call)


class TestDropout:
    @parameterized.expand(EVERY)
    def test_the_same_seed_drops_the_same_values(self, cell: str, split: bool) -> None:
        plain, made = pair(cell, 5, 7, 3, dropout=0.4, bidirectional=True, split_gates=split)
        x = torch.randn(6, 4, 5)
        packed = pack_padded_sequence(x, torch.tensor([6, 4, 4, 1]))
        for either in (x, packed):
            results = []
            for layer in (plain, made):
                torch.manual_seed(5)
                results.append(tensors(layer(either)))
            assert_close(results[1], results[0])
        assert not torch.equal(made(x)[0], made(x)[0])
        assert torch.equal(made.eval()(x)[0], made(x)[0])

    @parameterized.expand(EVERY)
    def test_dropping_everything_leaves_the_last_layer_its_biases(
        self, cell: str, split: bool
    ) -> None:
        plain, made = pair(cell, 5, 7, 2, dropout=1.0, split_gates=split)
        x = torch.randn(6, 4, 5)
        assert_close(tensors(made(x)), tensors(plain(x)))
        lengths = torch.full((4,), 6)
        assert_close(tensors(made(x, lengths=lengths)), tensors(plain(x)))
        assert torch.allclose(made(x)[0], made(2 * x)[0])

    @parameterized.expand(EVERY)
    def test_the_mean_over_seeds_is_that_of_torch(self, cell: str, split: bool) -> None:
        plain, made = pair(cell, 5, 7, 2, dropout=0.3, split_gates=split)
        x, lengths = torch.randn(3, 400, 5), torch.full((400,), 3)
        torch.manual_seed(7)
        got = made(x, lengths=lengths)[0]
        want, still = plain(x)[0], plain.eval()(x)[0]
        # 400 samples: the standard error of a mean is a twentieth of the spread.
        assert (got.mean(1) - want.mean(1)).abs().max() < 0.03
        assert (got - still).std() > 0.005

    @parameterized.expand(BOTH)
    def test_warns_about_one_layer_as_torch_does(self, cell: str) -> None:
        for make in LAYERS[cell]:
            with pytest.warns(UserWarning, match="dropout option adds dropout after all but"):
                make(5, 7, dropout=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = LAYERS[cell][0](5, 7, dropout=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = LAYERS[cell][1].from_float(layer)
            assert made.dropout == 0.5
            assert made.to_float().dropout == 0.5


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "no error"


class TestErrors:
    @parameterized.expand(
        [
            ("sizes", (0, 4), {}),
            ("hidden", (4, 0), {}),
            ("float_size", (4.0, 4), {}),
            ("layers", (4, 4, 0), {}),
            ("bias", (4, 4, 1, 1), {}),
            ("batch_first", (4, 4, 1, True, 1), {}),
            ("dropout", (4, 4, 2), {"dropout": 1.5}),
            ("dropout_bool", (4, 4, 2), {"dropout": True}),
            ("projection", (4, 4), {"proj_size": 4}),
            ("projection_below_0", (4, 4), {"proj_size": -1}),
        ]
    )
    def test_constructor(self, _: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        for plain, made in LAYERS.values():
            want = outcome(lambda: plain(*args, **options))  # noqa: B023
            assert want != "no error"
            assert outcome(lambda: made(*args, **options)) == want  # noqa: B023

    def test_split_gates_is_a_bool(self) -> None:
        for make in (*(pair[1] for pair in LAYERS.values()), *(pair[1] for pair in CELLS.values())):
            with pytest.raises(TypeError, match="split_gates should be of type bool, got: int"):
                make(5, 7, split_gates=1)

    # On a packed sequence nn.LSTM checks nothing itself, so there nn.GRU is the measure.
    FORWARD: tuple[tuple[str, Callable[[Any, Callable[..., Any]], Any]], ...] = (
        ("1_axis", lambda m, hx: m(torch.randn(5))),
        ("4_axes", lambda m, hx: m(torch.randn(1, 2, 3, 5))),
        ("width", lambda m, hx: m(torch.randn(4, 3, 6))),
        ("dtype", lambda m, hx: m(torch.randn(4, 3, 5).double())),
        ("integers", lambda m, hx: m(torch.ones(4, 3, 5, dtype=torch.int64))),
        ("no_steps", lambda m, hx: m(torch.randn(0, 3, 5))),
        ("no_steps_unbatched", lambda m, hx: m(torch.randn(0, 5))),
        ("hx_batch", lambda m, hx: m(torch.randn(4, 3, 5), hx(1, 2, 7))),
        ("hx_width", lambda m, hx: m(torch.randn(4, 3, 5), hx(1, 3, 8))),
        ("hx_layers", lambda m, hx: m(torch.randn(4, 3, 5), hx(2, 3, 7))),
        ("hx_2_axes", lambda m, hx: m(torch.randn(4, 3, 5), hx(3, 7))),
        ("hx_3_axes_unbatched", lambda m, hx: m(torch.randn(4, 5), hx(1, 1, 7))),
        ("hx_device", lambda m, hx: m(torch.randn(4, 3, 5), hx(1, 3, 7, device="meta"))),
        (
            "device",
            lambda m, hx: m(torch.randn(4, 3, 5, device="meta"), hx(1, 3, 7, device="meta")),
        ),
    )

    @parameterized.expand([(n, cell, split) for n, _ in FORWARD for cell, split in EVERY])
    def test_forward(self, name: str, cell: str, split: bool) -> None:
        call = dict(self.FORWARD)[name]
        plain, made = pair(cell, 5, 7, split_gates=split)

        def hx(*shape: int, **options: Any) -> Any:
            state = torch.zeros(*shape, **options)
            return state if cell == "GRU" else (state, state)

        want = outcome(lambda: call(plain, hx))
        assert want != "no error"
        assert outcome(lambda: call(made, hx)) == want

    @parameterized.expand(EVERY)
    def test_forward_of_a_packed_sequence(self, cell: str, split: bool) -> None:
        gru, made = nn.GRU(5, 7), LAYERS[cell][1](5, 7, split_gates=split)
        packed = pack_padded_sequence(torch.randn(3, 2, 6), torch.tensor([3, 1]))
        assert outcome(lambda: made(packed)) == outcome(lambda: gru(packed))
        packed = pack_padded_sequence(torch.randn(3, 2, 5), torch.tensor([3, 1]))
        state = torch.zeros(1, 3, 7)
        with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, 2, 7\), got \[1, 3"):
            made(packed, state if cell == "GRU" else (state, state))

    @parameterized.expand(EVERY)
    def test_states_of_another_dtype_are_refused(self, cell: str, split: bool) -> None:
        _, made = pair(cell, 5, 7, split_gates=split)
        given = states(made, 3, torch.float64)
        for options in ({}, {"lengths": torch.tensor([2, 1, 1])}):
            with pytest.raises(RuntimeError):
                with_states(made, torch.randn(2, 3, 5), *given, **options)

    @parameterized.expand(EVERY)
    def test_cells(self, cell: str, split: bool) -> None:
        plain, made = CELLS[cell][0](5, 7), CELLS[cell][1](5, 7, split_gates=split)

        def hx(*shape: int) -> Any:
            state = torch.zeros(*shape)
            return state if cell == "GRU" else (state, state)

        for call in (
            lambda m: m(torch.randn(1, 3, 5)),
            lambda m: m(torch.randn(3, 6)),
            lambda m: m(torch.randn(3, 5), hx(2, 7)),
            lambda m: m(torch.randn(3, 5), hx(3, 8)),
            lambda m: m(torch.randn(3, 5), hx(1, 3, 7)),
        ):
            want = outcome(lambda: call(plain))  # noqa: B023
            assert want != "no error"
            assert outcome(lambda: call(made)) == want  # noqa: B023


class TestState:
    @parameterized.expand(BOTH)
    def test_state_dict_goes_everywhere(self, cell: str) -> None:
        """From and to torch's layer, and between both settings of `split_gates`."""
        torch_class, qnn_class = LAYERS[cell]
        layers = [
            torch_class(5, 7, 2, bidirectional=True),
            qnn_class(5, 7, 2, bidirectional=True),
            qnn_class(5, 7, 2, bidirectional=True, split_gates=True),
        ]
        x = torch.randn(4, 3, 5)
        for source, target in itertools.permutations(layers, 2):
            for parameter in source.parameters():
                nn.init.normal_(parameter, std=0.3)
            assert list(source.state_dict()) == list(target.state_dict())
            buffer = io.BytesIO()
            torch.save(source.state_dict(), buffer)
            buffer.seek(0)
            target.load_state_dict(torch.load(buffer, weights_only=True))
            assert_close(tensors(target(x)), tensors(source(x)))

    @parameterized.expand([(cell, split) for cell, split in EVERY])
    def test_initialised_as_torch_does(self, cell: str, split: bool) -> None:
        for classes in (LAYERS, CELLS):
            made = []
            for make, options in zip(classes[cell], ({}, {"split_gates": split}), strict=True):
                torch.manual_seed(3)
                made.append(make(5, 7, **options))
            for (name, a), (other, b) in zip(
                made[0].named_parameters(), made[1].named_parameters(), strict=True
            ):
                assert name == other
                assert torch.equal(a, b)

    @parameterized.expand(EVERY)
    def test_from_float_and_back_hands_over_the_parameters(self, cell: str, split: bool) -> None:
        for classes in (LAYERS, CELLS):
            torch_class, qnn_class = classes[cell]
            layer = torch_class(5, 7, bias=False).eval()
            made = qnn_class.from_float(layer, split_gates=split)
            back = made.to_float()
            assert type(back) is torch_class
            for other in (made, back):
                assert not other.training
                for name, parameter in layer.named_parameters():
                    assert getattr(other, name) is parameter
            x = torch.randn(3, 4, 5) if classes is LAYERS else torch.randn(4, 5)
            assert_close(tensors(made(x)), tensors(layer(x)))
            with pytest.raises(TypeError, match=r"takes an nn.*, got Linear"):
                qnn_class.from_float(nn.Linear(2, 2))

    def test_tied_weights_stay_tied(self) -> None:
        model = nn.ModuleList([nn.LSTM(7, 7), nn.LSTM(7, 7)])
        model[1].weight_hh_l0 = model[0].weight_hh_l0
        made = [QuantizableLSTM.from_float(layer) for layer in model]
        assert made[0].weight_hh_l0 is made[1].weight_hh_l0

    @parameterized.expand(EVERY)
    def test_copies(self, cell: str, split: bool) -> None:
        _, made = pair(cell, 5, 7, 2, bidirectional=True, split_gates=split)
        x = torch.randn(4, 3, 5)
        want = tensors(made(x))
        for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert_close(tensors(copied(x)), want)
        meta = LAYERS[cell][1](5, 7, 2, bidirectional=True, split_gates=split, device="meta")
        assert meta(x.to("meta"))[0].shape == want[0].shape
        meta.load_state_dict(made.state_dict(), assign=True)
        assert_close(tensors(meta(x)), want)
        half = made.to(torch.bfloat16)
        assert {t.dtype for t in tensors(half(x.bfloat16()))} == {torch.bfloat16}

    @parameterized.expand(EVERY)
    def test_functional_call_reads_the_weights_it_is_given(self, cell: str, split: bool) -> None:
        plain, made = pair(cell, 5, 7, split_gates=split)
        weights = {n: torch.randn_like(p) for n, p in plain.named_parameters()}
        x = torch.randn(4, 3, 5)
        assert_close(
            tensors(torch.func.functional_call(made, weights, x)),
            tensors(torch.func.functional_call(plain, weights, x)),
        )

    def test_repr(self) -> None:
        for layer in (
            QuantizableLSTM(5, 7, proj_size=3, split_gates=True),
            QuantizableGRU(5, 7, num_layers=2, bidirectional=True),
            QuantizableLSTMCell(5, 7, bias=False),
        ):
            made = eval(repr(layer), {type(layer).__name__: type(layer)})  # noqa: S307
            assert repr(made) == repr(layer)


class Widths(TorchDispatchMode):
    """Every tensor that an op takes or makes, if it has two axes or more: its last width."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.dim() >= 2:
                self.seen.add(value.shape[-1])
        return result


class TestSplitGates:
    """No tensor of two axes or more is as wide as all gates. I, H, P, B and T are such that 4H and
    3H are no other size.
    """

    OPTIONS = (
        ("LSTM", {"num_layers": 2, "bidirectional": True}),
        ("LSTM", {"proj_size": 5}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
    )

    @parameterized.expand([(*o, qat) for o in OPTIONS for qat in (None, False, True)])
    def test_every_op(self, cell: str, options: dict[str, Any], qat: bool | None) -> None:
        width = 11 * (4 if cell == "LSTM" else 3)
        for split in (True, False):
            layer = LAYERS[cell][1](6, 11, **options, split_gates=split)
            layer = layer if qat is None else layer.observe(qat=qat)
            with Widths() as widths:
                layer(torch.randn(3, 2, 6))
                y, _ = layer(torch.randn(3, 2, 6), lengths=torch.tensor([3, 1]))
                y.sum().backward()
            assert (width in widths.seen) == (not split), sorted(widths.seen)

    @parameterized.expand(BOTH)
    def test_compiled_graphs(self, cell: str) -> None:
        width, seen = 11 * (4 if cell == "LSTM" else 3), set()

        def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
            for node in graph.graph.nodes:
                for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
                    if isinstance(value, torch.Tensor) and value.dim() >= 2:
                        seen.add(value.shape[-1])
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        for split in (True, False):
            seen.clear()
            torch._dynamo.reset()
            layer = LAYERS[cell][1](6, 11, split_gates=split)
            y, _ = torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(2, 3, 6))
            y.sum().backward()
            assert (width in seen) == (not split), sorted(seen)


class TestFaults:
    """What torch's own quantisable LSTM does wrong."""

    @parameterized.expand(EVERY)
    def test_dropout_is_not_ignored(self, cell: str, split: bool) -> None:
        made = LAYERS[cell][1](5, 7, 2, dropout=0.5, split_gates=split)
        x = torch.randn(4, 3, 5)
        assert not torch.equal(made(x)[0], made(x)[0])

    def test_projections(self) -> None:
        y, (h, c) = QuantizableLSTM(5, 7, proj_size=3, split_gates=True)(torch.randn(4, 2, 5))
        assert (y.shape[-1], h.shape[-1], c.shape[-1]) == (3, 3, 7)

    @parameterized.expand(EVERY)
    def test_packed_sequences(self, cell: str, split: bool) -> None:
        packed = pack_padded_sequence(torch.randn(4, 2, 5), torch.tensor([4, 2]))
        y, _ = LAYERS[cell][1](5, 7, split_gates=split)(packed)
        assert torch.equal(y.batch_sizes, packed.batch_sizes)

    @parameterized.expand(EVERY)
    def test_shape_of_an_unbatched_input(self, cell: str, split: bool) -> None:
        for batch_first in (False, True):
            made = LAYERS[cell][1](5, 7, batch_first=batch_first, split_gates=split)
            y, last = made(torch.randn(4, 5))
            assert y.shape == (4, 7)
            assert {state.shape for state in tensors(last)} == {(1, 7)}

    @parameterized.expand(EVERY)
    def test_two_bidirectional_layers(self, cell: str, split: bool) -> None:
        y, last = LAYERS[cell][1](5, 7, 2, bidirectional=True, split_gates=split)(
            torch.randn(4, 3, 5)
        )
        assert (y.shape, tensors(last)[0].shape) == ((4, 3, 14), (4, 3, 7))

    @parameterized.expand([(*e, obs) for e in EVERY for obs in (None, False, True)])
    def test_an_empty_batch(self, cell: str, split: bool, qat: bool | None) -> None:
        made = LAYERS[cell][1](5, 7, 2, bidirectional=True, split_gates=split)
        made = made if qat is None else made.observe(qat=qat)
        y, last = made(torch.randn(4, 0, 5))
        assert (y.shape, tensors(last)[0].shape) == ((4, 0, 14), (4, 0, 7))
        y.sum().backward()
        y, _ = made(torch.randn(4, 0, 5), lengths=torch.zeros(0, dtype=torch.int64))
        assert y.shape == (4, 0, 14)

    @parameterized.expand(EVERY)
    def test_no_steps_is_refused_in_words(self, cell: str, split: bool) -> None:
        made = LAYERS[cell][1](5, 7, split_gates=split)
        with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
            made(torch.randn(0, 3, 5))

    @parameterized.expand([(*e, d) for e in EVERY for d in (torch.bfloat16, torch.float64)])
    def test_states_have_the_dtype_of_the_input(
        self, cell: str, split: bool, dtype: torch.dtype
    ) -> None:
        made = LAYERS[cell][1](5, 7, split_gates=split, dtype=dtype)
        assert {t.dtype for t in tensors(made(torch.randn(4, 3, 5, dtype=dtype)))} == {dtype}

    @parameterized.expand(EVERY)
    def test_no_dynamo_switch(self, cell: str, split: bool) -> None:
        assert not torch._dynamo.config.allow_rnn
        made = LAYERS[cell][1](5, 7, split_gates=split)
        x, lengths = torch.randn(3, 2, 5), torch.tensor([3, 1])
        compiled = torch.compile(made, fullgraph=True, backend="eager")
        assert_close(tensors(compiled(x)), tensors(made(x)))
        assert_close(tensors(compiled(x, lengths=lengths)), tensors(made(x, lengths=lengths)))
        with torch.no_grad():
            assert_close(tensors(compiled(x)), tensors(made(x)))


class TestGraphs:
    @parameterized.expand([("LSTM", False), ("GRU", True)])
    def test_padded_lengths_bound_the_graphs_of_training(self, cell: str, qat: bool) -> None:
        torch.manual_seed(0)
        layer = (QuantizableLSTM if cell == "LSTM" else QuantizableGRU)(5, 7).train()
        if qat:
            layer.observe(qat=True)
            layer(torch.randn(4, 2, 5))
            qnn.freeze_observers(layer)
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        for steps in (2, 3, 4, 5, 6):
            x = torch.randn(steps, 2, 5)
            padded = nn.functional.pad(x, (0, 0, 0, 0, 0, -steps % 3), value=torch.nan)
            found = []
            for y in (layer(x)[0], compiled(padded, None, torch.tensor([steps] * 2))[0]):
                layer.zero_grad()
                y.square().sum().backward()
                found.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want)
        assert counter.frame_count == 2


class TestPreparedAgain:
    def test_a_layer_without_points_gets_them(self) -> None:
        for made in (QuantizableLSTM(5, 7), QuantizableGRU(5, 7)):
            prepared = qnn.prepare(nn.Sequential(made))
            assert "hidden_state" in prepared[0].parts()
            assert made.parts() == {}


class TestModes:
    @parameterized.expand([("LSTM", False), ("GRU", True)])
    def test_compiled_training_step(self, cell: str, split: bool) -> None:
        plain, made = pair(cell, 5, 7, split_gates=split)
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        x, lengths = torch.randn(2, 3, 5), torch.tensor([2, 1, 1])

        def padded(layer: nn.Module, x: torch.Tensor) -> Any:
            return layer(x, lengths=lengths)

        got, want = run(compiled, [x], padded), run(made, [x], padded)
        assert_close(got[0], want[0])
        assert_close(got[1], want[1])
        assert_same_layer(plain, compiled, [x], with_states)

    def test_inductor(self) -> None:
        made = QuantizableLSTM(5, 7)
        compiled = torch.compile(made, fullgraph=True)
        x = torch.randn(2, 3, 5)
        assert_close(run(compiled, [x], with_states)[1], run(made, [x], with_states)[1])

    @parameterized.expand([("strict", True), ("not_strict", False)])
    def test_export(self, _: str, strict: bool) -> None:
        made, x = QuantizableLSTM(5, 7).eval(), torch.randn(3, 2, 5)
        program = torch.export.export(made, (x,), strict=strict)
        assert_close(tensors(program.module()(x)), tensors(made(x)))
        lengths = torch.tensor([3, 1])
        program = torch.export.export(made, (x,), {"lengths": lengths}, strict=strict)
        assert_close(
            tensors(program.module()(x, lengths=lengths)), tensors(made(x, lengths=lengths))
        )

    @parameterized.expand(EVERY)
    def test_vmap_and_autocast(self, cell: str, split: bool) -> None:
        _, made = pair(cell, 5, 7, split_gates=split)
        x, lengths = torch.randn(4, 3, 2, 5), torch.tensor([3, 3])
        if split or runs_in_bfloat16(cell):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = made(x[0])[0]
            assert (y.float() - made(x[0])[0]).abs().max() < 0.03
        with torch.no_grad():
            # torch's kernels have no rule for vmap, so the cell is one with single operations.
            steps = CELLS[cell][1](5, 7, split_gates=True)
            h = tensors(torch.vmap(steps)(x[0]))[0]
            want = tensors(steps(x[0].flatten(0, 1)))[0]
            assert torch.allclose(h, want.view_as(h), atol=1e-6)
        assert made(x[1], lengths=lengths)[0].shape == (3, 2, 7)


@functools.cache
def runs_in_bfloat16(cell: str) -> bool:
    """Whether torch's own layer can: oneDNN has no such LSTM for a CPU without AVX-512."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            getattr(nn, cell)(5, 7)(torch.randn(3, 2, 5))
        except RuntimeError as error:
            if "primitive descriptor" not in str(error):
                raise
            return False
    return True


def test_samples_of_torchs_own_module_tests() -> None:
    """In a child process: torch's test helpers change global switches when they are imported."""
    out = forked(
        """
        import copy, pickle, sys, types, unittest, warnings
        import torch
        from torch import nn
        # A dependency of torch's test suite that its helpers import, and these samples do not use.
        stub = types.ModuleType("expecttest")
        stub.TestCase, stub.assert_expected_inline = unittest.TestCase, None
        sys.modules.setdefault("expecttest", stub)
        from torch.testing._internal.common_modules import module_db
        from qnn.nn.recurrent.quantizable import QuantizableGRU, QuantizableLSTM
        from qnn.nn.recurrent.quantizable_cell import QuantizableGRUCell, QuantizableLSTMCell
        warnings.simplefilter("ignore")
        drop_in = {nn.LSTM: QuantizableLSTM, nn.GRU: QuantizableGRU,
                   nn.LSTMCell: QuantizableLSTMCell, nn.GRUCell: QuantizableGRUCell}
        leaves = torch.utils._pytree.tree_leaves
        mapped = torch.utils._pytree.tree_map_only
        count = 0
        for info in module_db:
            if info.module_cls not in drop_in:
                continue
            for dtype, training in ((torch.float32, True), (torch.float64, False)):
                for sample in info.module_inputs_func(info, "cpu", dtype, True, training):
                    made_with, given = sample.constructor_input, sample.forward_input
                    plain = info.module_cls(*made_with.args, **made_with.kwargs, dtype=dtype)
                    for split in (False, True):
                        make = drop_in[info.module_cls]
                        options = {**made_with.kwargs, "dtype": dtype, "split_gates": split}
                        made = make(*made_with.args, **options)
                        made.load_state_dict(plain.state_dict())
                        made.train(training), plain.train(training)
                        strided = mapped(
                            torch.Tensor,
                            lambda t: torch.stack([t, t], -1)[..., 0].detach().requires_grad_(),
                            given.args,
                        )
                        runs = (
                            (plain, given.args), (made, given.args), (made, strided),
                            (copy.deepcopy(made), given.args),
                            (pickle.loads(pickle.dumps(made)), strided),
                        )
                        results = []
                        for layer, args in runs:
                            layer.zero_grad()
                            out = leaves(layer(*args, **given.kwargs))
                            sum(t.sum() for t in out).backward()
                            results.append(out + [p.grad for p in layer.parameters()])
                        for result in results[1:]:
                            for got, want in zip(result, results[0], strict=True):
                                assert (got.shape, got.dtype) == (want.shape, want.dtype)
                                assert torch.allclose(got, want, atol=1e-5, rtol=1e-5)
                        meta = make(*made_with.args, **options, device="meta")
                        to_meta = mapped(torch.Tensor, lambda t: t.to("meta"), given.args)
                        shapes = [t.shape for t in leaves(meta(*to_meta, **given.kwargs))]
                        assert shapes == [t.shape for t in results[0][: len(shapes)]]
                        count += 1
        print(count)
        """
    )
    assert int(out.split()[-1]) >= 200
