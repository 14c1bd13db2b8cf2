"""`QLinear`: a drop-in `nn.Linear` that holds its weight quantised."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from qnn.calibration.doubts import note_on
from qnn.functional.linear import linear_of, scale_columns
from qnn.kernels import get_scheme
from qnn.kernels.backends import linear_backend
from qnn.kernels.schemes import static_scheme
from qnn.nn.base import Quantized
from qnn.nn.linear.observed import ObservedLinear, grid
from qnn.nn.values import (
    Found,
    check_input,
    frozen,
    input_grid,
    of_other_kind,
    require_floats,
)

_SMOOTH = "pre_quant_scale"


class QLinear(Quantized, nn.Linear):
    """`y = x · dequantize(weight)ᵀ + bias`, with the weight and the arithmetic of `scheme`.

    Its tensors are plain and are all in the state dict, under the names that the compressed-tensors
    convention and the serving engines use:

    - `weight`: stored values, `[out_features, in_features]`; `weight_packed`, uint8
      `[out_features, in_features / 2]`, for nvfp4, and int32 `[…, in_features / 8]` for int4;
    - `weight_scale`: per-channel, float32 `[out_features, 1]`, for int8 and fp8; per-tensor, `[1]`,
      for fp8_tensor; per-block, `[⌈out_features / 128⌉, ⌈in_features / 128⌉]`, for fp8_block;
      per-group, `[out_features, in_features / group]`: uint8 exponents for mxfp8, float8_e4m3fn
      for nvfp4, float32 for int4. `weight * weight_scale` is the float weight;
    - `weight_global_scale`: nvfp4's second scale, float32 `[1]`, a divisor;
    - `input_scale`, float32 `[1]`, and `input_zero_point`, int8 `[1]`: of int8_static, for the
      input, per-tensor; of int16_static the scale alone. A scale of 0 says that there is none yet,
      and a call is an error;
    - `pre_quant_scale`, float32 `[in_features]`, powers of two: of int8_static, in a layer that
      calibration has smoothed alone. The input is multiplied by it before it is quantised, and
      what is stored is the float weight divided by it;
    - `bias`: `[out_features]`, in `dtype`.

    `layer.weight` reads as the float weight, in `dtype`, decoded where it is used; what is written
    to it is quantised into the layer. `layer.stored` are the tensors themselves.

    All but `bias` are parameters that need no gradient. They keep their dtypes through `.half()`
    and `.to(dtype)`. `load_state_dict` takes quantised state, or a float `weight`, which it
    quantises on the way in.

    Args:
        in_features, out_features, bias, device: as in `nn.Linear`. `in_features` must be a multiple
            of 32 for mxfp8 and of 16 for nvfp4.
        dtype: of the bias, and of what `dequantize()` returns; torch's default dtype if None.
        scheme: `"int8"`, `"int16"`, `"fp8"`, `"fp8_tensor"`, `"fp8_block"`, `"mxfp8"`, `"nvfp4"`
            (activations quantised, from the tensor at hand), `"int8_static"`, `"int16_static"` (on
            a grid from calibration: see `from_observed`), `"int8_int4"` (int8 rows, an int4 weight)
            or `"int8_weight"`, `"fp8_weight"`, `"nvfp4_weight"`, `"int4_weight"` (activations as
            they are).

    Shape:
        input `[..., in_features]`, any number of leading axes, also empty;
        output `[..., out_features]`, in the input's dtype.

    Raises:
        ValueError: a size that the scheme does not take, or an unknown scheme.
        TypeError: `dtype` is not a float dtype.

    >>> layer = QLinear(768, 3072)
    >>> layer(torch.randn(4, 128, 768)).shape
    torch.Size([4, 128, 3072])
    """

    weight_scale: nn.Parameter
    _smoothed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = "int8",
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self._set_dtype(dtype)
        reason = get_scheme(scheme).why_not_linear(in_features, out_features)
        if reason is not None:
            raise ValueError(f"{self._who}: {reason}.")
        # The bias first: what asks a model for its dtype takes that of the first float parameter,
        # which is not to be a scale or a code of float8.
        floats = {"bias": (out_features,) if bias else None, **self._weight_shapes()}
        self._empty_weights(device, floats)
        self._stored = tuple(name for name, _ in self._parts_of("weight"))
        self._operands = (*self._stored, *self._calibration())  # of the op, without x and bias
        self.reset_parameters()

    def _weight_shapes(self) -> dict[str, tuple[int, int]]:
        return {"weight": (self.out_features, self.in_features)}

    def _calibration(self) -> dict[str, Found]:
        found = input_grid(self._scheme)
        if self._smoothed:
            found[_SMOOTH] = Found(torch.float32, (self.in_features,), positive=True)
        return found

    def _smooth(self, smoothed: bool) -> None:
        """Have a `pre_quant_scale`, of ones, or none."""
        if smoothed and not self._smoothed:
            device = self._device
            self._parameters[_SMOOTH] = frozen(torch.ones(self.in_features, device=device).float())
        elif not smoothed:
            self._parameters.pop(_SMOOTH, None)
        self._smoothed = smoothed

    def _quantized(self, weight: str, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._smoothed and tuple(value.shape) == self._weight_shapes()[weight]:
            scale = cast(torch.Tensor, self._parameters[_SMOOTH])
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32)) / scale
        return super()._quantized(weight, value)

    def _dequantized(self, weight: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if not self._smoothed:
            return super()._dequantized(weight, dtype)
        dtype = dtype or self.dtype
        stored = super()._dequantized(weight, torch.promote_types(dtype, torch.float32))
        return (stored * cast(torch.Tensor, self._parameters[_SMOOTH])).to(dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A state says whether the layer that it is of was smoothed."""
        before, errors = self._parameters.get(_SMOOTH), len(args[-1])
        if input_grid(self._scheme) and prefix + "input_scale" in state_dict:
            self._smooth(prefix + _SMOOTH in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if len(args[-1]) > errors:  # nothing was read
            self._smooth(before is not None)
            if before is not None:
                self._parameters[_SMOOTH] = before

    def _read_state(self, given: dict[str, Any]) -> dict[str, Any]:
        weight = given.get("weight")
        if _SMOOTH in given and weight is not None and weight.is_floating_point():
            raise ValueError(
                f"the state has a {_SMOOTH} and a float weight, which is not divided by it; take "
                "the state of the converted layer."
            )
        return super()._read_state(given)

    def _backend(self) -> str:
        if self._uncalibrated:
            return (
                "none: not calibrated; load a calibrated state, or prepare, calibrate and convert"
            )
        return linear_backend(self._scheme, self.stored[0]) + "; input smoothed" * self._smoothed

    @property
    def stored(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the weight is stored in, the values first."""
        return self._stored_of("weight")

    def _float(self, device: Any) -> nn.Linear:
        bias = self.bias is not None
        return nn.Linear(self.in_features, self.out_features, bias, device=device, dtype=self.dtype)

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: str = "int8") -> QLinear:
        """The quantised twin of a float layer: same device, mode and bias; the weight is quantised.

        Raises:
            TypeError: `linear` or its weight is not a plain `nn.Linear` or float parameter.
            ValueError: the weight holds NaN or inf, or has a size that `scheme` does not take.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, QLinear):
            raise TypeError(
                f"qnn.QLinear.from_float takes an nn.Linear, got {type(linear).__name__}."
            )
        return cls._around(linear, scheme)

    @classmethod
    def from_observed(cls, observed: ObservedLinear) -> QLinear:
        """The static layer of one that was calibrated or trained: `int16_static` where its input
        has 16 bits, else `int8_static`.

        Raises:
            TypeError: `observed` is not an `ObservedLinear`.
            ValueError: it has observed nothing, or a NaN or infinite value; the weight holds NaN or
                inf, or has a size that the scheme does not take.
        """
        if not isinstance(observed, ObservedLinear):
            raise TypeError(
                "qnn.QLinear.from_observed takes a qnn.ObservedLinear, got "
                f"{type(observed).__name__}."
            )
        layer = cls._around(observed, static_scheme(observed.input_quantize.spec.dtype))
        point, device = observed.input_quantize, observed.weight.device
        scale = observed.factors()
        found = [part.to(device) for part in grid(point, scale)]
        if scale is None:
            note_on(layer, [point])
        else:
            layer._smooth(True)
            found.append(scale)
        layer._set_calibration(dict(zip(layer._calibration(), found, strict=True)))
        if scale is not None:
            layer._write("weight", observed.weight)
        return layer

    @classmethod
    def _around(cls, linear: nn.Linear, scheme: str) -> QLinear:
        floats = {"bias": linear.bias, "weight": linear.weight}
        require_floats(f"qnn.QLinear.from_float({linear!r})", floats)
        layer = cls(
            linear.in_features,
            linear.out_features,
            False,
            device="meta",
            dtype=linear.weight.dtype,
            scheme=scheme,
        )
        layer._take(floats)
        return layer.train(linear.training)

    def dequantize(self) -> nn.Linear:
        """A float `nn.Linear` with the weight `weight * weight_scale`, in `dtype`."""
        return cast(nn.Linear, super().dequantize())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if type(input) is not torch.Tensor and (y := of_other_kind(self, input)) is not None:
            return cast(torch.Tensor, y)
        if torch.compiler.is_compiling() or input.layout is not torch.strided:
            check_input(self, input, self._stored[0])
        if self._uncalibrated:
            self._refuse_uncalibrated()
        held: Any = self._parameters
        if self._smoothed:
            check_input(self, input, self._stored[0])  # which would be broadcast
            input = scale_columns(input, held[_SMOOTH])  # noqa: A001
        operands = [held[name] for name in self._operands]
        values = operands[0]
        if values.dtype is not self._storage or values.requires_grad:
            operands[0] = self._part(*self._parts_of("weight")[0])
        try:
            return linear_of(input, operands, held["bias"], self.scheme)
        except (RuntimeError, TypeError, ValueError):
            # The same fault, in words about the layer.
            check_input(self, input, self._stored[0])
            raise

    def extra_repr(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f", dtype={self.dtype}"
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{features}, bias={self.bias is not None}{dtype}, scheme={self.scheme!r}"

    def _is_foreign(self, name: str) -> bool:
        return super()._is_foreign(name) or name in (
            "input_scale",
            "input_zero_point",
            "input_global_scale",
            _SMOOTH,
        )
