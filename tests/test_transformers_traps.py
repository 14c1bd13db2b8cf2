"""transformers: each trap of a reader of quantised models; devices; what is done with a model."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

from .common import same_bits
from .test_load_pretrained import IDS, SMALL, hub, masked, same_state
from .test_transformers import Saved, equal, llama, output, randomised

pytestmark = pytest.mark.usefixtures("qnn_in_transformers")


class TestUse:
    def test_generate(self) -> None:
        """With a cache that grows and one of a fixed size."""
        saved = Saved(llama(tie_word_embeddings=True))
        want = qnn.convert(saved.float(), "int8")
        got = saved.quantised("int8")
        assert got.hf_quantizer.is_compileable
        for cache in (None, "static"):
            options: Any = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
            options["disable_compile"] = True
            assert torch.equal(got.generate(IDS, **options), want.generate(IDS, **options))

    def test_pipeline(self) -> None:
        transformers = hub()
        saved = Saved(llama())
        words = [f"w{i}" for i in range(SMALL["vocab_size"])]
        tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
        vocabulary = {word: i for i, word in enumerate(words)}
        plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
        plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
        tokenizer.save_pretrained(saved.path)
        options = {"quantization_config": qnn.Int8Config()}
        pipe = transformers.pipeline("text-generation", str(saved.path), model_kwargs=options)
        assert isinstance(pipe.model.model.layers[0].mlp.up_proj, qnn.QLinear)
        (said,) = pipe("w3 w4 w5", max_new_tokens=3, do_sample=False)
        ids = qnn.convert(saved.float()).generate(
            torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False
        )
        assert said["generated_text"].replace(" ", "") == "".join(words[i] for i in ids[0])

    def test_sentence_transformers(self) -> None:
        library = pytest.importorskip("sentence_transformers", reason="needs the library")
        layers: Any = importlib.import_module("sentence_transformers.models")
        transformers = hub()
        tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
        saved = Saved(randomised(transformers.BertModel(masked().config)))
        plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(100)}))
        plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        pad = {"pad_token": "w0"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **pad).save_pretrained(
            saved.path
        )
        parts = [layers.Transformer(str(saved.path)), layers.Pooling(64)]
        folder, texts = str(saved.path / "s"), ["w3 w5 w9", "w4 w4 w8 w7"]
        library.SentenceTransformer(modules=parts).save_pretrained(folder)
        options = {"quantization_config": qnn.Int8Config()}
        got = library.SentenceTransformer(folder, model_kwargs=options)
        want = qnn.convert(library.SentenceTransformer(folder), "int8")
        assert (got.encode(texts) == want.encode(texts)).all()
        got.save_pretrained(folder + "q")
        again = library.SentenceTransformer(folder + "q")
        assert any(isinstance(module, qnn.QLinear) for module in again.modules())
        assert (again.encode(texts) == got.encode(texts)).all()

    def test_dequantize(self) -> None:
        saved = Saved(randomised(masked()))
        rules = {"*": "int8", nn.Embedding: "int8_weight"}
        got = saved.quantised(rules)
        want = copy.deepcopy(got.bert.encoder.layer[0].output.dense.weight.clone())
        got.save_pretrained(saved.path / "q")  # which leaves config.dtype a string
        plain = got.dequantize()
        assert plain is got
        assert not any(isinstance(module, qnn.Quantized) for module in plain.modules())
        assert same_bits(plain.bert.encoder.layer[0].output.dense.weight, want)
        assert plain.cls.predictions.decoder.weight is plain.bert.embeddings.word_embeddings.weight
        assert not hasattr(plain.config, "quantization_config")
        plain.save_pretrained(saved.path / "f")
        assert same_bits(output(saved.cls.from_pretrained(saved.path / "f")), output(plain))
        again = saved.cls.from_pretrained(saved.path / "q").dequantize(dtype=torch.bfloat16)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}

    def test_convert_tells_the_model_its_quantizer(self) -> None:
        model = qnn.convert(randomised(masked()))
        assert type(copy.deepcopy(model).half().dequantize().bert.pooler) is type(None)
        assert model.hf_quantizer.is_serializable()

    def test_trainer_with_lora(self) -> None:
        transformers = hub()
        peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
        pytest.importorskip("accelerate", reason="needs accelerate")
        saved = Saved(llama())
        model = saved.quantised("int8")
        arguments = transformers.TrainingArguments(
            str(saved.path / "t"), max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True,
            per_device_train_batch_size=4, gradient_checkpointing=True, save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 100, (16, 9))]
        with pytest.raises(ValueError, match="Please attach trainable adapters"):
            transformers.Trainer(model, arguments, train_dataset=rows)
        before = copy.deepcopy(model.state_dict())
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        trainer = transformers.Trainer(adapted, arguments, train_dataset=rows)
        trainer.train()
        adapted.save_pretrained(saved.path / "lora")
        changed = [n for n, p in adapted.named_parameters() if "lora_B" in n and bool(p.any())]
        assert changed
        after = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
        assert all(same_bits(after[name], tensor) for name, tensor in before.items())
        again = peft.PeftModel.from_pretrained(saved.quantised("int8"), saved.path / "lora").eval()
        adapted.eval()
        assert same_bits(output(again), output(adapted))


ON_DISK = {
    "model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
    "model.layers.0": "cpu", "model.layers.1": "disk",
}  # fmt: skip


class TestDevices:
    def test_cpu_and_auto(self) -> None:
        pytest.importorskip("accelerate", reason="needs accelerate")
        saved = Saved(llama(tie_word_embeddings=True))
        want = qnn.convert(saved.float(), "int8")
        for device_map in ("cpu", "auto", {"": "cpu"}):
            equal(saved.quantised("int8", device_map=device_map), want)
        want.save_pretrained(saved.path / "q")
        for device_map in ("cpu", "auto"):
            equal(saved.cls.from_pretrained(saved.path / "q", device_map=device_map), want)

    def test_sizes_that_a_device_map_goes_by(self) -> None:
        """What a layer will hold, to some bytes of scales."""
        accelerate = importlib.import_module("transformers.integrations.accelerate")
        module = importlib.import_module("qnn.integrations.transformers")
        for scheme in ("int8", "nvfp4_weight", "int4_weight_g64"):
            saved = Saved(llama())
            want = qnn.convert(saved.float(), scheme)
            quantizer = module.QnnQuantizer(qnn.QnnConfig(scheme), pre_quantized=False)
            with torch.device("meta"):
                skeleton = saved.cls(want.config)
            quantizer._process_model_before_weight_loading(skeleton)
            sizes, _ = accelerate.compute_module_sizes(skeleton, quantizer)
            held = sum(p.nbytes for p in want.parameters())
            held += sum(b.nbytes for b in want.buffers())
            assert abs(sizes[""] - held) <= 0.001 * held, scheme

    @parameterized.expand([("int8",), ("fp8_weight",), ("nvfp4",), ("int4_weight_g64",)])
    def test_disk(self, scheme: str) -> None:
        pytest.importorskip("accelerate", reason="needs accelerate")
        saved = Saved(llama(tie_word_embeddings=True))
        want = saved.quantised(scheme)
        want.save_pretrained(saved.path / "q")
        got = saved.cls.from_pretrained(
            saved.path / "q", device_map=ON_DISK, offload_folder=str(saved.path / "o")
        )
        assert all(p.is_meta for p in got.model.layers[1].mlp.parameters())
        for _ in range(2):
            assert same_bits(output(got), output(want))
        with pytest.raises(ValueError, match="offloaded to the disk; load the model without"):
            got.dequantize()

    def test_disk_is_refused_where_it_would_be_wrong(self) -> None:
        pytest.importorskip("accelerate", reason="needs accelerate")
        saved = Saved(llama())
        saved.quantised("int4_weight_asym_g64").save_pretrained(saved.path / "q")
        with pytest.raises(ValueError, match="cannot be offloaded to the disk"):
            saved.cls.from_pretrained(
                saved.path / "q", device_map=ON_DISK, offload_folder=str(saved.path / "o")
            )


class TestTraps:
    """What goes wrong, silently or not, in a reader of quantised models that is written plainly."""

    def test_1_integers_loaded_as_floats(self) -> None:
        """A converted model describes itself; one quantised on load does too, for plain readers."""
        pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
        auto: Any = importlib.import_module("transformers.quantizers.auto")
        saved = Saved(randomised(masked()))
        got = saved.quantised("int8")
        got.save_pretrained(saved.path / "q")
        with pytest.MonkeyPatch.context() as patch:
            known = auto.CompressedTensorsConfig
            patch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", known)
            plain = saved.cls.from_pretrained(saved.path / "q").eval()
        assert not any(isinstance(module, qnn.Quantized) for module in plain.modules())
        assert qnn.sqnr(output(got), output(plain)) > 40

    @parameterized.expand([("of a backbone",), ("of another head",)])
    def test_2_new_heads(self, kind: str) -> None:
        """A head that the checkpoint lacks is drawn and stays float; the keys of a backbone have
        other names in the file.
        """
        transformers = hub()
        model = randomised(masked())
        saved = Saved(model.bert if kind == "of a backbone" else model)
        head = transformers.BertForSequenceClassification
        logger = transformers.logging.get_logger("transformers.qnn")
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logger, "warning", said.append)
            options = {"quantization_config": qnn.Int8Config(), "num_labels": 3}
            got = head.from_pretrained(saved.path, **options)
        assert type(got.classifier) is nn.Linear
        assert not got.classifier.weight.is_meta
        assert 0.01 < float(got.classifier.weight.std()) < 0.03
        assert any("classifier (it is new" in line for line in said)
        assert isinstance(got.bert.encoder.layer[0].output.dense, qnn.QLinear)
        assert "it is new" in str(qnn.summary(got))
        want = head.from_pretrained(saved.path, num_labels=3)
        want.classifier, want.bert.pooler = got.classifier, got.bert.pooler  # as they were drawn
        want = qnn.convert(want, exclude=["classifier", "bert.pooler"])
        assert same_bits(output(got), output(want))
        got.save_pretrained(saved.path / "q")
        assert same_state(head.from_pretrained(saved.path / "q"), got)

    def test_2_heads_of_other_sizes(self) -> None:
        transformers = hub()
        head = transformers.BertForSequenceClassification
        config = transformers.BertConfig(num_hidden_layers=1, num_labels=2, **SMALL)
        saved = Saved(randomised(head(config)))
        assert isinstance(saved.quantised("int8").classifier, qnn.QLinear)
        options = {"num_labels": 5, "ignore_mismatched_sizes": True}
        got = saved.quantised("int8", **options)
        assert type(got.classifier) is nn.Linear
        assert tuple(got.classifier.weight.shape) == (5, 64)
        assert "has other sizes in the checkpoint" in str(qnn.summary(got))
        with pytest.raises(RuntimeError, match=r"(?i)mismatched"):
            saved.quantised("int8", num_labels=5)

    def test_3_disk_offload_of_a_saved_model(self) -> None:
        """What stays on the disk is not drawn anew; all of it may stay there."""
        pytest.importorskip("accelerate", reason="needs accelerate")
        saved = Saved(llama())
        want = saved.quantised("int8")
        want.save_pretrained(saved.path / "q")
        for tied in (False, True):
            if tied:
                want = Saved(llama(tie_word_embeddings=True)).quantised(
                    {"*": "int8", nn.Embedding: "int8_weight"}
                )
                want.save_pretrained(saved.path / "q")
            device_map = {**ON_DISK, "lm_head": "disk", "model.embed_tokens": "disk"}
            got = saved.cls.from_pretrained(
                saved.path / "q", device_map=device_map, offload_folder=str(saved.path / "o")
            )
            assert same_bits(output(got), output(want))

    def test_4_quantise_on_load_to_the_disk(self) -> None:
        pytest.importorskip("accelerate", reason="needs accelerate")
        saved = Saved(llama())
        for device_map, options in ((ON_DISK, {}), ("auto", {"max_memory": {"cpu": "60KB"}})):
            with pytest.raises(ValueError, match=r"save_pretrained, and load that folder"):
                saved.quantised(
                    "int8", device_map=device_map, offload_folder=str(saved.path / "o"), **options
                )

    def test_5_scales_that_train(self) -> None:
        saved = Saved(qnn.convert(randomised(masked()), "int8"))
        for model in (
            saved.cls.from_pretrained(saved.path),
            qnn.load_pretrained(saved.cls, saved.path),
        ):
            layer = model.bert.encoder.layer[0].output.dense
            assert not layer.weight_scale.requires_grad
            assert layer.bias.requires_grad

    def test_6_floats_cast_to_the_storage(self) -> None:
        """`weight_packed` has another name than the float: it is quantised from the float all the
        same, and the file has its names and no others.
        """
        st = pytest.importorskip("safetensors", reason="needs safetensors")
        saved = Saved(randomised(masked()))
        got = saved.quantised("nvfp4_weight")
        got.save_pretrained(saved.path / "q")
        with st.safe_open(saved.path / "q" / "model.safetensors", "pt") as file:
            names = set(file.keys())
        head = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}  # tied
        assert names == got.state_dict().keys() - head
        assert qnn.sqnr(output(saved.float()), output(got)) > 10

    def test_7_the_last_layer_and_names_of_parameters(self) -> None:
        """Nothing is left float that nobody named; a name of a bias means its layer."""
        base: Any = importlib.import_module("transformers.quantizers.base")
        config = hub().BertConfig(num_hidden_layers=1, **SMALL)
        saved = Saved(randomised(hub().BertModel(config)))
        assert isinstance(saved.quantised("int8").pooler.dense, qnn.QLinear)
        names = base.get_keys_to_not_convert(saved.float())
        assert names == ["pooler.dense.bias"]
        assert type(saved.quantised("int8", names).pooler.dense) is nn.Linear

    def test_8_two_classes_of_configs(self) -> None:
        """A file of the convention that qnn did not write stays that of its package."""
        saved = Saved(qnn.convert(randomised(masked()), "int8"))
        config = saved.cls.config_class.from_pretrained(saved.path)
        foreign = {k: v for k, v in config.quantization_config.items() if not k.startswith("qnn")}
        config.quantization_config = foreign
        with pytest.raises(ValueError, match=r"CompressedTensorsConfig.*QnnConfig"):
            saved.cls.from_pretrained(
                saved.path, config=config, quantization_config=qnn.Int8Config()
            )

    def test_9_casts_of_a_parent(self) -> None:
        """`.half()` of a module around the model, and `.to(dtype)` of it: scales stay float32."""
        saved = Saved(randomised(masked()))
        got = saved.quantised("int8")
        before = got.state_dict()
        for cast in (nn.Sequential(got).half()[0], saved.quantised("int8").to(torch.bfloat16)):
            layer = cast.bert.encoder.layer[0].output.dense
            assert layer.weight_scale.dtype == torch.float32
            scale = before["bert.encoder.layer.0.output.dense.weight_scale"]
            assert same_bits(layer.weight_scale, scale)
            assert bool(output(cast).isfinite().all())
        with pytest.raises(ValueError, match="not supported for quantized model"):
            got.half()

    def test_10_activations_cast_to_the_weights_dtype(self) -> None:
        transformers = hub()
        config = transformers.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50
        )
        saved = Saved(randomised(transformers.T5EncoderModel(config)))
        got = saved.quantised("fp8_weight")
        assert got.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
        assert qnn.sqnr(output(saved.float()), output(got)) > 25
        layer = got.encoder.block[0].layer[1].DenseReluDense.wo
        with pytest.raises(TypeError, match="a storage dtype"):
            layer(torch.randn(2, 64).to(torch.float8_e4m3fn))

    def test_11_the_models_dtype(self) -> None:
        """The first float parameter is a code of float8 or a scale; the model is bfloat16."""
        saved = Saved(llama(attention_bias=True).to(torch.bfloat16))
        got = saved.quantised({"*": "int8", nn.Embedding: "fp8_weight"}, dtype="auto")
        assert got.dtype != torch.bfloat16
        got.save_pretrained(saved.path / "q")
        again = saved.cls.from_pretrained(saved.path / "q")
        assert again.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
        equal(again, got)

    def test_12_floats_into_integers(self) -> None:
        """A float state of the whole model is quantised on its way into the layers."""
        saved = Saved(randomised(masked()))
        got, other = saved.quantised("int8"), randomised(masked())
        got.load_state_dict(other.state_dict(), strict=False)
        assert same_state(got, qnn.convert(other, "int8"))
