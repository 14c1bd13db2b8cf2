"""The benchmark of recurrent layers: what it counts, and what it refuses to claim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn


@pytest.fixture
def bench(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("bench_lstm")


def _tiny(bench: Any, kind: type[nn.Module], variants: list[Any]) -> list[Any]:
    (case,) = bench.recurrent_cases([bench.Layers(kind, 8, 12, 1, (2,))], 3)
    effort = bench.Effort(rounds=3, seconds=0.01, turn=0)
    grid = bench.measure_grid(
        [case], variants, baseline=bench.BASELINE, effort=effort, show=bench.case_table
    )
    rows: list[Any] = grid[str(bench.Layers(kind, 8, 12, 1, (2,)))]["B=2"]
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


def test_operations_are_those_of_the_products(bench: Any) -> None:
    assert bench.Layers(nn.LSTM, 3, 5, 1, ()).operations(7, 2) == 2 * 7 * 2 * 20 * (3 + 5)
    assert bench.Layers(nn.GRU, 3, 5, 2, ()).operations(7, 2) == 2 * 7 * 2 * 15 * (8 + 10)


@pytest.mark.parametrize("amx", [False, True])
def test_every_aim_names_a_case_that_is_measured(bench: Any, amx: bool) -> None:
    cases = {f"{size}, B={batch}" for size in bench.LAYERS for batch in size.batches}
    aims = bench.aims(amx)
    assert {case for aim in aims for case in aim.cases} <= cases
    measured = {(v.family, v.precision) for v in bench.VARIANTS if v.mode != "compiled"}
    for aim in aims:
        assert (aim.theirs.family, aim.theirs.precision) in measured
        assert (aim.ours.family, aim.ours.precision) in measured
    of_float = [aim for aim in aims if aim.theirs.family == "float"]
    assert all(aim.goal > 1 for aim in of_float)


def test_an_aim_leaves_out_what_is_compiled(bench: Any) -> None:
    aim = bench.aims(amx=False)[0]

    def row(family: str, milliseconds: float, mode: str = "eager") -> Any:
        fields = (aim.cases[0], f"{family} {mode}", family, "fp32", mode, "ok", "")
        return bench.Measurement(*fields, median_ms=milliseconds)

    rows = [row("float", 10.0), row("float", 1.0, "compiled"), row("qnn int8", 2.0)]
    assert aim.judged(rows) == ("5.00x", "met")


def test_quantised_peers_run_where_they_are_installed(bench: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    peers = [v for v in bench.VARIANTS if v.family.startswith("ONNX") or v.name == bench.BASELINE]
    rows = _tiny(bench, nn.LSTM, peers)
    # Without VNNI its products of bytes saturate, and the harness tells so in the place of a time.
    ran = [row for row in rows if not (row.note.startswith("SQNR") and "int8" in row.variant)]
    assert len(rows) == 3
    assert {row.variant for row in ran} >= {bench.BASELINE}
    assert all(row.status == "ok" for row in ran)
