"""`QExperts`: the fused experts of a mixture, two stacks of quantised weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qnn.calibration.doubts import note_on
from qnn.functional.grouped import grouped_linear_of
from qnn.functional.layout import STACK
from qnn.kernels import get_scheme
from qnn.kernels.backends import linear_backend
from qnn.kernels.formats import FLOATS
from qnn.kernels.schemes import static_scheme
from qnn.nn.base import Quantized
from qnn.nn.grouped.observed_experts import ObservedExperts
from qnn.nn.grouped.quantized import why_not_stack
from qnn.nn.grouped.routed import Routed
from qnn.nn.linear.observed import grid
from qnn.nn.values import Found, input_grid, require_floats


class QExperts(Quantized, Routed):
    """A module of fused experts, such as transformers' `MixtralExperts`, in `scheme`: its forward,
    with `QGroupedLinear`'s arithmetic in its two products.

    Its tensors have the names of the float module, `gate_up_proj` and `down_proj`, with the
    suffixes of the parts, such as `gate_up_proj_scale`, in the layout `[E, N, K]` whatever that of
    the float module is; in int8_static also `gate_up_proj_input_scale`, float32 `[1]`, and
    `gate_up_proj_input_zero_point`, int8 `[1]`, a grid for all experts, and those of `down_proj`.
    Its other attributes and modules are those of the float one. `convert` makes it, for the classes
    that `qnn.register_adapter` knows.

    Shape:
        `hidden_states` `[T, H]`, `top_k_index` integers `[T, k]`, `top_k_weights` `[T, k]`; output
        `[T, H]`. An index of E or more is that of an expert elsewhere, which adds nothing here.
    """

    _layout = STACK

    def __init__(self, like: nn.Module, scheme: str = "int8", *, device: Any = None) -> None:
        super().__init__()
        self._is_like(like)
        adapter, self.scheme = self.adapter, scheme
        self._prefixes = adapter.weights
        self._set_dtype(cast(torch.Tensor, like._parameters[adapter.first]).dtype)
        for groups, rows, columns in self._shapes.values():
            if (reason := why_not_stack(get_scheme(scheme), groups, rows, columns)) is not None:
                raise ValueError(f"{self._who}: {reason}.")
        biases: dict[str, Any] = {
            f"{name}_bias": shape[:2] for name, shape in self._shapes.items() if adapter.bias
        }
        self._empty_weights(device, {**biases, **self._shapes})
        self._grids = {name: [*self._grid_of(name)] for name in self._shapes}

    @classmethod
    def from_float(cls, experts: nn.Module, scheme: str = "int8") -> QExperts:
        """The quantised twin of a float module, whose other modules it shares.

        Raises:
            TypeError: there is no adapter for its class, or it is built otherwise.
            ValueError: a weight holds NaN or inf, or has a size that `scheme` does not take.
        """
        return cls._around(experts, scheme)

    @classmethod
    def from_observed(cls, experts: ObservedExperts) -> QExperts:
        """The `int8_static` form of experts that were calibrated or trained.

        Raises:
            TypeError: `experts` is not an `ObservedExperts`.
            ValueError: a product has observed nothing, or a NaN or infinite value; a weight holds
                NaN or inf, or has a size that the scheme does not take.
        """
        if not isinstance(experts, ObservedExperts):
            raise TypeError(
                "qnn.QExperts.from_observed takes a qnn.ObservedExperts, got "
                f"{type(experts).__name__}."
            )
        points = experts.points()
        made = cls._around(experts, static_scheme(*(p.spec.dtype for p in points.values())))
        for weight, point in points.items():
            found = (part.to(made._device) for part in grid(point))
            made._set_calibration(dict(zip(made._grids[weight], found, strict=True)))
        note_on(made, list(points.values()))
        return made

    @classmethod
    def _around(cls, experts: nn.Module, scheme: str) -> QExperts:
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
        made._has_rest_of(experts)
        return made.train(experts.training)

    # -- what the base asks -----------------------------------------------------------------------

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    @property
    def _biases(self) -> tuple[str, ...]:
        return self.adapter.biases

    def _grid_of(self, weight: str) -> dict[str, Found]:
        return {f"{weight}_{name}": each for name, each in input_grid(self._scheme).items()}

    def _calibration(self) -> dict[str, Found]:
        return {name: each for w in self._shapes for name, each in self._grid_of(w).items()}

    def _is_foreign(self, name: str) -> bool:
        return super()._is_foreign(name) or name in {f"{w}_input_scale" for w in self._shapes}

    def _backend(self) -> str:
        if self._uncalibrated:
            return (
                "none: not calibrated; load a calibrated state, or prepare, calibrate and convert"
            )
        said = linear_backend(self._scheme, self._stored_of(self.adapter.first)[0])
        return f"{said}; a call for each expert with tokens"

    @property
    def _who(self) -> str:
        return f"qnn.QExperts({self._class.__name__}, scheme={self.scheme!r})"

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

    def _product(self, weight: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        if self._uncalibrated:
            self._refuse_uncalibrated()
        bias = self._parameters.get(f"{weight}_bias")
        points = [cast(torch.Tensor, self._parameters[name]) for name in self._grids[weight]]
        operands = (*self._held(weight), offsets, *points)
        return grouped_linear_of(rows, operands, bias, self.scheme)

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(shape)}" for name, shape in self._shapes.items())
        return f"{self._class.__name__}, {shapes}, scheme={self.scheme!r}"


_OWN = {"adapter", "scheme", "dtype", "num_groups", "in_features", "_class", "_shapes"}
_OWN |= {"_prefixes", "_storage", "_part_names", "_uncalibrated", "_grids"}


__all__ = ["QExperts"]
