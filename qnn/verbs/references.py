"""Who holds a module: every place in a model that names one, so that another can take its place.

Layers are not only children. Lists, dicts, attributes of other objects, bound methods, closures and
`functools.partial`s name them too, and what still names the old layer still calls it.
"""

from __future__ import annotations

import dis
import functools
import gc
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, bytearray, type, types.ModuleType,
    types.CodeType, torch.Tensor, torch.dtype, torch.device, torch.Size, torch.UntypedStorage,
)  # fmt: skip
_BOXES = (list, dict, set, deque)
# Of the standard library only these hold what users put in; a logger, say, leads to all others.
_OPEN = {
    "_weakrefset",
    "builtins",
    "collections",
    "functools",
    "types",
    "weakref",
    "argparse",
    "__main__",
}


@dataclass
class Place:
    """Where a module is named: `holder` has it as its attribute, item or member `key`.

    A holder that is a module to be replaced itself is given by its id, so that nothing here keeps
    it alive.
    """

    holder: Any
    kind: str
    key: Any


@dataclass
class References:
    """What `find` found: the places of each module, by its id, and those where none can be put."""

    places: dict[int, list[Place]] = field(default_factory=dict)
    fixed: list[tuple[str, int]] = field(default_factory=list)


def find(
    model: nn.Module, targets: dict[int, nn.Module], own: set[int] | None = None
) -> References:
    """Every place in `model` that leads to one of `targets`.

    Args:
        model: what is searched, with all the objects that its modules lead to.
        targets: the modules that are looked for, by id.
        own: ids of the objects that may be changed, all if None. Others are not searched, except
            for plain lists, dicts and sets in a closure, which `replaced` builds anew.
    """
    found, seen = References(), set[int]()
    todo: list[tuple[Any, str]] = [(m, name) for name, m in model.named_modules()]
    while todo:
        holder, path = todo.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        known = set[int]()
        for place, value, step in _edges(holder, targets):
            if isinstance(value, _ATOMS) or (isinstance(value, _BOXES) and not value):
                continue
            scan = _Scan(targets, own)
            scan.look(value)
            where = f"{path}{step}" if path else step.lstrip(".")
            for key in scan.ids:
                found.places.setdefault(key, []).append(place)
            known |= scan.ids
            found.fixed += [(where, key) for key in scan.fixed]
            todo += [(each, where) for each in scan.holders if id(each) not in seen]
        if own is None and isinstance(holder, nn.Module):
            todo += [(box, f"{path}.{key}".lstrip(".")) for key, box in _boxes_of(type(holder))]
        if not isinstance(holder, (nn.Module, *_BOXES)):
            found.fixed += [(path, key) for key in _inside(holder, targets) - known]
    return found


def _boxes_of(kind: type) -> Iterator[tuple[str, Any]]:
    """Lists and dicts of a class, which its modules share, and those in cells of its forward."""
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for key, value in vars(each).items():
            if isinstance(value, _BOXES) and value:
                yield key, value
    for cell in getattr(getattr(kind, "forward", None), "__closure__", None) or ():
        if isinstance(_content(cell), _BOXES):
            yield "forward", _content(cell)


def put(place: Place, current: dict[int, nn.Module], change: Callable[[Any], Any]) -> None:
    """Change what stands in a place; `current` has the modules that stand for replaced ones."""
    holder: Any = current[place.holder] if isinstance(place.holder, int) else place.holder
    if place.kind == "attribute":
        values = vars(holder)
        if place.key in values:  # else it is something that the new layer has no use for
            values[place.key] = change(values[place.key])
    elif place.kind == "slot":
        object.__setattr__(holder, place.key, change(getattr(holder, place.key)))
    elif place.kind == "item":
        holder[place.key] = change(holder[place.key])
    elif place.kind == "keys":
        items = [(change(key), value) for key, value in holder.items()]
        holder.clear()
        holder.update(items)
    else:
        members = [change(member) for member in holder]
        holder.clear()
        holder.update(members)


