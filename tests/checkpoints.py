"""What the tests of checkpoints share: files of other writers, and compressed-tensors' own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

State = dict[str, torch.Tensor]


class Net(nn.Module):
    """Two layers that may be quantised, beside one and a norm that stay float."""

    def __init__(self, k: int = 256, n: int = 128, out: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(k, n)
        self.norm = nn.LayerNorm(n)
        self.second = nn.Linear(n, n, bias=False)
        self.head = nn.Linear(n, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.second(self.norm(self.first(x)).relu()))
        return result


LAYERS = ("first", "second")


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def meta(*sizes: int) -> Net:
    with torch.device("meta"):
        return Net(*sizes)


def write(where: Path, state: State, config: Mapping[str, Any] | None, shards: int = 1) -> Path:
    """A folder as other writers leave one."""
    from safetensors.torch import save_file

    where.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, where / "model.safetensors", {"format": "pt"})
    else:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        files = {key: names[i % shards] for i, key in enumerate(state)}
        for name in names:
            part = {key: each for key, each in state.items() if files[key] == name}
            save_file(part, where / name, {"format": "pt"})
        index = {"metadata": {}, "weight_map": files}
        (where / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (where / "config.json").write_text(json.dumps({"quantization_config": config}))
    return where


def parsed(config: Mapping[str, Any]) -> Any:
    """A group of compressed-tensors from the `weights` and `input_activations` of a config."""
    pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(targets=["Linear"], **config)


def compressor(form: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(form)


def compressed(weight: torch.Tensor, form: str, scheme: Any) -> State:
    """A weight as compressed-tensors calibrates, quantises and stores it."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = scheme.weights
    per, size = str(args.strategy), args.group_size
    state = {"weight": weight}
    extra: dict[str, Any] = {}
    if per == "tensor":
        ends = torch.aminmax(weight)
    elif per == "channel":
        ends = torch.aminmax(weight, dim=-1, keepdim=True)
    elif per == "block":
        down, across = args.block_structure
        tiles = weight.unflatten(-1, (-1, across)).unflatten(0, (-1, down))
        ends = (tiles.amin((1, 3)), tiles.amax((1, 3)))
    else:
        ends = torch.aminmax(weight.unflatten(-1, (-1, size)), dim=-1)
    if per == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max()).reshape(1)
        extra["global_scale"] = state["weight_global_scale"]
    scale, zero = calculate_qparams(*ends, args, **extra)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    made: State = compressor(form).compress(state, scheme)
    return {name: tensor.detach() for name, tensor in made.items()}


def state_of(model: nn.Module, layers: Mapping[str, Mapping[str, torch.Tensor]]) -> State:
    """A model's state with the tensors of some layers instead of their weights."""
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in layers or not name.endswith(".weight")
    }
    for name, tensors in layers.items():
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}
    return state


def ct_config(form: str, scheme: Any, ignore: tuple[str, ...] = ("head",)) -> dict[str, Any]:
    """A config as compressed-tensors itself writes it."""
    from compressed_tensors.quantization import QuantizationConfig

    scheme = scheme.model_copy(update={"format": form})
    whole = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, ignore=list(ignore),
        quantization_status="compressed",
    )  # fmt: skip
    found: dict[str, Any] = whole.to_dict()
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]
