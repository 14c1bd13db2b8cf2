"""The recurrent ops, derived from the cells: for each scheme a layer in one direction, and the
gradient that all of them share. `reference/recurrent.py` says what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from qnn.kernels.declare.int8 import INT8, SCALE
from qnn.kernels.formats.base import FLOATS
from qnn.kernels.formats.int8 import int32_max_k
from qnn.kernels.op import Op, size_of
from qnn.kernels.reference.recurrent import (
    CELLS,
    DIRECTIONS,
    GRU,
    LSTM,
    Cell,
    gru_dgrad_reference,
    gru_reference,
    lstm_dgrad_reference,
    lstm_reference,
    split_gradients,
)
from qnn.kernels.schemes import Scheme, get_scheme, schemes_of

_RESULT = {"lstm": "t*b*p+b*p+b*h", "gru": "t*b*h+b*h"}
_GRADIENTS = {"lstm": "t*b*i+b*p+b*h+h*4+h*4", "gru": "t*b*i+b*h+h*3+h*3"}
_DOC = {
    "int8": "rows of x and of the hidden state in int8, a scale each; exact int32 sums; gates in "
    "float32",
    "int8_static": "every part of the cell on the grid of its row (scale, zero_point, qmin, qmax) "
    "of table; exact int32 sums",
    "int8_weight": "weights in int8, activations as they are, in float32",
}
_SAMPLE_SIZES: dict[str, int] = {"t": 5, "b": 3, "i": 19, "p": 21, "h": 21}


def _arguments(cell: Cell, extra: str | None = None) -> list[str]:
    """The arguments of a cell's ops; `extra` stands behind those that must be given."""
    rows, lstm = f"h*{len(cell.gates)}", cell is LSTM
    hidden = "p" if lstm else "h"
    return [
        *("x: t b i", f"h0: b {hidden}"),
        *(["c0: b h"] if lstm else []),
        *(f"w_ih: {rows} i", f"sw_ih: {rows} 1", f"w_hh: {rows} {hidden}", f"sw_hh: {rows} 1"),
        *([extra] if extra else []),
        *(f"b_ih?: {rows}", f"b_hh?: {rows}"),
        *(["w_hr?: p h", "sw_hr?: p 1"] if lstm else []),
        *("lengths?: b", "direction?: str"),
    ]


def _sample_scale(rows: str) -> Callable[[Mapping[str, int]], torch.Tensor]:
    """Scales of weights that leave the gates between their ends."""
    return lambda sizes: torch.linspace(0.0005, 0.0015, size_of(rows, sizes))[:, None]


def _sample_table(cell: Cell) -> torch.Tensor:
    """8 bits for what enters a product, 16 for the rest, and one part that stays as it is."""
    rows = [[2.0**-10, 0.0, -32768.0, 32767.0] for _ in cell.parts]
    rows[0] = [0.03, 120.0, 0.0, 255.0]
    rows[1] = [2.0**-7, 0.0, -128.0, 127.0]
    rows[-1] = [0.0, 0.0, 0.0, 0.0] if cell is GRU else [2.0**-7, 128.0, 0.0, 255.0]
    return torch.tensor(rows)


def _samples(cell: Cell, rows: str) -> dict[str, int | Callable[[Mapping[str, int]], torch.Tensor]]:
    return {
        **_SAMPLE_SIZES,
        "sw_ih": _sample_scale(rows),
        "sw_hh": _sample_scale(rows),
        "sw_hr": _sample_scale("p"),
        "table": lambda sizes: _sample_table(cell),
        "lengths": lambda sizes: torch.arange(sizes["b"]) * 2 % (sizes["t"] + 1),
    }


def _products(cell: Cell, times: int) -> dict[str, str]:
    """The products of each step, `times` over, by the optional weight that they are of."""
    rows, hidden = f"h*{len(cell.gates)}", "p" if cell is LSTM else "h"
    of_gates = f"t b {rows} i+t b {rows} {hidden}"
    result = {"": "+".join([of_gates] * times)}
    return result | ({"w_hr": "+".join(["t b p h"] * times)} if cell is LSTM else {})


