"""Bytes of whole models with quantised tables, counted on the meta device for real configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qnn

RULES = {"*": "int8", nn.Embedding: "int8_weight"}


def _gpt2(transformers: Any) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def _mixtral(transformers: Any) -> Any:
    """Of the published sizes, with two experts and four layers."""
    config = transformers.MixtralConfig(num_local_experts=2, num_hidden_layers=4)
    return transformers.MixtralForCausalLM(config)


class TestBytes:
    @pytest.mark.parametrize("build", [_gpt2, _mixtral])
    def test_of_real_configs(self, build: Any) -> None:
        """At most 0.28 of float, biases and norms aside."""
        transformers = pytest.importorskip("transformers")
        with torch.device("meta"):
            model = build(transformers)
        weights = {id(p): p for p in model.parameters() if p.dim() > 1}
        whole = sum(p.nbytes for p in weights.values())
        out: Any = qnn.convert(model, RULES, inplace=True, progress=False)
        held = {
            id(parameter): parameter
            for module in out.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if not name.endswith("bias") and "norm" not in type(module).__name__.lower()
        }
        share = sum(p.nbytes for p in held.values()) / whole
        assert 0.25 < share <= 0.28
