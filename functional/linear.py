"""The quantised linear layer and its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qnn.functional import tensor_parallel
from qnn.functional.invoke import op_region
from qnn.functional.quantize import dequantize, stored_parts
from qnn.kernels import OPS, get_scheme
from qnn.kernels.op.autograd import gradient_of_bias, shape_alone
from qnn.kernels.torch_private import in_functorch_transform

_AFTER = ("bias", "residual")


class _Layer(torch.autograd.Function):
    """One op of linear kind, `op(x, *weight, *constants[, bias])` with the parts of a quantised
    weight and, where it is static, the grid of `x`, and the integers of a convolution, in a region
    of its own; so are its gradients, to any order.

    For graphs that are compiled: elsewhere the op's own gradient is used, which is the same. The
    gradient to `x` is the op that the declaration names (`Op.backward`). That op is linear in `dy`
    and of the same kind, so its own gradient is again this Function.
    """

    @staticmethod
    def forward(
        x: torch.Tensor,
        bias: torch.Tensor | None,
        op: str,
        scheme: str,
        constants: Sequence[Any],
        *weight: torch.Tensor,
    ) -> torch.Tensor:
        return op_node(op, x, weight, bias, scheme, constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, bias, ctx.op, ctx.scheme, ctx.constants, *weight = inputs
        ctx.save_for_backward(*weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            (gradient,) = OPS[ctx.op].backward.values()
            names = [arg.name for arg in OPS[gradient].inputs if arg.axes is not None]
            # Without the grid of a static input; and with the shape of x, if it is asked for.
            count = len([name for name in names[1:] if name not in ("like", *_AFTER)])
            like = [shape_alone(dy, ctx.shape)] if "like" in names else []
            operands = (*weight[:count], *like)
            dx = apply_op(dy, operands, None, gradient, ctx.scheme, ctx.constants)
            # A packed weight stands for columns that x may lack.
            columns = ctx.shape[-1]
            dx = dx if dx.shape[-1] == columns else dx[..., :columns]
        if ctx.needs_input_grad[1]:
            operands_called = zip((a.name for a in OPS[ctx.op].inputs[1:]), weight, strict=False)
            offsets = dict(operands_called).get("offsets")
            dbias = gradient_of_bias(dy, ctx.bias_dtype, OPS[ctx.op].bias_axis or -1, offsets)
        return dx, dbias, None, None, None, *[None] * len(weight)


def op_node(
    op: str,
    x: torch.Tensor,
    weight: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    scheme: str,
    constants: Sequence[Any] = (),
) -> torch.Tensor:
    """The op, in a region; an op that gives a gradient takes no bias."""
    count = len(OPS[op].inputs)
    if not constants:
        return op_region(OPS[op].overload, *(x, *weight, bias)[:count], scheme=scheme)
    overload = OPS[op].overload

    def call(*tensors: torch.Tensor | None) -> torch.Tensor:
        *parts, last = tensors
        result: torch.Tensor = overload(*(*parts, *constants, last)[:count])
        return result

    return op_region(call, x, *weight, bias, scheme=scheme)


def apply_op(
    x: torch.Tensor,
    weight: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    op: str,
    scheme: str,
    constants: Sequence[Any] = (),
) -> torch.Tensor:
    """`op_node`, differentiable where that is asked for.

    Not through a Function otherwise: where no gradient is wanted Dynamo calls the forward of one
    that takes `*args` with `ctx` in front.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        result: torch.Tensor = _Layer.apply(x, bias, op, scheme, constants, *weight)  # type: ignore[no-untyped-call]
        return result
    return op_node(op, x, weight, bias, scheme, constants)


