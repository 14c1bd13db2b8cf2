"""On a GPU, Inductor may fuse a cast to float8 with what produces its input.

A pass over the post-grad graph replaces the per-token and per-tensor casts by plain arithmetic, so
that the cast of an activation after a norm, an activation or an addition costs no reading of its
own. The casts of groups, blocks, mxfp8 and nvfp4 stay ops: one Triton kernel does them in one pass,
which Inductor does not find.

What is fused skips the rounding of a bfloat16 intermediate, so its codes may differ from eager's.
Inductor's own switch restores it (`torch._inductor.config.emulate_precision_casts = True`), and
`DEVICES.clear()` keeps every cast an op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph

from qnn.kernels import OPS
from qnn.kernels.formats import Format
from qnn.kernels.formats.float8 import FLOAT8
from qnn.kernels.torch_private import inductor_matches_patterns, replace_node

# Where casts become arithmetic. On a CPU an op is as fast, and its codes are eager's.
DEVICES = {"cuda"}


def _arithmetic(form: Format, which: str) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    def cast(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts: tuple[torch.Tensor, ...] = ()
        if which != "_columns":
            parts += form.quantize(x)
        if which:
            parts += form.quantize(x.mT)
        return tuple(part.contiguous() for part in parts)

    return cast


# A cast whose two forms follow one rule, one scale for each row or per tensor, without a seed.
CASTS: dict[Any, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]] = {
    OPS[f"{form.key}_quantize{which}"].overload: _arithmetic(form, which)
    for form in FLOAT8.values()
    if form.block is None
    for which in ("", "_columns", "_both")
    if f"{form.key}_quantize{which}" in OPS
}


def unfold(graph: Graph) -> None:
    """Rewrite the graph in place."""
    if not inductor_matches_patterns():
        return
    for node in list(graph.nodes):
        if node.target in CASTS and node.args[0].meta["val"].device.type in DEVICES:
            replace_node(node, CASTS[node.target])
