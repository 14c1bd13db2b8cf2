"""The int8 convolutions on a CPU without the C++ library: exact sums by float32 convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qnn.kernels.reference.conv import OFFSET, product

# So many products of a code and a weight, at most 128, stay below 2^24, and so are exact in
# whatever order float32 sums them. Lower float32 precisions for convolutions do not harm: codes and
# their differences are exact in bfloat16 and TF32.
_DEPTH, _DEPTH_WITH_ZERO_POINT = 2**24 // (127 * 128), 2**24 // (255 * 128)


def float32_sums(
    q: torch.Tensor,
    zx: torch.Tensor | None,
    w: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """`exact_sums` of the reference, rounded to float32. Images keep three axes: torch's
    convolutions of two may go by Winograd's way or Fourier's, whose sums are not exact.
    """
    most = _DEPTH if zx is None else _DEPTH_WITH_ZERO_POINT
    x = q.float() if zx is None else q.float().sub_(zx.float() + OFFSET)
    rest = stride, padding, dilation, groups
    of_group, taps = q.shape[1] // groups, w.shape[2:].numel()
    if of_group * taps <= most:
        return product(transposed)(x, w.float(), *rest)
    if taps > most:
        return product(transposed)(x.double(), w.double(), *rest).float()
    acc = torch.zeros((), dtype=torch.int32)
    axis, parts = (0, groups) if transposed else (1, 1)
    step = most // taps
    for at in range(0, of_group, step):
        image = x.unflatten(1, (groups, of_group)).narrow(2, at, min(step, of_group - at))
        kernels = w.unflatten(axis, (parts, of_group)).narrow(axis + 1, at, image.shape[2]).float()
        acc = (
            acc
            + product(transposed)(image.flatten(1, 2), kernels.flatten(axis, axis + 1), *rest).int()
        )
    return acc.float()
