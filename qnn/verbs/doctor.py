"""`python -m qnn doctor`: what runs here, what does not, and how to get it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from qnn.kernels import OPS, SCHEMES
from qnn.kernels.backends import cuda_backend
from qnn.kernels.cpu import native
from qnn.kernels.cpu.engines import ENGINES, self_test
from qnn.kernels.cuda import backends

# What each package is for: those that qnn can use but does not need.
_OPTIONAL = {
    "matplotlib": "plots of qnn.compare, qnn.sensitivity and of the examples",
    "peft": "LoRA over a quantised base",
    "safetensors": "checkpoints without pickle",
    "transformers": "the models of the examples",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _without_onednn(reason: str, kernels: native.Status) -> str:
    """What it means that oneDNN's integers are not trusted."""
    if "wrong integers" in reason:
        reason = (
            "this CPU (or ONEDNN_MAX_CPU_ISA) has no VNNI instructions, without which its integers "
            "are wrong"
        )
    if kernels.loaded:
        return f"oneDNN's int8 is not used: {reason}. Nothing is lost: the native kernels run."
    return (
        f"int8 runs on exact float32 GEMMs, several times slower than oneDNN, which is not used: "
        f"{reason}. The native kernels help, and so does a CPU with AVX-512 VNNI, AVX-VNNI or AMX."
    )


def _native_advice(status: native.Status) -> list[str]:
    """What to do so that the native kernels, or all their tiers, run."""
    if status.missing:
        return [
            f"the native kernels lack {', '.join(status.missing)}, whose instructions "
            f"{status.compiler} does not know; with a newer compiler, run python -m qnn build "
            "--force"
        ]
    if status.loaded:
        return []
    return [f"no native int8 kernels: {status.reason}; qnn runs through the engines meanwhile"]


def _on_gpu(device: torch.device) -> dict[str, str]:
    """What serves each op on a GPU; the first call runs the known-answer tests."""
    return {op: cuda_backend(op, device) for op in OPS if backends.has_kernel(op)}


def report() -> dict[str, Any]:
    """Everything that `doctor` prints, as plain data."""
    kernels = native.status()
    engines = [self_test(name) for name in ENGINES]
    used = next((engine.engine for engine in engines if engine.usable), None)
    cpu = torch.cpu.get_capabilities()
    advice = []
    if used != "onednn":
        advice.append(
            _without_onednn(next(e.reason for e in engines if e.engine == "onednn"), kernels)
        )
    advice += _native_advice(kernels)
    if not torch.cuda.is_available():
        advice.append("no CUDA device: CPU kernels only.")
    missing = {package: use for package, use in _OPTIONAL.items() if _version(package) is None}
    advice += [
        f"{package} is not installed ({use}): pip install {package}"
        for package, use in missing.items()
    ]
    return {
        "versions": {
            "qnn": _version("qnn"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("einops", "numpy", *_OPTIONAL)},
        },
        "cpu": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "features": sorted(name for name, present in cpu.items() if present is True),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "engines": [
            {
                "name": engine.engine,
                "usable": engine.usable,
                "used": engine.engine == used,
                "reason": engine.reason,
            }
            for engine in engines
        ],
        "native": {
            "state": kernels.state,
            "path": str(kernels.path) if kernels.path else None,
            "reason": kernels.reason,
            "compiler": kernels.compiler,
            "missing": list(kernels.missing),
            "tiers": dict(kernels.tiers),
            "passed_over": list(kernels.passed_over),
        },
        "cuda_kernels": {
            "table": [list(row) for row in backends.table()],
            "devices": [_on_gpu(torch.device("cuda", i)) for i in range(torch.cuda.device_count())],
        },
        "schemes": {
            scheme.name: {device.lower(): "kernel" for device in OPS[scheme.linear].kernels}
            | {"other": "reference"}
            for scheme in SCHEMES.values()
        },
        "advice": advice,
    }


def _native_lines(data: dict[str, Any]) -> list[str]:
    rows = {
        "state": f"{data['state']}: {data['reason']}" if data["reason"] else data["state"],
        "path": data["path"],
        "compiler": data["compiler"],
        "lacks": ", ".join(data["missing"]),
        "tiers": ", ".join(f"{name}: {state}" for name, state in data["tiers"].items()),
    }
    lines = [f"  {name:8} {text}" for name, text in rows.items() if text]
    return lines + [f"  passed over: {line}" for line in data["passed_over"]]


def _loaded(data: dict[str, Any]) -> bool:
    return bool(data["native"]["tiers"])


def _columns(rows: list[Any]) -> list[str]:
    """Rows of text, in columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def render(data: dict[str, Any]) -> str:
    """`report()` as text."""
    versions = ", ".join(
        f"{name} {version or '(none)'}" for name, version in data["versions"].items()
    )
    cpu = data["cpu"]
    lines = [
        f"versions   {versions}",
        f"cpu        {cpu['machine']}, {cpu['threads']} threads, torch uses "
        f"{cpu['torch_capability']}",
        f"features   {', '.join(cpu['features'])}",
        f"cuda       {', '.join(data['cuda']) or 'none'}",
        "",
        "int8 engines of the CPU"
        + (", which serve where its native kernels do not" if _loaded(data) else ""),
    ]
    for engine in data["engines"]:
        used = engine["used"] and not _loaded(data)
        state = "used" if used else "ready" if engine["usable"] else "not used"
        lines.append(f"  {engine['name']:8} {state:9} {engine['reason']}")
    lines += ["", "native int8 kernels of the CPU", *_native_lines(data["native"])]
    lines += ["", "kernels of GPUs: the first row that fits, if it passes its known-answer test"]
    lines += _columns(data["cuda_kernels"]["table"])
    for number, found in enumerate(data["cuda_kernels"]["devices"]):
        lines += ["", f"kernels of GPU {number}", *_columns(list(found.items()))]
    lines += ["", "schemes"]
    for name, devices in data["schemes"].items():
        lines.append(
            f"  {name:12} " + ", ".join(f"{device}: {what}" for device, what in devices.items())
        )
    if data["advice"]:
        lines += ["", "advice", *(f"  - {line}" for line in data["advice"])]
    return "\n".join(lines)
