"""`convert`: swap the layers of a model for quantised ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.rnn import RNNBase

from qnn import patterns, references
from qnn.base import not_finite, why_not_finite
from qnn.cells import NAMES
from qnn.class_checks import warn_of_class_checks
from qnn.compressed_tensors import describe
from qnn.conv1d import QConv1D, tell_adapters
from qnn.doubts import warn_of
from qnn.kernels import get_scheme, recurrent, training_scheme
from qnn.kernels.formats import FLOATS
from qnn.kinds import (
    as_linear,
    inventory,
    is_layer,
    is_recurrent,
    is_transposed,
    nbytes,
    own_tensors,
    qualified,
    size,
    waits,
    why_not_as_linear,
)
from qnn.linear import Linear, is_training_layer
from qnn.observed import Observed
from qnn.observed_linear import ObservedLinear, grid
from qnn.patterns import Pattern, Patterns
from qnn.progress import check_progress
from qnn.qcell import QGRUCell, QLSTMCell
from qnn.qlinear import QLinear
from qnn.qlstm import QGRU, QLSTM
from qnn.qrecurrent import QRecurrent
from qnn.quantizable import QuantizableGRU, QuantizableLSTM
from qnn.quantizable_cell import QuantizableGRUCell, QuantizableLSTMCell
from qnn.swap import (
    ASKED,
    FLOAT,
    REASON,
    Make,
    Own,
    Plan,
    leave_fast_path,
    raise_unsupported,
    select,
    swapped,
)

ModelT = TypeVar("ModelT", bound=nn.Module)
SchemeMap = Mapping[Pattern, str | None]
RECURRENT: dict[type[nn.Module], type[QRecurrent]] = {
    nn.LSTM: QLSTM, QuantizableLSTM: QLSTM, nn.GRU: QGRU, QuantizableGRU: QGRU,
    nn.LSTMCell: QLSTMCell, QuantizableLSTMCell: QLSTMCell,
    nn.GRUCell: QGRUCell, QuantizableGRUCell: QGRUCell,
}  # fmt: skip


def convert(
    model: ModelT,
    scheme: str | SchemeMap | None = None,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    training: bool = False,
    inplace: bool = False,
    on_unsupported: Literal["error", "skip"] = "error",
    progress: bool | str = True,
) -> ModelT:
    """Replace the `nn.Linear`, `nn.LSTM` and `nn.GRU` layers of `model` by quantised ones.

    They become `QLinear`, `QLSTM` and `QGRU`; `nn.LSTMCell` and `nn.GRUCell` become `QLSTMCell` and
    `QGRUCell`, and transformers' `Conv1D` becomes a `QLinear` too. With
    `training=True` linear layers become `qnn.Linear`, which keeps the float parameters and trains
    in the scheme's arithmetic; a model that was trained so is converted once more to be deployed. A
    model from `qnn.prepare` that has seen its data is converted by `convert(model)`: every prepared
    layer gets the scheme and the ranges that it was prepared for. A `CalibrationWarning` names
    those whose range was much cut, or whose input is too fine for its grid.

    A pattern is a name with wildcards (`"encoder.layer.*.output"`), a module type, or a callable
    `(name, module) -> bool`; names and types pick everything inside the module that they match.
    Layers of other kinds, subclasses with a forward of their own, and recurrent layers where the
    scheme has none (it has one in the int8 schemes), are left alone; `qnn.summary` lists each with
    the reason. A subclass of `nn.Linear` that computes the same is taken if a pattern names it.

    Modules that are shared stay shared, and so do tied weights; a layer whose weight is tied to
    something that stays float is left alone. Hooks, train or eval mode, devices and the
    `requires_grad` of other parameters are kept. What names a layer besides its parent, such as a
    list or a bound method, follows it.

    Args:
        model: any module, also on the meta device. A bare `nn.Linear` gives a `QLinear`.
        scheme: a scheme's name, `"int8"` if None, or `{pattern: scheme}`, of which the last match
            counts and None leaves a layer alone, or makes a training layer an `nn.Linear` again.
            None alone for a prepared model.
        include: only layers that match; all if None.
        exclude: no layers that match.
        training: make layers that train in the scheme's arithmetic, around the same parameters;
            the schemes that quantise weights alone, and int8, have none. The result shares every
            parameter and buffer with `model`, so that an optimizer goes on. A training model goes
            to another scheme so.
        inplace: change `model` itself, one layer at a time; otherwise it is copied, and untouched.
        on_unsupported: `"error"`, or `"skip"` to leave out what a scheme cannot take.
        progress: a line on stderr once it has taken two seconds: True if stderr is a terminal,
            `"always"` in any case, False never.

    Returns:
        The converted model: `model` itself if `inplace`, unless it is a bare `nn.Linear`.

    Raises:
        ValueError: an unknown scheme, a pattern that matches nothing, nothing to convert, or
            layers that the scheme cannot take, each named with its reason; a prepared layer with a
            part that has seen nothing, or NaN or infinite values; a model that cannot be copied, or
            that names a layer where no other can be put. Nothing has been changed then.
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
    check_progress("qnn.convert", progress)
    modules = dict(model.named_modules(remove_duplicate=False))
    prepared = any(map(is_prepared, modules.values()))
    if prepared:
        if scheme is not None or training:
            raise ValueError(
                "qnn.convert: the model is prepared, and its layers know their scheme; call "
                "qnn.convert(model) without a scheme."
            )
        plan = _plan_of_prepared(modules, include, exclude)
    else:
        rules = _scheme_rules(scheme or "int8", modules, training)
        plan = _make_plan(modules, rules, include, exclude, training)
    if on_unsupported == "error":
        fix = "Exclude them, or pass on_unsupported='skip' to leave them as they are."
        raise_unsupported(plan, "qnn.convert", "converted", fix)
    if not plan.schemes:
        raise ValueError(_nothing_to_convert(modules, plan))
    if include is None:
        _warn_of_little(modules, plan)
    del modules  # it holds the float layers, which are to be freed one by one
    result = swapped(
        model,
        plan,
        _maker(plan, training),
        inplace=inplace,
        who="qnn.convert",
        share=training,
        progress=progress,
    )
    leave_fast_path(result)
    tell_adapters(result)
    if prepared:
        warn_of(result)
    describe(result)
    warn_of_class_checks("qnn.convert", result)
    return result


