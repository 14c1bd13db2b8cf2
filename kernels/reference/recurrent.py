"""The recurrent ops: an LSTM or a GRU, one layer in one direction, in the schemes `int8`,
`int8_static` and `int8_weight`.

The references are the meaning of the ops. The integers are exact, and what stands between them is
float32 arithmetic in a fixed order, without fused multiply-adds and with activations that are
polynomials of our own; so every kernel of `int8` and `int8_static` gives the same bits. A gate's
input is `(int32(xq · w_ihᵀ) · sw_ih) · sx + b_ih`, and the same of the hidden state.

- `int8` quantises the rows of `x` and of the hidden state in each step, a row of the batch by
  itself.
- `int8_static` takes a table with a row `(scale, zero_point, qmin, qmax)` for each part of the cell
  (`Cell.parts`), and rounds every part to its grid: `round(clamp(v · (1/scale), qmin − zero_point,
  qmax − zero_point)) · scale`. A part whose scale is 0 stays as it is.
- `int8_weight` takes activations as they are.

The hidden state is rounded to the dtype of `x` in each step, as it is in the result; the cell state
stays in float32 until the last step. The result is one tensor, since a region has one: the outputs
`[T, B, P]`, then the last hidden state `[B, P]`, then the last cell state `[B, H]`, flat and one
behind the other (`split_result`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum

from qnn.kernels.formats.int8 import quantize_rows

DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: what its parts are called, in the order of the rows of a table.

    Attributes:
        name: as in the names of its ops.
        gates: torch's order; a weight has as many times H rows.
        states: of which the first is the output.
        activations: the part of each gate's activation, in the order of `gates`.
        others: the parts behind these.
    """

    name: str
    gates: str
    states: tuple[str, ...]
    activations: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        linears = (f"{which}_linear_{gate}" for which in ("input", "hidden") for gate in self.gates)
        return ("input", *self.states, *linears, *self.activations, *self.others)


LSTM = Cell(
    "lstm",
    "ifgo",
    ("hidden_state", "cell_state"),
    ("input_gate", "forget_gate", "cell_gate", "output_gate"),
    ("cell_tanh", "projection_input"),
)
GRU = Cell("gru", "rzn", ("hidden_state",), ("reset_gate", "update_gate", "new_gate"))
CELLS = {cell.name: cell for cell in (LSTM, GRU)}
LSTM_PARTS, GRU_PARTS = LSTM.parts, GRU.parts

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
    v_on_grid = (v * (1 / scale)).clamp(qmin - zero_point, qmax - zero_point).round() * scale
    return torch.where(scale == 0, v, v_on_grid)


