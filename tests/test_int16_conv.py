"""Convolutions with 16-bit activations: exact sums, modules, graphs, calibration."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
import qnn.functional as F
from qnn.kernels.cpu.conv import float32_sums_of_bytes
from qnn.kernels.reference import conv as reference
from qnn.passes import regions

from .common import DTYPES, examples, same_bits
from .test_conv_ops import Case

STATIC = "int16_static"
BOTH = ("int16", STATIC)
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(6, 8, 4, padding="same"), (6, 9)),
    "2d": (nn.Conv2d(4, 6, 3, 2, (1, 2), padding_mode="reflect"), (4, 7, 8)),
    "2d depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (6, 5, 7)),
    "3d": (nn.Conv3d(2, 3, 2, dilation=2), (2, 4, 5, 4)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 4, 2, groups=2), (6, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (4, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, 2), (2, 3, 2, 3)),
}
EACH = list(itertools.product(LAYERS, BOTH))
SOME = list(zip(LAYERS, itertools.cycle(BOTH)))


def tailed(*shape: int) -> torch.Tensor:
    """Values of which most are far below the largest."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(2).exp()


def drawn(case: str) -> tuple[Any, torch.Tensor]:
    layer, sizes = LAYERS[case]
    return copy.deepcopy(layer).eval(), tailed(2, *sizes)


def converted(model: nn.Module, scheme: str, x: torch.Tensor) -> Any:
    if scheme == "int16":
        return qnn.convert(model, scheme)
    return qnn.convert(qnn.calibrate(qnn.prepare(model, scheme), [x], progress=False))


class TestSums:
    @examples(40, 1000)
    def test_integers_against_float64(self, examples: int) -> None:
        """Codes are the integers themselves; sums go beyond 2^24, and are rounded once."""
        one = torch.ones(1)
        for seed in range(examples):
            case, make = Case(seed), torch.Generator().manual_seed(seed)
            x = torch.randint(-32767, 32768, case.x.shape, generator=make).float()
            if len(x):
                x.flatten(1)[:, 0] = 32767  # the scale of every sample is 1
            bias, case.bias = case.bias, None
            want = case.float64(x).float()
            want = want if bias is None else want + bias.view(-1, *[1] * case.axes)
            case.bias = bias
            assert same_bits(case.call(x, "int16"), want), (seed, vars(case))
            got = case.call(x, STATIC, input_scale=one)
            assert same_bits(got, want), (seed, vars(case))

    @examples(20, 400)
    def test_of_two_planes_of_bytes(self, examples: int) -> None:
        """Where there is no C++ kernel, as for transposed layers."""
        for seed in range(examples):
            draw, make = random.Random(seed), torch.Generator().manual_seed(seed)
            groups, each, taps = draw.choice([1, 2]), draw.randint(1, 300), draw.choice([1, 3, 23])
            shape = 1, groups * each, 1, taps, 3
            q = torch.randint(-32767, 32768, shape, generator=make).to(torch.int16)
            transposed = draw.random() < 0.4
            first = (groups * each, 2) if transposed else (2 * groups, each)
            w = torch.randint(-128, 128, (*first, 1, taps, 3), generator=make).to(torch.int8)
            if draw.random() < 0.5:
                q, w = q.fill_(-32767), w.fill_(-128)
            rest = ([1] * 3, [0] * 6, [1] * 3, groups)
            got = float32_sums_of_bytes(q, None, w, *rest, transposed=transposed)
            want = reference.exact_sums(q, None, w, *rest, transposed=transposed)
            assert torch.equal(got, want.float()), seed

    @parameterized.expand(itertools.product(("2d", "transposed 2d"), BOTH, DTYPES))
    def test_dtypes_and_memory(self, case: str, scheme: str, dtype: torch.dtype) -> None:
        layer, x = drawn(case)
        small, x = converted(layer, scheme, x).to(dtype), x.to(dtype)
        y = small(x)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert torch.equal(y, small(x.float()).to(dtype))
        last = x.to(memory_format=torch.channels_last)
        assert same_bits(small(last), y)
        assert small(last).is_contiguous(memory_format=torch.channels_last)

    @parameterized.expand(EACH)
    def test_a_sample_with_a_nan_or_inf_is_lost_and_no_other(self, case: str, scheme: str) -> None:
        layer, x = drawn(case)
        small = converted(layer, scheme, x)
        clean = small(x)
        for bad in (torch.nan, torch.inf):
            x[1].view(-1)[-1] = bad
            y = small(x)
            assert not y[1].isfinite().any()
            assert same_bits(y[0], clean[0])


