"""The recurrent ops: an LSTM or a GRU, one layer in one direction.

The references are the meaning of the ops. A weight is what its format decodes it to. Where
activations are quantised, sums of products are exact, and what stands between them is float32
arithmetic in a fixed order, without fused multiply-adds and with activations that are polynomials
of our own; so every kernel of these schemes gives the same bits. A gate's input is
`(sum(xq · w_ihᵀ) · sw_ih) · sx + b_ih`, and the same of the hidden state.

- A scheme with dynamic activations (`int8`, `int16`) quantises the rows of `x` and of the hidden
  state in each step, a row of the batch by itself.
- A static one (`int8_static`, `int16_static`) takes a table with a row `(scale, zero_point, qmin,
  qmax)` for each part of the cell (`Cell.parts`), and rounds every part to its grid:
  `round(clamp(v · (1/scale), qmin − zero_point, qmax − zero_point)) · scale`. A part whose scale is
  0 stays as it is.
- One of weights alone (`int8_weight`) takes activations as they are.

The hidden state is rounded to the dtype of `x` in each step, as it is in the result; the cell state
stays in float32 until the last step. The result is one tensor, since a region has one: the outputs
`[T, B, P]`, then the last hidden state `[B, P]`, then the last cell state `[B, H]`, flat and one
after the other (`split_result`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import einsum

from qnn.kernels.formats.base import Format
from qnn.kernels.formats.int8 import int32_max_k, round_to_grid
from qnn.kernels.formats.int16 import QMAX as INT16_QMAX

DIRECTIONS = ("forward", "reverse")
Tensors = tuple[torch.Tensor, ...]
Reference = Callable[..., torch.Tensor]


class Product(NamedTuple):
    """A product of a cell: `operand · weightᵀ`.

    Attributes:
        weight: `"ih"`, as in the names of the weight's tensors.
        operand: the part of the cell that is multiplied; a table has at most 8 bits for it, or 16.
        rows, columns: the weight's axes.
        optional: whether a cell may do without it: a projection.
    """

    weight: str
    operand: str
    rows: str
    columns: str
    optional: bool = False


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: its products, and what its parts are called, in the order of the rows of a
    table.

    Attributes:
        name: as in the names of its ops.
        gates: torch's order; a weight has as many times H rows.
        states: of which the first is the output.
        widths: their axes.
        products: those of all gates first.
        activations: the part of each gate's activation, in the order of `gates`.
        others: the parts after these.
    """

    name: str
    gates: str
    states: tuple[str, ...]
    widths: tuple[str, ...]
    products: tuple[Product, ...]
    activations: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        linears = (f"{which}_linear_{gate}" for which in ("input", "hidden") for gate in self.gates)
        return ("input", *self.states, *linears, *self.activations, *self.others)

    def operands(self, *, projection: bool = True) -> tuple[str, ...]:
        """The parts that enter a product, with or without those of a projection."""
        return tuple(each.operand for each in self.products if projection or not each.optional)


LSTM = Cell(
    "lstm",
    "ifgo",
    ("hidden_state", "cell_state"),
    ("p", "h"),
    (
        Product("ih", "input", "h*4", "i"),
        Product("hh", "hidden_state", "h*4", "p"),
        Product("hr", "projection_input", "p", "h", optional=True),
    ),
    ("input_gate", "forget_gate", "cell_gate", "output_gate"),
    ("cell_tanh", "projection_input"),
)
GRU = Cell(
    "gru",
    "rzn",
    ("hidden_state",),
    ("h",),
    (Product("ih", "input", "h*3", "i"), Product("hh", "hidden_state", "h*3", "h")),
    ("reset_gate", "update_gate", "new_gate"),
)
CELLS = {cell.name: cell for cell in (LSTM, GRU)}
LSTM_PARTS, GRU_PARTS = LSTM.parts, GRU.parts


