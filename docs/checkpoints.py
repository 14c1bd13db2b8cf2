"""The formats of checkpoints that are read and written, from the table that the reader goes by.

`python docs/checkpoints.py` prints what `<!-- checkpoint table -->` becomes in a page.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qnn.integrations.checkpoints.fit import fits
from qnn.integrations.checkpoints.layouts import LAYOUTS, Layout
from qnn.integrations.checkpoints.numbers import Numbers
from qnn.kernels import SCHEMES

HEAD = ("format", "`quant_method`", "weights", "tensors of a layer", "read as", "written", "")
_SIZES = {"float": 128, "e8m0": 32, "e4m3": 16}


def weights_of(layout: Layout) -> Iterator[Numbers]:
    """The numbers that a row of the table is for, with the usual groups."""
    kind, bits, per = layout.takes
    scale = {torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}.get(layout.scale.dtypes[0], "float")
    for each in per:
        group = _SIZES[scale] if each == "group" else 0
        block = (128, 128) if each == "block" else None
        yield Numbers(kind, bits, each, group=group, block=block, scale=scale)


def schemes_of(layout: Layout) -> list[str]:
    """The schemes that weights of a row become, without those for other groups."""
    tensors = {"weight_scale": torch.ones(1)}
    forms = [fit.form for each in weights_of(layout) for fit in fits(each, tensors, (256, 256))]
    if any(part.name.endswith(("zero_point", "qzeros")) for part in layout.held):
        forms += [form.replace("int4", "int4_asym") for form in forms if "int4" in form]
    found = [s.name for s in SCHEMES.values() if s.weight.key in forms and "_g" not in s.name]
    return [name for name in found if _activations(layout, name)]


def _activations(layout: Layout, scheme: str) -> bool:
    """Whether files of a row may say that activations are as in a scheme."""
    found = Numbers.of_scheme(SCHEMES[scheme])
    if found is None or layout.method in ("awq", "gptq"):
        return found is None and layout.method in ("awq", "gptq", "compressed-tensors")
    if layout.takes[2] == ("tensor",):
        return found.per == "tensor"
    # Scales of small groups are of one kind in weights and activations.
    return found.scale == "float" or found.scale == next(weights_of(layout)).scale


def words(layout: Layout) -> str:
    """The tensors of a layer, with their shapes."""
    ways = list(weights_of(layout))
    result = []
    for held in zip(*map(layout.tensors, ways), strict=True):
        if held[0].name.startswith("input_"):
            continue
        shapes = dict.fromkeys(
            each.axes.replace("r", "N").replace("c", "K").format(g="group", b=128, d=128) or "1"
            for each in held
        )
        shown = " or ".join(f"`[{', '.join(shape.split())}]`" for shape in shapes)
        kind = str(held[0].dtypes[0]).removeprefix("torch.")
        result.append(f"`{held[0].name}` {kind} {shown}")
    return "<br>".join(result)


def table() -> str:
    """A row for each format."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for layout in LAYOUTS:
        kind, bits, per = layout.takes
        name = f"`{layout.format}`" if layout.method == "compressed-tensors" else layout.name
        cells = (
            name,
            f"`{layout.method}`",
            f"{kind}{bits}, per-{', per-'.join(per)}",
            words(layout),
            ", ".join(f"`{scheme}`" for scheme in schemes_of(layout)),
            "yes" if layout.written else "no",
            layout.note,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
