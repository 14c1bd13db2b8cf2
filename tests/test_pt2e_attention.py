"""Attention of exported graphs in 8 bits, where a rule names it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.nn import functional as TF

import qnn
import qnn.functional as F
from qnn import pt2e
from qnn.pt2e import Int8Quantizer

SDPA = TF.scaled_dot_product_attention
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True, "scale": 0.3},
    "masked": {"attn_mask": torch.tensor([[True, False, True, True, True]])},
    "added": {"attn_mask": torch.randn(5, 5)},
}


class Attends(nn.Module):
    def __init__(self, function: Any = SDPA, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        groups = 2 if options.get("enable_gqa") else 4
        self.q, self.kv = nn.Linear(16, 32), nn.Linear(16, 2 * 8 * groups)
        self.out = nn.Linear(32, 16)
        self.function, self.options = function, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (-1, 8)).transpose(1, 2).chunk(2, 1)
        y = self.function(q, k, v, **self.options)
        return self.out(y.transpose(1, 2).flatten(-2))


def prepared(model: nn.Module, *rules: Any, scheme: str | None = "int8") -> Any:
    quantizer = Int8Quantizer(scheme)
    for op, of_op in rules:
        quantizer.set_op_type(op, of_op)
    program = torch.export.export(model.eval(), (torch.randn(2, 5, 16),))
    return pt2e.prepare_pt2e(program, quantizer)


def converted(model: nn.Module, *rules: Any, scheme: str | None = "int8") -> Any:
    graph = prepared(model, *rules, scheme=scheme)
    if scheme == "int8_static":
        qnn.calibrate(graph, [torch.randn(2, 5, 16)], progress=False)
    return pt2e.convert_pt2e(graph)


def why(graph: Any) -> str:
    return str(qnn.summary(graph))


class TestAttention:
    @parameterized.expand(CALLS)
    def test_as_the_function(self, name: str) -> None:
        options, x = CALLS[name], torch.randn(2, 5, 16)
        ours = Attends(F.scaled_dot_product_attention, **options)
        want = qnn.convert(ours.eval(), "int8")
        with torch.no_grad():
            for rules in (
                [(SDPA, "int8")],
                [(torch.ops.aten.scaled_dot_product_attention, "int8")],
            ):
                graph = converted(Attends(**options), *rules)
                assert torch.equal(graph(x), want(x))
                assert torch.equal(copy.deepcopy(graph)(x), want(x))
                assert qnn.sqnr(Attends(**options)(x), graph(x)) > 25
            torch._dynamo.reset()
            compiled = torch.compile(graph, fullgraph=True)
            torch.testing.assert_close(compiled(x), want(x))
            again = torch.export.export(graph, (x,))
            assert torch.equal(again.module()(x), want(x))
        nodes = [n for n in again.graph.nodes if "invoke_quant" in str(n.target)]
        assert [n.kwargs.get("scheme") for n in nodes].count("int8") == 4

    def test_beside_static_layers_and_alone(self) -> None:
        x = torch.randn(2, 5, 16)
        graph = converted(Attends(), (SDPA, "int8"), scheme="int8_static")
        assert "where no rule names it" not in why(graph)
        assert "scheme='int8_static'" in str(graph.q)
        assert any(n.target is F.scaled_dot_product_attention for n in graph.graph.nodes)
        alone = converted(Attends(), (SDPA, "int8"), scheme=None)
        with torch.no_grad():
            assert torch.equal(alone(x), Attends(F.scaled_dot_product_attention)(x))

    def test_gradients(self) -> None:
        x = torch.randn(2, 5, 16, requires_grad=True)
        converted(Attends(), (SDPA, "int8"))(x).sum().backward()
        assert x.grad is not None
        assert x.grad.abs().max() > 0

    def test_prepared_is_float(self) -> None:
        x = torch.randn(2, 5, 16)
        with torch.no_grad():
            assert torch.equal(prepared(Attends(), (SDPA, "int8"))(x), Attends()(x))

    def test_stays_float_with_its_reason(self) -> None:
        assert "where no rule names it" in why(converted(Attends()))
        assert "no attention" in why(converted(Attends(), (SDPA, "int8_weight")))
        assert "where no rule names it" in why(converted(Attends(), (SDPA, None)))
        assert "export the model in eval mode" in why(
            converted(Attends(dropout_p=0.1), (SDPA, "int8"))
        )
        quantizer = Int8Quantizer("int8").set_op_type(SDPA, "int8").set_module_name("0", None)
        model = nn.Sequential(Attends(), Attends()).eval()
        program = torch.export.export(model, (torch.randn(2, 5, 16),))
        graph = pt2e.convert_pt2e(pt2e.prepare_pt2e(program, quantizer))
        assert "the rule for '0' says None" in why(graph)
        ours = [n for n in graph.graph.nodes if n.target is F.scaled_dot_product_attention]
        assert len(ours) == 1

    def test_a_rule_that_meets_nothing(self) -> None:
        with pytest.raises(ValueError, match="scaled_dot_product_attention matches nothing"):
            prepared(nn.Sequential(nn.Linear(16, 16)), (SDPA, "int8"))

    def test_inside_of_a_body(self) -> None:
        class Either(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attends, self.other = Attends(), nn.Linear(16, 16)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.cond(x.sum() > 0, self.attends, self.other, (x,))

        x = torch.randn(2, 5, 16).abs()
        graph = converted(Either(), (SDPA, "int8"))
        want = qnn.convert(Attends(F.scaled_dot_product_attention).eval(), "int8")
        with torch.no_grad():
            assert torch.equal(graph(x), want(x))
