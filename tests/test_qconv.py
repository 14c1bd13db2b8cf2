"""The quantised convolutions as modules: values and construction."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

from .common import DTYPES

SCHEMES = ("int8", "int8_static", "int8_weight")
# Every argument of torch's layers, and the sizes of an input after its batch.
CASES: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "1d": (nn.Conv1d, (6, 8, 3), {}, (6, 11)),
    "1d causal": (nn.Conv1d, (6, 6, 4), {"padding": 6, "dilation": 2, "groups": 6}, (6, 5)),
    "1d same": (nn.Conv1d, (6, 8, 4), {"padding": "same"}, (6, 9)),
    "2d": (nn.Conv2d, (3, 8, 3), {"stride": 2, "padding": 1}, (3, 9, 10)),
    "2d pointwise": (nn.Conv2d, (6, 4, 1), {"bias": False}, (6, 5, 7)),
    "2d depthwise": (nn.Conv2d, (6, 12, (3, 5)), {"groups": 6, "padding": (1, 2)}, (6, 7, 7)),
    "2d valid": (nn.Conv2d, (4, 6, 3), {"padding": "valid", "groups": 2}, (4, 5, 6)),
    "2d reflect": (nn.Conv2d, (4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (4, 5, 6)),
    "2d circular": (
        nn.Conv2d, (4, 6, (2, 3)), {"padding": "same", "padding_mode": "circular"}, (4, 5, 6),
    ),
    "2d replicate": (
        nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "replicate", "stride": 2}, (4, 5, 6),
    ),
    "3d": (nn.Conv3d, (3, 4, (1, 2, 3)), {"padding": (0, 1, 1), "stride": (1, 2, 1)}, (3, 4, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d, (6, 8, 4), {"stride": 2, "padding": 1}, (6, 7)),
    "transposed 2d": (
        nn.ConvTranspose2d, (6, 8, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, (6, 4, 5),
    ),
    "transposed 2d depthwise": (
        nn.ConvTranspose2d, (6, 6, 3), {"dilation": 2, "groups": 6, "bias": False}, (6, 4, 5),
    ),
    "transposed 3d": (nn.ConvTranspose3d, (4, 2, 2), {"stride": 2}, (4, 2, 3, 2)),
}  # fmt: skip
NAMES = [(name,) for name in CASES]


def plain(case: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind, sizes, options, _ = CASES[case]
    return kind(*sizes, **options, **more).eval()


def image(case: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *CASES[case][-1], generator=torch.Generator().manual_seed(1))


def converted(layer: nn.Module, scheme: str, x: torch.Tensor) -> Any:
    if scheme != "int8_static":
        return qnn.convert(layer, scheme)
    return qnn.convert(qnn.calibrate(qnn.prepare(layer), [x], progress=False))


class TestLayer:
    @parameterized.expand([(name, scheme) for name in CASES for scheme in SCHEMES])
    def test_is_torchs_layer_up_to_rounding(self, case: str, scheme: str) -> None:
        layer, x = plain(case), image(case)
        small = converted(layer, scheme, x)
        assert type(small).__name__ == "Q" + type(layer).__name__
        assert isinstance(small, type(layer))
        want, got = layer(x), small(x)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert qnn.sqnr(want, got) > 33
        # Exactly the dequantised layer, where no activation is rounded.
        if scheme == "int8_weight":
            torch.testing.assert_close(small.dequantize()(x), got, rtol=1e-5, atol=1e-5)
        assert torch.equal(small(x[0]), small(x[:1])[0])
        assert small(x[:0]).shape == (0, *want.shape[1:])

    @parameterized.expand(NAMES)
    def test_state(self, case: str) -> None:
        layer, x = plain(case), image(case)
        small = converted(layer, "int8_static", x)
        out, axes = layer.out_channels, layer.weight.dim()
        state = {k: (v.dtype, tuple(v.shape)) for k, v in small.state_dict().items()}
        assert state == {
            "weight": (torch.int8, tuple(layer.weight.shape)),
            "weight_scale": (torch.float32, (out, *[1] * (axes - 1))),
            "input_scale": (torch.float32, (1,)),
            "input_zero_point": (torch.int8, (1,)),
        } | ({} if layer.bias is None else {"bias": (torch.float32, (out,))})
        # The input channels are the last axis in memory, or the groups' of a transposed layer.
        inner = 0 if layer.transposed else 1
        assert layer.weight.shape[inner] == 1 or small.stored[0].stride(inner) == 1
        assert torch.equal(small.weight, small.dequantize().weight)
        assert qnn.sqnr(layer.weight, small.weight) > 40

    def test_scales_are_those_of_the_outputs(self) -> None:
        """Each output channel's largest weight has the code 127, also of a transposed layer."""
        layer = plain("transposed 2d")
        by_output = layer.weight.view(2, 3, 4, 3, 3).abs().amax((1, 3, 4)).flatten()
        small = qnn.QConvTranspose2d.from_float(layer)
        torch.testing.assert_close(small.weight_scale.flatten(), by_output.detach() / 127)

    @parameterized.expand([(name, dtype) for name in ("2d", "transposed 1d") for dtype in DTYPES])
    def test_dtypes(self, case: str, dtype: torch.dtype) -> None:
        layer, x = plain(case).to(dtype), image(case).to(dtype)
        for scheme in SCHEMES:
            small = converted(layer, scheme, x)
            assert small(x).dtype == dtype
            assert qnn.sqnr(layer(x), small(x)) > 30
            half = copy.deepcopy(small).half()
            assert half.weight_scale.dtype == torch.float32
            assert half.stored[0].dtype == torch.int8
            assert half.weight.dtype == torch.float16
            assert half(x.half()).dtype == torch.float16

    def test_memory_format(self) -> None:
        small, x = qnn.QConv2d.from_float(plain("2d")), image("2d")
        last = x.to(memory_format=torch.channels_last)
        assert small(x).is_contiguous()
        assert small(last).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(small(x), small(last))
        moved = small.to(memory_format=torch.channels_last)
        assert torch.equal(moved(x), small(x))

    def test_output_size(self) -> None:
        layer = nn.ConvTranspose2d(4, 6, 3, stride=3)
        small, x = qnn.QConvTranspose2d.from_float(layer, "int8_weight"), torch.randn(2, 4, 5, 5)
        for size in ([15, 16], (2, 6, 17, 15)):
            want = layer(x, output_size=size)
            torch.testing.assert_close(small(x, size), small.dequantize()(x, size))
            assert small(x, output_size=size).shape == want.shape
        with pytest.raises(ValueError, match="requested an output size"):
            small(x, [2, 2])

    def test_padding_is_exactly_zero(self) -> None:
        """On a grid whose zero is not code 0, and next to values that fill it."""
        layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        layer.weight.data.fill_(1.0)
        x = torch.full((1, 1, 4, 4), 8.0)
        small = converted(layer, "int8_static", torch.cat([x, x * 0 - 1.5]))
        assert int(small.input_zero_point) != 0
        torch.testing.assert_close(small(x), layer(x), rtol=1e-2, atol=0.1)

    def test_a_scale_for_each_sample(self) -> None:
        small, x = qnn.QConv2d.from_float(plain("2d")), image("2d")
        both = torch.cat([x, x * 1000])
        assert torch.equal(small(both)[:2], small(x))

    def test_not_finite(self) -> None:
        x = image("2d", 3)
        x[1, 0, 2, 2] = torch.inf
        for scheme in ("int8", "int8_static"):
            y = converted(plain("2d"), scheme, image("2d"))(x)
            assert not y[1].isfinite().any()
            assert bool(y[[0, 2]].isfinite().all())


