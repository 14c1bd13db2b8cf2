"""Checkpoints of other writers: DeepSeek, ModelOpt, AutoAWQ, GPTQ, and MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from parameterized import parameterized

import qnn
from qnn.integrations.checkpoints.files import Files

from .checkpoints import LAYERS, Net, compressed, meta, parsed, state_of, write
from .checkpoints import folder as tmp
from .common import same_bits

K, N = 256, 128
X = torch.randn(7, K, generator=torch.Generator().manual_seed(1))
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}


def sizes(name: str) -> tuple[int, int]:
    return N, K if name == "first" else N


def numbers(name: str, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[N, K]`, zero points and float16 scales `[N, groups]`; every code, also the ends."""
    rng = np.random.default_rng(len(name))
    rows, columns = sizes(name)
    groups = columns // group if group > 0 else 1
    codes = rng.integers(0, 16, (rows, columns))
    zeros = np.full((rows, groups), 8) if symmetric else rng.integers(1, 16, (rows, groups))
    return codes, zeros, (rng.random((rows, groups)) * 0.02 + 1e-3).astype(np.float16)


def floats(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: Any) -> torch.Tensor:
    """(code − zero point) · scale, column by column."""
    result = np.empty(codes.shape, np.float32)
    for column in range(codes.shape[1]):
        group = int(index[column])
        left = (codes[:, column] - zeros[:, group]).astype(np.float32)
        result[:, column] = left * scales[:, group].astype(np.float32)
    return torch.from_numpy(result)


