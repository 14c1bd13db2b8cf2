"""Graph mode: prepare, calibrate or train, and convert an exported graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parameterized import parameterized
from torch import nn

import qnn
from qnn import pt2e
from qnn.passes import regions
from qnn.pt2e import Int8Quantizer

DYNAMIC = torch.export.Dim.AUTO


class Net(nn.Module):
    """conv-bn-relu, depthwise, 1×1 with a residual, and two linear layers."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(8, eps=eps, momentum=0.03)
        self.c2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b2 = nn.BatchNorm2d(8, eps=eps)
        self.c3 = nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b1(self.c1(x)))
        x = x + F.relu6(self.b2(self.c2(x)))
        x = self.drop(self.c3(x)).mean((2, 3))
        return self.head(F.relu(self.fc(x)))


class Words(nn.Module):
    """A table, an LSTM and a head that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out, (h, _) = self.lstm(self.table(ids))
        return self.head(out[:, -1]) + self.head(torch.cat([h[-2], h[-1]], -1))


def images(batch: int = 4) -> tuple[torch.Tensor]:
    return (torch.randn(batch, 1, 8, 8),)


def words(batch: int = 4) -> tuple[torch.Tensor]:
    return (torch.randint(20, (batch, 6)),)


def settled(net: nn.Module) -> nn.Module:
    """With running statistics that are not those of a new BatchNorm."""
    for _ in range(3):
        net.train()(*images(16))
    return net.eval()


def exported(model: nn.Module, args: tuple[Any, ...], *, strict: bool = False) -> Any:
    shapes = tuple({0: DYNAMIC} for _ in args)
    return torch.export.export(model, args, dynamic_shapes=shapes, strict=strict)


CASES = [
    ("conv", lambda: settled(Net()), images),
    ("words", lambda: Words().eval(), words),
]


class TestAsTheModules:
    @parameterized.expand(
        [(f"{n}_{scheme}", m, a, scheme) for n, m, a in CASES for scheme in ("int8_static", "int8")]
    )
    def test_state_and_integers(self, _: str, make: Any, args: Any, scheme: str) -> None:
        model, batches = make(), [args() for _ in range(3)]
        graph = pt2e.prepare_pt2e(exported(model, args()), Int8Quantizer(scheme))
        fused = qnn.fuse(model, args()) if isinstance(model, Net) else model
        if scheme == "int8_static":
            qnn.calibrate(graph, batches, progress=False)
            fused = qnn.calibrate(qnn.prepare(fused), batches, progress=False)
            other = qnn.convert(fused)
        else:
            other = qnn.convert(fused, scheme)
        got, want = pt2e.convert_pt2e(graph).state_dict(), other.state_dict()
        assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
            k: (v.shape, v.dtype) for k, v in want.items()
        }
        for name, value in want.items():
            assert torch.equal(got[name], value), name

    @parameterized.expand(CASES)
    def test_every_way_to_run(self, _: str, make: Any, args: Any) -> None:
        graph = pt2e.prepare_pt2e(exported(make(), args()), Int8Quantizer("int8_static"))
        qnn.calibrate(graph, [args(8)], progress=False)
        graph = pt2e.convert_pt2e(graph)
        x = args(7)
        with torch.no_grad():
            want = graph(*x)
            compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(*x), want)
            for strict in (False, True):
                program = exported(graph, args(), strict=strict)
                layers = sum(qnn.kinds.is_quantized(module) for module in graph.modules())
                calls = {"Net": 5, "Words": 4 + 2}
                assert len(regions(program)) >= layers
                assert len(regions(program)) in calls.values()
                assert torch.equal(program.module()(*x), want)
            assert torch.equal(copy.deepcopy(graph)(*x), want)

    def test_prepared_outputs_are_those_of_the_float_model(self) -> None:
        model, x = Words().eval(), words()
        graph = pt2e.prepare_pt2e(exported(model, x), Int8Quantizer("int8_static"))
        assert torch.equal(graph(*x), model(*x))


class TestTraining:
    @parameterized.expand([(1e-5,), (1e-3,), (0.1,)])
    def test_b134_what_was_trained_is_what_is_converted(self, eps: float) -> None:
        model = settled(Net(eps))
        graph = pt2e.prepare_qat_pt2e(exported(model, images()), Int8Quantizer("int8_static"))
        optimizer = torch.optim.SGD(graph.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            graph(*images(16)).square().mean().backward()
            optimizer.step()
        norm = graph.get_submodule("b1")
        assert (norm.eps, norm.momentum, graph.drop.p) == (eps, 0.03, 0.2)
        assert int(norm.num_batches_tracked) == 6
        graph.eval()
        before, x = copy.deepcopy(graph.state_dict()), images(16)
        want = graph(*x)
        for name, value in graph.state_dict().items():
            assert torch.equal(value, before[name]), name
        got = pt2e.convert_pt2e(graph)(*x)
        assert qnn.sqnr(want, got) > 60

    def test_a_channel_without_gain(self) -> None:
        model = settled(Net())
        nn.init.zeros_(model.b1.weight)
        graph = pt2e.prepare_qat_pt2e(exported(model, images()), Int8Quantizer("int8_static"))
        graph(*images(16)).sum().backward()
        assert all(p.grad.isfinite().all() for p in graph.parameters() if p.grad is not None)
        assert pt2e.convert_pt2e(graph)(*images()).isfinite().all()

    @parameterized.expand([(True,), (False,)])
    def test_the_mode_of_the_export_does_not_matter(self, training: bool) -> None:
        model = settled(Net()).train(training)
        graph = pt2e.prepare_pt2e(exported(model, images()), Int8Quantizer("int8_static"))
        x = images()
        assert qnn.sqnr(model.eval()(*x), graph(*x)) > 100


class TestRules:
    def schemes(self, quantizer: Int8Quantizer, model: nn.Module, args: Any) -> dict[str, Any]:
        graph = pt2e.prepare_pt2e(exported(model, args), quantizer)
        qnn.calibrate(graph, [args], progress=False)
        return {row.name: row.scheme for row in qnn.summary(pt2e.convert_pt2e(graph)).rows}

    def test_b66_b70_precedence(self) -> None:
        quantizer = (
            Int8Quantizer("int8_static")
            .set_op_type(torch.ops.aten.linear, "int8")
            .set_module_type(nn.Conv2d, "int8_weight")
            .set_module_name("c3", None)
            .set_module_name("head", "int8_static")
        )
        found = self.schemes(quantizer, settled(Net()), images())
        assert found["c1"] == found["c2"] == "int8_weight"
        assert found["c3"] is None
        assert (found["fc"], found["head"]) == ("int8", "int8_static")

    def test_a_table_is_taken_when_named(self) -> None:
        assert self.schemes(Int8Quantizer("int8_static"), Words().eval(), words())["table"] is None
        named = Int8Quantizer("int8_static").set_module_type(nn.Embedding, "int8_static")
        assert self.schemes(named, Words().eval(), words())["table"] == "int8_weight"

    @parameterized.expand(
        [
            (lambda q: q.set_module_name("fc1", "int8"), "matches nothing.*'fc'"),
            (lambda q: q.set_module_name("f", "int8"), "matches nothing"),
            (lambda q: q.set_global("int9"), "set_global.*int9"),
            (lambda q: q.set_op_type(torch.relu, "int8"), "aten.linear"),
            (lambda q: None, "has no rule"),
        ]
    )
    def test_b80_mistakes(self, change: Any, message: str) -> None:
        def prepare() -> None:
            quantizer = Int8Quantizer()
            change(quantizer)
            pt2e.prepare_pt2e(exported(settled(Net()), images()), quantizer)

        with pytest.raises(ValueError, match=message):
            prepare()


class TestErrors:
    def test_what_is_not_exported(self) -> None:
        with pytest.raises(TypeError, match=r"torch\.export\.export.*qnn\.prepare"):
            pt2e.prepare_pt2e(Net(), Int8Quantizer("int8"))
        with pytest.raises(TypeError, match="symbolic_trace"):
            pt2e.prepare_pt2e(
                torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), Int8Quantizer("int8")
            )

    def test_nothing_seen(self) -> None:
        graph = pt2e.prepare_pt2e(exported(settled(Net()), images()), Int8Quantizer("int8_static"))
        with pytest.raises(ValueError, match=r"5 of 5 observed layers.*\n  c1: "):
            pt2e.convert_pt2e(graph)
        left = pt2e.convert_pt2e(graph, strict=False)
        assert "it has seen no data" in str(qnn.summary(left))

    def test_b60_the_input_is_untouched(self) -> None:
        module = exported(settled(Net()), images()).module()
        before = module.code
        pt2e.prepare_pt2e(module, Int8Quantizer("int8_static"))
        assert module.code == before
        assert pt2e.prepare_pt2e(module, Int8Quantizer("int8_static"), inplace=True) is module

    def test_what_stays_float_has_its_reason(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.q(x)
                return F.linear(y @ y.transpose(-1, -2) @ y, self.w * 2) + self.w.sum()

        x = (torch.randn(2, 3, 8),)
        graph = pt2e.prepare_pt2e(exported(Attention(), x), Int8Quantizer("int8"))
        rows = {row.name: row.reason for row in qnn.summary(pt2e.convert_pt2e(graph)).rows}
        (products,) = [name for name in rows if name.startswith("matmul (")]
        assert "test_pt2e.py:" in products
        assert rows[products] == "no int8 op multiplies two activations"
        (computed,) = [reason for name, reason in rows.items() if name.startswith("linear")]
        assert "from a tensor that add (aten.add.Tensor) reads too" in computed