def in_order(
    cell: Cell, weight: Format, has_extra: bool, args: Sequence[Any]
) -> tuple[torch.Tensor, Tensors, dict[str, Tensors], Any, dict[str, Any], Any, str]:
    """The arguments of an op of `cell` over weights in the format `weight`: `x`, the states, the
    parts of each weight that is there, the table or the incoming gradient, the biases, the lengths
    and the direction.
    """
    rest = iter(args)

    def take(count: int) -> Tensors:
        return tuple(next(rest) for _ in range(count))

    (x,), states, count = take(1), take(len(cell.states)), len(weight.parts)
    weights = {each.weight: take(count) for each in cell.products if not each.optional}
    extra = next(rest) if has_extra else None
    biases = dict(zip(weights, take(len(weights)), strict=True))
    weights |= {each.weight: take(count) for each in cell.products if each.optional}
    weights = {name: parts for name, parts in weights.items() if parts[0] is not None}
    lengths, direction = rest
    return x, states, weights, extra, biases, lengths, direction


# tanh(x) = x · P(x²) / Q(x²) on |x| ≤ 8, where it is 1 − 2e-7: fitted to the least relative error,
# 1.8e-9; float32's roundings make 3.5e-7 of it. Every float32 was tried: none exceeds 1.
_TANH_BOUND = 8.0
_TANH_P = (
    1.0, 0.13124364614486694, 0.0031493804417550564, 1.1642605386441574e-05,
    -2.2315303070513437e-08, 6.365833618762423e-11, -1.1565058922756906e-13,
)  # fmt: skip
_TANH_Q = (1.0, 0.46457695960998535, 0.02467506378889084, 0.00026129968464374542)


def _polynomial(coefficients: tuple[float, ...], z: torch.Tensor) -> torch.Tensor:
    result = z * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        result = result * z + coefficient
    return result


def tanh(x: torch.Tensor) -> torch.Tensor:
    """tanh to 3.5e-7 of its value, the same bits on every machine; float64 has torch's."""
    if x.dtype == torch.float64:
        return x.tanh()
    c = x.clamp(-_TANH_BOUND, _TANH_BOUND)
    z = c * c
    return c * _polynomial(_TANH_P, z) / _polynomial(_TANH_Q, z)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """`tanh(x / 2) / 2 + 1/2`, to 2e-7 absolutely; float64 has torch's."""
    return x.sigmoid() if x.dtype == torch.float64 else tanh(x * 0.5) * 0.5 + 0.5


