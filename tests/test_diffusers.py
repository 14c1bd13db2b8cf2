"""Models and pipelines of diffusers, quantised while they are read, saved, and loaded again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qnn

from .test_load_pretrained import same_state

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
st = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

pytestmark = pytest.mark.usefixtures("qnn_in_diffusers")
SCHEMES = ("int8", "int8_weight", "fp8_weight", "fp8_block", "nvfp4_weight")


def dit() -> Any:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    ).eval()  # fmt: skip


def vae() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def unet() -> Any:
    torch.manual_seed(2)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ).eval()  # fmt: skip


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    x = torch.randn(2, 4, 8, 8, dtype=model.dtype)
    plain = getattr(model, "_orig_mod", model)
    if isinstance(plain, diffusers.AutoencoderKL):
        return model.decode(x).sample
    step = torch.tensor([3, 4])
    if isinstance(plain, diffusers.UNet2DConditionModel):
        text = torch.randn(2, 5, 16, dtype=model.dtype)
        return model(x, step, encoder_hidden_states=text).sample
    return model(x, timestep=step, class_labels=torch.tensor([1, 2])).sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float checkpoints: dit, vae, unet, and a pipeline of the first two."""
    root = tmp_path_factory.mktemp("float")
    for make in (dit, vae, unet):
        make().save_pretrained(root / make.__name__)
    scheduler = diffusers.DDIMScheduler()
    diffusers.DiTPipeline(dit(), vae(), scheduler).save_pretrained(root / "pipeline")
    return root


def load(folder: Path, make: Any, scheme: Any = "int8", **options: Any) -> Any:
    config = scheme if isinstance(scheme, qnn.QnnConfig) else qnn.QnnConfig(scheme)
    path = folder / make.__name__
    return type(make()).from_pretrained(path, quantization_config=config, **options)


class TestLoad:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_as_convert(
        self, folder: Path, tmp_path: Path, scheme: str, dtype: torch.dtype
    ) -> None:
        for make in (dit, vae, unet):
            config = qnn.QnnConfig(scheme, on_unsupported="skip")
            model = load(folder, make, config, torch_dtype=dtype)
            plain = type(model).from_pretrained(folder / make.__name__, torch_dtype=dtype)
            want = qnn.convert(plain, scheme, on_unsupported="skip")
            assert same_state(model, want)
            assert torch.equal(run(model), run(want))
            assert not any(p.requires_grad for m in model.modules() for p in _codes(m))
            model.save_pretrained(tmp_path / make.__name__)
            again = type(model).from_pretrained(tmp_path / make.__name__, torch_dtype=dtype)
            assert same_state(again, model)
            assert torch.equal(run(again), run(model))
            assert again.dtype == dtype
            assert not any(p.requires_grad for m in again.modules() for p in _codes(m))

    def test_saved_without_the_quantizer(self, folder: Path, tmp_path: Path) -> None:
        """What `convert` made, in place or not, calibrated or not."""
        model = qnn.prepare(dit(), "int8_static")
        for _ in range(2):
            run(model)
        model = qnn.convert(model)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert type(again.hf_quantizer).__name__ == "QnnDiffusersQuantizer"
        assert torch.equal(run(again), run(model))

    def test_in_shards_and_as_a_pickle(self, tmp_path: Path) -> None:
        want = qnn.convert(dit(), "int8")
        dit().save_pretrained(tmp_path / "dit", max_shard_size="20KB")
        assert len(list((tmp_path / "dit").glob("*.safetensors"))) > 1
        assert same_state(load(tmp_path, dit), want)
        model = load(tmp_path, dit)
        model.save_pretrained(tmp_path / "int8", max_shard_size="10KB")
        assert same_state(type(model).from_pretrained(tmp_path / "int8"), want)
        dit().save_pretrained(tmp_path / "bin" / "dit", safe_serialization=False)
        assert same_state(load(tmp_path / "bin", dit, use_safetensors=False), want)

    def test_which_layers(self, folder: Path, tmp_path: Path) -> None:
        config = qnn.QnnConfig(
            {"*": "int8", "*.attn1.*": "int8_weight"}, modules_to_not_convert=["proj_out_2"]
        )
        model = load(folder, dit, config)
        schemes = {n: m.scheme for n, m in model.named_modules() if isinstance(m, qnn.QLinear)}
        assert schemes["transformer_blocks.0.attn1.to_q"] == "int8_weight"
        assert schemes["transformer_blocks.0.ff.net.2"] == "int8"
        assert type(model.proj_out_2) is nn.Linear
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert {n: type(m) for n, m in again.named_modules()} == {
            n: type(m) for n, m in model.named_modules()
        }

    def test_device_map(self, folder: Path) -> None:
        want = run(load(folder, unet))
        for device_map in ("auto", {"": "cpu"}):
            assert torch.equal(run(load(folder, unet, device_map=device_map)), want)
        with pytest.raises(ValueError, match="offloads to the disk"):
            load(folder, dit, device_map={"": "disk"}, offload_folder="/nowhere")

    def test_dequantize(self, folder: Path, tmp_path: Path) -> None:
        model = load(folder, dit)
        plain = copy.deepcopy(model).dequantize()
        assert type(plain.proj_out_2) is nn.Linear
        assert qnn.sqnr(run(dit()), run(plain)) > 30
        plain.save_pretrained(tmp_path)
        assert "quantization_config" not in _config(tmp_path)
        assert same_state(type(plain).from_pretrained(tmp_path), plain)

    def test_compiled_and_trained_with_adapters(self, folder: Path) -> None:
        model = load(folder, unet)
        torch._dynamo.reset()
        want = run(model)
        assert torch.equal(run(torch.compile(model, fullgraph=True, backend="aot_eager")), want)
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))
        assert not torch.equal(run(model), want)
        x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
        model(x, torch.tensor([1]), encoder_hidden_states=text).sample.sum().backward()
        adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
        assert adapters
        assert all(p.grad is not None and p.grad.any() for p in adapters.values())


