"""What files of quantised tables and of 16-bit activations say, and who reads them."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import pytest
import torch
from torch import nn

import qnn

from .common import same_bits

pytestmark = pytest.mark.usefixtures("plain_transformers")
TABLES = {nn.Embedding: "int8_weight"}
IDS = torch.arange(14).reshape(2, 7) * 5 % 87 + 3


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 90, "max_position_embeddings": 40}
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()


def converted(scheme: str) -> Any:
    model = bert()
    if scheme != "int16_static":
        return qnn.convert(model, scheme, progress=False)
    return qnn.convert(qnn.calibrate(qnn.prepare(model, scheme), [IDS]), progress=False)


class TestSixteenBits:
    @pytest.mark.parametrize("scheme", ["int16", "int16_static"])
    def test_both_readers(self, scheme: str) -> None:
        """compressed-tensors has a form for 16-bit activations, and transformers computes them."""
        out = converted(scheme)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            out.save_pretrained(folder)
            again = qnn.load_pretrained(type(out), folder)
            plain = type(out).from_pretrained(folder).eval()
            want = out(IDS).logits
            assert same_bits(again(IDS).logits, want)
            assert qnn.sqnr(want, plain(IDS).logits) > 60
        layers = [m for m in again.modules() if isinstance(m, qnn.QLinear)]
        assert {layer.scheme for layer in layers} == {scheme}


class TestTables:
    @pytest.mark.parametrize("rules", [TABLES, {"*": "int8", **TABLES}])
    def test_refused_by_name_elsewhere(self, rules: Any) -> None:
        """compressed-tensors has no form for a quantised table: transformers says what reads it."""
        out = qnn.convert(bert(), rules, progress=False)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            out.save_pretrained(folder)
            assert same_bits(qnn.load_pretrained(type(out), folder)(IDS).logits, out(IDS).logits)
            with pytest.raises(ValueError, match=r"qnn.QEmbedding; use qnn.load_pretrained"):
                type(out).from_pretrained(folder)

    def test_a_class_with_a_forward_is_called_what_it_is_over(self) -> None:
        pytest.importorskip("transformers")
        bart: Any = importlib.import_module("transformers.models.bart.modeling_bart")
        model = nn.Sequential(bart.BartScaledWordEmbedding(8, 8, 0, 2.0))
        out = qnn.convert(model, TABLES)
        (group,) = qnn.compressed_tensors.quantization_config(out)["config_groups"].values()
        assert group["format"] == "qnn.QEmbedding; use qnn.load_pretrained"
