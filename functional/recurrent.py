"""The quantised recurrent layers: an LSTM or a GRU, one layer in one direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qnn.functional.invoke import op_region
from qnn.functional.linear import autocast
from qnn.functional.quantize import stored_parts
from qnn.kernels import OPS
from qnn.kernels.reference.recurrent import split_gradients, split_result
from qnn.kernels.schemes import SCHEMES, schemes_of

Tensors = tuple[torch.Tensor | None, ...]
Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class RecurrentWeights:
    """The weights of one layer and direction.

    Attributes:
        ih, hh: `[G·H, I]` and `[G·H, P]`, for the G gates i, f, g, o of an LSTM (`[4H, …]`) or
            r, z, n of a GRU: the tensors that `quantize` returns, in a tuple; or the first alone.
        ih_scale, hh_scale: then the second: of int8 a scale per output channel, `[G·H, 1]`.
        bias_ih, bias_hh: float, `[G·H]`, or None.
        hr, hr_scale: the projection of an LSTM, `[P, H]`, likewise, or None.
        table: for `int8_static`: a row `(scale, zero_point, qmin, qmax)` for each part of the cell,
            in the order of `qnn.kernels.reference.recurrent.CELLS[...].parts`.
    """

    ih: torch.Tensor | Parts
    ih_scale: torch.Tensor | None = None
    hh: torch.Tensor | Parts | None = None
    hh_scale: torch.Tensor | None = None
    bias_ih: torch.Tensor | None = None
    bias_hh: torch.Tensor | None = None
    hr: torch.Tensor | Parts | None = None
    hr_scale: torch.Tensor | None = None
    table: torch.Tensor | None = None


def _call(op: str, direction: str, scheme: str, *tensors: torch.Tensor | None) -> torch.Tensor:
    """The op, in a region; `tensors` are all of its arguments but the last."""
    overload = OPS[op].overload

    def run(*operands: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = overload(*operands, direction)
        return result

    return op_region(run, *tensors, scheme=scheme)


class _Recurrent(torch.autograd.Function):
    """An op of a cell in a region of its own, and its gradients in another: those to `x`, the
    states and the biases, of the float cell over the dequantised weights. For graphs that are
    compiled: elsewhere the op's own gradient is used, which is the same.
    """

    @staticmethod
    def forward(
        op: str, direction: str, scheme: str, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        return _call(op, direction, scheme, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.op, ctx.direction, ctx.scheme, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dresult: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        names = [arg.name for arg in OPS[ctx.op].inputs[:-1]]
        given = dict(zip(names, ctx.saved_tensors, strict=True))
        (gradient,) = set(OPS[ctx.op].backward.values())
        wanted = [arg.name for arg in OPS[gradient].inputs[:-1]]
        values = {**given, "dresult": dresult.contiguous()}
        flat = _call(gradient, ctx.direction, ctx.scheme, *(values[name] for name in wanted))
        found = split_gradients(given, flat)
        asked = zip(names, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(found.get(name) if wants else None for name, wants in asked)


def recurrent_of(
    cell: str,
    x: torch.Tensor,
    states: Parts,
    operands: Tensors,
    scheme: str,
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
) -> Parts:
    """`lstm` or `gru` over the operands of the scheme's op: the parts of both weights, the table of
    a static scheme, both biases, and the parts of a projection where there is one.
    """
    op, x = OPS[str(SCHEMES[scheme].op(cell))], autocast(x)
    tensors: Tensors = (x, *[state.to(x.dtype) for state in states], *operands)
    tensors += (None,) * (len(op.inputs) - 2 - len(tensors)) + (lengths,)
    direction = "reverse" if reverse else "forward"
    if not torch.compiler.is_compiling():
        op.require(*tensors, direction)  # a kernel in C++ words its errors otherwise
        result = op.call(*tensors, direction)
    else:
        wanted = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in tensors
        )
        call: Callable[..., torch.Tensor] = _Recurrent.apply if wanted else _call
        result = call(op.name, direction, scheme, *tensors)
    return split_result(result, x.shape[0], x.shape[1], *(state.shape[1] for state in states))


def _operands(cell: str, weights: RecurrentWeights, scheme: str) -> Tensors:
    """What `recurrent_of` takes; a ValueError for weights of another scheme."""
    known, w = SCHEMES.get(scheme), weights
    if known is None or known.op(cell) is None:
        able = ", ".join(map(repr, schemes_of(cell)))
        raise ValueError(f"qnn.functional.{cell}: scheme must be one of {able}, got {scheme!r}.")
    if (w.table is not None) != known.static:
        verb = "has no" if w.table is not None else "needs a"
        raise ValueError(f"qnn.functional.{cell}: scheme {scheme!r} {verb} table of parts.")
    return (
        *stored_parts(scheme, w.ih, _scale=w.ih_scale),
        *stored_parts(scheme, () if w.hh is None else w.hh, _scale=w.hh_scale),
        *(() if w.table is None else (w.table,)),
        w.bias_ih,
        w.bias_hh,
        *(() if w.hr is None else stored_parts(scheme, w.hr, _scale=w.hr_scale)),
    )


def lstm(
    x: torch.Tensor,
    hx: tuple[torch.Tensor, torch.Tensor],
    weights: RecurrentWeights,
    *,
    scheme: str = "int8",
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer of an LSTM in one direction, computed as `scheme` says.

        i, f, o = sigmoid(W_ih,k x + b_ih,k + W_hh,k h + b_hh,k) for k = i, f, o; g = tanh(…)
        c = f · c + i · g;  h = o · tanh(c), or W_hr (o · tanh(c)) with a projection

    `int8` quantises `x` and `h` a row of the batch in each step, and multiplies integers;
    `int8_static` rounds every part of the cell to the grid that `weights.table` gives it;
    `int8_weight` takes activations as they are. docs/numerics.md has the arithmetic. Gradients to
    `x`, the states and the biases are those of the float cell over the dequantised weights.

    Args:
        x: float32, bfloat16, float16 or float64, `[T, B, I]`.
        hx: `(h [B, P], c [B, H])`, where P is H without a projection.
        weights: of this layer and direction.
        scheme: one that has a recurrent layer, such as `"int8"`, `"int8_static"`, `"int8_weight"`.
        lengths: int64 `[B]`; after a sequence's length its output is 0 and its states stay.
        reverse: from the last step to the first.

    Returns:
        `(y [T, B, P], h [B, P], c [B, H])` in the dtype of `x`; views of one tensor.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; a scheme without
            recurrent layers.
    """
    operands = _operands("lstm", weights, scheme)
    y, h, c = recurrent_of("lstm", x, hx, operands, scheme, lengths, reverse)
    return y, h, c


def gru(
    x: torch.Tensor,
    hx: torch.Tensor,
    weights: RecurrentWeights,
    *,
    scheme: str = "int8",
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of a GRU in one direction, computed as `scheme` says.

        r, z = sigmoid(W_ih,k x + b_ih,k + W_hh,k h + b_hh,k) for k = r, z
        n = tanh(W_ih,n x + b_ih,n + r · (W_hh,n h + b_hh,n));  h = (h − n) · z + n

    All else is as in `lstm`, with `hx` the hidden state `[B, H]`.

    Returns:
        `(y [T, B, H], h [B, H])` in the dtype of `x`.
    """
    operands = _operands("gru", weights, scheme)
    y, h = recurrent_of("gru", x, (hx,), operands, scheme, lengths, reverse)
    return y, h
