"""`smooth`: move outliers of activations into the weights that read them, exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from qnn.calibration.columns import Columns
from qnn.calibration.smoothing import factors
from qnn.calibration.spec import QuantSpec
from qnn.kinds import qualified
from qnn.verbs.calibrate import call
from qnn.verbs.checks import require_module, why_not_plain
from qnn.verbs.compare import evaluating
from qnn.verbs.edges import Edges
from qnn.verbs.fuse import require_same, shared_parameters, watched_run, why_not_itself
from qnn.verbs.plan import FOLDED, REASON

ModelT = TypeVar("ModelT", bound=nn.Module)

# The grid of an input that is quantised dynamically or statically, in 8 bits.
_GRID = QuantSpec(torch.int8)


def smooth(
    model: ModelT, batches: Iterable[Any], *, alpha: float | None = None, inplace: bool = False
) -> ModelT:
    """Divide the channels of a norm's result by constants, and multiply the weights that read them
    by the same, so that outliers of few channels do not spend the grid of all (SmoothQuant):

        s_j = max|x_j|^α / max|w_j|^(1−α),   norm.weight / s,   norm.bias / s,   linear.weight · s

    rounded to powers of two: the float model's outputs stay the same to the bit, but for numbers
    beyond its dtype. Do it before `qnn.prepare` or `qnn.convert`; `qnn.summary` names the norms
    that were smoothed, and why others were not.

    Folded are `nn.LayerNorm`, `nn.RMSNorm`, the RMSNorms of other libraries that multiply by their
    weight, and a linear layer before an `nn.ReLU`, where every reader is a linear layer that reads
    nothing else: the model is run on the first batch, and every operation that meets a result is
    watched. In a post-norm model, as BERT, a norm's result is also added to what comes later, and
    nothing can be folded; there `qnn.prepare(model, smooth=True)`, the default, has the layer
    multiply its input.

    Args:
        model: a float module.
        batches: as in `qnn.calibrate`; what the channels' magnitudes are taken from.
        alpha: how much of the range goes into the weights, 0 to 1; for each norm what leaves the
            least noise if None, and nothing where that is no gain.
        inplace: change `model` itself; otherwise it is copied, and untouched.

    Returns:
        The smoothed model: `model` itself if `inplace`.

    Raises:
        ValueError: nothing to smooth, with the reason of each norm; no batches; an `alpha` that is
            not in 0 … 1; outputs that are not the same. Nothing has been changed then.
        TypeError: `model` is not an `nn.Module`, or `batches` is one tensor.

    >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    >>> smoothed = smooth(model, [torch.randn(16, 8)], alpha=0.5)
    """
    require_module("qnn.smooth", model)
    if alpha is not None and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        raise ValueError(f"qnn.smooth: alpha must be a number in 0 … 1, or None, got {alpha!r}.")
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise TypeError(
            f"qnn.smooth: batches is a {type(batches).__name__}, one batch; pass [batch]."
        )
    held = list(batches)
    if not held:
        raise ValueError("qnn.smooth: there are no batches.")
    names = {id(module): name for name, module in model.named_modules()}
    watched = {id(m): m for m in model.modules() if _is_watched(m)}
    edges, before = watched_run(model, held[0], watched)
    shared, found, reasons = shared_parameters(model), dict[int, list[nn.Linear]](), {}
    for key, module in watched.items():
        before_relu = _is_linear(module) and _before_relu(key, edges, watched)
        if not before_relu and not _is_norm(module):
            continue
        readers, reason = _readers(key, module, edges, watched, names)
        for each in (module, *readers):
            reason = reason or _why_not(each, names[id(each)], edges, shared)
        if reason is None:
            found[key] = readers
        else:
            reasons[key] = reason
    columns = _columns(model, held, found) if found else {}
    scales = dict[int, torch.Tensor]()
    for key, readers in found.items():
        weight = torch.cat([each.weight.detach() for each in readers])
        scale = factors(weight, columns[key], _GRID, alpha=alpha, gain=1.0)
        if scale is None:
            reasons[key] = "it has no outliers that smoothing would lessen"
        else:
            scales[key] = scale
    if not scales:
        told = "\n".join(f"  {names[key] or 'model'}: {why}" for key, why in reasons.items())
        raise ValueError(f"qnn.smooth: nothing to smooth:\n{told or '  no norm before layers'}")
    by_name = [
        (names[key], scale, [names[id(r)] for r in found[key]]) for key, scale in scales.items()
    ]
    copied = copy.deepcopy(model)
    _fold(copied, by_name)
    require_same("qnn.smooth", copied, held[0], before)
    if inplace:
        _fold(model, by_name)
    result = model if inplace else copied
    for key, why in reasons.items():
        module = result.get_submodule(names[key])
        if not _is_linear(module):
            setattr(module, REASON, f"normalisation stays in float; not smoothed: {why}")
    return result


# -- who reads what -------------------------------------------------------------------------------


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_norm(module: nn.Module) -> bool:
    known = isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return known or type(module).__name__.endswith("RMSNorm")


def _is_watched(module: nn.Module) -> bool:
    return _is_linear(module) or _is_norm(module) or type(module) is nn.ReLU


def _before_relu(key: int, edges: Edges, watched: dict[int, nn.Module]) -> bool:
    readers = edges.readers.get(key, set())
    return len(readers) == 1 and all(type(watched.get(cast(int, r))) is nn.ReLU for r in readers)


def _readers(
    key: int, module: nn.Module, edges: Edges, watched: dict[int, nn.Module], names: dict[int, str]
) -> tuple[list[nn.Linear], str | None]:
    """The linear layers that read the result of a module, or of the ReLU after it; and why these
    are not all that it is for.
    """
    if key not in edges.readers:
        return [], "the model does not call it on these inputs"
    if _is_linear(module):
        (relu,) = edges.readers[key]
        if edges.sources[cast(int, relu)] != {key}:
            return [], f"the ReLU {names[cast(int, relu)]!r} has other inputs too"
        key = cast(int, relu)
        if (reason := why_not_itself(watched[key])) is not None:
            return [], f"of {names[key]!r}: {reason}"
    readers = edges.readers[key]
    linears = [watched[r] for r in watched if r in readers and _is_linear(watched[r])]
    rest = readers - set(map(id, linears))
    if rest or not linears:
        told = sorted(repr(names[r]) if isinstance(r, int) else r for r in rest)
        return [], f"its result also goes to {' and '.join(told) or 'nothing'}"
    for each in linears:
        if edges.sources[id(each)] != {key}:
            return [], f"{names[id(each)]!r} has other inputs too"
    return cast(list[nn.Linear], linears), None


def _why_not(module: nn.Module, name: str, edges: Edges, shared: set[int]) -> str | None:
    """Why the weight of a norm or a linear layer cannot be changed."""
    reason = why_not_itself(module) or (why_not_plain(module) if _is_linear(module) else None)
    held = [tensor for tensor in module._parameters.values() if tensor is not None]
    if reason is None and any(id(tensor) in shared for tensor in held):
        reason = "its parameters are shared with another layer"
    if reason is None and edges.tensors.get(id(module)):
        reason = f"its tensors are read outside of it, by {', '.join(edges.tensors[id(module)])}"
    if reason is None and _is_norm(module):
        reason = _why_not_norm(module)
    return None if reason is None else f"of {name or 'the model'!r}: {reason}"


def _why_not_norm(norm: nn.Module) -> str | None:
    of: Any = norm
    weight = norm._parameters.get("weight")
    if weight is None or weight.dim() != 1 or weight.is_meta:
        return "it has no weight of one axis to fold into"
    if set(norm._parameters) - {"weight", "bias"} or norm._buffers or norm._modules:
        return "it holds more than a weight and a bias"
    # Its code has the last word: some multiply by 1 + weight.
    probe, twin = torch.linspace(-1, 2, len(weight)).to(weight)[None], copy.deepcopy(of)
    with torch.no_grad():
        expected = 2 * of(probe)
        for tensor in twin._parameters.values():
            if tensor is not None:
                tensor.mul_(2)
        if not torch.equal(twin(probe), expected):
            return f"{qualified(type(norm))} does not multiply by its weight alone"
    return None


# -- the fold -------------------------------------------------------------------------------------


def _columns(
    model: nn.Module, batches: list[Any], found: dict[int, list[nn.Linear]]
) -> dict[int, torch.Tensor]:
    """What the columns of each group's input hold, over all batches."""
    seen: dict[int, torch.Tensor] = {}

    def watch(key: int) -> Any:
        def look(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = next(iter((*args, *kwargs.values()))).detach()
            if x.numel():
                seen[key] = Columns.with_values(seen[key], x) if key in seen else Columns.of(x)

        return look

    handles = [
        readers[0].register_forward_pre_hook(watch(key), with_kwargs=True)
        for key, readers in found.items()
    ]
    try:
        with torch.no_grad(), evaluating(model), torch.random.fork_rng(devices=[]):
            for batch in batches:
                call(model, copy.deepcopy(batch))
    finally:
        for handle in handles:
            handle.remove()
    none = {key: Columns.none(readers[0].in_features) for key, readers in found.items()}
    return none | seen


@torch.no_grad()
def _fold(model: nn.Module, groups: list[tuple[str, torch.Tensor, list[str]]]) -> None:
    for name, scale, readers in groups:
        module = model.get_submodule(name)
        for tensor in module._parameters.values():
            if tensor is not None:
                factor = scale.to(tensor)
                tensor.mul_(factor[:, None] if tensor.dim() > 1 else factor)
        for reader in readers:
            weight: Any = model.get_submodule(reader).weight
            weight.div_(scale.to(weight))
        told = f"; smoothed into {', '.join(readers)}"
        module.__dict__[FOLDED] = getattr(module, FOLDED, "") + told


__all__ = ["smooth"]
