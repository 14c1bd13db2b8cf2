"""Norms whose result is quantised: the ops in every tier, and where the compiler puts them."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch._inductor import config
from torch.nn import functional as F

import qnn
from qnn import passes
from qnn.kernels import OPS
from qnn.kernels.declare.norm import NORMS
from qnn.kernels.reference.norm import (
    KINDS,
    int8_norm_reference,
    int8_static_norm_reference,
    norm_reference,
)
from qnn.passes import fusion, norms

from .common import examples, python_kernels, same_bits
from .test_fusion import appended
from .tiers import TIERS, need

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# -- the ops ---------------------------------------------------------------------------------------


def rows(r: random.Random, m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Of any strides, with rows that are zero, constant, large, tiny, or hold a NaN or inf."""
    x = torch.randn(m, k + r.choice((0, 3)))[:, :k] * r.choice((1e-3, 1.0, 30.0))
    x = x + r.choice((0.0, 0.0, 100.0))
    for value in (0.0, 0.7, 1e-30, 1e30, math.nan, math.inf, -math.inf):
        if r.random() < 0.2:
            row, whole = r.randrange(m), value in (0.0, 0.7)
            x = x.clone()
            x[row, slice(None) if whole else r.randrange(k)] = value
    return x.to(dtype)


def call(r: random.Random) -> tuple[Any, ...]:
    dtype, m = r.choice(DTYPES), r.randint(1, 9)
    k = r.choice((1, 16, 63, 64, 65, 128, 768, r.randint(1, 300)))
    vectors = [torch.randn(k).to(r.choice(DTYPES)) if r.random() < 0.7 else None for _ in range(2)]
    residual = rows(r, m, k, dtype) if r.random() < 0.5 else None
    x = rows(r, m, k, dtype)
    return x, r.choice((1e-5, 1e-12, 0.0)), *vectors, residual, r.choice(KINDS)


