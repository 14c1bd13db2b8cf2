"""The kinds of linear layers: `nn.Linear`, and transformers' `Conv1D`, which holds its weight
`[in, out]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qnn.kernels import get_scheme
from qnn.kinds import Kind, Observation, Own, qualified, register_kind
from qnn.nn.linear.conv1d import ObservedConv1D, QConv1D, as_linear, tell_adapters
from qnn.nn.linear.observed import (
    ObservedLinear,
    default_spec,
    grid,
    spec_of_input,
    training_spec,
)
from qnn.nn.linear.quantized import QLinear
from qnn.nn.linear.training import Linear

# Their forward is their own and computes `x · weightᵀ + bias`, of a weight [out, in].
_AS_LINEAR = {
    "timm.layers.linear.Linear",
    "torch_geometric.nn.dense.linear.Linear",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
}


class LinearKind(Kind):
    """`y = x · weightᵀ + bias`."""

    name = "linear"
    floats = (nn.Linear,)
    titles: tuple[str, ...] = ("nn.Linear",)
    quantized = (QLinear,)
    observed = (ObservedLinear,)
    training = (Linear,)
    shares = True
    held_as = "rows"
    standard = True
    forwards: tuple[Callable[..., Any], ...] = (nn.Linear.forward, Linear.forward)
    made: type[QLinear] = QLinear

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or qualified(type(module)) in _AS_LINEAR

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        if type(module) in (nn.Linear, Linear):
            return None
        name, kind = qualified(type(module)), "a subclass of nn.Linear"
        if not isinstance(module, nn.Linear):
            kind = "a layer"
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return f"{name} is {kind} whose weight nn.MultiheadAttention, in float, only reads"
        if type(module).forward not in self.forwards and name not in _AS_LINEAR:
            return f"{name} is {kind} with a forward, and so a meaning of its own"
        if named:
            return None
        return (
            f"{name} is {kind} that computes what nn.Linear does: name it in include to convert it"
        )

    def quantize(self, layer: nn.Module, scheme: str, own: Own) -> QLinear:
        if isinstance(layer, ObservedLinear):
            made = self.made.from_observed(layer)
        else:
            made = self.made.from_float(self._flat(layer), scheme)
        if layer.bias is not None:
            made.bias = own(layer.bias)
        return made

    def train(self, layer: nn.Module, scheme: str | None, own: Own) -> nn.Module:
        flat = self._flat(layer)
        made = flat if scheme is None else Linear.from_float(flat, scheme)
        return with_parameters_of(layer, made, own)

    def observe(self, layer: nn.Module, how: Observation, own: Own) -> nn.Module:
        made = self._observed(layer, spec_of(layer, how), how)
        if isinstance(layer, ObservedLinear):
            made.input_quantize.begin(layer.input_quantize)
        return with_parameters_of(layer, made, own)

    def _flat(self, layer: nn.Module) -> nn.Linear:
        """The plain layer around the same parameters."""
        return as_linear(layer)

    def _observed(self, layer: nn.Module, spec: Any, how: Observation) -> ObservedLinear:
        return ObservedLinear.from_float(self._flat(layer), spec, how.qat, **_options(how))

    def points(self, layer: nn.Module, how: Observation) -> list[str]:
        return ["input"]

    def check_observation(self, layer: nn.Module, how: Observation) -> None:
        spec_of(layer, how)

    def why_untied(self, other: Kind) -> str | None:
        if other.held_as and other.held_as != self.held_as:
            return "that layer has it transposed"
        return super().why_untied(other)

    def require_ranges(self, layer: nn.Module) -> None:
        grid(cast(ObservedLinear, layer).input_quantize)

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        sizes: Any = layer
        return sizes.out_features, sizes.in_features


class Conv1DKind(LinearKind):
    """`y = x · weight + bias`, with `weight` `[in, out]`."""

    name = "Conv1D"
    titles = ()
    held_as = "columns"
    standard = False
    made = QConv1D
    observed = (ObservedConv1D,)
    quantized = (QConv1D,)

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, QConv1D | ObservedConv1D) or self._is_float(module)

    def _is_float(self, module: nn.Module) -> bool:
        # By name: the class is in a library that may not be in use.
        return any(qualified(each) == CONV1D for each in type(module).__mro__)

    def is_training(self, module: nn.Module) -> bool:
        return qualified(type(module)) == TRAINING_CONV1D

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        if qualified(type(module)) in (CONV1D, TRAINING_CONV1D) or self.is_observed(module):
            return None
        return f"{qualified(type(module))} is a subclass of Conv1D with a meaning of its own"

    def why_not(self, module: nn.Module, scheme: str) -> str | None:
        weight: Any = module.weight
        return get_scheme(scheme).why_not_linear(*weight.shape)

    def _flat(self, layer: nn.Module) -> nn.Linear:
        return as_linear(layer, transposed=True)

    def train(self, layer: nn.Module, scheme: str | None, own: Own) -> nn.Module:
        from qnn.nn.linear.training_conv1d import TrainingConv1D, plain  # imports transformers

        conv: Any = layer
        made = TrainingConv1D.from_float(conv, scheme) if scheme else plain(conv)
        return with_parameters_of(layer, made, own)

    def _observed(self, layer: nn.Module, spec: Any, how: Observation) -> ObservedLinear:
        return ObservedConv1D.from_float(layer, spec, how.qat, **_options(how))

    def after(self, who: str, model: nn.Module) -> None:
        tell_adapters(model)


CONV1D = "transformers.pytorch_utils.Conv1D"
TRAINING_CONV1D = "qnn.nn.linear.training_conv1d.TrainingConv1D"


def with_parameters_of(old: nn.Module, new: nn.Module, own: Own) -> nn.Module:
    """`new`, which then holds the parameters of `old` as `own` hands them over."""
    for name, parameter in old._parameters.items():
        if parameter is not None:
            setattr(new, name, own(parameter))
    return new


def _options(how: Observation) -> dict[str, Any]:
    return {"name": how.name, "smooth": how.smooth}


def spec_of(layer: nn.Module, how: Observation) -> Any:
    """The spec of the input: that of the call, or what the layer was observed with, or else that of
    the scheme.
    """
    spec = spec_of_input(how.parts)
    if spec is None and "input_quantize" in layer._modules:
        return training_spec(cast(Any, layer).input_quantize.spec)
    return spec or default_spec(how.scheme, how.qat)


LINEAR = register_kind(LinearKind())
register_kind(Conv1DKind())
