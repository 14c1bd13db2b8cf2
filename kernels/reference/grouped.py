"""What the grouped ops mean: the op of one layer on the rows of each group, with that group's
weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

# The values that an error shows.
_SHOWN = 8


def spans(offsets: torch.Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, each with these; a ValueError for offsets that are none."""
    begin, ends = 0, offsets.tolist()
    for end in ends:
        if not begin <= end <= rows:
            shown = ", ".join(map(str, ends[:_SHOWN])) + (", ..." if len(ends) > _SHOWN else "")
            raise ValueError(
                f"offsets must be the end of each group, from 0 to at most {rows} and never less "
                f"than the one before, got [{shown}]."
            )
        begin = end
    begin = 0
    for group, end in enumerate(ends):
        if end > begin:
            yield group, slice(begin, end)
        begin = end


def by_group(call: Callable[..., torch.Tensor], parts: int, *, bias: bool) -> Callable[..., Any]:
    """`call(x, *weight, *grid[, bias])` on each group's rows of `x`, as a function `(x, *weights,
    offsets, *grid[, biases])` of stacks `[E, …]` of `parts` tensors. Rows after the last group give
    zeros.
    """

    def run(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        weight, (offsets, *rest) = args[:parts], args[parts:]
        grid, biases = (rest[:-1], rest[-1:]) if bias else (rest, [])

        def of(group: int, rows: slice) -> torch.Tensor:
            mine = [None if each is None else each[group] for each in biases]
            return call(x[rows], *(part[group] for part in weight), *grid, *mine, **options)

        y: torch.Tensor | None = None
        for group, rows in spans(offsets, x.shape[0]):
            some = of(group, rows)
            y = some.new_zeros(x.shape[0], some.shape[-1]) if y is None else y
            y[rows] = some
        if y is None:  # no rows, or none of any group
            none = of(0, slice(0, 0))
            y = none.new_zeros(x.shape[0], none.shape[-1])
        return y

    return run
