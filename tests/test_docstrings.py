"""Every example in a docstring of the package runs, whichever module it stands in."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import qnn

ROOT = Path(__file__).resolve().parent.parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> list[str]:
    """The modules with '>>>' in their source, by import name."""
    names = []
    for folder, package in (
        ("qnn", "qnn"), ("functional", "qnn.functional"), ("kernels", "qnn.kernels"),
    ):  # fmt: skip
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text():
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join((package, *parts)).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", modules())
def test_module(name: str) -> None:
    given = {"torch": torch, "nn": torch.nn, "qnn": qnn}
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=FLAGS, extraglobs=given)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples; see above"
    assert result.attempted > 0, "'>>>' stands where doctest does not find it"


def test_the_verbs_have_examples() -> None:
    assert len(modules()) >= 15
    for verb in ("convert", "prepare", "calibrate", "summary"):
        assert f"qnn.verbs.{verb}" in modules()
    for layer in ("linear.quantized", "linear.training", "recurrent.qlstm"):
        assert f"qnn.nn.{layer}" in modules()
