"""`prepare`: observation points into a model, for calibration or quantisation-aware training."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import nn

from qnn.convert import keep_ties_to_float, why_not_convert
from qnn.observed_linear import ObservedLinear
from qnn.parts import Specs
from qnn.patterns import Patterns
from qnn.progress import check_progress
from qnn.quantizable import QuantizableGRU, QuantizableLSTM, QuantizableRecurrent
from qnn.swap import Make, Own, Plan, leave_fast_path, raise_unsupported, select, swapped

ModelT = TypeVar("ModelT", bound=nn.Module)
_PLAIN = (nn.Linear, nn.LSTM, nn.GRU, QuantizableLSTM, QuantizableGRU)


def prepare(
    model: ModelT,
    scheme: str = "int8_static",
    *,
    parts: Specs | None = None,
    split_gates: bool = False,
    qat: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    inplace: bool = False,
    progress: bool | str = True,
) -> ModelT:
    """Insert observation points into the `nn.Linear`, `nn.LSTM` and `nn.GRU` layers of `model`.

    They become `ObservedLinear`, `QuantizableLSTM` and `QuantizableGRU`, around the same
    parameters. Run the model on data like that of its use, or `qnn.calibrate` it, and then
    `qnn.convert(model)`. Without `qat` no output changes; with it, weights and parts are
    fake-quantised, for training: what `convert` makes then computes what was trained.

    Args:
        model: any float module.
        scheme: `"int8_static"`, the scheme whose activations have fixed grids.
        parts: for recurrent layers, specs by part name with wildcards, over the defaults, 8 bits
            for the operands of products and 16 for the rest: see `QuantizableLSTM.observe`.
            `qnn.parts.EIGHT_BIT` spends 8 on all.
        split_gates: each gate of a recurrent layer is a linear layer of its own, with grids of its
            own.
        qat: fake-quantise, for quantisation-aware training.
        include, exclude: patterns as in `qnn.convert`.
        inplace: change `model` itself; otherwise it is copied, and untouched.
        progress: as in `qnn.convert`.

    Returns:
        The prepared model: `model` itself if `inplace`, unless it is a bare layer.

    Raises:
        ValueError: a scheme without fixed grids, a pattern that matches nothing, a model that is
            prepared or converted already, nothing to prepare, a layer that cannot be quantised, or
            a part that no layer has. Nothing has been changed then.
        TypeError: `model` is no module.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> prepared = prepare(model)
    >>> _ = qnn.calibrate(prepared, [torch.randn(32, 8)])
    >>> type(qnn.convert(prepared)[0]).__name__
    'QLinear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"qnn.prepare takes an nn.Module, got {type(model).__name__}.")
    if scheme != "int8_static":
        raise ValueError(
            f"qnn.prepare: scheme must be 'int8_static', whose grids need data, got {scheme!r}; "
            "other schemes are converted at once: qnn.convert(model, scheme)."
        )
    check_progress("qnn.prepare", progress)
    modules = dict(model.named_modules(remove_duplicate=False))
    plan = _make_plan(modules, include, exclude)
    raise_unsupported(plan, "qnn.prepare", "prepared", "Exclude them to leave them in float.")
    if not plan.schemes:
        raise ValueError(_nothing_to_prepare(modules, plan))
    names = {id(module): name for name, module in reversed(modules.items())}
    make = _maker(names, parts, split_gates, qat)
    if parts is not None:
        _check_parts(modules, plan, parts, split_gates)
    del modules
    result = swapped(model, plan, make, inplace=inplace, who="qnn.prepare", progress=progress)
    leave_fast_path(result, (ObservedLinear,))
    return result


def _make_plan(
    modules: dict[str, nn.Module], include: Patterns | None, exclude: Patterns | None
) -> Plan:
    candidates = [n for n, m in modules.items() if isinstance(m, _PLAIN)]
    rules: list[Any] = [(nn.Module, "int8_static")]
    plan, selected = select("qnn.prepare", modules, candidates, rules, include, exclude)
    for name, scheme in selected.items():
        module = modules[name]
        if type(module) not in _PLAIN:
            plan.reasons[id(module)] = f"{type(module).__name__} has a meaning of its own"
        elif getattr(module, "points", None) is not None:
            plan.reasons[id(module)] = "it is prepared already"
        elif (why := why_not_convert(module)) is not None:
            plan.unsupported[name] = plan.reasons[id(module)] = why
        else:
            plan.schemes[id(module)] = scheme
    keep_ties_to_float(modules, plan, "qnn.prepare")
    return plan


def _maker(names: dict[int, str], parts: Specs | None, split_gates: bool, qat: bool) -> Make:
    def make(old: nn.Module, own: Own) -> nn.Module:
        new: nn.Module
        if isinstance(old, nn.Linear):
            new = ObservedLinear.from_float(old, qat=qat, name=names[id(old)])
        else:
            new = _quantizable(old, split_gates).observe(parts, qat=qat)
        for name, parameter in old._parameters.items():
            if parameter is not None:
                setattr(new, name, own(parameter))
        return new

    return make


def _check_parts(
    modules: dict[str, nn.Module], plan: Plan, parts: Specs, split_gates: bool
) -> None:
    """Raise what `observe` raises, before anything is changed."""
    for module in modules.values():
        if id(module) in plan.schemes and not isinstance(module, nn.Linear):
            _quantizable(module, split_gates).observe(parts)


def _quantizable(module: nn.Module, split_gates: bool) -> QuantizableRecurrent:
    """The quantisable layer around a recurrent layer's parameters."""
    if isinstance(module, QuantizableRecurrent):
        split_gates, module = split_gates or module.split_gates, module.to_float()
    kind = QuantizableLSTM if isinstance(module, nn.LSTM) else QuantizableGRU
    return kind.from_float(cast(Any, module), split_gates=split_gates)


def _nothing_to_prepare(modules: dict[str, nn.Module], plan: Plan) -> str:
    if plan.reasons:
        names = {id(module): name for name, module in modules.items()}
        listed = "\n".join(f"  {names[key] or 'model'}: {why}" for key, why in plan.reasons.items())
        return f"qnn.prepare: nothing to prepare: every layer is left alone:\n{listed}"
    kinds = sorted({type(module).__name__ for module in modules.values() if not module._modules})
    return (
        "qnn.prepare: nothing to prepare: the model has no nn.Linear, nn.LSTM or nn.GRU, only "
        f"{', '.join(kinds)}."
    )
