"""Checkpoints of compressed-tensors, there and back, with that package as the oracle."""

from __future__ import annotations

import copy
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.integrations.checkpoints.files import Files
from qnn.integrations.checkpoints.layouts import LAYOUTS
from qnn.kernels import SCHEMES, get_scheme

from .checkpoints import (
    LAYERS,
    Net,
    compressed,
    compressor,
    ct_config,
    meta,
    parsed,
    state_of,
    write,
)
from .checkpoints import folder as tmp
from .common import ROOT, same_bits

X = torch.randn(7, 256, generator=torch.Generator().manual_seed(1))


def args(kind: str, bits: int, per: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "num_bits": bits, "strategy": per, **more}


INT8, FP8 = args("int", 8, "channel"), args("float", 8, "channel")
TOKEN = args("int", 8, "token", dynamic=True)
STATIC = args("int", 8, "tensor", dynamic=False)
GROUP8 = args("float", 8, "group", group_size=128, dynamic=True)
MX8 = args("float", 8, "group", group_size=32, scale_dtype="torch.uint8")
MX4 = args("float", 4, "group", group_size=32, scale_dtype="torch.uint8")
NV = args("float", 4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
BLOCK = args("float", 8, "block", block_structure=[128, 128])
INT4 = args("int", 4, "group", group_size=128)

# Format, weights, activations, and the scheme that they are read as.
WRITTEN: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str]] = {
    "int8": ("int-quantized", INT8, TOKEN, "int8"),
    "int8, a scale": ("int-quantized", args("int", 8, "tensor"), TOKEN, "int8"),
    "int8 static": ("int-quantized", INT8, STATIC, "int8_static"),
    "int8 static, affine": ("int-quantized", INT8, {**STATIC, "symmetric": False}, "int8_static"),
    "int8 weights": ("naive-quantized", INT8, None, "int8_weight"),
    "int8 weights, packed": ("pack-quantized", INT8, None, "int8_weight"),
    "fp8": ("float-quantized", FP8, args("float", 8, "token", dynamic=True), "fp8"),
    "fp8 tensor": (
        "float-quantized", args("float", 8, "tensor"), args("float", 8, "tensor", dynamic=True),
        "fp8_tensor",
    ),
    "fp8 tensor, tokens": (
        "float-quantized", args("float", 8, "tensor"), args("float", 8, "token", dynamic=True),
        "fp8",
    ),
    "fp8 block": ("float-quantized", BLOCK, GROUP8, "fp8_block"),
    "fp8 weights": ("naive-quantized", FP8, None, "fp8_weight"),
    "mxfp8": ("mxfp8-quantized", MX8, {**MX8, "dynamic": True}, "mxfp8"),
    "nvfp4 weights": ("nvfp4-pack-quantized", NV, None, "nvfp4_weight"),
    "mxfp4 weights": ("mxfp4-pack-quantized", MX4, None, "nvfp4_weight"),
    "int4": ("pack-quantized", INT4, None, "int4_weight"),
    "int4, 64": ("pack-quantized", {**INT4, "group_size": 64}, None, "int4_weight_g64"),
    "int4, 256": ("pack-quantized", {**INT4, "group_size": 256}, None, "int4_weight"),
    "int4, rows": ("pack-quantized", args("int", 4, "channel"), None, "int4_weight"),
    "int4, zero points": (
        "pack-quantized", {**INT4, "group_size": 32, "symmetric": False}, None,
        "int4_weight_asym_g32",
    ),
    "int4, int8 tokens": ("pack-quantized", INT4, TOKEN, "int8_int4"),
}  # fmt: skip


def oracle(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, **files: Any
) -> tuple[Net, Path, Any]:
    """A model, the folder that the package writes of it, and the group of its config."""
    form, weights, activations, _ = WRITTEN[kind]
    group = parsed({"weights": weights, "input_activations": activations})
    model = Net(*((256, 256) if weights.get("group_size") == 256 else ())).to(dtype)
    layers = {
        name: compressed(model.get_submodule(name).weight.detach(), form, group) for name in LAYERS
    }
    if activations and not activations.get("dynamic"):
        for tensors in layers.values():
            tensors["input_scale"] = torch.tensor([0.03])
            if not activations.get("symmetric", True):
                tensors["input_zero_point"] = torch.tensor([-7], dtype=torch.int8)
    write(folder, state_of(model, layers), ct_config(form, group), **files)
    return model, folder, group


