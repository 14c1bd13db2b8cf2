"""The grouped linear ops: a stack of weights over rows sorted by the weight that they meet."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from parameterized import parameterized

import qnn
from qnn import functional as F
from qnn.kernels import OPS, SCHEMES

from .common import same_bits

E, N, K = 4, 48, 128
STATIC = {
    "input_scale": torch.tensor([0.03]),
    "input_zero_point": torch.tensor([3], dtype=torch.int8),
}
# One of each way to store and to compute.
SOME = ("int8", "int8_weight", "fp8_tensor", "nvfp4", "int4_weight_asym")


def ends(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def grid(scheme: str) -> dict[str, torch.Tensor]:
    """The parts of a static scheme's grid, as arguments and as a layer's parameters."""
    activation = SCHEMES[scheme].activation
    if not SCHEMES[scheme].static or activation is None:
        return {}
    return {name: STATIC[name] for name in ("input" + p.suffix for p in activation.parts[1:])}


def stack(scheme: str) -> tuple[tuple[torch.Tensor, ...], list[tuple[torch.Tensor, ...]]]:
    """The parts of a stack of weights, and those of each."""
    torch.manual_seed(0)
    each = [F.quantize(w, scheme) for w in torch.randn(E, N, K)]
    return tuple(map(torch.stack, zip(*each, strict=True))), each


def one_by_one(
    x: torch.Tensor, each: Any, offsets: torch.Tensor, bias: torch.Tensor | None, scheme: str
) -> torch.Tensor:
    """The layers themselves, each on its rows."""
    y, begin = torch.zeros(len(x), N, dtype=x.dtype), 0
    for e, end in enumerate(offsets.tolist()):
        own = None if bias is None else bias[e]
        y[begin:end] = F.linear(x[begin:end], each[e], bias=own, scheme=scheme, **grid(scheme))
        begin = end
    return y


class TestOp:
    @parameterized.expand(itertools.product(SCHEMES, (torch.float32, torch.bfloat16)))
    def test_is_the_layer_of_each_group_bit_for_bit(self, scheme: str, dtype: torch.dtype) -> None:
        parts, each = stack(scheme)
        x, bias = torch.randn(23, K).to(dtype), torch.randn(E, N)
        for offsets in (ends(5, 5, 22, 23), ends(0, 1, 1, 20), ends(23, 23, 23, 23)):
            for b in (bias, None):
                got = F.grouped_linear(x, parts, offsets, b, scheme=scheme, **grid(scheme))
                assert same_bits(got, one_by_one(x, each, offsets, b, scheme))

    @parameterized.expand(SCHEMES)
    def test_no_rows(self, scheme: str) -> None:
        parts, _ = stack(scheme)
        for rows in (0, 3):  # of no group
            x = torch.randn(rows, K)
            got = F.grouped_linear(x, parts, ends(0, 0, 0, 0), scheme=scheme, **grid(scheme))
            assert same_bits(got, torch.zeros(rows, N))

    @parameterized.expand(SOME)
    def test_nan_stays_in_its_rows(self, scheme: str) -> None:
        parts, _ = stack(scheme)
        x = torch.randn(9, K)
        x[2, 7], x[8, 0] = torch.nan, torch.inf
        got = F.grouped_linear(x, parts, ends(4, 6, 6, 8), scheme=scheme)
        assert not got[2].isfinite().any()
        # A row of no group has no values to spoil; a scale for all rows ties those of a group.
        group = 4 if scheme == "fp8_tensor" else 0
        assert got[max(3, group) :].isfinite().all()

    @parameterized.expand(
        itertools.product(("int8", "fp8"), (ends(3, 2, 5, 6), ends(-1, 2, 3, 4), ends(1, 2, 3, 99)))
    )
    def test_offsets_that_are_none_are_refused(self, scheme: str, offsets: torch.Tensor) -> None:
        parts, _ = stack(scheme)
        with pytest.raises(ValueError, match="offsets must be the end of each group, from 0 to"):
            F.grouped_linear(torch.randn(9, K), parts, offsets, scheme=scheme)

    def test_wrong_arguments(self) -> None:
        parts, _ = stack("int8")
        x, offsets = torch.randn(9, K), ends(1, 2, 3, 4)
        for bad in (
            (x[None], parts, offsets),
            (x, parts, offsets[:3]),
            (x, parts, offsets.long()),
            (x, [part[0] for part in parts], offsets),
            (x, parts, offsets, torch.randn(N)),
            (x, [part[:0] for part in parts], offsets[:0]),
        ):
            with pytest.raises((ValueError, TypeError), match="qnn::int8_grouped_linear"):
                F.grouped_linear(*bad)
        with pytest.raises(ValueError, match="takes no input_scale"):
            F.grouped_linear(x, parts, offsets, **STATIC)
        with pytest.raises(ValueError, match="needs input_scale"):
            F.grouped_linear(x, parts, offsets, scheme="int8_static")

    def test_every_scheme_of_linear_layers_has_one(self) -> None:
        for scheme in SCHEMES.values():
            op = OPS[str(scheme.op("grouped_linear"))]
            (gradient,) = op.backward.values()
            assert gradient == OPS[scheme.linear].backward["x"].replace("_lin", "_grouped_lin")

    @parameterized.expand([*((scheme, False) for scheme in SOME), ("int8", True)])
    def test_gradients(self, scheme: str, compiled: bool) -> None:
        parts, each = stack(scheme)
        offsets = ends(5, 5, 9, 10)
        x, bias = torch.randn(12, K), torch.randn(E, N)
        dy = torch.randn(12, N)

        def run(call: Any, *more: Any) -> tuple[torch.Tensor, ...]:
            leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
            y = call(leaves[0], *more, offsets, leaves[1], scheme=scheme)
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))

        call: Any = F.grouped_linear
        if compiled:
            call = torch.compile(call, backend="aot_eager", fullgraph=True)
        got, want = run(call, parts), run(one_by_one, each)
        assert same_bits(got[0], want[0])
        for one, other in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(one, other)
        assert got[2][1].eq(0).all()  # of a group without rows

    def test_second_derivatives(self) -> None:
        parts, _ = stack("int8")
        x = torch.randn(6, K, requires_grad=True)
        w = F.dequantize(parts)
        y = F.grouped_linear(x, parts, ends(2, 2, 5, 5))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        group = torch.tensor([0, 0, 2, 2, 2])
        gram = 2 * w[group].mT @ w[group]  # dx = gram · x, but for the rounding of x
        want = 2 * gram.mT @ (gram @ x[:5, :, None])
        assert qnn.sqnr(want[..., 0], ddx[:5]) > 30
        assert ddx[5].eq(0).all()

    def test_func_transforms(self) -> None:
        parts, each = stack("int8")
        x, offsets, bias = torch.randn(6, K), ends(2, 2, 5, 6), torch.randn(E, N)
        call = lambda x, b: F.grouped_linear(x, parts, offsets, b)  # noqa: E731
        both = torch.vmap(call, in_dims=(0, None))(torch.stack([x, 2 * x]), bias)
        assert same_bits(both[1], one_by_one(2 * x, each, offsets, bias, "int8"))
        _, moved = torch.func.jvp(lambda b: call(x, b), (bias,), (torch.ones(E, N),))
        assert moved.eq(1).all()
        grad = torch.func.grad(lambda x: call(x, bias).sum())
        compiled = torch.compile(grad, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), grad(x))


class TestSorting:
    def test_there_and_back(self) -> None:
        torch.manual_seed(0)
        groups = torch.randint(0, 7, (13, 3))
        order, offsets = F.sort_by_group(groups, 7)
        assert groups.flatten()[order].diff().ge(0).all()
        assert offsets.tolist() == [int((groups <= e).sum()) for e in range(7)]
        rows = torch.randn(39, 5)
        assert torch.equal(F.unsort(rows[order], order), rows)

    def test_a_group_of_none_comes_last(self) -> None:
        order, offsets = F.sort_by_group(torch.tensor([2, 0, 9, 1, 2]), 2)
        assert order.tolist() == [1, 3, 0, 4, 2]
        assert offsets.tolist() == [1, 2]
        assert offsets.dtype == torch.int32

    def test_none(self) -> None:
        order, offsets = F.sort_by_group(torch.empty(0, 2, dtype=torch.int64), 3)
        assert (order.tolist(), offsets.tolist()) == ([], [0, 0, 0])
