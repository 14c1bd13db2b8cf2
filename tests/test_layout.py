"""Weights of more axes than a matrix has, in the formats of matrices."""

from __future__ import annotations

import pytest
import torch
from parameterized import parameterized

from qnn.functional import quantize
from qnn.functional.layout import FILTERS, MATRIX, STACK, channels_last
from qnn.kernels import SCHEMES, get_scheme

FORMATS = {scheme.weight.key: scheme.name for scheme in SCHEMES.values()}


def same(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    """Equal bits, in memory of the same order."""
    return all(
        a.shape == b.shape
        and a.stride() == b.stride()
        and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())
        for a, b in zip(left, right, strict=True)
    )


class TestMatrices:
    @parameterized.expand(FORMATS.items())
    def test_some_rows_at_a_time(self, _: str, scheme: str) -> None:
        """The bits of one call, where rows share a scale too, and where the last piece is short."""
        for rows in (3, 517):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                weight = (torch.randn(rows, 384) * torch.rand(rows, 1) ** 4).to(dtype)
                weight[1] = 0
                weight = weight.repeat(1, 1 if rows > 3 else 128)
                if get_scheme(scheme).why_not_linear(weight.shape[1], rows) is None:
                    assert weight.numel() > 1 << 16
                    assert same(MATRIX.quantize(weight, scheme), quantize(weight, scheme))


class TestFilters:
    @parameterized.expand([((5, 3, 7),), ((5, 3, 4, 2),), ((5, 3, 2, 1, 3),), ((5, 1, 1, 1),)])
    def test_a_scale_for_each_filter(self, sizes: tuple[int, ...]) -> None:
        weight = torch.randn(sizes)
        form, scheme = get_scheme("int8").weight, "int8"
        q, scale = parts = FILTERS.quantize(weight, scheme)
        assert q.shape == sizes
        assert scale.shape == (5, *[1] * (len(sizes) - 1))
        assert q.movedim(1, -1).is_contiguous()
        assert torch.equal(scale.flatten(), weight.abs().flatten(1).amax(1) / 127)
        for part, made in zip(form.parts, parts, strict=True):
            empty = FILTERS.empty(part, sizes, "cpu")
            assert (empty.shape, empty.stride(), empty.dtype) == (
                made.shape,
                made.stride(),
                made.dtype,
            )
        back = FILTERS.dequantize(parts, torch.float32, scheme)
        assert torch.equal(back, q * scale)
        on_disk = FILTERS.to_disk(form, parts, sizes)
        assert all(part.is_contiguous() for part in on_disk)
        suffixes = [part.suffix for part in form.on_disk]
        read = FILTERS.from_disk(form, dict(zip(suffixes, on_disk, strict=True)), sizes)
        assert same(tuple(read.values()), parts)

    def test_channels_last(self) -> None:
        weight = torch.randn(4, 3, 2, 5)
        assert channels_last(weight).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(channels_last(weight), weight)


class TestStacks:
    @parameterized.expand(FORMATS.items())
    def test_each_matrix_by_itself(self, _: str, scheme: str) -> None:
        form, sizes = get_scheme(scheme).weight, (3, 128, 256)
        weight = torch.randn(sizes) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
        parts = STACK.quantize(weight, scheme)
        assert [part.shape for part in parts] == [STACK.shape(p, sizes) for p in form.parts]
        back = STACK.dequantize(parts, torch.float32, scheme)
        assert back.shape == sizes
        for one, whole in zip(back, weight, strict=True):
            assert (one - whole).norm() < 0.2 * whole.norm()
        suffixes = [part.suffix for part in form.on_disk]
        on_disk = STACK.to_disk(form, parts, sizes)
        assert [part.shape for part in on_disk] == [STACK.shape(p, sizes) for p in form.on_disk]
        read = STACK.from_disk(form, dict(zip(suffixes, on_disk, strict=True)), sizes)
        assert same(tuple(read.values()), parts)

    def test_a_file_of_other_sizes(self) -> None:
        scheme = "int4_weight"
        form = get_scheme(scheme).weight
        parts = STACK.quantize(torch.randn(2, 128, 256), scheme)
        on_disk = STACK.to_disk(form, parts, (2, 128, 256))
        named = dict(zip([part.suffix for part in form.on_disk], on_disk, strict=True))
        with pytest.raises(ValueError, match=r"a weight of \[128, 256\], the layer \[128, 512\]"):
            STACK.from_disk(form, named, (2, 128, 512))
