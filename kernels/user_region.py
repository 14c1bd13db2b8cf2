"""The first and the last operation of a region that holds a function of the user's.

`qnn::region_start` lists the operands in their order; Dynamo would order them by their first use.
It is recorded no further, so that only Dynamo's graph has it.

`qnn::region_result` is a copy of its argument, which says how Inductor is to compute what stands
before it, and whether the region is the gradient of another one. In Inductor's graph the pass over
regions takes it out again (`qnn/passes/user_region.py`); its fake brings that pass.

Where a region is traced, both look at its graph, and refuse what would give wrong gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qnn.kernels.op import LIBRARY, run_trace_hooks
from qnn.kernels.torch_private import ProxyTorchDispatchMode, get_proxy_mode

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("region_start(Tensor[] operands) -> ()", tags=_TAGS)
LIBRARY.define(
    "region_result(Tensor y, bool codegen_low_precision=True, bool backward=False) -> Tensor",
    tags=_TAGS,
)
REGION_START = torch.ops.qnn.region_start.default
REGION_RESULT = torch.ops.qnn.region_result.default


def options_of(args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> tuple[bool, bool]:
    """`codegen_low_precision` and `backward` of a call of `region_result`."""
    given = dict(zip(("y", "codegen_low_precision", "backward"), args, strict=False))
    given.update(kwargs or {})
    return given.get("codegen_low_precision", True), given.get("backward", False)


def check_capture(mode: Any = None) -> None:
    """Traced without Dynamo, a tensor from elsewhere is a constant of the region's graph."""
    mode = mode or get_proxy_mode()
    if mode is not None and mode.tracer.graph.find_nodes(op="get_attr"):
        _refuse_capture()


def _start_traced(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> None:
    """Dynamo makes an operand of each tensor that `fn` takes from elsewhere."""
    (operands,) = args
    placeholders = mode.tracer.graph.find_nodes(op="placeholder")
    tensors = [node for node in placeholders if isinstance(node.meta.get("val"), torch.Tensor)]
    if len(tensors) > len(set(map(id, operands))):
        _refuse_capture()


def _result_traced(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    check_capture(mode)
    if options_of(args, kwargs)[1]:
        _refuse_chance(mode.tracer.graph)
    return mode.__torch_dispatch__(op, types, args, kwargs or {})


def _result_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    """Called where the node of an exported module is differentiated, which traces its region."""
    mode = get_proxy_mode()
    if mode is not None:
        _refuse_chance(mode.tracer.graph)
    return dy, None, None


def _refuse_capture() -> None:
    raise NotImplementedError(
        "qnn.functional.invoke_quant: fn takes a tensor from elsewhere (a closure, an attribute of "
        "a module, or torch.tensor([…])), which the node of a graph would give no gradient; give "
        "it to fn as an argument: invoke_quant(fn, codes, table, scale, scheme=…)."
    )


def _refuse_chance(graph: torch.fx.Graph) -> None:
    """A gradient computes `fn` again, which may draw no random numbers then."""
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotImplementedError(
                f"qnn.functional.invoke_quant: fn draws random numbers ({node.target}), and its "
                "gradient would be that of other numbers, since the backward of a graph computes "
                "fn again; draw them outside and give them to fn as a tensor."
            )


def _copy(y: torch.Tensor, codegen_low_precision: bool = True, backward: bool = False) -> Any:
    return y.clone()


def _fake(y: torch.Tensor, codegen_low_precision: bool = True, backward: bool = False) -> Any:
    run_trace_hooks()
    return y.clone()


_START, _RESULT = "qnn::region_start", "qnn::region_result"
LIBRARY.impl("region_start", lambda operands: None, "CompositeExplicitAutograd")
torch.library.register_fake(_START, lambda operands: None, lib=LIBRARY)
torch.library.register_torch_dispatch(_START, ProxyTorchDispatchMode, _start_traced, lib=LIBRARY)
LIBRARY.impl("region_result", _copy, "CompositeExplicitAutograd")
torch.library.register_fake(_RESULT, _fake, lib=LIBRARY)
torch.library.register_autograd(_RESULT, _result_backward, lib=LIBRARY)
torch.library.register_torch_dispatch(_RESULT, ProxyTorchDispatchMode, _result_traced, lib=LIBRARY)
