"""The quantised linear layers of experts: rows sorted by the weight that they meet, and the way
there and back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qnn.functional.layout import STACK
from qnn.functional.linear import apply_op, autocast, call_in_eager, grid, op_node, straight_through
from qnn.functional.quantize import stored_parts
from qnn.kernels import get_scheme
from qnn.kernels.op.autograd import group_of_rows
from qnn.kernels.torch_private import in_functorch_transform


def grouped_linear(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    scheme: str = "int8",
) -> torch.Tensor:
    """`y = x · dequantize(weight[e])ᵀ + bias[e]` for the rows of each group `e`, as `linear`
    computes it in `scheme`.

    Group `e` has the rows `offsets[e − 1] … offsets[e] − 1` of `x`, none where the two are equal;
    `sort_by_group` sorts rows so. Rows after the last group belong to none and give zeros. In
    `fp8_tensor` the rows of each group have a scale.

    The gradients are those of `linear`: to `x` straight through the rounding, and to `bias`.

    Args:
        x: float32, bfloat16, float16 or float64, `[M, K]`.
        weight: the parts of a stack `[E, N, K]`, each with an axis `E` in front.
        offsets: the ends of the groups, int32 `[E]`, as those of torch's `grouped_mm`. A kernel
            reads them on the host.
        bias: any float dtype, `[E, N]`.
        input_scale, input_zero_point: of int8_static and int16_static alone: the grid of `x`, as
            for `linear`.
        scheme: the name of a scheme.

    Returns:
        `[M, N]` in the dtype of `x`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; offsets that
            decrease or lie outside of the rows; an unknown scheme, or one without such an op.

    >>> w = torch.ones(3, 2, 2, dtype=torch.int8), torch.ones(3, 2, 1)
    >>> offsets = torch.tensor([1, 1, 2], dtype=torch.int32)
    >>> grouped_linear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), w, offsets).shape
    torch.Size([2, 2])
    """
    parts = (*stored_parts(scheme, weight), offsets)
    if get_scheme(scheme).static or input_scale is not None or input_zero_point is not None:
        given = {"_scale": input_scale, "_zero_point": input_zero_point}
        parts += grid("qnn.functional.grouped_linear", scheme, given)
    return grouped_linear_of(x, parts, bias, scheme)


def grouped_linear_of(
    x: torch.Tensor, parts: Sequence[torch.Tensor], bias: torch.Tensor | None, scheme: str
) -> torch.Tensor:
    """`grouped_linear` over the operands of the scheme's op: the parts of the weight, the offsets
    and, where it is static, the grid of `x`.
    """
    known = get_scheme(scheme)
    op = known.op("grouped_linear")
    if op is None:
        raise ValueError(f"qnn.functional.grouped_linear: scheme {scheme!r} has no such op.")
    if not torch.compiler.is_compiling():
        return call_in_eager("grouped_linear", op, scheme, x, parts, (), bias)
    x, parts = autocast(x), tuple(parts)
    if in_functorch_transform():
        detached = None if bias is None else bias.detach()
        y = op_node(op, x.detach(), parts, detached, scheme)
        *weight, offsets = parts[: len(known.weight.parts) + 1]
        line = float_grouped_linear(x, STACK.dequantize(weight, x.dtype, scheme), offsets, bias)
        return straight_through(y, line)
    return apply_op(x, parts, bias, op, scheme)


def sort_by_group(groups: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in the order of their groups: `rows[order]` is what `grouped_linear` takes, together
    with `offsets`.

    Args:
        groups: the group of each row, integers `[...]`, such as the experts `[tokens, top_k]` that
            a router has chosen: row `t · top_k + j` is then the `j`-th of token `t`, and
            `tokens[order // top_k]` are the rows in order. What is `num_groups` or more is the
            group of none, and comes last.
        num_groups: how many there are.

    Returns:
        `order`, int64 `[M]`, and `offsets`, int32 `[num_groups]`. Rows of a group keep their order.

    >>> sort_by_group(torch.tensor([[2, 0], [0, 2]]), 3)
    (tensor([1, 2, 0, 3]), tensor([2, 2, 4], dtype=torch.int32))
    """
    ordered, order = groups.flatten().sort(stable=True)
    each = torch.arange(num_groups, dtype=ordered.dtype, device=ordered.device)
    return order, torch.searchsorted(ordered, each, right=True, out_int32=True)


def unsort(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Sorted rows in the order that they had before: `unsort(x[order], order)` is `x`."""
    places = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    return rows[places]


def without_rest(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`x` with zeros in the rows of no group."""
    return x.masked_fill(group_of_rows(offsets, x.shape[0])[:, None] == len(offsets), 0)


def float_grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`y = x · weight[e]ᵀ + bias[e]` for the rows of each group, in float; zeros in rows after the
    last group.
    """
    groups = group_of_rows(offsets, x.shape[0])[:, None]
    bias = None if bias is None else bias.to(x.dtype)
    if torch.compiler.is_compiling():  # torch traces grouped_mm in bfloat16 alone
        y = x.new_zeros(x.shape[0], weight.shape[1])
        for group, each in enumerate(weight):
            own = None if bias is None else bias[group]
            y = torch.where(groups == group, torch.nn.functional.linear(x, each, own), y)
        return y
    y = torch.nn.functional.grouped_mm(x, weight.mT, offs=offsets)
    if bias is not None:
        y = y + torch.nn.functional.pad(bias, (0, 0, 0, 1))[groups[:, 0]]
    return y.masked_fill(groups == len(offsets), 0)
