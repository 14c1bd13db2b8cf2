"""The kinds of layer: what the verbs ask about a layer, and the one list of those that are known.

`convert`, `prepare`, `summary`, `compare` and the description on disk name no class of layers. Each
asks `kind_of(module)`, and then the kind. A layer of a kind has one of four forms: float, as users
build it; observed, between `prepare` and `convert`; training, in low precision around float
parameters; and quantised, which is an `nn.base.Quantized`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from qnn.functional.layout import MATRIX, Layout
from qnn.kernels import get_scheme
from qnn.kernels.schemes import STATIC

# Hands over what a new module takes from the old one: as it is, or copied.
Own = Callable[[Any], Any]


@dataclass(frozen=True)
class Observation:
    """How `prepare` observes a layer; the arguments of `qnn.prepare`."""

    name: str = ""
    parts: Mapping[str, Any] | None = None
    split_gates: bool = False
    qat: bool = False
    scheme: str = STATIC
    smooth: bool = False


class Kind:
    """One kind of layer; a subclass says what differs, and `register_kind` makes it known.

    Attributes:
        name: such as `"linear"`, for errors.
        floats: the float classes. Exactly these are taken, since a subclass may mean more.
        titles: how errors call them.
        quantized, observed, training: the classes of the other forms.
        shares: whether layers that share a weight share its codes too. Others stay float then.
        held_as: how its weights lie; layers of two kinds that share codes, and hold them alike,
            keep a weight in common, if their schemes store it alike.
        when_named: why a layer is left alone that no name and no type of its own picks, of a kind
            that is taken then only.
        standard: whether compressed-tensors and the engines that read its files know the layer.
        skips_computed: whether a layer whose weight is computed, as by weight_norm, is left alone
            in a call for all layers; it is an error then only where a pattern names it.
        holds: names of modules inside a layer that are its own, such as observation points.
        calls: names of layers inside one whose weights its float form reads, and which its other
            forms call: they are swapped where it is, before it.
        leaves: attributes of a layer that do not move to the one in its place.
        layout: how its weights are stored in formats of matrices.
    """

    name: str
    floats: tuple[type[nn.Module], ...]
    titles: tuple[str, ...] = ()
    quantized: tuple[type[nn.Module], ...]
    observed: tuple[type[nn.Module], ...] = ()
    training: tuple[type[nn.Module], ...] = ()
    shares: bool = False
    held_as: str = ""
    when_named: str = ""
    standard: bool = False
    skips_computed: bool = False
    holds: frozenset[str] = frozenset()
    calls: tuple[str, ...] = ()
    leaves: frozenset[str] = frozenset({"points", "qat", "scheme", "smooth"})
    layout: Layout = MATRIX

    # -- which layers, in which form --------------------------------------------------------------

    def takes(self, module: nn.Module) -> bool:
        """Whether a module is of this kind, in any form, also as a subclass."""
        return isinstance(module, (*self.floats, *self.quantized, *self.observed, *self.training))

    def is_quantized(self, module: nn.Module) -> bool:
        return isinstance(module, self.quantized)

    def is_observed(self, module: nn.Module) -> bool:
        return isinstance(module, self.observed)

    def is_training(self, module: nn.Module) -> bool:
        return isinstance(module, self.training)

    # -- what keeps a layer float -----------------------------------------------------------------

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        """Why a layer that was picked is not for this call, without that being an error; `named` if
        a pattern means this one.
        """
        if type(module) not in self.floats:
            titles = " or ".join(self.titles)
            return f"{type(module).__name__} is a subclass of {titles} with a meaning of its own"
        if training:
            return f"there is no {self.name} layer that trains in low precision"
        return None if named else self.when_named or None

    def names(self, module: nn.Module) -> Iterable[str]:
        """The parameters that a plain layer has, None included; one with more is refused."""
        return ("weight", "bias")

    def keeps(self, module: nn.Module) -> Iterable[str]:
        """The buffers of a layer that the one in its place has too."""
        return ()

    def weights(self, module: nn.Module) -> dict[str, Any]:
        """The parameters of a float layer that are to be quantised."""
        return {n: p for n, p in module._parameters.items() if n.startswith("weight")}

    def why_not(self, module: nn.Module, scheme: str) -> str | None:
        """Why a scheme cannot hold the layer's weights, by their sizes."""
        for weight in self.weights(module).values():
            rows, columns = self.layout.matrix(weight.shape)
            if (reason := get_scheme(scheme).why_not_linear(columns, rows)) is not None:
                return reason
        return None

    def why_untied(self, other: Kind) -> str | None:
        """Why a layer keeps no weight in common with one of another kind, or its own; None where it
        does.
        """
        if other is not self and not (
            other.shares and self.held_as and self.held_as == other.held_as
        ):
            return "that layer holds it in another form"
        return None if self.shares else f"{self.name} layers do not share codes"

    # -- from form to form ------------------------------------------------------------------------

    def quantize(self, layer: nn.Module, scheme: str, own: Own) -> Any:
        """The quantised layer that replaces a float or observed one; `scheme` is that of the
        call, and for an observed layer the one that it was observed for.
        """
        raise NotImplementedError

    def train(self, layer: nn.Module, scheme: str | None, own: Own) -> nn.Module:
        """The training layer around the parameters of a float one; with None the float layer."""
        raise NotImplementedError

    def observe(self, layer: nn.Module, how: Observation, own: Own) -> nn.Module:
        """The observed layer that replaces a float one, or one observed otherwise."""
        raise NotImplementedError

    def points(self, layer: nn.Module, how: Observation) -> list[str]:
        """The names of the parts that `observe` would observe."""
        return []

    def check_observation(self, layer: nn.Module, how: Observation) -> None:
        """Raise what `observe` would raise."""

    def require_ranges(self, layer: nn.Module) -> None:
        """Raise a ValueError unless each part of an observed layer has a range."""

    def after(self, who: str, model: nn.Module) -> None:
        """What else a model needs once `who`, a verb, has swapped its layers."""

    # -- as others see it -------------------------------------------------------------------------

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        """Of a layer's weight, in any form, for `summary`."""
        sizes: Any = layer
        return tuple(sizes.weight.shape)

    def op(self, layer: type[nn.Module]) -> str:
        """What schemes call the op of a float class: `"linear"`, `"lstm"`, `"embedding_bag"`."""
        name = layer.__name__.removesuffix("Cell")
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()

    def sample(self, layer: type[nn.Module], size: int) -> tuple[nn.Module, torch.Tensor]:
        """A float layer of a class with `size` inputs and outputs, and an input, for the docs and
        tests that go over all kinds.
        """
        return layer(size, size), torch.randn(3, size)

    def remarks(self, model: nn.Module) -> dict[str, str]:
        """What `summary` is to add to the rows of layers of this kind, by their names."""
        return {}


