"""Every Python block of the documentation and of the README runs, page by page, as it stands."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from parameterized import parameterized

from .common import forked

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    path
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if BLOCK.search(path.read_text())
)


class TestDocs:
    @parameterized.expand([(str(path.relative_to(ROOT)), path) for path in PAGES])
    def test_page(self, name: str, path: Path) -> None:
        text = path.read_text()
        for needed in (
            "transformers", "diffusers", "peft", "safetensors", "onnxruntime", "accelerate",
            "lightning",
        ):  # fmt: skip
            if re.search(rf"^\s*(import|from) {needed}", text, re.MULTILINE):
                pytest.importorskip(needed, reason=f"{name} needs {needed}")
        blocks = []
        for block in BLOCK.findall(text):
            included = re.fullmatch(r'--8<-- "([^"]+)"\s*', block)
            blocks.append((ROOT / included[1]).read_text() if included else block)
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "page.py"
            script.write_text("\n".join(blocks))
            forked(
                f"""
                import os, runpy
                os.chdir({folder!r})
                runpy.run_path("page.py", run_name="__main__")
                """
            )
