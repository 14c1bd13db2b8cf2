"""The page of what graph mode does: complete, true of the tests that it names, and up to date."""

from __future__ import annotations

from .test_support import docs_module

behaviours = docs_module("behaviours")
POINTS = {point.number: point for point in behaviours.points()}


def test_every_point_has_its_verdict_and_its_test() -> None:
    assert list(POINTS) == list(range(1, 198))
    held = behaviours.tests()
    assert held.keys() <= POINTS.keys()
    for number, point in POINTS.items():
        assert point.verdict in behaviours.VERDICTS, number
        assert (number in held) == (point.verdict != "not taken"), number
        assert bool(point.why) == (point.verdict != "holds"), number


def test_the_page_is_up_to_date() -> None:
    written = behaviours.PAGE.read_text(encoding="utf-8")
    assert written == behaviours.page(), "run: python docs/behaviours.py"
