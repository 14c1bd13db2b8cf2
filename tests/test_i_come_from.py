"""The tables of docs/howto/i_come_from.md: every right side is called."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "howto" / "i_come_from.md"
CALL = re.compile(r"`([^`]*\bqnn\.[^`]*)`")


def rows() -> list[tuple[str, str, str]]:
    """Of each row the section, both sides."""
    section, found = "", []
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and section and cells[1] != "qnn":
            found.append((section, *cells))
    return found  # type: ignore[return-value]


EXPRESSIONS = sorted({call for *_, right in rows() for call in CALL.findall(right)})
NEIGHBOURS = ("accelerate", "lightning", "peft")
CONFIG = re.compile(r"qnn\.\w*Config\b")


def model(text: str) -> nn.Module:
    """One that the call has something to do for."""
    torch.manual_seed(0)
    if "qnn.fuse(" in text:
        return nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4)).eval()
    if "qnn.smooth(" in text:
        norm = nn.LayerNorm(128)
        norm.weight.data[:3] = 50
        return nn.Sequential(norm, nn.Linear(128, 128)).eval()
    if "nn.LSTM" in text:
        return nn.ModuleDict(
            {"lstm": nn.LSTM(8, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 8)}
        )
    net = nn.Sequential(nn.Linear(128, 128), nn.ReLU())
    net.add_module("lm_head", nn.Linear(128, 16))
    return net.eval()


def prepared() -> nn.Module:
    return qnn.calibrate(qnn.prepare(model("")), [torch.randn(4, 128)])


def given(text: str) -> dict[str, Any]:
    """What the page's names stand for."""
    net = model(text)
    x = torch.randn(2, 1, 9) if "qnn.fuse(" in text else torch.randn(4, 128)
    found: dict[str, Any] = {"qnn": qnn, "nn": nn, "torch": torch, "model": net, "x": x}
    found |= {"batches": [x], "evaluate": lambda net: 1.0}
    found |= {"a": x, "b": x + 0.1, "state": model("").state_dict()}
    if "small" in text:
        found["small"] = qnn.convert(net, "int8")
    if "prepared" in text:
        found["prepared"] = prepared()
    if "program" in text:
        found["program"] = torch.export.export(net, (x,))
    if "get_peft_model" in text:
        peft: Any = importlib.import_module("peft")
        found["config"] = peft.LoraConfig(r=2, target_modules=["0"])
    return found


@parameterized.expand([(each,) for each in EXPRESSIONS])
def test_right_sides(text: str) -> None:
    for name in NEIGHBOURS:
        if f"integrations.{name}" in text or (name == "peft" and "get_peft_model" in text):
            pytest.importorskip(name, reason=f"needs {name}")
            importlib.import_module(f"qnn.integrations.{name}")
    if CONFIG.search(text):
        pytest.importorskip("transformers", reason="needs the extra 'examples'")
    if "cls, folder" in text:  # tests of load_pretrained call it
        assert callable(qnn.load_pretrained)
        return
    known = given(text)
    named = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert named <= {*known, "name", "module"}, text  # those of a lambda
    assert eval(text, known) is not None  # noqa: S307  # of a page in this repository


def test_every_row_has_an_answer() -> None:
    found = rows()
    sections = {section for section, *_ in found}
    peers = ("torchao", "bitsandbytes", "quanto", "torch.ao", "NNCF", "TransformerEngine")
    assert sections == set(peers)
    assert len(found) > 70
    for section, left, right in found:
        answered = CALL.search(right) or right.startswith("none")
        assert answered, (section, left, right)
    schemes = re.findall(r'"([a-z0-9_]+)"', " ".join(EXPRESSIONS))
    assert {each for each in schemes if each.startswith(("int", "fp8", "mx", "nv"))} <= set(
        qnn.SCHEMES
    )


def test_left_sides_of_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="needs the extra 'bench'")
    lefts = " ".join(left for section, left, _ in rows() if section == "torchao")
    names = re.findall(r"\b((?:Int|Float8|Fqn)\w*Config)\(", lefts)
    assert len(names) >= 8
    assert not [each for each in names if not hasattr(torchao, each)]
