"""gpt-oss: fused experts in MXFP4, `…_blocks` and `…_scales`, as experts in `nvfp4_weight`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qnn.integrations.checkpoints.fit import Tensors, as_nvfp4, decode
from qnn.integrations.checkpoints.numbers import Numbers

_BLOCKS, _SCALES = "_blocks", "_scales"
_MXFP4 = Numbers("float", 4, "group", group=32, scale="e8m0")
SCHEME = "nvfp4_weight"


def fused(
    tensors: Tensors, dequantize: bool | Callable[[str], torch.dtype]
) -> tuple[Tensors, dict[str, str]]:
    """The tensors in our form, and the schemes of the experts that hold them.

    `…_blocks` uint8 `[E, N, K/32, 16]`, with the even element in the low nibble, and `…_scales`
    uint8 `[E, N, K/32]` are the matrices of E experts, whose float form is `[E, K, N]`.

    Raises:
        ValueError: a weight that is not so, or whose scales are too far apart for `nvfp4`.
    """
    rest = {n: t for n, t in tensors.items() if not n.endswith((_BLOCKS, _SCALES))}
    stems = {n.removesuffix(end) for n in tensors for end in (_BLOCKS, _SCALES) if n.endswith(end)}
    if not stems:
        raise ValueError("its config says 'mxfp4', and no tensor is …_blocks or …_scales")
    schemes = dict[str, str]()
    for stem in sorted(stems):
        blocks, scales = _pair(stem, tensors)
        packed = blocks.flatten(-2)
        if callable(dequantize):
            rest[stem] = _floats(packed, scales).to(dequantize(stem))
            continue
        made = [_expert(stem, *each) for each in zip(packed, scales, strict=True)]
        rest[f"{stem}_packed"] = packed
        rest[f"{stem}_scale"] = torch.stack([scale for scale, _ in made])
        rest[f"{stem}_global_scale"] = torch.stack([whole for _, whole in made])
        schemes[stem.rpartition(".")[0]] = SCHEME
    return rest, schemes


def _pair(stem: str, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    blocks, scales = (tensors.get(stem + end) for end in (_BLOCKS, _SCALES))
    if blocks is None or scales is None:
        raise ValueError(f"{stem}{_BLOCKS if blocks is None else _SCALES} is missing")
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"{stem}: blocks and scales are bytes, got {blocks.dtype}, {scales.dtype}")
    if blocks.dim() != 4 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"{stem}: blocks are [E, N, K/32, 16] and scales [E, N, K/32], got "
            f"{list(blocks.shape)} and {list(scales.shape)}"
        )
    return blocks, scales


def _expert(
    stem: str, packed: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        made = as_nvfp4({"weight_packed": packed, "weight_scale": scales})
    except ValueError as error:
        raise ValueError(f"{stem}: {error}; pass dequantize=True for float layers") from None
    return made["weight_scale"], made["weight_global_scale"]


def _floats(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    experts, rows, columns = packed.shape
    flat = {"weight_packed": packed.flatten(0, 1), "weight_scale": scales.flatten(0, 1)}
    values = decode(_MXFP4, flat, (experts * rows, 2 * columns))
    return values.view(experts, rows, 2 * columns).mT.contiguous()


__all__ = ["SCHEME", "fused"]
