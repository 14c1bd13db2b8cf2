"""`ObservedGroupedLinear`: a float `GroupedLinear` on its way to `int8_static`."""

from __future__ import annotations

import torch

from qnn.calibration.fake_quantize import FakeQuantize, rounds
from qnn.calibration.spec import QuantSpec
from qnn.functional.grouped import float_grouped_linear, without_rest
from qnn.functional.layout import STACK
from qnn.nn.grouped.linear import GroupedLinear
from qnn.nn.linear.observed import fake_quantize_weight, input_point


class ObservedGroupedLinear(GroupedLinear):
    """A `GroupedLinear` that records the range of its input, for
    `QGroupedLinear(scheme="int8_static")`, or `"int16_static"` with a spec of 16 bits: one range
    for all groups. Rows of no group take no part in it.

    With `qat` input and weight are fake-quantised, as `ObservedLinear` does. Its state dict is that
    of `GroupedLinear` and, under `input_quantize.`, the statistics.

    Args:
        num_groups, in_features, out_features, bias, device, dtype: as in `GroupedLinear`.
        spec, qat, name: as in `ObservedLinear`.

    Raises:
        ValueError: a spec that the quantised layer has no form for.

    >>> layer = ObservedGroupedLinear.from_float(GroupedLinear(4, 16, 8))
    >>> layer(torch.randn(5, 16), torch.tensor([2, 2, 4, 5], dtype=torch.int32)).shape
    torch.Size([5, 8])
    """

    input_quantize: FakeQuantize

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spec: QuantSpec | None = None,
        qat: bool = False,
        name: str = "",
    ) -> None:
        super().__init__(num_groups, in_features, out_features, bias, device, dtype)
        self.qat = qat
        self.input_quantize = input_point(spec, qat, name).to(self.weight.device)

    @classmethod
    def from_float(
        cls,
        layer: GroupedLinear,
        spec: QuantSpec | None = None,
        qat: bool = False,
        *,
        name: str = "",
    ) -> ObservedGroupedLinear:
        """An observed layer around the parameters of `layer` themselves, in its mode.

        Raises:
            TypeError: `layer` is not a `GroupedLinear`.
            ValueError: a spec that the constructor refuses.
        """
        if not isinstance(layer, GroupedLinear):
            raise TypeError(
                "qnn.ObservedGroupedLinear.from_float takes a qnn.GroupedLinear, got "
                f"{type(layer).__name__}."
            )
        sizes = layer.num_groups, layer.in_features, layer.out_features
        made = cls(*sizes, False, "meta", layer.weight.dtype, spec=spec, qat=qat, name=name)
        made.input_quantize = input_point(spec, qat, name).to(layer.weight.device)
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, input: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        weight = fake_quantize_weight(self.weight, STACK) if rounds(self) else self.weight
        x = self.input_quantize(without_rest(input, offsets))
        return float_grouped_linear(x, weight, offsets, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, qat={self.qat}"
