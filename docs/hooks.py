"""MkDocs hook: tables made from qnn's registry, and figures from `docs/benchmarks/`.

In a page, `<!-- op table -->` becomes a table of `qnn.kernels.OPS`, `<!-- scheme table -->` one of
`qnn.SCHEMES`, `<!-- support table -->` that of `support.py`, `<!-- sqnr table -->` that of
`sqnr.py`, `<!-- checkpoint table -->` that of `checkpoints.py`, and `<!-- benchmark: NAME -->` the
content of `benchmarks/NAME.md` with its picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import checkpoints
import sqnr
import support
import torch

from qnn.kernels import OPS, SCHEMES, Format, Op, Scheme

DOCS = Path(__file__).resolve().parent
_BENCHMARK = re.compile(r"<!-- benchmark: (\w+) -->")
_LOCAL_LINK = re.compile(r"\]\((?![a-z]+:|[/#])")


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = markdown.replace("<!-- op table -->", op_table())
    markdown = markdown.replace("<!-- scheme table -->", scheme_table())
    for name, table in (
        ("sqnr", sqnr.table),
        ("support", support.table),
        ("checkpoint", checkpoints.table),
    ):
        if f"<!-- {name} table -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} table -->", table())
    return _BENCHMARK.sub(lambda match: benchmark(match[1]), markdown)


def op_table() -> str:
    """A row for each registered op."""
    head = ("op", "signature", "formula", "dtypes and choices", "kernels", "backward")
    return _table(head, map(_op_row, OPS.values()))


def _op_row(op: Op) -> tuple[str, ...]:
    allowed = {
        name: f"as `{each}`" if isinstance(each, str) else _dtypes(each)
        for name, each in op.dtypes.items()
    }
    allowed |= {
        name: ", ".join(f"`{each}`" for each in names) for name, names in op.choices.items()
    }
    values = "<br>".join(f"`{name}`: {each}" for name, each in allowed.items())
    kernels = ", ".join([*op.kernels, "reference elsewhere" if op.kernels else "reference"])
    backward = "<br>".join(f"`{name}`: `{other}`" for name, other in op.backward.items()) or "none"
    return f"`{op.name}`", f"`{op.signature}`", _text(op.doc), values, kernels, backward


def scheme_table() -> str:
    """A row for each registered scheme."""
    head = ("scheme", "weight", "activations", "op of a linear layer", "largest in_features")
    return _table(head, map(_scheme_row, SCHEMES.values()))


def _scheme_row(scheme: Scheme) -> tuple[str, ...]:
    limit = "none" if scheme.max_in_features is None else f"{scheme.max_in_features:,}"
    activation = "as they are" if scheme.activation is None else _format(scheme.activation)
    return f"`{scheme.name}`", _format(scheme.weight), activation, f"`{scheme.linear}`", limit


def _format(fmt: Format) -> str:
    scale = f"{_dtypes([fmt.scale_dtype])} per-{fmt.granularity} scale"
    return f"{_dtypes([fmt.storage])} in [{fmt.qmin}, {fmt.qmax}], {scale}"


def _dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _text(text: str) -> str:
    """Plain text for a cell: a bar would end it."""
    return text.replace("|", "&#124;").replace("*", r"\*").replace("_", r"\_")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def benchmark(name: str) -> str:
    """`benchmarks/<name>.md` for a page one folder up, with its picture and its figures."""
    folder = DOCS / "benchmarks"
    source = folder / f"{name}.md"
    if not source.is_file():
        return "*Not measured yet.*"
    text = _included(source.read_text(encoding="utf-8"))
    if (folder / f"{name}.png").is_file() and f"{name}.png" not in text:
        text += f"\n\n![{name}](benchmarks/{name}.png)"
    if (folder / f"{name}.csv").is_file() and f"{name}.csv" not in text:
        text += f"\n\nAll figures: [{name}.csv](benchmarks/{name}.csv)."
    return text


def _included(markdown: str) -> str:
    """Headings two levels down, links relative to the including page; code blocks unchanged."""
    lines, fenced = [], False
    for line in markdown.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced:
            line = f"##{line}" if line.startswith("#") else _LOCAL_LINK.sub("](benchmarks/", line)
        lines.append(line)
    return "\n".join(lines)
