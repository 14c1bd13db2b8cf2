"""Weights of a file in the formats of our schemes, exactly, and as floats.

What is given here has the names of compressed-tensors: `weight` or `weight_packed`, `weight_scale`,
`weight_global_scale`, int4 zero points as bytes, and `g_idx` where columns are in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qnn.integrations.checkpoints.numbers import Numbers
from qnn.kernels.formats import int4, mxfp8, nvfp4

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fit:
    """A format, by its key, that holds the weight, and what makes its tensors; `make` raises a
    ValueError where these values are not in it.
    """

    form: str
    make: Callable[[], Tensors]


def fits(numbers: Numbers, tensors: Tensors, shape: tuple[int, int]) -> Iterator[Fit]:
    """The formats that hold a weight with these numbers, the nearest first."""
    kind = (numbers.type, numbers.bits)
    own = Fit("", lambda: tensors)
    rows = {**tensors, "weight_scale": tensors["weight_scale"].reshape(-1, 1)}
    if kind == ("int", 8) and numbers.symmetric and numbers.per in ("tensor", "channel"):
        yield Fit("int8", lambda: _every_row(rows, shape[0]))
    elif kind == ("float", 8) and numbers.scale == "float":
        if numbers.per == "tensor":
            yield Fit("float8_e4m3_tensor", own.make)
        if numbers.per in ("tensor", "channel"):
            yield Fit("float8_e4m3", lambda: _every_row(rows, shape[0]))
        elif numbers.block == (128, 128):
            yield Fit("float8_e4m3_block", own.make)
    elif kind == ("float", 8) and (numbers.scale, numbers.group) == ("e8m0", 32):
        yield Fit("mxfp8", own.make)
    elif kind == ("float", 4) and (numbers.scale, numbers.group) == ("e4m3", 16):
        yield Fit("nvfp4", own.make)
    elif kind == ("float", 4) and (numbers.scale, numbers.group) == ("e8m0", 32):
        yield Fit("nvfp4", lambda: as_nvfp4(tensors))
    elif kind == ("int", 4):
        asym = "" if numbers.symmetric else "_asym"
        for group in sorted(int4.GROUPS, reverse=True):
            per = numbers.group or shape[1]
            if shape[1] % group == 0 and (per % group == 0):
                key = f"int4{asym}" + ("" if group == 128 else f"_g{group}")
                yield Fit(key, functools.partial(_regrouped, tensors, per, group))


def _every_row(tensors: Tensors, rows: int) -> Tensors:
    scale = tensors["weight_scale"]
    return {**tensors, "weight_scale": scale.expand(rows, 1).contiguous()}


def as_nvfp4(tensors: Tensors) -> Tensors:
    """Powers of two as e4m3, from 2⁻⁹ to 2⁸, times one of the tensor; for each 16 columns."""
    byte = tensors["weight_scale"].to(torch.int32)
    if bool((byte == 255).any()):
        raise ValueError("weight_scale holds NaN")
    codes = tensors["weight_packed"].unflatten(-1, (-1, 16)) & 0x77
    used = byte[(codes != 0).any(-1)]  # that of a group of zeros may be anything
    least, most = (int(used.min()), int(used.max())) if used.numel() else (127, 127)
    # The factor of the tensor is 2^(shift − 127), and it and its inverse are normal numbers.
    shift = max(most - 8, 1)
    if shift > min(least + 9, 253):
        raise ValueError(
            f"its scales go from 2^{least - 127} to 2^{most - 127}, which the e4m3 scales of nvfp4 "
            "do not span"
        )
    byte = byte.clamp(least, most)
    power = torch.exp2((byte - shift).float()).to(torch.float8_e4m3fn)
    made = {name: t for name, t in tensors.items() if name != "input_global_scale"}
    made["weight_scale"] = power.repeat_interleave(2, -1)
    made["weight_global_scale"] = torch.tensor([2.0 ** (127 - shift)])
    return made


def _regrouped(tensors: Tensors, per: int, group: int) -> Tensors:
    """Scales and zero points for smaller groups, and in the order of the columns."""
    made = {name: t for name, t in tensors.items() if name != "g_idx"}
    columns = tensors["weight_packed"].shape[1] * 8
    index = tensors.get("g_idx")
    if index is None:
        index = torch.arange(columns) // per
    runs = index.view(-1, group)
    if not bool((runs == runs[:, :1]).all()):
        raise ValueError(
            f"act-order: its g_idx puts neighbours among {group} columns into different groups"
        )
    if not torch.equal(runs[:, 0].long(), torch.arange(columns // group)):
        for name in {"weight_scale", "weight_zero_point"} & made.keys():
            made[name] = made[name][:, runs[:, 0].long()].contiguous()
    made.setdefault("weight_shape", torch.tensor([made["weight_packed"].shape[0], columns]))
    return made


def decode(numbers: Numbers, tensors: Tensors, shape: tuple[int, int]) -> torch.Tensor:
    """The float weight, in float32: value · scale, or (code − zero point) · scale."""
    rows, columns = shape
    scale = tensors["weight_scale"]
    scale = mxfp8.power(scale) if numbers.scale == "e8m0" else scale.float()
    packed = tensors.get("weight_packed")
    if packed is None:
        values = tensors["weight"].float()
    elif numbers.type == "float":
        ones = torch.ones(rows, -(-columns // nvfp4.BLOCK), dtype=torch.float8_e4m3fn)
        values = nvfp4.ROWS.decode((packed, ones, torch.ones(1)), torch.float32)[0]
    else:
        values = int4.unpack(packed).float()[:, :columns]
    if numbers.per == "block":
        down, across = numbers.block or shape
        return values * _spread(_spread(scale, down, 0, rows), across, 1, columns)
    index = tensors.get("g_idx")
    if index is None:
        index = torch.arange(columns) // (numbers.group or columns)

    def each(found: torch.Tensor) -> torch.Tensor:
        found = found.reshape(-1, 1) if numbers.per in ("tensor", "channel") else found
        return found if found.shape[1] == 1 else found[:, index.long()]

    zero = tensors.get("weight_zero_point")
    if zero is not None:
        values -= each(zero.float())
    elif packed is not None and numbers.type == "int":
        values -= 8
    values *= each(scale)
    divisor = tensors.get("weight_global_scale")
    return values if divisor is None else values * (1 / divisor.float())


def _spread(scale: torch.Tensor, times: int, axis: int, size: int) -> torch.Tensor:
    return scale.repeat_interleave(times, axis).narrow(axis, 0, size)


__all__ = ["Fit", "as_nvfp4", "decode", "fits"]
