"""One code path: the same values in every mode, and one node a layer in every graph."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from parameterized import parameterized
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qnn import passes
from qnn.functional import invoke_quant

from .common import forked, mlp

SCHEMES = ("int8", "int8_weight")
BACKENDS = ("eager", "aot_eager", "inductor")


def schemes_of(graph: torch.fx.Graph) -> list[str | None]:
    """The scheme of each node; None for an op of qnn's that is not alone in a region."""
    return [region.scheme for region in passes.regions(graph)]


def same(got: torch.Tensor, want: torch.Tensor, scheme: str) -> bool:
    """int8 is equal to the bit; a float GEMM of another shape may sum in another order."""
    if scheme == "int8":
        return torch.equal(got, want)
    return torch.allclose(got, want, rtol=1e-2 if want.dtype == torch.bfloat16 else 1e-5, atol=1e-3)


class TestInvokeQuant:
    def test_eager_is_a_plain_call_and_none_is_passed_on(self) -> None:
        def fn(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return x + (1 if bias is None else bias)

        x = torch.ones(2)
        assert torch.equal(invoke_quant(fn, x, None, scheme="s"), x + 1)
        compiled = torch.compile(
            lambda x, bias: invoke_quant(fn, x, bias, scheme="s"), fullgraph=True, backend="eager"
        )
        assert torch.equal(compiled(x, None), x + 1)
        assert torch.equal(compiled(x, x), x + x)


class TestViews:
    """Operands of a node may share memory, as query, key and value of one projection do."""

    @parameterized.expand(BACKENDS)
    def test_of_one_tensor(self, backend: str) -> None:
        def double(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return 2 * a + b

        def run(x: torch.Tensor) -> torch.Tensor:
            return invoke_quant(double, *x.unbind(0), scheme="s") + invoke_quant(
                double, x[0], x[0], scheme="s"
            )

        x = torch.randn(2, 8, requires_grad=True)
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        with torch.no_grad():
            assert torch.equal(compiled(x), run(x))
        (got,) = torch.autograd.grad(compiled(x).sum(), x)
        assert torch.equal(got, torch.autograd.grad(run(x).sum(), x)[0])

    @parameterized.expand(BACKENDS)
    def test_a_result_is_no_view_of_an_operand(self, backend: str) -> None:
        for fn in (lambda x: x, lambda x: x[1:]):
            compiled = torch.compile(
                lambda x, fn=fn: invoke_quant(fn, x, scheme="s"), fullgraph=True, backend=backend
            )
            x = torch.ones(3)
            compiled(x).add_(1)
            assert torch.equal(x, torch.ones(3))


class TestCompile:
    @parameterized.expand(
        [
            *itertools.product(SCHEMES, BACKENDS, (False, True), (torch.float32,)),
            *itertools.product(("int8",), BACKENDS, (True,), (torch.bfloat16, torch.float16)),
        ]
    )
    def test_inference(self, scheme: str, backend: str, dynamic: bool, dtype: torch.dtype) -> None:
        model = mlp(scheme, dtype)
        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
        for shape in ((5, 48), (7, 48), (2, 3, 48)):
            x = torch.randn(shape, dtype=dtype)
            with torch.no_grad():
                assert same(compiled(x), model(x), scheme), (scheme, backend, shape)

    def test_max_autotune_freezing_and_inference_mode(self) -> None:
        model, x = mlp(), torch.randn(5, 48)
        want = model(x)
        tuned = torch.compile(model, fullgraph=True, mode="max-autotune")
        assert torch.equal(tuned(x), want)
        torch._dynamo.reset()
        with torch._inductor.config.patch(freezing=True), torch.no_grad():
            assert torch.equal(torch.compile(model, fullgraph=True)(x), want)
        torch._dynamo.reset()
        with torch.inference_mode():
            assert torch.equal(model(x), want)
            assert torch.equal(torch.compile(model, fullgraph=True)(x), want)

    def test_one_node_a_layer(self) -> None:
        graphs: dict[str, list[str | None]] = {}

        def note(name: str) -> Any:
            def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
                graphs[name] = schemes_of(gm.graph)
                return make_boxed_func(gm.forward)

            return compiler

        backend = aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward"))
        x = torch.randn(5, 48, requires_grad=True)
        with torch.no_grad():
            torch.compile(mlp(), fullgraph=True, backend=backend)(x)
        assert graphs == {"forward": ["int8", "int8"]}
        torch.compile(mlp(), fullgraph=True, backend=backend)(x).sum().backward()
        assert graphs == {"forward": ["int8", "int8"], "backward": ["int8", "int8"]}

    def test_ten_batch_sizes_without_recompiling(self) -> None:
        model = mlp()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            for size in (4, 5):
                compiled(torch.randn(size, 48))
            with torch._dynamo.config.patch(error_on_recompile=True):
                for size in range(6, 16):
                    x = torch.randn(size, 48)
                    assert torch.equal(compiled(x), model(x))

    def test_autocast(self) -> None:
        model, x = mlp(), torch.randn(5, 48)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            assert y.dtype == torch.bfloat16
            assert torch.equal(compiled(x), y)
            want = mlp().bfloat16()(x.bfloat16())
            assert torch.allclose(y, want, rtol=2e-2, atol=1e-2)
        assert compiled(x).dtype == torch.float32

    def test_a_second_process_hits_the_fx_graph_cache(self) -> None:
        """A forward alone, then a forward and a backward."""
        code = """
            import os, torch
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = FOLDER
            from tests.common import mlp
            from torch._dynamo.utils import counters
            for training in (False, True):
                counters.clear()
                torch.compiler.reset()
                model, x = mlp(), torch.randn(5, 48, requires_grad=training)
                with torch.set_grad_enabled(training):
                    y = torch.compile(model, fullgraph=True)(x)
                    if training:
                        y.sum().backward()
                c = counters["inductor"]
                print(c["fxgraph_cache_hit"], c["fxgraph_cache_miss"], c["fxgraph_cache_bypass"])
        """
        with tempfile.TemporaryDirectory() as folder:
            code = code.replace("FOLDER", repr(folder))
            first, second = (list(map(int, forked(code).split()[-6:])) for _ in range(2))
        for at in (0, 3):
            (hit, miss, bypass), (hit2, miss2, bypass2) = first[at : at + 3], second[at : at + 3]
            assert (hit, bypass, miss2, bypass2) == (0, 0, 0, 0), (first, second)
            assert miss >= 1
            assert hit2 == miss


class TestTraining:
    """Gradients to the input and the biases through a frozen int8 base."""

    def step(self, wrap: Any = None) -> list[torch.Tensor]:
        torch.manual_seed(5)
        model = mlp()
        x = torch.randn(5, 48, requires_grad=True)
        y = (wrap(model) if wrap else model)(x)
        y.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None for g in (x.grad, *gradients))
        return [y.detach(), x.grad, *gradients]  # type: ignore[list-item]

    def check(self, wrap: Any) -> None:
        for got, want in zip(self.step(wrap), self.step(), strict=True):
            torch.testing.assert_close(got, want)

    @parameterized.expand(itertools.product(BACKENDS, (False, True)))
    def test_compiled(self, backend: str, dynamic: bool) -> None:
        self.check(
            functools.partial(torch.compile, fullgraph=True, backend=backend, dynamic=dynamic)
        )

    @parameterized.expand(itertools.product((False, True), (None, "aot_eager", "inductor")))
    def test_checkpoint(self, reentrant: bool, backend: str | None) -> None:
        def wrap(model: nn.Module) -> Any:
            def run(x: torch.Tensor) -> Any:
                return checkpoint(model, x, use_reentrant=reentrant)

            return torch.compile(run, fullgraph=True, backend=backend) if backend else run

        self.check(wrap)

    @parameterized.expand([(None,), ("aot_eager",), ("inductor",)])
    def test_selective_checkpoint(self, backend: str | None) -> None:
        def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            keep = "invoke_quant" in str(op)
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        context = functools.partial(create_selective_checkpoint_contexts, policy)

        def wrap(model: nn.Module) -> Any:
            def run(x: torch.Tensor) -> Any:
                return checkpoint(model, x, use_reentrant=False, context_fn=context)

            return torch.compile(run, fullgraph=True, backend=backend) if backend else run

        self.check(wrap)

    def test_train_eval_train_on_one_compiled_module(self) -> None:
        model = mlp()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 48)
        for mode in (True, False, True, False):
            compiled.train(mode)
            with torch.set_grad_enabled(mode):
                y = compiled(x)
            assert y.requires_grad == mode
            assert torch.equal(y, model(x))