def grid(r: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    scale = r.choice((0.03, 0.5, 1e-3, 0.0, math.nan))
    point = r.choice((0, -128, 127, r.randint(-128, 127)))
    return torch.tensor([scale]), torch.tensor([point], dtype=torch.int8)


def assert_same(got: Any, want: Any, seed: int) -> None:
    for one, other in zip(got, want, strict=True):
        if one.dtype.is_floating_point:
            assert torch.equal(one.isnan(), other.isnan()), seed
            one, other = one.nan_to_num(7.0), other.nan_to_num(7.0)
        assert same_bits(one, other), seed


@pytest.mark.usefixtures("library", "threads")
class TestTiers:
    @pytest.mark.parametrize("tier", TIERS)
    @examples(150, 3000)
    def test_random_calls(self, tier: str, examples: int) -> None:
        need(tier)
        run = torch.ops.qnn.cpu_norm
        for seed in range(examples):
            r = random.Random(seed)
            torch.manual_seed(seed)
            x, eps, *rest = call(r)
            torch.set_num_threads(r.choice((1, 2, 3)))
            assert_same(
                run(x, None, None, eps, *rest, tier), int8_norm_reference(x, eps, *rest), seed
            )
            on = grid(r)
            want = int8_static_norm_reference(x, *on, eps, *rest)
            assert_same(run(x, *on, eps, *rest, tier), want, seed)

    @pytest.mark.parametrize("tier", TIERS)
    def test_rows_on_threads(self, tier: str) -> None:
        need(tier)
        x, weight = torch.randn(3, 70, 520), torch.randn(520)
        want = int8_norm_reference(x, 1e-5, weight, None, x)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = torch.ops.qnn.cpu_norm(x, None, None, 1e-5, weight, None, x, "layer", tier)
            assert_same(got, want, threads)


@pytest.mark.usefixtures("library")
class TestOps:
    @parameterized.expand(NORMS)
    def test_gives_what_its_name_says(self, name: str) -> None:
        x, more = torch.randn(2, 5, 70), torch.randn(2, 5, 70)
        weight, bias = torch.randn(70), torch.randn(70)
        on = (torch.tensor([0.05]), torch.tensor([-3], dtype=torch.int8)) * ("static" in name)
        reference = int8_static_norm_reference if on else int8_norm_reference
        total, y, *codes = reference(x, *on, 1e-5, weight, bias, more)
        want = [total] * ("sum" in name) + [y] * ("fork" in name) + codes
        assert_same(OPS[name].call(x, *on, 1e-5, weight, bias, more), want, 0)
        assert_same(OPS[name].overload(x, *on, 1e-5, weight, bias, more), want, 0)

    @parameterized.expand(NORMS)
    def test_no_rows_and_rows_of_nothing(self, name: str) -> None:
        on = (torch.tensor([0.05]), torch.tensor([-3], dtype=torch.int8)) * ("static" in name)
        for shape in ((0, 70), (3, 0)):
            args = (torch.empty(shape), *on, 1e-5)
            assert_same(OPS[name].call(*args), OPS[name].reference(*args), 0)

    @parameterized.expand(itertools.product(DTYPES, (1, 64, 768, 5000)))
    def test_close_to_the_exact_norm(self, dtype: torch.dtype, k: int) -> None:
        """Rounding of the result aside, by a few units of float32: of its largest value, as a
        centred value is a difference.
        """
        x = (torch.randn(20, k) + torch.randn(20, 1) * 3).to(dtype)
        weight, bias = torch.randn(k), torch.randn(k)
        exact = x.double()
        for kind in ("layer", "rms"):
            _, got = norm_reference(x, 1e-5, weight, bias, None, kind)
            v = exact - exact.mean(-1, keepdim=True) if kind == "layer" else exact
            v = v * (v.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            size = (v.abs() + exact.abs() / (exact.var(-1, keepdim=True, correction=0) + 1e-5)
                    .sqrt() * (kind == "layer")) * weight.double().abs()  # fmt: skip
            want = v * weight.double() + bias.double()
            # Blocks of 64, six halvings, and some operations after the sums.
            steps = k / 64 + 6 + 8
            bound = size.amax(-1, keepdim=True) * steps * 2.0**-24
            bound = bound + want.abs() * torch.finfo(dtype).eps + 1e-6
            assert bool(((got.double() - want).abs() <= bound).all())

    @parameterized.expand(DTYPES)
    def test_codes_are_those_of_the_layers(self, dtype: torch.dtype) -> None:
        """Of the floats that the op gives beside them."""
        x, on = torch.randn(9, 70).to(dtype), (torch.tensor([0.02]), torch.tensor([5]).char())
        y, q, scale = OPS["int8_fork_norm"].call(x, 1e-5)
        assert_same((q, scale), OPS["int8_quantize"].call(y), 0)
        w, sw = OPS["int8_quantize"].call(torch.randn(30, 70))
        bias, residual = torch.randn(30), torch.randn(9, 30).to(dtype)
        rest = (bias, residual, "relu")
        self.same_layer(x, on, w, sw, rest)
        with python_kernels():
            self.same_layer(x, on, w, sw, rest)

    def same_layer(self, x: Any, on: Any, w: Any, sw: Any, rest: Any) -> None:
        x = x.clone()
        x[3, 4] = math.inf
        y, q, scale = OPS["int8_static_fork_norm"].call(x, *on, 1e-5)
        got = OPS["int8_static_rows_linear"].overload(q, scale, w, sw, on[1], *rest, x.dtype)
        want = OPS["int8_static_linear"].overload(y, w, sw, *on, *rest)
        assert_same((got,), (want,), 0)
        assert not bool(got[3].isfinite().any())

    def test_a_row_with_nan_is_lost_alone(self) -> None:
        x = torch.randn(5, 70)
        clean = OPS["int8_fork_norm"].call(x, 1e-5)
        x[1, 7], x[3, 0] = math.nan, math.inf
        y, q, scale = OPS["int8_fork_norm"].call(x, 1e-5)
        assert not bool(y[[1, 3]].isfinite().any())
        assert not bool(scale[[1, 3]].isfinite().any())
        assert not bool(q[[1, 3]].any())
        for got, want in zip((y, q, scale), clean, strict=True):
            assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])


# -- the pass --------------------------------------------------------------------------------------


