"""nvfp4: e2m1 (±0, 0.5, 1, 1.5, 2, 3, 4, 6) with per-group scales in e4m3, for blocks of 16, and a
per-tensor scale in float32.

    S = min(448 · 6 / amax, FLT_MAX)                     of the tensor; 1 for zero
    b = e4m3(clamp(bmax · (S · (1/6)), 448))             of the block; 1 for zero
    q = e2m1(clamp(x · min(1 / (b · (1/S)), FLT_MAX), ±6))
    x ≈ q · b / S

`S` is stored as it stands here, a divisor, under the name that the compressed-tensors convention
gives it (`weight_global_scale`); `decode` is the one place that turns it over. Two codes a byte,
the even element in the low nibble; a row is filled up with zeros to a multiple of 16. Ties go to
the even code: 0.25 → 0, 0.75 → 1, 1.25 → 1, 1.75 → 2, 2.5 → 2, 3.5 → 4, 5 → 4. e2m1 has no NaN: a
NaN or inf makes the scale of its 16 values NaN. `amax` and `bmax` are taken over what is finite.

In training the weight has blocks of 16x16, so that both its orientations have the same codes; the
gradient is rounded stochastically; and the operands of the weight's gradient pass through a random
Hadamard transform first.

Source: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qnn.kernels.formats.base import Format, Part, finite_amax, grouped, over

BLOCK = 16
_E2M1_MAX, _E4M3_MAX = 6.0, 448.0
_FLT_MAX = torch.finfo(torch.float32).max
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Fixed and random: the sign of each of 16 neighbours before the Hadamard transform.
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The random Hadamard transform of each 16 neighbours in a row, which ends in zeros if it is no
    multiple of 16: orthogonal, so `hadamard(a) · hadamard(b)ᵀ = a · bᵀ`.

    Four rounds of sums and differences in float32, in this order in every kernel.
    """
    x = grouped(x.float(), BLOCK)
    x = x * torch.tensor(_SIGNS, dtype=torch.float32, device=x.device)
    for half in (1, 2, 4, 8):
        pairs = x.unflatten(-1, (BLOCK // (2 * half), 2, half))
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
    return (x * 0.25).flatten(-2)


def hashed(count: int, seed: torch.Tensor) -> torch.Tensor:
    """`count` uniform numbers in [0, 1), multiples of 2^-24, that depend on `seed`, int64 `[1]`,
    and on their position alone.

    Two rounds of a 32-bit mixing function (xor-shift and multiply), a half of the seed ahead of
    each; ahead of the second the lower half too, mixed, since seeds with the same upper half would
    permute the same numbers. int64 arithmetic on values below 2^32 gives the same bits everywhere.
    """
    word = 0xFFFFFFFF

    def mix(h: torch.Tensor) -> torch.Tensor:
        h = ((h ^ (h >> 16)) * 0x21F0AAAD) & word
        h = ((h ^ (h >> 15)) * 0x735A2D97) & word
        return h ^ (h >> 15)

    index = torch.arange(count, device=seed.device)
    h = mix((mix((index ^ seed) & word) + (seed >> 32) + mix(seed & word)) & word)
    return (h >> 8).float() * 2.0**-24


def e2m1(x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """The code of `x`, within ±6, as uint8: to nearest with ties to even, or with `noise` in [0, 1)
    up with a probability that makes the mean exact.
    """
    magnitude = x.abs()
    # Steps of 0.5 below 2, 1 below 4, 2 above; the code is the count of steps.
    steps = torch.where(
        magnitude < 2, magnitude * 2, torch.where(magnitude < 4, magnitude, magnitude * 0.5)
    )
    below = torch.where(magnitude < 2, 0, torch.where(magnitude < 4, 2, 4))
    # A comparison and not `(steps + noise).floor()`, whose rounding would move exact values too.
    whole = steps.floor()
    count = steps.round() if noise is None else whole + (noise < steps - whole)
    code = (count.to(torch.int32) + below).clamp(max=7)
    return (code | torch.where(x.signbit(), 8, 0)).to(torch.uint8)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the even element in the low nibble."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes `[..., 2p]` of `[..., p]`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


@dataclass(frozen=True)
class NVFP4(Format):
    """`transformed`: the rows pass through `hadamard` first, and stay so in `decode`."""

    transformed: bool = False

    def quantize(
        self, x: torch.Tensor, seed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = hadamard(x) if self.transformed else x.float()
        return self._quantize(x, finite_amax(x).reshape(1), seed)

    def quantize_beside(
        self, x: torch.Tensor, amax: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._quantize(x.float(), amax, None)

    def _quantize(
        self, x: torch.Tensor, amax: torch.Tensor, seed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = grouped(x, BLOCK)
        s = torch.where(amax == 0, 1.0, over(_E4M3_MAX * _E2M1_MAX, amax).clamp(max=_FLT_MAX))
        of_block = s[..., None]
        bmax = finite_amax(x, -1)
        if self.tall:  # a block of rows shares its scale
            tall = grouped(bmax.squeeze(-1).mT, BLOCK)
            bmax = finite_amax(tall, -1).expand_as(tall).flatten(-2)[:, : x.shape[0]].mT[..., None]
        b = (
            (bmax * (of_block * (1 / _E2M1_MAX)))
            .clamp(max=_E4M3_MAX)
            .to(torch.float8_e4m3fn)
            .float()
        )
        b = torch.where(bmax == 0, 1.0, b)
        r = (1 / (b * (1 / of_block))).clamp(max=_FLT_MAX)
        scaled = (x * r).clamp(-_E2M1_MAX, _E2M1_MAX)
        noise = None if seed is None else hashed(scaled.numel(), seed).view(scaled.shape)
        finite = x.isfinite()
        codes = e2m1(torch.where(finite, scaled, 0.0), noise)
        b = torch.where(finite.all(-1), b.squeeze(-1), torch.nan).to(torch.float8_e4m3fn)
        return pack(codes.flatten(-2)), b, s

    def decode(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, b, s = parts
        codes = unpack(packed)
        table = torch.tensor(
            [*_VALUES, *(-value for value in _VALUES)], dtype=compute, device=packed.device
        )
        values = table[codes.to(torch.int32)]
        each = b.to(compute).repeat_interleave(BLOCK, -1)[..., : codes.shape[-1]]
        return values * each, (1 / s.float())

    @property
    def compressed(self) -> dict[str, object]:
        return {**super().compressed, "strategy": "tensor_group"}


def _nvfp4(key: str, **options: object) -> NVFP4:
    parts = (
        Part("_packed", "{}q", torch.uint8, f"r c/{BLOCK}*{BLOCK // 2}"),
        Part("_scale", "s{}", torch.float8_e4m3fn, f"r c/{BLOCK}"),
        Part("_global_scale", "g{}", torch.float32, "1"),
    )
    return NVFP4(
        "nvfp4",
        key,
        "float",
        torch.uint8,
        -_E2M1_MAX,
        _E2M1_MAX,
        "group",
        parts,
        scale_dtype=torch.float8_e4m3fn,
        packing=2,
        **{"block": (1, BLOCK), **options},  # type: ignore[arg-type]
    )


ROWS = _nvfp4("nvfp4")
SQUARES = _nvfp4("nvfp4_square", block=(BLOCK, BLOCK))
GRADIENT = _nvfp4("nvfp4_stochastic", stochastic=True)
TRANSFORMED = _nvfp4("nvfp4_hadamard", transformed=True)
TRANSFORMED_GRADIENT = _nvfp4("nvfp4_hadamard_stochastic", transformed=True, stochastic=True)
