"""Floats to stored values and back."""

from __future__ import annotations

import torch

from qnn.kernels import OPS, get_scheme


def quantize(x: torch.Tensor, scheme: str = "int8") -> tuple[torch.Tensor, ...]:
    """Quantise `x` in the weight format of `scheme`.

    For int8: `scale = amax(|x|) / 127` a row, at least the smallest normal float32, and
    `q = clamp(round(x · (1/scale)), −127, 127)`, ties to even, in float32. A zero row gets scale 1;
    a row with a NaN or inf gets zeros, and NaN or inf as its scale. For fp8: `r = 448 / amax` a
    row, `q = e4m3(clamp(x · r, ±448))`, `scale = 1/r`, with amax over what is finite; a NaN or inf
    has the code of NaN. docs/numerics.md has the formula of each scheme.

    Args:
        x: float, `[..., K]`; `[N, K]` for `"fp8_block"`, whose blocks have 128 rows.
        scheme: the name of a scheme, such as `"int8"`.

    Returns:
        The parts that a weight is stored in, with `dequantize(*parts, scheme=scheme) ≈ x`:

        - int8: `q` int8 `[..., K]`, `scale` float32 `[..., 1]`;
        - fp8: `q` float8_e4m3fn, `scale` float32 `[..., 1]`; fp8_tensor: `[1]`; fp8_block:
          `[⌈N/128⌉, ⌈K/128⌉]`;
        - mxfp8: `q` float8_e4m3fn, `scale` uint8 `[..., ⌈K/32⌉]`, which means `2^(scale − 127)`;
        - nvfp4: `q` uint8 `[..., K/2]`, two values a byte, `scale` float8_e4m3fn `[..., K/16]`,
          and `global_scale` float32 `[1]`, a divisor.

        No gradient flows through any of them.

    Raises:
        ValueError: an unknown scheme.
        TypeError: `x` is not float.

    >>> q, scale = quantize(torch.tensor([[1.0, -127.0], [0.0, 0.0]]))
    >>> q.tolist(), scale.tolist()
    ([[1, -127], [0, 0]], [[1.0], [1.0]])
    """
    op = OPS[f"{get_scheme(scheme).weight.key}_quantize"]
    parts: tuple[torch.Tensor, ...] = op.overload(x.detach())
    return parts


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    global_scale: torch.Tensor | None = None,
    scheme: str = "int8",
) -> torch.Tensor:
    """`q · scale` in float32, then cast to `dtype`: the inverse of `quantize`.

    Args:
        q, scale: as `quantize` returns them.
        dtype: of the result.
        global_scale: nvfp4's divisor, for its schemes alone: `q · scale / global_scale`.
        scheme: the name of the scheme that `q` was quantised in.

    >>> dequantize(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([[0.5]]))
    tensor([[ 1., -2.]])
    """
    op = OPS[f"{get_scheme(scheme).weight.key}_dequantize"]
    parts = stored_parts(scheme, q, scale, global_scale)
    result: torch.Tensor = op.overload(*(part.detach() for part in parts), dtype)
    return result


def stored_parts(
    scheme: str, q: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The parts of a weight of `scheme`; a ValueError where one is missing or too many."""
    wanted = len(get_scheme(scheme).weight.parts)
    if (wanted == 3) != (global_scale is not None):
        verb = "needs a" if wanted == 3 else "has no"
        raise ValueError(f"qnn.functional: scheme {scheme!r} {verb} global scale.")
    return (q, scale) if global_scale is None else (q, scale, global_scale)
