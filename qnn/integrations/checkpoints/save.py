"""`save_checkpoint`: any converted model, as a checkpoint of compressed-tensors; `share_scales`."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from qnn.integrations.compressed_tensors import describe, quantization_config
from qnn.kernels.formats.base import finite_amax
from qnn.nn.base import Quantized
from qnn.nn.linear.quantized import QLinear
from qnn.verbs.checks import require_module

_GIB = 1 << 30
_OWN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

# The layers that serving engines fuse into one, by the last parts of their names.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def save_checkpoint(
    model: nn.Module, folder: str | Path, *, max_shard_size: int = 5 * _GIB
) -> None:
    """Write a converted model as a checkpoint of the compressed-tensors convention.

    `model.safetensors`, or shards of at most `max_shard_size` bytes and their index, and a
    `config.json` whose `quantization_config` says which layers are quantised, and how. A model of
    transformers or diffusers is written by its own `save_pretrained`, with its own config.
    `qnn.load_checkpoint` reads the folder, and `qnn.load_pretrained` that of such a model.

    The files are written beside those that are there and then put in their place, so that a model
    may be saved into the folder that it is mapped from.

    Args:
        model: with quantised layers.
        folder: is made if it is not there.
        max_shard_size: in bytes; one tensor may be larger.

    Raises:
        ValueError: no layer is quantised, or the size is not positive.
        TypeError: `model` is not a module.
    """
    who = "qnn.save_checkpoint"
    require_module(who, model)
    if max_shard_size < 1:
        raise ValueError(f"{who}: max_shard_size must be positive, got {max_shard_size}.")
    described = quantization_config(model)
    if hasattr(model, "save_pretrained"):
        describe(model)
        cast(Any, model).save_pretrained(folder, max_shard_size=max_shard_size)
        return
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = _once(model)
    shards = _shards(state, max_shard_size)
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = names if count > 1 else ["model.safetensors"]
    save_file: Any = importlib.import_module("safetensors.torch").save_file
    made = dict[str, Path]()
    for name, shard in zip(names, shards, strict=True):
        made[name] = target / f"{name}.part"
        save_file({key: state[key] for key in shard}, made[name], {"format": "pt"})
    texts = {"config.json": {**_config(target), "quantization_config": described}}
    if count > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(tensor.nbytes for tensor in state.values())
        texts["model.safetensors.index.json"] = {
            "metadata": {"total_size": size},
            "weight_map": where,
        }
    for name, content in texts.items():
        made[name] = target / f"{name}.part"
        made[name].write_text(json.dumps(content, indent=2) + "\n")
    for name, part in made.items():
        os.replace(part, target / name)
    for old in target.iterdir():
        if _OWN.fullmatch(old.name) and old.name not in made:
            old.unlink()


def _config(folder: Path) -> dict[str, Any]:
    """What a `config.json` that is there says beside."""
    path = folder / "config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _once(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state, each tensor under its first name."""
    seen, result = set[tuple[int, ...]](), dict[str, torch.Tensor]()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.storage_offset(), *tensor.shape)
        if tensor.is_meta:
            raise ValueError(
                f"qnn.save_checkpoint: {name} is on the meta device and has no values."
            )
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        result[name] = tensor.detach().cpu().contiguous()
    return result


def _shards(state: dict[str, torch.Tensor], most: int) -> list[list[str]]:
    """The names of each shard, in order; the tensors of a layer may be in two."""
    result, size = list[list[str]](), 0
    for name, tensor in state.items():
        if not result or size + tensor.nbytes > most:
            result.append([])
            size = 0
        result[-1].append(name)
        size += tensor.nbytes
    return result


def share_scales(
    model: nn.Module,
    source: nn.Module,
    groups: Iterable[Sequence[str]] = FUSED,
) -> list[list[str]]:
    """Quantise layers that serving engines fuse into one again, with one scale of the whole tensor.

    Engines keep one such scale for q, k and v, and one for gate and up: of several they take one,
    and the others' weights come out wrong. Of each group `amax` is that of all its layers. For the
    schemes that have a scale of the whole tensor: `nvfp4`, `nvfp4_weight` and `fp8_tensor`.

    Args:
        model: the converted model, which is changed.
        source: the float model that it was made from, whose weights are read.
        groups: the last parts of the names of layers beside each other, with wildcards:
            `[("q_proj", "k_proj", "v_proj")]`.

    Returns:
        The groups that now share a scale, by the layers' names.

    Raises:
        ValueError: no layers of `model` are such a group; layers of one that are in different
            schemes; `source` has no such layer.

        model = qnn.convert(source, "nvfp4_weight")
        qnn.share_scales(model, source)
    """
    found = list[list[str]]()
    layers = {name: m for name, m in model.named_modules() if _has_one(m)}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        near = [name for name in layers if name.rpartition(".")[0] == parent]
        for group in groups:
            last = {name: name.rpartition(".")[2] for name in near}
            names = [n for n in near if any(fnmatchcase(last[n], each) for each in group)]
            if len(names) > 1:
                found.append(names)
    if not found:
        raise ValueError(
            "qnn.share_scales: no layers beside each other are of one of the groups and in a "
            "scheme with a scale of the whole tensor (nvfp4, nvfp4_weight, fp8_tensor); pass "
            "groups=[(…, …)] with the last parts of their names."
        )
    plain = dict(source.named_modules())
    made = list[tuple[Quantized, Any]]()
    for names in found:
        some = [cast(Quantized, layers[name]) for name in names]
        if len(schemes := {layer.scheme for layer in some}) > 1:
            raise ValueError(f"qnn.share_scales: {', '.join(names)} are in {sorted(schemes)}.")
        weights = [_weight(plain, name, layer) for name, layer in zip(names, some, strict=True)]
        amax = torch.stack([finite_amax(weight).reshape(()) for weight in weights]).amax()
        for layer, weight in zip(some, weights, strict=True):
            form = layer._scheme.weight
            parts = form.quantize_beside(weight, amax.expand(len(weight), 1))
            held = zip(form.parts, parts, strict=True)
            made.append((layer, [p.flatten()[:1] if f.axes == "1" else p for f, p in held]))
    for layer, parts in made:
        layer._set_parts("weight", parts)
    return found


def _has_one(module: nn.Module) -> bool:
    """Whether a layer is a linear one with a scale of the whole tensor."""
    if type(module) is not QLinear:
        return False
    return any(part.axes == "1" for part in module._scheme.weight.parts)


def _weight(plain: dict[str, nn.Module], name: str, layer: Quantized) -> torch.Tensor:
    weight = getattr(plain.get(name), "weight", None)
    shape = layer._weight_shapes()["weight"]
    quantised = isinstance(plain.get(name), Quantized)
    if quantised or not isinstance(weight, torch.Tensor) or tuple(weight.shape) != shape:
        raise ValueError(f"qnn.share_scales: source has no float weight {list(shape)} of {name!r}.")
    return weight.detach().to(layer._device)


__all__ = ["FUSED", "save_checkpoint", "share_scales"]
