"""`convert`: swap the layers of a model for quantised ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from qnn import patterns
from qnn.compressed_tensors import describe
from qnn.kernels import get_scheme, training_scheme
from qnn.kernels.formats import FLOATS
from qnn.linear import Linear
from qnn.patterns import Pattern, Patterns
from qnn.qlinear import QLinear, needs_calibration, not_finite

ModelT = TypeVar("ModelT", bound=nn.Module)
SchemeMap = Mapping[Pattern, str | None]

# Where a module that was left alone keeps the reason; `summary` reads it.
REASON = "_qnn_reason"


@dataclass
class _Plan:
    """What `convert` will do, decided before anything is changed. Modules are keyed by identity:
    they may be shared.
    """

    training: bool
    schemes: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)


def convert(
    model: ModelT,
    scheme: str | SchemeMap = "int8",
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    training: bool = False,
    inplace: bool = False,
    on_unsupported: Literal["error", "skip"] = "error",
) -> ModelT:
    """Replace the `nn.Linear` layers of `model` by quantised ones of `scheme`.

    They become `QLinear`; with `training=True` they become `qnn.Linear`, which keeps the float
    parameters and trains in the scheme's arithmetic. A model that was trained so is converted once
    more to be deployed.

    A pattern is a name with wildcards (`"encoder.layer.*.output"`), a module type, or a callable
    `(name, module) -> bool`; names and types pick everything inside the module that they match.
    Layers of other kinds, and subclasses of `nn.Linear` with a meaning of their own, are left
    alone; `qnn.summary` lists each with the reason.

    Modules that are shared stay shared, and so do tied weights; a layer whose weight is tied to
    something that stays float is left alone. Hooks, train or eval mode, devices and the
    `requires_grad` of other parameters are kept.

    Args:
        model: any module, also on the meta device. A bare `nn.Linear` gives a `QLinear`.
        scheme: a scheme's name, or `{pattern: scheme}`, of which the last match counts and None
            leaves a layer alone.
        include: only layers that match; all if None.
        exclude: no layers that match.
        training: make layers that train in the scheme's arithmetic, around the same parameters;
            the schemes that quantise weights alone, and int8, have none.
        inplace: change `model` itself, one layer at a time; otherwise it is copied, and untouched.
        on_unsupported: `"error"`, or `"skip"` to leave out what a scheme cannot take.

    Returns:
        The converted model: `model` itself if `inplace`, unless it is a bare `nn.Linear`.

    Raises:
        ValueError: an unknown scheme, a pattern that matches nothing, nothing to convert, or
            layers that the scheme cannot take, each named with its reason. Nothing has been
            changed then.
        TypeError: an argument of the wrong kind.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> model = convert(model, "int8", exclude="2")
    >>> type(model[0]).__name__, type(model[2]).__name__
    ('QLinear', 'Linear')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"qnn.convert takes an nn.Module, got {type(model).__name__}.")
    if on_unsupported not in ("error", "skip"):
        raise ValueError(
            f"qnn.convert: on_unsupported must be 'error' or 'skip', got {on_unsupported!r}."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    rules = _scheme_rules(scheme, modules, training)
    plan = _make_plan(modules, rules, include, exclude, training)
    if plan.unsupported and on_unsupported == "error":
        listed = "\n".join(f"  {name}: {reason}" for name, reason in plan.unsupported.items())
        raise ValueError(
            f"qnn.convert: {len(plan.unsupported)} layer(s) cannot be converted:\n{listed}\n"
            "Exclude them, or pass on_unsupported='skip' to leave them in float."
        )
    if not plan.schemes:
        raise ValueError(_nothing_to_convert(modules, plan))
    del modules  # it holds the float layers, which are to be freed one by one
    return _in_place(model, plan) if inplace else _copied(model, plan)


def _scheme_rules(
    scheme: str | SchemeMap, modules: dict[str, nn.Module], training: bool
) -> list[tuple[Pattern, str | None]]:
    """`scheme` as rules of which the last match counts."""
    if isinstance(scheme, Mapping):
        patterns.check("scheme", scheme, modules)
        rules = list(scheme.items())
        names = [name for _, name in rules if name is not None]
    else:
        rules, names = [(nn.Module, scheme)], [scheme]
    for name in names:
        try:
            training_scheme(name) if training else get_scheme(name)
        except ValueError as error:
            raise ValueError(f"qnn.convert: {error}") from None
    return rules


def _make_plan(
    modules: dict[str, nn.Module],
    rules: list[tuple[Pattern, str | None]],
    include: Patterns | None,
    exclude: Patterns | None,
    training: bool,
) -> _Plan:
    included, excluded = patterns.as_list(include), patterns.as_list(exclude)
    patterns.check("include", included, modules)
    patterns.check("exclude", excluded, modules)
    plan = _Plan(training)
    done = Linear if training else QLinear
    selected: dict[str, str] = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or isinstance(module, (QLinear, done)):
            continue
        out = next((p for p in excluded if patterns.matches(p, name, modules)), None)
        schemes = [rule for pattern, rule in rules if patterns.matches(pattern, name, modules)]
        if include is not None and not any(patterns.matches(p, name, modules) for p in included):
            plan.reasons[id(module)] = "matches no include pattern"
        elif out is not None:
            plan.reasons[id(module)] = f"matches the exclude pattern {patterns.describe(out)}"
        elif not schemes:
            plan.reasons[id(module)] = "matches no pattern of the scheme map"
        elif schemes[-1] is None:
            plan.reasons[id(module)] = "the scheme map says None"
        else:
            selected[name] = schemes[-1]
    # A shared module is converted under each of its names or under none.
    for name, chosen in selected.items():
        module = modules[name]
        reason = plan.reasons.get(id(module))
        if reason is not None:
            continue
        if type(module) not in (nn.Linear, Linear) and not hasattr(module, "parametrizations"):
            plan.reasons[id(module)] = (
                f"{type(module).__name__} is a subclass of nn.Linear with a meaning of its own"
            )
        elif (why := _why_not(module, chosen)) is not None:
            plan.unsupported[name] = plan.reasons[id(module)] = why
        else:
            plan.schemes[id(module)] = chosen
    if not training:
        _keep_ties_to_float(modules, plan)
    return plan


def _why_not(linear: nn.Module, scheme: str) -> str | None:
    """Why a selected layer cannot be converted, or None."""
    if hasattr(linear, "parametrizations"):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    extra = [*(linear._parameters.keys() - {"weight", "bias"}), *linear._buffers, *linear._modules]
    if extra or "weight" not in linear._parameters:
        return (
            "it holds more than a weight and a bias "
            f"({', '.join(extra) or 'its weight is no parameter'}): weight_norm, spectral_norm, "
            "pruning, FSDP or another quantiser; undo it first, or wrap after converting"
        )
    weight = _linear(linear).weight
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        kind = type(weight.data if type(weight) is nn.Parameter else weight).__name__
        return (
            f"its weight is a {kind}, not a plain tensor; convert before sharding, distributing or "
            "quantising otherwise"
        )
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}; {', '.join(map(str, FLOATS))} can be quantised"
    if get_scheme(scheme).static:
        return needs_calibration(scheme)
    reason = get_scheme(scheme).why_not_linear(*reversed(weight.shape))
    if reason is None and not_finite(weight) is not None:
        bad = int((~weight.detach().isfinite()).sum())
        return f"its weight holds {bad} NaN or inf of {weight.numel()} values"
    return reason


