"""`qnn.Linear`: what a training script does to an `nn.Linear` it may do to this one."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from parameterized import parameterized
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import qnn
import qnn.functional as F
from qnn import passes
from qnn.kernels import OPS, SCHEMES, Scheme
from qnn.kernels.formats import Format

from .common import same_bits

TRAINED = [(s.name,) for s in SCHEMES.values() if s.trainable]
NAMES = [name for (name,) in TRAINED]
# One of each way through the compiled step: rows, blocks, and two scales with random rounding. In
# eager mode and in the ops' own tests every scheme runs.
CODE_PATHS = ("fp8", "fp8_block", "nvfp4")
BACKENDS = ("aot_eager", "inductor")


def layer(scheme: str, k: int = 64, n: int = 32, bias: bool = True, **kwargs: Any) -> qnn.Linear:
    torch.manual_seed(3)
    return qnn.Linear(k, n, bias, scheme=scheme, **kwargs)


def mlp(scheme: str) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))
    return qnn.convert(model, scheme, training=True)


def sqnr(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.double()
    return float(10 * torch.log10(want.square().sum() / (got.double() - want).square().sum()))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().ravel(), b.double().ravel(), 0))


class Calls(TorchDispatchMode):
    """Counts the qnn ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qnn":
            self.count[func._schema.name.removeprefix("qnn::")] += 1
        return func(*args, **(kwargs or {}))


class TestModule:
    @parameterized.expand(itertools.product(NAMES, (True, False)))
    def test_is_an_nn_linear_with_a_scheme(self, scheme: str, bias: bool) -> None:
        torch.manual_seed(3)
        plain = nn.Linear(64, 32, bias)
        mine = layer(scheme, bias=bias)
        assert list(mine.state_dict()) == list(plain.state_dict())
        for name, tensor in plain.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor), name
        other = nn.Linear(64, 32, bias)
        mine.load_state_dict(other.state_dict(), strict=True)
        plain.load_state_dict(mine.state_dict(), strict=True)
        assert torch.equal(plain.weight, other.weight)
        assert f"scheme={scheme!r}" in repr(mine)
        assert eval(repr(mine), {"Linear": qnn.Linear}).scheme == scheme  # noqa: S307

    @parameterized.expand(
        [
            ((0, 4), {}, ValueError, r"qnn.Linear\(0, 4, scheme='fp8'\): .*at least 1"),
            ((48, 4), {"scheme": "fp9"}, ValueError, "unknown scheme 'fp9'.*Did you mean 'fp8'"),
            ((64, 4), {"scheme": "int8"}, ValueError, "no layer for training; use one of 'fp8'"),
            ((64, 4), {"scheme": "fp8_weight"}, ValueError, "no layer for training; use one of"),
            ((64, 4), {"scheme": "nvfp4_weight"}, ValueError, "convert with training=False"),
            ((100, 7), {"scheme": "mxfp8"}, ValueError, r"100, 7, .*multiple of 32.*pad to 128"),
            ((3071, 8), {"scheme": "nvfp4"}, ValueError, "multiple of 16, got 3071.*pad to 3072"),
            ((4, 4), {"dtype": torch.int8}, TypeError, "dtype must be one of torch.float32"),
        ]
    )
    def test_bad_arguments(self, args: Any, kwargs: Any, kind: Any, message: str) -> None:
        with pytest.raises(kind, match=message):
            qnn.Linear(*args, **kwargs)

    def test_bad_input(self) -> None:
        module = layer("fp8")
        with pytest.raises(ValueError, match=r"qnn.Linear\(64, 32, .*\[..., 64\], got \(2, 47"):
            module(torch.randn(2, 47))
        with pytest.raises(TypeError, match="storage dtype"):
            module(torch.zeros(2, 64).to(torch.float8_e4m3fn))
        with pytest.raises(TypeError, match=r"cast it with .float"):
            module(torch.zeros(2, 64, dtype=torch.int64))
        with pytest.raises(ValueError, match="the input is on meta, the layer on cpu"):
            module(torch.zeros(2, 64, device="meta"))
        for bad, message in (
            ((torch.randn(3), torch.randn(4, 5)), r"x must be \[..., K\] and weight \[N, K\]"),
            ((torch.randn(2, 5), torch.randn(4, 5), torch.randn(3)), r"bias must be \[4\]"),
        ):
            with pytest.raises(ValueError, match=message):
                F.training_linear(*bad)
        with pytest.raises(TypeError, match="weight must be one of"):
            F.training_linear(torch.randn(2, 5), torch.zeros(4, 5, dtype=torch.int8))

    @parameterized.expand(TRAINED)
    def test_convert_there_and_on_to_deployment(self, scheme: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))
        plain = copy.deepcopy(model)
        training = qnn.convert(model, scheme, training=True)
        assert isinstance(training[0], qnn.Linear)
        assert type(model[0]) is nn.Linear
        assert training[0].weight is model[0].weight
        assert list(training.state_dict()) == list(plain.state_dict())
        with pytest.raises(ValueError, match=r"converted already .2 Linear, scheme"):
            qnn.convert(training, scheme, training=True)
        weight = model[0].weight
        inplace = qnn.convert(model, scheme, training=True, inplace=True)
        assert inplace is model
        assert inplace[0].weight is weight
        x = torch.randn(5, 96)
        deployed = qnn.convert(training, scheme)
        assert isinstance(deployed[0], qnn.QLinear)
        assert torch.equal(deployed(x), qnn.convert(plain, scheme)(x))
        row = qnn.summary(training).rows[0]
        assert (row.layer, row.scheme) == ("Linear", scheme)
        assert "quantised in each step" in str(row.backend)

    def test_convert_names_the_layers_that_a_scheme_does_not_take(self) -> None:
        model = nn.Sequential(nn.Linear(100, 64), nn.Linear(64, 10))
        with pytest.raises(ValueError, match=r"0: in_features must be a multiple of 32, got 100"):
            qnn.convert(model, "mxfp8", training=True)
        skipped = qnn.convert(model, "mxfp8", training=True, on_unsupported="skip")
        assert type(skipped[0]) is nn.Linear
        assert isinstance(skipped[1], qnn.Linear)
        with pytest.raises(ValueError, match=r"qnn.convert: scheme 'int8' has no layer for"):
            qnn.convert(model, "int8", training=True)


