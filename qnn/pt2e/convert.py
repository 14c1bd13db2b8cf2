"""`convert_pt2e`: a prepared graph becomes one that calls quantised layers."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn
from torch.fx import GraphModule

from qnn.calibration.doubts import warn_of
from qnn.kernels.schemes import STATIC
from qnn.kinds import is_prepared, kind_of
from qnn.pt2e import bodies
from qnn.pt2e import graph as graphs
from qnn.pt2e.batch_norm import fold_modules
from qnn.pt2e.prepare import REASONS, SCHEMES, set_reasons
from qnn.verbs.checks import keep_ties_to_float
from qnn.verbs.convert import maker
from qnn.verbs.plan import FOLDED, Plan, run_hooks, swapped


def convert_pt2e(
    model: Any,
    use_reference_representation: bool = False,
    fold_quantize: bool = True,
    *,
    form: Literal["layers"] = "layers",
    strict: bool = True,
    inplace: bool = False,
    progress: bool | str = True,
) -> GraphModule:
    """Quantise a graph that `prepare_pt2e` or `prepare_qat_pt2e` has made, and that has seen its
    data.

    The result calls `QLinear`, `QConv2d`, `QLSTM` and so on, under the names of the float layers:
    its state dict is that of the model that `qnn.convert` makes without a graph. It runs as it is;
    under `torch.compile`, `torch.export` and AOTInductor each layer is one `invoke_quant` node,
    without freezing. BatchNorms that were trained are folded.

    Args:
        model: the prepared graph.
        use_reference_representation: not offered; the ops are integer arithmetic as it is.
        fold_quantize: weights are always stored as integers in this form.
        form: `"layers"`.
        strict: whether a layer that has seen no data is an error; otherwise it stays float.
        inplace: change the module itself; otherwise it is copied.
        progress: as in `qnn.convert`.

    Returns:
        The converted graph, in evaluation mode.

    Raises:
        TypeError: not a graph module.
        ValueError: a graph that is not prepared, or converted already; layers that have seen no
            data, by name; an unknown form.
    """
    who = "qnn.pt2e.convert_pt2e"
    if use_reference_representation:
        raise ValueError(
            f"{who}: use_reference_representation is not offered: the arithmetic of a qnn op is "
            "that of integers already."
        )
    if form != "layers":
        raise ValueError(f"{who}: form must be 'layers', got {form!r}.")
    if not isinstance(model, GraphModule) or SCHEMES not in model.meta:
        raise (ValueError if isinstance(model, nn.Module) else TypeError)(
            f"{who} takes a graph from qnn.pt2e.prepare_pt2e that is not converted yet, got "
            f"{type(model).__name__}."
        )
    root = graphs.own(model, inplace=inplace, who=who)
    for name, norm in fold_modules(root).items():
        layer = root.get_submodule(name)
        layer.__dict__[FOLDED] = f"{getattr(layer, FOLDED, '')}; BatchNorm {norm} folded in"
    schemes = dict.fromkeys(_seen(who, root, strict), STATIC) | root.meta.pop(SCHEMES)
    # One swap for all: a weight that several layers share is quantised once.
    plan = Plan({id(root.get_submodule(name)): scheme for name, scheme in schemes.items()})
    keep_ties_to_float(dict(root.named_modules(remove_duplicate=False)), plan, who)
    make = maker(plan, training=False)
    swapped(root, plan, make, inplace=True, who=who, progress=progress)
    warn_of(root)
    run_hooks("qnn.convert", root)
    for name in schemes:
        if (reason := plan.reasons.get(id(root.get_submodule(name)))) is not None:
            root.meta[REASONS][name] = reason
    set_reasons(root)
    bodies.watch(root, observed=False)
    return root.eval()


def _seen(who: str, root: GraphModule, strict: bool) -> list[str]:
    """The observed layers that have seen data."""
    observed = {n: m for n, m in root.named_modules() if is_prepared(m)}
    blind: dict[str, str] = {}
    for name, layer in observed.items():
        try:
            cast(Any, kind_of(layer)).require_ranges(layer)
        except ValueError as error:
            blind[name] = str(error)
    if blind and strict:
        listed = "\n".join(f"  {name}: {why}" for name, why in blind.items())
        raise ValueError(
            f"{who}: {len(blind)} of {len(observed)} observed layers have no range:\n{listed}\n"
            "Run the prepared model on data, or qnn.calibrate it; strict=False leaves these float."
        )
    root.meta[REASONS] |= dict.fromkeys(blind, "it has seen no data")
    return [name for name in observed if name not in blind]
