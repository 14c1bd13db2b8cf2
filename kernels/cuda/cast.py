"""Casts to the float formats: quantise the rows of a matrix and, for training, those of its
transpose, reading it once where the scales need no more than a tile, and twice where they need a
whole row, column or tensor.

    amax pass    the input -> amax of rows, columns or everything, through atomic maxima
    cast pass    the input -> codes and scales, of both orientations

The maximum of nonnegative floats is that of their bits as int32, so one integer instruction does,
and its result does not depend on the order. Whatever else there is to a format stands in
`codes.py`. Sizes are free: tiles are masked. Rows are int64 offsets, so a matrix may have more than
2^31 elements.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False
# What Triton compiles has no types that Python could check, and constants in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from qnn.kernels.cuda.codes import (
    E4M3_ONE,
    FLT_MAX,
    NAN_CODE,
    SIXTH,
    cast8,
    decode8,
    encode4,
    encode8,
    exact,
    exponent_byte,
    finite,
    hadamard,
    hashed,
    inverse,
    magnitude,
    over,
    power,
    power_of_two,
    reciprocal_scale,
    widened,
)
from qnn.kernels.formats import Format
from qnn.kernels.formats.float8 import E4M3, Float8
from qnn.kernels.formats.mxfp8 import MXFP8
from qnn.kernels.formats.nvfp4 import NVFP4

Parts = tuple[torch.Tensor, ...]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Up to how many columns a row is kept in registers, so that it is read once; not measured yet.
WHOLE_ROW = 8192
# (columns up to, rows a program, warps) of the cast with one scale for each row; not measured yet.
ROWS_TABLE = ((256, 16, 4), (1024, 4, 4), (4096, 1, 4), (2**63, 1, 8))
# Tiles of the passes over a matrix: rows, columns, warps; not measured yet. A tile of whole blocks
# is 128 high where 128 rows share a scale, in either orientation.
AMAX_TILE = (64, 128, 4)
CAST_TILE = (64, 128, 4)
BLOCK_TILE = (128, 128, 8)


@triton.jit
def load_tile(x, M, K, stride_m, stride_k, BM: tl.constexpr, BK: tl.constexpr):
    """This program's tile in float32, zeros beyond the edges; its rows and columns."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    at = x + rows[:, None] * stride_m + columns.to(tl.int64)[None, :] * stride_k
    return widened(tl.load(at, mask=inside, other=0.0)), rows, columns


