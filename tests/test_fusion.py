"""What the compiler folds into quantised layers, and what it leaves alone."""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn
from torch._inductor import config, custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

import qnn
from qnn import passes
from qnn.passes import fusion

from .common import child, forked
from .test_epilogue import UNFUSED

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding of the activation, which a kernel of qnn's may compute otherwise than torch.
ATOL = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3, torch.float64: 1e-9}


class QKV(nn.Module):
    """Three layers that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(48, n, bias=n != 32) for n in (64, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


class MLP(nn.Module):
    """`x + down(act(up(x)))`."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act, self.up, self.down = act, nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


def converted(model: nn.Module, dtype: torch.dtype = torch.float32, scheme: str = "int8") -> Any:
    torch.manual_seed(2)
    return qnn.convert(model.eval(), scheme).to(dtype)


# Lists of graph passes came with torch 2.13; before, qnn's is left out if another is set.
LISTS = hasattr(custom_graph_pass, "get_custom_graph_passes")
takes_lists = pytest.mark.skipif(
    not LISTS, reason=f"torch {torch.__version__} takes one graph pass"
)


def appended(last: Any) -> Any:
    """The passes that are set, qnn's among them, and `last`."""
    fusion.install()
    present = config.post_grad_custom_post_pass
    passes = [*(present if isinstance(present, list | tuple) else [present]), last]

    def each(graph: torch.fx.Graph) -> None:
        for run in passes:
            run(graph)

    return passes if LISTS else each


def call_of(node: torch.fx.Node) -> str:
    """The op, its activation, and whether it adds a residual; empty if it is none of qnn's."""
    found = passes.read(node)
    if found is None:
        return ""
    words = [found.op.name]
    if found.arguments.get("activation", "none") != "none":
        words.append(found.arguments["activation"])
    if found.arguments.get("residual") is not None:
        words.append("residual")
    bare = found.scheme is None and words[0] not in ("int8_quantize", "int8_rows_linear")
    return "" if bare and len(words) == 1 else "+".join(words)  # in a region, counted above


def compiled(fn: Any, *args: Any, **options: Any) -> tuple[Any, Counter[str]]:
    """The result of the compiled `fn`, and the calls of qnn's ops in its last graphs."""
    calls: Counter[str] = Counter()
    passes = appended(lambda graph: calls.update(filter(None, map(call_of, graph.nodes))))
    torch._dynamo.reset()
    with config.patch(post_grad_custom_post_pass=passes):  # a bare function: nothing is cached
        return torch.compile(fn, fullgraph=True, **options)(*args), calls


@torch.no_grad()
def check(
    fn: Any,
    *args: Any,
    calls: dict[str, int],
    atol: float = 0,
    **options: Any,
) -> None:
    got, found = compiled(fn, *args, **options)
    assert found == Counter(calls), fn
    torch.testing.assert_close(got, fn(*args), rtol=atol, atol=atol)


