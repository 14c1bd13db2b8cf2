"""How a converted model describes itself on disk: the `quantization_config` of compressed-tensors.

`save_pretrained` writes it into `config.json`. Without it transformers reloads the integers as if
they were the float weights, without an error; with it transformers (through the compressed-tensors
package) and the serving engines read the same file. What that package cannot run is described in a
form that it refuses, by name and with what reads it: `qnn.load_pretrained`.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qnn.kernels import Scheme, get_scheme
from qnn.kinds import kind_of, owners
from qnn.nn.base import Quantized
from qnn.verbs.patterns import Pattern
from qnn.verbs.plan import after_swap

# Shown by transformers and diffusers as what they do not know; pydantic cuts at 50 characters.
_READER = "use qnn.load_pretrained"
SMOOTHED = "smoothed"
# What diffusers refuses, by this name, until `qnn.integrations.diffusers` is imported.
DIFFUSERS_METHOD = f"compressed-tensors; {_READER}"


def _group(scheme: Scheme, targets: list[str], kind: str | None) -> dict[str, Any]:
    activation = scheme.activation
    # Those of nvfp4 have a second scale, `input_global_scale`, which engines expect in the file. It
    # has none, so the file is described as what it is to them: weights alone.
    needs_data = activation is not None and not scheme.static and activation.packing > 1
    return {
        "targets": targets,
        "weights": {**scheme.weight.compressed, "dynamic": False},
        "input_activations": None
        if activation is None or needs_data
        else {**activation.compressed, "dynamic": not scheme.static},
        "output_activations": None,
        "format": f"{kind}; {_READER}" if kind else scheme.compressed_format,
    }


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a converted model: groups by scheme, with exact names.

    A transformers model is also loaded as the head or the backbone of another, under names with or
    without a prefix: these stand in groups of their own, as patterns. The key `"qnn"` says which
    scheme a group is.

    Raises:
        ValueError: the model has no quantised layer.
    """
    groups: dict[tuple[str, str | None], list[str]] = {}
    ignore, inside = [], owners(model.modules())
    for name, module in _layers(model):
        if isinstance(module, Quantized):
            # What the float form of its owner does not call is not a layer for the package either.
            known = _foreign(inside.get(id(module), module))
            groups.setdefault((module.scheme, known), []).append(name)
        elif (kind := kind_of(module)) is not None and kind.standard:
            ignore.append(name)
    if not groups:
        raise ValueError("qnn: the model has no quantised layer to describe; convert it first.")
    entries = [(key, list(names)) for key, names in groups.items()]
    entries += _elsewhere(model, groups, ignore)
    formats = {get_scheme(scheme).compressed_format for scheme, _ in groups}
    dtype = _hidden_dtype(model)
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _group(get_scheme(scheme), targets, kind)
            for i, ((scheme, kind), targets) in enumerate(entries)
        },
        "ignore": ignore,
        "qnn": {f"group_{i}": scheme for i, ((scheme, _), _) in enumerate(entries)},
        **({"qnn_dtype": str(dtype).removeprefix("torch.")} if dtype else {}),
    }


def _hidden_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model whose first float parameter, by which transformers takes and saves it,
    is a scale or a code, such as that of a quantised embedding; None for any other.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                if isinstance(module, Quantized) and name in module._kept():
                    return module.dtype
                return None
    return None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by the names that they have without peft's adapters, which are saved apart."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part != "base_layer"), module


def _foreign(module: nn.Module) -> str | None:
    """What to call a layer that the package does not know."""
    if getattr(module, "_smoothed", False):
        return f"{SMOOTHED} {type(module).__name__}"
    kind = kind_of(module)
    standard = kind is not None and kind.standard and type(module) in kind.quantized
    return None if standard else getattr(module, "_who", "a layer").partition("(")[0]


def _elsewhere(
    model: nn.Module, groups: Mapping[Any, list[str]], ignore: list[str]
) -> list[tuple[Any, list[str]]]:
    """The layers under the names that they have in a backbone that shares the model's config and
    may be saved or loaded alone, and in a model around this one.
    """
    pretrained = _class("transformers.modeling_utils", "PreTrainedModel")
    if pretrained is None or not isinstance(model, pretrained):
        return []
    config, base = model.config, model.base_model_prefix
    inner = {
        name for name, m in _layers(model) if isinstance(m, pretrained) and m.config is config
    } - {""}
    outer = {base} if base and not hasattr(model, base) else set()

    def others(name: str) -> set[str]:
        stripped = {name.removeprefix(p + ".") for p in inner if name.startswith(p + ".")}
        return stripped | {f"{p}.{name}" for p in outer}

    taken: dict[str, set[Any]] = {}
    for key, names in [*groups.items(), (None, ignore)]:
        for name in names:
            for other in (name, *others(name)):
                taken.setdefault(other, set()).add(key)
    known = {name for names in (*groups.values(), ignore) for name in names}
    result = []
    for key, names in groups.items():
        found = {other for name in names for other in others(name)} - known
        if mine := sorted(name for name in found if taken[name] == {key}):
            result.append((key, [_pattern(mine, taken.keys() - set(mine))]))
    return result


def _pattern(names: Iterable[str], others: Iterable[str]) -> str:
    """One target that matches `names` and none of `others`, with any number for a number."""
    forms: dict[str, None] = {}
    for name in names:
        exact = re.escape(name)
        loose = re.sub(r"\d+", lambda _: r"\d+", exact)
        unsafe = any(re.fullmatch(loose, other) for other in others)
        forms[exact if unsafe else loose] = None
    return f"re:(?:{'|'.join(forms)})$"


