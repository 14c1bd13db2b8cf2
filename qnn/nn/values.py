"""What a layer asks of an input, a weight or a stored tensor before it takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from qnn.functional.layout import MATRIX, Layout
from qnn.functional.tensor_parallel import is_distributed
from qnn.kernels import Scheme
from qnn.kernels.cpu.forking import return_threads
from qnn.kernels.formats import FLOATS, Part


@dataclass(frozen=True)
class Found:
    """A tensor that calibration finds: `positive` for a scale. Before, a layer holds zeros or NaN
    in its place.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    positive: bool = False


def input_grid(scheme: Scheme) -> dict[str, Found]:
    """What calibration finds for a layer's input, by name; nothing where a scheme is not static."""
    if not scheme.static or scheme.activation is None:
        return {}
    return {
        "input" + part.suffix: Found(part.dtype, (1,), part.dtype == torch.float32)
        for part in scheme.activation.parts[1:]
    }


CALIBRATE = "run qnn.prepare(model), qnn.calibrate(model, batches), qnn.convert(model)"


def needs_calibration(scheme: str) -> str:
    """What a static scheme needs beside a float weight."""
    return (
        f"scheme {scheme!r} needs calibration: qnn.prepare(model), qnn.calibrate(model, batches), "
        "qnn.convert(model)"
    )


def name_of(layer: Any) -> str:
    """The call that makes a linear layer, for errors."""
    kind = f"qnn.{type(layer).__name__}"
    return f"{kind}({layer.in_features}, {layer.out_features}, scheme={layer.scheme!r})"


def of_other_kind(layer: nn.Module, *inputs: Any, **options: Any) -> Any:
    """The result of a layer for an input that is not a plain tensor, or None where it is one; a
    TypeError for what is not a tensor at all.

    `torch.fx` passes a proxy: the layer is a leaf of its graph, whoever traces, as torch's own
    layers are. A jagged nested tensor gives another one.
    """
    given: Any = inputs[0]
    if isinstance(given, torch.fx.Proxy):
        tracer: Any = given.tracer
        target = tracer.path_of_module(layer)
        return tracer.create_proxy("call_module", target, inputs, options)
    if not isinstance(given, torch.Tensor):
        kind, got = type(layer).__name__, type(given).__name__
        raise TypeError(f"qnn.{kind}: the input must be a tensor, got {got}.")
    if given.layout == torch.jagged:
        nested: Any = given
        if not isinstance(nested.shape[-1], int):
            return None  # the last axis is the ragged one
        return torch.nested.nested_tensor_from_jagged(
            layer.forward(nested.values()),
            nested.offsets(),
            nested.lengths(),
            jagged_dim=nested._ragged_idx,
        )
    return None


def check_input(layer: Any, input: torch.Tensor, weight: str) -> None:
    """Raise a TypeError or ValueError where a linear `layer` cannot take `input`; `weight` is the
    parameter that says where the layer is.
    """
    device, columns = layer._parameters[weight].device, layer.in_features
    if can_take(input, device) and input.dim() > 0 and input.shape[-1] == columns:
        return
    who = name_of(layer)
    require_input(who, input, device)
    raise ValueError(
        f"{who}: the input must be [..., {columns}], got {tuple(input.shape)}; its last axis must "
        f"have in_features = {columns} elements."
    )


def can_take(input: torch.Tensor, device: torch.device) -> bool:
    """Whether a layer on `device` can take an input of this layout, dtype and device."""
    dense = input.layout is torch.strided and not input.is_nested
    return dense and input.dtype in FLOATS and input.device == device


def require_input(who: str, input: torch.Tensor, device: torch.device) -> None:
    """Raise a TypeError or ValueError where `can_take` is False."""
    require_dense(who, input)
    require_float(who, input.dtype)
    if input.device != device:
        raise ValueError(
            f"{who}: the input is on {input.device}, the layer on {device}; move one of them with "
            ".to(device)."
        )


def require_dense(who: str, input: torch.Tensor) -> None:
    """Raise a TypeError for a sparse input, or a nested one whose layout is not jagged."""
    if input.is_nested and input.layout == torch.strided:
        raise TypeError(
            f"{who}: the input is a nested tensor of strided layout; build it with "
            "layout=torch.jagged, or pad it with .to_padded_tensor(0.0)."
        )
    if input.layout not in (torch.strided, torch.jagged):
        raise TypeError(
            f"{who}: the input is sparse ({input.layout}); convert it with .to_dense()."
        )


