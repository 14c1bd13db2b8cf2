"""The ops of the float formats, all derived from the formats: for each format a cast there and
back, for each scheme its linear layers and its product of quantised operands.

The references are the meaning of the ops. Stored values are multiplied as float32, which holds the
products exactly, and summed in float32; then `acc · sw · sx + bias` in float32 and one cast, with
the scales of blocks inside the sum.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from qnn.kernels.cpu import native
from qnn.kernels.cpu.float_linear import quantized_linear, weight_linear
from qnn.kernels.cuda import kernels_for
from qnn.kernels.float8 import E4M3, E5M2, FLOAT8
from qnn.kernels.formats import FLOATS, Format
from qnn.kernels.schemes import SCHEMES
from qnn.kernels.spec import OPS, Op

Reference = Callable[..., Any]

# Those that the library of C++ kernels brings too.
_NATIVE = ("fp8_weight_linear", "nvfp4_weight_linear")


def quantize_reference(form: Format | None, transposed: Format | None = None) -> Reference:
    """The parts of `x` in `form`, those of `xᵀ` in `transposed`, or both, one behind the other."""

    def reference(x: torch.Tensor, seed: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        parts = () if form is None else form.quantize(x, seed)
        if transposed is not None:
            # Another draw: the two forms of an element are rounded independently.
            parts += transposed.quantize(x.mT, None if seed is None else seed + 1)
        return tuple(p.contiguous() if p.numel() else p.new_empty(p.shape) for p in parts)

    return reference


def dequantize_reference(form: Format) -> Reference:
    def reference(*args: Any, compute: torch.dtype = torch.float32) -> torch.Tensor:
        *parts, dtype = args
        return form.dequantize(parts, compute).to(dtype if compute == torch.float32 else compute)

    return reference


def product(
    x: tuple[torch.Tensor, torch.Tensor | None],
    w: tuple[torch.Tensor, torch.Tensor | None],
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`x · wᵀ + bias` of decoded operands, in the dtype of their values; one cast, unless that is
    float64. A packed weight may have zeros behind the columns of `x`.
    """
    (xv, sx), (wv, sw) = x, w
    compute = wv.dtype
    y = xv.to(compute) @ wv[:, : xv.shape[-1]].mT
    if sw is not None:
        y = y * sw.flatten().to(compute)
    if sx is not None:
        y = y * sx.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(dtype if compute == torch.float32 else compute)


def matmul_reference(x: Format, w: Format) -> Reference:
    split = len(x.parts), len(x.parts) + len(w.parts)

    def reference(*args: Any, compute: torch.dtype = torch.float32) -> torch.Tensor:
        given, weight, (bias, dtype) = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
        return product(x.decode(given, compute), w.decode(weight, compute), bias, dtype)

    return reference


def linear_reference(activation: Format | None, weight: Format) -> Reference:
    def reference(
        x: torch.Tensor, *args: Any, compute: torch.dtype = torch.float32
    ) -> torch.Tensor:
        *parts, bias = args
        left = (
            (x.to(compute), None)
            if activation is None
            else activation.decode(activation.quantize(x), compute)
        )
        return product(left, weight.decode(parts, compute), bias, x.dtype)

    return reference


def linear_dgrad_reference(weight: Format) -> Reference:
    def reference(
        dy: torch.Tensor, *parts: torch.Tensor, compute: torch.dtype = torch.float32
    ) -> torch.Tensor:
        w = weight.dequantize(parts, compute)
        return (dy.to(compute) @ w).to(dy.dtype if compute == torch.float32 else compute)

    return reference


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
    columns = _two_groups(transposed.declared("t", "k", "m"), "m")
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


def _two_groups(declared: str, axis: str) -> str:
    """Parts along the rows of a batch, with room for two groups' scales at least.

    One group would be an axis of size 1, on which torch's tracing puts a guard: a batch of more
    than one group would be compiled anew.
    """
    return re.sub(rf"\b{axis}/(\d+)(?![\d*])", rf"{axis}/\1>2", declared)


def _widened(function: Reference, form: Format) -> Reference:
    """`function`, whose last results are the parts of `form`, with room for two groups."""
    count = len(form.parts)
    grouped = [
        i - count for i, part in enumerate(form.parts) if re.fullmatch(r"r c/\d+", part.axes)
    ]

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
    (left, columns), (right, _) = x.stored("x", "m", "p"), w.stored("w", "n", "p")
    operands = f"{left}, {right}"
    either = {"xq": (E4M3, E5M2), "wq": (E4M3, E5M2)} if x.storage in (E4M3, E5M2) else {}
    Op(
        name,
        f"{_two_groups(operands, 'p') if over_rows else operands}, bias: n?, dtype: dtype? -> m n",
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
            f"x: ... k, {given}, bias: n? -> ... n",
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