def _entering(state: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
    """A state from outside on its grid, where a NaN or inf does not become a plausible number."""
    if row is None:
        return state
    return torch.where(state.isfinite(), round_to_part(state, row), torch.nan)


def _quantized_rows(x: torch.Tensor, row: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers (less their zero point) and the scale of each row of `x`; NaN or inf is in the
    scale.
    """
    if row is None:
        return quantize_rows(x)
    scale, zero_point, qmin, qmax = row
    q = (x.float() * (1 / scale)).clamp(qmin - zero_point, qmax - zero_point).round()
    finite = x.isfinite().all(-1, keepdim=True)
    return torch.where(finite, q, 0), torch.where(finite, scale, torch.nan)


class _Linear:
    """`y = x · (w · sw)ᵀ + bias` with `x` quantised by `row`, or dynamically, or not at all."""

    def __init__(
        self,
        w: torch.Tensor,
        sw: torch.Tensor,
        bias: torch.Tensor | None,
        quantized: bool,
        compute: torch.dtype,
    ) -> None:
        self.quantized, self.compute = quantized, compute
        self.w = w.double() if quantized else w.to(compute)
        self.sw = sw.squeeze(-1).to(compute)
        self.bias = None if bias is None else bias.to(compute)

    def __call__(self, x: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
        if self.quantized:
            q, scale = _quantized_rows(x, row)
            # Exact: the sums stay below 2^53.
            acc = einsum(q.double(), self.w, "... k, n k -> ... n").to(self.compute)
            y = acc * self.sw * scale.to(self.compute)
        else:
            y = einsum(x.to(self.compute), self.w, "... k, n k -> ... n") * self.sw
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


def lstm_reference(
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_ih: torch.Tensor,
    sw_ih: torch.Tensor,
    w_hh: torch.Tensor,
    sw_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
    w_hr: torch.Tensor | None = None,
    sw_hr: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    direction: str = "forward",
    *,
    table: torch.Tensor | None = None,
    quantized: bool = True,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    parts = _Parts(LSTM, table)
    of_input = _Linear(w_ih, sw_ih, b_ih, quantized, compute)
    of_hidden = _Linear(w_hh, sw_hh, b_hh, quantized, compute)
    projection = None
    if w_hr is not None and sw_hr is not None:
        projection = _Linear(w_hr, sw_hr, None, quantized, compute)

    def gates(y: torch.Tensor, which: str) -> torch.Tensor:
        return round_to_part(y.unflatten(-1, (4, -1)), parts.of_gates(LSTM, which))

    def step(
        of_x: torch.Tensor, h: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        i, f, g, o = (of_x + gates(of_hidden(h, parts["hidden_state"]), "hidden")).unbind(-2)
        i = round_to_part(sigmoid(i), parts["input_gate"])
        f = round_to_part(sigmoid(f), parts["forget_gate"])
        g = round_to_part(tanh(g), parts["cell_gate"])
        o = round_to_part(sigmoid(o), parts["output_gate"])
        c = round_to_part(f * c + i * g, parts["cell_state"])
        h = o * round_to_part(tanh(c), parts["cell_tanh"])
        if projection is not None:
            h = projection(h, parts["projection_input"])
        return round_to_part(h, parts["hidden_state"]), c

    states = (
        _entering(h0.to(compute), parts["hidden_state"]),
        _entering(c0.to(compute), parts["cell_state"]),
    )
    inputs = gates(of_input(x, parts["input"]), "input")
    return _scan(x, states, step, inputs, lengths, direction, compute)


def gru_reference(
    x: torch.Tensor,
    h0: torch.Tensor,
    w_ih: torch.Tensor,
    sw_ih: torch.Tensor,
    w_hh: torch.Tensor,
    sw_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    direction: str = "forward",
    *,
    table: torch.Tensor | None = None,
    quantized: bool = True,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    parts = _Parts(GRU, table)
    of_input = _Linear(w_ih, sw_ih, b_ih, quantized, compute)
    of_hidden = _Linear(w_hh, sw_hh, b_hh, quantized, compute)

    def gates(y: torch.Tensor, which: str) -> torch.Tensor:
        return round_to_part(y.unflatten(-1, (3, -1)), parts.of_gates(GRU, which))

    def step(of_x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor]:
        of_h = gates(of_hidden(h, parts["hidden_state"]), "hidden")
        (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.unbind(-2), of_h.unbind(-2)
        r = round_to_part(sigmoid(x_r + h_r), parts["reset_gate"])
        z = round_to_part(sigmoid(x_z + h_z), parts["update_gate"])
        n = round_to_part(tanh(x_n + r * h_n), parts["new_gate"])
        return (round_to_part((h - n) * z + n, parts["hidden_state"]),)

    states = (_entering(h0.to(compute), parts["hidden_state"]),)
    inputs = gates(of_input(x, parts["input"]), "input")
    return _scan(x, states, step, inputs, lengths, direction, compute)


# -- gradients: of the float cell over the dequantised weights, straight through every rounding


def _dequantized(w: torch.Tensor, sw: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    return w.to(compute) * sw.to(compute)


def _added(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def _order(steps: int, lengths: torch.Tensor | None, direction: str) -> list[tuple[int, Any]]:
    """The steps as they are taken, each with which rows of the batch take it (None: all)."""
    order = range(steps) if direction == "forward" else reversed(range(steps))
    return [(t, None if lengths is None else (t < lengths)[:, None]) for t in order]


def _pick(there: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return new if there is None else torch.where(there, new, old)


def _masked(there: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if there is None else torch.where(there, new, 0)


def lstm_dgrad_reference(
    x: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_ih: torch.Tensor,
    sw_ih: torch.Tensor,
    w_hh: torch.Tensor,
    sw_hh: torch.Tensor,
    dresult: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
    w_hr: torch.Tensor | None = None,
    sw_hr: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    direction: str = "forward",
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    steps, batch = x.shape[:2]
    w_x, w_h = _dequantized(w_ih, sw_ih, compute), _dequantized(w_hh, sw_hh, compute)
    w_r = None
    if w_hr is not None and sw_hr is not None:
        w_r = _dequantized(w_hr, sw_hr, compute)
    h, c = h0.to(compute), c0.to(compute)
    inputs = _added(x.to(compute) @ w_x.T, b_ih)
    order, saved = _order(steps, lengths, direction), []
    for t, there in order:
        i, f, g, o = _added(inputs[t] + h @ w_h.T, b_hh).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        new = f * c + i * g
        saved.append((i, f, g, o, c, new.tanh()))
        out = o * new.tanh()
        h = _pick(there, out if w_r is None else out @ w_r.T, h)
        c = _pick(there, new, c)
    dy, dh, dc = split_result(dresult.to(compute), steps, batch, h0.shape[1], c0.shape[1])
    steps_back: list[Any] = [None] * steps
    for (t, there), (i, f, g, o, c, tc) in zip(reversed(order), reversed(saved), strict=True):
        dout = dy[t] + dh
        dout = dout if w_r is None else dout @ w_r
        dnew = dc + dout * o * (1 - tc * tc)
        pieces = [
            dnew * g * i * (1 - i), dnew * c * f * (1 - f), dnew * i * (1 - g * g),
            dout * tc * o * (1 - o),
        ]  # fmt: skip
        steps_back[t] = dgates = _masked(there, torch.cat(pieces, -1))
        dh, dc = _pick(there, dgates @ w_h, dh), _pick(there, dnew * f, dc)
    dgates = torch.stack(steps_back) if steps else inputs
    return _gradients(x, w_x, (dh, dc), dgates, dgates, compute)


def gru_dgrad_reference(
    x: torch.Tensor,
    h0: torch.Tensor,
    w_ih: torch.Tensor,
    sw_ih: torch.Tensor,
    w_hh: torch.Tensor,
    sw_hh: torch.Tensor,
    dresult: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    direction: str = "forward",
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    steps, batch = x.shape[:2]
    w_x, w_h = _dequantized(w_ih, sw_ih, compute), _dequantized(w_hh, sw_hh, compute)
    h = h0.to(compute)
    inputs = _added(x.to(compute) @ w_x.T, b_ih)
    order, saved = _order(steps, lengths, direction), []
    for t, there in order:
        of_h = _added(h @ w_h.T, b_hh)
        (x_r, x_z, x_n), (h_r, h_z, h_n) = inputs[t].chunk(3, -1), of_h.chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
        saved.append((r, z, n, h_n, h))
        h = _pick(there, (h - n) * z + n, h)
    dy, dh = split_result(dresult.to(compute), steps, batch, h0.shape[1])
    of_input: list[Any] = [None] * steps
    of_hidden: list[Any] = [None] * steps
    for (t, there), (r, z, n, h_n, h) in zip(reversed(order), reversed(saved), strict=True):
        dnew = dy[t] + dh
        dn = dnew * (1 - z) * (1 - n * n)
        dr, dz = dn * h_n * r * (1 - r), dnew * (h - n) * z * (1 - z)
        of_input[t] = _masked(there, torch.cat([dr, dz, dn], -1))
        of_hidden[t] = dhidden = _masked(there, torch.cat([dr, dz, dn * r], -1))
        dh = _pick(there, dnew * z + dhidden @ w_h, dh)
    dinput = torch.stack(of_input) if steps else inputs
    dhidden = torch.stack(of_hidden) if steps else inputs
    return _gradients(x, w_x, (dh,), dinput, dhidden, compute)


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


def _gradients(
    x: torch.Tensor,
    w_x: torch.Tensor,
    dstates: tuple[torch.Tensor, ...],
    dinput: torch.Tensor,
    dhidden: torch.Tensor,
    compute: torch.dtype,
) -> torch.Tensor:
    pieces = [dinput @ w_x, *dstates, dinput.sum((0, 1)), dhidden.sum((0, 1))]
    flat = torch.cat([piece.flatten() for piece in pieces])
    return flat.to(x.dtype if compute == torch.float32 else compute)
