"""Other libraries over a converted model, unmodified: safetensors, transformers, peft, FSDP2, …"""

from __future__ import annotations

import copy
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized

import qnn

from . import zoo
from .common import forked, mlp, need_sharded_integers

pytestmark = pytest.mark.usefixtures("plain_transformers")


def bert(layers: int = 2, **config: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
    torch.manual_seed(0)
    return transformers.BertModel(
        transformers.BertConfig(num_hidden_layers=layers, **config)
    ).eval()


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 100}


class TestSafetensors:
    def test_plain_save_file_and_a_memory_mapped_load(self) -> None:
        st = pytest.importorskip("safetensors.torch", reason="needs the extra 'dev'")
        model, x = mlp(), torch.randn(3, 48)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            st.save_file(model.state_dict(), path)
            fresh = mlp()
            with torch.no_grad():
                for p in fresh.parameters():
                    p.zero_()
            fresh.load_state_dict(st.load_file(path))
            assert torch.equal(fresh(x), model(x))
            mapped = mlp()
            mapped.load_state_dict(st.load_file(path), assign=True)
            str(qnn.summary(mapped))
            assert torch.equal(mapped(x), model(x))


class TestBert:
    def test_sqnr_of_six_layers(self) -> None:
        model = bert(6)
        twin = qnn.convert(model)
        torch.manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (4, 128))
        with torch.no_grad():
            got, want = twin(ids), model(ids)
            assert qnn.sqnr(want.last_hidden_state, got.last_hidden_state) >= 35
            again = qnn.compare(model, twin, {"input_ids": ids})
        assert again.output >= 35
        assert len(again.rows) == 6 * 6 + 2
        assert len([r for r in qnn.summary(twin).rows if r.scheme == "int8"]) == 37

    def test_compiled_and_exported_with_dynamic_batch(self) -> None:
        model = qnn.convert(bert(1, **SMALL))
        ids = torch.randint(0, 100, (2, 16))
        with torch.no_grad():
            want = model(ids).last_hidden_state
            compiled = torch.compile(model, fullgraph=True)
            assert qnn.sqnr(want, compiled(ids).last_hidden_state) > 50

    def test_activations_cast_to_the_weight_dtype(self) -> None:
        """T5 casts the input of `wo` to `wo.weight.dtype`, unless that is int8: it stays float."""
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        config = transformers.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            vocab_size=50,
            decoder_start_token_id=0,
        )
        torch.manual_seed(0)
        model = transformers.T5EncoderModel(config).eval()
        twin = qnn.convert(model)
        ids = torch.randint(0, 50, (2, 7))
        with torch.no_grad():
            want, got = model(ids).last_hidden_state, twin(ids).last_hidden_state
        assert qnn.sqnr(want, got) > 25


class TestSavePretrained:
    """The saved model says what it is: transformers reloads it, and not its bare integers."""

    def test_reloads_in_plain_transformers_and_in_qnn(self) -> None:
        pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
        st = pytest.importorskip("safetensors.torch", reason="needs the extra 'dev'")
        model = bert(1, **SMALL)
        schemes = {"*": "int8", "*.dense": "int8_weight", "pooler": None}
        twin = qnn.convert(model, schemes)
        assert "quantization_config" not in model.config.to_dict()
        ids = torch.randint(0, 100, (2, 9))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            twin.save_pretrained(folder)
            again = type(model).from_pretrained(folder).eval()
            want, got = twin(ids).last_hidden_state, again(ids).last_hidden_state
            assert qnn.sqnr(want, got) > 40
            fresh = qnn.convert(bert(1, **SMALL), schemes)
            fresh.load_state_dict(st.load_file(Path(folder) / "model.safetensors"))
            assert torch.equal(fresh(ids).last_hidden_state, want)

    def test_the_outermost_model_describes_a_shared_config(self) -> None:
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(num_hidden_layers=1, **SMALL)
        )
        config = qnn.convert(model, exclude="classifier").config.quantization_config
        assert config["ignore"] == ["classifier"]
        assert "bert.pooler.dense" in config["config_groups"]["group_0"]["targets"]


