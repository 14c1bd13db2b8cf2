"""What keeps a layer float, asked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from qnn.kernels import get_scheme
from qnn.kernels.formats import FLOATS
from qnn.kinds import (
    Kind,
    is_quantized,
    is_swapped,
    is_training,
    kind_of,
    own_tensors,
    owners,
    titles,
    waits,
)
from qnn.nn.values import not_finite, why_not_finite
from qnn.verbs import references
from qnn.verbs.inventory import inventory
from qnn.verbs.plan import Plan

WAITS = "it is not initialised: its sizes come from its first input; run one batch first"
TIED = "its weight is tied to"
_LINES = 20


def require_module(who: str, model: object) -> None:
    """Raise a TypeError for what is not a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who} takes an nn.Module, got {type(model).__name__}.")


def left_alone(
    module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
) -> str | None:
    """Why a layer that was picked is not for this call, without that being an error; `named` if a
    pattern means this one.
    """
    if waits(module):
        return None  # why_not has a word on it
    kind = cast(Kind, kind_of(module))
    if kind.skips_computed and not named and (why := why_not_plain(module)) is not None:
        return why
    if hasattr(module, "parametrizations"):
        return None  # as above
    return kind.why_left(module, scheme, named=named, training=training)


def why_not(module: nn.Module, scheme: str) -> str | None:
    """Why a selected layer cannot be converted to `scheme` or prepared for it, or None."""
    if waits(module):
        return WAITS
    return why_not_plain(module) or _why_not_its_weights(module, scheme)


def why_not_plain(module: nn.Module) -> str | None:
    """Why a layer is not its parameters and the forward of its class alone."""
    if (why := _why_not_its_forward(module)) is not None:
        return why
    if hasattr(module, "parametrizations"):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    kind = cast(Kind, kind_of(module))
    names = list(kind.names(module))
    kept = set(kind.keeps(module))
    extra = [name for name in module._parameters if name not in names]
    extra += [name for name in module._buffers if name not in kept]
    extra += [name for name in module._modules if name not in kind.holds]
    missing = [name for name in names if name not in module._parameters]
    if extra or missing:
        found = ", ".join(extra) or f"its {missing[0]} is not a parameter"
        undo = next((fix for end, fix in _UNDO if any(name.endswith(end) for name in extra)), None)
        fix = (
            f"call {undo} first"
            if undo
            else (
                "weight_norm, spectral_norm, pruning, FSDP or another quantiser; undo it first, or "
                "wrap after converting"
            )
        )
        return f"it holds more than weights and biases ({found}): {fix}"
    return None


# By the ends of the names that torch's functions leave in a layer.
_UNDO = (
    ("_g", "torch.nn.utils.remove_weight_norm(layer, name)"),
    ("_mask", "torch.nn.utils.prune.remove(layer, name)"),
    ("_u", "torch.nn.utils.remove_spectral_norm(layer, name)"),
)


def _why_not_its_weights(module: nn.Module, scheme: str) -> str | None:
    kind = cast(Kind, kind_of(module))
    weights = kind.weights(module)
    for name, weight in weights.items():
        if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
            found = type(weight.data if type(weight) is nn.Parameter else weight).__name__
            return (
                f"its {name} is a {found}, not a plain tensor; convert before sharding, "
                "distributing or quantising otherwise"
            )
        if weight.dtype not in FLOATS:
            return f"its {name} is {weight.dtype}; {', '.join(map(str, FLOATS))} can be quantised"
    if (reason := kind.why_not(module, scheme)) is not None:
        return reason
    for name, weight in weights.items():
        if not_finite(weight) is not None:
            bad = int((~weight.detach().isfinite()).sum())
            if not bad:
                return f"its {name} holds {why_not_finite(weight)}"
            return f"its {name} holds {bad} NaN or inf of {weight.numel()} values"
    for name, bias in module._parameters.items():
        reason = why_not_finite(bias) if "bias" in name and bias is not None else None
        if reason is not None:
            return f"its {name} holds {reason}"
    return None


