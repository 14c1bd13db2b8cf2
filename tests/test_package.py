"""What installs, what `import qnn` costs and touches, and `python -m qnn doctor`."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

import qnn
from qnn import moved

from .common import child, forked

ROOT = Path(__file__).resolve().parent.parent


class TestImport:
    def test_cost(self) -> None:
        """In calls and modules, since seconds depend on the machine and on what else it does."""
        code = """
            import sys, torch
            calls, before = 0, set(sys.modules)
            def count(frame, event, arg):
                global calls
                calls += event in ("call", "c_call")
            sys.setprofile(count)
            import qnn
            sys.setprofile(None)
            print(calls, *sorted(set(sys.modules) - before))
        """
        calls, *modules = child(code).split()
        assert int(calls) < 300_000  # 99,484: 0.1 s on one Zen 4 core
        others = {name.split(".")[0] for name in modules} - sys.stdlib_module_names
        assert others <= {"qnn", "einops", "numpy", "torch"}

    def test_touches_only_the_two_operators(self) -> None:
        child(
            """
            import sys, torch
            def flags():
                return (torch.get_float32_matmul_precision(), torch.get_num_threads(),
                        torch.backends.quantized.engine, torch.get_default_dtype(),
                        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
            before = flags()
            import qnn
            assert flags() == before
            for name in ("torch._inductor.compile_fx", "torch._dynamo", "transformers", "triton"):
                assert name not in sys.modules, name
            from qnn.kernels.cpu.engines import self_test
            assert self_test.cache_info().currsize == 0  # nothing has run yet
            from qnn.kernels.torch_private import invoke_quant, invoke_quant_packed
            assert invoke_quant._cacheable and invoke_quant_packed._cacheable
            """
        )

    def test_from_the_root_of_a_checkout(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", "import qnn; print(qnn.functional.__file__)"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip().endswith("__init__.py")

    def test_its_pass_is_installed_by_a_trace(self) -> None:
        """In a process that imports nothing of qnn but itself."""
        code = """if 1:
            import torch
            import qnn
            from torch._inductor import config
            assert not config.post_grad_custom_post_pass
            layer = qnn.convert(torch.nn.Sequential(torch.nn.Linear(8, 8)), "int8")
            torch.compile(layer, backend="aot_eager")(torch.randn(2, 8))
            assert config.post_grad_custom_post_pass
            """
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    def test_everything_public_is_there(self) -> None:
        for name in qnn.__all__:
            assert hasattr(qnn, name), name


# From the ground up; a package stands for all that is in it, and the longest name counts.
FLOORS = (
    "qnn.kernels.torch_private", "qnn.kernels.epilogue", "qnn.kernels.op", "qnn.kernels.formats",
    "qnn.kernels.reference", "qnn.kernels", "qnn.passes", "qnn.functional", "qnn.calibration",
    "qnn.kinds", "qnn.nn",
    "qnn.verbs", "qnn.pt2e", "qnn.integrations", "qnn",
)  # fmt: skip


def floor(module: str) -> int:
    known = [name for name in FLOORS if module == name or module.startswith(f"{name}.")]
    return FLOORS.index(max(known, key=len))


def import_graph() -> dict[str, set[str]]:
    """What each module imports, wherever in its file; a package's own file stands for the names
    that it hands on, unless one of its modules is named.
    """
    files = {}
    roots = {"qnn": "qnn", "functional": "qnn.functional", "kernels": "qnn.kernels"}
    for folder, package in roots.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *(name for name in inside if name != "__init__")])] = path
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                named = {name if name in files else node.module or "" for name in names}
            elif isinstance(node, ast.Import):
                named = {alias.name for alias in node.names}
            else:
                continue
            graph[module] |= named & files.keys()
    return graph


class TestHouse:
    def test_imports_point_down(self) -> None:
        """No module imports one of a floor above, at the top, inside of a function or for types."""
        for module, imported in import_graph().items():
            for other in imported:
                assert floor(module) >= floor(other), (module, other)

    def test_no_imports_in_a_circle(self) -> None:
        graph = import_graph()
        order = graphlib.TopologicalSorter(graph)
        order.prepare()  # a CycleError names the circle

    def test_old_names_are_importable(self) -> None:
        for old, new in moved.MOVED.items():
            sys.modules.pop(old, None)
            with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
                found = importlib.import_module(old)
            assert found is importlib.import_module(new)
            assert (found.__spec__.name if found.__spec__ else "") == new
        sys.modules.pop("qnn.functional.fusion", None)
        vars(qnn.functional).pop("fusion", None)
        with pytest.warns(DeprecationWarning, match=r"is now qnn\.passes\.fusion"):
            assert qnn.functional.fusion is importlib.import_module("qnn.passes.fusion")

    def test_private_torch_names_stand_in_one_file(self) -> None:
        allowed = {"torch_private.py"}
        for folder in ("qnn", "functional", "kernels"):
            for path in (ROOT / folder).rglob("*.py"):
                if path.name in allowed:
                    continue
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                        parts = [*(node.module or "").split("."), *(a.name for a in node.names)]
                        assert not [p for p in parts if p.startswith("_")], path


class TestWheel:
    def test_one_top_level_package(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            files = subprocess.run(
                ["git", "ls-files", "qnn", "functional", "kernels", "*.toml", "*.md", "LICENSE"],
                cwd=ROOT, capture_output=True, text=True, check=True,
            ).stdout.split()  # fmt: skip
            for name in files:
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_bytes((ROOT / name).read_bytes())
            subprocess.run(
                [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
                 "-w", folder, str(tree)],
                check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            )  # fmt: skip
            (wheel,) = Path(folder).glob("*.whl")
            names = zipfile.ZipFile(wheel).namelist()
        tops = {name.split("/")[0] for name in names}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"qnn"}
        for name in ("qnn/py.typed", "qnn/functional/linear.py", "qnn/kernels/cpu/engines.py"):
            assert name in names
        modules = {n for n in files if n.endswith(".py")}
        assert len([n for n in names if n.endswith(".py")]) == len(modules)


# `python -m qnn doctor`, where torch is imported already.
_DOCTOR = """
import runpy, sys
sys.argv = ["qnn", "doctor"]
runpy.run_module("qnn", run_name="__main__", alter_sys=True)
"""


class TestDoctor:
    def test_text_and_json(self) -> None:
        run = [sys.executable, "-m", "qnn", "doctor", "--json"]
        text = forked(_DOCTOR)
        for word in ("versions", "features", "int8 engines", "exact", "onednn", "schemes"):
            assert word in text
        data = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        assert sum(engine["used"] for engine in data["engines"]) == 1
        assert set(data["schemes"]) == set(qnn.SCHEMES)

    def test_says_what_is_missing(self) -> None:
        text = forked(f'import os; os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"\n{_DOCTOR}')
        assert re.search(r"onednn +not used +wrong integers", text)
        assert "no VNNI instructions" in text.replace("has no \n", "has no ")

    def test_no_command(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "qnn"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "doctor" in done.stderr
