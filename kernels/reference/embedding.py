"""What a lookup in a quantised table means: the rows that are asked for are decoded, and no others.

An id that is not a row of the table is an `IndexError` on the CPU, before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qnn.kernels.formats.base import Format

Reference = Callable[..., torch.Tensor]
MODES = ("sum", "mean", "max")


def looked_up(
    form: Format, ids: torch.Tensor, parts: Sequence[torch.Tensor], compute: torch.dtype
) -> torch.Tensor:
    """The floats `[count, K]` of the rows `ids`, `[count]`, of a table."""
    return form.dequantize(
        [
            _rows(stored, ids) if part.axes.startswith("r ") else stored
            for part, stored in zip(form.parts, parts, strict=True)
        ],
        compute,
    )


def _rows(stored: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if stored.is_floating_point() and stored.itemsize == 1:  # which few backends select from
        return stored.view(torch.uint8).index_select(0, ids).view(stored.dtype)
    return stored.index_select(0, ids)


def embedding_reference(form: Format) -> Reference:
    def reference(
        ids: torch.Tensor, *args: Any, compute: torch.dtype = torch.float32
    ) -> torch.Tensor:
        *parts, dtype = args
        rows = looked_up(form, ids.reshape(-1), parts, compute)
        y: torch.Tensor = rows.view(*ids.shape, rows.shape[-1])
        return y.to(dtype if compute == torch.float32 else compute)

    return reference


def bag_reference(form: Format) -> Reference:
    """`y[b]` is the sum, mean or largest of the rows of bag b, each times its weight: the rows of
    the ids from `offsets[b]` to before `offsets[b + 1]`, but for those that are `padding`. A bag
    without rows is zeros.
    """

    def reference(
        ids: torch.Tensor,
        offsets: torch.Tensor,
        *args: Any,
        compute: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        *parts, weights, mode, padding, dtype = args
        rows = looked_up(form, ids, parts, compute)
        if weights is not None:
            rows = rows * weights.to(compute)[:, None]
        bags = offsets.shape[0] - 1
        places = torch.arange(ids.shape[0], dtype=offsets.dtype, device=ids.device)
        # The last of those that begin here or before; what is after the end has one of its own.
        bag = torch.searchsorted(offsets, places, right=True) - 1
        counts = ids != padding
        number = torch.zeros(bags + 1, dtype=compute, device=ids.device)
        number = number.index_add(0, bag, counts.to(compute))[:bags, None]
        if mode == "max":
            rows = torch.where(counts[:, None], rows, -torch.inf)
            y = rows.new_full((bags + 1, rows.shape[-1]), -torch.inf)
            y = y.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax")
            y = torch.where(number > 0, y[:bags], 0)
        else:
            rows = torch.where(counts[:, None], rows, 0)
            y = rows.new_zeros(bags + 1, rows.shape[-1]).index_add(0, bag, rows)[:bags]
            y = y / number.clamp_min(1) if mode == "mean" else y
        return y.to(dtype if compute == torch.float32 else compute)

    return reference


def checked(name: str, reference: Reference, *, bags: bool = False) -> Reference:
    """`reference` as a kernel of the CPU, in the words of the C++ library where an id is not a row
    of the table, or the offsets are no bounds of bags.
    """

    def kernel(ids: torch.Tensor, *args: Any) -> torch.Tensor:
        table = args[1] if bags else args[0]
        bad = (ids < 0) | (ids >= table.shape[0])
        if bool(bad.any()):
            at = int(bad.flatten().nonzero()[0])
            raise IndexError(
                f"qnn::{name}: the id {int(ids.flatten()[at])}, at position {at}, is not in a "
                f"table of {table.shape[0]} rows."
            )
        if bags and (why := why_not_bags(args[0], ids.shape[0])) is not None:
            raise ValueError(f"qnn::{name}: {why}.")
        return reference(ids, *args)

    return kernel


def why_not_bags(offsets: torch.Tensor, count: int) -> str | None:
    """Why `offsets` do not cut so many ids into bags, or None."""
    steps = bool((offsets[1:] >= offsets[:-1]).all())
    if len(offsets) and steps and int(offsets[0]) == 0 and int(offsets[-1]) <= count:
        return None
    return f"offsets must begin with 0, not fall, and end at {count}, the number of ids, or before"
