"""`ObservedLinear`: a float `nn.Linear` on its way to `int8_static` or `int16_static`."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import nn

from qnn.calibration import smoothing
from qnn.calibration.doubts import many_lost
from qnn.calibration.fake_quantize import FakeQuantize, rounds
from qnn.calibration.parts import Specs
from qnn.calibration.spec import QuantSpec
from qnn.functional.layout import MATRIX, Layout
from qnn.kernels.schemes import STATIC
from qnn.nn.values import of_other_kind

# By scheme, of calibration and of training. In 8 bits the clipping that errs least, from a
# histogram; in training the range has to be cheap and to follow the weights.
_DEFAULTS = {
    "int8_static": (
        QuantSpec(torch.int8, observer="histogram"),
        QuantSpec(torch.int8, observer="moving_average"),
    ),
    "int16_static": (
        QuantSpec(torch.int16, symmetric=True),
        QuantSpec(torch.int16, symmetric=True, observer="moving_average"),
    ),
}


# Observers whose range is that of all values, or what serves these best.
_WHOLE = ("minmax", "histogram")


def default_spec(scheme: str, qat: bool) -> QuantSpec:
    """The spec of a layer's input where none is given."""
    return _DEFAULTS[scheme][qat]


class ObservedLinear(nn.Linear):
    """An `nn.Linear` that records the range of its input, for `QLinear(scheme="int8_static")`, or
    `"int16_static"` with a spec of 16 bits.

    Without `qat` it computes what `nn.Linear` computes. With `qat` it trains for the quantised
    layer: input and weight are fake-quantised, the weight exactly as the layer will store it (int8,
    per-channel scales from the rows' largest magnitudes), with gradients straight through:

        y = input_quantize(x) · fq(weight)ᵀ + bias

    Its state dict is that of `nn.Linear` and, under `input_quantize.`, the statistics.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        spec: of the input, int8 or uint8 over the whole range or symmetric int16, per-tensor;
            `QuantSpec(torch.int8, observer="histogram")` if None, `"moving_average"` with `qat`.
        qat: whether to fake-quantise.
        name: of the layer, for errors.
        smooth: let `QLinear.from_observed` smooth the layer where that helps, as `qnn.prepare`
            says; of calibration alone, for an input of 8 bits.

    Raises:
        ValueError: a spec that the quantised layer has no form for.

    >>> layer = ObservedLinear.from_float(nn.Linear(64, 8))
    >>> layer(torch.randn(2, 64)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spec: QuantSpec | None = None,
        qat: bool = False,
        name: str = "",
        smooth: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.qat = qat
        self.input_quantize = input_point(spec, qat, name).to(self.weight.device)
        observer = self.input_quantize.observer
        able = observer is not None and not qat and self.input_quantize.spec.dtype != torch.int16
        self.smooth = smooth and able
        if observer is not None and self.smooth:
            observer.watch_columns(in_features)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        spec: QuantSpec | None = None,
        qat: bool = False,
        *,
        name: str = "",
        smooth: bool = False,
    ) -> ObservedLinear:
        """An observed layer around the parameters of `linear` themselves, in its mode.

        Raises:
            TypeError: `linear` is not a plain `nn.Linear`.
            ValueError: a spec that the constructor refuses.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"qnn.ObservedLinear.from_float takes an nn.Linear, got {type(linear).__name__}."
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            False,
            device="meta",
            dtype=linear.weight.dtype,
            spec=spec,
            qat=qat,
            name=name,
            smooth=smooth,
        )
        columns = layer.input_quantize.columns is not None
        layer.input_quantize = FakeQuantize(
            layer.input_quantize.spec, name=layer.input_quantize.name, qat=qat
        ).to(linear.weight.device)
        if columns and layer.input_quantize.observer is not None:
            layer.input_quantize.observer.watch_columns(linear.in_features)
        layer.weight = linear.weight
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if type(input) is not torch.Tensor and (y := of_other_kind(self, input)) is not None:
            return cast(torch.Tensor, y)
        weight = fake_quantize_weight(self.weight) if rounds(self) else self.weight
        return nn.functional.linear(self.input_quantize(input), weight, self.bias)

    def factors(self) -> torch.Tensor | None:
        """What the columns of the input are to be multiplied with before they are quantised,
        float32 `[in_features]`; None where it would not help.
        """
        point = self.input_quantize
        columns, spec = point.columns, point.spec
        if not self.smooth or columns is None or spec.observer not in _WHOLE or spec.limit:
            return None
        # What is small in every column stays so, and the doubts say it of the plain grid.
        if many_lost(point):
            return None
        return smoothing.factors(self._rows(), columns, spec)

    def _rows(self) -> torch.Tensor:
        return self.weight.detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, qat={self.qat}"


