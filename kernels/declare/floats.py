"""The ops that are derived from the formats: for each format a cast there and back, for each scheme
its linear layers, and the products of a training step where it has one. Those of the int8 schemes,
which take an epilogue and a static grid, are declared in `int8.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from qnn.kernels.cpu.blocked import by_rows_of_weight
from qnn.kernels.cpu.float_linear import quantized_linear, weight_linear
from qnn.kernels.cuda import kernels_for
from qnn.kernels.formats.base import FLOATS, Format
from qnn.kernels.formats.float8 import E4M3, E5M2, FLOAT8
from qnn.kernels.formats.int4 import INT4, Int4
from qnn.kernels.op import OPS, Op
from qnn.kernels.reference.floats import (
    Reference,
    dequantize_reference,
    linear_dgrad_reference,
    linear_reference,
    matmul_reference,
    quantize_reference,
)
from qnn.kernels.reference.int8_int4 import linear_reference as groups_reference
from qnn.kernels.schemes import SCHEMES

# The formats of weights that the C++ kernels decode, in the layers with activations as they are.
_NATIVE = ("float8_e4m3", "nvfp4", *INT4)
# Along the rows of a batch there is room for two groups' scales at least. One group would be an
# axis of size 1, on which torch's tracing puts a guard: a batch of more than one group would be
# compiled anew.
_TWO_GROUPS = 2


def stored_dtypes(form: Format, name: str) -> dict[str, tuple[torch.dtype, ...]]:
    return {part.short.format(name): (part.dtype,) for part in form.parts}


def scales_of(form: Format, name: str) -> tuple[str, ...]:
    return tuple(part.short.format(name) for part in form.parts if part.is_scale)


def _whole(form: Format, axis: str, name: str = "") -> dict[str, Any]:
    """Of an op whose `axis` is that of a row of `form`, or of its stored elements, and that takes
    the parts of `name`.
    """
    if not form.whole_groups:
        return {}
    multiple = form.columns_multiple_of // (form.packing if axis == "p" else 1)
    spans = {
        part.short.format(name): (part.span[0], part.span[1] + 1)
        for part in form.parts
        if part.span
    }
    return {"multiples": {axis: multiple}, "sample": {axis: 3 * multiple, **spans}}


def declare_format(form: Format, transposed: Format | None) -> None:
    """The casts of a format; `transposed` is that of a training operand's other form."""
    lead, seed = ("n" if form.tall else "..."), (", seed: 1" if form.stochastic else "")
    dtypes = {"x": FLOATS, "seed": (torch.int64,)}
    Op(
        f"{form.key}_quantize",
        f"x: {lead} k{seed} -> {form.declared('', lead, 'k')}",
        doc=f"the parts of x in {form.key}",
        dtypes=dtypes,
        out=[part.dtype for part in form.parts],
        reference=quantize_reference(form),
        kernels=kernels_for(f"{form.key}_quantize"),
        rowwise=form.rowwise,
        **_whole(form, "k"),
    )
    stored, columns = form.stored("", lead, "p")
    Op(
        f"{form.key}_dequantize",
        f"{stored}, dtype: dtype -> {lead} {columns}",
        doc="the floats that the parts stand for, in float32, then one cast to dtype",
        dtypes={**stored_dtypes(form, ""), "dtype": FLOATS},
        out=("dtype",),
        reference=dequantize_reference(form),
        positive=scales_of(form, ""),
        rowwise=form.rowwise,
        **_whole(form, "p"),
    )
    if transposed is None:
        return
    columns = transposed.declared("t", "k", "m", least=_TWO_GROUPS)
    for name, rows in {"columns": None, "both": form}.items():
        first = f"{form.declared('', 'm', 'k')}, " if rows else ""
        kernels = kernels_for(f"{form.key}_quantize_{name}")
        Op(
            f"{form.key}_quantize_{name}",
            f"x: m k{seed} -> {first}{columns}",
            doc=(f"the parts of x in {form.key}, and " if rows else "")
            + f"those of xᵀ in {transposed.key}",
            dtypes=dtypes,
            out=[p.dtype for p in (*(form.parts if rows else ()), *transposed.parts)],
            reference=_widened(quantize_reference(rows, transposed), transposed),
            kernels={key: _widened(kernel, transposed) for key, kernel in kernels.items()},
        )


def _widened(function: Reference, form: Format) -> Reference:
    """`function`, whose last results are the parts of `form`, with room for `_TWO_GROUPS`."""
    count = len(form.parts)
    grouped = [i - count for i, part in enumerate(form.parts) if part.is_grouped]

    def run(*args: Any) -> tuple[torch.Tensor, ...]:
        results = list(function(*args))
        for i in grouped:
            scale = results[i]
            if scale.shape[-1] < 2:
                results[i] = scale.new_zeros(scale.shape[0], 2)
                results[i][:, : scale.shape[-1]] = scale
        return tuple(results)

    return run


