"""`prepare`: observation points into a model, for calibration or quantisation-aware training."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import nn

from qnn.class_checks import warn_of_class_checks
from qnn.conv1d import ObservedConv1D
from qnn.convert import (
    is_prepared,
    keep_ties_to_float,
    left_alone,
    nothing_to_do,
    why_not_convert,
)
from qnn.kinds import as_linear, is_layer, is_recurrent, is_transposed
from qnn.linear import is_training_layer
from qnn.observed import Observed
from qnn.observed_linear import ObservedLinear, spec_of_input, training_spec
from qnn.parts import PartSpecs, Specs, check, points_of
from qnn.patterns import Patterns
from qnn.progress import check_progress
from qnn.qlinear import QLinear
from qnn.qrecurrent import QRecurrent
from qnn.quantizable import QuantizableGRU, QuantizableLSTM
from qnn.quantizable_cell import QuantizableGRUCell, QuantizableLSTMCell
from qnn.swap import Make, Own, Plan, leave_fast_path, raise_unsupported, select, swapped

ModelT = TypeVar("ModelT", bound=nn.Module)
_QUANTIZABLE: dict[type[nn.Module], Any] = {
    nn.LSTM: QuantizableLSTM, nn.GRU: QuantizableGRU,
    nn.LSTMCell: QuantizableLSTMCell, nn.GRUCell: QuantizableGRUCell,
}  # fmt: skip


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

    They become `ObservedLinear`, `QuantizableLSTM` and `QuantizableGRU`. Their parameters are
    copies, as the rest of the model is, and with `inplace=True` the same objects: an optimizer for
    quantisation-aware training is made after a copy. Run the model on data like that of its use, or
    `qnn.calibrate` it, and then `qnn.convert(model)`. Without `qat` no output changes; with it,
    weights and parts are fake-quantised, for training: what `convert` makes then computes what was
    trained.

    Args:
        model: any float module.
        scheme: `"int8_static"`, the scheme whose activations have fixed grids.
        parts: specs by part name with wildcards, over the defaults: 8 bits for the operands of
            products and 16 for the rest of a recurrent layer, see `QuantizableLSTM.observe`;
            `qnn.parts.EIGHT_BIT` spends 8 on all. A linear layer has one part, `"input"`. A key
            serves the layers that have such a part.
        split_gates: each gate of a recurrent layer is a linear layer of its own, with grids of its
            own.
        qat: fake-quantise, for quantisation-aware training. A model that was prepared and
            calibrated without goes on from its specs and ranges.
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
    plan = _make_plan(modules, include, exclude, qat)
    raise_unsupported(plan, "qnn.prepare", "prepared", "Exclude them to leave them in float.")
    if not plan.schemes:
        raise ValueError(nothing_to_do("qnn.prepare", "prepare", modules, plan))
    names = {id(module): name for name, module in reversed(modules.items())}
    parts = _checked_parts(modules, plan, parts, split_gates)
    make = _maker(names, parts, split_gates, qat)
    del modules
    result = swapped(model, plan, make, inplace=inplace, who="qnn.prepare", progress=progress)
    leave_fast_path(result)
    warn_of_class_checks("qnn.prepare", result)
    return result


def _make_plan(
    modules: dict[str, nn.Module],
    include: Patterns | None,
    exclude: Patterns | None,
    qat: bool,
) -> Plan:
    candidates = [n for n, m in modules.items() if is_layer(m) and not _is_quantised(m)]
    rules: list[Any] = [(nn.Module, "int8_static")]
    plan, selected = select("qnn.prepare", modules, candidates, rules, include, exclude)
    for name, (scheme, named) in selected.items():
        module = modules[name]
        if is_prepared(module):
            if qat and not module.qat:
                plan.schemes[id(module)] = scheme
            else:
                plan.reasons[id(module)] = "it is prepared already"
        elif (reason := left_alone(module, scheme, named=named)) is not None:
            plan.reasons[id(module)] = reason
        elif (why := why_not_convert(module)) is not None:
            plan.unsupported[name] = plan.reasons[id(module)] = why
        else:
            plan.schemes[id(module)] = scheme
    keep_ties_to_float(modules, plan, "qnn.prepare")
    return plan


def _maker(names: dict[int, str], parts: Specs | None, split_gates: bool, qat: bool) -> Make:
    def make(old: nn.Module, own: Own) -> nn.Module:
        new: Any
        if not is_recurrent(old):
            before = old.input_quantize if isinstance(old, ObservedLinear) else None
            spec = spec_of_input(parts)
            if spec is None and before is not None:
                spec = training_spec(before.spec)
            if is_transposed(old):
                new = ObservedConv1D.from_float(old, spec, qat, name=names[id(old)])
            else:
                new = ObservedLinear.from_float(as_linear(old), spec, qat, name=names[id(old)])
            if before is not None:
                new.input_quantize.begin(before)
        else:
            new = _quantizable(old, split_gates)
            known = old.specs() if isinstance(old, Observed) else {}
            new.observe(PartSpecs(known) | (parts or {}), qat=qat)
            if known:
                new.go_on_from(old)
        for name, parameter in old._parameters.items():
            if parameter is not None:
                setattr(new, name, own(parameter))
        return cast(nn.Module, new)

    return make


def _checked_parts(
    modules: dict[str, nn.Module], plan: Plan, parts: Specs | None, split_gates: bool
) -> PartSpecs | None:
    """`parts`, each key for the layers that have it; what is wrong is raised before anything is
    changed.
    """
    if parts is None:
        return None
    layers = [module for module in modules.values() if id(module) in plan.schemes]
    recurrent = [_quantizable(m, split_gates) for m in layers if is_recurrent(m)]
    points = ["input"]
    for layer in recurrent:
        projection = bool(getattr(layer, "proj_size", 0))
        points += points_of(
            layer.mode, split_gates=layer.split_gates, projection=projection
        ).values()
    check(parts, list(dict.fromkeys(points)), "qnn.prepare", "the layers'")
    parts = PartSpecs(parts)
    for layer in recurrent:
        layer.observe(parts)
    if len(recurrent) < len(layers):
        spec_of_input(parts)
    return parts


def _quantizable(module: nn.Module, split_gates: bool) -> Observed:
    """The quantisable layer around a recurrent layer's parameters."""
    if isinstance(module, Observed):
        split_gates, module = split_gates or module.split_gates, module.to_float()
    made: Observed = _QUANTIZABLE[type(module)].from_float(module, split_gates=split_gates)
    return made


def _is_quantised(module: nn.Module) -> bool:
    return isinstance(module, QLinear | QRecurrent) or is_training_layer(module)
