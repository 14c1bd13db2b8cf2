"""The kinds of `GroupedLinear` and of fused experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from qnn.functional.layout import STACK
from qnn.kernels import get_scheme
from qnn.kinds import Kind, Observation, Own, register_kind
from qnn.nn.grouped.adapters import ExpertsAdapter, adapter_of, modules_held
from qnn.nn.grouped.experts import QExperts
from qnn.nn.grouped.linear import GroupedLinear
from qnn.nn.grouped.observed import ObservedGroupedLinear
from qnn.nn.grouped.observed_experts import ObservedExperts
from qnn.nn.grouped.quantized import QGroupedLinear, why_not_stack
from qnn.nn.grouped.routed import Routed, form_of
from qnn.nn.linear.kind import spec_of, with_parameters_of
from qnn.nn.linear.observed import default_spec, grid, spec_of_input, training_spec
from qnn.nn.values import why_not_finite


class GroupedKind(Kind):
    """`y = x · weight[e]ᵀ + bias[e]` for the rows of each group."""

    name = "grouped linear"
    floats = (GroupedLinear,)
    titles = ()
    quantized = (QGroupedLinear,)
    observed = (ObservedGroupedLinear,)
    holds = frozenset({"input_quantize"})
    layout = STACK

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        if self.is_observed(module) and not training:
            return None
        return super().why_left(module, scheme, named=named, training=training)

    def why_not(self, module: nn.Module, scheme: str) -> str | None:
        weight: Any = module.weight
        return why_not_stack(get_scheme(scheme), *weight.shape)

    def quantize(self, layer: nn.Module, scheme: str, own: Own) -> QGroupedLinear:
        assert isinstance(layer, GroupedLinear)  # noqa: S101  # of its kind
        if isinstance(layer, ObservedGroupedLinear):
            made = QGroupedLinear.from_observed(layer)
        else:
            made = QGroupedLinear.from_float(layer, scheme)
        if layer.bias is not None:
            made.bias = own(layer.bias)
        return made

    def observe(self, layer: nn.Module, how: Observation, own: Own) -> nn.Module:
        old = cast(GroupedLinear, layer)
        spec = spec_of(layer, how)
        made = ObservedGroupedLinear.from_float(old, spec, how.qat, name=how.name)
        if isinstance(layer, ObservedGroupedLinear):
            made.input_quantize.begin(layer.input_quantize)
        return with_parameters_of(layer, made, own)

    def points(self, layer: nn.Module, how: Observation) -> list[str]:
        return ["input"]

    def check_observation(self, layer: nn.Module, how: Observation) -> None:
        spec_of(layer, how)

    def require_ranges(self, layer: nn.Module) -> None:
        grid(cast(ObservedGroupedLinear, layer).input_quantize)


class ExpertsKind(Kind):
    """Fused experts of the classes that have an adapter."""

    name = "experts"
    floats = ()
    quantized = (QExperts,)
    observed = (ObservedExperts,)
    leaves = Kind.leaves | {"forward"}

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, Routed) or adapter_of(module) is not None

    @property
    def holds(self) -> frozenset[str]:  # type: ignore[override]
        return modules_held()

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        if training:
            return "there is no experts layer that trains in low precision"
        adapter = _floats_of(module)
        return None if adapter is None else adapter.why_not(module)

    def names(self, module: nn.Module) -> Iterable[str]:
        adapter = _floats_of(module)
        return () if adapter is None else (*adapter.weights, *adapter.biases)

    def weights(self, module: nn.Module) -> dict[str, Any]:
        adapter = _floats_of(module)
        return {} if adapter is None else {n: module._parameters[n] for n in adapter.weights}

    def why_not(self, module: nn.Module, scheme: str) -> str | None:
        adapter = _floats_of(module)
        assert adapter is not None  # noqa: S101  # of its kind
        for weight in self.weights(module).values():
            if (reason := why_not_stack(get_scheme(scheme), *adapter.shape(weight))) is not None:
                return reason
        for name in adapter.biases:
            bias: Any = module._parameters[name]
            if (reason := why_not_finite(bias)) is not None:
                return f"its {name} holds {reason}"
        return None

    def quantize(self, layer: nn.Module, scheme: str, own: Own) -> QExperts:
        if isinstance(layer, ObservedExperts):
            made = QExperts.from_observed(layer)
        else:
            made = QExperts.from_float(layer, scheme)
        for name in made._modules:
            made._modules[name] = own(made._modules[name])
        for name in made._biases:
            made._parameters[name] = own(layer._parameters[name])
        return made

    def observe(self, layer: nn.Module, how: Observation, own: Own) -> nn.Module:
        made = ObservedExperts.from_float(layer, _spec(layer, how), how.qat, name=how.name)
        if isinstance(layer, ObservedExperts):
            for name, known in layer.points().items():
                made.points()[name].begin(known)
        for name in layer._modules.keys() & made._modules.keys():
            if made._modules[name] is layer._modules[name]:
                made._modules[name] = own(layer._modules[name])
        for name, parameter in made._parameters.items():
            made._parameters[name] = own(parameter)
        return made

    def points(self, layer: nn.Module, how: Observation) -> list[str]:
        return ["input"]

    def check_observation(self, layer: nn.Module, how: Observation) -> None:
        _spec(layer, how)

    def require_ranges(self, layer: nn.Module) -> None:
        for point in cast(ObservedExperts, layer).points().values():
            grid(point)

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        first: Any = getattr(layer, cast(Any, form_of(layer)).first)
        return tuple(first.shape)


def _floats_of(module: nn.Module) -> ExpertsAdapter | None:
    """How experts with float weights are built."""
    return None if isinstance(module, QExperts) else form_of(module)


def _spec(layer: nn.Module, how: Observation) -> Any:
    """The spec of the inputs: that of the call, or what the layer was observed with, or else that
    of the scheme.
    """
    spec = spec_of_input(how.parts)
    if spec is None and isinstance(layer, ObservedExperts):
        return training_spec(next(iter(layer.points().values())).spec)
    return spec or default_spec(how.scheme, how.qat)


GROUPED = register_kind(GroupedKind())
EXPERTS = register_kind(ExpertsKind())
