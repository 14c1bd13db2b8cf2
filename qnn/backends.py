"""Which kernel runs a layer, and why: for `repr`, `summary` and `doctor`."""

from __future__ import annotations

import torch
from torch import nn

from qnn.kernels import OPS, get_scheme
from qnn.kernels.cpu.engines import ENGINES, engine_choice, self_test


def int8_engine(weights: int) -> str:
    """What runs a layer of so many weights, and what is passed over with the reason.

    `onednn: passed the known-answer test`; for a small layer `exact up to 8 rows, then onednn: …`.
    """
    choice = engine_choice(weights)
    small = "".join(f"{engine.name} up to {rows} rows, then " for rows, engine in choice[:-1])
    name = choice[-1][1].name
    parts = [f"{small}{name}: {self_test(name).reason}"]
    for other in ENGINES:
        if other == name:
            break
        parts.append(f"not {other}: {self_test(other).reason}")
    return "; ".join(parts)


def linear_backend(layer: nn.Module) -> str:
    """The backend of a quantised linear layer on the device where it is."""
    scheme, weight = get_scheme(str(layer.scheme)), layer.weight
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        return "meta: no values yet"
    device = weight.device.type
    if device.upper() not in OPS[scheme.linear].kernels:
        return f"{device}: reference, since there is no {scheme.name} kernel for this device yet"
    if scheme.activation is None:
        return f"{device}: float32 GEMM on widened weights"
    return f"{device}: {int8_engine(weight.numel())}"
