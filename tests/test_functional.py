from __future__ import annotations

import pytest
import torch
from parameterized import parameterized

import qnn
import qnn.functional as F

from .common import sum_bound


class TestQuantize:
    @parameterized.expand([("int8",), ("int8_weight",)])
    def test_sqnr_of_normal_data(self, scheme: str) -> None:
        """8 bits on rows of 512 normal values: 10 log10(12 · 127² / amax²), about 41.6 dB less."""
        x = torch.randn(256, 512)
        q, scale = F.quantize(x, scheme)
        amax = x.abs().amax(-1)
        theory = 10 * torch.log10(12 * 127**2 / amax.square().mean()).item()
        assert qnn.sqnr(x, F.dequantize(q, scale)) == pytest.approx(theory, abs=0.3)

    def test_no_gradient_flows(self) -> None:
        x = torch.randn(3, 4, requires_grad=True)
        q, scale = F.quantize(x)
        assert not scale.requires_grad
        assert not F.dequantize(q, scale).requires_grad

    def test_unknown_scheme(self) -> None:
        for call in (
            lambda: F.quantize(torch.ones(1, 1), "x"),
            lambda: F.linear(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), scheme="x"),
        ):
            with pytest.raises(ValueError, match="the known schemes are 'int8'"):
                call()


class TestLinear:
    @parameterized.expand([("int8", 37.0), ("int8_weight", 41.0)])
    def test_sqnr(self, scheme: str, least: float) -> None:
        x, w = torch.randn(256, 512), torch.randn(384, 512)
        q, scale = F.quantize(w, scheme)
        y = F.linear(x, q, scale, scheme=scheme)
        assert qnn.sqnr(x.double() @ w.double().T, y) > least

    @parameterized.expand([(torch.float32,), (torch.bfloat16,), (torch.float16,)])
    def test_input_gradient_errs_by_its_roundings(self, dtype: torch.dtype) -> None:
        q, scale = F.quantize(torch.randn(384, 512))
        x = torch.randn(64, 512, dtype=dtype, requires_grad=True)
        dy = torch.randn(64, 384, dtype=dtype)
        F.linear(x, q, scale).backward(dy)
        assert x.grad is not None
        w = q.double() * scale.double()
        error = (x.grad.double() - dy.double() @ w).abs()
        # The weight is rounded to the dtype, the sum over 384 to float32, and the result again.
        sizes = dy.double().abs() @ w.abs()
        roundings = torch.finfo(dtype).eps * (8 * (dy.double().square() @ w.square()).sqrt())
        limit = sum_bound(sizes, 384) + roundings
        assert bool((error <= limit).all()), (error / limit).max()

    def test_bias_of_another_dtype_gets_its_gradient_in_it(self) -> None:
        q, scale = F.quantize(torch.randn(8, 4))
        bias = torch.zeros(8, requires_grad=True)
        y = F.linear(torch.randn(3, 4, dtype=torch.bfloat16), q, scale, bias)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert bias.grad is not None
        assert (bias.grad.dtype, bias.grad.tolist()) == (torch.float32, [3.0] * 8)

    def test_rank_one_and_empty_with_gradients(self) -> None:
        q, scale = F.quantize(torch.randn(8, 4))
        bias = torch.zeros(8, requires_grad=True)
        for shape in ((4,), (0, 4), (2, 0, 4)):
            x = torch.randn(shape, requires_grad=True)
            F.linear(x, q, scale, bias).sum().backward()
            assert x.grad is not None
            assert x.grad.shape == shape

    def test_a_distributed_tensor_is_refused_by_name(self) -> None:
        class Placed(torch.Tensor):
            placements = ()

        q, scale = F.quantize(torch.randn(8, 4))
        for name, given in (
            ("x", (torch.randn(3, 4).as_subclass(Placed), q, scale)),
            ("weight", (torch.randn(3, 4), q.as_subclass(Placed), scale)),
        ):
            with pytest.raises(ValueError, match=rf"scheme='int8'\): {name} is a DTensor"):
                F.linear(*given)

    def test_a_global_scale_where_there_is_one_and_only_there(self) -> None:
        x, (q, scale) = torch.randn(3, 16), F.quantize(torch.randn(8, 16))
        named = r"is \(weight, weight_scale\), .*got 3 tensors, .*weight_global_scale"
        with pytest.raises(ValueError, match=f"scheme 'int8' {named}"):
            F.linear(x, q, scale, weight_global_scale=torch.ones(1))
        packed = F.quantize(torch.randn(8, 16), "nvfp4_weight")
        named = r"is \(weight_packed, weight_scale, weight_global_scale\), .*got 2 tensors"
        for given in (packed[:2], (packed[:2],)):
            with pytest.raises(ValueError, match=f"scheme 'nvfp4_weight' {named}"):
                F.linear(x, *given, scheme="nvfp4_weight")
            with pytest.raises(ValueError, match=f"scheme 'nvfp4_weight' {named}"):
                F.dequantize(*given, scheme="nvfp4_weight")
        want = F.linear(x, *packed[:2], weight_global_scale=packed[2], scheme="nvfp4_weight")
        assert torch.equal(F.linear(x, packed, scheme="nvfp4_weight"), want)
