"""CPU kernels of the layers over a weight in a float format, in torch calls. Their meaning is
`linear_reference` in `kernels/declare/floats.py`, which decodes the whole weight at once.

Where the library of the C++ kernels is loaded, it serves the layers over fp8 and nvfp4 weights.
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


def _height(axes: str, tall: int) -> int:
    first = axes.split()[0]
    return 1 if first == "r" else tall if first.startswith("r/") else 0


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
        tall = form.block[0] if form.tall and form.block else 1
        step = tall * max(1, _DECODE_BLOCK // (k * tall))
        # Rows that a row of each part stands for; 0 for a scale of the whole weight.
        height = [_height(part.axes, tall) for part in form.parts]
        for begin in range(0, n, step):
            block = slice(begin, begin + step)
            some = [
                part[begin // h : -(-(begin + step) // h)] if h else part
                for part, h in zip(parts, height, strict=True)
            ]
            values, scale = form.decode(some, torch.float32)
            acc = rows @ values[:, :k].T
            if scale is not None:
                acc *= scale.flatten()
            if bias is not None:
                acc += bias[block]
            columns[:, block] = acc
        return y

    return kernel


def quantized_linear(activation: Format, product: str) -> Kernel:
    """The layer with quantised activations: `x` is cast, and the op `qnn::<product>`, which takes
    activations as they are, multiplies what the codes stand for. A CPU has no products of float8.
    """

    def kernel(x: torch.Tensor, *args: torch.Tensor | None) -> torch.Tensor:
        *parts, bias = args
        values, scale = activation.decode(activation.quantize(x), torch.float32)
        values = values[..., : x.shape[-1]]
        y: torch.Tensor = getattr(torch.ops.qnn, product).default(values, *parts, None)
        if scale is not None:
            y *= scale
        if bias is not None:
            y += bias
        return y.to(x.dtype)

    return kernel
