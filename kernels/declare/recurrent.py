"""The recurrent ops, derived from the cells and the schemes: for each scheme a layer in one
direction, and the gradient that the schemes of one weight format share. `reference/recurrent.py`
says what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qnn.kernels.formats.base import FLOATS, Format, Part
from qnn.kernels.op import OPS, Op, size_of
from qnn.kernels.reference.recurrent import (
    CELLS,
    DIRECTIONS,
    GRU,
    Cell,
    Product,
    Reference,
    gradient_reference,
    layer_reference,
    split_gradients,
)
from qnn.kernels.schemes import SCHEMES, Scheme

# The schemes whose layers the library of C++ kernels has.
_NATIVE = ("int8", "int8_static", "int16", "int16_static", "int8_weight")
_SAMPLE_SIZES: dict[str, int] = {"t": 5, "b": 3, "i": 19, "p": 21, "h": 21}


def _stored(cell: Cell, weight: Format) -> dict[str, tuple[Product, Part]]:
    """What the weights of a cell are stored in, by the names of the arguments."""
    first, *others = weight.parts
    parts = (replace(first, short="{}"), *others)  # w_ih, and not w_ihq
    return {
        part.short.format(f"w_{product.weight}"): (product, part)
        for product in cell.products
        for part in parts
    }


def _arguments(cell: Cell, weight: Format, extra: str | None) -> dict[str, str]:
    """The axes of each argument by its name; `extra` stands after those that must be given."""
    weights: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for product, part in _stored(cell, weight).values():
        declared = part.declared(f"w_{product.weight}", product.rows, product.columns)
        name, _, axes = declared.partition(": ")
        weights[product.optional][name + "?" * product.optional] = axes
    return {
        "x": "t b i",
        **{f"{n[0]}0": f"b {width}" for n, width in zip(cell.states, cell.widths, strict=True)},
        **weights[False],
        **(dict([extra.split(": ")]) if extra else {}),
        **{f"b_{each.weight}?": each.rows for each in cell.products if not each.optional},
        **weights[True],
        "lengths?": "b",
        "direction?": "str",
    }


def _result(cell: Cell) -> str:
    return "+".join([f"t*b*{cell.widths[0]}", *(f"b*{width}" for width in cell.widths)])


def _gradients(cell: Cell) -> str:
    states, rows = (f"b*{width}" for width in cell.widths), cell.products[0].rows
    return "+".join(["t*b*i", *states, rows, rows])


def _sample_scale(product: Product, part: Part) -> Callable[[Mapping[str, int]], torch.Tensor]:
    """Scales of a weight that leave the gates between their ends."""

    def sample(sizes: Mapping[str, int]) -> torch.Tensor:
        shape = part.shape(size_of(product.rows, sizes), size_of(product.columns, sizes))
        return torch.linspace(0.0005, 0.0015, torch.Size(shape).numel()).view(shape)

    return sample


def _sample_table(cell: Cell) -> torch.Tensor:
    """8 bits for what enters a product, 16 for the rest, and one part that stays as it is."""
    rows = [[2.0**-10, 0.0, -32768.0, 32767.0] for _ in cell.parts]
    rows[0] = [0.03, 120.0, 0.0, 255.0]
    rows[1] = [2.0**-7, 0.0, -128.0, 127.0]
    rows[-1] = [0.0, 0.0, 0.0, 0.0] if cell is GRU else [2.0**-7, 128.0, 0.0, 255.0]
    return torch.tensor(rows)


def _products(cell: Cell, times: int) -> dict[str, str]:
    """The products of each step, `times` over, by the optional weight that they are of."""
    result: dict[str, list[str]] = {"": []}
    for name, _, rows, columns, optional in cell.products:
        result.setdefault(f"w_{name}" if optional else "", []).append(f"t b {rows} {columns}")
    return {name: "+".join(each * times) for name, each in result.items()}


def _rule(names: Sequence[str], projection: Sequence[str]) -> Callable[..., str | None] | None:
    """What the notation cannot say of an LSTM, whose projection is stored in `projection`."""
    if not projection:
        return None
    first, *others = (names.index(name) for name in projection)

    def rule(*args: Any) -> str | None:
        absent = args[first] is None
        for at in others:
            if (args[at] is None) is not absent:
                return f"{' and '.join(projection)} belong together"
        if absent and (p := args[1].shape[-1]) != (h := args[2].shape[-1]):
            return f"h0 must be as wide as c0, {h}, where there is no projection w_hr, got {p}"
        return None

    return rule


def _declare(
    cell: Cell,
    scheme: Scheme,
    name: str,
    doc: str,
    reference: Reference,
    result: str,
    extra: str | None,
    backward: str | None,
) -> None:
    """A layer, whose gradient `backward` names, or such a gradient, which goes through the layer
    again and then back.
    """
    arguments, stored = _arguments(cell, scheme.weight, extra), _stored(cell, scheme.weight)
    names = [argument.rstrip("?") for argument in arguments]
    scales = {n: each for n, each in stored.items() if each[1].is_scale}
    columns = dict.fromkeys(product.columns for product in cell.products)
    is_layer, limit, weight = backward is not None, scheme.max_in_features, scheme.weight
    multiple = weight.columns_multiple_of if weight.whole_groups else 1
    Op(
        name,
        f"{', '.join(f'{argument}: {axes}' for argument, axes in arguments.items())} -> {result}",
        doc=doc,
        dtypes={
            **dict.fromkeys(("h0", "c0", "dresult"), "x"),
            **dict.fromkeys(("x", "b_ih", "b_hh"), FLOATS),
            **{n: (part.dtype,) for n, (_, part) in stored.items()},
            "table": (torch.float32,),
            "lengths": (torch.int64,),
        },
        out=("x",),
        reference=reference,
        native=is_layer and scheme.name in _NATIVE,
        backward={
            n: backward for n in names if backward and n in ("x", "h0", "c0", "b_ih", "b_hh")
        },
        split=split_gradients if is_layer else None,
        differentiable=not is_layer,
        positive=list(scales),
        choices={"direction": DIRECTIONS},
        rule=_rule(names, [n for n, (product, _) in stored.items() if product.optional]),
        sample={
            **_SAMPLE_SIZES,
            **{n: _sample_scale(*e) for n, e in scales.items() if e[1].dtype == torch.float32},
            **(dict.fromkeys(columns, multiple) if multiple > 1 else {}),
            "table": lambda sizes: _sample_table(cell),
            "lengths": lambda sizes: torch.arange(sizes["b"]) * 2 % (sizes["t"] + 1),
        },
        products=_products(cell, 1 if is_layer else 2),
        limits=dict.fromkeys(columns, limit) if is_layer and limit else {},
        multiples=dict.fromkeys(columns, multiple) if multiple > 1 else {},
        rowwise=False,
    )


def _bits(scheme: Scheme) -> int:
    return 32 if scheme.activation is None else scheme.activation.bits


def _doc(scheme: Scheme) -> str:
    if scheme.static:
        return (
            "every part of the cell on the grid of its row (scale, zero_point, qmin, qmax) of "
            f"table, what enters a product in up to {_bits(scheme)} bits; exact sums"
        )
    if scheme.activation is None:
        return f"weights in {scheme.weight.key}, activations as they are, in float32"
    return (
        f"rows of x and of the hidden state in {scheme.activation.key}, a scale each; exact sums; "
        "gates in float32"
    )


def declare(cell: Cell, scheme: Scheme) -> None:
    """The op of a cell in a scheme that has one, and that of its gradient."""
    name, weight = scheme.op(cell.name), scheme.weight
    if name is None:
        return
    # As the linear op of the scheme: int8_linear_dgrad, int8_lstm_dgrad.
    gradient = OPS[scheme.linear].backward["x"].replace("linear", cell.name)
    table = f"table: {len(cell.parts)} 4" if scheme.static else None
    layer = layer_reference(cell, weight, scheme.activation, static=scheme.static)
    _declare(cell, scheme, name, _doc(scheme), layer, _result(cell), table, gradient)
    if gradient not in OPS:
        doc = (
            "gradients of the float cell over the weights that the parts stand for: to x, the "
            "states, b_ih and b_hh, one after the other"
        )
        given = f"dresult: {_result(cell)}"
        reference = gradient_reference(cell, weight)
        _declare(cell, scheme, gradient, doc, reference, _gradients(cell), given, None)


for _cell in CELLS.values():
    for _scheme in SCHEMES.values():
        declare(_cell, _scheme)
