"""Which layer's result goes where: what `fuse` has to know of a model, by its graph or by a run.

Only modules of given classes are told apart. All else that makes or takes a tensor is a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from qnn.kernels.torch_private import TorchDispatchMode, tree_leaves

OUTPUT = "the model's output"


@dataclass
class Edges:
    """For the modules that were watched, by their ids: who takes the result (`readers`), and who
    made the input (`sources`), as ids or words; a module that was not called has no entry.

    `tensors` says who else reads a module's own parameters and buffers; `ranks` how many axes its
    inputs have, which a graph does not know.
    """

    readers: dict[int, set[int | str]] = field(default_factory=dict)
    sources: dict[int, set[int | str]] = field(default_factory=dict)
    tensors: dict[int, set[str]] = field(default_factory=dict)
    ranks: dict[int, set[int]] = field(default_factory=dict)


def by_graph(model: nn.Module, watched: dict[int, nn.Module]) -> Edges:
    """From the graph that `torch.fx` traces, which holds for every input; whatever the tracer
    raises for a model that it cannot follow.
    """
    tracer, edges = _Tracer(watched), Edges()
    graph = tracer.trace(model, concrete_args=_defaults(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {
        id(tensor): key
        for key, module in watched.items()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }

    def called(node: fx.Node) -> int | None:
        module = modules[str(node.target)] if node.op == "call_module" else None
        return id(module) if id(module) in watched else None

    def word(node: fx.Node) -> int | str:
        key = called(node)
        return key if key is not None else OUTPUT if node.op == "output" else node.name

    for node in graph.nodes:
        key = called(node)
        if key is not None:
            edges.readers.setdefault(key, set()).update(map(word, node.users))
            edges.sources.setdefault(key, set()).update(map(word, node.all_input_nodes))
        elif node.op == "get_attr":
            owner = owners.get(id(_attribute(model, str(node.target))))
            if owner is not None:
                edges.tensors.setdefault(owner, set()).add(next(iter(node.users), node).name)
    return edges


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, watched: dict[int, nn.Module]) -> None:
        super().__init__()
        self._watched = watched

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._watched or super().is_leaf_module(m, module_qualified_name)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments that a plain call leaves out, as it would have them."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: p.default for p in named if p.default is not p.empty}


def _attribute(model: nn.Module, target: str) -> Any:
    found: Any = model
    for name in target.split("."):
        found = getattr(found, name, None)
    return found


def by_run(watched: dict[int, nn.Module], run: Callable[[], Any]) -> tuple[Edges, Any]:
    """From one run of the model, `run()`, and its result: what that run does, and no other path.

    Every operation that meets the storage of a result counts as a reader, views too. The results
    are kept to the end, so that no storage stands for two.
    """
    with ExitStack() as stack:
        watch = _Watch(watched)
        for key, module in watched.items():
            stack.enter_context(_watched(module, key, watch))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watch)
        result = run()
    for tensor in tree_leaves(result, is_leaf=lambda value: isinstance(value, torch.Tensor)):
        if isinstance(tensor, torch.Tensor):
            watch.read(tensor, OUTPUT)
    return watch.edges, result


class _Watch(TorchDispatchMode):
    def __init__(self, watched: dict[int, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.edges = Edges()
        self._inside: list[int] = []
        self._made: dict[int, tuple[int, torch.Tensor]] = {}
        self._held = {
            _storage(tensor): key
            for key, module in watched.items()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }

    def begin(self, key: int, inputs: list[Any]) -> None:
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        sources = self.edges.sources.setdefault(key, set())
        for tensor in tensors:
            made = self._made.get(_storage(tensor))
            # A view of a result is not the result.
            sources.add(made[0] if made and made[1] is tensor else "an operation")
            self.read(tensor, key)
            self.edges.ranks.setdefault(key, set()).add(tensor.dim())
        self._inside.append(key)

    def end(self, key: int, result: Any) -> None:
        self._inside.pop()
        self.edges.readers.setdefault(key, set())
        if isinstance(result, torch.Tensor):
            self._made[_storage(result)] = key, result
        else:
            self.edges.readers[key].add(type(result).__name__)

    def read(self, tensor: torch.Tensor, reader: int | str) -> None:
        made = self._made.get(_storage(tensor))
        if made is not None:
            self.edges.readers[made[0]].add(reader)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = self._inside[-1] if self._inside else None
        for tensor in tree_leaves((args, kwargs)):
            if not isinstance(tensor, torch.Tensor):
                continue
            if inside is None:
                self.read(tensor, str(func))
            owner = self._held.get(_storage(tensor))
            if owner is not None and owner != inside:
                self.edges.tensors.setdefault(owner, set()).add(str(func))
        return func(*args, **kwargs or {})


def _storage(tensor: torch.Tensor) -> int:
    """What tells storages apart; of a tensor without one, its own id."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


@contextmanager
def _watched(module: nn.Module, key: int, watch: _Watch) -> Iterator[None]:
    """Inside, a module tells `watch` of its calls."""

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        watch.begin(key, [*args, *kwargs.values()])

    def after(_: nn.Module, args: Any, result: Any) -> None:
        watch.end(key, result)

    first = module.register_forward_pre_hook(before, with_kwargs=True)
    last = module.register_forward_hook(after)
    try:
        yield
    finally:
        first.remove()
        last.remove()


__all__ = ["OUTPUT", "Edges", "by_graph", "by_run"]
