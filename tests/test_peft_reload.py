"""Adapters of `test_peft.py` that are saved and loaded, compiled, cast and offloaded."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
from parameterized import parameterized

import qnn

peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
from qnn.integrations import peft as qnn_peft  # noqa: E402

from .test_peft import IDS, adapted, converted, learns, trained  # noqa: E402


class TestReload:
    @parameterized.expand(
        [
            ("int8", False),
            ("int8", True),
            ("fp8_block", False),
            ("nvfp4", True),
            ("int4_weight", False),
        ]
    )
    def test_onto_a_fresh_base(self, scheme: str, dora: bool) -> None:
        base = converted(scheme)
        model = adapted(base, use_dora=dora)
        trained(model.train())
        want = model.eval()(IDS)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = qnn_peft.load_adapter(converted(scheme), folder).eval()
            assert type(again.base_model.model.up) is qnn_peft.QLoraLinear
            assert torch.equal(again(IDS), want)
            assert not any(p.requires_grad for p in again.parameters())
            plain = peft.PeftModel.from_pretrained(converted(scheme), folder).eval()
            assert torch.equal(plain(IDS), want)  # peft alone: the same forward
            on = qnn_peft.load_adapter(converted(scheme), folder, is_trainable=True)
            assert learns(on)
        again.merge_adapter()
        again.unmerge_adapter()
        assert torch.equal(again(IDS), want)

    def test_a_second_adapter(self) -> None:
        """Also where the first one has none."""
        base = converted()
        first, second = adapted(base, ["up"]), adapted(base, ["up", "down"], r=2)
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            first.save_pretrained(one)
            second.save_pretrained(two)
            model = qnn_peft.load_adapter(copy.deepcopy(base), one)
            assert qnn_peft.load_adapter(model, two, "second") is model
            with pytest.raises(ValueError, match="give another adapter_name"):
                qnn_peft.load_adapter(model, two, "second")
        assert type(model.base_model.model.down) is qnn_peft.QLoraLinear
        assert torch.equal(model.eval()(IDS), first(IDS))
        model.set_adapter("second")
        assert torch.equal(model(IDS), second(IDS))

    def test_onto_from_pretrained(self, qnn_in_transformers: None) -> None:
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
        config = transformers.BertConfig(num_hidden_layers=1, vocab_size=100, **size)
        with tempfile.TemporaryDirectory() as folder:
            transformers.BertModel(config).save_pretrained(folder)
            options = {"quantization_config": qnn.Int8Config()}
            load = transformers.BertModel.from_pretrained
            lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            model = peft.get_peft_model(load(folder, **options), qnn_peft.register(lora)).eval()
            want = model(IDS).last_hidden_state
            model.save_pretrained(f"{folder}/lora")
            again = qnn_peft.load_adapter(load(folder, **options), f"{folder}/lora").eval()
            assert torch.equal(again(IDS).last_hidden_state, want)
            merged = again.merge_and_unload()
            assert qnn.sqnr(want, merged(IDS).last_hidden_state) > 20
            merged.save_pretrained(f"{folder}/merged")
            served = load(f"{folder}/merged").eval()
            assert torch.equal(served(IDS).last_hidden_state, merged(IDS).last_hidden_state)


class TestModes:
    @parameterized.expand([("lora", False, False), ("dora", True, True)])
    def test_compiled(self, name: str, dora: bool, dynamic: bool) -> None:
        model = adapted(converted(), use_dora=dora)
        call = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        results, gradients = [], []
        for each in (call, model):
            y = each(IDS)
            y.square().mean().backward()
            results.append(y)
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
            model.zero_grad()
        torch.testing.assert_close(*results)
        assert len(gradients[0]) == (6 if dora else 4)
        for mine, want in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, want)

    def test_empty_batch_and_casts(self) -> None:
        model = adapted(converted())
        assert model(IDS[:0]).shape == (0, 8, 8)
        half = copy.deepcopy(model).to(torch.bfloat16)
        assert qnn.sqnr(model(IDS), half(IDS).float()) > 25
        half.merge_adapter()
        assert half(IDS).dtype == torch.bfloat16

    def test_offloaded(self) -> None:
        """Merged where accelerate keeps the weights elsewhere."""
        accelerate = pytest.importorskip("accelerate", reason="needs the extra 'examples'")
        model = adapted(converted())
        want, merged = model(IDS), copy.deepcopy(model).merge_and_unload()
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert torch.equal(model(IDS), want)
        model.merge_adapter()
        assert torch.equal(model(IDS), merged(IDS))
        model.unmerge_adapter()
        assert torch.equal(model(IDS), want)
