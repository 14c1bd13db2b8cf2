"""`GroupedLinear`, `QGroupedLinear` and `ObservedGroupedLinear`."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from parameterized import parameterized
from torch import nn

import qnn
from qnn.kernels import SCHEMES
from qnn.passes import regions

from .common import same_bits
from .test_grouped import SOME, E, K, N, ends, grid

DYNAMIC = [name for name, scheme in SCHEMES.items() if not scheme.static]


def layers(scheme: str, bias: bool = True) -> tuple[qnn.GroupedLinear, qnn.QGroupedLinear]:
    torch.manual_seed(0)
    layer = qnn.GroupedLinear(E, K, N, bias)
    return layer, qnn.QGroupedLinear.from_float(layer, scheme)


X = torch.randn(10, K, generator=torch.Generator().manual_seed(1))
OFFSETS = ends(3, 3, 8, 9)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> Any:
        return self.layer(x, offsets)


class TestFloatLayer:
    def test_is_a_linear_layer_for_each_group(self) -> None:
        layer, _ = layers("int8")
        want, begin = torch.zeros(10, N), 0
        for e, end in enumerate(OFFSETS.tolist()):
            want[begin:end] = nn.functional.linear(X[begin:end], layer.weight[e], layer.bias[e])
            begin = end
        torch.testing.assert_close(layer(X, OFFSETS), want)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X, OFFSETS), want)


class TestLayer:
    @parameterized.expand(itertools.product(DYNAMIC, (True, False)))
    def test_stands_for_the_float_one(self, scheme: str, bias: bool) -> None:
        layer, small = layers(scheme, bias)
        model = qnn.convert(nn.ModuleList([layer]), scheme)
        assert type(model[0]) is qnn.QGroupedLinear
        y = small(X, OFFSETS)
        assert same_bits(y, model[0](X, OFFSETS))
        assert qnn.sqnr(layer(X, OFFSETS), y) > 15
        back = small.dequantize()
        assert torch.equal(back.weight, small.weight.clone())
        assert qnn.sqnr(back(X, OFFSETS), y) > (15 if SCHEMES[scheme].activation else 90)
        again = qnn.QGroupedLinear.from_float(layer.weight, scheme, bias=layer.bias)
        assert same_bits(again(X, OFFSETS), y)
        assert "a call for each group" in repr(small)

    @parameterized.expand(SCHEMES)
    def test_state(self, scheme: str) -> None:
        layer, small = layers(scheme)
        if SCHEMES[scheme].static:
            with pytest.raises(RuntimeError, match="not calibrated"):
                small(X, OFFSETS)
            for name, value in grid(scheme).items():
                setattr(small, name, nn.Parameter(value, requires_grad=False))
        y = small(X, OFFSETS)
        state = small.state_dict()
        assert all(tensor.shape[0] == E for name, tensor in state.items() if "input" not in name)
        fresh = qnn.QGroupedLinear(E, K, N, scheme=scheme)
        fresh.load_state_dict(state)
        empty = qnn.QGroupedLinear(E, K, N, scheme=scheme, device="meta")
        empty.load_state_dict(state, assign=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        read = qnn.QGroupedLinear(E, K, N, scheme=scheme)
        read.load_state_dict(torch.load(buffer, weights_only=True))
        others = [fresh, empty, read, copy.deepcopy(small)]
        if scheme.startswith("int"):  # torch pickles no storage of float8
            others.append(pickle.loads(pickle.dumps(small)))
        for other in others:
            assert same_bits(other(X, OFFSETS), y)
        if not SCHEMES[scheme].static:
            floats = qnn.QGroupedLinear(E, K, N, scheme=scheme)
            floats.load_state_dict(layer.state_dict())
            assert same_bits(floats(X, OFFSETS), y)
        with pytest.raises(RuntimeError, match=r"truncated|has a"):
            fresh.load_state_dict({k: v for k, v in state.items() if not k.endswith("_scale")})

    def test_casts(self) -> None:
        _, small = layers("int8")
        half = copy.deepcopy(small).to(torch.bfloat16)
        assert half.weight_scale.dtype == torch.float32
        assert half.bias.dtype == half.weight.dtype == torch.bfloat16
        y = half(X.bfloat16(), OFFSETS)
        assert y.dtype == torch.bfloat16
        assert qnn.sqnr(small(X, OFFSETS), y.float()) > 30

    def test_the_weight_reads_as_floats_and_takes_writes(self) -> None:
        _, small = layers("int8")
        before = small(X, OFFSETS)
        assert small.weight.shape == (E, N, K)
        assert small.weight.dtype == torch.float32
        small.weight = small.weight * 2
        torch.testing.assert_close(small(X, OFFSETS)[3:8] + small.bias[2], 2 * before[3:8])
        with torch.no_grad():
            small.weight.zero_()
        assert torch.equal(small(X, OFFSETS)[3:8], small.bias[2].expand(5, N))
        with pytest.raises(TypeError, match="quantised"):
            small.requires_grad_()

    @parameterized.expand(
        [
            ((X[None], OFFSETS), ValueError, "the input must be \\[rows, 128\\]"),
            ((X[:, 1:], OFFSETS), ValueError, "the input must be \\[rows, 128\\]"),
            ((X.int(), OFFSETS), TypeError, "the input must be float32"),
            ((X, OFFSETS.long()), ValueError, "offsets must be int32 \\[4\\]"),
            ((X, OFFSETS[1:]), ValueError, "offsets must be int32 \\[4\\]"),
            ((X, [3, 3, 8, 9]), TypeError, "offsets must be a tensor"),
            ((X, OFFSETS + 9), ValueError, "from 0 to at most 10"),
        ]
    )
    def test_what_it_cannot_take(self, given: Any, error: type[Exception], words: str) -> None:
        _, small = layers("int8")
        with pytest.raises(error, match=words):
            small(*given)

    def test_sizes_that_it_cannot_have(self) -> None:
        with pytest.raises(ValueError, match="num_groups must be an integer of at least 1, got 0"):
            qnn.QGroupedLinear(0, 4, 4)
        with pytest.raises(ValueError, match="multiple of 16, got 8"):
            qnn.QGroupedLinear(2, 8, 4, scheme="nvfp4")
        with pytest.raises(TypeError, match=r"a weight \[E, N, K\], got Tensor \[2, 3\]"):
            qnn.QGroupedLinear.from_float(torch.randn(2, 3))
        with pytest.raises(ValueError, match=r"bias must be \[2, 3\]"):
            qnn.QGroupedLinear.from_float(torch.randn(2, 3, 4), bias=torch.randn(3))
        with pytest.raises(ValueError, match="NaN"):
            qnn.QGroupedLinear.from_float(torch.full((2, 3, 4), torch.nan))

    @parameterized.expand(SOME)
    def test_export(self, scheme: str) -> None:
        """One node, and the same bits."""
        _, small = layers(scheme)
        program = torch.export.export(small, (X, OFFSETS), strict=scheme == "int8")
        (region,) = regions(program)
        assert (region.op.name, region.scheme) == (SCHEMES[scheme].op("grouped_linear"), scheme)
        assert same_bits(program.module()(X, OFFSETS), small(X, OFFSETS))

    @parameterized.expand(["int8", "fp8_tensor"])
    def test_nothing_is_compiled_anew(self, scheme: str) -> None:
        """For other rows and offsets."""
        _, small = layers(scheme)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(small, backend=counter, fullgraph=True)
        for rows in (10, 7, 3, 5):
            x, offsets = X[:rows], OFFSETS.clamp(max=rows)
            assert same_bits(compiled(x, offsets), small(x, offsets))
        assert counter.frame_count <= 2

    def test_inductor(self) -> None:
        _, small = layers("int8")
        compiled = torch.compile(lambda x, o: small(x.relu(), o).relu(), fullgraph=True)
        assert same_bits(compiled(X, OFFSETS), small(X.relu(), OFFSETS).relu())

    def test_trace(self) -> None:
        _, small = layers("int8")
        traced = torch.fx.symbolic_trace(Around(small))
        assert [node.op for node in traced.graph.nodes].count("call_module") == 1
        assert same_bits(traced(X, OFFSETS), small(X, OFFSETS))

    def test_summary_and_reasons(self) -> None:
        layer, _ = layers("int8")
        model = nn.ModuleDict({"experts": layer, "linear": nn.Linear(8, 8)})
        row = qnn.summary(qnn.convert(model)).rows[0]
        assert (row.layer, row.scheme, row.shape) == ("QGroupedLinear", "int8", (E, N, K))
        static = qnn.convert(model, "int8_static")
        assert "not calibrated" in (qnn.summary(static).rows[0].backend or "")
        with pytest.raises(ValueError, match="no grouped linear layer that trains"):
            qnn.convert(nn.ModuleList([layer]), "fp8", training=True)


class TestCalibration:
    @parameterized.expand(["int8_static", "int16_static"])
    def test_prepare_calibrate_convert(self, scheme: str) -> None:
        layer, _ = layers("int8")
        model = nn.ModuleList([layer])
        prepared = qnn.prepare(model, scheme)
        assert type(prepared[0]) is qnn.ObservedGroupedLinear
        assert prepared.state_dict().keys() > model.state_dict().keys()
        with pytest.raises(ValueError, match=r"0\.input.*no value was observed|observed"):
            qnn.convert(prepared)
        assert same_bits(prepared[0](X, OFFSETS), layer(X, OFFSETS))
        small = qnn.convert(prepared)[0]
        assert (type(small), small.scheme) == (qnn.QGroupedLinear, scheme)
        y = small(X, OFFSETS)
        assert qnn.sqnr(layer(X, OFFSETS), y) > (38 if "16" in scheme else 28)
        program = torch.export.export(small, (X, OFFSETS), strict=False)
        assert [region.scheme for region in regions(program)] == [scheme]
        assert same_bits(program.module()(X, OFFSETS), y)
        fresh = qnn.QGroupedLinear(E, K, N, scheme=scheme)
        fresh.load_state_dict(small.state_dict())
        assert same_bits(fresh(X, OFFSETS), y)

    def test_rows_of_no_group_take_no_part(self) -> None:
        layer, _ = layers("int8")
        observed = qnn.ObservedGroupedLinear.from_float(layer, qnn.QuantSpec(torch.int8))
        x = X.clone()
        x[9] = 1e4
        want, other = copy.deepcopy(observed), copy.deepcopy(observed)
        want(X[:9], OFFSETS)
        other(x, OFFSETS)
        for a, b in zip(want.input_quantize.qparams(), other.input_quantize.qparams(), strict=True):
            assert torch.equal(a, b)

    def test_training(self) -> None:
        """What is trained is what is converted, to float32's rounding."""
        layer, _ = layers("int8")
        calibrated = qnn.prepare(nn.ModuleList([layer]))
        calibrated[0](X, OFFSETS)
        prepared = qnn.prepare(calibrated, qat=True).train()
        assert prepared[0].qat
        optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            prepared[0](X, OFFSETS).square().mean().backward()
            assert all(p.grad is not None for p in prepared.parameters())
            optimizer.step()
        y = prepared.eval()[0](X, OFFSETS)
        assert qnn.sqnr(y, qnn.convert(prepared)[0](X, OFFSETS)) > 90

    def test_what_it_refuses(self) -> None:
        layer, _ = layers("int8")
        with pytest.raises(TypeError, match=r"takes a qnn.GroupedLinear, got Linear"):
            qnn.ObservedGroupedLinear.from_float(nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"takes a qnn.ObservedGroupedLinear, got GroupedLin"):
            qnn.QGroupedLinear.from_observed(layer)
        with pytest.raises(ValueError, match="must be int8, uint8 or int16"):
            qnn.ObservedGroupedLinear(2, 4, 4, spec=qnn.QuantSpec(torch.uint16))