class TestConstruction:
    @parameterized.expand([(name, scheme) for name in CASES for scheme in ("int8", "int8_static")])
    def test_torchs_arguments_and_draws(self, case: str, scheme: str) -> None:
        kind, sizes, options, _ = CASES[case]
        made: Any = getattr(qnn, "Q" + kind.__name__)
        torch.manual_seed(0)
        layer = made(*sizes, **options, scheme=scheme)
        twin = made.from_float(plain(case), scheme)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, twin.state_dict()[name]), name
        names = {n: getattr(qnn, n) for n in dir(qnn) if n.startswith("Q")}
        again = eval(repr(layer).split("  #")[0].replace(", not calibrated", ""), names)  # noqa: S307
        assert repr(again) == repr(layer)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in layer.state_dict().items()
        }

    def test_torchs_positional_arguments(self) -> None:
        args = (4, 6, 3, 2, 1, 1, 2, False, "zeros", "cpu", torch.bfloat16)
        assert qnn.QConv2d(*args).extra_repr() == (
            "4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False, "
            "dtype=torch.bfloat16, scheme='int8'"
        )
        up = qnn.QConvTranspose1d(4, 6, 3, 2, 1, 1, 2, False, 1, "zeros", "cpu", torch.bfloat16)
        assert "output_padding=(1,), groups=2, bias=False" in repr(up)

    @parameterized.expand(
        [
            ((4, 6, 3), {"scheme": "fp8"}, ValueError, "'fp8' has no convolution; use .*'int8_we"),
            ((4, 6, 3), {"scheme": "int9"}, ValueError, "known schemes"),
            ((4, 6, 3), {"groups": 3}, ValueError, "divisible by groups"),
            ((4, 6, 3), {"dtype": torch.int8}, TypeError, "dtype must be one of torch.float32"),
            ((4, 6, 0), {}, ValueError, "at least 1"),
            ((4, 6, 3), {"padding": "full"}, ValueError, "padding"),
            ((4, 6, 3), {"stride": 2, "padding": "same"}, ValueError, "same"),
            ((4, 6, 3), {"bais": True}, TypeError, "bais"),
            ((20000, 1, 3), {"device": "meta"}, ValueError, "at most 132104 products.*= 180000"),
        ]
    )
    def test_bad_arguments(self, sizes: Any, options: Any, kind: Any, message: str) -> None:
        with pytest.raises(kind, match=message):
            qnn.QConv2d(*sizes, **options)

    def test_from_float_refuses(self) -> None:
        with pytest.raises(TypeError, match=r"QConv2d.from_float takes an nn.Conv2d, got Conv1d"):
            qnn.QConv2d.from_float(nn.Conv1d(1, 1, 1))
        with pytest.raises(TypeError, match="got QConv2d"):
            qnn.QConv2d.from_float(qnn.QConv2d(1, 1, 1))
        with pytest.raises(TypeError, match=r"LazyConv2d is not initialised.*run one batch first"):
            qnn.QConv2d.from_float(nn.LazyConv2d(4, 3))
        with pytest.raises(
            TypeError, match=r"from_observed takes a qnn.ObservedConv2d, got Conv2d"
        ):
            qnn.QConv2d.from_observed(nn.Conv2d(1, 1, 1))
        bad = nn.ConvTranspose2d(2, 4, 3)
        bad.weight.data[1, 2] = torch.nan
        with pytest.raises(ValueError, match="weight holds NaN or inf"):
            qnn.QConvTranspose2d.from_float(bad)

    @parameterized.expand(
        [
            (
                torch.randn(2, 4, 9, 9),
                ValueError,
                r"must be \[batch, 3, h, w\] or \[3, h, w\], got",
            ),
            (torch.randn(3, 9), ValueError, r"got \(3, 9\)"),
            (torch.ones(2, 3, 9, 9, dtype=torch.int64), TypeError, r"got torch.int64.*\.float\(\)"),
            (torch.ones(2, 3, 9, 9, device="meta"), ValueError, "on meta, the layer on cpu"),
            (torch.randn(2, 3, 9, 9).to_sparse(), TypeError, r"sparse .*\.to_dense\(\)"),
            ([1], TypeError, "the input must be a tensor, got list"),
            (torch.nested.nested_tensor([torch.randn(3, 9, 9)]), TypeError, "to_padded_tensor"),
        ]
    )
    def test_bad_input(self, x: Any, kind: Any, message: str) -> None:
        with pytest.raises(kind, match=f"qnn.QConv2d.*{message}"):
            qnn.QConv2d(3, 4, 3)(x)

    def test_a_kernel_larger_than_the_image(self) -> None:
        with pytest.raises(ValueError, match="larger image"):
            qnn.QConv2d(3, 4, 5)(torch.randn(1, 3, 4, 4))
