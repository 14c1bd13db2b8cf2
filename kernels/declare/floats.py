"""The ops of the float formats, all derived from the formats: for each format a cast there and
back, for each scheme its linear layers and its product of quantised operands.
"""

from __future__ import annotations

from typing import Any

import torch

from qnn.kernels.cpu import native
from qnn.kernels.cpu.float_linear import quantized_linear, weight_linear
from qnn.kernels.cuda import kernels_for
from qnn.kernels.formats.base import FLOATS, Format
from qnn.kernels.formats.float8 import E4M3, E5M2, FLOAT8
from qnn.kernels.op import OPS, Op
from qnn.kernels.reference.floats import (
    Reference,
    dequantize_reference,
    linear_dgrad_reference,
    linear_reference,
    matmul_reference,
    quantize_reference,
)
from qnn.kernels.schemes import SCHEMES

# Those that the library of C++ kernels brings too.
_NATIVE = ("fp8_weight_linear", "nvfp4_weight_linear")
# Along the rows of a batch there is room for two groups' scales at least. One group would be an
# axis of size 1, on which torch's tracing puts a guard: a batch of more than one group would be
# compiled anew.
_TWO_GROUPS = 2


def _stored_dtypes(form: Format, name: str) -> dict[str, tuple[torch.dtype, ...]]:
    return {part.short.format(name): (part.dtype,) for part in form.parts}


def _scales(form: Format, *names: str) -> tuple[str, ...]:
    return tuple(scale for name in names for scale in form.names(name)[1:])


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
    )
    stored, columns = form.stored("", lead, "p")
    Op(
        f"{form.key}_dequantize",
        f"{stored}, dtype: dtype -> {lead} {columns}",
        doc="the floats that the parts stand for, in float32, then one cast to dtype",
        dtypes={**_stored_dtypes(form, ""), "dtype": FLOATS},
        out=("dtype",),
        reference=dequantize_reference(form),
        positive=_scales(form, ""),
        rowwise=form.rowwise,
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
            **_stored_dtypes(x, "x"), **_stored_dtypes(w, "w"), **either,
            "bias": FLOATS, "dtype": FLOATS,
        },
        out=("dtype",),
        reference=matmul_reference(x, w),
        kernels=kernels_for(name),
        positive=_scales(x, "x") + _scales(w, "w"),
        products=f"m n {columns}",
        rowwise=False,
    )  # fmt: skip


def declare_linear(prefix: str, weight: Format, activation: Format | None) -> None:
    """The layers over a quantised weight: with quantised activations, and with those as they are;
    and the gradient to the input, which both share.
    """
    given, (stored, columns) = weight.declared("w", "n", "k"), weight.stored("w", "n", "p")
    dtypes = {**dict.fromkeys(("x", "dy", "bias"), FLOATS), **_stored_dtypes(weight, "w")}
    plain = f"{prefix}_weight_linear"
    cpu = weight_linear(weight)
    layers: dict[str, tuple[Format | None, Reference]] = {
        plain: (None, native.preferred(plain, cpu) if plain in _NATIVE else cpu)
    }
    if activation is not None:
        layers[f"{prefix}_linear"] = (activation, quantized_linear(activation, plain))
    for name, (form, kernel) in layers.items():
        Op(
            name,
            f"x: ... k, {given}, bias?: n -> ... n",
            doc="x · wᵀ + bias with the weight that the parts stand for, in float32, then one cast"
            + (f"; x is quantised in {form.key} first" if form else ""),
            dtypes=dtypes,
            out=("x",),
            reference=linear_reference(form, weight),
            kernels={"CPU": kernel, **kernels_for(name)},
            backward={"x": f"{prefix}_linear_dgrad"},
            positive=_scales(weight, "w"),
            products="... n k",
            rowwise=form is None or form.rowwise,
        )
    Op(
        f"{prefix}_linear_dgrad",
        f"dy: ... n, {stored} -> ... {columns}",
        doc="dy · w with the weight that the parts stand for, straight through the rounding of x",
        dtypes=dtypes,
        out=("dy",),
        reference=linear_dgrad_reference(weight),
        backward={"dy": plain},
        sample={"p": 24} if weight.packing > 1 else None,  # whole blocks, as of a weight
        products=f"... n {columns}",
        positive=_scales(weight, "w"),
    )


def _declare_all() -> None:
    trained = [scheme.training for scheme in SCHEMES.values() if scheme.training is not None]
    # Which form of a training operand goes with which other.
    pairs = {t.x.key: t.x_of_wgrad for t in trained} | {t.dy.key: t.dy_of_wgrad for t in trained}
    forms: dict[str, Format] = {**FLOAT8}
    for t in trained:
        forms |= {f.key: f for f in (t.x, t.weight, t.dy, t.x_of_wgrad, t.dy_of_wgrad)}
    for key, form in forms.items():
        declare_format(form, pairs.get(key))
    for scheme in SCHEMES.values():
        training = scheme.training
        if training is None:
            continue
        declare_matmul(training.matmul, training.x, training.weight)
        if training.wgrad != training.matmul:
            declare_matmul(
                training.wgrad, training.dy_of_wgrad, training.x_of_wgrad, over_rows=True
            )
        declare_linear(scheme.name, scheme.weight, scheme.activation)


_declare_all()
native.replaces(*(OPS[name] for name in _NATIVE))
