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
    mask: torch.Tensor | None,
    is_causal: bool,
    rows: range,
    keys: int,
    device: torch.device,
    length: torch.Tensor | None = None,
    queries: int = 0,
) -> torch.Tensor:
    """Which keys queries see, `[b, h, m, n]`, or 1 along some axes. With the `length [b]` of each
    sequence the last of all `queries` is at its end.
    """
    at = torch.arange(keys, device=device)
    there = (at >= 0)[None, None, None]
    first = torch.zeros(1, dtype=torch.int64, device=device)
    if length is not None:
        there = there & (at < length[:, None])[:, None, None]
        first = length - queries
    if mask is not None:
        some = mask if mask.shape[2] == 1 else mask[:, :, rows.start : rows.stop]
        return there & (some if some.dtype == torch.bool else some.float() != -math.inf)
    if not is_causal:
        return there
    row = first[:, None] + torch.arange(rows.start, rows.stop, device=device)
    return there & (at <= row[..., None])[:, None]


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
    (b, h, m, _), n, e = q.shape, k.shape[2], v.shape[3]
    dtype = q.dtype if compute == torch.float32 else compute
    result = q.new_zeros(b, m, h, e, dtype=dtype)
    if 0 in (b, h, m, n, e):
        return result
    return _attend(q, *cache_codes(k, v), mask, scale, is_causal, None, compute, result)


def cache_codes(
    k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What attention reads of rows of keys and values: codes and scales `[b, g, n]` of the keys,
    and of the values.

    They are those of `int8_quantize`, but that a row whose codes are all 0 has the scale 0, and
    that a key has NaN where a NaN or inf is in its row or in that of its value: each query that
    sees it is NaN.
    """
    (kc, sk), (vc, sv) = (quantize_rows(each.float()) for each in (k, v))
    good = sk.isfinite() & sv.isfinite()
    sk, sv = (
        torch.where((codes != 0).any(-1, keepdim=True), scales, 0)
        for codes, scales in ((kc, sk), (vc, sv))
    )
    return kc, torch.where(good, sk, torch.nan)[..., 0], vc, sv[..., 0]


def _attend(
    q: torch.Tensor,
    kc: torch.Tensor,
    sk: torch.Tensor,
    vc: torch.Tensor,
    sv: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    is_causal: bool,
    length: torch.Tensor | None,
    compute: torch.dtype,
    result: torch.Tensor,
) -> torch.Tensor:
    """Attention over codes and scales as `cache_codes` has them, into `result [b, m, h, e]`."""
    (b, h, m, d), (groups, n) = q.shape, kc.shape[1:3]
    dtype = result.dtype
    qc, sq = quantize_rows(q.float())
    sk, sv = sk[..., None], sv[..., None]
    sq = torch.where(sq.isfinite(), sq, torch.nan)
    kc, sk, vc, sv = (each.repeat_interleave(h // groups, 1) for each in (kc, sk, vc, sv))
    unit = _single(d**-0.5 if scale is None else scale) * _single(LOG2E) * (1 << FRACTION)
    sq = sq * unit.to(q.device)

    # The scales of the values as 15-bit parts of the largest that some query sees.
    seen = torch.zeros(1, 1, n, dtype=torch.bool, device=q.device)
    blocks = range(0, m, max(1, _BLOCK // (b * h * n)))
    for start in blocks:
        rows = range(start, min(m, start + blocks.step))
        seen = seen | _visible(mask, is_causal, rows, n, q.device, length, m).any(-2)
    sv = torch.where(seen[..., None], sv, 0)
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
        u = torch.where(_visible(mask, is_causal, rows, n, q.device, length, m), u, HIDDEN)
        most = u.amax(-1, keepdim=True)
        a = weights_of(most - u)
        total = a.sum(-1, keepdim=True).to(torch.float32).to(compute)
        # Exact: the sums stay below 2^53.
        sums = (_mulhrs(a, gain.mT).double() @ vc.double()).float().to(compute)
        y = sums * (1 / total) * (top * _single(32768 / 32767).to(q.device)).to(compute)
        y = torch.where(most == NAN, torch.nan, torch.where(most == HIDDEN, 0, y))
        result[:, rows.start : rows.stop] = y.to(dtype).transpose(1, 2)
    return result


def why_not_kv_attention(given: Mapping[str, Any]) -> str | None:
    """The same of attention over a cache."""
    return why_not_attention({**given, "k": given["keys"]})


def kv_attention_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    key_scale: torch.Tensor,
    values: torch.Tensor,
    value_scale: torch.Tensor,
    length: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    (b, h, m, _), (n, e) = q.shape, values.shape[2:]
    if reason := why_not_lengths(length, m if is_causal else 0, n):
        raise ValueError(f"qnn::int8_kv_attention: {reason}.")
    dtype = q.dtype if compute == torch.float32 else compute
    result = q.new_zeros(b, m, h, e, dtype=dtype)
    if 0 in (b, h, m, n, e):
        return result
    parts = (keys, key_scale, values, value_scale)
    return _attend(q, *parts, mask, scale, is_causal, length, compute, result)


def why_not_lengths(length: torch.Tensor, least: int, most: int) -> str | None:
    """What is wrong with the lengths of sequences, on a device where looking at them is free."""
    if not length.is_cpu or not length.numel():
        return None
    low, high = (int(end) for end in length.aminmax())
    if high > most or low < 0:
        got = high if high > most else low
        return f"length must be from 0 to {most}, the tokens that the cache holds, got {got}"
    if low < least:
        return (
            f"with is_causal the last {least} tokens are those of q: length must be at least "
            f"{least}, got {low}; append their keys and values first"
        )
    return None


def kv_append_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    key_scale: torch.Tensor,
    values: torch.Tensor,
    value_scale: torch.Tensor,
    length: torch.Tensor,
) -> None:
    (b, _, count, _), most = k.shape, keys.shape[2]
    if reason := why_not_room(length, count, most):
        raise ValueError(f"qnn::int8_kv_append: {reason}.")
    at = length[:, None] + torch.arange(count, device=length.device)
    batch = torch.arange(b, device=length.device)[:, None]
    for to, part in zip((keys, key_scale, values, value_scale), cache_codes(k, v), strict=True):
        to[batch, :, at] = part.transpose(1, 2)
    length += count


def why_not_room(length: torch.Tensor, count: int, most: int) -> str | None:
    """Why so many more tokens cannot be appended to each sequence."""
    if reason := why_not_lengths(length, 0, most):
        return reason
    held = int(length.max()) if length.is_cpu and length.numel() else 0
    if held + count > most:
        return (
            f"the cache holds {most} tokens at most: there are {held}, and {count} more; make it "
            "larger, or reset it"
        )
    return None


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