def _scheme_rules(
    scheme: str | SchemeMap, modules: dict[str, nn.Module], training: bool
) -> list[tuple[Pattern, str | None]]:
    """`scheme` as rules of which the last match counts."""
    if isinstance(scheme, Mapping):
        patterns.check("qnn.convert", "scheme", scheme, modules)
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


def is_prepared(module: nn.Module) -> bool:
    """Whether a layer has observation points."""
    if isinstance(module, Observed):
        return module.points is not None
    return isinstance(module, ObservedLinear)


def _plan_of_prepared(
    modules: dict[str, nn.Module], include: Patterns | None, exclude: Patterns | None
) -> Plan:
    candidates = [name for name, module in modules.items() if is_prepared(module)]
    rules: list[tuple[Pattern, str | None]] = [(nn.Module, "int8_static")]
    plan, selected = select("qnn.convert", modules, candidates, rules, include, exclude)
    for name, choice in selected.items():
        plan.schemes[id(modules[name])] = choice.scheme
    keep_ties_to_float(modules, plan)
    for name in selected:
        if id(modules[name]) in plan.schemes:
            _require_ranges(name, modules[name])
    for module in modules.values():
        left = type(module) in (nn.Linear, *RECURRENT) and not is_prepared(module)
        if left and not hasattr(module, REASON):
            plan.reasons.setdefault(id(module), "not prepared")
    return plan