def schemes_of(config: Any, model: nn.Module) -> dict[Pattern, str | None]:
    """Which layers of `model` a saved config says are quantised, and in which scheme: what
    `qnn.convert` takes to make the model that was saved.

    Args:
        config: of transformers or diffusers, or the dictionary of its `config.json`.
        model: the float model, built from it.

    Raises:
        ValueError: the config does not describe a model that qnn saved, or none of its layers is
            in `model`.
    """
    found, schemes = require_described(config)
    result: dict[Pattern, str | None] = {}
    inside = owners(model.modules())
    for name, module in model.named_modules():
        if id(module) in inside and name in found["ignore"]:
            result[name] = None  # a pattern of its owner means it too
        for group, scheme in schemes.items():
            if name and any(_matches(name, t) for t in found["config_groups"][group]["targets"]):
                result.setdefault(name, scheme)
    if not result:
        some = next(iter(found["config_groups"].values()))["targets"][0]
        raise ValueError(
            f"qnn: the config describes other layers than {type(model).__name__} has, such as "
            f"{some!r}; build the class that was saved."
        )
    return result


def require_described(config: Any) -> tuple[Any, dict[str, str]]:
    """The description in a saved config, and the schemes of its groups; a ValueError for none."""
    found = _read(config, "quantization_config")
    schemes = _read(found, "qnn")
    if not schemes:
        raise ValueError(
            "qnn: the config has no description of qnn's: it is that of a float model, or was "
            "written by something else. Convert the model with the scheme that you know."
        )
    return found, schemes


def smoothed_of(config: Any, model: nn.Module) -> list[str]:
    """The layers of `model` that a saved config says have a `pre_quant_scale`."""
    groups = _read(config, "quantization_config")["config_groups"].values()
    targets = [t for g in groups if g["format"].startswith(SMOOTHED) for t in g["targets"]]
    return [name for name, _ in model.named_modules() if any(_matches(name, t) for t in targets)]


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target


def _read(config: Any, key: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(key)
    found: Any = getattr(config, key, None)
    return found.to_dict() if hasattr(found, "to_dict") else found


def describe(model: nn.Module) -> None:
    """Put the description into the config of each transformers or diffusers model inside `model`.

    `qnn.convert` does it. Do it again before saving where a part of a model was converted by
    itself: the description is that of the model that is saved. A model and its backbone share one
    config; the outermost is described last.
    """
    pretrained = _class("transformers.modeling_utils", "PreTrainedModel")
    mixin = _class("diffusers.models.modeling_utils", "ModelMixin")
    fresh = None
    for module in reversed(list(model.modules())):
        if pretrained is not None and isinstance(module, pretrained):
            config: Any = module.config
            known = _read(config, "quantization_config")
            if any(isinstance(layer, Quantized) for layer in module.modules()):
                config.quantization_config = quantization_config(module)
                fresh = fresh if known else module
            elif "qnn" in (known or ()):
                del config.quantization_config
        elif mixin is not None and isinstance(module, mixin):
            _describe_diffusers(module)
    if fresh is not None:
        _warn(fresh)


@after_swap
def _describe_converted(who: str, model: nn.Module) -> None:
    if who == "qnn.convert":
        describe(model)


def _describe_diffusers(model: Any) -> None:
    """diffusers has no reader of compressed-tensors, and refuses what it does not know by name."""
    if any(isinstance(layer, Quantized) for layer in model.modules()):
        described = quantization_config(model)
        described["quant_method"] = DIFFUSERS_METHOD
        model.register_to_config(quantization_config=described)
    elif "qnn" in (_read(model.config, "quantization_config") or ()):
        config = model._internal_dict  # `register_to_config` takes nothing away
        left = {key: value for key, value in config.items() if key != "quantization_config"}
        model._internal_dict = type(config)(left)


def _warn(model: nn.Module) -> None:
    """Say what plain transformers could not run."""
    for name, module in _layers(model):
        if not isinstance(module, Quantized) or _foreign(module):
            continue
        weight = get_scheme(module.scheme).weight
        ((_, in_features),) = module._weight_shapes().values()
        rows, columns = weight.block or (1, 1)
        if rows > 1 and in_features % columns:
            reason = (
                f"scheme {module.scheme!r} in multiples of {columns} alone, and in_features of "
                f"{name!r} is {in_features}: exclude such layers, or load"
            )
        elif weight.scale_dtype != torch.float32 and module.dtype != torch.bfloat16:
            reason = (
                f"scheme {module.scheme!r} in bfloat16 alone, and the model is {module.dtype}: "
                "pass dtype=torch.bfloat16 to from_pretrained, convert model.bfloat16(), or load"
            )
        elif not weight.compressed["symmetric"]:
            reason = (
                f"scheme {module.scheme!r} in no model that was built empty, since its zero points "
                "are packed in the file alone: take a symmetric scheme, or load"
            )
        else:
            continue
        warnings.warn(
            "qnn: a file of this model will not run in plain transformers: compressed-tensors runs "
            f"{reason} with qnn.load_pretrained.",
            stacklevel=6,  # the caller of convert
        )
        return


def _class(module: str, name: str) -> Any:
    """A class of a library, if the library is in use."""
    return getattr(sys.modules.get(module), name, None)
