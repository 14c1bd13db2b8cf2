"""The kinds of convolutions: plain, and transposed, whose scales lie along another axis."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qnn.kernels.schemes import static_scheme
from qnn.kinds import Kind, Observation, Own, qualified, register_kind
from qnn.nn.conv import observed, quantized
from qnn.nn.conv.geometry import CONVS, TRANSPOSED, plain_class, why_not_conv
from qnn.nn.linear.kind import spec_of
from qnn.nn.linear.observed import grid

# What a class may define and still be the layer that it is built as.
_BUILDS = {
    "__init__",
    "__module__",
    "__doc__",
    "__annotations__",
    "__qualname__",
    "__firstlineno__",
}
_BUILDS |= {"__static_attributes__"}


class ConvKind(Kind):
    """`y = conv(x, weight) + bias`."""

    name = "conv"
    floats = CONVS
    titles: tuple[str, ...] = ("nn.Conv1d/2d/3d",)
    quantized: tuple[type[nn.Module], ...] = (
        quantized.QConv1d,
        quantized.QConv2d,
        quantized.QConv3d,
    )
    observed: tuple[type[nn.Module], ...] = (
        observed.ObservedConv1d,
        observed.ObservedConv2d,
        observed.ObservedConv3d,
    )
    shares = True
    skips_computed = True  # those of audio models have weight_norm

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        if (reason := self._why_other(type(module), named)) is not None:
            return reason
        if training:
            return "there is no convolution that trains in low precision"
        known = why_not_conv(scheme, module)
        return known if known is not None and "has no convolution" in known else None

    def _why_other(self, kind: Any, named: bool) -> str | None:
        """Why a subclass of torch's layer is not taken as one."""
        if kind in self.floats or kind in self.observed:
            return None
        base = plain_class(kind)
        name, of = qualified(kind), f"a subclass of nn.{base.__name__}"
        if any(getattr(kind, each) is not getattr(base, each) for each in _forwards(base)):
            return f"{name} is {of} with a forward, and so a meaning of its own"
        between = kind.__mro__[: kind.__mro__.index(base)]
        if named or all(vars(each).keys() <= _BUILDS for each in between):
            return None
        return f"{name} is {of} that computes what it does: name it in include to convert it"

    def why_not(self, module: nn.Module, scheme: str) -> str | None:
        return why_not_conv(scheme, module)

    def quantize(self, layer: nn.Module, scheme: str, own: Own) -> Any:
        made: Any
        kind = cast(Any, self.quantized[self.floats.index(plain_class(layer))])
        if self.is_observed(layer):
            made = kind.from_observed(layer)
        else:
            made = kind.from_float(layer, scheme)
        if layer.bias is not None:
            made.bias = own(layer.bias)
        return made

    def observe(self, layer: nn.Module, how: Observation, own: Own) -> nn.Module:
        kind = cast(Any, self.observed[self.floats.index(plain_class(layer))])
        made = kind.from_float(layer, spec_of(layer, how), how.qat, name=how.name)
        if self.is_observed(layer):
            made.input_quantize.begin(layer.input_quantize)
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                setattr(made, name, own(parameter))
        return cast(nn.Module, made)

    def op(self, layer: type[nn.Module]) -> str:
        return self.name

    def sample(self, layer: type[nn.Module], size: int) -> tuple[nn.Module, torch.Tensor]:
        axes = self.floats.index(layer) + 1
        return layer(size, size, 3, padding=1), torch.randn(2, size, *[4] * axes)

    def points(self, layer: nn.Module, how: Observation) -> list[str]:
        return ["input"]

    def check_observation(self, layer: nn.Module, how: Observation) -> None:
        scheme = static_scheme(spec_of(layer, how).dtype)
        if (reason := why_not_conv(scheme, layer)) is not None:
            raise ValueError(f"qnn.{type(layer).__name__}: {reason}.")

    def require_ranges(self, layer: nn.Module) -> None:
        grid(cast(Any, layer).input_quantize)


class ConvTransposeKind(ConvKind):
    """`y = conv_transpose(x, weight) + bias`."""

    name = "conv_transpose"
    floats = TRANSPOSED
    titles = ("nn.ConvTranspose1d/2d/3d",)
    quantized = (
        quantized.QConvTranspose1d,
        quantized.QConvTranspose2d,
        quantized.QConvTranspose3d,
    )
    observed = (
        observed.ObservedConvTranspose1d,
        observed.ObservedConvTranspose2d,
        observed.ObservedConvTranspose3d,
    )


def _forwards(base: Any) -> list[str]:
    """The methods that compute."""
    return [name for name in ("forward", "_conv_forward", "_output_padding") if hasattr(base, name)]


CONV = register_kind(ConvKind())
CONV_TRANSPOSE = register_kind(ConvTransposeKind())
