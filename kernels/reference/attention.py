"""What int8 attention means: every sum is of integers, so no order of blocks or threads shows.

Rows of queries, keys and values have int8 codes and a scale, as `int8_quantize` gives them. A score
is an integer, in 2⁻¹⁰ of a power of two; a weight is 2^score in 15 bits, of which the part that
belongs to a value's scale is taken in before the product with the codes of the values.

What a query does not see has no part in its result, whatever it holds. What no query of a head sees
has no part in the unit of the values' scales either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qnn.kernels.formats.int8 import quantize_rows

LOG2E = 1.44269504
FRACTION = 10  # bits of a score
# Of scores: numbers stay within ±LIMIT; a NaN is above and what is hidden is below all of them.
LIMIT, NAN, HIDDEN = 1 << 29, 1 << 30, -(1 << 30)
ONE = 32640  # the weight of the largest score: 255 · 128
_MOST = torch.finfo(torch.float32).max
_BLOCK = 1 << 20  # scores at a time, for the memory alone


def _single(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _mulhrs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The upper half of a doubled product of 16 bits, rounded."""
    return (a * b + (1 << 14)) >> 15


def weights_of(d: torch.Tensor) -> torch.Tensor:
    """`32640 · 2^(−d / 1024)` in 16-bit integers, for d ≥ 0: monotone, to 3.4 units.

    >>> weights_of(torch.tensor([0, 1024, 1536, 15 * 1024, 16 * 1024])).tolist()
    [32640, 16320, 11539, 1, 0]
    """
    d = d.clamp(max=32767)
    n, x = d >> FRACTION, (d << (15 - FRACTION)) & 0x7FE0
    e = _mulhrs(x, torch.full_like(x, -1287)) + 7537
    e = _mulhrs(e, x) - 22571
    e = _mulhrs(e, x) + ONE
    return ((2 * e >> n) + 1) >> 1


def why_not_attention(given: Mapping[str, Any]) -> str | None:
    """What the notation cannot say of the arguments of an attention op, by their names."""
    q, k, mask = given["q"], given["k"], given["mask"]
    heads, of_keys = q.shape[1], k.shape[1]
    if q.shape[3] < 1:
        return "d must be at least 1, got 0"
    if heads % of_keys if of_keys else heads:
        return f"the heads of k and v must divide those of q, {heads}, got {of_keys}"
    if mask is None:
        return None
    if given["is_causal"]:
        return "mask and is_causal exclude each other; take both into the mask"
    wanted = (q.shape[0], heads, q.shape[2], k.shape[2])
    if len(mask.shape) != 4 or any(
        got not in (1, size) for got, size in zip(mask.shape, wanted, strict=True)
    ):
        return f"mask must be {list(wanted)}, or 1 along some of its axes, got {list(mask.shape)}"
    return None


