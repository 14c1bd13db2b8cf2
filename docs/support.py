"""What is there: each layer in each scheme, in each mode, from the registries.

`python docs/support.py` prints the table that `<!-- support table -->` becomes in a page. The
layers are those of `qnn.kinds`, the schemes those of `qnn.SCHEMES`; a new one has its row without
a change here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from qnn.kernels import OPS, SCHEMES, Op, Scheme
from qnn.kernels.cuda.backends import has_kernel
from qnn.kinds import Kind, kind_of, known_kinds

SIZE = 128  # which every scheme takes
HEAD = (
    "layer", "scheme", "op", "eager", "compiled", "exported", "gradient to x", "trains", "QAT",
    "on disk", "CPU, C++", "CPU, torch", "GPU kernel",
)  # fmt: skip


@dataclass(frozen=True)
class Support:
    """What one layer has in one scheme."""

    kind: Kind
    layer: type[nn.Module]
    scheme: Scheme
    op: Op

    @property
    def is_traced(self) -> bool:
        """The op is one node in graphs, compiled and exported; `opcheck` holds it in the tests."""
        return torch.Tag.pt2_compliant_tag in self.op.overload.tags

    @property
    def gradient(self) -> bool:
        return bool(self.op.backward)

    @property
    def trains(self) -> bool:
        """In low precision, with float parameters."""
        left = self.kind.why_left(self.layer(SIZE, SIZE), self.scheme.name, training=True)
        return self.scheme.trainable and left is None

    @property
    def qat(self) -> bool:
        """Fake-quantised while it trains: `qnn.prepare` makes layers for a static scheme."""
        return self.scheme.static and bool(self.kind.observed)

    @property
    def disk(self) -> str:
        """The name that compressed-tensors has for the file."""
        return f"`{self.scheme.compressed_format}`" if self.kind.standard else "qnn's own"

    @property
    def cpp(self) -> bool | str:
        if self.op.native or self.scheme.activation is None or not self.op.backward:
            return self.op.native
        # The gradient of the gradient is the layer without the casts of its activations.
        (gradient,) = self.op.backward.values()
        return "product" if OPS[OPS[gradient].backward["dy"]].native else False

    @property
    def marks(self) -> tuple[bool | str, ...]:
        """The cells after the op's name, in the order of `HEAD`."""
        compiled = exported = self.is_traced
        eager = reference = True  # an op cannot be declared without its reference
        return (
            eager, compiled, exported, self.gradient, self.trains, self.qat, self.disk, self.cpp,
            reference, has_kernel(self.op.name),
        )  # fmt: skip


def supported() -> Iterator[Support]:
    """Each layer of torch that a kind takes, in each scheme that can hold it."""
    for kind in known_kinds():
        for layer in kind.floats:
            if not layer.__module__.startswith("torch.") or kind_of(layer(SIZE, SIZE)) is not kind:
                continue
            # Schemes name their ops by torch's name of the layer: "lstm", "embedding_bag".
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", layer.__name__.removesuffix("Cell"))
            name = words.lower()
            for scheme in SCHEMES.values():
                left = kind.why_left(layer(SIZE, SIZE), scheme.name, named=True)
                if left is None and (op := scheme.op(name)) is not None:
                    yield Support(kind, layer, scheme, OPS[op])


def table() -> str:
    """A row for each op: what shares it, such as a cell and its layer, shares the row."""
    shared: dict[str, list[Support]] = {}
    for each in supported():
        shared.setdefault(each.op.name, []).append(each)
    lines = [HEAD, ("---",) * 3 + (":---:",) * (len(HEAD) - 3)]
    for same in shared.values():
        layers, schemes = (
            ", ".join(dict.fromkeys(f"`{name}`" for name in names))
            for names in (
                (f"nn.{each.layer.__name__}" for each in same),
                (each.scheme.name for each in same),
            )
        )
        marks = [{True: "✓", False: "–"}.get(mark, mark) for mark in same[0].marks]
        lines.append((layers, schemes, f"`{same[0].op.name}`", *marks))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
