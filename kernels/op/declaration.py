"""What follows from a declaration without registering it: schema, checks, shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch

from qnn.kernels.op.axes import (
    LEAD,
    Arg,
    Axis,
    UnknownSizeError,
    describe,
    dtype_of,
    parse_axis,
    parse_signature,
    tensors_of,
)
from qnn.kernels.op.fast_check import source_of

_DEFAULT_DTYPE = torch.float32


def too_long(axis: str, limit: int, size: Any) -> str:
    """Why a sum over so many products is refused."""
    return (
        f"{axis} must be at most {limit}, beyond which an int32 sum can overflow, got {size}; use "
        "the scheme int8_weight"
    )


def not_multiple(axis: str, multiple: int, size: Any, beside: str = "") -> str:
    """Why a row that is not whole groups is refused."""
    return (
        f"{axis} must be a multiple of {multiple}, got {size}{beside}; pad to "
        f"{size + -size % multiple} or exclude the layer"
    )


class Declaration:
    """An operator as it is declared; `Op` registers it, and has the arguments' meaning."""

    overload: Any
    """The registered operator."""

    def __init__(
        self,
        name: str,
        signature: str,
        *,
        doc: str,
        dtypes: Mapping[str, Sequence[torch.dtype] | str],
        out: Sequence[torch.dtype | str],
        reference: Callable[..., Any],
        kernels: Mapping[str, Callable[..., Any]] | None = None,
        backward: Mapping[str, str] | None = None,
        split: Callable[[Mapping[str, Any], torch.Tensor], dict[str, torch.Tensor]] | None = None,
        differentiable: bool = False,
        positive: Sequence[str] = (),
        choices: Mapping[str, Sequence[str]] | None = None,
        rule: Callable[..., str | None] | None = None,
        sizes: Mapping[str, Callable[..., Any]] | None = None,
        sample: Mapping[str, Any] | None = None,
        products: str | Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        multiples: Mapping[str, int] | None = None,
        rowwise: bool = True,
        layout: str | None = None,
        inference: bool = False,
    ) -> None:
        self.name, self.signature, self.doc = name, signature, doc
        self.sizes = dict(sizes or {})
        self.inputs, self.outputs = parse_signature(name, signature, self.sizes)
        self.dtypes: dict[str, tuple[torch.dtype, ...] | str] = {
            key: value if isinstance(value, str) else tuple(value) for key, value in dtypes.items()
        }
        for arg in self.inputs:
            if arg.axes is not None and arg.name not in self.dtypes:
                raise ValueError(f"{name}: signature {signature!r}: dtypes lacks {arg.name}.")
        self.choices = {key: tuple(value) for key, value in (choices or {}).items()}
        self.out, self.reference, self.kernels = tuple(out), reference, dict(kernels or {})
        self.backward, self.split = dict(backward or {}), split
        self.differentiable, self.positive = differentiable, frozenset(positive)
        self.rowwise, self.rule, self.sample = rowwise, rule, dict(sample or {})
        names = [arg.name for arg in self.inputs]
        self.layout = None if layout is None else names.index(layout)
        self.products = {"": products} if isinstance(products, str) else dict(products or {})
        self.limits, self.multiples = dict(limits or {}), dict(multiples or {})
        # The axis of the result that `bias` is added along, from its end; None without one.
        added = [arg.tail for arg in self.inputs if arg.name == "bias"]
        tail = self.outputs[0].tail if self.outputs else ()
        ends = [tail.index(axes[-1]) - len(tail) for axes in added if axes[-1] in tail]
        self.bias_axis = ends[0] if ends and not inference else None
        # Whose tensors the op writes to: their places among the arguments.
        self.written = tuple(i for i, arg in enumerate(self.inputs) if arg.written)
        self.inference = inference
        # Torch drops trailing arguments that equal their default on the way to Python functions;
        # `tails[n]` is what a call of n arguments lacks.
        defaults = tuple(self.default(arg) for arg in self.inputs)
        self.tails = [defaults[count:] for count in range(len(defaults) + 1)]

    # -- schema -----------------------------------------------------------------------------------

    def default(self, arg: Arg) -> Any:
        """What an argument is where it is left out; None where it must be given."""
        if not arg.optional or arg.axes is not None:
            return None
        if arg.kind == "ScalarType":
            return _DEFAULT_DTYPE
        return self.choices[arg.name][0] if arg.kind == "str" else arg.default

    def _declared(self, arg: Arg) -> str:
        """The argument in the schema."""
        if arg.written:
            return f"{arg.kind}({chr(ord('a') + self.inputs.index(arg))}!) {arg.name}"
        if not arg.optional:
            return f"{arg.kind} {arg.name}"
        if arg.axes is not None:
            return f"{arg.kind}? {arg.name}=None"
        if arg.kind == "ScalarType":
            return f"ScalarType {arg.name}=float"
        value = self.default(arg)
        if value is None:
            return f"{arg.kind}? {arg.name}=None"
        return (
            f'str {arg.name}="{value}"' if arg.kind == "str" else f"{arg.kind} {arg.name}={value}"
        )

    @property
    def schema(self) -> str:
        args = ", ".join(map(self._declared, self.inputs))
        result = (
            "Tensor" if len(self.outputs) == 1 else f"({', '.join('Tensor' for _ in self.outputs)})"
        )
        return f"{self.name}({args}) -> {result}"

    # -- checks -----------------------------------------------------------------------------------

    @property
    def checks(self) -> str:
        """What `check` asks of a call but for the rule, as the C++ kernels read it: a line for each
        argument, with the dtypes or words that it may be, or the argument whose dtype it shares,
        or the default of an integer; then the limits of axes, and what they are multiples of. Of
        a flag or a number `plain`, which nothing is asked of.

            x: ... k | float32 bfloat16
            residual?: ... n = x
            stride: ints 3 |
            padding?: int | -1
            k <= 132104
            k % 32
        """
        lines, kinds = [], {"str": "str", "ScalarType": "dtype"}
        for arg in self.inputs:
            if arg.is_integers:
                kind = f"ints {arg.length}" if arg.length else "int"
                default = f" {arg.default}" if arg.optional else ""
                lines.append(f"{arg.name}{'?' * arg.optional}: {kind} |{default}")
                continue
            if arg.kind in ("float", "bool"):
                lines.append(f"{arg.name}{'?' * arg.optional}: plain |")
                continue
            allowed = self.dtypes.get(arg.name) or self.choices[arg.name]
            shares = isinstance(allowed, str)
            accepted = f"= {allowed}" if shares else f"| {' '.join(map(str, allowed))}"
            axes = " ".join([*([LEAD] if arg.has_lead else []), *map(str, arg.tail)])
            name = f"{arg.name}?" if arg.optional else arg.name
            lines.append(f"{name}: {kinds.get(arg.kind, axes)} {accepted}".replace("torch.", ""))
        lines += [f"{axis} <= {most}" for axis, most in self.limits.items()]
        lines += [f"{axis} % {number}" for axis, number in self.multiples.items()]
        return "\n".join(lines)

    @functools.cached_property
    def source(self) -> str:
        """The source of the fast check, a function `fits`."""
        return source_of(self.inputs, self.dtypes, self.limits, self.multiples)

    @functools.cached_property
    def _fits(self) -> Callable[..., bool]:
        """Compiled at the first call: all ops together take 0.1 s."""
        allowed = {**self.dtypes, **self.choices}
        scope: dict[str, Any] = {f"{name}_allowed": each for name, each in allowed.items()}
        scope |= self.sizes
        exec(self.source, scope)  # noqa: S102  # built from our own declarations only
        return cast(Callable[..., bool], scope["fits"])

    def require(self, *args: Any) -> None:
        """Raise what `check` raises, in 1 µs where nothing is wrong."""
        args += self.tails[len(args)]
        if not self._fits(*args) or (self.rule is not None and self.rule(*args) is not None):
            self.check(*args)

    def check(self, *args: Any) -> dict[str, Any]:
        """Bind every axis to its size; raise a ValueError or TypeError that says which argument is
        wrong and why.
        """
        args += self.tails[len(args)]
        by_name = {arg.name: value for arg, value in zip(self.inputs, args, strict=True)}
        sizes: dict[str, Any] = {}
        bound_by: dict[str, str] = {}
        for value, arg in zip(args, self.inputs, strict=True):
            if value is not None and arg.is_integers:
                sizes[arg.name] = value
                many = value if isinstance(value, list | tuple) else []
                sizes |= {f"{arg.name}[{i}]": each for i, each in enumerate(many)}
        first = next(value for value in args if isinstance(value, torch.Tensor | list | tuple))
        device = (first if isinstance(first, torch.Tensor) else first[0]).device
        for value, arg in zip(args, self.inputs, strict=True):
            if value is None and arg.optional:
                continue
            if arg.kind == "str":
                self._check_choice(args, arg, value)
            if arg.count is not None:
                if not len(value):
                    self._fail(ValueError, args, f"{arg.name} must hold a tensor at least")
                self._bind(args, arg.name, parse_axis(arg.count), len(value), sizes, bound_by, arg)
            if arg.axes is None:
                if arg.name in self.dtypes:
                    self._check_dtype(args, arg, arg.name, value, by_name)
                continue
            for name, tensor in tensors_of(arg, value):
                self._check_dtype(args, arg, name, tensor, by_name)
                if tensor.device != device:
                    where = f"{name} is on {tensor.device}, {self.inputs[0].name} on {device}"
                    self._fail(ValueError, args, f"{where}; move them together")
                self._check_shape(args, arg, name, tensor.shape, sizes, bound_by)
        reason = None if self.rule is None else self.rule(*args)
        if reason is not None:
            self._fail(ValueError, args, reason)
        return sizes

    def _check_shape(
        self,
        args: Sequence[Any],
        arg: Arg,
        name: str,
        shape: Sequence[Any],
        sizes: dict[str, Any],
        bound_by: dict[str, str],
    ) -> None:
        tail = len(arg.tail)
        if len(shape) < tail or (len(shape) > tail and not arg.has_lead):
            self._fail(ValueError, args, f"{name} must be {arg}, got {list(shape)}")
        if arg.has_lead:
            lead = tuple(shape[: len(shape) - tail])
            if sizes.setdefault(LEAD, lead) != lead:
                reason = f"{name} must begin with {sizes[LEAD]}, got {list(shape)}"
                self._fail(ValueError, args, reason)
        for axis, size in zip(arg.tail, shape[len(shape) - tail :], strict=True):
            self._bind(args, name, axis, size, sizes, bound_by, arg, shape)

    def _bind(
        self,
        args: Sequence[Any],
        name: str,
        axis: Axis,
        size: Any,
        sizes: dict[str, Any],
        bound_by: dict[str, str],
        arg: Arg,
        shape: Sequence[Any] = (),
    ) -> None:
        """Take the size of an axis that is not known yet, or compare it."""
        if axis.name is not None and axis.name not in sizes:
            sizes[axis.name], bound_by[axis.name] = size, name
            if axis.name in self.limits and size > self.limits[axis.name]:
                reason = too_long(axis.name, self.limits[axis.name], size)
                self._fail(ValueError, args, reason)
            if size % self.multiples.get(axis.name, 1):
                reason = not_multiple(axis.name, self.multiples[axis.name], size)
                self._fail(ValueError, args, reason)
            return
        wanted = axis.size(sizes, self.sizes)
        if wanted != size:
            by = next((bound_by[each] for each in sorted(axis.names) if each in bound_by), None)
            given = "" if axis.is_number else f" with {axis} = {wanted} as in {by}"
            got = list(shape) if len(shape) else size
            self._fail(ValueError, args, f"{name} must be {arg}{given}, got {got}")

    def _check_choice(self, args: Sequence[Any], arg: Arg, value: str) -> None:
        choices = self.choices[arg.name]
        if value not in choices:
            accepted = ", ".join(map(repr, choices))
            self._fail(ValueError, args, f"{arg.name} must be one of {accepted}, got {value!r}")

    def _check_dtype(
        self, args: Sequence[Any], arg: Arg, name: str, value: Any, by_name: Mapping[str, Any]
    ) -> None:
        allowed, got = self.dtypes[arg.name], dtype_of(value)
        if isinstance(allowed, str):
            want = dtype_of(by_name[allowed])
            if got != want:
                reason = f"{name} must be {want} as {allowed}, got {got}; cast it"
                self._fail(TypeError, args, reason)
        elif got not in allowed:
            accepted = ", ".join(map(str, allowed))
            self._fail(TypeError, args, f"{name} must be one of {accepted}")

    def _fail(self, kind: type[Exception], args: Sequence[Any], reason: str) -> NoReturn:
        """Raise, with the call repeated; arguments at their default are left out."""
        call = ", ".join(
            f"{arg.name}={describe(value)}"
            for arg, value in zip(self.inputs, args, strict=True)
            if not arg.optional or value is not self.default(arg)
        )
        raise kind(f"qnn::{self.name}({call}): {reason}.")

    # -- results ----------------------------------------------------------------------------------

    def results(self, *args: Any) -> Any:
        """What the op returns, without its values: new, in the signature's shapes, and contiguous
        or, where an argument lends its layout, in that argument's memory format.
        """
        args += self.tails[len(args)]
        sizes = self.check(*args)
        by_name = {arg.name: value for arg, value in zip(self.inputs, args, strict=True)}
        like = next(value for value in args if isinstance(value, torch.Tensor))

        def make(result: Arg, rule: torch.dtype | str) -> torch.Tensor:
            dtype = dtype_of(by_name[rule] if isinstance(rule, str) else rule)
            lead = sizes[LEAD] if result.has_lead else ()
            shape = (*lead, *(axis.size(sizes, self.sizes) for axis in result.tail))
            memory = self.memory_format(args)
            return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory)

        results = tuple(
            make(result, rule) for result, rule in zip(self.outputs, self.out, strict=True)
        )
        if not results:
            return None
        return results[0] if len(results) == 1 else results

    def memory_format(self, args: Sequence[Any]) -> torch.memory_format:
        """Of the results: that of the argument named by `layout`, which has five axes; contiguous
        where both would do.
        """
        x = None if self.layout is None else args[self.layout]
        channels_last = torch.channels_last_3d
        if x is None or x.is_contiguous() or not x.is_contiguous(memory_format=channels_last):
            return torch.contiguous_format
        return channels_last

    def __repr__(self) -> str:
        return f"<qnn op {self.name}: {self.signature}>"


__all__ = ["Declaration", "UnknownSizeError", "not_multiple", "too_long"]