def _visible(
    mask: torch.Tensor | None, is_causal: bool, rows: range, keys: int, device: torch.device
) -> torch.Tensor:
    """Which keys queries see, `[b, h, m, n]`, or 1 along some axes."""
    if mask is not None:
        some = mask if mask.shape[2] == 1 else mask[:, :, rows.start : rows.stop]
        return some if some.dtype == torch.bool else some.float() != -math.inf
    at = torch.arange(keys, device=device)
    queries = torch.arange(rows.start, rows.stop, device=device)[:, None]
    return ((at <= queries) if is_causal else (at >= 0)[None])[None, None]


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    (b, h, m, d), n, e = q.shape, k.shape[2], v.shape[3]
    dtype = q.dtype if compute == torch.float32 else compute
    result = q.new_zeros(b, m, h, e, dtype=dtype)
    if 0 in (b, h, m, n, e):
        return result
    (qc, sq), (kc, sk), (vc, sv) = (quantize_rows(each.float()) for each in (q, k, v))
    # A key with a NaN or inf, or whose value has one, makes a NaN of each score that sees it.
    sk = torch.where(sk.isfinite() & sv.isfinite(), sk, torch.nan)
    sq = torch.where(sq.isfinite(), sq, torch.nan)
    kc, sk, vc, sv = (each.repeat_interleave(h // k.shape[1], 1) for each in (kc, sk, vc, sv))
    unit = _single(d**-0.5 if scale is None else scale) * _single(LOG2E) * (1 << FRACTION)
    sq = sq * unit.to(q.device)

    # The scales of the values as 15-bit parts of the largest that some query sees.
    seen = torch.zeros(1, 1, n, dtype=torch.bool, device=q.device)
    blocks = range(0, m, max(1, _BLOCK // (b * h * n)))
    for start in blocks:
        rows = range(start, min(m, start + blocks.step))
        seen = seen | _visible(mask, is_causal, rows, n, q.device).any(-2)
    there = (seen & sv[..., 0].isfinite() & (vc != 0).any(-1))[..., None]
    sv = torch.where(there, sv, 0)
    top = sv.amax(-2, keepdim=True)
    gain = torch.round(torch.where(top > 0, sv / top * 32767, 0)).long()

    for start in blocks:
        rows = range(start, min(m, start + blocks.step))
        codes, scales = (each[:, :, rows.start : rows.stop] for each in (qc, sq))
        scores = (codes.double() @ kc.double().mT).float() * sk.mT * scales
        if mask is not None and mask.dtype != torch.bool:
            some = mask if mask.shape[2] == 1 else mask[:, :, rows.start : rows.stop]
            added = some.float() * (_single(LOG2E) * (1 << FRACTION)).to(q.device)
            scores = scores + added.clamp(-_MOST, _MOST)  # inf is larger than any score
        u = torch.round(scores.clamp(-LIMIT, LIMIT)).nan_to_num(NAN).long()
        u = torch.where(_visible(mask, is_causal, rows, n, q.device), u, HIDDEN)
        most = u.amax(-1, keepdim=True)
        a = weights_of(most - u)
        total = a.sum(-1, keepdim=True).to(torch.float32).to(compute)
        # Exact: the sums stay below 2^53.
        sums = (_mulhrs(a, gain.mT).double() @ vc.double()).float().to(compute)
        y = sums * (1 / total) * (top * _single(32768 / 32767).to(q.device)).to(compute)
        y = torch.where(most == NAN, torch.nan, torch.where(most == HIDDEN, 0, y))
        result[:, rows.start : rows.stop] = y.to(dtype).transpose(1, 2)
    return result


def attention_gradient_reference(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The gradients of float attention to q, k and v, flat and one after the other."""
    dtype = q.dtype if compute == torch.float32 else compute
    compute = torch.promote_types(compute, q.dtype)
    groups, each, factor = k.shape[1], q.shape[1] // max(k.shape[1], 1), scale
    factor = q.shape[3] ** -0.5 if factor is None else factor
    # [b, g, each, …]: the heads that share their keys.
    dy, q = (x.to(compute).unflatten(1, (groups, each)) for x in (dy.transpose(1, 2), q))
    k, v = (x.to(compute).unsqueeze(2) for x in (k, v))
    scores = q @ k.mT * factor
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(compute).expand(-1, groups * each, -1, -1).unflatten(
            1, (groups, each)
        )
    visible = _visible(mask, is_causal, range(q.shape[3]), k.shape[3], q.device)
    visible = visible.expand(-1, groups * each, -1, -1).unflatten(1, (groups, each))
    p = torch.softmax(scores.masked_fill(~visible, -math.inf), -1)
    p = torch.where(visible, p, 0)
    dp = dy @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * factor
    gradients = (ds @ k, (ds.mT @ q).sum(2), (p.mT @ dy).sum(2))
    return torch.cat([gradient.flatten() for gradient in gradients]).to(dtype)


def split_attention_gradients(
    given: Mapping[str, torch.Tensor | None], flat: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the gradient's op returns, by the names of the forward's arguments."""
    found, at = {}, 0
    for name in ("q", "k", "v"):
        tensor = given[name]
        assert tensor is not None  # noqa: S101  # they are not optional
        found[name] = flat[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    return found
