"""`prepare_pt2e` and `prepare_qat_pt2e`: an exported graph with observers in it."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.fx import GraphModule, Node

from qnn.calibration.parts import Specs
from qnn.kernels import get_scheme
from qnn.kinds import Kind, Observation, Own, kind_of
from qnn.pt2e import attention, bodies
from qnn.pt2e import graph as graphs
from qnn.pt2e.batch_norm import fold_nodes
from qnn.pt2e.graph import ANNOTATION
from qnn.pt2e.insert import insert_observers
from qnn.pt2e.layers import BY_MODE
from qnn.pt2e.lift import Lifted, lift
from qnn.pt2e.normal import normalise
from qnn.pt2e.quantizer import call_if_there
from qnn.pt2e.specs import WHY_LEFT, retarget_annotations
from qnn.verbs.checks import keep_ties_to_float, left_alone, why_not
from qnn.verbs.plan import FOLDED, LEFT, REASON, Plan, run_hooks, swapped
from qnn.verbs.prepare import checked_parts, tied

# What a prepared graph knows, in its `meta`: the schemes of the layers that have no observers.
SCHEMES = "qnn_schemes"
# There too: why layers stay float, by their names.
REASONS = "qnn_reasons"


def prepare_pt2e(
    model: Any,
    quantizer: Any,
    *,
    inplace: bool = False,
    parts: Specs | None = None,
    smooth: bool = True,
    progress: bool | str = True,
) -> GraphModule:
    """Make an exported model ready for calibration.

    Each BatchNorm is folded into the layer before it, where that is exact. The quantizer annotates
    the graph. The nodes that it gives a scheme become calls of layers, under the names that their
    parameters have; those of a scheme with fixed grids observe their inputs. The outputs are those
    of the float model. Then run the model on data, or `qnn.calibrate` it, and `convert_pt2e`.

    Args:
        model: what `torch.export.export(model, args)` returns, or its `module()`. A batch of any
            size needs dynamic shapes there.
        quantizer: an `Int8Quantizer`, or any object with its methods.
        inplace: change the module itself; otherwise it is copied, and untouched.
        parts: specs of what layers of schemes observe, as in `qnn.prepare`: of their inputs, of the
            parts of a recurrent layer.
        smooth: as in `qnn.prepare`.
        progress: as in `qnn.convert`.

    Returns:
        The prepared graph, in evaluation mode. `train()` and `eval()` work.

    Raises:
        TypeError: a model that is not exported, or a quantizer without `annotate`.
        ValueError: nothing was annotated, with the reason of each node that might be.
    """
    who = "qnn.pt2e.prepare_pt2e"
    how = (inplace, parts, progress)
    return _prepare(who, model, quantizer, *how, qat=False, smooth=smooth)


def prepare_qat_pt2e(
    model: Any,
    quantizer: Any,
    *,
    inplace: bool = False,
    parts: Specs | None = None,
    progress: bool | str = True,
) -> GraphModule:
    """Make an exported model ready for quantisation-aware training.

    As `prepare_pt2e`, but BatchNorms stay and are trained, as real modules with their own eps and
    momentum, and inputs and weights are fake-quantised. `convert_pt2e` folds them. Observers move
    in training mode alone; `qnn.freeze_observers` stops them. A spec of `parts` that is `learnable`
    has a scale that is trained.

    Returns:
        The prepared graph, in training mode; its parameters are copies unless `inplace`, so that an
        optimizer is made after it.
    """
    who = "qnn.pt2e.prepare_qat_pt2e"
    how = (inplace, parts, progress)
    return _prepare(who, model, quantizer, *how, qat=True, smooth=False)


def _prepare(
    who: str,
    model: Any,
    quantizer: Any,
    inplace: bool,
    parts: Specs | None,
    progress: bool | str,
    *,
    qat: bool,
    smooth: bool,
) -> GraphModule:
    if not callable(getattr(quantizer, "annotate", None)):
        raise TypeError(
            f"{who}: quantizer must have a method annotate(model), as qnn.pt2e.Int8Quantizer has; "
            f"got {type(quantizer).__name__}."
        )
    root = graphs.own(model, inplace=inplace, who=who)
    retarget_annotations(root.graph)
    bodies.mark(root)
    normalise(root)
    folded = {} if qat else fold_nodes(root)
    root = _transformed(quantizer, root, who)
    bodies.mark(root)
    quantizer.annotate(root)
    call_if_there(quantizer, "validate", root)
    _annotate_inside(quantizer, root)
    every = [node for graph in graphs.graphs(root) for node in graph.graph.nodes]
    annotated = [n for n in every if graphs.is_annotated(n)]
    by_scheme = [n for n in annotated if _scheme_of(n) is not None]
    told: dict[Any, str] = {graphs.title(n): graphs.told(n) for n in every}
    reasons: dict[str, str] = dict(getattr(quantizer, "reasons", {}))
    attending = [n for n in every if attention.SCHEME in n.meta]
    why_none = {told.get(n) or n: reason for n, reason in reasons.items()}
    _check_something(who, annotated + attending, why_none)
    others = set(annotated) - set(by_scheme)
    nodes = {node.name: node for node in root.graph.nodes}
    lifted = lift(root, lambda n: n not in others and (bool(by_scheme) or n.target in BY_MODE))
    gone = nodes.keys() - {node.name for node in root.graph.nodes if node in nodes.values()}
    calls = {node.meta.get("qnn_node"): node for node in root.graph.nodes}
    retarget_annotations(root.graph, {nodes[n]: calls[n] for n in gone & calls.keys()})
    bodies.unmark(root)
    schemes, left = _choose(root, lifted, reasons)
    _untie(root, schemes, left, who)
    if by_scheme and not (schemes or others or attending):
        raise ValueError(_nothing(who, "no layer can be quantised", left))
    for name, norm in folded.items():
        _note_fold(root, name, norm)
    _observe(root, schemes, parts, qat, smooth, progress, who)
    callback = getattr(quantizer, "prepare_obs_or_fq_callback", None)
    for graph in graphs.graphs(root):
        insert_observers(graph, qat=qat, callback=callback)
        reasons |= {
            graphs.title(n): n.meta[WHY_LEFT] for n in graph.graph.nodes if WHY_LEFT in n.meta
        }
    bodies.watch(root, observed=True)
    for node, reason in lifted.reasons.items():
        if node.target is not attention.OPERATOR:
            reasons[graphs.title(node)] = reason
        elif node not in attending:
            reasons.setdefault(graphs.title(node), reason)
    gone |= {node.meta["qnn_node"] for calls in lifted.layers.values() for node in calls}
    for node in (each for calls in lifted.layers.values() for each in calls):
        node.meta.pop(ANNOTATION, None)
    root.meta[LEFT] = {told[n]: why for n, why in reasons.items() if n in told and n not in gone}
    root.meta[REASONS] = left
    set_reasons(root)
    return root.train(qat)


def _transformed(quantizer: Any, root: GraphModule, who: str) -> GraphModule:
    """What a quantizer makes of the graph, which may be another: one that it exported anew."""
    new = call_if_there(quantizer, "transform_for_annotation", root)
    if new is None or new is root:
        return root
    meta = dict(root.meta)
    root = graphs.own(new, inplace=True, who=who)
    root.meta = meta | root.meta
    return root


def _annotate_inside(quantizer: Any, root: GraphModule) -> None:
    """Have quantizers annotate the graphs that `root` calls too, one at a time, unless they do so
    by themselves.
    """
    for each in getattr(quantizer, "quantizers", [quantizer]):
        if getattr(each, "annotates_inner_graphs", False):
            continue
        for graph in graphs.graphs(root):
            if graph is not root and not any(bodies.CONDITION in n.meta for n in graph.graph.nodes):
                each.annotate(graph)
                call_if_there(each, "validate", graph)


def set_reasons(root: GraphModule) -> None:
    """Put on each layer that stays float why it does; a verb has a word of its own on those that it
    was not to take.
    """
    for name, reason in root.meta.get(REASONS, {}).items():
        setattr(root.get_submodule(name), REASON, reason)


def _scheme_of(node: Node) -> Any:
    return getattr(node.meta.get(ANNOTATION), "scheme", None)


def _check_something(who: str, annotated: list[Node], reasons: dict[str, str]) -> None:
    """Raise if there is nothing to do; `reasons` by the node in words."""
    if annotated:
        return
    raise ValueError(_nothing(who, "the quantizer annotated nothing", reasons))


def _nothing(who: str, what: str, reasons: dict[str, str]) -> str:
    listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    rest = f"what it might have taken:\n{listed}" if listed else "the graph calls no layer."
    return f"{who}: {what}; {rest}"


def _choose(
    root: GraphModule, lifted: Lifted, reasons: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The scheme of each layer, by its name, and why the others stay float; `reasons` are those of
    the nodes that the quantizer left alone.
    """
    schemes, left = dict[str, str](), dict[str, str]()
    for name, calls in lifted.layers.items():
        layer = root.get_submodule(name)
        kind = kind_of(layer)
        if kind is None:
            if "qnn_reason" in calls[0].meta:
                left[name] = calls[0].meta["qnn_reason"]
            continue
        found = {_scheme_of(node) for node in calls}
        alone = [node for node in calls if _scheme_of(node) is None]
        reason: str | None
        if (reader := lifted.read_elsewhere.get(name)) is not None:
            reason = f"its weight or bias is read as a float tensor by {reader}"
        elif alone:
            reason = reasons.get(alone[0].meta["qnn_node"], "the quantizer did not annotate it")
            if len(found) > 1:
                reason = f"one of its calls needs the float weight: {reason}"
        elif len(found) > 1:
            reason = f"its calls would get the schemes {' and '.join(sorted(map(str, found)))}"
        else:
            scheme = _for_kind(kind.name, str(_scheme_of(calls[0])))
            reason = left_alone(layer, scheme, named=True) or why_not(layer, scheme)
        if reason is None:
            schemes[name] = scheme
        else:
            left[name] = reason
    return schemes, left


