"""The quantised convolutions, plain and transposed, of 1, 2 and 3 axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from qnn.functional.linear import apply_op, autocast, call_in_eager, grid, op_node, straight_through
from qnn.functional.quantize import stored_parts
from qnn.kernels import get_scheme
from qnn.kernels.reference.conv import product
from qnn.kernels.schemes import schemes_of
from qnn.kernels.torch_private import in_functorch_transform

_Numbers = int | Sequence[int]
_MODES = ("zeros", "reflect", "replicate", "circular")
_AXES = 3  # of the images that the ops take


def conv(
    x: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers | str = 0,
    dilation: _Numbers = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    scheme: str = "int8",
) -> torch.Tensor:
    """`y = conv(x, weight · weight_scale) + bias` along the axes that the weight has, computed as
    `scheme` says.

    `int8` quantises each sample of `x` with a scale of its own and multiplies integers:
    `y = int32(conv(xq, weight)) · weight_scale · sx + bias`; `int8_static` does so on the grid of
    `input_scale` and `input_zero_point`; `int16` and `int16_static` do the same with 16 bits for
    `x`; `int8_weight` takes `x` as it is. Padding is exactly zero.
    The arithmetic after the sums is float32, with one cast at the end. The result has the memory
    format of `x`, contiguous or channels-last.

    The gradient to `x` is that of the convolution with the dequantised weight, straight through
    the rounding of `x`; `bias` has its usual gradient; `weight` has none. Under `torch.autocast`,
    `x` is cast as `nn.Conv2d` would cast it.

    Args:
        x: float32, bfloat16, float16 or float64, `[B, C, *sizes]` with 1, 2 or 3 sizes, or
            `[C, *sizes]`.
        weight: int8 `[N, C / groups, *kernel]`, or both parts of the weight in one tuple.
        weight_scale: float32 `[N, 1, …]`, with as many axes as `weight`.
        bias: any float dtype, `[N]`.
        stride, padding, dilation, groups, padding_mode: as those of `nn.Conv2d`.
        input_scale, input_zero_point: of int8_static alone: the grid of `x`, float32 and int8
            `[1]`, with `x ≈ (q − input_zero_point) · input_scale` for q from −128 to 127. Of
            int16_static input_scale alone, with q from −32767 to 32767.
        scheme: the name of a scheme that has convolutions.

    Returns:
        `[B, N, *sizes]` in the dtype of `x`; without the batch if `x` has none.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; an unknown scheme,
            or one without convolutions; kernels that are larger than the padded image.

    >>> x, w = torch.eye(3).reshape(1, 1, 3, 3), torch.ones(1, 1, 2, 2, dtype=torch.int8)
    >>> conv(x, w, torch.ones(1, 1, 1, 1))
    tensor([[[[2., 1.],
              [1., 2.]]]])
    """
    who = "qnn.functional.conv"
    parts = _operands(who, scheme, weight, weight_scale, input_scale, input_zero_point)
    axes, batched = _axes(who, x, parts[0])
    strides = _numbers(who, "stride", stride, axes)
    dilations = _numbers(who, "dilation", dilation, axes)
    if padding_mode not in _MODES:
        known = ", ".join(map(repr, _MODES))
        raise ValueError(f"{who}: padding_mode must be one of {known}, got {padding_mode!r}.")
    ends = _ends(who, padding, parts[0].shape[2:], strides, dilations)
    if padding_mode != "zeros" and any(ends):
        x = F.pad(x, [ends[2 * i + j] for i in reversed(range(axes)) for j in (0, 1)], padding_mode)
        ends = (0,) * len(ends)
    x = x if batched else x.unsqueeze(0)
    y = conv_of(x, parts, bias, scheme, strides, ends, dilations, groups)
    return y if batched else y.squeeze(0)


def conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    stride: _Numbers = 1,
    padding: _Numbers = 0,
    output_padding: _Numbers = 0,
    groups: int = 1,
    dilation: _Numbers = 1,
    *,
    input_scale: torch.Tensor | None = None,
    input_zero_point: torch.Tensor | None = None,
    scheme: str = "int8",
) -> torch.Tensor:
    """`y = conv_transpose(x, weight · weight_scale) + bias` along the axes that the weight has; all
    else is as in `conv`.

    Args:
        x: float32, bfloat16, float16 or float64, `[B, C, *sizes]` with 1, 2 or 3 sizes, or
            `[C, *sizes]`.
        weight: int8 `[C, N / groups, *kernel]`, or both parts of the weight in one tuple.
        weight_scale: float32 `[N, 1, …]`: one for each of the N channels of the result.
        bias: any float dtype, `[N]`.
        stride, padding, output_padding, groups, dilation: as those of `nn.ConvTranspose2d`.
        input_scale, input_zero_point, scheme: as in `conv`.

    Returns:
        `[B, N, *sizes]` in the dtype of `x`; without the batch if `x` has none.

    Raises:
        ValueError, TypeError: as `conv`, and an output_padding that is neither smaller than the
            stride nor than the dilation.

    >>> x, w = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1, 3]]], dtype=torch.int8)
    >>> conv_transpose(x, w, torch.ones(1, 1, 1), stride=2, scheme="int8_weight")
    tensor([[[1., 3., 2., 6.]]])
    """
    who = "qnn.functional.conv_transpose"
    parts = _operands(who, scheme, weight, weight_scale, input_scale, input_zero_point)
    axes, batched = _axes(who, x, parts[0])
    strides = _numbers(who, "stride", stride, axes)
    dilations = _numbers(who, "dilation", dilation, axes)
    paddings = _numbers(who, "padding", padding, axes)
    more = _numbers(who, "output_padding", output_padding, axes)
    for each, step, spread in zip(more, strides, dilations, strict=True):
        if not 0 <= each < max(step, spread):
            raise ValueError(
                f"{who}: output_padding must be smaller than stride or dilation, got {more} with "
                f"stride {strides} and dilation {dilations}."
            )
    if min(paddings) < 0:
        raise ValueError(f"{who}: padding must not be negative, got {paddings}.")
    ends = tuple(e for p, m in zip(paddings, more, strict=True) for e in (p, p - m))
    x = x if batched else x.unsqueeze(0)
    y = conv_of(x, parts, bias, scheme, strides, ends, dilations, groups, transposed=True)
    return y if batched else y.squeeze(0)


def conv_of(
    x: torch.Tensor,
    operands: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    scheme: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """`conv` or `conv_transpose` of a batch, over the operands of the scheme's op: the parts of the
    weight and, where it is static, the grid of `x`.

    `stride` and `dilation` have a number for each axis, `padding` two, before and after it; those
    of a transposed convolution are cut off.
    """
    kind = "conv_transpose" if transposed else "conv"
    op = get_scheme(scheme).op(kind)
    if op is None:
        known = ", ".join(map(repr, schemes_of(kind)))
        raise ValueError(
            f"qnn.functional.{kind}: scheme {scheme!r} has no convolutions; use one of {known}."
        )
    missing = _AXES + 2 - x.dim()
    x, w, scale = (_spread(each, missing) for each in (autocast(x), *operands[:2]))
    parts = (w, scale, *operands[2:])
    constants = (
        (*[1] * missing, *stride), (*[0] * (2 * missing), *padding), (*[1] * missing, *dilation),
        groups,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        y = call_in_eager(kind, op, scheme, x, parts, constants, bias)
        return y.squeeze(tuple(range(2, 2 + missing))) if missing else y
    # Known before the op is traced, which would make a symbol of its own of it.
    channels = w.shape[0] if transposed else w.shape[1] * groups
    if x.shape[1] != channels:
        raise ValueError(
            f"qnn.functional.{kind}: x must have {channels} channels, got {list(x.shape)}."
        )
    if in_functorch_transform():
        detached = None if bias is None else bias.detach()
        y = op_node(op, x.detach(), parts, detached, scheme, constants)
        line = product(transposed)(
            x, (w * _of_kernels(scale, w, transposed)).to(x.dtype), *constants
        )
        line = line if bias is None else line + bias.to(x.dtype).view(-1, 1, 1, 1)
        y = straight_through(y, line)
    else:
        y = apply_op(x, parts, bias, op, scheme, constants)
    return y.squeeze(tuple(range(2, 2 + missing))) if missing else y


def _spread(x: torch.Tensor, missing: int) -> torch.Tensor:
    """`x` with the axes that it lacks, of size 1, before those that it has."""
    for _ in range(missing):
        x = x.unsqueeze(2)
    return x


def _of_kernels(scale: torch.Tensor, w: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The scales of the outputs, as they multiply `w`."""
    if not transposed:
        return scale
    by_group = scale.view(-1, 1, w.shape[1])
    return by_group.expand(-1, w.shape[0] // by_group.shape[0], -1).reshape(*w.shape[:2], 1, 1, 1)


def _operands(
    who: str,
    scheme: str,
    weight: torch.Tensor | Sequence[torch.Tensor],
    weight_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero_point: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    parts = stored_parts(scheme, weight, _scale=weight_scale)
    if get_scheme(scheme).static or input_scale is not None or input_zero_point is not None:
        parts += grid(who, scheme, {"_scale": input_scale, "_zero_point": input_zero_point})
    return parts


def _axes(who: str, x: torch.Tensor, weight: torch.Tensor) -> tuple[int, bool]:
    """How many axes the convolution has, and whether `x` has a batch."""
    axes = weight.dim() - 2
    if not 1 <= axes <= _AXES:
        shape = list(weight.shape)
        raise ValueError(f"{who}: weight must have 3, 4 or 5 axes, got {shape}.")
    if x.dim() not in (axes + 1, axes + 2):
        raise ValueError(
            f"{who}: x must have {axes + 2} axes, or {axes + 1} without a batch, for a weight "
            f"{list(weight.shape)}, got {list(x.shape)}."
        )
    return axes, x.dim() == axes + 2


def _numbers(who: str, name: str, value: _Numbers, axes: int) -> tuple[int, ...]:
    """A number for each axis."""
    if isinstance(value, int):
        return (value,) * axes
    values = tuple(value)
    if len(values) == 1:
        return values * axes
    if len(values) != axes:
        raise ValueError(
            f"{who}: {name} must be one number or {axes}, one for each axis, got {value!r}."
        )
    return values


def _ends(
    who: str,
    padding: _Numbers | str,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """What is added before and after each axis."""
    if padding == "valid":
        return (0,) * (2 * len(kernel))
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"{who}: padding must be numbers, 'same' or 'valid', got {padding!r}.")
        if max(stride) > 1:
            raise ValueError(f"{who}: padding='same' needs stride 1, got {tuple(stride)}.")
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return tuple(end for total in totals for end in (total // 2, total - total // 2))
    return tuple(
        end for each in _numbers(who, "padding", padding, len(kernel)) for end in (each, each)
    )
