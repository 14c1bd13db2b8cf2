"""The tiers of the C++ kernels: the one list of them for all tests."""

from __future__ import annotations

import pytest
import torch

from qnn.kernels.cpu import native

TIERS = ("amx", "avx512_vnni", "avx_vnni", "avx2", "portable")  # the best first


def need(tier: str) -> str:
    """`tier`, or a skip with the reason why this library or this CPU does not run it."""
    status = native.ensure()
    if not status.loaded:
        pytest.skip(status.reason)
    tiers = dict(pair.split(":", 1) for pair in torch.ops.qnn.cpu_tiers().split(","))
    why = tiers.get(tier, "not in this library")
    if why != "ok":
        pytest.skip(f"{tier}: {why}")
    return tier


def usable() -> list[str]:
    """The tiers that run here, the best first."""
    return [name for name, state in native.ready().tiers if state == "ok"]
