"""What a number format is: how floats become stored tensors and back.

Each family has a file of its own (`int8.py`, `float8.py`, `mxfp8.py`, `nvfp4.py`) with its rule and
its `Format` objects. Whatever else works with formats reads this description and needs no case for
any of them. Schemes, which combine formats into layers, are in `schemes.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from qnn.kernels.op.axes import parse_axis, size_of

Granularity = Literal["tensor", "token", "channel", "group", "block"]

# The dtypes that a quantised layer accepts for its activations. Scale arithmetic is float32 for all
# of them.
FLOATS: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Part:
    """One of the tensors that a quantised value is stored in.

    Attributes:
        suffix: after the name of the value, in state dicts: `weight`, `weight_scale`, …
        short: its name as an argument of an op: `xq` for `"{}q"`.
        dtype: what it is stored as.
        axes: in the notation of `Op`, for the value's axes `r` (rows) and `c` (columns).
        span: the least and the largest value that it may hold, where not all of its dtype.
    """

    suffix: str
    short: str
    dtype: torch.dtype
    axes: str
    span: tuple[int, int] | None = None

    def declared(self, name: str, rows: str, columns: str, *, least: int = 0) -> str:
        """The argument of an op that holds this part of `name`: `sx: ... k/16`. There is room for
        `least` groups along the columns.
        """
        axes = self.axes.split()
        if self.is_grouped and least:
            axes[-1] += f">{least}"
        known = {"r": rows, "c": columns}
        axes = [known.get(axis[0], axis[0]) + axis[1:] for axis in axes]
        return f"{self.short.format(name)}: {' '.join(axes)}"

    @property
    def is_scale(self) -> bool:
        return self.suffix.endswith("_scale")

    @property
    def is_grouped(self) -> bool:
        """Whether it has an element for each group of columns in each row: a scale of groups."""
        rows, *columns = self.axes.split()
        return rows == "r" and bool(columns) and self.group > 1 and "*" not in columns[0]

    @property
    def group(self) -> int:
        """How many columns have one element, or a word of several."""
        last = parse_axis(self.axes.split()[-1])
        return last.terms[0][0].divisor

    def of_stored(self, packing: int) -> Part:
        """The part with its groups counted in elements of `packing` columns each."""
        if self.group == 1:
            return self
        return replace(
            self, axes=self.axes.replace(f"c/{self.group}", f"c/{self.group // packing}")
        )

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The part's shape for a value of `[rows, columns]`."""
        known = {"r": rows, "c": columns}
        return tuple(size_of(axis, known) for axis in self.axes.split())


