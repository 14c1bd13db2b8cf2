"""Graph mode: bodies of control flow, and buffers that the graph writes to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch._higher_order_ops import while_loop

import qnn
from qnn import pt2e
from qnn.passes import regions
from qnn.pt2e import Int8Quantizer
from qnn.pt2e import graph as graphs
from tests.pt2e import observer_of, of_layers
from tests.test_pt2e_graphs import SCHEMES, leaves, prepared, quantised, schemes, why
from tests.test_pt2e_rules import Annotates


class Cond(nn.Module):
    """A layer in one branch, in both and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: self.g(x) + self.fc(x), (x,))
        return self.fc(y)


class While(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        def body(i: torch.Tensor, y: torch.Tensor) -> Any:
            return i + 1, torch.tanh(self.fc(y))

        start = (torch.tensor(0), x)
        return while_loop(lambda i, y: i < 3, body, start)


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> Any:
        def step(carry: torch.Tensor, each: torch.Tensor) -> Any:
            carry = self.block(carry) + each @ (self.w * 2)
            return carry, carry.clone()

        xs = x.unsqueeze(0).expand(5, -1, -1).clone()
        return torch._higher_order_ops.scan(step, x, xs)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return torch._higher_order_ops.map(lambda each: self.fc(each), x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 9, lambda x: self.g(x), lambda x: self.fc(x), (x,))

        return torch.cond(x.mean() > 0, inner, lambda x: self.fc(x) + 1, (x,))


CASES = [
    ("cond", Cond, {"fc", "g"}, 4),
    ("while", While, {"fc"}, 1),
    ("scan", Scan, {"block.0"}, 1),
    ("map", Mapped, {"fc"}, 1),
    ("nested", Nested, {"fc", "g"}, 3),
]


def batches() -> list[torch.Tensor]:
    x = torch.rand(3, 4)
    return [x, -x, x * 9]


class TestBodies:
    @parameterized.expand(
        [(f"{n}_{s}", m, names, s) for n, m, names, _ in CASES for (s,) in SCHEMES]
    )
    def test_layers_are_those_of_the_model(
        self, _: str, make: Any, names: set[str], scheme: str
    ) -> None:
        model, data = make(), batches()
        graph = prepared(model, (data[0],), scheme)
        with torch.no_grad():
            for x in data:
                for got, want in zip(leaves(graph(x)), leaves(model(x)), strict=True):
                    torch.testing.assert_close(got, want)
        graph = pt2e.convert_pt2e(graph)
        assert {name for name, s in schemes(graph).items() if s == scheme} == names
        with torch.no_grad():
            for x in data:
                assert qnn.sqnr(leaves(model(x))[-1], leaves(graph(x))[-1]) > 25
        if scheme == "int8_static" and make in (Scan, Mapped):
            return  # torch's own `scan` and `map` of modules cannot run observers
        other = qnn.prepare(model) if scheme == "int8_static" else model
        if scheme == "int8_static":
            with torch.no_grad():
                for x in data:
                    other(x)
        theirs = qnn.convert(other, None if scheme == "int8_static" else scheme).state_dict()
        ours = graph.state_dict()
        assert set(theirs) <= set(ours)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name

    @parameterized.expand(CASES)
    def test_every_way_to_run(self, _: str, make: Any, names: set[str], count: int) -> None:
        data = batches()
        graph = qnn.calibrate(prepared(make(), (data[0],), "int8_static"), data)
        graph = pt2e.convert_pt2e(graph)
        copied, state = copy.deepcopy(graph), set(graph.state_dict())
        torch._dynamo.reset()
        with torch.no_grad():
            wants = [leaves(graph(x)) for x in data]
            ways = [copied, torch.compile(graph, backend="aot_eager", fullgraph=True)]
            for strict in (False, True):
                program = torch.export.export(graph, (data[0],), strict=strict)
                assert len(regions(program)) == count
                assert not {n.removeprefix("L__self___") for n in program.state_dict} - state
                ways.append(program.module())
            for way in ways:
                for x, want in zip(data, wants, strict=True):
                    for got, each in zip(leaves(way(x)), want, strict=True):
                        assert torch.equal(got, each)
        assert set(copied.state_dict()) == state
        before = wants[0][-1].clone()
        for name, value in copied.state_dict().items():
            if name.endswith("weight_scale"):
                value.zero_()
        assert not torch.equal(leaves(copied(data[0]))[-1], before)
        assert torch.equal(leaves(graph(data[0]))[-1], before)

    def test_compiled_by_inductor(self) -> None:
        graph, data = quantised(Cond(), (batches()[0],), "int8"), batches()
        torch._dynamo.reset()
        compiled = torch.compile(graph, fullgraph=True)
        with torch.no_grad():
            for x in data:
                torch.testing.assert_close(compiled(x), graph(x))

    def test_what_stays_float_has_its_reason(self) -> None:
        graph = quantised(Scan(), (batches()[0],), "int8")
        assert "computed by aten.mul.Tensor in the body" in why(graph, "scan_combine_graph_0.")

    def test_b167_the_condition_of_a_loop_stays_float(self) -> None:
        class Loop(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.t, self.fc = nn.Linear(4, 1), nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                def goes_on(at: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                    return (at < 3) & (self.t(y).sum() < 100)

                def body(at: torch.Tensor, y: torch.Tensor) -> Any:
                    return at + 1, torch.tanh(self.fc(y))

                return while_loop(goes_on, body, (torch.tensor(0), x))[1]

        for (scheme,) in SCHEMES:
            graph = quantised(Loop(), (batches()[0],), scheme)
            assert {n: s for n, s in schemes(graph).items() if n} == {"fc": scheme, "t": None}
            assert "whether a loop goes on" in why(graph, "t")
        program = torch.export.export(Loop().eval(), (batches()[0],))
        graph = pt2e.prepare_pt2e(program, Annotates(of_layers()))
        seen = [
            any(observer_of(each, node) is not None for node in each.graph.nodes)
            for each in graphs.graphs(graph)
        ]
        assert sum(seen) == 1

    @parameterized.expand([(False,), (True,)])
    def test_prepared_bodies_compile(self, qat: bool) -> None:
        """Without gradients; with them no operator of torch's takes bodies that write. Frozen
        observers do not.
        """
        prepare = pt2e.prepare_qat_pt2e if qat else pt2e.prepare_pt2e
        program = torch.export.export(Cond(), (batches()[0],))
        graph = prepare(program, Int8Quantizer("int8_static"))
        other = copy.deepcopy(graph)
        torch._dynamo.reset()
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for x in (*batches(), *(-x for x in batches())):
                torch.testing.assert_close(compiled(x), graph(x))
        for (name, value), same in zip(
            graph.state_dict().items(), other.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(same, value, msg=name)
        qnn.freeze_observers(graph), qnn.freeze_observers(other)
        for x in (batches()[0], -batches()[0]):
            for each in (graph, compiled):
                each(x).square().sum().backward()
        for one, same in zip(graph.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(same.grad, one.grad)

    def test_training(self) -> None:
        program = torch.export.export(Cond(), (x := batches()[0],))
        graph = pt2e.prepare_qat_pt2e(program, Int8Quantizer("int8_static"))
        for each in (x, -x):
            graph(each).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in graph.parameters())
        assert pt2e.convert_pt2e(graph)(x).isfinite().all()


class Cache(nn.Module):
    """E6 of the hard cases."""

    def __init__(self) -> None:
        super().__init__()
        self.kv, self.l = nn.Buffer(torch.zeros(2, 8)), nn.Linear(8, 8)
        self.n = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.kv.select(0, 0).index_put_((at,), self.l(x)[0, :2])
        self.n += 1
        return self.l(self.kv)


class TestMutation:
    @parameterized.expand(SCHEMES)
    def test_b175_a_cache(self, scheme: str) -> None:
        model, args = Cache(), (torch.randn(1, 8), torch.tensor([1, 3]))
        graph = prepared(model, args, scheme)
        if scheme == "int8_static":
            qnn.calibrate(graph, [args] * 2)
        assert not graph.kv.any()
        assert graph.n == 0
        graph = pt2e.convert_pt2e(graph)
        assert schemes(graph)["l"] == scheme
        with torch.no_grad():
            program = torch.export.export(copy.deepcopy(graph), args)
            changed = {s.target for s in program.run_decompositions().graph_signature.output_specs}
            assert {"kv", "n"} <= changed
            for way in (graph, program.module()):
                first = way(*args)
                assert way.n == 1
                assert way.kv[0].count_nonzero() == 2
                assert not torch.equal(way(args[0] * 2, args[1]), first)

    def test_a_forward_with_gradients_has_written_to_it(self) -> None:
        args = (torch.randn(1, 8), torch.tensor([1, 3]))
        graph = prepared(Cache(), args, "int8_static")
        graph(*args)
        assert not graph.kv.is_leaf
        converted = pt2e.convert_pt2e(graph)
        assert torch.equal(converted.kv, graph.kv)
        assert not torch.equal(converted(*args), graph.kv)

    @parameterized.expand([(False,), (True,)])
    def test_calibration_of_a_model_leaves_buffers(self, replaced: bool) -> None:
        class Net(Cache):
            def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
                if replaced:
                    self.kv = self.kv + self.l(x)
                return super().forward(x, at)

        model, args = Net(), (torch.randn(1, 8), torch.tensor([1, 3]))
        kv = (model := qnn.prepare(model)).kv
        qnn.calibrate(model, [args] * 2)
        assert model.kv is kv
        assert not kv.any()
        assert model.n == 0
        assert qnn.convert(model)(*args).isfinite().all()

    def test_calibration_that_fails_leaves_buffers_too(self) -> None:
        model, args = qnn.prepare(Cache()), (torch.randn(1, 8), torch.tensor([1, 3]))
        with pytest.raises(RuntimeError):
            qnn.calibrate(model, [args, (torch.randn(1, 9), args[1])])
        assert not model.kv.any()
