"""float8: e4m3 (largest value 448) and e5m2 (57344). Scales are per-tensor, per-channel or
per-token (one for each row), per-group or per-block.

    r = fp8_max / amax, at most 2^126; blocks: r rounded down to a power of two
    q = cast(clamp(x · r, ±fp8_max)), to nearest, ties to even; s = 1 / r

`amax` is taken over what is finite. A NaN or inf has the code of NaN. Nothing but zeros: s = 1.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; the bit layout is that of the
OCP 8-bit floating point specification. Clamping comes before the cast, which before torch 2.13 did
not saturate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qnn.kernels.formats.base import Format, Granularity, Part, finite_amax, grouped, over, spread

# Keeps 1 / r a normal number, which no flush to zero takes away.
MAX_RECIPROCAL = 2.0**126
_MANTISSA = 0x007FFFFF


def power_of_two(r: torch.Tensor) -> torch.Tensor:
    """`r` rounded down to a power of two."""
    return (r.view(torch.int32) & ~_MANTISSA).view(torch.float32)


def reciprocal_scale(amax: torch.Tensor, qmax: float) -> torch.Tensor:
    """`qmax / amax`, at most 2^126; 1 for zero."""
    return torch.where(amax == 0, 1.0, over(qmax, amax).clamp(max=MAX_RECIPROCAL))


def cast(x: torch.Tensor, r: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """`x · r` in float32, clamped and cast; NaN for what is not finite."""
    x = x.float()
    limit = torch.finfo(storage).max
    scaled = (x * r).clamp(-limit, limit)
    return torch.where(x.isfinite(), scaled, torch.nan).to(storage)


@dataclass(frozen=True)
class Float8(Format):
    """`sides`: rows and columns that share a scale; 0 is the whole axis."""

    sides: tuple[int, int] = (1, 0)

    def quantize(
        self, x: torch.Tensor, seed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = self.sides
        if rows == 0:
            q, scale = self.quantize_beside(x, finite_amax(x))
            return q, scale.reshape(1)
        if columns == 0:
            r = reciprocal_scale(finite_amax(x, -1), self.qmax)
            return cast(x, r, self.storage), 1 / r
        amax = finite_amax(grouped(x, columns), -1).squeeze(-1)
        if rows > 1:
            amax = finite_amax(grouped(amax.mT, rows), -1).squeeze(-1).mT
        r = power_of_two(reciprocal_scale(amax, self.qmax))
        each = spread(r, columns, x.shape[-1])
        if rows > 1:
            each = each.repeat_interleave(rows, 0)[: x.shape[0]]
        return cast(x, each, self.storage), (1 / r).contiguous()

    def quantize_beside(
        self, x: torch.Tensor, amax: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sides[0] != 0:
            return self.quantize(x)
        r = reciprocal_scale(amax, self.qmax)
        return cast(x, r, self.storage), 1 / r

    def decode(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, scale = parts
        rows, columns = self.sides
        values = q.to(compute)
        if columns == 0:
            return values, scale
        each = spread(scale, columns, q.shape[-1])
        if rows > 1:
            each = each.repeat_interleave(rows, 0)[: q.shape[0]]
        return values * each.to(compute), None


def _float8(
    storage: torch.dtype, suffix: str, granularity: Granularity, block: tuple[int, int], axes: str
) -> Float8:
    name = {torch.float8_e4m3fn: "float8_e4m3", torch.float8_e5m2: "float8_e5m2"}[storage]
    limit = torch.finfo(storage).max
    parts = (Part("", "{}q", storage, "r c"), Part("_scale", "s{}", torch.float32, axes))
    return Float8(
        name,
        name + suffix,
        "float",
        storage,
        -limit,
        limit,
        granularity,
        parts,
        block=block if all(block) else None,
        sides=block,
    )


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOAT8 = {
    form.key: form
    for storage in (E4M3, E5M2)
    for form in (
        _float8(storage, "", "channel", (1, 0), "r 1"),
        _float8(storage, "_tensor", "tensor", (0, 0), "1"),
        _float8(storage, "_group", "group", (1, 128), "r c/128"),
        _float8(storage, "_block", "block", (128, 128), "r/128 c/128"),
    )
}
