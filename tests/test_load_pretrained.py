"""A model that was saved comes back right, or is refused: the description and `load_pretrained`."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.integrations.compressed_tensors import describe, quantization_config, schemes_of

from .common import same_bits

pytestmark = pytest.mark.usefixtures("plain_transformers")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 100}
IDS = torch.arange(3, 12)[None]


def hub() -> Any:
    """transformers, quiet, with what its description of a file needs."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
    pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def masked(**options: Any) -> Any:
    """A head over a backbone that shares its config."""
    transformers = hub()
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=2, **{**SMALL, **options})
    return spread(transformers.BertForMaskedLM(config))


def spread(model: nn.Module) -> Any:
    """Weights of unit gain, so that a wrong one shows behind the residual."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=layer.in_features**-0.5)
    return model.eval()


def own_class() -> tuple[Any, Any]:
    """A model of transformers with recurrent layers, and its config's class."""
    transformers = hub()

    class Config(transformers.PretrainedConfig):  # type: ignore[name-defined, misc]
        model_type = "speaker"

    class Speaker(transformers.PreTrainedModel):  # type: ignore[name-defined, misc]
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            cell = config.kind.endswith("Cell")
            self.rnn = getattr(nn, config.kind)(8, 16, **({} if cell else {"batch_first": True}))
            self.head = nn.Linear(16, 16) if config.head else nn.Identity()
            self.post_init()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cell = isinstance(self.rnn, nn.RNNCellBase)
            y = self.rnn(x[:, 0]) if cell else self.rnn(x)
            result: torch.Tensor = self.head(y[0] if isinstance(y, tuple) else y)
            return result

    return Speaker, Config


def same_state(got: nn.Module, want: nn.Module) -> bool:
    left, right = got.state_dict(), want.state_dict()
    return left.keys() == right.keys() and all(same_bits(left[key], right[key]) for key in left)


