"""Quantised convolutions in graphs, and their gradients."""

from __future__ import annotations

import torch
from parameterized import parameterized
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qnn
from qnn.passes import regions

from .test_qconv import SCHEMES, converted, image, plain


class TestGraphs:
    @parameterized.expand(
        [
            ("1d same", "int8", False),
            ("2d reflect", "int8_static", True),
            ("transposed 2d", "int8_weight", False),
        ]
    )
    def test_compiled_and_exported(self, case: str, scheme: str, strict: bool) -> None:
        x = image(case)
        small = converted(plain(case), scheme, x)
        want = small(x)
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want)
        exported = torch.export.export(small, (x,), strict=strict)
        assert torch.equal(exported.module()(x), want)
        (region,) = regions(exported)
        assert region.scheme == scheme

    def test_dynamic_sizes(self) -> None:
        torch._dynamo.reset()
        small = qnn.convert(nn.Sequential(plain("2d"), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, 2)))
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(small, fullgraph=True, backend=counter, dynamic=True)
        for b, h, w in ((2, 9, 10), (3, 17, 8), (4, 12, 31)):
            x = torch.randn(b, 3, h, w)
            assert torch.equal(compiled(x), small(x))
        assert counter.frame_count == 1

    def test_inductor(self) -> None:
        torch._dynamo.reset()
        small, x = qnn.convert(nn.Sequential(plain("2d"), nn.ReLU())), image("2d")
        assert torch.equal(torch.compile(small, fullgraph=True)(x), small(x))

    @parameterized.expand([("1d",), ("2d circular",), ("3d",), ("transposed 1d",)])
    def test_gradient_to_the_input(self, case: str) -> None:
        for scheme in SCHEMES:
            x = image(case).requires_grad_()
            small = converted(plain(case), scheme, image(case))
            line = small.dequantize()
            dy = torch.randn_like(line(x))
            (want,) = torch.autograd.grad(line(x), x, dy)
            runs = [small]
            if (case, scheme) in (("2d circular", "int8"), ("transposed 1d", "int8_static")):
                runs.append(torch.compile(small, fullgraph=True, backend="aot_eager"))
            for run in runs:
                (got,) = torch.autograd.grad(run(x), x, dy)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_gradient_to_the_bias(self) -> None:
        for case in ("2d", "transposed 1d"):
            small = qnn.convert(plain(case))
            y = small(image(case))
            y.sum().backward()
            count = float(y.numel() / y.shape[1])
            torch.testing.assert_close(small.bias.grad, torch.full_like(small.bias, count))

    def test_leaves_of_symbolic_trace_and_jit_trace(self) -> None:
        x = image("2d")
        for module in (qnn.convert(plain("2d")), qnn.prepare(plain("2d"))):
            model = nn.Sequential(module, nn.ReLU())
            graph = torch.fx.symbolic_trace(model)
            assert [n.op for n in graph.graph.nodes][1:3] == ["call_module", "call_module"]
            assert torch.equal(graph(x), model(x))
        traced = torch.jit.trace(qnn.convert(nn.Sequential(plain("2d"))), x)
        assert torch.equal(traced(x + 1), qnn.convert(nn.Sequential(plain("2d")))(x + 1))

    def test_meta(self) -> None:
        with torch.device("meta"):
            model = qnn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2)))
            y = model(torch.empty(2, 3, 8, 8, dtype=torch.bfloat16))
        assert (y.shape, y.dtype, y.device.type) == ((2, 2, 7, 7), torch.bfloat16, "meta")

    def test_operations_are_counted(self) -> None:
        for case in ("2d depthwise", "transposed 1d"):
            counts = []
            for module in (plain(case), qnn.convert(plain(case))):
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    module(image(case))
                counts.append(counter.get_total_flops())
            assert counts[0] == counts[1]

    def test_autocast(self) -> None:
        small, x = qnn.convert(plain("2d")), image("2d")
        with torch.autocast("cpu", torch.bfloat16):
            assert small(x).dtype == torch.bfloat16
