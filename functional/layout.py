"""Weights of any number of axes, in formats that know matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from qnn.functional.quantize import dequantize, quantize
from qnn.kernels import get_scheme
from qnn.kernels.formats import Format, Part
from qnn.kernels.formats.base import finite_amax

Sizes = Sequence[int]


class Layout:
    """How a float weight becomes the parts of a format: a matrix `[N, K]` as it is."""

    def matrix(self, sizes: Sizes) -> tuple[int, int]:
        """Rows and columns of a matrix as the format meets it."""
        rows, columns = sizes
        return rows, columns

    def shape(self, part: Part, sizes: Sizes) -> tuple[int, ...]:
        """The shape of a part of a weight of these sizes."""
        return part.shape(*self.matrix(sizes))

    def empty(self, part: Part, sizes: Sizes, device: torch.device | str | None) -> torch.Tensor:
        """Room for a part."""
        return torch.empty(self.shape(part, sizes), dtype=part.dtype, device=device)

    def quantize(self, weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, ...]:
        """The parts of a float weight."""
        return _by_rows(self, weight, scheme)

    def dequantize(
        self, parts: Sequence[torch.Tensor], dtype: torch.dtype, scheme: str
    ) -> torch.Tensor:
        """The float weight that the parts stand for."""
        return dequantize(parts, dtype=dtype, scheme=scheme)

    def to_disk(
        self, form: Format, parts: Sequence[torch.Tensor], sizes: Sizes
    ) -> tuple[torch.Tensor, ...]:
        """The tensors of `form.on_disk`."""
        return form.to_disk(parts, self.matrix(sizes))

    def from_disk(
        self, form: Format, tensors: Mapping[str, torch.Tensor], sizes: Sizes
    ) -> dict[str, torch.Tensor]:
        """Those of the parts, by suffix, that tensors of a file are or hold."""
        return form.from_disk(tensors, self.matrix(sizes))


# Elements that are quantised at once, of a weight in a CPU's memory.
_PIECE = 1 << 15


def _by_rows(layout: Layout, weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, ...]:
    """`quantize`, a few rows at a time: what it needs on the way is not several times the weight
    then, which an allocator may keep.
    """
    form = get_scheme(scheme).weight
    plain = type(weight) is torch.Tensor and weight.device.type == "cpu" and not form.stochastic
    if not plain or weight.numel() <= _PIECE or torch.compiler.is_compiling():
        return quantize(weight, scheme)
    least = form.block[0] if form.tall and form.block else 1  # rows that share scales
    count = weight.shape[0]
    step = max(1, _PIECE * count // weight.numel() // least) * least
    pieces = [weight[start : start + step] for start in range(0, count, step)]
    amax = None
    if any(part.axes == "1" for part in form.parts):
        amax = torch.stack([finite_amax(piece) for piece in pieces]).amax().view(1, 1)
    parts = [layout.empty(part, weight.shape, weight.device) for part in form.parts]
    for i, piece in enumerate(pieces):
        made = (
            quantize(piece, scheme)
            if amax is None
            else form.quantize_beside(piece, amax.expand(len(piece), 1))
        )
        for part, held, values in zip(form.parts, parts, made, strict=True):
            if part.axes == "1":
                held.copy_(values.flatten()[:1])
            else:
                start = i * step // (least if part.axes.startswith("r/") else 1)
                held[start : start + len(values)] = values
    return tuple(parts)


class Filters(Layout):
    """Filters `[N, …]`: a row for each, of all its elements. Codes have the shape of the weight, in
    memory whose last axis is the second (channels last), and scales `[N, 1, …]`. For formats with a
    scale per-channel and one code an element.
    """

    def matrix(self, sizes: Sizes) -> tuple[int, int]:
        return sizes[0], math.prod(sizes[1:])

    def shape(self, part: Part, sizes: Sizes) -> tuple[int, ...]:
        rows, columns = super().shape(part, sizes)
        return tuple(sizes) if columns != 1 or math.prod(sizes[1:]) == 1 else _ones(rows, sizes)

    def empty(self, part: Part, sizes: Sizes, device: torch.device | str | None) -> torch.Tensor:
        return channels_last(super().empty(part, sizes, device))

    def quantize(self, weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, ...]:
        values, *scales = quantize(weight.flatten(1), scheme)
        return (
            channels_last(values.view(weight.shape)),
            *(scale.view(_ones(scale.shape[0], weight.shape)) for scale in scales),
        )

    def dequantize(
        self, parts: Sequence[torch.Tensor], dtype: torch.dtype, scheme: str
    ) -> torch.Tensor:
        sizes = parts[0].shape
        return dequantize([part.flatten(1) for part in parts], dtype=dtype, scheme=scheme).view(
            sizes
        )

    def to_disk(
        self, form: Format, parts: Sequence[torch.Tensor], sizes: Sizes
    ) -> tuple[torch.Tensor, ...]:
        # Files of safetensors have no strides.
        return tuple(part.contiguous() for part in super().to_disk(form, parts, sizes))

    def from_disk(
        self, form: Format, tensors: Mapping[str, torch.Tensor], sizes: Sizes
    ) -> dict[str, torch.Tensor]:
        parts = super().from_disk(form, tensors, sizes)
        return {key: channels_last(part) if part.dim() > 1 else part for key, part in parts.items()}


class TransposedFilters(Filters):
    """Filters of a transposed convolution, `[C, N / groups, …]`: the rows are those of the outputs
    `N`, and codes lie in memory with `C` as the last axis.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def matrix(self, sizes: Sizes) -> tuple[int, int]:
        rows = sizes[1] * self.groups
        return rows, math.prod(sizes) // rows if rows else 0

    def shape(self, part: Part, sizes: Sizes) -> tuple[int, ...]:
        rows, _ = self.matrix(sizes)
        return _ones(rows, sizes) if part.is_scale else tuple(sizes)

    def empty(self, part: Part, sizes: Sizes, device: torch.device | str | None) -> torch.Tensor:
        return _first_last(Layout.empty(self, part, sizes, device))

    def quantize(self, weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, ...]:
        rows = self._swapped(weight)
        values, *scales = quantize(rows.flatten(1), scheme)
        return (
            _first_last(self._swapped(values.view(rows.shape))),
            *(scale.view(_ones(scale.shape[0], weight.shape)) for scale in scales),
        )

    def dequantize(
        self, parts: Sequence[torch.Tensor], dtype: torch.dtype, scheme: str
    ) -> torch.Tensor:
        rows = self._swapped(parts[0])
        flat = [rows.flatten(1), *(scale.flatten(1) for scale in parts[1:])]
        return self._swapped(dequantize(flat, dtype=dtype, scheme=scheme).view(rows.shape))

    def from_disk(
        self, form: Format, tensors: Mapping[str, torch.Tensor], sizes: Sizes
    ) -> dict[str, torch.Tensor]:
        parts = Layout.from_disk(self, form, tensors, sizes)
        return {key: _first_last(part) if part.dim() > 1 else part for key, part in parts.items()}

    def _swapped(self, weight: torch.Tensor) -> torch.Tensor:
        """`[N, C / groups, …]` for `[C, N / groups, …]`; the swap is its own inverse."""
        groups = self.groups
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return split.transpose(1, 2).flatten(0, 1)


