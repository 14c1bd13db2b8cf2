"""How a layer with quantised weights reads a checkpoint, and what it writes into one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from qnn.functional.layout import MATRIX, Layout
from qnn.functional.tensor_parallel import is_distributed
from qnn.kernels import SCHEMES, Scheme, get_scheme
from qnn.kernels.cpu.forking import return_threads
from qnn.kernels.formats import FLOATS, Part
from qnn.nn.values import (
    Found,
    bad_part,
    name_of,
    needs_calibration,
    quantize,
    rows_of,
    why_not_calibration,
    why_not_finite,
)


class Stored(nn.Module):
    """A module whose weights are stored as the parts of its scheme's format, under `weight`,
    `weight_scale`, …, beside what calibration finds for it and biases in `dtype`.
    """

    scheme: str
    dtype: torch.dtype
    _uncalibrated: bool
    _layout: Layout = MATRIX  # of the weights' axes

    def _weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The float shape of each quantised weight, by its name in the float layer."""
        raise NotImplementedError

    def _calibration(self) -> dict[str, Found]:
        """What calibration finds, by the name of its parameter."""
        return {}

    @property
    def _who(self) -> str:
        """The call that makes the layer, for errors."""
        return name_of(self)

    # -- names ------------------------------------------------------------------------------------

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

    def _kept(self) -> list[str]:
        """The parameters whose dtype no cast changes."""
        parts = [name for weight in self._weight_shapes() for name, _ in self._parts_of(weight)]
        return [*parts, *self._calibration()]

    def _quantized(self, weight: str, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of a float weight; a ValueError for one that cannot be held."""
        shape = self._weight_shapes()[weight]
        if tuple(value.shape) != shape:
            raise ValueError(f"{weight} must be {list(shape)}, got {list(value.shape)}.")
        if (reason := why_not_finite(value)) is not None:
            raise ValueError(f"{weight} holds {reason}.")
        return quantize(value, self.scheme, self._layout)

    def _codes(self, name: str, held: torch.Tensor, part: Part) -> torch.Tensor:
        """Codes that are held in another dtype; a TypeError where the values are no codes."""
        codes = held.detach().to(part.dtype)
        exact = torch.compiler.is_compiling() or held.is_meta
        if not exact and not torch.equal(codes.to(held.dtype), held):
            raise TypeError(
                f"{self._who}: {name} was set to values of {held.dtype} that are no codes of "
                f"{part.dtype}, past load_state_dict, as accelerate sets those of a float "
                "checkpoint. Load such a file with load_state_dict, which quantises it, or the "
                "state of a converted model."
            )
        return codes

    # -- from and into a checkpoint ---------------------------------------------------------------

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
                wanted = self._layout.shape(part, shape)
                given[name] = self._read_plain(name, given[name], part.dtype, wanted)
        found = {name.removeprefix(weight): tensor for name, tensor in given.items()}
        found = self._layout.from_disk(form, found, shape)
        given = {weight + end: tensor for end, tensor in found.items()}
        return {name: self._read_part(name, part, shape, given) for name, part in parts}

    def _read_part(
        self, name: str, part: Part, weight: tuple[int, ...], given: Mapping[str, Any]
    ) -> torch.Tensor:
        if name not in given:
            first = next(iter(given))
            raise ValueError(
                f"{first} is {given[first].dtype}, yet the state has no {name}: the checkpoint is "
                "truncated."
            )
        shape = self._layout.shape(part, weight)
        tensor = self._read_plain(name, given[name], part.dtype, shape)
        if (bad := bad_part(tensor, part)) is not None:
            what = (
                "must be positive and finite; it is not" if part.is_scale else "holds codes of NaN"
            )
            if part.span is not None:
                what = f"must lie in {part.span[0]} … {part.span[1]}; it does not"
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
                    held[i] = self._codes(parts[i][0], held[i], part)
            made = zip(form.on_disk, self._layout.to_disk(form, held, shape), strict=True)
            destination.update({prefix + weight + part.suffix: each for part, each in made})


# What schemes, the compressed-tensors convention and its neighbours store beside a weight.
_SUFFIXES = {part.suffix for each in SCHEMES.values() for part in each.weight.on_disk}
_SUFFIXES |= {"_scale_inv", "_scale_2"}
