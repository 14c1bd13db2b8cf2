"""What every quantised layer shares: stored weights, casts, state, checks, representation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from qnn.functional.tensor_parallel import is_distributed
from qnn.kernels.formats import FLOATS, Part
from qnn.kernels.torch_private import is_jit_tracing
from qnn.nn.state import Stored
from qnn.nn.values import (
    CALIBRATE,
    bad_part,
    frozen,
    normal,
    quantize,
    rows_of,
    why_not_calibration,
)
from qnn.nn.weight_view import FloatWeight

LayerT = TypeVar("LayerT", bound="Quantized")


class Quantized(Stored):
    """A layer that holds its weights quantised, as the parts of its scheme's format of weights.

    A subclass says which weights it has (`_weight_shapes`), what calibration finds for it
    (`_calibration`), which backend serves it (`_backend`), the call that makes it (`_who`), and the
    float layer in its place (`_float`). All tensors are in `_parameters`: the parts under `weight`,
    `weight_scale`, …, and the biases, in `dtype`. Code of qnn reads parts by their own names
    (`_held`, `_stored_of`), never through `layer.weight`.

    `_uncalibrated` is True while what calibration finds is missing; a call is an error then. It is
    a plain bool, so that a graph can decide by it.
    """

    # -- what a subclass says ---------------------------------------------------------------------

    # What the names of its weights begin with, which is asked of each name that is looked up.
    _prefixes: tuple[str, ...] = ("weight",)

    def _backend(self) -> str:
        raise NotImplementedError

    def _float(self, device: Any) -> nn.Module:
        """A float layer of these sizes, in `dtype`."""
        raise NotImplementedError

    # -- weights ----------------------------------------------------------------------------------

    def _set_dtype(self, dtype: torch.dtype | None) -> None:
        """The dtype of what is not quantised; a TypeError for one that is not float."""
        self.dtype = dtype or torch.get_default_dtype()
        if self.dtype not in FLOATS:
            able = ", ".join(map(str, FLOATS))
            raise TypeError(f"{self._who}: dtype must be one of {able}, got {self.dtype}.")

    @property
    def _device(self) -> torch.device:
        first = next(iter(self._part_names.values()))[0]
        return cast(torch.Tensor, self._parameters[first]).device

    def _part(self, name: str, part: Part) -> torch.Tensor:
        """A stored part, as it must be.

        What sets parameters in the dtype that `layer.weight` shows (accelerate) leaves codes as
        floats, exactly; they become codes again here, once.
        """
        held = cast(torch.Tensor, self._parameters[name])
        if held.requires_grad:
            raise TypeError(
                f"{self._who}: {name} is quantised and cannot be trained, yet it requires a "
                "gradient; leave it out of requires_grad_(True) and of modules_to_save."
            )
        if held.dtype == part.dtype:
            return held
        codes = self._codes(name, held, part)
        if not torch.compiler.is_compiling():
            held.data = codes
        return codes

    def _held(self, weight: str) -> tuple[torch.Tensor, ...]:
        """The tensors that a weight is stored in, as an op takes them."""
        parameters: Any = self._parameters
        held = [parameters[name] for name in self._part_names[weight]]
        for part in held:
            if part.requires_grad:
                break
        else:
            if held[0].dtype is self._storage:
                return tuple(held)
        return tuple(self._part(name, part) for name, part in self._parts_of(weight))

    def _stored_of(self, weight: str) -> tuple[nn.Parameter, ...]:
        """The parameters that a weight is stored in, the values first."""
        parameters: Any = self._parameters
        return tuple(parameters[name] for name in self._part_names[weight])

    def _put_back(self, weight: str, parts: Sequence[nn.Parameter]) -> None:
        """Refuse what has taken the parameters out of the layer, and undo it."""
        names = self._part_names[weight]
        if all(name in self._parameters for name in names):
            return
        for name, part in zip(names, parts, strict=True):
            self._parameters.pop(name, None)  # the parts stand together, in their order
            self._parameters[name] = part
        raise TypeError(self._not_parametrised(weight))

    def _not_parametrised(self, weight: str) -> str:
        return (
            f"{self._who}: its {weight} is quantised and cannot be parametrised, pruned, "
            "registered again or taken away; do so in float, and convert afterwards."
        )

    def _empty_weights(
        self,
        device: Any,
        floats: Mapping[str, Sequence[int] | None] | None = None,
        *,
        on_disk: bool = False,
    ) -> None:
        """Make room for every weight, and for what calibration finds; for the biases too, where
        `floats` are the shapes of the float layer's parameters, in their order. With `on_disk` as a
        file has the weights, for a reader that sets one tensor after the other.
        """
        form, weights = self._scheme.weight, self._weight_shapes()
        self._storage = form.storage
        self._part_names = {name: [part for part, _ in self._parts_of(name)] for name in weights}
        for name in self._disk_names():
            self._parameters.pop(name, None)
        for name, shape in (weights if floats is None else floats).items():
            if name in weights:
                for part in form.on_disk if on_disk else form.parts:
                    empty = self._layout.empty(part, weights[name], device)
                    self._parameters[name + part.suffix] = frozen(empty)
            elif shape is None:
                self._parameters[name] = None
            else:
                bias = torch.empty(shape, dtype=self.dtype, device=device)
                self._parameters[name] = nn.Parameter(bias)
        self._empty_calibration(device)

    def _empty_calibration(self, device: Any) -> None:
        for name, each in self._calibration().items():
            # Zeros are no scale, and NaN is no table: neither can be taken for a calibration.
            fill = 0 if each.positive or not each.dtype.is_floating_point else torch.nan
            values = torch.full(each.shape, fill, dtype=each.dtype, device=device)
            self._parameters[name] = frozen(values)
        self._uncalibrated = bool(self._calibration())

    def _set_parts(self, weight: str, parts: Iterable[torch.Tensor]) -> None:
        """Hold a weight in new parameters."""
        for (name, _), part in zip(self._parts_of(weight), parts, strict=True):
            self._parameters[name] = frozen(part)

    def _dequantized(self, weight: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The float weight, in the layer's `dtype` if it is None."""
        return self._layout.dequantize(self._held(weight), dtype or self.dtype, self.scheme)

    # -- from the float layer and back ------------------------------------------------------------

    def _take(self, floats: Mapping[str, torch.Tensor | None]) -> None:
        """Hold the parameters of a float layer in new ones, quantised where they are weights; not
        calibrated.
        """
        for name, value in floats.items():
            if value is None:
                continue
            if name in self._weight_shapes():
                self._set_parts(name, quantize(value, self.scheme, self._layout))
            else:
                bias = normal(value).clone()
                self._parameters[name] = nn.Parameter(bias, requires_grad=value.requires_grad)
        self._empty_calibration(self._device)

    def reset_parameters(self) -> None:
        """Draw the weights that the float layer would draw, and quantise them."""
        if self._device.type != "meta":
            self._draw_from(self._float(self._device))

    def _draw_from(self, layer: nn.Module) -> None:
        for name, value in layer.named_parameters(recurse=False):
            if name in self._weight_shapes():
                self._write(name, value)
            else:
                cast(nn.Parameter, self._parameters[name]).data = value.detach()

    def dequantize(self) -> nn.Module:
        """The float layer, with the weights that the stored ones stand for, in `dtype`."""
        layer = self._float("meta")
        for name, _ in list(layer.named_parameters(recurse=False)):
            if name in self._weight_shapes():
                values, trained = self._dequantized(name), True
            else:
                bias = cast(torch.Tensor, self._parameters[name])
                values, trained = bias.detach().to(self.dtype, copy=True), bias.requires_grad
            setattr(layer, name, nn.Parameter(values, requires_grad=trained))
        return layer.train(self.training)

    # -- what is asked of a layer by the name of a weight: its float form -------------------------

    def __getattr__(self, name: str) -> Any:
        # Reached for parameters and their like alone, and never by `forward`.
        if name.startswith(self._prefixes) and name in self._weight_shapes():
            held = [self._parameters.get(part) for part, _ in self._parts_of(name)]
            if any(part is None for part in held):
                raise AttributeError(f"{self._who} has no {name}: it was deleted.")
            if is_distributed(cast(torch.Tensor, held[0])):
                return held[0]  # sharded: what fully_shard put here, and looks for
            if torch.compiler.is_compiling() or is_jit_tracing():
                return self._dequantized(name)
            return FloatWeight(self, name)
        if name.startswith(self._prefixes) and name in self._disk_names() - self._parameters.keys():
            return self.state_dict()[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_tensor = isinstance(value, torch.Tensor)
        if is_tensor and name.startswith(self._prefixes) and name in self._weight_shapes():
            self._assign(name, value)
            return
        super().__setattr__(name, value)
        if is_tensor and name in self._calibration():
            self._uncalibrated = self._is_uncalibrated()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # weight_g, weight_orig
        other = name.startswith("weight") and name not in {*self._kept(), *self._parameters}
        if other or isinstance(param, FloatWeight):
            raise TypeError(self._not_parametrised("weight"))
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name.startswith(self._prefixes) and name in self._weight_shapes():
            raise TypeError(self._not_parametrised(name))
        super().__delattr__(name)

    def requires_grad_(self: LayerT, requires_grad: bool = True) -> LayerT:
        """As of `nn.Module`; what is quantised cannot be trained."""
        if requires_grad:
            raise TypeError(
                f"{self._who}: its weight is quantised and cannot be trained. Train adapters over "
                "it, or leave the layer in float: convert(…, exclude=…), and no modules_to_save."
            )
        return super().requires_grad_(requires_grad)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter as it is stored, also where `layer.weight` is the float weight."""
        held = self._parameters.get(target)
        return super().get_parameter(target) if held is None else held

    def _assign(self, weight: str, value: torch.Tensor) -> None:
        """`layer.weight = value`: floats are quantised into new parameters; codes stay as they are,
        and so does a parameter that holds them. The weight of another layer that stores it alike is
        shared: the two are tied.
        """
        if isinstance(value, FloatWeight):
            if value.stands_for(self, weight):
                return
            if (shared := value.stored_for(self, weight)) is not None:
                self._parameters.update(zip(self._part_names[weight], shared, strict=True))
                return
        (first, part), *_ = self._parts_of(weight)
        if value.dtype == part.dtype and isinstance(value, nn.Parameter):
            self._require_codes(weight, value)
            super().__setattr__(first, value)
            return
        if value.grad_fn is not None and torch.is_grad_enabled():
            raise TypeError(
                f"{self._who}.{weight} is frozen, and a gradient to what is assigned would be "
                "lost; assign value.detach()."
            )
        for name, made in self._to_store(weight, value).items():
            self._parameters[name] = frozen(made)

    def _write(self, weight: str, value: torch.Tensor) -> None:
        """`layer.weight.data = value`, and what was written in place: as `_assign`, into the
        parameters that are there, so that tied layers follow.
        """
        for name, made in self._to_store(weight, value).items():
            held = cast(nn.Parameter, self._parameters[name])
            if held.device == made.device:
                held.data = made
            else:
                self._parameters[name] = frozen(made)

    def _to_store(self, weight: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts that change when `value` is written; a TypeError or ValueError, before
        anything is, for what cannot be.
        """
        parts = self._parts_of(weight)
        (first, part), *_ = parts
        who = f"{self._who}.{weight}"
        held = self._parameters.get(first)
        if held is None:
            raise TypeError(
                f"{who} was deleted. A quantised weight cannot be parametrised; do so in float, "
                "and convert afterwards."
            )
        if is_distributed(held):
            raise TypeError(f"{who} is sharded; write to it before sharding.")
        if value.dtype in FLOATS:
            try:
                made = self._quantized(weight, value)
            except ValueError as error:
                raise ValueError(f"{self._who}: {error}") from None
            return {name: each for (name, _), each in zip(parts, made, strict=True)}
        self._require_codes(weight, value)
        if (bad := bad_part(value, part)) is not None:
            raise ValueError(f"{who}: the codes hold NaN in {rows_of(bad)}.")
        return {first: normal(value)}

    def _require_codes(self, weight: str, value: torch.Tensor) -> None:
        (_, part), *_ = self._parts_of(weight)
        sizes = self._weight_shapes()[weight]
        shape = self._layout.shape(part, sizes)
        if value.dtype != part.dtype or tuple(value.shape) != shape:
            raise TypeError(
                f"{self._who}.{weight} takes floats {list(sizes)}, which it quantises, or "
                f"its own codes, {part.dtype} {list(shape)}; got {value.dtype} "
                f"{list(value.shape)}."
            )

    def _set_calibration(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take what calibration has found."""
        for name, value in values.items():
            self._parameters[name] = frozen(value)
        self._uncalibrated = False

    def _is_uncalibrated(self) -> bool:
        return any(
            why_not_calibration(each, self._parameters.get(name)) is not None
            for name, each in self._calibration().items()
        )

    def _refuse_uncalibrated(self) -> None:
        """Raise where a call has no ranges. Values that were written into the parameters past
        `load_state_dict` count; a graph goes by the flag alone.
        """
        held = [cast(torch.Tensor, self._parameters[name]) for name in self._calibration()]
        if held[0].is_meta:
            return  # the shape of the result is what is asked for
        if not torch.compiler.is_compiling() and not self._is_uncalibrated():
            return
        raise RuntimeError(
            f"{self._who}: the layer is not calibrated, it has no range of its input yet. Load a "
            f"state that was saved after calibration, or {CALIBRATE}."
        )

    # -- casts and moves --------------------------------------------------------------------------

    def _apply(
        self: LayerT, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> LayerT:
        # A cast of the whole model reaches scales, tables and codes of float8. Their values stay as
        # they are; only their device follows.
        kept = [(n, p.data) for n in self._kept() if (p := self._parameters.get(n)) is not None]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, data in kept:
            parameter = cast(nn.Parameter, self._parameters[name])
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        device = kept[0][1].device if kept else None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

    def _bytes_in_float(self, counted: Iterable[torch.Tensor]) -> int:
        """Of the float layer's tensors, in `dtype`, those that are in `counted` here."""
        here = set(map(id, counted))
        sizes = [
            math.prod(shape)
            for weight, shape in self._weight_shapes().items()
            if id(self._stored_of(weight)[0]) in here
        ]
        kept = set(self._kept())
        sizes += [
            parameter.numel()
            for name, parameter in self._parameters.items()
            if parameter is not None and name not in kept and id(parameter) in here
        ]
        return self.dtype.itemsize * sum(sizes)

    # -- representation ---------------------------------------------------------------------------

    def __repr__(self) -> str:
        if torch.compiler.is_compiling():  # torch.vmap asks for the name of what it maps
            return self._who
        words = self.extra_repr() + (", not calibrated" if self._uncalibrated else "")
        return f"{type(self).__name__}({words})  # {self._backend()}"
