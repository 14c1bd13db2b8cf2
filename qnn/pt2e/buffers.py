"""State that a graph reads and writes anew, held as the integers that are written."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from qnn.kernels.torch_private import quantized_decomposed
from qnn.pt2e.constants import attribute, erase_with_inputs, names_of, register, writes
from qnn.pt2e.qdq import Writer

_COPY = torch.ops.aten.copy_.default


def fold_into_buffers(gm: GraphModule) -> dict[str, str]:
    """Hold in integers each buffer of `gm` that ends in `buffer.copy_(dequantize(codes, grid))`;
    by the name of each that stays float, the reason.

    The copy takes the codes, and what reads the buffer reads them dequantised on the grid of the
    write, whatever grid the read had: as the values lie on that grid, storing them changes none.
    The buffer's first value is rounded to it.

    Raises:
        ValueError: a buffer whose memory has another name too.
    """
    found, left = writes(gm.graph), dict[str, str]()
    for buffer, writers in found.items():
        held = attribute(gm, str(buffer.target)) if buffer.op == "get_attr" else None
        if not isinstance(held, torch.Tensor) or not held.is_floating_point():
            continue
        name = str(buffer.target)
        if (reason := _why_not(gm, held, writers)) is not None:
            left[name] = f"the buffer stays float: {reason}"
            continue
        others = {each for each in _sharing(gm, held) if each != name}
        if others:
            raise ValueError(
                f"qnn.pt2e: the buffer {name!r} is to be held in integers, and its memory is that "
                f"of {', '.join(map(repr, sorted(others)))} too; give each a tensor of its own."
            )
        _fold(gm, name, held, writers[0])
    if found:
        gm.graph.lint()
        gm.recompile()
    return left


def _why_not(gm: GraphModule, held: torch.Tensor, writers: list[Node]) -> str | None:
    if len(writers) > 1 or writers[0].target is not _COPY or writers[0].args[0].op != "get_attr":  # type: ignore[union-attr]
        names = ", ".join(map(str, writers))
        return f"it is written by {names}, and not once by copy_ of the whole"
    copy, value = writers[0], writers[0].args[1]
    if not isinstance(value, Node) or value.target is not _ops().dequantize_per_tensor.default:
        return "what is written is not annotated with a static grid of one scale"
    if copy.users:
        return f"the result of {copy} is read"
    order = {node: at for at, node in enumerate(gm.graph.nodes)}
    late = [user for node in _reads(gm, held) for user in node.users if order[user] > order[copy]]
    return f"{late[0]} reads it after it was written" if late else None


def _ops() -> Any:
    return quantized_decomposed()


def _reads(gm: GraphModule, held: torch.Tensor) -> list[Node]:
    nodes = gm.graph.find_nodes(op="get_attr")
    return [node for node in nodes if attribute(gm, str(node.target)) is held]


def _sharing(gm: GraphModule, held: torch.Tensor) -> list[str]:
    """The names of all tensors in the memory of a tensor."""
    memory = held.untyped_storage().data_ptr()
    every = [*gm.named_buffers(), *gm.named_parameters()]
    alike = [t for _, t in every if memory and t.untyped_storage().data_ptr() == memory]
    return [name for tensor in alike for name in names_of(gm, tensor)]


def _fold(gm: GraphModule, name: str, held: torch.Tensor, copy: Node) -> None:
    ops, writer = _ops(), Writer(gm, _ops())
    written: Any = copy.args[1]
    codes, *grid = written.args
    reads = _reads(gm, held)
    register(gm, name, ops.quantize_per_tensor.default(held.detach(), *grid))
    for node in reads:
        users = [user for user in node.users if user is not copy]
        node.meta.pop("tensor_meta", None)
        if "val" in node.meta:
            node.meta["val"] = node.meta["val"].to(grid[-1])
        if not users:
            continue
        with gm.graph.inserting_after(node):
            own = writer.call(written.target, node, *grid, of=node, **written.kwargs)
        for user in users:
            user.replace_input_with(node, own)
            if user.target is ops.quantize_per_tensor.default:
                for each in list(user.users):
                    if each.target is written.target:
                        each.replace_all_uses_with(own)
                        gm.graph.erase_node(each)
                erase_with_inputs(gm, user)
    copy.args = (copy.args[0], codes, *copy.args[2:])
    copy.meta.pop("tensor_meta", None)
    if "val" in copy.meta:
        copy.meta["val"] = copy.meta["val"].to(grid[-1])
    erase_with_inputs(gm, written)


__all__ = ["fold_into_buffers"]
