"""Export to ONNX: the table, linear layers of every scheme, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.kernels.schemes import SCHEMES

pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from qnn.integrations import onnx as qnn_onnx
from qnn.integrations.onnx.table import KINDS, RULES

from .common import child
from .onnx_runs import DYNAMIC, Exported, compared, exported, static

BATCH = ({0: DYNAMIC},)


class TestTable:
    def test_every_op_is_translated_or_refused(self) -> None:
        # In a process of its own: tests declare ops too.
        child(
            """
            from qnn.integrations import onnx
            from qnn.integrations.onnx.table import RULES
            from qnn.kernels import OPS

            assert set(RULES) <= set(OPS)
            for name in OPS:
                why = onnx.refusal(name)
                assert (name in RULES) is (why is None), name
                assert "not an op of the library" not in (why or ""), name
            assert {each.overload for each in OPS.values()} <= set(onnx.translations())
            """
        )

    def test_every_op_of_a_layer_is_translated(self) -> None:
        for scheme in SCHEMES.values():
            assert not isinstance(scheme.ops, str)
            assert set(scheme.ops) <= set(KINDS), "a kind of layer without a rule"
            assert set(scheme.ops.values()) <= set(RULES)


def _mlp(scheme: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(128, 160), nn.ReLU(), nn.Linear(160, 24)).eval()
    if SCHEMES[scheme].static:
        return static(model, torch.randn(64, 128) * 2 + 0.3, scheme=scheme)
    wide = SCHEMES[scheme].weight.columns_multiple_of > 32
    rules = {"0": scheme, "2": "int8"} if wide else scheme  # 160 columns are no whole groups
    converted: nn.Module = qnn.convert(model, rules)
    return converted


class TestLinear:
    @parameterized.expand(
        [
            ("int8", {"MatMulInteger": 2}, 100),
            ("int8_static", {"MatMulInteger": 2}, 100),
            ("int16", {"MatMulInteger": 4}, 100),
            ("int8_weight", {"MatMulNBits": 2}, 100),
            ("int4_weight_asym", {"MatMulInteger": 1, "MatMulNBits": 1}, 60),
            ("nvfp4", {}, 60),
        ]
    )
    def test_dynamic_batch(self, scheme: str, integers: dict[str, int], least: float) -> None:
        torch.manual_seed(0)
        model, x = _mlp(scheme), torch.randn(5, 128)
        run = exported(model, (x,), BATCH)
        assert run.integers == integers
        for rows in (5, 1, 33):
            assert compared(model, run, torch.randn(rows, 128)) > least
        (none,) = run(torch.randn(0, 128))
        assert none.shape == (0, 24)

    def test_table_alone(self) -> None:
        torch.manual_seed(0)
        model, x = _mlp("int8"), torch.randn(5, 128)
        program = torch.onnx.export(
            model, (x,), dynamo=True, dynamic_shapes=BATCH, verbose=False,
            custom_translation_table=qnn_onnx.translations(),
        )  # fmt: skip
        run = Exported(program)
        assert run.integers == {"MatMulInteger": 2}
        assert compared(model, run, torch.randn(7, 128)) > 100

    def test_exported_program(self) -> None:
        torch.manual_seed(0)
        model, x = _mlp("int8"), torch.randn(5, 128)
        with torch.no_grad():
            program = torch.export.export(model, (x,), dynamic_shapes=BATCH)
        run = Exported(qnn_onnx.export(program, verbose=False))
        assert compared(model, run, torch.randn(7, 128)) > 100

    @parameterized.expand(["int8", "int8_static", "fp8", "int8_weight"])
    def test_not_finite(self, scheme: str) -> None:
        """A NaN or inf is where it is in torch."""
        torch.manual_seed(0)
        model, x = _mlp(scheme), torch.randn(5, 128)
        x[1, 70], x[2, 3], x[3] = torch.nan, torch.inf, 0
        (found,) = exported(model, (x,))(x)
        with torch.no_grad():
            assert (model(x).isfinite().numpy() == np.isfinite(found)).all()
        assert np.isfinite(found).any()

    def test_half(self) -> None:
        torch.manual_seed(0)
        for dtype, least in ((torch.float16, 40.0), (torch.float64, 100.0)):
            model, x = _mlp("int8").to(dtype), torch.randn(5, 128).to(dtype)
            run = exported(model, (x,))
            assert run.integers == {"MatMulInteger": 2}
            assert compared(model, run, x) > least

    def test_file_is_small(self) -> None:
        """Weights are laid out when the model is exported, and stay in 8 or 4 bits."""
        model = nn.Sequential(nn.Linear(512, 512, bias=False)).eval()
        x = torch.randn(2, 512)
        for scheme, bits in (("int8", 8), ("int8_weight", 8), ("int4_weight", 4), ("fp8", 8)):
            program = qnn_onnx.export(
                qnn.convert(copy.deepcopy(model), scheme), (x,), verbose=False
            )
            assert Exported(program).bytes < 512 * 512 * bits // 8 + 40_000, scheme
            kept = [each.op_type for each in program.model.graph if each.op_type == "Transpose"]
            assert not kept or scheme == "fp8"


class TestRefusals:
    def test_training_mode(self) -> None:
        model = _mlp("int8").train()
        with pytest.raises(ValueError, match=r"in training mode; call model\.eval"):
            qnn_onnx.export(model, (torch.randn(2, 128),))

    def test_observed(self) -> None:
        model = qnn.prepare(nn.Sequential(nn.Linear(8, 8)).eval())
        with pytest.raises(ValueError, match=r"0 \(.*observed and not converted; call qnn.convert"):
            qnn_onnx.export(model, (torch.randn(2, 8),))

    def test_training_layer(self) -> None:
        model = qnn.convert(nn.Sequential(nn.Linear(32, 32)), "fp8", training=True).eval()
        with pytest.raises(ValueError, match="a layer for training"):
            qnn_onnx.export(model, (torch.randn(2, 32),))

    def test_not_a_model(self) -> None:
        with pytest.raises(TypeError, match=r"takes an nn\.Module or an ExportedProgram, got int"):
            qnn_onnx.export(3)  # type: ignore[arg-type]

    def test_op_without_translation(self) -> None:
        class Packs(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return qnn.functional.quantize(x, "nvfp4")[0]

        with pytest.raises(
            qnn_onnx.NotTranslatableError,
            match=r"nvfp4_quantize has no translation.*quantise before",
        ):
            qnn_onnx.export(Packs().eval(), (torch.randn(2, 32),), verbose=False)
