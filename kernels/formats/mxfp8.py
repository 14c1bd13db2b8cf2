"""mxfp8: e4m3 with per-group scales: a power of two for each 32 neighbours along a row.

    scale = 2^e, e = ⌈log2(amax / 448)⌉ in [-127, 127], stored as the byte e + 127 (E8M0)
    q = cast(clamp(x · 2^-e, ±448)), to nearest, ties to even

The exponent is rounded up, so nothing is cut off; the OCP rule rounds it down. `amax` is taken over
what is finite. A NaN or inf has the code of NaN. Nothing but zeros: scale 1.

Source: OCP Microscaling Formats (MX) specification 1.0; rounding up: Mishra et al., "Recipes for
Pre-training LLMs with MXFP8", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qnn.kernels.formats.base import Format, Part, finite_amax, grouped, spread
from qnn.kernels.formats.float8 import cast

BLOCK = 32
_MANTISSA_BITS = 23
_BIAS = 127


def exponent_byte(amax: torch.Tensor) -> torch.Tensor:
    """The E8M0 byte of `amax / 448`, rounded up; 127, which is 1, for zero. int32."""
    # By a tensor: on a GPU torch divides by a number as a product with its reciprocal.
    bits = (amax / torch.full_like(amax, 448.0)).view(torch.int32)
    up = (bits >> _MANTISSA_BITS) + ((bits & ((1 << _MANTISSA_BITS) - 1)) != 0)
    # 2^-127, the smallest scale, is subnormal, and what is below it counts as it.
    up = torch.where(bits <= 1 << (_MANTISSA_BITS - 1), 0, up)
    return torch.where(amax == 0, _BIAS, up)


def power(byte: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127) in float32, also the subnormal 2^-127; NaN for 255."""
    byte = byte.to(torch.int32)
    bits = torch.where(byte == 0, 1 << (_MANTISSA_BITS - 1), byte << _MANTISSA_BITS)
    return torch.where(byte == 255, torch.nan, bits.view(torch.float32))


@dataclass(frozen=True)
class MXFP8(Format):
    def quantize(
        self, x: torch.Tensor, seed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        byte = exponent_byte(finite_amax(grouped(x, BLOCK), -1).squeeze(-1))
        r = spread(power(2 * _BIAS - byte), BLOCK, x.shape[-1])
        return cast(x, r, self.storage), byte.to(torch.uint8)

    def decode(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, None]:
        q, byte = parts
        return q.to(compute) * spread(power(byte), BLOCK, q.shape[-1]).to(compute), None


MX = MXFP8(
    "mxfp8",
    "mxfp8",
    "float",
    torch.float8_e4m3fn,
    -448.0,
    448.0,
    "group",
    (
        Part("", "{}q", torch.float8_e4m3fn, "r c"),
        Part("_scale", "s{}", torch.uint8, f"r c/{BLOCK}"),
    ),
    scale_dtype=torch.uint8,
    block=(1, BLOCK),
)
