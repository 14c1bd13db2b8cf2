"""The C++ kernels refuse what `Op.check` refuses, in the same words: they check a call by the op's
own declaration. A wrong dtype is a TypeError there and a ValueError here, the one that torch lets
C++ raise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qnn.kernels import OPS, Op
from qnn.kernels.op import Arg
from qnn.kernels.reference.recurrent import CELLS

pytestmark = pytest.mark.usefixtures("library")
NATIVE = [name for name, op in OPS.items() if op.native]
OTHERS = (torch.float32, torch.float64, torch.int16, torch.complex64, torch.bool)


def broken(op: Op, arg: Arg, value: Any) -> Iterator[tuple[str, Any]]:
    """Other values of an argument, most of which are not as declared."""
    if arg.optional and arg.axes is not None:
        yield "left out", None
    if value is None:
        return
    if arg.kind == "str":
        yield "another word", "another"
        return
    if arg.kind == "ScalarType":
        yield from ((f"{dtype}", dtype) for dtype in OTHERS)
        return
    if arg.is_integers:
        many = isinstance(value, list | tuple)
        for other in (-1, 0, 50):
            yield f"{other}", [other, *value[1:]] if many else other
        return
    if arg.kind in ("float", "bool"):  # nothing is asked of it but what the rule says
        yield "another value", 0.5 if arg.kind == "float" else not value
        return
    yield from ((f"as {dtype}", value.to(dtype)) for dtype in OTHERS)
    yield "without axes", value.new_zeros(())
    yield "an axis more", value[None]
    yield "an axis less", value.flatten(-2) if value.dim() > 1 else value[0]
    for axis in range(value.dim()):
        yield f"axis {axis} shorter", value.narrow(axis, 0, max(value.shape[axis] - 1, 0))
        last = value.narrow(axis, value.shape[axis] - 1, 1)  # so that offsets still do not fall
        yield f"axis {axis} longer", torch.cat([value, last], axis)
    for axis, named in enumerate(arg.tail, -len(arg.tail)):
        if named.name in op.limits:
            shape = list(value.shape)
            shape[axis] = op.limits[named.name] + 1
            yield f"{named} too long", value.new_zeros(1).expand(shape)


def may_be_any(op: Op, arg: Arg) -> bool:
    """Whether it is a number, or an integer of which no size is made."""
    if arg.kind == "float":
        return True
    others = [line for line in op.checks.splitlines() if not re.match(rf"{arg.name}\b", line)]
    return arg.is_integers and re.search(rf"\b{arg.name}\b", "\n".join(others)) is None


def words_of(check: Any, args: tuple[Any, ...]) -> str | None:
    try:
        check(*args)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", NATIVE)
def test_the_same_words(name: str) -> None:
    op, refused = OPS[name], set[str]()
    kernel = getattr(torch.ops.qnn, f"{name}_no_grad").default
    samples = dict(op.samples())
    wanted = [next(iter(samples))] + [key for key in samples if key.startswith("float32-2x3-")]
    for key in wanted:
        args = samples[key]
        for i, (arg, value) in enumerate(zip(op.inputs, args, strict=True)):
            for how, other in broken(op, arg, value):
                call = (*args[:i], other, *args[i + 1 :])
                # Each call appends to a cache of its own.
                call = tuple(v.clone() if j in op.written else v for j, v in enumerate(call))
                want = words_of(op.check, call)
                assert words_of(kernel, call) == want, (key, arg.name, how)
                refused |= {arg.name} if want is not None else set()
    assert refused == {arg.name for arg in op.inputs if not may_be_any(op, arg)}


def test_an_op_without_a_kernel() -> None:
    with pytest.raises(ValueError, match=r"the C[+][+] library has no kernel of it"):
        torch.ops.qnn.cpu_declare("int8_dequantize", OPS["int8_dequantize"].checks)


@pytest.mark.parametrize(
    "checks",
    [
        "x: ... out(k) | float32",
        "x: ... k+1 | float32",
        "x: ... k/8/2 | float32",
        "x: ... k | float31",
        "x: ... k",
    ],
)
def test_what_cannot_be_checked(checks: str) -> None:
    """What a declaration says beyond what C++ can check is refused, and not left out."""
    with pytest.raises(ValueError, match=r"the C[+][+] kernels cannot check"):
        torch.ops.qnn.cpu_declare("int8_quantize", checks)


def test_parts_of_cells() -> None:
    """The rows of a table, by which C++ finds the grid of a part."""
    given = dict(pair.split(":") for pair in torch.ops.qnn.cpu_cell_parts().split(";"))
    assert {name: tuple(parts.split(",")) for name, parts in given.items()} == {
        name: cell.parts for name, cell in CELLS.items()
    }
