"""Models with attention through the verbs, torch's own encoders and decoders, and files."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.integrations.compressed_tensors import quantization_config, schemes_of

from .common import same_bits
from .test_attention import HEADS, WIDTH, floats


class Model(nn.Module):
    """Attention of all forms, as models use it."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.other = nn.MultiheadAttention(WIDTH, HEADS, kdim=16, vdim=8, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.same(x, x, x, need_weights=False)[0]
        x = x + self.cross(x, y, y)[0]
        return self.head(x + self.other(x, y[..., :16], y[..., :8])[0])


class TestModels:
    def setup_method(self) -> None:
        self.model = Model().eval()
        self.batch = torch.randn(2, 6, WIDTH), torch.randn(2, 4, WIDTH)

    @parameterized.expand([("int8",), ("int8_static",), ("int8_weight",), ("fp8",)])
    def test_verbs(self, scheme: str) -> None:
        if scheme == "int8_static":
            prepared = qnn.prepare(self.model)
            torch.testing.assert_close(prepared(*self.batch), self.model(*self.batch))
            small = qnn.convert(qnn.calibrate(prepared, [self.batch]))
        else:
            small = qnn.convert(self.model, scheme)
        rows = {row.name: row for row in qnn.summary(small).rows}
        assert len(rows) == 7
        for name in ("same", "cross", "other"):
            assert rows[name].layer == "QMultiheadAttention"
            assert rows[f"{name}.out_proj"].layer == "QLinear"
            assert rows[name].scheme == rows[f"{name}.out_proj"].scheme == scheme
        assert (rows["same"].shape, rows["other"].shape) == ((3 * WIDTH, WIDTH), (WIDTH, WIDTH))
        held = sum(t.numel() * t.element_size() for t in small.state_dict().values())
        assert qnn.summary(small).bytes_after == held
        found = qnn.compare(self.model, small, self.batch)
        assert {row.name for row in found.rows} == {"same", "cross", "other", "head", "(output)"}
        assert all(row.sqnr > 20 for row in found.rows)
        in_place = qnn.convert(copy.deepcopy(self.model), "int8", inplace=True)
        assert same_bits(in_place(*self.batch), qnn.convert(self.model)(*self.batch))

    def test_quantisation_aware(self) -> None:
        prepared = qnn.prepare(self.model, qat=True).train()
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
        for _ in range(3):
            prepared(*self.batch).square().sum().backward()
            assert all(p.grad is not None for p in prepared.parameters())
            optimizer.step()
            optimizer.zero_grad()
        converted = qnn.convert(prepared.eval())
        assert qnn.sqnr(prepared(*self.batch), converted(*self.batch)) > 60
        calibrated = qnn.calibrate(qnn.prepare(self.model), [self.batch])
        again = qnn.prepare(calibrated, qat=True)  # goes on from what was seen
        assert bool(again.same.query_quantize.scale > 0)
        assert (again.same.qat, again.same.out_proj.qat) == (True, True)

    def test_roles_that_saw_nothing(self) -> None:
        prepared = qnn.calibrate(qnn.prepare(self.model), [self.batch])
        small = qnn.convert(prepared)
        assert torch.equal(small.same.query_scale, small.same.value_scale)
        assert torch.equal(small.cross.key_scale, small.cross.value_scale)
        assert not torch.equal(small.cross.query_scale, small.cross.key_scale)
        assert not torch.equal(small.other.key_scale, small.other.value_scale)
        with pytest.raises(ValueError, match=r"same.*nothing was observed"):
            qnn.convert(qnn.prepare(self.model))

    def test_parts_of_an_attention(self) -> None:
        """Patterns may leave the output projection float, or give it another scheme."""
        small = qnn.convert(self.model, exclude="*.out_proj")
        assert isinstance(small.same, qnn.QMultiheadAttention)
        assert not isinstance(small.same.out_proj, qnn.QLinear)
        words = {row.name: str(row.reason) for row in qnn.summary(small).rows}
        assert "exclude pattern" in words["same.out_proj"]
        assert type(small.same.dequantize()) is nn.MultiheadAttention
        mixed = qnn.convert(self.model, {"*": "int8", "same.out_proj": "int8_weight"})
        assert (mixed.same.scheme, mixed.same.out_proj.scheme) == ("int8", "int8_weight")
        for model in (small, mixed):
            assert qnn.sqnr(self.model(*self.batch), model(*self.batch)) > 25
        alone = qnn.convert(self.model, include=["*.out_proj", "head"])
        assert type(alone.same) is nn.MultiheadAttention
        assert not isinstance(alone.same.out_proj, qnn.QLinear)
        static = qnn.prepare(self.model, exclude="same.out_proj")
        static = qnn.convert(qnn.calibrate(static, [self.batch]))
        assert type(static.same) is qnn.QMultiheadAttention
        assert qnn.sqnr(self.model(*self.batch), static(*self.batch)) > 25

    def test_references_follow(self) -> None:
        for inplace in (False, True):
            model = copy.deepcopy(self.model)
            model.outputs = [model.same.out_proj]
            model.same.out_proj.label = "kept"
            small = qnn.convert(model, inplace=inplace)
            assert small.outputs[0] is small.same.out_proj
            assert small.same.out_proj.label == "kept"

    def test_what_is_refused(self) -> None:
        class Rotary(nn.MultiheadAttention):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

        class Out(nn.Linear):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return super().forward(input) * 2

        self.model.same = Rotary(WIDTH, HEADS)
        words = {r.name: str(r.reason) for r in qnn.summary(qnn.convert(self.model)).rows}
        assert "Rotary is a subclass of nn.MultiheadAttention with a meaning" in words["same"]
        assert "in float, only reads" in words["same.out_proj"]
        cases: list[tuple[Any, str]] = [
            (lambda m: setattr(m.cross, "out_proj", Out(WIDTH, WIDTH)), "a forward of its own"),
            (
                lambda m: nn.utils.parametrizations.weight_norm(m.cross, "in_proj_weight"),
                "cross: it is parametrized; call .*remove_parametrizations",
            ),
            (
                lambda m: nn.utils.parametrizations.weight_norm(m.cross.out_proj),
                r"cross.out_proj: it is parametrized",
            ),
            (lambda m: m.cross.in_proj_weight.data.fill_(torch.nan), "in_proj_weight holds"),
            (lambda m: m.cross.in_proj_bias.data.fill_(torch.nan), "in_proj_bias holds NaN"),
        ]
        for spoil, reason in cases:
            model = Model()
            spoil(model)
            with pytest.raises(ValueError, match=reason):
                qnn.convert(model)
        with pytest.raises(ValueError, match="no attention layer that trains in low precision"):
            qnn.convert(nn.Sequential(floats()), "fp8", training=True)
        model.other.q_proj_weight = nn.Parameter(model.head.weight.detach())
        tied = nn.ModuleDict({"a": floats("kdim"), "b": nn.Linear(WIDTH, WIDTH)})
        tied["b"].weight = tied["a"].q_proj_weight
        words = {r.name: str(r.reason) for r in qnn.summary(tied).rows}
        with pytest.raises(ValueError, match="its weight is tied to"):
            qnn.convert(tied)

    def test_described_on_disk(self) -> None:
        small = qnn.convert(self.model, {"*": "int8", "other": "fp8", "same.out_proj": None})
        config = quantization_config(small)
        formats = {n: g["format"] for g in config["config_groups"].values() for n in g["targets"]}
        assert set(formats) == {
            "same",
            "cross",
            "cross.out_proj",
            "other",
            "other.out_proj",
            "head",
        }
        for name, said in formats.items():
            assert ("qnn.QMultiheadAttention; use qnn.load_pretrained" in said) == (name != "head")
        again = qnn.convert(Model().eval(), schemes_of({"quantization_config": config}, Model()))
        again.load_state_dict(small.state_dict())
        assert not isinstance(again.same.out_proj, qnn.QLinear)
        assert same_bits(again(*self.batch), small(*self.batch))


