"""transformers: quantise on load, and the way there and back. Each trap of the reader is a test."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

from .common import child, same_bits
from .test_load_pretrained import IDS, SMALL, STOCK, hub, masked, own_class, same_state

pytestmark = pytest.mark.usefixtures("qnn_in_transformers")

SOME = ("int8_weight", "fp8_weight", "fp8_block", "nvfp4", "int4_weight", "int4_weight_asym_g64")
SCHEMES = sorted(s for s in qnn.SCHEMES if not qnn.kernels.get_scheme(s).static)


def randomised(model: nn.Module) -> Any:
    """Weights of unit gain and biases that are not zeros, so that a wrong one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def output(model: Any, x: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(x)[0]
    return result


def inputs(kind: str) -> torch.Tensor:
    return torch.randn(1, 3, 16, 16) if kind == "renamed keys" else IDS


class Saved:
    """A float model in a folder."""

    def __init__(self, model: Any) -> None:
        self.cls = type(model)
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        model.save_pretrained(self.path)

    def float(self, **options: Any) -> Any:
        return self.cls.from_pretrained(self.path, **options)

    def quantised(self, *arguments: Any, **options: Any) -> Any:
        config = qnn.QnnConfig(*arguments)
        return self.cls.from_pretrained(self.path, quantization_config=config, **options)


def llama(**options: Any) -> Any:
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    transformers = hub()
    config = transformers.LlamaConfig(**{**SMALL, **sizes, "eos_token_id": None, **options})
    return randomised(transformers.LlamaForCausalLM(config))


def equal(got: Any, want: Any, x: torch.Tensor = IDS) -> None:
    """The same model: state, order and gradients of parameters, description, output."""
    assert same_state(got, want)
    for (name, p), (other, q) in zip(got.named_parameters(), want.named_parameters(), strict=True):
        assert (name, p.requires_grad, p.dtype) == (other, q.requires_grad, q.dtype)
    assert got.config.quantization_config == want.config.quantization_config
    assert same_bits(output(got, x), output(want, x))


def check_scheme(scheme: str) -> None:
    saved = Saved(randomised(masked(hidden_size=128)))
    got = saved.quantised(scheme)
    equal(got, qnn.convert(saved.float(), scheme))
    got.save_pretrained(saved.path / "q")
    equal(saved.cls.from_pretrained(saved.path / "q"), got)


class TestQuantiseOnLoad:
    """It gives what `qnn.convert` gives, bit for bit, and so does the file that it saves."""

    @parameterized.expand([(kind,) for kind in STOCK])
    def test_stock_models(self, kind: str) -> None:
        saved = Saved(randomised(STOCK[kind]()))
        got, x = saved.quantised("int8"), inputs(kind)
        equal(got, qnn.convert(saved.float(), "int8"), x)
        got.save_pretrained(saved.path / "q")
        again = saved.cls.from_pretrained(saved.path / "q")
        equal(again, got, x)
        again.save_pretrained(saved.path / "q")  # the folder that it is mapped from
        equal(saved.cls.from_pretrained(saved.path / "q"), got, x)

    @parameterized.expand([(scheme,) for scheme in SOME])
    def test_schemes(self, scheme: str) -> None:
        check_scheme(scheme)

    @parameterized.expand([(scheme,) for scheme in SCHEMES if scheme not in SOME])
    @pytest.mark.long
    def test_other_schemes(self, scheme: str) -> None:
        check_scheme(scheme)

    @parameterized.expand(
        [
            ({"*": "int8", nn.Embedding: "int8_weight"},),
            ({"*": "nvfp4_weight", nn.Embedding: "nvfp4_weight"},),
            ({"*.attention": "fp8", "*.dense": "int8_weight", "*.layer.1.output*": None},),
            ({lambda name, module: "query" in name: "int4_weight_g64"},),
        ]
    )
    def test_a_scheme_a_name_and_tied_tables(self, scheme: Any) -> None:
        saved = Saved(randomised(masked()))
        got, want = saved.quantised(scheme), qnn.convert(saved.float(), scheme)
        equal(got, want)
        tied = nn.Embedding in scheme
        assert (
            got.cls.predictions.decoder.weight is got.bert.embeddings.word_embeddings.weight
        ) == (want.cls.predictions.decoder.weight is want.bert.embeddings.word_embeddings.weight)
        if tied:
            left, right = got.cls.predictions.decoder, got.bert.embeddings.word_embeddings
            first = next(iter(left._part_names["weight"]))
            assert left._parameters[first] is right._parameters[first]
        got.save_pretrained(saved.path / "q")
        equal(saved.cls.from_pretrained(saved.path / "q"), got)

    def test_conv1d_and_experts_of_other_layouts(self) -> None:
        transformers = hub()
        config = transformers.GPT2Config(
            n_layer=1, n_embd=32, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0
        )
        saved = Saved(randomised(transformers.GPT2LMHeadModel(config)))
        equal(saved.quantised("fp8"), qnn.convert(saved.float(), "fp8"))
        config = transformers.GptOssConfig(
            **SMALL, num_hidden_layers=1, num_local_experts=2, num_key_value_heads=2, head_dim=32,
            pad_token_id=0, num_experts_per_tok=2,
        )  # fmt: skip
        saved = Saved(randomised(transformers.GptOssForCausalLM(config)))
        equal(saved.quantised("int8"), qnn.convert(saved.float(), "int8"))

    @parameterized.expand([("LSTM",), ("GRUCell",)])
    def test_recurrent(self, kind: str) -> None:
        cls, config = own_class()
        saved = Saved(randomised(cls(config(kind=kind, head=True))))
        got, x = saved.quantised("int8"), torch.randn(2, 5, 8)
        equal(got, qnn.convert(saved.float(), "int8"), x)
        assert isinstance(got.rnn, qnn.Quantized)
        got.save_pretrained(saved.path / "q")
        equal(cls.from_pretrained(saved.path / "q"), got, x)

    @parameterized.expand([("bfloat16",), ("float16",), ("auto",)])
    def test_dtype(self, dtype: str) -> None:
        saved = Saved(randomised(masked()).to(torch.bfloat16))
        got = saved.quantised("int8", dtype=dtype)
        equal(got, qnn.convert(saved.float(dtype=dtype), "int8"))
        layer = got.bert.encoder.layer[0].output.dense
        assert layer.weight_scale.dtype == torch.float32
        assert layer.bias.dtype == got.dtype == getattr(torch, dtype.replace("auto", "bfloat16"))

    def test_a_layer_that_keeps_float32(self) -> None:
        """T5 keeps `wo` in float32 beside float16: it is quantised from float32."""
        transformers = hub()
        config = transformers.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50
        )
        saved = Saved(randomised(transformers.T5EncoderModel(config)))
        got = saved.quantised("int8", dtype=torch.float16)
        equal(got, qnn.convert(saved.float(dtype=torch.float16), "int8"))
        assert got.encoder.block[0].layer[1].DenseReluDense.wo.dtype == torch.float32

    def test_sharded_checkpoints_and_pickles(self) -> None:
        model = randomised(masked())
        saved = Saved(model)
        want = qnn.convert(saved.float(), "int8")
        model.save_pretrained(saved.path, max_shard_size="40KB")
        assert len(list(saved.path.glob("*.safetensors"))) > 2
        equal(saved.quantised("int8"), want)
        for path in saved.path.glob("*.safetensors*"):
            path.unlink()
        torch.save(model.state_dict(), saved.path / "pytorch_model.bin")  # tied weights twice
        equal(saved.quantised({"*": "int8", nn.Embedding: "int8_weight"}),
              qnn.convert(saved.float(), {"*": "int8", nn.Embedding: "int8_weight"}))  # fmt: skip

    def test_names_that_stay_float(self) -> None:
        saved = Saved(randomised(masked()))
        got = saved.quantised("int8", ["transform.dense", "bert.encoder.layer.0", "*.key"])
        want = qnn.convert(
            saved.float(), exclude=["cls.predictions.transform", "bert.encoder.layer.0", "*.key"]
        )
        equal(got, want)
        with pytest.raises(ValueError, match=r"has 'lm_head', which is not a module of"):
            saved.quantised("int8", ["lm_head"])

    def test_what_a_scheme_cannot_take(self) -> None:
        saved = Saved(randomised(masked()))
        with pytest.raises(ValueError, match="multiple of 128, got 64"):
            saved.quantised("int4_weight")
        got = saved.quantised("int4_weight", None, "skip")
        equal(got, qnn.convert(saved.float(), "int4_weight", on_unsupported="skip"))
        model = saved.float()
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight[3, 5] = torch.nan
        model.save_pretrained(saved.path)
        with pytest.raises(ValueError, match=r"layer.0.output.dense: its weight holds 1 NaN"):
            saved.quantised("int8")
        got = saved.quantised("int8", None, "skip")
        assert type(got.bert.encoder.layer[0].output.dense) is nn.Linear
        assert same_state(got, qnn.convert(saved.float(), "int8", on_unsupported="skip"))

    def test_configs(self) -> None:
        assert qnn.Int4WeightG64Config().scheme == "int4_weight_g64"
        assert "*.query" in repr(qnn.QnnConfig({"*.query": "int8", nn.Embedding: "int8_weight"}))
        for scheme, message in (("int8_static", "needs calibration"), ("int9", "int9")):
            with pytest.raises(ValueError, match=message):
                qnn.QnnConfig(scheme)
        with pytest.raises(TypeError, match="takes a list of names of modules, got 'lm_head'"):
            qnn.Int8Config(modules_to_not_convert="lm_head")
        with pytest.raises(ValueError, match="'error' or 'skip', got 'maybe'"):
            qnn.Int8Config(on_unsupported="maybe")
        with pytest.raises(AttributeError):
            _ = qnn.Int9Config
        saved = Saved(randomised(masked()))
        config = {"quant_method": "qnn", "scheme": "int8"}
        got = saved.cls.from_pretrained(saved.path, quantization_config=config)
        equal(got, qnn.convert(saved.float(), "int8"))

    def test_tied_by_the_config_and_not_in_the_file(self) -> None:
        st = pytest.importorskip("safetensors.torch", reason="needs safetensors")
        saved = Saved(llama(tie_word_embeddings=True))
        path = saved.path / "model.safetensors"
        state = st.load_file(path)
        table = state["model.embed_tokens.weight"]
        for head in (table.clone(), table * 2):
            st.save_file({**state, "lm_head.weight": head}, path, metadata={"format": "pt"})
            rules = {"*": "int8", nn.Embedding: "int8_weight"}
            got, want = saved.quantised(rules), qnn.convert(saved.float(), rules)
            assert same_state(got, want)
            got.save_pretrained(saved.path / "q")
            assert same_state(saved.cls.from_pretrained(saved.path / "q"), got)


