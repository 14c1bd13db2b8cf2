"""What several processes see of one batch, added up."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist

from qnn.kernels.torch_private import active_ddp


def several(group: Any = None) -> bool:
    """Whether this process is one of several that talk to each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def group_of_call() -> Any:
    """The processes that run the forward of a `DistributedDataParallel` together, where this is
    called in one; None elsewhere, and for one process.
    """
    ddp = active_ddp()
    return ddp.process_group if ddp is not None and several(ddp.process_group) else None


def of_all(batch: Any, group: Any) -> Any:
    """What each process of `group` has seen of one batch, an observer each, added up in the order
    of their ranks.

    Raises:
        RuntimeError: the processes are at different observers.
    """
    buffers = [buffer for _, buffer in batch.named_buffers()]
    # Processes that take different ways through a model would mix up two of its parts.
    tag = zlib.crc32(f"{batch.who} {batch.spec}".encode())
    # float64 holds all of it: counts of a batch stay below 2^53.
    flat = [buffers[0].new_tensor([tag]), *(buffer.flatten() for buffer in buffers)]
    mine = torch.cat([tensor.double() for tensor in flat])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    if any(int(tensor[0]) != tag for tensor in every):
        raise RuntimeError(
            f"{batch.who}: another process observes another part at this point. The ranges of "
            "several processes are added up in the forward of DistributedDataParallel, so each has "
            "to call the same layers in the same order; qnn.calibrate first, and "
            "qnn.freeze_observers before training, where they do not."
        )
    total = batch.empty()
    for tensor in every:
        other, sizes = batch.empty(), [buffer.numel() for buffer in buffers]
        values = tensor[1:].split(sizes)
        for (_, buffer), value in zip(other.named_buffers(), values, strict=True):
            buffer.copy_(value.view(buffer.shape))
        total.merge(other)
    return total