class TestTransforms:
    """`torch.func` over a converted layer, eager and compiled."""

    def setup_method(self) -> None:
        self.layer = mlp()[0]  # type: ignore[index]
        self.x = torch.randn(6, 48)
        self.w = self.layer.dequantize().weight

    def both(self, fn: Any, want: torch.Tensor) -> None:
        for call in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(call(self.x), want, rtol=1e-4, atol=1e-4)

    def test_vmap(self) -> None:
        self.both(torch.vmap(self.layer), self.layer(self.x))
        self.both(torch.vmap(self.layer, in_dims=1, out_dims=1), self.both_dims())

    def both_dims(self) -> torch.Tensor:
        self.x = torch.randn(6, 4, 48)
        return self.layer(self.x)

    def test_grad(self) -> None:
        x = self.x.clone().requires_grad_()
        self.layer(x).square().sum().backward()
        assert x.grad is not None
        self.both(torch.func.grad(lambda v: self.layer(v).square().sum()), x.grad)
        each = torch.vmap(torch.func.grad(lambda v: self.layer(v).square().sum()))
        self.both(each, x.grad)

    def test_jvp_and_jacobians(self) -> None:
        tangent = self.x @ self.w.T
        self.both(lambda v: torch.func.jvp(self.layer, (v,), (v,))[1], tangent)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            self.both(lambda v, j=jacobian: j(self.layer)(v[0]), self.w)

    def test_second_derivatives(self) -> None:
        def loss(v: torch.Tensor) -> torch.Tensor:
            return self.layer(v).pow(3).sum()

        x = self.x[0]
        y = self.layer(x)
        want = self.w.T @ torch.diag(6 * y.detach()) @ self.w
        torch.testing.assert_close(torch.func.hessian(loss)(x), want, rtol=1e-3, atol=1e-3)
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(second, want.sum(0), rtol=1e-3, atol=1e-3)