class TestReading:
    """`from_pretrained` of a file that qnn wrote."""

    def test_one_that_convert_made(self) -> None:
        model = qnn.convert(randomised(masked()), {"*": "fp8", "*.query": None})
        saved = Saved(model)
        equal(saved.cls.from_pretrained(saved.path), model)
        with pytest.warns(UserWarning, match="from the model will be used"):
            got = saved.cls.from_pretrained(saved.path, quantization_config=qnn.Int8Config())
        equal(got, model)

    def test_static(self) -> None:
        batches = [torch.randint(3, 100, (2, 9)) for _ in range(3)]
        prepared = qnn.prepare(randomised(masked()), exclude="*.key")
        model = qnn.convert(qnn.calibrate(prepared, batches))
        saved = Saved(model)
        equal(saved.cls.from_pretrained(saved.path), model)

    def test_truncated(self) -> None:
        st = pytest.importorskip("safetensors.torch", reason="needs safetensors")
        saved = Saved(qnn.convert(randomised(masked())))
        path = saved.path / "model.safetensors"
        state = st.load_file(path)
        del state["bert.encoder.layer.1.output.dense.weight_scale"]
        st.save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"the file has no bert\S*dense.weight_scale"):
            saved.cls.from_pretrained(saved.path)

    def test_a_config_without_a_description(self) -> None:
        saved = Saved(masked())
        config = saved.float().config
        config.quantization_config = {"quant_method": "qnn"}
        with pytest.raises(ValueError, match=r"pass quantization_config=qnn.Int8Config\(\)"):
            saved.cls.from_pretrained(saved.path, config=config)

    def test_auto_classes_pipelines_and_other_heads(self) -> None:
        transformers = hub()
        model = randomised(masked())
        saved = Saved(model)
        got = transformers.AutoModelForMaskedLM.from_pretrained(
            saved.path, quantization_config=qnn.Int8Config()
        )
        got.save_pretrained(saved.path)
        backbone = transformers.AutoModel.from_pretrained(saved.path)
        assert same_bits(output(backbone), output(got.bert))


