"""The GPU benchmark: that its small mode runs, and that it claims nothing it has not measured."""

from __future__ import annotations

import contextlib
import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qnn.kernels import SCHEMES
from qnn.kernels.cuda import backends

from .common import forked_script

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
TRAINED = [scheme.name for scheme in SCHEMES.values() if scheme.trainable]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_fp8")


def run(*arguments: str, cwd: Path) -> str:
    """What the benchmark prints on a machine without a GPU."""
    return forked_script(ROOT / "benchmarks" / "bench_fp8.py", *arguments, cwd=cwd)


def test_tiny_run(tmp_path: Path) -> None:
    text = run("--tiny", "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert "emulated" in text
    assert not re.search(r"\bmet\b|missed", text)
    assert "Aims" not in (tmp_path / "out" / "bench_fp8.md").read_text()
    with (tmp_path / "out" / "bench_fp8.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["gpu"] for row in rows} == {"none"}
    assert not [row["note"] for row in rows if row["status"] == "failed"]
    timed = {(row["section"], row["family"], row["mode"]) for row in rows if row["median_ms"]}
    for scheme in TRAINED:
        for mode in ("eager", "compiled", "products"):
            assert ("Training: one linear layer", f"qnn {scheme}", mode) in timed
        assert ("Training: a Llama-style block", f"qnn {scheme}", "eager") in timed
    for scheme in ("fp8_weight", "nvfp4_weight"):
        assert ("Inference: weights from memory", f"qnn {scheme}", "eager") in timed
    for row in rows:  # what has no time has no ratio, and says why
        assert bool(row["median_ms"]) == bool(row["speedup"]) == (row["status"] == "ok")
        assert row["median_ms"] or row["note"]


def test_nothing_is_written_without_being_asked(tmp_path: Path) -> None:
    assert "nothing written" in run("--budget", "0", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_red_self_test_leaves_no_time(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = backends.Entry(("*",), (8, 0), None, "triton", "decoded")
    bad = backends.Entry(("*",), (8, 9), None, "scaled_mm", "tensor cores")
    passed = {"fp8_matmul": ((bad, "ArithmeticError: 3 of 4 wrong"),)}
    monkeypatch.setattr(
        backends,
        "state",
        lambda op, device: SimpleNamespace(entry=good, passed_over=passed.get(op, ())),
    )
    gpu = torch.device("cuda", 0)
    assert bench.served(bench.training_ops("mxfp8"), gpu) == "triton: decoded"
    with pytest.raises(RuntimeError, match=r"fp8_matmul, scaled_mm: ArithmeticError: 3 of 4 wrong"):
        bench.served(bench.training_ops("fp8"), gpu)


@pytest.mark.parametrize("scheme", TRAINED)
def test_the_ops_of_a_step_are_registered(bench: Any, scheme: str) -> None:
    assert all(op in bench.OPS for op in bench.training_ops(scheme))


@pytest.mark.parametrize("fault", ["a gradient of zeros", "a scale of 2", "NaN", "raises"])
def test_a_wrong_variant_leaves_no_time(bench: Any, fault: str) -> None:
    task = bench.training_task(bench.Layer(16, 64, 64), torch.device("cpu"), "aot_eager")

    def build(task: Any, dtype: torch.dtype) -> Any:
        if fault == "raises":
            raise ZeroDivisionError("of all things")
        y, dx, dw = (t.clone() for t in task.reference)
        changed = {"a gradient of zeros": 0.0, "a scale of 2": 2.0, "NaN": torch.nan}[fault]
        return bench.Run(lambda: [y, dx, dw * changed])

    variant = bench.Variant("qnn nvfp4", "bf16", "eager", build)
    found, row = bench.prepared(variant, task)
    assert found is None
    assert row.status == "failed"
    assert row.note.startswith("ZeroDivisionError" if fault == "raises" else "SQNR")


def test_ratios_are_to_the_same_mode(bench: Any) -> None:
    def row(family: str, mode: str, milliseconds: float | None) -> Any:
        status = "failed" if milliseconds is None else "ok"
        return bench.Row("case", "", family, "bf16", mode, status, "", median_ms=milliseconds)

    times = {
        ("nn.Linear", "eager"): 8.0,
        ("nn.Linear", "compiled"): 6.0,
        ("torchao rowwise", "compiled"): 4.0,
        ("qnn fp8", "eager"): 4.0,
        ("qnn fp8", "compiled"): 3.0,
        ("qnn nvfp4", "compiled"): None,
    }
    found = bench.with_ratios([row(*key, value) for key, value in times.items()])
    ratios = {(r.family, r.mode): (r.speedup, r.over_torchao) for r in found}
    assert ratios["qnn fp8", "eager"] == (2.0, None)
    assert ratios["qnn fp8", "compiled"] == (2.0, 4.0 / 3.0)
    assert ratios["qnn nvfp4", "compiled"] == (None, None)
    assert ratios["nn.Linear", "compiled"] == (1.0, None)


def test_aims_are_judged_from_the_rows(bench: Any) -> None:
    aim = bench.Aim("two", "qnn fp8", "compiled", 1.5, ("a", "b"))

    def row(case: str, speedup: float | None, mode: str = "compiled") -> Any:
        status = "failed" if speedup is None else "ok"
        return bench.Row(case, "", "qnn fp8", "bf16", mode, status, "red", speedup=speedup)

    assert aim.judged([]) == ("-", "not measured")
    assert aim.judged([row("a", 9.0, "eager"), row("c", 9.0)]) == ("-", "not measured")
    assert aim.judged([row("a", 1.5), row("b", 1.7)]) == ("1.50x", "met")
    assert aim.judged([row("a", 1.4), row("b", 1.7)]) == ("1.40x", "**missed**")
    assert aim.judged([row("a", 1.6)]) == ("1.60x", "met, 1 of 2 cases not measured")
    assert aim.judged([row("a", 1.6), row("b", None)]) == ("-", "not judged: b: failed: red")


def test_every_aim_names_cases_that_are_measured(bench: Any) -> None:
    cases = {str(case): case for case in bench._cases()}
    assert len(cases) == len({(case.section, case) for case in bench._cases()})
    for aim in bench.AIMS:
        assert set(aim.cases) <= set(cases)
        assert aim.mode != "compiled" or all(cases[name].compiled for name in aim.cases)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_script() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    done = subprocess.run(["bash", str(SCRIPT), "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no step is called 'nothing'" in done.stderr
    environment = {**os.environ, "SECONDS_IN_ALL": "0", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(SCRIPT), "machine"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "nvidia-smi (not begun) doctor (not begun)" in done.stdout


class FakeGpu:
    """A host and a device, each with a clock of its own: kernels queue up behind one another."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.host, self.device))
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def timer(self, timing: Any, patch: pytest.MonkeyPatch) -> Any:
        """The timer of `cuda_timing.py`, on this device."""
        patch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.host))
        patch.setattr(torch.cuda, "synchronize", self.synchronize)
        patch.setattr(torch.cuda, "Event", self.event)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(0.0, cycles / 2e9))
        timer = object.__new__(timing._Timer)
        timer._device = None
        timer._flush = SimpleNamespace(zero_=lambda: self.launch(5e-6, 5e-5))
        return timer


@pytest.mark.parametrize(("launching", "running"), [(1e-5, 2e-4), (3e-4, 1e-4), (2e-3, 1e-6)])
def test_what_is_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, launching: float, running: float
) -> None:
    gpu = FakeGpu()
    timer = gpu.timer(sys.modules["cuda_timing"], monkeypatch)

    def call() -> None:
        for _ in range(3):
            gpu.launch(launching, running)

    samples = timer.turn(call, 4)
    longer = max(launching, running)
    assert samples.wall == pytest.approx([launching + 2 * longer + running] * 4)
    assert samples.host == pytest.approx([3 * launching] * 4)
    assert samples.device == pytest.approx([3 * running] * 4)