def declare_matmul(name: str, x: Format, w: Format, *, over_rows: bool = False) -> None:
    """The product of two quantised matrices; one of float8 takes either kind. With `over_rows` it
    sums over the rows of a batch, as the gradient of a weight does.
    """
    least = _TWO_GROUPS if over_rows else 0
    (left, columns), (right, _) = (
        form.stored(name, rows, "p", least=least)
        for form, name, rows in ((x, "x", "m"), (w, "w", "n"))
    )
    either = {"xq": (E4M3, E5M2), "wq": (E4M3, E5M2)} if x.storage in (E4M3, E5M2) else {}
    Op(
        name,
        f"{left}, {right}, bias?: n, dtype?: dtype -> m n",
        doc="x · wᵀ + bias of what the parts stand for, in float32, then one cast to dtype",
        dtypes={
            **stored_dtypes(x, "x"), **stored_dtypes(w, "w"), **either,
            "bias": FLOATS, "dtype": FLOATS,
        },
        out=("dtype",),
        reference=matmul_reference(x, w),
        kernels=kernels_for(name),
        positive=scales_of(x, "x") + scales_of(w, "w"),
        products=f"m n {columns}",
        rowwise=False,
    )  # fmt: skip


def declare_linear(name: str, dgrad: str, weight: Format, activation: Format | None) -> None:
    """A layer over a quantised weight: with quantised activations, or with those as they are, as
    the gradient of `dgrad` has it.
    """
    cpu, reference = weight_linear(weight), linear_reference(activation, weight)
    doc = "x · wᵀ + bias with the weight that the parts stand for, in float32, then one cast"
    integers = False
    if activation is not None and isinstance(weight, Int4):
        integers = True
        reference = groups_reference(activation, weight)
        cpu = by_rows_of_weight(reference)
        doc = (
            "(Σ over groups: float32(Σ xq · wqᵀ) · sw) · sx + bias of integers less their zero "
            f"points, exact sums, in float32, then one cast; x is quantised in {activation.key}"
        )
    elif activation is not None:
        cpu = quantized_linear(activation, _plain(dgrad))
        doc += f"; x is quantised in {activation.key} first"
    Op(
        name,
        f"x: ... k, {weight.declared('w', 'n', 'k')}, bias?: n -> ... n",
        doc=doc,
        dtypes={"x": FLOATS, **stored_dtypes(weight, "w"), "bias": FLOATS},
        out=("x",),
        reference=reference,
        kernels={"CPU": cpu, **kernels_for(name)},
        native=weight.key in _NATIVE and (activation is None or integers),
        backward={"x": dgrad},
        positive=scales_of(weight, "w"),
        products="... n k",
        rowwise=activation is None or activation.rowwise,
        **_whole(weight, "k", "w"),
    )


def declare_dgrad(name: str, weight: Format) -> None:
    """The gradient to the input, which all layers over such a weight share."""
    stored, columns = weight.stored("w", "n", "p")
    packed = weight.packing > 1  # whole groups, as of a weight
    sample = {"p": 3 * weight.columns_multiple_of // weight.packing} if packed else {}
    Op(
        name,
        f"dy: ... n, {stored} -> ... {columns}",
        doc="dy · w with the weight that the parts stand for, straight through the rounding of x",
        dtypes={"dy": FLOATS, **stored_dtypes(weight, "w")},
        out=("dy",),
        reference=linear_dgrad_reference(weight),
        backward={"dy": _plain(name)},
        products=f"... n {columns}",
        positive=scales_of(weight, "w"),
        **{"sample": sample, **_whole(weight, "p", "w")},
    )


def _plain(dgrad: str) -> str:
    """The layer with activations as they are, of an op that gives the gradient to the input."""
    return dgrad.replace("_linear_dgrad", "_weight_linear")


def _declare_all() -> None:
    schemes = [scheme for scheme in SCHEMES.values() if scheme.weight.name != "int8"]
    trained = [scheme.training for scheme in schemes if scheme.training is not None]
    # Which form of a training operand goes with which other.
    pairs = {t.x.key: t.x_of_wgrad for t in trained} | {t.dy.key: t.dy_of_wgrad for t in trained}
    forms: dict[str, Format] = {**FLOAT8}
    for t in trained:
        forms |= {f.key: f for f in (t.x, t.weight, t.dy, t.x_of_wgrad, t.dy_of_wgrad)}
    forms |= {scheme.weight.key: scheme.weight for scheme in schemes}
    for key, form in forms.items():
        declare_format(form, pairs.get(key))
    for t in trained:
        declare_matmul(t.matmul, t.x, t.weight)
        if t.wgrad != t.matmul:
            declare_matmul(t.wgrad, t.dy_of_wgrad, t.x_of_wgrad, over_rows=True)
    dgrads: dict[str, str] = {}  # one for each format of a weight
    for scheme in schemes:
        named = scheme.linear.removesuffix("_linear").removesuffix("_weight") + "_linear_dgrad"
        dgrad = dgrads.setdefault(scheme.weight.key, named)
        if dgrad not in OPS:
            declare_linear(_plain(dgrad), dgrad, scheme.weight, None)
            declare_dgrad(dgrad, scheme.weight)
        if scheme.linear not in OPS:
            declare_linear(scheme.linear, dgrad, scheme.weight, scheme.activation)


_declare_all()
