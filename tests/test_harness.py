"""What the benchmarks share: what is timed, what gets no time, and which aims are met."""

from __future__ import annotations

import ast
import contextlib
import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qnn.verbs import timing

from .common import BENCHMARKS, forked_script

Import = Callable[[str], Any]


@pytest.fixture
def harness(benchmark: Import) -> Any:
    return benchmark("harness")


@pytest.fixture
def report(benchmark: Import) -> Any:
    return benchmark("report")


def test_nothing_is_written_twice() -> None:
    """No two functions of one name, and none of the same statements."""
    places: dict[str, list[str]] = {}
    for path in sorted(BENCHMARKS.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name == "main":
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            for key in (node.name, "".join(map(ast.dump, body))):
                places.setdefault(key, []).append(f"{path.name}: {node.name}")
    assert not [found for found in places.values() if len(found) > 1]


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("bench_lstm", ("--no-processes", "--only", "qnn int8 fp32 eager")),
        ("bench_attention", ("--only", "qnn int8")),
        ("bench_conv", ("--what", "transposed", "--batches", "2", "--only", "qnn")),
        # Half a minute, for the machine's peaks and what is measured beside the grid.
        pytest.param(
            "bench_linear", ("--only", "qnn int8 bf16 eager|GEMM"), marks=pytest.mark.long
        ),
    ],
)
def test_a_script_measures_and_writes(
    script: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    path = BENCHMARKS / f"{script}.py"
    stem = f"{script}_transposed" if "transposed" in options else script
    text = forked_script(path, "--quick", "--out", str(tmp_path), *options, cwd=tmp_path)
    assert f"written: {tmp_path / stem}.csv" in text
    with (tmp_path / f"{stem}.csv").open() as file:
        rows = list(csv.DictReader(file))
    grid = [row for row in rows if row["variant"] == "float fp32 eager" and row["speedup"]]
    assert grid
    assert all(float(row["speedup"]) == 1 for row in grid)
    for row in rows:  # what has no time says why
        assert row["median_ms"] or row["note"] or row["case"] == "peak"
        assert row["torch"] == torch.__version__
    page = (tmp_path / f"{stem}.md").read_text()
    assert f"`python benchmarks/{script}.py --quick" in page
    assert "\n## Without a time\n" in page
    ours = [row for row in rows if row["variant"].startswith(options[-1].partition("|")[0])]
    assert ours
    assert all(row["median_ms"] for row in ours)


# -- variants and rows ---------------------------------------------------------------------------


def case_of(harness: Any, **changes: Any) -> Any:
    """Doubling a row of ones, twice."""
    case = harness.Case("ones", "M=1", torch.ones(8), torch.full((8,), 2.0), operations=8)
    return replace(case, **changes)


def variant(harness: Any, family: str, call: Callable[[torch.Tensor], Any], **of_run: Any) -> Any:
    def build(x: torch.Tensor, dtype: torch.dtype) -> Any:
        return harness.Run(lambda: call(x.to(dtype)), **of_run)

    return harness.Variant(family, "fp32", "eager", build)


def measure(harness: Any, case: Any, *variants: Any) -> list[Any]:
    effort = harness.Effort(rounds=3, seconds=0.01, turn=0)
    rows: list[Any] = harness.measure(case, variants, baseline="good fp32 {mode}", effort=effort)
    return rows


def test_only_what_is_right_gets_a_time(harness: Any, report: Any) -> None:
    def raises(x: torch.Tensor) -> Any:
        raise ZeroDivisionError("of all things\nand more")

    def not_installed(x: torch.Tensor) -> Any:
        harness.needs("no_such_library")

    variants = [
        variant(harness, "good", lambda x: 2 * x, note="as it should"),
        variant(harness, "wrong", lambda x: 3 * x),
        variant(harness, "NaN", lambda x: x * torch.nan),
        variant(harness, "raises", raises),
        variant(harness, "absent", not_installed),
        harness.only_where(variant(harness, "left out", lambda x: 2 * x), lambda x: len(x) > 8),
    ]
    rows = measure(harness, case_of(harness), *variants)
    assert [row.status for row in rows] == [
        "ok",
        "failed",
        "failed",
        "failed",
        *["unavailable"] * 2,
    ]
    assert [row.note for row in rows] == [
        "as it should",
        "SQNR 6.0 dB, under 20",
        "SQNR nan dB, under 20",
        "ZeroDivisionError: of all things",
        "not installed (no_such_library)",
        harness.LEFT_OUT,
    ]
    assert rows[0].speedup == 1
    assert rows[0].tops == pytest.approx(8 / rows[0].median_ms * 1e-9)
    assert all((row.median_ms, row.speedup) == (None, None) for row in rows[1:])
    text = report.without_time(rows)
    assert "- raises fp32 eager: failed: ZeroDivisionError: of all things (cases: 1)" in text
    assert "left out" not in text
    table = report.size_table({"M=1": rows})
    assert "not installed" not in table
    assert "(`--everywhere` adds them): left out fp32 eager." in table


def test_every_output_counts_and_the_floor_is_the_cases_own(harness: Any) -> None:
    case = case_of(harness, reference=[torch.ones(8), torch.full((8,), 2.0)])
    off = variant(harness, "off", lambda x: [x, 2.02 * x], output=list)  # 40 dB
    lacks = variant(harness, "lacks one", lambda x: [x], output=list)
    assert [row.status for row in measure(harness, case, off, lacks)] == ["ok", "failed"]
    strict = replace(case, floor={"off": 41.0, "lacks one": 0.0}.__getitem__)
    row, _ = measure(harness, strict, off, lacks)
    assert (row.status, row.note) == ("failed", "SQNR 40.0 dB, under 41")


def test_gradients_are_there_for_a_training_step_alone(harness: Any) -> None:
    def says(x: torch.Tensor) -> torch.Tensor:
        return 2 * x if torch.is_grad_enabled() else 3 * x

    step = variant(harness, "step", says)
    found = [measure(harness, case_of(harness, training=t), step)[0].status for t in (True, False)]
    assert found == ["ok", "failed"]


def test_a_call_may_repeat_the_task(harness: Any) -> None:
    row = harness.row_of("case", variant(harness, "x", lambda x: x), "ok", "")
    samples = harness.Samples(wall=[0.4, 0.2, 0.3])
    got = harness.timed(row, samples, operations=1e9, read=2e9, per=10)
    assert (got.median_ms, got.min_ms, got.samples) == pytest.approx((30.0, 20.0, 3))
    assert (got.tops, got.gb_s) == pytest.approx((1e-3 / 0.03, 2 / 0.03))
    assert not hasattr(got, "device_ms")
    samples = harness.Samples([0.4], [0.1], [0.3])
    got = harness.timed(row, samples, per=10)
    assert (got.median_ms, got.device_ms, got.host_ms) == pytest.approx((40.0, 10.0, 30.0))


def test_a_variant_may_change_nothing_for_the_others(harness: Any) -> None:
    from torch._inductor import config

    def changes(x: torch.Tensor) -> torch.Tensor:
        config.freezing = not config.freezing
        return 2 * x

    def kept(x: torch.Tensor) -> torch.Tensor:
        with harness.inductor_settings():
            return changes(x)

    before = config.freezing
    assert measure(harness, case_of(harness), variant(harness, "kept", kept))[0].status == "ok"
    assert config.freezing == before
    with pytest.raises(RuntimeError, match=r"'loud fp32 eager' changed .*config.freezing"):
        measure(harness, case_of(harness), variant(harness, "loud", changes))
    config.freezing = before


def test_what_is_compiled_is_its_own(harness: Any) -> None:
    """Each has a code object, which Dynamo keeps compiled code with."""
    torch._dynamo.reset()
    doubles, adds = (harness.compiled(f, "eager") for f in (lambda x: 2 * x, lambda x: x + 3))
    x = torch.ones(3)
    assert [doubles(x)[0], adds(x)[0], doubles(x)[0]] == [2, 4, 2]
    from torch._dynamo.eval_frame import innermost_fn

    assert innermost_fn(doubles).__code__ is not innermost_fn(adds).__code__


def test_a_fresh_process_answers_or_says_what_is_wrong(benchmark: Import, tmp_path: Path) -> None:
    ask = benchmark("fresh_process").ask
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nprint('more')\nprint(json.dumps({'got': sys.argv[1:]}))")
    threads = ["--threads", str(torch.get_num_threads())]
    assert ask(str(script), "what", quick=True) == {"got": ["what", "--quick", *threads]}
    script.write_text("import sys\nsys.exit('out of luck')")
    assert ask(str(script), "what", quick=False) == {"error": "out of luck"}


# -- ratios and aims -----------------------------------------------------------------------------


def timed(harness: Any, case: str, family: str, milliseconds: float | None, **more: Any) -> Any:
    status = "failed" if milliseconds is None else "ok"
    fields = {"precision": "bf16", "mode": "compiled", **more}
    return harness.Measurement(
        case, family, family, status=status, note="red", median_ms=milliseconds, **fields
    )


def test_the_best_of_what_is_picked(harness: Any, report: Any) -> None:
    rows = [
        timed(harness, "a", "x", 1.0, mode="eager"),
        timed(harness, "a", "x", 3.0, precision="fp32"),
        timed(harness, "a", "x", 2.0),
        timed(harness, "a", "x", None),
        timed(harness, "a", "y", 0.5),
    ]
    for pick, best in (
        (report.Pick("x"), 1.0),
        (report.Pick("x", "compiled"), 2.0),
        (report.Pick("x", precision="fp32"), 3.0),
        (report.Pick("x", but="eager"), 2.0),
    ):
        assert pick.best(rows).median_ms == best
    assert report.Pick("z").best(rows) is None
    assert harness.over(rows[0], rows[2]) == 0.5
    assert harness.over(rows[0], rows[3]) is harness.over(None, rows[0]) is None
    assert harness.over(rows[0], rows[2], "device_ms") is None


def test_aims_are_judged_from_the_rows(harness: Any, report: Any) -> None:
    aim = report.Aim("two", report.Pick("qnn", "compiled"), report.Pick("plain"), 1.5, ("a", "b"))

    def rows(**ratios: float | None) -> list[Any]:
        plain = [timed(harness, case, "plain", 6.0) for case in ratios]
        times = [None if each is None else 6.0 / each for each in ratios.values()]
        return plain + [
            timed(harness, case, "qnn", ms) for case, ms in zip(ratios, times, strict=True)
        ]

    assert aim.judged([]) == ("-", "not measured")
    assert aim.judged(rows(c=9.0)) == ("-", "not measured")
    assert aim.judged([timed(harness, "a", "qnn", 1.0, mode="eager")]) == ("-", "not measured")
    assert aim.judged(rows(a=1.5, b=1.75)) == ("1.50x", "met")
    assert aim.judged(rows(a=1.25, b=1.75)) == ("1.25x", "**missed**")
    assert aim.judged(rows(a=1.75)) == ("1.75x", "met, 1 of 2 cases not measured")
    assert aim.judged(rows(a=1.75, b=None)) == ("-", "not judged: b: failed: red")
    assert aim.judged(rows(a=1.75)[1:]) == ("-", "not judged: a: nothing to compare")
    loud = [replace(row, other_load=2 * report.QUIET) for row in rows(a=1.5, b=1.5)]
    assert aim.judged(loud) == ("1.50x", "not judged, on a machine that was not quiet")
    table = " ".join(report.aims_table([aim], rows(a=1.5, b=1.75)).split())
    assert table.endswith("| two | qnn compiled | plain | 1.5x | 1.50x | met |")


# -- timers --------------------------------------------------------------------------------------


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

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Make `qnn.verbs.timing` time this device."""
        clock = SimpleNamespace(perf_counter=lambda: self.host)
        properties = SimpleNamespace(L2_cache_size=1 << 10)
        flush = SimpleNamespace(zero_=lambda: self.launch(5e-6, 5e-5))
        patch.setattr(timing, "time", clock)
        patch.setattr(torch, "empty", lambda *_, **__: flush)
        for name, value in {
            "synchronize": self.synchronize,
            "Event": self.event,
            "device": lambda _: contextlib.nullcontext(),
            "_sleep": lambda cycles: self.launch(0.0, cycles / 2e9),
            "get_device_properties": lambda _: properties,
        }.items():
            patch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(("launching", "running"), [(1e-5, 2e-4), (3e-4, 1e-4), (2e-3, 1e-6)])
def test_what_is_timed_on_a_gpu(
    benchmark: Import, monkeypatch: pytest.MonkeyPatch, launching: float, running: float
) -> None:
    gpu = FakeGpu()
    gpu.patch(monkeypatch)

    def call() -> None:
        for _ in range(3):
            gpu.launch(launching, running)

    longer = max(launching, running)
    want = launching + 2 * longer + running, 3 * running, 3 * launching
    effort = timing.Effort(rounds=4, seconds=0, turn=2.5 * want[0])
    found = timing.interleave({"a": call, "b": call}, effort, torch.device("cuda", 0))
    for samples in found.values():  # three rounds at least, of as many calls as fit a turn
        assert samples.wall == pytest.approx([want[0]] * 6)
        assert samples.device == pytest.approx([want[1]] * 6)
        assert samples.host == pytest.approx([want[2]] * 6)
        assert [samples.median(kind) for kind in ("wall", "device", "host")] == pytest.approx(want)


def test_a_row_of_a_gpu(harness: Any, benchmark: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    gpu.patch(monkeypatch)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(harness, "peak_megabytes", lambda call, device: 5.0)
    monkeypatch.setattr(harness, "clock_mhz", lambda device: 1500)

    def of(milliseconds: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: gpu.launch(1e-5, milliseconds / 1e3) or 2 * x

    good = variant(harness, "good", of(4.0), repeats=2)
    wrong = variant(harness, "wrong", lambda x: x)
    fast = variant(harness, "fast", of(1.0), repeats=2)
    case = case_of(harness, device=torch.device("cuda", 0))
    found, failed, faster = measure(harness, case, good, wrong, fast)
    assert (found.device_ms, found.host_ms) == pytest.approx((2.0, 0.005))
    assert (found.median_ms, faster.speedup) == pytest.approx((2.005, 4.01 / 1.01))
    assert (found.megabytes, found.sm_mhz, found.other_load) == (5.0, 1500, None)
    assert (failed.status, failed.median_ms, failed.megabytes) == ("failed", None, None)


def test_turns_on_a_cpu(benchmark: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], list[str]()
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda _: order.append("pause"))
    monkeypatch.setattr(timing, "time", clock)

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    calls = {"short": call("short", 0.002), "long": call("long", 0.5)}
    found = timing.interleave(calls, timing.Effort(rounds=5, seconds=1e9, turn=0.007))
    assert found["short"].wall == pytest.approx([0.002] * 15)
    assert found["long"].wall == pytest.approx([0.5] * 5)
    assert found["short"].device == found["short"].host == []
    turns = "".join(each[0] for each in order).split("p")[3:]
    assert sorted(turns) == ["ll"] * 5 + ["sssss"] * 5
    assert benchmark("timing").fastest(calls)[0] == "short"
