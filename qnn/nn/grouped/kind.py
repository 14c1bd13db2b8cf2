"""The kinds of `GroupedLinear` and of fused experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qnn.functional.layout import STACK
from qnn.kernels import get_scheme
from qnn.kinds import Kind, Own, register_kind
from qnn.nn.grouped.adapters import adapter_of, modules_held
from qnn.nn.grouped.experts import QExperts
from qnn.nn.grouped.linear import GroupedLinear
from qnn.nn.grouped.quantized import QGroupedLinear, why_not_stack
from qnn.nn.values import needs_calibration, why_not_finite


class GroupedKind(Kind):
    """`y = x · weight[e]ᵀ + bias[e]` for the rows of each group."""

    name = "grouped linear"
    floats = (GroupedLinear,)
    titles = ()
    quantized = (QGroupedLinear,)
    layout = STACK

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        return _why_left(scheme) or super().why_left(module, scheme, named=named, training=training)

    def why_not(self, module: nn.Module, scheme: str) -> str | None:
        weight: Any = module.weight
        return why_not_stack(get_scheme(scheme), *weight.shape)

    def quantize(self, layer: nn.Module, scheme: str, own: Own) -> QGroupedLinear:
        assert isinstance(layer, GroupedLinear)  # noqa: S101  # of its kind
        made = QGroupedLinear.from_float(layer, scheme)
        if layer.bias is not None:
            made.bias = own(layer.bias)
        return made


class ExpertsKind(Kind):
    """Fused experts of the classes that have an adapter."""

    name = "experts"
    floats = ()
    quantized = (QExperts,)
    leaves = Kind.leaves | {"forward"}

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, QExperts) or adapter_of(module) is not None

    @property
    def holds(self) -> frozenset[str]:  # type: ignore[override]
        return modules_held()

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        if training:
            return "there is no experts layer that trains in low precision"
        if (reason := _why_left(scheme)) is not None:
            return reason
        adapter = adapter_of(module)
        return None if adapter is None else adapter.why_not(module)

    def names(self, module: nn.Module) -> Iterable[str]:
        adapter = adapter_of(module)
        return () if adapter is None else (*adapter.weights, *adapter.biases)

    def weights(self, module: nn.Module) -> dict[str, Any]:
        adapter = adapter_of(module)
        return {} if adapter is None else {n: module._parameters[n] for n in adapter.weights}

    def why_not(self, module: nn.Module, scheme: str) -> str | None:
        adapter = adapter_of(module)
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
        made = QExperts.from_float(layer, scheme)
        for name in made._modules:
            made._modules[name] = own(made._modules[name])
        for name in made._biases:
            made._parameters[name] = own(layer._parameters[name])
        return made

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        adapter = layer.adapter if isinstance(layer, QExperts) else adapter_of(layer)
        first: Any = getattr(layer, adapter.first)  # type: ignore[union-attr]
        return tuple(first.shape)


def _why_left(scheme: str) -> str | None:
    """Why layers that nothing observes stay float."""
    known = get_scheme(scheme)
    if not known.static:
        return None
    return f"its input is not observed, and {needs_calibration(scheme)}; take another scheme for it"


GROUPED = register_kind(GroupedKind())
EXPERTS = register_kind(ExpertsKind())
