"""`ObservedExperts`: the fused experts of a mixture in float, on their way to `int8_static`."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from qnn.calibration.fake_quantize import FakeQuantize, rounds
from qnn.calibration.spec import QuantSpec
from qnn.functional.grouped import float_grouped_linear, without_rest
from qnn.functional.layout import STACK
from qnn.nn.grouped.routed import Routed, input_points
from qnn.nn.linear.observed import fake_quantize_weight, input_point


class ObservedExperts(Routed):
    """A module of fused experts, such as transformers' `MixtralExperts`, that records what enters
    its two products, for `QExperts` in `int8_static`, or `int16_static` with a spec of 16 bits: a
    range for each product, which all experts share.

    It computes what the float module computes, to rounding; with `qat` both inputs and weights are
    fake-quantised, as `ObservedLinear` does. Its parameters are those of the float module, and its
    state dict has, under `gate_up_proj_input_quantize.` and `down_proj_input_quantize.`, the
    statistics. `qnn.prepare` makes it, for the classes that `qnn.register_adapter` knows.

    Shape:
        as of `QExperts`.
    """

    def __init__(
        self,
        like: nn.Module,
        spec: QuantSpec | None = None,
        qat: bool = False,
        *,
        name: str = "",
    ) -> None:
        super().__init__()
        self._is_like(like)
        self.qat = qat
        for key in (*self.adapter.weights, *self.adapter.biases):
            self._parameters[key] = like._parameters[key]
        for weight, key in zip(self.adapter.weights, input_points(self.adapter), strict=True):
            point = input_point(spec, qat, f"{name}.{weight}" if name else weight)
            self._modules[key] = point.to(self._device)
        self._has_rest_of(like)
        self.train(like.training)

    @classmethod
    def from_float(
        cls,
        experts: nn.Module,
        spec: QuantSpec | None = None,
        qat: bool = False,
        *,
        name: str = "",
    ) -> ObservedExperts:
        """An observed module around the parameters of `experts` themselves, in its mode.

        Raises:
            TypeError: there is no adapter for its class, or it is built otherwise.
            ValueError: a spec that the quantised form has no form for.
        """
        return cls(experts, spec, qat, name=name)

    def points(self) -> dict[str, FakeQuantize]:
        """The observation points of the two products, by the names of their weights."""
        names = zip(self.adapter.weights, input_points(self.adapter), strict=True)
        return {weight: cast(FakeQuantize, self._modules[key]) for weight, key in names}

    @property
    def _who(self) -> str:
        return f"qnn.ObservedExperts({self._class.__name__})"

    def _product(self, weight: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        held = self._turned(cast(torch.Tensor, self._parameters[weight]))
        held = fake_quantize_weight(held, STACK) if rounds(self) else held
        x = self.points()[weight](without_rest(rows, offsets))
        return float_grouped_linear(x, held, offsets, self._parameters.get(f"{weight}_bias"))

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(shape)}" for name, shape in self._shapes.items())
        return f"{self._class.__name__}, {shapes}, qat={self.qat}"
