"""Linear layers over a quantised weight whose activations stay as they are:
`y = x · dequantised(w)ᵀ + bias`, the weight decoded in registers, sums in float32, one cast.

A handful of rows is bound by reading the weight. Up to 4 rows a kernel without tensor cores
multiplies and adds: a program has a few rows of the weight and a part of the columns, so that there
are enough programs to keep the memory busy. Above that the tiles of `gemm.py` run, with K in parts
where tiles are few.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False
# What Triton compiles has no types that Python could check, and constants in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from qnn.kernels.cuda.codes import exact
from qnn.kernels.cuda.gemm import (
    FLOAT,
    Operand,
    finish,
    floats,
    operand,
    product,
    store_result,
    sum_parts,
    values,
)
from qnn.kernels.formats import Format
from qnn.kernels.formats.float8 import E4M3

# (rows of x up to, BM, rows of w a program, columns a step, warps); not measured yet.
GEMV_TABLE = ((1, 1, 8, 512, 4), (2, 2, 4, 512, 4), (4, 4, 4, 256, 4))
# (rows of w up to, parts of K); not measured yet.
GEMV_SPLITS = ((1024, 8), (4096, 4), (8192, 2), (2**63, 1))
SPLIT_AT_LEAST = 1024  # columns in a part


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x, w, sw, gw, bias, y, M, N, XK, WK, SPAN,
    WKIND: tl.constexpr, WE4M3: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """All rows of `x` by `BN` rows of `w`; the sum over a step's columns is left to the end."""
    rows = tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    begin = tl.program_id(1) * SPAN
    acc = tl.zeros((BM, BN, BK), tl.float32)
    for start in range(begin, tl.minimum(begin + SPAN, XK), BK):
        a = values(x, x, rows, start, M, XK, FLOAT, False, True, tl.float32, EXACT, BM, BK)
        b = values(w, sw, columns, start, N, WK, WKIND, WE4M3, True, tl.float32, EXACT, BN, BK)
        acc += a[:, None, :] * b[None, :, :]
    total = tl.sum(acc, 2)
    if SPLIT:
        y += tl.program_id(1).to(tl.int64) * M * N
    else:
        total = finish(total, x, x, sw, gw, bias, rows, columns, M, N, FLOAT, WKIND, BIAS)
    store_result(y, total, rows, columns, M, N, EXACT)


def gemv(
    x: Operand, w: Operand, is_e4m3: bool, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`x · wᵀ + bias` for the few rows that `GEMV_TABLE` knows."""
    M, N, K = x.rows, w.rows, x.columns
    bm, bn, bk, warps = next(row[1:] for row in GEMV_TABLE if row[0] >= M)
    parts = next(count for limit, count in GEMV_SPLITS if limit >= N)
    parts = min(parts, triton.cdiv(K, SPLIT_AT_LEAST))
    span = triton.cdiv(triton.cdiv(K, parts), bk) * bk
    parts = triton.cdiv(K, span)
    y = x.codes.new_empty((M, N), dtype=dtype)
    target = y if parts == 1 else x.codes.new_empty((parts, M, N), dtype=torch.float32)
    end = w.codes if bias is None else bias.contiguous()
    common: dict[str, Any] = {"WKIND": w.kind, "BIAS": bias is not None, "EXACT": exact(y.device)}
    with torch.cuda.device_of(y):
        gemv_kernel[(triton.cdiv(N, bn), parts)](
            x.codes, w.codes, w.scales, w.tensor_scale, end, target, M, N, K, w.columns, span,
            WE4M3=is_e4m3, SPLIT=parts > 1, BM=bm, BN=bn, BK=bk, num_warps=warps, **common,
        )  # fmt: skip
        if parts > 1:
            scales = (x.scales, x.tensor_scale, w.scales, w.tensor_scale)
            sum_parts(target, scales, end, y, {"XKIND": x.kind, **common})
    return y


def linear(weight: Format) -> Callable[..., torch.Tensor]:
    """The kernel of a `*_weight_linear` op; float64 is left to the reference."""
    from qnn.kernels.reference.floats import linear_reference  # which imports this package

    reference = linear_reference(None, weight)

    def run(x: torch.Tensor, *args: Any) -> torch.Tensor:
        *parts, bias = args
        if x.dtype == torch.float64 or x.numel() == 0 or parts[0].numel() == 0:
            return reference(x, *args)  # type: ignore[no-any-return]
        rows, w = floats(x.reshape(-1, x.shape[-1])), operand(weight, parts)
        is_e4m3 = parts[0].dtype == E4M3
        if rows.rows <= GEMV_TABLE[-1][0]:
            y = gemv(rows, w, is_e4m3, bias, x.dtype)
        else:
            y = product(rows, w, (False, is_e4m3), bias, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    return run
