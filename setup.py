"""What pyproject.toml cannot say: a wheel with the compiled CPU kernels inside.

QNN_PREBUILD=1 pip wheel --no-deps --no-build-isolation .

needs torch and a C++ compiler. Without the variable the wheel is pure Python, and building it needs
neither.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PREBUILD = os.environ.get("QNN_PREBUILD") == "1"
CPU = Path(__file__).resolve().parent / "kernels" / "cpu"


class BuildPy(build_py):
    """Copies the package, then compiles the kernels beside their copied sources."""

    def run(self) -> None:
        folder = Path(self.build_lib, "qnn", "kernels", "cpu")
        shutil.rmtree(folder / "csrc", ignore_errors=True)  # build/ is kept, with what was deleted
        super().run()
        # An editable install finds its library in the user's cache.
        if PREBUILD and not self.editable_mode:
            self._compile(folder)

    def _compile(self, folder: Path) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            raise SystemExit(
                "QNN_PREBUILD=1 needs torch to compile against: install it and use "
                "--no-build-isolation"
            )
        toolchain = _toolchain()
        try:
            record = toolchain.build_into(
                folder, folder / "csrc", Path(torch.submodule_search_locations[0])
            )
        except toolchain.BuildError as error:
            raise SystemExit(f"{error.log}\nQNN_PREBUILD=1: {error}") from error
        if record.missing:
            raise SystemExit(
                f"QNN_PREBUILD=1: {record.compiler} is too old for {', '.join(record.missing)}; "
                "a wheel needs every tier"
            )


class Binary(Distribution):
    """A distribution for one platform if it carries the library."""

    def has_ext_modules(self) -> bool:
        return PREBUILD


class Wheel(bdist_wheel):
    """The library is tied to a platform, and to no Python: its torch interface is C."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if PREBUILD else tag


def _toolchain():
    """`kernels/cpu/toolchain.py` alone: importing qnn would import torch."""
    spec = importlib.util.spec_from_file_location("qnn_toolchain", CPU / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


setup(distclass=Binary, cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel})