def _edges(holder: Any, targets: dict[int, nn.Module]) -> Iterator[tuple[Place, Any, str]]:
    """What `holder` holds, with the place and the step of its path."""
    if isinstance(holder, dict):
        if any(not isinstance(key, _ATOMS) for key in holder):
            yield Place(holder, "keys", None), tuple(holder), ".keys()"
        for key, value in holder.items():
            yield Place(holder, "item", key), value, f"[{key!r}]" if _plain(key) else "[…]"
    elif isinstance(holder, list | deque):
        for index, value in enumerate(holder):
            yield Place(holder, "item", index), value, f"[{index}]"
    elif isinstance(holder, set):
        yield Place(holder, "members", None), tuple(holder), ""
    values = getattr(holder, "__dict__", None)
    if isinstance(values, dict):
        known = id(holder) if id(holder) in targets else holder
        for key, value in values.items():
            if key == "_modules" and isinstance(holder, nn.Module):
                for name, child in value.items():
                    yield Place(value, "item", name), child, f".{name}"
            elif key not in ("_parameters", "_buffers") and not isinstance(value, _ATOMS):
                yield Place(known, "attribute", key), value, f".{key}"
    for kind in type(holder).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(vars(kind).get(name), types.MemberDescriptorType):
                value = getattr(holder, name, None)
                yield Place(holder, "slot", name), value, f".{name}"


def _plain(key: Any) -> bool:
    return isinstance(key, str | int)


class _Scan:
    """What one value leads to, through what cannot be changed and so is built anew."""

    def __init__(self, targets: dict[int, nn.Module], own: set[int] | None) -> None:
        self.targets, self.own = targets, own
        self.ids, self.fixed = set[int](), set[int]()
        self.holders: list[Any] = []
        self._seen = set[int]()

    def look(self, value: Any) -> None:
        if isinstance(value, _ATOMS) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if id(value) in self.targets:
            self.ids.add(id(value))
        elif isinstance(value, _BOXES):
            # A box that is not ours is rebuilt; one that is ours has places itself.
            if self.own is None or id(value) in self.own:
                self.holders.append(value)
            else:
                for child in _children(value) or ():
                    self.look(child)
        elif (children := _children(value)) is not None:
            for child in children:
                self.look(child)
        elif self.own is not None and id(value) not in self.own:
            return
        elif hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
            package = type(value).__module__.partition(".")[0]
            if package in _OPEN or package not in sys.stdlib_module_names:
                self.holders.append(value)
        else:
            self.fixed |= _inside(value, self.targets)
            self.holders += [each for each in gc.get_referents(value) if isinstance(each, _BOXES)]


def _inside(value: Any, targets: dict[int, nn.Module]) -> set[int]:
    """What an object of C holds is known to the garbage collector alone, and not to be changed."""
    scan = _Scan(targets, set())
    for child in gc.get_referents(value):
        if id(child) in targets or isinstance(child, types.MethodType | functools.partial | tuple):
            scan.look(child)
    return scan.ids


