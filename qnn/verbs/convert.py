"""`convert`: swap the layers of a model for quantised ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar, cast

from torch import nn

from qnn import kinds
from qnn.calibration.doubts import warn_of
from qnn.calibration.fake_quantize import observation_points
from qnn.kernels import get_scheme, training_scheme
from qnn.kernels.schemes import STATIC
from qnn.kinds import Own, kind_of
from qnn.nn.base import Quantized
from qnn.verbs import patterns
from qnn.verbs.checks import (
    TIED,
    keep_ties_to_float,
    left_alone,
    nothing_to_do,
    require_module,
    why_not,
    why_not_plain,
)
from qnn.verbs.choose import Row
from qnn.verbs.inventory import nbytes, size
from qnn.verbs.max_drop import check as check_drop
from qnn.verbs.max_drop import keep_worst
from qnn.verbs.patterns import Pattern, Patterns
from qnn.verbs.plan import (
    ASKED,
    FLOAT,
    REASON,
    Make,
    Plan,
    raise_unsupported,
    run_hooks,
    select,
    swapped,
)
from qnn.verbs.progress import check_progress
from qnn.verbs.trial import EvalFn

ModelT = TypeVar("ModelT", bound=nn.Module)
SchemeMap = Mapping[Pattern, str | None]


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
    max_drop: float | None = None,
    eval_fn: EvalFn | None = None,
    ranking: Iterable[Row] | None = None,
) -> ModelT:
    """Replace the linear, convolution, attention, LSTM and GRU layers of `model` by quantised ones.

    `nn.Linear`, `nn.MultiheadAttention`, `nn.Conv2d`, `nn.ConvTranspose2d` (and those of one and
    three axes), `nn.LSTM`, `nn.GRU` and their cells become `QLinear`, `QMultiheadAttention`,
    `QConv2d`, `QConvTranspose2d`, `QLSTM`, `QGRU` and so on, and transformers' `Conv1D` becomes a
    `QLinear` too; fused experts of classes that `qnn.register_adapter` knows become `QExperts`.
    Embedding tables are taken when named. With
    `training=True` linear layers become `qnn.Linear`, which keeps the float parameters and trains
    in the scheme's arithmetic; a model that was trained so is converted once more to be deployed. A
    model from `qnn.prepare` that has seen its data is converted by `convert(model)`: every prepared
    layer gets the scheme and the ranges that it was prepared for. A `CalibrationWarning` names
    those whose range was much cut, or whose input is too fine for its grid.

    A pattern is a name with wildcards (`"encoder.layer.*.output"`), a module type, or a callable
    `(name, module) -> bool`; names and types pick everything inside the module that they match.
    Layers of other kinds, subclasses with a forward of their own, convolutions with weight_norm,
    and convolutions and recurrent layers where the scheme has none (the int8 and int16 ones have),
    are left alone; `qnn.summary` lists each with the reason. A subclass of `nn.Linear` that
    computes the same is taken if a pattern names it.

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
        max_drop: how much lower the score of the converted model may be than that of the float
            one. All layers are quantised, and the one that hurts most is put back into float until
            the score holds; `qnn.summary` names those that were. The order is that of each layer
            alone, worst first, of equal ones the smallest. Everything is tried out in the model
            itself, which is put back; meanwhile both forms of all layers are in memory.
        eval_fn: `model -> number`, higher is better, the same each time for the same model; called
            once for the float model, once for each layer alone, and once for each layer put back.
            It must call the model that it is given.
        ranking: the table of `qnn.sensitivity` for this model: the order then is by its errors, and
            `eval_fn` is not called for each layer alone.

    Returns:
        The converted model: `model` itself if `inplace`, unless it is a bare `nn.Linear`.

    Raises:
        ValueError: an unknown scheme, a pattern that matches nothing, nothing to convert, or
            layers that the scheme cannot take, each named with its reason; a prepared layer with a
            part that has seen nothing, or NaN or infinite values; a model that cannot be copied, or
            that names a layer where no other can be put; a `max_drop` that only the float model
            holds, or not even that. Nothing has been changed then.
        TypeError: an argument of the wrong kind; `eval_fn` gives no number.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> model = convert(model, "int8", exclude="2")
    >>> type(model[0]).__name__, type(model[2]).__name__
    ('QLinear', 'Linear')
    """
    require_module("qnn.convert", model)
    if on_unsupported not in ("error", "skip"):
        raise ValueError(
            f"qnn.convert: on_unsupported must be 'error' or 'skip', got {on_unsupported!r}."
        )
    check_progress("qnn.convert", progress)
    check_drop(max_drop, eval_fn, ranking, training)
    prepared = any(map(kinds.is_prepared, model.modules()))
    plan = planned(
        model,
        scheme,
        include=include,
        exclude=exclude,
        training=training,
        on_unsupported=on_unsupported,
    )
    kept = list[str]()
    if max_drop is not None and eval_fn is not None:
        kept = keep_worst(
            model,
            plan,
            maker,
            max_drop=max_drop,
            eval_fn=eval_fn,
            ranking=ranking,
            progress=progress,
        )
    result = swapped(
        model,
        plan,
        maker(plan, training),
        inplace=inplace,
        who="qnn.convert",
        share=training,
        progress=progress,
    )
    for point in (p for name in kept for p in observation_points(result.get_submodule(name))):
        point.freeze()
        point.pass_on()
    if prepared:
        warn_of(result)
    run_hooks("qnn.convert", result)
    return result


def planned(
    model: nn.Module,
    scheme: str | SchemeMap | None = None,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    training: bool = False,
    on_unsupported: str = "error",
) -> Plan:
    """What `convert` does to a model, which is not changed; its arguments and errors."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if any(map(kinds.is_prepared, modules.values())):
        if scheme is not None or training:
            raise ValueError(
                "qnn.convert: the model is prepared, and its layers know their scheme; call "
                "qnn.convert(model) without a scheme."
            )
        plan = _plan_of_prepared(modules, include, exclude)
    else:
        rules = _scheme_rules("int8" if scheme is None else scheme, modules, training)
        plan = _make_plan(modules, rules, include, exclude, training)
    if on_unsupported == "error":
        fix = "Exclude them, or pass on_unsupported='skip' to leave them as they are."
        raise_unsupported(plan, "qnn.convert", "converted", fix)
    if not plan.schemes:
        raise ValueError(nothing_to_do("qnn.convert", "convert", modules, plan))
    if include is None:
        _warn_of_little(modules, plan)
    return plan