class TestExport:
    def exported(self, strict: bool, scheme: str = "int8") -> tuple[nn.Module, Any]:
        model = mlp(scheme)
        shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
        args = (torch.randn(3, 5, 48),)
        return model, torch.export.export(model, args, dynamic_shapes=shapes, strict=strict)

    @parameterized.expand(itertools.product((False, True), SCHEMES))
    def test_export(self, strict: bool, scheme: str) -> None:
        model, program = self.exported(strict, scheme)
        assert schemes_of(program.graph) == [scheme, scheme]
        x = torch.randn(7, 2, 48)
        with torch.no_grad():
            want = model(x)
            assert same(program.module()(x), want, scheme)
            decomposed = program.run_decompositions()
            assert schemes_of(decomposed.graph) == [scheme, scheme]
            assert same(decomposed.module()(x), want, scheme)
            compiled = torch.compile(program.module(), fullgraph=True)
            assert same(compiled(x), want, scheme)

    def test_the_state_is_named_as_in_the_module(self) -> None:
        model, program = self.exported(strict=False)
        assert set(program.state_dict) == set(model.state_dict())

    @parameterized.expand([(False,), (True,)])
    def test_saved_and_run_in_a_fresh_process(self, strict: bool) -> None:
        model, program = self.exported(strict)
        x = torch.randn(4, 9, 48)
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            torch.export.save(program, where / "model.pt2")
            torch.save(x, where / "x.pt")
            forked(
                f"""
                import torch, qnn
                program = torch.export.load({str(where / "model.pt2")!r})
                y = program.module()(torch.load({str(where / "x.pt")!r}))
                torch.save(y.detach(), {str(where / "y.pt")!r})
                """
            )
            assert torch.equal(torch.load(where / "y.pt"), model(x).detach())

    @parameterized.expand([(False,), (True,)])
    def test_a_view_behind_a_layer_is_packaged(self, strict: bool) -> None:
        class Heads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = mlp()[0]  # type: ignore[index]

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layer(x).unflatten(-1, (4, 24)).transpose(1, 2).flatten(1)

        model, x = Heads().eval(), torch.randn(2, 5, 48)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            program = torch.export.export(model, (x,), strict=strict)
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder) / "model.pt2")
            )
            packaged = torch._inductor.aoti_load_package(package)
            assert torch.equal(packaged(x), model(x))

    def test_packaged_by_aotinductor_and_run_in_a_fresh_process(self) -> None:
        model, program = self.exported(strict=False)
        x = torch.randn(4, 9, 48)
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            with torch.no_grad():
                package = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(where / "model.aoti.pt2")
                )
            torch.save(x, where / "x.pt")
            forked(
                f"""
                import torch, qnn
                model = torch._inductor.aoti_load_package({package!r})
                x = torch.load({str(where / "x.pt")!r})
                for _ in range(3):
                    y = model(x)
                torch.save(y, {str(where / "y.pt")!r})
                from qnn.kernels.cpu import pack
                print(pack.count())
                """
            )
            assert torch.equal(torch.load(where / "y.pt"), model(x).detach())
