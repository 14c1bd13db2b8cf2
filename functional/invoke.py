"""The one seam: every quantised computation passes through `op_region` or `invoke_quant`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from qnn.kernels.op import describe
from qnn.kernels.torch_private import allow_views, in_functorch_transform, invoke_quant_packed
from qnn.kernels.user_region import REGION_RESULT, REGION_START, check_capture

Results = torch.Tensor | tuple[torch.Tensor, ...]
R = TypeVar("R", bound=Results)


def op_region(
    fn: Callable[..., torch.Tensor], *tensors: torch.Tensor | None, scheme: str
) -> torch.Tensor:
    """`fn(*tensors)`, one registered op with one tensor as its result, as a single node of any
    graph that is being traced. The gradient is the caller's: inside of an `autograd.Function`.
    """
    if not torch.compiler.is_compiling() or in_functorch_transform():
        return fn(*tensors)
    (result,) = _node(lambda *given: (fn(*given),), tensors, scheme)
    return result


def invoke_quant(
    fn: Callable[..., R],
    *tensors: torch.Tensor | None,
    scheme: str,
    codegen_low_precision: bool = True,
) -> R:
    """`fn(*tensors)`, as a single node with `scheme=` in any graph that is being traced: the seam
    for a scheme of your own, whose `fn` is made of torch operations.

        w = invoke_quant(dequantize, codes, scale, scheme="nf4")
        y = torch.mm(x, w.t())

    In eager mode it is a plain call, and inside `torch.func` transforms too, for which the node has
    no rule. Under `torch.compile` and `torch.export` the graph gets one higher-order node,
    `invoke_quant_packed(region, *tensors, scheme="…")`, whose region holds what `fn` does;
    Inductor's post-grad passes see it as `invoke_quant`, whatever a pass makes of it, and fuse what
    is left of it with its neighbours.

    Where a gradient is wanted, the backward graph has one more node, `scheme="…_backward"`. Its
    region is the vector-Jacobian product of `fn`: it computes `fn` again from the same tensors, and
    gives the gradients of the float tensors that need one. So nothing but `tensors` is kept for the
    backward, and `fn` may draw no random numbers.

    Args:
        fn: a function of `tensors`. It returns a tensor, or a tuple of tensors; it may not write to
            its arguments, branch on values, or take tensors from anywhere else.
        tensors: its arguments, of any dtype. A None reaches `fn` and is not an operand of the node.
        scheme: any name; the schemes of the library are in `qnn.SCHEMES`.
        codegen_low_precision: as of torch's `InvokeQuant`: where Inductor makes the region the
            prologue of a Triton matrix product, whether it computes it in the region's dtypes,
            bfloat16 say, or in float32 between loads and stores, as everywhere else. Code for the
            CPU is the same either way.

    Raises:
        TypeError: an argument of the wrong kind, or an `fn` that returns no tensors.
        ValueError: in eager mode, an `fn` that writes to its arguments.
        NotImplementedError: under `torch.compile`, a gradient through an `fn` that draws random
            numbers.
    """
    _check(fn, tensors, scheme, codegen_low_precision)
    if not torch.compiler.is_compiling() or in_functorch_transform():
        return _eager(fn, tensors, scheme)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        results = _Region.apply(fn, scheme, codegen_low_precision, *tensors)  # type: ignore[no-untyped-call]
    else:
        results = _forward(fn, tensors, scheme, codegen_low_precision)
    return cast(R, results[0] if len(results) == 1 else results)


def _node(
    fn: Callable[..., tuple[torch.Tensor, ...]],
    tensors: Sequence[torch.Tensor | None],
    scheme: str,
) -> tuple[torch.Tensor, ...]:
    """The node; `fn` returns a tuple."""
    present = tuple(tensor is not None for tensor in tensors)

    # A tuple: of a bare tensor from non-strict export Inductor loses the shape on its way to
    # AOTInductor, and a view after the node fails with KeyError 'val'.
    def region(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(operands)
        return fn(*[next(given) if here else None for here in present])

    if torch.compiler.is_dynamo_compiling():
        allow_views()
    operands = [tensor for tensor in tensors if tensor is not None]
    return cast(tuple[torch.Tensor, ...], invoke_quant_packed(region, *operands, scheme=scheme))


def _marked(
    fn: Callable[..., tuple[torch.Tensor, ...]],
    tensors: Sequence[torch.Tensor | None],
    scheme: str,
    low: bool,
    backward: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The node of `fn`, which returns a tuple, between `region_start` and `region_result`."""

    def marked(*given: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        REGION_START([each for each in given if each is not None])
        results = fn(*given)
        if not torch.compiler.is_dynamo_compiling():
            check_capture()
        return tuple([REGION_RESULT(each, low, backward) for each in results])

    return _node(marked, tensors, scheme)


def _forward(
    fn: Callable[..., Results], tensors: Sequence[torch.Tensor | None], scheme: str, low: bool
) -> tuple[torch.Tensor, ...]:
    def call(*given: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        by_dynamo = torch.compiler.is_dynamo_compiling()  # which refuses writes itself
        return _tuple(fn(*given) if by_dynamo else _eager(fn, given, scheme), scheme)

    return _marked(call, tensors, scheme, low)


class _Region(torch.autograd.Function):
    """A region, and its gradient in another one: the vector-Jacobian product of `fn`."""

    @staticmethod
    def forward(
        fn: Callable[..., Results], scheme: str, low: bool, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        return _forward(fn, tensors, scheme, low)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.fn, ctx.scheme, ctx.low, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.differentiable = tuple(y.is_floating_point() or y.is_complex() for y in output)

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors, fn, floats = ctx.saved_tensors, ctx.fn, ctx.differentiable
        if not any(floats):  # Dynamo traces it all the same
            return None, None, None, *[None] * len(tensors)
        wanted = [i for i, wants in enumerate(ctx.needs_input_grad[3:]) if wants]
        dy = tuple(d for d, is_float in zip(dy, floats, strict=True) if is_float)

        def vjp(*given: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            held = list(given[len(dy) :])

            def of(*primals: torch.Tensor) -> tuple[torch.Tensor, ...]:
                for i, primal in zip(wanted, primals, strict=True):
                    held[i] = primal
                results = _tuple(fn(*held), ctx.scheme)
                return tuple(y for y, is_float in zip(results, floats, strict=True) if is_float)

            pull = torch.func.vjp(of, *[held[i] for i in wanted])[1]
            return cast(tuple[torch.Tensor, ...], pull(given[: len(dy)]))

        scheme = f"{ctx.scheme}_backward"
        found = iter(_marked(vjp, (*dy, *tensors), scheme, ctx.low, backward=True))
        asked = ctx.needs_input_grad[3:]
        return None, None, None, *[next(found) if wants else None for wants in asked]


def _eager(fn: Callable[..., R], tensors: Sequence[torch.Tensor | None], scheme: str) -> R:
    """A plain call, which refuses what no graph would take."""
    counted = [
        (i, tensor, tensor._version)
        for i, tensor in enumerate(tensors)
        if tensor is not None and not (in_functorch_transform() or tensor.is_inference())
    ]
    results = fn(*tensors)
    _tuple(results, scheme)
    for i, tensor, version in counted:
        if tensor._version != version:
            raise ValueError(
                f"{_who(scheme)}: fn writes to its argument {i}, {describe(tensor)}; it must "
                "leave its arguments alone and return what it computes."
            )
    return results


def _tuple(results: Any, scheme: str) -> tuple[torch.Tensor, ...]:
    """What `fn` returns, as a tuple."""
    if isinstance(results, torch.Tensor):
        return (results,)
    if not isinstance(results, tuple):
        raise TypeError(
            f"{_who(scheme)}: fn must return a tensor or a tuple of tensors, got a "
            f"{type(results).__name__}."
        )
    for i, each in enumerate(results):
        if not isinstance(each, torch.Tensor):
            raise TypeError(
                f"{_who(scheme)}: fn must return a tensor or a tuple of tensors; item {i} of its "
                f"tuple is a {type(each).__name__}."
            )
    if len(results) < 2:
        raise TypeError(
            f"{_who(scheme)}: fn returns a tuple of {len(results)}; return the tensor itself."
        )
    return results


def _check(fn: object, tensors: Sequence[object], scheme: object, low: object) -> None:
    if not isinstance(scheme, str) or not scheme:
        raise TypeError(
            f"qnn.functional.invoke_quant: scheme must be a name, such as 'nf4', got {scheme!r}."
        )
    if not callable(fn):
        raise TypeError(
            f"{_who(scheme)}: fn must be a function of the tensors, got a {type(fn).__name__}; "
            "call invoke_quant(fn, *tensors, scheme=…)."
        )
    for i, tensor in enumerate(tensors):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{_who(scheme)}: argument {i} of fn must be a tensor or None, got a "
                f"{type(tensor).__name__}; bind what is not a tensor, as "
                "functools.partial(fn, block=64)."
            )
    if not any(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise TypeError(f"{_who(scheme)}: fn must be given a tensor, at least one.")
    if not isinstance(low, bool):
        raise TypeError(
            f"{_who(scheme)}: codegen_low_precision must be True or False, got {low!r}."
        )


def _who(scheme: str) -> str:
    return f"qnn.functional.invoke_quant(scheme={scheme!r})"