def _require_ranges(name: str, module: nn.Module) -> None:
    """Raise, before anything is changed, unless every part of a prepared layer has a range."""
    if isinstance(module, ObservedLinear):
        grid(module.input_quantize)
        return
    try:
        RECURRENT[type(module)].tables_of(module)
    except ValueError as error:
        raise ValueError(f"qnn.convert: {name or 'the layer'}: {error}") from None


def _make_plan(
    modules: dict[str, nn.Module],
    rules: list[tuple[Pattern, str | None]],
    include: Patterns | None,
    exclude: Patterns | None,
    training: bool,
) -> Plan:
    candidates = [
        name
        for name, module in modules.items()
        if (is_layer(module) or is_training_layer(module))
        and not isinstance(module, QLinear | QRecurrent)
    ]
    plan, selected = select("qnn.convert", modules, candidates, rules, include, exclude)
    for name, (chosen, named) in selected.items():
        module = modules[name]
        if training and is_training_layer(module) and module.scheme == chosen:
            continue
        if (reason := left_alone(module, chosen, named=named, training=training)) is not None:
            plan.reasons[id(module)] = reason
        elif (why := why_not_convert(module, chosen)) is not None:
            plan.unsupported[name] = plan.reasons[id(module)] = why
        else:
            plan.schemes[id(module)] = chosen
    if not training:
        keep_ties_to_float(modules, plan)
    _end_training(modules, plan)
    return plan


def _end_training(modules: dict[str, nn.Module], plan: Plan) -> None:
    """Training layers that stay float by a scheme map or a tie become plain float layers again."""
    for name, module in modules.items():
        reason = plan.reasons.get(id(module), "")
        if not is_training_layer(module) or not reason.startswith((FLOAT, _TIED)):
            continue
        if (why := _why_not_plain(module)) is not None:
            plan.unsupported[name] = plan.reasons[id(module)] = why
        elif type(module) is Linear or is_transposed(module):
            plan.schemes[id(module)] = None


def left_alone(
    module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
) -> str | None:
    """Why a layer that was picked is not for this call, without that being an error; `named` if a
    pattern means this one.
    """
    if waits(module) or hasattr(module, "parametrizations"):
        return None  # why_not_convert has a word on it
    if not is_recurrent(module):
        if type(module) in (nn.Linear, Linear) or is_transposed(module):
            return None
        return why_not_as_linear(module, named, (nn.Linear.forward, Linear.forward))
    if type(module) not in RECURRENT:
        kind = "nn.LSTM or nn.GRU"
        if not isinstance(module, RNNBase):
            kind = "nn.LSTMCell or nn.GRUCell"
        return f"{type(module).__name__} is a subclass of {kind} with a meaning of its own"
    if training:
        return "there is no recurrent layer that trains in low precision; see qnn.prepare"
    if scheme not in recurrent.SCHEMES:
        able = ", ".join(map(repr, recurrent.SCHEMES))
        return f"scheme {scheme!r} has no recurrent layer; {able} have one"
    return None


def _weights(module: nn.Module) -> dict[str, Any]:
    """The parameters of a float layer that are to be quantised."""
    return {n: p for n, p in module._parameters.items() if n.startswith("weight")}


WAITS = "it is not initialised: its sizes come from its first input; run one batch first"


def why_not_convert(module: nn.Module, scheme: str = "int8_static") -> str | None:
    """Why a selected layer cannot be converted to `scheme` or prepared for it, or None."""
    if waits(module):
        return WAITS
    return _why_not_plain(module) or _why_not_its_weights(module, scheme)


