"""`QLinear`: a drop-in `nn.Linear` that holds its weight quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qnn import functional as F
from qnn.backends import linear_backend
from qnn.kernels import Scheme, get_scheme
from qnn.kernels.formats import FLOATS


class QLinear(nn.Linear):
    """`y = x · dequantize(weight)ᵀ + bias`, with the weight and the arithmetic of `scheme`.

    Its tensors are plain and are all in the state dict, under the names that the compressed-tensors
    convention and the serving engines use:

    - `weight`: stored values, `[out_features, in_features]`;
    - `weight_scale`: float32 `[out_features, 1]`; `weight * weight_scale` is the float weight;
    - `bias`: `[out_features]`, in `dtype`.

    `weight` and `weight_scale` are parameters that need no gradient. The scale stays float32
    through `.half()` and `.to(dtype)`. `load_state_dict` takes quantised state, or a float
    `weight`, which it quantises on the way in.

    Args:
        in_features, out_features, bias, device: as in `nn.Linear`.
        dtype: of the bias, and of what `dequantize()` returns; torch's default dtype if None.
        scheme: `"int8"` (activations quantised a row) or `"int8_weight"` (activations as they are).

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
        form = self._scheme.weight
        self.weight = _frozen(
            torch.empty(out_features, in_features, dtype=form.storage, device=device)
        )
        self.weight_scale = _frozen(
            torch.empty(out_features, 1, dtype=form.scale_dtype, device=device)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=self.dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def _scheme(self) -> Scheme:
        return get_scheme(self.scheme)

    def reset_parameters(self) -> None:
        """Draw the weights that `nn.Linear` would draw, and quantise them."""
        if self.weight.is_meta:
            return
        device = self.weight.device
        fresh = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=device,
            dtype=self.dtype,
        )
        self._assign(*_quantize(fresh.weight, self.scheme))
        if self.bias is not None and fresh.bias is not None:
            self.bias.data = fresh.bias.data

    def _assign(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.weight.data, self.weight_scale.data = weight, scale

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
        quantized, scale = _quantize(weight, scheme)
        if not scale.is_meta and not scale.isfinite().all():
            raise ValueError(f"{who}: the weight holds NaN or inf in {_rows(~scale.isfinite())}.")
        layer.weight, layer.weight_scale = _frozen(quantized), _frozen(scale)
        if bias is not None:
            layer.bias = nn.Parameter(_normal(bias), requires_grad=bias.requires_grad)
        return layer.train(linear.training)

    def dequantize(self) -> nn.Linear:
        """A float `nn.Linear` with the weight `weight * weight_scale`, in `dtype`."""
        has_bias = self.bias is not None
        linear = nn.Linear(
            self.in_features, self.out_features, has_bias, device="meta", dtype=self.dtype
        )
        weight = F.dequantize(self.weight, self.weight_scale, self.dtype, scheme=self.scheme)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(
                self.bias.detach().clone(), requires_grad=self.bias.requires_grad
            )
        return linear.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype not in FLOATS or input.dim() == 0 or input.shape[-1] != self.in_features:
            self._refuse(input.dtype, tuple(input.shape))
        if input.device != self.weight.device:
            raise ValueError(
                f"{self._name()}: the input is on {input.device}, the layer on "
                f"{self.weight.device}; move one of them with .to(device)."
            )
        return F.linear(input, self.weight, self.weight_scale, self.bias, scheme=self.scheme)

    def _name(self) -> str:
        return f"qnn.QLinear({self.in_features}, {self.out_features}, scheme={self.scheme!r})"

    def _refuse(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if dtype in (torch.int8, torch.uint8) or (dtype.itemsize == 1 and dtype.is_floating_point):
            raise TypeError(
                f"{self._name()}: the input is {dtype}, a storage dtype; some models cast "
                "activations to weight.dtype. Pass float32, bfloat16 or float16 activations, or "
                "exclude this layer from convert()."
            )
        if dtype not in FLOATS:
            raise TypeError(
                f"{self._name()}: the input must be float32, bfloat16, float16 or float64, got "
                f"{dtype}; cast it with .float()."
            )
        raise ValueError(
            f"{self._name()}: the input must be [..., {self.in_features}], got {shape}; "
            f"its last axis must have in_features = {self.in_features} elements."
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QLinear:
        # A cast of the whole model reaches the scale, and `.type()` the weight too. Their values
        # stay as they are; only their device follows.
        kept = [(name, getattr(self, name).data) for name in ("weight", "weight_scale")]
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
        key = prefix + "weight"
        try:
            loaded = self._read_state(state_dict.get(key), state_dict.get(key + "_scale"))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.removesuffix('.') or self._name()}: {error}")
            return
        if loaded is not None:
            state_dict = {**state_dict, key: loaded[0], key + "_scale": loaded[1]}
        foreign = [k for k in _FOREIGN_KEYS if prefix + k in state_dict]
        if foreign:
            error_msgs.append(
                f"{prefix.removesuffix('.') or self._name()}: {', '.join(foreign)} belongs to "
                f"another scheme than {self.scheme!r}; build the model with the scheme that the "
                "checkpoint was saved in."
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for parameter in (self.weight, self.weight_scale):
            parameter.requires_grad_(False)

    def _read_state(self, weight: Any, scale: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A checkpoint's weight and scale as this layer holds them; None where it has neither."""
        if weight is None and scale is None:
            return None
        if weight is None:
            raise ValueError("the state has a weight_scale but no weight.")
        shape, storage = (self.out_features, self.in_features), self._scheme.weight.storage
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight must be {list(shape)}, got {list(weight.shape)}.")
        if weight.dtype in FLOATS:
            if scale is not None:
                raise ValueError(
                    f"weight is {weight.dtype} and so float, yet the state has a weight_scale too."
                )
            weight, scale = _quantize(weight, self.scheme)
            if not scale.is_meta and not scale.isfinite().all():
                raise ValueError(f"weight holds NaN or inf in {_rows(~scale.isfinite())}.")
            return weight, scale
        if weight.dtype != storage:
            raise TypeError(
                f"weight is {weight.dtype}, but scheme {self.scheme!r} stores {storage}; build the "
                "model with the scheme that the checkpoint was saved in."
            )
        if scale is None:
            raise ValueError(
                f"weight is {weight.dtype}, yet the state has no weight_scale: the checkpoint is "
                "truncated."
            )
        if tuple(scale.shape) != (self.out_features, 1) or scale.dtype not in FLOATS:
            got = f"{scale.dtype} {list(scale.shape)}"
            raise ValueError(f"weight_scale must be float [{self.out_features}, 1], got {got}.")
        scale = scale.float()
        bad = ~(scale.isfinite() & (scale > 0))
        if not scale.is_meta and bad.any():
            raise ValueError(
                f"weight_scale must be positive and finite; it is not in {_rows(bad)}."
            )
        return weight, scale

    def extra_repr(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f", dtype={self.dtype}"
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{features}, bias={self.bias is not None}{dtype}, scheme={self.scheme!r}"

    def __repr__(self) -> str:
        if torch.compiler.is_compiling():  # torch.vmap asks for the name of what it maps
            return self._name()
        return f"{type(self).__name__}({self.extra_repr()})  # {linear_backend(self)}"


# What other schemes of the compressed-tensors convention store beside or instead of `weight`.
_FOREIGN_KEYS = (
    "weight_packed",
    "weight_global_scale",
    "weight_zero_point",
    "input_scale",
    "weight_scale_inv",
)


def _quantize(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        weight, scale = F.quantize(_normal(weight), scheme)
    return weight, scale


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
    """`row 3 and 2 more`, from a mask `[N, 1]`."""
    rows = bad.flatten().nonzero().flatten().tolist()
    return f"row {rows[0]}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
