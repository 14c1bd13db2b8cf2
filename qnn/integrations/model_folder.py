"""A folder that transformers' `save_pretrained` wrote: its model, and batches to run it on."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qnn.integrations.load_pretrained import load_pretrained

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")


def open_model(folder: Path, dtype: str = "auto") -> nn.Module:
    """The model in evaluation mode, of the class that its config names; a converted one with its
    quantised layers. Nothing is downloaded, and no code of the folder's is run.

    Raises:
        ValueError: it is no such folder, or its class is not one of transformers.
        ImportError: there is no transformers.
    """
    config = read_config(folder)
    cls = _class_of(folder, config)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if config.get("quantization_config") or (folder / "hf_quant_config.json").is_file():
        model: nn.Module = load_pretrained(cls, folder, **options)
    else:
        model = cls.from_pretrained(folder, **options)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one that save_pretrained wrote.")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json; give one that save_pretrained of transformers wrote."
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; a config is an object.")
    return config


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError(
            "model folders need transformers, which is not installed: pip install "
            f"'transformers>=5.0' ({error})."
        ) from None


def _class_of(folder: Path, config: dict[str, Any]) -> Any:
    transformers = _transformers()
    names = config.get("architectures") or []
    if not names:
        return transformers.AutoModel
    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise ValueError(
            f"{folder / 'config.json'} names the class {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have."
        )
    return cls


def copy_the_rest(source: Path, target: Path) -> None:
    """Copy what belongs to a model besides weights and config, such as its tokenizer."""
    for path in sorted(source.iterdir()):
        wanted = path.is_file() and not path.name.endswith(_WEIGHTS)
        if wanted and not (target / path.name).exists():
            shutil.copy2(path, target / path.name)


def batches_of(
    model: nn.Module,
    folder: Path,
    *,
    inputs: Path | None = None,
    texts: Path | None = None,
    batch: int = 1,
    tokens: int = 128,
) -> list[Any]:
    """Batches from a file of `torch.save`, from the lines of a text by the folder's tokenizer, or
    one of random tokens.

    Raises:
        ValueError: a file that holds no batches, or a model without a vocabulary.
    """
    if inputs is not None:
        held = torch.load(inputs, weights_only=True)
        return held if isinstance(held, list) else [held]
    if texts is not None:
        return _tokenized(folder, texts, batch, tokens)
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "vocab_size", None)
    if size is None:
        raise ValueError(
            f"{folder}: {type(model).__name__} has no vocabulary to take random tokens from; save "
            "batches with torch.save(batches, 'batches.pt') and pass --inputs batches.pt."
        )
    ids = torch.randint(size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = ids
    return [made]


def _tokenized(folder: Path, texts: Path, batch: int, tokens: int) -> list[Any]:
    lines = [line.strip() for line in texts.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{texts} has no lines of text.")
    tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return [
        dict(
            tokenizer(
                lines[start : start + batch],
                padding=True,
                truncation=True,
                max_length=tokens,
                return_tensors="pt",
            )
        )
        for start in range(0, len(lines), batch)
    ]


def moved(value: Any, device: str) -> Any:
    """A batch on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(each, device) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(moved(each, device) for each in value)
    return value
