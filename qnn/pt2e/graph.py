"""What a node of an exported graph says of itself, and how a graph becomes qnn's own."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.kinds import qualified
from qnn.pt2e.guards import Unpicklable, own_guards

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
        graph: Any = model.module() if inplace else _copy(model.module())
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
        graph = model if inplace else _copy(model)
    for name in ("train", "eval"):
        graph.__dict__.pop(name, None)  # torch.export's own, which raise
    own_guards(graph)
    graph.meta["qnn_pickle"] = Unpicklable()
    result: GraphModule = graph
    return result


def _copy(model: nn.Module) -> Any:
    """A copy, with the attributes that a user has set. Buffers that a forward with gradients has
    written to are copied by their values.
    """
    memo: dict[int, Any] = {
        id(each): each.detach().clone() for each in model.buffers() if not each.is_leaf
    }
    with warnings.catch_warnings():  # torch 2.13 copies the tree of its inputs so that it warns
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        made = copy.deepcopy(model, memo)
    others = vars(model).keys() - vars(made).keys() - {"train", "eval"}
    vars(made).update({key: copy.deepcopy(vars(model)[key], memo) for key in others})
    return made


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
    """What a get_attr or call_module node names, or the tensor of the model that a placeholder of a
    body is; None if nothing.
    """
    if node.op == "placeholder":
        return node.meta.get("qnn_held", (None, None))[1]
    value: Any = root
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def name(node: Node) -> str:
    """The name of what a node holds, in the model."""
    return str(node.meta["qnn_held"][0] if "qnn_held" in node.meta else node.target)


def title(node: Node) -> str:
    """The name of a node, with that of the body that it is in."""
    body = node.meta.get("qnn_body")
    return f"{body}.{node.name}" if body else node.name


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
        if place and place[1][0] != "<" and _TORCH not in place[1].replace("\\", "/"):
            code = trace[at + 1].strip() if at + 1 < len(trace) else ""
            found = f"{place[1].replace(chr(92), '/').rpartition('/')[2]}:{place[2]}: {code}"
    return found or str(node.meta.get("qnn_caller", ""))


_TORCH = torch.__path__[0].replace("\\", "/")


def told(node: Node) -> str:
    """A node in words, for errors and reports: its operator, its module, the user's line."""
    where = [name for name, _ in path(node) if name]
    words = f"{title(node)} ({node.target})"
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


def owner_of(root: nn.Module, name: str) -> nn.Module:
    """The module of a name; what is missing on the way is made."""
    if name and (root.get_submodule(name) if _taken(root, name) else None) is None:
        put(root, name, nn.Module())
    return root.get_submodule(name)


def delete_unread(root: GraphModule, targets: Iterable[str]) -> None:
    """Delete those of these tensors that the graph does not read, and the bare modules that are
    empty then.
    """
    still = {str(node.target) for node in root.graph.find_nodes(op="get_attr")}
    for target in set(targets) - still:
        owner, _, name = target.rpartition(".")
        module = root.get_submodule(owner)
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        while owner and not (module._parameters or module._buffers or module._modules):
            if type(module) is not nn.Module:
                break
            owner, _, name = owner.rpartition(".")
            module = root.get_submodule(owner)
            del module._modules[name]


def written(root: GraphModule) -> Iterator[int]:
    """The ids of the model's tensors that operators of the graph write to, also through views."""
    for node in root.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        for at, argument in enumerate(schema.arguments[: len(node.args)]):
            source = node.args[at]
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            while isinstance(source, Node) and source.op == "call_function" and source.args:
                source = source.args[0]
            if isinstance(source, Node) and source.op == "get_attr":
                yield id(held(root, source))
