"""`QConv1d` to `QConvTranspose3d`: drop-in convolutions that hold their weight quantised."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from qnn.calibration.doubts import note_on
from qnn.functional.conv import conv_of
from qnn.kernels.backends import op_backend
from qnn.kernels.schemes import static_scheme
from qnn.nn.base import Quantized
from qnn.nn.conv.geometry import (
    ends,
    geometry,
    layout_of,
    op_of,
    padded,
    plain_class,
    require_conv,
    why_not_conv,
    words,
)
from qnn.nn.conv.observed import (
    ObservedConv,
    ObservedConv1d,
    ObservedConv2d,
    ObservedConv3d,
    ObservedConvTranspose1d,
    ObservedConvTranspose2d,
    ObservedConvTranspose3d,
)
from qnn.nn.linear.observed import grid
from qnn.nn.values import (
    Found,
    can_take,
    input_grid,
    of_other_kind,
    require_floats,
    require_input,
)

Sizes = int | tuple[int, ...]
ConvT = TypeVar("ConvT", bound="QConv")
_MODULE = vars(nn.Module()).keys()


class QConv(Quantized):
    """What the quantised convolutions share; `QConv2d` says what they are.

    The class of torch's in a subclass's bases gives it the signature, the shapes and the checks.
    """

    _observed: ClassVar[type[ObservedConv]]

    in_channels: int
    out_channels: int
    groups: int
    transposed: bool
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    padding_mode: str
    bias: nn.Parameter | None
    weight_scale: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = "int8",
    ) -> None:
        sizes = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        plain = plain_class(self)(*sizes, bias, padding_mode, device="meta")
        self._build(plain, device, dtype, scheme)

    def _build(
        self,
        plain: Any,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        scheme: str,
    ) -> None:
        """Be the quantised form of `plain`, a float layer on the meta device."""
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in vars(plain).items() if k not in _MODULE})
        self.scheme = scheme
        self._set_dtype(dtype)
        if (reason := why_not_conv(scheme, self)) is not None:
            raise ValueError(f"{self._who}: {reason}.")
        self._layout = layout_of(self)
        self._sizes = tuple(plain.weight.shape)
        biased = None if plain.bias is None else (self.out_channels,)
        self._empty_weights(device, {"bias": biased, **self._weight_shapes()})
        self._operands = (*self._part_names["weight"], *self._calibration())  # without x and bias
        self.reset_parameters()

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": self._sizes}

    def _calibration(self) -> dict[str, Found]:
        return input_grid(self._scheme)

    @property
    def _who(self) -> str:
        return f"qnn.{type(self).__name__}({words(self)}, scheme={self.scheme!r})"

    def _backend(self) -> str:
        if self._uncalibrated:
            return (
                "none: not calibrated; load a calibrated state, or prepare, calibrate and convert"
            )
        return op_backend(cast(str, self._scheme.op(op_of(self))), self._device)

    @property
    def stored(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the weight is stored in, the values first."""
        return self._stored_of("weight")

    def _float(self, device: Any) -> nn.Module:
        options = {"bias": self.bias is not None, "device": device, "dtype": self.dtype}
        made: nn.Module = plain_class(self)(**geometry(self), **options)
        return made

    @classmethod
    def from_float(cls: type[ConvT], conv: nn.Module, scheme: str = "int8") -> ConvT:
        """The quantised twin of a float layer: same device, mode and bias; the weight is quantised.

        Raises:
            TypeError: `conv` is not torch's float layer of this class, or has no sizes yet.
            ValueError: the weight holds NaN or inf, or has a size that `scheme` does not take.
        """
        require_conv(f"qnn.{cls.__name__}.from_float", conv, plain_class(cls), Quantized)
        return cls._around(conv, scheme)

    @classmethod
    def from_observed(cls: type[ConvT], observed: Any) -> ConvT:
        """The `int8_static` or `int16_static` layer of one that was calibrated or trained.

        Raises:
            TypeError: `observed` is not the observed layer of this class.
            ValueError: it has observed nothing, or a NaN or infinite value; the weight holds NaN or
                inf, or has a size that the scheme does not take.
        """
        if not isinstance(observed, cls._observed):
            raise TypeError(
                f"qnn.{cls.__name__}.from_observed takes a qnn.{cls._observed.__name__}, got "
                f"{type(observed).__name__}."
            )
        layer = cls._around(observed, static_scheme(observed.input_quantize.spec.dtype))
        found = (part.to(observed.weight.device) for part in grid(observed.input_quantize))
        layer._set_calibration(dict(zip(layer._calibration(), found, strict=True)))
        note_on(layer, [observed.input_quantize])
        return layer

    @classmethod
    def _around(cls: type[ConvT], conv: Any, scheme: str) -> ConvT:
        floats = {"bias": conv.bias, "weight": conv.weight}
        require_floats(f"qnn.{cls.__name__}.from_float({conv!r})", floats)
        options: Any = {"device": "meta", "dtype": conv.weight.dtype, "scheme": scheme}
        layer = cls(**geometry(conv), bias=False, **options)
        layer._take(floats)
        return layer.train(conv.training)

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        if type(input) is not torch.Tensor and (y := self._of_other_kind(input)) is not None:
            return y
        if torch.compiler.is_compiling() or input.layout is not torch.strided:
            self._check_input(input)
        if self._uncalibrated:
            self._refuse_uncalibrated()
        held: Any = self._parameters
        operands = [held[name] for name in self._operands]
        values = operands[0]
        if values.dtype is not self._storage or values.requires_grad:
            operands[0] = self._part(*self._parts_of("weight")[0])
        axes = len(self.kernel_size)
        try:
            x = input if (batched := input.dim() == axes + 2) else input.unsqueeze(0)
            border = self._border(input, output_size)
            if self.padding_mode != "zeros":
                x, border = padded(self, x), (0,) * (2 * axes)
            y = conv_of(
                x,
                operands,
                held["bias"],
                self.scheme,
                self.stride,
                border,
                self.dilation,
                self.groups,
                transposed=self.transposed,
            )
        except (RuntimeError, TypeError, ValueError):
            # The same fault, in words about the layer.
            self._check_input(input)
            raise
        return y if batched else y.squeeze(0)

    def _border(self, input: torch.Tensor, output_size: list[int] | None) -> tuple[int, ...]:
        """What is added before and after each axis; of a transposed layer, what is cut off."""
        return ends(self)

    def _of_other_kind(self, input: Any) -> torch.Tensor | None:
        if isinstance(input, torch.Tensor) and input.is_nested:
            self._check_input(input)
        return cast("torch.Tensor | None", of_other_kind(self, input))

    def _check_input(self, input: torch.Tensor) -> None:
        """Raise a TypeError or ValueError where the layer cannot take `input`."""
        if input.is_nested:
            raise TypeError(
                f"{self._who}: the input is a nested tensor; pad it with .to_padded_tensor(0.0)."
            )
        device, axes = self._device, len(self.kernel_size)
        shape, channels = tuple(input.shape), self.in_channels
        if not can_take(input, device):
            require_input(self._who, input, device)
        if len(shape) not in (axes + 1, axes + 2) or shape[-axes - 1] != channels:
            sizes = ", ".join("dhw"[-axes:])
            raise ValueError(
                f"{self._who}: the input must be [batch, {channels}, {sizes}] or [{channels}, "
                f"{sizes}], got {shape}."
            )

    def extra_repr(self) -> str:
        said = [words(self), f"stride={self.stride}"]
        plain = {"padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}
        for name, value in [*plain.items(), ("padding_mode", "zeros"), ("bias", True)]:
            held = self.bias is not None if name == "bias" else getattr(self, name)
            if held not in (value, (value,) * len(self.kernel_size)):
                said.append(f"{name}={held!r}")
        if self.dtype != torch.float32:
            said.append(f"dtype={self.dtype}")
        return ", ".join([*said, f"scheme={self.scheme!r}"])

    def _is_foreign(self, name: str) -> bool:
        return super()._is_foreign(name) or name in (
            "input_scale",
            "input_zero_point",
            "input_global_scale",
        )


class QConvTranspose(QConv):
    """What the transposed convolutions share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = "int8",
    ) -> None:
        sizes = in_channels, out_channels, kernel_size, stride, padding, output_padding, groups
        plain = plain_class(self)(*sizes, bias, dilation, padding_mode, device="meta")
        self._build(plain, device, dtype, scheme)

    def _border(self, input: torch.Tensor, output_size: list[int] | None) -> tuple[int, ...]:
        axes = len(self.kernel_size)
        own: Any = self
        more = own._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, axes, self.dilation
        )
        cut = cast("tuple[int, ...]", self.padding)
        return tuple(end for j in range(axes) for end in (cut[j], cut[j] - more[j]))


class QConv1d(QConv, nn.Conv1d):  # type: ignore[misc]
    """As `QConv2d`, of `nn.Conv1d`: inputs `[batch, in_channels, w]`."""

    _observed = ObservedConv1d


class QConv2d(QConv, nn.Conv2d):  # type: ignore[misc]
    """`conv2d(x, dequantize(weight)) + bias`, with the weight and the arithmetic of `scheme`.

    Its tensors are plain and are all in the state dict:

    - `weight`: int8, in the shape of torch's layer, `[out_channels, in_channels / groups, …]`; in
      memory with the channels last;
    - `weight_scale`: per-channel, float32 `[out_channels, 1, …]`. `weight * weight_scale` is the
      float weight;
    - `input_scale`, float32 `[1]`, and `input_zero_point`, int8 `[1]`: of int8_static, for the
      input, per-tensor; int16_static has no zero point. A scale of 0 says that there is none yet,
      and a call is an error;
    - `bias`: `[out_channels]`, in `dtype`.

    In `int8` and `int16` each sample of a batch has a scale of its own. Padded borders are exactly
    zero. As for `QLinear`, `layer.weight` reads as the float weight, all but `bias` need no
    gradient and keep their dtypes, and `load_state_dict` takes quantised state or a float `weight`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device: as in `nn.Conv2d`.
        dtype: of the bias, and of what `dequantize()` returns; torch's default dtype if None.
        scheme: `"int8"`, `"int8_static"`, `"int16"`, `"int16_static"` or `"int8_weight"`, as of
            `QLinear`.

    Shape:
        input `[batch, in_channels, h, w]` or `[in_channels, h, w]`, also an empty batch;
        output as of `nn.Conv2d`, in the input's dtype and memory format.

    Raises:
        ValueError: a size that the scheme does not take, or a scheme without convolutions.
        TypeError: `dtype` is not a float dtype.

    >>> layer = QConv2d(3, 16, 3, stride=2, padding=1)
    >>> layer(torch.randn(4, 3, 32, 32)).shape
    torch.Size([4, 16, 16, 16])
    """

    _observed = ObservedConv2d


class QConv3d(QConv, nn.Conv3d):  # type: ignore[misc]
    """As `QConv2d`, of `nn.Conv3d`: inputs `[batch, in_channels, d, h, w]`."""

    _observed = ObservedConv3d


class QConvTranspose1d(QConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """As `QConvTranspose2d`, of `nn.ConvTranspose1d`: inputs `[batch, in_channels, w]`."""

    _observed = ObservedConvTranspose1d


class QConvTranspose2d(QConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """`conv_transpose2d(x, dequantize(weight)) + bias`: what `QConv2d` is, of `nn.ConvTranspose2d`.

    `weight` has the shape of torch's layer, `[in_channels, out_channels / groups, …]`, and
    `weight_scale` is per-channel of the output, float32 `[out_channels, 1, …]`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode, device: as in `nn.ConvTranspose2d`.
        dtype, scheme: as in `QConv2d`.

    >>> layer = QConvTranspose2d(16, 3, 4, stride=2, padding=1)
    >>> layer(torch.randn(4, 16, 8, 8)).shape
    torch.Size([4, 3, 16, 16])
    >>> layer(torch.randn(4, 16, 8, 8), output_size=(17, 17)).shape
    torch.Size([4, 3, 17, 17])
    """

    _observed = ObservedConvTranspose2d


class QConvTranspose3d(QConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """As `QConvTranspose2d`, of `nn.ConvTranspose3d`: inputs `[batch, in_channels, d, h, w]`."""

    _observed = ObservedConvTranspose3d
