"""The gradient of an op, derived from its declaration and registered on the op itself.

So it is the same in eager mode, in graphs that are exported, traced or captured, and to any order,
since a gradient is made of ops again. What has no gradient says so when it is differentiated: it
never gives zero or None.

- An argument with an entry in `Op.backward` has the result of that op as its gradient. The op is
  called with the incoming gradient and what it shares by name with the forward; of an argument
  `like` it reads the shape, which is that of the forward's input.
- `bias` is added along one axis of the result: its gradient is the sum over the others; of a
  grouped layer, whose rows have a bias for each group, the sum of each group's.
- An epilogue (`activation`, `residual`, `last`) is differentiated as the separate torch calls that
  it stands for.
- An op whose reference is differentiable (`Op.differentiable`) has the reference's gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from qnn.kernels.epilogue import ACTIVATIONS
from qnn.kernels.op import flops
from qnn.kernels.op.declaration import Declaration
from qnn.kernels.torch_private import (
    AFTER_AUTOGRAD,
    SingleLevelFunction,
    any_requires_grad,
    below_autograd,
    in_functorch_transform,
    in_mode,
    note_writes,
    single_level_functions,
    with_gradients,
    without_autocast,
)

__all__ = ["autograd_kernel", "gradient_of_bias", "shape_alone"]


def gradient_of_bias(
    dy: torch.Tensor, dtype: torch.dtype, axis: int = -1, offsets: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of what is added along `axis`, to each row `[N]` of `[..., N]`; where rows are
    sorted in groups, which end at `offsets`, `[E, N]` of `[M, N]`.
    """
    if offsets is None:
        others = [each for each in range(dy.dim()) if each != axis % dy.dim()]
        return dy.sum(others, dtype=dtype) if others else dy.to(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    sums = dy.new_zeros(offsets.shape[0] + 1, dy.shape[-1], dtype=compute)
    groups = group_of_rows(offsets, dy.shape[0])
    return sums.index_add(0, groups, dy.to(compute))[:-1].to(dtype)


def group_of_rows(offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """The group of each of `rows` sorted rows; the number of groups for a row of none."""
    each = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, each, right=True)


def shape_alone(dy: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor:
    """A tensor of this shape without memory. Sizes that are symbols would be no operands of a
    region in a graph.
    """
    return dy.new_empty(()).expand(shape)


def autograd_kernel(op: Declaration, ops: Mapping[str, Declaration]) -> Callable[..., Any]:
    """The kernel of `op` for the dispatch keys of autograd; `ops` are all that are declared.

    Where nothing requires a gradient it is one test and the call below it.
    """
    grad_enabled, redispatch = torch.is_grad_enabled, op.overload._handle.redispatch_boxed

    def run(keyset: Any, *args: Any) -> Any:
        if in_mode():
            flops.register(ops)
        if (grad_enabled() and any_requires_grad(*args)) or (
            forward_ad._current_level >= 0 and _has_tangent(args)
        ):
            return differentiable(keyset & AFTER_AUTOGRAD, *args)
        result = redispatch(keyset & AFTER_AUTOGRAD, *args)
        if op.written:
            note_writes(args[i] for i in op.written)
        return result

    names = [arg.name for arg in op.inputs]
    # What an epilogue has where it does nothing.
    absent = {"residual": None, "activation": "none", "last": "none"}
    epilogue = [names.index(name) for name in absent if name in names and not op.inference]
    bare = [absent[names[at]] for at in epilogue]
    # Made at the first gradient: of all ops together it would be a good part of the import.
    function = functools.cache(functools.partial(_function, op, ops))

    def differentiable(below: Any, *args: Any) -> Any:
        args += op.tails[len(args)]
        if op.written:  # there is no result whose gradient could be asked for
            needed = [n for n, v in zip(names, args, strict=True) if _is_differentiated(v)]
            _refuse(op, needed, set(), advice=_IN_PLACE)
        if epilogue:
            residual, activation, *last = given = [args[at] for at in epilogue]
            if residual is not None or given != bare:
                plain = list(args)
                for at, value in zip(epilogue, bare, strict=True):
                    plain[at] = value
                y = ACTIVATIONS[activation](op.overload(*plain))
                y = y if residual is None else y + residual
                return ACTIVATIONS[last[0]](y) if last else y
        with single_level_functions():
            return function().apply(functools.partial(redispatch, below), *args)

    return run


def _has_tangent(args: Sequence[Any]) -> bool:
    return torch._C._is_fwd_grad_enabled() and any(
        isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None
        for arg in args
    )


def _is_differentiated(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.requires_grad or _has_tangent((value,)))


def _function(op: Declaration, ops: Mapping[str, Declaration]) -> Any:
    names = [arg.name for arg in op.inputs]

    class Gradient(SingleLevelFunction):
        @staticmethod
        def forward(below: Callable[..., Any], *args: Any) -> Any:
            # A function's forward has no gradients of its own; transforms around it want theirs.
            around = with_gradients if in_functorch_transform() else below_autograd
            with around():
                return below(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            given, kept = inputs[1:], _kept(op, ops)
            tensors = [
                value if name in kept and isinstance(value, torch.Tensor) else None
                for name, value in zip(names, given, strict=True)
            ]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)
            # What else the gradients need: names and dtypes as they were given, and sizes.
            ctx.others = [None if isinstance(v, torch.Tensor) else v for v in given]
            ctx.like = [(v.shape, v.dtype) if isinstance(v, torch.Tensor) else None for v in given]
            ctx.result = (output.shape, output.dtype) if isinstance(output, torch.Tensor) else None

        @staticmethod
        def backward(ctx: Any, *douts: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            if all(dout is None for dout in douts):
                return (None,) * (1 + len(names))
            wanted = [n for n, wants in zip(names, ctx.needs_input_grad[1:], strict=True) if wants]
            given = _given(ctx, names)
            like = dict(zip(names, ctx.like, strict=True))
            found = _gradients(op, ops, given, douts, wanted, like)
            return None, *(found[name] if name in wanted else None for name in names)

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> torch.Tensor:
            moved = dict(zip(names, tangents, strict=True))
            return _tangent(op, ops, _given(ctx, names), moved, ctx.result)

    Gradient.__name__ = Gradient.__qualname__ = f"Gradient of qnn::{op.name}"
    return Gradient


def _given(ctx: Any, names: Sequence[str]) -> dict[str, Any]:
    """The arguments by name; a tensor that no gradient needs is None."""
    pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
    values = (other if tensor is None else tensor for tensor, other in pairs)
    return dict(zip(names, values, strict=True))


def _kept(op: Declaration, ops: Mapping[str, Declaration]) -> set[str]:
    """The arguments whose values the gradients need."""
    if op.differentiable:
        return {arg.name for arg in op.inputs}
    return {arg.name for other in op.backward.values() for arg in ops[other].inputs}


def _called(op: Declaration, given: Mapping[str, Any], dy: torch.Tensor) -> torch.Tensor:
    """A gradient's op on what it shares by name with the forward; what is left is `dy`."""
    args: list[Any] = []
    for arg in op.inputs:
        if arg.name in given:
            args.append(given[arg.name])
        else:
            args.append(op.default(arg) if arg.optional else dy)
    result: torch.Tensor = op.overload(*args)
    return result


def _gradients(
    op: Declaration,
    ops: Mapping[str, Declaration],
    given: Mapping[str, Any],
    douts: Sequence[torch.Tensor | None],
    wanted: Sequence[str],
    like: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """The gradient of each of the `wanted` arguments."""
    if op.differentiable:
        return _through_reference(op, given, douts, wanted)
    (dy, *_) = douts
    axis = op.bias_axis
    able = {*op.backward, *(["bias"] if axis is not None else [])}
    if refused := [name for name in wanted if name not in able]:
        _refuse(op, refused, able)
    assert dy is not None  # noqa: S101  # an op with gradients has one result
    if op.split is not None:
        (other,) = set(op.backward.values())
        return op.split(given, _called(ops[other], given, dy.contiguous()))
    found: dict[str, torch.Tensor] = {}
    if "bias" in wanted and axis is not None:
        found["bias"] = gradient_of_bias(dy, like["bias"][1], axis, given.get("offsets"))
    for first, other in op.backward.items():
        if first in wanted:
            shape, columns = shape_alone(dy, like[first][0]), like[first][0][-1]
            dx = _called(ops[other], {**given, "like": shape}, dy)
            # A packed weight stands for columns that x may lack.
            found[first] = dx if dx.shape[-1] == columns else dx[..., :columns]
    return found


def _through_reference(
    op: Declaration,
    given: Mapping[str, Any],
    douts: Sequence[torch.Tensor | None],
    wanted: Sequence[str],
) -> dict[str, torch.Tensor]:
    (dy,) = douts

    def reference(*moved: torch.Tensor) -> Any:
        values = {**given, **dict(zip(wanted, moved, strict=True))}
        with without_autocast():
            return op.reference(*(values[arg.name] for arg in op.inputs))

    pull: Any = torch.func.vjp(reference, *(given[name] for name in wanted))[1]
    return dict(zip(wanted, pull(dy), strict=True))


def _tangent(
    op: Declaration,
    ops: Mapping[str, Declaration],
    given: Mapping[str, Any],
    moved: Mapping[str, torch.Tensor | None],
    result: tuple[torch.Size, torch.dtype],
) -> torch.Tensor:
    """The tangent of the result, of a layer that is linear in its input and in `bias`: the gradient
    of the gradient is the layer without the rounding of the input, which is its linearisation.
    """
    able: set[str] = set()
    if op.split is None and op.backward:
        ((first, gradient),) = op.backward.items()
        (linearised,) = ops[gradient].backward.values()
        able = {first, *(["bias"] if (axis := op.bias_axis) is not None else [])}
    refused = [name for name, t in moved.items() if t is not None and name not in able]
    if refused:
        _refuse(op, refused, able, "forward-mode derivative")
    tx, tbias = moved[first], moved.get("bias")
    if tx is None:
        assert tbias is not None  # noqa: S101  # something has a tangent
        assert axis is not None  # noqa: S101  # or it would have been refused
        offsets = given.get("offsets")
        if offsets is not None:
            groups = group_of_rows(offsets, result[0][0])
            return torch.nn.functional.pad(tbias, (0, 0, 0, 1))[groups].to(result[1])
        return tbias.to(result[1]).view(-1, *[1] * (-1 - axis)).expand(result[0])
    shared = {name: value for name, value in given.items() if name != first}
    return _called(ops[linearised], {**shared, "bias": tbias}, tx)


_FROZEN = (
    "Detach what needs none; quantised values are frozen. To train a weight use qnn.Linear (or "
    "prepare for quantisation-aware training), in eager mode or under torch.compile."
)
_IN_PLACE = (
    "It writes codes in place, for inference: call it under torch.no_grad(), or detach them."
)


def _refuse(
    op: Declaration,
    refused: Sequence[str],
    able: set[str],
    what: str = "gradient",
    advice: str = _FROZEN,
) -> NoReturn:
    """Raise, naming what has no gradient, what has one, and what to do."""
    have = ", ".join(arg.name for arg in op.inputs if arg.name in able)
    raise NotImplementedError(
        f"qnn::{op.name} has no {what} with respect to {', '.join(refused)}"
        + (f", only to {have}" if have else "")
        + f". {advice}"
    )
