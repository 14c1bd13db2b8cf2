"""What the forms of fused experts share: what an adapter says, and the way of the tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qnn.functional.grouped import sort_by_group, unsort
from qnn.nn.grouped.adapters import ExpertsAdapter, adapter_of
from qnn.nn.values import of_other_kind, require_input


class Routed(nn.Module):
    """Experts in a form of qnn's: a subclass says how a product is computed."""

    adapter: ExpertsAdapter
    num_groups: int
    in_features: int
    _class: type[nn.Module]  # of the float module
    _shapes: dict[str, tuple[int, ...]]

    def _is_like(self, experts: nn.Module) -> None:
        """Have the adapter, the class and the sizes of `experts`, float or in a form of qnn's.

        Raises:
            TypeError: there is no adapter for its class, or it is built otherwise.
        """
        adapter = form_of(experts)
        if adapter is None or (reason := adapter.why_not(experts)) is not None:
            raise TypeError(
                f"qnn.{type(self).__name__}: {type(experts).__name__} is not built as an adapter "
                f"says: {reason if adapter else 'there is none for it; see qnn.register_adapter'}."
            )
        self.adapter = adapter
        self._class = experts._class if isinstance(experts, Routed) else type(experts)
        weights = [cast(torch.Tensor, experts._parameters[name]) for name in adapter.weights]
        self._shapes = dict(zip(adapter.weights, map(adapter.shape, weights), strict=True))
        self.num_groups, _, self.in_features = self._shapes[adapter.first]

    def _has_rest_of(self, experts: nn.Module) -> None:
        """Share the other modules of `experts`, and its attributes."""
        for name, module in experts._modules.items():
            if name not in input_points(self.adapter):
                self._modules[name] = module
        for name, value in vars(experts).items():
            if name not in vars(self) and name != "qat":
                self.__dict__[name] = value

    @property
    def _who(self) -> str:
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        return cast(torch.Tensor, self._parameters[self.adapter.first]).device

    def _product(self, weight: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _turned(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight between the layout of the float module and `[E, N, K]`."""
        return weight.mT if self.adapter.transposed else weight

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(hidden_states, torch.fx.Proxy):
            leaf = of_other_kind(self, hidden_states, top_k_index, top_k_weights)
            return cast(torch.Tensor, leaf)
        self._check(hidden_states, top_k_index, top_k_weights)
        if top_k_index is None or top_k_weights is None:
            return self._all(hidden_states)
        tokens, chosen = top_k_index.shape
        order, offsets = sort_by_group(top_k_index, self.num_groups)
        rows = self._of_each(hidden_states[order // chosen], offsets)
        weighed = rows * top_k_weights.flatten()[order, None]
        summed = unsort(weighed, order).unflatten(0, (tokens, chosen)).sum(1)
        return cast(torch.Tensor, summed.to(hidden_states.dtype))

    def _all(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of as many rows for each expert."""
        rows = hidden_states.reshape(-1, self.in_features)
        each = torch.arange(1, self.num_groups + 1, dtype=torch.int32, device=rows.device)
        return self._of_each(rows, each * (rows.shape[0] // self.num_groups))

    def _of_each(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """What each expert makes of its rows."""
        adapter = self.adapter
        inner = self._gate(self._product(adapter.first, rows, offsets))
        result = self._product(adapter.second, inner, offsets)
        return result if adapter.norm is None else cast(Any, self._modules[adapter.norm])(result)

    def _gate(self, rows: torch.Tensor) -> torch.Tensor:
        gate: Any = self.adapter.gate
        if gate is None and self.adapter.gated:
            gate = getattr(self._class, "_apply_gate", _halves)
        return cast(
            torch.Tensor, gate(self, rows) if gate is not None else cast(Any, self).act_fn(rows)
        )

    def _check(
        self, hidden: torch.Tensor, index: torch.Tensor | None, weights: torch.Tensor | None
    ) -> None:
        require_input(self._who, hidden, self._device)
        routed = self.adapter.routed
        if hidden.shape[-1] != self.in_features or (routed and hidden.dim() != 2):
            raise ValueError(
                f"{self._who}: hidden_states must be [tokens, {self.in_features}], got "
                f"{tuple(hidden.shape)}."
            )
        if not routed:
            if index is not None or weights is not None:
                raise TypeError(f"{self._who} takes hidden_states alone, sorted by expert.")
            if (rows := hidden.numel() // self.in_features) % self.num_groups:
                raise ValueError(
                    f"{self._who}: hidden_states must have as many rows for each of "
                    f"{self.num_groups} experts, got {rows}."
                )
        elif index is None or weights is None:
            raise TypeError(f"{self._who} takes hidden_states, top_k_index and top_k_weights.")
        elif index.dim() != 2 or index.shape != weights.shape or index.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"{self._who}: top_k_index and top_k_weights must be [tokens, k] for the "
                f"{hidden.shape[0]} tokens, got {tuple(index.shape)} and {tuple(weights.shape)}."
            )


def _halves(module: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return cast(torch.Tensor, module.act_fn(gate) * up)


def form_of(module: nn.Module) -> ExpertsAdapter | None:
    """How experts are built, in any form; None for what is not known."""
    return module.adapter if isinstance(module, Routed) else adapter_of(module)


def input_points(adapter: ExpertsAdapter) -> tuple[str, ...]:
    """The names of what observes the inputs of the two products."""
    return tuple(f"{weight}_input_quantize" for weight in adapter.weights)
