"""What quantised convolutions store and load."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

from .test_qconv import CASES, SCHEMES, converted, image, plain


class TestState:
    @parameterized.expand([(name,) for name in ("1d", "2d depthwise", "3d", "transposed 2d")])
    def test_round_trips(self, case: str) -> None:
        x = image(case)
        for scheme in SCHEMES:
            module = converted(plain(case), scheme, x)
            want, file = module(x), io.BytesIO()
            torch.save(module.state_dict(), file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            kind, sizes, options, _ = CASES[case]
            made: Any = getattr(qnn, "Q" + kind.__name__)
            fresh = made(*sizes, **options, scheme=scheme)
            fresh.load_state_dict(state)
            on_meta = made(*sizes, **options, scheme=scheme, device="meta")
            on_meta.load_state_dict(state, assign=True)
            for twin in (fresh, on_meta, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(twin(x), want)
                assert twin.stored[0].stride() == module.stored[0].stride()
                assert not twin.stored[0].requires_grad

    def test_safetensors(self) -> None:
        files = pytest.importorskip("safetensors.torch")
        model = qnn.convert(nn.Sequential(plain("2d"), nn.ConvTranspose2d(8, 3, 2)))
        x = image("2d")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.safetensors")
            files.save_model(model, path)
            other = qnn.convert(nn.Sequential(plain("2d"), nn.ConvTranspose2d(8, 3, 2)))
            files.load_model(other, path)
        assert torch.equal(other(x), model(x))

    @parameterized.expand([("2d",), ("transposed 2d",)])
    def test_a_float_state_is_quantised_on_the_way_in(self, case: str) -> None:
        source = plain(case)
        for assign in (False, True):
            module = qnn.convert(nn.Sequential(copy.deepcopy(source)))
            module[0].weight = torch.zeros_like(source.weight)
            module.load_state_dict(
                {f"0.{k}": v for k, v in source.state_dict().items()}, assign=assign
            )
            want = qnn.convert(source)
            assert torch.equal(module[0].stored[0], want.stored[0])
            assert torch.equal(module[0].weight_scale, want.weight_scale)

    @parameterized.expand(
        [
            ({"weight_scale": None}, "the state has no weight_scale"),
            ({"weight_scale": torch.zeros(8, 1, 1, 1)}, "must be positive and finite"),
            ({"weight_scale": torch.ones(8, 1)}, r"must be float32 \[8, 1, 1, 1\]"),
            ({"weight": torch.zeros(8, 3, 3, 1, dtype=torch.int8)}, r"int8 \[8, 3, 3, 3\]"),
            ({"input_scale": torch.ones(1)}, "belongs to another scheme"),
        ]
    )
    def test_bad_state(self, change: Any, message: str) -> None:
        module = qnn.QConv2d.from_float(plain("2d"))
        before = copy.deepcopy(module.state_dict())
        state = {k: v for k, v in {**before, **change}.items() if v is not None}
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(state, strict=False)
        assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())

    def test_the_weight_view(self) -> None:
        for case in ("2d", "transposed 2d"):
            module = qnn.convert(plain(case))
            module.weight = torch.zeros_like(module.weight)
            module.weight.data += 1
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            with pytest.raises(TypeError, match="takes floats"):
                module.weight = torch.zeros(3, dtype=torch.int8)
            with pytest.raises(TypeError, match="cannot be trained"):
                module.requires_grad_()

    def test_static_without_a_grid(self) -> None:
        module = qnn.QConv2d(3, 4, 3, scheme="int8_static")
        assert "not calibrated" in repr(module)
        with pytest.raises(RuntimeError, match="the layer is not calibrated"):
            module(torch.randn(1, 3, 5, 5))
