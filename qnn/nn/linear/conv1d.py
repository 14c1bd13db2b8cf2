"""Layers in the place of transformers' `Conv1D`: `y = x · weight + bias`, `weight` [in, out]."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qnn.calibration.fake_quantize import rounds
from qnn.calibration.spec import QuantSpec
from qnn.kernels.formats import FLOATS
from qnn.nn.linear.observed import ObservedLinear, fake_quantize_weight
from qnn.nn.linear.quantized import QLinear
from qnn.nn.values import of_other_kind


def as_linear(module: nn.Module, *, transposed: bool = False) -> nn.Linear:
    """The `nn.Linear` of what computes as one, around the same parameters; of a weight `[in, out]`
    around a view of it, transposed.
    """
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None  # noqa: S101  # what lacks one is refused before
    if transposed:
        weight = nn.Parameter(weight.detach().t(), requires_grad=False)
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, False, device="meta", dtype=weight.dtype)
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear.train(module.training)


class QConv1D(QLinear):
    """A `QLinear` whose float state is that of transformers' `Conv1D`: `weight` `[in, out]`.

    Its own state, its `weight` and its arithmetic are those of `QLinear`, `[out, in]`. Only float
    checkpoints of the model, which `load_state_dict` quantises, and `dequantize()` have the other
    layout. `convert` makes it.
    """

    def _read_state(self, given: dict[str, Any]) -> Any:
        weight = given.get("weight")
        if weight is not None and weight.dtype in FLOATS:
            shape = [self.in_features, self.out_features]
            if list(weight.shape) != shape:
                raise ValueError(
                    f"weight must be {shape}, as Conv1D has it, got {list(weight.shape)}."
                )
            given = {**given, "weight": weight.t()}
        return super()._read_state(given)

    def dequantize(self) -> nn.Module:  # type: ignore[override]
        """A float `Conv1D` with the weight `(weight * weight_scale)ᵀ`."""
        from transformers.pytorch_utils import Conv1D

        linear = super().dequantize()
        with torch.device("meta"):
            layer: Any = Conv1D(self.out_features, self.in_features)
        layer.weight = nn.Parameter(linear.weight.detach().t().contiguous())
        layer.bias = linear.bias
        return cast(nn.Module, layer.train(self.training))

    @classmethod
    def from_observed(cls, observed: ObservedLinear) -> QConv1D:
        flat = ObservedLinear.from_float(
            as_linear(observed, transposed=True), observed.input_quantize.spec
        )
        flat.input_quantize = observed.input_quantize
        flat.smooth = observed.smooth
        made = super().from_observed(flat)
        assert isinstance(made, QConv1D)  # noqa: S101
        return made


class ObservedConv1D(ObservedLinear):
    """An `ObservedLinear` around the parameters of a `Conv1D`."""

    @classmethod
    def from_float(
        cls,
        conv: nn.Module,
        spec: QuantSpec | None = None,
        qat: bool = False,
        *,
        name: str = "",
        smooth: bool = False,
    ) -> ObservedConv1D:
        flat = as_linear(conv, transposed=True)
        layer = super().from_float(flat, spec, qat, name=name, smooth=smooth)
        assert isinstance(layer, ObservedConv1D)  # noqa: S101
        layer.weight = conv.weight  # type: ignore[assignment]
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if type(input) is not torch.Tensor and (y := of_other_kind(self, input)) is not None:
            return cast(torch.Tensor, y)
        x = self.input_quantize(input)
        if rounds(self):
            return nn.functional.linear(x, fake_quantize_weight(self.weight.t()), self.bias)
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.out_features)

    def _rows(self) -> torch.Tensor:
        return self.weight.detach().t()


def tell_adapters(model: nn.Module) -> None:
    """peft's adapters around a `Conv1D` add what they have learned in its layout; around a
    `QConv1D`, whose `weight` is `[out, in]`, they are to do it as for an `nn.Linear`.
    """
    for module in model.modules():
        base = module._modules.get("base_layer")
        if isinstance(base, QConv1D) and vars(module).get("fan_in_fan_out") is True:
            module.fan_in_fan_out = False  # type: ignore[assignment]


__all__ = ["ObservedConv1D", "QConv1D", "as_linear", "tell_adapters"]
