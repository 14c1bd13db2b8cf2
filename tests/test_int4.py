"""int4: its rule against a second implementation, its codes, its form on disk."""

from __future__ import annotations

import io
import itertools
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn import functional as F
from qnn.kernels import OPS, SCHEMES
from qnn.kernels.formats.int4 import INT4, Int4, pack, unpack

from .common import same_bits

f32 = np.float32
KEYS = tuple(INT4)
NAMES = [name for name in SCHEMES if name.startswith("int4")]
TINY = np.finfo(f32).tiny


def expected(form: Int4, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[R, C]`, scales and zero points `[R, C / group]` of finite `x`, a group at a time."""
    rows, columns = x.shape
    codes = np.zeros(x.shape, np.int64)
    scales = np.zeros((rows, columns // form.group), f32)
    zeros = np.full(scales.shape, 8, np.int64)
    for i, j in np.ndindex(*scales.shape):
        where = np.s_[i, j * form.group : (j + 1) * form.group]
        group = x[where]
        low, high = min(group.min(), f32(0)), max(group.max(), f32(0))
        # In float64 the difference of two float32 numbers is finite, and rounded once here.
        span = f32(max(-low, high)) if form.symmetric else f32((float(high) - float(low)) / 2)
        scale = max(span / f32(7 if form.symmetric else 7.5), TINY) if span else f32(1)
        steps = np.rint(group * (f32(1) / scale))
        if form.symmetric:
            codes[where] = np.clip(steps, -7, 7) + 8
        else:
            zeros[i, j] = np.clip(np.rint(-low * (f32(1) / scale)), 0, 15)
            codes[where] = np.clip(steps + zeros[i, j], 0, 15)
        scales[i, j] = scale
    return codes, scales, zeros


def matrix(rows: int, columns: int) -> torch.Tensor:
    """Rows of very different size, groups of zeros, of one sign, and of subnormal numbers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-6, 6, (rows, 1))
    x[1], x[2], x[3], x[4] = 0, np.abs(x[2]) + 5, -np.abs(x[3]) - 5, x[4] * 1e-42
    x[5] *= 3e38 / np.abs(x[5]).max()  # the span is beyond float32
    return torch.from_numpy(x.astype(f32))


class TestRule:
    @parameterized.expand(KEYS)
    def test_equals_the_second_reference(self, key: str) -> None:
        form, x = INT4[key], matrix(12, 384)
        words, scale, *zero = form.quantize(x)
        codes, scales, zeros = expected(form, x.numpy())
        np.testing.assert_array_equal(unpack(words).numpy(), codes)
        np.testing.assert_array_equal(scale.numpy(), scales)
        assert len(zero) == (not form.symmetric)
        if zero:
            np.testing.assert_array_equal(zero[0].numpy(), zeros)
        back = form.dequantize((words, scale, *zero), torch.float64).numpy()
        each = scales.repeat(form.group, -1).astype(np.float64)
        want = (codes - zeros.repeat(form.group, -1)) * each
        np.testing.assert_array_equal(back, want)
        # Half a step; the zero point's own rounding may move an end by as much again.
        bound = (0.5 if form.symmetric else 1.0) * each * 1.0001
        assert (np.abs(want - x.numpy()) <= bound).all()

    @parameterized.expand(KEYS)
    def test_zeros(self, key: str) -> None:
        form = INT4[key]
        parts = form.quantize(torch.zeros(3, 256))
        assert bool((parts[1] == 1).all())
        assert not form.dequantize(parts).any()

    @parameterized.expand(itertools.product(KEYS, (float("nan"), float("inf"), -float("inf"))))
    def test_what_is_not_finite_spoils_its_group(self, key: str, value: float) -> None:
        form, x = INT4[key], torch.randn(4, 384)
        x[2, 130] = 0
        clean = form.dequantize(form.quantize(x))
        x[2, 130] = value
        back, at = form.dequantize(form.quantize(x)), 130 // form.group * form.group
        hit = torch.zeros(4, 384, dtype=torch.bool)
        hit[2, at : at + form.group] = True
        assert bool(back[hit].isnan().all())
        assert torch.equal(back[~hit], clean[~hit])

    def test_eight_codes_a_word_the_first_lowest(self) -> None:
        words = pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15]]))
        assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x87654321, 0x0000000F]
        codes = torch.randint(0, 16, (3, 5, 64))
        assert torch.equal(unpack(pack(codes)).int(), codes.int())

    @parameterized.expand([(key,) for key, form in INT4.items() if form.symmetric])
    def test_minus_eight_of_others_is_taken(self, key: str) -> None:
        form, x = INT4[key], torch.randn(2, 256)
        words = torch.zeros(3, 32, dtype=torch.int32)  # code 0 everywhere
        scale = torch.full((3, 256 // form.group), 0.5)
        y = OPS[f"{key}_weight_linear"].overload(x, words, scale, None)
        torch.testing.assert_close(y, -4 * x.sum(-1, keepdim=True).expand(2, 3))

    def test_which_schemes(self) -> None:
        assert [
            f"int4_weight{asym}{group}" for asym in ("", "_asym") for group in ("", "_g64", "_g32")
        ] == NAMES
        with pytest.raises(ValueError, match="Did you mean 'int4_weight'"):
            qnn.QLinear(128, 8, scheme="int4_weights")

    def test_error_falls_with_smaller_groups(self) -> None:
        torch.manual_seed(0)
        w = torch.randn(64, 512)
        found = [qnn.sqnr(w, F.dequantize(F.quantize(w, s), scheme=s)) for s in NAMES]
        assert sorted(found[:3]) == found[:3]
        assert sorted(found[3:]) == found[3:]
        assert all(a > s for a, s in zip(found[3:], found[:3], strict=True))


def layer(scheme: str, n: int = 20, bias: bool = True) -> tuple[nn.Linear, qnn.QLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(256, n, bias)
    return linear, qnn.QLinear.from_float(linear, scheme)


def peer(scheme: str) -> tuple[Any, Any]:
    """The package's compressor, and its form of what qnn writes into a config."""
    pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = nn.Sequential(layer(scheme)[1])
    config = qnn.integrations.compressed_tensors.quantization_config(model)
    assert config["format"] == "pack-quantized"
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    return BaseCompressor.get_value_from_registry(group.format), group


class TestDisk:
    @parameterized.expand(NAMES)
    def test_description(self, scheme: str) -> None:
        form: Any = SCHEMES[scheme].weight
        assert form.compressed == {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": form.group,
            "symmetric": "asym" not in scheme,
        }  # fmt: skip

    @parameterized.expand(itertools.product(NAMES, (20, 160)))
    def test_read_by_compressed_tensors(self, scheme: str, n: int) -> None:
        compressor, group = peer(scheme)
        module = layer(scheme, n, False)[1]
        decoded = compressor.decompress(dict(module.state_dict()), group)["weight"]
        assert torch.equal(decoded, module.dequantize().weight)

    @parameterized.expand(itertools.product(NAMES, (20, 160)))
    def test_written_by_compressed_tensors(self, scheme: str, n: int) -> None:
        """Its own calibration and its own compressor, whose codes reach −8."""
        compressor, group = peer(scheme)
        from compressed_tensors.quantization.utils import calculate_qparams

        linear = layer(scheme, n, False)[0]
        weight, size = linear.weight.detach(), group.weights.group_size
        groups = weight.unflatten(-1, (-1, size))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), group.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        written = compressor.compress(state, group)
        assert ("weight_zero_point" in written) == ("asym" in scheme)
        module = qnn.QLinear(256, n, bias=False, scheme=scheme)
        module.load_state_dict(written, strict=True)
        decoded = compressor.decompress(written, group)["weight"]
        assert torch.equal(decoded, module.dequantize().weight)
        assert qnn.sqnr(weight, decoded) > 20

    @parameterized.expand(NAMES)
    def test_round_trip(self, scheme: str) -> None:
        module = layer(scheme)[1]
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        fresh = qnn.QLinear(256, 20, scheme=scheme, device="meta")
        fresh.load_state_dict(torch.load(file, weights_only=True), assign=True)
        assert all(map(same_bits, fresh.stored, module.stored))
        assert module.weight_shape.tolist() == [20, 256]
        x = torch.randn(3, 256)
        assert torch.equal(fresh(x), module(x))

    def test_by_torchs_checkpoint_of_models(self) -> None:
        from torch.distributed.checkpoint.state_dict import (
            get_model_state_dict,
            set_model_state_dict,
        )

        model, other = (nn.Sequential(layer("int4_weight_asym")[1]) for _ in range(2))
        with torch.no_grad():
            other[0].weight *= 0.5
        set_model_state_dict(other, get_model_state_dict(model))
        assert all(map(same_bits, other[0].stored, model[0].stored))

    def test_bad_state(self) -> None:
        module = layer("int4_weight_asym")[1]
        good = module.state_dict()
        before = [part.clone() for part in module.stored]
        other = layer("int4_weight")[1].state_dict()
        for change, message in (
            ({"weight_shape": torch.tensor([20, 250])}, r"a weight of \[20, 250\], the layer \["),
            ({"weight_zero_point": good["weight_zero_point"][:2]}, r"must be int32 \[3, 2\], got"),
            ({"weight_zero_point": torch.zeros(20, 2)}, "weight_zero_point is torch.float32, but"),
            ({"weight_scale": good["weight_scale"] * torch.nan}, "positive and finite"),
            ({"weight_packed": good["weight_packed"].to(torch.uint8)}, "is torch.uint8, but"),
            ({"weight_zero_point": torch.full((20, 2), 16).to(torch.int8)}, "must lie in 0 … 15"),
            ({"weight_zero_point": None}, "the state has no weight_zero_point"),
        ):
            state = {k: v for k, v in {**good, **change}.items() if v is not None}
            with pytest.raises(RuntimeError, match=message):
                module.load_state_dict(state)
        with pytest.raises(RuntimeError, match="weight_zero_point belongs to another scheme"):
            layer("int4_weight")[1].load_state_dict(good)
        with pytest.raises(RuntimeError, match=r"weight_packed, .*weight_shape belongs to another"):
            qnn.QLinear(256, 20).load_state_dict(other)
        assert all(map(same_bits, module.stored, before))

    @parameterized.expand(["int4_weight", "int4_weight_asym_g32"])
    @pytest.mark.usefixtures("plain_transformers")
    def test_a_pretrained_model(self, scheme: str) -> None:
        """By qnn bit for bit, and by plain transformers through compressed-tensors, which packs no
        zero points of a model that is built empty.
        """
        pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        torch.manual_seed(0)
        config = transformers.BertConfig(
            num_hidden_layers=1, hidden_size=128, intermediate_size=256, num_attention_heads=2,
            vocab_size=100,
        )  # fmt: skip
        model = qnn.convert(transformers.BertForMaskedLM(config).eval(), scheme)
        ids = torch.arange(3, 12)[None]
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            again = qnn.load_pretrained(type(model), folder)
            left, right = again.state_dict(), model.state_dict()
            assert left.keys() == right.keys()
            assert all(same_bits(left[key], right[key]) for key in left)
            assert torch.equal(again(ids).logits, model(ids).logits)
            if "asym" in scheme:
                with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                    type(model).from_pretrained(folder)
                return
            plain = type(model).from_pretrained(folder).eval()
            assert qnn.sqnr(model(ids).logits, plain(ids).logits) > 80