MEMORY = """
import os, sys, tempfile, threading, time
import torch, transformers
import qnn
import qnn.integrations.transformers

def private():
    with open("/proc/self/status") as file:
        (line,) = (each for each in file if each.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def grown(cls, folder, **options):
    before, peak, done = private(), [0], threading.Event()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], private())
            time.sleep(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    model = cls.from_pretrained(folder, **options)
    done.set()
    thread.join()
    return model, max(peak[0], private()) - before

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
cls, scheme = transformers.BertModel, sys.argv[1]
with tempfile.TemporaryDirectory() as folder:
    for layers, hidden in ((1, 256), (8, 512)):  # the first for what is made once
        config = transformers.BertConfig(
            hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, vocab_size=400, max_position_embeddings=64)
        if os.fork() == 0:  # its floats are to leave nothing here
            cls(config).save_pretrained(f"{folder}/{hidden}")
            os._exit(0)
        os.wait()
        path = f"{folder}/{hidden}"
        size = os.path.getsize(path + "/model.safetensors")
        model, loaded = grown(cls, path, quantization_config=qnn.QnnConfig(scheme))
        model.save_pretrained(path + "/q")
        del model
        model, reloaded = grown(cls, path + "/q")
        assert any(isinstance(each, qnn.QLinear) for each in model.modules())
print(size, loaded, reloaded)
"""