def _why_not_plain(module: nn.Module) -> str | None:
    """Why a layer is not its parameters and the forward of its class alone."""
    if (why := _why_not_its_forward(module)) is not None:
        return why
    if hasattr(module, "parametrizations"):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    names = ["weight", "bias"]
    if isinstance(module, RNNBase):
        names = list(module._flat_weights_names)
    elif is_recurrent(module):
        names = list(NAMES)
    extra = [*(module._parameters.keys() - set(names)), *module._buffers]
    extra += [name for name in module._modules if name != "points"]
    missing = [name for name in names if name not in module._parameters]
    if extra or missing:
        return (
            "it holds more than weights and biases "
            f"({', '.join(extra) or f'its {missing[0]} is no parameter'}): weight_norm, "
            "spectral_norm, pruning, FSDP or another quantiser; undo it first, or wrap after "
            "converting"
        )
    return None


def _why_not_its_weights(module: nn.Module, scheme: str) -> str | None:
    for name, weight in _weights(module).items():
        if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
            kind = type(weight.data if type(weight) is nn.Parameter else weight).__name__
            return (
                f"its {name} is a {kind}, not a plain tensor; convert before sharding, "
                "distributing or quantising otherwise"
            )
        if weight.dtype not in FLOATS:
            return f"its {name} is {weight.dtype}; {', '.join(map(str, FLOATS))} can be quantised"
    for name, weight in _weights(module).items():
        sizes = weight.shape if is_transposed(module) else reversed(weight.shape)
        reason = get_scheme(scheme).why_not_linear(*sizes)
        if reason is None and not_finite(weight) is not None:
            bad = int((~weight.detach().isfinite()).sum())
            reason = f"its {name} holds {bad} NaN or inf of {weight.numel()} values"
            if not bad:
                reason = f"its {name} holds {why_not_finite(weight)}"
        if reason is not None:
            return reason
    for name, bias in module._parameters.items():
        reason = why_not_finite(bias) if name.startswith("bias") and bias is not None else None
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


_TIED = "its weight is tied to"


def keep_ties_to_float(modules: dict[str, nn.Module], plan: Plan, who: str = "qnn.convert") -> None:
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
        for other, user in _others(module, users):
            why = None
            if id(user) not in plan.schemes:
                why = f"{_TIED} {other!r} ({type(user).__name__}), which stays in float"
            elif is_recurrent(module):
                why = f"{_TIED} {other!r}; recurrent layers do not share codes"
            elif is_transposed(module) != is_transposed(user):
                why = f"{_TIED} {other!r}, which has it transposed"
            if why is not None:
                del plan.schemes[id(module)]
                plan.reasons[id(module)] = why
                break
            if plan.schemes[id(user)] != plan.schemes[id(module)]:
                raise ValueError(
                    f"{who}: {name!r} and {other!r} share one weight but would get the "
                    f"schemes {plan.schemes[id(module)]!r} and {plan.schemes[id(user)]!r}; give "
                    "both the same."
                )


def _others(
    module: nn.Module, users: dict[int, list[tuple[str, nn.Module]]]
) -> Iterator[tuple[str, nn.Module]]:
    """What else uses a weight of `module`."""
    for weight in _weights(module).values():
        yield from ((name, user) for name, user in users[id(weight)] if user is not module)


def nothing_to_do(who: str, verb: str, modules: dict[str, nn.Module], plan: Plan) -> str:
    """The error of a call that would change nothing: each reason, or the kinds that there are."""
    if plan.reasons:
        names = {id(module): name for name, module in reversed(modules.items())}
        lines = [f"  {names[key] or 'model'}: {why}" for key, why in plan.reasons.items()]
        if len(lines) > _LINES:
            lines[_LINES:] = [f"  and {len(lines) - _LINES} more"]
        rest = [m for m in modules.values() if id(m) not in plan.reasons and own_tensors(m)]
        if rest:
            lines.append(f"The rest holds no layer that qnn knows: {inventory(rest)}.")
        listed = "\n".join(lines)
        return f"{who}: nothing to {verb}: every layer is left alone:\n{listed}"
    return (
        f"{who}: nothing to {verb}: the model has no nn.Linear, nn.LSTM or nn.GRU, only "
        f"{inventory(modules.values())}."
    )


