"""What names a layer, or calls it, follows it when it is swapped; or it is said."""

from __future__ import annotations

import copy
import functools
import importlib.util
import threading
import types
import weakref
from collections import deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn

from .common import same_bits

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Frozen:
    layer: nn.Module


class Slotted:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Plain:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Other(nn.Module):
    """Not a child of the model: it is found in a list only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def closure(layer: nn.Module) -> Callable[[], nn.Module]:
    return lambda: layer


def default(layer: nn.Module) -> Callable[..., nn.Module]:
    def get(held: nn.Module = layer) -> nn.Module:
        return held

    return get


def recursive(layer: nn.Module) -> Callable[..., nn.Module]:
    def get(depth: int = 2) -> nn.Module:
        return get(depth - 1) if depth else layer

    return get


# How a model names a layer, and how the layer is read from there.
HOLDERS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], Any]]] = {
    "list": (lambda m: [m], lambda h: h[0]),
    "nested": (lambda m: {"a": [(1, {"b": m})]}, lambda h: h["a"][0][1]["b"]),
    "tuple": (lambda m: (1, m), lambda h: h[1]),
    "namedtuple": (lambda m: Pair(1, m), lambda h: h.second),
    "dict": (lambda m: {"a": m}, lambda h: h["a"]),
    "key": (lambda m: {m: "a"}, lambda h: next(iter(h))),
    "set": (lambda m: {m}, lambda h: next(iter(h))),
    "frozenset": (lambda m: frozenset([m]), lambda h: next(iter(h))),
    "deque": (lambda m: deque([m]), lambda h: h[0]),
    "dataclass": (Frozen, lambda h: h.layer),
    "slots": (Slotted, lambda h: h.layer),
    "object": (Plain, lambda h: h.layer),
    "namespace": (lambda m: types.SimpleNamespace(a=m), lambda h: h.a),
    "module": (lambda m: [Other(m)], lambda h: h[0].layer),
    "partial": (lambda m: functools.partial(map, m), lambda h: h.args[0]),
    "keyword": (lambda m: functools.partial(map, f=m), lambda h: h.keywords["f"]),
    "method": (lambda m: m.train, lambda h: h.__self__),
    "closure": (closure, lambda h: h()),
    "default": (default, lambda h: h()),
    "recursive": (recursive, lambda h: h()),
    "list in a closure": (lambda m: (lambda held: lambda: held)([m]), lambda h: h()[0]),
    "weak": (weakref.ref, lambda h: h()),
    "weak set": (lambda m: weakref.WeakSet([m]), lambda h: next(iter(h))),
    "weak key": (lambda m: weakref.WeakKeyDictionary({m: 1}), lambda h: next(iter(h))),
    "weak value": (lambda m: weakref.WeakValueDictionary(a=m), lambda h: h["a"]),
    "weak method": (lambda m: weakref.WeakMethod(m.train), lambda h: h().__self__),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


class TestReferences:
    @parameterized.expand(
        [(n, i) for n in HOLDERS for i in (False, True) if i or n != "weak method"]  # no deepcopy
    )
    def test_every_holder_follows(self, name: str, inplace: bool) -> None:
        hold, read = HOLDERS[name]
        for owner in ("", "first", "second"):  # the model, a swapped layer, the layer itself
            net = model()
            layer, holder = net.second, net.get_submodule(owner)
            holder.held = hold(layer)  # type: ignore[assignment]
            if owner:
                holder.register_forward_hook(functools.partial(lambda h, *_: None, holder.held))
            out = qnn.convert(net, inplace=inplace)
            assert read(out.get_submodule(owner).held) is out.second
            assert type(out.second) is qnn.QLinear
            if not inplace:
                assert read(net.get_submodule(owner).held) is layer
                assert type(layer) is nn.Linear

    def test_the_variables_of_others_stay(self) -> None:
        net = model()
        layer = net.second
        net.get = lambda: layer  # type: ignore[assignment]
        out = qnn.convert(net, inplace=True)
        assert type(layer) is nn.Linear
        assert out.get() is out.second

    @parameterized.expand([(False,), (True,)])
    def test_methods_become_those_of_the_new_class(self, inplace: bool) -> None:
        net = model()
        net.calls = [net.first.forward, net.second]  # type: ignore[assignment]
        x = torch.randn(3, 16)
        want = qnn.convert(model())(x)
        out = qnn.convert(net, inplace=inplace)
        assert same_bits(out.calls[1](out.calls[0](x)), want)

    def test_a_forward_on_the_model_follows_its_copy(self) -> None:
        for inplace in (False, True):
            net, x = model(), torch.randn(3, 16)
            net.forward = lambda x, net=net: net.second(net.first(x))  # type: ignore[method-assign]
            out = qnn.convert(net, inplace=inplace)
            assert same_bits(out(x), qnn.convert(model())(x))

    def test_what_cannot_be_changed_is_named(self) -> None:
        net = model()
        net.later = functools.lru_cache(net.second)  # type: ignore[assignment]
        del net.later.__wrapped__
        before = list(net.children())
        with pytest.raises(ValueError, match="later names the layer 'second' in a form"):
            qnn.convert(net, inplace=True)
        assert list(net.children()) == before

    @parameterized.expand([(False,), (True,)])
    def test_a_forward_that_reads_a_global_is_refused(self, inplace: bool) -> None:
        space: dict[str, Any] = {"net": model()}
        exec("layer = net.second\ndef forward(x): return layer(net.first(x))", space)  # noqa: S102
        space["net"].forward = space["forward"]
        with pytest.raises(ValueError, match="the forward of the model would go on calling"):
            qnn.convert(space["net"], inplace=inplace)

    def test_a_forward_through_a_shared_object_is_refused(self) -> None:
        class Runner:
            def __init__(self, net: nn.Module) -> None:
                self.net = net

        net = model()
        runner = Runner(net)
        net.forward = lambda x: runner.net.second(x)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="in a global variable, its class or another object"):
            qnn.convert(net)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module]]] = {
    "Linear": (lambda: nn.Linear(16, 8), qnn.convert),
    "LSTM": (lambda: nn.LSTM(16, 8), qnn.convert),
    "GRU": (lambda: nn.GRU(16, 8), qnn.convert),
    "training": (
        lambda: nn.Linear(16, 8),
        lambda m, **k: qnn.convert(m, "fp8", training=True, **k),
    ),
    "prepare": (lambda: nn.Linear(16, 8), lambda m, **k: qnn.prepare(m, qat=True, **k)),
    "prepare LSTM": (lambda: nn.LSTM(16, 8), lambda m, **k: qnn.prepare(m, qat=True, **k)),
}
CASES = [(name, inplace) for name in KINDS for inplace in (False, True)]


def out_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    got: torch.Tensor = y[0] if isinstance(y, tuple) else y
    return got.detach()


class TestCalls:
    """Nothing of the old layer goes on calling it."""

    def nets(self, name: str) -> tuple[nn.Sequential, nn.Sequential]:
        make, _ = KINDS[name]
        torch.manual_seed(0)
        net = nn.Sequential(make()).eval()
        twin = nn.Sequential(make()).eval()
        twin.load_state_dict(net.state_dict())
        return net, twin

    @parameterized.expand(CASES)
    def test_compiled_layers(self, name: str, inplace: bool) -> None:
        net, twin = self.nets(name)
        net[0].compile(backend="eager")
        x = torch.randn(1, 3, 16)
        swap = KINDS[name][1]
        out, want = swap(net, inplace=inplace), swap(twin)
        assert same_bits(out_of(out[0], x), out_of(want[0], x))  # type: ignore[index]
        # A copy is not compiled, as one by deepcopy is not; in place it stays compiled.
        assert (out[0]._compiled_call_impl is not None) == inplace  # type: ignore[index]

    @parameterized.expand([("Linear",), ("LSTM",), ("training",)])
    def test_torch_compile_around_a_layer(self, name: str) -> None:
        for inplace in (False, True):
            net, twin = self.nets(name)
            net[0] = torch.compile(net[0], backend="eager")
            swap, x = KINDS[name][1], torch.randn(1, 3, 16)
            out, want = swap(net, inplace=inplace), swap(twin)
            assert same_bits(out_of(out, x), out_of(want, x))

    @parameterized.expand(CASES)
    def test_wrapped_forwards_move(self, name: str, inplace: bool) -> None:
        def by_closure(layer: nn.Module) -> None:
            before = layer.forward
            layer.forward = lambda *a: (calls.append(1), before(*a))[1]

        def by_attribute(layer: nn.Module) -> None:  # as accelerate does it
            def run(module: Any, *args: Any) -> Any:
                calls.append(1)
                return module._old_forward(*args)

            layer._old_forward = layer.forward
            layer.forward = functools.update_wrapper(
                functools.partial(run, layer), layer._old_forward
            )

        def by_method(layer: nn.Module) -> None:
            before = layer.forward

            def run(self: Any, *args: Any) -> Any:
                calls.append(1)
                return before(*args)

            layer.forward = types.MethodType(run, layer)

        swap, x = KINDS[name][1], torch.randn(5, 3, 16)
        for wrap in (by_closure, by_attribute, by_method):
            calls: list[int] = []
            net, twin = self.nets(name)
            wrap(net[0])
            out = swap(net, inplace=inplace)
            want = out_of(swap(twin), x)
            assert same_bits(out_of(out, x), want), wrap.__name__
            assert len(calls) == 1, wrap.__name__

    @parameterized.expand(CASES)
    def test_other_forwards_are_refused(self, name: str, inplace: bool) -> None:
        net, _ = self.nets(name)
        layer = net[0]
        for forward in (
            lambda x: x,
            functools.partial(lambda module, x: x @ module.weight.T, layer),
            types.MethodType(lambda self, x: x, layer),
        ):
            layer.forward = forward
            with pytest.raises(ValueError, match=r"0: a forward of its own .* del layer.forward"):
                KINDS[name][1](net, inplace=inplace)
            assert net[0] is layer

    @pytest.mark.skipif(
        not importlib.util.find_spec("accelerate"), reason="accelerate is not installed"
    )
    def test_hooks_of_accelerate(self) -> None:
        from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
        from accelerate.hooks import remove_hook_from_module as remove

        class Double(ModelHook):  # type: ignore[misc]
            def post_forward(self, module: nn.Module, output: Any) -> Any:
                return 2 * output

        for inplace in (False, True):
            net, x = model(), torch.randn(3, 16)
            add_hook_to_module(net.second, Double())
            add_hook_to_module(net.first, AlignDevicesHook("cpu", io_same_device=True))
            out, want = qnn.convert(net, inplace=inplace), qnn.convert(model())(x)
            assert same_bits(out(x), 2 * want)
            remove(out, recurse=True)
            assert same_bits(out(x), want)
        net = model()
        add_hook_to_module(net.first, AlignDevicesHook("cpu", offload=True, weights_map={}))
        for verb in (qnn.convert, qnn.prepare):
            with pytest.raises(ValueError, match="first: accelerate offloads its weights"):
                verb(net)


class TestHooks:
    def test_every_kind_lives_on_and_can_be_removed(self) -> None:
        def add(layer: nn.Module, calls: list[str]) -> list[Any]:
            def note(name: str) -> Callable[..., None]:
                return lambda *args, **kwargs: calls.append(name)

            always = layer.register_forward_hook(
                note("always"), with_kwargs=True, always_call=True, prepend=True
            )
            return [
                layer.register_forward_pre_hook(note("pre"), with_kwargs=True),
                layer.register_forward_pre_hook(note("plain pre")),
                layer.register_forward_hook(note("forward")),
                always,
                layer.register_full_backward_pre_hook(note("backward pre")),
                layer.register_full_backward_hook(note("backward")),
                layer.register_state_dict_pre_hook(note("state pre")),
                layer.register_state_dict_post_hook(note("state")),
                layer.register_load_state_dict_pre_hook(note("load pre")),
                layer.register_load_state_dict_post_hook(note("load")),
            ]

        for name, inplace in CASES:
            net, _ = TestCalls().nets(name)
            calls: list[str] = []
            handles = add(net[0], calls)
            out = KINDS[name][1](net, inplace=inplace)
            y = out(torch.randn(5, 3, 16, requires_grad=True))
            (y[0] if isinstance(y, tuple) else y).sum().backward()
            out.load_state_dict(out.state_dict())
            assert len(set(calls)) == len(calls) == len(handles), (name, inplace, calls)
            if inplace:
                calls.clear()
                for handle in handles:
                    handle.remove()
                out(torch.randn(5, 3, 16))
                out.load_state_dict(out.state_dict())
                assert calls == [], name

    @parameterized.expand([(False,), (True,)])
    def test_a_hook_before_loading_gets_the_layer_that_loads(self, inplace: bool) -> None:
        seen = []
        net = model()
        net.first.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
        out = qnn.convert(net, inplace=inplace)
        out.load_state_dict(out.state_dict())
        assert seen == [out.first]


class TestCopies:
    @parameterized.expand(
        [
            ("lock", lambda m: setattr(m, "lock", threading.Lock()), "'lock' .lock. of the model"),
            (
                "result",
                lambda m: setattr(m.first, "last", m(torch.ones(1, 16))),
                "'last' .Tensor. of first",
            ),
            ("generator", lambda m: setattr(m, "later", (i for i in [1])), "'later' .generator."),
        ]
    )
    def test_a_model_that_cannot_be_copied(self, _: str, spoil: Any, words: str) -> None:
        for verb in (qnn.convert, qnn.prepare):
            net = model()
            spoil(net)
            with pytest.raises(ValueError, match=f"{words}.*Pass inplace=True"):
                verb(net)
            assert type(net.first) is nn.Linear
            verb(net, inplace=True)


class Registry(nn.Module):
    """A list of the class names the layer."""

    layers: list[nn.Module] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.layers[:] = [self.layer]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers[0](x)
        return y


class TestClasses:
    """What a class holds is not copied, and its functions are not changed."""

    def test_a_list_of_the_class(self) -> None:
        model, x = Registry(), torch.randn(2, 16)
        with pytest.raises(ValueError, match="the forward of the model would go on calling"):
            qnn.convert(model)
        want = qnn.convert(copy.deepcopy(model.layer))(x)
        assert same_bits(qnn.convert(model, inplace=True)(x), want)

    @parameterized.expand([(False,), (True,)])
    def test_a_variable_around_the_class(self, inplace: bool) -> None:
        layer = nn.Linear(16, 16)

        class Enclosed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = layer(x)
                return y

        with pytest.raises(ValueError, match="would go on calling the float layers"):
            qnn.convert(Enclosed(), inplace=inplace)

    @parameterized.expand([(False,), (True,)])
    def test_an_attribute_is_no_global(self, inplace: bool) -> None:
        space: dict[str, Any] = {"net": model()}
        exec("second = net.second\ndef forward(x): return net_of().second(x)", space)  # noqa: S102
        net = space["net"]
        space["net_of"] = lambda: net
        net.forward = lambda x: net.second(net.first(x))
        assert type(qnn.convert(net, inplace=inplace).second) is qnn.QLinear