class TestPeft:
    def test_lora_trains_saves_and_reloads(self) -> None:
        peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
        base = qnn.convert(bert(1, **SMALL))
        before = copy.deepcopy(base.state_dict())
        config = peft.LoraConfig(r=4, target_modules=["query", "value", "dense"], lora_dropout=0.0)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        ids = torch.randint(0, 100, (4, 12))
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses, target = [], torch.randn(4, 12, 64)
        for _ in range(8):
            optimiser.zero_grad()
            loss = (model(ids).last_hidden_state - target).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, tensor in model.state_dict().items():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if plain in before:
                assert torch.equal(tensor, before[plain]), name
        model.eval()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
            assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)

    @parameterized.expand([("convolutions", "head"), ("attention", "out_proj")])
    def test_other_kinds(self, name: str, target: str) -> None:
        """Beside convolutions, and inside an attention, whose gradients go to adapters before."""
        peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
        base = zoo.quantised(name, "int8")
        given = zoo.ZOO[name].inputs(3)
        want = base(*given)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[target]))
        assert torch.equal(model.eval()(*given), want)  # an adapter begins as nothing
        model.train()(*given).square().mean().backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert any("lora_B" in each for each in trained)
        for each, parameter in trained.items():
            assert parameter.grad is not None, each
            assert "lora_A" in each or bool(parameter.grad.any()), each

    def test_a_convolution_is_no_target(self) -> None:
        """peft makes adapters of its class, and so of integers, which it then cannot train."""
        peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
        config = peft.LoraConfig(r=4, target_modules=["stem.0"])
        with pytest.raises(RuntimeError, match="only Tensors of floating point"):
            peft.get_peft_model(zoo.quantised("convolutions", "int8"), config)

    def test_gradients_reach_lora_below_quantised_layers_when_compiled(self) -> None:
        peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        gradients = []
        for compiled in (False, True):
            torch.manual_seed(0)
            model = peft.get_peft_model(mlp(), config).train()
            torch.manual_seed(1)
            call = torch.compile(model, backend="aot_eager") if compiled else model
            call(torch.randn(3, 48)).square().mean().backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert len(gradients[0]) == 4
        for eager, comp in zip(*gradients, strict=True):
            assert eager is not None
            assert eager.abs().max().item() > 0
            torch.testing.assert_close(eager, comp)


class TestAccelerate:
    def test_cpu_offload_and_device_map(self) -> None:
        accelerate = pytest.importorskip("accelerate", reason="needs the extra 'examples'")
        model, x = mlp(), torch.randn(3, 48)
        want = model(x)
        with tempfile.TemporaryDirectory() as folder:
            offloaded = accelerate.disk_offload(mlp(), folder, execution_device=torch.device("cpu"))
            assert all(p.is_meta for p in offloaded.parameters())
            for _ in range(2):
                assert torch.equal(offloaded(x), want)


WORKER = """
import os, tempfile
import torch, torch.multiprocessing as mp, torch.distributed as dist
import qnn
from torch import nn

def model():
    torch.manual_seed(0)
    return qnn.convert(nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)))

def run(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(1)
    x, want = torch.randn(4, 48), None
    single = model()
    y = single(x); y.square().mean().backward()
    BODY
    got = wrapped(x)
    assert torch.equal(got, y), (got - y).abs().max()
    got.square().mean().backward()
    for (name, p), q in zip(wrapped.named_parameters(), single.parameters()):
        if q.requires_grad:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(grad, q.grad)
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo and autograd may want the GIL, and a Python that finalises ends them by abort.
    os._exit(0)

torch.set_num_threads(1)
mp.start_processes(run, (tempfile.mktemp(),), nprocs=2, start_method="fork")  # nothing has run here
print("both ranks agree")
"""


class TestDistributed:
    def both_ranks(self, body: str) -> None:
        out = forked(WORKER.replace("    BODY\n", textwrap.indent(textwrap.dedent(body), "    ")))
        assert "both ranks agree" in out

    def test_fsdp2_shards_the_quantised_weight(self) -> None:
        need_sharded_integers()
        self.both_ranks(
            """
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            wrapped = model()
            mesh = init_device_mesh("cpu", (2,))
            for layer in (wrapped[0], wrapped[2], wrapped):
                fully_shard(layer, mesh=mesh)
            local = wrapped[0].stored[0].to_local()
            assert local.dtype == torch.int8 and local.shape == (32, 48), local.shape
            """
        )

    def test_ddp(self) -> None:
        self.both_ranks(
            """
            wrapped = nn.parallel.DistributedDataParallel(model())
            """
        )