def decoder(name: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        transformers, torch_seed = hub(), torch.manual_seed(0)
        del torch_seed
        sizes = {**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 2, "pad_token_id": 0}
        config = getattr(transformers, f"{name}Config")(**sizes, **options)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()

    return build


def vit() -> Any:
    transformers = hub()
    return transformers.ViTModel(
        transformers.ViTConfig(
            **{k: v for k, v in SMALL.items() if k != "vocab_size"},
            num_hidden_layers=1, image_size=16, patch_size=8,
        )
    ).eval()  # fmt: skip


STOCK = {
    "tied": decoder("Llama", tie_word_embeddings=True),
    "renamed keys": vit,
    "fused experts": decoder("Mixtral", num_local_experts=4),
    "buffers out of the file": decoder("Gemma", head_dim=16),
    "a head, tied": masked,
}


class TestLoadPretrained:
    @parameterized.expand(
        [
            (f"{kind}, {scheme}", kind, scheme)
            for kind in STOCK
            for scheme in ("int8", "nvfp4_weight")
        ]
    )
    def test_stock(self, name: str, kind: str, scheme: str) -> None:
        model = qnn.convert(STOCK[kind](), scheme)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = qnn.load_pretrained(type(model), folder)
            assert same_state(again, model)
            for (key, got), want in zip(again.named_parameters(), model.parameters(), strict=True):
                assert got.requires_grad == want.requires_grad, key
            assert not [k for k, b in again.named_buffers() if b.is_meta]
            assert again.config.quantization_config == model.config.quantization_config
            with torch.no_grad():
                x = torch.randn(1, 3, 16, 16) if kind == "renamed keys" else IDS
                assert torch.equal(again(x)[0], model(x)[0])
            again.save_pretrained(Path(folder) / "twice")
            twice = qnn.load_pretrained(type(model), Path(folder) / "twice")
            assert same_state(twice, model)

    def test_auto_classes_and_mixed_schemes(self) -> None:
        transformers = hub()
        model = qnn.convert(masked(), {"*": "int8", "*.dense": "fp8", "*.query": None})
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            again = qnn.load_pretrained(transformers.AutoModelForMaskedLM, folder)
            assert same_state(again, model)
            backbone = qnn.load_pretrained(transformers.AutoModel, folder)
            want = model.bert(IDS).last_hidden_state
            assert torch.equal(backbone(IDS).last_hidden_state, want)

    @parameterized.expand(
        [(kind, head) for kind in ("LSTM", "GRU", "LSTMCell") for head in (False, True)]
    )
    def test_recurrent(self, kind: str, head: bool) -> None:
        """compressed-tensors has no recurrent layers: plain transformers refuses the file."""
        cls, config = own_class()
        model = qnn.convert(cls(config(kind=kind, head=head)).eval())
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            with pytest.raises(ValueError, match=r"(?s)format.*use qnn.load_pretrained"):
                cls.from_pretrained(folder)
            again = qnn.load_pretrained(cls, folder)
            assert same_state(again, model)
            x = torch.randn(2, 5, 8)
            assert torch.equal(again(x), model(x))

    def test_conv1d(self) -> None:
        """Its codes are transposed: plain transformers would read a square layer wrongly."""
        transformers = hub()
        config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)
        model = qnn.convert(transformers.GPT2LMHeadModel(config).eval(), "fp8")
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            with pytest.raises(ValueError, match=r"(?s)format.*use qnn.load_pretrained"):
                type(model).from_pretrained(folder)
            again = qnn.load_pretrained(type(model), folder)
            assert same_state(again, model)
            assert torch.equal(again(IDS).logits, model(IDS).logits)

    def test_static(self) -> None:
        """A calibrated model comes back without data, also through plain transformers."""
        batches = [torch.randint(3, 100, (2, 9)) for _ in range(3)]
        model = qnn.convert(qnn.calibrate(qnn.prepare(masked(), exclude="*.key"), batches))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            again = qnn.load_pretrained(type(model), folder)
            assert same_state(again, model)
            assert torch.equal(again(IDS).logits, model(IDS).logits)
            plain = type(model).from_pretrained(folder).eval()
            assert qnn.sqnr(model(IDS).logits, plain(IDS).logits) > 25

    def test_refused(self) -> None:
        st = pytest.importorskip("safetensors.torch", reason="needs the extra 'dev'")
        transformers = hub()
        model, key = qnn.convert(masked()), "bert.encoder.layer.1.output.dense"
        with tempfile.TemporaryDirectory() as folder:
            masked().save_pretrained(folder)
            with pytest.raises(ValueError, match="no description of qnn's"):
                qnn.load_pretrained(type(model), folder)
            model.save_pretrained(folder)
            with pytest.raises(ValueError, match="describes other layers than GPT2Model has"):
                qnn.load_pretrained(
                    transformers.GPT2Model,
                    folder,
                    config=transformers.GPT2Config(
                        n_layer=1, n_embd=8, n_head=1, vocab_size=9,
                        quantization_config=model.config.quantization_config,
                    ),
                )  # fmt: skip
            path = Path(folder) / "model.safetensors"
            whole = st.load_file(path)
            for change, message in (
                (lambda s: s.pop(f"{key}.weight_scale"), "the file has no .*weight_scale"),
                (lambda s: s[f"{key}.weight_scale"].fill_(float("nan")), "positive and finite"),
            ):
                state = {name: tensor.clone() for name, tensor in whole.items()}
                change(state)
                st.save_file(state, path, metadata={"format": "pt"})
                with pytest.raises(ValueError, match=message):
                    qnn.load_pretrained(type(model), folder)
            st.save_file(whole, path, metadata={"format": "pt"})
            short = model.config
            short.quantization_config["config_groups"]["group_0"]["targets"].remove(key)
            del short.quantization_config["qnn"]["group_1"]
            with pytest.raises(ValueError, match="which the config does not describe"):
                qnn.load_pretrained(type(model), folder, config=short)

    def test_diffusers(self) -> None:
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
            num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
        )  # fmt: skip
        twin = qnn.convert(model.eval(), "fp8")
        assert "quantization_config" not in model.config
        with tempfile.TemporaryDirectory() as folder:
            twin.save_pretrained(folder)
            with pytest.raises(ValueError, match=r"use qnn.load_pretrained"):
                type(model).from_pretrained(folder)
            again = qnn.load_pretrained(type(model), folder)
            assert same_state(again, twin)
            with pytest.raises(TypeError, match="without options"):
                qnn.load_pretrained(type(model), folder, device_map="auto")


