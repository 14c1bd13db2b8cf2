"""Code of a model that asks for an `nn.LSTM` or `nn.GRU` by its class.

What stands for one after `prepare` or `convert` is an `nn.RNNBase`, and none of these two: Dynamo
refuses every module for which `isinstance(module, nn.LSTM)` is true, so that no such layer could be
compiled. A model that tells LSTM from GRU so, as to take `h` from `(h, c)`, takes the other branch
in silence. Its code is looked through for that.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator

from torch import nn

from qnn.nn.recurrent.sequences import Sequences

# Methods that run before a layer is swapped.
_BEFORE = {"__init__", "_init_weights", "init_weights", "reset_parameters", "_reset_parameters"}


def class_checks(model: nn.Module) -> dict[str, list[str]]:
    """The methods that ask for a class, `Encoder.forward`, by the name of each recurrent layer that
    is inside of their module.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        methods = sorted(_asking(type(module)))
        for child, layer in module.named_modules(prefix=name) if methods else ():
            if isinstance(layer, Sequences):
                known = found.setdefault(child, [])
                known += [method for method in methods if method not in known]
    return found


def warn_of_class_checks(who: str, model: nn.Module) -> None:
    """Say at the swap what `class_checks` finds."""
    checks = class_checks(model)
    methods = sorted({method for each in checks.values() for method in each})
    if methods:
        warnings.warn(
            f"{who}: {', '.join(methods)} asks for nn.LSTM or nn.GRU by class, and "
            f"{', '.join(map(repr, checks))} is none of them now, since torch.compile takes no "
            f"layer that is: isinstance(layer, nn.LSTM) is False. {ADVICE}.",
            stacklevel=5,
        )


ADVICE = 'Ask layer.mode == "LSTM", which is so before and after'


def _asking(kind: type) -> Iterator[str]:
    """The methods of a user's module class that name both a check and a class."""
    done = set(_BEFORE)
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] in ("torch", "qnn", "builtins"):
            continue
        for name, value in vars(each).items():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if name in done or not isinstance(function, types.FunctionType):
                continue
            names = set(_names(function.__code__))
            if "super" not in names:
                done.add(name)  # what a base class has under this name is not called
            if names & {"isinstance", "type"} and names & {"LSTM", "GRU"}:
                yield f"{kind.__name__}.{name}"


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names and attributes that a function reads, and those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
