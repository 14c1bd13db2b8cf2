"""Where and with what a row was measured: the CPU, the GPU, the threads and the versions."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "qnn", "torchao", "onnxruntime", "openvino", "nncf", "transformers")


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first CPU; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Machine:
    """The CPU and the versions."""

    cpu: str
    cores: int
    threads: int
    amx: bool
    vnni: bool
    date: str
    python: str
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> Machine:
        info = _cpuinfo()
        return cls(
            cpu=info.get("model name", platform.processor() or platform.machine()),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            amx=torch.cpu._is_amx_tile_supported(),
            vnni=not {"avx512_vnni", "avx_vnni"}.isdisjoint(info.get("flags", "").split()),
            date=datetime.date.today().isoformat(),
            python=platform.python_version(),
            versions={name: _version(name) for name in _PACKAGES},
        )

    def columns(self) -> dict[str, Any]:
        """The cells that every CSV row ends with."""
        fields = dataclasses.asdict(self)
        versions = fields.pop("versions")
        return {**fields, **versions}

    def missing(self) -> str:
        """The peers that are not installed, in a sentence; empty if all are."""
        names = [name for name, version in self.versions.items() if version == "not installed"]
        return f"Not installed, and so not measured: {', '.join(names)}." if names else ""

    def __str__(self) -> str:
        features = ["AMX" if self.amx else "no AMX", "VNNI" if self.vnni else "no VNNI"]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        where = f"{self.cpu}, {counted(self.cores, 'core')}, {counted(self.threads, 'thread')}"
        return f"{where}, {', '.join(features)}; Python {self.python}, {versions}; {self.date}"


@dataclass(frozen=True)
class Gpu:
    """The GPU, as it was found."""

    gpu: str
    capability: str
    multiprocessors: int
    gpu_gib: float
    l2_mib: float
    cuda: str
    driver: str
    triton: str
    transformer_engine: str

    @classmethod
    def here(cls, device: torch.device) -> Gpu | None:
        """None without a GPU."""
        if device.type != "cuda":
            return None
        found = torch.cuda.get_device_properties(device)
        return cls(
            gpu=found.name,
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            gpu_gib=round(found.total_memory / 2**30, 1),
            l2_mib=round(found.L2_cache_size / 2**20, 1),
            cuda=str(torch.version.cuda),
            driver=_driver(),
            triton=_version("triton"),
            transformer_engine=_version("transformer-engine"),
        )

    def columns(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.gpu}, compute capability {self.capability}, {self.multiprocessors} "
            f"multiprocessors, {self.gpu_gib} GiB, L2 {self.l2_mib} MiB; CUDA {self.cuda}, driver "
            f"{self.driver}, Triton {self.triton}, TransformerEngine {self.transformer_engine}"
        )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"
