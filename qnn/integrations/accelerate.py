"""accelerate: a converted model over several devices, memory and disk, and training in 8 bits.

from qnn.integrations.accelerate import load_checkpoint_and_dispatch

model = load_checkpoint_and_dispatch(skeleton, folder, device_map="auto", offload_folder="off")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import get_balanced_memory, offload_state_dict
from torch import nn

from qnn.integrations.load_pretrained import read_safetensors


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | Path,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """`accelerate.load_checkpoint_and_dispatch` in which each layer reads its own state: packed
    formats load, a float file is quantised, and what is missing, left over or damaged is an error.

    Args:
        model: a converted model, usually one on the meta device.
        checkpoint: a safetensors file of its state, or a folder of such files, which stay mapped
            into memory; the float model's will do.
        device_map: as of accelerate; None to stay where the file is read to.
        offload_folder: where tensors of modules on the `"disk"` are written.
        options: of `dispatch`.

    Raises:
        RuntimeError: the file has not the state of this model.
        ValueError: there are no such files; what `dispatch` refuses.
    """
    model.load_state_dict(read_safetensors(Path(checkpoint)), assign=True)
    if device_map is None:
        return model
    return dispatch(model, device_map, offload_folder, **options)


def dispatch(
    model: nn.Module,
    device_map: str | Mapping[str, Any],
    offload_folder: str | Path | None = None,
    *,
    max_memory: dict[Any, Any] | None = None,
    no_split_module_classes: list[str] | None = None,
    **options: Any,
) -> nn.Module:
    """`accelerate.dispatch_model` with the tensors that layers hold, which are not in all formats
    those of their state dict.

    Args:
        model: a converted model, which is changed in place.
        device_map: as of accelerate: devices, `"cpu"` and `"disk"` by the names of modules, or
            `"auto"`, `"balanced"`, `"balanced_low_0"` or `"sequential"`.
        offload_folder: where tensors of modules on the `"disk"` are written, over what is there.
        max_memory, no_split_module_classes: as of accelerate, for a `device_map` by name.
        options: of `accelerate.dispatch_model`.

    Raises:
        ValueError: a module on the disk, and no `offload_folder`.
    """
    places: Any = device_map
    if isinstance(places, str):
        sizes: dict[str, Any] = {
            "max_memory": max_memory,
            "no_split_module_classes": no_split_module_classes,
        }
        if places != "sequential":
            low = places == "balanced_low_0"
            sizes["max_memory"] = get_balanced_memory(model, **sizes, low_zero=low)
        places = accelerate.infer_auto_device_map(model, **sizes)
    elsewhere: dict[str, list[str]] = {"cpu": [], "disk": []}
    for name, device in places.items():
        if str(device) in elsewhere:
            elsewhere[str(device)].append(name)
    held = _held(model)
    if elsewhere["disk"]:
        if offload_folder is None:
            raise ValueError(
                "qnn.integrations.accelerate: device_map has modules on the disk: "
                f"{', '.join(elsewhere['disk'][:5])}; say where with offload_folder."
            )
        offload_state_dict(str(offload_folder), _below(elsewhere["disk"], held))
        options["offload_dir"] = str(offload_folder)
    if set(places.values()) - {"cpu", "disk", torch.device("cpu")} and elsewhere["cpu"]:
        options["state_dict"] = _below(elsewhere["cpu"], held)
    dispatched: nn.Module = accelerate.dispatch_model(model, dict(places), **options)
    return dispatched


def _below(modules: list[str], held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of some modules, of which `""` is the model."""
    starts = tuple(f"{name}." for name in modules if name)
    return {n: t for n, t in held.items() if "" in modules or n in modules or n.startswith(starts)}


def _held(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in (tensors | buffers).items()}


__all__ = ["dispatch", "load_checkpoint_and_dispatch"]