@dataclass(frozen=True)
class Format(ABC):
    """A number format: float = stored value x scale.

    Scales are per-tensor; per-token, one for each row of the activations `[..., K]`; per-channel,
    one for each output row of the weight `[N, K]`, by the same arithmetic; per-group, one for
    neighbours in a row; or per-block, one for a rectangle. `block` has the size of the last two.

    Attributes:
        name: the format's name, such as `"float8_e4m3"`; several granularities share one.
        key: the name of exactly this format, and what its ops begin with.
        number: what a stored value is.
        storage: the dtype that values are stored in.
        qmin, qmax: the range of a stored value.
        granularity: what shares a scale.
        parts: the tensors of a quantised value; the first holds the values themselves.
        scale_dtype: of the scales that most values share.
        block: rows and columns of a `group` or `block`.
        packing: values in one element of `storage`.
        stochastic: whether `quantize` rounds by chance, from a `seed`.
        whole_groups: whether an op takes rows of whole groups alone; others end in zeros.
    """

    name: str
    key: str
    number: Literal["int", "float"]
    storage: torch.dtype
    qmin: float
    qmax: float
    granularity: Granularity
    parts: tuple[Part, ...]
    scale_dtype: torch.dtype = torch.float32
    block: tuple[int, int] | None = None
    packing: int = 1
    stochastic: bool = False
    whole_groups: bool = False

    @abstractmethod
    def quantize(self, x: torch.Tensor, seed: torch.Tensor | None = None) -> tuple[Any, ...]:
        """The parts of `x [..., C]`. Nothing is shared along leading axes, but in a format with
        a per-tensor scale; a format of 128x128 or 16x16 blocks takes `[R, C]` alone.
        """

    def quantize_beside(self, x: torch.Tensor, amax: torch.Tensor) -> tuple[Any, ...]:
        """`quantize`, for rows of several values at once: a scale of the tensor becomes one for
        each row, from `amax` float32 `[R, 1]`, the largest finite magnitude of the value that the
        row is of. So `quantize` of each value gives the same codes and scales.
        """
        return self.quantize(x)

    @abstractmethod
    def decode(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(values, scale)` with float = values · scale.

        `scale` is `[..., 1]` or `[1]`, and None where the values have it in them already. `values`
        of a format that activations may have are of at most 8 significant bits, so that products
        of two are exact in float32.
        """

    def dequantize(
        self, parts: Sequence[torch.Tensor], compute: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The floats, in `compute`."""
        values, scale = self.decode(parts, compute)
        return values if scale is None else values * scale.to(compute)

    def rows(
        self, parts: Sequence[torch.Tensor], start: int, stop: int
    ) -> tuple[torch.Tensor, ...] | None:
        """Views of the parts of a matrix for its rows from `start` up to `stop`; None where rows on
        both sides of an end share a scale.
        """
        side = self.block[0] if self.tall and self.block else 1
        if start % side or (stop % side and stop != parts[0].shape[0]):
            return None
        some = []  # Dynamo traces this: the notation is not parsed here
        for part, tensor in zip(self.parts, parts, strict=True):
            unit = side if part.axes.startswith("r/") else 1
            whole = part.axes.startswith("1")
            some.append(tensor if whole else tensor[start // unit : -(-stop // unit)])
        return tuple(some)

    @property
    def on_disk(self) -> tuple[Part, ...]:
        """The tensors of a quantised value in a file; its parts, unless they have another form."""
        return self.parts

    def to_disk(
        self, parts: Sequence[torch.Tensor], shape: tuple[int, int]
    ) -> tuple[torch.Tensor, ...]:
        """The tensors of `on_disk` for a value of this shape."""
        return tuple(parts)

    def from_disk(
        self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Those of the parts, by suffix, that tensors of a file are or hold; a ValueError for what
        belongs to another shape.
        """
        return dict(tensors)

    @property
    def bits(self) -> int:
        """Of a stored value, without its share of the scales."""
        return 8 * self.storage.itemsize // self.packing

    @property
    def columns_multiple_of(self) -> int:
        """What a weight's row must be a multiple of, so that its file can be read by others."""
        return 1 if self.granularity != "group" or self.block is None else self.block[1]

    @property
    def compressed(self) -> dict[str, Any]:
        """What the compressed-tensors convention calls the format."""
        result: dict[str, Any] = {
            "num_bits": self.bits,
            "type": self.number,
            "strategy": self.granularity,
            "symmetric": all(part.suffix != "_zero_point" for part in self.parts),
        }
        if self.granularity == "group" and self.block is not None:
            result["group_size"] = self.block[1]
        elif self.granularity == "block" and self.block is not None:
            result["block_structure"] = list(self.block)
        if self.scale_dtype != torch.float32:
            result["scale_dtype"] = str(self.scale_dtype)
        return result

    def declared(self, name: str, rows: str, columns: str, *, least: int = 0) -> str:
        """The parts of a value of `[rows, columns]`, as arguments or results of an op."""
        return ", ".join(part.declared(name, rows, columns, least=least) for part in self.parts)

    def stored(self, name: str, rows: str, axis: str, *, least: int = 0) -> tuple[str, str]:
        """The parts as arguments that say by themselves how many columns the value has: `axis` is
        that of the stored elements; and the axis of the columns that they decode to.
        """
        if self.packing == 1:
            return self.declared(name, rows, axis, least=least), axis
        first, *scales = self.parts
        parts = [replace(first, axes="r c"), *(scale.of_stored(self.packing) for scale in scales)]
        words = [part.declared(name, rows, axis, least=least) for part in parts]
        return ", ".join(words), f"{axis}*{self.packing}"

    @property
    def rowwise(self) -> bool:
        """Whether a row is quantised by itself, whatever the others are."""
        one_scale = any(part.axes == "1" for part in self.parts)
        return not (one_scale or self.tall or self.stochastic)

    @property
    def tall(self) -> bool:
        """Whether several rows share a scale, so that the value must be a matrix."""
        return self.block is not None and self.block[0] > 1

    def names(self, name: str) -> tuple[str, ...]:
        """The names of those arguments."""
        return tuple(part.short.format(name) for part in self.parts)


def finite_amax(x: torch.Tensor, dims: int | Sequence[int] | None = None) -> torch.Tensor:
    """The largest finite magnitude along `dims`, which are kept, in float32; 0 where there is none.

    What is not finite has its own code and takes no part in the scale, so that it spoils only the
    outputs that it enters.
    """
    dims = list(range(x.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    # A size that is traced is not zero: torch compiles empty tensors apart.
    if any(isinstance(x.shape[d], int) and x.shape[d] == 0 for d in dims):
        shape = [1 if d in {e % x.dim() for e in dims} else s for d, s in enumerate(x.shape)]
        return x.new_zeros(shape, dtype=torch.float32)
    # float64 beyond the range of float32 is infinite to the casts.
    magnitude = (x.float() if x.dtype == torch.float64 else x).abs()
    magnitude = torch.where(magnitude.isfinite(), magnitude, 0)
    return magnitude.amax(dims, keepdim=True).float()


def over(number: float, x: torch.Tensor) -> torch.Tensor:
    """`number / x`, correctly rounded. Torch's own `number / x` is a product with the reciprocal,
    which has two roundings; 448 / 448 must be 1 where it is rounded down to a power of two.
    """
    return torch.full_like(x, number) / x


def spread(scale: torch.Tensor, block: int, columns: int) -> torch.Tensor:
    """A scale for each of `columns`, from per-group ones of `block` columns."""
    return scale.repeat_interleave(block, -1)[..., :columns]


def grouped(x: torch.Tensor, block: int) -> torch.Tensor:
    """`[..., C]` as `[..., ⌈C / block⌉, block]`, with zeros after the end."""
    missing = -x.shape[-1] % block
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x
    result: torch.Tensor = x.unflatten(-1, (x.shape[-1] // block, block))
    return result
