"""A region of a user's own function: one node in every graph, and its gradient one more."""

from __future__ import annotations

import copy
import functools
import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.lowering import lowerings
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V
from torch.utils.checkpoint import checkpoint

from qnn import passes
from qnn.functional import invoke_quant
from qnn.kernels import OPS
from qnn.kernels.torch_private import invoke_quant as node_of_inductor

from .common import forked

BATCH = ({0: torch.export.Dim("batch")},)
GRAPHS = list(itertools.product(("aot_eager", "inductor"), (False, True)))


def decode(
    codes: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`[K, N]`, from a table's entries, two codes a byte, and a scale for each 8 of a row."""
    index = torch.stack((codes >> 4, codes & 15), -1).flatten(1).long()
    w = (table[index].unflatten(1, (-1, 8)) * scale[..., None]).flatten(1)
    return (w if bias is None else w + bias[:, None]).t()


class Layer(nn.Module):
    def __init__(self, low: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.low = low
        self.register_buffer("codes", torch.randint(0, 256, (12, 8), dtype=torch.uint8))
        self.table = nn.Parameter(torch.randn(16, dtype=dtype))
        self.scale = nn.Parameter(torch.rand(12, 2, dtype=dtype))
        self.lora = nn.Parameter(torch.randn(16, 12, dtype=dtype) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = invoke_quant(
            decode, self.codes, self.table, self.scale, scheme="nf4",
            codegen_low_precision=self.low,
        )  # fmt: skip
        return torch.mm(x, w) + torch.mm(x, self.lora)


def step(model: nn.Module, call: Any, x: torch.Tensor) -> list[torch.Tensor | None]:
    """The result and the gradients of everything that has one."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def check(model: nn.Module, call: Any, x: torch.Tensor) -> None:
    want = step(model, model, x)
    torch.testing.assert_close(step(model, call, x), want)
    assert all(each is not None for each in want)


def schemes(graph: torch.fx.Graph) -> list[Any]:
    return [n.kwargs["scheme"] for n in graph.nodes if "invoke_quant" in str(n.target)]


class TestTraining:
    @pytest.mark.parametrize(("backend", "dynamic"), GRAPHS)
    def test_gradients(self, backend: str, dynamic: bool) -> None:
        model = Layer()
        call = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
        for rows in (5, 7):
            check(model, call, torch.randn(rows, 16))
        with torch.no_grad():
            x = torch.randn(3, 16)
            torch.testing.assert_close(call(x), model(x))

    @pytest.mark.parametrize("trained", [("scale",), ("scale", "table"), ("lora",)])
    def test_a_node_each_for_forward_and_gradient(self, trained: tuple[str, ...]) -> None:
        graphs: dict[str, list[Any]] = {}

        def note(name: str) -> Any:
            def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
                graphs[name] = schemes(gm.graph)
                return make_boxed_func(gm.forward)

            return compiler

        model = Layer()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        backend = aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward"))
        torch.compile(model, fullgraph=True, backend=backend)(torch.randn(5, 16)).sum().backward()
        through = trained != ("lora",)
        assert graphs == {"forward": ["nf4"], "backward": ["nf4_backward"] * through}
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained)

    def test_bfloat16_and_autocast(self) -> None:
        model = Layer(dtype=torch.bfloat16)
        x = torch.randn(5, 16, dtype=torch.bfloat16)
        want = step(model, model, x)
        got = step(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-1)
        model, x = Layer(), torch.randn(5, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want = step(model, model, x)
            got = step(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-1)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint(self, reentrant: bool) -> None:
        model = Layer()

        def run(x: torch.Tensor) -> Any:
            return checkpoint(model, x, use_reentrant=reentrant)

        for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            check(model, call, torch.randn(5, 16))

    def test_double_backward_is_right_or_refused(self) -> None:
        model, x = Layer(), torch.randn(5, 16, requires_grad=True)

        def penalty(call: Any) -> tuple[torch.Tensor, ...]:
            loss = call(x).square().sum()
            (first,) = torch.autograd.grad(loss, model.scale, create_graph=True)
            return torch.autograd.grad(first.square().sum(), (x, model.table))

        def loss(scale: torch.Tensor, table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return (x @ decode(model.codes, table, scale) + x @ model.lora).square().sum()

        def norm(scale: torch.Tensor, table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.func.grad(loss)(scale, table, x).square().sum()

        want = torch.func.grad(norm, argnums=(2, 1))(model.scale, model.table, x.detach())
        torch.testing.assert_close(penalty(model), want)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            penalty(torch.compile(model, fullgraph=True, backend="aot_eager"))

    def test_torch_func(self) -> None:
        model, x = Layer(), torch.randn(5, 16)
        want = step(model, model, x)[1]
        grad = torch.func.grad(lambda v: model(v).square().sum())
        for call in (grad, torch.compile(grad, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(call(x), want)

    def test_a_frozen_copy_and_a_none(self) -> None:
        model, x = Layer(), torch.randn(5, 16)
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        given = model.codes, model.table, model.scale
        bias = torch.randn(12, requires_grad=True)

        def call(*tensors: torch.Tensor | None) -> Any:
            return invoke_quant(decode, *tensors, scheme="s")

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for last in (None, bias):
            wanted = model.scale if last is None else last
            want, got = (
                torch.autograd.grad(each(*given, last).square().sum(), wanted)
                for each in (call, compiled)
            )
            torch.testing.assert_close(got, want)


def several(c: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (c * s).sum(-1), s.t(), c + 1


# Results that Inductor cannot lower as they are, or that share memory with an operand.
ENDS: dict[str, Callable[..., torch.Tensor]] = {
    "axes_dropped": lambda c, s: (c * s).sum(-1, keepdim=True).view(-1),
    "operand": lambda c, s: s,
    "view_of_operand": lambda c, s: s[:, :1].expand(4, 6),
    "transposed_product": lambda c, s: (c.to(s.dtype) @ s.t()).t(),
}


class TestResults:
    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.c, self.s = torch.randint(0, 9, (4, 6)), torch.rand(4, 6, requires_grad=True)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
    def test_several(self, backend: str) -> None:
        def run(c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            a, b, i = invoke_quant(several, c, s, scheme="several")
            return a.sum() * b * i.t()

        call = torch.compile(run, fullgraph=True, backend=backend)
        want, got = (
            torch.autograd.grad(each(self.c, self.s).square().sum(), self.s) for each in (run, call)
        )
        torch.testing.assert_close(got, want)
        with torch.no_grad():
            torch.testing.assert_close(call(self.c, self.s), run(self.c, self.s))

    def test_any_end_is_lowered(self) -> None:
        def run(c: torch.Tensor, s: torch.Tensor) -> list[Any]:
            return [invoke_quant(fn, c, s, scheme=name) for name, fn in ENDS.items()]

        def gradient(each: Any) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(sum(y.square().sum() for y in each(self.c, self.s)), self.s)

        call = torch.compile(run, fullgraph=True)
        torch.testing.assert_close(gradient(call), gradient(run))
        with torch.no_grad():
            torch.testing.assert_close(call(self.c, self.s), run(self.c, self.s))

    def test_integers_have_no_gradient(self) -> None:
        def run(s: torch.Tensor) -> Any:
            return invoke_quant(lambda s: (s * 100).to(torch.int8), s, scheme="round")

        y = torch.compile(run, fullgraph=True, backend="aot_eager")(self.s)
        assert torch.equal(y, run(self.s))
        assert not y.requires_grad

    def test_operands_stand_in_their_order(self) -> None:
        """Dynamo alone would order them by their first use, and leave out what is not used."""
        seen = []

        def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
            (node,) = (n for n in gm.graph.nodes if "invoke_quant" in str(n.target))
            seen.append([str(each) for each in node.args[1:]])
            return gm.forward

        def run(first: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> Any:
            return invoke_quant(lambda a, b, c: c * a, first, second, third, scheme="s")

        torch.compile(run, backend=backend)(self.c, self.c + 1, self.c + 2)
        assert seen == [["l_first_", "l_second_", "l_third_"]]

    def test_a_qnn_op_in_it_is_read(self) -> None:
        _, (x, w, sw, *_) = next(iter(OPS["int8_linear"].samples()))

        class Own(nn.Module):
            def forward(self, x: torch.Tensor, w: torch.Tensor, sw: torch.Tensor) -> Any:
                return invoke_quant(torch.ops.qnn.int8_linear.default, x, w, sw, scheme="mine")

        program = torch.export.export(Own(), (x, w, sw))
        (region,) = passes.regions(program)
        assert (region.scheme, region.op.name) == ("mine", "int8_linear")
        assert region.result in region.node.users


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_saved_loaded_and_trained(self, strict: bool) -> None:
        model, x = Layer(), torch.randn(5, 16)
        program = torch.export.export(model, (x,), dynamic_shapes=BATCH, strict=strict)
        assert schemes(program.graph) == schemes(program.run_decompositions().graph) == ["nf4"]
        with tempfile.TemporaryDirectory() as folder:
            torch.export.save(program, Path(folder) / "model.pt2")
            torch.save(x, Path(folder) / "x.pt")
            forked(
                f"""
                import torch, qnn
                program = torch.export.load({folder!r} + "/model.pt2")
                y = program.module()(torch.load({folder!r} + "/x.pt"))
                torch.save(y.detach(), {folder!r} + "/y.pt")
                """
            )
            assert torch.equal(torch.load(Path(folder) / "y.pt"), model(x).detach())
        module = program.module()
        want = step(model, model, x)
        for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(step(module, call, x), want)

    def test_the_option_reaches_inductor(self) -> None:
        """In `torch.compile`, and through an exported program that was saved in a package of
        AOTInductor, which a fresh process runs.
        """
        x = torch.randn(5, 16, dtype=torch.bfloat16)
        lower, seen = lowerings[node_of_inductor], []

        def spy(*args: Any, **kwargs: Any) -> Any:
            result = lower(*args, **kwargs)
            options = V.graph.current_node.meta["quant_options"]
            seen.append((options.codegen_low_precision, len(V.graph.low_precision_codegen_ops)))
            return result

        near = functools.partial(torch.testing.assert_close, rtol=2e-2, atol=5e-2)
        with (
            tempfile.TemporaryDirectory() as folder,
            torch.no_grad(),
            mock.patch.dict(lowerings, {node_of_inductor: spy}),
            torch._inductor.config.patch(fx_graph_cache=False),
        ):
            code = []
            for low in (True, False):
                model = Layer(low, torch.bfloat16)
                y, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
                near(y, model(x))
                code.append(source)
            # On a CPU both compute in float32 between loads and stores.
            loops = [
                re.findall(r"(?s)async_compile.cpp_pybinding.*?\'\'\'\)", each) for each in code
            ]
            assert loops[0] == loops[1]
            assert loops[0]
            program = torch.export.export(model, (x,), dynamic_shapes=BATCH)
            torch.export.save(program, Path(folder) / "model.pt2")
            program = torch.export.load(Path(folder) / "model.pt2")
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=f"{folder}/model.aoti.pt2"
            )
            assert seen == [(True, 1), (False, 0), (False, 0)]
            want = model(x)
            near(torch._inductor.aoti_load_package(package)(x), want)
            torch.save(x, Path(folder) / "x.pt")
            forked(
                f"""
                import torch, qnn
                model = torch._inductor.aoti_load_package({package!r})
                torch.save(model(torch.load({folder!r} + "/x.pt")), {folder!r} + "/y.pt")
                """
            )
            near(torch.load(Path(folder) / "y.pt"), want)


def writes(c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return c * s.add_(1)


def branches(c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return c * s if s.sum() > 0 else c - s


def draws(c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return c * s * torch.rand_like(s)


class Own(nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn
        self.outside = nn.Parameter(torch.ones(6))

    def forward(self, c: Any, s: Any) -> Any:
        if self.fn == "closure":
            return invoke_quant(lambda c, s: c * s * self.outside, c, s, scheme="own")
        return invoke_quant(self.fn, c, s, scheme="own")


class TestErrors:
    def setup_method(self) -> None:
        self.given = torch.ones(4, 6), torch.rand(4, 6)

    @pytest.mark.parametrize(
        ("args", "options", "said"),
        [
            (("nf4",), {}, "fn must be a function of the tensors, got a str"),
            ((decode, 3), {}, "argument 0 of fn must be a tensor or None, got a int; bind what"),
            ((decode, torch.ones(2), [1]), {}, "argument 1 of fn must be a tensor or None"),
            ((decode, None), {}, "fn must be given a tensor"),
            ((decode, torch.ones(2)), {"scheme": 4}, "scheme must be a name, such as 'nf4', got 4"),
            ((decode, torch.ones(2)), {"scheme": ""}, "scheme must be a name"),
            ((decode, torch.ones(2)), {"codegen_low_precision": "no"}, "must be True or False"),
            ((lambda x: None, torch.ones(2)), {}, "fn must return a tensor or a tuple of tensors"),
            ((lambda x: [x, x], torch.ones(2)), {}, "got a list"),
            ((lambda x: (x, 3), torch.ones(2)), {}, "item 1 of its tuple is a int"),
            ((lambda x: (x,), torch.ones(2)), {}, "a tuple of 1; return the tensor itself"),
        ],
    )  # fmt: skip
    def test_arguments(self, args: tuple[Any, ...], options: dict[str, Any], said: str) -> None:
        def call(*tensors: Any) -> Any:
            return invoke_quant(args[0], *tensors, **{"scheme": "own", **options})

        with pytest.raises(TypeError, match=f"qnn.functional.invoke_quant.*{said}"):
            call(*args[1:])
        with pytest.raises(torch._dynamo.exc.Unsupported, match=said):
            torch.compile(call, fullgraph=True, backend="eager")(*args[1:])

    def test_writing_to_an_argument(self) -> None:
        with pytest.raises(ValueError, match=r"scheme='own'\): fn writes to its argument 1, float"):
            Own(writes)(*self.given)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="do not support input mutation"):
            torch.compile(Own(writes), fullgraph=True)(*self.given)
        with pytest.raises(ValueError, match="fn writes to its argument 1"):
            torch.export.export(Own(writes), self.given)
        with torch.inference_mode():  # whose tensors count no writes
            Own(writes)(torch.ones(4, 6), torch.ones(4, 6))

    def test_branching_on_values(self) -> None:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"branching[\s\S]*invoke_quant"):
            torch.compile(Own(branches), fullgraph=True)(*self.given)
        with pytest.raises(Exception, match="data-dependent"):
            torch.export.export(Own(branches), self.given)

    def test_a_tensor_from_elsewhere(self) -> None:
        """Whose gradient would be lost."""
        said = "fn takes a tensor from elsewhere.*give it to fn as an argument"
        c, s = self.given
        for given in ((c, s), (c, s.clone().requires_grad_())):
            with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=said):
                torch.compile(Own("closure"), fullgraph=True, backend="aot_eager")(*given)
        with pytest.raises(NotImplementedError, match=said):
            torch.export.export(Own("closure"), self.given)

        def literal(c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return c * s * torch.tensor([1.0, 2, 3, 4, 5, 6])

        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=said):
            torch.compile(Own(literal), fullgraph=True, backend="aot_eager")(*self.given)

    def test_random_numbers(self) -> None:
        """Which the gradient would draw again."""
        c, s = self.given
        compiled = torch.compile(Own(draws), fullgraph=True, backend="aot_eager")
        assert compiled(c, s).shape == (4, 6)
        s = s.clone().requires_grad_()
        Own(draws)(c, s).sum().backward()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="draws random numbers"):
            compiled(c, s)
        module = torch.export.export(Own(draws), self.given).module()
        with pytest.raises(NotImplementedError, match="draws random numbers"):
            module(c, s).sum().backward()
