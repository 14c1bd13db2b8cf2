"""The table of checkpoint formats: what each calls a quantised layer's tensors, their dtypes and
shapes, and how they become those of compressed-tensors, which are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from qnn.integrations.checkpoints import transforms
from qnn.integrations.checkpoints.numbers import Numbers
from qnn.kernels.formats import FLOATS
from qnn.kernels.op.axes import size_of

Tensors = dict[str, torch.Tensor]
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
I8, U8, I32, I64 = torch.int8, torch.uint8, torch.int32, torch.int64
F32 = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Held:
    """A tensor of a layer: its last name, the dtypes that it may have, and its axes in the notation
    of ops, for the weight's rows `r` and columns `c`; `{g}`, `{b}` and `{d}` are the group, and the
    rows and columns of a block. No axes is one element, of any shape; `=` is the scale's.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    axes: str
    optional: bool = False

    def shape(self, rows: int, columns: int, numbers: Numbers) -> tuple[int, ...]:
        down, across = numbers.block or (1, 1)
        axes = self.axes.format(g=numbers.group or columns, b=down, d=across)
        return tuple(size_of(axis, {"r": rows, "c": columns}) for axis in axes.split())


_SCALES = {"tensor": "", "channel": "r 1", "group": "r c/{g}", "block": "r/{b} c/{d}"}