def _children(value: Any) -> Iterable[Any] | None:
    """What an unchangeable value holds, or a box; None if it is neither."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values(), *vars(value).values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.BuiltinMethodType):
        return [value.__self__]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, types.MappingProxyType):
        return gc.get_referents(value)
    return None


def _of_function(value: types.FunctionType) -> list[Any]:
    held = [_content(cell) for cell in value.__closure__ or ()]
    held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return held + list(vars(value).values())


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name of the enclosing function that has no value yet
        return None


class Replace:
    """A change of values: each module of `table` (by id) gives way to another.

    `old` has the class of the layer before it, by the id of both: a bound method that is that
    class's own becomes the new class's, and any other is bound to the new layer.
    """

    def __init__(self, table: dict[int, nn.Module], old: dict[int, type], own: set[int] | None):
        self.table, self.old, self.own = table, old, own
        self._made: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        """`value`, or another in its place if it leads to one of the modules."""
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self.table:
            return self.table[id(value)]
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, _BOXES) and (self.own is None or id(value) in self.own):
            return value
        scan = _Scan(self.table, self.own)
        scan.look(value)
        if not scan.ids:
            return value
        return self._rebuilt(value)

    def _rebuilt(self, value: Any) -> Any:
        if isinstance(value, dict):
            return type(value)((self(key), self(each)) for key, each in value.items())
        if isinstance(value, tuple) and hasattr(value, "_make"):
            return value._make(map(self, value))
        if isinstance(value, tuple):
            return tuple.__new__(type(value), map(self, value))
        if isinstance(value, list | set | frozenset | deque):
            return type(value)(map(self, value))
        if isinstance(value, functools.partial):
            keywords = {key: self(each) for key, each in value.keywords.items()}
            made = type(value)(self(value.func), *map(self, value.args), **keywords)
            vars(made).update({key: self(each) for key, each in vars(value).items()})
            return made
        if isinstance(value, types.MethodType):
            return self._method(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, weakref.KeyedRef):
            return weakref.KeyedRef(self(value()), value.__callback__, value.key)
        if isinstance(value, weakref.WeakMethod):  # whose callback is its own
            return weakref.WeakMethod(self(value()))
        if isinstance(value, weakref.ref):
            return type(value)(self(value()), value.__callback__)
        return value

    def _method(self, value: types.MethodType) -> types.MethodType:
        function, holder, before = value.__func__, value.__self__, self.old.get(id(value.__self__))
        new, name = self(holder), function.__name__
        if before is not None and getattr(before, name, None) is function:
            function = getattr(type(new), name, function)
        return types.MethodType(self(function), new)

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """The function with cells of its own where they lead to a module: the variables of whoever
        wrote it stay as they are.
        """
        cells = [
            types.CellType() if self._leads(_content(cell)) else cell
            for cell in value.__closure__ or ()
        ]
        made = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, None, tuple(cells) or None
        )
        self._made[id(value)] = made  # before its cells: it may be in one of them
        for cell, old in zip(cells, value.__closure__ or (), strict=True):
            if cell is not old:
                cell.cell_contents = self(_content(old))
        made.__defaults__ = self(value.__defaults__)
        made.__kwdefaults__ = {k: self(v) for k, v in (value.__kwdefaults__ or {}).items()} or None
        made.__qualname__, made.__module__ = value.__qualname__, value.__module__
        made.__doc__, made.__annotations__ = value.__doc__, value.__annotations__
        vars(made).update({key: self(each) for key, each in vars(value).items()})
        return made

    def _leads(self, value: Any) -> bool:
        scan = _Scan(self.table, self.own)
        scan.look(value)
        return bool(scan.ids)


def calls_its_class(layer: nn.Module) -> bool:
    """Whether the `forward` that was set on a layer itself ends in the one of its class: then it
    wraps the layer's arithmetic, and does not replace it.
    """
    forward = vars(layer)["forward"]
    todo, seen = [forward], set[int]()
    while todo:
        value = todo.pop()
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.MethodType) and value.__self__ is layer:
            if value.__func__ is type(layer).forward:
                return True
            todo.append(value.__func__)
        if value is layer:  # the usual names for what was there before
            todo += [each for key, each in vars(layer).items() if key.endswith("_forward")]
        else:
            todo += _children(value) or ()
    return False


def stuck(module: nn.Module, targets: dict[int, nn.Module], *, copied: bool) -> bool:
    """Whether the `forward` of a module goes on calling one of `targets`, which it finds outside of
    the model: in a global variable, in a closure or a list of its class, or, if `copied`, through
    an object that a copy shares.
    """
    if _class_is_stuck(type(module), targets, copied=copied):
        return True
    todo, seen = [vars(module).get("forward")], set[int]()
    while todo:
        value = todo.pop()
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            if copied and id(value) in targets:
                return True
            continue
        if _reads_global(value, targets):
            return True
        children = _children(value)
        if children is None and copied:
            children = getattr(value, "__dict__", {}).values()
        todo += children or ()
    return False


def _class_is_stuck(kind: type, targets: dict[int, nn.Module], *, copied: bool) -> bool:
    forward: Any = getattr(kind, "forward", None)
    if kind.__module__.partition(".")[0] == "torch" or not isinstance(forward, types.FunctionType):
        return False
    held = [_content(cell) for cell in forward.__closure__ or ()]
    if copied:  # in place they are changed
        held += [box for key, box in _boxes_of(kind) if key in forward.__code__.co_names]
    else:
        held = [value for value in held if not isinstance(value, _BOXES)]
    return _reads_global(forward, targets) or any(_leads_to(value, targets) for value in held)


def _leads_to(value: Any, targets: dict[int, nn.Module]) -> bool:
    scan = _Scan(targets, set())
    scan.look(value)
    return bool(scan.ids)


def _reads_global(value: Any, targets: dict[int, nn.Module]) -> bool:
    if not isinstance(value, types.FunctionType):
        return False
    held = value.__globals__
    return any(id(held.get(name)) in targets for name in _names(value.__code__))


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> frozenset[str]:
    """The global names that a function and those inside it read; attributes are names too, but not
    these.
    """
    read = {
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            read |= _names(constant)
    return frozenset(read)
