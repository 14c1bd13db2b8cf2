"""A line on stderr that says how far a verb is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


def check_progress(who: str, progress: bool | str) -> None:
    """Raise a ValueError unless `progress` is True, False or `"always"`."""
    if progress not in (True, False, "always"):
        raise ValueError(f"{who}: progress must be True, False or 'always', got {progress!r}.")


class Meter:
    """Counts what is done, and shows it ten times a second: `qnn.calibrate: batch 3/8, 1.2 s`.

    Args:
        who, what: the verb, and what it counts.
        total: how many there will be, if that is known.
        progress: True if stderr is a terminal, `"always"` in any case, False never.
        after: seconds before anything is shown.
    """

    def __init__(
        self, who: str, what: str, total: int | None, progress: bool | str, after: float = 0.0
    ) -> None:
        self.who, self.what, self.done = who, what, 0
        self.total = "" if total is None else f"/{total}"
        self.shown = progress == "always" or (bool(progress) and sys.stderr.isatty())
        self.after = 0.0 if progress == "always" else after

    def each(self, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """The items; each is counted when the next is asked for."""
        start = last = time.monotonic()
        for item in items:
            yield item
            self.done += 1
            now = time.monotonic()
            if self.shown and now - last > 0.1 and now - start >= self.after:
                last = now
                self._show(now - start)
        if self.shown and self.done and (last > start or not self.after):
            self._show(time.monotonic() - start)
            sys.stderr.write("\n")

    def _show(self, seconds: float) -> None:
        sys.stderr.write(f"\r{self.who}: {self.what} {self.done}{self.total}, {seconds:.1f} s")
        sys.stderr.flush()
