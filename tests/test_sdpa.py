"""`qnn.functional.scaled_dot_product_attention`: torch's signature, semantics and graphs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch.nn import functional as TF

import qnn.functional as F
from qnn.kernels import OPS

from .common import same_bits

sdpa = F.scaled_dot_product_attention


def sqnr(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(20 * torch.log10(want.double().norm() / (got.double() - want.double()).norm()))


def qkv(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def nn_of(function: Any) -> nn.Module:
    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = function(x)
            return result

    return Module()


USUAL = ((2, 4, 10, 16), (2, 4, 12, 16), (2, 4, 12, 24))


class TestAsTorch:
    def test_signature(self) -> None:
        names = [*inspect.signature(sdpa).parameters]
        assert names == [
            *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"),
            *("enable_gqa", "scheme"),
        ]

    @parameterized.expand(
        [
            ("rows", (10, 16), (12, 16), (12, 24)),
            ("heads", (5, 10, 16), (5, 12, 16), (5, 12, 24)),
            ("usual", *USUAL),
            ("five axes", (3, 2, 4, 10, 16), (3, 2, 4, 12, 16), (3, 2, 4, 12, 24)),
            ("one batch of keys", (2, 4, 10, 16), (1, 4, 12, 16), (1, 4, 12, 24)),
            ("one head of keys", (2, 4, 10, 16), (2, 1, 12, 16), (2, 1, 12, 24)),
            ("one batch of queries", (1, 4, 10, 16), (2, 4, 12, 16), (2, 4, 12, 24)),
            ("one head of queries", (2, 1, 10, 16), (2, 4, 12, 16), (2, 4, 12, 24)),
            ("no axes of keys", (2, 4, 10, 16), (12, 16), (12, 24)),
            ("other axes", (1, 2, 4, 10, 16), (3, 2, 4, 12, 16), (3, 1, 4, 12, 24)),
        ]
    )
    def test_shapes(self, _: str, *shapes: tuple[int, ...]) -> None:
        args = qkv(*shapes)
        got, want = sdpa(*args), TF.scaled_dot_product_attention(*args)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert sqnr(got, want) > 36
        seen = torch.rand((*want.shape[:-1], 12)) > 0.3
        seen[..., 0] = True
        for mask in (seen, seen[..., :1, :], torch.randn(10, 12), torch.randn(1, 12)):
            while mask.dim() > want.dim():
                mask = mask[0]
            want = TF.scaled_dot_product_attention(*args, mask)
            assert sqnr(sdpa(*args, mask), want) > 34

    def test_grouped_heads(self) -> None:
        for q, k, v in (
            ((2, 6, 10, 16), (2, 2, 12, 16), (2, 2, 12, 24)),
            ((3, 2, 6, 10, 16), (3, 1, 2, 12, 16), (1, 2, 2, 12, 24)),
            ((6, 10, 16), (3, 12, 16), (3, 12, 24)),
        ):
            args = qkv(q, k, v)
            mask = torch.randn(6, 1, 12)
            want = TF.scaled_dot_product_attention(*args, mask, enable_gqa=True)
            assert sqnr(sdpa(*args, mask, enable_gqa=True), want) > 34

    def test_causal_and_scale(self) -> None:
        args = qkv(*USUAL)
        for options in ({"is_causal": True}, {"scale": 0.5}, {"is_causal": True, "scale": 1}):
            want = TF.scaled_dot_product_attention(*args, **options)
            assert sqnr(sdpa(*args, **options), want) > 33

    def test_layout_of_the_result(self) -> None:
        """Heads are joined without a copy."""
        y = sdpa(*qkv(*USUAL))
        assert y.transpose(1, 2).flatten(2).data_ptr() == y.data_ptr()

    def test_autocast(self) -> None:
        args = qkv(*USUAL)
        with torch.autocast("cpu", torch.bfloat16):
            y = sdpa(*args)
        assert same_bits(y, sdpa(*(each.bfloat16() for each in args)))

    def test_torch_func(self) -> None:
        args = qkv(*USUAL)
        mapped = torch.vmap(sdpa)(*args)
        assert same_bits(mapped.contiguous(), sdpa(*args).contiguous())
        got = torch.func.grad(lambda q: sdpa(q, *args[1:]).square().sum())(args[0])
        assert got.shape == args[0].shape
        assert got.any()


class TestErrors:
    def test_words(self) -> None:
        q, k, v = qkv(*USUAL)
        mask = torch.ones(10, 12)
        for args, options, kind, words in (
            ((q, k, v), {"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0, got 0.1"),
            ((q, k, v), {"scheme": "int9"}, ValueError, "scheme must be one of 'int8'"),
            ((q, k, v, mask), {"is_causal": True}, ValueError, "exclude each other"),
            ((q, k[:, :2], v[:, :2]), {}, ValueError, "enable_gqa lets heads of query share"),
            ((q, k[:, :3], v[:, :3]), {"enable_gqa": True}, ValueError, "must be a multiple"),
            ((q, k, v, mask[:, :5]), {}, ValueError, r"must broadcast to \[2, 4, 10, 12\]"),
            ((q, k, v, mask.expand(3, 2, 4, 10, 12)), {}, ValueError, "attn_mask must broadcast"),
            ((q[0, 0, 0], k, v), {}, ValueError, r"must be \[..., L, D\]"),
            ((q, k[..., :8], v), {}, ValueError, r"k must be \[b, g, n, d\] with d = 16"),
            ((q, k.double(), v), {}, TypeError, "k must be torch.float32 as q"),
            ((q, k, v, mask.int()), {}, TypeError, "mask must be one of torch.bool"),
        ):
            with pytest.raises(kind, match=words):
                sdpa(*args, **options)


class Model(nn.Module):
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        y = sdpa(q.transpose(1, 2), k, v, mask, scale=0.3, enable_gqa=True)
        return y.transpose(1, 2).flatten(2) + 1


def inputs(rows: int = 10) -> tuple[torch.Tensor, ...]:
    q, k, v = qkv((2, rows, 4, 16), (2, 2, 12, 16), (2, 2, 12, 16))
    return q, k, v, torch.randn(2, 1, 1, 12)


def nodes(graph: torch.fx.Graph) -> list[Any]:
    return [n for n in graph.nodes if n.target is torch.ops.higher_order.invoke_quant_packed]


class TestGraphs:
    def test_compile(self) -> None:
        model = Model()
        for dynamic in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
            for rows in (10, 1, 13):
                args = inputs(rows)
                assert same_bits(compiled(*args), model(*args))

    def test_heads_of_one_projection(self) -> None:
        """Query, key and value are views of one tensor."""

        def run(x: torch.Tensor) -> torch.Tensor:
            return sdpa(*x.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0))

        x = torch.randn(2, 5, 48, requires_grad=True)
        for backend in ("aot_eager", "inductor"):
            torch._dynamo.reset()
            compiled = torch.compile(run, fullgraph=True, backend=backend)
            with torch.no_grad():
                assert same_bits(compiled(x), run(x))
            got, want = (torch.autograd.grad(each(x).sum(), x)[0] for each in (compiled, run))
            torch.testing.assert_close(got, want)
        exported = torch.export.export(nn_of(run), (x.detach(),), strict=True)
        assert same_bits(exported.module()(x.detach()), run(x).detach())

    def test_gradients_in_a_compiled_graph(self) -> None:
        compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
        *args, mask = inputs()
        for each in args:
            each.requires_grad_()
        for wanted in (args, args[1:2]):
            for each in args:
                each.requires_grad_(any(each is one for one in wanted))
            got = torch.autograd.grad(compiled(*args, mask).square().sum(), wanted)
            want = torch.autograd.grad(Model()(*args, mask).square().sum(), wanted)
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other)
        with pytest.raises(Exception, match="no gradient with respect to mask"):
            compiled(*args, mask.requires_grad_())

    @parameterized.expand([(True,), (False,)])
    def test_export(self, strict: bool) -> None:
        rows = torch.export.Dim("rows", min=1, max=512)
        program = torch.export.export(
            Model(), inputs(), strict=strict, dynamic_shapes=({1: rows}, None, None, None)
        )
        (node,) = nodes(program.graph)
        assert node.kwargs["scheme"] == "int8"
        region = getattr(program.graph_module, node.args[0].target)
        called = [n.target for n in region.graph.nodes if n.op == "call_function"]
        assert called == [OPS["int8_attention"].overload]
        for args in (inputs(), inputs(3)):
            assert same_bits(program.module()(*args), Model()(*args))

    def test_meta(self) -> None:
        args = [each.to("meta") for each in inputs()]
        assert Model()(*args).shape == (2, 10, 64)
