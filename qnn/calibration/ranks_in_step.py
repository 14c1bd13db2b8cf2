"""What a graph breaks for, in a training step of several processes. Imports Dynamo, a second."""

from __future__ import annotations

from typing import Any

import torch

from qnn.calibration.ranks import group_of_call


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="qnn adds up what the processes of a DistributedDataParallel see in each step: "
    "qnn.freeze_observers(model) ends that"
)
def observe_together(observer: Any, x: torch.Tensor) -> None:
    """Let `observer` see what each of the processes gives it."""
    observer.observe(x, group_of_call())