class TestNames:
    """The description names the layers as the model that is saved does."""

    @parameterized.expand(
        [
            ("itself", lambda m: m, lambda q: q),
            ("data_parallel", nn.DataParallel, lambda q: q.module),
            ("compiled", torch.compile, lambda q: q._orig_mod),
            ("in_a_module", lambda m: nn.ModuleDict({"m": m}), lambda q: q["m"]),
        ]
    )
    def test_wrapped(self, name: str, wrap: Any, unwrap: Any) -> None:
        model = unwrap(qnn.convert(wrap(masked()), "fp8"))
        group = model.config.quantization_config["config_groups"]["group_0"]["targets"]
        quantised = [n for n, m in model.named_modules() if isinstance(m, qnn.QLinear)]
        assert group == quantised

    def test_peft(self) -> None:
        peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
        config = peft.LoraConfig(r=2, target_modules=["query"])
        model = qnn.convert(peft.get_peft_model(masked(), config), "fp8", exclude="*lora*")
        plain = model.unload()
        group = plain.config.quantization_config["config_groups"]["group_0"]["targets"]
        quantised = [n for n, m in plain.named_modules() if isinstance(m, qnn.QLinear)]
        assert group == quantised

    @parameterized.expand(
        [
            "whole",
            "backbone of a head",
            "head over a backbone",
            "backbone saved alone",
            "backbone converted alone",
        ]
    )
    def test_read_by_plain_transformers(self, case: str) -> None:
        """fp8, since its codes in a float layer raise nothing: they are wrong."""
        transformers, model = hub(), masked()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            if case == "head over a backbone":
                saved = qnn.convert(model.bert, "fp8")
                want = saved(IDS).last_hidden_state
            elif case == "backbone converted alone":
                qnn.convert(model.bert, "fp8", inplace=True)
                saved, want = model, model(IDS).logits
            else:
                saved = qnn.convert(model, "fp8")
                want = saved(IDS).logits if case == "whole" else saved.bert(IDS).last_hidden_state
                saved = saved.bert if case == "backbone saved alone" else saved
            saved.save_pretrained(folder)
            if case in ("whole", "backbone converted alone"):
                got = type(model).from_pretrained(folder).eval()(IDS).logits
            elif case == "head over a backbone":
                head = type(model).from_pretrained(folder).eval()
                got = head(IDS, output_hidden_states=True).hidden_states[-1]
            else:
                got = transformers.AutoModel.from_pretrained(folder).eval()(IDS).last_hidden_state
        assert qnn.sqnr(want, got) > 60

    def test_a_part_that_was_converted_is_described_before_saving(self) -> None:
        transformers = hub()
        pair = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            vit().config, masked().bert.config
        )
        model = transformers.VisionTextDualEncoderModel(pair).eval()
        model.text_model = qnn.convert(model.text_model, "fp8")
        assert not hasattr(model.config, "quantization_config")
        describe(model)
        names = model.config.quantization_config["config_groups"]["group_0"]["targets"]
        assert all(name.startswith("text_model.") for name in names)

    def test_a_pattern_takes_no_layer_that_is_float(self) -> None:
        model = qnn.convert(masked(), "fp8", exclude="*.layer.1.output.dense")
        config = model.config.quantization_config
        found = schemes_of(model.config, model.bert)
        assert "encoder.layer.0.output.dense" in found
        assert "encoder.layer.1.output.dense" not in found
        assert set(config["qnn"].values()) == {"fp8"}


class TestWhatOthersRun:
    @parameterized.expand(
        [
            ("nvfp4", torch.float32, 128, "bfloat16 alone"),
            ("nvfp4_weight", torch.float16, 128, "bfloat16 alone"),
            ("mxfp8", torch.float32, 128, "bfloat16 alone"),
            ("fp8_block", torch.bfloat16, 64, "multiples of 128 alone"),
            ("fp8_block", torch.float32, 128, None),
            ("mxfp8", torch.bfloat16, 64, None),
            ("int8", torch.float32, 64, None),
            ("int4_weight", torch.float32, 128, None),
            ("int4_weight_asym", torch.float32, 128, "packed in the file alone"),
        ]
    )
    def test_said(self, scheme: str, dtype: torch.dtype, width: int, said: str | None) -> None:
        model = masked(hidden_size=width).to(dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            qnn.convert(model, scheme)
        words = [str(w.message) for w in caught if "compressed-tensors runs" in str(w.message)]
        assert len(words) == (said is not None), words
        if said is not None:
            assert said in words[0]

    def test_nvfp4_is_described_as_what_its_file_holds(self) -> None:
        """Engines read an `input_global_scale` where a file asks for nvfp4 activations."""
        model = nn.Sequential(qnn.QLinear(32, 16, scheme="nvfp4"))
        config = quantization_config(model)
        assert config["config_groups"]["group_0"]["input_activations"] is None
        described = {"quantization_config": config}
        assert schemes_of(described, nn.Sequential(nn.Linear(32, 16))) == {"0": "nvfp4"}


def test_smoothed_layers_come_back(tmp_path: Path) -> None:
    model = masked()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[::16] *= 40
    prepared = qnn.calibrate(qnn.prepare(model), [{"input_ids": IDS}], progress=False)
    converted = qnn.convert(prepared)
    smoothed = [key for key in converted.state_dict() if key.endswith("pre_quant_scale")]
    assert 0 < len(smoothed) < len(qnn.summary(converted).rows)
    converted.save_pretrained(tmp_path)
    config = converted.config.quantization_config
    groups = [g for g in config["config_groups"].values() if g["format"].startswith("smoothed")]
    assert groups  # which plain transformers refuses
    loaded = qnn.load_pretrained(type(model), tmp_path)
    assert same_state(loaded, converted)
    assert same_bits(loaded(IDS).logits, converted(IDS).logits)
    with pytest.raises(Exception, match="load_pretrained"):
        type(model).from_pretrained(tmp_path)
