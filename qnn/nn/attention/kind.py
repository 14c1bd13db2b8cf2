"""The kind of attention layers: `nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as TF

from qnn.kinds import Kind, Observation, Own, is_swapped, register_kind
from qnn.nn.attention.forward import APART, PACKED
from qnn.nn.attention.observed import ObservedMultiheadAttention
from qnn.nn.attention.quantized import QMultiheadAttention
from qnn.nn.linear.observed import default_spec, spec_of_input, training_spec

_BIASES = ("in_proj_bias", "bias_k", "bias_v")
_POINTS = ("query_quantize", "key_quantize", "value_quantize")


class AttentionKind(Kind):
    """Layers whose output projection is a linear layer inside, which is swapped before."""

    name = "attention"
    floats = (nn.MultiheadAttention,)
    titles = ("nn.MultiheadAttention",)
    quantized = (QMultiheadAttention,)
    observed = (ObservedMultiheadAttention,)
    holds = frozenset({"out_proj", *_POINTS})
    calls = ("out_proj",)
    leaves = Kind.leaves | {"name", "_qkv_same_embed_dim"}

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    def why_left(
        self, module: nn.Module, scheme: str, *, named: bool = False, training: bool = False
    ) -> str | None:
        if self.is_observed(module) and not training:
            return None
        return super().why_left(module, scheme, named=named, training=training)

    def op(self, layer: type[nn.Module]) -> str:
        return "linear"

    def sample(self, layer: type[nn.Module], size: int) -> tuple[nn.Module, torch.Tensor]:
        return layer(size, 4), torch.randn(5, 3, size)

    def names(self, module: nn.Module) -> tuple[str, ...]:
        layer = cast(nn.MultiheadAttention, module)
        biases = _BIASES if layer.bias_k is not None else _BIASES[:1]
        return (*PACKED, *APART, *biases)

    def weights(self, module: nn.Module) -> dict[str, Any]:
        held = module._parameters
        return {name: held[name] for name in (*PACKED, *APART) if held.get(name) is not None}

    def why_not(self, module: nn.Module, scheme: str) -> str | None:
        out = cast(nn.MultiheadAttention, module).out_proj
        if type(out).forward is not nn.Linear.forward and not is_swapped(out):
            return (
                f"its out_proj is a {type(out).__name__} with a forward of its own, which "
                "nn.MultiheadAttention does not call; put an nn.Linear there"
            )
        return super().why_not(module, scheme)

    def quantize(self, layer: nn.Module, scheme: str, own: Own) -> QMultiheadAttention:
        if isinstance(layer, ObservedMultiheadAttention):
            made = QMultiheadAttention._around_observed(layer)
        else:
            made = QMultiheadAttention._around(cast(nn.MultiheadAttention, layer), scheme)
        for name in _BIASES:
            if layer._parameters.get(name) is not None:
                made._parameters[name] = own(layer._parameters[name])
        made.out_proj = own(layer.out_proj)
        return made

    def observe(self, layer: nn.Module, how: Observation, own: Own) -> nn.Module:
        old = cast(nn.MultiheadAttention, layer)
        made = ObservedMultiheadAttention._around(old, _spec(layer, how), how.qat, how.name)
        for name, parameter in layer._parameters.items():
            made._parameters[name] = None if parameter is None else own(parameter)
        made.out_proj = own(layer.out_proj)
        if isinstance(layer, ObservedMultiheadAttention):
            for new, known in zip(made.points(), layer.points(), strict=True):
                new.begin(known)
        return made

    def points(self, layer: nn.Module, how: Observation) -> list[str]:
        return ["input"]

    def check_observation(self, layer: nn.Module, how: Observation) -> None:
        _spec(layer, how)

    def require_ranges(self, layer: nn.Module) -> None:
        cast(ObservedMultiheadAttention, layer).grids()

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        made = cast(QMultiheadAttention, layer)
        return made._weight_shapes()[made._names[0]]

    def remarks(self, model: nn.Module) -> dict[str, str]:
        """Where a layer in an encoder is swapped: what torch would have run."""
        found: dict[str, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.TransformerEncoderLayer) and _was_fused(module):
                swapped = (n for n, each in module.named_modules(prefix=name) if is_swapped(each))
                if (first := next(swapped, None)) is not None:
                    found[first] = _FUSED
        return found


_FUSED = (
    "; torch's fused kernel of encoder layers, which reads float weights, is off, and so are "
    "nested tensors: rows of padding are computed, and are not zeros"
)


def _was_fused(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether torch would run an encoder layer in its fused kernel, in evaluation."""
    attention, activation = layer.self_attn, layer.activation
    fused = activation in (TF.relu, TF.gelu) or isinstance(activation, nn.ReLU | nn.GELU)
    sizes = attention.kdim == attention.vdim == attention.embed_dim
    return bool(
        fused
        and sizes
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention.num_heads % 2 == 0
        and layer.norm1.eps == layer.norm2.eps
    )


def _spec(layer: nn.Module, how: Observation) -> Any:
    """The spec of the inputs: that of the call, or what the layer was observed with, or else that
    of the scheme.
    """
    spec = spec_of_input(how.parts)
    if spec is None and isinstance(layer, ObservedMultiheadAttention):
        return training_spec(layer.spec)
    return spec or default_spec(how.scheme, how.qat)


register_kind(AttentionKind())
