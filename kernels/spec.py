"""One op, one declaration.

`Op` takes a signature in einops notation and derives from it what is elsewhere written by hand,
twice: the schema, the argument checks that the kernel and the fake share, the fake itself, the
`vmap` rule, the samples that the tests feed to `torch.library.opcheck`, and the op's row in the
documentation.

    x: ... k, w: n k, sw: n 1, bias: n? -> ... n

reads: `x` has any leading axes and ends in `k`; `w` is `[n, k]`; `sw` is `[n, 1]`; `bias` is `[n]`
or None; the result has the leading axes of `x` and ends in `n`. `k/128` is ⌈k / 128⌉, `k/128>2` the
same but at least 2, `p*2` is twice `p` and `k/16*8` eight for each 16 begun, where the axis is
known from an argument before; otherwise it is a name like any other. `t*b*p+b*h` is a sum of
products of known axes: of several tensors laid behind each other.

An argument without axes is a torch.dtype, `dtype: dtype`, or one of the names in `choices`,
`activation: str`. What is marked with `?` may be left out, and so may all that follows: a tensor is
then None, a dtype float32, a name the first of its choices.
"""

from __future__ import annotations

import functools
import itertools
import keyword
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from qnn.kernels import flops
from qnn.kernels.autograd import autograd_kernel
from qnn.kernels.torch_private import (
    below_autograd,
    in_mode,
    is_observed,
    unregister,
    without_autocast,
)

LIBRARY = torch.library.Library("qnn", "FRAGMENT")
OPS: dict[str, Op] = {}
_TRACE_HOOKS: list[Callable[[], None]] = []

_LEAD = "..."
_KINDS = {"dtype": "ScalarType", "str": "str"}
_DEFAULT_DTYPE = torch.float32
_SAMPLE_SIZES = (37, 19, 23)
_SAMPLE_LEADS: tuple[tuple[int, ...], ...] = ((5,), (), (2, 3), (0,))


def on_trace(hook: Callable[[], None]) -> Callable[[], None]:
    """Have `hook` called whenever an op is traced; its fake is the one Python code that runs in
    every trace.
    """
    _TRACE_HOOKS.append(hook)
    return hook


@dataclass(frozen=True)
class Arg:
    """One argument or result: its name and its axes; `axes` is None for one that is no tensor.
    `kind` is the type in the schema.
    """

    name: str
    axes: tuple[str, ...] | None
    optional: bool = False
    kind: str = "Tensor"

    @property
    def has_lead(self) -> bool:
        return self.axes is not None and self.axes[:1] == (_LEAD,)

    @property
    def tail(self) -> tuple[str, ...]:
        """The axes behind the leading ones."""
        axes = self.axes or ()
        return axes[1:] if self.has_lead else axes

    def __str__(self) -> str:
        return f"[{', '.join(self.axes or ())}]"


def parse_signature(signature: str) -> tuple[tuple[Arg, ...], tuple[Arg, ...]]:
    """The arguments and the results of a signature; see the head of this file for the notation."""
    left, arrow, right = signature.partition("->")
    if not arrow:
        raise ValueError(f"signature {signature!r} has no '->'.")

    def parse(part: str) -> Arg:
        name, _, axes = part.rpartition(":")
        name, axes = name.strip(), axes.strip()
        optional, axes = axes.endswith("?"), axes.removesuffix("?")
        if axes in _KINDS:
            return Arg(name, None, optional, _KINDS[axes])
        return Arg(name or "y", tuple(axes.split()), optional)

    inputs = tuple(map(parse, left.split(",")))
    for before, after in itertools.pairwise(inputs):
        if before.optional and not after.optional:
            raise ValueError(
                f"signature {signature!r}: {after.name} must be optional, as {before.name} is."
            )
    return inputs, tuple(map(parse, right.split(",")))