class TestFiles:
    @pytest.mark.parametrize("out", ["quantised", "float"])
    def test_a_saved_model_comes_back(self, out: str) -> None:
        """SigLIP pools with an nn.MultiheadAttention, whose weights its initialisation draws."""
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        config = transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            image_size=16, patch_size=8,
        )  # fmt: skip
        model, x = transformers.SiglipVisionModel(config).eval(), torch.randn(2, 3, 16, 16)
        schemes: dict[Any, str | None] = {"*": "int8"}
        if out == "float":
            schemes["*.attention.out_proj"] = None
        small = qnn.convert(model, schemes)
        (head,) = (m for m in small.modules() if isinstance(m, qnn.QMultiheadAttention))
        assert isinstance(head.out_proj, qnn.QLinear) == (out == "quantised")
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            again = qnn.load_pretrained(transformers.SiglipVisionModel, folder).eval()
        with torch.no_grad():
            assert same_bits(again(x).pooler_output, small(x).pooler_output)
        trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (again, small)]
        assert trained[0] == trained[1]


class TestEncoders:
    """torch's own layers convert whole, and leave the kernels that read float weights."""

    def layer(self, **options: Any) -> nn.TransformerEncoderLayer:
        torch.manual_seed(1)
        return nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, **options).eval()

    @parameterized.expand(
        [(torch.no_grad, True), (torch.enable_grad, True), (torch.no_grad, False)]
    )
    def test_padding(self, mode: Any, nested: bool) -> None:
        model = nn.TransformerEncoder(self.layer(), 1, enable_nested_tensor=nested).eval()
        small, x = qnn.convert(model), torch.randn(2, 6, WIDTH)
        padding = torch.arange(6) >= torch.tensor([[6], [4]])
        kept = ~padding
        with mode():
            got = small(x, src_key_padding_mask=padding)
            assert got.shape == x.shape
            assert qnn.sqnr(model(x, src_key_padding_mask=padding)[kept], got[kept]) > 30
            assert qnn.sqnr(model(x), small(x)) > 30
            if nested and not torch.is_grad_enabled():
                compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
                again = compiled(x, src_key_padding_mask=padding)
                torch.testing.assert_close(again[kept], got[kept])
        with pytest.raises(TypeError, match=r"pad it with \.to_padded_tensor"):
            small(torch.nested.nested_tensor([x[0], x[1, :4]]))

    def test_placed_by_hand(self) -> None:
        """A layer that no verb has seen leaves the fused kernel too, eager and compiled."""
        layer, x = self.layer(), torch.randn(2, 6, WIDTH)
        layer.self_attn = qnn.QMultiheadAttention.from_float(layer.self_attn, "int8")
        calls = []
        layer.self_attn.out_proj.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            want = layer(x)
            assert calls == [1]
            layer.self_attn.out_proj._forward_hooks.clear()
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
            assert same_bits(compiled(x), want)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stack = nn.TransformerEncoder(layer, 2)
        assert not stack.use_nested_tensor
        assert "enable_nested_tensor is True, but" in str(caught[0].message)

    def test_summary_says_what_is_lost(self) -> None:
        small = qnn.convert(self.layer())
        said = {row.name: str(row.backend) for row in qnn.summary(small).rows}
        assert "fused kernel of encoder layers, which reads float" in said["self_attn"]
        assert "fused" not in said["linear1"]
        part = qnn.convert(self.layer(), exclude="self_attn")
        assert "fused kernel" in str(qnn.summary(part).rows[2].backend)
        for options in ({"activation": torch.tanh}, {"bias": False}):
            small = qnn.convert(self.layer(**options))
            assert "fused" not in str(qnn.summary(small))
        assert "fused" not in str(qnn.summary(self.layer()))

    def test_whole_transformer(self) -> None:
        model = nn.Transformer(WIDTH, HEADS, 1, 1, 64, batch_first=True).eval()
        x, y = torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH)
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        small = qnn.convert(model)
        floats = [row.layer for row in qnn.summary(small).rows if row.scheme is None]
        assert set(floats) == {"LayerNorm"}
        given = {"src": x, "tgt": y, "tgt_mask": mask, "tgt_is_causal": True}
        assert qnn.sqnr(model(**given), small(**given)) > 30
        static = qnn.convert(qnn.calibrate(qnn.prepare(model), [given]))
        assert qnn.sqnr(model(**given), static(**given)) > 25