_KINDS: list[Kind] = []


def register_kind(kind: Kind) -> Kind:
    """Make a kind of layer known to all verbs; returns it.

    The last one that was registered is asked first, so that a kind may take layers from a more
    general one.

    Raises:
        TypeError: `kind` is not a `Kind`.
        ValueError: another one has its name.
    """
    if not isinstance(kind, Kind):
        raise TypeError(f"qnn.register_kind takes a qnn.Kind, got {type(kind).__name__}.")
    if any(kind.name == known.name for known in _KINDS):
        raise ValueError(f"qnn.register_kind: there is a kind {kind.name!r} already.")
    _KINDS.insert(0, kind)
    return kind


def unregister_kind(kind: Kind) -> None:
    """Remove a kind."""
    _KINDS.remove(kind)


def known_kinds() -> tuple[Kind, ...]:
    """All kinds, in the order in which they were registered."""
    return tuple(reversed(_KINDS))


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer in any form; None for any other module."""
    return next((kind for kind in _KINDS if kind.takes(module)), None)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantised layer."""
    kind = kind_of(module)
    return kind is not None and kind.is_quantized(module)


def is_training(module: nn.Module) -> bool:
    """Whether a module is a layer that trains in low precision."""
    kind = kind_of(module)
    return kind is not None and kind.is_training(module)


def is_prepared(module: nn.Module) -> bool:
    """Whether a module is a layer that has observation points."""
    kind = kind_of(module)
    return kind is not None and kind.is_observed(module)


def is_swapped(module: nn.Module) -> bool:
    """Whether a module is a layer that a verb has made."""
    return is_quantized(module) or is_training(module) or is_prepared(module)


def owners(modules: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """The layer that calls or reads another one inside of it, by the id of the other."""
    return {
        id(inner): module
        for module in modules
        if (kind := kind_of(module)) is not None
        for name in kind.calls
        if (inner := module._modules.get(name)) is not None
    }


def titles() -> str:
    """`nn.Linear, nn.LSTM or nn.GRU`: what the verbs look for."""
    *first, last = [title for kind in known_kinds() for title in kind.titles]
    return f"{', '.join(first)} or {last}" if first else last


def qualified(kind: type) -> str:
    """`torch.nn.modules.conv.Conv2d`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of the module itself."""
    held = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in held if tensor is not None]


def waits(module: nn.Module) -> bool:
    """Whether the module takes its sizes from an input that it has not seen yet."""
    return any(map(is_lazy, own_tensors(module)))


__all__ = [
    "Kind",
    "Observation",
    "Own",
    "is_prepared",
    "is_quantized",
    "is_swapped",
    "is_training",
    "kind_of",
    "known_kinds",
    "own_tensors",
    "owners",
    "qualified",
    "register_kind",
    "titles",
    "unregister_kind",
    "waits",
]
