"""The GPU benchmark: that its small mode runs, and that it claims nothing it has not measured."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qnn.kernels import OPS, SCHEMES
from qnn.kernels.cuda import backends

from .common import BENCHMARKS, forked_script

SCRIPT = BENCHMARKS / "gpu.sh"
TRAINED = [scheme.name for scheme in SCHEMES.values() if scheme.trainable]
CPU = torch.device("cpu")


@pytest.fixture
def bench(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("bench_fp8")


@pytest.fixture
def variants(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("fp8_variants")


def run(*arguments: str, cwd: Path) -> str:
    """What the benchmark prints on a machine without a GPU."""
    return forked_script(BENCHMARKS / "bench_fp8.py", *arguments, cwd=cwd)


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


def test_a_red_self_test_leaves_no_time(variants: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = backends.Entry(("*",), (8, 0), None, "triton", "decoded")
    bad = backends.Entry(("*",), (8, 9), None, "scaled_mm", "tensor cores")
    passed = {"fp8_matmul": ((bad, "ArithmeticError: 3 of 4 wrong"),)}
    monkeypatch.setattr(
        backends,
        "state",
        lambda op, device: SimpleNamespace(entry=good, passed_over=passed.get(op, ())),
    )
    gpu = torch.device("cuda", 0)
    assert variants.served(variants.training_ops("mxfp8"), gpu) == "triton: decoded"
    with pytest.raises(RuntimeError, match=r"fp8_matmul, scaled_mm: ArithmeticError: 3 of 4 wrong"):
        variants.served(variants.training_ops("fp8"), gpu)


@pytest.mark.parametrize("scheme", TRAINED)
def test_the_ops_that_must_be_right_are_those_of_a_step(variants: Any, scheme: str) -> None:
    """What a compiled step calls, forward and backward."""
    called: set[str] = set()

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.update(re.findall(r"qnn\.(\w+?)(?:_no_grad)?\.default", graph.code))
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    size = variants.Step(16, 64, 64)
    task = variants.training_case(size, CPU, aot_autograd(fw_compiler=note)).task
    variants._qnn(scheme, "compiled", task, torch.bfloat16).call()
    assert called & {*OPS}
    assert called & {*OPS} <= {*variants.training_ops(scheme)}


@pytest.mark.parametrize("fault", ["none", "a gradient of zeros", "a scale of 2", "NaN"])
def test_a_wrong_gradient_leaves_no_time(
    bench: Any, variants: Any, benchmark: Callable[[str], Any], fault: str
) -> None:
    case = variants.training_case(variants.Step(16, 64, 64), CPU, "aot_eager")

    def build(task: Any, dtype: torch.dtype) -> Any:
        y, dx, dw = (t.clone() for t in case.reference)
        factors = {"none": 1.0, "a gradient of zeros": 0.0, "a scale of 2": 2.0, "NaN": torch.nan}
        return harness.Run(lambda: [y, dx, dw * factors[fault]], output=list)

    harness = benchmark("harness")
    variant = harness.Variant("qnn nvfp4", "bf16", "eager", build)
    found, row = harness.prepared(case, variant)
    assert row.status == ("ok" if fault == "none" else "failed")
    assert (found is None) == (fault != "none")
    assert row.note == "" or row.note.startswith("SQNR")


def test_ratios_are_to_the_same_mode(bench: Any, benchmark: Callable[[str], Any]) -> None:
    kind, size = benchmark("harness").GpuMeasurement, bench.Decode(2, 8, 8)

    def row(family: str, mode: str, milliseconds: float | None) -> Any:
        times = {} if milliseconds is None else {"device_ms": milliseconds / 2}
        fields = {"family": family, "mode": mode, "median_ms": milliseconds, **times}
        return kind("case", "", precision="bf16", status="", note="", **fields)

    times = {
        ("nn.Linear", "eager"): 8.0,
        ("nn.Linear", "compiled"): 6.0,
        ("torchao rowwise", "compiled"): 4.0,
        ("qnn fp8", "eager"): 4.0,
        ("qnn fp8", "compiled"): 3.0,
        ("qnn nvfp4", "compiled"): None,
    }
    rows = [row(*key, value) for key, value in times.items()]
    found = {(r.family, r.mode): r for r in bench.with_ratios(rows, size, {"qnn fp8": 6e-3})}
    ratios = {key: (r.device_speedup, r.over_torchao) for key, r in found.items()}
    assert ratios["qnn fp8", "eager"] == (2.0, None)
    assert ratios["qnn fp8", "compiled"] == (2.0, 4.0 / 3.0)
    assert ratios["qnn nvfp4", "compiled"] == (None, None)
    assert ratios["nn.Linear", "compiled"] == (1.0, None)
    compiled = found["qnn fp8", "compiled"]
    assert (compiled.tokens_s, compiled.gb_s) == pytest.approx((2 / 3e-3, 6e-3 / 1.5e-3))
    assert compiled.device_over_torchao == 4.0 / 3.0


def test_the_page_of_a_gpu(bench: Any, benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    gpu = benchmark("machine").Gpu("H200", "9.0", 132, 140.0, 50.0, "12.8", "570", "3.6", "none")
    size = bench.AIMED

    def row(family: str, mode: str, milliseconds: float | None) -> Any:
        status = "failed" if milliseconds is None else "ok"
        times = {} if milliseconds is None else {"device_ms": milliseconds, "sm_mhz": 1980}
        name = f"{family} bf16 {mode}"
        fields = (f"{size.section}, {size}", name, family, "bf16", mode, status, "red")
        return benchmark("harness").GpuMeasurement(*fields, median_ms=milliseconds, **times)

    rows = [row("nn.Linear", "compiled", 8.0), row("nn.Linear", "products", 7.0)]
    rows += [row("qnn fp8", "compiled", 5.0), row("qnn fp8", "products", 3.5)]
    rows += [row("qnn fp8_tensor", "compiled", 6.0), row("qnn fp8_block", "compiled", None)]
    done = {size: bench.with_ratios(rows, size, {})}
    bench.save_all(tmp_path, done, [bench.Decode(1, 8, 8)], gpu)
    page = re.sub(" +", " ", (tmp_path / "bench_fp8.md").read_text())
    for text in (
        "H200, compute capability 9.0, 132 multiprocessors",
        "clock 1980 to 1980 MHz",
        "| row-wise float8 | qnn fp8 compiled | nn.Linear | 1.5x | 1.60x | met |",
        "| tensor-wise float8 | qnn fp8_tensor compiled | nn.Linear | 1.6x | 1.33x | **missed** |",
        "not judged: Training: one linear layer, M=16384, 8192->8192: failed: red |",
        "| weights in float8, M = 1 to 8 | qnn fp8_weight graph | nn.Linear | 1.7x | - | not meas",
        "| 3.50 (2.00x) |",
        "- Inference: weights from memory: M=1, 8->8",
        "- qnn fp8_block bf16 compiled: failed: red (cases: 1)",
    ):
        assert text in page
    with (tmp_path / "bench_fp8.csv").open() as file:
        found = {row["variant"]: row for row in csv.DictReader(file)}
    assert {row["gpu"] for row in found.values()} == {"H200"}
    assert found["qnn fp8 bf16 compiled"]["device_speedup"] == "1.6"
    assert found["qnn fp8 bf16 compiled"]["tokens_s"] == "3.2768e+06"


def test_bytes_of_a_layer_are_those_of_its_parts(bench: Any, variants: Any) -> None:
    m, k, n = 4, 64, 32
    task = variants.deployed_case(variants.Decode(m, k, n), CPU, "aot_eager").task
    found = {family: size * 1e9 for family, size in bench.gigabytes_read(task).items()}
    x = 2 * m * k
    assert found["nn.Linear"] == pytest.approx(x + 2 * n * k)
    assert (
        found["qnn fp8_weight"]
        == found["torchao float8 weight"]
        == pytest.approx(x + n * k + 4 * n)
    )
    assert found["qnn nvfp4_weight"] == pytest.approx(x + n * k / 2 + n * k / 16 + 4)


def test_every_aim_names_cases_that_are_measured(bench: Any) -> None:
    sizes = {f"{size.section}, {size}": size for size in bench.sizes()}
    assert len(sizes) == len(bench.sizes())
    for aim in bench.AIMS:
        assert {*aim.cases} <= {*sizes}
        assert aim.ours.mode == aim.theirs.mode
        assert aim.ours.mode != "compiled" or all(sizes[name].compiled for name in aim.cases)


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