def operands(
    lead: tuple[int, ...] = (5,), k: int = 64, n: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, w, bias and dy."""
    torch.manual_seed(7)
    x, w = torch.randn(*lead, k), (torch.rand(n, k) * 2 - 1) / k**0.5
    return x.to(dtype), w, torch.randn(n), torch.randn(*lead, n).to(dtype)


class TestNumerics:
    """SQNR against float64, a few tenths of a dB under what an independent simulation gives."""

    GATES = {  # noqa: RUF012  # output, dgrad, wgrad
        "fp8": (28.5, 28.5, 28.4),
        "fp8_tensor": (28.4, 24.4, 24.3),
        "fp8_block": (28.3, 28.2, 28.2),
        "mxfp8": (28.3, 28.2, 28.2),
        "nvfp4": (16.4, 14.7, 15.2),
    }

    @parameterized.expand(TRAINED)
    def test_sqnr(self, scheme: str) -> None:
        x, w, _, dy = operands((256,), 384, 512)
        x.requires_grad_()
        w.requires_grad_()
        y = F.training_linear(x, w, scheme=scheme)
        y.backward(dy)
        xd, wd, dyd = x.detach().double(), w.detach().double(), dy.double()
        wanted = xd @ wd.T, dyd @ wd, dyd.T @ xd
        for got, want, gate in zip((y, x.grad, w.grad), wanted, self.GATES[scheme], strict=True):
            assert sqnr(got.detach(), want) > gate  # type: ignore[union-attr]
            assert sqnr(got.detach(), want) < gate + 1  # type: ignore[union-attr]

    @parameterized.expand(TRAINED)
    def test_no_gradient_is_silently_zero(self, scheme: str) -> None:
        """The direction of each is that of bfloat16's."""
        x, w, bias, dy = operands((64,), 128, 96)
        found = []
        for function in (functools.partial(F.training_linear, scheme=scheme), None):
            leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
            if function:
                function(*leaves).backward(dy)
            else:
                a, b, c = (leaf.bfloat16() for leaf in leaves)
                nn.functional.linear(a, b, c).backward(dy.bfloat16())
            found.append([leaf.grad for leaf in leaves])
        for got, want in zip(*found, strict=True):
            assert got is not None
            assert want is not None
            assert cosine(got, want) > (0.95 if scheme == "nvfp4" else 0.99)

    @parameterized.expand(TRAINED)
    def test_codes_are_those_of_the_references(self, scheme: str) -> None:
        """What the layer multiplies and what it saves, in eager mode and under Inductor."""
        training = SCHEMES[scheme].training
        assert training is not None
        x, w, _, _ = operands((137,))
        w.requires_grad_()
        want = [*training.x.quantize(x), *training.x_of_wgrad.quantize(x.T)]

        def parts(x: torch.Tensor) -> list[torch.Tensor]:
            return list(OPS[f"{training.x.key}_quantize_both"].overload(x))

        for call in (parts, torch.compile(parts, fullgraph=True)):
            for got, wanted in zip(call(x), want, strict=True):
                assert same_bits(got, wanted)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            for call in (F.training_linear, torch.compile(F.training_linear, fullgraph=True)):
                saved: list[torch.Tensor] = []
                y = call(x, w, scheme=scheme)
                y.sum().backward()
                for wanted in want[len(training.x.parts) :]:
                    assert any(same_bits(wanted, each) for each in saved)

    @parameterized.expand(
        [(*case,) for case in itertools.product(NAMES, (1, 37, 130), (64, 96), (1, 10, 200))]
    )
    def test_odd_sizes(self, scheme: str, m: int, k: int, n: int) -> None:
        x, w, bias, dy = operands((m,), k, n)
        got = gradients(functools.partial(F.training_linear, scheme=scheme), x, w, bias, dy)
        want = gradients(nn.functional.linear, x, w, bias, dy)
        least = 9 if scheme == "nvfp4" else 20
        for mine, exact in zip(got, want, strict=True):
            assert mine.shape == exact.shape
            if mine.numel() >= 10:  # one sum alone may cancel
                assert sqnr(mine, exact) > least
            else:
                torch.testing.assert_close(mine, exact, rtol=0.5, atol=0.5)

    @parameterized.expand(itertools.product(NAMES, (torch.bfloat16, torch.float16, torch.float64)))
    def test_dtypes(self, scheme: str, dtype: torch.dtype) -> None:
        module = layer(scheme, dtype=dtype)
        x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
        y = module(x)
        y.sum().backward()
        assert x.grad is not None
        assert {y.dtype, x.grad.dtype} == {dtype}
        assert all(p.grad.dtype == dtype for p in module.parameters())  # type: ignore[union-attr]

    @parameterized.expand([("fp8", 1), ("fp8_block", 1), ("mxfp8", 32), ("fp8_tensor", 0)])
    def test_rows_do_not_touch_each_other(self, scheme: str, _: int) -> None:
        """Zero, huge, tiny rows and one NaN: each in its own row of the output."""
        x, w, _, _ = operands((6,))
        plain = F.training_linear(x, w, scheme=scheme)
        x[0], x[1], x[2], x[3, 7] = 0, x[1] * 1e20, x[2] * 1e-20, torch.nan
        y = F.training_linear(x, w, scheme=scheme)
        assert torch.equal(y[0], torch.zeros(32))
        assert not y[3].isfinite().any()
        assert y[[0, 1, 2, 4, 5]].isfinite().all()
        if scheme != "fp8_tensor":  # there the huge row takes the others' scale away
            assert torch.equal(y[4:], plain[4:])
            for row, factor in ((1, 1e20), (2, 1e-20)):
                assert sqnr(y[row] / factor, plain[row]) > 25

    @parameterized.expand(TRAINED)
    def test_special_values_in_gradients(self, scheme: str) -> None:
        for factor in (0.0, 1e20, 1e-20):
            x, w, bias, dy = operands((5,))
            for mine in gradients(
                functools.partial(F.training_linear, scheme=scheme), x * factor, w, bias, dy
            ):
                assert mine.isfinite().all()
            got = gradients(
                functools.partial(F.training_linear, scheme=scheme), x, w, bias, dy * factor
            )
            assert all(mine.isfinite().all() for mine in got)
            if factor == 0:
                assert all(not mine.any() for mine in got[1:])
        x, w, bias, dy = operands((5,))
        x[1, 3] = torch.nan
        y, dx, dw, _ = gradients(
            functools.partial(F.training_linear, scheme=scheme), x, w, bias, dy
        )
        assert not y[1].isfinite().any()
        assert y[[0, 2, 3, 4]].isfinite().all()
        assert dx.isfinite().all()
        assert not dw[:, 3].isfinite().any()
        assert dw[:, [0, 1, 2, 4]].isfinite().all()
        x, w, bias, dy = operands((5,))
        dy[1, 3] = torch.inf
        _, dx, dw, dbias = gradients(
            functools.partial(F.training_linear, scheme=scheme), x, w, bias, dy
        )
        assert not dx[1].isfinite().any()
        assert dx[[0, 2, 3, 4]].isfinite().all()
        assert not dw[3].isfinite().any()
        assert dw[[0, 1, 2, 4]].isfinite().all()
        assert not dbias[3].isfinite()

    @parameterized.expand(itertools.product(NAMES, ((0,), (2, 0), ())))
    def test_empty_and_single(self, scheme: str, lead: tuple[int, ...]) -> None:
        x, w, bias, dy = operands(lead)
        got = gradients(functools.partial(F.training_linear, scheme=scheme), x, w, bias, dy)
        assert got[0].shape == (*lead, 32)
        assert all(mine.isfinite().all() for mine in got)
        if 0 in lead:
            assert not got[2].any()
            assert got[2].shape == w.shape

    def test_stochastic_rounding_is_unbiased_and_follows_the_seed(self) -> None:
        x, w, _, dy = operands((64,), 64, 64)
        x.requires_grad_()
        w.requires_grad_()

        def dx(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            y = F.training_linear(x, w, scheme="nvfp4")
            return torch.autograd.grad(y, x, dy)[0]

        assert torch.equal(dx(1), dx(1))
        assert not torch.equal(dx(1), dx(2))
        # The mean of many draws is closer to the product with the float dy than any draw.
        training = SCHEMES["nvfp4"].training
        assert training is not None
        parts = training.weight.quantize(w.detach().T)
        exact = dy.double() @ training.weight.dequantize(parts, torch.float64).T
        draws = torch.stack([dx(seed) for seed in range(64)])
        assert sqnr(draws.mean(0), exact) > sqnr(draws[0], exact) + 12


def gradients(function: Any, *given: torch.Tensor) -> list[torch.Tensor]:
    """y, dx, dw, dbias."""
    *leaves, dy = given
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def products(graph: torch.fx.Graph) -> list[str]:
    """The scheme of each product, in a region of its own; casts stand outside of regions."""
    return [region.scheme for region in passes.regions(graph) if region.scheme is not None]


class TestWhatIsAskedFor:
    @parameterized.expand(
        [
            *itertools.product(NAMES, *itertools.repeat((False, True), 3), (None,)),
            *itertools.product(CODE_PATHS, *itertools.repeat((False, True), 3), ("aot_eager",)),
        ]
    )
    def test_every_subset_of_gradients(
        self, scheme: str, of_x: bool, of_w: bool, of_bias: bool, backend: str | None
    ) -> None:
        x, w, bias, dy = operands()
        wanted = gradients(functools.partial(F.training_linear, scheme=scheme), x, w, bias, dy)
        for leaf, wants in zip((x, w, bias), (of_x, of_w, of_bias), strict=True):
            leaf.requires_grad_(wants)
        run = functools.partial(F.training_linear, scheme=scheme)
        call = torch.compile(run, fullgraph=True, backend=backend) if backend else run
        y = call(x, w, bias)
        assert y.requires_grad == (of_x or of_w or of_bias)
        assert torch.equal(y, wanted[0])
        if y.requires_grad:
            y.backward(dy)
        for leaf, wants, want in zip((x, w, bias), (of_x, of_w, of_bias), wanted[1:], strict=True):
            assert (leaf.grad is not None) == wants
            if leaf.grad is not None and scheme != "nvfp4":
                assert torch.equal(leaf.grad, want)
            elif leaf.grad is not None:  # another draw
                assert cosine(leaf.grad, want) > 0.95

    @parameterized.expand(TRAINED)
    def test_nothing_else_is_computed(self, scheme: str) -> None:
        training = SCHEMES[scheme].training
        assert training is not None
        products = {training.matmul, training.wgrad}
        for of_x, of_w, of_bias in itertools.product((False, True), repeat=3):
            x, w, bias, dy = operands()
            for leaf, wants in zip((x, w, bias), (of_x, of_w, of_bias), strict=True):
                leaf.requires_grad_(wants)
            with Calls() as calls:
                y = F.training_linear(x, w, bias, scheme=scheme)
            both = sum(v for name, v in calls.count.items() if name.endswith("_quantize_both"))
            assert both == int(of_w)  # xᵀ is cast for dw alone
            assert sum(calls.count[name] for name in products) == 1
            if y.requires_grad:
                with Calls() as calls:
                    y.backward(dy)
                assert sum(calls.count[name] for name in products) == of_x + of_w
                casts = sum(v for name, v in calls.count.items() if "_quantize" in name)
                # dy, in one or both forms, and w for dx.
                assert casts == int(of_x or of_w) + int(of_x)

    @parameterized.expand(
        [("fp8", 0.52), ("fp8_tensor", 0.52), ("fp8_block", 0.54), ("mxfp8", 0.54), ("nvfp4", 0.3)]
    )
    def test_what_is_kept_for_the_backward(self, scheme: str, share: float) -> None:
        """The quantised input, about half of bfloat16's bytes, and the parameter itself."""
        module = layer(scheme, 256, 128)
        x = torch.randn(512, 256, dtype=torch.bfloat16)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = module(x)
            y.sum().backward()
        own = {p.data_ptr() for p in module.parameters()}
        held = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in own)
        assert held <= share * x.numel() * 2
        assert held > 0.2 * x.numel() * 2
        module.weight.requires_grad_(False)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            module(x.requires_grad_()).sum().backward()
        assert not [
            t
            for t in kept
            if t.numel() >= x.numel() // 2 and t.dim() == 2 and t.data_ptr() not in own
        ]

    @parameterized.expand(TRAINED)
    def test_one_node_a_product(self, scheme: str) -> None:
        graphs: dict[str, list[str]] = {}

        def note(name: str) -> Any:
            def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
                graphs[name] = products(gm.graph)
                return make_boxed_func(gm.forward)

            return compiler

        backend = aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward"))
        x = torch.randn(5, 64, requires_grad=True)
        torch.compile(layer(scheme), fullgraph=True, backend=backend)(x).sum().backward()
        assert graphs == {"forward": [scheme], "backward": [scheme, scheme]}


class TestCompile:
    @parameterized.expand(itertools.product(CODE_PATHS, BACKENDS))
    def test_dynamic_batches_without_recompiling(self, scheme: str, backend: str) -> None:
        """Eager and compiled steps agree, on models of their own."""
        eager, model = mlp(scheme), mlp(scheme)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        with torch._inductor.config.patch(fallback_random=True):
            for size in (4, 5, 6, 9, 16):
                results = []
                guard = torch._dynamo.config.patch(error_on_recompile=size > 5)
                with guard:
                    for call in (eager, compiled):
                        torch.manual_seed(size)
                        x = torch.randn(size, 64, requires_grad=True)
                        y = call(x)
                        y.square().sum().backward()
                        results.append((y.detach(), x.grad))
                for got, want in zip(*results, strict=True):
                    assert torch.equal(got, want), (size, scheme)
        for got, want in zip(model.parameters(), eager.parameters(), strict=True):
            assert got.grad is not None
            torch.testing.assert_close(got.grad, want.grad)

    @parameterized.expand(
        [*itertools.product(CODE_PATHS, ("aot_eager",)), ("fp8", "inductor"), ("nvfp4", "inductor")]
    )
    def test_train_eval_train_on_one_compiled_module(self, scheme: str, backend: str) -> None:
        model = mlp(scheme)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        x = torch.randn(5, 64)
        for turn, train in enumerate((True, False, True, False, True)):
            compiled.train(train)
            guard = torch._dynamo.config.patch(error_on_recompile=turn > 1)
            with guard, torch.set_grad_enabled(train):
                y = compiled(x)
                if train:
                    y.sum().backward()
            assert y.requires_grad == train
            assert torch.equal(y, model(x))

    @parameterized.expand(
        [
            *itertools.product(NAMES, (False, True), (None,)),
            *itertools.product(CODE_PATHS, (False, True), ("aot_eager",)),
            *itertools.product(("fp8", "nvfp4"), (False, True), ("inductor",)),
        ]
    )
    def test_checkpoint(self, scheme: str, reentrant: bool, backend: str | None) -> None:
        def step(wrap: Any) -> list[torch.Tensor]:
            model = mlp(scheme)
            x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
            torch.manual_seed(5)
            y = wrap(model)(x)
            y.square().sum().backward()
            return [y.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

        def wrap(model: nn.Module) -> Any:
            def run(x: torch.Tensor) -> Any:
                return checkpoint(model, x, use_reentrant=reentrant)

            return torch.compile(run, fullgraph=True, backend=backend) if backend else run

        with torch._inductor.config.patch(fallback_random=True):
            got, want = step(wrap), step(lambda model: model)
        for mine, plain in zip(got, want, strict=True):
            if scheme == "nvfp4":  # a compiled graph may draw in another order
                assert cosine(mine, plain) > 0.9
            else:
                torch.testing.assert_close(mine, plain)

    @parameterized.expand(
        [*((name, None) for name in NAMES), *itertools.product(CODE_PATHS, ("aot_eager",)),
         ("fp8", "inductor")]
    )  # fmt: skip
    def test_autocast(self, scheme: str, backend: str | None) -> None:
        module = layer(scheme)
        call = torch.compile(module, fullgraph=True, backend=backend) if backend else module
        x = torch.randn(5, 64, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert x.grad is not None
        assert module.weight.grad is not None
        assert (x.grad.dtype, module.weight.grad.dtype) == (torch.float32,) * 2
        want = F.training_linear(x.bfloat16(), module.weight, module.bias, scheme=scheme)
        assert torch.equal(y, want)

    @parameterized.expand(TRAINED)
    def test_export(self, scheme: str) -> None:
        """A training model in eval mode exports like any other."""
        module, x = layer(scheme).eval(), torch.randn(5, 64)
        for strict in (False, True):
            program = torch.export.export(
                module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
            )
            assert products(program.graph) == [scheme]
            longer = torch.randn(9, 64)
            assert torch.equal(program.module()(longer), module(longer))

    @pytest.mark.skipif(
        torch.__version__ >= "2.12", reason=f"torch {torch.__version__} packages it rightly"
    )
    def test_what_a_package_would_call_with_another_dtype_is_refused(self) -> None:
        program = torch.export.export(layer("fp8").eval(), (torch.randn(5, 64),))
        with (
            tempfile.TemporaryDirectory() as folder,
            pytest.raises(Exception, match=r"has a dtype for an argument.*with torch 2.12"),
            torch.no_grad(),
        ):
            torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")


class TestScripts:
    """What training scripts do around a layer."""

    @parameterized.expand([*((n, False) for n in NAMES), *((n, True) for n in CODE_PATHS)])
    def test_a_model_learns(self, scheme: str, compiled: bool) -> None:
        model = mlp(scheme)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        x, target = torch.randn(64, 64), torch.randn(64, 32)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (call(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]

    @parameterized.expand(TRAINED)
    def test_gradients_accumulate(self, scheme: str) -> None:
        module = layer(scheme)
        torch.manual_seed(1)
        module(torch.ones(3, 64)).sum().backward()
        assert module.weight.grad is not None
        once = module.weight.grad.clone()
        torch.manual_seed(1)
        module(torch.ones(3, 64)).sum().backward()
        assert torch.equal(module.weight.grad, 2 * once)

    @parameterized.expand(TRAINED)
    def test_gradient_scaling(self, scheme: str) -> None:
        """A power of two in front of the loss changes no code of a gradient."""
        got = []
        for factor in (1.0, 2.0**10):
            module = layer(scheme)
            scaler = torch.amp.GradScaler("cpu", init_scale=factor)
            optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
            torch.manual_seed(1)
            scaler.scale(module(torch.randn(4, 64)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            got.append(module.weight.detach())
        torch.testing.assert_close(*got, rtol=1e-5, atol=1e-6)

    @parameterized.expand(TRAINED)
    def test_copies_functional_calls_and_ties(self, scheme: str) -> None:
        module, x = layer(scheme), torch.randn(3, 64)
        twin = copy.deepcopy(module)
        assert twin.scheme == scheme
        assert torch.equal(twin(x), module(x))
        other = {name: p.detach() * 2 for name, p in module.named_parameters()}
        called = torch.func.functional_call(module, other, (x,))
        twin.load_state_dict(other)
        assert torch.equal(called, twin(x))

        tied = nn.Sequential(nn.Linear(64, 64, False), nn.Linear(64, 64, False))
        tied[1].weight = tied[0].weight
        tied = qnn.convert(tied, scheme, training=True)
        assert tied[0].weight is tied[1].weight
        tied(torch.randn(3, 64)).sum().backward()
        assert len(list(tied.parameters())) == 1

        embedding = nn.ModuleDict({"emb": nn.Embedding(10, 64), "head": nn.Linear(64, 10, False)})
        embedding["head"].weight = embedding["emb"].weight
        embedding = qnn.convert(embedding, scheme, training=True)
        assert embedding["head"].weight is embedding["emb"].weight
        assert isinstance(embedding["head"], qnn.Linear)

    @parameterized.expand(TRAINED)
    def test_torch_func(self, scheme: str) -> None:
        module, x = layer(scheme), torch.randn(6, 64)

        def loss(v: torch.Tensor) -> torch.Tensor:
            return F.training_linear(v, module.weight.detach(), scheme=scheme).square().sum()

        torch.manual_seed(1)
        mine = torch.func.grad(loss)(x)
        exact = torch.func.grad(lambda v: (v @ module.weight.detach().T).square().sum())(x)
        assert cosine(mine, exact) > 0.95

    def test_a_frozen_weight_still_gives_the_bias_its_gradient(self) -> None:
        for (scheme,), backend in itertools.product(TRAINED, (None, *BACKENDS)):
            module = layer(scheme)
            module.weight.requires_grad_(False)
            call = torch.compile(module, fullgraph=True, backend=backend) if backend else module
            call(torch.randn(5, 64)).sum().backward()
            assert module.bias.grad is not None
            assert torch.equal(module.bias.grad, torch.full((32,), 5.0))
            assert module.weight.grad is None
            torch._dynamo.reset()


class TestFoundation:
    def test_a_format_of_ones_own_needs_no_case_elsewhere(self) -> None:
        """Every fact that the ops and layers use stands in the format."""
        for scheme in SCHEMES.values():
            assert isinstance(scheme, Scheme)
            assert isinstance(scheme.weight, Format)
            shapes = [part.shape(256, 128) for part in scheme.weight.parts]
            stored = scheme.weight.quantize(torch.randn(256, 128))
            assert shapes == [tuple(part.shape) for part in stored]
            assert [p.dtype for p in scheme.weight.parts] == [p.dtype for p in stored]
