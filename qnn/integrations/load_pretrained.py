"""`load_pretrained`: a model of transformers or diffusers that was converted and saved."""

from __future__ import annotations

import copy
import functools
import importlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from qnn.integrations.compressed_tensors import describe, schemes_of, smoothed_of
from qnn.nn import QLinear
from qnn.nn.base import Quantized
from qnn.verbs.convert import convert


def load_pretrained(cls: Any, folder: str | Path, **options: Any) -> Any:
    """The converted model that `save_pretrained` wrote into `folder`, with its quantised layers.

    The model is built from its config, converted to what the config says that it was, and loaded by
    the library's own reader, which knows renamed and fused keys, tied weights and buffers that are
    not in the file. Nothing is held in float on the way.

    Args:
        cls: the class to build: a model of transformers, one of its `Auto…` classes, or a model of
            diffusers.
        folder: where it was saved; for transformers also a name on its hub.
        options: of `cls.from_pretrained`; none for diffusers.

    Raises:
        ValueError: the config has no description of qnn's, or describes other layers; the file
            lacks tensors of a quantised layer, has them for a layer that is float, or holds values
            that no layer takes, such as NaN.

        model = qnn.load_pretrained(BertModel, "bert-int8")
    """
    if hasattr(cls, "load_config"):
        if options:
            raise TypeError(
                f"qnn.load_pretrained({cls.__name__}, …): {', '.join(options)}: a model of "
                "diffusers is loaded without options."
            )
        return _load_diffusers(cls, Path(folder))
    return _load_transformers(cls, folder, options)


def _load_transformers(cls: Any, folder: str | Path, options: dict[str, Any]) -> Any:
    _register()
    who = f"qnn.load_pretrained({cls.__name__}, {str(folder)!r})"
    config = options.pop("config", None)
    if config is None:
        reader: Any = getattr(cls, "config_class", None)
        reader = reader or importlib.import_module("transformers").AutoConfig
        config = reader.from_pretrained(folder)
    config = copy.deepcopy(config)
    described = getattr(config, "quantization_config", None)
    if dtype := (described or {}).get("qnn_dtype"):
        config.dtype = getattr(torch, dtype)
    config.quantization_config = {"quant_method": "qnn", "described": described}
    wanted = options.pop("output_loading_info", False)
    model, info = cls.from_pretrained(folder, config=config, output_loading_info=True, **options)
    tied = model.hf_quantizer.tied
    model.hf_quantizer.remove_quantization_config(model)
    _check(who, model, info)
    model.all_tied_weights_keys = tied
    model.tie_weights(recompute_mapping=False)  # each layer has read its own state
    model.config.quantization_config = described
    describe(model)
    return (model, info) if wanted else model


@functools.cache
def _register() -> None:
    """Tell transformers what `quant_method` "qnn" is: convert the model that was built, on the meta
    device, and read into it.
    """
    base: Any = importlib.import_module("transformers.quantizers.base").HfQuantizer
    mixin: Any = importlib.import_module(
        "transformers.utils.quantization_config"
    ).QuantizationConfigMixin
    auto: Any = importlib.import_module("transformers.quantizers.auto")

    def init(self: Any, described: Any = None, **_: Any) -> None:
        self.quant_method, self.described = "qnn", described

    def before_loading(self: Any, model: Any, **_: Any) -> None:
        found = {"quantization_config": self.quantization_config.described}
        convert(model, schemes_of(found, model), inplace=True)
        for name in smoothed_of(found, model):
            cast(QLinear, model.get_submodule(name))._smooth(True)
        layers = _layers(model)
        for layer in layers.values():
            layer._empty_weights("meta", on_disk=True)
        self.tied = dict(model.all_tied_weights_keys)
        model.all_tied_weights_keys = _tied_parts(self.tied, layers)
        for target in model.all_tied_weights_keys:
            name, _, part = target.rpartition(".")
            if name in layers:
                # As transformers marks what a tie will fill: it sets this on `layer.weight`, which
                # is another object each time, and would draw the layer anew.
                held: Any = layers[name]._parameters[part]
                held._is_hf_initialized = True

    def is_read_by_its_layer(self: Any, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name.rpartition(".")[0] in _layers(model)

    methods = {
        "is_trainable": True,
        "is_compileable": True,
        "is_serializable": lambda self: True,
        "_process_model_before_weight_loading": before_loading,
        "param_needs_quantization": is_read_by_its_layer,
    }
    auto.register_quantization_config("qnn")(type("Config", (mixin,), {"__init__": init}))
    auto.register_quantizer("qnn")(type("Quantizer", (base,), methods))


def _tied_parts(tied: dict[str, str], layers: dict[str, Quantized]) -> dict[str, str]:
    """Which tensor of a file stands for which other one, `{target: source}`, from that of weights:
    of two quantised layers all that the weight is stored in.
    """
    result = {}
    for target, source in tied.items():
        layer, weight = layers.get(source.rpartition(".")[0]), target.rpartition(".")[0]
        if layer is None or weight not in layers:
            result[target] = source
        else:
            ends = [part.suffix for part in layer._scheme.weight.on_disk]
            result |= {target + end: source + end for end in ends}
    return result


def _load_diffusers(cls: Any, folder: Path) -> Any:
    config = dict(cls.load_config(folder))
    described = {"quantization_config": config.pop("quantization_config", None)}
    model = cls.from_config(config).eval()
    convert(model, schemes_of(described, model), inplace=True)
    model.load_state_dict(_state(folder), assign=True)
    return model


def _state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's safetensors files, memory-mapped."""
    load_file: Any = importlib.import_module("safetensors.torch").load_file
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def _layers(model: nn.Module) -> dict[str, Quantized]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Quantized)}


def _check(who: str, model: nn.Module, info: Any) -> None:
    """Refuse what transformers' reader leaves to a log line."""
    layers = _layers(model)
    missing = [key for key in info["missing_keys"] if key.rpartition(".")[0] in layers]
    if missing:
        raise ValueError(f"{who}: the file has no {', '.join(sorted(missing)[:5])}.")
    modules = dict(model.named_modules())
    scales = [key.rpartition(".") for key in info["unexpected_keys"] if key.endswith("_scale")]
    odd = sorted({n for n, _, leaf in scales if n in modules and leaf.startswith("weight")})
    if odd:
        raise ValueError(
            f"{who}: the file has quantised {', '.join(odd[:5])}, which the config does not "
            "describe."
        )
    for name, layer in layers.items():
        # The reader sets parameters one by one; a layer's own reading checks them together.
        state = layer.state_dict()
        layer._empty_weights("meta")
        try:
            layer.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{who}: {name}: {error}") from None
        kept = layer._kept()
        for parameter_name, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(parameter_name not in kept)
