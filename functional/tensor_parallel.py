"""A layer whose weight is a `DTensor`: what each process computes of it, and what its result is.

The products work on the local tensors. Scales are taken from the local part of an operand, which
is never coarser than from the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def is_distributed(weight: torch.Tensor) -> bool:
    """Whether `weight` is a `DTensor`, asked without importing torch's distributed package."""
    return hasattr(weight, "placements")


def linear(
    function: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: Any,
    bias: Any,
    **options: Any,
) -> Any:
    """`function(x, weight, bias, **options)` for a `DTensor` weight on a mesh of one axis.

    | weight | x | result | gradient to x |
    |---|---|---|---|
    | rows sharded (`ColwiseParallel`) | gathered | last axis sharded | as `x` |
    | columns sharded (`RowwiseParallel`) | made sharded along the last axis | partial | as `x` |
    | replicated | any; gathered if partial or last axis sharded | as `x` | as `x` |

    The result is a `DTensor`, and so are the gradients to `weight` and `bias`, placed as these are.
    A plain `x` counts as replicated. To a partial result each process adds its share of `bias`, so
    that the sum may be an all-reduce or, for a sequence-parallel result, a reduce-scatter.

    Raises:
        ValueError: a mesh of several axes, or a `bias` that is not a `DTensor`.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1:
        raise ValueError(
            f"qnn: a weight on a mesh of {mesh.ndim} axes ({placements}) is not supported; "
            "parallelize over one axis, and wrap with fully_shard for the other."
        )
    if bias is not None and not is_distributed(bias):
        raise ValueError(
            f"qnn: the weight is a DTensor ({placements}) and the bias a plain tensor; distribute "
            "both, as parallelize_module does."
        )
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    last = x.dim() - 1
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    stride = torch.empty(shape, device="meta").stride()

    def whole(y: torch.Tensor, placement: Any) -> Any:
        return DTensor.from_local(y, mesh, [placement], run_check=False, shape=shape, stride=stride)

    (placement,) = placements
    if placement == Shard(0):
        given = x.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        b = None if bias is None else bias.redistribute(mesh, [Shard(0)]).to_local()
        return whole(function(given, weight.to_local(), b, **options), Shard(last))
    if placement == Shard(1):
        given = x.redistribute(mesh, [Shard(last)]).to_local()
        y = whole(function(given, weight.to_local(), None, **options), Partial())
        return y if bias is None else y + bias.redistribute(mesh, [Replicate()]).to(y.dtype)
    (kept,) = x.placements
    if kept.is_partial() or kept == Shard(last):
        kept = Replicate()
        x = x.redistribute(mesh, [kept])
    partial = [Replicate() if kept == Replicate() else Partial()]

    def local(parameter: Any) -> Any:
        return parameter.redistribute(mesh, [Replicate()]).to_local(grad_placements=partial)

    b = None if bias is None else local(bias)
    return whole(function(x.to_local(), local(weight), b, **options), kept)
