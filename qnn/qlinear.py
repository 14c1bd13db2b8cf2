"""`QLinear`: a drop-in `nn.Linear` that holds its weight quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from qnn import functional as F
from qnn.backends import linear_backend
from qnn.forking import return_threads
from qnn.kernels import Scheme, get_scheme
from qnn.kernels.formats import FLOATS, Part
from qnn.observed_linear import ObservedLinear, grid


class QLinear(nn.Linear):
    """`y = x · dequantize(weight)ᵀ + bias`, with the weight and the arithmetic of `scheme`.

    Its tensors are plain and are all in the state dict, under the names that the compressed-tensors
    convention and the serving engines use:

    - `weight`: stored values, `[out_features, in_features]`; in the nvfp4 schemes `weight_packed`,
      uint8 `[out_features, in_features / 2]`, which `layer.weight` is a name for;
    - `weight_scale`: float32 `[out_features, 1]` for int8 and fp8, `[1]` for fp8_tensor,
      `[⌈out_features / 128⌉, ⌈in_features / 128⌉]` for fp8_block; uint8 exponents
      `[out_features, in_features / 32]` for mxfp8; float8_e4m3fn `[out_features, in_features / 16]`
      for nvfp4. `weight * weight_scale` is the float weight;
    - `weight_global_scale`: nvfp4's second scale, float32 `[1]`, a divisor;
    - `input_scale`, float32 `[1]`, and `input_zero_point`, int8 `[1]`: of int8_static, the grid of
      the input. A scale of 0 says that there is none yet, and gives NaN;
    - `bias`: `[out_features]`, in `dtype`.

    All but `bias` are parameters that need no gradient. They keep their dtypes through `.half()`
    and `.to(dtype)`. `load_state_dict` takes quantised state, or a float `weight`, which it
    quantises on the way in.

    Args:
        in_features, out_features, bias, device: as in `nn.Linear`. `in_features` must be a multiple
            of 32 for mxfp8 and of 16 for nvfp4.
        dtype: of the bias, and of what `dequantize()` returns; torch's default dtype if None.
        scheme: `"int8"`, `"fp8"`, `"fp8_tensor"`, `"fp8_block"`, `"mxfp8"`, `"nvfp4"` (activations
            quantised, from the tensor at hand), `"int8_static"` (on a grid from calibration: see
            `from_observed`), or `"int8_weight"`, `"fp8_weight"`, `"nvfp4_weight"` (activations as
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
        self.dtype = dtype or torch.get_default_dtype()
        who = f"qnn.QLinear({in_features}, {out_features}, scheme={scheme!r})"
        if self.dtype not in FLOATS:
            raise TypeError(
                f"{who}: dtype must be one of {', '.join(map(str, FLOATS))}; got {self.dtype}."
            )
        reason = self._scheme.why_not_linear(in_features, out_features)
        if reason is not None:
            raise ValueError(f"{who}: {reason}.")
        self._stored = tuple("weight" + part.suffix for part in self._scheme.weight.parts)
        for name, part in self._parts():
            shape = part.shape(out_features, in_features)
            setattr(self, name, _frozen(torch.empty(shape, dtype=part.dtype, device=device)))
        for name, part in self._grid():
            setattr(self, name, _frozen(torch.zeros(1, dtype=part.dtype, device=device)))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=self.dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def _scheme(self) -> Scheme:
        return get_scheme(self.scheme)

    def _parts(self) -> list[tuple[str, Part]]:
        """The parts of the weight, each with the name of its parameter."""
        return list(zip(self._stored, self._scheme.weight.parts, strict=True))

    def _grid(self) -> list[tuple[str, Part]]:
        """The grid of a static input, as `_parts`; nothing in the other schemes."""
        scheme = self._scheme
        if not scheme.static or scheme.activation is None:
            return []
        return [("input" + part.suffix, part) for part in scheme.activation.parts[1:]]

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The values as they are stored: the parameter `weight` or `weight_packed`. Other libraries
        ask it for its device and dtype.
        """
        parameters = self.__dict__["_parameters"]
        for name in ("weight", "weight_packed"):
            if name in parameters:
                return cast(nn.Parameter, parameters[name])
        raise AttributeError("weight")

    @property
    def stored(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the weight is stored in, the values first."""
        return tuple([self._parameters[name] for name in self._stored])  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """Draw the weights that `nn.Linear` would draw, and quantise them."""
        if self.stored[0].is_meta:
            return
        device = self.stored[0].device
        fresh = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=device,
            dtype=self.dtype,
        )
        for parameter, part in zip(self.stored, _quantize(fresh.weight, self.scheme), strict=True):
            parameter.data = part
        if self.bias is not None and fresh.bias is not None:
            self.bias.data = fresh.bias.data

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: str = "int8") -> QLinear:
        """The quantised twin of a float layer: same device, mode and bias; the weight is quantised.

        Raises:
            TypeError: `linear` is no plain `nn.Linear`, or its weight is no plain float parameter.
            ValueError: the weight holds NaN or inf, or has a size that `scheme` does not take.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, QLinear):
            raise TypeError(
                f"qnn.QLinear.from_float takes an nn.Linear, got {type(linear).__name__}."
            )
        if get_scheme(scheme).static:
            raise ValueError(f"qnn.QLinear.from_float({linear!r}): {needs_calibration(scheme)}.")
        return cls._around(linear, scheme)

    @classmethod
    def from_observed(cls, observed: ObservedLinear) -> QLinear:
        """The `int8_static` layer of one that was calibrated or trained.

        Raises:
            TypeError: `observed` is no `ObservedLinear`.
            ValueError: it has observed nothing, or a NaN or infinite value; the weight holds NaN or
                inf, or has a size that the scheme does not take.
        """
        if not isinstance(observed, ObservedLinear):
            raise TypeError(
                "qnn.QLinear.from_observed takes a qnn.ObservedLinear, got "
                f"{type(observed).__name__}."
            )
        layer = cls._around(observed, "int8_static")
        for (name, _), part in zip(layer._grid(), grid(observed.input_quantize), strict=True):
            setattr(layer, name, _frozen(part.to(observed.weight.device)))
        return layer

    @classmethod
    def _around(cls, linear: nn.Linear, scheme: str) -> QLinear:
        weight, bias = linear.weight, linear.bias
        who = f"qnn.QLinear.from_float({linear!r})"
        if weight.dtype not in FLOATS:
            raise TypeError(f"{who}: the weight must be float, got {weight.dtype}.")
        layer = cls(
            linear.in_features,
            linear.out_features,
            False,
            device="meta",
            dtype=weight.dtype,
            scheme=scheme,
        )
        if (bad := not_finite(weight)) is not None:
            raise ValueError(f"{who}: the weight holds NaN or inf in {_rows(bad)}.")
        for (name, _), part in zip(layer._parts(), _quantize(weight, scheme), strict=True):
            setattr(layer, name, _frozen(part))
        if bias is not None:
            layer.bias = nn.Parameter(_normal(bias), requires_grad=bias.requires_grad)
        return layer.train(linear.training)

    def dequantize(self) -> nn.Linear:
        """A float `nn.Linear` with the weight `weight * weight_scale`, in `dtype`."""
        has_bias = self.bias is not None
        linear = nn.Linear(
            self.in_features, self.out_features, has_bias, device="meta", dtype=self.dtype
        )
        q, scale, *rest = self.stored
        weight = F.dequantize(
            q, scale, self.dtype, global_scale=rest[0] if rest else None, scheme=self.scheme
        )
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(
                self.bias.detach().clone(), requires_grad=self.bias.requires_grad
            )
        return linear.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first, second, *rest = self._stored
        check_input(self, input, first)
        parameters = self._parameters
        return F.linear(
            input,
            cast(torch.Tensor, parameters[first]),
            cast(torch.Tensor, parameters[second]),
            parameters["bias"],
            weight_global_scale=parameters[rest[0]] if rest else None,
            input_scale=parameters.get("input_scale"),
            input_zero_point=parameters.get("input_zero_point"),
            scheme=self.scheme,
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QLinear:
        # A cast of the whole model reaches the scales, and a weight of float8. Their values stay as
        # they are; only their device follows.
        kept = [(name, getattr(self, name).data) for name, _ in self._parts() + self._grid()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, data in kept:
            parameter = getattr(self, name)
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=kept[0][1].device)).dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        who = prefix.removesuffix(".") or name_of(self)
        grid = [name for name, _ in self._grid()]
        names = [name for name, _ in self._parts()]
        given = {n: state_dict[prefix + n] for n in ("weight", *names) if prefix + n in state_dict}
        foreign = [
            k for k in _FOREIGN_KEYS if k not in (*names, *grid) and prefix + k in state_dict
        ]
        if foreign:
            error_msgs.append(
                f"{who}: {', '.join(foreign)} belongs to another scheme than {self.scheme!r}; "
                "build the model with the scheme that the checkpoint was saved in."
            )
            return
        try:
            loaded = self._read_state(given)
            given = {n: state_dict[prefix + n] for n in grid if prefix + n in state_dict}
            if grid and (loaded or given):
                read = self._read_grid(given)
                state_dict = state_dict | {prefix + n: part for n, part in read.items()}
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{who}: {error}")
            return
        if loaded:
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + "weight"}
            state_dict |= {prefix + n: part for n, part in zip(names, loaded, strict=True)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        return_threads()
        for name in (*self._stored, *grid):
            getattr(self, name).requires_grad_(False)

    def _read_state(self, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """A checkpoint's weight as this layer holds it; nothing where it has none."""
        if not given:
            return ()
        parts = self._parts()
        first = next(iter(parts))[0]
        weight = given.get("weight", given.get(first))
        if weight is None:
            raise ValueError(f"the state has a {next(iter(given))} but no {first}.")
        shape = (self.out_features, self.in_features)
        if weight.dtype in FLOATS:
            if tuple(weight.shape) != shape:
                raise ValueError(f"weight must be {list(shape)}, got {list(weight.shape)}.")
            if len(given) > 1:
                raise ValueError(
                    f"weight is {weight.dtype} and so float, yet the state has a "
                    f"{list(given)[1]} too."
                )
            if (bad := not_finite(weight)) is not None:
                raise ValueError(f"weight holds NaN or inf in {_rows(bad)}.")
            return _quantize(weight, self.scheme)
        if "weight" in given and first != "weight":
            raise TypeError(
                f"weight is {weight.dtype}, but scheme {self.scheme!r} stores {first}; build the "
                "model with the scheme that the checkpoint was saved in."
            )
        return tuple(self._read_part(name, part, given) for name, part in parts)

    def _read_grid(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A checkpoint's grid of the input; without a zero point it is symmetric."""
        (scale, scale_part), (point, point_part) = self._grid()
        if scale not in given:
            raise ValueError(f"the state has no {scale}; {needs_calibration(self.scheme)}.")
        given = {scale: given[scale], point: given.get(point, torch.zeros(1, dtype=torch.int8))}
        read = self._read_part(scale, scale_part, given)
        return {scale: read, point: self._read_part(point, point_part, given)}

    def _read_part(self, name: str, part: Part, given: dict[str, Any]) -> torch.Tensor:
        shape = part.shape(self.out_features, self.in_features)
        tensor: torch.Tensor | None = given.get(name)
        if tensor is None:
            first = next(iter(given))
            raise ValueError(
                f"{first} is {given[first].dtype}, yet the state has no {name}: the checkpoint is "
                "truncated."
            )
        if part.dtype == torch.float32 and tensor.dtype in FLOATS:
            tensor = tensor.float()
        elif tensor.dtype != part.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype}, but scheme {self.scheme!r} stores {part.dtype}; build "
                "the model with the scheme that the checkpoint was saved in."
            )
        if tuple(tensor.shape) != shape:
            # A scale of the whole tensor is a scalar in some files.
            if tensor.numel() == 1 and shape == (1,):
                tensor = tensor.reshape(1)
            else:
                kind = str(part.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{name} must be {kind} {list(shape)}, got {kind} {list(tensor.shape)}."
                )
        if part.suffix.endswith("_scale") and tensor.dtype.is_floating_point:
            value = tensor.float()
            bad = ~(value.isfinite() & (value > 0 if part.dtype == torch.float32 else value >= 0))
            if not tensor.is_meta and bad.any():
                raise ValueError(f"{name} must be positive and finite; it is not in {_rows(bad)}.")
        return tensor

    def extra_repr(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f", dtype={self.dtype}"
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        words = f"{features}, bias={self.bias is not None}{dtype}, scheme={self.scheme!r}"
        scale = self._parameters.get("input_scale")
        if scale is None or scale.is_meta or torch.compiler.is_compiling():
            return words
        return words if bool(scale > 0) else f"{words}, not calibrated"

    def __repr__(self) -> str:
        if torch.compiler.is_compiling():  # torch.vmap asks for the name of what it maps
            return name_of(self)
        return f"{type(self).__name__}({self.extra_repr()})  # {linear_backend(self)}"


# What schemes of the compressed-tensors convention and of its neighbours store beside `weight` and
# `weight_scale`.
_FOREIGN_KEYS = (
    "weight_packed",
    "weight_global_scale",
    "weight_zero_point",
    "input_scale",
    "input_global_scale",
    "weight_scale_inv",
    "weight_scale_2",
)


def needs_calibration(scheme: str) -> str:
    """Why a float layer cannot become one of a static scheme at once."""
    return (
        f"scheme {scheme!r} needs calibration: qnn.prepare(model), qnn.calibrate(model, batches), "
        "qnn.convert(model)"
    )


def name_of(layer: Any) -> str:
    """The call that makes the layer, for errors."""
    kind = f"qnn.{type(layer).__name__}"
    return f"{kind}({layer.in_features}, {layer.out_features}, scheme={layer.scheme!r})"


def check_input(layer: Any, input: torch.Tensor, weight: str) -> None:
    """Raise a TypeError or ValueError where `layer` cannot take `input`; `weight` is the parameter
    that says where the layer is.
    """
    if (
        input.dtype in FLOATS
        and input.dim() > 0
        and input.shape[-1] == layer.in_features
        and input.device == layer._parameters[weight].device
    ):
        return
    who, dtype, device = name_of(layer), input.dtype, layer._parameters[weight].device
    if dtype in (torch.int8, torch.uint8) or (dtype.itemsize == 1 and dtype.is_floating_point):
        raise TypeError(
            f"{who}: the input is {dtype}, a storage dtype; some models cast activations to "
            "weight.dtype. Pass float32, bfloat16 or float16 activations, or exclude this layer "
            "from convert()."
        )
    if dtype not in FLOATS:
        raise TypeError(
            f"{who}: the input must be float32, bfloat16, float16 or float64, got {dtype}; cast it "
            "with .float()."
        )
    if input.device != device:
        raise ValueError(
            f"{who}: the input is on {input.device}, the layer on {device}; move one of them with "
            ".to(device)."
        )
    raise ValueError(
        f"{who}: the input must be [..., {layer.in_features}], got {tuple(input.shape)}; its last "
        f"axis must have in_features = {layer.in_features} elements."
    )


def not_finite(weight: torch.Tensor) -> torch.Tensor | None:
    """Where a weight holds NaN or inf, `[N]`; None where it has none, or has no values yet.

    Without a mask as large as the weight: a sum meets every NaN and inf, though a finite one may
    overflow.
    """
    values = weight.detach()
    if values.is_meta or bool(values.sum(dtype=torch.float64).isfinite()):
        return None
    bad = ~values.isfinite()
    return bad.any(-1) if bool(bad.any()) else None


def _quantize(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode(False), torch.no_grad():
        return F.quantize(_normal(weight), scheme)


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without its history, and never an inference tensor, which has no version counter to
    watch.
    """
    with torch.inference_mode(False):
        return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    with torch.inference_mode(False):
        return nn.Parameter(
            tensor.clone() if tensor.is_inference() else tensor, requires_grad=False
        )


def _rows(bad: torch.Tensor) -> str:
    """`row 3 and 2 more`, from a mask whose first axis is that of the rows."""
    rows = bad.flatten(1).any(-1) if bad.dim() > 1 else bad
    found = rows.nonzero().flatten().tolist()
    return f"row {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
