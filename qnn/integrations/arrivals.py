"""Layers that are quantised one by one, as a reader brings the tensors of a float checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from qnn.kernels import get_scheme
from qnn.kinds import Kind, kind_of, owners
from qnn.nn.base import Quantized
from qnn.nn.values import frozen
from qnn.verbs.checks import why_not
from qnn.verbs.convert import SchemeMap, maker, planned
from qnn.verbs.plan import REASON, InPlace, Plan, swapped

NEW = "it is new: its weight is not in the checkpoint"


@dataclass
class Tensor:
    """A tensor of a checkpoint: the layers that it is for, with the parameter, and its names."""

    places: list[tuple[int, str]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


class Arrivals:
    """What `qnn.convert` does to a model, done while its tensors arrive.

    The model is a skeleton on the meta device. A layer of the plan stays the float layer until all
    of its tensors are there; then `convert`'s own maker makes the quantised one, and the floats are
    let go. So a float copy is never of more than these layers, and what is made is what `convert`
    makes.
    """

    def __init__(
        self,
        model: nn.Module,
        scheme: str | SchemeMap,
        *,
        exclude: list[str] | None,
        on_unsupported: str,
        tied: Mapping[str, str],
    ) -> None:
        """`tied` are the ties that the model will have, `{target: source}`, of names of weights."""
        self.model, self.skip = model, on_unsupported == "skip"
        held = _tie(model, tied)
        try:
            self.plan = planned(model, scheme, exclude=exclude, on_unsupported=on_unsupported)
            self.places = InPlace(model, self.plan, "qnn.convert")
            self.owners = {k: id(m) for k, m in owners(model.modules()).items()}
            known: dict[int, Tensor] = {}
            same: dict[tuple[int, str], Tensor] = {}
            for key, module in self.places.current.items():
                for leaf, parameter in _own(module).items():
                    same[key, leaf] = known.setdefault(id(parameter), Tensor())
                    same[key, leaf].places.append((key, leaf))
        finally:
            for parent, leaf, parameter in held:
                parent._parameters[leaf] = parameter
        self.waiting = set(self.places.current)
        # Parameters that are tied to those of other modules, and do not arrive: biases of heads.
        self.elsewhere = set[tuple[int, str]]()
        self.names: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if (key := id(module)) in self.waiting:
                self.names.setdefault(key, name)
                for leaf in _own(module):
                    full = f"{name}.{leaf}" if name else leaf
                    self.tensors[full] = same[key, leaf]
                    same[key, leaf].names.add(full)
                    if full in tied and len(same[key, leaf].places) == 1:
                        self.elsewhere.add((key, leaf))
        self.untied: set[str] = set()
        self.refused: dict[str, str] = {}
        self.left: dict[str, str] = {}

    def expects(self, name: str) -> bool:
        """Whether a tensor is one of a layer that is to be quantised."""
        return name in self.tensors

    def is_done(self, name: str) -> bool:
        """Whether it is one of a layer that has been quantised."""
        found = self.tensors.get(name)
        return found is not None and not any(key in self.waiting for key, _ in found.places)

    def is_shared(self, name: str) -> bool:
        """Whether it is stored with that of another layer already."""
        return self.is_done(name) and len(self.tensors[name].places) > 1

    def parameter(self, name: str) -> torch.Tensor:
        """The float parameter that a tensor is for, while its layer waits."""
        key, leaf = self.tensors[name].places[0]
        return cast(torch.Tensor, self.places.current[key]._parameters[leaf])

    def bytes_of(self, name: str) -> float:
        """The bytes of an element of a tensor, once it is quantised."""
        key, leaf = self.tensors[name].places[0]
        module = self.places.current[key]
        kind = cast(Kind, kind_of(module))
        if leaf not in kind.weights(module):
            return self.parameter(name).element_size()
        *rows, columns = kind.weights(module)[leaf].shape
        form = get_scheme(cast(str, self.plan.schemes[key])).weight
        sizes = ((part, part.shape(math.prod(rows), columns)) for part in form.parts)
        count = sum(math.prod(shape) * part.dtype.itemsize for part, shape in sizes)
        return float(count / (math.prod(rows) * columns))

    def take(self, name: str, value: torch.Tensor) -> set[str]:
        """Put a tensor where it belongs, and quantise what is complete; returns the names that it
        has in the model, none for one that the reader is to put there itself.
        """
        found = self.tensors.get(name)
        if found is None:
            return set()  # its layer was left alone meanwhile
        if self.is_done(name):
            return found.names if self._again(name, value) else set()
        if self.parameter(name).shape != value.shape:
            reason = f"its {found.places[0][1]} has other sizes in the checkpoint"
            self._leave({key for key, _ in found.places}, reason)
            return set()
        parameter = _loaded(nn.Parameter(value, requires_grad=value.is_floating_point()))
        for key, leaf in found.places:
            self.places.current[key]._parameters[leaf] = parameter
        ready = [key for key, _ in found.places]
        self._quantise([*ready, *(self.owners[key] for key in ready if key in self.owners)])
        return found.names

    def _is_ready(self, key: int) -> bool:
        inside = any(o == key and k in self.waiting for k, o in self.owners.items())
        if key not in self.waiting or inside:
            return False
        own = _own(self.places.current[key]).items()
        return not any(p.is_meta for leaf, p in own if (key, leaf) not in self.elsewhere)

    def _quantise(self, keys: list[int]) -> None:
        make = maker(self.plan, False)  # one for layers that are tied
        for key in keys:
            if not self._is_ready(key):
                continue
            module = self.places.current[key]
            reason = why_not(module, cast(str, self.plan.schemes[key]))
            if reason is not None:
                if not self.skip:
                    self.refused[self.names[key]] = reason
                self._leave({key}, reason)
                continue
            self.waiting.discard(key)
            for parameter in _own(self.places.swap(key, make)).values():
                _loaded(parameter)

    def _leave(self, keys: set[int], reason: str) -> None:
        for key in keys & self.waiting:
            module = self.places.current[key]
            setattr(module, REASON, reason)
            self.left[self.names[key]] = reason
        self.waiting -= keys
        for found in list(self.tensors.values()):
            if any(key in keys for key, _ in found.places):
                for name in found.names:
                    self.tensors.pop(name, None)

    def _again(self, name: str, value: torch.Tensor) -> bool:
        """A tensor of a layer that is quantised already, by a weight that it is tied to: where the
        file has another one, the two are not tied. False for a bias.
        """
        owner, _, leaf = name.rpartition(".")
        layer = cast(Quantized, self.model.get_submodule(owner))
        if leaf not in layer._weight_shapes():
            return False
        read = layer._read_state({leaf: value})
        if any(not torch.equal(cast(Any, layer._parameters[n]), p) for n, p in read.items()):
            self.untied |= self.tensors[name].names
            for part, each in read.items():
                layer._parameters[part] = _loaded(frozen(each))
        return True

    def raise_refused(self, who: str) -> None:
        """Raise if layers that were asked for could not be quantised, each with its reason."""
        if self.refused:
            listed = "\n".join(f"  {name}: {reason}" for name, reason in self.refused.items())
            raise ValueError(
                f"qnn: {len(self.refused)} layer(s) of {who} cannot be quantised:\n{listed}\n"
                "Name them in modules_to_not_convert, or pass on_unsupported='skip'."
            )

    def finish(self, missing: Iterable[str]) -> None:
        """Convert what could not be while tensors arrived, and say what stays float; `missing` are
        the names that the checkpoint did not have.
        """
        absent = set(missing)
        for key in sorted(self.waiting, key=lambda key: self.names[key]):
            module, name = self.places.current[key], self.names[key]
            weights = cast(Kind, kind_of(module)).weights(module)
            wanted = [f"{name}.{leaf}" if name else leaf for leaf in weights]
            if any(self.tensors[full].names <= absent for full in wanted):
                self._leave({key}, NEW)
            elif (reason := why_not(module, cast(str, self.plan.schemes[key]))) is not None:
                if not self.skip:
                    raise ValueError(f"qnn.convert: {name} cannot be converted: {reason}")
                self._leave({key}, reason)
        schemes = {key: self.plan.schemes[key] for key in self.waiting}
        if schemes:
            rest = Plan(schemes, {})
            swapped(self.model, rest, maker(rest, False), inplace=True, who="qnn.convert")


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in module._parameters.items() if each is not None}


def _loaded(parameter: Any) -> nn.Parameter:
    """Marked as transformers marks what it does not have to draw."""
    parameter._is_hf_initialized = True
    return cast(nn.Parameter, parameter)


def _tie(model: nn.Module, tied: Mapping[str, str]) -> list[tuple[nn.Module, str, Any]]:
    """Tie a skeleton as the model will be; returns what it held."""
    held = []
    for target, source in tied.items():
        owner, _, leaf = target.rpartition(".")
        with suppress(AttributeError):
            parent, parameter = model.get_submodule(owner), model.get_parameter(source)
            held.append((parent, leaf, parent._parameters.get(leaf)))
            parent._parameters[leaf] = parameter
    return held


def layers_of(model: nn.Module) -> dict[str, Quantized]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Quantized)}


def dequantize(model: nn.Module) -> None:
    """Put the float layers back, with the weights that the stored ones stand for."""
    made: dict[int, nn.Module] = {}
    for name, layer in reversed(list(model.named_modules(remove_duplicate=False))):
        if isinstance(layer, Quantized):
            made[id(layer)] = made.get(id(layer)) or layer.dequantize()
            model.set_submodule(name, made[id(layer)])


def excluded(model: nn.Module, given: list[str] | None) -> list[str]:
    """The modules of a model that `modules_to_not_convert` means.

    Raises:
        ValueError: a name that is none of the model's.
    """
    known, found = [name for name, _ in model.named_modules() if name], list[str]()
    for name in given or ():
        # As transformers lists what it would leave alone: names of parameters among them.
        plain = name.removesuffix(".weight").removesuffix(".bias")
        mine = [n for n in known if fnmatchcase(n, plain) or fnmatchcase(n, f"*.{plain}")]
        if not mine:
            raise ValueError(
                f"qnn.QnnConfig: modules_to_not_convert has {name!r}, which is not a module of "
                f"{type(model).__name__}. It takes names of model.named_modules(), or their last "
                "parts, with wildcards *, ? and [seq]."
            )
        found += mine
    return found
