"""Graph mode on models of `transformers`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parameterized import parameterized

import qnn
from qnn import pt2e
from qnn.pt2e import Int8Quantizer

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(transformers: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=48))


def gpt2(transformers: Any) -> Any:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def llama(transformers: Any) -> Any:
    more = {"intermediate_size": 48, "num_key_value_heads": 1, "use_cache": False}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, **more, tie_word_embeddings=True)
    )


class TestModels:
    """With keyword inputs and any batch: the state dict is that of the flow of modules."""

    @parameterized.expand([(m, s) for m in (bert, gpt2, llama) for s in ("int8", "int8_static")])
    def test_as_the_modules(self, make: Any, scheme: str) -> None:
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        torch.manual_seed(0)
        model, ids = make(transformers).eval(), torch.randint(5, 60, (3, 7))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        sizes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
        with torch.no_grad():
            program = torch.export.export(model, (), inputs, dynamic_shapes=sizes)
        graph = pt2e.prepare_pt2e(program, Int8Quantizer(scheme))
        other = model
        if scheme == "int8_static":
            qnn.calibrate(graph, [inputs])
            other = qnn.calibrate(qnn.prepare(model), [inputs])
        graph = pt2e.convert_pt2e(graph)
        theirs = qnn.convert(other, None if scheme == "int8_static" else scheme).state_dict()
        ours = graph.state_dict()
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
        more = {name: torch.cat([value, value]) for name, value in inputs.items()}
        with torch.no_grad():
            assert qnn.sqnr(model(**more)[0], graph(**more)[0]) > 30
