"""The int8 and int16 convolutions: plain and transposed, of 1, 2 and 3 axes, and their gradients.

There is one op for any number of axes: images are `[b, c, i1, i2, i3]`, and an axis that a 1-D or
2-D convolution lacks has size 1. `padding` is what is added before and after each axis; it has the
code of zero. A transposed convolution has so much cut off, or added where it is negative. The sums
of products are exact. A sample with a NaN or inf gives a sample of NaN, as a row of a linear layer
does.

Between layers with static grids the codes may stay: uint8, 128 more than the int8 code, with a
scale for each sample, which is NaN where the sample is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qnn.kernels.cpu.conv import float32_sums, float32_sums_of_bytes
from qnn.kernels.epilogue import ACTIVATIONS, LAST
from qnn.kernels.formats.base import FLOATS
from qnn.kernels.formats.int8 import INT8_MAX_K, INT8_STATIC_MAX_K
from qnn.kernels.op import Op, too_long
from qnn.kernels.reference import conv as reference
from qnn.kernels.reference import int16

INT8, CODES, SCALE = (torch.int8,), (torch.uint8,), (torch.float32,)
EPILOGUE = {"activation": tuple(ACTIVATIONS), "last": LAST}


def _out(size: Any, kernel: Any, stride: int, before: int, after: int, dilation: int) -> Any:
    """The size of an axis after a convolution."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1 if stride > 0 else 0


def _up(size: Any, kernel: Any, stride: int, before: int, after: int, dilation: int) -> Any:
    """The size of an axis after a transposed convolution."""
    return (size - 1) * stride + dilation * (kernel - 1) + 1 - before - after


def _per(channels: Any, groups: int) -> Any:
    """The channels of a group."""
    return channels // groups if groups > 0 else 0


SIZES = {"out": _out, "up": _up, "per": _per}


def _axes(function: str, of: str) -> str:
    """The three axes that `function` makes of `of + "1"` and so on."""
    each = "{f}({of}{i},k{i},stride[{j}],padding[{a}],padding[{b}],dilation[{j}])"
    return " ".join(
        each.format(f=function, of=of, i=j + 1, j=j, a=2 * j, b=2 * j + 1) for j in range(3)
    )


X, SAMPLES, LIKE = "b c i1 i2 i3", "b 1 1 1 1", "b m*groups i1 i2 i3"
CODES_OF_X = f"q: {X}, scale: {SAMPLES}, zx: 1"
WEIGHT = "w: n per(c,groups) k1 k2 k3, sw: n 1 1 1 1"
# Of a transposed one: the channels of a group, m, come from the kernels.
WEIGHT_UP = "w: c m k1 k2 k3, sw: m*groups 1 1 1 1"
GRID, GRID_OUT = "sx: 1, zx: 1", "so: 1, zo: 1"
GEOMETRY = "stride: int[3], padding: int[6], dilation: int[3], groups: int"
OUT, UP = f"b n {_axes('out', 'i')}", f"b m*groups {_axes('up', 'i')}"
AFTER = "activation?: str, last?: str"
OTHERS = f"bias?: n, residual?: {OUT}, rq?: {OUT}, rscale?: {SAMPLES}, rz?: 1, {AFTER}"
PRODUCTS, PRODUCTS_UP = f"{OUT} per(c,groups) k1 k2 k3", f"{X} m k1 k2 k3"

_SAMPLE: dict[str, Any] = {
    "b": 2, "c": 6, "n": 4, "m": 2, "i1": 3, "i2": 5, "i3": 6, "k1": 2, "k2": 3, "k3": 2,
    "stride": [1, 2, 1], "padding": [0, 1, 1, 1, 2, 0], "dilation": [2, 1, 1], "groups": 2,
}  # fmt: skip
_SAMPLE_OF_GRADIENT = {**_SAMPLE, "m": 3, "o1": 2, "o2": 3, "o3": 7}


