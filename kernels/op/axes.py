"""The notation of a declaration, parsed once.

    x: ... k, w: n k, bias?: n -> ... n

An argument is `name: axes`, and `name?: axes` where it may be left out, and so may all that follow.
A tensor `name!: axes` is written in place, and keeps its shape.
Axes stand apart by blanks; `...` is any number of leading ones. An axis is

- a name, `k`, which the first tensor that has it binds to its size;
- a number, `1`;
- a part of a known one: `k/128` is ⌈k / 128⌉, and `k/128>2` the same but at least 2;
- a sum of products of these: `p*2`, `k/16*8`, `t*b*p+b*h`;
- a function of known ones by its name, `out(h, kh, stride[0])`, which the declaration has.

`w: (n k)[e]` is a list of `e` tensors. Other arguments are a `dtype`, `str`, `int`, `int[]`,
`int[2]`, `float` or `bool`; `int=1` has a default. An integer argument is a known size too, and
`stride[0]` the first of several. Results are `name: axes`, or the axes alone, or `()` for none, of
an op that writes.
"""

from __future__ import annotations

import functools
import itertools
import keyword
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

LEAD = "..."
Sizes = Mapping[str, Any]
Functions = Mapping[str, Callable[..., Any]]

_NAME = r"[A-Za-z_]\w*"
_FACTOR = re.compile(rf"(?P<name>{_NAME}(?:\[\d+\])?)(?:/(?P<divisor>\d+)(?:>(?P<least>\d+))?)?")
_CALL = re.compile(rf"({_NAME})\((.*)\)")
_LIST = re.compile(rf"\((?P<axes>.*)\)\[(?P<count>{_NAME})\]")
_PLAIN = re.compile(r"(dtype|str|int|float|bool)(?:\[(\d*)\])?(?:=(.+))?")
_SCHEMA = {"dtype": "ScalarType", **{word: word for word in ("str", "int", "float", "bool")}}
FORMS = "names, k/128, k/128>2, p*2, t*b+b*h, f(h, k), and (n k)[e] for a list of tensors"


class UnknownSizeError(Exception):
    """The size of an axis is not known: `name` has not been bound."""


