"""Tables of classes with a forward of their own around `nn.Embedding`'s, such as scaled word
embeddings and places with an offset.

The quantised layer is of a class that has both, the float class and `QEmbedding`: its forward is
that of the float class, whose `super().forward` is the quantised lookup. So nothing of a class is
read out of its code and written again, and it stays an instance of the class that it was.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import nn

from qnn.kinds import Own, qualified
from qnn.nn.embedding.quantized import QEmbedding
from qnn.nn.values import of_other_kind


class OwnForward(QEmbedding):
    """A `QEmbedding` around which `own_class`, the class of the float layer, has a forward."""

    own_class: ClassVar[type[nn.Embedding]]

    @property
    def _who(self) -> str:
        return super()._who.replace(type(self).__name__, "QEmbedding", 1)

    def _float(self, device: Any) -> nn.Module:
        layer = super()._float(device)
        layer.__class__ = self.own_class
        known = _attributes()
        layer.__dict__ |= {key: value for key, value in vars(self).items() if key not in known}
        _keep_tensors(self, layer, lambda value: value.detach().clone())
        layer._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = cast(Any, super().__reduce_ex__(protocol))
        return _empty, (self.own_class,), *state


def _empty(kind: type[nn.Embedding]) -> OwnForward:
    """For pickle, which finds no class that was made at run time."""
    made = quantized_class(cast(Any, kind))
    return made.__new__(made)


@functools.cache
def _attributes() -> frozenset[str]:
    """What every `QEmbedding` has."""
    return frozenset(vars(QEmbedding(1, 1, device="meta")))


@functools.cache
def quantized_class(kind: type[nn.Embedding]) -> type[OwnForward]:
    """`kind` over quantised tables."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        given = (*args, *options.values())
        if given and isinstance(given[0], torch.fx.Proxy):  # a leaf with all of its forward
            return of_other_kind(self, *given[:1], *args[1:], **(options if args else {}))
        return kind.forward(self, *args, **options)

    members = {"forward": forward, "own_class": kind, "__module__": __name__}
    return cast(type[OwnForward], type(f"Q{kind.__name__}", (kind, OwnForward), members))


def _own_classes(kind: type) -> Iterator[type]:
    for each in kind.__mro__:
        if each is nn.Embedding:
            return
        yield each


def has_own_forward(module: nn.Module) -> bool:
    """Whether it is a table with a forward around that of `nn.Embedding`."""
    forward: Any = nn.Embedding.forward
    return isinstance(module, nn.Embedding) and type(module).forward is not forward


def own_tensors(module: nn.Module) -> tuple[list[str], list[str]]:
    """The parameters and the buffers that such a table has besides `weight`."""
    if not has_own_forward(module):
        return [], []
    return [name for name in module._parameters if name != "weight"], list(module._buffers)


# What a forward may ask of `self.weight`; for all else a whole float table would be decoded.
_ASKED = ("dtype", "device", "shape")
# What a class may define that a quantised layer has too.
_DEFINED = {"__init__", "__module__", "__doc__", "__annotations__", "__qualname__", "forward"}
_DEFINED |= {"__firstlineno__", "__static_attributes__", "__dict__", "__weakref__"}


def why_not_own(module: nn.Module) -> str | None:
    """Why the forward of a class cannot go around a quantised lookup, or None."""
    kind = type(module)
    name = qualified(kind)
    for each in _own_classes(kind):
        if clash := sorted(n for n in vars(each).keys() - _DEFINED if hasattr(QEmbedding, n)):
            return f"{name} is a subclass of nn.Embedding that has its own {clash[0]}"
        forward = vars(each).get("forward")
        code = getattr(inspect.unwrap(forward), "__code__", None) if forward else None
        if forward is None:
            continue
        if code is None or "__class__" not in code.co_freevars:
            return (
                f"{name} is a subclass of nn.Embedding with a forward that does not call "
                "super().forward, and so has a meaning of its own"
            )
        steps = list(dis.get_instructions(code))
        for step, after in zip(steps, [*steps[1:], None], strict=True):
            reads = step.argval == "weight" and step.opname.startswith("LOAD_")
            if reads and (after is None or after.argval not in _ASKED):
                return f"the forward of {name} reads the table by itself"
    if module._modules:
        return f"{name} is a subclass of nn.Embedding that holds {next(iter(module._modules))!r}"
    return None


def _keep_tensors(source: nn.Module, target: nn.Module, own: Own) -> None:
    """Give `target` the parameters and buffers of `source` that no plain table has."""
    for name, value in source._parameters.items():
        if name not in target._parameters and not name.startswith("weight"):
            trained = value is not None and value.requires_grad
            made = None if value is None else own(value)
            if made is not None and not isinstance(made, nn.Parameter):
                made = nn.Parameter(made, requires_grad=trained)
            target._parameters[name] = made
    for name, buffer in source._buffers.items():
        target._buffers[name] = None if buffer is None else own(buffer)


def around(table: nn.Embedding, scheme: str, own: Own) -> QEmbedding:
    """The quantised twin of a table with a forward of its own."""
    layer = QEmbedding.around(table, scheme)
    layer.__class__ = quantized_class(cast(Any, type(table)))
    _keep_tensors(table, layer, own)
    return layer


__all__ = ["OwnForward", "around", "has_own_forward", "own_tensors", "quantized_class"]