class Norm(nn.Module):
    """A norm as models write it; in `exactly`, the op's arithmetic."""

    exact = False

    def __init__(self, k: int, kind: str, affine: bool = True) -> None:
        super().__init__()
        self.kind, self.eps = kind, 1e-5
        self.weight = nn.Parameter(torch.rand(k) + 0.5) if affine else None
        layer = affine and kind == "layer"
        self.bias = nn.Parameter(torch.randn(k)) if layer else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if Norm.exact:
            kind = {"llama": "rms_rounded", "gemma": "rms"}.get(self.kind, self.kind)
            weight = self.weight
            if self.kind == "gemma" and weight is not None:
                weight = 1.0 + weight.float()
            return norm_reference(x, self.eps, weight, self.bias, None, kind)[1]
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        v = x.to(torch.float32)
        v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "llama":
            return self.weight * v.to(x.dtype)
        return (v * (1.0 + self.weight.float())).type_as(x)


class Post(nn.Module):
    """A block of BERT: norms after the sums, which the next sum reads; one layer that mixes."""

    def __init__(self, k: int, kind: str, affine: bool = True) -> None:
        super().__init__()
        self.first, self.second = Norm(k, kind, affine), Norm(k, kind, affine)
        self.q, self.k, self.o = (nn.Linear(k, k) for _ in range(3))
        self.up, self.down = nn.Linear(k, 2 * k), nn.Linear(2 * k, k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.o(self.q(x) * self.k(x)) + x)
        return self.second(self.down(self.up(x).relu()) + x)