def _rule(names: Sequence[str], *, up: bool, limit: int | None) -> Callable[..., str | None]:
    """What the notation cannot say of the arguments with these names; `up` is for transposed ones
    and their gradient.
    """
    size = _up if up and names[0] == "x" else _out

    def rule(*args: Any) -> str | None:
        given = dict(zip(names, args, strict=True))
        image, w = given.get("like", args[0]).shape, given["w"].shape
        stride, padding, dilation = (given[name] for name in ("stride", "padding", "dilation"))
        groups = given["groups"]
        together = {given[name] is None for name in ("rq", "rscale", "rz") if name in given}
        if len(together) > 1:
            return "rq, rscale and rz belong together"
        if min(*stride, *dilation, groups) < 1:
            return (
                f"stride, dilation and groups must be at least 1, got {list(stride)}, "
                f"{list(dilation)} and {groups}"
            )
        if min(padding) < 0 and not up:
            return f"padding must not be negative, got {list(padding)}"
        if min(*image[1:], *w) < 1:
            return f"only the batch may be empty, got an image {list(image)} and kernels {list(w)}"
        if image[1] % groups or w[0] % groups:
            return f"groups must divide the channels, {image[1]} and {w[0]}, got {groups}"
        depth = math.prod(w[2:]) * (w[0] // groups if up else w[1])
        if limit is not None and depth > limit:
            return too_long("the products of an output", limit, depth)
        ends = zip(image[2:], w[2:], stride, padding[::2], padding[1::2], dilation, strict=True)
        sizes = [size(*each) for each in ends]
        if min(sizes) < 1:
            return (
                f"kernels of {list(w[2:])} with stride {list(stride)}, padding {list(padding)} and "
                f"dilation {list(dilation)} leave nothing of an image of {list(image[2:])}: the "
                f"result would be {sizes}; use a larger image, more padding or smaller kernels"
            )
        if "like" in given and (got := list(args[0].shape[2:])) != sizes:
            return f"dy of images of {list(image[2:])} must be of {sizes}, got {got}"
        return None

    return rule


def _conv(
    name: str,
    arguments: str,
    result: str,
    reference: Callable[..., Any],
    doc: str,
    *,
    up: bool = False,
    limit: int | None = None,
    native: bool = False,
    integer_sums: Callable[..., torch.Tensor] = float32_sums,
    **declared: Any,
) -> Op:
    """Declare one of the family. What has a limit, or 16 bits, sums integers."""
    names = [argument.split(":")[0].rstrip("?") for argument in arguments.split(", ")]
    dtypes = {
        **dict.fromkeys(("x", "dy", "like", "bias", "dtype"), FLOATS),
        **dict.fromkeys(("q", "rq"), CODES),
        **dict.fromkeys(("w", "zx", "zo", "rz"), INT8),
        **dict.fromkeys(("sw", "sx", "so", "scale", "rscale"), SCALE),
        "residual": "dtype" if "dtype" in names else "x",
    }
    scales = ("sw", "sx", "so", "scale", "rscale")
    defaults: dict[str, Any] = {
        "out": (names[0],),
        "positive": [each for each in scales if each in names],
        "choices": EPILOGUE if "activation" in names else {},
        "sample": _SAMPLE,
        "products": PRODUCTS_UP if up else PRODUCTS,
    }
    if up and names[0] == "x":
        reference = functools.partial(reference, transposed=True)
    wide = integer_sums is not float32_sums
    sums = {"integer_sums": integer_sums} if limit is not None or wide else {}
    return Op(
        name,
        f"{arguments} -> {result}",
        doc=doc,
        dtypes={each: dtypes[each] for each in names if each in dtypes},
        reference=reference,
        kernels={"CPU": functools.partial(reference, **sums)} if "activation" in names else {},
        rule=_rule(names, up=up, limit=limit),
        sizes=SIZES,
        layout=names[0],
        rowwise=False,
        native=native,
        **{**defaults, **declared},
    )


int8_static_quantize = Op(
    "int8_static_quantize",
    f"x: {X}, {GRID} -> q: {X}, scale: {SAMPLES}",
    doc="q = clamp(round(x · (1/sx)) + zx, −128, 127) + 128; scale = sx, or NaN for a sample with "
    "a NaN or inf, whose codes are that of zero",
    dtypes={"x": FLOATS, "sx": SCALE, "zx": INT8},
    out=(torch.uint8, torch.float32),
    reference=reference.static_quantize_reference,
    positive=("sx",),
    layout="x",
    rowwise=False,
    native=True,
)

for _up_too in (False, True):
    _weight, _result = (WEIGHT_UP, UP) if _up_too else (WEIGHT, OUT)
    _end, _what = ("_transpose", "conv_transpose") if _up_too else ("", "conv")
    _rest = f"{GEOMETRY}, bias?: {_result.split()[1]}, residual?: {_result}, {AFTER}"
    _conv(
        f"int8_conv{_end}",
        f"x: {X}, {_weight}, {_rest}",
        _result,
        reference.conv_reference,
        "xq, sx = int8_quantize of each sample as one row; last(activation(int32("
        f"{_what}(xq, w)) · sw · sx + bias) + residual), in float32, with one cast after each of "
        "the four",
        up=_up_too,
        native=True,
        limit=INT8_MAX_K,
        backward={"x": f"int8_conv{_end}_dgrad"},
    )
    _conv(
        f"int8_static_conv{_end}",
        f"x: {X}, {_weight}, {GRID}, {_rest}",
        _result,
        reference.static_conv_reference,
        "q = clamp(round(x · (1/sx)) + zx, −128, 127); last(activation(int32("
        f"{_what}(q − zx, w)) · sw · sx + bias) + residual), with casts as in int8_conv",
        up=_up_too,
        native=True,
        limit=INT8_STATIC_MAX_K,
        backward={"x": f"int8_conv{_end}_dgrad"},
    )
    for _name, _grid, _meaning, _codes in (
        ("int16", "", int16.conv_reference, "sx = amax(|x|) / 32767 of each sample, "),
        ("int16_static", "sx: 1, ", int16.static_conv_reference, ""),
    ):
        _conv(
            f"{_name}_conv{_end}",
            f"x: {X}, {_weight}, {_grid}{_rest}",
            _result,
            _meaning,
            f"{_codes}q = clamp(round(x · (1/sx)), −32767, 32767); last(activation(float32("
            f"{_what}(q, w)) · sw · sx + bias) + residual), with casts as in int8_conv",
            up=_up_too,
            native=True,
            integer_sums=float32_sums_of_bytes,
            backward={"x": f"int8_conv{_end}_dgrad"},
        )
    _conv(
        f"int8_weight_conv{_end}",
        f"x: {X}, {_weight}, {_rest}",
        _result,
        reference.weight_conv_reference,
        f"last(activation({_what}(x, w) · sw + bias) + residual), in float32, with casts as in "
        "int8_conv",
        up=_up_too,
        native=True,
        backward={"x": f"int8_conv{_end}_dgrad"},
    )

int8_conv_dgrad = _conv(
    "int8_conv_dgrad",
    f"dy: b n o1 o2 o3, w: n m k1 k2 k3, sw: n 1 1 1 1, like: {LIKE}, {GEOMETRY}",
    LIKE,
    reference.conv_dgrad_reference,
    "conv_transpose(dy, w · sw) of the sizes of `like`, straight through the quantisation of x",
    backward={"dy": "int8_weight_conv"},
    sample=_SAMPLE_OF_GRADIENT,
    products="b n o1 o2 o3 m k1 k2 k3",
)

int8_conv_transpose_dgrad = _conv(
    "int8_conv_transpose_dgrad",
    f"dy: b n o1 o2 o3, w: c per(n,groups) k1 k2 k3, sw: n 1 1 1 1, {GEOMETRY}",
    f"b c {_axes('out', 'o')}",
    reference.conv_transpose_dgrad_reference,
    "conv(dy, w · sw), straight through the quantisation of x",
    up=True,
    backward={"dy": "int8_weight_conv_transpose"},
    sample={**_SAMPLE, "o1": 3, "o2": 5, "o3": 6},
    products=f"b c {_axes('out', 'o')} per(n,groups) k1 k2 k3",
)

int8_codes_conv = _conv(
    "int8_codes_conv",
    f"{CODES_OF_X}, {WEIGHT}, {GEOMETRY}, {OTHERS}, dtype?: dtype",
    OUT,
    reference.codes_conv_reference,
    "int8_static_conv of x that int8_static_quantize has quantised; (rq − 128 − rz) · rscale is "
    "added to the residual",
    limit=INT8_STATIC_MAX_K,
    native=True,
    out=("dtype",),
    inference=True,
)

int8_chain_conv = _conv(
    "int8_chain_conv",
    f"{CODES_OF_X}, {WEIGHT}, {GRID_OUT}, {GEOMETRY}, {OTHERS}, dtype?: dtype",
    f"codes: {OUT}, oscale: {SAMPLES}",
    reference.chain_conv_reference,
    "int8_static_quantize(int8_codes_conv(…), so, zo)",
    limit=INT8_STATIC_MAX_K,
    native=True,
    out=(torch.uint8, torch.float32),
    inference=True,
)

int8_fork_conv = _conv(
    "int8_fork_conv",
    f"{CODES_OF_X}, {WEIGHT}, {GRID_OUT}, {GEOMETRY}, {OTHERS}, dtype?: dtype",
    f"y: {OUT}, codes: {OUT}, oscale: {SAMPLES}",
    reference.fork_conv_reference,
    "y = int8_codes_conv(…), and int8_static_quantize(y, so, zo)",
    limit=INT8_STATIC_MAX_K,
    native=True,
    out=("dtype", torch.uint8, torch.float32),
    inference=True,
)
