"""Every private torch name that qnn uses, in one place; tried with torch 2.13 (CPU).

Importing this module also registers what the two `invoke_quant` operators lack upstream:

- they are cacheable: Inductor's key hashes the region's body, so a second process may reuse the
  first one's code;
- both kinds of selective activation checkpointing let them pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._C import _are_functorch_transforms_active as in_functorch_transform
from torch._C import _AutoDispatchBelowADInplaceOrView as below_autograd
from torch._C import _DisableAutocast as without_autocast
from torch._higher_order_ops import invoke_quant, invoke_quant_packed
from torch._higher_order_ops.utils import redirect_to_mode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

__all__ = [
    "below_autograd",
    "in_forward_mode",
    "in_functorch_transform",
    "invoke_quant",
    "invoke_quant_packed",
    "plain_dispatch",
    "without_autocast",
]


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives (`torch.func.jvp`, `jacfwd`, `hessian`) are being taken."""
    return forward_ad._current_level >= 0


@contextmanager
def plain_dispatch() -> Iterator[None]:
    """Run real torch calls, whatever mode, autocast or fake tensors the caller is in."""
    with _disable_current_modes(), below_autograd(), without_autocast():
        yield


for _operator in (invoke_quant, invoke_quant_packed):
    _operator._cacheable = True
    for _mode in (_CachingTorchDispatchMode, _CachedTorchDispatchMode):
        redirect_to_mode(_operator, _mode)