class Pre(nn.Module):
    """A block of Llama: norms before the layers, which alone read them."""

    def __init__(self, k: int, kind: str, affine: bool = True) -> None:
        super().__init__()
        self.first, self.second = Norm(k, kind, affine), Norm(k, kind, affine)
        self.q, self.k, self.o = (nn.Linear(k, k, bias=False) for _ in range(3))
        self.gate, self.up = (nn.Linear(k, 2 * k, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * k, k, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        x = x + self.o(self.q(h) * self.k(h))
        h = self.second(x)
        return x + self.down(self.gate(h).relu() * self.up(h))


def converted(model: nn.Module, dtype: torch.dtype = torch.float32, scheme: str = "int8") -> Any:
    if scheme == "int8":
        return qnn.convert(model.eval(), scheme).to(dtype)
    prepared = qnn.prepare(model.eval())
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(3))
    return qnn.convert(qnn.calibrate(prepared, [x], progress=False)).to(dtype)


@contextmanager
def exactly() -> Iterator[None]:
    with mock.patch.object(Norm, "exact", True):
        yield


def compiled(fn: Any, *args: Any, **options: Any) -> tuple[Any, Counter[str]]:
    """The result of the compiled `fn`; the ops of its graph, and the float norms that are left."""
    calls: Counter[str] = Counter()

    def count(graph: torch.fx.Graph) -> None:  # the graphs inside of regions come first
        calls.clear()
        calls.update(found.op.name for found in passes.match(graph.nodes))
        calls.update("norm" for node in graph.nodes if node.target is aten.rsqrt.default)
        calls.update("add" for node in graph.nodes if node.target is aten.add.Tensor)

    torch._dynamo.reset()
    with config.patch(post_grad_custom_post_pass=appended(count)):  # nothing is cached
        return torch.compile(fn, fullgraph=True, **options)(*args), calls


@torch.no_grad()
def check(fn: Any, *args: Any, calls: dict[str, int], **options: Any) -> None:
    """The ops, and the bits that they give in eager mode."""
    got, found = compiled(fn, *args, **options)
    assert found == Counter(calls), found
    with exactly():
        want = fn(*args)
    for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
        assert same_bits(one, other)
        assert one.stride() == other.stride()


class Stack(nn.Sequential):
    """Two blocks, between a layer that gives what is added to and one that reads the last norm."""

    def __init__(self, block: type[nn.Module], kind: str, affine: bool = True) -> None:
        torch.manual_seed(4)
        super().__init__(nn.Linear(48, 48), *(block(48, kind, affine) for _ in range(2)))


class TestBlocks:
    @parameterized.expand(
        [(kind, dtype) for kind in ("layer", "rms", "llama", "gemma") for dtype in DTYPES]
    )
    def test_norms_before_layers(self, kind: str, dtype: torch.dtype) -> None:
        """Each norm gives codes alone; no layer quantises what a norm gives."""
        model, x = converted(Stack(Pre, kind), dtype), torch.randn(2, 5, 48).to(dtype)
        want = {"int8_norm": 4, "int8_rows_linear": 8, "int8_linear": 5}
        check(model, x, calls=want | extra(kind))

    @parameterized.expand(
        [("layer", dtype, dynamic) for dtype in DTYPES for dynamic in (False, True)]
        + [("rms", torch.bfloat16, True)]
        + [(kind, torch.bfloat16, False) for kind in ("llama", "gemma")]
    )
    def test_norms_after_sums(self, kind: str, dtype: torch.dtype, dynamic: bool) -> None:
        """Each norm but the last gives codes, and floats for the next sum."""
        model, x = converted(Stack(Post, kind), dtype), torch.randn(2, 5, 48).to(dtype)
        with torch.no_grad():
            y, found = compiled(model, x, dynamic=dynamic)
        assert found["int8_fork_norm"] == 3
        assert found["int8_norm"] == 0
        assert found["int8_rows_linear"] == 2 + 1 + 2 + 1
        assert found["norm"] == 1
        # The last norm is Inductor's, within some roundings of the dtype.
        with exactly(), torch.no_grad():
            bound = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(y, model(x), rtol=bound, atol=bound)

    @parameterized.expand([("layer", Post), ("rms", Pre)])
    def test_without_weight_and_bias(self, kind: str, block: Any) -> None:
        model = converted(nn.Sequential(Stack(block, kind, False), nn.Linear(48, 8)))
        with torch.no_grad():
            _y, found = compiled(model, torch.randn(3, 48))
        assert found["norm"] == 0
        assert found["int8_norm"] + found["int8_fork_norm"] == 4

    def test_any_batch_without_recompiling(self) -> None:
        model = converted(Stack(Pre, "llama"), torch.bfloat16)
        run = torch.compile(model, fullgraph=True)
        x = torch.randn(2, 5, 48).bfloat16()
        torch._dynamo.mark_dynamic(x, [0, 1])

        def want(model: Any, x: torch.Tensor) -> torch.Tensor:
            with exactly():
                return model(x)

        with torch.no_grad():
            run(x)
            with torch._dynamo.config.patch(error_on_recompile=True):
                for shape in ((3, 7, 48), (2, 1100, 48), (9, 2, 48)):
                    x = torch.randn(shape).bfloat16()
                    assert same_bits(run(x), want(model, x))

    @parameterized.expand(["layer", "llama"])
    def test_on_grids(self, kind: str) -> None:
        """The first layer gets codes on its grid; others, whose grids are other tensors, floats."""
        model, x = converted(Stack(Pre, kind), scheme="int8_static"), torch.randn(2, 5, 48)
        want = {"int8_static_fork_norm": 4, "int8_static_rows_linear": 4, "int8_static_linear": 9}
        check(model, x, calls=want | extra(kind))


def extra(kind: str) -> dict[str, int]:
    """The additions that are left: of gemma's weight."""
    return {"add": 4} if kind == "gemma" else {}


class TestUsers:
    def setup_method(self) -> None:
        torch.manual_seed(5)
        self.a, self.b = (converted(nn.Linear(48, 48)) for _ in range(2))
        self.norm = Norm(48, "layer")
        self.x = torch.randn(3, 5, 48)

    def test_returned_sliced_and_added(self) -> None:
        def fn(x: torch.Tensor) -> Any:
            y = self.norm(x)
            return self.a(y) + y, self.b(y[:, 0]), y

        check(
            fn, self.x, calls={"int8_fork_norm": 1, "int8_rows_linear": 1, "int8_linear": 1}
        )  # the residual is folded, and the slice is quantised anew

    def test_an_input_that_is_its_own_residual(self) -> None:
        def fn(x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return y + self.a(y)

        check(fn, self.x, calls={"int8_fork_norm": 1, "int8_rows_linear": 1})

    def test_tied_layers(self) -> None:
        self.b.weight = self.a.weight
        self.b.weight_scale = self.a.weight_scale

        def fn(x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return torch.cat([self.a(y), self.b(y), self.a(y).relu()])

        check(fn, self.x, calls={"int8_norm": 1, "int8_rows_linear": 3})

    def test_a_sum_that_is_read_again(self) -> None:
        """Both terms are in memory: the op adds them, and gives the sum."""

        def fn(x: torch.Tensor, other: torch.Tensor) -> Any:
            total = x + other
            return self.a(self.norm(total)), total

        two = self.x, torch.randn_like(self.x)
        check(fn, *two, calls={"int8_sum_norm": 1, "int8_rows_linear": 1})

        def both(x: torch.Tensor, other: torch.Tensor) -> Any:
            total = x + other
            y = self.norm(total)
            return self.a(y), total, y

        check(both, *two, calls={"int8_sum_fork_norm": 1, "int8_rows_linear": 1})
        bfloat16 = [each.bfloat16() for each in two]
        self.a.bfloat16(), self.norm.bfloat16()
        check(both, *bfloat16, calls={"int8_sum_fork_norm": 1, "int8_rows_linear": 1})

    def test_a_sum_that_nothing_else_reads(self) -> None:
        def fn(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return self.a(self.norm(x + other))

        check(fn, self.x, torch.randn_like(self.x), calls={"int8_norm": 1, "int8_rows_linear": 1})

    def test_a_sum_of_what_is_computed_stays_there(self) -> None:
        def fn(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return self.a(self.norm(x.abs() + other[:1]))

        want = {"int8_norm": 1, "int8_rows_linear": 1, "add": 1}
        check(fn, self.x, torch.randn_like(self.x), calls=want)

    def test_rows_with_nan(self) -> None:
        self.x[1, 2, 3] = math.nan
        with torch.no_grad():
            y, found = compiled(lambda x: self.a(self.norm(x)), self.x)
        assert found["int8_norm"] == 1
        assert y[1, 2].isnan().all()
        assert y.isnan().sum() == 48


class TestLeftAlone:
    def setup_method(self) -> None:
        torch.manual_seed(6)
        self.layer, self.norm = converted(nn.Linear(48, 8)), Norm(48, "layer")

    def none(self, fn: Any, *args: Any, **options: Any) -> None:
        with torch.no_grad():
            got, found = compiled(fn, *args, **options)
            assert not {*found} & {*NORMS}
            torch.testing.assert_close(got, fn(*args), rtol=1e-4, atol=2e-2)

    def test_what_is_no_norm_of_rows(self) -> None:
        x = torch.randn(4, 6, 48)
        self.none(lambda x: self.layer(F.layer_norm(x, (6, 48))), x)
        self.none(lambda x: self.layer(F.layer_norm(x.mT, (6,)).mT), x)
        self.none(lambda x: self.layer(x * torch.rsqrt(x.pow(2).sum(-1, True) + 1e-5)), x)
        self.none(lambda x: self.layer(x * torch.rsqrt(x.pow(2).mean(-1, True))), x)
        self.none(lambda x: self.layer(x * torch.rsqrt(x.pow(3).mean(-1, True).abs() + 1)), x)
        unbiased = lambda x: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)  # noqa: E731
        self.none(lambda x: self.layer(unbiased(x)), x)
        other = torch.randn(4, 6, 48)
        self.none(
            lambda x, y: self.layer(x * torch.rsqrt(y.pow(2).mean(-1, True) + 1e-5)), x, other
        )

    def test_an_eps_that_is_an_input(self) -> None:
        """As torch takes a float that a model names itself, where all is to be dynamic."""
        norm = Norm(48, "llama")
        self.none(lambda x: self.layer(norm(x)), torch.randn(4, 48), dynamic=True)

    def test_a_weight_of_each_row(self) -> None:
        x, weight = torch.randn(48, 48), torch.rand(48, 1)
        self.none(lambda x: self.layer(F.layer_norm(x, (48,)) * weight), x)

    def test_a_part_that_is_read_elsewhere(self) -> None:
        def fn(x: torch.Tensor) -> Any:
            deviation = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
            return self.layer(x * deviation), deviation

        self.none(fn, torch.randn(4, 48))

    def test_other_schemes_and_float_layers(self) -> None:
        x, float_layer = torch.randn(4, 48), nn.Linear(48, 8)
        weight_only = qnn.convert(nn.Linear(48, 8), "int8_weight")
        self.none(lambda x: weight_only(self.norm(x)) + float_layer(self.norm(x)), x)

    def test_float64(self) -> None:
        layer, norm = converted(nn.Linear(48, 8), torch.float64), Norm(48, "layer").double()
        self.none(lambda x: layer(norm(x)), torch.randn(4, 48).double())

    def test_a_transposed_input(self) -> None:
        """The op would copy it, which Inductor's code need not."""
        norm = Norm(48, "llama")
        self.none(lambda x: self.layer(norm(x.mT)), torch.randn(3, 48, 5))

    def test_switched_off(self) -> None:
        x, before = torch.randn(4, 48), fusion._uuid()
        with mock.patch.object(norms, "KINDS", {"rms"}):
            self.none(lambda x: self.layer(self.norm(x)), x)
            assert fusion._uuid() != before  # caches of compiled graphs tell them apart
        with mock.patch.object(norms, "KINDS", {"layer"}):
            rms = Norm(48, "llama")
            self.none(lambda x: self.layer(rms(x)), x)
        self.none(lambda x: self.layer(self.norm(x)), x, options={"pattern_matcher": False})

    def test_training(self) -> None:
        """Graphs with gradients keep their norms, whose statistics the backward reads."""
        model = converted(Stack(Pre, "layer"))
        for norm in (each for each in model.modules() if isinstance(each, Norm)):
            norm.requires_grad_()
        x = torch.randn(3, 48)
        y, found = compiled(model, x)
        assert not {*found} & {*NORMS}
        y.square().sum().backward()
        got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(got) == 8 + 1  # and a bias
        model.zero_grad()
        model(x).square().sum().backward()
        want = [p.grad for p in model.parameters() if p.grad is not None]
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


class TestModels:
    @parameterized.expand(["bert", "llama"])
    def test_of_transformers(self, name: str) -> None:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(7)
        sizes = {
            "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 50,
            "num_hidden_layers": 2,
        }  # fmt: skip
        if name == "bert":
            model = transformers.BertModel(transformers.BertConfig(**sizes))
        else:
            model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, use_cache=False))
        model = qnn.convert(model.eval().bfloat16(), "int8")
        ids = torch.randint(50, (2, 9))

        def run(ids: torch.Tensor) -> torch.Tensor:
            return model(ids).last_hidden_state

        with torch.no_grad():
            got, found = compiled(run, ids)
            with mock.patch.object(norms, "KINDS", set()):
                plain, none = compiled(run, ids)
            want = run(ids)
        assert not {*none} & {*NORMS}
        if name == "bert":  # the embedding's, two a block; the pooler reads a slice of the last
            assert found["int8_fork_norm"] == 4
            assert found["norm"] == 1
            assert found["int8_rows_linear"] == 2 * 4
        else:  # two a block; the last is the result
            assert found["int8_norm"] == 4
            assert found["norm"] == 1
            assert found["int8_rows_linear"] == 2 * 5
        # As near to eager mode as the graph without the pass, whose norms round otherwise too.
        error = [(each.double() - want.double()).norm().item() for each in (got, plain)]
        assert error[0] <= 2 * error[1] + 0.01 * want.double().norm().item()

    def test_packaged(self) -> None:
        model, x = converted(Stack(Pre, "llama"), torch.bfloat16), torch.randn(2, 5, 48).bfloat16()
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            program = torch.export.export(model, (x,))
            path = str(Path(folder) / "model.pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=path)
            with exactly():
                want = model(x)
            assert same_bits(torch._inductor.aoti_load_package(path)(x), want)
