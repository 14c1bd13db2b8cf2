"""LSTM and GRU layers in float, a loop over the steps, with a hook at each observation point.

The steps are written out and not torch's fused kernels, because every value between two of them can
be observed and fake-quantised here. What does not depend on the state stands before the loop: the
input's linears of all steps, the weights of each gate. What is observed is kept, and handed on
after the loop of one layer and direction as one tensor of all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

from qnn.functional.quantize import dequantize, quantize
from qnn.kernels.reference.recurrent import CELLS

States: TypeAlias = tuple[torch.Tensor, ...]
Quantizer: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
MakeQuantizer: TypeAlias = Callable[[torch.Tensor], Quantizer | None]


class Weights(NamedTuple):
    """The parameters of one layer and direction, in torch's shapes; G is the number of gates."""

    ih: torch.Tensor  # [G·H, I]
    hh: torch.Tensor  # [G·H, P]
    bias_ih: torch.Tensor | None = None  # [G·H]
    bias_hh: torch.Tensor | None = None
    hr: torch.Tensor | None = None  # [P, H], of an LSTM with a projection

    def fake_quantized(self) -> Weights:
        """The matrices as int8 holds them, with per-channel scales; biases as they are."""
        hr = None if self.hr is None else fake_quantize_weight(self.hr)
        ih, hh = fake_quantize_weight(self.ih), fake_quantize_weight(self.hh)
        return Weights(ih, hh, self.bias_ih, self.bias_hh, hr)