def decoded(kind: str, folder: Path, group: Any) -> dict[str, torch.Tensor]:
    """The weights that the package takes a folder's files for."""
    result = {}
    for name in LAYERS:
        tensors = {
            key.removeprefix(f"{name}."): tensor.clone()
            for key, tensor in Files(folder).tensors.items()
            if key.startswith(f"{name}.weight")
        }
        result[name] = compressor(WRITTEN[kind][0]).decompress(tensors, group)["weight"]
    return result


class TestRead:
    """What the package writes is read bit for bit, into the scheme of exactly that arithmetic."""

    @parameterized.expand(WRITTEN)
    def test_written_by_the_package(self, kind: str) -> None:
        scheme = WRITTEN[kind][3]
        with tmp() as folder:
            model, _, group = oracle(kind, folder)
            sizes = (256, model.first.out_features)
            with torch.no_grad():
                got = qnn.load_checkpoint(meta(*sizes), folder)
                plain = qnn.load_checkpoint(meta(*sizes), folder, dequantize=True)
                want = decoded(kind, folder, group)
                for name in LAYERS:
                    layer: Any = got.get_submodule(name)
                    assert layer.scheme == scheme
                    assert torch.equal(layer.dequantize().weight, plain.get_submodule(name).weight)
                    # Where its scales are bytes the package computes in bfloat16.
                    rough = want[name].dtype == torch.bfloat16 or "fp4" in kind
                    torch.testing.assert_close(
                        plain.get_submodule(name).weight.float(), want[name].float(),
                        rtol=2.0**-7 if rough else 0, atol=0,
                    )  # fmt: skip
                assert type(got.head) is nn.Linear
                assert same_bits(got.head.weight.data, model.head.weight.data)
                assert type(plain.first) is nn.Linear
                out = got(X)
                assert out.isfinite().all()
                assert qnn.sqnr(model(X), out) > (8 if "4" in kind else 15)

    def test_codes_are_those_of_the_file(self) -> None:
        """Also −128, which qnn itself never writes, and scales in bfloat16."""
        with tmp() as folder:
            oracle("int8", folder, torch.bfloat16)
            tensors = Files(folder).tensors
            assert min(int(tensors[f"{n}.weight"].min()) for n in LAYERS) == -128
            assert tensors["first.weight_scale"].dtype == torch.bfloat16
            got: Any = qnn.load_checkpoint(meta().bfloat16(), folder)
            for name in LAYERS:
                layer = got.get_submodule(name)
                assert same_bits(layer.stored[0].data, tensors[f"{name}.weight"])
                assert torch.equal(layer.weight_scale, tensors[f"{name}.weight_scale"].float())
            x = X.bfloat16()
            want = torch.nn.functional.linear(x.double(), got.first.weight.double())
            assert qnn.sqnr(want + got.first.bias.double(), got.first(x)) > 30

    def test_static_grids(self) -> None:
        with tmp() as folder:
            oracle("int8 static, affine", folder / "affine")
            oracle("int8 static", folder / "symmetric")
            for kind, zero in (("affine", -7), ("symmetric", 0)):
                layer: Any = qnn.load_checkpoint(meta(), folder / kind).first
                assert (float(layer.input_scale), int(layer.input_zero_point)) == (
                    pytest.approx(0.03),
                    zero,
                )

    def test_act_order_that_keeps_runs(self) -> None:
        """A g_idx whose groups are whole runs of 32 is a weight of groups of 32."""
        with tmp() as folder:
            oracle("int4", folder)
            tensors = dict(Files(folder).tensors)
            index = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.int32)
            for name, runs in (("first", index), ("second", torch.zeros(4, dtype=torch.int32))):
                tensors[f"{name}.weight_g_idx"] = runs.repeat_interleave(32)
            config = json.loads((folder / "config.json").read_text())["quantization_config"]
            write(folder / "order", tensors, config)
            got: Any = qnn.load_checkpoint(meta(), folder / "order")
            assert (got.first.scheme, got.second.scheme) == ("int4_weight_g32", "int4_weight")
            plain: Any = qnn.load_checkpoint(meta(), folder / "order", dequantize=True)
            assert torch.equal(got.first.dequantize().weight, plain.first.weight)
            scales = tensors["first.weight_scale"][:, index.long().repeat_interleave(32)]
            codes = qnn.kernels.formats.int4.unpack(tensors["first.weight_packed"]).float() - 8
            assert torch.equal(plain.first.weight, codes * scales)
            odd = index.repeat_interleave(32)
            odd[0] = 0
            write(folder / "odd", {**tensors, "first.weight_g_idx": odd}, config)
            with pytest.raises(ValueError, match=r"first: act-order.*dequantize=True"):
                qnn.load_checkpoint(meta(), folder / "odd")
            plain = qnn.load_checkpoint(meta(), folder / "odd", dequantize=True)
            assert torch.equal(plain.first.weight[:, 0], codes[:, 0] * scales[:, 33])

    @parameterized.expand(
        [
            ("int8 static", "dynamic", "int8"),
            ("int8 static", "float", "int8_weight"),
            ("fp8", "float", "fp8_weight"),
            ("fp8 tensor", "float", "fp8_weight"),
            ("int8", "dynamic", "int8"),
            ("int4, int8 tokens", "float", "int4_weight"),
        ]
    )
    def test_other_activations_when_asked(self, kind: str, wanted: str, scheme: str) -> None:
        with tmp() as folder:
            oracle(kind, folder)
            got: Any = qnn.load_checkpoint(meta(), folder, activations=wanted)
            plain: Any = qnn.load_checkpoint(meta(), folder, dequantize=True)
            assert got.first.scheme == scheme
            assert torch.equal(got.first.dequantize().weight, plain.first.weight)

    def test_sharded(self) -> None:
        with tmp() as folder:
            oracle("nvfp4 weights", folder, shards=3)
            torch.manual_seed(0)
            got = qnn.load_checkpoint(meta(), folder)
            state = got.state_dict()
            for name, tensor in Files(folder).tensors.items():
                assert same_bits(state[name], tensor), name

    def test_one_file(self) -> None:
        with tmp() as folder:
            oracle("fp8", folder)
            got: Any = qnn.load_checkpoint(meta(), folder / "model.safetensors")
            assert got.first.scheme == "fp8"

    def test_mapped(self) -> None:
        """What needs no change is the file's memory."""
        with tmp() as folder:
            oracle("int8", folder)
            got: Any = qnn.load_checkpoint(meta(), folder)
            (file,) = folder.glob("*.safetensors")
            mapped = maps(file)
            if not mapped:
                pytest.skip("needs /proc/self/maps")
            for tensor in (got.first.stored[0], got.head.weight, got.first.weight_scale):
                assert any(low <= tensor.data_ptr() < high for low, high in mapped)

    def test_into_a_model_with_values(self) -> None:
        """Dtypes, mode, hooks, ties and the parameters' identity are the model's."""
        with tmp() as folder:
            oracle("int8", folder)
            model = Net().bfloat16().train()
            head, calls = model.head.weight, []
            model.first.register_forward_hook(lambda *_: calls.append(1))
            got: Any = qnn.load_checkpoint(model, folder)
            assert got is model
            assert model.head.weight is head
            assert head.dtype == torch.bfloat16
            assert model.first.training
            assert model.first.bias.dtype == torch.bfloat16
            assert got(X.bfloat16()).dtype == torch.bfloat16
            assert calls == [1]


