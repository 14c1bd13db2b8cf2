"""The quantised linear layer and its gradient."""

from __future__ import annotations

from typing import Any

import torch

from qnn.functional.invoke import invoke_quant
from qnn.functional.quantize import dequantize
from qnn.kernels import OPS, get_scheme
from qnn.kernels.torch_private import in_forward_mode, in_functorch_transform


class _Linear(torch.autograd.Function):
    """One op of linear kind, `op(x, w, sw[, bias])`, in a region of its own; so are its gradients,
    to any order.

    The gradient to `x` is the op that the declaration names (`Op.backward`). That op is linear in
    `dy` and of the same kind, so its own gradient is again this Function.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        w: torch.Tensor,
        sw: torch.Tensor,
        bias: torch.Tensor | None,
        op: str,
        scheme: str,
    ) -> torch.Tensor:
        operands = (x, w, sw, bias)[: len(OPS[op].inputs)]
        return invoke_quant(OPS[op].overload, *operands, scheme=scheme)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, w, sw, bias, ctx.op, ctx.scheme = inputs
        ctx.save_for_backward(w, sw)
        ctx.save_for_forward(w, sw)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w, sw = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            (gradient,) = OPS[ctx.op].backward.values()
            dx = _apply(dy, w, sw, None, gradient, ctx.scheme)
        if ctx.needs_input_grad[3]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return dx, None, None, dbias, None, None


class _ForwardModeLinear(_Linear):
    """`_Linear` with the tangent of its output. A class of its own, since Dynamo refuses one that
    has a `jvp`.
    """

    @staticmethod
    def jvp(
        ctx: Any, tx: torch.Tensor, tw: None, tsw: None, tbias: torch.Tensor | None, *_: None
    ) -> torch.Tensor:
        w, sw = ctx.saved_tensors
        # The gradient of the gradient is the layer without the rounding of x, which is its
        # linearisation.
        (gradient,) = OPS[ctx.op].backward.values()
        (linearised,) = OPS[gradient].backward.values()
        return _apply(tx, w, sw, tbias, linearised, ctx.scheme)


def _apply(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    op: str,
    scheme: str,
) -> torch.Tensor:
    function = _ForwardModeLinear if in_forward_mode() else _Linear
    result: torch.Tensor = function.apply(x, w, sw, bias, op, scheme)  # type: ignore[no-untyped-call]
    return result


def _straight_through(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    op: str,
    scheme: str,
) -> torch.Tensor:
    """The op's value with the derivatives of the float layer, for `torch.func` transforms that are
    being compiled.

    Dynamo traces no `autograd.Function` there; the difference below is zero, and its derivatives
    are those of `line`.
    """
    detached = (x.detach(), w, sw, None if bias is None else bias.detach())
    y = invoke_quant(OPS[op].overload, *detached, scheme=scheme)
    line = torch.nn.functional.linear(
        x, dequantize(w, sw, x.dtype), None if bias is None else bias.to(x.dtype)
    )
    return y.detach() + (line - line.detach())


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scheme: str = "int8",
) -> torch.Tensor:
    """`y = x · dequantize(weight, weight_scale)ᵀ + bias`, computed as `scheme` says.

    `int8` quantises `x` a row and multiplies integers: `y = int32(xq · weightᵀ) · weight_scale · sx
    + bias`; `int8_weight` takes `x` as it is. The arithmetic behind the sums is float32, with one
    cast at the end. The gradient to `x` is `dy · dequantize(weight)`, straight through the rounding
    of `x`; `bias` has its usual gradient; `weight` has none. Under `torch.autocast`, `x` is cast as
    `nn.Linear` would cast it.

    Args:
        x: float32, bfloat16, float16 or float64, `[..., K]`.
        weight: stored values, `[N, K]`.
        weight_scale: float32 `[N, 1]`.
        bias: any float dtype, `[N]`.
        scheme: `"int8"` or `"int8_weight"`.

    Returns:
        `[..., N]` in the dtype of `x`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; an unknown scheme.
    """
    op = get_scheme(scheme).linear
    if not torch.compiler.is_compiling():
        # Of a kernel in C++ a wrong dtype is a ValueError; traced, the fake checks.
        OPS[op].require(x, weight, weight_scale, bias)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if torch.compiler.is_compiling() and in_functorch_transform():
        return _straight_through(x, weight, weight_scale, bias, op, scheme)
    differentiable = x.requires_grad or (bias is not None and bias.requires_grad)
    if in_forward_mode() or (differentiable and torch.is_grad_enabled()):
        return _apply(x, weight, weight_scale, bias, op, scheme)
    return invoke_quant(OPS[op].overload, x, weight, weight_scale, bias, scheme=scheme)