def fake_quantize_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` quantised to int8 and back, to the bit, with the gradient of the identity."""
    q, scale = quantize(weight)
    exact = dequantize(q, scale, weight.dtype)
    # Minus an exact zero: the value and the sign of a zero stay.
    return exact - (weight.detach() - weight) if torch.is_grad_enabled() else exact


class Points:
    """The observation points of one layer and direction: a value is kept, then fake-quantised.

    Args:
        quantizers: what makes, for tensors like one, the fake-quantiser of a part, or None.
        observed: the parts whose values are kept.
    """

    def __init__(self, quantizers: Mapping[str, MakeQuantizer], observed: Collection[str]) -> None:
        self.quantizers = quantizers
        self.made: dict[str, Quantizer | None] = {}
        self.steps: dict[str, list[torch.Tensor]] = {name: [] for name in observed}
        self.first: dict[str, torch.Tensor] = {}
        self.whole: dict[str, torch.Tensor] = {}

    def at(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """`value` of one step, `[B, …]`."""
        if name in self.steps:
            self.steps[name].append(value)
        return self._quantized(name, value)

    def at_all(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """`value` of all steps, `[T, B, …]`."""
        if name in self.steps:
            self.whole[name] = value
        return self._quantized(name, value)

    def at_start(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A state that the caller has given, `[B, …]`."""
        if name in self.steps:
            self.first[name] = value
        return self._quantized(name, value)

    def _quantized(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in self.quantizers:
            return value
        if name not in self.made:
            self.made[name] = self.quantizers[name](value)
        quantize = self.made[name]
        return value if quantize is None else quantize(value)

    def observed(
        self, *, reverse: bool, lengths: torch.Tensor | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What each observed part has seen, `[T or T+1, B, …]`; T+1 with a given state. It is no
        longer kept then.

        Of a sequence that is shorter than T, its valid steps follow each other over and over to
        T: so the range is that of the valid steps, their distribution close to it, and no shape
        depends on the lengths.
        """
        for name in list(self.steps):
            values = self._all_steps(name, reverse)
            if values is None or values.numel() == 0:
                continue
            if lengths is not None:
                values = _valid_steps(values, lengths)
            if name in self.first:
                values = torch.cat([values, self.first.pop(name).detach().unsqueeze(0)])
            yield name, values

    def _all_steps(self, name: str, reverse: bool) -> torch.Tensor | None:
        steps, whole = self.steps.pop(name), self.whole.pop(name, None)
        if whole is not None:
            return whole.detach()
        steps = [step.detach() for step in steps]
        return torch.stack(steps[::-1] if reverse else steps) if steps else None


def _valid_steps(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`values[t mod length, b]`; an empty sequence shows the longest one's steps."""
    steps = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    rows = torch.arange(values.shape[1], device=values.device)
    rows = torch.where(lengths > 0, rows, lengths.argmax())
    return values[steps % lengths[rows].clamp_min(1), rows]


def valid_steps(lengths: torch.Tensor, steps: int) -> torch.Tensor:
    """Which steps of which sequences are within their length: bool `[T, B, 1]`."""
    return (torch.arange(steps, device=lengths.device).unsqueeze(1) < lengths).unsqueeze(-1)


def float_layer(
    cell: str,
    x: torch.Tensor,
    states: States,
    weights: Weights,
    points: Points,
    *,
    given: bool = True,
    reverse: bool = False,
    valid: torch.Tensor | None = None,
    split_gates: bool = False,
) -> tuple[torch.Tensor, States]:
    """One layer and direction.

    LSTM, with fq_p for what `points` does to part p:

        x' = fq_input(x); h = fq_hidden_state(h0); c = fq_cell_state(c0)
        a_k = fq_input_linear_k(W_ih,k x' + b_ih,k) + fq_hidden_linear_k(W_hh,k h + b_hh,k)
        i, f, o = fq(sigmoid(a_i)), fq(sigmoid(a_f)), fq(sigmoid(a_o)); g = fq_cell_gate(tanh(a_g))
        c = fq_cell_state(f·c + i·g); t = fq_cell_tanh(tanh(c))
        h = fq_hidden_state(o·t), or fq_hidden_state(W_hr fq_projection_input(o·t))

    GRU:

        r, z = fq_reset_gate(sigmoid(a_r)), fq_update_gate(sigmoid(a_z))
        n = fq_new_gate(tanh(fq_input_linear_n(…) + r · fq_hidden_linear_n(W_hh,n h + b_hh,n)))
        h = fq_hidden_state((h − n)·z + n)

    With `split_gates` each gate has its linears and their points; without, one linear of all gates
    is one point, `input_linear` or `hidden_linear`.

    Args:
        cell: `"LSTM"` or `"GRU"`.
        x: `[T, B, I]`, T at least 1.
        states: `(h [B, P], c [B, H])`, or `(h,)`.
        given: whether the states come from the caller; zeros need no observing.
        valid: bool `[T, B, 1]`; past a sequence's end its state stays, and its output is 0.

    Returns:
        y `[T, B, P]`, and the states after the last step (of the reverse direction, the first).
    """
    gates = CELLS[cell.lower()].gates
    step = _lstm_step if cell == "LSTM" else _gru_step
    names = [f"_linear_{gate}" for gate in gates] if split_gates else ["_linear"]
    x = points.at_all("input", x)
    inputs = [
        points.at_all(f"input{name}", F.linear(x, w, b))
        for name, w, b in _rows(names, weights.ih, weights.bias_ih)
    ]
    if cell == "GRU" and not split_gates:
        inputs = list(inputs[0].chunk(3, -1))
    of_steps = [value.unbind(0) for value in inputs]
    hidden = [(f"hidden{name}", w, b) for name, w, b in _rows(names, weights.hh, weights.bias_hh)]
    if given:
        parts = ("hidden_state", "cell_state")
        states = tuple(map(points.at_start, parts, states))
    keep = None if valid is None else valid.unbind(0)
    outputs = []
    order = range(x.shape[0])
    for t in reversed(order) if reverse else order:
        h = states[0]
        linears = [points.at(name, F.linear(h, w, b)) for name, w, b in hidden]
        new = step([value[t] for value in of_steps], linears, states, weights.hr, points)
        if keep is not None:
            new = tuple(torch.where(keep[t], n, s) for n, s in zip(new, states, strict=True))
        states = new
        outputs.append(states[0])
    y = torch.stack(outputs[::-1] if reverse else outputs)
    return (y if valid is None else torch.where(valid, y, 0)), states


def _rows(
    names: list[str], weight: torch.Tensor, bias: torch.Tensor | None
) -> list[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """The rows of a weight that belong to each name."""
    if len(names) == 1:
        return [(names[0], weight, bias)]
    biases = [None] * len(names) if bias is None else bias.chunk(len(names))
    return list(zip(names, weight.chunk(len(names)), biases, strict=True))


def _lstm_step(
    inputs: list[torch.Tensor],
    hidden: list[torch.Tensor],
    states: States,
    hr: torch.Tensor | None,
    points: Points,
) -> States:
    sums = [a + b for a, b in zip(inputs, hidden, strict=True)]
    i, f, g, o = sums if len(sums) == 4 else sums[0].chunk(4, -1)
    i = points.at("input_gate", torch.sigmoid(i))
    f = points.at("forget_gate", torch.sigmoid(f))
    g = points.at("cell_gate", torch.tanh(g))
    o = points.at("output_gate", torch.sigmoid(o))
    c = points.at("cell_state", f * states[1] + i * g)
    h = o * points.at("cell_tanh", torch.tanh(c))
    if hr is not None:
        h = F.linear(points.at("projection_input", h), hr)
    return points.at("hidden_state", h), c


def _gru_step(
    inputs: list[torch.Tensor],
    hidden: list[torch.Tensor],
    states: States,
    hr: torch.Tensor | None,
    points: Points,
) -> States:
    xr, xz, xn = inputs
    ur, uz, un = hidden if len(hidden) == 3 else hidden[0].chunk(3, -1)
    r = points.at("reset_gate", torch.sigmoid(xr + ur))
    z = points.at("update_gate", torch.sigmoid(xz + uz))
    n = points.at("new_gate", torch.tanh(xn + r * un))
    return (points.at("hidden_state", (states[0] - n) * z + n),)


def float_recurrent(
    cell: str,
    x: torch.Tensor,
    states: States,
    weights: Sequence[Weights],
    points: Sequence[Points],
    *,
    bidirectional: bool = False,
    given: bool = True,
    valid: torch.Tensor | None = None,
    split_gates: bool = False,
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None,
    done: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, States]:
    """The layers of an LSTM or GRU, and both directions of each.

    Args:
        x: `[T, B, I]`.
        states: `(h [L·D, B, P], c [L·D, B, H])`, or `(h,)`.
        weights, points: of each layer and direction, in torch's order.
        valid: bool `[T, B, 1]`, see `float_layer`.
        dropout: what happens to the output of each layer but the last.
        done: called with the index of each layer and direction after its steps.

    Returns:
        y `[T, B, D·P]`, and the last states, in the shapes of `states`.
    """
    directions = 2 if bidirectional else 1
    if valid is not None:
        # A NaN after the end would reach the gradients as 0 · NaN.
        x = torch.where(valid, x, 0)
    last = []
    for layer in range(0, len(weights), directions):
        outputs = []
        for direction in range(directions):
            at = layer + direction
            y, state = float_layer(
                cell,
                x,
                tuple(state[at] for state in states),
                weights[at],
                points[at],
                given=given,
                reverse=direction == 1,
                valid=valid,
                split_gates=split_gates,
            )
            outputs.append(y)
            last.append(state)
            if done is not None:
                done(at)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout is not None and layer + directions < len(weights):
            x = dropout(x)
    return x, tuple(map(torch.stack, zip(*last, strict=True)))
