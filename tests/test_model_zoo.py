"""The table of stock models: each step is run, and what fails or is refused is a row."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture
def zoo(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("model_zoo")


class Raises(nn.Linear):
    """Runs alone, and in no graph: nor does its float form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(16, 16), Raises(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.other(self.inner(x))
        return result


def test_rows(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        "raw_parameters": zoo.MODELS["raw_parameters"],
        "broken": ("torch.nn", lambda: (Broken(), (torch.randn(3, 16),))),
        "float": ("torch.nn", lambda: (nn.Sequential(nn.ReLU()), (torch.randn(3, 16),))),
        "absent": ("torch.nn", lambda: importlib.import_module("no_such_library")),
    }
    for name, each in models.items():
        monkeypatch.setitem(zoo.MODELS, name, each)
    threads = torch.get_num_threads()
    rows = {name: zoo.row(name, "int8", "eager") for name in models}
    torch.set_num_threads(threads)
    steps = {name: (r["fullgraph"], r["export"], r["reload"]) for name, r in rows.items()}
    assert steps["raw_parameters"] == ("yes", "yes", "yes")
    assert rows["raw_parameters"]["layers"] == "1"
    assert float(rows["raw_parameters"]["sqnr_dB"]) > 30
    assert steps["broken"][0] == "no, nor float"
    assert steps["broken"][2] == "yes"
    assert "nothing to convert" in rows["float"]["remark"]
    assert rows["absent"]["remark"].startswith("not installed")
    page = zoo.page(list(rows.values()), "eager", "here")
    assert "4 rows: 2 converted, 1 of them" in page
    assert "- **absent**: not installed" in page
