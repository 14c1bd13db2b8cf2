"""Layers of other libraries that are linear: transformers' Conv1D, and look-alikes of nn.Linear."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.integrations.compressed_tensors import quantization_config
from qnn.kernels import SCHEMES
from qnn.nn.linear.quantized import QLinear

from .common import same_bits

TRANSFORMERS = importlib.util.find_spec("transformers") is not None
WITHOUT_DATA = [name for name, scheme in SCHEMES.items() if not scheme.static]
TRAINED = [name for name, scheme in SCHEMES.items() if scheme.training is not None]


class Same(nn.Linear):
    """Only its class differs."""

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Other(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class TestSubclasses:
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"block": nn.ModuleDict({"same": Same(32, 8), "other": Other(32, 8)})}
        )
        model["plain"] = nn.Linear(32, 8)
        for parameter in model["block"].parameters():
            nn.init.normal_(parameter)
        return model

    @parameterized.expand(
        [
            ("type", Same, True),
            ("name", "block.same", True),
            ("wildcards", "*.sa?e", True),
            ("callable", lambda _, m: isinstance(m, Same), True),
            ("its parent", "block", False),
            ("its parent's type", nn.ModuleDict, False),
            ("all", "*", False),
            ("nn.Linear", nn.Linear, False),
        ]
    )
    def test_taken_when_named(self, _: str, pattern: Any, taken: bool) -> None:
        verbs = (
            lambda m: qnn.convert(m, include=[pattern, "plain"]),
            lambda m: qnn.convert(m, {"plain": "int8", pattern: "int8"}),
            lambda m: qnn.convert(m, "fp8", training=True, include=[pattern, "plain"]),
            lambda m: qnn.prepare(m, include=[pattern, "plain"]),
        )
        for verb, kind in zip(
            verbs, (QLinear, QLinear, qnn.Linear, qnn.ObservedLinear), strict=True
        ):
            out = verb(self.model())
            assert type(out["block"]["same"]) is (kind if taken else Same)
            assert type(out["plain"]) is kind
            assert type(out["block"]["other"]) is Other

    def test_reasons(self) -> None:
        model = self.model()
        model["attention"] = nn.MultiheadAttention(8, 2)
        out = qnn.convert(model, include=[Other, "attention.*", "plain", "block"])
        words = {row.name: str(row.reason) for row in qnn.summary(out).rows}
        assert "Same is a subclass of nn.Linear that computes what" in words["block.same"]
        assert "name it in include" in words["block.same"]
        assert "Other is a subclass of nn.Linear with a forward" in words["block.other"]
        assert "nn.MultiheadAttention, in float, only reads" in words["attention.out_proj"]

    def test_values(self) -> None:
        model, plain, x = Same(128, 8), nn.Linear(128, 8), torch.randn(3, 128)
        plain.load_state_dict(model.state_dict())
        for scheme in WITHOUT_DATA:
            got = qnn.convert(model, scheme, include=Same)(x)
            assert same_bits(got, qnn.convert(plain, scheme)(x))


def conv1d(nx: int = 64, nf: int = 64) -> Any:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(nf, nx)
    nn.init.normal_(layer.weight, std=0.1)
    nn.init.normal_(layer.bias)
    return layer


def twin(conv: Any) -> nn.Linear:
    """The `nn.Linear` with the same values."""
    nx, nf = conv.weight.shape
    linear = nn.Linear(nx, nf)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    return linear


@pytest.mark.skipif(not TRANSFORMERS, reason="transformers is not installed")
class TestConv1D:
    @parameterized.expand([(scheme, nf) for scheme in WITHOUT_DATA for nf in (64, 48)])
    def test_it_is_the_linear_layer(self, scheme: str, nf: int) -> None:
        conv, x = conv1d(128, nf), torch.randn(2, 5, 128)
        layer, want = qnn.convert(conv, scheme), qnn.convert(twin(conv), scheme)
        assert isinstance(layer, QLinear)
        assert same_bits(layer(x), want(x))
        state = want.state_dict()
        assert list(layer.state_dict()) == list(state)
        assert all(same_bits(t, state[n]) for n, t in layer.state_dict().items())
        again = qnn.convert(conv1d(128, nf), scheme)
        again.load_state_dict(layer.state_dict())
        assert same_bits(again(x), want(x))
        again = qnn.convert(conv1d(128, nf), scheme)
        again.load_state_dict(conv.state_dict())  # a float checkpoint, transposed
        assert same_bits(again(x), want(x))
        back = layer.dequantize()
        assert type(back) is type(conv)
        torch.testing.assert_close(back(x), want.dequantize()(x))
        file = io.BytesIO()
        torch.save(copy.deepcopy(layer), file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
        assert same_bits(copied(x), want(x))
        with pytest.raises(RuntimeError, match=r"weight must be \[128, .*as Conv1D has it"):
            layer.load_state_dict({**conv.state_dict(), "weight": torch.ones(7, 64)})

    @parameterized.expand(TRAINED)
    def test_training(self, scheme: str) -> None:
        conv = conv1d(nf=32)
        linear = twin(conv)
        layer, want = (qnn.convert(m, scheme, training=True) for m in (conv, linear))
        assert isinstance(layer, type(conv))
        assert layer.weight is conv.weight
        grads = []
        for each in (layer, want):
            torch.manual_seed(3)  # nvfp4 draws
            x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
            y = each(x)
            (y * torch.linspace(-1, 1, 32)).sum().backward()
            grads.append((y, x.grad, each.weight.grad, each.bias.grad))
        (y, dx, dw, db), (want_y, want_dx, want_dw, want_db) = grads
        for got, expected in ((y, want_y), (dx, want_dx), (dw.t(), want_dw), (db, want_db)):
            assert same_bits(got.contiguous(), expected)
        row = qnn.summary(layer).rows[0]
        assert (row.scheme, row.shape) == (scheme, (32, 64))
        assert list(layer.state_dict()) == list(conv.state_dict())
        deployed = qnn.convert(layer.eval(), scheme)
        assert same_bits(deployed(x), qnn.convert(want.eval(), scheme)(x))
        back = qnn.convert(copy.deepcopy(layer), {"*": None}, training=True)
        assert type(back) is type(conv)
        pickle.loads(pickle.dumps(layer))

    @parameterized.expand([(False,), (True,)])
    def test_prepared(self, qat: bool) -> None:
        conv, x = conv1d(nf=32), torch.randn(6, 64)
        results = []
        for model in (conv, twin(conv)):
            prepared = qnn.prepare(nn.Sequential(model), qat=qat)
            if not qat:
                assert same_bits(prepared(x), model(x))
            qnn.calibrate(prepared, [x], progress=False)
            converted = qnn.convert(prepared.eval())
            assert qnn.sqnr(prepared(x), converted(x)) > 30 + 70 * qat
            results.append(converted(x))
        assert same_bits(*results)
        model = nn.Sequential(conv)
        weight = conv.weight
        prepared = qnn.prepare(model, qat=True, inplace=True)
        assert prepared[0].weight is weight
        prepared.train()(x).sum().backward()
        assert weight.grad.shape == (64, 32)

    def test_ties(self) -> None:
        convs = nn.ModuleDict({name: conv1d() for name in "abcd"})
        convs["b"].weight = convs["a"].weight
        convs["linear"], convs["embedding"] = nn.Linear(64, 64), nn.Embedding(64, 64)
        convs["linear"].weight = convs["c"].weight
        convs["d"].weight = convs["embedding"].weight
        x = torch.randn(3, 64)
        for inplace in (False, True):
            model = copy.deepcopy(convs)
            out = qnn.convert(model, inplace=inplace)
            assert out["a"].stored[0] is out["b"].stored[0]
            assert out["c"].weight is out["linear"].weight
            words = {row.name: str(row.reason) for row in qnn.summary(out).rows}
            for name in ("c", "linear", "d"):
                assert "its weight is tied to" in words[name]
            for name in convs:
                if name != "embedding":
                    assert qnn.sqnr(convs[name](x), out[name](x)) > 25, name

    def test_a_model(self) -> None:
        model = nn.Sequential(conv1d(), nn.GELU(), conv1d(nf=48)).eval()
        small = qnn.convert(model)
        assert type(small[0]).__name__ == "QConv1D"
        table = qnn.compare(model, small, torch.randn(5, 64))
        assert len(table.rows) == 3
        assert table.output > 30
        row = qnn.summary(small).rows[1]
        assert (row.shape, row.bytes_before) == ((48, 64), 4 * (48 * 64 + 48))
        words = str(qnn.summary(qnn.convert(model, exclude="2")).rows[1].reason)
        assert words == "matches the exclude pattern '2'"

    def test_plain_transformers_refuses_its_file(self) -> None:
        # It would read the codes of a square layer into a Conv1D, as floats and transposed.
        model = qnn.convert(nn.ModuleDict({"conv": conv1d(), "linear": nn.Linear(64, 64)}))
        groups = quantization_config(model)["config_groups"].values()
        formats = {group["targets"][0]: group["format"] for group in groups}
        assert formats["conv"] == "qnn.QConv1D; use qnn.load_pretrained"
        assert formats["linear"] == "int-quantized"

    def test_adapters_learn_of_the_other_layout(self) -> None:
        class Adapter(nn.Module):  # as peft's around a Conv1D
            def __init__(self, base: nn.Module) -> None:
                super().__init__()
                self.base_layer, self.fan_in_fan_out = base, True

        for inplace in (False, True):
            model = nn.ModuleDict({"a": Adapter(conv1d()), "b": Adapter(conv1d())})
            out = qnn.convert(model, include="a", inplace=inplace)
            assert [out[name].fan_in_fan_out for name in "ab"] == [False, True]
            trained = qnn.convert(copy.deepcopy(model), "fp8", training=True, include="b")
            assert trained["b"].fan_in_fan_out
