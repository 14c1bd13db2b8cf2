"""Products of quantised matrices, `x · wᵀ + bias`, two ways.

`scaled_matmul` is torch's own GEMM on the stored codes, `torch.nn.functional.scaled_mm`. It wants
sizes in multiples of 16 (blocks: 128) and scales in layouts of its own; here both are made to fit,
with zeros beyond the edges, which change no sum.

`triton_matmul` runs where torch has none: a tile of codes is decoded in registers to bfloat16,
which holds every value exactly (at most 8 significant bits, scales of 16 and of 32 neighbours
included), and multiplied with float32 sums. Scales of 128 belong to a step of the sum, scales of
rows and tensors to its end.

Fast accumulation keeps about 14 bits of a partial sum inside Hopper's tensor cores. It is for
outputs only; gradients take split accumulation. A `*_linear` op is always an output. A `*_matmul`
op is told nothing, so it splits, except with per-tensor scales: an operand in e5m2 there is a
gradient, and two in e4m3 are an output.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False
# What Triton compiles has no types that Python could check, and constants in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch.nn import functional as F
from torch.nn.functional import ScalingType, SwizzleType

from qnn.kernels.cuda.codes import (
    INTERPRETED,
    decode4,
    decode8,
    exact,
    inverse,
    power,
    rounded,
    widened,
)
from qnn.kernels.formats import Format
from qnn.kernels.formats.float8 import E4M3, E5M2, Float8
from qnn.kernels.formats.mxfp8 import MXFP8

# What shares a scale.
FLOAT = tl.constexpr(0)  # none: the values are floats
ROW = tl.constexpr(1)  # per-channel and per-token
TENSOR = tl.constexpr(2)  # per-tensor
GROUP = tl.constexpr(3)  # per-group: 128 in a row
BLOCK = tl.constexpr(4)  # per-block: 128 by 128
MX = tl.constexpr(5)  # per-group: 32 in a row
NV = tl.constexpr(6)  # per-group: 16 in a row, and per-tensor

# (rows up to, BM, BN, BK, warps, stages) of the Triton GEMM; not measured yet.
TILES = ((16, 16, 64, 128, 4, 4), (64, 64, 64, 128, 4, 3), (2**63, 128, 128, 64, 8, 3))
# (output tiles up to, parts of K), so that few tiles still fill the GPU; not measured yet.
SPLITS = ((16, 8), (64, 4), (128, 2), (2**63, 1))
SPLIT_AT_LEAST = 512  # columns in a part


@triton.jit
def values(
    codes, scales, rows, start, R, K,
    KIND: tl.constexpr, E4M3: tl.constexpr, WITHIN: tl.constexpr,
    DTYPE: tl.constexpr, EXACT: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`BK` columns of `rows` from `start` on, decoded: `[B, BK]` in `DTYPE`, zeros beyond the
    edges. The scales of 16 and 32 are in them, with `WITHIN` those of 128 too.
    """
    far = rows.to(tl.int64)[:, None]
    k = start + tl.arange(0, BK)
    if KIND == NV:
        at = start // 2 + tl.arange(0, BK // 2)
        inside = (rows < R)[:, None] & (at * 2 < K)[None, :]
        packed = tl.load(codes + far * (K // 2) + at[None, :], mask=inside, other=0).to(tl.int32)
        x = tl.interleave(decode4(packed & 15), decode4(packed >> 4))
    else:
        inside = (rows < R)[:, None] & (k < K)[None, :]
        word = tl.load(codes + far * K + k[None, :], mask=inside, other=0)
        x = widened(word) if KIND == FLOAT else decode8(word, E4M3, EXACT)
    if KIND >= MX or (KIND >= GROUP and WITHIN):
        G: tl.constexpr = 16 if KIND == NV else (32 if KIND == MX else 128)
        group = start // G + tl.arange(0, BK // G)
        if KIND == BLOCK:
            far = far // 128
        inside = (rows < R)[:, None] & (group < tl.cdiv(K, G))[None, :]
        scale = tl.load(scales + far * tl.cdiv(K, G) + group[None, :], mask=inside, other=0)
        if KIND == NV:
            scale = decode8(scale, True, EXACT)
        elif KIND == MX:
            scale = power(scale.to(tl.int32))
        x = tl.reshape(tl.reshape(x, (B, BK // G, G)) * scale[:, :, None], (B, BK))
    return x.to(DTYPE)


@triton.jit
def step_scale(scales, rows, start, R, K, KIND: tl.constexpr):
    """The scale of each of `rows` in the 128 columns around `start`."""
    groups = tl.cdiv(K, 128)
    if KIND == BLOCK:
        at = (rows // 128).to(tl.int64) * groups + start // 128
    else:
        at = rows.to(tl.int64) * groups + start // 128
    return tl.load(scales + at, mask=rows < R, other=0.0)


@triton.jit
def finish(
    acc, sx, gx, sw, gw, bias, rows, columns, M, N,
    XKIND: tl.constexpr, WKIND: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The scales that belong to the end of a sum, `sw` first, and the bias."""
    if WKIND == ROW:
        acc = acc * tl.load(sw + columns, mask=columns < N, other=0.0)[None, :]
    elif WKIND == TENSOR:
        acc = acc * tl.load(sw)
    elif WKIND == NV:
        acc = acc * inverse(tl.load(gw))
    if XKIND == ROW:
        acc = acc * tl.load(sx + rows, mask=rows < M, other=0.0)[:, None]
    elif XKIND == TENSOR:
        acc = acc * tl.load(sx)
    elif XKIND == NV:
        acc = acc * inverse(tl.load(gx))
    if BIAS:
        acc = acc + widened(tl.load(bias + columns, mask=columns < N, other=0.0))[None, :]
    return acc


@triton.jit
def store_result(y, acc, rows, columns, M, N, EXACT: tl.constexpr):
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = y + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, rounded(acc, y.dtype.element_ty, EXACT), mask=inside)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x, sx, gx, w, sw, gw, bias, y, M, N, XK, WK, SPAN,
    XKIND: tl.constexpr, XE4M3: tl.constexpr, WKIND: tl.constexpr, WE4M3: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of `y`, or with `SPLIT` the part of its sum over `SPAN` columns."""
    across, down = tl.cdiv(N, BN), tl.cdiv(M, BM)
    tile = tl.program_id(0)
    # Neighbouring programs share rows of x and of w in the L2 cache.
    i, j = tl.swizzle2d(tile // across, tile % across, down, across, 8)
    rows = i * BM + tl.arange(0, BM)
    columns = j * BN + tl.arange(0, BN)
    begin = tl.program_id(1) * SPAN
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(begin, tl.minimum(begin + SPAN, XK), BK):
        a = values(x, sx, rows, start, M, XK, XKIND, XE4M3, False, DTYPE, EXACT, BM, BK)
        b = values(w, sw, columns, start, N, WK, WKIND, WE4M3, False, DTYPE, EXACT, BN, BK)
        if XKIND == GROUP or (WKIND >= GROUP and WKIND <= BLOCK):
            part = tl.dot(a, tl.trans(b), input_precision="ieee")
            if WKIND >= GROUP and WKIND <= BLOCK:
                part = part * step_scale(sw, columns, start, N, WK, WKIND)[None, :]
            if XKIND == GROUP:
                part = part * step_scale(sx, rows, start, M, XK, XKIND)[:, None]
            acc += part
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if SPLIT:
        y += tl.program_id(1).to(tl.int64) * M * N
    else:
        acc = finish(acc, sx, gx, sw, gw, bias, rows, columns, M, N, XKIND, WKIND, BIAS)
    store_result(y, acc, rows, columns, M, N, EXACT)


@triton.jit(do_not_specialize=["M"])
def finish_kernel(
    parts, sx, gx, sw, gw, bias, y, M, N, COUNT,
    XKIND: tl.constexpr, WKIND: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The sum of `COUNT` parts, in a fixed order, and its end."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = parts + rows.to(tl.int64)[:, None] * N + columns[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for part in range(COUNT):
        acc += tl.load(at + tl.cast(part, tl.int64) * M * N, mask=inside, other=0.0)
    acc = finish(acc, sx, gx, sw, gw, bias, rows, columns, M, N, XKIND, WKIND, BIAS)
    store_result(y, acc, rows, columns, M, N, EXACT)


@dataclass(frozen=True)
class Operand:
    """A matrix as the kernels take it: codes, their scales and the scale of the tensor (where one
    is missing the codes stand in for it), and the number of columns.
    """

    kind: int
    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    columns: int

    @property
    def rows(self) -> int:
        return self.codes.shape[0]


def floats(x: torch.Tensor) -> Operand:
    x = x.contiguous()
    return Operand(FLOAT.value, x, x, x, x.shape[1])


def operand(form: Format, parts: Sequence[torch.Tensor]) -> Operand:
    """A quantised matrix."""
    codes, *scales = (
        part.contiguous() if part.dtype.itemsize > 1 else part.contiguous().view(torch.uint8)
        for part in narrowed(form, parts)
    )
    if isinstance(form, Float8):
        kinds = {(0, 0): TENSOR, (1, 0): ROW, (1, 128): GROUP, (128, 128): BLOCK}
        return Operand(kinds[form.sides].value, codes, scales[0], codes, codes.shape[1])
    if isinstance(form, MXFP8):
        return Operand(MX.value, codes, scales[0], codes, codes.shape[1])
    return Operand(NV.value, codes, scales[0], scales[1], codes.shape[1] * 2)


def narrowed(form: Format, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The parts without scales after the last group, of which ops over a batch's rows have one
    where there is a single group.
    """
    codes, scale, *rest = parts
    if form.block is not None:
        scale = scale[:, : -(-codes.shape[1] * form.packing // form.block[1])]
    return [codes, scale, *rest]


def compute_dtype(x: Operand, w: Operand) -> Any:
    """What tiles are multiplied in. The interpreter multiplies the bits of bfloat16 as integers;
    float16 does not hold every power of two that mxfp8 has as a scale.
    """
    if INTERPRETED or x.codes.dtype == torch.float32:
        return tl.float32
    if x.kind == FLOAT.value and x.codes.dtype == torch.float16:
        return tl.float32 if w.kind == MX.value else tl.float16
    return tl.bfloat16


def product(
    x: Operand, w: Operand, is_e4m3: tuple[bool, bool], bias: torch.Tensor | None, dtype: Any
) -> torch.Tensor:
    """`x · wᵀ + bias` by the Triton GEMM."""
    M, N, K = x.rows, w.rows, x.columns
    bm, bn, bk, warps, stages = next(row[1:] for row in TILES if row[0] >= M)
    tiles = triton.cdiv(M, bm) * triton.cdiv(N, bn)
    parts = next(count for limit, count in SPLITS if tiles <= limit)
    parts = min(parts, triton.cdiv(K, SPLIT_AT_LEAST))
    span = triton.cdiv(triton.cdiv(K, parts), 128) * 128
    parts = triton.cdiv(K, span)
    y = x.codes.new_empty((M, N), dtype=dtype)
    target = y if parts == 1 else x.codes.new_empty((parts, M, N), dtype=torch.float32)
    given = bias is not None
    end = (w.codes if bias is None else bias.contiguous(),)
    scales = (x.scales, x.tensor_scale, w.scales, w.tensor_scale)
    common = {"XKIND": x.kind, "WKIND": w.kind, "BIAS": given, "EXACT": exact(y.device)}
    with torch.cuda.device_of(y):
        gemm_kernel[(tiles, parts)](
            x.codes, *scales[:2], w.codes, *scales[2:], *end, target, M, N, K, w.columns, span,
            XE4M3=is_e4m3[0], WE4M3=is_e4m3[1], SPLIT=parts > 1, DTYPE=compute_dtype(x, w),
            BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages, **common,
        )  # fmt: skip
        if parts > 1:
            sum_parts(target, scales, end[0], y, common)
    return y


def sum_parts(
    parts: torch.Tensor,
    scales: Sequence[torch.Tensor],
    bias: torch.Tensor,
    y: torch.Tensor,
    common: dict[str, Any],
) -> None:
    """`y` from the parts of its sums."""
    M, N = y.shape
    finish_kernel[(triton.cdiv(M, 4), triton.cdiv(N, 256))](
        parts, *scales, bias, y, M, N, parts.shape[0], BM=4, BN=256, num_warps=4, **common
    )


def _split(
    x: Format, w: Format, args: Sequence[Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None, torch.dtype]:
    first, second = len(x.parts), len(x.parts) + len(w.parts)
    bias, dtype = args[second:]
    return list(args[:first]), list(args[first:second]), bias, dtype


def triton_matmul(x: Format, w: Format) -> Callable[..., torch.Tensor]:
    """The kernel of a `*_matmul` or `*_wgrad` op on any GPU; float64 is left to the reference."""
    from qnn.kernels.reference.floats import matmul_reference  # which imports this package

    reference = matmul_reference(x, w)

    def run(*args: Any) -> torch.Tensor:
        left, right, bias, dtype = _split(x, w, args)
        if dtype == torch.float64 or 0 in (*left[0].shape, *right[0].shape):
            return reference(*args)  # type: ignore[no-any-return]
        is_e4m3 = (left[0].dtype == E4M3, right[0].dtype == E4M3)
        return product(operand(x, left), operand(w, right), is_e4m3, bias, dtype)

    return run


# torch's own GEMM.


def padded(x: torch.Tensor, rows: int, columns: int, value: int = 0) -> torch.Tensor:
    """`[R, C]` filled up to multiples of `rows` and `columns`; contiguous."""
    down, right = -x.shape[0] % rows, -x.shape[1] % columns
    if not (down or right):
        return x.contiguous()
    if x.dtype.itemsize > 1:
        return F.pad(x, (0, right, 0, down), value=value)
    return F.pad(x.view(torch.uint8), (0, right, 0, down), value=value).view(x.dtype)


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """Scales `[R, G]` of one byte in the order in which tensor cores of 10.0 read them: tiles of
    128 rows and 4 groups, in each of which row 32a + b and group c stand at 16b + 4a + c.
    """
    tiles = padded(scale, 128, 4).view(torch.uint8)
    tiles = tiles.view(tiles.shape[0] // 128, 4, 32, tiles.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(scale.dtype).flatten()


def outer_major(scale: torch.Tensor) -> torch.Tensor:
    """The same `[R, C]` with the rows next to each other in memory."""
    return scale.mT.contiguous().mT


def _ended(
    y: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, rows: int, columns: int
) -> torch.Tensor:
    """Without what was padded, with the bias, in the dtype of the result."""
    y = y[:rows, :columns]
    y = y if bias is None else y + bias
    return y.to(dtype).contiguous()


def _scaled_rows(
    left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    (xq, sx), (wq, sw) = left, right
    a, b = padded(xq, 1, 16), padded(wq, 16, 16).mT
    if dtype == torch.bfloat16:
        row, scale = ScalingType.RowWise, padded(sw, 16, 1, value=1).mT
        return F.scaled_mm(
            a, b, sx.contiguous(), row, scale, row, output_dtype=dtype, use_fast_accum=fast
        )
    # Row scales come with bfloat16 results alone, before torch 2.12 and on some GPUs since; other
    # dtypes want more digits.
    tensor, one = ScalingType.TensorWise, sx.new_ones(1)
    y = F.scaled_mm(a, b, one, tensor, one, tensor, output_dtype=torch.float32, use_fast_accum=fast)
    return y[:, : wq.shape[0]] * sw.mT * sx


def _scaled_tensor(
    left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    (xq, sx), (wq, sw) = left, right
    tensor = ScalingType.TensorWise
    return F.scaled_mm(
        padded(xq, 1, 16), padded(wq, 16, 16).mT, sx, tensor, sw, tensor,
        output_dtype=dtype, use_fast_accum=fast or E5M2 not in (xq.dtype, wq.dtype),
    )  # fmt: skip


def _scaled_groups(
    left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], dtype: torch.dtype, block: bool
) -> torch.Tensor:
    (xq, sx), (wq, sw) = left, right
    a, b = padded(xq, 4, 128), padded(wq, 128, 128)
    scale_a = outer_major(padded(sx, 4, 1, value=1))
    if block:  # [N / 128, K / 128] as [K / 128, N / 128], filled up to a multiple of 4
        kind, scale_b = ScalingType.BlockWise128x128, padded(sw, 1, 4, value=1).mT
    else:
        kind, scale_b = ScalingType.BlockWise1x128, outer_major(padded(sw, 128, 1, value=1))
    return F.scaled_mm(
        a, b.mT, scale_a, ScalingType.BlockWise1x128, scale_b, kind,
        output_dtype=torch.float32 if dtype == torch.float16 else dtype,
    )  # fmt: skip


def _scaled_mx(
    left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    (xq, sx), (wq, sw) = left, right
    kind, order = ScalingType.BlockWise1x32, SwizzleType.SWIZZLE_32_4_4
    scale_a, scale_b = (
        swizzled(padded(s, rows, 1)).view(torch.float8_e8m0fnu) for s, rows in ((sx, 1), (sw, 16))
    )
    return F.scaled_mm(
        padded(xq, 1, 32), padded(wq, 16, 32).mT, scale_a, kind, scale_b, kind,
        swizzle_a=order, swizzle_b=order, output_dtype=dtype,
    )  # fmt: skip


def _scaled_nv(
    left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    (xq, sx, gx), (wq, sw, gw) = left, right
    kinds = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    orders = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    a, b = (padded(q, rows, 16).view(torch.float4_e2m1fn_x2) for q, rows in ((xq, 1), (wq, 16)))
    # 16 bytes are two groups, so that a row may have gained a group.
    scale_a, scale_b = (swizzled(padded(s, rows, 2)) for s, rows in ((sx, 1), (sw, 16)))
    return F.scaled_mm(
        a, b.mT, [scale_a, 1 / gx], kinds, [scale_b, 1 / gw], kinds,
        swizzle_a=orders, swizzle_b=orders, output_dtype=dtype,
    )  # fmt: skip


def scaled_matmul(x: Format, w: Format, fast: bool = False) -> Callable[..., torch.Tensor]:
    """The kernel of a `*_matmul` or `*_wgrad` op by torch's scaled GEMM. What that does not take,
    two operands in e5m2, goes to `triton_matmul`.

    Args:
        x, w: the formats of the operands.
        fast: fast accumulation, for outputs.
    """
    otherwise = triton_matmul(x, w)

    def run(*args: Any) -> torch.Tensor:
        left, right, bias, dtype = _split(x, w, args)
        (M, p), (N, _) = left[0].shape, right[0].shape
        e5m2 = (left[0].dtype, right[0].dtype).count(E5M2)
        grouped = isinstance(x, Float8) and x.sides[1] > 0
        if dtype == torch.float64 or 0 in (M, N, p) or e5m2 == 2 or (e5m2 and grouped):
            return otherwise(*args)
        left, right = narrowed(x, left), narrowed(w, right)
        with torch.cuda.device_of(left[0]):
            if not isinstance(x, Float8):
                y = (_scaled_mx if isinstance(x, MXFP8) else _scaled_nv)(left, right, dtype)
            elif x.sides == (1, 0):
                y = _scaled_rows(left, right, dtype, fast)
            elif x.sides == (0, 0):
                y = _scaled_tensor(left, right, dtype, fast)
            else:
                block = isinstance(w, Float8) and w.sides == (128, 128)
                y = _scaled_groups(left, right, dtype, block)
            return _ended(y, bias, dtype, M, N)

    return run


def linear(
    activation: Format,
    weight: Format,
    cast: Callable[..., tuple[torch.Tensor, ...]],
    matmul: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """The kernel of a `*_linear` op: a cast, then a product of codes."""
    from qnn.kernels.reference.floats import linear_reference  # which imports this package

    reference = linear_reference(activation, weight)

    def run(x: torch.Tensor, *args: Any) -> torch.Tensor:
        if x.dtype == torch.float64 or x.numel() == 0:
            return reference(x, *args)  # type: ignore[no-any-return]
        *parts, bias = args
        rows = x.reshape(-1, x.shape[-1])
        y = matmul(*cast(rows), *parts, bias, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    return run
