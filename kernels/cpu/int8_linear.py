"""CPU kernels of the int8 ops. Their meaning is `kernels/reference/int8.py`; integers are equal bit
for bit.
"""

from __future__ import annotations

import torch

from qnn.kernels.cpu.engines import Engine, best_engine
from qnn.kernels.epilogue import finish
from qnn.kernels.formats.int8 import round_to_grid

# Rows are quantised in blocks of so many values, with one float32 buffer that stays in the caches.
# 1024x4096 float32, 2 Zen 4 cores: 2.0 ms at 2^16, 1.3 at 2^18, 1.1 at 2^19, 1.0 at 2^20, 1.7 at
# 2^22; from 2^20 on the buffer's page faults cost another 1 ms whenever the allocator hands out
# fresh memory.
_QUANTIZE_BLOCK = 1 << 19
# Values of an int8 weight that are widened at a time.
_WIDEN_BLOCK = 1 << 20
_TINY = torch.finfo(torch.float32).tiny
# Adding 1.5 * 2^23 rounds a float32 below 2^22 to an integer, ties to even, and leaves that integer
# in the low byte.
_ROUND = 1.5 * 2**23


def quantize_rows(x: torch.Tensor, *, zero_point: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of `x [M, K]`: integers `[M, K]`, int8 or, with zero point 128, uint8; and float32
    scales `[M, 1]`.

    Differs from the reference where a product cannot tell: a zero row has the smallest scale
    instead of 1, and the integers of a row with NaN or inf are arbitrary. A small layer is as fast
    as this has few torch calls.
    """
    storage = torch.uint8 if zero_point else torch.int8
    if x.numel() <= _QUANTIZE_BLOCK:
        x = x if x.dtype == torch.float32 else x.float()
        work = x.abs()
        scale = work.amax(-1, keepdim=True).div_(127.0).clamp_min_(_TINY)
        return _integers(x, scale.reciprocal(), zero_point, work).to(storage), scale
    # |x| would not fit into the caches: two reductions are faster.
    amax = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    scale = amax.float().div_(127.0).clamp_min_(_TINY)
    q = x.new_empty(x.shape, dtype=storage)
    step = max(1, _QUANTIZE_BLOCK // x.shape[1])
    work = scale.new_empty(step, x.shape[1])
    for rows, inverse, out in zip(
        x.split(step), scale.reciprocal().split(step), q.split(step), strict=True
    ):
        out.copy_(_integers(rows.float(), inverse, zero_point, work[: rows.shape[0]]))
    return q, scale


def _integers(
    x: torch.Tensor, inverse: torch.Tensor, zero_point: int, work: torch.Tensor
) -> torch.Tensor:
    """int32 whose low byte is round(x · inverse) + zero_point. The product rounds to at most 127:
    no clamp is needed.
    """
    return torch.mul(x, inverse, out=work).add_(_ROUND + zero_point).view(torch.int32)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    k = x.shape[-1]
    if x.numel() == 0:
        scale = x.new_ones(*x.shape[:-1], 1, dtype=torch.float32)
        return x.new_empty(x.shape, dtype=torch.int8), scale
    rows = x.reshape(-1, k)
    q, scale = quantize_rows(rows)
    q.masked_fill_(~scale.isfinite(), 0)
    scale.masked_fill_(~rows.any(-1, keepdim=True), 1.0)
    return q.view(x.shape), scale.view(*x.shape[:-1], 1)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    engine: Engine | None = None,
) -> torch.Tensor:
    if x.numel() == 0 or w.numel() == 0:
        return finish(_empty_sum(x, w, bias, x.dtype), residual, activation)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    engine = engine or best_engine(rows.shape[0], w)
    q, sx = quantize_rows(rows, zero_point=engine.zero_point)
    y = _output(engine.matmul(q, w, sw.view(-1)).mul_(sx), bias, x, x.dtype)
    return finish(y, residual, activation)


def rows_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    *,
    engine: Engine | None = None,
) -> torch.Tensor:
    if q.numel() == 0 or w.numel() == 0:
        return finish(_empty_sum(q, w, bias, dtype), residual, activation)
    y = _product_of_rows(q, scale, w, sw, 0, engine)
    return finish(_output(y, bias, q, dtype), residual, activation)


def _product_of_rows(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    zero_point: int,
    engine: Engine | None,
) -> torch.Tensor:
    rows = q.reshape(-1, q.shape[-1])
    engine = engine or best_engine(rows.shape[0], w)
    if engine.zero_point:  # 128: the sign bit turned over is the value moved up by it
        rows = rows.view(torch.uint8) ^ engine.zero_point
    given = (zero_point,) if zero_point else ()
    return engine.matmul(rows, w, sw.view(-1), *given).mul_(scale.reshape(-1, 1))


def static_rows_linear(
    q: torch.Tensor,
    scale: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    zx: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype = torch.float32,
    *,
    engine: Engine | None = None,
) -> torch.Tensor:
    if q.numel() == 0 or w.numel() == 0:
        y = scale.new_zeros(scale.numel(), w.shape[0]).mul_(scale.reshape(-1, 1))
    else:
        y = _product_of_rows(q, scale, w, sw, int(zx), engine)
    return finish(_output(y, bias, q, dtype), residual, activation)


def static_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    sx: torch.Tensor,
    zx: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    *,
    engine: Engine | None = None,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    good = rows.isfinite().all(-1, keepdim=True) & (sx >= _TINY) & sx.isfinite()
    scale = torch.where(good, sx, torch.nan)
    if x.numel() == 0 or w.numel() == 0:
        y = rows.new_zeros(rows.shape[0], w.shape[0]).mul_(scale)
    else:
        engine = engine or best_engine(rows.shape[0], w)
        zero_point = int(zx)
        q = round_to_grid(rows, sx.reciprocal(), -128 - zero_point, 127 - zero_point)
        storage = torch.uint8 if engine.zero_point else torch.int8
        # The integers of a bad row are arbitrary, but int8: a NaN has no defined cast.
        q = torch.where(good, q.add_(zero_point + engine.zero_point), 0).to(storage)
        y = engine.matmul(q, w, sw.view(-1), zero_point).mul_(scale)
    y = _output(y, bias, x, x.dtype)
    return finish(y, residual, activation)


def weight_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    if x.numel() == 0 or w.numel() == 0:
        return finish(_empty_sum(x, w, bias, x.dtype), residual, activation)
    rows = x.reshape(-1, x.shape[-1]).float()
    y = rows.new_empty(rows.shape[0], w.shape[0])
    step = max(1, _WIDEN_BLOCK // w.shape[1])
    for block, out in zip(w.split(step), y.split(step, dim=1), strict=True):
        out.copy_(rows @ block.float().T)
    return finish(_output(y.mul_(sw.view(-1)), bias, x, x.dtype), residual, activation)


def linear_dgrad(dy: torch.Tensor, w: torch.Tensor, sw: torch.Tensor) -> torch.Tensor:
    return torch.matmul(dy, (w * sw).to(dy.dtype))


def _output(
    y: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The bias, in float32, then the one cast, and the leading axes of `x`."""
    if bias is not None:
        y.add_(bias)
    if dtype != torch.float32:
        y = y.to(dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _empty_sum(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """No rows, or rows of no elements, whose products sum to zero."""
    y = x.new_zeros(*x.shape[:-1], w.shape[0], dtype=dtype)
    return y if bias is None else y.add_(bias)
