"""Gradients belong to the ops: the same in eager mode, exported, traced and captured graphs, to any
order; what has none says so.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_joint_simple, aot_export_module

import qnn
from qnn.kernels import OPS, SCHEMES, Op

LINEAR = tuple(SCHEMES)
TRAINED = tuple(s.name for s in SCHEMES.values() if s.trainable)
CELLS = (nn.LSTM, nn.GRU)


@pytest.fixture(autouse=True)
def _no_warning_of_a_lost_gradient() -> Iterator[None]:
    """Torch warns where an op without an autograd kernel is differentiated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*an autograd kernel was not registered.*")
        yield


def differentiable(op: Op) -> dict[str, torch.Tensor]:
    """Arguments of a sample; those that are floats require a gradient."""
    for _, args in op.samples():
        given = dict(zip((arg.name for arg in op.inputs), args, strict=True))
        return {
            name: value.requires_grad_()
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float64)
            else value
            for name, value in given.items()
        }
    raise AssertionError(op)


def able(op: Op) -> set[str]:
    names = {arg.name for arg in op.inputs} if not op.inference else set()
    return names if op.differentiable else {*op.backward, *({"bias", "residual"} & names)}


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_every_argument_has_a_gradient_or_says_that_it_has_none(op: Op) -> None:
    """One at a time, in eager mode: never None, never zero."""
    given = differentiable(op)
    floats = [n for n, v in given.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    for name in floats:
        for other in floats:
            given[other].requires_grad_(other == name)
        if op.written:
            with pytest.raises(
                NotImplementedError, match=f"{op.name} has no gradient with.* {name}"
            ):
                op.overload(*given.values())
            continue
        result = op.overload(*given.values())
        results = result if isinstance(result, tuple) else (result,)
        outs = [r for r in results if r.requires_grad]
        if not outs:  # codes alone
            assert not any(r.dtype.is_floating_point for r in results), (op.name, name)
            continue
        total = sum(out.float().sum() for out in outs)
        if name in able(op):
            (gradient,) = torch.autograd.grad(total, given[name])
            assert gradient.shape == given[name].shape
            assert gradient.abs().sum() > 0, (op.name, name)
        else:
            with pytest.raises(NotImplementedError, match=f"qnn::{op.name} has no gradient with"):
                torch.autograd.grad(total, given[name])


@pytest.mark.parametrize(
    "op",
    [op for op in OPS.values() if "activation" in op.choices and not op.inference],
    ids=lambda op: op.name,
)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_an_epilogue_has_the_gradients_of_its_parts(op: Op, activation: str) -> None:
    given = differentiable(op)
    names = [n for n in ("x", "bias", "residual") if n in given]
    leaves = [given[n] for n in names]
    for name in ("sw", "scale", "sx"):  # they have none
        if name in given:
            given[name].requires_grad_(False)
    got = op.overload(*{**given, "activation": activation}.values())
    plain = op.overload(*{**given, "residual": None, "activation": "none"}.values())
    act = {"gelu_tanh": lambda v: nn.functional.gelu(v, approximate="tanh")}.get(activation)
    want = (act or getattr(nn.functional, activation))(plain) + given["residual"]
    torch.testing.assert_close(got, want)
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def mlp(scheme: str, *, training: bool = False) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
    if scheme.endswith("_static"):
        prepared = qnn.prepare(model, scheme)
        qnn.calibrate(prepared, [torch.randn(16, 128)])
        return qnn.convert(prepared)
    return qnn.convert(model, scheme, training=training)


def gradients(call: Any, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(5)
    call(x).square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in (x.grad, *found.values())), found
    return {"x": x.grad, **{n: g.clone() for n, g in found.items()}}  # type: ignore[dict-item,union-attr]


def alike(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class Recurrent(nn.Module):
    """A converted recurrent layer, of which only the outputs are taken."""

    def __init__(self, cell: type[nn.RNNBase], scheme: str = "int8") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rnn = qnn.convert(nn.ModuleList([cell(12, 10, num_layers=2)]), scheme)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.rnn(x)[0]
        return y


EXPORTED = [
    *((scheme, False, "call") for scheme in LINEAR),
    ("int8", True, "call"),
    ("int8", True, "aot_eager"),
    ("nvfp4", False, "aot_eager"),
    ("int8", False, "inductor"),
]


@pytest.mark.parametrize(("scheme", "strict", "how"), EXPORTED)
def test_exported(scheme: str, strict: bool, how: str) -> None:
    model, x = mlp(scheme), torch.randn(5, 128)
    module = torch.export.export(model, (x,), strict=strict).module()
    call = module if how == "call" else torch.compile(module, fullgraph=True, backend=how)
    alike(gradients(call, module, x), gradients(model, model, x))


@pytest.mark.parametrize(("cell", "strict"), zip(CELLS, (True, False), strict=True))
def test_exported_recurrent(cell: type[nn.RNNBase], strict: bool) -> None:
    model, x = Recurrent(cell), torch.randn(4, 3, 12)
    module = torch.export.export(model, (x,), strict=strict).module()
    alike(gradients(module, module, x), gradients(model, model, x))


@pytest.mark.parametrize("scheme", TRAINED)
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_training_layer_refuses(scheme: str, strict: bool) -> None:
    """It runs, and its gradients are refused at the attempt."""
    model, x = mlp(scheme, training=True), torch.randn(5, 128)
    module = torch.export.export(model, (x,), strict=strict).module()
    y = module(x)
    torch.testing.assert_close(y, model(x))
    with pytest.raises(NotImplementedError, match=r"To train a weight use qnn\.Linear"):
        y.sum().backward()


def test_a_bias_after_a_frozen_weight_has_its_gradient_in_an_exported_training_layer() -> None:
    model, x = mlp("fp8", training=True)[2:], torch.randn(5, 128)
    model[0].weight.requires_grad_(False)
    module = torch.export.export(model, (x,)).module()
    module(x).sum().backward()
    (gradient,) = (p.grad for n, p in module.named_parameters() if n.endswith("bias"))
    torch.testing.assert_close(gradient, torch.full((32,), 5.0))


@pytest.mark.parametrize("make", [lambda: mlp("int8"), lambda: Recurrent(nn.LSTM)])
def test_jit_trace(make: Any) -> None:
    model = make()
    x = torch.randn(5, 128) if isinstance(model, nn.Sequential) else torch.randn(4, 3, 12)
    traced = torch.jit.trace(model, (x,))
    alike(gradients(traced, traced, x), gradients(model, model, x))


def test_a_jit_traced_training_layer_refuses() -> None:
    x = torch.randn(5, 128)
    traced = torch.jit.trace(mlp("fp8", training=True), (x,))
    # A NotImplementedError that went through TorchScript is a RuntimeError.
    with pytest.raises(RuntimeError, match="has no gradient with respect to"):
        traced(x).sum().backward()


@pytest.mark.parametrize(("scheme", "training"), [("int8", False), ("fp8", True), ("nvfp4", True)])
def test_joint_graphs(scheme: str, training: bool) -> None:
    """Whole-graph capture for training has a gradient for each parameter that wants one."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp(scheme, training=training)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.model(x).square().mean(),)

    module, x = Loss(), torch.randn(5, 128)
    wanted = {name for name, p in module.named_parameters() if p.requires_grad}
    _, signature = aot_export_module(module, [x], trace_joint=True, output_loss_index=0)
    assert signature.backward_signature is not None
    assert set(signature.backward_signature.gradients_to_parameters.values()) == wanted

    parameters = dict(module.named_parameters())

    def loss(x: torch.Tensor, *values: torch.Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_(p.requires_grad) for p in parameters.values()]
    graph = aot_export_joint_simple(loss, (x.requires_grad_(), *values), trace_joint=True)
    results: Any = graph.graph.output_node().args[0]
    found = dict(zip(("x", *parameters), results[1:], strict=True))
    assert {n for n, result in found.items() if result is not None} == {"x", *wanted}


@pytest.mark.parametrize("training", [False, True])
def test_nested_compile_region(training: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        @torch.compiler.nested_compile_region
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.layer(x))

    torch.manual_seed(3)
    scheme = "fp8" if training else "int8"
    model = qnn.convert(nn.Sequential(Block(), Block()), scheme, training=training)
    x = torch.randn(5, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    alike(gradients(compiled, model, x), gradients(model, model, x))


class TestSecondDerivatives:
    @staticmethod
    def second(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        parameters = [x, *(p for p in layer.parameters() if p.dim() == 1 and p.requires_grad)]
        y = layer(x)
        (first,) = torch.autograd.grad(
            (y[0] if isinstance(y, tuple) else y).sum(), x, create_graph=True
        )
        return list(torch.autograd.grad(first.square().sum(), parameters))

    @pytest.mark.parametrize(
        ("cell", "kwargs", "scheme"),
        [
            *itertools.product(CELLS, ({}, {"num_layers": 2}), ("int8", "int8_weight")),
            (nn.LSTM, {"proj_size": 4}, "int8"),
        ],
    )
    def test_recurrent(self, cell: Any, kwargs: dict[str, Any], scheme: str) -> None:
        """Those of the float cell over the dequantised weights, as the first ones."""
        torch.manual_seed(3)
        layer = qnn.convert(nn.ModuleList([cell(6, 7, **kwargs)]), scheme)[0]
        x = torch.randn(5, 3, 6)
        for got, want in zip(
            self.second(layer, x), self.second(layer.dequantize(), x), strict=True
        ):
            assert want.abs().sum() > 0
            if "num_layers" in kwargs or "proj_size" in kwargs:  # at rounded inputs
                cosine = nn.functional.cosine_similarity(got.ravel(), want.ravel(), 0)
                assert cosine > 0.99
            else:
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("scheme", TRAINED)
    def test_a_training_layer_refuses(self, scheme: str) -> None:
        layer, x = qnn.Linear(64, 32, scheme=scheme), torch.randn(5, 64, requires_grad=True)
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="has no gradient with respect to"):
            first.sum().backward()


class TestTransforms:
    """Of the raw ops, composed."""

    def test_any_order(self) -> None:
        torch.manual_seed(3)
        x, b = torch.randn(32), torch.randn(8)
        w, sw = qnn.functional.quantize(torch.randn(8, 32), "int8")

        def loss(v: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.ops.qnn.int8_linear(v, w, sw, b)
            return y.pow(3).sum()

        line = w * sw
        want = line.T @ torch.diag(6 * torch.ops.qnn.int8_linear(x, w, sw, b)) @ line
        modes = (torch.func.jacfwd, torch.func.jacrev)
        for outer, inner in itertools.product(modes, modes):
            torch.testing.assert_close(outer(inner(loss))(x), want, rtol=1e-4, atol=1e-3)
        tangent = torch.func.jvp(lambda v: torch.ops.qnn.int8_linear(x, w, sw, v), (b,), (b,))[1]
        torch.testing.assert_close(tangent, b)

    def test_what_has_no_forward_mode_says_so(self) -> None:
        layer, x = Recurrent(nn.LSTM), torch.randn(4, 3, 12)
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(layer, (x,), (x,))

    @pytest.mark.parametrize("scheme", TRAINED)
    def test_forward_mode_of_a_training_layer_is_that_of_its_float_line(self, scheme: str) -> None:
        layer = qnn.Linear(64, 32, scheme=scheme)
        x, t = torch.randn(5, 64), torch.randn(5, 64)
        y, tangent = torch.func.jvp(layer, (x,), (t,))
        torch.testing.assert_close(tangent, t @ layer.weight.T)
        with torch.no_grad():
            torch.testing.assert_close(y, layer(x))
        w = layer.weight.detach()

        def of_w(w: torch.Tensor) -> torch.Tensor:
            return qnn.functional.training_linear(x, w, scheme=scheme)

        torch.testing.assert_close(torch.func.jvp(of_w, (w,), (w,))[1], x @ w.T)


def test_a_call_that_needs_no_gradient_goes_past_autograd() -> None:
    """And one that something observes does not."""
    op = OPS["int8_linear"]
    if op._direct is None:
        pytest.skip("the C++ library is not loaded")
    given = {
        n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in differentiable(op).items()
    }
    with torch.profiler.profile() as profile:
        op.call(*given.values())
        op.call(given["x"].clone().requires_grad_(), *list(given.values())[1:])
    names = [event.name for event in profile.events() if event.name.startswith("qnn::")]
    assert list(dict.fromkeys(names)) == ["qnn::int8_linear_no_grad", "qnn::int8_linear"]