def _scheme_rules(
    scheme: str | SchemeMap, modules: dict[str, nn.Module], training: bool
) -> list[tuple[Pattern, str | None]]:
    """`scheme` as rules of which the last match counts."""
    if isinstance(scheme, Mapping):
        if not scheme:
            raise ValueError("qnn.convert: scheme is an empty dict; give it {pattern: scheme}.")
        patterns.check("qnn.convert", "scheme", scheme, modules)
        rules = list(scheme.items())
        names = [name for _, name in rules if name is not None]
    else:
        rules, names = [(nn.Module, scheme)], [scheme]
    for name in names:
        try:
            training_scheme(name) if training else get_scheme(name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"qnn.convert: {error}") from None
    return rules


def _plan_of_prepared(
    modules: dict[str, nn.Module], include: Patterns | None, exclude: Patterns | None
) -> Plan:
    candidates = [name for name, module in modules.items() if kinds.is_prepared(module)]
    rules: list[tuple[Pattern, str | None]] = [(nn.Module, STATIC)]
    plan, selected = select("qnn.convert", modules, candidates, rules, include, exclude)
    for name, choice in selected.items():
        plan.schemes[id(modules[name])] = choice.scheme
    keep_ties_to_float(modules, plan)
    for name in selected:
        if id(modules[name]) in plan.schemes:
            _require_ranges(name, modules[name])
    for module in modules.values():
        kind = kind_of(module)
        left = kind is not None and type(module) in kind.floats and not kind.is_observed(module)
        if left and not hasattr(module, REASON):
            plan.reasons.setdefault(id(module), "not prepared")
    return plan


