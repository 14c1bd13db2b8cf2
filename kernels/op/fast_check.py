"""The check of a call as one straight line of Python without messages, for eager mode: 1 µs where
the loop of `Declaration.check` takes 4 (16 when cold).

For `x: ... k, w: n k` it reads

    def fits(x, w):
        device = x.device
        shape = x.shape
        if x.dtype not in x_allowed or x.device != device or len(shape) < 1: return False
        lead = shape[:len(shape) - 1]
        k = shape[-1]
        shape = w.shape
        if w.dtype not in w_allowed or w.device != device or len(shape) != 2: return False
        n = shape[-2]
        if k != shape[-1]: return False
        return True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qnn.kernels.op.axes import LEAD, Arg


def source_of(
    inputs: Sequence[Arg],
    dtypes: Mapping[str, tuple[torch.dtype, ...] | str],
    limits: Mapping[str, int],
    multiples: Mapping[str, int],
) -> str:
    """The source of a function `fits` of the arguments, which says whether they are as declared.

    Where it runs, `x_allowed` are the dtypes or choices of each argument `x`.
    """
    known: set[str] = {arg.name for arg in inputs if arg.is_integers}
    tensors = [arg for arg in inputs if arg.axes is not None]
    first = next(arg for arg in tensors)
    lines = [f"device = {first.name}{'' if first.count is None else '[0]'}.device"]
    for arg in inputs:
        if arg.axes is None:
            if arg.kind == "str" or arg.name in dtypes:
                lines.append(f"if {arg.name} not in {arg.name}_allowed: return False")
            continue
        if arg.count is None:
            body = _tensor(arg, arg.name, inputs, dtypes, limits, multiples, known)
        else:
            body = [f"if not {arg.name}: return False"]
            body += _compare(arg.count, f"len({arg.name})", known)
            # The first tensor binds what is new.
            body += _tensor(arg, f"{arg.name}[0]", inputs, dtypes, limits, multiples, known)
            each = _tensor(arg, "each", inputs, dtypes, limits, multiples, known)
            body += [f"for each in {arg.name}:", *(f"    {line}" for line in each)]
        if arg.optional:
            body = [f"if {arg.name} is not None:", *(f"    {line}" for line in body)]
        lines += body
    names = ", ".join(arg.name for arg in inputs)
    return "\n    ".join([f"def fits({names}):", *lines, "return True"])


def _tensor(
    arg: Arg,
    name: str,
    inputs: Sequence[Arg],
    dtypes: Mapping[str, tuple[torch.dtype, ...] | str],
    limits: Mapping[str, int],
    multiples: Mapping[str, int],
    known: set[str],
) -> list[str]:
    """The lines for one tensor; what they bind is known afterwards."""
    allowed = dtypes[arg.name]
    wrong = [
        f"{name}.dtype != {_dtype(allowed, inputs)}"
        if isinstance(allowed, str)
        else f"{name}.dtype not in {arg.name}_allowed",
        f"{name}.device != device",
        f"len(shape) {'<' if arg.has_lead else '!='} {len(arg.tail)}",
    ]
    lines = [f"shape = {name}.shape", f"if {' or '.join(wrong)}: return False"]
    if arg.has_lead:
        lead = f"shape[:len(shape) - {len(arg.tail)}]"
        lines.append(f"if lead != {lead}: return False" if LEAD in known else f"lead = {lead}")
        known.add(LEAD)
    for position, axis in enumerate(arg.tail, -len(arg.tail)):
        size = f"shape[{position}]"
        if axis.name is None:
            lines.append(f"if {axis.source()} != {size}: return False")
            continue
        new = axis.name not in known
        lines += _compare(axis.name, size, known)
        if new and axis.name in limits:
            lines.append(f"if {axis.name} > {limits[axis.name]}: return False")
        if new and axis.name in multiples:
            lines.append(f"if {axis.name} % {multiples[axis.name]}: return False")
    return lines


def _compare(name: str, size: str, known: set[str]) -> list[str]:
    """Bind a name to a size, or compare it."""
    if name in known:
        return [f"if {name} != {size}: return False"]
    known.add(name)
    return [f"{name} = {size}"]


def _dtype(name: str, inputs: Sequence[Arg]) -> str:
    """The expression for the dtype that the argument `name` is or has."""
    (arg,) = (arg for arg in inputs if arg.name == name)
    if arg.axes is None:
        return name
    return f"{name}{'' if arg.count is None else '[0]'}.dtype"
