"""The checkpoints of others into models of transformers."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qnn.integrations.checkpoints.files import Files
from qnn.integrations.checkpoints.load import is_layer
from qnn.integrations.checkpoints.read import read
from qnn.verbs.patterns import Pattern

_WHO = "qnn.load_pretrained"
_FUSED = ("gate_up_proj", "down_proj")  # of experts that are fused in the file


def is_foreign(config: Any, folder: str | Path) -> bool:
    """Whether a folder's config describes a quantised model that something else than qnn wrote."""
    described: Any = getattr(config, "quantization_config", None)
    described = described.to_dict() if hasattr(described, "to_dict") else described
    beside = (Path(folder) / "hf_quant_config.json").is_file()
    return "qnn" not in described if described else beside


def load_foreign(
    cls: Any,
    folder: str | Path,
    config: Any,
    options: dict[str, Any],
    *,
    activations: str,
    dequantize: bool,
) -> Any:
    """What transformers' reader makes of the tensors in our form: it knows names that differ in the
    file, fused experts, ties and buffers.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"{_WHO}: {folder} is not a folder, and the checkpoints of others are read from one: "
            "download it first (huggingface_hub.snapshot_download)."
        )
    if options.get("device_map") == "disk" or "disk" in _values(options.get("device_map")):
        raise ValueError(
            f"{_WHO}: the checkpoint of another writer cannot be offloaded to the disk."
        )
    found = read(
        Files(folder),
        activations=activations,
        dequantize=_dtype(config, options) if dequantize else False,
    )
    config = copy.deepcopy(config)
    if found.schemes:
        described = {"quant_method": "compressed-tensors", "layers": found.schemes}
        config.quantization_config = {"quant_method": "qnn", "described": described}
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    cls = _class_of(cls, config)
    loaded = cls.from_pretrained(None, config=config, state_dict=found.state, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        generation: Any = importlib.import_module("transformers").GenerationConfig
        model.generation_config = generation.from_pretrained(folder)
    return loaded


def _values(mapping: Any) -> list[Any]:
    return list(mapping.values()) if isinstance(mapping, Mapping) else []


def _dtype(config: Any, options: Mapping[str, Any]) -> Any:
    """The dtype of each layer that is decoded, as transformers would have it."""
    given = options.get("dtype", options.get("torch_dtype"))
    given = getattr(config, "dtype", None) if given in (None, "auto") else given
    given = getattr(torch, given) if isinstance(given, str) else given
    return lambda name: given or torch.get_default_dtype()


def _class_of(cls: Any, config: Any) -> Any:
    """The class of models that an `Auto…` class stands for, which asks for a folder itself."""
    mapping = getattr(cls, "_model_mapping", None)
    if mapping is None:
        return cls
    factory: Any = importlib.import_module("transformers.models.auto.auto_factory")
    if type(config) not in mapping:
        raise ValueError(f"{_WHO}: {cls.__name__} has no model for {type(config).__name__}.")
    return factory._get_model_class(config, mapping)


def layers_in(model: Any, layers: Mapping[str, str]) -> dict[Pattern, str | None]:
    """The layers of a file by the names that they have in a float model of transformers.

    Raises:
        ValueError: none is in it, or one is a part of a fused weight.
    """
    conversion: Any = importlib.import_module("transformers.conversion_mapping")
    loading: Any = importlib.import_module("transformers.core_model_loading")
    mapping = conversion.get_model_conversion_mapping(model, None, None)
    renamings = [e for e in mapping if isinstance(e, loading.WeightRenaming)]
    converters = [e for e in mapping if isinstance(e, loading.WeightConverter)]
    state, modules = model.state_dict(), dict(model.named_modules())
    result = dict[Pattern, str | None]()
    for name, scheme in layers.items():
        full, fused = _in_model(name, loading, renamings, converters, model, state)
        if fused is not None:
            raise ValueError(
                f"{_WHO}: {name} is a part of {full}, which {type(model).__name__} holds as one: "
                "quantised layers are not fused. Pass dequantize=True, and convert the model."
            )
        owner = full.rpartition(".")[0]
        found = modules.get(owner)
        if found is None:
            continue  # of a head, say, that this model does not have
        if not is_layer(found):
            raise ValueError(
                f"{_WHO}: {name} is quantised in the file and a {type(found).__name__} in the "
                "model; pass dequantize=True."
            )
        result[owner] = scheme
    if not result:
        raise ValueError(
            f"{_WHO}: the file has quantised {', '.join(list(layers)[:3])}, …, and "
            f"{type(model).__name__} none of them; load the class that was saved."
        )
    return result


def _in_model(
    name: str, loading: Any, renamings: Any, converters: Any, model: Any, state: Any
) -> tuple[str, str | None]:
    """The name that a layer's weight has in a model, and the pattern that fuses it if one does."""
    for leaf in ("weight", *_FUSED):
        full, pattern = loading.rename_source_key(
            f"{name}.{leaf}", renamings, converters, model.base_model_prefix, state
        )
        if full in state or pattern is not None:
            return full, pattern
    return f"{name}.weight", None


__all__ = ["is_foreign", "layers_in", "load_foreign"]
