"""The schemes `int16` and `int16_static`: 16-bit activations on int8 weights."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn import functional as F
from qnn.kernels import OPS
from qnn.kernels.cpu import int16_linear as python
from qnn.kernels.reference import int16 as reference
from qnn.kernels.reference.recurrent import LSTM

from .common import DTYPES, SIZES, same_bits, weights
from .tiers import need, usable

STATIC = "int16_static"
BOTH = ("int16", STATIC)
WIDE = qnn.QuantSpec(torch.int16, symmetric=True)


def tailed(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values whose median is far below the largest, of both signs."""
    return (torch.randn(shape) * torch.exp(2 * torch.randn(shape))).to(dtype)


def calls() -> Iterator[tuple[Any, ...]]:
    """x, w, sw, sx and bias; sums beyond 32 bits among them, and whole panels of extremes."""
    torch.manual_seed(0)
    sizes = (*SIZES, (3, 9000, 17), (40, 1537, 33))
    for (m, k, n), dtype in zip(sizes, itertools.cycle(DTYPES), strict=False):
        x, (w, sw) = tailed(m, k, dtype=dtype), weights(n, k)
        x[0] = x.abs().max()
        yield x, w, sw, x.abs().max().float().reshape(1) / 20000, torch.randn(n)


def converted(model: nn.Module, scheme: str, x: torch.Tensor) -> Any:
    if scheme != STATIC:
        return qnn.convert(model, scheme)
    return qnn.convert(qnn.calibrate(qnn.prepare(model, scheme), [x]))


class TestRule:
    def test_rows(self) -> None:
        """`int16` is the product with rows on a symmetric grid of 2 · 32767 + 1 steps."""
        x, (w, sw) = torch.tensor([[32767.0, -2.5, 1.5], [0.0, 0.0, 0.0]]) / 4, weights(4, 3)
        q = [32767, -2, 2]  # ties to even
        for n in range(4):
            acc = sum(a * int(b) for a, b in zip(q, w[n].tolist(), strict=True))
            want = torch.tensor(float(acc)) * sw[n, 0] / 4
            assert F.linear(x, w, sw, scheme="int16")[0, n] == want
        assert not F.linear(x, w, sw, scheme="int16")[1].any()

    def test_a_sum_is_rounded_once(self) -> None:
        """Beyond 2³¹, where the sum of two rounded halves would differ."""
        k = 4097
        x = torch.full((1, k), 32767.0)
        w = torch.full((1, k), 127, dtype=torch.int8)
        w[0, -1], one = 1, torch.ones(1, 1)
        exact = 32767 * (127 * (k - 1) + 1)
        assert exact > 2**31
        want = torch.tensor(float(exact), dtype=torch.float64).float()
        assert F.linear(x, w, one, scheme="int16").item() == want.item()

    def test_no_row_is_too_long(self) -> None:
        layer = qnn.QLinear(300_000, 2, bias=False, scheme="int16")
        layer.weight = torch.ones(2, 300_000)
        assert layer(torch.ones(1, 300_000)).tolist() == [[300_000.0] * 2]


