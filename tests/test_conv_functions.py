"""The convolutions as functions: gradients, and every mode of torch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from parameterized import parameterized
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as T
from torch.utils.flop_counter import FlopCounterMode

import qnn.functional as F

from .test_conv_ops import SCHEMES, drawn, grid_of


class Layer(nn.Module):
    """A convolution whose tensors are its own, as those of a module are."""

    def __init__(self, scheme: str, transposed: bool = False, groups: int = 2) -> None:
        super().__init__()
        _, parts, _ = drawn(2, groups)
        w = parts[0].transpose(0, 1).contiguous() if transposed and groups == 1 else parts[0]
        self.function = F.conv_transpose if transposed else F.conv
        self.groups, self.scheme = groups, scheme
        self.register_buffer("w", w)
        outputs = w.shape[1] * groups if transposed else w.shape[0]
        self.register_buffer("sw", torch.rand(outputs, 1, 1, 1) / 64)
        self.bias = nn.Parameter(torch.randn(outputs))
        for name, value in grid_of(scheme).items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = {name: getattr(self, name) for name in grid_of(self.scheme)}
        return self.function(
            x, (self.w, self.sw), None, self.bias, (2, 1), 1, groups=self.groups,
            scheme=self.scheme, **grid,
        )  # fmt: skip

    def float(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if self.function is F.conv:
            w = self.w * self.sw
            return T.conv2d(x, w, bias, (2, 1), 1, 1, self.groups)
        w = self.w * self.sw.view(self.groups, 1, -1, 1, 1).expand(
            -1, self.w.shape[0] // self.groups, -1, -1, -1
        ).flatten(0, 1)
        return T.conv_transpose2d(x, w, bias, (2, 1), 1, 0, self.groups)


class TestGradients:
    @parameterized.expand(itertools.product(SCHEMES, (False, True), (False, True)))
    def test_straight_through(self, scheme: str, transposed: bool, compile_it: bool) -> None:
        layer = Layer(scheme, transposed)
        x = torch.randn(2, layer.w.shape[0] if transposed else 4, 6, 5, requires_grad=True)
        call: Any = (
            torch.compile(layer, fullgraph=True, backend="aot_eager") if compile_it else layer
        )
        y = call(x)
        assert torch.equal(y, layer(x))
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, layer.bias), dy)
        want = torch.autograd.grad(layer.float(x, layer.bias), (x, layer.bias), dy)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    @parameterized.expand([(False,), (True,)])
    def test_to_any_order(self, transposed: bool) -> None:
        layer = Layer("int8", transposed)
        shape = (2, layer.w.shape[0] if transposed else 4, 6, 5)
        results = []
        for call in (layer, lambda x: layer.float(x, layer.bias)):
            torch.manual_seed(1)
            x = torch.randn(shape, requires_grad=True)
            y = call(x)
            # Linear in dy, and to dy again.
            dy = torch.randn(y.shape, requires_grad=True)
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
            (ddy,) = torch.autograd.grad(dx.pow(2).sum(), dy, create_graph=True)
            (d3,) = torch.autograd.grad(ddy.pow(2).sum(), dy)
            results.append((dx, ddy, d3))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)

    def test_forward_mode_and_transforms(self) -> None:
        layer = Layer("int8")
        x, t = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
        _, got = torch.func.jvp(layer, (x,), (t,))
        torch.testing.assert_close(got, layer.float(t, None), rtol=1e-4, atol=1e-4)
        each = torch.vmap(torch.func.grad(lambda one: layer(one[None]).sum()))(x)
        whole = x.clone().requires_grad_()
        layer(whole).sum().backward()
        torch.testing.assert_close(each, whole.grad)
        compiled_grad = torch.compile(
            lambda x: torch.func.grad(lambda x: layer(x).sum())(x), backend="aot_eager"
        )
        torch.testing.assert_close(compiled_grad(x), whole.grad, rtol=1e-4, atol=1e-4)

    def test_of_a_dtype_below_float32(self) -> None:
        layer = Layer("int8")
        x = torch.randn(2, 4, 6, 5).bfloat16().requires_grad_()
        layer(x).float().sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16


class TestModes:
    @parameterized.expand(itertools.product(SCHEMES, (False, True)))
    def test_nothing_is_compiled_again_after_the_second_size(
        self, scheme: str, transposed: bool
    ) -> None:
        layer = Layer(scheme, transposed)
        counter = CompileCounterWithBackend("aot_eager")
        call = torch.compile(layer, fullgraph=True, backend=counter)
        channels = layer.w.shape[0] if transposed else 4
        with torch.no_grad():
            for batch, size in ((2, 6), (3, 8), (5, 9), (4, 13), (7, 21)):
                x = torch.randn(batch, channels, size, size + 1)
                assert torch.equal(call(x), layer(x))
        assert counter.frame_count == 2

    @parameterized.expand(itertools.product(SCHEMES, (False, True)))
    def test_inductor(self, scheme: str, dynamic: bool) -> None:
        layer, x = Layer(scheme), torch.randn(2, 4, 6, 5)
        call = torch.compile(layer, fullgraph=True, dynamic=dynamic)
        last = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            for given in (x, last):
                got, want = call(given), layer(given)
                assert torch.equal(got, want)
                assert got.stride() == want.stride()
        whole = x.clone().requires_grad_()
        got = torch.autograd.grad(call(whole).sum(), whole)
        assert torch.equal(got[0], torch.autograd.grad(layer(whole).sum(), whole)[0])

    @parameterized.expand(itertools.product(SCHEMES, (False, True)))
    def test_export(self, scheme: str, strict: bool) -> None:
        layer, x = Layer(scheme).eval(), torch.randn(2, 4, 6, 5)
        sizes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(layer, (x,), dynamic_shapes=sizes, strict=strict)
        nodes = [n for n in program.graph.nodes if n.kwargs.get("scheme") == scheme]
        assert len(nodes) == 1
        for given in (x, torch.randn(3, 4, 9, 5)):
            assert torch.equal(program.module()(given), layer(given))

    def test_flops(self) -> None:
        for transposed in (False, True):
            layer = Layer("int8", transposed)
            x = torch.randn(2, layer.w.shape[0] if transposed else 4, 6, 5, requires_grad=True)
            counts = []
            for call in (layer, lambda x, layer=layer: layer.float(x, layer.bias)):
                with FlopCounterMode(display=False) as counter:
                    call(x).sum().backward()
                counts.append(counter.get_total_flops())
            assert counts[0] == counts[1] > 0