def _require_ranges(name: str, module: nn.Module) -> None:
    """Raise, before anything is changed, unless every part of a prepared layer has a range."""
    try:
        cast(kinds.Kind, kind_of(module)).require_ranges(module)
    except ValueError as error:
        raise ValueError(f"qnn.convert: {name or 'the layer'}: {error}") from None


def _make_plan(
    modules: dict[str, nn.Module],
    rules: list[tuple[Pattern, str | None]],
    include: Patterns | None,
    exclude: Patterns | None,
    training: bool,
) -> Plan:
    candidates = {
        name: kind
        for name, module in modules.items()
        if (kind := kind_of(module)) is not None and not kind.is_quantized(module)
    }
    plan, selected = select("qnn.convert", modules, candidates, rules, include, exclude)
    owners = kinds.owners(modules.values())
    for name, (chosen, named) in selected.items():
        module, kind = modules[name], candidates[name]
        called = id(owners.get(id(module))) in plan.schemes
        if training and kind.is_training(module) and module.scheme == chosen:
            continue
        reason = left_alone(module, chosen, named=named, training=training)
        if reason is not None and not called:
            plan.reasons[id(module)] = reason
        elif (why := why_not(module, chosen)) is not None:
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
        if not kinds.is_training(module) or not reason.startswith((FLOAT, TIED)):
            continue
        if (why := why_not_plain(module)) is not None:
            plan.unsupported[name] = plan.reasons[id(module)] = why
        elif left_alone(module, cast(str, module.scheme)) is None:
            plan.schemes[id(module)] = None


def _warn_of_little(modules: dict[str, nn.Module], plan: Plan) -> None:
    """Warn where most of a model stays float and no pattern asked for that."""
    every = {
        id(t): (t, m) for m in modules.values() for t in m._parameters.values() if t is not None
    }
    done, left = 0, dict[str, int]()
    for tensor, module in every.values():
        reason = plan.reasons.get(id(module), "")
        if id(module) in plan.schemes or kinds.is_quantized(module):
            done += nbytes([tensor])
        elif not kinds.is_training(module) and not reason.startswith(ASKED):
            kind = kinds.qualified(type(module))
            left[kind] = left.get(kind, 0) + nbytes([tensor])
    total = done + sum(left.values())
    if done < _LITTLE * total:
        largest = sorted(left, key=lambda kind: -left[kind])[:3]
        warnings.warn(
            f"qnn.convert: {done / total:.1%} of the parameters' bytes are converted; what stays "
            f"float is mostly {', '.join(f'{kind} ({size(left[kind])})' for kind in largest)}. "
            "qnn.summary(model) gives the reasons.",
            stacklevel=4,
        )


# Of the bytes of a model.
_LITTLE = 0.1


def maker(plan: Plan, training: bool) -> Make:
    """What makes the layer that stands for another one; a tied weight is quantised once."""
    tied = dict[int, tuple[nn.Parameter, ...]]()

    def make(old: nn.Module, own: Own) -> nn.Module:
        kind, scheme = cast(kinds.Kind, kind_of(old)), plan.schemes[id(old)]
        if training or scheme is None:
            return kind.train(old, scheme, own)
        made = cast(Quantized, kind.quantize(old, scheme, own))
        for name, weight in kind.weights(old).items() if kind.shares else ():
            stored = tied.setdefault(id(weight), made._stored_of(name))
            names = [part for part, _ in made._parts_of(name)]
            made._parameters.update(zip(names, stored, strict=True))
        return made

    return make
