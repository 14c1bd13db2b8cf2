"""Models of every kind of layer, in every way that torch has to copy, store, cast, trace and
package them.

How each layer does by itself is for the file of its kind; rows of the table of layers × schemes are
run in test_support.py, and several processes in test_distributed.py.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import qnn

from .common import forked, same_bits
from .zoo import FIRST, GRID, ZOO, floats, images, quantised


def has_float8(model: nn.Module) -> bool:
    return any("float8" in str(each.dtype) for each in model.state_dict().values())


@torch.no_grad()
def run(model: Any, name: str, batch: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    given = (each.to(dtype) if each.is_floating_point() else each for each in inputs(name, batch))
    result: torch.Tensor = model(*given)
    return result


def inputs(name: str, batch: int = 3) -> tuple[torch.Tensor, ...]:
    return ZOO[name].inputs(batch)


class TestState:
    @parameterized.expand(GRID)
    def test_copies(self, name: str, scheme: str) -> None:
        model = quantised(name, scheme)
        want, copies = run(model, name), [copy.deepcopy(model)]
        assert qnn.sqnr(run(floats(name), name), want) > (5 if "4" in scheme else 20)
        if not has_float8(model):  # which pickle takes through torch.save alone
            copies.append(pickle.loads(pickle.dumps(model)))
        with tempfile.TemporaryFile() as file:
            torch.save(model, file)
            file.seek(0)
            copies.append(torch.load(file, weights_only=False))
        for each in copies:
            assert same_bits(run(each, name), want)
            for (key, a), (_, b) in zip(
                each.named_parameters(), model.named_parameters(), strict=True
            ):
                assert (a.stride(), a.requires_grad) == (b.stride(), b.requires_grad), key
                assert a.data_ptr() != b.data_ptr(), key

    @parameterized.expand(GRID)
    def test_files(self, name: str, scheme: str) -> None:
        """safetensors, read into another model, and into one on meta that takes the tensors."""
        st = pytest.importorskip("safetensors.torch", reason="needs the extra 'dev'")
        model = quantised(name, scheme)
        want = run(model, name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            st.save_file(model.state_dict(), path)
            for assign in (False, True):
                other = copy.deepcopy(model).to("meta")
                if not assign:
                    other = other.to_empty(device="cpu")
                other.load_state_dict(st.load_file(path), assign=assign)
                assert same_bits(run(other, name), want)
                assert not any(each.is_meta for each in (*other.parameters(), *other.buffers()))

    @parameterized.expand(FIRST)
    def test_made_on_meta(self, name: str, scheme: str) -> None:
        with torch.device("meta"):
            empty: Any = quantised(name, scheme)
        model = quantised(name, scheme)
        missing, unexpected = empty.load_state_dict(model.state_dict(), assign=True)
        assert (missing, unexpected) == ([], [])
        assert same_bits(run(empty, name), run(model, name))

    @parameterized.expand(
        [(*each, dtype) for each in GRID for dtype in (torch.float16, torch.bfloat16)]
    )
    def test_casts(self, name: str, scheme: str, dtype: torch.dtype) -> None:
        """Codes and scales stay as they are; the rest, and the result, have the new dtype."""
        model = quantised(name, scheme)
        before, want = copy.deepcopy(model.state_dict()), run(model, name)
        small = model.half() if dtype == torch.float16 else model.to(dtype)
        for key, value in small.state_dict().items():
            if key.endswith(("scale", "zero_point")) or not before[key].is_floating_point():
                assert same_bits(value, before[key]), key
        got = run(small, name, dtype=dtype)
        assert got.dtype == dtype
        assert qnn.sqnr(want, got.float()) > 15


class TestGraphs:
    def test_packaged_by_aotinductor_and_run_in_a_fresh_process(self) -> None:
        """One package of all kinds, of any batch; each model's result is its own."""

        class Every(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.names = [name for name, _ in packaged]
                self.models = nn.ModuleList(quantised(*each) for each in packaged)

            def forward(self, given: dict[str, Any]) -> list[torch.Tensor]:
                return [m(*given[n]) for n, m in zip(self.names, self.models, strict=True)]

        # An op that takes a dtype is in no package of torch 2.11; cells are in test_qlstm.py.
        left = {"cells"} | ({"words"} if torch.__version__ < "2.12" else set())
        packaged = [each for each in FIRST if each[0] not in left]
        model = Every().eval()
        given, more = ({name: inputs(name, batch) for name in model.names} for batch in (3, 5))
        batch = torch.export.Dim("batch", min=2)
        shapes = {name: tuple({0: batch} for _ in each) for name, each in given.items()}
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            program = torch.export.export(model, (given,), dynamic_shapes=(shapes,))
            with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
                package = torch._inductor.aoti_compile_and_package(
                    program, package_path=f"{folder}/model.pt2"
                )
            torch.save(more, f"{folder}/x.pt")
            forked(
                f"""
                import torch, qnn
                model = torch._inductor.aoti_load_package({package!r})
                torch.save(model(torch.load("{folder}/x.pt")), "{folder}/y.pt")
                """
            )
            for name, got, want in zip(
                model.names, torch.load(f"{folder}/y.pt"), model(more), strict=True
            ):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=name)

    @parameterized.expand(FIRST)
    def test_traced_by_fx_and_jit(self, name: str, scheme: str) -> None:
        """fx has each layer as a call of a module, and jit its op."""
        model = quantised(name, scheme)
        want = run(model, name)
        traced = torch.jit.trace(model, inputs(name))
        assert same_bits(run(traced, name), want)
        assert "qnn::" in str(traced.inlined_graph)
        graph = torch.fx.symbolic_trace(model)
        assert same_bits(run(graph, name), want)
        called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
        layers = {n for n, m in model.named_modules() if isinstance(m, qnn.Quantized)}
        assert {n for n in layers if not n.endswith("out_proj")} <= called

    @parameterized.expand([each for each in FIRST if each[0] in ("words", "attention", "mixture")])
    def test_any_batch_after_the_second(self, name: str, scheme: str) -> None:
        """Of convolutions see test_conv_functions.py, of recurrent layers test_qlstm.py."""
        model = quantised(name, scheme)
        counter = CompileCounterWithBackend("aot_eager")
        call = torch.compile(model, fullgraph=True, backend=counter)
        for batch in (2, 3, 5, 7):
            torch.testing.assert_close(run(call, name, batch), run(model, name, batch))
        assert counter.frame_count == 2

    def test_any_size_of_images_with_channels_last(self) -> None:
        """Compiled once with dynamic=True; the format stays from layer to layer, to the result."""
        model = quantised("convolutions", "int8").stem[:1]
        call = torch.compile(model, fullgraph=True, dynamic=True)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for size in ((2, 9, 10), (3, 17, 8), (5, 12, 31)):
                x = images(*size).to(memory_format=torch.channels_last)
                got, want = call(x), model(x)
                assert same_bits(got, want)
                assert got.is_contiguous(memory_format=torch.channels_last)
                assert got.stride() == want.stride()