class Stack(Layout):
    """Matrices `[E, N, K]`, each stored by itself: every part has an axis `E` in front."""

    def matrix(self, sizes: Sizes) -> tuple[int, int]:
        _, rows, columns = sizes
        return rows, columns

    def shape(self, part: Part, sizes: Sizes) -> tuple[int, ...]:
        return (sizes[0], *super().shape(part, sizes))

    def quantize(self, weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, ...]:
        if get_scheme(scheme).weight.rowwise:
            return _by_rows(self, weight, scheme)
        return _stacked([quantize(each, scheme) for each in weight])

    def dequantize(
        self, parts: Sequence[torch.Tensor], dtype: torch.dtype, scheme: str
    ) -> torch.Tensor:
        if get_scheme(scheme).weight.rowwise:
            return dequantize(parts, dtype=dtype, scheme=scheme)
        each = zip(*(part.unbind() for part in parts), strict=True)
        return torch.stack([dequantize(one, dtype=dtype, scheme=scheme) for one in each])

    def to_disk(
        self, form: Format, parts: Sequence[torch.Tensor], sizes: Sizes
    ) -> tuple[torch.Tensor, ...]:
        if form.on_disk == form.parts:
            return tuple(parts)
        each = zip(*(part.unbind() for part in parts), strict=True)
        return _stacked([form.to_disk(one, self.matrix(sizes)) for one in each])

    def from_disk(
        self, form: Format, tensors: Mapping[str, torch.Tensor], sizes: Sizes
    ) -> dict[str, torch.Tensor]:
        if form.on_disk == form.parts:
            return dict(tensors)
        matrix = self.matrix(sizes)
        each = [
            form.from_disk({key: tensor[i] for key, tensor in tensors.items()}, matrix)
            for i in range(sizes[0])
        ]
        return {key: torch.stack([one[key] for one in each]) for key in each[0]}


def channels_last(weight: torch.Tensor) -> torch.Tensor:
    """The same weight `[N, C, …]`, with `C` the last axis of its memory."""
    return weight.movedim(1, -1).contiguous().movedim(-1, 1)


def _first_last(weight: torch.Tensor) -> torch.Tensor:
    """The same weight, with its first axis the last of its memory."""
    return weight.movedim(0, -1).contiguous().movedim(-1, 0)


def _ones(rows: int, sizes: Sizes) -> tuple[int, ...]:
    return (rows, *[1] * (len(sizes) - 1))


def _stacked(each: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


MATRIX, FILTERS, STACK = Layout(), Filters(), Stack()
