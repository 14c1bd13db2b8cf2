"""Every test starts from the same seed and from a clean compiler."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Before torch is imported, and for child processes too: processes that share the tests (pytest -n)
# share the cores. Threads that spin on the cores of another process make both wait.
if PROCESSES := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // PROCESSES))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Inductor asks the CPU what it has; that the compiler can build for it takes 7 s of a process with
# an empty cache to find out, and is so wherever the C++ kernels are built.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from qnn.integrations import compressed_tensors
from qnn.kernels.cpu import native

from . import tiers
from .common import BENCHMARKS

# Random cases: the same ones each time, nothing written to disk. Their number is a test's own.
settings.register_profile(
    "qnn", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("qnn")

# Files whose tests share what is slow to set up, or where one test takes very long: a process runs
# each as a whole, and they come first.
WHOLE = (
    *("test_distributed.py", "test_examples.py", "test_kernels_cpp.py", "test_pt2e_whole.py"),
    "test_triton.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes, each takes the next test when it is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(WHOLE) else nodeid

    return Scheduler(config, log)


@pytest.hookimpl(trylast=True)  # after `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A short form of a test is left out beside the long one, which makes more of the same."""

    def function(item: pytest.Item) -> str:
        return item.nodeid.partition("[")[0]

    long = {function(item) for item in items if item.get_closest_marker("long")}
    covered = [
        item for item in items if item.get_closest_marker("short") and function(item) in long
    ]
    if covered:
        config.hook.pytest_deselected(items=covered)
        left = set(covered)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def _clean_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` is filled with NaN, so that a value which was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=tiers.TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    """Each tier; one that does not run here is a skip with its reason."""
    return tiers.need(request.param)


@pytest.fixture(scope="module")
def library() -> Iterator[None]:
    """The C++ library, or a skip; with threads enough that calls are divided on every machine."""
    status = native.ensure()
    if not status.loaded:
        pytest.skip(status.reason)
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """The test changes the number of threads; it is set back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is where nothing has imported qnn's integration: it reads qnn's files
    through the compressed-tensors package. And diffusers, which reads none.
    """
    if (diffusers := sys.modules.get("diffusers.quantizers.auto")) is not None:
        mapping = diffusers.AUTO_QUANTIZATION_CONFIG_MAPPING
        monkeypatch.delitem(mapping, compressed_tensors.DIFFUSERS_METHOD, raising=False)
    if importlib.util.find_spec("transformers") is not None:
        importlib.import_module("qnn.integrations.transformers")  # once, and not during the test
        auto: Any = importlib.import_module("transformers.quantizers.auto")
        known = auto.CompressedTensorsConfig
        monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", known)


@pytest.fixture
def qnn_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers with qnn's integration, whatever other tests have taken away."""
    auto: Any = pytest.importorskip("transformers.quantizers.auto", reason="needs transformers")
    module: Any = importlib.import_module("qnn.integrations.transformers")
    mapping = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    monkeypatch.setitem(mapping, "compressed-tensors", module._Described)


@pytest.fixture
def qnn_in_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers with qnn's integration, likewise."""
    auto: Any = pytest.importorskip("diffusers.quantizers.auto", reason="needs diffusers")
    module: Any = importlib.import_module("qnn.integrations.diffusers")
    mapping = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    monkeypatch.setitem(mapping, module.DIFFUSERS_METHOD, module._Described)
