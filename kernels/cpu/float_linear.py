"""CPU kernels of the layers over a weight in a float format, for where the library of the C++
kernels is not loaded. Their meaning is `linear_reference` in `kernels/float_ops.py`, which decodes
the whole weight at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qnn.kernels.formats import Format

# Values of a weight that are decoded at a time. ms of 64 rows times 4096x4096 on one core of a
# Zen 4, for 2^16, 2^18, 2^20, 2^22: e4m3 93, 80, 80, 101; nvfp4 167, 107, 109, 148. All at once, as
# the reference does it: 113 and 276.
_DECODE_BLOCK = 1 << 20

Kernel = Callable[..., torch.Tensor]


def weight_linear(form: Format) -> Kernel:
    """The layer over a weight in `form`, a block of rows of the weight after the other."""

    def kernel(x: torch.Tensor, *args: torch.Tensor | None) -> torch.Tensor:
        *given, bias = args
        parts = [part for part in given if part is not None]
        k, n = x.shape[-1], parts[0].shape[0]
        y = x.new_zeros(*x.shape[:-1], n)
        if x.numel() == 0 or n == 0:
            return y if bias is None else y.add_(bias)
        rows, columns = x.reshape(-1, k).float(), y.view(-1, n)
        step = max(1, _DECODE_BLOCK // k)
        for begin in range(0, n, step):
            block = slice(begin, begin + step)
            values, scale = form.decode(
                [
                    part[block] if declared.axes.startswith("r") else part
                    for part, declared in zip(parts, form.parts, strict=True)
                ],
                torch.float32,
            )
            acc = rows @ values[:, :k].T
            if scale is not None:
                acc *= scale.flatten()
            if bias is not None:
                acc += bias[block]
            columns[:, block] = acc
        return y

    return kernel