def call_in_eager(
    function: str,
    op: str,
    scheme: str,
    x: torch.Tensor,
    parts: Sequence[torch.Tensor],
    constants: Sequence[Any],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The op in eager mode, with errors that repeat the call."""
    if type(x) not in _PLAIN or type(parts[0]) not in _PLAIN:
        _refuse_distributed(function, scheme, x=x, weight=parts[0])
    # Of a kernel in C++ a wrong dtype is a ValueError; traced, the fake checks.
    OPS[op].require(x, *parts, *constants, bias)
    result: torch.Tensor = OPS[op].call(autocast(x), *parts, *constants, bias)
    return result


def straight_through(y: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """The value of `y` with the derivatives of `line`, for `torch.func` transforms that are being
    compiled.

    Dynamo traces no `autograd.Function` there; the difference below is zero.
    """
    return y.detach() + (line - line.detach())


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    weight_global_scale: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    scheme: str = "int8",
) -> torch.Tensor:
    """`y = x · dequantize(weight)ᵀ + bias`, computed as `scheme` says.

    `int8` quantises `x` per-token and multiplies integers: `y = int32(xq · weightᵀ) · weight_scale
    · sx + bias`; `int8_static` does so on the grid of `input_scale` and `input_zero_point`; `int16`
    and `int16_static` do the same with 16 bits for `x`; `fp8`,
    `fp8_tensor`, `fp8_block`, `mxfp8` and `nvfp4` quantise `x` in the scheme's format of
    activations; `int8_weight`, `fp8_weight`, `nvfp4_weight` and `int4_weight` take `x` as it is.
    The arithmetic after the sums is float32, with one cast at the end.

    The gradient to `x` is `dy · dequantize(weight)`, straight through the rounding of `x`; `bias`
    has its usual gradient; `weight` has none. Under `torch.autocast`, `x` is cast as `nn.Linear`
    would cast it.

    Args:
        x: float32, bfloat16, float16 or float64, `[..., K]`.
        weight: the parts that `quantize` returns, in one tuple; or the stored values alone, with
        weight_scale: their scale, and
        weight_global_scale: nvfp4's divisor.
        bias: any float dtype, `[N]`.
        input_scale, input_zero_point: of int8_static alone: the grid of `x`, float32 and int8
            `[1]`, with `x ≈ (q − input_zero_point) · input_scale` for q from −128 to 127. Of
            int16_static input_scale alone, with q from −32767 to 32767.
        scheme: the name of a scheme.

    Returns:
        `[..., N]` in the dtype of `x`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; an unknown scheme.
    """
    parts = stored_parts(scheme, weight, _scale=weight_scale, _global_scale=weight_global_scale)
    if get_scheme(scheme).static or input_scale is not None or input_zero_point is not None:
        given = {"_scale": input_scale, "_zero_point": input_zero_point}
        parts += grid("qnn.functional.linear", scheme, given)
    return linear_of(x, parts, bias, scheme)


def linear_of(
    x: torch.Tensor, parts: Sequence[torch.Tensor], bias: torch.Tensor | None, scheme: str
) -> torch.Tensor:
    """`linear` over the operands of the scheme's op: the parts of the weight and, where it is
    static, the grid of `x`.
    """
    known = get_scheme(scheme)
    op = known.linear
    if not torch.compiler.is_compiling():
        return call_in_eager("linear", op, scheme, x, parts, (), bias)
    x, parts = autocast(x), tuple(parts)
    if in_functorch_transform():
        detached = None if bias is None else bias.detach()
        y = op_node(op, x.detach(), parts, detached, scheme)
        w = dequantize(parts[: len(known.weight.parts)], dtype=x.dtype, scheme=scheme)
        line = torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
        return straight_through(y, line)
    return apply_op(x, parts, bias, op, scheme)


def scale_columns(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x` `[..., K]` times `scale` `[K]`, powers of two, in the dtype of `x`."""
    return x * scale.to(x.dtype)


def grid(
    who: str, scheme: str, given: Mapping[str, torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """The parts of a grid that a static scheme has, by suffix."""
    known = get_scheme(scheme)
    if not known.static or known.activation is None:
        raise ValueError(f"{who}: scheme {scheme!r} takes no input_scale.")
    wanted = [part.suffix for part in known.activation.parts[1:]]
    names = " and ".join("input" + suffix for suffix in wanted)
    found = {suffix: part for suffix, part in given.items() if part is not None}
    if found.keys() != {*wanted}:
        only = "" if found.keys() <= {*wanted} else " alone"
        raise ValueError(f"{who}: scheme {scheme!r} needs {names}{only}.")
    return tuple(found[suffix] for suffix in wanted)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _refuse_distributed(function: str, scheme: str, **given: torch.Tensor) -> None:
    for name, tensor in given.items():
        if tensor_parallel.is_distributed(tensor):
            raise ValueError(
                f"qnn.functional.{function}(scheme={scheme!r}): {name} is a DTensor; quantised "
                "weights are sharded by fully_shard alone, and tensor parallelism is for "
                "qnn.Linear."
            )


def autocast(x: torch.Tensor) -> torch.Tensor:
    """`x` as `nn.Linear` would cast it under `torch.autocast`."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
