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
    | rows sharded (`ColwiseParallel`) | replicated | last axis sharded | partial |
    | columns sharded (`RowwiseParallel`) | last axis sharded | partial | last axis sharded |
    | replicated | any but partial | as `x` | as `x` |

    The result is a `DTensor`. A plain `x` counts as replicated. `bias` is added to a partial result
    once, behind the sum over the processes.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1:
        raise ValueError(
            f"qnn: a weight on a mesh of {mesh.ndim} axes ({placements}) is not supported; "
            "parallelize over one axis, and wrap with fully_shard for the other."
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
        return y if bias is None else y.redistribute(mesh, [Replicate()]) + bias
    (kept,) = x.placements
    w = weight.redistribute(mesh, [Replicate()])
    if kept.is_partial() or kept == Shard(last):
        kept = Replicate()
        x = x.redistribute(mesh, [kept])
    partial = [Replicate() if kept == Replicate() else Partial()]
    b = None if bias is None else bias.to_local(grad_placements=partial)
    y = function(x.to_local(), w.to_local(grad_placements=partial), b, **options)
    return whole(y, kept)
