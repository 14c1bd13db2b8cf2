"""Which backend a layer runs on and why, in words: for `repr`, `summary` and `doctor`."""

from __future__ import annotations

import torch

from qnn.kernels import OPS, Scheme
from qnn.kernels.cpu import native
from qnn.kernels.cpu.engines import ENGINES, engine_choice, self_test
from qnn.kernels.cpu.forking import return_threads
from qnn.kernels.cuda.backends import has_kernel, state

_META = "meta: no values yet"
_NO_KERNEL = "there is no native kernel for it"
_DECODED = "float32 GEMM on decoded blocks of the weight"
_WIDENED = "float64 GEMM on widened blocks of the weight"


def native_tier() -> str | None:
    """What runs the layers of a CPU where the native kernels are loaded, and what is passed over
    with the reason: `avx512_vnni: passed the known-answer test; not amx: …`.
    """
    tiers = native.ready().tiers
    best = next((i for i, (_, state) in enumerate(tiers) if state == "ok"), None)
    if best is None:
        return None
    passed_over = [f"not {name}: {state}" for name, state in tiers[:best]]
    return "; ".join([f"{tiers[best][0]}: passed the known-answer test", *passed_over])


def int8_engine(weights: int) -> str:
    """What runs a layer of so many weights without native kernels, and what is passed over.

    `onednn: passed the known-answer test`; for a small layer `exact up to 8 rows, then onednn: …`.
    """
    choice = engine_choice(weights)
    return_threads()  # of the self-tests
    small = "".join(f"{engine.name} up to {rows} rows, then " for rows, engine in choice[:-1])
    name = choice[-1][1].name
    parts = [f"{small}{name}: {self_test(name).reason}"]
    for other in ENGINES:
        if other == name:
            break
        parts.append(f"not {other}: {self_test(other).reason}")
    return "; ".join(parts)


def cuda_backend(op: str, device: torch.device) -> str:
    """The kernel that serves an op on a GPU: `cuda: scaled_mm: float8 tensor cores`."""
    found = state(op, device)
    passed_over = [f"not {entry.kernel}: {why}" for entry, why in found.passed_over]
    name = f"{found.entry.kernel or 'reference'}: {found.entry.reason}"
    return f"cuda: {'; '.join([name, *passed_over])}"


def linear_backend(scheme: Scheme, values: torch.Tensor) -> str:
    """What runs a linear layer with a weight of these stored values."""
    if values.is_meta:
        return _META
    device = values.device.type
    if device == "cuda" and has_kernel(scheme.linear):
        return cuda_backend(scheme.linear, values.device)
    if device.upper() not in OPS[scheme.linear].kernels:
        return (
            f"{device}: reference, float32 GEMM on decoded values, since there is no {scheme.name} "
            "kernel for this device"
        )
    return f"{device}: {_on_cpu(scheme, values.numel())}"


def op_backend(name: str, device: torch.device, reference: str = "reference") -> str:
    """What runs the op of this name on a device; `reference` says how its reference goes."""
    op = OPS[name]
    if device.type == "meta":
        return _META
    if device.type != "cpu":
        return f"{device.type}: {reference}, since there is no kernel for this device"
    tier = native_tier() if op.native else None
    reason = native.ready().reason if op.native else _NO_KERNEL
    return f"cpu: {tier or f'{reference}; not native: {reason}'}"


def table_backend(name: str, device: torch.device) -> str:
    """What runs the op of this name, a lookup in a table, on a device."""
    if device.type == "meta":
        return _META
    if device.type != "cpu":
        return f"{device.type}: reference, since there is no kernel for this device"
    return f"cpu: {native_tier() or f'reference; not native: {native.ready().reason}'}"


def _on_cpu(scheme: Scheme, weights: int) -> str:
    op, casts = OPS[scheme.linear], ""
    if not op.native and scheme.activation is not None:
        # The product is that of the op without activations' casts.
        (gradient,) = op.backward.values()
        (product,) = OPS[gradient].backward.values()
        op, casts = OPS[product], "; activations cast in torch operations"
    if not op.native:
        return f"{_DECODED}; not native: {_NO_KERNEL}{casts}"
    if (tier := native_tier()) is not None:
        return tier + casts
    if scheme.activation is None or casts:
        engine = _DECODED
    else:
        engine = _WIDENED if scheme.activation.bits > 8 else int8_engine(weights)
    return f"{engine}; not native: {native.ready().reason}{casts}"
