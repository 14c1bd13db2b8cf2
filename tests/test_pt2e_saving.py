"""Graph mode: what is written to disk, run in another process or taken up again."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn import pt2e
from qnn.passes import regions
from qnn.pt2e import Int8Quantizer
from tests.common import forked
from tests.test_pt2e_graphs import DYNAMIC, prepared, quantised, schemes


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.block(self.rnn(self.table(ids))[0][:, -1])


def words(batch: int = 3) -> tuple[torch.Tensor]:
    return (torch.randint(20, (batch, 5)),)


def converted(scheme: str = "int8_static") -> Any:
    return quantised(Words(), words(), scheme, shapes=({0: DYNAMIC},))


class TestPrograms:
    def test_saved_and_loaded_before_prepare(self) -> None:
        model, args = Words().eval(), words()
        program, file = torch.export.export(model, args), io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        rules = Int8Quantizer("int8").set_module_name("block.0", None)
        states = []
        for each in (program, torch.export.load(file)):
            rules.set_module_type(nn.LSTM, "int8_weight")
            graph = pt2e.convert_pt2e(pt2e.prepare_pt2e(each, rules))
            assert {n: s for n, s in schemes(graph).items() if n != "table"} == {
                "rnn": "int8_weight", "block.0": None, "block.2": "int8",
            }  # fmt: skip
            states.append(graph.state_dict())
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    def test_saved_and_run_in_a_fresh_process(self) -> None:
        graph, args = converted(), words(7)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            program = torch.export.export(graph, words(), dynamic_shapes=({0: DYNAMIC},))
            torch.export.save(program, where / "model.pt2")
            torch.save(args[0], where / "x.pt")
            forked(
                f"""
                import torch, qnn
                model = torch.export.load({str(where / "model.pt2")!r}).module()
                with torch.no_grad():
                    y = model(torch.load({str(where / "x.pt")!r}))
                torch.save(y, {str(where / "y.pt")!r})
                """
            )
            assert torch.equal(torch.load(where / "y.pt"), graph(*args))

    @parameterized.expand([(True,), (False,)])
    def test_b196_packaged_by_aotinductor_and_run_in_a_fresh_process(self, grad: bool) -> None:
        graph, args = converted(), words(7)
        with torch.set_grad_enabled(grad), tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            program = torch.export.export(graph, words(), dynamic_shapes=({0: DYNAMIC},))
            assert len(regions(program)) == 3
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=str(where / "model.pt2")
            )
            torch.save(args[0], where / "x.pt")
            forked(
                f"""
                import torch, qnn
                torch.set_grad_enabled({grad})
                model = torch._inductor.aoti_load_package({package!r})
                torch.save(model(torch.load({str(where / "x.pt")!r})), {str(where / "y.pt")!r})
                """
            )
            torch.testing.assert_close(torch.load(where / "y.pt"), graph(*args))

    def test_a_second_process_hits_the_caches(self) -> None:
        code = """
            import os, torch
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = FOLDER
            from torch._dynamo.utils import counters
            from tests.test_pt2e_saving import converted, words
            torch.manual_seed(0)
            with torch.no_grad():
                torch.compile(converted("int8"), fullgraph=True)(*words())
            c, a = counters["inductor"], counters["aot_autograd"]
            print(c["fxgraph_cache_hit"], c["fxgraph_cache_miss"], c["fxgraph_cache_bypass"],
                  a["autograd_cache_hit"])
        """
        with tempfile.TemporaryDirectory() as folder:
            code = code.replace("FOLDER", repr(folder))
            first, second = (forked(code).split()[-4:] for _ in range(2))
        assert (first, second) == (["0", "1", "0", "0"], ["1", "0", "0", "1"])


class TestPickle:
    def test_it_says_what_to_save(self) -> None:
        """Tracing anew, as pickle does, fails at operators that take sizes of the input."""
        graph = prepared(Words(), words(), "int8")
        for each in (graph, copy.deepcopy(graph), pt2e.convert_pt2e(graph)):
            with pytest.raises(TypeError, match=r"torch\.export\.save, or graph\.state_dict\(\)"):
                pickle.dumps(each)

    def test_a_prepared_graph_is_copied(self) -> None:
        graph, args = prepared(Words(), words(), "int8_static"), words()
        copied = copy.deepcopy(qnn.calibrate(graph, [args]))
        want = pt2e.convert_pt2e(graph)(*args)
        assert torch.equal(pt2e.convert_pt2e(copied)(*args), want)


class TestStates:
    def test_into_a_graph_that_was_calibrated_otherwise(self) -> None:
        graph, args = converted(), words()
        other = converted()
        assert not torch.equal(other(*args), graph(*args))
        other.load_state_dict(graph.state_dict())
        assert torch.equal(other(*args), graph(*args))

    def test_of_observers(self) -> None:
        """178"""
        torch.manual_seed(0)
        model, args = Words(), words()
        graph = qnn.calibrate(prepared(model, args, "int8_static"), [args])
        other = prepared(model, args, "int8_static")
        other.load_state_dict(graph.state_dict())
        want = pt2e.convert_pt2e(graph).state_dict()
        for name, value in pt2e.convert_pt2e(other).state_dict().items():
            assert torch.equal(value, want[name]), name

    @parameterized.expand([("int8_static",), ("int8",)])
    def test_between_graphs_and_modules(self, scheme: str) -> None:
        model, args = Words(), words()
        graph = quantised(model, args, scheme)
        other = copy.deepcopy(model)
        if scheme == "int8_static":
            other = qnn.calibrate(qnn.prepare(other), [words(9)])
        other = qnn.convert(other, None if scheme == "int8_static" else scheme)
        other.load_state_dict(graph.state_dict())
        assert torch.equal(other(*args), graph(*args))
        back = quantised(Words(), args, scheme)
        back.load_state_dict(other.state_dict())
        assert torch.equal(back(*args), graph(*args))

    @parameterized.expand([("int8_static",), ("int8",)])
    def test_compared_with_the_float_model(self, scheme: str) -> None:
        model = Words()
        graph, args = quantised(model, words(), scheme), words()
        rows = {row.name: row.sqnr for row in qnn.compare(model, graph, args).rows}
        assert set(rows) == {"rnn", "block.0", "block.2", "(output)"}
        assert min(rows.values()) > 12


class TestAgain:
    def test_a_part_by_graph_and_the_rest_later(self) -> None:
        """95"""
        model, args = Words().eval(), words()
        part = torch.export.export(model.block, (torch.randn(3, 8),))
        part = pt2e.prepare_pt2e(part, Int8Quantizer("int8_static").set_module_name("2", None))
        for _ in range(2):
            part(torch.randn(3, 8))
        whole = copy.deepcopy(model)
        whole.block = pt2e.convert_pt2e(part)
        with torch.no_grad():
            want = whole(*args)
            program = torch.export.export(whole, args)
            assert len(regions(program)) == 1
            graph = pt2e.prepare_pt2e(program, Int8Quantizer("int8_static"))
            assert torch.equal(graph(*args), want)
            graph = pt2e.convert_pt2e(graph)
            assert qnn.sqnr(want, graph(*args)) > 25
            assert {n: s for n, s in schemes(graph).items() if s} == {
                "rnn": "int8_static", "block.2": "int8_static",
            }  # fmt: skip
            again = torch.export.export(graph, args)
            assert len(regions(again)) == 3
            assert torch.equal(again.module()(*args), graph(*args))

    def test_what_was_left_alone_is_prepared_by_name(self) -> None:
        graph = prepared(Words(), words(), "int8", lambda q: q.set_module_name("rnn", None))
        graph = qnn.convert(pt2e.convert_pt2e(graph), {"rnn": "int8"})
        assert {n: s for n, s in schemes(graph).items() if n != "table"} == dict.fromkeys(
            ("rnn", "block.0", "block.2"), "int8"
        )