def _untie(root: GraphModule, schemes: dict[str, str], left: dict[str, str], who: str) -> None:
    """Leave alone layers whose weight is that of a layer that stays float."""
    names = {id(root.get_submodule(name)): name for name in schemes}
    plan = Plan({key: schemes[name] for key, name in names.items()})
    keep_ties_to_float(dict(root.named_modules(remove_duplicate=False)), plan, who)
    for key, reason in plan.reasons.items():
        left[names[key]] = reason
        del schemes[names[key]]


def _for_kind(kind: str, scheme: str) -> str:
    """The scheme for a kind of layers: a table has no activations, and so no grid."""
    return "int8_weight" if kind == "embedding" and get_scheme(scheme).static else scheme


def _note_fold(root: GraphModule, name: str, norm: str) -> None:
    layer = root.get_submodule(name)
    layer.__dict__[FOLDED] = f"{getattr(layer, FOLDED, '')}; BatchNorm {norm} folded in"


def _observe(
    root: GraphModule,
    schemes: dict[str, str],
    parts: Specs | None,
    qat: bool,
    smooth: bool,
    progress: bool | str,
    who: str,
) -> None:
    """Observe the layers of schemes with grids, and keep the schemes of the others."""
    observed = {name: scheme for name, scheme in schemes.items() if get_scheme(scheme).static}
    names = {id(root.get_submodule(name)): name for name in observed}
    shared = tied(dict(root.named_modules()))

    def make(old: nn.Module, own: Own) -> nn.Module:
        name, alone = names[id(old)], smooth and id(old) not in shared
        how = Observation(name, checked, False, qat, observed[name], smooth=alone)
        return cast(Kind, kind_of(old)).observe(old, how, own)

    plan = Plan({key: observed[name] for key, name in names.items()})
    checked = checked_parts(dict(root.named_modules()), plan, parts, False)
    swapped(root, plan, make, inplace=True, who=who, progress=progress)
    run_hooks("qnn.prepare", root)
    root.meta[SCHEMES] = {name: s for name, s in schemes.items() if name not in observed}
