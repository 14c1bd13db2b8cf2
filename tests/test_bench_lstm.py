"""The benchmark of recurrent layers: what it counts, and what it refuses to claim."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CASE = "LSTM, 256->512, 1 layer"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_lstm")


def _tiny(bench: Any, kind: type[nn.Module], variants: list[Any]) -> list[Any]:
    size = bench.Layers(kind, 8, 12, 1, (2,))
    effort = bench.Effort(rounds=3, seconds=0.01, turn=0)
    ((_, cases),) = bench.measure_all([size], 3, variants, effort, False).items()
    rows: list[Any] = cases["B=2"]
    return rows


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_every_variant_of_torch_and_qnn_is_checked_and_timed(
    bench: Any, kind: type[nn.Module]
) -> None:
    ours = [v for v in bench.VARIANTS if v.family.startswith(("float", "qnn", "torch.ao"))]
    rows = _tiny(bench, kind, [v for v in ours if v.mode != "compiled"])
    assert not [row for row in rows if row.status == "failed"]
    timed = {row.family for row in rows if row.median_ms is not None and row.sqnr_db > 20}
    assert {"float", "qnn int8", "qnn int8_static", "qnn int8_weight"} <= timed


def test_a_wrong_output_gets_no_time(bench: Any) -> None:
    right = next(v for v in bench.VARIANTS if v.name == bench.BASELINE)

    def build(task: Any, dtype: torch.dtype) -> Any:
        run = right.build(task, dtype)
        return replace(run, output=lambda result: run.output(result).flip(0))

    wrong = replace(right, family="qnn int8", build=build)
    row = _tiny(bench, nn.LSTM, [right, wrong])[1]
    assert (row.status, row.median_ms, row.speedup) == ("failed", None, None)
    assert "SQNR" in bench.size_table({"B=2": [row]}) + bench.without_time([row])


def test_operations_are_those_of_the_products(bench: Any) -> None:
    assert bench.Layers(nn.LSTM, 3, 5, 1, ()).operations(7, 2) == 2 * 7 * 2 * 20 * (3 + 5)
    assert bench.Layers(nn.GRU, 3, 5, 2, ()).operations(7, 2) == 2 * 7 * 2 * 15 * (8 + 10)


@pytest.mark.parametrize(
    ("load", "verdict"), [(0.0, "**not reached**"), (1.0, "not judged"), (None, "**not reached**")]
)
def test_aims_are_judged_by_the_slower_scheme_and_on_a_quiet_machine(
    bench: Any, load: float | None, verdict: str
) -> None:
    def row(family: str, milliseconds: float, mode: str = "eager") -> Any:
        name = f"{family} fp32 {mode}"
        timed = bench.Measurement(CASE, name, family, "fp32", mode, "ok", "")
        return replace(timed, median_ms=milliseconds, other_load=load)

    rows = [
        row("float", 10.0),
        row("float", 1.0, "compiled"),
        row("qnn int8", 1.0),
        row("qnn int8_static", 5.0),
    ]
    text = " ".join(bench.ratios({CASE: {"B=16": rows}}, amx=False).split())
    assert "| 10.00x | 2.00x | 2.5x" in text
    assert verdict in text


def test_quantised_peers_run_where_they_are_installed(bench: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    peers = [v for v in bench.VARIANTS if v.family.startswith("ONNX") or v.name == bench.BASELINE]
    rows = _tiny(bench, nn.LSTM, peers)
    assert [row.status for row in rows] == ["ok"] * 3
