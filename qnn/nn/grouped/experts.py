"""`QExperts`: the fused experts of a mixture, two stacks of quantised weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qnn.functional.grouped import grouped_linear_of, sort_by_group, unsort
from qnn.functional.layout import STACK
from qnn.kernels import get_scheme
from qnn.kernels.backends import linear_backend
from qnn.kernels.formats import FLOATS
from qnn.nn.base import Quantized
from qnn.nn.grouped.adapters import ExpertsAdapter, adapter_of
from qnn.nn.grouped.quantized import why_not_stack
from qnn.nn.values import of_other_kind, require_floats, require_input


class QExperts(Quantized):
    """A module of fused experts, such as transformers' `MixtralExperts`, in `scheme`: its forward,
    with `QGroupedLinear`'s arithmetic in its two products.

    Its tensors have the names of the float module, `gate_up_proj` and `down_proj`, with the
    suffixes of the parts, such as `gate_up_proj_scale`, in the layout `[E, N, K]` whatever that of
    the float module is. Its other attributes and modules are those of the float one.
    `convert` makes it, for the classes that `qnn.register_adapter` knows.

    Shape:
        `hidden_states` `[T, H]`, `top_k_index` integers `[T, k]`, `top_k_weights` `[T, k]`; output
        `[T, H]`. An index of E or more is that of an expert elsewhere, which adds nothing here.
    """

    _layout = STACK
    adapter: ExpertsAdapter
    num_groups: int

    def __init__(self, like: nn.Module, scheme: str = "int8", *, device: Any = None) -> None:
        super().__init__()
        adapter = adapter_of(like)
        if adapter is None or (reason := adapter.why_not(like)) is not None:
            raise TypeError(
                f"qnn.QExperts: {type(like).__name__} is not built as an adapter says: "
                f"{reason if adapter else 'there is none for it; see qnn.register_adapter'}."
            )
        self.adapter, self.scheme, self._prefixes = adapter, scheme, adapter.weights
        self._class = type(like)
        weights = [cast(torch.Tensor, like._parameters[name]) for name in adapter.weights]
        self._shapes = dict(zip(adapter.weights, map(adapter.shape, weights), strict=True))
        self._set_dtype(weights[0].dtype)
        self.num_groups, _, self.in_features = self._shapes[adapter.first]
        for groups, rows, columns in self._shapes.values():
            if (reason := why_not_stack(get_scheme(scheme), groups, rows, columns)) is not None:
                raise ValueError(f"{self._who}: {reason}.")
        biases: dict[str, Any] = {
            f"{name}_bias": shape[:2] for name, shape in self._shapes.items() if adapter.bias
        }
        self._empty_weights(device, {**biases, **self._shapes})

    @classmethod
    def from_float(cls, experts: nn.Module, scheme: str = "int8") -> QExperts:
        """The quantised twin of a float module, whose other modules it shares.

        Raises:
            TypeError: there is no adapter for its class, or it is built otherwise.
            ValueError: a weight holds NaN or inf, or has a size that `scheme` does not take.
        """
        made = cls(experts, scheme, device="meta")
        floats = {name: experts._parameters[name] for name in (*made._biases, *made._shapes)}
        require_floats(f"qnn.QExperts.from_float({type(experts).__name__})", floats)
        made._take(
            {
                n: made._turned(p) if n in made._shapes else p
                for n, p in floats.items()
                if p is not None
            }
        )
        made._modules.update(experts._modules)
        for name, value in vars(experts).items():
            if name not in vars(made):
                made.__dict__[name] = value
        return made.train(experts.training)

    # -- what the base asks -----------------------------------------------------------------------

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    @property
    def _biases(self) -> tuple[str, ...]:
        return self.adapter.biases

    def _backend(self) -> str:
        said = linear_backend(self._scheme, self._stored_of(self.adapter.first)[0])
        return f"{said}; a call for each expert with tokens"

    @property
    def _who(self) -> str:
        return f"qnn.QExperts({self._class.__name__}, scheme={self.scheme!r})"

    def _turned(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight between the layout of the float module and `[E, N, K]`."""
        return weight.mT if self.adapter.transposed else weight

    def _read_state(self, given: dict[str, Any]) -> dict[str, Any]:
        turned = dict(given)
        for name, shape in self._shapes.items() if self.adapter.transposed else ():
            value = given.get(name)
            if isinstance(value, torch.Tensor) and value.dtype in FLOATS:
                wanted = [shape[0], shape[2], shape[1]]
                if list(value.shape) != wanted:
                    raise ValueError(
                        f"{name} must be {wanted}, as {self._class.__name__} has it, got "
                        f"{list(value.shape)}."
                    )
                turned[name] = value.mT
        return super()._read_state(turned)

    def reset_parameters(self) -> None:
        """Refused: the float module says how it is drawn."""
        raise TypeError(f"{self._who} draws no weights; draw those of the float model.")

    def dequantize(self) -> nn.Module:
        """The float module, with the weights that the stored ones stand for, in `dtype`."""
        layer: Any = self._class.__new__(self._class)
        nn.Module.__init__(layer)
        own = vars(QExperts.__new__(QExperts)).keys() | _OWN
        layer.__dict__.update(
            {n: v for n, v in vars(self).items() if n not in own and n not in vars(layer)}
        )
        layer._modules.update(self._modules)
        for name in self._shapes:
            values = self._turned(self._dequantized(name)).contiguous()
            layer.register_parameter(name, nn.Parameter(values))
        for name in self._biases:
            bias = cast(torch.Tensor, self._parameters[name])
            values = bias.detach().to(self.dtype, copy=True)
            layer.register_parameter(name, nn.Parameter(values, requires_grad=bias.requires_grad))
        return cast(nn.Module, layer.train(self.training))

    # -- forward ----------------------------------------------------------------------------------

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

    def _product(self, weight: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        bias = self._parameters.get(f"{weight}_bias")
        return grouped_linear_of(rows, (*self._held(weight), offsets), bias, self.scheme)

    def _gate(self, rows: torch.Tensor) -> torch.Tensor:
        gate: Any = self.adapter.gate
        if gate is None and self.adapter.gated:
            gate = getattr(self._class, "_apply_gate", _halves)
        return cast(torch.Tensor, gate(self, rows) if gate is not None else self.act_fn(rows))

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

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(shape)}" for name, shape in self._shapes.items())
        return f"{self._class.__name__}, {shapes}, scheme={self.scheme!r}"


_OWN = {"adapter", "scheme", "dtype", "num_groups", "in_features", "_class", "_shapes"}
_OWN |= {"_prefixes", "_storage", "_part_names", "_uncalibrated"}


def _halves(module: Any, rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return cast(torch.Tensor, module.act_fn(gate) * up)


__all__ = ["QExperts"]