@dataclass(frozen=True)
class Factor:
    """`k`, `4`, `k/128` or `k/128>2`."""

    name: str | None
    number: int = 1
    divisor: int = 1
    least: int = 0

    def size(self, sizes: Sizes) -> Any:
        if self.name is None:
            return self.number
        if self.name not in sizes:
            raise UnknownSizeError(self.name)
        size = sizes[self.name]
        if self.divisor != 1:
            size = -(-size // self.divisor)
        return torch.sym_max(size, self.least) if self.least else size

    def source(self) -> str:
        """The same as a Python expression of variables with the axes' names."""
        if self.name is None:
            return str(self.number)
        size = self.name if self.divisor == 1 else f"-(-{self.name} // {self.divisor})"
        return f"max({size}, {self.least})" if self.least else size


@dataclass(frozen=True)
class Axis:
    """One axis: a sum of products of factors, or `function` of other axes."""

    text: str
    terms: tuple[tuple[Factor, ...], ...] = ()
    function: str | None = None
    of: tuple[Axis, ...] = ()

    @property
    def name(self) -> str | None:
        """The name, of an axis that is a name alone."""
        if len(self.terms) == 1 and len(self.terms[0]) == 1:
            (factor,) = self.terms[0]
            return factor.name if factor.divisor == 1 and not factor.least else None
        return None

    @property
    def names(self) -> frozenset[str]:
        """All that its size depends on."""
        own = (factor.name for term in self.terms for factor in term if factor.name)
        return frozenset(own).union(*(axis.names for axis in self.of))

    @property
    def is_number(self) -> bool:
        return not self.names and self.function is None

    def size(self, sizes: Sizes, functions: Functions | None = None) -> Any:
        """Its size; raises `UnknownSizeError` where `sizes` does not say it."""
        if self.function is not None:
            given = [axis.size(sizes, functions) for axis in self.of]
            return (functions or {})[self.function](*given)
        return sum(math.prod(factor.size(sizes) for factor in term) for term in self.terms)

    def source(self) -> str:
        """The size as a Python expression of variables with the axes' names."""
        if self.function is not None:
            return f"{self.function}({', '.join(axis.source() for axis in self.of)})"
        return " + ".join(" * ".join(factor.source() for factor in term) for term in self.terms)

    def __str__(self) -> str:
        return self.text


@functools.cache
def parse_axis(text: str) -> Axis:
    """An axis; a ValueError for what is none."""
    text = text.strip()
    if call := _CALL.fullmatch(text):
        return Axis(text, (), call[1], tuple(map(parse_axis, _apart(call[2], ","))))
    return Axis(text, tuple(tuple(map(_factor, term.split("*"))) for term in text.split("+")))


def _factor(text: str) -> Factor:
    if text.isdecimal():
        return Factor(None, int(text))
    match = _FACTOR.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return Factor(match["name"], 1, int(match["divisor"] or 1), int(match["least"] or 0))


@dataclass(frozen=True)
class Arg:
    """One argument or result.

    Attributes:
        name: of the argument.
        axes: of a tensor, without the leading ones; None for other arguments.
        has_lead: whether any number of axes come first.
        optional: whether it may be left out.
        kind: its type in the schema.
        count: of a list of tensors, the axis that is its length.
        default: of an optional argument that is not a tensor.
        written: whether the op writes to the tensor in place.
    """

    name: str
    axes: tuple[Axis, ...] | None
    has_lead: bool = False
    optional: bool = False
    kind: str = "Tensor"
    count: str | None = None
    default: Any = None
    written: bool = False

    @property
    def tail(self) -> tuple[Axis, ...]:
        """The axes after the leading ones."""
        return self.axes or ()

    @property
    def is_integers(self) -> bool:
        return self.kind.startswith("int")

    @property
    def length(self) -> int:
        """How many integers it has, as far as its type says; 0 of one, or of any number."""
        match = re.search(r"\[(\d+)\]", self.kind)
        return int(match[1]) if match else 0

    def __str__(self) -> str:
        return f"[{', '.join([*([LEAD] if self.has_lead else []), *map(str, self.tail)])}]"


def parse_signature(
    op: str, signature: str, functions: Collection[str] = ()
) -> tuple[tuple[Arg, ...], tuple[Arg, ...]]:
    """The arguments and the results of a signature.

    Raises:
        ValueError: what cannot be read, with the signature, the place and the reason.
    """

    def fail(reason: str) -> NoReturn:
        raise ValueError(f"{op}: signature {signature!r}: {reason}.")

    def read(part: str, *, given: bool) -> Arg:
        try:
            return _argument(part, given)
        except _UnreadableError as error:
            reason = str(error)
        fail(reason)

    left, arrow, right = signature.partition("->")
    if not arrow:
        fail("it has no '->' before the results")
    inputs = tuple(read(part, given=True) for part in _apart(left, ","))
    results = [] if right.strip() == "()" else _apart(right, ",")
    outputs = tuple(read(part, given=False) for part in results)
    if not outputs and not any(arg.written for arg in inputs):
        fail("it has no result, and no argument marked '!' that it writes to")
    for before, after in itertools.pairwise(inputs):
        if before.optional and not after.optional:
            fail(f"{after.name} must be optional, as {before.name} is")
    if len({arg.name for arg in inputs}) != len(inputs):
        twice = next(
            arg.name
            for i, arg in enumerate(inputs)
            if arg.name in {other.name for other in inputs[:i]}
        )
        fail(f"two arguments are called {twice}")
    known: set[str] = set()
    for arg in inputs:
        if arg.is_integers:
            known |= {arg.name, *(f"{arg.name}[{i}]" for i in range(arg.length))}
    for arg in inputs:
        known |= {arg.count} if arg.count else set()
        for axis in arg.tail:
            _require_functions(axis, functions, arg, fail)
            if axis.name is not None:
                if arg.optional and axis.name not in known:
                    fail(f"the optional {arg.name} is the first with {axis.name}")
                known.add(axis.name)
            elif lacks := axis.names - known:
                fail(f"no argument before {arg.name} says the size of {min(lacks)!r} in {axis}")
    for arg in outputs:
        if arg.has_lead and not any(other.has_lead for other in inputs):
            fail(f"no argument has the leading axes '...' of {arg.name}")
        for axis in arg.tail:
            _require_functions(axis, functions, arg, fail)
            if lacks := axis.names - known:
                fail(f"no argument says the size of {min(lacks)!r} in the result {arg.name}")
    return inputs, outputs


def _require_functions(
    axis: Axis, functions: Collection[str], arg: Arg, fail: Callable[[str], Any]
) -> None:
    if axis.function is not None and axis.function not in functions:
        fail(
            f"{arg.name} has an axis {axis}, and the declaration has no function {axis.function!r}"
        )
    for other in axis.of:
        _require_functions(other, functions, arg, fail)


class _UnreadableError(ValueError):
    """Why an argument or a result cannot be read."""


def _fail(reason: str) -> NoReturn:
    raise _UnreadableError(reason)


@functools.cache  # many ops share most of their arguments
def _argument(part: str, given: bool) -> Arg:
    """One argument, or one result, whose name may be missing."""
    name, colon, axes = part.partition(":")
    if not colon:
        if given:
            _fail(f"an argument has no ':' before its axes {part.strip()!r}; write 'name: axes'")
        name, axes = "y", part
    name, axes = name.strip(), axes.strip()
    optional, name = name.endswith("?"), name.removesuffix("?").strip()
    written, name = name.endswith("!") and given, name.removesuffix("!").strip()
    if written and optional:
        _fail(f"{name} is written, so it cannot be left out")
    if given and (not name.isidentifier() or keyword.iskeyword(name)):
        _fail(f"{name!r} cannot name an argument; write 'name: axes'")
    if axes.endswith("?"):
        _fail(f"{name} is marked after its axes; write '{name}?: {axes[:-1]}'")
    if (match := _PLAIN.fullmatch(axes)) and given:
        if written:
            _fail(f"{name} is marked '!' and is not a tensor")
        return _plain(name, match, optional)
    count = None
    if match := _LIST.fullmatch(axes):
        if written:
            _fail(f"{name} is marked '!' and is a list; name each tensor that is written")
        count, axes = match["count"], match["axes"].strip()
    words = _apart(axes, None)
    lead = words[:1] == [LEAD]
    if LEAD in words[1:]:
        _fail(f"'...' of {name} must come first, and once")
    parsed = []
    for word in words[lead:]:
        try:
            parsed.append(parse_axis(word))
        except ValueError:
            _fail(f"{word!r} of {name} is not an axis: {FORMS}")
    kind = "Tensor" if count is None else "Tensor[]"
    return Arg(name, tuple(parsed), lead, optional, kind, count, written=written)


def _plain(name: str, match: re.Match[str], optional: bool) -> Arg:
    """An argument that is not a tensor."""
    word, length, default = match.groups()
    if length is not None and word != "int":
        _fail(f"{name} is a list of {word}; only integers come in lists")
    kind = _SCHEMA[word] + ("" if length is None else f"[{length}]")
    if default is None:
        return Arg(name, None, optional=optional, kind=kind)
    try:
        flags = {"True": True, "False": False}
        value = flags[default] if word == "bool" else (float if word == "float" else int)(default)
    except (KeyError, ValueError):
        _fail(f"{name} has the default {default!r}, which is not {word}")
    return Arg(name, None, optional=True, kind=kind, default=value)


def _apart(text: str, separator: str | None) -> list[str]:
    """`text` cut at a separator, or at blanks, that stands in no bracket."""
    if separator is None and not {*"(["} & {*text}:
        return text.split()
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and (letter == separator or (separator is None and letter.isspace())):
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if separator is not None or part.strip()]


def size_of(text: str, sizes: Sizes) -> Any:
    """The size of an axis such as `k/128`, given by its text."""
    return parse_axis(text).size(sizes)


def describe(value: object) -> str:
    """`float32[4, 768]` for a tensor, for error messages."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple) and any(isinstance(each, torch.Tensor) for each in value):
        return f"[{', '.join(map(describe, value))}]"
    return repr(value)


def dtype_of(value: Any) -> torch.dtype:
    """The dtype that `value` is or has."""
    value = value[0] if isinstance(value, list | tuple) else value
    found: torch.dtype = value if isinstance(value, torch.dtype) else value.dtype
    return found


def tensors_of(arg: Arg, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an argument, each with its name in errors."""
    if arg.count is None:
        yield arg.name, value
        return
    yield from ((f"{arg.name}[{i}]", each) for i, each in enumerate(value))


__all__ = [
    "LEAD",
    "Arg",
    "Axis",
    "Factor",
    "Functions",
    "Sizes",
    "UnknownSizeError",
    "describe",
    "dtype_of",
    "parse_axis",
    "parse_signature",
    "size_of",
    "tensors_of",
]