def _why_not_its_forward(module: nn.Module) -> str | None:
    """Why a `forward` that was set on the layer itself cannot move to another one."""
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
        return (
            "accelerate offloads its weights (a hook with offload=True); convert the model before "
            "it is dispatched, or accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    forward = vars(module).get("forward")
    if forward is None or references.calls_its_class(module):
        return None
    return (
        f"a forward of its own was set on it ({getattr(forward, '__qualname__', forward)}), and "
        f"does not call that of {type(module).__name__}; del layer.forward, or exclude it"
    )


def keep_ties_to_float(modules: dict[str, nn.Module], plan: Plan, who: str = "qnn.convert") -> None:
    """Leave alone a layer whose weight something else uses as a float: converting it would untie
    the two.
    """
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module))
    _keep_ties(modules, plan, who, users)
    for key, owner in owners(modules.values()).items():
        if key in plan.schemes and id(owner) not in plan.schemes and not is_swapped(owner):
            del plan.schemes[key]
            reason = f"{type(owner).__name__}, which reads its weight, stays in float"
            plan.reasons.setdefault(key, reason)


def _keep_ties(
    modules: dict[str, nn.Module],
    plan: Plan,
    who: str,
    users: dict[int, list[tuple[str, nn.Module]]],
) -> None:
    for name, module in modules.items():
        if id(module) not in plan.schemes:
            continue
        kind = cast(Kind, kind_of(module))
        for other, user in _others(module, users):
            why: str | None = f" ({type(user).__name__}), which stays in float"
            if id(user) in plan.schemes:
                why = kind.why_untied(cast(Kind, kind_of(user)))
                why = why and f"; {why}"
            if why is not None:
                del plan.schemes[id(module)]
                plan.reasons[id(module)] = f"{TIED} {other!r}{why}"
                break
            mine, theirs = plan.schemes[id(module)], plan.schemes[id(user)]
            if mine != theirs and not _stored_alike(mine, theirs):
                raise ValueError(
                    f"{who}: {name!r} and {other!r} share one weight but would get the "
                    f"schemes {mine!r} and {theirs!r}, which store it in two ways; give both the "
                    "same, or one of the same format."
                )


def _stored_alike(*schemes: str | None) -> bool:
    """Whether the schemes have one format of weights, as `int8` and `int8_weight`."""
    formats = [get_scheme(scheme).weight for scheme in schemes if scheme is not None]
    return len(formats) == len(schemes) and all(form == formats[0] for form in formats)


def _others(
    module: nn.Module, users: dict[int, list[tuple[str, nn.Module]]]
) -> Iterator[tuple[str, nn.Module]]:
    """What else uses a weight of `module`."""
    for weight in cast(Kind, kind_of(module)).weights(module).values():
        yield from ((name, user) for name, user in users[id(weight)] if user is not module)


def nothing_to_do(who: str, verb: str, modules: dict[str, nn.Module], plan: Plan) -> str:
    """The error of a call that would change nothing: that all is done already, each reason, or the
    kinds that there are.
    """
    done: list[Any] = [m for m in modules.values() if is_quantized(m) or is_training(m)]
    if done:
        fix = (
            "Convert to another scheme, or with {'*': None} to the float layers again."
            if all(map(is_training, done))
            else f"To change that, {verb} the float model; layer.dequantize() gives a float layer "
            "with the rounded weight."
        )
        return (
            f"{who}: nothing to {verb}: the model is converted already ({len(done)} "
            f"{type(done[0]).__name__}, scheme {done[0].scheme!r}). {fix}"
        )
    if plan.reasons:
        names = {id(module): name for name, module in reversed(modules.items())}
        lines = [f"  {names[key] or 'model'}: {why}" for key, why in plan.reasons.items()]
        if len(lines) > _LINES:
            lines[_LINES:] = [f"  and {len(lines) - _LINES} more"]
        mine = [id(m) for key in modules.values() if id(key) in plan.reasons for m in key.modules()]
        rest = [m for m in modules.values() if id(m) not in mine and own_tensors(m)]
        if rest:
            lines.append(f"The rest holds no layer that qnn knows: {inventory(rest)}.")
        listed = "\n".join(lines)
        return f"{who}: nothing to {verb}: every layer is left alone:\n{listed}"
    return (
        f"{who}: nothing to {verb}: the model has no {titles()}, only "
        f"{inventory(modules.values())}."
    )
