"""Checkpoints of other writers into models of transformers, and qnn's into plain transformers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

from .checkpoints import ct_config, state_of
from .checkpoints import folder as tmp
from .common import same_bits
from .test_checkpoints import WRITTEN
from .test_checkpoints_foreign import AWQ, DEEPSEEK, words
from .test_load_pretrained import IDS, hub, same_state

pytestmark = pytest.mark.usefixtures("plain_transformers")
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(name: str = "Llama", **options: Any) -> Any:
    transformers = hub()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 100}
    config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=layer.in_features**-0.5)
    return model


def write(model: Any, folder: Path, layers: Any, config: Any, shards: int = 1) -> None:
    """`save_pretrained`, with the tensors of another writer and its config."""
    state = state_of(model, layers)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    size = "30KB" if shards > 1 else "5GB"
    model.save_pretrained(folder, state_dict=state, max_shard_size=size)
    path = folder / "config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "quantization_config": config}))


def save(config: Any, state: dict[str, torch.Tensor], folder: Path, described: Any) -> None:
    """A folder of tensors and a config, as other writers leave one."""
    from safetensors.torch import save_file

    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "quantization_config": described}))


def linear(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in PARTS}


def ct(kind: str, model: Any, folder: Path, **options: Any) -> None:
    """By compressed-tensors."""
    from .checkpoints import compressed, parsed

    form, weights, activations, _ = WRITTEN[kind]
    group = parsed({"weights": weights, "input_activations": activations})
    layers = {n: compressed(m.weight.detach(), form, group) for n, m in linear(model).items()}
    if activations and not activations.get("dynamic"):
        for tensors in layers.values():
            tensors["input_scale"] = torch.tensor([0.05])
    write(model, folder, layers, ct_config(form, group, ("lm_head",)), **options)


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """64 columns a group, the zero points in the middle or beside it."""
    n, k = weight.shape
    groups = weight.detach().view(n, -1, 64)
    scale = (groups.abs().amax(-1) / 6).half()
    zero = torch.full(scale.shape, 8) - torch.arange(n)[:, None] % 2
    codes = (groups / scale[..., None].float()).round() + zero[..., None]
    codes, order = codes.clamp(0, 15).view(n, k), (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(codes.T.numpy(), order),
        "qzeros": words(zero.T.numpy(), order),
        "scales": scale.T.contiguous(),
    }


class TestOthers:
    """`load_pretrained` of what qnn did not write."""

    @parameterized.expand(
        [("int8", True), ("fp8", False), ("int4", False), ("int4", True), ("mxfp8", False),
         ("int8 static", False), ("nvfp4 weights", False)]
    )  # fmt: skip
    def test_compressed_tensors(self, kind: str, tied: bool) -> None:
        model = llama(tie_word_embeddings=tied)
        with tmp() as folder, torch.no_grad():
            ct(kind, model, folder, shards=1 + tied)
            got = qnn.load_pretrained(type(model), folder)
            schemes = {m.scheme for m in linear(got).values()}
            assert schemes == {WRITTEN[kind][3]}
            assert type(got.lm_head) is nn.Linear
            assert (got.lm_head.weight is got.model.embed_tokens.weight) == tied
            want = model(IDS).logits
            assert qnn.sqnr(want, got(IDS).logits) > (8 if "4" in kind else 15)
            plain = qnn.load_pretrained(type(model), folder, dequantize=True)
            weights = {n: m.dequantize().weight for n, m in linear(got).items()}
            assert all(torch.equal(m.weight, weights[n]) for n, m in linear(plain).items())
            assert getattr(plain.config, "quantization_config", None) is None
            assert got.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 12)
            # And on as qnn's own.
            got.save_pretrained(folder / "again")
            again = qnn.load_pretrained(type(model), folder / "again")
            assert torch.equal(again(IDS).logits, got(IDS).logits)

    def test_auto_classes_and_backbones(self) -> None:
        transformers = hub()
        model = llama()
        with tmp() as folder, torch.no_grad():
            ct("int8", model, folder)
            whole = qnn.load_pretrained(transformers.AutoModelForCausalLM, folder)
            back = qnn.load_pretrained(transformers.AutoModel, folder)
            assert type(back) is type(model.model)
            assert type(whole) is type(model)
            hidden = back(IDS).last_hidden_state
            assert torch.equal(hidden, whole.model(IDS).last_hidden_state)
            assert whole.config.name_or_path == str(folder)

    @parameterized.expand([("awq",), ("fp8",)])
    def test_other_methods(self, method: str) -> None:
        model = llama()
        layers, config, scheme = {}, AWQ, "int4_weight_asym_g64"
        for name, layer in linear(model).items():
            if method == "awq":
                layers[name] = awq(layer.weight)
            else:
                made = qnn.QLinear.from_float(layer, "fp8_block").state_dict()
                layers[name] = {
                    "weight": made["weight"],
                    "weight_scale_inv": made["weight_scale"],
                }
                config, scheme = DEEPSEEK, "fp8_block"
        with tmp() as folder, torch.no_grad():
            write(model, folder, layers, config)
            got = qnn.load_pretrained(type(model), folder)
            assert {m.scheme for m in linear(got).values()} == {scheme}
            floats = qnn.load_pretrained(type(model), folder, dequantize=True)
            least = 60 if method == "awq" else 20  # whose activations are quantised
            assert qnn.sqnr(floats(IDS).logits, got(IDS).logits) > least
            plain = qnn.load_pretrained(type(model), folder, dequantize=True, dtype=torch.bfloat16)
            assert plain.dtype == torch.bfloat16
            for name, layer in linear(plain).items():
                held = linear(got)[name].dequantize().weight
                assert same_bits(layer.weight.data, held.bfloat16())

    def test_names_that_differ_in_the_file(self) -> None:
        """A head's file has a prefix that its backbone's has not."""
        model = llama()
        with tmp() as folder, torch.no_grad():
            ct("int8", model.model, folder)
            got = qnn.load_pretrained(type(model), folder)
            assert {m.scheme for m in linear(got).values()} == {"int8"}
            want = qnn.load_pretrained(type(model.model), folder)
            hidden = got.model(IDS).last_hidden_state
            assert torch.equal(hidden, want(IDS).last_hidden_state)

    def test_fused_experts(self) -> None:
        """Which the file has one by one, and the model as one: floats only."""
        transformers = hub()
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            hidden_size=128, intermediate_size=128, num_attention_heads=2, num_hidden_layers=1,
            num_key_value_heads=1, num_local_experts=2, vocab_size=100,
        )  # fmt: skip
        model = transformers.MixtralForCausalLM(config).eval()
        with tmp() as folder, torch.no_grad():
            model.save_pretrained(folder)
            from qnn.integrations.checkpoints.files import Files

            state = {name: t.clone() for name, t in Files(folder).tensors.items()}
            for name in [n for n in state if ".experts." in n]:
                q = qnn.QLinear.from_float(linear_of(state.pop(name)), "fp8_block").state_dict()
                state[name] = q["weight"]
                state[name.removesuffix("weight") + "weight_scale_inv"] = q["weight_scale"]
            assert any(name.endswith("_inv") for name in state)
            from safetensors.torch import save_file

            save_file(state, folder / "model.safetensors", {"format": "pt"})
            path = folder / "config.json"
            held = json.loads(path.read_text())
            path.write_text(json.dumps({**held, "quantization_config": DEEPSEEK}))
            with pytest.raises(ValueError, match=r"is a part of .* quantised layers are not fused"):
                qnn.load_pretrained(type(model), folder)
            got = qnn.load_pretrained(type(model), folder, dequantize=True)
            assert qnn.sqnr(model(IDS).logits, got(IDS).logits) > 20

    def test_gpt_oss(self) -> None:
        """Fused experts in MXFP4, against transformers' own decoder."""
        transformers = hub()
        packed: Any = pytest.importorskip("transformers.integrations.mxfp4")
        torch.manual_seed(0)
        config = transformers.GptOssConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, num_local_experts=3, num_experts_per_tok=2,
            vocab_size=100, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        model = transformers.GptOssForCausalLM(config).eval()
        where = "model.layers.0.mlp.experts"
        state = {name: t.clone() for name, t in model.state_dict().items()}
        want = {}
        for name, rows, columns in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
            blocks = torch.randint(0, 256, (3, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (3, rows, columns // 32), dtype=torch.uint8)
            del state[f"{where}.{name}"]
            state |= {f"{where}.{name}_blocks": blocks, f"{where}.{name}_scales": scales}
            decode = packed._convert_moe_packed_tensors
            want[name] = decode(blocks, scales, dtype=torch.float32)
        with tmp() as folder, torch.no_grad():
            save(config, state, folder, {"quant_method": "mxfp4"})
            cls = type(model)
            plain = qnn.load_pretrained(cls, folder, dequantize=True, dtype=torch.float32)
            experts = plain.get_submodule(where)
            assert torch.equal(experts.gate_up_proj, want["gate_up_proj"])
            assert torch.equal(experts.down_proj, want["down_proj"])
            for got in (
                qnn.load_pretrained(cls, folder, dtype=torch.float32),
                qnn.load_checkpoint(cls(config).eval(), folder),
            ):
                held = got.get_submodule(where)
                assert isinstance(held, qnn.QExperts)
                assert held.scheme == "nvfp4_weight"
                back = held.dequantize()
                assert torch.equal(back.gate_up_proj, want["gate_up_proj"])
                assert torch.equal(back.down_proj, want["down_proj"])
                assert qnn.sqnr(plain(IDS).logits, got(IDS).logits) > 60
            back = qnn.load_pretrained(transformers.AutoModel, folder)
            assert isinstance(back.get_submodule(where.removeprefix("model.")), qnn.QExperts)
            for change, message in (
                ({f"{where}.down_proj_scales": None}, "down_proj_scales is missing"),
                ({f"{where}.down_proj_scales": scales[:, :5].clone()}, "and scales .* got"),
                ({f"{where}.down_proj_scales": scales.float()}, "blocks and scales are bytes"),
                (
                    {f"{where}.down_proj_scales": scales + torch.arange(64)[:, None].byte()},
                    "do not span; pass dequantize=True",
                ),
            ):
                bad = {k: t for k, t in {**state, **change}.items() if t is not None}
                save(config, bad, folder / "bad", {"quant_method": "mxfp4"})
                with pytest.raises(ValueError, match=message):
                    qnn.load_pretrained(cls, folder / "bad")

    def test_refused(self) -> None:
        transformers = hub()
        model = llama()
        with tmp() as folder:
            ct("int8", model, folder)
            with pytest.raises(ValueError, match="cannot be offloaded to the disk"):
                qnn.load_pretrained(type(model), folder, device_map={"": "disk"})
            with pytest.raises(ValueError, match="has no model for LlamaConfig"):
                qnn.load_pretrained(transformers.AutoModelForMaskedLM, folder)
            path = folder / "config.json"
            held = json.loads(path.read_text())
            held["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "float"
            path.write_text(json.dumps(held))
            with pytest.raises(
                ValueError, match="its config says format 'int-quantized': it holds"
            ):
                qnn.load_pretrained(type(model), folder)
            qnn.save_checkpoint(qnn.convert(model, "int8"), folder / "own")
            with pytest.raises(ValueError, match="this one names its schemes"):
                qnn.load_pretrained(type(model), folder / "own", activations="float")
            plain = qnn.load_pretrained(type(model), folder / "own", dequantize=True)
            assert not [m for m in plain.modules() if isinstance(m, qnn.Quantized)]


class TestPlainTransformers:
    """transformers without qnn reads what `save_checkpoint` writes."""

    @parameterized.expand(["int8", "fp8_tensor", "fp8_block", "mxfp8", "nvfp4", "int4_weight"])
    def test_written_by_qnn(self, scheme: str) -> None:
        self.check(scheme)

    @parameterized.expand(["int8_weight", "fp8", "fp8_weight", "int4_weight_g64", "int8_int4"])
    @pytest.mark.long
    def test_other_schemes(self, scheme: str) -> None:
        self.check(scheme)

    def check(self, scheme: str) -> None:
        source = llama().bfloat16()
        model = qnn.convert(source, scheme, exclude="lm_head")
        if scheme == "nvfp4":
            assert len(qnn.share_scales(model, source)) == 4
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            qnn.save_checkpoint(model, folder, max_shard_size=50_000)
            assert len(list(Path(folder).glob("*.safetensors"))) > 1
            plain = type(model).from_pretrained(folder).eval()
            assert not [m for m in plain.modules() if isinstance(m, qnn.Quantized)]
            again = qnn.load_pretrained(type(model), folder)
            assert same_state(again, model)
            want = again(IDS).logits.float()
            assert qnn.sqnr(want, plain(IDS).logits.float()) > (9 if scheme == "nvfp4" else 15)
            decoded = linear(plain)  # by the call
            for name, layer in linear(model).items():
                want = layer.dequantize().weight
                torch.testing.assert_close(
                    decoded[name].weight.to(want.dtype), want, rtol=2.0**-7, atol=0
                )


def linear_of(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer
