"""Swapping modules of a model: which ones, and how. `convert` and `prepare` are built on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

from torch import nn

from qnn.kernels.cpu.forking import return_threads
from qnn.kernels.schemes import DEFAULT_SCHEME
from qnn.kinds import Kind, Own, is_swapped, kind_of, known_kinds, waits
from qnn.verbs import patterns, references
from qnn.verbs.patterns import Pattern, Patterns
from qnn.verbs.progress import Meter

ModelT = TypeVar("ModelT", bound=nn.Module)
Make = Callable[[nn.Module, Own], nn.Module]

# Where a module that was left alone keeps the reason; `summary` reads it.
REASON = "_qnn_reason"
# Where a layer keeps the names of what was folded into it; `summary` reads it too.
FOLDED = "_qnn_folded"
# In the `meta` of a graph: why nodes that are no modules stay float, by the node in words.
LEFT = "qnn_left"


@dataclass
class Plan:
    """What a verb will do, decided before anything is changed. Modules are keyed by identity: they
    may be shared.

    Attributes:
        schemes: of the modules that will be swapped; None for a training layer that becomes a
            float layer again.
        reasons: why the others are left alone.
        unsupported: modules that were asked for and cannot be swapped, by name, with the reason.
    """

    schemes: dict[int, str | None] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)


class Choice(NamedTuple):
    """The scheme of a module, and whether a pattern names it or its class, and not all layers."""

    scheme: str
    named: bool


# The reason of a module that a scheme map leaves alone.
FLOAT = "the scheme map says None"
# How the reasons begin that patterns give.
ASKED = (FLOAT, "matches ")


def select(
    who: str,
    modules: dict[str, nn.Module],
    candidates: Iterable[str],
    rules: list[tuple[Pattern, str | None]],
    include: Patterns | None,
    exclude: Patterns | None,
) -> tuple[Plan, dict[str, Choice]]:
    """What the patterns choose for each candidate that they pick, by name; the plan has the reasons
    of the others.
    """
    included, excluded = patterns.as_list(include), patterns.as_list(exclude)
    patterns.check(who, "include", included, modules)
    patterns.check(who, "exclude", excluded, modules)
    plan, selected = Plan(), dict[str, Choice]()
    everything = [*included, *excluded, *(pattern for pattern, _ in rules)]
    for name in candidates:
        key = id(modules[name])
        kind = cast(Kind, kind_of(modules[name]))
        if kind.when_named and not any(patterns.names(p, name, modules) for p in everything):
            plan.reasons[key] = kind.why_left(modules[name], DEFAULT_SCHEME) or kind.when_named
            continue
        out = next((p for p in excluded if patterns.matches(p, name, modules)), None)
        schemes = [rule for pattern, rule in rules if patterns.matches(pattern, name, modules)]
        if include is not None and not any(patterns.matches(p, name, modules) for p in included):
            plan.reasons[key] = "matches no include pattern"
        elif out is not None:
            plan.reasons[key] = f"matches the exclude pattern {patterns.describe(out)}"
        elif not schemes:
            plan.reasons[key] = "matches no pattern of the scheme map"
        elif schemes[-1] is None:
            plan.reasons[key] = FLOAT
        else:
            picked = [*included, *(pattern for pattern, _ in rules)]
            named = any(patterns.names(pattern, name, modules) for pattern in picked)
            selected[name] = Choice(schemes[-1], named)
    # A shared module is swapped under each of its names or under none.
    return plan, {n: s for n, s in selected.items() if id(modules[n]) not in plan.reasons}


def raise_unsupported(plan: Plan, who: str, verb: str, fix: str) -> None:
    """Raise if layers that were asked for cannot be swapped, each with its reason."""
    if plan.unsupported:
        listed = "\n".join(f"  {n or 'model'}: {reason}" for n, reason in plan.unsupported.items())
        raise ValueError(
            f"{who}: {len(plan.unsupported)} layer(s) cannot be {verb}:\n{listed}\n{fix}"
        )


def swapped(
    model: ModelT,
    plan: Plan,
    make: Make,
    *,
    inplace: bool,
    who: str,
    share: bool = False,
    progress: bool | str = False,
) -> ModelT:
    """The model with `make(module, own)` instead of each module of the plan, made once a
    module, wherever the model names it.

    Args:
        model, plan, make: what is changed, and how.
        inplace: change `model` itself; otherwise it is copied.
        who: the verb, for errors.
        share: the copy has the parameters and buffers of `model` themselves.
        progress: a line on stderr after two seconds, as in `calibrate`.

    Raises:
        ValueError: something in the model names a layer and cannot be made to name another, or the
            model cannot be copied. Nothing has been changed then.
    """
    meter = Meter(who, "layer", len(plan.schemes), progress, after=2.0)
    try:
        if inplace:
            return _in_place(model, plan, make, who, meter)
        return _copied(model, plan, make, who, meter, share=share)
    finally:
        return_threads()


_MODULE = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}


def _with_the_rest(old: nn.Module, new: nn.Module, own: Own) -> None:
    """Move hooks, their bookkeeping, and whatever users have hung on the old module. Shared dicts
    keep hook handles alive.
    """
    kind = kind_of(old)
    left = {REASON, *(kind.leaves if kind else vars(old))}
    for key, value in vars(old).items():
        if key in _MODULE or (key not in vars(new) and key not in left):
            new.__dict__[key] = own(value)


class InPlace:
    """Puts other layers in the places of those of a plan, in the model itself, one at a time."""

    def __init__(self, model: nn.Module, plan: Plan, who: str) -> None:
        """Nothing is changed yet but the reasons of what is left alone.

        Raises:
            ValueError: something names a layer of the plan and cannot be changed.
        """
        # By the ids of the float layers, what stands for each now. Nothing here holds a layer that
        # is replaced: peak memory is the old model and one layer.
        self.current = {id(m): m for m in model.modules() if id(m) in plan.schemes}
        self.plan, self._found = plan, references.find(model, self.current)
        _raise_fixed(model, self.current, self._found, who)
        for module in model.modules():
            if id(module) in plan.reasons and id(module) not in self.current:
                setattr(module, REASON, plan.reasons[id(module)])

    def swap(self, key: int, make: Make) -> nn.Module:
        """Put `make(old, own)` wherever the model names the layer with the id `key`."""
        old = self.current[key]
        new = make(old, lambda value: value)
        _with_the_rest(old, new, lambda value: value)
        compiled = vars(new).get(_COMPILED)
        self._put(key, new, references.Replace({key: new}, {key: type(old)}, None))
        if compiled is not None and vars(new)[_COMPILED] is compiled:
            del new.__dict__[_COMPILED]  # it would go on calling the old layer
        if key in self.plan.reasons:
            setattr(new, REASON, self.plan.reasons[key])
        return new

    def _put(self, key: int, new: nn.Module, change: Callable[[Any], Any]) -> None:
        self.current[key] = new
        for place in self._found.places.get(key, ()):
            references.put(place, self.current, change)


def _in_place(model: ModelT, plan: Plan, make: Make, who: str, meter: Meter) -> ModelT:
    places = InPlace(model, plan, who)
    for key in meter.each(list(reversed(places.current))):  # what is inside of a layer before it
        places.swap(key, make)
    return cast(ModelT, places.current.get(id(model), model))


# What `module.compile()` leaves on a module.
_COMPILED = "_compiled_call_impl"


def _raise_fixed(
    model: nn.Module, targets: dict[int, nn.Module], found: references.References, who: str
) -> None:
    """Raise if something names a layer and cannot be changed."""
    names = {id(module): name for name, module in model.named_modules()}
    for place, key in found.fixed:
        raise ValueError(
            f"{who}: {place} names the layer {names[key]!r} in a form that cannot be changed; "
            "remove it, or name the layer by its name. A copy (inplace=False) may do as well."
        )
    for name, module in model.named_modules():
        if references.stuck(module, targets, copied=False):
            raise ValueError(_own_forward(who, name))


def _own_forward(who: str, name: str) -> str:
    return (
        f"{who}: the forward of {name or 'the model'} would go on calling the float layers, which "
        "it finds outside of the model: in a global variable, its class or another object. Let it "
        "begin at the model (self), or, if it was set on the model itself, set it after converting."
    )


def _copied(
    model: ModelT, plan: Plan, make: Make, who: str, meter: Meter, *, share: bool
) -> ModelT:
    # deepcopy asks its memo first, so the float weights are never copied.
    memo: dict[int, Any] = {}
    if share:
        memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}

    def own(value: Any) -> Any:
        return copy.deepcopy(value, memo)

    originals = {id(module): module for module in model.modules()}
    made: dict[int, nn.Module] = {}
    targets = [key for key in originals if key in plan.schemes]
    for key in meter.each(targets[::-1]):  # what is inside of a layer before it
        made[key] = memo[key] = make(originals[key], own)
        memo[id(made[key])] = made[key]
    try:
        for key, new in made.items():
            old = originals[key]
            itself = references.Replace({key: new}, {key: type(old)}, None)
            _with_the_rest(old, new, lambda value, itself=itself: own(itself(value)))  # type: ignore[misc]
            new.__dict__.pop(_COMPILED, None)  # as deepcopy leaves it out
        result = own(model)
    except Exception as error:
        raise ValueError(_why_no_copy(model, who, error)) from error
    _follow_copies(result, originals, made, memo)
    for name, module in result.named_modules():
        if references.stuck(module, originals, copied=True):
            raise ValueError(_own_forward(who, name))
    for key in originals:
        if key in plan.reasons:
            setattr(memo[key], REASON, plan.reasons[key])
    return cast(ModelT, result)


def _follow_copies(
    result: nn.Module,
    originals: dict[int, nn.Module],
    made: dict[int, nn.Module],
    memo: dict[int, Any],
) -> None:
    """What deepcopy leaves as it is: closures and weak references, which still name the modules
    that were copied, and bound methods, which still have the function of the float layer.
    """
    new = {id(layer): layer for layer in made.values()}
    kinds = {key: type(originals[key]) for key in made}
    kinds |= {id(layer): type(originals[key]) for key, layer in made.items()}
    own = set(map(id, memo.values()))
    found = references.find(result, originals | new, own)
    copies = {key: memo[key] for key in originals if key in memo}
    change = references.Replace(copies | new, kinds, own)
    for places in found.places.values():
        for place in places:
            references.put(place, new, change)


def _why_no_copy(model: nn.Module, who: str, error: Exception) -> str:
    """Which attribute of which module `copy.deepcopy` fails on."""
    waiting = [name for name, module in model.named_modules() if waits(module)]
    if waiting:
        return (
            f"{who}: the model cannot be copied: {', '.join(waiting)} took no input yet and so has "
            "no sizes; run one batch first."
        )
    place, error = _uncopied(model) or (type(model).__name__, error)
    first = str(error).strip().partition("\n")[0]
    return (
        f"{who}: the model cannot be copied: {place} raises {type(error).__name__}: {first} "
        "Pass inplace=True to change the model itself, or remove the attribute first."
    )


def _uncopied(model: nn.Module) -> tuple[str, Exception] | None:
    kept: dict[int, Any] = {id(p): p for p in model.parameters() if p.is_leaf}
    kept |= {id(module): module for module in model.modules()}
    for name, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers}
        for key in [key for key in held if key not in ("_modules", "_parameters", "_buffers")]:
            try:
                copy.deepcopy(held[key], dict(kept))
            except Exception as error:  # whatever a __deepcopy__ raises
                kind = type(held[key]).__name__
                return f"the attribute {key!r} ({kind}) of {name or 'the model'}", error
    return None


Hook = Callable[[str, nn.Module], None]
_HOOKS: list[Hook] = []


def after_swap(hook: Hook) -> Hook:
    """Have `hook` called with the verb and the model at the end of each `convert` and `prepare`."""
    _HOOKS.append(hook)
    return hook


def run_hooks(who: str, model: nn.Module) -> None:
    """What a model needs once layers of it have been swapped."""
    leave_fast_path(model)
    for kind in known_kinds():
        kind.after(who, model)
    for hook in _HOOKS:
        hook(who, model)


def leave_fast_path(model: nn.Module) -> None:
    """Keep torch's fused encoder kernel, which reads the raw weights of its linears, off layers
    that have been swapped.
    """
    for module in model.modules():
        encoder = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)
        if encoder and any(is_swapped(child) for child in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0  # type: ignore[assignment]