class TestWrite:
    """What qnn writes is what the package writes of the same numbers."""

    @parameterized.expand([(s,) for s, each in SCHEMES.items() if not each.static])
    def test_bits_of_the_package(self, scheme: str) -> None:
        """Decoded and compressed again by it, with these scales: names, dtypes, shapes and bits."""
        model = qnn.convert(Net(), scheme, exclude="head")
        with tmp() as folder:
            qnn.save_checkpoint(model, folder)
            files = Files(folder)
            (group,) = files.config["config_groups"].values()
            parts = parsed({k: group[k] for k in ("weights", "input_activations")})
            assert (sorted(group["targets"]), files.config["ignore"]) == (list(LAYERS), ["head"])
            for name in LAYERS:
                tensors = {
                    key.removeprefix(f"{name}."): tensor
                    for key, tensor in files.tensors.items()
                    if key.startswith(f"{name}.weight")
                }
                again = recompressed(tensors, group["format"], parts)
                assert again.keys() == tensors.keys()
                for key, tensor in tensors.items():
                    if "fp4" in scheme and key == "weight_packed":
                        tensor = without_minus_zero(tensor)  # which is a zero to the package
                    assert same_bits(again[key], tensor), key

    @parameterized.expand([(s,) for s in SCHEMES])
    def test_read_without_the_names_of_schemes(self, scheme: str) -> None:
        """The config alone says the scheme, as it does of another writer's file."""
        model, x = Net(), X
        out: Any = (
            qnn.convert(qnn.calibrate(qnn.prepare(model, scheme, exclude="head"), [x]))
            if get_scheme(scheme).static
            else qnn.convert(model, scheme, exclude="head")
        )
        with tmp() as folder, torch.no_grad():
            qnn.save_checkpoint(out, folder)
            assert torch.equal(qnn.load_checkpoint(meta(), folder)(x), out(x))
            config = json.loads((folder / "config.json").read_text())["quantization_config"]
            del config["qnn"]
            write(folder, Files(folder).tensors, config)
            got: Any = qnn.load_checkpoint(meta(), folder)
            want = "nvfp4_weight" if scheme == "nvfp4" else scheme
            assert got.first.scheme == want
            if scheme == want:
                assert torch.equal(got(x), out(x))

    def test_shards_ties_and_the_same_folder(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(40, 64)
                self.body = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
                self.head = nn.Linear(64, 40, bias=False)
                self.head.weight = self.table.weight

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = self.head(self.body(self.table(ids)))
                return result

        ids = torch.arange(9)
        for rules in ({"*": "int8"}, {"*": "int8", nn.Embedding: "int8_weight"}):
            model = qnn.convert(Tied(), rules)
            with tmp() as folder, torch.no_grad():
                qnn.save_checkpoint(model, folder, max_shard_size=3000)
                assert len(list(folder.glob("*.safetensors"))) > 2
                with torch.device("meta"):
                    fresh = Tied()
                got = qnn.load_checkpoint(fresh, folder)
                assert torch.equal(got(ids), model(ids))
                first = next(iter(got.table.parameters()))
                assert first is next(iter(got.head.parameters()))
                qnn.save_checkpoint(got, folder)  # which it is mapped from
                assert [p.name for p in sorted(folder.iterdir())] == [
                    "config.json",
                    "model.safetensors",
                ]
                again = qnn.load_checkpoint(Tied(), folder)
                assert torch.equal(again(ids), model(ids))

    def test_layers_of_every_kind(self) -> None:
        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(8, 16, 3)
                self.rnn = nn.LSTM(16, 16, batch_first=True)
                self.head = nn.Linear(16, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = self.head(self.rnn(self.conv(x).mT)[0])
                return result

        model, x = qnn.convert(Mixed().eval(), "int8"), torch.randn(2, 8, 9)
        with tmp() as folder, torch.no_grad():
            qnn.save_checkpoint(model, folder)
            got = qnn.load_checkpoint(Mixed().eval(), folder)
            assert torch.equal(got(x), model(x))
            plain = qnn.load_checkpoint(Mixed().eval(), folder, dequantize=True)
            assert type(plain.rnn) is nn.LSTM
            assert qnn.sqnr(plain(x), model(x)) > 15

    def test_refused(self) -> None:
        with tmp() as folder:
            with pytest.raises(ValueError, match="no quantised layer to describe"):
                qnn.save_checkpoint(Net(), folder)
            with pytest.raises(ValueError, match="max_shard_size must be positive"):
                qnn.save_checkpoint(qnn.convert(Net()), folder, max_shard_size=0)
            with pytest.raises(ValueError, match=r"first.bias is on the meta device"):
                qnn.save_checkpoint(qnn.convert(meta()), folder)
            qnn.save_checkpoint(qnn.convert(Net()), folder)
            with pytest.raises(ValueError, match=r"this one names its schemes"):
                qnn.load_checkpoint(Net(), folder, activations="float")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(64, 64))
        with torch.no_grad():
            self.q_proj.weight *= 3


class TestSharedScales:
    @parameterized.expand([("nvfp4_weight",), ("nvfp4",), ("fp8_tensor",)])
    def test_one_scale_in_a_fused_group(self, scheme: str) -> None:
        source = nn.Sequential(Attention(), Attention())
        model: Any = qnn.convert(copy.deepcopy(source), scheme)
        lone = [t.clone() for t in model[0].o_proj.stored]
        shared = qnn.share_scales(model, source)
        assert shared == [[f"{i}.{n}_proj" for n in "qkv"] for i in (0, 1)]
        whole = {"fp8_tensor": "weight_scale"}.get(scheme, "weight_global_scale")
        found = {
            name: float(getattr(model[0], f"{name}_proj")._parameters[whole]) for name in "qkv"
        }
        assert len(set(found.values())) == 1
        assert all(map(same_bits, model[0].o_proj.stored, lone))
        # The one with the largest weights has the scale that it has alone; what an engine makes of
        # the three, one matrix with that scale, is what each is by itself.
        alone: Any = qnn.convert(copy.deepcopy(source[0].q_proj), scheme)
        assert all(map(same_bits, model[0].q_proj.stored, alone.stored))
        fused = nn.Linear(64, 192, bias=False)
        fused.weight.data = torch.cat([getattr(source[0], f"{n}_proj").weight.data for n in "qkv"])
        together: Any = qnn.convert(fused, scheme)
        mine = torch.cat([getattr(model[0], f"{n}_proj").stored[0] for n in "qkv"])
        assert same_bits(mine, together.stored[0].data)
        x = torch.randn(3, 64)
        assert qnn.sqnr(source[0].k_proj(x), model[0].k_proj(x)) > 12

    def test_refused(self) -> None:
        source = Attention()
        with pytest.raises(ValueError, match="no layers beside each other"):
            qnn.share_scales(qnn.convert(copy.deepcopy(source), "int8"), source)
        model = qnn.convert(copy.deepcopy(source), {"*": "nvfp4", "k_proj": "nvfp4_weight"})
        with pytest.raises(ValueError, match=r"q_proj, k_proj, v_proj are in \['nvfp4', 'nvfp4_w"):
            qnn.share_scales(model, source)
        model = qnn.convert(copy.deepcopy(source), "nvfp4")
        with pytest.raises(ValueError, match=r"source has no float weight \[64, 64\] of 'q_proj'"):
            qnn.share_scales(model, nn.Sequential(source))


def maps(file: Path) -> list[tuple[int, int]]:
    """Where a file is mapped into this process."""
    listing = Path("/proc/self/maps")
    if not listing.is_file():
        return []
    lines = [line.split() for line in listing.read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(file.resolve())]
    return [(int(low, 16), int(high, 16)) for low, high in spans]


def without_minus_zero(packed: torch.Tensor) -> torch.Tensor:
    low, high = packed & 15, packed & 0xF0
    return torch.where(low == 8, 0, low) | torch.where(high == 0x80, 0, high)


def recompressed(
    tensors: dict[str, torch.Tensor], form: str, parts: Any
) -> dict[str, torch.Tensor]:
    """A layer's tensors after the package has decoded and compressed them with the same scales."""
    peer = compressor(form)
    float_weight = peer.decompress({k: t.clone() for k, t in tensors.items()}, parts)
    state = {k: t for k, t in float_weight.items() if k != "weight_shape"}
    if "weight_scale" in tensors and tensors["weight_scale"].dtype == torch.uint8:
        power = torch.exp2(tensors["weight_scale"].float() - 127)
        state["weight_scale"] = power
    elif tensors["weight_scale"].dtype == torch.float8_e4m3fn:
        state["weight_scale"] = tensors["weight_scale"].float()
    made: dict[str, torch.Tensor] = peer.compress(state, parts)
    return {name: tensor.detach() for name, tensor in made.items()}


class TestDocs:
    def test_the_table_of_the_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A row for each layout, which names the schemes that files of it are read as here."""
        monkeypatch.syspath_prepend(str(ROOT / "docs"))
        page: Any = importlib.import_module("checkpoints")
        rows = page.table().splitlines()[2:]
        assert len(rows) == len(LAYOUTS)
        assert "<!-- checkpoint table -->" in (ROOT / "docs/howto/checkpoints.md").read_text()
        for layout, row in zip(LAYOUTS, rows, strict=True):
            assert all(f"`{n}`" in row for n in layout.names if not n.startswith("input_"))
            assert page.schemes_of(layout)
        for form, _, _, scheme in WRITTEN.values():
            named = {s for each in LAYOUTS if each.format == form for s in page.schemes_of(each)}
            assert re.sub(r"_g\d+$", "", scheme) in named
