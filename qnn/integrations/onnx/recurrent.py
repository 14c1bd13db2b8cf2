"""LSTM and GRU in ONNX: a `Scan` over the steps, with the integer products inside.

com.microsoft's `DynamicQuantizeLSTM` is another arithmetic: one asymmetric scale for the whole
input and one for the hidden states of a batch, where qnn has one for each row. Nor has it 16 bits,
grids, a GRU, or sequences of several lengths that keep their states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qnn.integrations.onnx.build import (
    FLOAT,
    INT64,
    Value,
    body,
    cast,
    const,
    dtype_of,
    finite,
    ints,
    node,
    op,
    rounded,
    shaped,
    size,
    widened,
)
from qnn.integrations.onnx.integers import scaled_by
from qnn.integrations.onnx.layers import Arguments, Rule, added
from qnn.integrations.onnx.products import Product, product, product_on_grid
from qnn.kernels.reference.recurrent import LSTM, Cell, in_order
from qnn.kernels.schemes import Scheme


class _Row(NamedTuple):
    """The grid of a part, as `[1]`, or of the gates side by side, `[G · H]`: a scale, and the ends
    of its codes less its zero point.
    """

    scale: Value
    low: Value
    high: Value


class _Table:
    """The grids of a cell's parts; None for each without a table."""

    def __init__(self, cell: Cell, table: Value | None, hidden: int) -> None:
        self.cell, self.hidden = cell, hidden
        self.columns: tuple[Value, ...] = ()
        if table is not None:
            self.columns = tuple(op.Slice(table, ints(i), ints(i + 1), ints(1)) for i in range(4))

    def rows(self, names: Sequence[str], width: int) -> _Row | None:
        """Of `width` values of each part that is named."""
        if not self.columns:
            return None
        at = ints(*(self.cell.parts.index(name) for name in names))
        scale, zero, low, high = (
            op.Reshape(op.Expand(op.Gather(column, at), ints(len(names), width)), ints(-1))
            for column in self.columns
        )
        return _Row(scale, op.Sub(low, zero), op.Sub(high, zero))

    def row(self, name: str) -> _Row | None:
        return self.rows([name], 1)

    def linears(self, which: str) -> _Row | None:
        return self.rows([f"{which}_linear_{gate}" for gate in self.cell.gates], self.hidden)


def _on_grid(v: Value, row: _Row | None) -> Value:
    if row is None:
        return v
    # Not Clip, whose ends are scalars.
    q = op.Round(op.Min(op.Max(scaled_by(v, row.scale), row.low), row.high))
    return op.Where(op.Equal(row.scale, 0.0), v, op.Mul(q, row.scale))


def recurrent(cell: Cell, scheme: Scheme) -> Rule:
    def rule(given: Arguments) -> Value:
        args = list(given.values())
        x, states, weights, table, biases, lengths, direction = in_order(
            cell, scheme.weight, scheme.static, args
        )
        dtype, widths = dtype_of(x), [size(state, -1) for state in states]
        parts = _Table(cell, table, widths[-1])
        depth = {"ih": size(x, -1), "hh": widths[0], "hr": widths[-1]}
        operands = {each.weight: each.operand for each in cell.products}

        def made(name: str) -> Product:
            stored, row = weights[name], parts.row(operands[name])
            if row is None:
                return product(scheme.weight, stored, scheme.activation, depth[name])
            bits = 8 if scheme.activation is None else scheme.activation.bits
            return product_on_grid(stored, bits, depth[name], row)

        times = {name: made(name) for name in weights}
        of_input, of_hidden = parts.linears("input"), parts.linears("hidden")
        row = {name: parts.row(name) for name in cell.parts if "_linear_" not in name}

        def step(of_x: Value, there: Value | None, old: Sequence[Value]) -> list[Value]:
            of_h = _on_grid(
                added(times["hh"](shaped(old[0], None, widths[0])), biases["hh"]), of_hidden
            )
            new = (_lstm if cell is LSTM else _gru)(old, of_x, of_h, row, times.get("hr"))
            new = [rounded(new[0], dtype), *new[1:]]
            if there is None:
                return [*new, new[0]]
            kept = [op.Where(there, a, b) for a, b in zip(new, old, strict=True)]
            return [*kept, op.Where(there, new[0], 0.0)]

        inputs = _on_grid(added(times["ih"](widened(x)), biases["ih"]), of_input)
        begin = [
            _entering(widened(state), row[n]) for n, state in zip(cell.states, states, strict=True)
        ]
        results = _scan(step, begin, inputs, lengths, reverse=direction == "reverse")
        *last, outputs = results
        flat = [op.Reshape(each, ints(-1)) for each in (outputs, *last)]
        y = op.Concat(*flat, axis=0)
        return y if dtype == FLOAT else cast(y, dtype)

    return rule


