"""Every private torch name that qnn uses, in one place; tried with torch 2.13 (CPU).

Importing this module also registers what the two `invoke_quant` operators lack upstream:

- they are cacheable: Inductor's key hashes the region's body, so a second process may reuse the
  first one's code;
- both kinds of selective activation checkpointing let them pass;
- operands may be views of one tensor, as query, key and value of one projection are
  (`allow_views`, which Dynamo runs where it comes to a region).

What would import Inductor, 1.3 to 1.8 s, is imported by the functions that need it, which run only
where Inductor is loaded already.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import _after_autograd_keyset as AFTER_AUTOGRAD
from torch._C import _any_requires_grad as any_requires_grad
from torch._C import _are_functorch_transforms_active as in_functorch_transform
from torch._C import _AutoDispatchBelowADInplaceOrView as below_autograd
from torch._C import _DisableAutocast as without_autocast
from torch._functorch.utils import (
    enable_single_level_autograd_function as single_level_functions,
)
from torch._higher_order_ops import InvokeQuant, invoke_quant, invoke_quant_packed
from torch._higher_order_ops.utils import redirect_to_mode
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_mode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

__all__ = [
    "AFTER_AUTOGRAD",
    "InvokeQuant",
    "ProxyTorchDispatchMode",
    "SingleLevelFunction",
    "TorchDispatchMode",
    "active_ddp",
    "allow_views",
    "any_requires_grad",
    "append_post_grad_pass",
    "below_autograd",
    "below_overload",
    "count_operations",
    "dtype_number",
    "get_proxy_mode",
    "in_forward_mode",
    "in_functorch_transform",
    "in_mode",
    "in_several",
    "inductor_matches_patterns",
    "invoke_quant",
    "invoke_quant_packed",
    "is_exporting",
    "is_jit_tracing",
    "is_observed",
    "mistakes_dtypes",
    "note_writes",
    "plain_dispatch",
    "post_grad_form",
    "quantized_decomposed",
    "replace_node",
    "single_level_functions",
    "statically_equal",
    "tree_leaves",
    "tree_map_only",
    "unregister",
    "with_gradients",
    "without_autocast",
]


def unregister(library: torch.library.Library) -> None:
    """Take back what was registered through `library`."""
    library._destroy()


def below_overload(overload: Any) -> Callable[..., Any]:
    """What an overload calls: itself without its frame of Python."""
    call: Callable[..., Any] = overload._op
    return call


def dtype_number(dtype: torch.dtype) -> int:
    """What stands for a dtype in C++ and in a call of an op."""
    number: int = torch.ops.prim.dtype(torch.empty(0, dtype=dtype, device="cpu"))
    return number


def active_ddp() -> Any:
    """The `DistributedDataParallel` in whose forward this is called, or None."""
    return DistributedDataParallel._active_ddp_module


def in_several() -> bool:
    """Whether this is traced in the forward of a `DistributedDataParallel` of several processes."""
    return (
        DistributedDataParallel._active_ddp_module is not None
        and torch.distributed.get_world_size() > 1
    )


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives (`torch.func.jvp`, `jacfwd`, `hessian`) are being taken."""
    return forward_ad._current_level >= 0


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_modes = torch._C._len_torch_dispatch_stack
_records = torch.is_grad_enabled
_tracer = torch._C._get_tracing_state


def note_writes(tensors: Iterable[torch.Tensor]) -> None:
    """Let autograd know that they were written to: what it has saved of them is no longer good.
    Tensors of `torch.inference_mode()` have no versions.
    """
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def in_mode() -> bool:
    """Whether a dispatch mode, such as that of fake tensors or of a counter, sees all calls."""
    return _modes() > 0


def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, which is true of every graph to the Dynamo of torch 2.11."""
    return torch.compiler._is_exporting_flag


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` records."""
    return _tracer() is not None


def is_observed(args: Sequence[Any]) -> bool:
    """Whether anything but the kernel wants to see a call in eager mode: autograd, a transform, a
    mode, a tracer, or a subclass of Tensor.
    """
    return (
        (_records() and any_requires_grad(*args))
        or in_functorch_transform()
        or forward_ad._current_level >= 0
        or _modes() > 0
        or _tracer() is not None
        or type(args[0]) not in _PLAIN
    )


