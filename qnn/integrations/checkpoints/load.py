"""`load_checkpoint`: the quantised checkpoint of any writer in the table, into a float model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from qnn.integrations.checkpoints.files import Files
from qnn.integrations.checkpoints.numbers import STORED, require_stored
from qnn.integrations.checkpoints.read import check_floats, read
from qnn.integrations.compressed_tensors import schemes_of, smoothed_of
from qnn.kernels.formats import FLOATS
from qnn.kinds import kind_of
from qnn.nn.base import Quantized
from qnn.nn.linear.quantized import QLinear
from qnn.verbs.checks import require_module
from qnn.verbs.convert import SchemeMap, convert, planned
from qnn.verbs.plan import REASON, run_hooks, swapped

ModelT = TypeVar("ModelT", bound=nn.Module)
_WHO = "qnn.load_checkpoint"
_SHOWN = 5


def load_checkpoint(
    model: ModelT,
    path: str | Path,
    *,
    activations: str = STORED,
    dequantize: bool = False,
    strict: bool = True,
) -> ModelT:
    """Load a quantised checkpoint into a float model, whose layers become quantised ones.

    The files are those of `qnn.save_checkpoint`, or of any writer in the table of the page
    "Checkpoints": compressed-tensors, ModelOpt, AutoAWQ, GPTQ, DeepSeek. Each layer becomes one of
    the scheme that stands for the same weights, exactly, and has the arithmetic that the config
    says; a layer for which there is none is an error. What needs no change stays mapped from the
    file.

    Args:
        model: the float model, with the names that are in the file, also on the meta device. It is
            changed, once everything has been read and checked.
        path: a folder with `config.json` and `.safetensors` files, or one such file.
        activations: `"stored"`, as the config says; `"dynamic"`, quantised in the same format with
            scales from the tensor at hand, and what calibration found is left out; `"float"`, left
            as they are.
        dequantize: leave the layers float, with the weights that the file stands for.
        strict: whether tensors that the model has no place for, or that it lacks, are errors.

    Returns:
        `model`.

    Raises:
        ValueError: files that are cut off or that the index does not fit; tensors that are not what
            the config says, or not what the model has; a layer that no scheme holds exactly. The
            model is as it was then.
        TypeError: `model` is not a module, or is a single layer.

        with torch.device("meta"):
            model = Net()
        qnn.load_checkpoint(model, "net-int8")
    """
    require_module(_WHO, model)
    if not model._modules:
        raise TypeError(
            f"{_WHO}: the model is a single {type(model).__name__}; put it in a module."
        )
    files = Files(path)
    if files.config.get("qnn"):
        require_stored(_WHO, activations)
        described = {"quantization_config": files.config}
        schemes: SchemeMap = schemes_of(described, model)
        state, smoothed = files.tensors, smoothed_of(described, model)
    else:
        held = model.state_dict()

        def dtype_of(name: str) -> torch.dtype:
            like: torch.Tensor | None = held.get(f"{name}.weight", held.get(name))
            return torch.get_default_dtype() if like is None else like.dtype

        found = read(files, activations=activations, dequantize=dtype_of if dequantize else False)
        schemes, state, smoothed = dict[Any, str | None](found.schemes), found.state, list[str]()
        _require_layers(model, found.schemes, str(path))
        done = {*found.schemes, *found.floats}
        linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
        if found.description is not None and found.description.exact:
            here = [n for n in linear if n not in done and f"{n}.weight" in found.state]
            check_floats(f"{_WHO}: {path}", found.description, here, by_class=True)
    skeleton = _skeleton(model)
    if schemes:
        _convert(skeleton, schemes, smoothed, str(path))
    _fill(skeleton, model, state, strict=strict, who=f"{_WHO}: {path}")
    result = _moved(skeleton, model, schemes)
    if schemes and dequantize and files.config.get("qnn"):
        _decode(result)
    return result


def _require_layers(model: nn.Module, schemes: dict[str, str], who: str) -> None:
    modules = dict(model.named_modules())
    odd = [name for name in schemes if not is_layer(modules.get(name))]
    if odd:
        kind = type(modules[odd[0]]).__name__ if odd[0] in modules else "no such module"
        raise ValueError(
            f"{_WHO}: {who} has quantised {', '.join(odd[:_SHOWN])}, and the model has {kind} "
            f"there; it takes the float model, with nn.Linear, that the file was made from."
        )


def is_layer(module: nn.Module | None) -> bool:
    """Whether a module of a float model is what files of others have quantised."""
    if module is None or isinstance(module, nn.Linear):
        return module is not None
    kind = kind_of(module)
    return kind is not None and kind.name == "experts"


def _skeleton(model: ModelT) -> ModelT:
    """A copy on the meta device, without the values."""
    memo: dict[int, Any] = {}
    for each in model.parameters():
        memo[id(each)] = nn.Parameter(each.detach().to("meta"), each.requires_grad)
    memo |= {id(each): each.detach().to("meta") for each in model.buffers()}
    return copy.deepcopy(model, memo)


def _convert(skeleton: nn.Module, schemes: SchemeMap, smoothed: list[str], who: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a file that is to be written
        convert(skeleton, schemes, inplace=True, progress=False)
    for layer in smoothed:
        cast(QLinear, skeleton.get_submodule(layer))._smooth(True)
    for name in (str(name) for name, scheme in schemes.items() if scheme is not None):
        module = skeleton.get_submodule(name)
        if not isinstance(module, Quantized):
            reason = getattr(module, REASON, "it is not a layer that qnn converts")
            raise ValueError(f"{_WHO}: {who} has {name} quantised, which stays float: {reason}.")


def _fill(
    skeleton: nn.Module, model: nn.Module, state: dict[str, torch.Tensor], *, strict: bool, who: str
) -> None:
    """Read a state into the skeleton, cast and moved as the model is; a ValueError for what does
    not fit.
    """
    expected = skeleton.state_dict()
    held = model.state_dict()
    layers = {name for name, m in skeleton.named_modules() if isinstance(m, Quantized)}
    made = dict[str, torch.Tensor]()
    for name, tensor in state.items():
        owner = name.rpartition(".")[0]
        like = held.get(name)
        near = like
        if owner in layers:
            near = next(iter(model.get_submodule(owner).parameters()), None)
        device = None if near is None or near.is_meta else near.device
        floats = like is not None and {like.dtype, tensor.dtype} <= {*FLOATS}
        dtype = like.dtype if like is not None and floats else tensor.dtype
        made[name] = tensor.to(device=device or tensor.device, dtype=dtype)
    ties = _ties(skeleton)
    for names in ties:
        there = [name for name in names if name in made]
        made |= {name: made[there[0]] for name in names if there and name not in made}
    missing = expected.keys() - made.keys()
    try:
        result = skeleton.load_state_dict(made, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{who}: {error}") from None
    extra = set(result.unexpected_keys)
    problems = [
        f"the file has no {_some(missing)}" if missing else "",
        f"the model has no place for {_some(extra)}" if extra else "",
    ]
    if strict and any(problems):
        raise ValueError(f"{who}: {'; '.join(filter(None, problems))}.")
    if some := [name for name in missing if name.rpartition(".")[0] in layers]:
        raise ValueError(f"{who}: the file has no {_some(some)}.")
    for names in ties:
        places = [
            (skeleton.get_submodule(o), leaf) for o, _, leaf in (n.rpartition(".") for n in names)
        ]
        first, name = places[0]
        for module, leaf in places[1:]:
            module._parameters[leaf] = first._parameters[name]


def _some(names: Any) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _ties(model: nn.Module) -> list[list[str]]:
    """The names of parameters that are one."""
    found: dict[int, list[str]] = {}
    for name, each in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(each), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _moved(skeleton: nn.Module, model: ModelT, schemes: SchemeMap) -> ModelT:
    """Put what the skeleton holds into the model."""
    names = {id(module): name for name, module in model.named_modules()}
    if schemes:
        plan = planned(model, schemes)

        def make(old: nn.Module, own: Any) -> nn.Module:
            return skeleton.get_submodule(names[id(old)]).train(old.training)

        model = swapped(model, plan, make, inplace=True, who=_WHO)
    made = dict[int, nn.Parameter]()
    for name, module in model.named_modules():
        other = skeleton.get_submodule(name)
        if other is module:
            continue
        for leaf, new in other._parameters.items():
            old = module._parameters[leaf]
            if old is None or new is None or new.is_meta:
                continue
            if old.is_meta:
                fresh = nn.Parameter(new.detach(), requires_grad=old.requires_grad)
                module._parameters[leaf] = made.setdefault(id(old), fresh)
            else:
                old.data = new.detach()
        for leaf, buffer in other._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer
    run_hooks("qnn.convert", model)
    return model


def _decode(model: nn.Module) -> None:
    made = dict[int, nn.Module]()
    for name, layer in reversed(list(model.named_modules(remove_duplicate=False))):
        if isinstance(layer, Quantized):
            made[id(layer)] = made.get(id(layer)) or layer.dequantize()
            model.set_submodule(name, made[id(layer)])


__all__ = ["load_checkpoint"]
