"""The CPU kernels against the references: integers bit for bit, on every engine and CPU."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from parameterized import parameterized

from qnn.kernels.cpu import int8_linear as cpu
from qnn.kernels.cpu import native
from qnn.kernels.cpu.engines import ENGINES, self_test
from qnn.kernels.reference import int8

from .common import DTYPES, SIZES, forked, sum_bound, weights

USABLE = [name for name in ENGINES if self_test(name).usable]


def name_case(function, number, param) -> str:  # type: ignore[no-untyped-def]
    parts = [str(p).removeprefix("torch.").replace(", ", "x").strip("()") for p in param.args]
    return "_".join([function.__name__, *parts]).replace(" ", "")


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("amx_int8"), reason="this CPU has no AMX")
@pytest.mark.parametrize(("most", "zero_point"), [("ALL", 0), ("AVX512_CORE_VNNI", 128)])
def test_onednn_is_exact_with_amx_and_without(most: str, zero_point: int) -> None:
    forked(
        f"""
        import os
        os.environ["ONEDNN_MAX_CPU_ISA"] = "{most}"
        from qnn.kernels.cpu.engines import ENGINES, self_test
        assert self_test("onednn").usable, self_test("onednn")
        assert ENGINES["onednn"].zero_point == {zero_point}
        """
    )


@pytest.mark.usefixtures("poisoned_memory")
class TestLinear:
    @parameterized.expand(itertools.product(USABLE, SIZES), name_func=name_case)
    def test_float32_equals_reference(self, engine: str, size: tuple[int, int, int]) -> None:
        m, k, n = size
        w, sw = weights(n, k)
        x, bias = torch.randn(m, k), torch.randn(n)
        got = cpu.linear(x, w, sw, bias, engine=ENGINES[engine])
        assert torch.equal(got, int8.linear_reference(x, w, sw, bias))

    @parameterized.expand(itertools.product(USABLE, SIZES), name_func=name_case)
    def test_integers(self, engine: str, size: tuple[int, int, int]) -> None:
        """Scales of one and whole activations: the result is the integer sum itself."""
        m, k, n = size
        w, _ = weights(n, k)
        xq = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        xq[:, 0] = 127
        y = cpu.linear(xq.float(), w, torch.ones(n, 1), None, engine=ENGINES[engine])
        want = xq.long() @ w.long().T
        assert torch.equal(y, want.to(torch.float32))

    @parameterized.expand(itertools.product(DTYPES, SIZES), name_func=name_case)
    def test_dtypes(self, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
        m, k, n = size
        w, sw = weights(n, k)
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        got = torch.ops.qnn.int8_linear(x, w, sw, bias)
        assert got.dtype == dtype
        assert torch.equal(got, int8.linear_reference(x, w, sw, bias))

    def test_blocked_rows_equal_unblocked(self) -> None:
        x = torch.randn(700, 1000)  # more than one quantisation block
        q, scale = cpu.quantize_rows(x)
        for rows in (slice(0, 1), slice(523, 530), slice(699, 700)):
            q1, scale1 = cpu.quantize_rows(x[rows])
            assert torch.equal(q[rows], q1)
            assert torch.equal(scale[rows], scale1)
        assert torch.equal(q, int8.quantize_reference(x)[0])

    def test_longest_row(self) -> None:
        k = 132_104
        w = torch.full((2, k), -128, dtype=torch.int8)
        for engine in USABLE:
            y = cpu.linear(
                torch.full((1, k), -1.0), w, torch.ones(2, 1), None, engine=ENGINES[engine]
            )
            # The scale of the row is 1/127, its integers are -127.
            want = torch.tensor(127.0 * 128 * k) * (torch.tensor(1.0) / 127)
            torch.testing.assert_close(y[0, 0], want, rtol=1e-6, atol=0)

    def test_leading_axes_strides_and_empty(self) -> None:
        w, sw = weights(9, 8)
        op = torch.ops.qnn.int8_linear
        x = torch.randn(4, 3, 8)
        want = op(x.reshape(12, 8), w, sw, None)
        assert torch.equal(op(x, w, sw, None), want.view(4, 3, 9))
        assert torch.equal(op(x[0, 0], w, sw, None), want[0])
        strided = torch.randn(8, 12).T
        assert torch.equal(op(strided, w, sw, None), op(strided.contiguous(), w, sw, None))
        expanded = x[:1, :1].expand(4, 3, 8)
        assert torch.equal(op(expanded, w, sw, None), want[:1].expand(12, 9).view(4, 3, 9))
        transposed = torch.randint(-127, 127, (8, 9), dtype=torch.int8).T
        assert torch.equal(op(x, transposed, sw, None), op(x, transposed.contiguous(), sw, None))
        assert op(torch.empty(0, 8), w, sw, None).shape == (0, 9)
        assert op(torch.empty(2, 0, 8), w, sw, torch.ones(9)).shape == (2, 0, 9)
        no_k = op(torch.empty(3, 0), torch.empty(9, 0, dtype=torch.int8), sw, torch.arange(9.0))
        assert torch.equal(no_k, torch.arange(9.0).expand(3, 9))

    def test_scales_and_bias_of_any_stride(self) -> None:
        for k, n in ((64, 64), (600, 300)):  # both engines
            w, _ = weights(n, k)
            x = torch.randn(9, k)
            scales = {
                "sliced": (torch.rand(n, 3) + 0.1)[:, 1:2],
                "every second": (torch.rand(2 * n, 1) + 0.1)[::2],
                "expanded": torch.tensor([[0.5]]).expand(n, 1),
                "transposed": (torch.rand(1, n) + 0.1).T,
            }
            for name, sw in scales.items():
                for bias in (None, torch.randn(n, 2)[:, 0], torch.ones(1).expand(n)):
                    got = torch.ops.qnn.int8_linear(x, w, sw, bias)
                    assert torch.equal(got, int8.linear_reference(x, w, sw, bias)), (name, n)
                    got = torch.ops.qnn.int8_weight_linear(x, w, sw, bias)
                    want = int8.weight_linear_reference(x, w, sw, bias, compute=torch.float64)
                    sizes = x.abs() @ (w * sw).abs().T + (0 if bias is None else bias.abs())
                    over = (got - want).abs() / sum_bound(sizes, k + 2)
                    assert over.max().item() <= 1, (name, n)

    @parameterized.expand(itertools.product(("int8_linear", "int8_weight_linear"), DTYPES))
    def test_non_finite_rows_stay_apart(self, op: str, dtype: torch.dtype) -> None:
        w, sw = weights(33, 64)
        x = torch.randn(5, 64).to(dtype)
        clean = getattr(torch.ops.qnn, op)(x, w, sw, torch.ones(33))
        for bad in (float("nan"), float("inf"), -float("inf")):
            dirty = x.clone()
            dirty[2, 7] = bad
            y = getattr(torch.ops.qnn, op)(dirty, w, sw, torch.ones(33))
            assert not bool(y[2].isfinite().any())
            keep = torch.tensor([0, 1, 3, 4])
            assert torch.equal(y[keep], clean[keep])

    def test_zero_huge_and_tiny_rows(self) -> None:
        w, sw = weights(33, 64)
        x = torch.randn(6, 64)
        x[0], x[1], x[2], x[3], x[4] = 0, x[1] * 1e20, x[2] * 1e-20, x[3] * 1e-38, x[4] * 1e-44
        y = torch.ops.qnn.int8_linear(x, w, sw, None)
        assert torch.equal(y, int8.linear_reference(x, w, sw))
        assert bool((y[0] == 0).all())
        assert bool(y.isfinite().all())
        with_bias = torch.ops.qnn.int8_linear(x[:1], w, sw, torch.arange(33.0))
        assert torch.equal(with_bias[0], torch.arange(33.0))

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        w, sw = weights(96, 64)
        x = torch.randn(300, 64)
        whole = torch.ops.qnn.int8_linear(x, w, sw, None)
        for rows in (1, 8, 9, 128, 129):
            assert torch.equal(torch.ops.qnn.int8_linear(x[:rows], w, sw, None), whole[:rows])

    @parameterized.expand([("int8_linear",), ("int8_weight_linear",), ("int8_linear_dgrad",)])
    def test_the_surroundings_change_nothing(self, name: str) -> None:
        """Autocast, default dtype and default device reach the torch calls inside a kernel."""
        op = getattr(torch.ops.qnn, name)
        for m, k, n in ((3, 64, 64), (3, 700, 700)):  # both engines
            w, sw = weights(n, k)
            args = (torch.randn(m, n), w, sw)
            args = args if name.endswith("dgrad") else (torch.randn(m, k), w, sw, torch.randn(n))
            want = op(*args)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(op(*args), want)
            with torch.device("meta"):
                assert torch.equal(op(*args), want)
            try:
                torch.set_default_dtype(torch.bfloat16)
                assert torch.equal(op(*args), want)
            finally:
                torch.set_default_dtype(torch.float32)

    def test_the_self_test_is_the_same_in_every_mode(self) -> None:
        forked(
            """
            import torch, qnn
            from torch._subclasses.fake_tensor import FakeTensorMode
            from qnn.kernels.cpu.engines import self_test
            torch.set_default_dtype(torch.float16)
            with torch.device("meta"), torch.autocast("cpu"), FakeTensorMode():
                inside = [self_test(name) for name in ("onednn", "exact")]
            torch.set_default_dtype(torch.float32)
            self_test.cache_clear()
            assert inside == [self_test(name) for name in ("onednn", "exact")], inside
            """
        )

    def test_lower_matmul_precision_changes_no_integer(self) -> None:
        w, _ = weights(64, 1500)
        x = torch.randint(-127, 128, (40, 1500)).float()
        x[:, 0] = 127
        want = (x.double() @ w.double().T).float()
        before = torch.get_float32_matmul_precision()
        try:
            for precision in ("high", "medium"):
                torch.set_float32_matmul_precision(precision)
                y = cpu.linear(x, w, torch.ones(64, 1), None, engine=ENGINES["exact"])
                assert torch.equal(y, want), precision
        finally:
            torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("poisoned_memory")
class TestQuantize:
    def test_ties_go_to_even(self) -> None:
        halves = torch.arange(-126.5, 127.5, 1.0)
        x = torch.cat([torch.tensor([127.0]), halves])[None]
        q, scale = torch.ops.qnn.int8_quantize(x)
        assert scale.item() == 1.0
        even = [round(v) for v in halves.tolist()]  # Python rounds ties to even
        assert q[0, 1:].tolist() == even

    @parameterized.expand([(dtype,) for dtype in DTYPES], name_func=name_case)
    def test_equals_reference(self, dtype: torch.dtype) -> None:
        x = torch.cat([torch.randn(40, 100) * 10.0**e for e in (-40, -30, -3, 0, 3)]).to(dtype)
        x[3] = 0
        x[4, 5], x[6, 7] = float("nan"), float("inf")
        q, scale = torch.ops.qnn.int8_quantize(x)
        want_q, want_scale = int8.quantize_reference(x)
        assert torch.equal(q, want_q)
        torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
        assert scale[3].item() == 1.0
        assert bool((q[4] == 0).all() and (q[6] == 0).all())
        assert not bool(torch.ops.qnn.int8_dequantize(q, scale, dtype)[6].isfinite().any())

    def test_every_code_survives_a_round_trip(self) -> None:
        codes = torch.arange(-127, 128, dtype=torch.int8)[None]
        for scale in (torch.tensor([[2.0**-9]]), torch.rand(1, 1), torch.tensor([[3e-38]])):
            x = torch.ops.qnn.int8_dequantize(codes, scale, torch.float32)
            q, _ = torch.ops.qnn.int8_quantize(x)
            assert torch.equal(q, codes)


# Those that call an engine; the other tests run native code, which no setting of oneDNN reaches.
ENGINE_CASES = "float32_equals or test_integers or blocked_rows or longest_row or matmul_precision"
PICK = ENGINE_CASES if native.ensure().loaded else "TestLinear or TestQuantize"


class TestInstructionSets:
    """What an engine computes again, in processes whose oneDNN is held to older instructions."""

    @parameterized.expand([("AVX2",), ("AVX512_CORE",), ("AVX2_VNNI",), ("AVX512_CORE_VNNI",)])
    def test_exact_under(self, isa: str) -> None:
        out = forked(
            """
            import os, sys, pytest
            os.environ["ONEDNN_MAX_CPU_ISA"] = LEVEL
            from qnn.kernels.cpu.engines import ENGINES, self_test
            print({name: self_test(name).usable for name in ENGINES})
            pick = PICK
            sys.exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", TESTS, "-k", pick])))
            """.replace("TESTS", repr(str(Path(__file__))))
            .replace("PICK", repr(PICK))
            .replace("LEVEL", repr(isa))
        )
        assert "'exact': True" in out

    def test_without_vnni_onednn_is_found_out(self) -> None:
        out = forked(
            """
            import os, torch
            os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
            from qnn.kernels.cpu.engines import best_engine, self_test
            print(self_test("onednn"), best_engine(1000, torch.empty(1000, 1000)).name)
            """
        )
        assert "usable=False" in out
        assert "wrong integers in the known-answer test" in out
        assert out.strip().endswith("exact")
