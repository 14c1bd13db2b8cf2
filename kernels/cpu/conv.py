"""The int8 and int16 convolutions on a CPU without the C++ library: exact sums by float32
convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qnn.kernels.reference.conv import OFFSET, product

# So many products of a code and a weight, at most 128, stay below 2^24, and so are exact in
# whatever order float32 sums them. Lower float32 precisions for convolutions do not harm: codes and
# their differences are exact in bfloat16 and TF32.
_DEPTH, _DEPTH_WITH_ZERO_POINT = 2**24 // (127 * 128), 2**24 // (255 * 128)


def float32_sums(
    q: torch.Tensor, zx: torch.Tensor | None, w: torch.Tensor, *rest: Any, transposed: bool = False
) -> torch.Tensor:
    """`exact_sums` of the reference, rounded to float32."""
    most = _DEPTH if zx is None else _DEPTH_WITH_ZERO_POINT
    x = q.float() if zx is None else q.float().sub_(zx.float() + OFFSET)
    return _exact(x, most, w, *rest, transposed=transposed).float()


def float32_sums_of_bytes(
    q: torch.Tensor, zx: torch.Tensor | None, w: torch.Tensor, *rest: Any, transposed: bool = False
) -> torch.Tensor:
    """The same of 16-bit codes, which have no zero point: the sums of their high and of their low
    bytes, joined once.
    """
    high, low = (
        _exact(each.float(), _DEPTH_WITH_ZERO_POINT, w, *rest, transposed=transposed).double()
        for each in (q >> 8, q & 255)
    )
    return low.add_(high, alpha=256).float()


def _exact(
    x: torch.Tensor,
    most: int,
    w: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    transposed: bool,
) -> torch.Tensor:
    """The sums of whole numbers of which float32 holds `most` products, in float32 or float64.
    Images keep three axes: torch's convolutions of two may go by Winograd's way or Fourier's, whose
    sums are not exact.
    """
    rest = stride, padding, dilation, groups
    of_group, taps = x.shape[1] // groups, w.shape[2:].numel()
    if of_group * taps <= most:
        return product(transposed)(x, w.float(), *rest)
    if taps > most:
        return product(transposed)(x.double(), w.double(), *rest)
    acc = torch.zeros((), dtype=torch.float64)
    axis, parts = (0, groups) if transposed else (1, 1)
    step = most // taps
    for at in range(0, of_group, step):
        image = x.unflatten(1, (groups, of_group)).narrow(2, at, min(step, of_group - at))
        kernels = w.unflatten(axis, (parts, of_group)).narrow(axis + 1, at, image.shape[2]).float()
        some = product(transposed)(image.flatten(1, 2), kernels.flatten(axis, axis + 1), *rest)
        acc = acc + some.double()
    return acc
