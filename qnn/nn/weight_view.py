"""`layer.weight` of a quantised layer: what reads as the float weight, and takes writes.

The parameters of a layer stay what they are, codes and scales. `FloatWeight` stands beside them: a
tensor without storage that knows shape, dtype and device, decodes the weight when an operator asks
for values, and quantises what is written to it into the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from qnn.kernels import Scheme
from qnn.kernels.torch_private import tree_leaves, tree_map_only


class Holder(Protocol):
    """What a view asks of the layer that it is a part of: a `Quantized`."""

    dtype: torch.dtype

    @property
    def _who(self) -> str: ...
    def _weight_shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def _scheme(self) -> Scheme: ...
    def _stored_of(self, weight: str) -> tuple[nn.Parameter, ...]: ...
    def _put_back(self, weight: str, parts: Sequence[nn.Parameter]) -> None: ...
    def _dequantized(self, weight: str) -> torch.Tensor: ...
    def _write(self, weight: str, value: torch.Tensor) -> None: ...


class FloatWeight(torch.Tensor):
    """The float weight of a quantised layer, decoded where it is used.

    What an operator returns is a plain tensor, but for views (`weight[0]`, `weight.T`), which are
    read-only: a write to one would be lost. A write to the weight itself, in place or by `.data`,
    is quantised into the layer; one that cannot be (a NaN, a wrong shape) is refused, and changes
    nothing. It needs no gradient, has no memory of its own, and a copy of it is a plain tensor.
    """

    _layer: Holder
    _name: str
    _values: torch.Tensor | None  # type: ignore[assignment]
    _held: tuple[nn.Parameter, ...]

    @staticmethod
    def __new__(cls, layer: Holder, name: str, values: torch.Tensor | None = None) -> FloatWeight:
        """Of the weight `name` of `layer`; `values`, decoded, of a view of it."""
        held = layer._stored_of(name)[0]
        shape = layer._weight_shapes()[name] if values is None else values.shape
        made: FloatWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=None if values is None else values.stride(),
            dtype=layer.dtype if values is None else values.dtype,
            device=held.device,
            requires_grad=False,
        )
        made._layer, made._name, made._values = layer, name, values
        made._held = layer._stored_of(name)
        if values is None:
            # Flags of others on the parameter: transformers' says that it has been loaded, and is
            # not to be drawn again.
            made.__dict__.update(vars(held))
            made._is_param = True  # isinstance(layer.weight, nn.Parameter), as of nn.Linear
        return made

    @property
    def _who(self) -> str:
        return f"{self._layer._who}.{self._name}"

    def stands_for(self, layer: Holder, name: str) -> bool:
        """Whether it is the weight `name` of `layer`, and no part of it."""
        return self._layer is layer and self._name == name and self._values is None

    def stored_for(self, layer: Holder, name: str) -> tuple[nn.Parameter, ...] | None:
        """What the whole weight is stored in, if a weight of `layer` can be the same; else None."""
        mine, theirs = self._layer, layer
        alike = (
            self._values is None
            and not any(getattr(layer, "_smoothed", False) for layer in (mine, theirs))
            and mine._scheme.weight == theirs._scheme.weight
            and mine._weight_shapes()[self._name] == theirs._weight_shapes()[name]
        )
        return mine._stored_of(self._name) if alike else None

    def _decoded(self) -> torch.Tensor:
        """The values: a tensor that nobody else holds, or those of a view."""
        if self._values is not None:
            return self._values
        self._layer._put_back(self._name, self._held)
        return self._layer._dequantized(self._name)

    def _refuse(self, what: str) -> None:
        raise TypeError(
            f"{self._who} is a float view of a quantised weight: {what}. Read a copy with "
            f".clone(), write with layer.{self._name} = tensor."
        )

    def _require_writable(self, *given: Any) -> None:
        """Raise where a write would be lost, or a gradient to one of the `given` tensors."""
        if self._values is not None:
            self._refuse("a write to a part or a view of it would be lost")
        if torch.is_grad_enabled() and any(
            isinstance(each, torch.Tensor) and each.requires_grad for each in tree_leaves(given)
        ):
            self._refuse("it is frozen, and a gradient to what is written would be lost")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None and args and isinstance(args[0], cls):
            return special(args[0], *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return FloatWeight(args[0]._layer, args[0]._name, args[0]._values)
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and _on_meta(kwargs.get("device")):
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.empty(args[0].shape, dtype=dtype, device="meta")  # of no values
        written = _written(func, args, kwargs)
        for view in written:
            view._require_writable(args, kwargs)
        decoded: dict[int, torch.Tensor] = {}

        def plain(view: FloatWeight) -> torch.Tensor:
            return decoded.setdefault(id(view), view._decoded())

        new_args, new_kwargs = tree_map_only(cls, plain, (args, kwargs))
        result = func(*new_args, **new_kwargs)
        for view in written:
            view._layer._write(view._name, decoded[id(view)])
        if written:
            back = {id(value): view for view in written for value in [decoded[id(view)]]}
            return tree_map_only(torch.Tensor, lambda t: back.get(id(t), t), result)
        first = next((arg for arg in args if isinstance(arg, cls)), None)
        if first is None or not _is_view(func):
            return result
        return tree_map_only(
            torch.Tensor, lambda values: FloatWeight(first._layer, first._name, values), result
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self._decoded()!r}  # float view of {self._who}"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made: torch.Tensor = _copy(self)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _copy(self).__reduce_ex__(protocol)


def _copy(view: FloatWeight) -> torch.Tensor:
    """A tensor of its own: a parameter where the view stands for one."""
    values = view._decoded().clone() if view._values is not None else view._decoded()
    return values if view._values is not None else nn.Parameter(values, requires_grad=False)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FloatWeight]:
    """The views among the arguments that an operator writes to."""
    found: list[FloatWeight] = []
    schema = func._schema.arguments
    for position, argument in enumerate(schema):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        for each in given if isinstance(given, list | tuple) else [given]:
            if isinstance(each, FloatWeight) and all(each is not other for other in found):
                found.append(each)
    return found


def _on_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _is_view(func: Any) -> bool:
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in func._schema.returns
    )


# What torch's functions do to a view where dispatch comes too late: attributes, and what needs
# memory.


def _set_data(view: FloatWeight, value: torch.Tensor) -> None:
    view._require_writable()
    view._layer._write(view._name, value)


def _set_item(view: FloatWeight, index: Any, value: Any) -> None:
    view._require_writable(value)
    values = view._decoded()
    with torch.no_grad():
        values[index] = value
    view._layer._write(view._name, values)


def _requires_grad(view: FloatWeight, requires_grad: bool = True) -> FloatWeight:
    if requires_grad:
        view._refuse("it is frozen and takes no gradient")
    return view


def _set_requires_grad(view: FloatWeight, requires_grad: bool) -> None:
    _requires_grad(view, requires_grad)


def _set_grad(view: FloatWeight, gradient: torch.Tensor | None) -> None:
    if gradient is not None:
        view._refuse("it is frozen and takes no gradient")


def _numpy(view: FloatWeight, *args: Any, **kwargs: Any) -> Any:
    array = view._decoded().numpy(*args, **kwargs)
    array.flags.writeable = False  # a write would be lost
    return array


def _array(view: FloatWeight, *args: Any, **kwargs: Any) -> Any:
    array = view._decoded().__array__(*args, **kwargs)
    array.flags.writeable = False
    return array


def _no_memory(view: FloatWeight, *args: Any, **kwargs: Any) -> Any:
    view._refuse("it has no memory of its own")


def _on_values(method: Any) -> Any:
    return lambda view, *args, **kwargs: method(view._decoded(), *args, **kwargs)


_TENSOR: Any = torch.Tensor
_SPECIAL: dict[Any, Any] = {
    _TENSOR.data.__get__: lambda view: view,
    _TENSOR.data.__set__: _set_data,
    _TENSOR.__setitem__: _set_item,
    _TENSOR.requires_grad_: _requires_grad,
    _TENSOR.requires_grad.__set__: _set_requires_grad,
    _TENSOR.grad.__set__: _set_grad,
    _TENSOR.numpy: _numpy,
    _TENSOR.__array__: _array,
    _TENSOR.tolist: _on_values(_TENSOR.tolist),
    # Says which weights are one, and is no address that a kernel could read floats from.
    _TENSOR.data_ptr: lambda view: -view._layer._stored_of(view._name)[0].data_ptr(),
    _TENSOR.untyped_storage: _no_memory,
    _TENSOR.storage: _no_memory,
    _TENSOR.share_memory_: _no_memory,
    _TENSOR.__dlpack__: _no_memory,
    _TENSOR.set_: _no_memory,
}
