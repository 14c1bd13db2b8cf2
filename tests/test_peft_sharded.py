"""LoRA over int8 parameters that FSDP2 shards, on the two processes of `test_distributed.py`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

from .common import need_sharded_integers
from .test_distributed import Block, both_ranks, mesh, tearDownModule, whole  # noqa: F401

pytest.importorskip("peft", reason="needs the extra 'examples'")


def sharded_adapters(rank: int, scheme: str, dora: bool) -> None:
    """Results, gradients and a gathered state are those of one process, bit for bit."""
    import peft
    from torch.distributed.checkpoint import state_dict
    from torch.distributed.fsdp import fully_shard

    from qnn.integrations.peft import get_peft_model

    torch.manual_seed(1)
    base = qnn.convert(nn.Sequential(Block(128, 256), Block(128, 256)), scheme)
    config = peft.LoraConfig(
        r=4, target_modules=["up", "down"], init_lora_weights=False, use_dora=dora
    )
    alone = get_peft_model(base, config)
    wrapped, x = copy.deepcopy(alone), torch.randn(2, 5, 128)
    for block in wrapped.base_model.model:
        fully_shard(block, mesh=mesh(2))
    fully_shard(wrapped, mesh=mesh(2))
    up = wrapped.base_model.model[0].up
    (codes, *_), (held, *_) = up.base_layer.stored, alone.base_model.model[0].up.base_layer.stored
    assert (codes.to_local().shape[0], codes.dtype) == (held.shape[0] // 2, held.dtype)
    with pytest.raises(TypeError, match="which is sharded"):
        up.merge()
    for _ in range(2):
        calls: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        for each in (wrapped, alone):
            trained = [p for p in each.parameters() if p.requires_grad]
            optimiser = torch.optim.SGD(trained, lr=0.1)
            y = each(x)
            y.square().mean().backward()
            calls.append((y.detach(), [whole(p.grad) for p in trained]))
            optimiser.step()
        (got, mine), (want, its) = calls
        assert torch.equal(got, want)
        assert len(mine) == (12 if dora else 8)
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
        wrapped.zero_grad()
        alone.zero_grad()
    options = state_dict.StateDictOptions(full_state_dict=True)
    gathered: dict[str, Any] = state_dict.get_model_state_dict(wrapped, options=options)
    fresh = get_peft_model(
        qnn.convert(nn.Sequential(Block(128, 256), Block(128, 256)), scheme), config
    )
    fresh.load_state_dict(gathered, strict=False)  # a file of int4 has the shape of a weight too
    stored = alone.state_dict()
    assert stored.keys() - gathered.keys() <= {n for n in stored if n.endswith("weight_shape")}
    assert not gathered.keys() - stored.keys()
    for name, tensor in fresh.state_dict().items():
        assert tensor.dtype == stored[name].dtype, name
        assert tensor.tolist() == stored[name].tolist(), name


@parameterized.expand([("int8", False), ("int8", True), ("int4_weight", False)])
def test_adapters(scheme: str, dora: bool) -> None:
    need_sharded_integers()
    both_ranks(sharded_adapters, scheme, dora)