def require_float(who: str, dtype: torch.dtype) -> None:
    """Raise a TypeError unless an input of `dtype` can be taken."""
    if dtype in (torch.int8, torch.uint8) or (dtype.itemsize == 1 and dtype.is_floating_point):
        raise TypeError(
            f"{who}: the input is {dtype}, a storage dtype. Pass float32, bfloat16 or float16 "
            "activations, or exclude this layer from convert()."
        )
    if dtype not in FLOATS:
        raise TypeError(
            f"{who}: the input must be float32, bfloat16, float16 or float64, got {dtype}; cast it "
            "with .float()."
        )


def not_finite(tensor: torch.Tensor) -> torch.Tensor | None:
    """Where a float tensor holds NaN, inf or a value beyond float32, in which scales are: a mask of
    its rows, `[N]`; None where it has none, or has no values yet.

    Without anything as large as the tensor where all is well: the extremes are NaN where one value
    is.
    """
    values = local(tensor)
    if values.is_meta or not values.numel():
        return None
    if bool(torch.stack(torch.aminmax(values)).float().isfinite().all()):
        return None
    bad = ~values.float().isfinite()
    return bad.any(-1) if bad.dim() > 1 else bad


def require_floats(who: str, given: Mapping[str, torch.Tensor | None]) -> None:
    """Raise a TypeError or ValueError for a parameter of a float layer that cannot be held."""
    for name, value in given.items():
        if value is None:
            continue
        if value.dtype not in FLOATS:
            raise TypeError(f"{who}: {name} must be float, got {value.dtype}.")
        if (reason := why_not_finite(value)) is not None:
            raise ValueError(f"{who}: {name} holds {reason}.")


def why_not_finite(tensor: torch.Tensor) -> str | None:
    """`NaN or inf in row 3`, or what else keeps a float tensor from being held; None if nothing."""
    if (bad := not_finite(tensor)) is None:
        return None
    if bool(local(tensor).isfinite().all()):
        return f"values beyond float32, in which scales and sums are, in {rows_of(bad)}"
    return f"NaN or inf in {rows_of(bad)}"


def bad_part(tensor: torch.Tensor, part: Part) -> torch.Tensor | None:
    """Where a stored part means no number, as a mask of its rows; None where all is well."""
    values = local(tensor)
    if values.is_meta or not values.numel():
        return None
    scale = part.suffix.endswith("_scale")
    if values.dtype == torch.float8_e4m3fn and not scale:
        bad = (values.view(torch.uint8) & 0x7F) == 0x7F
    elif scale and values.dtype == torch.uint8:
        bad = values == 255  # an exponent of E8M0
    elif scale and values.dtype.is_floating_point:
        floats = values.float()
        # A block of zeros may have an e4m3 scale of zero; a float32 one never has.
        bad = ~(floats.isfinite() & (floats > 0 if part.dtype == torch.float32 else floats >= 0))
    elif part.span is not None:
        bad = (values < part.span[0]) | (values > part.span[1])
    else:
        return None
    return bad if bool(bad.any()) else None


def why_not_calibration(found: Found, tensor: torch.Tensor | None) -> str | None:
    """Why a tensor is not what calibration finds, or None."""
    if tensor is None:
        return "is missing"
    values = local(tensor)
    if values.is_meta or not found.dtype.is_floating_point:
        return None
    if found.positive and not bool((values.isfinite() & (values > 0)).all()):
        return "must be positive and finite; a layer that is not calibrated holds 0"
    if not bool(values.isfinite().all()):
        return "must be finite; a layer that is not calibrated holds NaN"
    return None


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The values of this process, without their history."""
    plain = tensor.detach()
    return cast(Any, plain).to_local() if is_distributed(plain) else plain


def quantize(
    weight: torch.Tensor, scheme: str, layout: Layout = MATRIX
) -> tuple[torch.Tensor, ...]:
    """The parts of a weight; plain tensors, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        parts = layout.quantize(normal(weight), scheme)
    return_threads()
    return parts


def normal(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without its history, and never an inference tensor, which has no version counter to
    watch.
    """
    with torch.inference_mode(False):
        return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that needs no gradient."""
    with torch.inference_mode(False):
        return nn.Parameter(
            tensor.clone() if tensor.is_inference() else tensor, requires_grad=False
        )


def rows_of(bad: torch.Tensor) -> str:
    """`row 3 and 2 more`, from a mask whose first axis is that of the rows."""
    rows = bad.flatten(1).any(-1) if bad.dim() > 1 else bad
    found = rows.nonzero().flatten().tolist()
    return f"row {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
