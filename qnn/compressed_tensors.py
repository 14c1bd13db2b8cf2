"""How a converted model describes itself on disk: the `quantization_config` of compressed-tensors.

`save_pretrained` writes it into `config.json`. Without it transformers reloads the integers as if
they were the float weights, without an error; with it transformers (through the compressed-tensors
package) and the serving engines read the same file.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qnn.kernels import Scheme, get_scheme
from qnn.qlinear import QLinear


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    activation = scheme.activation
    return {
        "targets": targets,
        "weights": {**scheme.weight.compressed, "dynamic": False},
        "input_activations": None
        if activation is None
        else {**activation.compressed, "dynamic": not scheme.static},
        "output_activations": None,
        "format": scheme.compressed_format,
    }


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a converted model: a group for each scheme, by exact names.

    Raises:
        ValueError: the model has no quantised layer.
    """
    targets: dict[str, list[str]] = {}
    ignore = []
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            targets.setdefault(module.scheme, []).append(name)
        elif isinstance(module, nn.Linear):
            ignore.append(name)
    if not targets:
        raise ValueError("qnn: the model has no quantised layer to describe; convert it first.")
    formats = {get_scheme(scheme).compressed_format for scheme in targets}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _group(get_scheme(scheme), names)
            for i, (scheme, names) in enumerate(targets.items())
        },
        "ignore": ignore,
    }


def describe(model: nn.Module) -> None:
    """Put the description into the `config` of each transformers model inside `model`.

    A model and its backbone share one config; the outermost, which is saved, is described last.
    """
    for module in reversed(list(model.modules())):
        config: Any = getattr(module, "config", None)
        is_saved = callable(getattr(module, "save_pretrained", None)) and hasattr(config, "to_dict")
        if is_saved and any(isinstance(layer, QLinear) for layer in module.modules()):
            config.quantization_config = quantization_config(module)
