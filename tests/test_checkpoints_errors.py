"""Checkpoints that are cut off, foreign or mislabelled: refused, and the model untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.integrations.checkpoints.files import Files

from .checkpoints import Net, meta, write
from .checkpoints import folder as tmp
from .common import same_bits

Change = Callable[[dict[str, torch.Tensor], Any], None]


def group_of(config: Any) -> Any:
    return config["config_groups"]["group_0"]


def saved(folder: Path, scheme: str) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors and the config of a file as another writer has them."""
    torch.manual_seed(0)
    qnn.save_checkpoint(qnn.convert(Net(), scheme, exclude="head"), folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    del config["qnn"]
    return {name: t.clone() for name, t in Files(folder).tensors.items()}, config


def untouched(folder: Path, message: str, model: nn.Module | None = None, **options: Any) -> None:
    """A ValueError with this message, after which the model is as it was."""
    model = model or Net()
    modules = [id(module) for module in model.modules()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        qnn.load_checkpoint(model, folder, **options)
    assert [id(module) for module in model.modules()] == modules
    after = model.state_dict()
    assert after.keys() == values.keys()
    assert all(same_bits(after[name], tensor) for name, tensor in values.items())


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: Any) -> None:
        tensors[name] = make(tensors[name])

    return change


def add(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors, config: tensors.update({name: tensor})


def drop(name: str) -> Change:
    def change(tensors: dict[str, torch.Tensor], config: Any) -> None:
        del tensors[name]

    return change


def say(**words: Any) -> Change:
    return lambda tensors, config: config.update(words)


def weights(**words: Any) -> Change:
    return lambda tensors, config: group_of(config)["weights"].update(words)


def activations(**words: Any) -> Change:
    def change(tensors: Any, config: Any) -> None:
        group_of(config)["input_activations"] = {**group_of(config)["weights"], **words}

    return change


ONES = torch.ones(1)
WRONG: dict[str, tuple[str, Change, str]] = {
    "no scale": ("int8", drop("first.weight_scale"), "first: weight_scale is missing"),
    "no values": ("int8", drop("first.weight"), "first: there is no weight of two axes"),
    "no bias": ("int8", drop("first.bias"), "the file has no first.bias"),
    "no norm": ("int8", drop("norm.weight"), "the file has no norm.weight"),
    "no head": ("int8", drop("head.weight"), "the file has no head.weight"),
    "a part too many": (
        "int8", add("first.weight_global_scale", ONES),
        "first: int-quantized has no weight_global_scale",
    ),
    "a tensor too many": ("int8", add("extra.bias", ONES), "the model has no place for extra.bias"),
    "a layer too many": (
        "int8", add("third.weight_scale", ONES), "third: the file has weight_scale float32 for it"
    ),
    "a scale of floats": (
        "int8", add("head.weight_scale", torch.ones(5, 1)),
        "head: the file has .*weight_scale.*, and the config says that it is float",
    ),
    "a scale's shape": (
        "int8", put("first.weight_scale", lambda t: t[:5]),
        r"first: weight_scale is \[5, 1\], and int-quantized of a weight \[128, 256\] has \[128, 1",
    ),
    "a scale's dtype": (
        "int8", put("first.weight_scale", lambda t: t.to(torch.int32)),
        "first: weight_scale is torch.int32, and int-quantized has float32 or bfloat16 or float16",
    ),
    "a scale of NaN": (
        "int8", put("first.weight_scale", lambda t: t * torch.nan),
        "first: weight_scale must be positive and finite; it is not in row 0",
    ),
    "codes of NaN": (
        "fp8", put("first.weight", lambda t: t.float().fill_(torch.nan).to(t.dtype)),
        "first: weight holds codes of NaN",
    ),
    "a bias of NaN": (
        "int8", put("first.bias", lambda t: t * torch.nan), "first: bias holds NaN or inf"
    ),
    "another size": (
        "int8", put("first.weight", lambda t: t[:, :64]), r"weight must be int8 \[128, 256\], got"
    ),
    "floats": (
        "int8", put("first.weight", lambda t: t.float()),
        "first: weight is torch.float32, and int-quantized has int8",
    ),
    "floats, and no scale": (
        "int8",
        lambda t, c: (t.update({"first.weight": t.pop("first.weight").float()}),
                      t.pop("first.weight_scale"))[0],
        "first: its weight is float, and the config says that it is quantised",
    ),
    "another format's tensors": (
        "int8", weights(type="float"), "its config says format 'int-quantized': it holds int8"
    ),
    "another format's name": (
        "fp8", lambda t, c: group_of(c).update(format="mxfp8-quantized"),
        "it holds float8, per-group, and the config says float8 per-channel",
    ),
    "fp8 for int8": (
        "fp8",
        lambda t, c: (group_of(c).update(format="int-quantized"), group_of(c)["weights"].update(
            type="int"), group_of(c)["input_activations"].update(type="int"))[0],
        r"weight is torch.float8_e4m3fn, and int-quantized has int8; by its tensors it is float-qu",
    ),
    "zero points in a symmetric file": (
        "int4_weight", add("first.weight_zero_point", torch.zeros(16, 2, dtype=torch.int32)),
        "first: weight_zero_point is there, and the config says symmetric",
    ),
    "no zero points": (
        "int4_weight", weights(symmetric=False), "first: weight_zero_point is missing"
    ),
    "zero points of int8": (
        "int8", add("first.weight_zero_point", torch.ones(128, 1, dtype=torch.int8)),
        "first: weight_zero_point is not 0, and the config says symmetric",
    ),
    "int8 weights with zero points": (
        "int8", weights(symmetric=False),
        "no scheme has weights int8 per-channel, with zero points; dequantize=True",
    ),
    "another weight's shape": (
        "int4_weight", put("first.weight_shape", lambda t: t + 1),
        r"the file has a weight of \[129, 257\], the layer \[128, 256\]",
    ),
    "another group": (
        "int4_weight_g64", weights(group_size=32),
        r"first: weight_scale is \[128, 4\], and pack-quantized of a weight \[128, 256\] has",
    ),
    "no static grid": (
        "int8", activations(strategy="tensor", dynamic=False), "first: input_scale is missing"
    ),
    "nvfp4 without its second scale": (
        "nvfp4_weight", drop("first.weight_global_scale"), "first: weight_global_scale is missing"
    ),
    "activations of no scheme": (
        "int4_weight", activations(num_bits=8, type="float", strategy="token", dynamic=True),
        r"no scheme has weights int4 per-group of 128 with activations float8.*activations='float' "
        "reads it as 'int4_weight'",
    ),
    "outputs": (
        "int8", lambda t, c: group_of(c).update(output_activations={"num_bits": 8}),
        "quantised outputs",
    ),
    "rotations": ("int8", say(transform_config={"config_groups": {"a": 1}}), "a transform_config"),
    "sparse": ("int8", say(sparsity_config={"format": "marlin-24"}), "a sparsity_config"),
    "not compressed": ("int8", say(quantization_status="frozen"), "its tensors are 'frozen'"),
    "a cache": ("int8", say(kv_cache_scheme={"num_bits": 8}), "key-value cache quantised"),
    "another method": ("int8", say(quant_method="bitsandbytes"), "quant_method 'bitsandbytes'"),
    "no groups": ("int8", lambda t, c: c.pop("config_groups") and None, "is not one of 'compress"),
    "all floats": (
        "int8",
        lambda t, c: [t.pop(n) for n in list(t) if "first" in n or "second" in n] and None,
        "its config says 'compressed-tensors', and all of its tensors are floats",
    ),
}  # fmt: skip


class TestMislabelled:
    @parameterized.expand(WRONG)
    def test_refused_by_name(self, name: str) -> None:
        scheme, change, message = WRONG[name]
        with tmp() as folder:
            tensors, config = saved(folder / "good", scheme)
            change(tensors, config)
            write(folder / "bad", tensors, config)
            untouched(folder / "bad", message)

    def test_by_a_class(self) -> None:
        """`Linear` means the head too, which the model says is one."""
        with tmp() as folder:
            tensors, config = saved(folder / "good", "int8")
            group_of(config)["targets"], config["ignore"] = ["Linear"], []
            write(folder / "bad", tensors, config)
            untouched(folder / "bad", "head: its weight is float, and the config says that it is q")

    def test_not_strict(self) -> None:
        with tmp() as folder:
            tensors, config = saved(folder / "good", "int8")
            tensors["extra.bias"] = ONES
            del tensors["norm.weight"]
            write(folder / "odd", tensors, config)
            model = Net()
            model.norm.weight.data.fill_(3)
            got: Any = qnn.load_checkpoint(model, folder / "odd", strict=False)
            assert got.first.scheme == "int8"
            assert got.norm.weight.detach().unique().tolist() == [3]
            del tensors["first.weight_scale"]
            write(folder / "bad", tensors, config)
            untouched(folder / "bad", "first: weight_scale is missing", strict=False)

    def test_what_other_options_are_for(self) -> None:
        with tmp() as folder:
            saved(folder, "int8")
            tensors, config = saved(folder / "good", "int8")
            write(folder / "other", tensors, config)
            untouched(folder / "other", "activations must be one of 'stored'", activations="int")


class TestFiles:
    @parameterized.expand([(10,), (-1,), (-20000,)])
    def test_cut_off(self, size: int) -> None:
        with tmp() as folder:
            tensors, config = saved(folder / "good", "int8")
            write(folder / "cut", tensors, config)
            path = folder / "cut" / "model.safetensors"
            path.write_bytes(path.read_bytes()[:size])
            untouched(folder / "cut", r"model.safetensors cannot be read, and may be cut off")

    def test_an_index_that_does_not_fit(self) -> None:
        with tmp() as folder:
            tensors, config = saved(folder / "good", "int8")
            write(folder / "a", tensors, config, shards=2)
            (folder / "a" / "model-00002-of-00002.safetensors").unlink()
            untouched(
                folder / "a", "has no model-00002-of-00002.safetensors, which its index names"
            )
            index = write(folder / "b", tensors, config, shards=2) / "model.safetensors.index.json"
            held = json.loads(index.read_text())
            held["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
            index.write_text(json.dumps(held))
            untouched(folder / "b", "names lost.weight, which is in none of the files")
            held["weight_map"]["lost.weight"] = "../good/model.safetensors"
            index.write_text(json.dumps(held))
            untouched(folder / "b", r"names a file of another folder: '\.\./good/model")
            index.write_text("{")
            untouched(folder / "b", "index.json is not JSON")
            index.unlink()
            untouched(folder / "b", "has 2 .safetensors files and no model.safetensors.index.json")

    def test_other_folders(self) -> None:
        with tmp() as folder:
            untouched(folder / "none", "is not a folder nor a file")
            untouched(folder, "has no .safetensors file; pickles are not read")
            write(folder / "float", Net().state_dict(), None)
            untouched(folder / "float", "is a float checkpoint: load it into the float model")
            tensors, _ = saved(folder / "good", "int8")
            write(folder / "bare", tensors, None)
            untouched(folder / "bare", "first has weight.* int8.* no quantization_config in a conf")
            (folder / "bare" / "config.json").write_text("[1]")
            untouched(folder / "bare", "config.json holds no object")
            (folder / "good" / "model.bin").write_bytes(b"")
            untouched(folder / "good" / "model.bin", "is a .safetensors file or a folder")

    def test_models_that_do_not_fit(self) -> None:
        class Other(Net):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Conv1d(256, 128, 1)  # type: ignore[assignment]

        with tmp() as folder:
            tensors, config = saved(folder / "good", "int8")
            write(folder / "file", tensors, config)
            untouched(
                folder / "file", "has quantised first, and the model has Conv1d there", Other()
            )
            other = nn.ModuleDict({"b": nn.Linear(2, 2)})
            untouched(folder / "file", "first, second, and the model has no such module", other)
            untouched(folder / "file", r"weight must be int8 \[16, 256\], got", Net(256, 16))
            untouched(folder / "good", "describes other layers than ModuleDict has", other)
            with pytest.raises(TypeError, match="the model is a single Linear; put it in a module"):
                qnn.load_checkpoint(nn.Linear(3, 3), folder / "good")

    def test_own_files(self) -> None:
        with tmp() as folder:
            tensors, _ = saved(folder, "int8")
            config = json.loads((folder / "config.json").read_text())["quantization_config"]
            for name, message in (
                (
                    "first.weight_scale",
                    "the state has no weight_scale: the checkpoint is truncated",
                ),
                ("second.weight", "the state has a weight_scale but no weight"),
                ("norm.bias", "the file has no norm.bias"),
            ):
                write(folder / "bad", {k: t for k, t in tensors.items() if k != name}, config)
                untouched(folder / "bad", message)
            gone = {k: t for k, t in tensors.items() if not k.startswith("first.weight")}
            write(folder / "bad", gone, config)
            untouched(
                folder / "bad", "the file has no first.weight, first.weight_scale", strict=False
            )
            assert meta().first.weight.is_meta
