"""What a node of an exported graph says of itself, and how a graph becomes qnn's own."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.kinds import qualified

# The key of what a quantizer says of a node.
ANNOTATION = "quantization_annotation"

_SPELLINGS = re.compile(r"^L(?:\['self'\]|__self__)_?\.?|_modules\[|\]|['\"]|@\d+")


def own(model: Any, *, inplace: bool, who: str) -> GraphModule:
    """The graph that `who` may change: of an exported program, or of its module, copied or not. Its
    `train()` and `eval()` work, as those of any module.

    Raises:
        TypeError: anything else, with what to do.
    """
    export: Any = sys.modules.get("torch.export")  # slow to import; who exported has done so
    if export is not None and isinstance(model, export.ExportedProgram):
        graph: Any = model.module() if inplace else _copied(model.module())
    elif not isinstance(model, GraphModule):
        kind = qualified(type(model))
        raise TypeError(
            f"{who} takes what torch.export.export(model, args) returns, or its module(), got "
            f"{kind}; a model that is not exported is prepared by qnn.prepare(model)."
        )
    elif not _is_exported(model):
        raise TypeError(
            f"{who}: this graph was not exported: its nodes have no types (meta['val']). Those "
            "of torch.export.export(model, args) do; those of torch.fx.symbolic_trace do not."
        )
    else:
        graph = model if inplace else _copied(model)
    for name in ("train", "eval"):
        graph.__dict__.pop(name, None)  # torch.export's own, which raise
    return graph


def _copied(graph: GraphModule) -> GraphModule:
    with warnings.catch_warnings():  # torch 2.13 copies the tree of its inputs so that it warns
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        return copy.deepcopy(graph)


def _is_exported(graph: GraphModule) -> bool:
    """Whether the graph is torch.export's, or one that qnn has made of such."""
    nodes = list(graph.graph.nodes)
    calls = [node for node in nodes if node.op == "call_function"]
    return any("val" in node.meta for node in nodes) and not any(
        n.op == "call_method" for n in calls
    )


def graphs(model: GraphModule) -> Iterator[GraphModule]:
    """The graph after those that it calls (`torch.cond`, `scan`, `while_loop`), but for the bodies
    of regions.
    """
    yield from _graphs(model, set())


def _graphs(model: GraphModule, seen: set[int]) -> Iterator[GraphModule]:
    seen.add(id(model))
    for node in model.graph.nodes:
        inner = held(model, node) if node.op == "get_attr" else None
        if isinstance(inner, GraphModule) and id(inner) not in seen and not is_region(node):
            yield from _graphs(inner, seen)
    yield model


def is_region(node: Node) -> bool:
    """Whether a graph is the body of a quantised region."""
    return any("invoke_quant" in str(user.target) for user in node.users)


def held(root: nn.Module, node: Node) -> Any:
    """What a get_attr or call_module node names; None if nothing."""
    value: Any = root
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def path(node: Node) -> list[tuple[str, str]]:
    """The modules whose forward a node comes from, the outermost first: `[("", "Net"), ("block.0",
    "torch.nn.modules.linear.Linear")]`.
    """
    stack = node.meta.get("nn_module_stack") or {}
    result = []
    for name, kind in stack.values():
        if not str(name).startswith("_empty_nn_module_stack"):
            title = kind if isinstance(kind, str) else qualified(kind)
            result.append((spelt(str(name)), title))
    return result


def spelt(name: str) -> str:
    """The name of a module as `named_modules` has it, of a path such as `L['self'].fc@1`."""
    return _SPELLINGS.sub("", name)


def source(node: Node) -> str:
    """The user's line that a node comes from: `model.py:12: y = self.fc(x)`; empty if unknown."""
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    found = ""
    for at, line in enumerate(trace):
        place = re.match(r'\s*File "(.*)", line (\d+)', line)
        if place and f"{_TORCH}" not in place[1].replace("\\", "/"):
            code = trace[at + 1].strip() if at + 1 < len(trace) else ""
            found = f"{place[1].replace(chr(92), '/').rpartition('/')[2]}:{place[2]}: {code}"
    return found


_TORCH = torch.__path__[0].replace("\\", "/")


def told(node: Node) -> str:
    """A node in words, for errors and reports: its operator, its module, the user's line."""
    where = [name for name, _ in path(node) if name]
    words = f"{node.name} ({node.target})"
    if where:
        words += f" in {where[-1]!r}"
    return words + (f", {line}" if (line := source(node)) else "")


def is_annotated(node: Node) -> bool:
    """Whether a quantizer has said something of the node."""
    annotation = node.meta.get(ANNOTATION)
    return annotation is not None and bool(
        getattr(annotation, "_annotated", False)
        or getattr(annotation, "scheme", None)
        or getattr(annotation, "input_qspec_map", None)
        or getattr(annotation, "output_qspec", None)
    )


def value(node: Any) -> Any:
    """The fake tensor of a node, or None."""
    return node.meta.get("val") if isinstance(node, Node) else None


def free_name(root: nn.Module, wanted: str) -> str:
    """`wanted`, with a number after it if something has the name already."""
    name, count = wanted, 0
    while _taken(root, name):
        count += 1
        name = f"{wanted}_{count}"
    return name


def _taken(root: nn.Module, name: str) -> bool:
    at: Any = root
    for part in name.split("."):
        if not hasattr(at, part):
            return False
        at = getattr(at, part)
    return True


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register a module under a name with dots; what is missing on the way is made."""
    at, parts = root, name.split(".")
    for part in parts[:-1]:
        if part not in at._modules:
            at.add_module(part, nn.Module())
        at = at._modules[part]  # type: ignore[assignment]
    at._modules.pop(parts[-1], None)
    at.add_module(parts[-1], module)
