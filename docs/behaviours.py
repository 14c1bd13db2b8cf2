"""What graph mode does, point by point, with the tests that hold it to that.

`python docs/behaviours.py` writes `docs/reference/pt2e_behaviours.md` from `behaviours.txt` and the
names of the tests: `test_b24_b39_…` is one of points 24 and 39.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "reference" / "pt2e_behaviours.md"
TESTS = DOCS.parent / "tests"
VERDICTS = ("holds", "differs", "not taken")
_NAME = re.compile(r"test((?:_b\d+)+)(?:_|$)")
_INTRO = (
    "# What graph mode does, point by point\n\n"
    "The list follows what users of `prepare_pt2e` and `convert_pt2e` rely on elsewhere, as the "
    "tests of torchao and of quantizers for it show. *Holds*: a test here says so. *Differs*: the "
    "point says what is done elsewhere, or more than is done here, and then what is done here and "
    "why; a test holds that too. The names are those of tests in `tests/`; `python "
    "docs/behaviours.py` writes this page from them.\n"
)


@dataclass(frozen=True)
class Point:
    """One point: `verdict` is one of `VERDICTS`, and `why` is empty where it holds."""

    section: str
    number: int
    text: str
    verdict: str
    why: str


def points() -> Iterator[Point]:
    section = ""
    for line in (DOCS / "behaviours.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line and not line.startswith("#"):
            number, _, rest = line.partition(" ")
            text, _, verdict = rest.partition(" | ")
            kind, _, why = verdict.partition(": ")
            yield Point(section, int(number), text, kind or "holds", why)


def tests() -> dict[int, list[str]]:
    """The tests of each point: `file::name`, in order."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "def test_b" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (match := _NAME.match(node.name)):
                for number in map(int, re.findall(r"_b(\d+)", match[1])):
                    found.setdefault(number, []).append(f"{path.stem}::{node.name}")
    return {number: sorted(names) for number, names in found.items()}


def page() -> str:
    held, parts, section = tests(), [_INTRO], None
    for point in points():
        if point.section != section:
            section = point.section
            parts.append(f"\n## {section}\n\n| | what | verdict | tests |\n|---|---|---|---|\n")
        verdict = f"{point.verdict}: {point.why}" if point.why else point.verdict
        names = "<br>".join(f"`{name}`" for name in held.get(point.number, ()))
        parts.append(f"| {point.number} | {point.text} | {verdict} | {names} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
