"""`qnn.QLinear` in the float schemes: state, disk, graphs and neighbours."""

from __future__ import annotations

import copy
import io
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.kernels import OPS, SCHEMES

from .common import DTYPES, forked, same_bits, sum_bound
from .test_invoke_quant import schemes_of

# The schemes whose products are not of integers.
EVERY = [name for name in SCHEMES if not name.startswith(("int8", "int16"))]
# Of int4 one of each kind, and the smallest and the largest group.
NAMES = [s for s in EVERY if "int4" not in s] + ["int4_weight", "int4_weight_asym_g32"]
K = {name: 256 if name.startswith("int4") else 96 for name in EVERY}  # in features
STATE = {  # of a layer of K in and 160 out features
    "fp8": {"weight": ("float8_e4m3fn", (160, 96)), "weight_scale": ("float32", (160, 1))},
    "fp8_tensor": {"weight": ("float8_e4m3fn", (160, 96)), "weight_scale": ("float32", (1,))},
    "fp8_block": {"weight": ("float8_e4m3fn", (160, 96)), "weight_scale": ("float32", (2, 1))},
    "mxfp8": {"weight": ("float8_e4m3fn", (160, 96)), "weight_scale": ("uint8", (160, 3))},
    "nvfp4": {
        "weight_packed": ("uint8", (160, 48)),
        "weight_scale": ("float8_e4m3fn", (160, 6)),
        "weight_global_scale": ("float32", (1,)),
    },
}
STATE["fp8_weight"], STATE["nvfp4_weight"] = STATE["fp8"], STATE["nvfp4"]
for _group, _name in ((128, ""), (64, "_g64"), (32, "_g32")):
    _parts = {
        "weight_packed": ("int32", (160, 32)),
        "weight_scale": ("float32", (160, 256 // _group)),
        "weight_shape": ("int64", (2,)),
    }
    STATE[f"int4_weight{_name}"] = _parts
    # On disk the zero points are packed down the columns.
    _zeros = {"weight_zero_point": ("int32", (20, 256 // _group))}
    STATE[f"int4_weight_asym{_name}"] = _parts | _zeros
# dB of a layer's output against float, for normal x and uniform weights.
LEAST = {
    **dict.fromkeys(EVERY, 28.0), "nvfp4": 16.0, "fp8_weight": 31.0, "nvfp4_weight": 19.0,
    **{name: 22.5 for name in EVERY if "int4" in name},
}  # fmt: skip


def plain(k: int = 96, n: int = 160, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias)


def layer(scheme: str, k: int | None = None, n: int = 160, **kwargs: Any) -> qnn.QLinear:
    torch.manual_seed(0)
    return qnn.QLinear(k or K[scheme], n, scheme=scheme, **kwargs)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(same_bits(left[k], right[k]) for k in left)


class TestState:
    @parameterized.expand(itertools.product(EVERY, (True, False)))
    def test_names_shapes_and_dtypes(self, scheme: str, bias: bool) -> None:
        module = layer(scheme, bias=bias)
        found = {
            name: (str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in module.state_dict().items()
        }
        want = dict(STATE[scheme])
        assert found == ({**want, "bias": ("float32", (160,))} if bias else want)
        assert same_state(module, qnn.QLinear.from_float(plain(K[scheme], bias=bias), scheme))
        stored = [p for name, p in module.named_parameters() if name != "bias"]
        assert not any(p.requires_grad for p in stored)
        assert list(module.stored) == stored
        assert list(module.buffers()) == []
        if scheme.startswith("nvfp4"):
            assert module.stored[0] is module.weight_packed

    @parameterized.expand(itertools.product(NAMES, DTYPES))
    def test_output(self, scheme: str, dtype: torch.dtype) -> None:
        module = layer(scheme, dtype=dtype)
        torch.manual_seed(0)
        float_layer = nn.Linear(K[scheme], 160, dtype=dtype).float()
        for lead in ((256,), (), (1,), (0,), (2, 3)):
            x = torch.randn(*lead, K[scheme], dtype=dtype)
            y = module(x)
            assert (y.shape, y.dtype) == ((*lead, 160), dtype)
            if x.numel() > 1000:
                assert qnn.sqnr(float_layer(x.float()), y.float()) > LEAST[scheme] - 0.3
        back = module.dequantize()
        assert back.weight.dtype == dtype
        assert qnn.sqnr(float_layer.weight, back.weight.float()) > 19

    @parameterized.expand(NAMES)
    def test_a_weight_of_several_blocks(self, scheme: str) -> None:
        """More values than are decoded at a time."""
        module, x = layer(scheme, 2048, 1100), torch.randn(2, 3, 2048)
        op = OPS[SCHEMES[scheme].linear]
        want = op.reference(x, *module.stored, module.bias, compute=torch.float64)
        # Half as much again: e2m1 may round x up by a quarter.
        sizes = 1.5 * x.abs() @ module.dequantize().weight.abs().T + module.bias.abs()
        over = (module(x) - want).abs() / sum_bound(sizes, 2048 + 4)
        assert over.max().item() <= 1

    def test_normal_weights_alone_in_nvfp4(self) -> None:
        linear = plain(384, 512, False)
        nn.init.normal_(linear.weight)
        got = qnn.QLinear.from_float(linear, "nvfp4_weight").dequantize().weight
        assert qnn.sqnr(linear.weight, got) > 19.5

    @parameterized.expand(NAMES)
    def test_survives_casts_copies_and_files(self, scheme: str) -> None:
        module, x = layer(scheme), torch.randn(3, K[scheme])
        y = module(x)
        cast = copy.deepcopy(module).half().to(torch.bfloat16).double().float()
        assert all(map(same_bits, module.stored, cast.stored))
        assert cast.stored[-1].dtype == module.stored[-1].dtype
        assert same_state(copy.deepcopy(module), module)
        # Plain pickle loads no float8 tensor, in torch 2.13; torch.save does.
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), y)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        fresh = layer(scheme, device="meta")
        assert all(p.is_meta for p in fresh.parameters())
        fresh.load_state_dict(torch.load(file, weights_only=True), assign=True)
        assert torch.equal(fresh(x), y)
        assert not any(p.requires_grad for p in fresh.stored)

    @parameterized.expand(NAMES)
    def test_a_float_checkpoint_is_quantised_on_the_way_in(self, scheme: str) -> None:
        module = layer(scheme)
        other = nn.Linear(K[scheme], 160)
        module.load_state_dict(other.state_dict())
        assert same_state(module, qnn.QLinear.from_float(other, scheme))

    @parameterized.expand(NAMES)
    def test_bad_state(self, scheme: str) -> None:
        module = layer(scheme)
        good, spoiled = module.state_dict(), torch.full((160, K[scheme]), torch.nan)
        first, *scales = STATE[scheme]
        cases = [
            ({scales[0]: None}, f"the state has no {scales[0]}: the checkpoint is truncated"),
            ({first: None}, f"no {first}"),
            ({first: good[first][:3]}, f"{first} must be .*160"),
            ({first: good[first].to(torch.int16)}, f"{first} is torch.int16, but scheme"),
            ({scales[0]: good[scales[0]].to(torch.int32)}, f"{scales[0]} is torch.int32, but"),
            ({"input_scale": torch.ones(1)}, "input_scale belongs to another scheme"),
            ({"weight": spoiled, first: None} if first != "weight" else
             {"weight": spoiled}, "."),
        ]  # fmt: skip
        for change, message in cases:
            state = {k: v for k, v in {**good, **change}.items() if v is not None}
            with pytest.raises(RuntimeError, match=message):
                module.load_state_dict(state)
        nan = {k: v for k, v in good.items() if k == "bias"}
        with pytest.raises(RuntimeError, match="weight holds NaN or inf in row 0 and 159 more"):
            module.load_state_dict({**nan, "weight": spoiled})
        assert same_state(module, layer(scheme))

    def test_another_scheme_says_so(self) -> None:
        packed = layer("nvfp4").state_dict()
        with pytest.raises(RuntimeError, match="weight_packed, weight_global_scale belongs to an"):
            layer("fp8").load_state_dict(packed)
        with pytest.raises(RuntimeError, match=r"weight is torch.float8_e4m3fn, but scheme 'nvfp4"):
            layer("nvfp4").load_state_dict(layer("fp8").state_dict())

    def test_sizes(self) -> None:
        for scheme in NAMES:
            if scheme.startswith(("nvfp4", "mxfp8")):
                name = rf"qnn.QLinear\(3071, 7, scheme='{scheme}'\): in_features must be a multiple"
                with pytest.raises(ValueError, match=name + ".*got 3071.*pad to 3072"):
                    qnn.QLinear(3071, 7, scheme=scheme)
                module = layer(scheme, 32, 7)
            elif scheme.startswith("int4"):
                with pytest.raises(ValueError, match=r"multiple of 128.*200.*pad to 256"):
                    qnn.QLinear(200, 7, scheme="int4_weight")
                module = layer(scheme, 128, 7)
            else:
                module = layer(scheme, 37, 7)
            x = torch.randn(5, module.in_features)
            assert qnn.sqnr(module.dequantize()(x), module(x)) > 10

    def test_a_model_in_schemes_of_its_own(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 33))
        mixed = qnn.convert(model, {"*": "nvfp4_weight", "2": "fp8", "3": "int8"})
        table = qnn.summary(mixed)
        assert [row.scheme for row in table.rows] == ["nvfp4_weight", "fp8", "int8"]
        assert all(row.backend for row in table.rows)
        # 4.5 bits a weight, and the global scale.
        assert table.rows[0].bytes_after == 64 * 64 * 9 // 16 + 4 + 64 * 4
        assert table.rows[0].bytes_before == 64 * 64 * 4 + 64 * 4
        compared = qnn.compare(model, mixed, torch.randn(16, 64))
        assert {row.name for row in compared.rows} == {"0", "2", "3", "(output)"}
        assert all(row.sqnr > 10 for row in compared.rows)


class TestSpecialValues:
    @parameterized.expand(NAMES)
    def test_each_row_by_itself(self, scheme: str) -> None:
        module = layer(scheme, bias=False)
        x = torch.randn(6, K[scheme])
        x[0], x[1], x[2], x[3, 5], x[4, 5] = 0, x[1] * 1e20, x[2] * 1e-20, torch.nan, torch.inf
        y = module(x)
        assert not y[0].any()
        assert not y[3:5].isfinite().any()
        assert y[[0, 1, 2, 5]].isfinite().all()
        zero = nn.Linear(K[scheme], 160, False)
        zero.weight.data.zero_()
        assert not qnn.QLinear.from_float(zero, scheme)(torch.randn(3, K[scheme])).any()


class TestGradients:
    @parameterized.expand(
        [*itertools.product(NAMES, (None, "aot_eager")), ("fp8", "inductor"), ("nvfp4", "inductor")]
    )
    def test_through_a_frozen_layer(self, scheme: str, backend: str | None) -> None:
        module = layer(scheme)
        call = torch.compile(module, fullgraph=True, backend=backend) if backend else module
        x = torch.randn(2, 5, K[scheme], requires_grad=True)
        y = call(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        torch.testing.assert_close(x.grad, dy @ module.dequantize().weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.bias.grad, dy.sum((0, 1)))

    @parameterized.expand([("fp8",), ("nvfp4",), ("mxfp8",), ("int4_weight",)])
    def test_lora(self, scheme: str) -> None:
        peft = pytest.importorskip("peft", reason="needs the extra 'examples'")
        model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
        base = qnn.convert(model, scheme)
        x = torch.randn(4, 128)
        want = base(x)
        lora = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "2"]))
        assert torch.equal(lora(x), want)
        lora(x).square().sum().backward()
        found = [name for name, p in lora.named_parameters() if p.grad is not None]
        assert len(found) == 4
        assert all("lora" in name for name in found)


class TestGraphs:
    @parameterized.expand(itertools.product(NAMES, ("aot_eager", "inductor")))
    def test_compiled_with_dynamic_batch(self, scheme: str, backend: str) -> None:
        module = layer(scheme)
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        with torch.no_grad():
            for size in (4, 5, 40, 200):
                with torch._dynamo.config.patch(error_on_recompile=size > 5):
                    x = torch.randn(size, K[scheme])
                    assert torch.equal(compiled(x), module(x))

    @parameterized.expand(itertools.product(NAMES, (False, True)))
    def test_export_and_reload(self, scheme: str, strict: bool) -> None:
        module = layer(scheme)
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(
            module, (torch.randn(3, K[scheme]),), dynamic_shapes=shapes, strict=strict
        )
        assert schemes_of(program.graph) == [scheme]
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        x = torch.randn(40, K[scheme])
        assert torch.equal(torch.export.load(file).module()(x), module(x))

    def test_packaged_and_run_in_a_fresh_process(self) -> None:
        """All schemes in one package."""
        model = nn.Sequential(*(layer(s, 128, 128) for s in NAMES)).eval()
        x = torch.randn(4, 128)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            where = Path(folder)
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(model, (torch.randn(3, 128),), dynamic_shapes=shapes)
            assert schemes_of(program.graph) == NAMES
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=str(where / "model.pt2")
            )
            torch.save((x, model(x)), where / "x.pt")
            torch.save(model.state_dict(), where / "state.pt")
            torch.export.save(program, where / "program.pt2")
            out = forked(
                f"""
                import torch, qnn
                from torch import nn
                x, want = torch.load({str(where / "x.pt")!r})
                packaged = torch._inductor.aoti_load_package({package!r})
                exported = torch.export.load({str(where / "program.pt2")!r}).module()
                model = nn.Sequential(*(qnn.QLinear(128, 128, scheme=s) for s in {NAMES!r}))
                model.load_state_dict(torch.load({str(where / "state.pt")!r}, weights_only=True))
                with torch.no_grad():
                    print(*(torch.equal(f(x), want) for f in (packaged, exported, model)))
                """
            )
            assert out.split()[-3:] == ["True"] * 3