class TestLayer:
    @parameterized.expand(SOME)
    def test_every_mode(self, case: str, scheme: str) -> None:
        layer, x = drawn(case)
        small = converted(layer, scheme, x)
        assert type(small).__name__ == "Q" + type(layer).__name__
        y = small(x)
        line = small.dequantize()
        assert qnn.sqnr(line(x), y) > 60  # what 16 bits lose
        assert qnn.sqnr(layer(x), y) > 38  # and 8 bits of the weight
        for run in (
            torch.compile(small, fullgraph=True, backend="aot_eager"),
            pickle.loads(pickle.dumps(copy.deepcopy(small))),
        ):
            assert same_bits(run(x), y)
        program = torch.export.export(small, (x,), strict=case == "2d")
        assert same_bits(program.module()(x), y)
        (region,) = regions(program)
        assert region.scheme == scheme
        kind = "conv_transpose" if layer.transposed else "conv"
        assert region.op.name == f"{scheme}_{kind}"
        fresh = qnn.convert(copy.deepcopy(layer), scheme)
        fresh.load_state_dict(small.state_dict())
        assert same_bits(fresh(x), y)
        assert same_bits(small(x[0]), small(x[:1])[0])
        assert small(x[:0]).shape == (0, *y.shape[1:])

    def test_inductor(self) -> None:
        layer, x = drawn("2d")
        small = nn.Sequential(converted(layer, STATIC, x), nn.ReLU())
        compiled = torch.compile(small, fullgraph=True, dynamic=True)
        for given in (x, torch.cat([x, x])):
            assert same_bits(compiled(given), small(given))

    @parameterized.expand(SOME)
    def test_gradient_to_the_input_and_the_bias(self, case: str, scheme: str) -> None:
        layer, x = drawn(case)
        small = converted(layer, scheme, x)
        line = small.dequantize()
        dy = torch.randn_like(line(x))
        results = []
        for module in (small, line):
            leaves = [x.clone().requires_grad_(), module.bias]
            leaves = [leaf for leaf in leaves if leaf is not None]
            results.append(torch.autograd.grad(module(leaves[0]), leaves, dy))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_state(self) -> None:
        layer, x = drawn("2d")
        small = converted(layer, STATIC, x)
        assert {*small.state_dict()} == {"bias", "weight", "weight_scale", "input_scale"}
        assert "input_scale" not in qnn.convert(layer, "int16").state_dict()
        eight = qnn.convert(qnn.calibrate(qnn.prepare(layer), [x], progress=False))
        with pytest.raises(RuntimeError, match="input_zero_point belongs to another scheme"):
            small.load_state_dict(eight.state_dict())
        with pytest.raises(RuntimeError, match="not calibrated"):
            qnn.QConv2d(4, 6, 3, scheme=STATIC)(x)

    def test_no_limit_of_products(self) -> None:
        assert qnn.QConv1d(20000, 1, 9, device="meta", scheme="int16").in_channels == 20000

    def test_summary(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2))
        rows = qnn.summary(qnn.convert(model, "int16")).rows
        assert [(row.layer, row.scheme) for row in rows] == [
            ("QConv2d", "int16"), ("QConvTranspose2d", "int16"),
        ]  # fmt: skip
        assert rows[0].backend == rows[1].backend


class TestPrepare:
    def test_the_spec_decides(self) -> None:
        layer, x = drawn("1d")
        wide = qnn.QuantSpec(torch.int16, symmetric=True)
        for scheme, parts, want in (
            ("int8_static", {"input": wide}, STATIC),
            (STATIC, {"input": qnn.QuantSpec(torch.uint8)}, "int8_static"),
        ):
            prepared = qnn.prepare(layer, scheme, parts=parts)
            assert torch.equal(prepared(x), layer(x))
            assert qnn.convert(qnn.calibrate(prepared, [x], progress=False)).scheme == want

    def test_training(self) -> None:
        """What is trained is what is converted, to float32's rounding."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 2, 2, 2))
        x = tailed(4, 3, 12)
        prepared = qnn.prepare(model, STATIC, qat=True).train()
        optimizer = torch.optim.SGD(prepared.parameters(), 1e-5)
        for _ in range(3):
            optimizer.zero_grad()
            prepared(x).square().mean().backward()
            optimizer.step()
        want = prepared.eval()(x)
        assert qnn.sqnr(want, qnn.convert(prepared)(x)) > 90

    def test_heavy_tails(self) -> None:
        """As good as int8_weight, where a grid of 8 bits loses most of the input."""
        torch.manual_seed(0)
        model, x = nn.Conv1d(8, 16, 5), tailed(4, 8, 200)
        with torch.no_grad():
            model.weight[:, :, 0] *= 50
        want = model(x)
        alone, sixteen, eight = (
            qnn.sqnr(want, small(x))
            for small in (
                qnn.convert(model, "int8_weight"),
                converted(model, STATIC, x),
                qnn.convert(model, "int8"),
            )
        )
        assert sixteen > alone - 0.5 > eight + 3


def test_functional() -> None:
    x, w = torch.randn(1, 3, 5), (torch.ones(2, 3, 3, dtype=torch.int8), torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match=r"scheme 'int16_static' needs input_scale\.$"):
        F.conv(x, w, scheme=STATIC)
    with pytest.raises(ValueError, match="scheme 'int16' takes no input_scale"):
        F.conv(x, w, input_scale=torch.ones(1), scheme="int16")
    y = F.conv(x, w, input_scale=torch.full((1,), 1e-4), scheme=STATIC)
    assert qnn.sqnr(x.unfold(-1, 3, 1).sum((1, 3))[:, None].expand(-1, 2, -1), y) > 60