@dataclass(frozen=True)
class Layout:
    """A row of the table.

    Attributes:
        name: for errors and the docs.
        method: the config's `quant_method`.
        format: compressed-tensors' name of it.
        held: the tensors beside the scale of the weights.
        scale: the scale of the weights; its axes follow from what shares one, where it has none.
        takes: the numbers of weights that it is for, `(type, bits, what may share a scale)`.
        written: whether qnn writes it.
        common: makes compressed-tensors' tensors of these.
        activations: the tensors that belong to static activations.
        note: for the docs.
    """

    name: str
    method: str
    held: tuple[Held, ...]
    scale: Held
    takes: tuple[str, int, tuple[str, ...]]
    format: str = ""
    written: bool = False
    common: Callable[[Tensors, Numbers], Tensors] = field(default=lambda tensors, numbers: tensors)
    activations: tuple[Held, ...] = ()
    note: str = ""

    def tensors(self, numbers: Numbers) -> tuple[Held, ...]:
        """All tensors of a layer whose weights are so."""
        axes = self.scale.axes or _SCALES[numbers.per]
        alike = (replace(each, axes=axes) if each.axes == "=" else each for each in self.held)
        return (*alike, replace(self.scale, axes=axes), *self.activations)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(each.name for each in (*self.held, self.scale, *self.activations))

    def why_not(self, numbers: Numbers) -> str | None:
        """Why weights with these numbers are not in this layout, or None."""
        kind, bits, per = self.takes
        if (numbers.type, numbers.bits) != (kind, bits) or numbers.per not in per:
            return (
                f"it holds {kind}{bits}, per-{' or per-'.join(per)}, and the config says {numbers}"
            )
        return None

    def shape(self, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
        """Rows and columns of the weight, by the tensor that holds its values."""
        first = self.held[0]
        found = tensors.get(first.name)
        if found is None or found.dim() != 2:
            return None
        sizes = dict[str, int]()
        for axis, size in zip(first.axes.split(), found.shape, strict=True):
            name, _, packing = axis.partition("/")
            sizes[name] = size * int(packing or 1)
        return sizes["r"], sizes["c"]

    def check(self, tensors: Mapping[str, torch.Tensor], numbers: Numbers) -> None:
        """Raise a ValueError for tensors that are not this layout's."""
        shape = self.shape(tensors)
        if shape is None:
            raise ValueError(f"there is no {self.held[0].name} of two axes")
        if numbers.per == "group" and shape[1] % numbers.group:
            raise ValueError(f"{shape[1]} columns are not whole groups of {numbers.group}")
        for held in self.tensors(numbers):
            found = tensors.get(held.name)
            if found is None:
                if not held.optional:
                    raise ValueError(f"{held.name} is missing")
                continue
            if found.dtype not in held.dtypes:
                able = " or ".join(str(dtype).removeprefix("torch.") for dtype in held.dtypes)
                raise ValueError(f"{held.name} is {found.dtype}, and {self.name} has {able}")
            want = held.shape(*shape, numbers)
            one = not held.axes and found.numel() == 1
            if tuple(found.shape) != want and not one:
                raise ValueError(
                    f"{held.name} is {list(found.shape)}, and {self.name} of a weight "
                    f"{list(shape)} has {list(want) or [1]}"
                )


_SHAPE = Held("weight_shape", (I64, I32), "2")
_CODES = Held("weight", (I8,), "r c")
_FLOATS = Held("weight", (E4M3,), "r c")
_FOURS = Held("weight_packed", (U8,), "r c/2")
_SCALE = Held("weight_scale", F32, "")
_BYTES = Held("weight_scale", (U8, E8M0), "r c/{g}")
_ZERO = Held("weight_zero_point", (I32,), "r/8 c/{g}", True)
_GRID = (Held("input_scale", F32, "", True), Held("input_zero_point", (I8,), "", True))
_GLOBAL = Held("weight_global_scale", F32, "")
_CT = "compressed-tensors"
_ROWS = ("tensor", "channel")
_INT8 = (_CODES, Held("weight_zero_point", (I8,), "=", True))
_GPTQ = (
    Held("qweight", (I32,), "c/8 r"),
    Held("qzeros", (I32,), "c/{g} r/8"),
    Held("g_idx", (I32,), "c", True),
)
_GPTQ_SCALE = Held("scales", F32, "c/{g} r")
_ORDER = "act-order where runs of 32 columns are in one group each"

LAYOUTS = (
    Layout(
        "int-quantized", _CT, _INT8, _SCALE, ("int", 8, (*_ROWS, "group")), "int-quantized", True,
        transforms.without_zeros, activations=_GRID, note="static activations with and without "
        "zero points",
    ),
    Layout(
        "float-quantized", _CT, (_FLOATS,), _SCALE, ("float", 8, (*_ROWS, "block")),
        "float-quantized", True, activations=_GRID[:1],
    ),
    Layout(
        "naive-quantized", _CT, _INT8, _SCALE, ("int", 8, (*_ROWS, "group")), "naive-quantized",
        common=transforms.without_zeros, activations=_GRID,
    ),
    Layout(
        "naive-quantized", _CT, (_FLOATS,), _SCALE, ("float", 8, (*_ROWS, "block")),
        "naive-quantized", activations=_GRID[:1],
    ),
    Layout(
        "mxfp8-quantized", _CT, (_FLOATS,), _BYTES, ("float", 8, ("group",)), "mxfp8-quantized",
        True, transforms.bytes_of_scales,
    ),
    Layout(
        "nvfp4-pack-quantized", _CT, (_FOURS, _GLOBAL), Held("weight_scale", (E4M3,), "r c/16"),
        ("float", 4, ("group",)), "nvfp4-pack-quantized", True,
        activations=(Held("input_global_scale", F32, "", True),),
        note="scales of the whole tensor are divisors",
    ),
    Layout(
        "mxfp4-pack-quantized", _CT, (_FOURS,), _BYTES, ("float", 4, ("group",)),
        "mxfp4-pack-quantized", common=transforms.bytes_of_scales,
    ),
    Layout(
        "pack-quantized", _CT,
        (
            Held("weight_packed", (I32,), "r c/8"), _SHAPE, _ZERO,
            Held("weight_g_idx", (I32,), "c", True),
        ),
        _SCALE, ("int", 4, (*_ROWS, "group")), "pack-quantized", True, transforms.unpacked_zeros,
    ),
    Layout(
        "pack-quantized", _CT, (Held("weight_packed", (I32,), "r c/4"), _SHAPE), _SCALE,
        ("int", 8, (*_ROWS, "group")), "pack-quantized", common=transforms.unpacked_bytes,
    ),
    Layout(
        "DeepSeek fp8", "fp8", (_FLOATS,), Held("weight_scale_inv", (*F32, E8M0), ""),
        ("float", 8, ("block",)), common=transforms.from_deepseek,
        note="`weight_scale_inv` multiplies",
    ),
    Layout(
        "fp8, per-tensor", "fp8", (_FLOATS,), _SCALE, ("float", 8, ("tensor",)),
        activations=_GRID[:1],
    ),
    Layout(
        "ModelOpt NVFP4", "modelopt",
        (Held("weight", (U8,), "r c/2"), Held("weight_scale_2", F32, "")),
        Held("weight_scale", (E4M3,), "r c/16"), ("float", 4, ("group",)),
        common=transforms.from_modelopt, activations=_GRID[:1],
        note="scales of the whole tensor are factors, and are turned over: to the last place of "
        "float32",
    ),
    Layout(
        "ModelOpt FP8", "modelopt", (_FLOATS,), _SCALE, ("float", 8, ("tensor",)),
        activations=_GRID[:1],
    ),
    Layout(
        "AutoAWQ int4", "awq",
        (Held("qweight", (I32,), "c r/8"), Held("qzeros", (I32,), "c/{g} r/8", True)),
        Held("scales", F32, "c/{g} r"), ("int", 4, ("group", "channel")),
        common=transforms.from_awq, note="version `gemm`",
    ),
    Layout(
        "GPTQ int4", "gptq", _GPTQ, _GPTQ_SCALE, ("int", 4, ("group", "channel")), "gptq",
        common=transforms.from_gptq, note="stored zero points are one less; " + _ORDER,
    ),
    Layout(
        "GPTQ int4, version 2", "gptq", _GPTQ, _GPTQ_SCALE, ("int", 4, ("group", "channel")),
        "gptq_v2", common=transforms.from_gptq_v2, note=_ORDER,
    ),
)  # fmt: skip


def layouts_of(method: str, form: str | None = None) -> list[Layout]:
    """The rows of a `quant_method`, and of compressed-tensors' name of a format."""
    return [each for each in LAYOUTS if each.method == method and form in (None, each.format)]


def last_names() -> frozenset[str]:
    """All names that say that a layer is quantised."""
    return frozenset().union(*(each.names for each in LAYOUTS)) - {"weight"}


def by_tensors(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The layouts whose values a layer's tensors could be, for errors."""
    found = dict[str, None]()
    for layout in LAYOUTS:
        first = layout.held[0]
        value = tensors.get(first.name)
        wanted: Iterable[Held] = (*layout.held, layout.scale)
        fits = value is not None and value.dtype in first.dtypes
        if fits and all(each.optional or each.name in tensors for each in wanted):
            found[f"{layout.name} ({layout.method})"] = None
    return list(found)


__all__ = ["FLOATS", "LAYOUTS", "Held", "Layout", "by_tensors", "last_names", "layouts_of"]