class TestDisk:
    """The compressed-tensors package reads what qnn writes, and takes it to mean the same."""

    @parameterized.expand([name for name in EVERY if name not in ("fp8_weight", "nvfp4_weight")])
    def test_decoded_by_compressed_tensors(self, scheme: str) -> None:
        pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
        st = pytest.importorskip("safetensors.torch", reason="needs the extra 'dev'")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

        # Blocks that are full: the package pads none.
        module = layer(scheme, 256, 384)
        config = qnn.integrations.compressed_tensors.quantization_config(nn.Sequential(module))
        parsed = QuantizationConfig.model_validate(config)
        (group,) = parsed.config_groups.values()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            st.save_file(module.state_dict(), path)
            state = st.load_file(path)
        state.pop("bias")
        decoder = BaseCompressor.get_value_from_registry(group.format)
        decoded = decoder.decompress(state, group)["weight"]
        # The package multiplies in bfloat16 where a scale is a byte; mxfp8's products fit.
        rtol = 2.0**-7 if scheme == "nvfp4" else 1e-6
        rtol = 0.0 if scheme.startswith("int4") else rtol
        torch.testing.assert_close(decoded.float(), module.dequantize().weight, rtol=rtol, atol=0)

    @parameterized.expand([name for name in NAMES if "asym" not in name])
    @pytest.mark.usefixtures("plain_transformers")
    def test_a_saved_model_is_read_by_transformers(self, scheme: str) -> None:
        pytest.importorskip("compressed_tensors", reason="needs the extra 'dev'")
        transformers = pytest.importorskip("transformers", reason="needs the extra 'examples'")
        torch.manual_seed(0)
        config = transformers.BertConfig(
            num_hidden_layers=1, hidden_size=128, intermediate_size=256, num_attention_heads=2,
            vocab_size=100,
        )  # fmt: skip
        model = qnn.convert(transformers.BertModel(config).eval().bfloat16(), scheme)
        ids = torch.randint(0, 100, (2, 9))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            want = model(ids).last_hidden_state
            again = type(model).from_pretrained(folder).eval()
            got = again(ids).last_hidden_state
        assert qnn.sqnr(want, got) > (12 if scheme == "nvfp4" else 20)
