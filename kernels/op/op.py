"""One op, one declaration.

`Op` takes a signature in einops notation (`axes.py` says how it reads) and derives from it what is
elsewhere written by hand, twice: the schema, the argument checks that the kernel and the fake
share, the fake itself, the `vmap` rule, the gradient, the samples that the tests feed to
`torch.library.opcheck`, and the op's row in the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from qnn.kernels.op import flops
from qnn.kernels.op.autograd import autograd_kernel
from qnn.kernels.op.declaration import Declaration
from qnn.kernels.op.samples import samples
from qnn.kernels.torch_private import (
    below_autograd,
    below_overload,
    dtype_number,
    in_mode,
    is_observed,
    note_writes,
    unregister,
    without_autocast,
)

LIBRARY = torch.library.Library("qnn", "FRAGMENT")
OPS: dict[str, Op] = {}
_TRACE_HOOKS: list[Callable[[], None]] = []
_LOADERS: list[Callable[[], bool]] = []


def on_trace(hook: Callable[[], None]) -> Callable[[], None]:
    """Have `hook` called whenever an op is traced; its fake is the one Python code that runs in
    every trace.
    """
    _TRACE_HOOKS.append(hook)
    return hook


def run_trace_hooks() -> None:
    """For the fake of an op."""
    for hook in _TRACE_HOOKS:
        hook()


def on_first_call(load: Callable[[], bool]) -> Callable[[], bool]:
    """Have `load` called when a native op runs before the C++ library has its kernel: it loads the
    library, and says whether it is there now.
    """
    _LOADERS.append(load)
    return load


class Op(Declaration):
    """An operator `torch.ops.qnn.<name>`, registered from one declaration.

    Args:
        name: the operator's name.
        signature: arguments and results; see `axes.py`.
        doc: what it computes, as one formula; it stands in the op table.
        dtypes: the dtypes that each tensor argument may have, or the name of the argument whose
            dtype it must share; for a dtype argument, those that it may be.
        out: for each result a dtype, or the name of the argument that lends its dtype.
        reference: the meaning of the op in plain torch, and its kernel where a device has none. One
            whose result is float takes `compute=`, the dtype of its float arithmetic.
        kernels: a kernel for each dispatch key, such as `"CPU"`.
        native: whether the C++ library has a kernel for the CPU. That of `kernels`, or the
            reference, then serves where there is no library; the first call of an op with products
            builds it.
        backward: for a differentiable argument, the op that gives its gradient; `bias` needs no
            entry. See `autograd.py`.
        split: where one op gives the gradients of several arguments in one tensor, what takes that
            apart: called with the arguments by name and the tensor, it returns them by name.
        differentiable: whether the reference is made of torch operations whose own derivatives are
            the op's.
        positive: float arguments whose samples must be positive (scales).
        choices: the values that each str argument may have, the default first.
        rule: what the notation cannot say: called with the arguments, it returns what is wrong with
            them, or None.
        sizes: the functions that the signature names, by name: called with the sizes of their
            axes, one returns a size.
        sample: for the samples, the size of an axis, a function of the sizes that makes an
            argument, or the range that the integers of an argument are drawn from.
        products: the multiply-adds of a call as sums of products of axes, `"... n k"`; or, by the
            name of an optional argument, those that a call with it has besides those of `""`.
        limits: the largest size of an axis whose products are summed in int32, which a longer sum
            could wrap around.
        multiples: for an axis, the number that its size must be a multiple of.
        rowwise: whether the leading axes are independent of each other; a scale for the whole
            tensor ties them.
        layout: the argument whose memory format the results have, contiguous or channels-last: an
            image `[b, c, …]` of three axes. A kernel may return another one, which costs a copy.
        inference: whether none of its arguments has a gradient, not even a bias.
    """

    def __init__(self, name: str, signature: str, *, native: bool = False, **declared: Any) -> None:
        super().__init__(name, signature, **declared)
        self.native = native
        if native:
            self.kernels.setdefault("CPU", self.reference)
        self._direct: Callable[..., Any] | None = None
        self._ends: dict[Any, tuple[int, ...]] | None = None
        self._register()
        OPS[name] = self

    def _register(self) -> None:
        LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._checked(self.reference), "CompositeExplicitAutograd")
        for key, kernel in self.kernels.items():
            if key == "CPU" and self.native:
                # The twin that `call` may go to; it has the kernel and nothing else.
                LIBRARY.define(self.schema.replace(self.name, f"{self.name}_no_grad", 1))
                self._replaceable = torch.library.Library("qnn", "IMPL", key)
                kernel = self._native_first(kernel) if self.products else kernel
                self._replaceable.impl(self.name, self._checked(kernel))
            else:
                LIBRARY.impl(self.name, self._checked(kernel), key)
        torch.library.register_fake(f"qnn::{self.name}", self.fake, lib=LIBRARY)
        torch.library.register_vmap(f"qnn::{self.name}", self._vmap, lib=LIBRARY)
        self.overload = getattr(torch.ops.qnn, self.name).default
        LIBRARY.impl(self.name, autograd_kernel(self, OPS), "Autograd", with_keyset=True)

    def call(self, *args: Any) -> Any:
        """`overload(*args)`, in eager mode straight to the kernel of the C++ library, where it has
        one: past the kernel of autograd, which takes 3 µs to find that it has nothing to do.
        """
        direct = self._direct
        if direct is None or not args[0].is_cpu or is_observed(args):
            if in_mode():
                flops.register(OPS)
            return self.overload(*args)
        if self._ends is not None and (end := self._ends.get(args[-1])) is not None:
            args = args[:-1] + end
        if self.written:
            note_writes(args[i] for i in self.written)
        return direct(*args)

    def go_native(self, declare: Callable[[str, str], None]) -> None:
        """Let the C++ library, which is loaded, have the place of the kernel in Python: `declare`
        takes the op's name and `checks`. Between the two the reference serves.
        """
        unregister(self._replaceable)
        declare(self.name, self.checks)
        self._direct = self._first_direct

    def _first_direct(self, *args: Any) -> Any:
        """What `call` goes to, made at its first use, as it would be much of an import."""
        twin = f"{self.name}_no_grad"
        # Past what torch puts in the place of a gradient that is missing, which takes 0.3 µs.
        LIBRARY.impl(twin, torch.library.fallthrough_kernel, "Autograd")
        # Of a dtype, the last argument, torch asks for `__torch_function__` and makes an error of
        # the answer, which takes 1 µs. Its number says the same, and nothing the default.
        last = self.inputs[-1]
        if last.kind == "ScalarType":
            numbers: dict[Any, tuple[int, ...]] = {
                dtype: (dtype_number(dtype),)
                for dtype in self.dtypes[last.name]
                if isinstance(dtype, torch.dtype)
            }
            self._ends = numbers | ({self.default(last): ()} if last.optional else {})
        self._direct = below_overload(getattr(torch.ops.qnn, twin).default)
        return self.call(*args)

    def _native_first(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """`kernel`, but for a call that finds the library loaded."""

        def run(*args: Any) -> Any:
            loaded = any(load() for load in _LOADERS)
            return self.overload(*args) if loaded else kernel(*args)

        return run

    def _checked(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        tails, require = self.tails, self.require

        def run(*args: Any) -> Any:
            args += tails[len(args)]
            require(*args)
            # A kernel's own torch calls are arithmetic that autocast must not round.
            with below_autograd(), without_autocast():
                return kernel(*args) if self.layout is None else self._laid_out(args, kernel(*args))

        return run

    def _laid_out(self, args: Sequence[Any], results: Any) -> Any:
        """The results in the memory format that the fake promises."""
        memory = self.memory_format(args)

        def laid_out(y: torch.Tensor) -> torch.Tensor:
            made = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=memory)
            return y if y.stride() == made.stride() and y._base is None else made.copy_(y)

        return tuple(map(laid_out, results)) if isinstance(results, tuple) else laid_out(results)

    def fake(self, *args: Any) -> Any:
        """`results`, in every trace."""
        run_trace_hooks()
        flops.register(OPS)
        return self.results(*args)

    def _vmap(self, info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """A mapped axis becomes a leading axis where every mapped argument has some, or part of the
        batch of images; otherwise one call an element.
        """
        args += self.tails[len(args)]
        in_dims = (*in_dims, *[None] * (len(args) - len(in_dims)))
        # Of several integers it is a list of None.
        in_dims = [
            None if arg.is_integers else axis
            for arg, axis in zip(self.inputs, in_dims, strict=True)
        ]
        mapped = [arg for arg, axis in zip(self.inputs, in_dims, strict=True) if axis is not None]
        if self.written:
            return self._of_each(info.batch_size, in_dims, args)
        if self.layout is not None and all(arg.tail[0].name == "b" for arg in mapped):
            return self._of_larger_batch(info.batch_size, in_dims, args)
        if self.rowwise and all(arg.has_lead for arg in mapped):
            moved = []
            for arg, axis, value in zip(self.inputs, in_dims, args, strict=True):
                if axis is not None:
                    value = value.movedim(axis, 0)
                elif arg.has_lead and value is not None:
                    value = value.expand(info.batch_size, *value.shape)
                moved.append(value)
            result = self.overload(*moved)
        else:
            calls = [
                self.overload(
                    *(
                        v if d is None else v.select(d, i)
                        for v, d in zip(args, in_dims, strict=True)
                    )
                )
                for i in range(info.batch_size)
            ]
            single = len(self.outputs) == 1
            result = (
                torch.stack(calls) if single else tuple(map(torch.stack, zip(*calls, strict=True)))
            )
        return result, 0 if len(self.outputs) == 1 else (0,) * len(self.outputs)

    def _of_each(
        self, count: int, in_dims: Sequence[int | None], args: Sequence[Any]
    ) -> tuple[None, None]:
        """A call an element, each of which writes to its own part of what is mapped."""
        for i in self.written:
            if in_dims[i] is None:
                name = self.inputs[i].name
                raise ValueError(
                    f"qnn::{self.name} under torch.vmap: {name} is written in place, and has no "
                    "axis that is mapped: all elements would write to the same place. Map it too."
                )
        for i in range(count):
            self.overload(
                *(v if d is None else v.select(d, i) for v, d in zip(args, in_dims, strict=True))
            )
        return None, None

    def _of_larger_batch(
        self, count: int, in_dims: Sequence[int | None], args: Sequence[Any]
    ) -> tuple[Any, Any]:
        """One call over all mapped batches `b`."""
        moved = []
        for arg, axis, value in zip(self.inputs, in_dims, args, strict=True):
            if axis is not None:
                value = value.movedim(axis, 0).flatten(0, 1)
            elif value is not None and arg.tail and arg.tail[0].name == "b":
                value = value.expand(count, *value.shape).flatten(0, 1)
            moved.append(value)
        results = self.overload(*moved)
        parts = results if isinstance(results, tuple) else (results,)
        parts = tuple(y.unflatten(0, (count, y.shape[0] // count)) for y in parts)
        return (parts, (0,) * len(parts)) if isinstance(results, tuple) else (parts[0], 0)

    def samples(self, seed: int = 0) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Arguments for tests; see `samples.py`."""
        return samples(self, seed)
