"""`prepare`: observation points into a model, for calibration or quantisation-aware training."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import nn

from qnn import kinds
from qnn.calibration.parts import PartSpecs, Specs, check
from qnn.kernels.schemes import STATIC, STATIC_OF
from qnn.kinds import Observation, Own, kind_of
from qnn.verbs.checks import (
    keep_ties_to_float,
    left_alone,
    nothing_to_do,
    require_module,
    why_not,
)
from qnn.verbs.patterns import Patterns
from qnn.verbs.plan import Plan, raise_unsupported, run_hooks, select, swapped
from qnn.verbs.progress import check_progress

ModelT = TypeVar("ModelT", bound=nn.Module)


def prepare(
    model: ModelT,
    scheme: str = STATIC,
    *,
    parts: Specs | None = None,
    split_gates: bool = False,
    qat: bool = False,
    smooth: bool = True,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    inplace: bool = False,
    progress: bool | str = True,
) -> ModelT:
    """Insert observation points into the linear, convolution, attention and recurrent layers of a
    model.

    They become `ObservedLinear`, `ObservedConv2d`, `ObservedMultiheadAttention`, `QuantizableLSTM`
    and so on. Their parameters are copies, as the rest of the model is, and with `inplace=True` the
    same objects: an optimizer for quantisation-aware training is made after a copy. Run the model
    on data like that of its use, or `qnn.calibrate` it, and then `qnn.convert(model)`. Without
    `qat` no output changes, but for the rounding of an attention and of experts, whose products are
    then called; with it, weights and parts are fake-quantised, for training: what `convert` makes
    then computes what was trained.

    Args:
        model: any float module.
        scheme: one whose activations have fixed grids: `"int8_static"`, or `"int16_static"`, which
            has 16 bits for the operands of products too.
        parts: specs by part name with wildcards, over the defaults: the scheme's bits for the
            operands of products and 16 for the rest of a recurrent layer, see
            `QuantizableLSTM.observe`; `qnn.parts.EIGHT_BIT` spends 8 on the rest. A linear layer, a
            convolution, an attention and experts have one part, `"input"`. A key serves the layers
            that have such a part. What a layer becomes depends on its operands: `int16_static`
            where one has 16 bits.
        split_gates: each gate of a recurrent layer is a linear layer of its own, with grids of its
            own.
        qat: fake-quantise, for quantisation-aware training. A model that was prepared and
            calibrated without goes on from its specs and ranges.
        smooth: let `convert` multiply the columns of a linear layer's input by constants before it
            is quantised to 8 bits, and divide the weight's by them (SmoothQuant), where that leaves
            at most two thirds of the noise of its result. Not in training, and not of a weight
            that several layers share.
        include, exclude: patterns as in `qnn.convert`.
        inplace: change `model` itself; otherwise it is copied, and untouched.
        progress: as in `qnn.convert`.

    Returns:
        The prepared model: `model` itself if `inplace`, unless it is a bare layer.

    Raises:
        ValueError: a scheme without fixed grids, a pattern that matches nothing, a model that is
            prepared or converted already, nothing to prepare, a layer that cannot be quantised, or
            a part that no layer has. Nothing has been changed then.
        TypeError: `model` is not an `nn.Module`.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> prepared = prepare(model)
    >>> _ = qnn.calibrate(prepared, [torch.randn(32, 8)])
    >>> type(qnn.convert(prepared)[0]).__name__
    'QLinear'
    """
    require_module("qnn.prepare", model)
    if scheme not in STATIC_OF.values():
        able = " or ".join(map(repr, STATIC_OF.values()))
        raise ValueError(
            f"qnn.prepare: scheme must be {able}, whose grids need data, got {scheme!r}; other "
            "schemes are converted at once: qnn.convert(model, scheme)."
        )
    check_progress("qnn.prepare", progress)
    modules = dict(model.named_modules(remove_duplicate=False))
    plan = _make_plan(modules, scheme, include, exclude, qat)
    raise_unsupported(plan, "qnn.prepare", "prepared", "Exclude them to leave them in float.")
    if not plan.schemes:
        raise ValueError(nothing_to_do("qnn.prepare", "prepare", modules, plan))
    names = {id(module): name for name, module in reversed(modules.items())}
    parts = checked_parts(modules, plan, parts, split_gates)
    shared = tied(modules) if smooth else set()

    def make(old: nn.Module, own: Own) -> nn.Module:
        alone = smooth and id(old) not in shared
        how = Observation(names[id(old)], parts, split_gates, qat, scheme, smooth=alone)
        return cast(kinds.Kind, kind_of(old)).observe(old, how, own)

    del modules
    result = swapped(model, plan, make, inplace=inplace, who="qnn.prepare", progress=progress)
    run_hooks("qnn.prepare", result)
    return result


def _make_plan(
    modules: dict[str, nn.Module],
    scheme: str,
    include: Patterns | None,
    exclude: Patterns | None,
    qat: bool,
) -> Plan:
    candidates = [
        name
        for name, module in modules.items()
        if kind_of(module) and not kinds.is_quantized(module) and not kinds.is_training(module)
    ]
    rules: list[Any] = [(nn.Module, scheme)]
    plan, selected = select("qnn.prepare", modules, candidates, rules, include, exclude)
    owners = kinds.owners(modules.values())
    for name, (scheme, named) in selected.items():
        module = modules[name]
        called = id(owners.get(id(module))) in plan.schemes
        if kinds.is_prepared(module):
            if qat and not module.qat:
                plan.schemes[id(module)] = scheme
            else:
                plan.reasons[id(module)] = "it is prepared already"
        elif not (kind := cast(kinds.Kind, kind_of(module))).observed:
            plan.reasons[id(module)] = f"there is no observed {kind.name} layer"
        elif (reason := left_alone(module, scheme, named=named)) is not None and not called:
            plan.reasons[id(module)] = reason
        elif (why := why_not(module, scheme)) is not None:
            plan.unsupported[name] = plan.reasons[id(module)] = why
        else:
            plan.schemes[id(module)] = scheme
    keep_ties_to_float(modules, plan, "qnn.prepare")
    return plan


def tied(modules: dict[str, nn.Module]) -> set[int]:
    """The modules, by id, with a parameter that another one holds too."""
    users: dict[int, set[int]] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), set()).add(id(module))
    return {key for several in users.values() if len(several) > 1 for key in several}


def checked_parts(
    modules: dict[str, nn.Module], plan: Plan, parts: Specs | None, split_gates: bool
) -> PartSpecs | None:
    """`parts`, each key for the layers that have it; what is wrong is raised before anything is
    changed.
    """
    if parts is None:
        return None
    how = Observation(split_gates=split_gates)
    layers = [
        (cast(kinds.Kind, kind_of(module)), module)
        for module in modules.values()
        if id(module) in plan.schemes
    ]
    points = ["input", *(name for kind, layer in layers for name in kind.points(layer, how))]
    check(parts, list(dict.fromkeys(points)), "qnn.prepare", "the layers'")
    parts = PartSpecs(parts)
    for kind, layer in layers:
        kind.check_observation(layer, Observation(parts=parts, split_gates=split_gates))
    return parts
