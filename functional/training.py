"""The linear layer that trains in low precision: three quantised products and their casts."""

from __future__ import annotations

from typing import Any

import torch

from qnn.functional import tensor_parallel
from qnn.functional.invoke import op_region
from qnn.functional.linear import autocast, straight_through
from qnn.kernels import OPS, training_scheme
from qnn.kernels.formats import FLOATS, Format
from qnn.kernels.schemes import Training
from qnn.kernels.torch_private import (
    in_forward_mode,
    in_functorch_transform,
    is_exporting,
    is_jit_tracing,
)

Parts = tuple[torch.Tensor, ...]


def _training(scheme: str) -> Training:
    training = training_scheme(scheme).training
    assert training is not None  # noqa: S101  # training_scheme refuses the others
    return training


def _cast(
    form: Format, x: torch.Tensor, seed: torch.Tensor | None = None, *, which: str = ""
) -> Parts:
    """The parts of a matrix; `which="_columns"`: those of its transpose, as the gradient of a
    weight takes it; `"_both"`: first the ones, then the others.
    """
    op = OPS[f"{form.key}_quantize{which}"].overload
    parts: Parts = op(x, seed) if form.stochastic else op(x)
    return parts


def _multiply(
    op: str, a: Parts, b: Parts, bias: torch.Tensor | None, dtype: torch.dtype, scheme: str
) -> torch.Tensor:
    """`a · bᵀ + bias`: one region, one product."""

    def product(*operands: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = OPS[op].overload(*operands, dtype)
        return result

    return op_region(product, *a, *b, bias, scheme=scheme)


class _TrainingLinear(torch.autograd.Function):
    """`x · wᵀ + bias` of matrices, with quantised products for the gradients to `x` and `w`.

    The parts are quantised already, in this order: `x` and `w` as the forward multiplies them, and,
    if `w` wants a gradient, `xᵀ` as the product of that gradient takes it: all that is saved of
    `x`. What no gradient asks for is neither cast nor multiplied.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        seed: torch.Tensor | None,
        scheme: str,
        *parts: torch.Tensor,
    ) -> torch.Tensor:
        t = _training(scheme)
        count = len(t.x.parts)
        xq, wq = parts[:count], parts[count : count + len(t.weight.parts)]
        return _multiply(t.matmul, xq, wq, bias, x.dtype, scheme)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, w, bias, seed, ctx.scheme, *parts = inputs
        t = _training(ctx.scheme)
        transposed = parts[len(t.x.parts) + len(t.weight.parts) :]
        ctx.save_for_backward(w, seed, *transposed)
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.parts = len(parts)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        w, seed, *transposed = ctx.saved_tensors
        t = _training(ctx.scheme)
        of_x, of_w, of_bias = ctx.needs_input_grad[:3]
        dx = dw = dbias = None
        if of_x or of_w:
            which = "_both" if of_x and of_w else "_columns" if of_w else ""
            dyq = _cast(t.dy, dy, seed, which=which)
        if of_x:
            by_row = dyq[: len(t.dy.parts)]
            # Not `w.mT`: Dynamo takes an attribute out of the graph of the gradient, as one more
            # input, and nested compile regions refuse inputs that share memory.
            wq = _cast(t.weight, w.transpose(0, 1))
            dx = _multiply(t.matmul, by_row, wq, None, ctx.x_dtype, ctx.scheme)
        if of_w:
            by_column = dyq[-len(t.dy_of_wgrad.parts) :]
            dw = _multiply(t.wgrad, by_column, tuple(transposed), None, w.dtype, ctx.scheme)
        if of_bias:
            dbias = dy.sum(0, dtype=ctx.bias_dtype)
        return dx, dw, dbias, None, None, *[None] * ctx.parts


def training_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scheme: str = "fp8",
) -> torch.Tensor:
    """`y = x · weightᵀ + bias`, with all three products of a training step in low precision.

        y      = quantize(x) · quantize(weight)ᵀ + bias        summed over K
        dx     = quantize(dy) · quantize(weightᵀ)ᵀ             summed over N
        dw     = quantize(dyᵀ) · quantize(xᵀ)ᵀ                 summed over the rows of x
        dbias  = Σ dy                                          over the rows, in float

    Each operand is quantised along the axis that is summed over, in the formats of `scheme`; sums
    are float32, with one cast at the end. Of `x` only `quantize(xᵀ)` is kept for the backward, and
    nothing if `weight` needs no gradient. Rows and columns that a block does not fill are padded
    with zeros inside. Under `torch.autocast`, `x` is cast as `nn.Linear` would cast it, and
    `weight` is quantised from the dtype that it has.

    Args:
        x: float, `[..., K]`.
        weight: float, `[N, K]`.
        bias: float, `[N]`.
        scheme: `"fp8"`, `"fp8_tensor"`, `"fp8_block"`, `"mxfp8"` or `"nvfp4"`, which rounds the
            gradients by chance, from torch's random generator.

    Returns:
        `[..., N]` in the dtype of `x`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; a scheme that is
            unknown, or that has no training layer.
    """
    t = _training(scheme)
    if tensor_parallel.is_distributed(weight):
        y: torch.Tensor = tensor_parallel.linear(training_linear, x, weight, bias, scheme=scheme)
        return y
    _check(x, weight, bias, scheme)
    x = autocast(x)
    lead = x.shape[:-1]
    rows = x.reshape(-1, x.shape[-1])
    compiled = torch.compiler.is_compiling()
    traced = compiled or is_jit_tracing()
    transformed = (compiled and in_functorch_transform()) or in_forward_mode()
    # A tracer other than Dynamo keeps no autograd.Function.
    tracked = torch.is_grad_enabled() and (not traced or torch.compiler.is_dynamo_compiling())
    of_w = tracked and not transformed and weight.requires_grad
    # Nor does a graph that Dynamo exports. There the casts must see what wants a gradient, since
    # they are ops that say that they have none; detached, it would be lost in silence. In a graph
    # that is compiled they must not: DistributedDataParallel may cut it between a cast and its
    # product, and the parts would want gradients.
    exported = traced and (not torch.compiler.is_dynamo_compiling() or is_exporting())
    detached = not exported or transformed
    wq = _cast(t.weight, weight.detach() if detached else weight)
    xq = _cast(t.x, rows.detach() if detached else rows, which="_both" if of_w else "")
    xq, transposed = xq[: len(t.x.parts)], xq[len(t.x.parts) :]
    if transformed:
        added = None if bias is None else bias.detach()
        y = _multiply(t.matmul, xq, wq, added, x.dtype, scheme)
        b = None if bias is None else bias.to(x.dtype)
        y = straight_through(y, torch.nn.functional.linear(rows, weight.to(x.dtype), b))
    elif of_w or (tracked and (x.requires_grad or (bias is not None and bias.requires_grad))):
        seed = torch.randint(2**62, (1,), device=x.device) if t.stochastic else None
        y = _TrainingLinear.apply(rows, weight, bias, seed, scheme, *xq, *wq, *transposed)  # type: ignore[no-untyped-call]
    else:
        y = _multiply(t.matmul, xq, wq, bias, x.dtype, scheme)
    if len(lead) == 1:
        return y
    # Not a view to autograd: FSDP2 warns of those.
    result: torch.Tensor = torch.ops.aten._unsafe_view.default(y, [*lead, y.shape[-1]])
    return result


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scheme: str) -> None:
    who = f"qnn.functional.training_linear(scheme={scheme!r})"
    given = {"x": x, "weight": weight, **({} if bias is None else {"bias": bias})}
    for name, tensor in given.items():
        if tensor_parallel.is_distributed(tensor):
            raise ValueError(
                f"{who}: {name} is a DTensor, weight a plain tensor; parallelize the layer too, or "
                "pass the local tensor."
            )
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{who}: {name} must be one of {', '.join(map(str, FLOATS))}, got {tensor.dtype}."
            )
        if tensor.device != x.device:
            raise ValueError(
                f"{who}: {name} is on {tensor.device}, x on {x.device}; move them together."
            )
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{who}: x must be [..., K] and weight [N, K], got {list(x.shape)} and "
            f"{list(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{who}: bias must be [{weight.shape[0]}], got {list(bias.shape)}.")
