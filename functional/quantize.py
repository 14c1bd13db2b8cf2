"""Floats to stored values and back."""

from __future__ import annotations

import torch

from qnn.kernels import OPS, get_scheme


def quantize(x: torch.Tensor, scheme: str = "int8") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the rows of `x` in the weight format of `scheme`.

    For int8: `scale = amax(|x|) / 127` a row, at least the smallest normal float32, and
    `q = clamp(round(x · (1/scale)), −127, 127)`, ties to even, in float32. A zero row gets scale 1;
    a row with a NaN or inf gets zeros, and NaN or inf as its scale.

    Args:
        x: float, `[..., K]`.
        scheme: the name of a scheme, such as `"int8"`.

    Returns:
        `q` int8 `[..., K]` and `scale` float32 `[..., 1]`, with `q * scale ≈ x`. No gradient flows
        through either.

    Raises:
        ValueError: an unknown scheme.
        TypeError: `x` is not float.

    >>> q, scale = quantize(torch.tensor([[1.0, -127.0], [0.0, 0.0]]))
    >>> q.tolist(), scale.tolist()
    ([[1, -127], [0, 0]], [[1.0], [1.0]])
    """
    op = OPS[f"{get_scheme(scheme).weight.key}_quantize"]
    q, scale = op.overload(x.detach())
    return q, scale


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    scheme: str = "int8",
) -> torch.Tensor:
    """`q · scale` in float32, then cast to `dtype`: the inverse of `quantize`.

    Args:
        q: stored values, `[..., K]`.
        scale: float32 `[..., 1]`.
        dtype: of the result.
        scheme: the name of the scheme that `q` was quantised in.

    >>> dequantize(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([[0.5]]))
    tensor([[ 1., -2.]])
    """
    op = OPS[f"{get_scheme(scheme).weight.key}_dequantize"]
    result: torch.Tensor = op.overload(q, scale.detach(), dtype)
    return result