def _linear(module: nn.Module | None) -> nn.Linear:
    return cast(nn.Linear, module)


def _keep_ties_to_float(modules: dict[str, nn.Module], plan: _Plan) -> None:
    """Leave alone a layer whose weight something else uses as a float: converting it would untie
    the two.
    """
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module))
    for name, module in modules.items():
        if id(module) not in plan.schemes:
            continue
        for other, user in users[id(module._parameters["weight"])]:
            if user is not module and id(user) not in plan.schemes:
                del plan.schemes[id(module)]
                plan.reasons[id(module)] = (
                    f"its weight is tied to {other!r} ({type(user).__name__}), which stays in float"
                )
                break
            if user is not module and plan.schemes[id(user)] != plan.schemes[id(module)]:
                raise ValueError(
                    f"qnn.convert: {name!r} and {other!r} share one weight but would get the "
                    f"schemes {plan.schemes[id(module)]!r} and {plan.schemes[id(user)]!r}; give "
                    "both the same."
                )


def _nothing_to_convert(modules: dict[str, nn.Module], plan: _Plan) -> str:
    done = [module for module in modules.values() if isinstance(module, (QLinear, Linear))]
    if done:
        return (
            f"qnn.convert: nothing to convert: the model is converted already ({len(done)} "
            f"{type(done[0]).__name__}, scheme {done[0].scheme!r}). To change the scheme, convert "
            "the float model."
        )
    if plan.reasons:
        names = {id(module): name for name, module in modules.items()}
        listed = "\n".join(
            f"  {names[key] or 'model'}: {reason}" for key, reason in plan.reasons.items()
        )
        return f"qnn.convert: nothing to convert: every linear layer is left alone:\n{listed}"
    kinds = sorted({type(module).__name__ for module in modules.values() if not module._modules})
    return f"qnn.convert: nothing to convert: the model has no nn.Linear, only {', '.join(kinds)}."