def round_to_part(v: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
    """`v` on the grid of a part, whose row `(scale, zero_point, qmin, qmax)` may have axes before
    it, with a part for each element of an axis of `v`.
    """
    if row is None:
        return v
    scale, zero_point, qmin, qmax = row.to(v.dtype).unbind(-1)
    q = round_to_grid(v, 1 / scale, qmin - zero_point, qmax - zero_point)
    return torch.where(scale == 0, v, q * scale)


def _entering(state: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
    """A state from outside on its grid, where a NaN or inf does not become a plausible number."""
    if row is None:
        return state
    return torch.where(state.isfinite(), round_to_part(state, row), torch.nan)


def _rows_on_grid(x: torch.Tensor, row: torch.Tensor) -> Tensors:
    """The integers of `x` on the grid of a part, less its zero point, and the scale of each row of
    `x`; NaN or inf is in the scale.
    """
    scale, zero_point, qmin, qmax = row
    q = round_to_grid(x.float(), 1 / scale, qmin - zero_point, qmax - zero_point)
    finite = x.isfinite().all(-1, keepdim=True)
    return torch.where(finite, q, 0), torch.where(finite, scale, torch.nan)


class _Linear:
    """`y = x · wᵀ + bias`, with `x` on the grid of a part, or quantised in the format `activation`,
    or as it is.
    """

    def __init__(
        self,
        weight: Format,
        parts: Tensors,
        bias: torch.Tensor | None,
        activation: Format | None,
        compute: torch.dtype,
    ) -> None:
        self.activation, self.compute = activation, compute
        # The sums of products of codes are exact: they stay below 2^53.
        self.w, sw = weight.decode(parts, compute if activation is None else torch.float64)
        self.sw = None if sw is None else sw.flatten()
        self.bias = None if bias is None else bias.to(compute)

    def __call__(self, x: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
        values, sx = x, None
        if row is not None:
            values, sx = _rows_on_grid(x, row)
        elif self.activation is not None:
            values, sx = self.activation.decode(self.activation.quantize(x), torch.float64)
        w = self.w[:, : x.shape[-1]]  # a packed weight may have zeros after the last column
        y = einsum(values.to(w.dtype), w, "... k, n k -> ... n").to(self.compute)
        for scale in (self.sw, sx):
            y = y if scale is None else y * scale.to(self.compute)
        return y if self.bias is None else y + self.bias


class _Parts:
    """The rows of a table by the names of their parts; all None without a table."""

    def __init__(self, cell: Cell, table: torch.Tensor | None) -> None:
        self._names, self._table = cell.parts, table

    def __getitem__(self, name: str) -> torch.Tensor | None:
        return None if self._table is None else self._table[self._names.index(name)]

    def of_gates(self, cell: Cell, which: str) -> torch.Tensor | None:
        """The rows of a linear of all gates, `[gates, 1, 4]`."""
        if self._table is None:
            return None
        first = self._names.index(f"{which}_linear_{cell.gates[0]}")
        return self._table[first : first + len(cell.gates), None]


def split_result(
    result: torch.Tensor, steps: int, batch: int, *widths: int
) -> tuple[torch.Tensor, ...]:
    """An op's result as views: the outputs `[T, B, P]`, the last states `[B, P]` and `[B, H]`."""
    output = result[: steps * batch * widths[0]].view(steps, batch, widths[0])
    states, at = [], steps * batch * widths[0]
    for width in widths:
        states.append(result[at : at + batch * width].view(batch, width))
        at += batch * width
    return (output, *states)


def _scan(
    x: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    step: Callable[..., tuple[torch.Tensor, ...]],
    inputs: torch.Tensor,
    lengths: torch.Tensor | None,
    direction: str,
    compute: torch.dtype,
) -> torch.Tensor:
    """The steps in order, and the flat result."""
    output = inputs.new_empty(len(x), *states[0].shape)
    for t in range(len(x)) if direction == "forward" else reversed(range(len(x))):
        new = step(inputs[t], *states)
        if compute == torch.float32:
            new = (new[0].to(x.dtype).float(), *new[1:])
        if lengths is None:
            states = new
            output[t] = new[0]
        else:
            there = (t < lengths)[:, None]
            states = tuple(torch.where(there, a, b) for a, b in zip(new, states, strict=True))
            output[t] = torch.where(there, new[0], 0)
    flat = torch.cat([output.flatten(), *(state.flatten() for state in states)])
    return flat.to(x.dtype if compute == torch.float32 else compute)


def _lstm_step(
    h: torch.Tensor, c: torch.Tensor, sums: Tensors, parts: _Parts, projection: _Linear | None
) -> Tensors:
    of_x, of_h = sums
    i, f, g, o = (of_x + of_h).unbind(-2)
    i = round_to_part(sigmoid(i), parts["input_gate"])
    f = round_to_part(sigmoid(f), parts["forget_gate"])
    g = round_to_part(tanh(g), parts["cell_gate"])
    o = round_to_part(sigmoid(o), parts["output_gate"])
    c = round_to_part(f * c + i * g, parts["cell_state"])
    h = o * round_to_part(tanh(c), parts["cell_tanh"])
    if projection is not None:
        h = projection(h, parts["projection_input"])
    return round_to_part(h, parts["hidden_state"]), c


def _gru_step(h: torch.Tensor, sums: Tensors, parts: _Parts, projection: None) -> Tensors:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (each.unbind(-2) for each in sums)
    r = round_to_part(sigmoid(x_r + h_r), parts["reset_gate"])
    z = round_to_part(sigmoid(x_z + h_z), parts["update_gate"])
    n = round_to_part(tanh(x_n + r * h_n), parts["new_gate"])
    return (round_to_part((h - n) * z + n, parts["hidden_state"]),)


def why_not_operand(row: Sequence[float], bits: int) -> str | None:
    """What a part that enters a product must have in its row of a table, and has not; or None."""
    scale, zero_point, qmin, qmax = row
    low, high = qmin - zero_point, qmax - zero_point
    if not 0 < scale < math.inf:
        return "a positive scale"
    whole = low.is_integer() and high.is_integer() and low <= high
    if bits > 8:
        fits, words = max(-low, high) <= INT16_QMAX, _WORDS_16
    else:
        fits, words = high - low <= 255 and abs(low) <= 1024, "8 bits"
    return None if whole and fits else words


_WORDS_16 = f"codes less its zero point from {-INT16_QMAX} to {INT16_QMAX}"


def _require_operands(
    cell: Cell, table: torch.Tensor, columns: Mapping[str, int], bits: int
) -> None:
    """Raise unless the parts that enter a product have no more bits, and, of 8, int32 holds a sum
    of so many products: those of the weights in `columns`.
    """
    for name, count in ((p.operand, columns.get(p.weight)) for p in cell.products):
        if count is None:
            continue
        row = table[cell.parts.index(name)].tolist()
        if (reason := why_not_operand(row, bits)) is not None:
            raise ValueError(f"table must give the part {name} {reason}.")
        _, zero_point, qmin, qmax = row
        largest = max(1, int(max(abs(qmin - zero_point), abs(qmax - zero_point))))
        if bits <= 8 and count > int32_max_k(largest):
            raise ValueError(
                f"table gives the part {name} codes of up to {largest}, of which an int32 sum of "
                f"{count} can overflow, from {int32_max_k(largest) + 1} on; use the scheme "
                "int8_weight."
            )


def layer_reference(
    cell: Cell, weight: Format, activation: Format | None, *, static: bool
) -> Reference:
    """A layer over weights in the format `weight`, with activations in `activation`, if any."""
    new_states: Any = _lstm_step if cell is LSTM else _gru_step

    def reference(*args: Any, compute: torch.dtype = torch.float32) -> torch.Tensor:
        given = in_order(cell, weight, static, args)
        x, states, weights, table, biases, lengths, direction = given
        if static:
            columns = {"ih": x.shape[-1], "hh": states[0].shape[-1], "hr": states[-1].shape[-1]}
            bits = 8 if activation is None else activation.bits
            _require_operands(cell, table, {name: columns[name] for name in weights}, bits)
        parts = _Parts(cell, table)
        of = {
            name: _Linear(weight, stored, biases.get(name), activation, compute)
            for name, stored in weights.items()
        }

        def gates(which: str, v: torch.Tensor, name: str) -> torch.Tensor:
            """The linear of all gates, `[..., gates, H]`."""
            y = of[which](v, parts[name]).unflatten(-1, (len(cell.gates), -1))
            return round_to_part(y, parts.of_gates(cell, name.partition("_")[0]))

        def step(of_x: torch.Tensor, *states: torch.Tensor) -> Tensors:
            of_h = gates("hh", states[0], "hidden_state")
            made: Tensors = new_states(*states, (of_x, of_h), parts, of.get("hr"))
            return made

        states = tuple(
            _entering(state.to(compute), parts[name])
            for name, state in zip(cell.states, states, strict=True)
        )
        inputs = gates("ih", x, "input")
        return _scan(x, states, step, inputs, lengths, direction, compute)

    return reference


# -- gradients: of the float cell over the dequantised weights, straight through every rounding


def _added(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def _lstm_forward(
    states: Tensors, of_x: torch.Tensor, of_h: torch.Tensor, bias: Any, w_r: Any
) -> tuple[Tensors, Tensors]:
    """The states after a step, and what its gradient needs."""
    c = states[1]
    i, f, g, o = _added(of_x + of_h, bias).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    h = o * new.tanh()
    return (h if w_r is None else h @ w_r.T, new), (i, f, g, o, c, new.tanh())


def _lstm_back(dnew: Sequence[torch.Tensor], kept: Tensors, w_r: Any) -> tuple[Any, ...]:
    """The gradients to the linears of the input and of the hidden state, and to the states that the
    step began with; None where it is by the linear alone.
    """
    i, f, g, o, c, tc = kept
    dout, dc = dnew
    dout = dout if w_r is None else dout @ w_r
    dc = dc + dout * o * (1 - tc * tc)
    pieces = [
        dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dout * tc * o * (1 - o),
    ]  # fmt: skip
    gates = torch.cat(pieces, -1)
    return gates, gates, (None, dc * f)


def _gru_forward(
    states: Tensors, of_x: torch.Tensor, of_h: torch.Tensor, bias: Any, _: None
) -> tuple[Tensors, Tensors]:
    (h,) = states
    (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, -1), _added(of_h, bias).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((h - n) * z + n,), (r, z, n, h_n, h)


def _gru_back(dnew: Sequence[torch.Tensor], kept: Tensors, _: None) -> tuple[Any, ...]:
    r, z, n, h_n, h = kept
    (dh,) = dnew
    dn = dh * (1 - z) * (1 - n * n)
    dr, dz = dn * h_n * r * (1 - r), dh * (h - n) * z * (1 - z)
    return torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1), (dh * z,)


def gradient_reference(cell: Cell, weight: Format) -> Reference:
    """The gradients to `x`, the states and the biases, flat and one after the other."""
    forward: Any = _lstm_forward if cell is LSTM else _gru_forward
    back: Any = _lstm_back if cell is LSTM else _gru_back

    def reference(*args: Any, compute: torch.dtype = torch.float32) -> torch.Tensor:
        x, states, weights, dresult, biases, lengths, direction = in_order(cell, weight, True, args)
        (steps, batch), widths = x.shape[:2], [state.shape[1] for state in states]
        w = {name: weight.dequantize(parts, compute) for name, parts in weights.items()}
        # A packed weight may have zeros after the last column.
        w_x, w_h = w["ih"][:, : x.shape[2]], w["hh"][:, : widths[0]]
        w_r = w["hr"][:, : widths[1]] if "hr" in w else None
        inputs = _added(x.to(compute) @ w_x.T, biases["ih"])
        states = tuple(state.to(compute) for state in states)

        def pick(t: int, new: Sequence[torch.Tensor], old: Any) -> Tensors:
            """`new` for the sequences that take step `t`."""
            if lengths is None:
                return tuple(new)
            there = (t < lengths)[:, None]
            return tuple(torch.where(there, a, b) for a, b in zip(new, old, strict=True))

        order = list(range(steps) if direction == "forward" else reversed(range(steps)))
        kept = {}
        for t in order:
            new, kept[t] = forward(states, inputs[t], states[0] @ w_h.T, biases["hh"], w_r)
            states = pick(t, new, states)
        dy, *last = split_result(dresult.to(compute), steps, batch, *widths)
        dstates: Tensors = tuple(last)
        of_steps: list[Tensors] = [()] * steps
        for t in reversed(order):
            dx, dh, (past, *others) = back((dy[t] + dstates[0], *dstates[1:]), kept[t], w_r)
            of_steps[t] = pick(t, (dx, dh), (0, 0))
            dh = of_steps[t][1] @ w_h
            dstates = pick(t, (dh if past is None else past + dh, *others), dstates)
        dinput, dhidden = (
            map(torch.stack, zip(*of_steps, strict=True)) if steps else (inputs, inputs)
        )
        pieces = [dinput @ w_x, *dstates, dinput.sum((0, 1)), dhidden.sum((0, 1))]
        flat = torch.cat([piece.flatten() for piece in pieces])
        return flat.to(x.dtype if compute == torch.float32 else compute)

    return reference


def split_gradients(
    given: Mapping[str, torch.Tensor | None], flat: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What a gradient's op returns, by the names of the forward's arguments that are given."""
    found: dict[str, torch.Tensor] = {}
    at, w_hh = 0, given["w_hh"]
    assert w_hh is not None  # noqa: S101  # it is not optional
    for name in ("x", "h0", "c0", "b_ih", "b_hh"):
        if name in given:
            tensor = given[name]
            count = w_hh.shape[0] if tensor is None else tensor.numel()
            if tensor is not None:
                found[name] = flat[at : at + count].view(tensor.shape).to(tensor.dtype)
            at += count
    return found
