"""Mixed schemes: which layer gets which, for a model that fits into so many bytes."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from qnn.verbs.inventory import size


@dataclass(frozen=True)
class Row:
    """What one layer, or a group of layers, does when it alone is quantised.

    Attributes:
        name: of the layer or the group.
        scheme: its scheme, several joined by `+`.
        sqnr: SQNR of the model's output against that of the float model, in dB; None without
            batches.
        score: what `eval_fn`, or `metric` on average, has given; None without either.
        drop: the float model's score minus this one's.
        bytes_before, bytes_after: of its parameters and buffers, in float and quantised.
        layers: the scheme of each layer, by name: an argument for `qnn.convert`.
    """

    name: str
    scheme: str
    sqnr: float | None
    score: float | None
    drop: float | None
    bytes_before: int
    bytes_after: int
    layers: Mapping[str, str]

    @property
    def error(self) -> float:
        """What rows are ranked by: `drop`, or the noise in the output relative to the signal,
        `10^(−sqnr / 10)`. NaN counts as infinite.
        """
        error = self.drop if self.drop is not None else 10 ** (-cast(float, self.sqnr) / 10)
        return math.inf if math.isnan(error) else error

    @property
    def saved(self) -> int:
        return self.bytes_before - self.bytes_after

    @property
    def error_per_byte(self) -> float:
        """Error for each byte saved; infinite where none is."""
        return self.error / self.saved if self.saved > 0 else math.inf


def choose(rows: Iterable[Row], bytes_before: int, budget_bytes: int) -> dict[str, str | None]:
    """As `Sensitivity.choose` says."""
    table = list(rows)
    who = "qnn.Sensitivity.choose"
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int | float):
        raise TypeError(f"{who}: budget_bytes must be a number, got {budget_bytes!r}.")
    options: dict[str, list[Row]] = {}
    for row in table:
        if math.isfinite(row.error):
            options.setdefault(row.name, []).append(row)
    chosen: dict[str, Row] = {}
    total = bytes_before

    def step(row: Row) -> tuple[float, int]:
        """Additional error, and bytes saved, from what is chosen now to `row`."""
        now = chosen.get(row.name)
        return row.error - (now.error if now else 0.0), row.saved - (now.saved if now else 0)

    done: list[tuple[float, int, Row, Row | None]] = []
    while total > budget_bytes:
        steps = [(*step(row), row) for rows in options.values() for row in rows]
        steps = [(error, saved, row) for error, saved, row in steps if saved > 0]
        if not steps:
            raise ValueError(
                f"{who}: budget_bytes={budget_bytes} ({size(budget_bytes)}) cannot be reached: the "
                f"least with the schemes that were measured is {total} ({size(total)})."
            )
        error, saved, row = min(steps, key=lambda each: each[0] / each[1])
        done.append((error, saved, row, chosen.get(row.name)))
        chosen[row.name] = row
        total -= saved
    for error, saved, row, before in sorted(done, key=lambda each: -each[0]):
        if error > 0 and total + saved <= budget_bytes and chosen.get(row.name) is row:
            total += saved
            if before is None:
                del chosen[row.name]
            else:
                chosen[row.name] = before
    schemes = {layer: None for row in table for layer in row.layers} | {
        layer: scheme for row in chosen.values() for layer, scheme in row.layers.items()
    }
    return {glob.escape(name): scheme for name, scheme in schemes.items()}