def describe(value: object) -> str:
    """`float32[4, 768]` for a tensor, for error messages."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


def too_long(axis: str, limit: int, size: Any) -> str:
    """Why a sum over so many products is refused."""
    return (
        f"{axis} must be at most {limit}, beyond which an int32 sum can overflow, got {size}; use "
        "the scheme int8_weight"
    )


_AXIS = re.compile(r"(\w+)(?:/(\d+))?(?:>(\d+))?(?:\*(\d+))?")


def _is_sum(axis: str) -> bool:
    """Whether an axis is a sum of products of others, `t*b*p+b*h`."""
    return "+" in axis or bool(re.search(r"\*[a-z]", axis))


_SUM = re.compile(r"\w+(\*\w+)*(\+\w+(\*\w+)*)*")


def _require_sound(op: str, signature: str, inputs: Sequence[Arg], outputs: Sequence[Arg]) -> None:
    """Raise a ValueError that says which part of a signature cannot be read, and why."""

    def fail(reason: str) -> None:
        raise ValueError(f"{op}: signature {signature!r}: {reason}.")

    known: set[str] = set()
    seen: set[str] = set()
    for arg in (*inputs, *outputs):
        given = arg in inputs
        if given and (not arg.name.isidentifier() or keyword.iskeyword(arg.name)):
            fail(f"{arg.name!r} cannot name an argument; write 'name: axes'")
        if given and arg.name in seen:
            fail(f"two arguments are called {arg.name}")
        seen.add(arg.name)
        if given and ":" not in signature.partition("->")[0].split(",")[len(seen) - 1]:
            fail(f"an argument has no ':' before its axes {arg}; write 'name: axes'")
        for position, axis in enumerate(arg.axes or ()):
            if axis == _LEAD:
                if position:
                    fail(f"'...' of {arg.name} must come first, and once")
                if not given and not any(other.has_lead for other in inputs):
                    fail(f"no argument has the leading axes '...' of {arg.name}")
                continue
            match = _AXIS.fullmatch(axis)
            if match is None and not _SUM.fullmatch(axis):
                fail(f"{axis!r} of {arg.name} is no axis: names, k/128, k/128>2, p*2, t*b+b*h")
            if given:
                known |= {axis} | set(re.findall(r"[a-z]\w*", axis) if _is_sum(axis) else ())
            elif axis not in known and not all(
                name in known or name.isdecimal() for name in re.findall(r"[A-Za-z_]\w*", axis)
            ):
                fail(f"no argument says the size of {axis!r} in the result {arg.name}")


def size_of(axis: str, sizes: Mapping[str, Any]) -> Any:
    """The size of an axis such as `k`, `k/128` or `p*2`, or None where `sizes` does not say it."""
    if axis in sizes:
        return sizes[axis]
    if axis.isdecimal():
        return int(axis)
    if _is_sum(axis):
        terms = [[size_of(name, sizes) for name in term.split("*")] for term in axis.split("+")]
        if any(size is None for term in terms for size in term):
            return None
        return sum(map(math.prod, terms))
    base, divisor, least, factor = cast(re.Match[str], _AXIS.fullmatch(axis)).groups()
    if base not in sizes:
        return None
    size = -(-sizes[base] // int(divisor or 1))
    return (torch.sym_max(size, int(least)) if least else size) * int(factor or 1)


def _dtype(value: Any) -> torch.dtype:
    """The dtype that `value` is or has."""
    return cast(torch.dtype, value if isinstance(value, torch.dtype) else value.dtype)


def _sample_range(dtype: torch.dtype, positive: bool) -> tuple[int, int]:
    """The integers to draw samples from; a byte that is positive is an exponent of E8M0."""
    if positive:
        return 118, 126
    info = torch.iinfo(dtype)
    return info.min, min(info.max, 2**31) + (info.bits <= 8)


class Op:
    """An operator `torch.ops.qnn.<name>`, registered from one declaration.

    Args:
        name: the operator's name.
        signature: arguments and results; see the head of this file.
        doc: what it computes, as one formula; it stands in the op table.
        dtypes: the dtypes that each tensor argument may have, or the name of the argument whose
            dtype it must share; for a dtype argument, those that it may be.
        out: for each result a dtype, or the name of the argument that lends its dtype.
        reference: the meaning of the op in plain torch, and its kernel where a device has none. One
            whose result is float takes `compute=`, the dtype of its float arithmetic.
        kernels: a kernel for each dispatch key, such as `"CPU"`.
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
        sample: for the samples, the size of an axis, or a function of the sizes that makes an
            argument.
        products: the multiply-adds of a call as sums of products of axes, `"... n k"`; or, by the
            name of an optional argument, those that a call with it has besides those of `""`.
        limits: the largest size of an axis whose products are summed in int32, which a longer sum
            could wrap around.
        rowwise: whether the leading axes are independent of each other; a scale for the whole
            tensor ties them.
    """

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
        sample: Mapping[str, int | Callable[[Mapping[str, int]], torch.Tensor]] | None = None,
        products: str | Mapping[str, str] | None = None,
        limits: Mapping[str, int] | None = None,
        rowwise: bool = True,
    ) -> None:
        self.limits = dict(limits or {})
        self.products = {"": products} if isinstance(products, str) else dict(products or {})
        self.rowwise, self.rule, self.sample = rowwise, rule, dict(sample or {})
        self.name, self.signature, self.doc = name, signature, doc
        self.inputs, self.outputs = parse_signature(signature)
        _require_sound(self.name, signature, self.inputs, self.outputs)
        self.dtypes: dict[str, tuple[torch.dtype, ...] | str] = {
            key: value if isinstance(value, str) else tuple(value) for key, value in dtypes.items()
        }
        for arg in self.inputs:
            if arg.axes is not None and arg.name not in self.dtypes:
                raise ValueError(f"{name}: signature {signature!r}: dtypes lacks {arg.name}.")
        self.choices = {key: tuple(value) for key, value in (choices or {}).items()}
        self.out = tuple(out)
        self.reference = reference
        self.kernels = dict(kernels or {})
        self._enabled: dict[str, torch.library.Library] = {}
        self.backward, self.split = dict(backward or {}), split
        self.differentiable = differentiable
        self.positive = frozenset(positive)
        # Torch drops trailing arguments that equal their default on the way to Python functions;
        # `_tails[n]` is what a call of n arguments lacks.
        defaults = tuple(self._default(arg) for arg in self.inputs)
        self._tails = [defaults[count:] for count in range(len(defaults) + 1)]
        self._source = self._fits_source()
        self._direct: Callable[..., Any] | None = None
        self._register()
        OPS[name] = self

    # What is derived.

    def _default(self, arg: Arg) -> Any:
        if not arg.optional or arg.kind == "Tensor":
            return None
        return _DEFAULT_DTYPE if arg.kind == "ScalarType" else self.choices[arg.name][0]

    def _declared(self, arg: Arg) -> str:
        """The argument in the schema."""
        if not arg.optional:
            return f"{arg.kind} {arg.name}"
        if arg.kind == "str":
            return f'str {arg.name}="{self._default(arg)}"'
        return f"{arg.kind} {arg.name}=float" if arg.axes is None else f"Tensor? {arg.name}=None"

    @property
    def schema(self) -> str:
        args = ", ".join(map(self._declared, self.inputs))
        result = (
            "Tensor" if len(self.outputs) == 1 else f"({', '.join('Tensor' for _ in self.outputs)})"
        )
        return f"{self.name}({args}) -> {result}"

    def _register(self) -> None:
        LIBRARY.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._checked(self.reference), "CompositeExplicitAutograd")
        for key in self.kernels:
            self.enable(key)
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
        return direct(*args)

    def declare_direct(self) -> None:
        """Declare the twin that `call` may go to; it has the kernel and nothing else."""
        LIBRARY.define(self.schema.replace(self.name, f"{self.name}_no_grad", 1))

    def go_direct(self) -> None:
        """The C++ library is loaded, and has the kernel of the twin."""
        self._direct = getattr(torch.ops.qnn, f"{self.name}_no_grad").default

    def enable(self, key: str) -> None:
        """Register the kernel of a dispatch key."""
        self._enabled[key] = torch.library.Library("qnn", "IMPL", key)
        self._enabled[key].impl(self.name, self._checked(self.kernels[key]))

    def disable(self, key: str) -> None:
        """Take the kernel of a dispatch key back, to make room for another; between the two the
        reference serves.
        """
        unregister(self._enabled.pop(key))

    @staticmethod
    def size(axis: str, sizes: Mapping[str, Any]) -> Any:
        """`size_of`, of an axis that is known."""
        return size_of(axis, sizes)

    def _checked(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        tails, require = self._tails, self.require

        def run(*args: Any) -> Any:
            args += tails[len(args)]
            require(*args)
            # A kernel's own torch calls are arithmetic that autocast must not round.
            with below_autograd(), without_autocast():
                return kernel(*args)

        return run

    def _fits_source(self) -> str:
        """`check` as one straight line without messages, for the eager path: 1 µs where the loop
        takes 4 (16 when cold).

        For `x: ... k, w: n k` it reads

            def fits(x, w):
                device = x.device
                shape = x.shape
                if x.dtype not in x_dtypes or len(shape) < 1: return False
                k = shape[-1]
                ...
        """
        known: dict[str, str] = {}  # the expression for the size of each axis
        lines = [f"device = {self.inputs[0].name}.device"]
        for arg in self.inputs:
            if arg.axes is None:
                if arg.kind == "str" or arg.name in self.dtypes:
                    lines.append(f"if {arg.name} not in {arg.name}_allowed: return False")
                continue
            allowed = self.dtypes[arg.name]
            wrong = [
                f"{arg.name}.dtype != {self._dtype_of(allowed)}"
                if isinstance(allowed, str)
                else f"{arg.name}.dtype not in {arg.name}_allowed",
                f"{arg.name}.device != device",
            ]
            wrong.append(f"len(shape) {'<' if arg.has_lead else '!='} {len(arg.tail)}")
            body = [f"shape = {arg.name}.shape", f"if {' or '.join(wrong)}: return False"]
            if arg.has_lead:
                lead = f"shape[:len(shape) - {len(arg.tail)}]"
                body.append(
                    f"if lead != {lead}: return False" if _LEAD in known else f"lead = {lead}"
                )
                known[_LEAD] = "lead"
            for position, axis in enumerate(arg.tail, -len(arg.tail)):
                size = f"shape[{position}]"
                if _is_sum(axis) and axis not in known:
                    body.append(f"if {axis} != {size}: return False")
                    continue
                base, divisor, least, factor = cast(re.Match[str], _AXIS.fullmatch(axis)).groups()
                if axis in known or axis.isdecimal():
                    body.append(f"if {known.get(axis, axis)} != {size}: return False")
                elif base in known:
                    wanted = f"max(-(-{base} // {divisor or 1}), {least or 0}) * {factor or 1}"
                    body.append(f"if {wanted} != {size}: return False")
                elif arg.optional:
                    raise ValueError(
                        f"{self.name}: the optional {arg.name} is the first with {axis}."
                    )
                else:
                    known[axis] = re.sub(r"\W", "_", axis)
                    body.append(f"{known[axis]} = {size}")
                    if axis in self.limits:
                        body.append(f"if {known[axis]} > {self.limits[axis]}: return False")
            lines += (
                [f"if {arg.name} is not None:", *(f"    {line}" for line in body)]
                if arg.optional
                else body
            )
        names = ", ".join(arg.name for arg in self.inputs)
        return "\n    ".join([f"def fits({names}):", *lines, "return True"])

    @functools.cached_property
    def _fits(self) -> Callable[..., bool]:
        """Compiled at the first call: all ops together take 0.1 s."""
        allowed_values = {**self.dtypes, **self.choices}
        scope: dict[str, Any] = {f"{name}_allowed": each for name, each in allowed_values.items()}
        exec(self._source, scope)  # noqa: S102  # built from our own declarations only
        return cast(Callable[..., bool], scope["fits"])

    def _dtype_of(self, name: str) -> str:
        """The expression for the dtype that the argument `name` is or has."""
        (arg,) = (arg for arg in self.inputs if arg.name == name)
        return name if arg.axes is None else f"{name}.dtype"

    def require(self, *args: Any) -> None:
        """Raise what `check` raises, in 1 µs where nothing is wrong."""
        args += self._tails[len(args)]
        if not self._fits(*args) or (self.rule is not None and self.rule(*args) is not None):
            self.check(*args)

    def check(self, *args: Any) -> dict[str, Any]:
        """Bind every axis to its size; raise a ValueError or TypeError that says which argument is
        wrong and why.
        """
        args += self._tails[len(args)]
        by_name = {arg.name: value for arg, value in zip(self.inputs, args, strict=True)}
        sizes: dict[str, Any] = {}
        bound_by: dict[str, str] = {}
        first = args[0]
        for value, arg in zip(args, self.inputs, strict=True):
            if value is None and arg.optional:
                continue
            if arg.kind == "str":
                self._check_choice(args, arg, value)
            elif arg.name in self.dtypes:
                self._check_dtype(args, arg, value, by_name)
            if arg.axes is None:
                continue
            if value.device != first.device:
                where = f"{arg.name} is on {value.device}, {self.inputs[0].name} on {first.device}"
                self._fail(ValueError, args, f"{where}; move them together")
            shape, tail = value.shape, len(arg.tail)
            if len(shape) < tail or (len(shape) > tail and not arg.has_lead):
                self._fail(ValueError, args, f"{arg.name} must be {arg}, got {list(shape)}")
            if arg.has_lead:
                lead = tuple(shape[: len(shape) - tail])
                if sizes.setdefault(_LEAD, lead) != lead:
                    self._fail(
                        ValueError,
                        args,
                        f"{arg.name} must begin with {sizes[_LEAD]}, got {list(shape)}",
                    )
            for axis, size in zip(arg.tail, shape[len(shape) - tail :], strict=True):
                wanted = size_of(axis, sizes)
                if wanted is None:
                    sizes[axis], bound_by[axis] = size, arg.name
                    if axis in self.limits and size > self.limits[axis]:
                        self._fail(ValueError, args, too_long(axis, self.limits[axis], size))
                elif wanted != size:
                    by = bound_by.get(axis) or bound_by.get(re.split("[/*]", axis)[0])
                    given = "" if axis.isdecimal() else f" with {axis} = {wanted} as in {by}"
                    self._fail(
                        ValueError, args, f"{arg.name} must be {arg}{given}, got {list(shape)}"
                    )
        reason = None if self.rule is None else self.rule(*args)
        if reason is not None:
            self._fail(ValueError, args, reason)
        return sizes

    def _check_choice(self, args: Sequence[Any], arg: Arg, value: str) -> None:
        choices = self.choices[arg.name]
        if value not in choices:
            accepted = ", ".join(map(repr, choices))
            self._fail(ValueError, args, f"{arg.name} must be one of {accepted}, got {value!r}")

    def _check_dtype(
        self, args: Sequence[Any], arg: Arg, value: Any, by_name: Mapping[str, Any]
    ) -> None:
        allowed, got = self.dtypes[arg.name], _dtype(value)
        if isinstance(allowed, str):
            want = _dtype(by_name[allowed])
            if got != want:
                reason = f"{arg.name} must be {want} as {allowed}, got {got}; cast it"
                self._fail(TypeError, args, reason)
        elif got not in allowed:
            accepted = ", ".join(map(str, allowed))
            self._fail(TypeError, args, f"{arg.name} must be one of {accepted}")

    def _fail(self, kind: type[Exception], args: Sequence[Any], reason: str) -> None:
        """Raise, with the call repeated; arguments at their default are left out."""
        call = ", ".join(
            f"{arg.name}={describe(value)}"
            for arg, value in zip(self.inputs, args, strict=True)
            if not arg.optional or value is not self._default(arg)
        )
        raise kind(f"qnn::{self.name}({call}): {reason}.")

    def fake(self, *args: Any) -> Any:
        """What the op returns, without its values: the shape rule of the signature, new and
        contiguous.
        """
        for hook in _TRACE_HOOKS:
            hook()
        flops.register(OPS)
        args += self._tails[len(args)]
        sizes = self.check(*args)
        by_name = {arg.name: value for arg, value in zip(self.inputs, args, strict=True)}

        def make(result: Arg, rule: torch.dtype | str) -> torch.Tensor:
            dtype = _dtype(by_name[rule] if isinstance(rule, str) else rule)
            lead = sizes[_LEAD] if result.has_lead else ()
            shape = (*lead, *(size_of(axis, sizes) for axis in result.tail))
            return cast(torch.Tensor, args[0].new_empty(shape, dtype=dtype))

        results = tuple(
            make(result, rule) for result, rule in zip(self.outputs, self.out, strict=True)
        )
        return results[0] if len(results) == 1 else results

    def _vmap(self, info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """A mapped axis becomes a leading axis where every mapped argument has some; otherwise one
        call an element.
        """
        args += self._tails[len(args)]
        in_dims = (*in_dims, *[None] * (len(args) - len(in_dims)))
        mapped = [arg for arg, axis in zip(self.inputs, in_dims, strict=True) if axis is not None]
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

    def samples(self, seed: int = 0) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Arguments for tests, each with a readable id: every lead, every dtype, options present
        and absent, every choice.
        """
        free = self.dtypes.get("dtype", self.dtypes[self.inputs[0].name])
        names = itertools.cycle(itertools.product(*self.choices.values()))
        count = math.prod(map(len, self.choices.values()))
        leads = _SAMPLE_LEADS if any(arg.has_lead for arg in self.inputs) else _SAMPLE_LEADS[:1]
        for dtype in free:
            # Every lead with the first dtype; with the others one that has rows, and the empty one.
            for lead in leads if dtype == free[0] else dict.fromkeys((leads[0], leads[-1])):
                label = f"{dtype}-{'x'.join(map(str, lead)) or 'scalar'}".removeprefix("torch.")
                # Every choice with the first lead, then one a lead in turn.
                for picked in itertools.islice(names, count if lead == _SAMPLE_LEADS[0] else 1):
                    choices = dict(zip(self.choices, picked, strict=True))
                    args = self._sample(cast(torch.dtype, dtype), lead, choices, seed)
                    yield "-".join([label, *picked]), args
                if any(arg.optional for arg in self.inputs):
                    yield f"{label}-bare", self._sample(cast(torch.dtype, dtype), lead, None, seed)

    def _sample(
        self,
        dtype: torch.dtype,
        lead: tuple[int, ...],
        choices: Mapping[str, str] | None,
        seed: int,
    ) -> tuple[Any, ...]:
        """One sample; without `choices`, every tensor and name that can be is left out."""
        generator = torch.Generator().manual_seed(seed)
        axes = dict.fromkeys(
            axis for arg in self.inputs for axis in arg.tail if axis.isidentifier()
        )
        sizes = dict(zip(axes, _SAMPLE_SIZES, strict=False))
        sizes |= {axis: size for axis, size in self.sample.items() if isinstance(size, int)}
        args: list[Any] = []
        for arg in self.inputs:
            if arg.kind == "ScalarType":
                args.append(dtype if arg.name in self.dtypes else _DEFAULT_DTYPE)
                continue
            if arg.optional and choices is None:
                args.append(self._default(arg))
                continue
            if arg.kind == "str":
                args.append((choices or {}).get(arg.name, self.choices[arg.name][0]))
                continue
            if callable(make := self.sample.get(arg.name)):
                args.append(make(sizes))
                continue
            shape = (*(lead if arg.has_lead else ()), *(size_of(axis, sizes) for axis in arg.tail))
            allowed = self.dtypes[arg.name]
            if isinstance(allowed[0], torch.dtype) and not allowed[0].is_floating_point:
                low, high = _sample_range(allowed[0], arg.name in self.positive)
                args.append(torch.randint(low, high, shape, dtype=allowed[0], generator=generator))
                continue
            value = torch.randn(shape, generator=generator)
            # Small: two scales times a sum of products must stay within float16.
            value = (value.abs() + 0.5) / 16 if arg.name in self.positive else value
            shared = isinstance(allowed, str) or dtype in allowed
            args.append(value.to(dtype if shared else cast(torch.dtype, allowed[0])))
        return tuple(args)

    def __repr__(self) -> str:
        return f"<qnn op {self.name}: {self.signature}>"
