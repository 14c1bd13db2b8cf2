"""`convert_pt2e`: a prepared graph becomes one that calls quantised layers."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn
from torch.fx import GraphModule

from qnn.calibration.doubts import warn_of
from qnn.kernels.schemes import STATIC
from qnn.kinds import is_prepared, kind_of
from qnn.pt2e import attention, bodies
from qnn.pt2e import graph as graphs
from qnn.pt2e.batch_norm import fold_modules
from qnn.pt2e.buffers import fold_into_buffers
from qnn.pt2e.fold_codes import fold_codes
from qnn.pt2e.from_specs import layers_of_specs
from qnn.pt2e.prepare import REASONS, SCHEMES, set_reasons
from qnn.pt2e.qdq import write_qdq
from qnn.pt2e.specs import WHY_LEFT
from qnn.pt2e.unlift import nodes_of_layers
from qnn.verbs.checks import keep_ties_to_float
from qnn.verbs.convert import maker
from qnn.verbs.plan import FOLDED, LEFT, Plan, run_hooks, swapped


def convert_pt2e(
    model: Any,
    use_reference_representation: bool = False,
    fold_quantize: bool = True,
    fold_quantize_into_mutable_buffers: bool = False,
    *,
    form: Literal["layers", "qdq"] = "layers",
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
        fold_quantize: of the nodes: hold the integers of weights in the place of the floats. The
            weights of layers always are integers.
        fold_quantize_into_mutable_buffers: hold in integers the buffers that the graph ends in
            writing anew, by `copy_` of what is annotated: the grid of the write serves the reads
            too. Those that stay float have the reason in `qnn.summary`.
        form: `"layers"`; or `"qdq"`, which writes float operators between quantise and dequantise
            nodes, `torch.ops.quantized_decomposed`, as torchao does, for tools that lower from
            them. In the form of layers that is done for what is annotated and makes no layer.
        strict: whether a layer or an observer that has seen no data is an error; otherwise a layer
            stays float, and an observer is what its library makes of that.
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
    if form not in ("layers", "qdq"):
        raise ValueError(f"{who}: form must be 'layers' or 'qdq', got {form!r}.")
    into_buffers = fold_quantize_into_mutable_buffers
    for name, flag in (
        ("fold_quantize", fold_quantize),
        ("fold_quantize_into_mutable_buffers", into_buffers),
    ):
        if not isinstance(flag, bool):
            raise ValueError(f"{who}: {name} must be True or False, got {flag!r}.")
    if into_buffers and not fold_quantize:
        raise ValueError(
            f"{who}: fold_quantize_into_mutable_buffers=True is a way to fold; leave "
            "fold_quantize True."
        )
    if not isinstance(model, GraphModule) or SCHEMES not in model.meta:
        raise (ValueError if isinstance(model, nn.Module) else TypeError)(
            f"{who} takes a graph from qnn.pt2e.prepare_pt2e that is not converted yet, got "
            f"{type(model).__name__}."
        )
    root = graphs.own(model, inplace=inplace, who=who)
    for name, norm in fold_modules(root).items():
        root.meta[REASONS].pop(norm, None)
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
    for graph in graphs.graphs(root):
        attention.quantize(graph)
        if form == "layers":
            layers_of_specs(graph, strict=strict)
        else:
            root.meta[LEFT] |= nodes_of_layers(graph)
        root.meta[LEFT] |= {
            graphs.told(n): n.meta[WHY_LEFT] for n in graph.graph.nodes if WHY_LEFT in n.meta
        }
        write_qdq(graph, fold_quantize=fold_quantize, cancel=form == "layers", strict=strict)
        if into_buffers:
            root.meta[LEFT] |= fold_into_buffers(graph)
        for norm, name in fold_codes(graph).items():
            root.meta[REASONS].pop(norm, None)
            layer = graph.get_submodule(name)
            layer.__dict__[FOLDED] = f"{getattr(layer, FOLDED, '')}; BatchNorm {norm} folded in"
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
