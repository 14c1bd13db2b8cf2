"""`load_pretrained`: a quantised checkpoint of transformers or diffusers, with its layers."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch

from qnn.integrations.checkpoints.numbers import STORED, require_stored
from qnn.integrations.checkpoints.pretrained import is_foreign, load_foreign
from qnn.integrations.compressed_tensors import require_described, schemes_of
from qnn.verbs.convert import convert


def load_pretrained(
    cls: Any,
    folder: str | Path,
    *,
    activations: str = STORED,
    dequantize: bool = False,
    **options: Any,
) -> Any:
    """The converted model that `save_pretrained` wrote into `folder`, with its quantised layers; or
    that of another writer, such as llm-compressor, ModelOpt, AutoAWQ and GPTQ.

    The model is built from its config, converted to what the config says that it was, and loaded by
    the library's own reader, which knows renamed and fused keys, tied weights and buffers that are
    not in the file. Nothing is held in float on the way.

    Args:
        cls: the class to build: a model of transformers, one of its `Auto…` classes, or a model of
            diffusers.
        folder: where it was saved; for transformers also a name on its hub, of a file of qnn's.
        activations, dequantize: of another writer's file, as of `qnn.load_checkpoint`.
        options: of `cls.from_pretrained`; none for diffusers.

    Raises:
        ValueError: the config describes no quantised model, or other layers; the file lacks
            tensors of a quantised layer, has them for a layer that is float, or holds values that
            no layer takes, such as NaN; a layer of another writer has no scheme.

        model = qnn.load_pretrained(BertModel, "bert-int8")
    """
    ways = {"activations": activations, "dequantize": dequantize}
    if hasattr(cls, "load_config"):
        options |= {k: v for k, v in ways.items() if v not in (STORED, False)}
        if options:
            raise TypeError(
                f"qnn.load_pretrained({cls.__name__}, …): {', '.join(options)}: a model of "
                "diffusers is loaded without options."
            )
        return _load_diffusers(cls, Path(folder))
    return _load_transformers(cls, folder, options, ways)


def _load_transformers(
    cls: Any, folder: str | Path, options: dict[str, Any], ways: dict[str, Any]
) -> Any:
    from qnn.integrations import transformers  # noqa: F401  # which knows "qnn" then

    config = options.pop("config", None)
    if config is None:
        reader: Any = getattr(cls, "config_class", None)
        reader = reader or importlib.import_module("transformers").AutoConfig
        config = reader.from_pretrained(folder)
    config = copy.deepcopy(config)
    if is_foreign(config, folder):
        loaded = load_foreign(cls, folder, config, options, **ways)
    else:
        require_stored("qnn.load_pretrained", ways["activations"])
        described, _ = require_described(config)
        config.quantization_config = {"quant_method": "qnn", "described": described}
        loaded = cls.from_pretrained(folder, config=config, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if ways["dequantize"] and hasattr(model, "hf_quantizer"):
        model.dequantize()
    model.is_quantized = False  # transformers would refuse `.half()`, which is exact here
    return loaded


def _load_diffusers(cls: Any, folder: Path) -> Any:
    config = dict(cls.load_config(folder))
    described = {"quantization_config": config.pop("quantization_config", None)}
    model = cls.from_config(config).eval()
    convert(model, schemes_of(described, model), inplace=True)
    model.load_state_dict(read_safetensors(folder), assign=True)
    return model


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of a folder's, memory-mapped.

    Raises:
        ValueError: there is none.
    """
    load_file: Any = importlib.import_module("safetensors.torch").load_file
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path} is not a safetensors file, nor a folder that has one.")
    state: dict[str, torch.Tensor] = {}
    for each in files:
        state |= load_file(each)
    return state