@triton.jit
def store_tile(to, value, rows, columns, ROWS, COLUMNS):
    """Into a contiguous matrix `[ROWS, COLUMNS]`."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    at = to + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    tl.store(at, value, mask=inside)


@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    x, q, s, M, K, stride_m, stride_k,
    QMAX: tl.constexpr, E4M3: tl.constexpr, EXACT: tl.constexpr,
    WHOLE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """float8, one scale for each row, some rows a program; what fits in registers is read once."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BK)
    at = x + rows[:, None] * stride_m
    if WHOLE:
        inside = (rows < M)[:, None] & (columns < K)[None, :]
        tile = tl.load(at + columns.to(tl.int64)[None, :] * stride_k, mask=inside, other=0.0)
        tile = widened(tile)
        r = reciprocal_scale(tl.max(magnitude(tile), 1), QMAX)
        store_tile(q, cast8(tile, r[:, None], QMAX, E4M3, EXACT), rows, columns, M, K)
    else:
        largest = tl.zeros((BM, BK), tl.float32)
        for start in range(0, K, BK):
            k = start + columns
            inside = (rows < M)[:, None] & (k < K)[None, :]
            tile = tl.load(at + k.to(tl.int64)[None, :] * stride_k, mask=inside, other=0.0)
            largest = tl.maximum(largest, magnitude(widened(tile)))
        r = reciprocal_scale(tl.max(largest, 1), QMAX)
        for start in range(0, K, BK):
            k = start + columns
            inside = (rows < M)[:, None] & (k < K)[None, :]
            tile = tl.load(at + k.to(tl.int64)[None, :] * stride_k, mask=inside, other=0.0)
            codes = cast8(widened(tile), r[:, None], QMAX, E4M3, EXACT)
            store_tile(q, codes, rows, k, M, K)
    tl.store(s + rows, inverse(r), mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def amax_kernel(
    x, amax, tamax, M, K, stride_m, stride_k,
    ROWS: tl.constexpr, BOTH: tl.constexpr,
    TRANSFORM: tl.constexpr, TTRANSFORM: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Raise `amax` to the amax of each row with `ROWS`, else of the tensor, and with `BOTH` `tamax`
    to that of each column or of the transposed tensor. A `TRANSFORM` comes first. Bits, int32.
    """
    tile, rows, columns = load_tile(x, M, K, stride_m, stride_k, BM, BK)
    if ROWS:
        bits = tl.max(magnitude(tile), 1).to(tl.int32, bitcast=True)
        tl.atomic_max(amax + rows, bits, mask=rows < M)
        if BOTH:
            bits = tl.max(magnitude(tile), 0).to(tl.int32, bitcast=True)
            tl.atomic_max(tamax + columns, bits, mask=columns < K)
    else:
        value = tile
        if TRANSFORM:
            groups = tl.reshape(tile, (BM, BK // 16, 16))
            value = tl.reshape(hadamard(groups, BM, BK // 16), (BM, BK))
        largest = tl.max(tl.max(magnitude(value), 1), 0)
        tl.atomic_max(amax, largest.to(tl.int32, bitcast=True))
        if BOTH:
            value = tl.trans(tile)
            if TTRANSFORM:
                groups = tl.reshape(value, (BK, BM // 16, 16))
                value = tl.reshape(hadamard(groups, BK, BM // 16), (BK, BM))
            largest = tl.max(tl.max(magnitude(value), 1), 0)
            tl.atomic_max(tamax, largest.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["M"])
def scaled_kernel(
    x, amax, tamax, q, s, tq, st, M, K, stride_m, stride_k,
    QMAX: tl.constexpr, E4M3: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, BOTH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """float8 with known amax, of rows and columns with `ROWS`, else of the tensor."""
    tile, rows, columns = load_tile(x, M, K, stride_m, stride_k, BM, BK)
    if ROWS:
        r = reciprocal_scale(tl.load(amax + rows, mask=rows < M, other=0.0), QMAX)
        if tl.program_id(1) == 0:
            tl.store(s + rows, inverse(r), mask=rows < M)
        store_tile(q, cast8(tile, r[:, None], QMAX, E4M3, EXACT), rows, columns, M, K)
        if BOTH:
            r = reciprocal_scale(tl.load(tamax + columns, mask=columns < K, other=0.0), QMAX)
            if tl.program_id(0) == 0:
                tl.store(st + columns, inverse(r), mask=columns < K)
            codes = cast8(tile, r[None, :], QMAX, E4M3, EXACT)
            store_tile(tq, tl.trans(codes), columns, rows, K, M)
    else:
        r = reciprocal_scale(tl.load(amax), QMAX)
        codes = cast8(tile, r, QMAX, E4M3, EXACT)
        first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
        tl.store(s, inverse(r), mask=first)
        store_tile(q, codes, rows, columns, M, K)
        if BOTH:  # the transpose has the same amax, and so the same codes
            tl.store(st, inverse(r), mask=first)
            store_tile(tq, tl.trans(codes), columns, rows, K, M)


@triton.jit
def cast_groups(
    tile, QMAX: tl.constexpr, E4M3: tl.constexpr, EXACT: tl.constexpr,
    MX: tl.constexpr, TALL: tl.constexpr, G: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Codes `[R, C]` of a tile, and the scales of its groups of `G` along a row: `[R, C / G]`; with
    `TALL` those of its blocks of `G` rows too, `[R / G, C / G]`.
    """
    groups = tl.reshape(tile, (R, C // G, G))
    amax = tl.max(magnitude(groups), 2)
    if TALL:
        amax = tl.max(tl.reshape(amax, (R // G, G, C // G)), 1)
    if MX:
        byte = exponent_byte(amax)
        r = power(254 - byte)
        scale = byte.to(tl.uint8)
    else:
        r = power_of_two(reciprocal_scale(amax, QMAX))
        scale = inverse(r)
    if TALL:
        r = tl.reshape(tl.broadcast_to(r[:, None, :], (R // G, G, C // G)), (R, C // G))
    codes = cast8(groups, r[:, :, None], QMAX, E4M3, EXACT)
    return tl.reshape(codes, (R, C)), scale


@triton.jit(do_not_specialize=["M"])
def groups_kernel(
    x, q, s, tq, st, M, K, stride_m, stride_k,
    QMAX: tl.constexpr, E4M3: tl.constexpr, EXACT: tl.constexpr,
    MX: tl.constexpr, TALL: tl.constexpr, BOTH: tl.constexpr, G: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """float8 and mxfp8 whose scales belong to groups or blocks within a tile."""
    tile, rows, columns = load_tile(x, M, K, stride_m, stride_k, BM, BK)
    column_group = tl.program_id(1) * (BK // G) + tl.arange(0, BK // G)
    codes, scale = cast_groups(tile, QMAX, E4M3, EXACT, MX, TALL, G, BM, BK)
    store_tile(q, codes, rows, columns, M, K)
    if TALL or BOTH:  # else a tile may be lower than a group
        row_group = tl.program_id(0) * (BM // G) + tl.arange(0, BM // G)
    if TALL:
        store_tile(s, scale, row_group, column_group, tl.cdiv(M, G), tl.cdiv(K, G))
    else:
        store_tile(s, scale, rows, column_group, M, tl.cdiv(K, G))
    if BOTH:
        codes, scale = cast_groups(tl.trans(tile), QMAX, E4M3, EXACT, MX, TALL, G, BK, BM)
        store_tile(tq, codes, columns, rows, K, M)
        if TALL:
            store_tile(st, scale, column_group, row_group, tl.cdiv(K, G), tl.cdiv(M, G))
        else:
            store_tile(st, scale, columns, row_group, K, tl.cdiv(M, G))


@triton.jit
def cast_nvfp4(
    tile, amax, rows, first_group, GROUPS, seed, EXACT: tl.constexpr,
    TRANSFORM: tl.constexpr, STOCHASTIC: tl.constexpr, TALL: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Eight codes an int32 `[R, C / 8]`, block scales `[R, C / 16]` and the tensor's scale."""
    G: tl.constexpr = C // 16
    x = tl.reshape(tile, (R, G, 16))
    if TRANSFORM:
        x = hadamard(x, R, G)
    s = tl.minimum(over(2688.0, tl.where(amax == 0, 1.0, amax)), FLT_MAX)
    s = tl.where(amax == 0, 1.0, s)
    bmax = tl.max(magnitude(x), 2)
    if TALL:
        tall = tl.max(tl.reshape(bmax, (R // 16, 16, G)), 1)
        bmax = tl.reshape(tl.broadcast_to(tall[:, None, :], (R // 16, 16, G)), (R, G))
    code = encode8(tl.minimum(bmax * (s * SIXTH), 448.0), True, EXACT)
    code = tl.where(bmax == 0, E4M3_ONE, code).to(tl.uint8)
    # A block that is too small for any scale has scale 0, and 1 / 0 is infinite.
    step = decode8(code, True, EXACT) * inverse(s)
    r = tl.where(step == 0, FLT_MAX, tl.minimum(inverse(tl.where(step == 0, 1.0, step)), FLT_MAX))
    usable = finite(x)
    scaled = tl.minimum(tl.maximum(x * r[:, :, None], -6.0), 6.0)
    scaled = tl.where(usable, scaled, 0.0)
    lane = tl.arange(0, 16)[None, None, :]
    if STOCHASTIC:
        group = first_group + tl.arange(0, G)
        index = (rows[:, None] * GROUPS + group[None, :])[:, :, None] * 16 + lane
        codes = encode4(scaled, hashed(index, seed), True)
    else:
        codes = encode4(scaled, scaled, False)
    # The lanes' bits do not overlap, so that their sum is their union.
    words = tl.reshape(codes << ((lane % 8) * 4), (R, G * 2, 8))
    code = tl.where(tl.min(usable.to(tl.int32), 2) == 0, NAN_CODE, code).to(tl.uint8)
    return tl.sum(words, 2).to(tl.int32), code, s


@triton.jit(do_not_specialize=["M"])
def nvfp4_kernel(
    x, amax, tamax, seeds, q, s, g, tq, st, gt, M, K, stride_m, stride_k, EXACT: tl.constexpr,
    TRANSFORM: tl.constexpr, TTRANSFORM: tl.constexpr, STOCHASTIC: tl.constexpr,
    TALL: tl.constexpr, BOTH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """nvfp4 with known amax; the transpose has an amax and a seed of its own."""
    tile, rows, columns = load_tile(x, M, K, stride_m, stride_k, BM, BK)
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    seed = tl.load(seeds).to(tl.int64) if STOCHASTIC else 0
    groups = tl.cdiv(K, 16)
    group = tl.program_id(1) * (BK // 16)
    words, code, scale = cast_nvfp4(
        tile, tl.load(amax), rows, group, groups, seed, EXACT,
        TRANSFORM, STOCHASTIC, TALL, BM, BK,
    )  # fmt: skip
    store_tile(q, words, rows, group * 2 + tl.arange(0, BK // 8), M, groups * 2)
    store_tile(s, code, rows, group + tl.arange(0, BK // 16), M, groups)
    tl.store(g, scale, mask=first)
    if BOTH:
        groups = tl.cdiv(M, 16)
        group = tl.program_id(0) * (BM // 16)
        words, code, scale = cast_nvfp4(
            tl.trans(tile), tl.load(tamax), columns.to(tl.int64), group, groups, seed + 1, EXACT,
            TTRANSFORM, STOCHASTIC, False, BK, BM,
        )  # fmt: skip
        store_tile(tq, words, columns, group * 2 + tl.arange(0, BM // 8), K, groups * 2)
        store_tile(st, code, columns, group + tl.arange(0, BM // 16), K, groups)
        tl.store(gt, scale, mask=first)


def _float8(form: Float8, both: bool, x: torch.Tensor, parts: Parts) -> None:
    (M, K), (rows, columns) = x.shape, form.sides
    q, s, tq, st = _bytes(parts) if both else _bytes(parts) * 2
    common: dict[str, Any] = {
        "QMAX": form.qmax, "E4M3": form.storage == E4M3, "EXACT": exact(x.device),
        "enable_fp_fusion": False,
    }  # fmt: skip
    if rows == 1 and columns == 0 and not both and x.stride(1) == 1:
        bm, warps = next(row[1:] for row in ROWS_TABLE if row[0] >= K)
        bk = triton.next_power_of_2(min(K, WHOLE_ROW))
        rows_kernel[(triton.cdiv(M, bm),)](
            x, q, s, M, K, *x.stride(), WHOLE=bk >= K, BM=bm, BK=bk, num_warps=warps, **common
        )
    elif columns == 0:
        amax, tamax = _amax(x, both, by_rows=rows == 1)
        bm, bk, warps = CAST_TILE
        scaled_kernel[_grid(x, bm, bk)](
            x, amax, tamax, q, s, tq, st, M, K, *x.stride(),
            ROWS=rows == 1, BOTH=both, BM=bm, BK=bk, num_warps=warps, **common,
        )  # fmt: skip
    else:
        _groups(form, both, x, (q, s, tq, st), columns, rows > 1, False)


def _groups(
    form: Format, both: bool, x: torch.Tensor, parts: Parts, group: int, tall: bool, mx: bool
) -> None:
    bm, bk, warps = BLOCK_TILE if both or tall else CAST_TILE
    groups_kernel[_grid(x, bm, bk)](
        x, *parts, *x.shape, *x.stride(), QMAX=form.qmax, E4M3=form.parts[0].dtype == E4M3,
        EXACT=exact(x.device), MX=mx, TALL=tall, BOTH=both, G=group,
        BM=bm, BK=bk, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


def _nvfp4(
    form: NVFP4,
    transposed: Format | None,
    x: torch.Tensor,
    parts: Parts,
    seed: torch.Tensor | None,
) -> None:
    both = transposed is not None
    transforms = (form.transformed, isinstance(transposed, NVFP4) and transposed.transformed)
    amax, tamax = _amax(x, both, by_rows=False, transforms=transforms)
    q, s, g, tq, st, gt = _bytes(parts) if both else _bytes(parts) * 2
    bm, bk, warps = CAST_TILE
    nvfp4_kernel[_grid(x, bm, bk)](
        x, amax, tamax, amax if seed is None else seed,
        q.view(torch.int32), s, g, tq.view(torch.int32), st, gt, *x.shape, *x.stride(),
        EXACT=exact(x.device), TRANSFORM=transforms[0], TTRANSFORM=transforms[1],
        STOCHASTIC=seed is not None, TALL=form.tall, BOTH=both,
        BM=bm, BK=bk, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip


def _amax(
    x: torch.Tensor, both: bool, by_rows: bool, transforms: tuple[bool, bool] = (False, False)
) -> tuple[torch.Tensor, torch.Tensor]:
    """amax of the rows and the columns, or of the tensor and its transpose."""
    (M, K), (bm, bk, warps) = x.shape, AMAX_TILE
    sizes = (M, K) if by_rows else (1, 1)
    # One allocation and one fill, for both.
    bits = torch.zeros(sum(sizes), dtype=torch.int32, device=x.device)
    amax, tamax = bits.split(sizes)
    # The transpose has no amax of its own unless something is done to it.
    needs_own = both and (by_rows or any(transforms))
    amax_kernel[_grid(x, bm, bk)](
        x, amax, tamax, M, K, *x.stride(),
        ROWS=by_rows, BOTH=needs_own, TRANSFORM=transforms[0], TTRANSFORM=transforms[1],
        BM=bm, BK=bk, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    amax, tamax = amax.view(torch.float32), tamax.view(torch.float32)
    return amax, tamax if needs_own else amax


def _grid(x: torch.Tensor, bm: int, bk: int) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], bm), triton.cdiv(x.shape[1], bk)


def _bytes(parts: Sequence[torch.Tensor]) -> Parts:
    """float8 as bytes: a GPU without the type cannot name it."""
    return tuple(p.view(torch.uint8) if p.dtype.itemsize == 1 else p for p in parts)


def _empty(form: Format, x: torch.Tensor) -> Parts:
    rows, columns = x.shape
    return tuple(x.new_empty(p.shape(rows, columns), dtype=p.dtype) for p in form.parts)


def quantize(form: Format | None, transposed: Format | None = None) -> Callable[..., Parts]:
    """The kernel of the casts of a format: what `float_ops.quantize_reference` of the same
    arguments gives, bit for bit. float64 is left to that.
    """
    from qnn.kernels.reference.floats import quantize_reference  # which imports this package

    reference = quantize_reference(form, transposed)
    if form is None:
        if transposed is None:
            raise ValueError("nothing to quantise: neither rows nor columns have a format")
        return _columns(transposed)

    def run(x: torch.Tensor, seed: torch.Tensor | None = None) -> Parts:
        if x.dtype not in FLOATS or x.numel() == 0:
            return tuple(reference(x, seed))
        rows = x.reshape(-1, x.shape[-1])
        parts = _empty(form, rows)
        if transposed is not None:
            parts += _empty(transposed, rows.mT)
        with torch.cuda.device_of(x):
            if isinstance(form, Float8):
                _float8(form, transposed is not None, rows, parts)
            elif isinstance(form, MXFP8):
                given = _bytes(parts) if transposed is not None else _bytes(parts) * 2
                _groups(form, transposed is not None, rows, given, 32, False, True)
            elif isinstance(form, NVFP4):
                _nvfp4(form, transposed, rows, parts, seed)
            else:
                raise TypeError(f"no cast kernel for {form.key}")
        if x.dim() == 2:
            return parts
        lead = x.shape[:-1]
        return tuple(
            part if spec.axes == "1" else part.view(*lead, part.shape[-1])
            for part, spec in zip(parts, form.parts, strict=True)
        )

    return run


def _columns(form: Format) -> Callable[..., Parts]:
    """The transpose alone, read through its strides; its draw is the one that it has in both."""
    rows = quantize(form)

    def run(x: torch.Tensor, seed: torch.Tensor | None = None) -> Parts:
        return rows(x.mT, None if seed is None else seed + 1)

    return run
