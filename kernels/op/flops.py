"""The floating-point operations of each op, for `torch.utils.flop_counter.FlopCounterMode`.

They follow from the declaration (`Op.products`): two for each product and sum, whatever the bits of
the operands, as for a float layer. A cast has none. torch's module imports Triton, 0.5 s; so the
formulas are registered when it is loaded and a mode first sees an op of qnn's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from qnn.kernels.op.axes import parse_axis
from qnn.kernels.op.declaration import Declaration
from qnn.kernels.torch_private import count_operations

__all__ = ["formula", "register"]

_MODULE = "torch.utils.flop_counter"
_registered: set[str] = set()


def register(ops: Mapping[str, Declaration]) -> None:
    """Register the formulas of `ops`, if torch's counter is loaded and lacks them."""
    if len(_registered) == len(ops) or _MODULE not in sys.modules:
        return
    new = {
        op.overload._overloadpacket: formula(op)
        for name, op in ops.items()
        if name not in _registered
    }
    _registered.update(ops)
    count_operations(new)


def formula(op: Declaration) -> Callable[..., int]:
    """The operations of a call, from its arguments."""
    names = [arg.name for arg in op.inputs]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = dict(zip(names, (*args, *op.tails[len(args)]), strict=True)) | kwargs
        sizes = op.check(*given.values())
        total = 0
        for condition, terms in op.products.items():
            if not condition or given[condition] is not None:
                total += sum(_product(op, term, sizes) for term in terms.split("+"))
        return 2 * total

    return count


def _product(op: Declaration, term: str, sizes: Mapping[str, Any]) -> int:
    lead = math.prod(sizes.get("...", ()))
    axes = term.split()
    return int(
        math.prod(
            lead if axis == "..." else parse_axis(axis).size(sizes, op.sizes) for axis in axes
        )
    )
