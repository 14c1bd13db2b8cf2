"""One weight, and what is made of it: oneDNN's pack must see every change and free itself; our own
kernels read the weight where it lies. And threads.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import tempfile
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import qnn
import qnn.functional as F
from qnn.kernels.cpu import native, pack
from qnn.kernels.cpu.engines import self_test
from qnn.kernels.reference.int8 import linear_reference

from .common import child, python_kernels

N, K = 160, 512  # large enough for the engine that packs


def expected(layer: qnn.QLinear, x: torch.Tensor) -> torch.Tensor:
    return linear_reference(x, layer.stored[0], layer.weight_scale, layer.bias)


class TestWeight:
    """Through the kernels that the machine has; where a compiler is, our own."""

    kernels = staticmethod(contextlib.nullcontext)

    @pytest.fixture(autouse=True)
    def _layer(self) -> Iterator[None]:
        with self.kernels():
            self.layer = qnn.QLinear(K, N).eval().requires_grad_(False)
            self.x = torch.randn(9, K)
            yield

    def check(self, layer: qnn.QLinear | None = None, what: str = "") -> None:
        layer = layer or self.layer
        assert torch.equal(layer(self.x), expected(layer, self.x)), what

    def test_sees_every_kind_of_change(self) -> None:
        def optimiser_step(w: torch.Tensor) -> None:
            w.add_(1)

        changes = {
            "neg_": lambda w: w.neg_(),
            "add_": optimiser_step,
            "copy_": lambda w: w.copy_(torch.randint(-127, 127, w.shape, dtype=torch.int8)),
            "one element": lambda w: w[0, 0].fill_(5),
            "detach": lambda w: w.detach().neg_(),
            "view": lambda w: w.view(-1).neg_(),
            "data": lambda w: w.data.neg_(),
            "data fill": lambda w: w.data.fill_(3),
            "numpy": lambda w: w.numpy().__imul__(-1),
            "set data": lambda w: setattr(w, "data", torch.ones_like(w)),
        }
        for name, change in changes.items():
            self.check(what=name)
            change(self.layer.stored[0])
            self.check(what=name)
            with torch.inference_mode():
                self.layer.stored[0].neg_()
            self.check(what=name)

    def test_load_state_dict_and_new_parameter(self) -> None:
        other = qnn.QLinear(K, N)
        self.check()
        self.layer.load_state_dict(other.state_dict())
        self.check()
        self.layer.weight = nn.Parameter(torch.ones(N, K, dtype=torch.int8), requires_grad=False)
        self.check()

    def test_copies_pickles_and_moves(self) -> None:
        self.check()
        for twin in (
            copy.deepcopy(self.layer),
            pickle.loads(pickle.dumps(self.layer)),
            copy.deepcopy(self.layer).to(torch.bfloat16).float(),
            copy.deepcopy(self.layer).to("cpu"),
        ):
            self.check(twin)
            twin.stored[0].neg_()
            self.check(twin)
            self.check()
        file = io.BytesIO()
        torch.save(self.layer.state_dict(), file)
        assert len(file.getvalue()) < 1.1 * N * K

    def test_two_views_of_one_storage(self) -> None:
        both = torch.randint(-127, 127, (2 * N, K), dtype=torch.int8)
        sw = torch.rand(N, 1)
        for half in (both[:N], both[N:], both[:N]):
            assert torch.equal(F.linear(self.x, half, sw), linear_reference(self.x, half, sw))
        square = torch.randint(-127, 127, (K, K), dtype=torch.int8)
        for w in (square, square.T):  # the same address, shape and version
            scale = torch.rand(K, 1)
            assert torch.equal(F.linear(self.x, w, scale), linear_reference(self.x, w, scale))

    def test_inference_tensors_are_never_stale(self) -> None:
        with torch.inference_mode():
            w, sw = torch.randint(-127, 127, (N, K), dtype=torch.int8), torch.rand(N, 1)
            for _ in range(3):
                assert torch.equal(F.linear(self.x, w, sw), linear_reference(self.x, w, sw))
                w[0, 0] += 1
            assert not pack.is_packed(w)
            layer = qnn.QLinear(K, N)
        assert not layer.stored[0].is_inference()

    def test_threads(self) -> None:
        want = expected(self.layer, self.x)
        wrong: list[str] = []
        start = threading.Barrier(8)

        def work() -> None:
            start.wait()
            for _ in range(30):
                if not torch.equal(self.layer(self.x), want):
                    wrong.append("differs")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def resident(self, **environment: str) -> float:
        """Bytes a parameter that a converted model holds after a call; nothing when it is gone."""
        out = child(
            """
            import ctypes, gc, torch, qnn
            from torch import nn
            def resident():
                gc.collect()
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps is not ours
                with open("/proc/self/statm") as file:
                    return int(file.read().split()[1]) * 4096
            n, k, count = 2048, 4096, 6
            warm = qnn.QLinear(k, n); warm(torch.randn(1, k)); del warm
            start = resident()
            model = nn.Sequential(*(nn.Linear(k, n) for _ in range(count)))
            floats = resident() - start
            model = qnn.convert(model, inplace=True)
            x = torch.randn(1, k)
            with torch.no_grad():
                for layer in model:
                    layer(x)
            parameters = n * k * count
            print((resident() - start) / parameters, floats / parameters)
            del model, layer
            print((resident() - start) / parameters)
            """,
            **environment,
        )
        held, floats, after = map(float, out.split())
        assert floats > 3.9
        assert after < 0.3
        return held

    @pytest.mark.skipif(not native.ensure().loaded, reason=native.ensure().reason)
    def test_one_copy_of_the_weight(self) -> None:
        assert self.resident() <= 1.1


@pytest.mark.skipif(
    not self_test("onednn").usable, reason="oneDNN's int8 GEMM is not exact on this CPU"
)
class TestPack(TestWeight):
    """Through oneDNN, which packs."""

    kernels = staticmethod(python_kernels)

    def test_packs_once(self) -> None:
        gc.collect()
        before = pack.count()
        for _ in range(3):
            self.check()
        assert pack.count() == before + 1
        assert pack.is_packed(self.layer.stored[0])

    def test_freed_with_the_module(self) -> None:
        gc.collect()
        before = pack.count()
        layers = [qnn.QLinear(K, N) for _ in range(5)]
        for layer in layers:
            layer(self.x)
        assert pack.count() == before + 5
        del layer
        layers.clear()
        gc.collect()
        assert pack.count() == before

    def test_one_copy_of_the_weight(self) -> None:
        """Without a library: the weight and the pack."""
        with tempfile.TemporaryDirectory() as empty:
            nowhere = {"CXX": "/nowhere/c++", "XDG_CACHE_HOME": empty}
            assert self.resident(**nowhere) <= 2.1