class _Maker:
    """Makes the layer that stands for a float layer, once a layer, and quantises a tied weight
    once.
    """

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.made: dict[int, QLinear | Linear] = {}
        self.weights: dict[int, tuple[nn.Parameter, ...]] = {}

    def __call__(self, linear: nn.Linear, own: Callable[[Any], Any]) -> QLinear | Linear:
        """`own` hands over what the new layer takes from the old one: as it is, or copied."""
        if id(linear) not in self.made:
            scheme = self.plan.schemes[id(linear)]
            layer: QLinear | Linear
            if self.plan.training:
                layer = Linear.from_float(linear, scheme)
                layer.weight = own(linear.weight)
            else:
                layer = QLinear.from_float(linear, scheme)
                tied = self.weights.setdefault(id(linear.weight), layer.stored)
                layer._parameters.update(zip(layer._stored, tied, strict=True))
            if linear.bias is not None:
                layer.bias = own(linear.bias)
            # Hooks, their bookkeeping, and whatever users have hung on the layer. Shared dicts keep
            # hook handles alive.
            for key, value in vars(linear).items():
                if key not in _OWN_STATE:
                    layer.__dict__[key] = own(value)
            self.made[id(linear)] = layer
        return self.made[id(linear)]


# What the new layer has of its own; all other attributes are taken over from the float layer.
_OWN_STATE = frozenset(
    {"_parameters", "_buffers", "_modules", "in_features", "out_features", "scheme", REASON}
)


def _in_place(model: ModelT, plan: _Plan) -> ModelT:
    maker = _Maker(plan)
    if id(model) in plan.schemes:
        return cast(ModelT, maker(_linear(model), lambda value: value))
    # Nothing here may hold a float layer once it is replaced: peak memory is the float model and
    # one layer.
    for parent in [module for module in model.modules() if id(module) not in plan.schemes]:
        for name in parent._modules:
            if id(parent._modules[name]) in plan.schemes:
                parent._modules[name] = maker(_linear(parent._modules[name]), lambda value: value)
        if id(parent) in plan.reasons:
            setattr(parent, REASON, plan.reasons[id(parent)])
    return _finished(model)


def _copied(model: ModelT, plan: _Plan) -> ModelT:
    # deepcopy asks its memo first, so the float weights are never copied.
    memo: dict[int, Any] = {}
    maker = _Maker(plan)
    for module in model.modules():
        if id(module) in plan.schemes:
            memo[id(module)] = maker(_linear(module), lambda value: copy.deepcopy(value, memo))
    result = copy.deepcopy(model, memo)
    for module in model.modules():
        if id(module) in plan.reasons:
            setattr(memo[id(module)], REASON, plan.reasons[id(module)])
    return _finished(result)


def _finished(model: ModelT) -> ModelT:
    _leave_fast_path(model)
    describe(model)
    return model


def _leave_fast_path(model: nn.Module) -> None:
    """Keep torch's fused encoder kernel, which reads the raw weights of its linears, off layers
    that are quantised.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, (QLinear, Linear)) for child in module.modules()
        ):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(child, (QLinear, Linear)) for child in module.modules()
        ):
            module.use_nested_tensor = False
