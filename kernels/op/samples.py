"""Samples of an op's arguments, for the tests that every op goes through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from qnn.kernels.op.axes import Arg
from qnn.kernels.op.declaration import Declaration

_SIZES = (37, 19, 23, 7, 5)
_LEADS: tuple[tuple[int, ...], ...] = ((5,), (), (2, 3), (0,))


def samples(op: Declaration, seed: int = 0) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments, each with a readable id: every lead, every dtype, options present and absent,
    every choice.
    """
    free = op.dtypes.get("dtype", op.dtypes[op.inputs[0].name])
    count = max(map(len, op.choices.values()), default=1)
    cycles = map(itertools.cycle, op.choices.values())
    names = zip(*cycles, strict=True) if op.choices else itertools.repeat(())
    leads = _LEADS if any(arg.has_lead for arg in op.inputs) else _LEADS[:1]
    for dtype in free:
        # Every lead with the first dtype; with the others one that has rows, and the empty one.
        for lead in leads if dtype == free[0] else dict.fromkeys((leads[0], leads[-1])):
            label = f"{dtype}-{'x'.join(map(str, lead)) or 'scalar'}".removeprefix("torch.")
            # Every choice with the first lead, then one a lead in turn.
            for picked in itertools.islice(names, count if lead == _LEADS[0] else 1):
                choices = dict(zip(op.choices, picked, strict=True))
                yield (
                    "-".join([label, *picked]),
                    _sample(op, cast(torch.dtype, dtype), lead, choices, seed),
                )
            if any(arg.optional for arg in op.inputs):
                yield f"{label}-bare", _sample(op, cast(torch.dtype, dtype), lead, None, seed)


def _sample(
    op: Declaration,
    dtype: torch.dtype,
    lead: tuple[int, ...],
    choices: Mapping[str, str] | None,
    seed: int,
) -> tuple[Any, ...]:
    """One sample; without `choices`, everything that can be is left out."""
    generator = torch.Generator().manual_seed(seed)
    integers = {
        arg.name: op.sample.get(arg.name, arg.default) for arg in op.inputs if arg.is_integers
    }
    names = [axis.name for arg in op.inputs for axis in arg.tail if axis.name is not None]
    sizes: dict[str, Any] = dict(zip(dict.fromkeys(names), _SIZES, strict=False))
    sizes |= {axis: size for axis, size in op.sample.items() if isinstance(size, int)}
    for name, value in integers.items():
        many = value if isinstance(value, list | tuple) else []
        sizes |= {name: value, **{f"{name}[{i}]": each for i, each in enumerate(many)}}

    def tensor(arg: Arg) -> torch.Tensor:
        axes = (axis.size(sizes, op.sizes) for axis in arg.tail)
        shape = (*(lead if arg.has_lead else ()), *axes)
        allowed = op.dtypes[arg.name]
        if isinstance(allowed[0], torch.dtype) and not allowed[0].is_floating_point:
            low, high = op.sample.get(arg.name) or _range(allowed[0], arg.name in op.positive)
            return torch.randint(low, high, shape, dtype=allowed[0], generator=generator)
        value = torch.randn(shape, generator=generator)
        # Small: two scales times a sum of products must stay within float16.
        value = (value.abs() + 0.5) / 16 if arg.name in op.positive else value
        shared = isinstance(allowed, str) or dtype in allowed
        return value.to(dtype if shared else cast(torch.dtype, allowed[0]))

    args: list[Any] = []
    for arg in op.inputs:
        if arg.kind == "ScalarType":
            args.append(dtype if arg.name in op.dtypes else torch.float32)
        elif arg.optional and choices is None:
            args.append(op.default(arg))
        elif arg.kind == "str":
            args.append((choices or {}).get(arg.name, op.choices[arg.name][0]))
        elif callable(make := op.sample.get(arg.name)):
            args.append(make(sizes))
        elif arg.axes is None:
            args.append(op.sample.get(arg.name, arg.default))
        elif arg.count is not None:
            args.append([tensor(arg) for _ in range(sizes[arg.count])])
        else:
            args.append(tensor(arg))
    return tuple(args)


def _range(dtype: torch.dtype, positive: bool) -> tuple[int, int]:
    """The integers to draw samples from; a byte that is positive is an exponent of E8M0."""
    if positive:
        return 118, 126
    info = torch.iinfo(dtype)
    return info.min, min(info.max, 2**31) + (info.bits <= 8)
