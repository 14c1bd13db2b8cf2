"""Modules of other libraries that hold experts as stacks of weights, in a table by their class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qnn.kinds import qualified


@dataclass(frozen=True)
class ExpertsAdapter:
    """How a module of fused experts is built: two stacks of weights with a gate between them.

    Its forward is `(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])`, and the sum
    over the k experts of a token, by their weights, of `norm(w2 · gate(w1 · x + b1) + b2)`.

    Attributes:
        first, second: the parameters of the two products, `[E, N, H]` and `[E, H, I]`.
        transposed: whether they are `[E, H, N]` and `[E, I, H]`.
        bias: whether each has a bias, `first + "_bias"` `[E, N]`.
        gated: whether N = 2 I, not I.
        gate: takes the module and `[rows, N]`, and gives `[rows, I]`; a function that pickle finds
            by its name. None for the method `_apply_gate` of its class, where it has one, as
            transformers' have; else `act_fn` of the first half times the second, or `act_fn` alone.
        norm: the module, if any, that the second product goes through.
        routed: False where the forward is `(hidden_states)`, all tokens for each expert, `[E · T,
            H]`, expert by expert, and gives `[E · T, H]`.
        holds: the modules that it has.
    """

    first: str = "gate_up_proj"
    second: str = "down_proj"
    transposed: bool = False
    bias: bool = False
    gated: bool = True
    gate: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    norm: str | None = None
    routed: bool = True
    holds: frozenset[str] = frozenset({"act_fn"})

    @property
    def weights(self) -> tuple[str, str]:
        return self.first, self.second

    @property
    def biases(self) -> tuple[str, ...]:
        return (f"{self.first}_bias", f"{self.second}_bias") if self.bias else ()

    def shape(self, weight: torch.Tensor) -> tuple[int, ...]:
        """`[E, N, K]` of a parameter."""
        groups, rows, columns = weight.shape
        return (groups, columns, rows) if self.transposed else (groups, rows, columns)

    def why_not(self, module: nn.Module) -> str | None:
        """Why a module is not built so, or None."""
        held = module._parameters
        weights = [held.get(name) for name in self.weights]
        if any(each is None or each.dim() != 3 for each in weights):
            return f"its {self.first} and {self.second} are not weights of three axes"
        first, second = (self.shape(each) for each in weights if each is not None)
        inner = first[1] // 2 if self.gated else first[1]
        want = (first[0], first[2], inner)
        if second != want or (self.gated and first[1] % 2):
            return (
                f"its {self.second} {list(second)} does not follow its {self.first} {list(first)}"
            )
        sizes = zip(self.biases, (first, second), strict=True) if self.bias else ()
        for name, (groups, rows, _) in sizes:
            bias = held.get(name)
            if bias is None or tuple(bias.shape) != (groups, rows):
                return f"its {name} is not a bias of {[groups, rows]}"
        said = vars(module)  # by transformers' decorator
        for name, mine in _SAID.items():
            if said.get(name, mine(self)) != mine(self):
                return f"its {name} is {said[name]}, and its adapter says otherwise"
        if said.get("_is_expert_parallel"):
            return "its experts are shared out over processes; convert before"
        return None


_SAID: dict[str, Callable[[ExpertsAdapter], Any]] = {
    "is_transposed": lambda adapter: adapter.transposed,
    "has_bias": lambda adapter: adapter.bias,
    "has_gate": lambda adapter: adapter.gated,
    "has_post_expert_norm": lambda adapter: adapter.norm is not None,
}

_ADAPTERS: dict[str, ExpertsAdapter] = {}


def register_adapter(kind: str | type[nn.Module], adapter: ExpertsAdapter) -> None:
    """Have `convert` take modules of a class as fused experts: they become `QExperts`.

    A subclass is not taken, as it may mean more. Every process that loads a saved model needs it.

    Args:
        kind: the class, or its qualified name, `"package.module.Class"`.
        adapter: how it is built.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: the class has an adapter already.

        qnn.register_adapter("mine.models.Experts", qnn.ExpertsAdapter(transposed=True))
    """
    name = qualified(kind) if isinstance(kind, type) else kind
    if not isinstance(name, str) or not isinstance(adapter, ExpertsAdapter):
        raise TypeError(
            "qnn.register_adapter takes a class or its qualified name, and a qnn.ExpertsAdapter; "
            f"got {kind!r} and {type(adapter).__name__}."
        )
    if name in _ADAPTERS:
        raise ValueError(f"qnn.register_adapter: there is an adapter for {name} already.")
    _ADAPTERS[name] = adapter


def unregister_adapter(kind: str | type[nn.Module]) -> None:
    """Remove an adapter."""
    del _ADAPTERS[qualified(kind) if isinstance(kind, type) else kind]


def adapter_of(module: nn.Module) -> ExpertsAdapter | None:
    """How a module is built; None where that is not known."""
    return _ADAPTERS.get(qualified(type(module)))


def modules_held() -> frozenset[str]:
    """The names of modules that experts may have."""
    held = (
        adapter.holds | {f"{weight}_input_quantize" for weight in adapter.weights}
        for adapter in _ADAPTERS.values()
    )
    return frozenset().union(*held)


# [E, 2 I, H] and [E, H, I], without biases, with a gate of the class.
_PLAIN = (
    "afmoe.Afmoe", "axk1.AXK1", "axk2.AXK2", "bailing_hybrid.BailingHybrid", "beam.Beam",
    "cohere2_moe.Cohere2Moe", "deepseek_ocr2.DeepseekOcr2Text", "deepseek_v2.DeepseekV2",
    "deepseek_v3.DeepseekV3", "deepseek_v32.DeepseekV32", "deepseek_v4.DeepseekV4",
    "diffusion_gemma.DiffusionGemmaText", "dots1.Dots1", "dots3_note.Dots3Note",
    "ernie4_5_moe.Ernie4_5_Moe", "ernie4_5_vl_moe.Ernie4_5_VLMoeMoe", "exaone_moe.ExaoneMoe",
    "flex_olmo.FlexOlmo", "flint.Flint", "gemma4.Gemma4Text", "glm4_moe.Glm4Moe",
    "glm4_moe_lite.Glm4MoeLite", "glm4v_moe.Glm4vMoeText", "glm5_next.Glm5NextText",
    "glm_moe_dsa.GlmMoeDsa", "granitemoe.GraniteMoe", "granitemoe_swa.GraniteMoeSWA",
    "granitemoehybrid.GraniteMoeHybrid", "granitemoeshared.GraniteMoeShared",
    "hunyuan_v1_moe.HunYuanMoEV1", "hy_v3.HYV3", "hy_v4.HYV4", "inkling.Inkling",
    "inkling2.Inkling2", "jamba.Jamba", "kimi_linear.KimiLinear", "kolibri1.Kolibri1",
    "laguna.Laguna", "lfm2_moe.Lfm2Moe", "mellum.Mellum", "mimo_v2_flash.MiMoV2Flash",
    "minimax.MiniMax", "minimax_m2.MiniMaxM2", "minimax_m3_vl.MiniMaxM3VL", "mistral4.Mistral4",
    "mistral_large4.MistralLarge4Text", "mixtral.Mixtral", "olmoe.Olmoe", "phimoe.Phimoe",
    "qwen2_moe.Qwen2Moe", "qwen3_5_moe.Qwen3_5Moe", "qwen3_moe.Qwen3Moe", "qwen3_next.Qwen3Next",
    "qwen3_omni_moe.Qwen3OmniMoeThinkerText", "qwen3_omni_moe.Qwen3OmniMoeTalkerText",
    "qwen3_vl_moe.Qwen3VLMoeText", "qwen4_exp.Qwen4ExpText", "solar_open.SolarOpen",
    "step3p7.Step3p7", "unlimited_ocr.UnlimitedOcrText", "zaya.Zaya",
)  # fmt: skip


def _in_transformers(name: str) -> str:
    """`transformers.models.mixtral.modeling_mixtral.MixtralExperts`, of `mixtral.Mixtral`."""
    model, kind = name.split(".")
    return f"transformers.models.{model}.modeling_{model}.{kind}Experts"


_ADAPTERS |= {
    _in_transformers(name): adapter
    for name, adapter in {
        **dict.fromkeys(_PLAIN, ExpertsAdapter()),
        "aria.Aria": ExpertsAdapter(transposed=True),
        "gpt_oss.GptOss": ExpertsAdapter(transposed=True, bias=True),
        "llama4.Llama4Text": ExpertsAdapter(transposed=True, routed=False),
        "muse_spark.MuseSpark": ExpertsAdapter(
            norm="post_expert_norm", holds=frozenset({"act_fn", "post_expert_norm"})
        ),
        "nemotron_h.NemotronH": ExpertsAdapter(first="up_proj", gated=False),
    }.items()
}
