"""Swapping modules of a model: which ones, and how. `convert` and `prepare` are built on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import nn

from qnn import patterns
from qnn.forking import return_threads
from qnn.patterns import Pattern, Patterns

ModelT = TypeVar("ModelT", bound=nn.Module)
# Hands over what a new module takes from the old one: as it is, or copied.
Own = Callable[[Any], Any]
Make = Callable[[nn.Module, Own], nn.Module]

# Where a module that was left alone keeps the reason; `summary` reads it.
REASON = "_qnn_reason"


@dataclass
class Plan:
    """What a verb will do, decided before anything is changed. Modules are keyed by identity: they
    may be shared.

    Attributes:
        schemes: of the modules that will be swapped.
        reasons: why the others are left alone.
        unsupported: modules that were asked for and cannot be had, by name, with the reason.
    """

    schemes: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)


def select(
    who: str,
    modules: dict[str, nn.Module],
    candidates: Iterable[str],
    rules: list[tuple[Pattern, str | None]],
    include: Patterns | None,
    exclude: Patterns | None,
) -> tuple[Plan, dict[str, str]]:
    """The scheme of each candidate that the patterns pick, by name; the plan has the reasons of the
    others.
    """
    included, excluded = patterns.as_list(include), patterns.as_list(exclude)
    patterns.check(who, "include", included, modules)
    patterns.check(who, "exclude", excluded, modules)
    plan, selected = Plan(), dict[str, str]()
    for name in candidates:
        key = id(modules[name])
        out = next((p for p in excluded if patterns.matches(p, name, modules)), None)
        schemes = [rule for pattern, rule in rules if patterns.matches(pattern, name, modules)]
        if include is not None and not any(patterns.matches(p, name, modules) for p in included):
            plan.reasons[key] = "matches no include pattern"
        elif out is not None:
            plan.reasons[key] = f"matches the exclude pattern {patterns.describe(out)}"
        elif not schemes:
            plan.reasons[key] = "matches no pattern of the scheme map"
        elif schemes[-1] is None:
            plan.reasons[key] = "the scheme map says None"
        else:
            selected[name] = schemes[-1]
    # A shared module is swapped under each of its names or under none.
    return plan, {n: s for n, s in selected.items() if id(modules[n]) not in plan.reasons}


def raise_unsupported(plan: Plan, who: str, verb: str, mend: str) -> None:
    """Raise if layers that were asked for cannot be had, each with its reason."""
    if plan.unsupported:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in plan.unsupported.items())
        raise ValueError(
            f"{who}: {len(plan.unsupported)} layer(s) cannot be {verb}:\n{listed}\n{mend}"
        )


def swapped(model: ModelT, plan: Plan, make: Make, *, inplace: bool) -> ModelT:
    """The model with `make(module, own)` in the place of each module of the plan, made once a
    module.
    """
    made: dict[int, nn.Module] = {}

    def once(module: nn.Module, own: Own) -> nn.Module:
        if id(module) not in made:
            made[id(module)] = _with_the_rest(module, make(module, own), own)
        return made[id(module)]

    try:
        return _in_place(model, plan, once) if inplace else _copied(model, plan, once)
    finally:
        return_threads()


_MODULE = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
# What a recurrent layer derives from its float parameters, and what observing has added.
_LEFT_BEHIND = {"_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights", "qat"}


def _with_the_rest(old: nn.Module, new: nn.Module, own: Own) -> nn.Module:
    """`new` with hooks, their bookkeeping, and whatever users have hung on the old module. Shared
    dicts keep hook handles alive.
    """
    for key, value in vars(old).items():
        if key in _MODULE or (key not in vars(new) and key not in {REASON, *_LEFT_BEHIND}):
            new.__dict__[key] = own(value)
    return new


def _in_place(model: ModelT, plan: Plan, make: Make) -> ModelT:
    if id(model) in plan.schemes:
        return cast(ModelT, make(model, lambda value: value))
    # Nothing here may hold an old module once it is replaced: peak memory is the old model and one
    # layer.
    for parent in [module for module in model.modules() if id(module) not in plan.schemes]:
        for name in parent._modules:
            child = parent._modules[name]
            if child is not None and id(child) in plan.schemes:
                parent._modules[name] = make(child, lambda value: value)
            del child
        if id(parent) in plan.reasons:
            setattr(parent, REASON, plan.reasons[id(parent)])
    return model


def _copied(model: ModelT, plan: Plan, make: Make) -> ModelT:
    # deepcopy asks its memo first, so the float weights are never copied.
    memo: dict[int, Any] = {}
    for module in model.modules():
        if id(module) in plan.schemes:
            memo[id(module)] = make(module, lambda value: copy.deepcopy(value, memo))
    result = copy.deepcopy(model, memo)
    for module in model.modules():
        if id(module) in plan.reasons:
            setattr(memo[id(module)], REASON, plan.reasons[id(module)])
    return result


def leave_fast_path(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Keep torch's fused encoder kernel, which reads the raw weights of its linears, off layers
    that have been swapped.
    """
    for module in model.modules():
        encoder = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)
        if encoder and any(isinstance(child, kinds) for child in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0  # type: ignore[assignment]