class TestKernels:
    @pytest.mark.parametrize("tier", ["amx", "avx512_vnni", "avx_vnni", "avx2", "portable"])
    def test_every_tier_is_the_reference(self, tier: str) -> None:
        need(tier)
        for x, w, sw, sx, bias in calls():
            for given in (bias, None):
                got = torch.ops.qnn.cpu_linear(x, w, sw, given, None, "none", "int16", tier)
                assert same_bits(got, reference.linear_reference(x, w, sw, given))
                got = torch.ops.qnn.cpu_static_linear(x, w, sw, sx, None, given, None, "none", tier)
                assert same_bits(got, reference.static_linear_reference(x, w, sw, sx, given))

    def test_epilogue(self) -> None:
        for (x, w, sw, sx, bias), name in zip(calls(), itertools.cycle(("relu", "none"))):
            residual = torch.randn(x.shape[0], w.shape[0]).to(x.dtype)
            for op, grid in ((OPS["int16_linear"], ()), (OPS["int16_static_linear"], (sx,))):
                given = (x, w, sw, *grid, bias, residual, name)
                assert same_bits(op.call(*given), op.reference(*given))

    def test_without_the_library(self) -> None:
        """A weight in several blocks of rows."""
        x, (w, sw), bias, sx = tailed(3, 2000), weights(700, 2000), torch.randn(700), torch.ones(1)
        residual = torch.randn(3, 700)
        for kernel, of, grid in (
            (python.linear, reference.linear_reference, ()),
            (python.static_linear, reference.static_linear_reference, (sx / 50,)),
        ):
            for rest in ((bias,), (None,), (bias, residual, "relu"), (None, residual, "none")):
                assert same_bits(kernel(x, w, sw, *grid, *rest), of(x, w, sw, *grid, *rest))
            assert same_bits(kernel(x[:0], w, sw, *grid, bias), of(x[:0], w, sw, *grid, bias))

    @parameterized.expand(BOTH)
    def test_what_is_not_finite(self, scheme: str) -> None:
        x, (w, sw) = torch.randn(5, 37), weights(9, 37)
        x[1, 3], x[2, 4] = float("nan"), float("-inf")
        grid = torch.full((1,), 1e-3) if scheme == STATIC else None
        y = F.linear(x, w, sw, input_scale=grid, scheme=scheme)
        assert not y[1:3].isfinite().any()
        assert y[[0, 3, 4]].isfinite().all()
        if grid is not None:
            for bad in (0.0, float("nan"), float("inf")):
                y = F.linear(x, w, sw, input_scale=grid * bad, scheme=scheme)
                assert y.isnan().all()

    def test_the_grid_is_asked_for(self) -> None:
        x, (w, sw), one = torch.randn(2, 8), weights(3, 8), torch.ones(1)
        zero = torch.zeros(1, dtype=torch.int8)
        with pytest.raises(ValueError, match=r"scheme 'int16_static' needs input_scale\.$"):
            F.linear(x, w, sw, scheme=STATIC)
        with pytest.raises(ValueError, match="needs input_scale alone"):
            F.linear(x, w, sw, input_scale=one, input_zero_point=zero, scheme=STATIC)
        with pytest.raises(ValueError, match="scheme 'int16' takes no input_scale"):
            F.linear(x, w, sw, input_scale=one, scheme="int16")


class TestLinear:
    @parameterized.expand(itertools.product(BOTH, (True, False)))
    def test_every_mode(self, scheme: str, bias: bool) -> None:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(48, 96, bias), nn.ReLU(), nn.Linear(96, 32, bias)).eval()
        x = tailed(5, 3, 48)
        small = converted(model, scheme, x)
        y = small(x)
        assert qnn.sqnr(model(x), y) > 38
        compiled = torch.compile(small, fullgraph=True, dynamic=True)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(small)))
        for run in (compiled, torch.export.export(small, (x,), strict=True).module(), copied):
            assert same_bits(run(x), y)
        fresh = qnn.convert(copy.deepcopy(model), scheme)
        fresh.load_state_dict(small.state_dict())
        assert same_bits(fresh(x), y)
        assert small(x[:0]).shape == (0, 3, 32)
        assert small.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16

    def test_state(self) -> None:
        layer = converted(nn.Linear(8, 4), STATIC, torch.randn(9, 8))
        assert set(layer.state_dict()) == {"bias", "weight", "weight_scale", "input_scale"}
        eight = qnn.convert(qnn.calibrate(qnn.prepare(nn.Linear(8, 4)), [torch.randn(9, 8)]))
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="input_zero_point belongs to another scheme"):
                layer.load_state_dict(eight.state_dict(), strict=strict)
            with pytest.raises(RuntimeError, match="input_scale belongs to another scheme"):
                qnn.QLinear(8, 4, scheme="int16").load_state_dict(layer.state_dict(), strict=strict)

    def test_it_describes_itself(self) -> None:
        for scheme, strategy in zip(BOTH, ("token", "tensor"), strict=True):
            model = converted(nn.Sequential(nn.Linear(8, 4)), scheme, torch.randn(9, 8))
            (group,) = qnn.compressed_tensors.quantization_config(model)["config_groups"].values()
            assert group["input_activations"] == {
                "num_bits": 16, "type": "int", "strategy": strategy, "symmetric": True,
                "dynamic": scheme == "int16",
            }  # fmt: skip
            assert group["format"] == "int-quantized"

    def test_the_backend_says_so(self) -> None:
        assert qnn.QLinear(8, 4, scheme="int16")._backend().startswith(f"cpu: {usable()[0]}")

    def test_gradient(self) -> None:
        x, dy = torch.randn(5, 24), torch.randn(5, 7)
        for scheme in BOTH:
            layer = converted(nn.Linear(24, 7), scheme, x)
            leaf = x.clone().requires_grad_()
            layer(leaf).backward(dy)
            torch.testing.assert_close(leaf.grad, dy @ layer.weight.dequantize())