class TestSharing:
    @parameterized.expand(itertools.product((*DTYPES, torch.float64), (False, True)))
    def test_rows_are_quantised_once(self, dtype: torch.dtype, dynamic: bool) -> None:
        x = torch.randn(2, 3, 48).to(dtype)
        want = {"int8_quantize": 1, "int8_rows_linear": 3}
        check(converted(QKV(), dtype), x, calls=want, dynamic=dynamic)

    def test_through_equal_views(self) -> None:
        a, b, c = (converted(nn.Linear(48, 8)) for _ in range(3))

        def fn(x: torch.Tensor) -> torch.Tensor:
            return a(x.view(-1, 48)) * 2 - b(x.reshape(-1, 48)) + c(x.view(6, 1, 48))[:, 0] * 2

        want = {"int8_quantize": 1, "int8_rows_linear": 2, "int8_linear": 1}
        check(fn, torch.randn(2, 3, 48), calls=want, atol=1e-6)

    def test_non_finite_rows_stay_apart(self) -> None:
        model, x = converted(QKV()), torch.randn(4, 48)
        x[2, 7] = float("inf")
        with torch.no_grad():
            y, calls = compiled(model, x)
        assert calls["int8_quantize"] == 1
        assert not bool(y[2].isfinite().any())
        assert torch.equal(y[[0, 1, 3]], model(x)[[0, 1, 3]])

    def test_weight_only_layers_share_nothing(self) -> None:
        model = converted(QKV(), scheme="int8_weight")
        check(model, torch.randn(4, 48), calls={"int8_weight_linear": 3}, atol=1e-5)

    def test_with_activations_and_residuals(self) -> None:
        a, b = converted(nn.Linear(48, 48)), converted(nn.Linear(48, 48))

        def fn(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([a(x).relu(), x + b(x)])

        want = {"int8_quantize": 1, "int8_rows_linear+relu": 1, "int8_rows_linear+residual": 1}
        check(fn, torch.randn(4, 48), calls=want)


class TestActivations:
    @parameterized.expand(
        [
            (name, dtype, dtype == torch.bfloat16)
            for name, dtype in itertools.product([n for n in UNFUSED if n != "none"], DTYPES)
        ]
    )
    def test_folded(self, name: str, dtype: torch.dtype, dynamic: bool) -> None:
        layer, x = converted(nn.Linear(48, 96), dtype), torch.randn(2, 5, 48).to(dtype)
        atol = 0 if name == "relu" else ATOL[dtype]

        def fn(x: torch.Tensor) -> torch.Tensor:
            return UNFUSED[name](layer(x))

        check(fn, x, calls={f"int8_linear+{name}": 1}, atol=atol, dynamic=dynamic)

    def test_float64_and_weight_only(self) -> None:
        model = converted(nn.Sequential(nn.Linear(48, 96), nn.SiLU()), torch.float64, "int8_weight")
        x = torch.randn(5, 48).double()
        check(model, x, calls={"int8_weight_linear+silu": 1}, atol=1e-6)

    def test_a_view_in_between(self) -> None:
        layer = converted(nn.Linear(48, 96))

        def fn(x: torch.Tensor) -> torch.Tensor:
            return F.gelu(layer(x).unflatten(-1, (4, 24)).transpose(1, 2)).flatten(2) * 2

        check(fn, torch.randn(2, 5, 48), calls={"int8_linear+gelu": 1}, atol=1e-5)

    def test_an_input_that_is_written_to_afterwards(self) -> None:
        layer = converted(nn.Linear(48, 48))

        def fn(x: torch.Tensor) -> torch.Tensor:
            y = layer(x)
            x.add_(1)
            return y.relu() + x

        x = torch.randn(5, 48)
        with torch.no_grad():
            want = layer(x).relu() + (x + 1)
            got, calls = compiled(fn, x)
        assert torch.equal(got, want)
        assert calls == Counter({"int8_linear+relu+residual": 1})

    def test_left_alone(self) -> None:
        layer = converted(nn.Linear(48, 96))

        def tanh(x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(layer(x))

        def used_twice(x: torch.Tensor) -> torch.Tensor:
            y = layer(x)
            return F.gelu(y) * y

        def returned(x: torch.Tensor) -> Any:
            y = layer(x)
            return y, y.relu()

        def another_constant(x: torch.Tensor) -> torch.Tensor:
            y = layer(x)
            return y * 0.5 * (torch.erf(y * 0.7) + 1)

        def part_of_it_used(x: torch.Tensor) -> torch.Tensor:
            y = layer(x)
            half = y * 0.5
            return half * (torch.erf(y * 0.7071067811865476) + 1) - half

        def viewed_twice(x: torch.Tensor) -> torch.Tensor:
            y = layer(x)
            return torch.cat([y.view(-1, 2).relu(), y.view(-1, 2)])

        for fn in (tanh, used_twice, returned, another_constant, part_of_it_used, viewed_twice):
            check(fn, torch.randn(5, 48), calls={"int8_linear": 1}, atol=1e-5)


class TestResiduals:
    @parameterized.expand(itertools.product((*DTYPES, torch.float64), (False, True)))
    def test_block(self, dtype: torch.dtype, dynamic: bool) -> None:
        model, x = converted(MLP(F.relu), dtype), torch.randn(2, 5, 48).to(dtype)
        want = {"int8_linear+relu": 1, "int8_linear+residual": 1}
        check(model, x, calls=want, dynamic=dynamic)

    def test_chain_of_blocks_and_both_orders(self) -> None:
        first, second = converted(MLP(F.silu)), converted(MLP(F.relu))

        def fn(x: torch.Tensor) -> torch.Tensor:
            x = first(x)
            return second.down(second.act(second.up(x))).relu() + x

        want = {"int8_linear+silu": 1, "int8_linear+residual": 1}
        want |= {"int8_linear+relu": 1, "int8_linear+relu+residual": 1}
        check(fn, torch.randn(5, 48), calls=want, atol=2e-2)

    def test_two_layers_added(self) -> None:
        a, b = converted(nn.Linear(48, 48)), converted(nn.Linear(48, 48))

        def fn(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return a(x) + b(z)

        want = {"int8_linear": 1, "int8_linear+residual": 1}
        check(fn, torch.randn(5, 48), torch.randn(5, 48), calls=want)

    def test_a_residual_computed_later(self) -> None:
        layer = converted(nn.Linear(48, 48))

        def fn(x: torch.Tensor) -> torch.Tensor:
            y = layer(x)
            return y + torch.cumsum(x, -1).sin()

        check(fn, torch.randn(5, 48), calls={"int8_linear+residual": 1}, atol=1e-6)

    def test_left_alone(self) -> None:
        layer = converted(nn.Linear(48, 48))

        def scaled(x: torch.Tensor) -> torch.Tensor:
            return torch.add(x, layer(x), alpha=2)

        def broadcast(x: torch.Tensor) -> torch.Tensor:
            return layer(x) + x[0]

        def wider(x: torch.Tensor) -> torch.Tensor:
            return layer(x) + x.double()

        def number(x: torch.Tensor) -> torch.Tensor:
            return layer(x) + 1

        def itself(x: torch.Tensor) -> torch.Tensor:
            y = layer(x)
            return y + y

        def returned(x: torch.Tensor) -> Any:
            y = layer(x)
            return x + y, y

        def transposed(x: torch.Tensor) -> torch.Tensor:
            return layer(x).view(5, 6, 8) + x.view(5, 8, 6).transpose(1, 2)

        for fn in (scaled, broadcast, wider, number, itself, returned, transposed):
            check(fn, torch.randn(5, 48), calls={"int8_linear": 1}, atol=1e-6)


class TestModes:
    def test_ten_batch_sizes_without_recompiling(self) -> None:
        model = nn.Sequential(converted(MLP(F.relu)), converted(QKV()))
        run = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            for size in (4, 5):
                run(torch.randn(size, 48))
            with torch._dynamo.config.patch(error_on_recompile=True):
                for size in range(6, 16):
                    x = torch.randn(size, 48)
                    assert torch.equal(run(x), model(x))

    @parameterized.expand(itertools.product((False, True), (F.relu, F.gelu)))
    def test_training(self, dynamic: bool, act: Any) -> None:
        """What is saved for backward is not folded away, and the gradients are the same."""
        model = nn.Sequential(converted(MLP(act)), converted(QKV()))
        params = [p for p in model.parameters() if p.requires_grad]

        def loss(x: torch.Tensor) -> torch.Tensor:
            return model(x).square().sum()

        def step(run: Any) -> Any:
            x = torch.arange(240.0).view(5, 48).sin().requires_grad_()
            return torch.autograd.grad(run(x), [x, *params])

        calls: Counter[str] = Counter()
        passes = appended(lambda graph: calls.update(filter(None, map(call_of, graph.nodes))))
        with config.patch(post_grad_custom_post_pass=passes):
            got = step(torch.compile(loss, fullgraph=True, dynamic=dynamic))
        for one, other in zip(got, step(loss), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
        up = "int8_linear+relu" if act is F.relu else "int8_linear"
        want = {up: 1, "int8_linear+residual": 1, "int8_quantize": 1, "int8_rows_linear": 3}
        assert calls == Counter({**want, "int8_linear_dgrad": 5})

    @parameterized.expand([("freezing",), ("max_autotune",)])
    def test_settings(self, setting: str) -> None:
        want = {"int8_linear+relu": 1, "int8_linear+residual": 1}
        with config.patch({setting: True}):
            check(converted(MLP(F.relu)), torch.randn(5, 48), calls=want)

    def test_switched_off_with_inductors_own_patterns(self) -> None:
        model, x = converted(MLP(F.relu)), torch.randn(5, 48)
        check(model, x, calls={"int8_linear": 2}, options={"pattern_matcher": False})

    def test_packaged_by_aotinductor_and_run_in_a_fresh_process(self) -> None:
        model = nn.Sequential(converted(MLP(F.relu)), converted(QKV())).bfloat16()
        x = torch.randn(3, 48).bfloat16()
        seen: list[str] = []
        passes = appended(lambda graph: seen.extend(str(n.target) for n in graph.nodes))
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(model, (x,), dynamic_shapes=shapes)
            with config.patch(post_grad_custom_post_pass=passes):
                package = torch._inductor.aoti_compile_and_package(
                    program, package_path=str(where / "model.pt2")
                )
            # An op that takes a dtype is called with another one by packages of torch 2.11.
            shared = torch.__version__ >= "2.12"
            assert ("qnn.int8_rows_linear.default" in seen) == shared
            x = torch.randn(7, 48).bfloat16()
            torch.save(x, where / "x.pt")
            forked(
                f"""
                import torch, qnn
                model = torch._inductor.aoti_load_package({package!r})
                torch.save(model(torch.load({str(where / "x.pt")!r})), {str(where / "y.pt")!r})
                """
            )
            assert torch.equal(torch.load(where / "y.pt"), model(x))

    def test_a_second_process_hits_the_caches(self) -> None:
        code = """
            import os, torch
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = FOLDER
            from torch import nn
            from torch._dynamo.utils import counters
            from torch._inductor import config
            from torch._inductor.custom_graph_pass import CustomGraphPass
            from torch.nn import functional as F
            from tests.test_fusion import MLP, QKV, converted

            class Theirs(CustomGraphPass):
                def __call__(self, graph): pass
                def uuid(self): return b"theirs"

            config.post_grad_custom_post_pass = Theirs()
            model = nn.Sequential(converted(MLP(F.relu)), converted(QKV()))
            with torch.no_grad():
                torch.compile(model, fullgraph=True)(torch.randn(5, 48))
            c, a = counters["inductor"], counters["aot_autograd"]
            print(c["fxgraph_cache_hit"], c["fxgraph_cache_miss"], c["fxgraph_cache_bypass"],
                  a["autograd_cache_hit"])
        """
        with tempfile.TemporaryDirectory() as folder:
            code = code.replace("FOLDER", repr(folder))
            first, second = (forked(code).split()[-4:] for _ in range(2))
        assert (first, second) == (["0", "1", "0", "0"], ["1", "0", "0", "1"])


class Note(CustomGraphPass):
    def __init__(self) -> None:
        self.schemes: list[str] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.schemes += [str(n.kwargs["scheme"]) for n in graph.nodes if "scheme" in n.kwargs]

    def uuid(self) -> bytes:
        return b"note"


class TestInstallation:
    @pytest.fixture(autouse=True)
    def _as_before(self) -> Iterator[None]:
        before = config.post_grad_custom_post_pass
        yield
        config.post_grad_custom_post_pass = before

    def run_once(self, **options: Any) -> list[Any]:
        """Compile a block whose ReLU is folded; the passes that are set afterwards."""
        torch._dynamo.reset()
        run = torch.compile(converted(MLP(F.relu)), fullgraph=True, **options)
        with torch.no_grad(), config.patch(fx_graph_cache=False):
            _, (code,) = run_and_get_code(run, torch.randn(5, 48))
        assert "'relu'" in code
        present = config.post_grad_custom_post_pass
        return list(present) if isinstance(present, list | tuple) else [present]

    @takes_lists
    def test_the_passes_of_others_run_first_and_stay(self) -> None:
        theirs = Note()
        config.post_grad_custom_post_pass = theirs
        passes = self.run_once()
        assert (passes[0], len(passes)) == (theirs, 2)
        assert theirs.schemes == ["int8", "int8"]
        assert self.run_once() == passes
        assert passes[1].uuid()

    @takes_lists
    def test_a_setting_that_is_replaced(self) -> None:
        config.post_grad_custom_post_pass = None
        mine = self.run_once()
        theirs = Note()
        config.post_grad_custom_post_pass = (theirs,)
        assert self.run_once() == [theirs, *mine]

    @takes_lists
    def test_a_setting_of_one_compilation(self) -> None:
        config.post_grad_custom_post_pass = None
        theirs = Note()
        self.run_once(options={"post_grad_custom_post_pass": theirs})
        assert theirs.schemes == ["int8", "int8"]
        with config.patch(post_grad_custom_post_pass=[theirs]):
            self.run_once()
        assert theirs not in self.run_once()

    def test_another_thread(self) -> None:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(self.run_once()))
        thread.start()
        thread.join()
        assert len(found) == 1

    def test_import_and_eager_calls_leave_inductor_alone(self) -> None:
        child(
            """
            import sys, torch, qnn
            layer = qnn.convert(torch.nn.Linear(8, 8), "int8")
            layer(torch.randn(2, 8))
            torch.export.export(layer, (torch.randn(2, 8),))
            assert "torch._inductor.compile_fx" not in sys.modules
            """
        )


class TestPage:
    def test_the_graphs_on_the_page_are_those_of_the_snippet(self) -> None:
        snippet = ROOT / "docs" / "snippets" / "fusion.py"
        page = (ROOT / "docs" / "howto" / "fusion.md").read_text()
        for graph in forked(snippet.read_text()).strip().partition("\n\n")[::2]:
            # A torch for GPUs has something to say where there is none.
            calls = "\n".join(line for line in graph.splitlines() if " = " in line)
            assert f"```text\n{calls}\n```" in page