def words(codes: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight codes a word along the last axis: nibble i is that of column `order[i]`."""
    split = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    packed = np.zeros(split.shape[:-1], np.uint32)
    for i, column in enumerate(order):
        packed |= split[..., column] << np.uint32(4 * i)
    return torch.from_numpy(packed.view(np.int32).copy())


def awq(name: str, symmetric: bool = False, group: int = 64) -> tuple[Any, torch.Tensor]:
    codes, zeros, scales = numbers(name, group, symmetric)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": words(codes.T, order),
        "qzeros": words(zeros.T, order),
        "scales": torch.from_numpy(scales.T.copy()),
    }
    index = np.arange(codes.shape[1]) // (group if group > 0 else codes.shape[1])
    return tensors, floats(codes, zeros, scales, index)


def gptq(
    name: str, symmetric: bool = True, group: int = 64, less: int = 1, index: Any = None
) -> tuple[Any, torch.Tensor]:
    codes, zeros, scales = numbers(name, group, symmetric)
    plain = np.arange(codes.shape[1]) // (group if group > 0 else codes.shape[1])
    index = plain if index is None else index[: codes.shape[1]]
    tensors = {
        "qweight": words(codes).mT,
        "qzeros": words((zeros - less).T),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    return tensors, floats(codes, zeros, scales, index)


def check(folder: Path, want: dict[str, torch.Tensor], scheme: str | None, **options: Any) -> Any:
    """Exactly these weights, as layers of a scheme and as floats."""
    plain: Any = qnn.load_checkpoint(meta(), folder, dequantize=True)
    got: Any = qnn.load_checkpoint(meta(), folder, **options) if scheme else plain
    for name, weight in want.items():
        layer = got.get_submodule(name)
        assert getattr(layer, "scheme", None) == scheme
        held = layer.dequantize().weight if scheme else layer.weight
        assert torch.equal(held, weight)
        assert torch.equal(plain.get_submodule(name).weight, weight)
    x = X @ torch.eye(K)
    assert got(x).isfinite().all()
    return got


def saved(folder: Path, make: Any, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    made = {name: make(name, **options) for name in LAYERS}
    write(folder, state_of(Net(), {name: each[0] for name, each in made.items()}), config)
    return {name: each[1] for name, each in made.items()}


class TestAutoAWQ:
    @parameterized.expand([(32,), (64,), (128,), (-1,)])
    def test_weights(self, group: int) -> None:
        config = {**AWQ, "group_size": group}
        end = {32: "_g32", 64: "_g64"}.get(group, "")
        with tmp() as folder:
            want = saved(folder, awq, config, group=group)
            check(folder, want, f"int4_weight_asym{end}")

    def test_as_compressed_tensors_converts_it(self) -> None:
        pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
        from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

        with tmp() as folder:
            saved(folder, awq, AWQ)
            got = qnn.load_checkpoint(meta(), folder).state_dict()
            peer = AutoAWQConverter.from_autoawq_config(AWQ)
            tensors = {k: t.clone() for k, t in Files(folder).tensors.items() if "head" not in k}
            for name, tensor in peer.process(tensors).items():
                want = tensor.float() if name.endswith("weight_scale") else tensor
                assert same_bits(got[name], want), name

    def test_without_zero_points(self) -> None:
        config = {**AWQ, "zero_point": False}
        with tmp() as folder:
            want = saved(folder, awq, config, symmetric=True)
            check(folder, want, "int4_weight_g64")
            saved(folder / "odd", awq, config, symmetric=False)
            with pytest.raises(ValueError, match="zero_point: false, and qzeros are not 8"):
                qnn.load_checkpoint(meta(), folder / "odd")

    @parameterized.expand(
        [
            ({"version": "gemv"}, "version 'gemv' of AWQ; 'gemm' is read"),
            ({"bits": 3}, "its config says 3 bits; int4 is read"),
            ({"group_size": 32}, r"qzeros is \[4, 16\], and AutoAWQ int4 of a weight \[128, 256\]"),
        ]
    )
    def test_refused(self, change: dict[str, Any], message: str) -> None:
        with tmp() as folder:
            saved(folder, awq, {**AWQ, **change}, group=64)
            with pytest.raises(ValueError, match=message):
                qnn.load_checkpoint(meta(), folder)

    def test_groups_that_no_scheme_has(self) -> None:
        with tmp() as folder:
            want = saved(folder, awq, {**AWQ, "group_size": 16}, group=16)
            with pytest.raises(
                ValueError, match=r"no scheme has weights int4 per-group of 16.*deq"
            ):
                qnn.load_checkpoint(meta(), folder)
            check(folder, want, None)


class TestGPTQ:
    @parameterized.expand([("gptq", 1), ("gptq_v2", 0), (None, 1)])
    def test_zero_points_of_both_versions(self, form: str | None, less: int) -> None:
        """The first one stores them less one."""
        config = {**GPTQ, "checkpoint_format": form}
        with tmp() as folder:
            want = saved(folder / "sym", gptq, config, less=less)
            check(folder / "sym", want, "int4_weight_g64")
            want = saved(
                folder / "asym", gptq, {**config, "sym": False}, less=less, symmetric=False
            )
            check(folder / "asym", want, "int4_weight_asym_g64")

    @parameterized.expand([(32, "_g32"), (128, ""), (-1, "")])
    def test_groups(self, group: int, end: str) -> None:
        with tmp() as folder:
            want = saved(folder, gptq, {**GPTQ, "group_size": group}, group=group)
            check(folder, want, f"int4_weight{end}")

    def test_act_order(self) -> None:
        """Columns in the order of their activations: a group of its own for each, refused; whole
        runs in another order are groups of 32.
        """
        config = {**GPTQ, "desc_act": True}
        runs = np.repeat([1, 0, 0, 1, 3, 2, 3, 2], 32)
        single = np.random.default_rng(0).permutation(np.arange(K) // 64)
        for name, index, scheme in (("runs", runs, "int4_weight_g32"), ("single", single, None)):
            with tmp() as folder:
                made = {
                    "first": gptq("first", index=index),
                    "second": gptq("second"),
                }
                state = state_of(Net(), {key: each[0] for key, each in made.items()})
                write(folder, state, config)
                want = {"first": made["first"][1]}
                if scheme is None:
                    with pytest.raises(
                        ValueError, match=r"first: act-order: its g_idx.*dequantize"
                    ):
                        qnn.load_checkpoint(meta(), folder)
                check(folder, want, scheme)
                assert name

    @parameterized.expand(
        [
            ({"bits": 8}, {}, "its config says 8 bits; int4 is read"),
            ({"checkpoint_format": "marlin"}, {}, "checkpoint_format 'marlin'"),
            ({"is_marlin_format": True}, {}, "checkpoint_format 'marlin'"),
            # The version is that of neither config.
            ({"checkpoint_format": "gptq_v2"}, {}, "the config says sym, and the zero points are"),
            ({}, {"less": 0}, "the config says sym, and the zero points are not 8"),
            ({"sym": False}, {"less": 0, "symmetric": False}, "qzeros holds 15, which readers"),
        ]
    )
    def test_refused(self, change: Any, options: Any, message: str) -> None:
        with tmp() as folder:
            saved(folder, gptq, {**GPTQ, **change}, **options)
            with pytest.raises(ValueError, match=message):
                qnn.load_checkpoint(meta(), folder)


def deepseek(name: str, scale: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(len(name))
    rows, columns = sizes(name)
    weight = torch.randn(rows, columns).clamp(-2, 2) * 100
    down = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    down = torch.exp2(down.log2().round()) if scale == torch.float8_e8m0fnu else down
    tensors = {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": down.to(scale)}
    each = down.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return tensors, tensors["weight"].float() * each


DEEPSEEK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


class TestDeepSeek:
    @parameterized.expand([(torch.float32,), (torch.float8_e8m0fnu,)])
    def test_scales_multiply(self, scale: torch.dtype) -> None:
        with tmp() as folder:
            config = {**DEEPSEEK, "scale_fmt": "ue8m0"} if scale.itemsize == 1 else DEEPSEEK
            check(folder, saved(folder, deepseek, config, scale=scale), "fp8_block")

    def test_blocks_that_end_in_the_weight(self) -> None:
        rows, columns = 160, 200
        weight = (torch.randn(rows, columns) * 50).to(torch.float8_e4m3fn)
        scale = torch.rand(2, 2) + 0.5
        layer = {"weight": weight, "weight_scale_inv": scale}
        with tmp() as folder:
            model = Net(columns, rows)
            write(folder, state_of(model, {"first": layer}), DEEPSEEK)
            got: Any = qnn.load_checkpoint(meta(columns, rows), folder)
            want = weight.float() * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(
                128, 1
            )[:, :columns]  # fmt: skip
            assert torch.equal(got.first.dequantize().weight, want)

    def test_per_tensor(self) -> None:
        config = {"quant_method": "fp8", "activation_scheme": "static"}
        with tmp() as folder:
            layers = {
                name: {
                    "weight": torch.randn(sizes(name)).to(torch.float8_e4m3fn),
                    "weight_scale": torch.tensor(0.5),
                    "input_scale": torch.tensor(0.1),
                }
                for name in LAYERS
            }
            write(folder, state_of(Net(), layers), config)
            with pytest.raises(
                ValueError,
                match="no scheme has weights float8 per-tensor with activations float8 per-tensor; "
                "activations='dynamic' reads it as 'fp8_tensor'; activations='float' reads it as "
                "'fp8_weight'; dequantize=True",
            ):
                qnn.load_checkpoint(meta(), folder)
            want = {name: each["weight"].float() * 0.5 for name, each in layers.items()}
            check(folder, want, "fp8_tensor", activations="dynamic")
            check(folder, want, "fp8_weight", activations="float")


def modelopt(name: str) -> tuple[Any, torch.Tensor]:
    """From compressed-tensors' own NVFP4, by the rules of ModelOpt."""
    args = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    group = parsed({"weights": {**args, "scale_dtype": "torch.float8_e4m3fn"}})
    torch.manual_seed(len(name))
    made = compressed(torch.randn(sizes(name)) * 0.1, "nvfp4-pack-quantized", group)
    second = torch.tensor(2.0**-11 * 1.25)
    layer = qnn.QLinear(*reversed(sizes(name)), False, scheme="nvfp4_weight")
    state = {**made, "weight_global_scale": 1 / second.reshape(1)}
    layer.load_state_dict({key: each for key, each in state.items() if key.startswith("weight")})
    tensors = {
        "weight": made["weight_packed"],
        "weight_scale": made["weight_scale"],
        "weight_scale_2": second,
        "input_scale": torch.tensor(0.01),
    }
    return tensors, layer.dequantize().weight.detach()


class TestModelOpt:
    @parameterized.expand([("config.json",), ("hf_quant_config.json",)])
    def test_nvfp4(self, place: str) -> None:
        inside = {"quant_algo": "NVFP4", "group_size": 16}
        with tmp() as folder:
            if place == "config.json":
                want = saved(folder, modelopt, {"quant_method": "modelopt", **inside})
            else:
                want = saved(folder, modelopt, None)  # type: ignore[arg-type]
                beside = {"producer": {"name": "modelopt"}, "quantization": inside}
                (folder / place).write_text(json.dumps(beside))
            with pytest.raises(ValueError, match="activations='dynamic' reads it as 'nvfp4'"):
                qnn.load_checkpoint(meta(), folder)
            check(folder, want, "nvfp4_weight", activations="float")
            check(folder, want, "nvfp4", activations="dynamic")

    def test_as_compressed_tensors_converts_it(self) -> None:
        pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
        from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter

        with tmp() as folder:
            saved(folder, modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
            got = qnn.load_checkpoint(meta(), folder, activations="float").state_dict()
            peer = ModelOptNvfp4Converter(targets=["re:first", "re:second"])
            tensors = {k: t.clone() for k, t in Files(folder).tensors.items() if "head" not in k}
            for name, tensor in peer.process(tensors).items():
                if not name.endswith("input_global_scale"):
                    assert same_bits(got[name], tensor.reshape(got[name].shape)), name

    def test_factors_turned_over_to_the_last_place(self) -> None:
        """What the docs say: a factor comes back, or a neighbour of it."""
        factors = torch.rand(10000) * 10 ** torch.empty(10000).uniform_(-20, 3)
        again = 1 / (1 / factors)
        assert bool((again != factors).any())
        near = torch.nextafter(factors, factors - 1), torch.nextafter(factors, factors + 1)
        assert bool(((again == factors) | (again == near[0]) | (again == near[1])).all())

    def test_fp8(self) -> None:
        layers = {
            name: {
                "weight": torch.randn(sizes(name)).to(torch.float8_e4m3fn),
                "weight_scale": torch.tensor(0.25),
                "input_scale": torch.tensor(0.1),
            }
            for name in LAYERS
        }
        with tmp() as folder:
            write(
                folder, state_of(Net(), layers), {"quant_method": "modelopt", "quant_algo": "FP8"}
            )
            want = {name: each["weight"].float() * 0.25 for name, each in layers.items()}
            check(folder, want, "fp8_tensor", activations="dynamic")

    def test_a_quantised_cache(self) -> None:
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}
        with tmp() as folder:
            made = {name: modelopt(name) for name in LAYERS}
            layers = {name: {**each[0], "k_scale": torch.ones(1)} for name, each in made.items()}
            write(folder, state_of(Net(), layers), config)
            with pytest.raises(ValueError, match="key-value cache quantised, which is not read"):
                qnn.load_checkpoint(meta(), folder)
            want = {name: each[1] for name, each in made.items()}
            check(folder, want, "nvfp4_weight", activations="float")

    def test_another_algorithm(self) -> None:
        with tmp() as folder:
            saved(folder, modelopt, {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"})
            with pytest.raises(ValueError, match="quant_algo 'W4A8_AWQ'; 'NVFP4' and 'FP8' are"):
                qnn.load_checkpoint(meta(), folder)


class TestMXFP4:
    CONFIG: ClassVar[dict[str, Any]] = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
                    "symmetric": True, "scale_dtype": "torch.uint8",
                },
            }
        },
        "ignore": ["head"],
    }  # fmt: skip

    def make(self, name: str, least: int, most: int) -> tuple[Any, torch.Tensor]:
        rng = np.random.default_rng(len(name))
        rows, columns = sizes(name)
        codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
        byte = rng.integers(least, most + 1, (rows, columns // 32)).astype(np.uint8)
        byte[0, 0], byte[-1, -1] = least, most
        codes[1, :32], byte[1, 0] = 8, 0  # a group of zeros, whose scale is anything
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        values = np.where(codes & 8, -table[codes & 7], table[codes & 7])
        weight = values * np.exp2(byte.astype(np.float32) - 127).repeat(32, 1)
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        tensors = {"weight_packed": packed, "weight_scale": byte}
        made = {key: torch.from_numpy(each) for key, each in tensors.items()}
        return made, torch.from_numpy(weight.astype(np.float32))

    @parameterized.expand([(110, 127), (1, 18), (229, 246), (120, 120)])
    def test_exact_as_nvfp4(self, least: int, most: int) -> None:
        with tmp() as folder:
            made = {name: self.make(name, least, most) for name in LAYERS}
            layers = {name: each[0] for name, each in made.items()}
            write(folder, state_of(Net(), layers), self.CONFIG)
            got: Any = qnn.load_checkpoint(meta(), folder)
            plain: Any = qnn.load_checkpoint(meta(), folder, dequantize=True)
            for name, (_, weight) in made.items():
                assert torch.equal(got.get_submodule(name).dequantize().weight, weight)
                assert torch.equal(plain.get_submodule(name).weight, weight)
            assert got.first.scheme == "nvfp4_weight"

    def test_scales_too_far_apart(self) -> None:
        with tmp() as folder:
            made = {name: self.make(name, 100, 118) for name in LAYERS}
            layers = {name: each[0] for name, each in made.items()}
            write(folder, state_of(Net(), layers), self.CONFIG)
            with pytest.raises(ValueError, match=r"from 2\^-27 to 2\^-9, which the e4m3 .*dequan"):
                qnn.load_checkpoint(meta(), folder)
            check(folder, {name: each[1] for name, each in made.items()}, None)
