"""Floats to stored values and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from qnn.kernels import OPS, get_scheme


def quantize(x: torch.Tensor, scheme: str = "int8") -> tuple[torch.Tensor, ...]:
    """Quantise `x` in the weight format of `scheme`.

    For int8: `scale = amax(|x|) / 127` per row, at least the smallest normal float32, and
    `q = clamp(round(x · (1/scale)), −127, 127)`, ties to even, in float32. A zero row gets scale 1;
    a row with a NaN or inf gets zeros, and NaN or inf as its scale. For fp8: `r = 448 / amax` per
    row, `q = e4m3(clamp(x · r, ±448))`, `scale = 1/r`, with amax over what is finite; a NaN or inf
    has the code of NaN. docs/numerics.md has the formula of each scheme.

    Args:
        x: float, `[..., K]`; `[N, K]` for `"fp8_block"`, whose blocks have 128 rows.
        scheme: the name of a scheme, such as `"int8"`.

    Returns:
        The parts that a weight is stored in, with `dequantize(parts, scheme=scheme) ≈ x`:

        - int8: `q` int8 `[..., K]`, `scale` float32 `[..., 1]`, per-channel;
        - fp8: `q` float8_e4m3fn, `scale` float32 `[..., 1]`; fp8_tensor: `[1]`; fp8_block:
          `[⌈N/128⌉, ⌈K/128⌉]`, per-block;
        - mxfp8: `q` float8_e4m3fn, `scale` uint8 `[..., ⌈K/32⌉]`, per-group: `2^(scale − 127)`;
        - nvfp4: `q` uint8 `[..., K/2]`, two values a byte, `scale` float8_e4m3fn `[..., K/16]`,
          and `global_scale` float32 `[1]`, a divisor;
        - int4: `q` int32 `[..., K/8]`, eight codes a word, `scale` float32 `[..., K/128]`, or
          `K/64` and `K/32` for `_g64` and `_g32`; with `_asym` `zero_point` int8, of that shape.

        No gradient flows through any of them.

    Raises:
        ValueError: an unknown scheme, or for int4 a K that is not whole groups.
        TypeError: `x` is not float.

    >>> q, scale = quantize(torch.tensor([[1.0, -127.0], [0.0, 0.0]]))
    >>> q.tolist(), scale.tolist()
    ([[1, -127], [0, 0]], [[1.0], [1.0]])
    """
    op = OPS[f"{get_scheme(scheme).weight.key}_quantize"]
    parts: tuple[torch.Tensor, ...] = op.overload(x.detach())
    return parts


def dequantize(
    q: torch.Tensor | Sequence[torch.Tensor],
    scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    global_scale: torch.Tensor | None = None,
    scheme: str = "int8",
) -> torch.Tensor:
    """`q · scale` in float32, then cast to `dtype`: the inverse of `quantize`.

    Args:
        q: the parts that `quantize` returns, in one tuple; or the stored values alone, with
        scale: their scale, and
        global_scale: nvfp4's divisor: `q · scale / global_scale`.
        dtype: of the result.
        scheme: the name of the scheme that `q` was quantised in.

    >>> dequantize(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([[0.5]]))
    tensor([[ 1., -2.]])
    """
    parts = stored_parts(scheme, q, _scale=scale, _global_scale=global_scale)
    op = OPS[f"{get_scheme(scheme).weight.key}_dequantize"]
    result: torch.Tensor = op.overload(*(part.detach() for part in parts), dtype)
    return result


def stored_parts(
    scheme: str, first: torch.Tensor | Sequence[torch.Tensor], **others: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The parts of a weight of `scheme`, from one tuple, or from the first and others by suffix; a
    ValueError that names them where one is missing or too many.
    """
    parts = [part.suffix for part in get_scheme(scheme).weight.parts]
    values = [first] if isinstance(first, torch.Tensor) else list(first)
    others = {suffix: other for suffix, other in others.items() if other is not None}
    given = dict(zip(parts, values, strict=False)) | others
    if given.keys() == {*parts} and len(values) + len(others) == len(parts):
        return tuple(cast(torch.Tensor, given[suffix]) for suffix in parts)
    wanted, got = (", ".join("weight" + suffix for suffix in each) for each in (parts, given))
    raise ValueError(
        f"qnn.functional: a weight of scheme {scheme!r} is ({wanted}), as quantize returns it; got "
        f"{len(values) + len(others)} tensors, ({got})."
    )
