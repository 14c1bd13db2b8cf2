"""`ObservedConv1d` to `ObservedConvTranspose3d`: float layers on their way to `int8_static`."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import nn

from qnn.calibration.fake_quantize import FakeQuantize, rounds
from qnn.calibration.spec import QuantSpec
from qnn.nn.base import Quantized
from qnn.nn.conv.geometry import geometry, layout_of, plain_class, require_conv
from qnn.nn.linear.observed import fake_quantize_weight, input_point
from qnn.nn.values import of_other_kind

ConvT = TypeVar("ConvT", bound="ObservedConv")


class ObservedConv(nn.Module):
    """What the observed convolutions share; `ObservedConv2d` says what they are."""

    input_quantize: FakeQuantize
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        *sizes: Any,
        spec: QuantSpec | None = None,
        qat: bool = False,
        name: str = "",
        **more: Any,
    ) -> None:
        super().__init__(*sizes, **more)
        self.qat = qat
        self.input_quantize = input_point(spec, qat, name).to(self.weight.device)

    @classmethod
    def from_float(
        cls: type[ConvT],
        conv: Any,
        spec: QuantSpec | None = None,
        qat: bool = False,
        *,
        name: str = "",
    ) -> ConvT:
        """An observed layer around the parameters of `conv` themselves, in its mode.

        Raises:
            TypeError: `conv` is not torch's float layer of this class, or has no sizes yet.
            ValueError: a spec that the quantised layer has no form for.
        """
        require_conv(f"qnn.{cls.__name__}.from_float", conv, plain_class(cls), Quantized)
        options = {"bias": False, "device": "meta", "dtype": conv.weight.dtype}
        layer = cls(**geometry(conv), **options, spec=spec, qat=qat, name=name)
        layer.input_quantize = input_point(spec, qat, name).to(conv.weight.device)
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        if type(input) is not torch.Tensor and (y := of_other_kind(self, input)) is not None:
            return cast(torch.Tensor, y)
        own: Any = self
        weight = fake_quantize_weight(self.weight, layout_of(self)) if rounds(self) else self.weight
        x = self.input_quantize(input)
        if not own.transposed:
            return cast(torch.Tensor, own._conv_forward(x, weight, self.bias))
        axes = len(own.kernel_size)
        more = own._output_padding(
            x, output_size, own.stride, own.padding, own.kernel_size, axes, own.dilation
        )
        convolve: Any = getattr(nn.functional, f"conv_transpose{axes}d")
        sizes = own.stride, own.padding, more, own.groups, own.dilation
        return cast(torch.Tensor, convolve(x, weight, self.bias, *sizes))

    def extra_repr(self) -> str:
        return f"{cast(Any, super()).extra_repr()}, qat={self.qat}"


class ObservedConv1d(ObservedConv, nn.Conv1d):  # type: ignore[misc]
    """As `ObservedConv2d`, of `nn.Conv1d`, for `QConv1d`."""


class ObservedConv2d(ObservedConv, nn.Conv2d):  # type: ignore[misc]
    """An `nn.Conv2d` that records the range of its input, for `QConv2d(scheme="int8_static")`.

    Without `qat` it computes what `nn.Conv2d` computes. With `qat` it trains for the quantised
    layer: input and weight are fake-quantised, the weight exactly as the layer will store it (int8,
    per-channel scales from the filters' largest magnitudes), with gradients straight through.

    Its state dict is that of `nn.Conv2d` and, under `input_quantize.`, the statistics.

    Args:
        in_channels, …, device, dtype: as in `nn.Conv2d`.
        spec, qat, name: as in `ObservedLinear`.

    >>> layer = ObservedConv2d.from_float(nn.Conv2d(3, 8, 3))
    >>> layer(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 8, 6, 6])
    """


class ObservedConv3d(ObservedConv, nn.Conv3d):  # type: ignore[misc]
    """As `ObservedConv2d`, of `nn.Conv3d`, for `QConv3d`."""


class ObservedConvTranspose1d(ObservedConv, nn.ConvTranspose1d):  # type: ignore[misc]
    """As `ObservedConv2d`, of `nn.ConvTranspose1d`, for `QConvTranspose1d`."""


class ObservedConvTranspose2d(ObservedConv, nn.ConvTranspose2d):  # type: ignore[misc]
    """As `ObservedConv2d`, of `nn.ConvTranspose2d`, for `QConvTranspose2d`."""


class ObservedConvTranspose3d(ObservedConv, nn.ConvTranspose3d):  # type: ignore[misc]
    """As `ObservedConv2d`, of `nn.ConvTranspose3d`, for `QConvTranspose3d`."""
