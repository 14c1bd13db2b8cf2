"""Trying out: layers that are quantised for a while, in the model itself, and put back exactly."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from qnn import kinds
from qnn.calibration.fake_quantize import observation_points
from qnn.calibration.statistics import Statistics
from qnn.kernels.cpu.forking import return_threads
from qnn.kinds import kind_of, own_tensors
from qnn.verbs import patterns, references
from qnn.verbs.calibrate import observes, remember_buffers
from qnn.verbs.compare import evaluating
from qnn.verbs.inventory import nbytes
from qnn.verbs.patterns import Patterns
from qnn.verbs.plan import InPlace, Make, Plan

# Runs a function of the model without a trace.
Run = Callable[[Callable[[], Any]], Any]
EvalFn = Callable[[nn.Module], Any]
# `maker` of `convert`: what makes the layers of a plan.
MakerOf = Callable[[Plan, bool], Make]


@dataclass(frozen=True, eq=False)
class Unit:
    """Layers that are quantised together, by the ids of the float ones, inner before outer."""

    name: str
    keys: tuple[int, ...]
    schemes: Mapping[str, str]
    """By the layers' names."""


def units_of(
    who: str, model: nn.Module, plan: Plan, groups: Mapping[str, Patterns] | None = None
) -> list[Unit]:
    """The layers of a plan, one a unit; those of a group, those that share a weight, and one that
    calls another inside of it, are one.

    Raises:
        ValueError: a pattern of `groups` matches nothing, or a group has no layer of the plan.
    """
    layers = {name: m for name, m in model.named_modules() if plan.schemes.get(id(m)) is not None}
    modules = dict(model.named_modules(remove_duplicate=False))
    label = {id(layer): index for index, layer in enumerate(layers.values())}

    def join(keys: list[int]) -> None:
        old = {label[key] for key in keys}
        label.update({key: min(old) for key, each in label.items() if each in old})

    users: dict[int, list[int]] = {}
    for layer in layers.values():
        for weight in cast(kinds.Kind, kind_of(layer)).weights(layer).values():
            users.setdefault(id(weight), []).append(id(layer))
    for sharing in users.values():
        join(sharing)
    for key, owner in kinds.owners(layers.values()).items():
        if key in label and id(owner) in label:
            join([key, id(owner)])
    titles: dict[int, str] = {}
    for title, given in (groups or {}).items():
        chosen = patterns.as_list(given)
        patterns.check(who, f"groups[{title!r}]", chosen, modules)
        keys = [
            id(layer)
            for name, layer in layers.items()
            if any(patterns.matches(pattern, name, modules) for pattern in chosen)
        ]
        if not keys:
            raise ValueError(f"{who}: groups[{title!r}] has no layer that is to be quantised.")
        join(keys)
        titles[keys[0]] = title
    named = {label[key]: title for key, title in titles.items()}
    result = []
    for each in dict.fromkeys(label.values()):
        mine = {name: layer for name, layer in layers.items() if label[id(layer)] == each}
        schemes = {name: cast(str, plan.schemes[id(layer)]) for name, layer in mine.items()}
        keys = [id(layer) for layer in mine.values()][::-1]
        result.append(Unit(named.get(each, next(iter(mine))), tuple(keys), schemes))
    return result


class Trial(InPlace):
    """Quantises units in the model itself, and puts the last ones back. The float layers are held
    meanwhile, so that every place names the same object again.
    """

    def __init__(self, model: nn.Module, plan: Plan, maker: MakerOf, who: str) -> None:
        super().__init__(model, Plan(dict(plan.schemes)), who)
        self._root, self._maker = model, maker
        self._stack: list[list[tuple[int, nn.Module, nn.Module, dict[int, tuple[Any, Any]]]]] = []

    @property
    def model(self) -> nn.Module:
        """The model as it stands: another object where the model is one layer."""
        return self.current.get(id(self._root), self._root)

    def quantize(self, unit: Unit) -> None:
        make = self._maker(self.plan, False)  # one for layers that are tied
        self._stack.append([])
        for key in unit.keys:
            self.swap(key, make)

    def _put(self, key: int, new: nn.Module, change: Callable[[Any], Any]) -> None:
        kept: dict[int, tuple[Any, Any]] = {}

        def noted(value: Any) -> Any:
            made = change(value)
            kept[id(made)] = made, value
            return made

        self._stack[-1].append((key, self.current[key], new, kept))
        super()._put(key, new, noted)

    def put_back(self) -> None:
        """Undo the last `quantize`."""
        for key, old, new, kept in reversed(self._stack.pop()):
            # A value that the model itself has built meanwhile is not among those kept.
            back = references.Replace({id(new): old}, {id(new): type(new)}, None)

            def before(value: Any, kept: Any = kept, back: Any = back) -> Any:
                return kept[id(value)][1] if id(value) in kept else back(value)

            super()._put(key, old, before)

    def put_all_back(self) -> None:
        while self._stack:
            self.put_back()

    def bytes_of(self, unit: Unit) -> int:
        """Bytes of the unit's layers as they stand."""
        return bytes_of(*(self.current[key] for key in unit.keys))


def bytes_of(*modules: nn.Module) -> int:
    """Bytes of the parameters and buffers in modules, each counted once, without what calibration
    has recorded.
    """
    held = {
        id(tensor): tensor
        for module in modules
        for each in module.modules()
        if not isinstance(each, Statistics)
        for tensor in own_tensors(each)
    }
    return nbytes(held.values())


@contextmanager
def undisturbed(who: str, *models: nn.Module) -> Iterator[Run]:
    """What runs models without a trace: in evaluation mode, without gradients, each run with the
    same random numbers. Buffers that the forward writes to are put back after each run, and
    observation points neither record nor round.

    Raises:
        ValueError: a model with observers of another library.
    """
    if any(observes(module) for model in models for module in model.modules()):
        raise ValueError(
            f"{who}: the model holds observers of another library, which would record what is run "
            "here; give it the float model."
        )
    points = [
        (point, point.observing, point.rounding)
        for model in models
        for point in observation_points(model)
    ]
    buffers = [remember_buffers(model) for model in models]

    def run(function: Callable[[], Any]) -> Any:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return function()
        finally:
            for put_back in buffers:
                put_back()

    try:
        for point, _, _ in points:
            point.observing = point.rounding = False
        with evaluating(*models):
            yield run
    finally:
        for point, observing, rounding in points:
            point.observing, point.rounding = observing, rounding
        return_threads()


@contextmanager
def trying(who: str, model: nn.Module, plan: Plan, maker: MakerOf) -> Iterator[tuple[Trial, Run]]:
    """A `Trial`, and what runs the model without a trace and without torch's fused encoder, which
    reads raw weights; at the end the model is as before, whatever has been raised.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with undisturbed(who, model) as run:
        trial = Trial(model, plan, maker, who)
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield trial, run
        finally:
            trial.put_all_back()
            torch.backends.mha.set_fastpath_enabled(fast)


def evaluated(who: str, trial: Trial, run: Run, eval_fn: EvalFn) -> float:
    """What `eval_fn` gives for the model as it stands.

    Raises:
        TypeError: no number.
    """
    return number(f"{who}: eval_fn", run(lambda: eval_fn(trial.model)))


def number(who: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(
            f"{who} must return one number, higher is better, got {type(value).__name__} {value!r}."
        )
    return float(value)
