"""int16: activations of 16 bits for weights of 8, symmetric, with per-token scales from a row's
largest magnitude or a per-tensor scale that calibration has found.

    s = amax / 32767        q = clamp(round(x · (1/s)), −32767, 32767)

The rule is that of int8, with more steps. There is no zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qnn.kernels.formats.base import Format, Part
from qnn.kernels.formats.int8 import quantize_rows

QMAX = 32767


@dataclass(frozen=True)
class Int16(Format):
    def quantize(
        self, x: torch.Tensor, seed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.granularity == "tensor":
            raise NotImplementedError("int16_static: the scale comes from calibration, not from x.")
        return quantize_rows(x, QMAX, torch.int16)

    def decode(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = parts
        return q.to(compute), scale


INT16_TOKEN = Int16(
    "int16",
    "int16",
    "int",
    torch.int16,
    -QMAX,
    QMAX,
    "token",
    (Part("", "{}q", torch.int16, "r c"), Part("_scale", "s{}", torch.float32, "r 1")),
)
INT16_TENSOR = replace(
    INT16_TOKEN,
    key="int16_static",
    granularity="tensor",
    parts=(INT16_TOKEN.parts[0], Part("_scale", "s{}", torch.float32, "1")),
)
