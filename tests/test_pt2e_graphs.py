"""Graph mode on graphs that are not a row of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parameterized import parameterized
from torch import nn

import qnn
from qnn import pt2e
from qnn.pt2e import Int8Quantizer

DYNAMIC = torch.export.Dim.AUTO
SCHEMES = [("int8_static",), ("int8",)]
Change = Callable[[Int8Quantizer], Any]


def leaves(output: Any) -> list[torch.Tensor]:
    every = torch.utils._pytree.tree_leaves(output)
    return [each for each in every if isinstance(each, torch.Tensor)]


def prepared(
    model: nn.Module, args: Any, scheme: str, change: Change | None = None, *,
    kwargs: dict[str, Any] | None = None, shapes: Any = None, decomposed: bool = False,
) -> Any:  # fmt: skip
    with torch.no_grad():
        program = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes)
    if decomposed:
        program = program.run_decompositions()
    quantizer = Int8Quantizer(scheme)
    if change is not None:
        change(quantizer)
    return pt2e.prepare_pt2e(program, quantizer)


def quantised(model: nn.Module, args: Any, scheme: str, *more: Any, db: float = 25, **ways: Any):
    """The converted graph, with outputs near those of the model, which those of the prepared graph
    are.
    """
    kwargs = ways.get("kwargs") or {}
    graph = prepared(model, args, scheme, *more, **ways)
    with torch.no_grad():
        want = leaves(model(*args, **kwargs))
        for a, b in zip(leaves(graph(*args, **kwargs)), want, strict=True):
            torch.testing.assert_close(a, b)
        graph = pt2e.convert_pt2e(graph)
        for a, b in zip(leaves(graph(*args, **kwargs)), want, strict=True):
            assert a.dtype == b.dtype
            if a.is_floating_point() and b.isfinite().all():
                assert qnn.sqnr(b, a) > db
    return graph


def schemes(graph: nn.Module) -> dict[str, str | None]:
    return {row.name.partition(" ")[0]: row.scheme for row in qnn.summary(graph).rows}


def reasons(graph: nn.Module) -> dict[str, str]:
    rows = qnn.summary(graph).rows
    return {row.name: row.reason for row in rows if row.reason is not None}


def why(graph: nn.Module, start: str) -> str:
    (reason,) = [each for name, each in reasons(graph).items() if name.startswith(start)]
    return reason


class Tied(nn.Module):
    """A table and a head of one weight, and perhaps a third reader."""

    def __init__(self, third: bool) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
        self.h.weight, self.third, self.out = self.e.weight, third, nn.Linear(50, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.e(ids)
        z = self.h(y)
        return self.out(z + F.linear(y, self.e.weight * 2) if self.third else z)


def is_shared(graph: nn.Module, *names: str) -> bool:
    """Whether entries of the state dict are one tensor."""
    return len({graph.state_dict()[name].data_ptr() for name in names}) == 1


def tables(quantizer: Int8Quantizer) -> Any:
    return quantizer.set_module_type(nn.Embedding, "int8_weight")


class TestTied:
    """E3 of the hard cases."""

    @parameterized.expand(SCHEMES)
    def test_quantised_once(self, scheme: str) -> None:
        ids = (torch.randint(50, (3, 5)),)
        graph = quantised(Tied(False), ids, scheme, tables)
        assert schemes(graph) == {"e": "int8_weight", "h": scheme, "out": scheme}
        assert is_shared(graph, "e.weight", "h.weight")
        assert graph.state_dict()["e.weight"].dtype == torch.int8

    @parameterized.expand(SCHEMES)
    def test_a_reader_that_needs_the_float_weight(self, scheme: str) -> None:
        ids = (torch.randint(50, (3, 5)),)
        graph = quantised(Tied(True), ids, scheme, tables)
        assert schemes(graph) == {"e": None, "h": None, "out": scheme, "linear_1": None}
        for name in ("e", "h"):
            assert "read as a float tensor by mul (aten.mul.Tensor)" in why(graph, name)
        assert "from a tensor that embedding (aten.embedding.default) reads" in why(graph, "linear")
        assert "test_pt2e_graphs.py:" in next(n for n in reasons(graph) if n.startswith("linear"))
        assert is_shared(graph, "e.weight", "h.weight")

    @parameterized.expand(SCHEMES)
    def test_a_table_that_no_rule_names(self, scheme: str) -> None:
        graph = quantised(Tied(False), (torch.randint(50, (3, 5)),), scheme)
        assert schemes(graph) == {"e": None, "h": None, "out": scheme}
        assert why(graph, "h") == "its weight is tied to 'e' (Embedding), which stays in float"

    def test_nothing_that_can_be_quantised(self) -> None:
        model = Tied(True)
        model.out = nn.Identity()  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"no layer can be quantised.*\n  e: .*\n  h: "):
            prepared(model, (torch.randint(50, (3, 5)),), "int8_static", tables)

    @parameterized.expand(SCHEMES)
    def test_two_linear_layers(self, scheme: str) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
                self.b.weight = self.a.weight

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.a(x) + self.b(2 * x) + self.a(x.relu())

        graph = quantised(Two(), (torch.randn(3, 8),), scheme)
        assert is_shared(graph, "a.weight", "b.weight")
        assert not is_shared(graph, "a.bias", "b.bias")
        assert [n.target for n in graph.graph.find_nodes(op="call_module")][1:] == ["a", "b", "a"]


class TestHardCases:
    @parameterized.expand(SCHEMES)
    def test_integers_and_sizes(self, scheme: str) -> None:
        """E7"""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("n", torch.tensor([100]))
                self.l = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> Any:
                y = self.l(x)[:, torch.arange(4) + 0]
                return (y + self.n) * 3.4e38, torch.eq(x, 0), y.shape[0] - 1

        graph = quantised(Net(), (torch.randn(3, 4),), scheme, shapes=({0: DYNAMIC},))
        assert schemes(graph)["l"] == scheme
        assert graph.n.dtype == torch.int64
        big, equal, size = graph(torch.zeros(5, 4))
        assert big.isinf().all()
        assert equal.all()
        assert size == 4

    def test_dynamic_needs_no_data(self) -> None:
        """E8"""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)

        x, args = torch.randn(3, 5, 8), (torch.randn(3, 5, 8),)
        graph = prepared(model := Net(), args, "int8", lambda q: q.set_module_name("k", None))
        graph = pt2e.convert_pt2e(graph)
        assert qnn.sqnr(model(x), graph(x)) > 25
        found = {"q": "int8", "k": None, "v": "int8", "matmul": None, "matmul_1": None}
        assert schemes(graph) == found
        assert why(graph, "k") == "the rule for 'k' says None"
        x[:, 0] = 0
        assert graph(x).isfinite().all()
        assert torch.equal(graph.k.weight, model.k.weight)

    @parameterized.expand(SCHEMES)
    def test_a_residual_that_is_read_again(self, scheme: str) -> None:
        """E9"""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

            def forward(self, x: torch.Tensor) -> Any:
                y = self.a(x)
                return F.relu(y + self.b(y)), y.flatten(1).t()

        graph = quantised(Net(), args := (torch.randn(3, 3, 5, 5),), scheme)
        with torch.no_grad():
            want = graph(*args)
            torch._dynamo.reset()
            for got, each in zip(torch.compile(graph, fullgraph=True)(*args), want, strict=True):
                torch.testing.assert_close(got, each)
        assert torch.equal(want[1], graph.a(*args).flatten(1).t())

    @parameterized.expand([(s, d) for (s,) in SCHEMES for d in (False, True)])
    def test_transposed_with_groups(self, scheme: str, decomposed: bool) -> None:
        """E10"""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.c, self.b = nn.ConvTranspose2d(2, 6, 3, groups=2), nn.BatchNorm2d(6)
                self.d = nn.Conv2d(6, 4, 1, bias=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.d(self.b(self.c(x)))

        (model := Net())(torch.randn(9, 2, 5, 5) * 3 + 1)
        graph = quantised(model, (torch.randn(3, 2, 5, 5),), scheme, decomposed=decomposed)
        assert graph.c.weight.shape == (2, 3, 3, 3)
        assert graph.c.weight_scale.numel() == 6
        assert graph.d.bias is None
        assert set(schemes(graph)) == {"c", "d"}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.weight, self.sub = nn.Parameter(torch.randn(8, 8)), nn.Module()
        self.sub.proj_weight = nn.Parameter(torch.randn(8, 8))
        self.sub.k = nn.Parameter(torch.randn(4, 8, 3))

    def forward(self, x: torch.Tensor) -> Any:
        y = F.linear(x, self.w, self.b) + F.linear(x, self.sub.proj_weight) + x @ self.w.t()
        return y + F.linear(x, self.weight), F.conv1d(x.unsqueeze(-1), self.sub.k, padding=1)


class Computed(nn.Module):
    """Weights that the graph computes of parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.table, self.dense = nn.Buffer(torch.randn(8, 4)), nn.Module()
        self.dense.weight, self.dense.bias = (
            nn.Parameter(torch.randn(8, 4)),
            nn.Parameter(torch.randn(4)),
        )
        self.e, self.shared = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        y = F.linear(x, self.w.t().contiguous()) + F.linear(x, self.v * 2)
        y = y + F.linear(self.shared(x), self.shared.weight + 1)
        y = y + torch.einsum("bk,nk->bn", x, self.e) + torch.einsum("kn,bk->bn", self.e, x)
        return y, x @ self.table, torch.addmm(self.dense.bias, x, self.dense.weight)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        p = torch.nn.utils.parametrizations
        self.c, self.l = p.weight_norm(nn.Conv1d(4, 4, 3)), p.spectral_norm(nn.Linear(4, 4))
        self.old = torch.nn.utils.weight_norm(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.old(self.l(self.c(x).mean(-1)))


class TestWeights:
    @parameterized.expand(SCHEMES)
    def test_functional_calls(self, scheme: str) -> None:
        graph = quantised(Functional(), (torch.randn(3, 8),), scheme)
        names = {"w_linear", "w_linear_1", "linear", "sub.proj", "sub.k_conv1d"}
        assert schemes(graph) == dict.fromkeys(names, scheme)
        assert is_shared(graph, "w_linear.weight", "w_linear_1.weight")

    @parameterized.expand(SCHEMES)
    def test_computed(self, scheme: str) -> None:
        graph = quantised(Computed(), (torch.randn(3, 8),), scheme, shapes=({0: DYNAMIC},))
        taken = ("w_0", "v_0", "table_0", "dense.computed_0")
        found = schemes(graph)
        assert {name: found[name] for name in taken} == dict.fromkeys(taken, scheme)
        assert [found[name] for name in ("shared", "linear_3")] == [None, None]
        assert not {"w", "v", "table", "dense.weight"} & set(graph.state_dict())
        # One parameter, read once as it is and once turned: that stays float.
        assert "from a tensor that" in why(graph, "matmul_default")

    @parameterized.expand(SCHEMES)
    def test_parametrized(self, scheme: str) -> None:
        graph = quantised(Normed(), (torch.randn(3, 4, 9),), scheme)
        assert schemes(graph) == {"c": scheme, "l": scheme, "old": scheme}
        assert not [name for name in graph.state_dict() if "parametrizations" in name]

    def test_training_goes_on_from_the_computed_weight(self) -> None:
        program = torch.export.export(Normed().eval(), args := (torch.randn(3, 4, 9),))
        graph = pt2e.prepare_qat_pt2e(program, Int8Quantizer("int8_static"))
        graph(*args).sum().backward()
        assert graph.c.weight.grad is not None
        assert pt2e.convert_pt2e(graph)(*args).isfinite().all()

    def test_a_weight_that_the_graph_writes_to(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cache, self.l = nn.Buffer(torch.randn(8, 8)), nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = F.linear(self.l(x), self.cache) + x @ self.cache.t() + x @ (self.cache * 2)
                self.cache.mul_(0.5)
                return y + F.linear(x, self.cache)

        graph = prepared(Net(), args := (torch.randn(3, 8),), "int8")
        graph = pt2e.convert_pt2e(graph)
        assert {n: s for n, s in schemes(graph).items() if n} == {
            "l": "int8", "linear_1": None, "matmul": None, "matmul_1": None, "linear_2": None,
        }  # fmt: skip
        assert "is a tensor that the graph writes to" in why(graph, "linear_1")
        assert "from a tensor that the graph writes to" in why(graph, "matmul_1")
        first, second = graph(*args), graph(*args)
        torch.testing.assert_close(second, first / 2)

    @parameterized.expand(SCHEMES)
    def test_decomposed(self, scheme: str) -> None:
        model, args = (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            (torch.randn(3, 5, 8),),
        )
        for decomposed in (False, True):
            graph = quantised(model, args, scheme, shapes=({0: DYNAMIC},), decomposed=decomposed)
            names = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
            assert all(schemes(graph)[name] == scheme for name in names)
            x = torch.randn(7, 5, 8)
            assert qnn.sqnr(model(x), graph(x)) > 25


class TestAttention:
    @parameterized.expand(
        [
            ("packed", {}, [8], ["in_proj"]),
            ("cross", {}, [8, 8], ["in_proj_0", "in_proj_1"]),
            ("kdim", {"kdim": 6, "vdim": 6}, [8, 6], ["q_proj", "k_proj", "v_proj"]),
            ("no_bias", {"bias": False}, [8, 8], ["in_proj_0", "in_proj_1"]),
        ]
    )
    def test_projections(self, _: str, options: Any, widths: list[int], names: list[str]) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.at = nn.MultiheadAttention(8, 2, batch_first=True, **options)

            def forward(self, x: torch.Tensor, *other: torch.Tensor) -> Any:
                return self.at(x, *(other or (x,)) * 2)

        args = tuple(torch.randn(3, 4 + at, width) for at, width in enumerate(widths))
        for (scheme,) in SCHEMES:
            graph = quantised(Net(), args, scheme)
            found = {f"at.{name}": scheme for name in (*names, "out_proj")}
            assert schemes(graph) == {**found, "bmm": None, "bmm_1": None}
            assert why(graph, "bmm (") == "no int8 op multiplies two activations"


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gc = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a: torch.Tensor, *, opts: Any, none: Any = None) -> Any:
        self.gc(a)  # nothing reads it
        return {"y": self.fc(a) + opts["s"], "n": none, "l": [a, self.fc(opts["t"][0])]}


class TestInputs:
    @parameterized.expand(SCHEMES)
    def test_nested(self, scheme: str) -> None:
        kwargs = {"opts": {"s": torch.randn(4), "t": (torch.randn(3, 4),)}}
        graph = quantised(Keywords(), (a := torch.randn(3, 4),), scheme, kwargs=kwargs)
        result = graph(a, **kwargs)
        assert result["n"] is None
        assert result["l"][0] is a
        assert schemes(graph)["fc"] == scheme

    def test_another_size_says_how_to_export(self) -> None:
        graph = prepared(nn.Sequential(nn.Linear(4, 4)), (torch.randn(3, 4),), "int8_static")
        with pytest.raises(
            AssertionError, match=r"== 3\. .*dynamic_shapes=\(\{0: torch.export.Dim"
        ):
            qnn.calibrate(graph, [torch.randn(5, 4)])
        graph = pt2e.convert_pt2e(qnn.calibrate(graph, [torch.randn(3, 4)]))
        with pytest.raises(AssertionError, match=r"== 3\. .*dynamic_shapes"):
            graph(torch.randn(5, 4))

    def test_b112_every_node_has_its_type_and_place(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.rnn, self.gru = nn.Linear(4, 4), nn.LSTM(4, 4), nn.GRU(4, 4)
                self.w, self.e = nn.Parameter(torch.randn(4, 4)), nn.EmbeddingBag(9, 4)

            def forward(self, x: torch.Tensor, ids: torch.Tensor) -> Any:
                y, (h, c) = self.rnn(self.fc(x) @ self.w)
                return self.gru(y)[0] + self.e(ids), h, c

        args = (torch.randn(2, 3, 4), torch.randint(9, (3, 5)))
        for graph in (quantised(Net(), args, "int8_static"), quantised(Net(), args, "int8")):
            values = torch.fx.Interpreter(graph)
            seen = {}

            class Note(torch.fx.Interpreter):
                def run_node(self, node: Any, seen: Any = seen) -> Any:
                    seen[node] = super().run_node(node)
                    return seen[node]

            with torch.no_grad():
                Note(graph).run(*values.module.graph.process_inputs(*args))
            for node, value in seen.items():
                if node.op in ("call_module", "call_function") and node.target != "_guards_fn":
                    types = [(each.shape, each.dtype) for each in leaves(value)]
                    assert types == [(t.shape, t.dtype) for t in leaves(node.meta["val"])], node
                    assert node.meta["nn_module_stack"]
                    assert "test_pt2e_graphs.py" in node.meta["stack_trace"]
                    assert node.meta["from_node"]
