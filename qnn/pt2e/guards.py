"""The check of input sizes that torch.export puts into a graph, which here says what to do, and why
a graph is not pickled.
"""

from __future__ import annotations

import builtins
import math
from types import CodeType, FunctionType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

_HINT = (
    ". The model was exported for inputs like its example; for batches of any size export it with "
    "dynamic shapes, as torch.export.export(model, args, dynamic_shapes=({0: "
    "torch.export.Dim.AUTO},))"
)


class Guards(nn.Module):
    """Asserts what torch.export found to hold of the inputs. Without users in the graph, and kept
    all the same.
    """

    _is_impure = True

    def __init__(self, code: CodeType) -> None:
        super().__init__()
        names = {**SYMPY_INTERP, "math": math, "inf": math.inf, "torch": torch}
        names["__builtins__"] = builtins  # which torch.compile looks for
        check: Any = torch._dynamo.dont_skip_tracing(FunctionType(code, names))
        self._code, self.forward = code, check

    def __deepcopy__(self, memo: dict[int, Any]) -> Guards:
        memo[id(self)] = copied = Guards(self._code)
        return copied

    def __reduce__(self) -> NoReturn:
        Unpicklable().__reduce__()


class Unpicklable:
    """In the `meta` of a graph. Pickle would trace the graph's code anew, without the types of its
    nodes, and fails at many operators.
    """

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "qnn.pt2e: a graph module is not pickled. Save torch.export.export(graph, args) by "
            "torch.export.save, or graph.state_dict(), and load it into a graph that was prepared "
            "and converted in the same way."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpicklable:
        return self


def own_guards(graph: GraphModule) -> None:
    """Put `Guards` in the place of torch.export's check, if there is one."""
    theirs = graph._modules.get("_guards_fn")
    code = None if isinstance(theirs, Guards) else _code(getattr(theirs, "forward", None))
    if code is None:
        return
    told = tuple(
        f"{each}{_HINT}" if isinstance(each, str) and each.startswith("Guard failed") else each
        for each in code.co_consts
    )
    graph._modules["_guards_fn"] = Guards(code.replace(co_consts=told))


def _code(function: Any) -> CodeType | None:
    """That of the function that asserts, which torch wraps."""
    code = getattr(function, "__code__", None)
    if code is None or any(str(each).startswith("Guard failed") for each in code.co_consts):
        return code
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return next((found for each in cells if (found := _code(each)) is not None), None)