def count_operations(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Give `torch.utils.flop_counter`, which must be loaded, the formulas of ops; and the counters
    that count already, since each has a copy. Inside of a region the ops are counted.
    """
    counter: Any = sys.modules["torch.utils.flop_counter"]
    for packet, formula in formulas.items():
        counter.register_flop_formula(packet, get_raw=True)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry.update(formulas)
    for operator in (invoke_quant, invoke_quant_packed):
        if counter._FlopCounterMode not in operator.python_key_table:
            operator.py_impl(counter._FlopCounterMode)(_counted)


def _counted(mode: Any, region: Callable[..., Any], *operands: Any, **_: Any) -> Any:
    # Gradients are recorded around it; the counter's own hooks must not look for them inside.
    inside = (each.detach() if isinstance(each, torch.Tensor) else each for each in operands)
    with mode, torch.no_grad():
        return region(*inside)


@contextmanager
def with_gradients() -> Iterator[None]:
    """Record derivatives of both modes."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


@contextmanager
def plain_dispatch() -> Iterator[None]:
    """Run real torch calls, whatever mode, autocast or fake tensors the caller is in."""
    with _disable_current_modes(), below_autograd(), without_autocast():
        yield


def append_post_grad_pass(run: Callable[[torch.fx.Graph], None], uuid: Callable[[], bytes]) -> None:
    """Let Inductor, if it is loaded, call `run` on each graph after the passes that are set. A
    torch that takes only one pass keeps the one that is set.
    """
    config: Any = sys.modules.get("torch._inductor.config")
    if config is None:
        return
    from torch._inductor import custom_graph_pass

    present = config.post_grad_custom_post_pass
    passes = list(present) if isinstance(present, list | tuple) else [present] if present else []
    mine = _graph_pass(run, uuid)
    if mine in passes or (passes and not hasattr(custom_graph_pass, "get_custom_graph_passes")):
        return
    config.post_grad_custom_post_pass = [*passes, mine] if passes else mine


@functools.cache
def _graph_pass(run: Callable[[torch.fx.Graph], None], uuid: Callable[[], bytes]) -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            run(graph)

        def uuid(self) -> bytes:
            return uuid()

    return Pass()


def inductor_matches_patterns() -> bool:
    """Inductor's own switch for rewriting graphs."""
    from torch._inductor import config

    return bool(config.pattern_matcher)


# Packages of torch 2.11 take the number of a dtype in their file for the one that it has in C++.
_MISTAKES_DTYPES = torch.__version__ < "2.12"


def mistakes_dtypes() -> bool:
    """Whether this is lowered for a package of AOTInductor where an op would be called with another
    dtype than is written here, as with torch 2.11.
    """
    virtualized: Any = sys.modules.get("torch._inductor.virtualized")
    return _MISTAKES_DTYPES and virtualized is not None and bool(virtualized.V.aot_compilation)


@functools.cache
def post_grad_form(
    function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> torch.fx.Node:
    """What Inductor's decompositions make of an elementwise function: the node of its result."""
    from torch._guards import tracing
    from torch._inductor.pattern_matcher import fwd_only
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    with tracing(None), unset_fake_temporarily(), FakeTensorMode(), without_autocast():
        example = torch.empty(8, 8, dtype=dtype, device="cpu")
        graph = fwd_only(lambda x: function(x), [example]).graph
    (result,) = graph.output_node().all_input_nodes
    return result


def replace_node(node: torch.fx.Node, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    """Put the graph of `function`, as Inductor decomposes it, in the place of a node with several
    results.
    """
    from torch._inductor.pattern_matcher import fwd_only
    from torch._inductor.virtualized import V

    graph = node.graph
    given = [arg.meta["val"] for arg in node.args if isinstance(arg, torch.fx.Node)]
    with V.set_fake_mode(given[0].fake_mode), given[0].fake_mode:
        inner = fwd_only(function, given).graph
    made: dict[torch.fx.Node, Any] = dict(
        zip(inner.find_nodes(op="placeholder"), node.args, strict=True)
    )
    with graph.inserting_before(node):
        for each in inner.nodes:
            if each.op == "call_function":
                made[each] = graph.node_copy(each, lambda old: made[old])
    results: Any = inner.output_node().args[0]
    for user in list(node.users):
        user.replace_all_uses_with(made[results[user.args[1]]])
        graph.erase_node(user)
    graph.erase_node(node)


def statically_equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether sizes are equal whatever their symbols are, without a guard on them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(first) == len(second) and all(
        statically_known_true(a == b) for a, b in zip(first, second, strict=True)
    )


def contiguous_strides(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Those of a dense, row-major tensor of sizes that may be symbols."""
    from torch._prims_common import make_contiguous_strides_for

    return tuple(make_contiguous_strides_for(tuple(shape)))


def quantized_decomposed() -> Any:
    """The ops that quantise and dequantise in an exported graph, which this import registers."""
    import torch.ao.quantization.fx._decomposed  # on request: it imports torch.ao

    return torch.ops.quantized_decomposed


def allow_views() -> None:
    """Have Dynamo take operands of a region that share memory. It refuses them for an operator that
    it does not know, since that might write to one; regions are checked not to write, and their
    results are new.
    """
    from torch._dynamo.variables import higher_order_ops

    classes: Any = higher_order_ops._hop_name_to_variable_class
    if invoke_quant_packed.__name__ in classes:
        return

    class Region(higher_order_ops.BaseHOPVariable):
        supports_aliasing = True

    classes.update({each.__name__: Region for each in (invoke_quant, invoke_quant_packed)})


# What `torch.compiler.assume_constant_result` sets, which would import Dynamo.
allow_views._dynamo_marked_constant = True  # type: ignore[attr-defined]


for _operator in (invoke_quant, invoke_quant_packed):
    _operator._cacheable = True
    for _mode in (_CachingTorchDispatchMode, _CachedTorchDispatchMode):
        redirect_to_mode(_operator, _mode)