def input_point(spec: QuantSpec | None, qat: bool, name: str) -> FakeQuantize:
    """The point that observes the input of the layer called `name`."""
    spec = _accepted(spec or default_spec(STATIC, qat))
    return FakeQuantize(spec, name=f"{name}.input" if name else "input", qat=qat)


def fake_quantize_weight(weight: torch.Tensor, layout: Layout = MATRIX) -> torch.Tensor:
    """The weight as the int8 schemes will store it, in its own dtype; the gradient is that of the
    identity.
    """
    with torch.no_grad():
        stored = layout.dequantize(layout.quantize(weight, STATIC), weight.dtype, STATIC)
    # Minus a zero, and not `weight + (stored - weight)`, which would round.
    return stored - (weight.detach() - weight)


def spec_of_input(parts: Specs | None) -> QuantSpec | None:
    """The spec that `parts` has for a linear layer: that of the last key that matches `"input"`.

    Raises:
        ValueError: None, or a spec that the quantised layer has no form for.
    """
    given = [spec for pattern, spec in (parts or {}).items() if fnmatchcase("input", pattern)]
    if not given:
        return None
    if given[-1] is None:
        raise ValueError(
            "qnn.ObservedLinear: 'input' enters an integer product, so its dtype must be "
            "torch.uint8, torch.int8 or torch.int16; got None. Exclude the layer to leave it in "
            "float."
        )
    return _accepted(given[-1])


def training_spec(spec: QuantSpec) -> QuantSpec:
    """The spec with which an input that was calibrated with `spec` is trained: the default of
    training, after the default of calibration.
    """
    return dict(_DEFAULTS.values()).get(spec, spec)


def _accepted(spec: QuantSpec) -> QuantSpec:
    """`spec`, over all integers that the layer clamps to."""
    who = "qnn.ObservedLinear"
    if spec.dtype not in (torch.int8, torch.uint8, torch.int16):
        raise ValueError(f"{who}: the input's spec must be int8, uint8 or int16, got {spec.dtype}.")
    if spec.channel_axis is not None:
        raise ValueError(f"{who}: the input has one scale; the spec's channel_axis must be None.")
    if spec.dtype == torch.int16:
        if not spec.symmetric or spec.qmin != -spec.qmax:
            raise ValueError(
                f"{who}: an input of 16 bits has no zero point; its spec must be "
                f"QuantSpec(torch.int16, symmetric=True), got {spec}."
            )
        if spec.qmax == torch.iinfo(torch.int16).max:
            return spec
    info = torch.iinfo(spec.dtype)
    least = info.min + 1 if spec.symmetric and info.min < 0 else info.min
    if spec.qmin not in (info.min, least) or spec.qmax != info.max:
        raise ValueError(
            f"{who}: the layer uses all of {info.min} … {info.max}, got a spec of "
            f"{spec.qmin} … {spec.qmax}; leave qmin and qmax out."
        )
    return spec if spec.qmin == info.min else replace(spec, qmin=info.min)


def grid(point: FakeQuantize, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Scale and zero point of a layer's input, float32 and int8 `[1]`; of 16 bits the scale. With
    `factors` those of the input's columns times these.
    """
    scale, zero_point = point.qparams()
    if factors is not None and point.columns is not None:
        low, high = (end.float() for end in smoothing.ends(point.columns, factors))
        scale, zero_point = point.spec.qparams(low[None], high[None])
    if point.spec.dtype == torch.int16:
        return (scale.detach().clone(),)
    if point.spec.dtype == torch.uint8:
        zero_point = zero_point - 128
    return scale.detach().clone(), zero_point.to(torch.int8)


__all__ = [
    "ObservedLinear",
    "default_spec",
    "fake_quantize_weight",
    "grid",
    "input_point",
    "spec_of_input",
    "training_spec",
]
