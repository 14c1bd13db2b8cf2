"""Tables as text, and charts as files: what the results of the verbs print and plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def aligned(table: Iterable[Sequence[str]]) -> list[str]:
    """Lines of text, their cells in columns."""
    rows = list(table)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def chart(who: str, bars: int) -> tuple[Any, Any]:
    """A figure of matplotlib with room for horizontal bars, and its axes.

    Raises:
        ImportError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{who} needs matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(8, 1 + 0.22 * bars), layout="constrained")
    return figure, figure.add_subplot()