def _declare(
    cell: Cell,
    name: str,
    doc: str,
    reference: Callable[..., torch.Tensor],
    result: str,
    extra: str | None = None,
    backward: str | None = None,
    native: bool = False,
    limit: int | None = None,
    times: int = 1,
) -> Op:
    """`limit`: the most columns of a weight; `times`: how often each weight is multiplied."""
    arguments, rows = _arguments(cell, extra), f"h*{len(cell.gates)}"
    names = [argument.partition(":")[0].rstrip("?") for argument in arguments]
    dtypes: dict[str, Any] = {"x": FLOATS, "h0": "x", "lengths": (torch.int64,)}
    dtypes |= {name: INT8 for name in names if name.startswith("w_")}
    dtypes |= {name: SCALE for name in names if name.startswith("sw_") or name == "table"}
    dtypes |= {name: FLOATS for name in names if name.startswith("b_")}
    dtypes |= {name: "x" for name in names if name in ("c0", "dresult")}

    differentiable = [n for n in names if n in ("x", "h0", "c0", "b_ih", "b_hh")]

    def rule(*args: Any) -> str | None:
        given = dict(zip(names, args, strict=False))
        if cell is not LSTM:
            return None
        if (given["w_hr"] is None) != (given["sw_hr"] is None):
            return "w_hr and sw_hr belong together"
        p, h = given["h0"].shape[-1], given["c0"].shape[-1]
        if given["w_hr"] is None and p != h:
            return f"h0 must be as wide as c0, {h}, where there is no projection w_hr, got {p}"
        return None

    return Op(
        name,
        f"{', '.join(arguments)} -> {result}",
        doc=doc,
        dtypes=dtypes,
        out=("x",),
        reference=reference,
        native=native,
        backward=dict.fromkeys(differentiable, backward) if backward else {},
        split=split_gradients if backward else None,
        differentiable=backward is None,
        positive=[name for name in names if name.startswith("sw_")],
        choices={"direction": DIRECTIONS},
        rule=rule,
        sample=_samples(cell, rows),
        products=_products(cell, times),
        limits={} if limit is None else dict.fromkeys("ihp" if cell is LSTM else "ih", limit),
        rowwise=False,
    )


def _require_bytes(cell: Cell, table: torch.Tensor, columns: Mapping[str, int]) -> None:
    """Raise unless the parts that enter a product have 8 bits, and int32 holds a sum of so many
    products.
    """
    for name, count in columns.items():
        scale, zero_point, qmin, qmax = table[cell.parts.index(name)].tolist()
        low, high = qmin - zero_point, qmax - zero_point
        if not 0 < scale < math.inf:
            raise ValueError(f"table must give the part {name} a positive scale.")
        whole = low.is_integer() and high.is_integer()
        if not (whole and low <= high <= low + 255 and abs(low) <= 1024):
            raise ValueError(f"table must give the part {name} 8 bits.")
        largest = max(1, int(max(abs(low), abs(high))))
        if count > int32_max_k(largest):
            raise ValueError(
                f"table gives the part {name} codes of up to {largest}, of which an int32 sum of "
                f"{count} can overflow, from {int32_max_k(largest) + 1} on; use the scheme "
                "int8_weight."
            )


def _forward(
    cell: Cell, scheme: Scheme, reference: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """A cell's reference as that of one scheme's op."""
    at = [argument.partition(":")[0].rstrip("?") for argument in _arguments(cell, "table")].index(
        "table"
    )

    def run(*args: Any, compute: torch.dtype = torch.float32) -> torch.Tensor:
        table = None
        if scheme.static:
            table, args = args[at], (*args[:at], *args[at + 1 :])
            columns = {"input": args[0].shape[-1], "hidden_state": args[1].shape[-1]}
            if cell is LSTM and len(args) > 9 and args[9] is not None:
                columns["projection_input"] = args[9].shape[-1]
            _require_bytes(cell, table, columns)
        return reference(
            *args, table=table, quantized=scheme.activation is not None, compute=compute
        )

    return run


_REFERENCES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "lstm": (lstm_reference, lstm_dgrad_reference),
    "gru": (gru_reference, gru_dgrad_reference),
}

for _cell in CELLS.values():
    _reference, _gradient_reference = _REFERENCES[_cell.name]
    _gradient = f"int8_{_cell.name}_dgrad"
    for _scheme in map(get_scheme, schemes_of(_cell.name)):
        _declare(
            _cell,
            cast(str, _scheme.op(_cell.name)),
            _DOC[_scheme.name],
            _forward(_cell, _scheme, _reference),
            _RESULT[_cell.name],
            f"table: {len(_cell.parts)} 4" if _scheme.static else None,
            _gradient,
            native=True,
            limit=_scheme.max_in_features,
        )
    _declare(
        _cell,
        _gradient,
        "gradients of the float cell over w · sw: to x, the states, b_ih and b_hh, one behind the "
        "other",
        _gradient_reference,
        _GRADIENTS[_cell.name],
        f"dresult: {_RESULT[_cell.name]}",
        times=2,  # the forward again, then back
    )
