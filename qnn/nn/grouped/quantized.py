"""`QGroupedLinear`: linear layers of one size, in one stack, over rows sorted by layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qnn.calibration.doubts import note_on
from qnn.functional.grouped import grouped_linear_of
from qnn.functional.layout import STACK
from qnn.kernels import Scheme, get_scheme
from qnn.kernels.backends import linear_backend
from qnn.kernels.schemes import static_scheme
from qnn.nn.base import Quantized
from qnn.nn.grouped.linear import GroupedLinear
from qnn.nn.grouped.observed import ObservedGroupedLinear
from qnn.nn.linear.observed import grid
from qnn.nn.values import Found, input_grid, of_other_kind, require_floats, require_input


class QGroupedLinear(Quantized):
    """`y = x · dequantize(weight[e])ᵀ + bias[e]` for the rows of each group `e`, with the weights
    and the arithmetic of `scheme`: what `QLinear` computes for each, in one op.

    Its tensors are those of `QLinear` with an axis in front, such as int8 `weight`
    `[num_groups, out_features, in_features]` and float32 `weight_scale`
    `[num_groups, out_features, 1]`; `bias` is `[num_groups, out_features]`. `input_scale` and
    `input_zero_point` of int8_static are one grid for all groups.

    `layer.weight` reads as the float stack, and takes writes, as that of `QLinear`.

    Args:
        num_groups: how many weights there are.
        in_features, out_features, bias, device, dtype, scheme: as in `QLinear`, of each.

    Shape:
        input `[M, in_features]`, rows sorted by their group, M may be 0; `offsets` int32
        `[num_groups]`, the ends of the groups, equal where one has no rows, as
        `qnn.functional.sort_by_group` gives them;
        output `[M, out_features]`, in the input's dtype; zeros in rows after the last group.

    Raises:
        ValueError: a size that the scheme does not take, or an unknown scheme.
        TypeError: `dtype` is not a float dtype.

    >>> layer = QGroupedLinear(8, 64, 32)
    >>> experts = torch.tensor([[3, 1], [1, 7]])  # two for each of two tokens
    >>> order, offsets = qnn.functional.sort_by_group(experts, 8)
    >>> layer(torch.randn(2, 64)[order // 2], offsets).shape
    torch.Size([4, 32])
    """

    _layout = STACK

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = "int8",
    ) -> None:
        super().__init__()
        self.num_groups, self.in_features, self.out_features = num_groups, in_features, out_features
        self.scheme = scheme
        self._set_dtype(dtype)
        if reason := why_not_stack(get_scheme(scheme), num_groups, out_features, in_features):
            raise ValueError(f"{self._who}: {reason}.")
        # The bias first, as in QLinear.
        floats = {"bias": (num_groups, out_features) if bias else None, **self._weight_shapes()}
        self._empty_weights(device, floats)
        self.reset_parameters()

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.num_groups, self.out_features, self.in_features)}

    def _calibration(self) -> dict[str, Found]:
        return input_grid(self._scheme)

    def _backend(self) -> str:
        if self._uncalibrated:
            return (
                "none: not calibrated; load a calibrated state, or prepare, calibrate and convert"
            )
        return f"{linear_backend(self._scheme, self.stored[0])}; a call for each group with rows"

    @property
    def _who(self) -> str:
        return (
            f"qnn.{type(self).__name__}({self.num_groups}, {self.in_features}, "
            f"{self.out_features}, scheme={self.scheme!r})"
        )

    @property
    def stored(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the weight is stored in, the values first."""
        return self._stored_of("weight")

    def _float(self, device: Any) -> GroupedLinear:
        bias = self.bias is not None
        return GroupedLinear(
            self.num_groups, self.in_features, self.out_features, bias, device, self.dtype
        )

    @classmethod
    def from_float(
        cls,
        layer: GroupedLinear | torch.Tensor,
        scheme: str = "int8",
        *,
        bias: torch.Tensor | None = None,
    ) -> QGroupedLinear:
        """The quantised twin of a float layer, or of a weight `[E, N, K]` and `bias` `[E, N]`.

        Raises:
            TypeError: `layer` is neither, or not float.
            ValueError: it holds NaN or inf, or has a size that `scheme` does not take.
        """
        training = False
        if isinstance(layer, GroupedLinear):
            weight, bias, training = layer.weight, layer.bias, layer.training
        elif isinstance(layer, torch.Tensor) and layer.dim() == 3:
            weight = cast(nn.Parameter, layer)
        else:
            got = f"{type(layer).__name__} {list(getattr(layer, 'shape', ()))}".removesuffix(" []")
            raise TypeError(
                "qnn.QGroupedLinear.from_float takes a qnn.GroupedLinear or a weight [E, N, K], "
                f"got {got}."
            )
        floats = {"bias": bias, "weight": weight}
        require_floats("qnn.QGroupedLinear.from_float", floats)
        groups, rows, columns = weight.shape
        if bias is not None and bias.shape != (groups, rows):
            raise ValueError(
                f"qnn.QGroupedLinear.from_float: bias must be {[groups, rows]}, as the weight "
                f"{list(weight.shape)} has rows, got {list(bias.shape)}."
            )
        made = cls(groups, columns, rows, False, "meta", weight.dtype, scheme=scheme)
        made._take(floats)
        return made.train(training)

    @classmethod
    def from_observed(cls, layer: ObservedGroupedLinear) -> QGroupedLinear:
        """The `int8_static` layer of one that was calibrated or trained.

        Raises:
            TypeError: `layer` is not an `ObservedGroupedLinear`.
            ValueError: it has observed nothing, or a NaN or infinite value; the weight holds NaN or
                inf, or has a size that the scheme does not take.
        """
        if not isinstance(layer, ObservedGroupedLinear):
            raise TypeError(
                "qnn.QGroupedLinear.from_observed takes a qnn.ObservedGroupedLinear, got "
                f"{type(layer).__name__}."
            )
        point = layer.input_quantize
        made = cls.from_float(layer, static_scheme(point.spec.dtype))
        found = (part.to(layer.weight.device) for part in grid(point))
        made._set_calibration(dict(zip(made._calibration(), found, strict=True)))
        note_on(made, [point])
        return made

    def dequantize(self) -> GroupedLinear:
        """The float layer with the weights that the stored ones stand for, in `dtype`."""
        return cast(GroupedLinear, super().dequantize())

    def forward(self, input: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        if isinstance(input, torch.fx.Proxy):
            return cast(torch.Tensor, of_other_kind(self, input, offsets))
        if torch.compiler.is_compiling():
            self._check(input, offsets)
        if self._uncalibrated:
            self._refuse_uncalibrated()
        grid = [self._parameters[name] for name in self._calibration()]
        operands = (*self._held("weight"), offsets, *cast(Any, grid))
        try:
            return grouped_linear_of(input, operands, self._parameters["bias"], self.scheme)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            self._check(input, offsets)  # the same fault, in words about the layer
            raise

    def _check(self, input: torch.Tensor, offsets: torch.Tensor) -> None:
        who = self._who
        for name, given in (("input", input), ("offsets", offsets)):
            if not isinstance(given, torch.Tensor):
                raise TypeError(f"{who}: {name} must be a tensor, got {type(given).__name__}.")
        require_input(who, input, self._device)
        if input.dim() != 2 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"{who}: the input must be [rows, {self.in_features}], got {tuple(input.shape)}; "
                "flatten the axes before the last one."
            )
        if offsets.dtype != torch.int32 or offsets.shape != (self.num_groups,):
            raise ValueError(
                f"{who}: offsets must be int32 [{self.num_groups}], the end of each group as "
                "qnn.functional.sort_by_group gives it, got "
                f"{str(offsets.dtype).removeprefix('torch.')} {list(offsets.shape)}."
            )
        if offsets.device != input.device:
            raise ValueError(
                f"{who}: offsets are on {offsets.device}, the input on {input.device}; move them "
                "together."
            )

    def extra_repr(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f", dtype={self.dtype}"
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return (
            f"num_groups={self.num_groups}, {features}, bias={self.bias is not None}{dtype}, "
            f"scheme={self.scheme!r}"
        )

    def _is_foreign(self, name: str) -> bool:
        return super()._is_foreign(name) or name in (
            "input_scale",
            "input_zero_point",
            "input_global_scale",
        )


def why_not_stack(scheme: Scheme, groups: int, rows: int, columns: int) -> str | None:
    """Why a scheme cannot hold a stack of such weights, or None."""
    if scheme.op("grouped_linear") is None:
        return f"scheme {scheme.name!r} has no grouped linear layer"
    if not isinstance(groups, int | torch.SymInt) or groups < 1:
        return f"num_groups must be an integer of at least 1, got {groups!r}"
    return scheme.why_not_linear(columns, rows)
