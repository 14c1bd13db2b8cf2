"""The schemes `int8_int4`: int8 activations, per token, on int4 weights in groups."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn import functional as F
from qnn.kernels import OPS, SCHEMES
from qnn.kernels.cpu.blocked import by_rows_of_weight
from qnn.kernels.formats.int4 import Int4

from .common import DTYPES, same_bits, sum_bound
from .tiers import need, usable

NAMES = [name for name in SCHEMES if name.startswith("int8_int4")]
# Rows, groups and columns, where tiles, blocks and tails end in different places.
SHAPES = ((1, 1, 1), (1, 3, 63), (5, 2, 64), (37, 5, 19), (101, 4, 37), (13, 33, 17))


def form_of(scheme: str) -> Int4:
    form = SCHEMES[scheme].weight
    assert isinstance(form, Int4)
    return form


def operands(
    scheme: str, m: int, groups: int, n: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """Heavy-tailed rows, a weight with every code, and a bias."""
    torch.manual_seed(m + groups + n)
    k = groups * form_of(scheme).group
    x = (torch.randn(m, k) * torch.randn(m, k).exp()).to(dtype)
    words, *rest = F.quantize(torch.randn(n, k) * torch.randn(n, k).exp(), scheme)
    words.random_(-(2**31), 2**31)
    return x, (words, *rest), torch.randn(n)


class TestRule:
    def test_there_is_one_for_each_int4_format(self) -> None:
        weights = {name.removeprefix("int8_"): SCHEMES[name].weight for name in NAMES}
        named = {name.replace("_weight", ""): s for name, s in SCHEMES.items() if "int4_w" in name}
        assert weights == {name: scheme.weight for name, scheme in named.items()}
        assert len(NAMES) == 6

    @parameterized.expand(NAMES)
    def test_it_is_written_out(self, scheme: str) -> None:
        """Python's integers, and a float32 sum a group after the other."""
        x, (words, sw, *zero), bias = operands(scheme, 3, 4, 5)
        group = form_of(scheme).group
        q, sx = F.quantize(x)
        for row, column in itertools.product(range(3), range(5)):
            total = torch.zeros(())
            for at in range(4):
                acc = 0
                for i in range(at * group, (at + 1) * group):
                    code = int(words[column, i // 8]) >> 4 * (i % 8) & 15
                    acc += int(q[row, i]) * (code - (int(zero[0][column, at]) if zero else 8))
                total = total + torch.tensor(float(acc)) * sw[column, at]
            want = total * sx[row, 0] + bias[column]
            assert F.linear(x, (words, sw, *zero), bias=bias, scheme=scheme)[row, column] == want

    @parameterized.expand(NAMES)
    def test_it_is_the_product_of_what_the_parts_stand_for(self, scheme: str) -> None:
        x, parts, bias = operands(scheme, 20, 3, 33)
        op, w = OPS[SCHEMES[scheme].linear], F.dequantize(parts, scheme=scheme).double()
        rows = F.dequantize(*F.quantize(x)).double()
        got = op.reference(x, *parts, bias, compute=torch.float64)
        sizes = rows.abs() @ w.abs().T + bias.abs()
        assert ((got - (rows @ w.T + bias)).abs() <= sum_bound(sizes, 5)).all()


class TestKernels:
    @pytest.mark.parametrize("tier", ["amx", "avx512_vnni", "avx_vnni", "avx2", "portable"])
    @pytest.mark.parametrize("scheme", NAMES)
    def test_every_tier_is_the_reference(self, tier: str, scheme: str) -> None:
        need(tier)
        op = OPS[SCHEMES[scheme].linear]
        for (m, groups, n), dtype in zip(SHAPES, itertools.cycle(DTYPES), strict=False):
            x, (words, sw, *zero), bias = operands(scheme, m, groups, n, dtype)
            for given in (bias, None):
                got = torch.ops.qnn.cpu_weight_linear(
                    x, words, sw, zero[0] if zero else None, given, op.name, tier
                )
                assert same_bits(got, op.reference(x, words, sw, *zero, given)), (m, groups, n)

    def test_threads_change_no_bit(self) -> None:
        x, parts, bias = operands("int8_int4_g32", 300, 9, 130)
        results, threads = [], torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(F.linear(x, parts, bias=bias, scheme="int8_int4_g32"))
        finally:
            torch.set_num_threads(threads)
        assert all(same_bits(each, results[0]) for each in results)

    @parameterized.expand(NAMES)
    def test_without_the_library(self, scheme: str) -> None:
        """A weight in several blocks of rows."""
        x, parts, bias = operands(scheme, 2, 40, 300)
        op = OPS[SCHEMES[scheme].linear]
        kernel = by_rows_of_weight(op.reference)
        for given in (bias, None):
            assert same_bits(kernel(x, *parts, given), op.reference(x, *parts, given))
        assert same_bits(kernel(x[:0], *parts, bias), op.reference(x[:0], *parts, bias))

    @parameterized.expand(NAMES)
    def test_what_is_not_finite(self, scheme: str) -> None:
        x, parts, bias = operands(scheme, 6, 2, 20)
        x[1, 3], x[2, 4], x[3] = float("nan"), float("-inf"), 0
        y = F.linear(x, parts, bias=bias, scheme=scheme)
        assert y[1].isnan().all()
        assert not y[2].isfinite().any()
        assert y[[0, 4, 5]].isfinite().all()
        assert torch.equal(y[3], bias)


class TestLayer:
    @parameterized.expand(NAMES)
    def test_every_mode(self, scheme: str) -> None:
        torch.manual_seed(1)
        float_layer = nn.Linear(256, 40)
        model = qnn.convert(nn.Sequential(float_layer), scheme)
        x = torch.randn(3, 7, 256)
        y = model(x)
        assert qnn.sqnr(nn.Sequential(float_layer)(x), y) > 15
        assert qnn.sqnr(qnn.convert(nn.Sequential(float_layer), scheme[5:].replace(
            "int4", "int4_weight", 1))(x), y) > 35  # fmt: skip
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        program = torch.export.export(model, (x,), strict=True)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        for run in (compiled, program.module(), copied):
            assert same_bits(run(x), y)
        assert [n.kwargs["scheme"] for n in program.graph.nodes if "scheme" in n.kwargs] == [scheme]
        fresh = qnn.convert(nn.Sequential(nn.Linear(256, 40)), scheme)
        fresh.load_state_dict(model.state_dict())
        assert same_bits(fresh(x), y)
        assert model(x[:0]).shape == (0, 7, 40)
        assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16

    @parameterized.expand(NAMES)
    def test_gradient(self, scheme: str) -> None:
        model = qnn.convert(nn.Linear(256, 24), scheme)
        x = torch.randn(5, 256, requires_grad=True)
        dy = torch.randn(5, 24)
        model(x).backward(dy)
        torch.testing.assert_close(x.grad, dy @ model.weight.dequantize())

    def test_shares_the_file_of_int4_weight(self) -> None:
        """The same tensors: only what the layer does with its input differs."""
        layer = nn.Linear(128, 16)
        weight_only, both = (qnn.convert(layer, s) for s in ("int4_weight", "int8_int4"))
        for name, tensor in weight_only.state_dict().items():
            assert same_bits(both.state_dict()[name], tensor)
        config = qnn.compressed_tensors.quantization_config(nn.Sequential(both))
        (group,) = config["config_groups"].values()
        assert group["weights"]["num_bits"] == 4
        assert group["input_activations"] == {
            "num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True,
        }  # fmt: skip

    def test_the_backend_says_so(self) -> None:
        assert qnn.QLinear(128, 16, scheme="int8_int4")._backend().startswith(f"cpu: {usable()[0]}")

    def test_whole_groups(self) -> None:
        with pytest.raises(ValueError, match="in_features must be a multiple of 64, got 96"):
            qnn.QLinear(96, 16, scheme="int8_int4_g64")
