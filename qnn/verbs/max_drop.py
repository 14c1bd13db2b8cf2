"""`convert(max_drop=)`: which layers stay in float, so that a score holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from qnn.verbs.choose import Row
from qnn.verbs.plan import Plan
from qnn.verbs.progress import Meter
from qnn.verbs.trial import EvalFn, MakerOf, Run, Trial, Unit, evaluated, trying, units_of

_WHO = "qnn.convert"


def check(max_drop: Any, eval_fn: Any, ranking: Any, training: bool) -> None:
    """Raise if the arguments make no sense together.

    Raises:
        ValueError: one without the other, a drop below 0, or `training`.
        TypeError: one of the wrong kind.
    """
    if max_drop is None or eval_fn is None:
        if (max_drop, eval_fn, ranking) != (None, None, None):
            raise ValueError(
                f"{_WHO}: max_drop and eval_fn go together, and ranking with both: max_drop=0.01, "
                "eval_fn=function of the model."
            )
        return
    if training:
        raise ValueError(f"{_WHO}: max_drop is for layers to deploy; leave out training=True.")
    if not callable(eval_fn):
        raise TypeError(f"{_WHO}: eval_fn must be a function, got {type(eval_fn).__name__}.")
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float):
        raise TypeError(f"{_WHO}: max_drop must be a number, got {max_drop!r}.")
    if not max_drop >= 0:
        raise ValueError(
            f"{_WHO}: max_drop must be at least 0, got {max_drop}: not even the float model, whose "
            "drop is 0, has less."
        )


def keep_worst(
    model: nn.Module,
    plan: Plan,
    maker: MakerOf,
    *,
    max_drop: float,
    eval_fn: EvalFn,
    ranking: Iterable[Row] | None,
    progress: bool | str,
) -> list[str]:
    """Take out of the plan the layers that `convert` says; their names."""
    units = units_of(_WHO, model, plan)
    with trying(_WHO, model, plan, maker) as (trial, run):
        score = evaluated(_WHO, trial, run, eval_fn)
        if math.isnan(score):
            raise ValueError(f"{_WHO}: eval_fn gives NaN for the float model.")
        if ranking is None:
            meter = Meter(_WHO, "layer alone", len(units), progress)
            errors = {u: score - _alone(trial, run, u, eval_fn) for u in meter.each(units)}
        else:
            rows = list(ranking)
            errors = {unit: _ranked(unit, rows) for unit in units}
        # The worst one last, to be put back first; of equal ones the smallest.
        order = sorted(units, key=lambda u: (_finite(errors[u]), -trial.bytes_of(u)))
        for unit in order:
            trial.quantize(unit)
        kept = _put_back(trial, run, order, score, max_drop, eval_fn, progress)
    names = dict(model.named_modules())
    by = "eval_fn falls by" if ranking is None else "its error is"
    for unit in kept:
        for name, scheme in unit.schemes.items():
            key = id(names[name])
            del plan.schemes[key]
            plan.reasons[key] = (
                f"kept in float for max_drop; with this layer alone in {scheme} {by} "
                f"{errors[unit]:.3g}"
            )
    return [name for unit in kept for name in unit.schemes]


def _put_back(
    trial: Trial,
    run: Run,
    order: list[Unit],
    score: float,
    max_drop: float,
    eval_fn: EvalFn,
    progress: bool | str,
) -> list[Unit]:
    """The last units of `order`, as many as have to be in float."""
    drop = math.inf
    meter = Meter(_WHO, "layer put back", None, progress)
    for count in meter.each(range(len(order))):
        if count:
            trial.put_back()
        drop = score - evaluated(_WHO, trial, run, eval_fn)
        if drop <= max_drop:
            return order[len(order) - count :]
    trial.put_back()
    again = evaluated(_WHO, trial, run, eval_fn)
    if not score - again <= max_drop:
        raise ValueError(
            f"{_WHO}: even with every layer in float the drop is {score - again:.6g}, more than "
            f"max_drop={max_drop}: eval_fn gives {score:.6g} and {again:.6g} for the same model. "
            "Let it use the same data each time."
        )
    raise ValueError(
        f"{_WHO}: max_drop={max_drop} needs every layer in float; with {order[0].name or 'it'!r} "
        f"alone quantised eval_fn falls by {drop:.6g}. Give it more, or another scheme."
    )


def _alone(trial: Trial, run: Run, unit: Unit, eval_fn: EvalFn) -> float:
    trial.quantize(unit)
    try:
        return evaluated(_WHO, trial, run, eval_fn)
    finally:
        trial.put_back()


def _finite(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _ranked(unit: Unit, rows: list[Row]) -> float:
    """The error of the worst row with a layer of the unit, in its scheme."""
    errors = [row.error for row in rows if row.layers.items() & unit.schemes.items()]
    if not errors:
        raise ValueError(
            f"{_WHO}: ranking has no row of the layer {unit.name!r} in its scheme; it is a table "
            "that qnn.sensitivity has made for this model, with the same schemes and patterns."
        )
    return max(errors)