class TestPrepare:
    def test_the_spec_decides(self) -> None:
        """A layer is what its input is observed as, whatever the scheme of the call."""
        x = torch.randn(20, 8)
        for scheme, parts, want in (
            ("int8_static", None, "int8_static"),
            (STATIC, None, STATIC),
            ("int8_static", {"input": WIDE}, STATIC),
            (STATIC, {"input": qnn.QuantSpec(torch.uint8)}, "int8_static"),
        ):
            prepared = qnn.prepare(nn.Linear(8, 4), scheme, parts=parts)
            assert qnn.convert(qnn.calibrate(prepared, [x])).scheme == want

    def test_training(self) -> None:
        """What is trained is what is converted, to float32's rounding."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))
        x, y = tailed(64, 12), torch.randn(64, 3)
        calibrated = qnn.calibrate(qnn.prepare(model, STATIC), [x])
        prepared = qnn.prepare(calibrated, STATIC, qat=True).train()
        assert prepared[0].input_quantize.spec.observer == "moving_average"
        optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            (prepared(x) - y).square().mean().backward()
            optimizer.step()
        want = prepared.eval()(x)
        assert qnn.sqnr(want, qnn.convert(prepared)(x)) > 90

    @parameterized.expand(
        [
            (qnn.QuantSpec(torch.int16), "has no zero point"),
            (qnn.QuantSpec(torch.int16, symmetric=True, qmin=-99, qmax=99), "uses all of"),
            (qnn.QuantSpec(torch.uint16), "must be int8, uint8 or int16"),
        ]
    )
    def test_specs_without_a_form(self, spec: qnn.QuantSpec, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            qnn.ObservedLinear(4, 4, spec=spec)

    def test_schemes_without_grids(self) -> None:
        with pytest.raises(ValueError, match=r"'int8_static' or 'int16_static'.*got 'int16'"):
            qnn.prepare(nn.Linear(4, 4), "int16")


class TestRecurrent:
    @pytest.mark.parametrize("tier", ["amx", "avx512_vnni", "avx_vnni", "avx2", "portable"])
    def test_long_sums(self, tier: str) -> None:
        """More than 256 pairs of codes; `test_recurrent_kernels` has all other sizes."""
        need(tier)
        torch.manual_seed(0)
        inputs, hidden, batch = 1300, 530, 3
        (w_ih, sw_ih), (w_hh, sw_hh) = weights(4 * hidden, inputs), weights(4 * hidden, hidden)
        x = torch.ones(2, batch, inputs)
        x[:, 1] = torch.randn(2, inputs)
        h, c = torch.ones(batch, hidden), torch.randn(batch, hidden)
        args = (x, h, c, w_ih, sw_ih * 1e-3, w_hh, sw_hh * 1e-3)
        got = torch.ops.qnn.cpu_recurrent(*args, *[None] * 6, "forward", False, tier, 1, True)
        assert same_bits(got, OPS["int16_lstm"].reference(*args, *[None] * 5, "forward"))

    @parameterized.expand([("input",), ("hidden_state",), ("input", "hidden_state")])
    def test_bits_are_chosen_by_part(self, *wide: str) -> None:
        """The input in 16 bits and the state in 8, or the other way round."""
        torch.manual_seed(1)
        lstm, x = nn.LSTM(12, 20), torch.randn(30, 4, 12)
        prepared = qnn.prepare(lstm, parts=dict.fromkeys(wide, WIDE))
        layer = qnn.convert(qnn.calibrate(prepared, [x]))
        assert layer.scheme == STATIC
        table = dict(zip(LSTM.parts, layer.table_l0.tolist(), strict=True))
        for part in ("input", "hidden_state"):
            steps = table[part][3] - table[part][2]
            assert steps == (65534 if part in wide else 255)
        assert qnn.sqnr(lstm(x)[0], layer(x)[0]) > 30

    def test_all_of_eight_bits_is_int8_static(self) -> None:
        prepared = qnn.prepare(nn.GRU(4, 5), STATIC, parts=qnn.parts.DEFAULT)
        assert qnn.convert(qnn.calibrate(prepared, [torch.randn(9, 2, 4)])).scheme == "int8_static"

    def test_a_grid_that_no_product_takes(self) -> None:
        layer = converted(nn.LSTM(4, 5), STATIC, torch.randn(9, 2, 4))
        state = layer.state_dict()
        for row in ((1e-3, -32768.0, -32768.0, 32767.0), (1e-3, 0.0, -32768.0, 32767.0)):
            state["table_l0"][0] = torch.tensor(row)
            with pytest.raises(RuntimeError, match=r"input enters an integer product.*-32767 to"):
                layer.load_state_dict(state)
        for spec in (qnn.QuantSpec(torch.int16), qnn.QuantSpec(torch.uint16), None):
            with pytest.raises(ValueError, match="int16 with symmetric=True"):
                qnn.prepare(nn.LSTM(4, 5), parts={"input": spec})

    def test_a_table_of_the_other_scheme(self) -> None:
        """The grids of 8 bits are grids of int16_static; those of 16 are none of int8_static."""
        lstm, x = nn.LSTM(4, 5), torch.randn(9, 2, 4)
        eight, sixteen = (converted(lstm, s, x) for s in ("int8", STATIC))
        eight = qnn.convert(qnn.calibrate(qnn.prepare(lstm), [x]))
        with pytest.raises(RuntimeError, match="must have 8 bits"):
            eight.load_state_dict(sixteen.state_dict())
        sixteen.load_state_dict(eight.state_dict())
        assert same_bits(sixteen(x)[0], eight(x)[0])


def spectra() -> torch.Tensor:
    """Like power spectra: the median is a thousandth of the largest, and channels differ."""
    x = torch.exp(2.5 * torch.randn(8, 60, 40))
    x = x / x.max() * 2
    x[..., 20:] *= 0.02
    return x


@parameterized.expand([(nn.LSTM,), (nn.GRU,)])
def test_accuracy_on_heavy_tails(cell: Any) -> None:
    """As int8_weight, where grids of 8 bits lose most of the input."""
    torch.manual_seed(0)
    model = cell(40, 64, 2, batch_first=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight_ih_l0" in name:
                parameter.mul_(20)
                parameter[:, 20:].mul_(20)  # a network that listens to the small values too
    x = spectra()
    want = model(x)[0].detach()

    def measured(layer: nn.Module) -> tuple[float, float]:
        y = layer(x)[0].detach()
        cosine = torch.cosine_similarity(y.flatten(1), want.flatten(1)).mean()
        return float(cosine), qnn.sqnr(want, y)

    alone = measured(qnn.convert(model, "int8_weight"))
    with pytest.warns(qnn.CalibrationWarning, match="int16_static"):
        eight = measured(qnn.convert(qnn.calibrate(qnn.prepare(model), [x])))
    for scheme in BOTH:
        cosine, noise = measured(converted(model, scheme, x))
        assert cosine > alone[0] - 0.002
        assert noise > alone[1] - 0.5
        assert noise > eight[1] + 5
