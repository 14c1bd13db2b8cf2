"""`fuse`: fold BatchNorms into the layers before them."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import nn

from qnn.functional import batch_norm
from qnn.kinds import Own, kind_of, qualified
from qnn.nn.values import why_not_finite
from qnn.verbs.calibrate import call
from qnn.verbs.checks import require_module, why_not_plain
from qnn.verbs.compare import _Power, evaluating
from qnn.verbs.edges import Edges, by_graph, by_run
from qnn.verbs.plan import FOLDED, Plan, run_hooks, swapped

ModelT = TypeVar("ModelT", bound=nn.Module)
Affine = tuple[torch.Tensor, torch.Tensor]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# BatchNorms of other libraries that are buffers alone, `weight`, `bias`, `running_mean` and
# `running_var`, by the end of their names; each is asked for its arithmetic.
_FROZEN = ("FrozenBatchNorm2d",)
# A BatchNorm and what it calls afterwards, which stays.
_WITH_MORE = {
    "timm.layers.norm_act.BatchNormAct2d": ("drop", "act"),
    "timm.layers.norm_act.FrozenBatchNormAct2d": ("drop", "act"),
}
# The least agreement of the outputs, in dB: what folds right has the roundings of the dtype alone.
_AGREEMENT = {torch.float64: 120.0, torch.float32: 60.0}
_AGREEMENT_OF_HALVES = 20.0


def fuse(model: ModelT, inputs: Any = None, *, inplace: bool = False) -> ModelT:
    """Fold each BatchNorm that follows a convolution or linear layer into that layer.

    In evaluation mode a BatchNorm is a scale and a shift per channel, `scale = weight / √(var +
    eps)` and `shift = bias − mean · scale`. The layer before it takes both,

        weight' = weight · scale,   bias' = bias · scale + shift,

    and an `nn.Identity` stands where the BatchNorm was. Fuse before `qnn.prepare` and
    `qnn.convert`, so that the quantised layers hold the folded weights; `qnn.summary` names what
    was folded into a layer, and why another BatchNorm was not.

    A pair is folded only where the model shows that the layer's result goes into the BatchNorm and
    nowhere else, and that the BatchNorm has no other input: never by the order of modules. Without
    `inputs`, `torch.fx` traces the model, which holds for any input and computes nothing; it cannot
    follow a model whose Python code depends on tensors. With `inputs` the model is run on them, and
    every operation that meets a layer's result or parameters is watched; the fused model then has
    to give the same outputs. A run shows one path through the model: if other arguments lead to
    others, give those that are in use.

    Folded are `nn.BatchNorm1d`, `2d`, `3d`, `nn.SyncBatchNorm`, the `FrozenBatchNorm2d` of other
    libraries, and timm's `BatchNormAct2d`, whose activation stays; not those in training mode or
    without running statistics, and no pair with hooks, parametrisations or shared weights. For
    `nn.BatchNorm1d`, `inputs` are needed: the axis that it normalises depends on them.

    Args:
        model: a float module, in evaluation mode.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments, a small batch.
        inplace: change `model` itself; otherwise it is copied, and untouched.

    Returns:
        The fused model: `model` itself if `inplace`.

    Raises:
        ValueError: nothing to fold, with the reason of each BatchNorm; a model that `torch.fx`
            cannot trace, without `inputs`; outputs that differ. Nothing has been changed then.
        TypeError: `model` is not an `nn.Module`.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> fuse(model)[1]
    Identity()
    """
    require_module("qnn.fuse", model)
    names = {id(module): name for name, module in model.named_modules()}
    norms = {id(m): m for m in model.modules() if _is_norm(m)}
    if not norms:
        raise ValueError("qnn.fuse: nothing to fold: the model has no BatchNorm.")
    layers = {id(m): m for m in model.modules() if _is_layer(m)}
    if inputs is None:
        edges, before = _traced(model, layers | norms), None
    else:
        edges, before = watched_run(model, inputs, layers | norms)
    plan, folds = Plan(), dict[int, tuple[nn.Module, Affine]]()
    shared = shared_parameters(model)
    for key, norm in norms.items():
        reason = _why_not_norm(norm) or _why_not_edge(norm, edges, layers, names, inputs is None)
        if reason is None:
            (source,) = edges.sources[key]
            layer = layers[cast(Any, source)]
            reason = _why_not_layer(layer, names[id(layer)], shared)
        if reason is None and isinstance(found := _affine(norm, layer), str):
            reason = found
        if reason is None:
            folds[id(layer)] = norm, cast(Affine, found)
            plan.schemes[id(layer)] = plan.schemes[key] = None
        else:
            plan.reasons[key] = f"not folded: {reason}"
    if not folds:
        told = "\n".join(f"  {names[key] or 'model'}: {why}" for key, why in plan.reasons.items())
        raise ValueError(f"qnn.fuse: nothing to fold:\n{told}")

    def make(old: nn.Module, own: Own) -> nn.Module:
        if id(old) not in folds:
            return _rest(old, own)
        norm, affine = folds[id(old)]
        return _folded(old, affine, names[id(norm)])

    result = model
    if before is not None or not inplace:
        result = swapped(model, plan, make, inplace=False, who="qnn.fuse")
    if before is not None:
        require_same("qnn.fuse", result, inputs, before)
    if inplace:
        result = swapped(model, plan, make, inplace=True, who="qnn.fuse")
    run_hooks("qnn.fuse", result)
    return result


# -- how the model is connected -------------------------------------------------------------------


def _traced(model: nn.Module, watched: dict[int, nn.Module]) -> Edges:
    try:
        return by_graph(model, watched)
    except (
        Exception
    ) as error:  # whatever a model's own code raises on what it cannot do with a proxy
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"qnn.fuse: torch.fx cannot trace the model ({type(error).__name__}: {first}); give an "
            "example of its input: qnn.fuse(model, inputs)."
        ) from error


def watched_run(model: nn.Module, inputs: Any, watched: dict[int, nn.Module]) -> tuple[Edges, Any]:
    """Where results go in a run on `inputs`, and what the model returns."""
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]):
        return by_run(watched, lambda: call(model, _copied(inputs)))


def _copied(inputs: Any) -> Any:
    """For a model that writes into its input, or into a cache that it is given."""
    return copy.deepcopy(inputs)


def require_same(who: str, fused: nn.Module, inputs: Any, before: Any) -> None:
    """Raise unless the outputs of what the verb `who` made are `before`, up to rounding."""
    power = _Power()
    with torch.no_grad(), evaluating(fused), torch.random.fork_rng(devices=[]):
        after = call(fused, _copied(inputs))
    power.add_all(before, after)
    dtype = next(p.dtype for p in fused.parameters() if p.is_floating_point())
    least = _AGREEMENT.get(dtype, _AGREEMENT_OF_HALVES)
    if not power.db >= least:
        raise ValueError(
            f"{who}: the changed model's outputs agree to {power.db:.1f} dB alone, where {dtype} "
            f"should give {least:.0f}: the outputs are not a function of the inputs, or the model "
            "calls its layers in a way that one run does not show. Nothing has been changed."
        )


def _why_not_edge(
    norm: nn.Module,
    edges: Edges,
    layers: dict[int, nn.Module],
    names: dict[int, str],
    by_graph: bool,
) -> str | None:
    """Why the result of exactly one layer does not go into `norm`, and there alone."""
    key = id(norm)

    def told(which: set[int | str]) -> str:
        return " and ".join(sorted(repr(names[w]) if isinstance(w, int) else w for w in which))

    if key not in edges.sources:
        return "the model does not call it" + ("" if by_graph else " on these inputs")
    sources = edges.sources[key]
    source: Any = next(iter(sources), None)
    if len(sources) != 1 or source not in layers:
        return f"its input comes from {told(sources)}, not from one convolution or linear layer"
    layer, readers = layers[source], edges.readers[source]
    if readers != {key}:
        return f"the result of {names[id(layer)]!r} also goes to {told(readers - {key})}"
    for each in (layer, norm):
        if edges.tensors.get(id(each)):
            read = " and ".join(sorted(edges.tensors[id(each)]))
            return f"the tensors of {names[id(each)]!r} are read outside of it, by {read}"
    dims = _dims(layer)
    if by_graph and isinstance(norm, nn.BatchNorm1d | nn.SyncBatchNorm):
        return (
            "which axis it normalises depends on the input's axes, and a graph does not know them; "
            "give an example: qnn.fuse(model, inputs)"
        )
    over = 3 if isinstance(norm, nn.BatchNorm3d) else 2
    if dims != over if by_graph else edges.ranks[key] != {dims + 2}:
        return f"it normalises an axis that is not that of {names[id(layer)]!r}'s outputs"
    return None


def _dims(layer: nn.Module) -> int:
    """Over how many axes a layer slides; 0 for a linear one."""
    return 0 if isinstance(layer, nn.Linear) else cast(Any, layer).weight.dim() - 2


# -- what can be folded ---------------------------------------------------------------------------


def _is_layer(module: nn.Module) -> bool:
    """Whether a layer computes with its weight and bias what its class in torch does."""
    kind: Any = type(module)
    base: Any = next((each for each in _LAYERS if isinstance(module, each)), None)
    own = ("forward", "_conv_forward")
    return base is not None and all(
        getattr(kind, name, None) is getattr(base, name, None) for name in own
    )


def _is_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        or type(module).__name__ in _FROZEN
        or qualified(type(module)) in _WITH_MORE
    )


def _why_not_norm(norm: nn.Module) -> str | None:
    kind = type(norm)
    if kind not in _NORMS and kind.__name__ not in _FROZEN and qualified(kind) not in _WITH_MORE:
        return f"{qualified(kind)} is a subclass of BatchNorm with a meaning of its own"
    if norm.training and kind.__name__ not in _FROZEN:
        return "it is in training mode; call model.eval() first"
    if getattr(norm, "running_mean", None) is None or norm.running_var is None:
        return "it has no running statistics, and so normalises by each batch's own"
    more = set(_WITH_MORE.get(qualified(kind), ()))
    known = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    held = {**norm._parameters, **norm._buffers}
    extra = [*(held.keys() - known), *(norm._modules.keys() - more)]
    if extra or hasattr(norm, "parametrizations"):
        return f"it holds more than its statistics, weight and bias ({', '.join(extra)})"
    return why_not_itself(norm)


def why_not_itself(module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "a forward of its own was set on it"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which would see other values"
    return None


def _why_not_layer(layer: nn.Module, name: str, shared: set[int]) -> str | None:
    reason = why_not_plain(layer) if kind_of(layer) else None
    if (reason := reason or why_not_itself(layer)) is not None:
        return f"of {name!r}: {reason}"
    held = [tensor for tensor in layer._parameters.values() if tensor is not None]
    if any(id(tensor) in shared for tensor in held):
        return f"the parameters of {name!r} are shared with another layer"
    if any(type(tensor.data) is not torch.Tensor for tensor in held):
        return f"the parameters of {name!r} are not plain tensors; fuse before sharding"
    return None


def shared_parameters(model: nn.Module) -> set[int]:
    """The parameters that several modules hold, by id."""
    seen, shared = set[int](), set[int]()
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                (shared if id(tensor) in seen else seen).add(id(tensor))
    return shared


def _affine(norm: nn.Module, layer: nn.Module) -> Affine | str:
    """The scale and shift of a BatchNorm, or why the layer cannot take them."""
    of: Any = norm
    with torch.no_grad():
        held = of.running_mean, of.running_var, of.weight, of.bias, getattr(of, "eps", 1e-5)
        scale, shift = batch_norm.scale_and_shift(*held)
    if scale.is_meta:
        return "it is on the meta device and has no values"
    if len(scale) != (out := _outputs(layer)):
        return f"it has {len(scale)} channels, and the layer {out} outputs"
    weight, bias = _folded_tensors(layer, (scale, shift))
    if why_not_finite(weight) or why_not_finite(bias):
        return f"the folded weight would not be finite in {weight.dtype}"
    if type(norm) not in _NORMS:
        # Its code is not torch's: what it computes has the last word.
        probe = torch.stack([torch.zeros_like(of.running_mean), torch.ones_like(of.running_mean)])
        with torch.no_grad():
            bare = copy.copy(norm)
            bare._modules = {name: nn.Identity() for name in norm._modules}
            got = bare(probe[:, :, None, None])[:, :, 0, 0].double()
        if not torch.allclose(got, probe.double() * scale + shift, rtol=1e-3, atol=1e-5):
            return f"{qualified(type(norm))} is not weight · (x − mean) / √(var + eps) + bias"
    return scale, shift


def _outputs(layer: nn.Module) -> int:
    of: Any = layer
    return int(of.out_features if isinstance(layer, nn.Linear) else of.out_channels)


def _folded_tensors(layer: nn.Module, affine: Affine) -> tuple[torch.Tensor, torch.Tensor]:
    of: Any = layer
    bias = None if of.bias is None else of.bias.detach()
    groups = of.groups if isinstance(layer, _TRANSPOSED) else None
    scale, shift = (each.to(of.weight.device) for each in affine)
    return batch_norm.fold(of.weight.detach(), bias, scale, shift, transposed_groups=groups)


def _folded(layer: nn.Module, affine: Affine, name: str) -> nn.Module:
    """The layer with a BatchNorm in its weight and bias."""
    made = copy.copy(layer)
    trained = cast(Any, layer).weight.requires_grad
    made._parameters = {
        name: nn.Parameter(tensor, requires_grad=trained)
        for name, tensor in zip(("weight", "bias"), _folded_tensors(layer, affine), strict=True)
    }
    made.__dict__[FOLDED] = f"{getattr(layer, FOLDED, '')}; BatchNorm {name} folded in"
    return made


def _rest(norm: nn.Module, own: Own) -> nn.Module:
    """What stays in the place of a BatchNorm."""
    held = _WITH_MORE.get(qualified(type(norm)), ())
    more = [own(module) for name in held if (module := norm._modules.get(name)) is not None]
    more = [module for module in more if type(module) is not nn.Identity]
    made = more[0] if len(more) == 1 else nn.Sequential(*more) if more else nn.Identity()
    return made.train(norm.training)


__all__ = ["fuse", "require_same", "shared_parameters", "watched_run", "why_not_itself"]