_LINES = 20


def _nothing_to_convert(modules: dict[str, nn.Module], plan: Plan) -> str:
    done: list[Any] = [
        m for m in modules.values() if isinstance(m, QLinear | QRecurrent) or is_training_layer(m)
    ]
    if not done:
        return nothing_to_do("qnn.convert", "convert", modules, plan)
    fix = (
        "Pass another scheme, or {pattern: None} for the float layers again."
        if all(map(is_training_layer, done))
        else "To change the scheme, convert the float model; layer.dequantize() gives a float "
        "layer with the rounded weight."
    )
    return (
        f"qnn.convert: nothing to convert: the model is converted already ({len(done)} "
        f"{type(done[0]).__name__}, scheme {done[0].scheme!r}). {fix}"
    )


def _warn_of_little(modules: dict[str, nn.Module], plan: Plan) -> None:
    """Warn where most of a model stays float and no pattern asked for that."""
    every = {
        id(t): (t, m) for m in modules.values() for t in m._parameters.values() if t is not None
    }
    done, left = 0, dict[str, int]()
    for tensor, module in every.values():
        reason = plan.reasons.get(id(module), "")
        if id(module) in plan.schemes or isinstance(module, QLinear | QRecurrent):
            done += nbytes([tensor])
        elif not is_training_layer(module) and not reason.startswith(ASKED):
            kind = qualified(type(module))
            left[kind] = left.get(kind, 0) + nbytes([tensor])
    total = done + sum(left.values())
    if done < _LITTLE * total:
        kinds = sorted(left, key=lambda kind: -left[kind])[:3]
        warnings.warn(
            f"qnn.convert: {done / total:.1%} of the parameters' bytes are converted; what stays "
            f"float is mostly {', '.join(f'{kind} ({size(left[kind])})' for kind in kinds)}. "
            "qnn.summary(model) gives the reasons.",
            stacklevel=3,
        )


# Of the bytes of a model.
_LITTLE = 0.1


def _maker(plan: Plan, training: bool) -> Make:
    """What makes the layer that stands for another one; a tied weight is quantised once."""
    schemes, tied = plan.schemes, dict[int, tuple[nn.Parameter, ...]]()

    def in_training(old: nn.Module, own: Own) -> nn.Module:
        layer: Any
        scheme = schemes[id(old)]
        if is_transposed(old):
            from qnn.training_conv1d import TrainingConv1D, plain

            conv = cast(Any, old)
            layer = TrainingConv1D.from_float(conv, scheme) if scheme else plain(conv)
        else:
            flat = as_linear(old)
            layer = Linear.from_float(flat, scheme) if scheme else flat
        layer.weight = own(old.weight)
        layer.bias = own(old.bias)
        return cast(nn.Module, layer)

    def linear(old: Any, own: Own) -> nn.Module:
        kind = QConv1D if is_transposed(old) else QLinear
        if isinstance(old, ObservedLinear):
            layer = kind.from_observed(old)
        else:
            layer = kind.from_float(as_linear(old), cast(str, schemes[id(old)]))
        stored = tied.setdefault(id(old.weight), layer.stored)
        layer._parameters.update(zip(layer._stored, stored, strict=True))
        if old.bias is not None:
            layer.bias = own(old.bias)
        return layer

    def recurrent_layer(old: nn.Module, own: Own) -> nn.Module:
        kind = RECURRENT[type(old)]
        if is_prepared(old):
            layer = kind.from_observed(old)
        else:
            layer = kind.from_float(old, cast(str, schemes[id(old)]))
        for name, parameter in old._parameters.items():
            if name.startswith("bias"):
                layer._parameters[name] = own(parameter)
        return layer

    def make(old: nn.Module, own: Own) -> nn.Module:
        if training or schemes[id(old)] is None:
            return in_training(old, own)
        return recurrent_layer(old, own) if is_recurrent(old) else linear(old, own)

    return make