class TestPipelines:
    @pytest.mark.parametrize("one_config", [True, False])
    def test_components(self, folder: Path, tmp_path: Path, one_config: bool) -> None:
        if one_config:
            config = diffusers.PipelineQuantizationConfig(
                quant_backend="qnn",
                quant_kwargs={"scheme": "int8"},
                components_to_quantize=["transformer"],
            )
        else:
            config = diffusers.PipelineQuantizationConfig(
                quant_mapping={"transformer": qnn.Int8Config()}
            )
        pipeline = diffusers.DiTPipeline.from_pretrained(
            folder / "pipeline", quantization_config=config
        )
        want = qnn.convert(dit(), "int8")
        assert same_state(pipeline.transformer, want)
        assert type(pipeline.vae.decoder.conv_in) is nn.Conv2d
        pipeline.save_pretrained(tmp_path)
        again = diffusers.DiTPipeline.from_pretrained(tmp_path)
        assert same_state(again.transformer, want)
        images = [
            p([1], num_inference_steps=1, guidance_scale=1.0, output_type="np",
              generator=torch.Generator().manual_seed(0)).images
            for p in (pipeline, again)
        ]  # fmt: skip
        assert (images[0] == images[1]).all()


class TestErrors:
    def test_files_that_lack_or_have_more(self, folder: Path, tmp_path: Path) -> None:
        model = load(folder, dit)
        model.save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        whole = st.load_file(path)
        name = "proj_out_2.weight_scale"
        st.save_file({k: v for k, v in whole.items() if k != name}, path)
        with pytest.raises(ValueError, match=r"has no proj_out_2\.weight_scale"):
            type(model).from_pretrained(tmp_path)
        st.save_file({**whole, name: torch.full_like(whole[name], torch.nan)}, path)
        with pytest.raises(ValueError, match=r"proj_out_2"):
            type(model).from_pretrained(tmp_path)

    def test_what_cannot_be_quantised(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="cannot be"):
            load(folder, unet, "int4_weight_g32")
        model = load(folder, unet, qnn.QnnConfig("int4_weight_g32", on_unsupported="skip"))
        assert "in_features" in str(qnn.summary(model))

    def test_names_of_no_module(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="'head', which is not a module"):
            load(folder, dit, qnn.QnnConfig(modules_to_not_convert=["head"]))

    def test_a_config_beside_a_saved_one(self, folder: Path, tmp_path: Path) -> None:
        load(folder, dit).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            model = diffusers.DiTTransformer2DModel.from_pretrained(
                tmp_path, quantization_config=qnn.Fp8WeightConfig()
            )
        assert model.proj_out_2.scheme == "int8"

    def test_casts(self, folder: Path) -> None:
        model = load(folder, dit)
        for cast in (lambda: model.half(), lambda: model.to(torch.bfloat16)):
            with pytest.raises(ValueError, match="quantized"):
                cast()


def _codes(module: nn.Module) -> list[torch.Tensor]:
    kept = module._kept() if isinstance(module, qnn.nn.base.Quantized) else []
    return [p for n, p in module._parameters.items() if n in kept and p is not None]


def _config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())
