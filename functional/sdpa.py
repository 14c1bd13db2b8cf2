"""`scaled_dot_product_attention` in 8 bits."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from qnn.functional.invoke import op_region
from qnn.functional.linear import autocast
from qnn.kernels import OPS
from qnn.kernels.op import describe
from qnn.kernels.reference.attention import split_attention_gradients
from qnn.kernels.torch_private import in_functorch_transform

SCHEMES = {"int8": "int8_attention"}
_NAMES = ("q", "k", "v", "mask")

Options = tuple[float | None, bool]
Operands = tuple[torch.Tensor | None, ...]


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    scheme: str = "int8",
) -> torch.Tensor:
    """`softmax(query · keyᵀ · scale + attn_mask) · value`, as torch's function of this name, in
    integers from end to end.

    `int8` quantises each row of query, key and value with a scale of its own. Scores are integers
    in 2⁻¹⁰ of a power of two, the weights have 15 bits, and all sums are exact: no size of blocks,
    no tier and no number of threads changes a bit. docs/numerics.md has the arithmetic.

    A key that a query does not see has no part in its result, also where it holds NaN or inf; one
    that it sees makes a NaN of the whole row. A query that sees no key has 0, as in torch.

    The gradients to query, key and value are those of float attention, straight through the
    rounding; a mask has none. Under `torch.autocast` the operands are cast as torch would cast
    them.

    Args:
        query: float32, bfloat16, float16 or float64, `[..., H, L, D]`, or `[L, D]`.
        key, value: in the dtype of `query`, `[..., G, S, D]` and `[..., G, S, E]`; leading axes may
            be 1 where those of `query` are not. Any strides; what is dense along the last axis is
            not copied.
        attn_mask: bool, True where a key is seen, or float, which is added to the scores; of a
            shape that broadcasts to `[..., H, L, S]`. It is read as it lies.
        dropout_p: 0; there is no dropout.
        is_causal: query i sees keys 0 to i, counted from the first, as in torch.
        scale: 1/√D if None.
        enable_gqa: H may be a multiple of G: each head of key and value serves H / G of query.
        scheme: `"int8"`.

    Returns:
        `[..., H, L, E]` in the dtype of `query`.

    Raises:
        ValueError: shapes that do not fit, a mask together with `is_causal`, an unknown scheme.
        TypeError: dtypes that differ or are not of floats.
        NotImplementedError: dropout; a gradient to a mask.

    >>> x = torch.eye(3)
    >>> scaled_dot_product_attention(x, x, x, is_causal=True, scale=100.0).round()
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    who = f"qnn.functional.scaled_dot_product_attention(scheme={scheme!r})"
    if scheme not in SCHEMES:
        able = ", ".join(map(repr, SCHEMES))
        raise ValueError(f"{who}: scheme must be one of {able}.")
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"{who}: dropout_p must be 0, got {dropout_p}; there is no dropout in 8 bits. Train "
            "with torch.nn.functional.scaled_dot_product_attention."
        )
    if attn_mask is not None and is_causal:
        raise ValueError(
            f"{who}: attn_mask and is_causal exclude each other; take both into the mask."
        )
    q, k, v = (autocast(each) for each in (query, key, value))
    if min(q.dim(), k.dim(), v.dim()) < 2:
        shapes = ", ".join(describe(each) for each in (q, k, v))
        raise ValueError(f"{who}: query, key and value must be [..., L, D], got {shapes}.")
    lead, of_keys = _lead(who, q, k, v, enable_gqa)
    q = _four_axes(q, lead)
    k, v = (_four_axes(each, (*lead[:-1], *of_keys)) for each in (k, v))
    mask = (
        None
        if attn_mask is None
        else attention_mask(who, attn_mask, (*lead, q.shape[2], k.shape[2]))
    )
    y = _call(SCHEMES[scheme], scheme, (scale, is_causal), (q, k, v, mask))
    y = y.transpose(1, 2)  # as torch's: heads are joined without a copy
    return y if len(lead) == 2 else y.reshape(*lead, *y.shape[2:])


def _lead(
    who: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, enable_gqa: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The leading axes of the result, and its heads of key and value, if it has some."""

    def fail(what: str) -> NoReturn:
        shapes = ", ".join(describe(each) for each in (q, k, v))
        raise ValueError(f"{who}: {what}, got {shapes}.")

    leads = [tuple(each.shape[:-2]) for each in (q, k, v)]
    if enable_gqa:
        heads = tuple(each[-1] if each else 1 for each in leads)
        if not leads[0] or heads[1] != heads[2] or heads[1] == 0 or heads[0] % heads[1]:
            fail("with enable_gqa the heads of query must be a multiple of those of key and value")
        # Other axes broadcast; these have their own rule.
        leads = [each[:-1] for each in leads]
    try:
        found = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        fail(
            "the axes before the last two must be the same, or 1"
            + ("" if enable_gqa else "; enable_gqa lets heads of query share those of key")
        )
    if enable_gqa:
        return (*found, heads[0]), heads[1:2]
    heads = tuple(torch.broadcast_shapes(*(lead[-1:] for lead in leads[1:])))
    return found, heads or (1,) * min(len(found), 1)


def _four_axes(x: torch.Tensor, lead: tuple[Any, ...]) -> torch.Tensor:
    """`[b, heads, rows, columns]`; what broadcasts is not copied, unless axes have to be joined."""
    if x.dim() == 4 and tuple(x.shape[:2]) == lead:
        return x
    x = x.expand(*lead, *x.shape[-2:])
    x = x.reshape(*[1] * (4 - x.dim()), *x.shape)
    return x if x.dim() == 4 else x.flatten(0, -4)


def attention_mask(who: str, mask: torch.Tensor, wanted: tuple[Any, ...]) -> torch.Tensor:
    """Four axes, of which those along which it is the same are 1."""
    shape = tuple(mask.shape)
    lacks = len(wanted) - len(shape)
    if lacks < 0 or any(
        got not in (1, size) for got, size in zip(shape, wanted[lacks:], strict=True)
    ):
        raise ValueError(
            f"{who}: attn_mask must broadcast to {list(wanted)}, got {describe(mask)}."
        )
    if len(shape) < 4:
        mask = mask.reshape(*[1] * max(lacks, 4 - len(shape)), *shape)
    before = wanted[:-3]
    if mask.dim() <= 4:
        return mask
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.flatten(0, -4)
    return mask.expand(*before, *mask.shape[-3:]).flatten(0, -4)


def _node(op: str, scheme: str, options: Options, operands: Operands) -> torch.Tensor:
    overload = OPS[op].overload

    def run(*tensors: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = overload(*tensors, *options)
        return result

    return op_region(run, *operands, scheme=scheme)


class _Attention(torch.autograd.Function):
    """The op in a region of its own, and its gradients in another. For graphs that are compiled:
    elsewhere the op's own gradient is used, which is the same.
    """

    @staticmethod
    def forward(
        op: str, scheme: str, options: Options, *operands: torch.Tensor | None
    ) -> torch.Tensor:
        return _node(op, scheme, options, operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.op, ctx.scheme, ctx.options, *operands = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        operands = ctx.saved_tensors
        (gradient,) = set(OPS[ctx.op].backward.values())
        flat = _node(gradient, ctx.scheme, ctx.options, (dy.contiguous(), *operands))
        found = split_attention_gradients(dict(zip(_NAMES, operands, strict=True)), flat)
        asked = zip(_NAMES, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(found[name] if wants else None for name, wants in asked)


def _call(op: str, scheme: str, options: Options, operands: Operands) -> torch.Tensor:
    if not torch.compiler.is_compiling():
        OPS[op].require(*operands, *options)  # a kernel in C++ words its errors otherwise
        result: torch.Tensor = OPS[op].call(*operands, *options)
        return result
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    mask = operands[3]
    if wanted and mask is not None and mask.requires_grad:
        raise NotImplementedError(f"qnn::{op} has no gradient with respect to mask. Detach it.")
    if wanted and not in_functorch_transform():
        found: torch.Tensor = _Attention.apply(op, scheme, options, *operands)  # type: ignore[no-untyped-call]
        return found
    return _node(op, scheme, options, operands)