def _entering(state: Value, row: _Row | None) -> Value:
    if row is None:
        return state
    return op.Where(finite(state), _on_grid(state, row), const(np.nan))


def _scan(
    step: Any, begin: Sequence[Value], inputs: Value, lengths: Value | None, *, reverse: bool
) -> Sequence[Value]:
    """The last states, and the outputs of all steps."""
    count = len(begin)

    def run(*given: Value) -> list[Value]:
        old, (of_x, *time) = given[:count], given[count:]
        there = op.Unsqueeze(op.Less(time[0], lengths), ints(-1)) if time else None
        return step(of_x, there, old)  # type: ignore[no-any-return]

    over, dtypes = [inputs], [FLOAT] * (count + 1)
    if lengths is not None:
        steps = op.Reshape(op.Slice(op.Shape(inputs), ints(0), ints(1)), const([], np.int64))
        over.append(op.Range(const(0, np.int64), steps, const(1, np.int64)))
        dtypes.append(INT64)
    way = int(reverse)
    result: Sequence[Value] = node(
        "Scan", [*begin, *over], outputs=count + 1, body=body(run, *dtypes),
        num_scan_inputs=len(over), scan_input_directions=[way] * len(over),
        scan_output_directions=[way],
    )  # fmt: skip
    return result


def _lstm(
    old: Sequence[Value],
    of_x: Value,
    of_h: Value,
    row: dict[str, _Row | None],
    projection: Product | None,
) -> list[Value]:
    i, f, g, o = op.Split(op.Add(of_x, of_h), axis=-1, num_outputs=4)
    i = _on_grid(op.Sigmoid(i), row["input_gate"])
    f = _on_grid(op.Sigmoid(f), row["forget_gate"])
    g = _on_grid(op.Tanh(g), row["cell_gate"])
    o = _on_grid(op.Sigmoid(o), row["output_gate"])
    c = _on_grid(op.Add(op.Mul(f, old[1]), op.Mul(i, g)), row["cell_state"])
    h = op.Mul(o, _on_grid(op.Tanh(c), row["cell_tanh"]))
    h = h if projection is None else projection(shaped(h, None, None))
    return [_on_grid(h, row["hidden_state"]), c]


def _gru(
    old: Sequence[Value],
    of_x: Value,
    of_h: Value,
    row: dict[str, _Row | None],
    projection: Product | None,
) -> list[Value]:
    x_r, x_z, x_n = op.Split(of_x, axis=-1, num_outputs=3)
    h_r, h_z, h_n = op.Split(of_h, axis=-1, num_outputs=3)
    r = _on_grid(op.Sigmoid(op.Add(x_r, h_r)), row["reset_gate"])
    z = _on_grid(op.Sigmoid(op.Add(x_z, h_z)), row["update_gate"])
    n = _on_grid(op.Tanh(op.Add(x_n, op.Mul(r, h_n))), row["new_gate"])
    h = op.Add(op.Mul(op.Sub(old[0], n), z), n)
    return [_on_grid(h, row["hidden_state"])]
