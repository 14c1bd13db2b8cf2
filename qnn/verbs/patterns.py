"""Patterns that pick layers of a model: names with wildcards, types, or callables."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from qnn.kinds import kind_of

Pattern: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns: TypeAlias = Pattern | Iterable[Pattern]


def as_list(patterns: Patterns | None) -> list[Pattern]:
    """One pattern, several or None, as a list."""
    if patterns is None:
        return []
    if isinstance(patterns, Iterable) and not isinstance(patterns, str | type):
        return list(patterns)
    return [patterns]


def matches(pattern: Pattern, name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether `pattern` picks the module called `name`.

    A name or a type picks a module and all that is inside it: `"encoder.layer.0"` picks that
    layer's linears, and so does the layer's class. A callable is asked about the module itself.
    """
    if isinstance(pattern, str):
        return any(fnmatchcase(part, pattern) for part in _path(name))
    if isinstance(pattern, type):
        return any(
            isinstance(modules[part], pattern) for part in ("", *_path(name)) if part in modules
        )
    return bool(pattern(name, modules[name]))


def names(pattern: Pattern, name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether `pattern` picks the module called `name` itself, and not what it is inside of or
    every layer: `"*.dense"`, its own class, a callable.

    Of a kind that is taken when named, the classes that the kind takes name a layer too, and a
    callable does not: it may be older than the kind. A model that is one layer is named.
    """
    kind = kind_of(modules[name])
    apart = kind is not None and bool(kind.when_named)
    if isinstance(pattern, str):
        return bool(pattern.strip("*?.")) and fnmatchcase(name, pattern)
    if isinstance(pattern, type):
        general = (nn.Module, *(kind.floats if kind is not None and not apart else ()))
        picked = pattern not in general and isinstance(modules[name], pattern)
        return picked or (apart and not name)
    return not apart and bool(pattern(name, modules[name]))


def _path(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`; the root is its own path."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def describe(pattern: Pattern) -> str:
    if isinstance(pattern, str):
        return repr(pattern)
    return getattr(pattern, "__name__", repr(pattern))


def check(
    who: str, argument: str, patterns: Iterable[Pattern], modules: dict[str, nn.Module]
) -> None:
    """Raise unless every pattern is of a known kind and picks something.

    Raises:
        TypeError: a pattern that is not a name, a type or a callable.
        ValueError: one that matches nothing.
    """
    for pattern in patterns:
        if not (isinstance(pattern, str) or callable(pattern)) or isinstance(pattern, nn.Module):
            raise TypeError(
                f"{who}: {argument} takes names with wildcards, module types or callables "
                f"(name, module) -> bool, got {type(pattern).__name__} {pattern!r}."
            )
        # A callable is asked about layers that have a kind only, first about those that are taken
        # in any case: it may read what other modules do not have.
        asked = list(modules)
        if not isinstance(pattern, str | type):
            kinds = {name: kind for name in asked if (kind := kind_of(modules[name])) is not None}
            asked = sorted(kinds, key=lambda name: bool(kinds[name].when_named))
        if not any(matches(pattern, name, modules) for name in asked):
            close = (
                difflib.get_close_matches(pattern, modules, n=3) if isinstance(pattern, str) else []
            )
            hint = f" Close names: {', '.join(map(repr, close))}." if close else ""
            raise ValueError(
                f"{who}: {argument} pattern {describe(pattern)} matches no module of the "
                f"model.{hint} Names are those of model.named_modules(); wildcards are *, ? and "
                "[seq]."
            )
