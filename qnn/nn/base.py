"""What every quantised layer shares: stored weights, casts, state, checks, representation."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from qnn import functional as F
from qnn.functional.tensor_parallel import is_distributed
from qnn.kernels import Scheme, get_scheme
from qnn.kernels.cpu.forking import return_threads
from qnn.kernels.formats import FLOATS, Part
from qnn.kernels.torch_private import is_jit_tracing
from qnn.nn.values import (
    CALIBRATE,
    Found,
    bad_part,
    frozen,
    name_of,
    needs_calibration,
    normal,
    quantize,
    rows_of,
    why_not_calibration,
    why_not_finite,
)
from qnn.nn.weight_view import FloatWeight

LayerT = TypeVar("LayerT", bound="Quantized")


class Quantized(nn.Module):
    """A layer that holds its weights quantised, as the parts of its scheme's format of weights.

    A subclass says which weights it has (`_weight_shapes`), what calibration finds for it
    (`_calibration`), which backend serves it (`_backend`) and the call that makes it (`_who`). All
    tensors are in `_parameters`: the parts under `weight`, `weight_scale`, …, and the biases, in
    `dtype`. Code of qnn reads parts by their own names (`_part`, `_stored_of`), never through
    `layer.weight`.

    `_uncalibrated` is True while what calibration finds is missing; a call is an error then. It is
    a plain bool, so that a graph can decide by it.
    """

    scheme: str
    dtype: torch.dtype
    _uncalibrated: bool

    # -- what a subclass says ---------------------------------------------------------------------

    def _weight_shapes(self) -> dict[str, tuple[int, int]]:
        """The float shape of each quantised weight, by its name in the float layer."""
        raise NotImplementedError

    def _calibration(self) -> dict[str, Found]:
        """What calibration finds, by the name of its parameter."""
        return {}

    def _backend(self) -> str:
        raise NotImplementedError

    @property
    def _who(self) -> str:
        """The call that makes the layer, for errors."""
        return name_of(self)

    # -- weights ----------------------------------------------------------------------------------

    @property
    def _scheme(self) -> Scheme:
        return get_scheme(self.scheme)

    def _parts_of(self, weight: str) -> list[tuple[str, Part]]:
        """The parts of a weight, each with the name of its parameter, the values first."""
        return [(weight + part.suffix, part) for part in self._scheme.weight.parts]

    def _disk_names(self) -> set[str]:
        """What a file has of the weights beside what is held here."""
        form = self._scheme.weight
        more = {part.suffix for part in form.on_disk} - {part.suffix for part in form.parts}
        return {weight + suffix for weight in self._weight_shapes() for suffix in more}

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
        codes = held.detach().to(part.dtype)
        if not torch.compiler.is_compiling():
            held.data = codes
        return codes

    def _stored_of(self, weight: str) -> tuple[nn.Parameter, ...]:
        """The parameters that a weight is stored in, the values first."""
        return tuple(
            cast(nn.Parameter, self._parameters[name]) for name, _ in self._parts_of(weight)
        )

    def _put_back(self, weight: str, parts: Sequence[nn.Parameter]) -> None:
        """Refuse what has taken the parameters out of the layer, and undo it."""
        names = [name for name, _ in self._parts_of(weight)]
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

    def _empty_weights(self, device: Any, *, on_disk: bool = False) -> None:
        """Make room for every weight, and for what calibration finds; with `on_disk` as a file has
        them, for a reader that sets one tensor after the other.
        """
        form = self._scheme.weight
        for name in self._disk_names():
            self._parameters.pop(name, None)
        for weight, shape in self._weight_shapes().items():
            for part in form.on_disk if on_disk else form.parts:
                empty = torch.empty(part.shape(*shape), dtype=part.dtype, device=device)
                self._parameters[weight + part.suffix] = frozen(empty)
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

    def _quantized(self, weight: str, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of a float weight; a ValueError for one that cannot be held."""
        shape = self._weight_shapes()[weight]
        if tuple(value.shape) != shape:
            raise ValueError(f"{weight} must be {list(shape)}, got {list(value.shape)}.")
        if (reason := why_not_finite(value)) is not None:
            raise ValueError(f"{weight} holds {reason}.")
        return quantize(value, self.scheme)

    def _dequantized(self, weight: str) -> torch.Tensor:
        """The float weight, in `dtype`."""
        parts = [self._part(name, part) for name, part in self._parts_of(weight)]
        return F.dequantize(parts, dtype=self.dtype, scheme=self.scheme)

    # What is asked of a layer by the name of a weight: its float form.

    def __getattr__(self, name: str) -> Any:
        # Reached for parameters and their like alone, and never by `forward`.
        if name.startswith("weight") and name in self._weight_shapes():
            held = [self._parameters.get(part) for part, _ in self._parts_of(name)]
            if any(part is None for part in held):
                raise AttributeError(f"{self._who} has no {name}: it was deleted.")
            if is_distributed(cast(torch.Tensor, held[0])):
                return held[0]  # sharded: what fully_shard put here, and looks for
            if torch.compiler.is_compiling() or is_jit_tracing():
                return self._dequantized(name)
            return FloatWeight(self, name)
        if name.startswith("weight") and name in self._disk_names():
            return self.state_dict()[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_tensor = isinstance(value, torch.Tensor)
        if is_tensor and name.startswith("weight") and name in self._weight_shapes():
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
        if name.startswith("weight") and name in self._weight_shapes():
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
        and so does a parameter that holds them.
        """
        if isinstance(value, FloatWeight) and value.stands_for(self, weight):
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
        rows, columns = self._weight_shapes()[weight]
        shape = part.shape(rows, columns)
        if value.dtype != part.dtype or tuple(value.shape) != shape:
            raise TypeError(
                f"{self._who}.{weight} takes floats [{rows}, {columns}], which it quantises, or "
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

    def _kept(self) -> list[str]:
        """The parameters whose dtype no cast changes."""
        parts = [name for weight in self._weight_shapes() for name, _ in self._parts_of(weight)]
        return [*parts, *self._calibration()]

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

    # -- state ------------------------------------------------------------------------------------

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
        """Read everything first, so that what is refused changes nothing."""
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # Before the state is read: a hook may rename its keys.
        hooks = self._load_state_dict_pre_hooks
        for hook in hooks.values():
            hook(state_dict, prefix, *rest)
        given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        try:
            read = self._read_state(given)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.removesuffix('.') or self._who}: {error}")
            return
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        dtype = self._dtype_of(given) if assign else None
        try:
            self._load_state_dict_pre_hooks = OrderedDict()
            super()._load_from_state_dict(
                {prefix + name: tensor for name, tensor in read.items()}, prefix, *rest
            )
        finally:
            self._load_state_dict_pre_hooks = hooks
            return_threads()
        self.dtype = dtype or self.dtype
        for name in self._kept():
            cast(nn.Parameter, self._parameters[name]).requires_grad_(False)
        if self._calibration().keys() & read.keys():
            self._uncalibrated = False

    def _dtype_of(self, given: Mapping[str, Any]) -> torch.dtype | None:
        """The dtype of a layer that takes over a state's own tensors."""
        floats = [name for name in self._parameters if name not in self._kept()]
        for name in (*floats, *self._weight_shapes()):
            if name in given and given[name].dtype in FLOATS:
                return cast(torch.dtype, given[name].dtype)
        return None

    def _read_state(self, given: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's tensors as this layer holds them, by name; a TypeError or ValueError for
        what it cannot take.
        """
        for name, tensor in given.items():
            if name in self._parameters and not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
        own = {*self._kept(), *self._weight_shapes(), *self._parameters} | self._disk_names()
        foreign = [name for name in given if name not in own and self._is_foreign(name)]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} belongs to another scheme than {self.scheme!r}; build the "
                "model with the scheme that the checkpoint was saved in."
            )
        apart = {*self._weight_shapes()} | self._disk_names()
        read = {name: tensor for name, tensor in given.items() if name not in apart}
        loaded = False
        for weight in self._weight_shapes():
            parts = self._read_weight(weight, given)
            loaded = loaded or bool(parts)
            read |= parts
        found = self._calibration()
        if found and (loaded or found.keys() & given.keys()):
            read |= {name: self._read_found(name, each, given) for name, each in found.items()}
        for name, parameter in self._parameters.items():
            if parameter is not None and name in given and name not in self._kept():
                self._require_bias(name, given[name], parameter)
        return read

    def _is_foreign(self, name: str) -> bool:
        """Whether a name that is none of this layer's is one of another scheme's layers."""
        return any(name == weight + end for weight in self._weight_shapes() for end in _SUFFIXES)

    def _read_weight(self, weight: str, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The parts of a weight, quantised if it is float; nothing where the state has none."""
        parts = self._parts_of(weight)
        form = self._scheme.weight
        names = [weight + part.suffix for part in (*form.parts, *form.on_disk)]
        given = {name: state[name] for name in (weight, *names) if name in state}
        if not given:
            return {}
        first = parts[0][0]
        values = given.get(weight, given.get(first))
        if values is None:
            raise ValueError(f"the state has a {next(iter(given))} but no {first}.")
        if values.dtype in FLOATS:
            if len(given) > 1:
                raise ValueError(
                    f"{weight} is {values.dtype} and so float, yet the state has a "
                    f"{list(given)[1]} too."
                )
            made = self._quantized(weight, values)
            return {name: part for (name, _), part in zip(parts, made, strict=True)}
        if weight in given and first != weight:
            raise TypeError(
                f"{weight} is {values.dtype}, but scheme {self.scheme!r} stores {first}; build the "
                "model with the scheme that the checkpoint was saved in."
            )
        shape = self._weight_shapes()[weight]
        held = {part.suffix: part.dtype for part in form.parts}
        for part in {*form.on_disk} - {*form.parts}:
            name = weight + part.suffix
            if name in given and given[name].dtype != held.get(part.suffix):
                wanted = part.shape(*shape)
                given[name] = self._read_plain(name, given[name], part.dtype, wanted)
        found = {name.removeprefix(weight): tensor for name, tensor in given.items()}
        given = {weight + end: tensor for end, tensor in form.from_disk(found, shape).items()}
        return {name: self._read_part(name, part, shape, given) for name, part in parts}

    def _read_part(
        self, name: str, part: Part, weight: tuple[int, int], given: Mapping[str, Any]
    ) -> torch.Tensor:
        if name not in given:
            first = next(iter(given))
            raise ValueError(
                f"{first} is {given[first].dtype}, yet the state has no {name}: the checkpoint is "
                "truncated."
            )
        tensor = self._read_plain(name, given[name], part.dtype, part.shape(*weight))
        if (bad := bad_part(tensor, part)) is not None:
            what = (
                "must be positive and finite; it is not" if part.is_scale else "holds codes of NaN"
            )
            raise ValueError(f"{name} {what} in {rows_of(bad)}.")
        return tensor

    def _read_found(self, name: str, found: Found, given: Mapping[str, Any]) -> torch.Tensor:
        if name not in given:
            hint = (
                "where the grid is symmetric, add zeros"
                if name.endswith("zero_point") and len(given)
                else needs_calibration(self.scheme)
            )
            raise ValueError(f"the state has no {name}; {hint}.")
        tensor = self._read_plain(name, given[name], found.dtype, found.shape)
        if (reason := why_not_calibration(found, tensor)) is not None:
            raise ValueError(f"{name} {reason}.")
        return tensor

    def _read_plain(
        self, name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """A tensor of the right dtype and shape; float32 is read from any float dtype."""
        if dtype == torch.float32 and tensor.dtype in FLOATS:
            tensor = tensor.float()
        elif tensor.dtype != dtype:
            raise TypeError(
                f"{name} is {tensor.dtype}, but scheme {self.scheme!r} stores {dtype}; build "
                "the model with the scheme that the checkpoint was saved in."
            )
        if tuple(tensor.shape) != shape:
            # A scale of the whole tensor is a scalar in some files.
            if tensor.numel() == 1 and shape == (1,):
                return tensor.reshape(1)
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} must be {kind} {list(shape)}, got {kind} {list(tensor.shape)}."
            )
        return tensor

    def _require_bias(self, name: str, tensor: torch.Tensor, held: torch.Tensor) -> None:
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float, got {tensor.dtype}.")
        if tensor.shape != held.shape:
            raise ValueError(f"{name} must be {list(held.shape)}, got {list(tensor.shape)}.")
        if (reason := why_not_finite(tensor)) is not None:
            raise ValueError(f"{name} holds {reason}.")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        form = self._scheme.weight
        if self._parameters.keys() & self._disk_names():
            return  # held as in a file
        for weight, shape in self._weight_shapes().items():
            parts = self._parts_of(weight)
            held = [destination[prefix + n] for n, _ in parts if prefix + n in destination]
            if len(held) < len(parts) or any(map(is_distributed, held)):
                continue  # deleted, or a shard, which is written as it is
            for i, (_, part) in enumerate(parts):
                if held[i].dtype != part.dtype:  # as in `_part`
                    held[i] = held[i].detach().to(part.dtype)
            made = zip(form.on_disk, form.to_disk(held, shape), strict=True)
            destination.update({prefix + weight + part.suffix: each for part, each in made})

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


# What schemes of the compressed-tensors convention and of its neighbours store beside a weight.
_SUFFIXES = (
    "_packed",
    "_shape",
    "_scale",
    "_global_scale",
    "_zero_point",
    "_scale_inv",
    "_scale_2",
)
