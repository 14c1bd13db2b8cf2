"""The one seam: every quantised computation passes through `invoke_quant`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qnn.kernels.torch_private import in_functorch_transform, invoke_quant_packed


def invoke_quant(
    fn: Callable[..., torch.Tensor], *tensors: torch.Tensor | None, scheme: str
) -> torch.Tensor:
    """Call `fn(*tensors)`, as a single node with `scheme=` in any graph that is being traced.

    In eager mode it is a plain call, and inside `torch.func` transforms too, for which the node has
    no rule. Under `torch.compile` and `torch.export` the graph gets one higher-order node,
    `invoke_quant_packed(region, *tensors, scheme="…")` (Inductor's post-grad passes see it as
    `invoke_quant`), whose region holds what `fn` does: one registered op with one tensor as its
    result. A None among `tensors` reaches `fn` and is not an operand of the node.
    """
    if not torch.compiler.is_compiling() or in_functorch_transform():
        return fn(*tensors)
    present = tuple(tensor is not None for tensor in tensors)

    # A tuple: of a bare tensor from non-strict export Inductor loses the shape on its way to
    # AOTInductor, and a view after the node fails with KeyError 'val'.
    def region(*operands: torch.Tensor) -> tuple[torch.Tensor]:
        given = iter(operands)
        return (fn(*[next(given) if here else None for here in present]),)

    operands = [tensor for tensor in tensors if tensor is not None]
    result: torch.Tensor
    (result,) = invoke_quant_packed(region, *operands, scheme=scheme)
    return result
