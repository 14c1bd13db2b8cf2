"""int4: 16 levels with per-group scales in float32, for groups of 32, 64 or 128 along a row.

    symmetric:   s = amax / 7             q = clamp(round(x · (1/s)), −7, 7)        z = 8
                 stored is the code q + 8; −8, code 0, is read where others have written it
    asymmetric:  s = (hi − lo) / 15       z = clamp(round(−lo · (1/s)), 0, 15)
                 q = clamp(round(x · (1/s)) + z, 0, 15), with lo = min(x, 0), hi = max(x, 0)
    x ≈ (code − z) · s

Rounding is to nearest, ties to even; scales are at least float32's smallest normal number. Nothing
but zeros: s = 1. There is no NaN among the codes: a NaN or inf makes the scale of its group NaN;
`amax`, `lo` and `hi` are taken over what is finite. Eight codes a word of int32, the first in the
lowest bits. A row is whole groups.

On disk it is `pack-quantized` of the compressed-tensors convention: the words as they are here, the
zero points packed down the columns, and the weight's shape.

Source: Frantar et al., "GPTQ", 2022, for the grids; the layout is that of compressed-tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qnn.kernels.formats.base import Format, Part, finite_amax

GROUPS = (32, 64, 128)
_BITS, _WORD = 4, 8
_ZERO = 8  # the code of zero where it is not stored
_TINY = torch.finfo(torch.float32).tiny


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes a word along the last axis, the first in the lowest bits; zeros after the end."""
    missing = -codes.shape[-1] % _WORD
    codes = torch.nn.functional.pad(codes.to(torch.int32), (0, missing))
    shifts = torch.arange(0, 32, _BITS, dtype=torch.int32, device=codes.device)
    words = codes.unflatten(-1, (codes.shape[-1] // _WORD, _WORD)) << shifts
    packed: torch.Tensor = words.sum(-1, dtype=torch.int32)  # no bit twice: a sum is an or
    return packed


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The codes `[..., 8p]` of `[..., p]`, uint8."""
    octets = words.contiguous().view(torch.uint8)
    if sys.byteorder == "big":
        octets = octets.unflatten(-1, (words.shape[-1], 4)).flip(-1).flatten(-2)
    return torch.stack((octets & 15, octets >> _BITS), -1).flatten(-2)


@dataclass(frozen=True)
class Int4(Format):
    symmetric: bool = True

    @property
    def group(self) -> int:
        return self.block[1] if self.block else 0

    def quantize(
        self, x: torch.Tensor, seed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        x = x.float().unflatten(-1, (x.shape[-1] // self.group, self.group))
        bad = ~x.isfinite()
        x = torch.where(bad, 0, x)
        if self.symmetric:
            scale, zero = _over(finite_amax(x, -1), 7), None
        else:
            # Halves, whose difference is finite; it has the same bits.
            low, high = (side.amax(-1, keepdim=True).clamp_min(0) for side in (-x, x))
            scale = _over(high * 0.5 + low * 0.5, 7.5)
            zero = (low * (1 / scale)).round().clamp(0, 15)
        code = (x * (1 / scale)).round()
        code = code.clamp(-7, 7) + _ZERO if zero is None else (code + zero).clamp(0, 15)
        scale = torch.where(bad.any(-1, keepdim=True), torch.nan, scale).squeeze(-1)
        words = pack(code.flatten(-2))
        return (words, scale) if zero is None else (words, scale, zero.squeeze(-1).to(torch.int8))

    def decode(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, None]:
        code, scale = self.integers(parts)
        return (code.to(compute) * scale.to(compute)[..., None]).flatten(-2), None

    def integers(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes less their zero point, int8 `[..., groups, group]`, and the scales."""
        words, scale, *zero = parts
        code = unpack(words).to(torch.int8).unflatten(-1, (scale.shape[-1], self.group))
        return code - (zero[0][..., None] if zero else _ZERO), scale

    @property
    def on_disk(self) -> tuple[Part, ...]:
        zeros = (Part("_zero_point", "", torch.int32, f"r/{_WORD} c/{self.group}"),)
        shape = Part("_shape", "", torch.int64, "2")
        return (*self.parts[:2], *(() if self.symmetric else zeros), shape)

    def to_disk(
        self, parts: Sequence[torch.Tensor], shape: tuple[int, int]
    ) -> tuple[torch.Tensor, ...]:
        words, scale, *zero = parts
        packed = (pack(each.mT).mT.contiguous() for each in zero)
        return (words, scale, *packed, torch.tensor(shape, device=words.device))

    def from_disk(
        self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        parts = dict(tensors)
        said = parts.pop("_shape", None)
        if said is not None and not said.is_meta and tuple(said.tolist()) != shape:
            raise ValueError(f"the file has a weight of {said.tolist()}, the layer {list(shape)}.")
        zero = parts.get("_zero_point")
        if zero is not None and zero.dtype == torch.int32:
            parts["_zero_point"] = unpack(zero.mT).mT[: shape[0]].to(torch.int8).contiguous()
        return parts


def _over(span: torch.Tensor, steps: float) -> torch.Tensor:
    """The scale of groups with this span; 1 for zero."""
    # By a tensor: on a GPU torch divides by a number as a product with its reciprocal.
    scale = (span / torch.full_like(span, steps)).clamp_min(_TINY)
    return torch.where(span == 0, 1.0, scale)


def _int4(group: int, symmetric: bool) -> Int4:
    key = "int4" + ("" if symmetric else "_asym") + ("" if group == 128 else f"_g{group}")
    parts = (
        Part("_packed", "{}q", torch.int32, f"r c/{_WORD}"),
        Part("_scale", "s{}", torch.float32, f"r c/{group}"),
        Part("_zero_point", "z{}", torch.int8, f"r c/{group}", (0, 15)),
    )
    return Int4(
        "int4",
        key,
        "int",
        torch.int32,
        -7 if symmetric else 0,
        7 if symmetric else 15,
        "group",
        parts[:2] if symmetric else parts,
        block=(1, group),
        packing=_WORD,
        whole_groups=True,
        symmetric=symmetric,
    )


INT4 = {
    form.key: form
    for symmetric in (True, False)
    for form in (_int4(group, symmetric) for group in sorted(GROUPS, reverse=True))
}
