"""What a model holds, in words: bytes, and kinds of modules by their names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from qnn.kinds import own_tensors, qualified


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the values; a parameter that waits for its first batch has none yet."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None and not is_lazy(t))


def size(count: float) -> str:
    """Bytes in words: `1.2 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def inventory(modules: Iterable[nn.Module]) -> str:
    """The kinds of modules that hold something or have no children, by qualified name, the largest
    first: `torch.nn.modules.conv.Conv2d (3, 1.2 MB), torch.nn.modules.activation.ReLU (2)`.
    """
    count, held = dict[str, int](), dict[str, int]()
    seen = set[int]()
    for module in {id(module): module for module in modules}.values():
        tensors = [t for t in own_tensors(module) if id(t) not in seen]
        seen.update(map(id, tensors))
        if tensors or not module._modules:
            kind = qualified(type(module))
            count[kind] = count.get(kind, 0) + 1
            held[kind] = held.get(kind, 0) + nbytes(tensors)
    order = sorted(count, key=lambda kind: (-held[kind], kind))
    return ", ".join(
        f"{kind} ({count[kind]}{f', {size(held[kind])}' if held[kind] else ''})" for kind in order
    )