class TestMemory:
    def test_no_float_copy(self) -> None:
        """Private memory over a checkpoint of 100 MB, the most at any time."""
        self.check("int8")

    @parameterized.expand([("int4_weight",), ("nvfp4_weight",)])
    @pytest.mark.long
    def test_others(self, scheme: str) -> None:
        self.check(scheme)

    def check(self, scheme: str) -> None:
        if not Path("/proc/self/status").exists():
            pytest.skip("needs /proc")
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "memory.py"
            script.write_text(MEMORY)
            code = (
                f"import runpy, sys; sys.argv = ['', {scheme!r}]; runpy.run_path({str(script)!r})"
            )
            size, loaded, reloaded = map(int, child(code).split()[-3:])
        assert 90e6 < size < 110e6
        assert loaded <= 0.3 * size
        assert reloaded <= 0.02 * size


class TestRegistration:
    def test_by_its_import(self) -> None:
        """Not by that of qnn, nor by convert."""
        child(
            """
            import torch, transformers
            from transformers.quantizers import auto
            import qnn
            known = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
            config = transformers.BertConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
            qnn.convert(transformers.BertModel(config))
            assert "qnn" not in known
            qnn.Int8Config
            assert "qnn" in known
            """
        )

    def test_without_transformers(self) -> None:
        child(
            """
            import sys
            sys.modules["transformers"] = None
            import qnn
            try:
                qnn.Int8Config()
            except ImportError as error:
                assert "qnn.Int8Config needs transformers" in str(error), error
            else:
                raise AssertionError
            """
        )
