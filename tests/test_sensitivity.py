from __future__ import annotations

import copy
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from parameterized import parameterized
from torch import nn

import qnn
from qnn.verbs.choose import Row


class Net(nn.Module):
    """Layers in many places: children, a list, a tuple, a dict, a closure, a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.norm, self.drop = nn.BatchNorm1d(32), nn.Dropout()
        self.pair = (self.first, self.second)
        self.held = {"head": self.head, "list": [self.first]}
        self.call_head = self.head.forward
        self.register_buffer("calls", torch.zeros(()))
        self.head.note = "mine"  # type: ignore[assignment]

        def closed(x: torch.Tensor, layer: nn.Module = self.second) -> Any:
            return layer(x)

        self.closed = closed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.drop(self.norm(self.pair[0](x).relu()))
        result: torch.Tensor = self.call_head(self.closed(x).relu())
        return result


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.second.weight.data[:, 0] *= 40  # which costs each row its precision
    return model


def batches(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 32, generator=generator) for _ in range(count)]


def trace(model: Any) -> list[Any]:
    """Everything that quantising a layer may change, by identity and value."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    attributes = {
        (name, key): id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key != "training" and not isinstance(value, (bool, types.MethodType))
    }
    tensors = [(name, id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()]
    boxes = [id(each) for each in getattr(model, "pair", ())]
    return [modules, attributes, [t[:2] for t in tensors], [t[2].tolist() for t in tensors], boxes]


def alone(model: Any, name: str, scheme: Any = "int8") -> qnn.Sensitivity | Any:
    return qnn.convert(model, scheme, include=name)


class TestSensitivity:
    def test_errors_are_those_of_models_with_one_layer_converted(self) -> None:
        model, data = net(), batches()
        table = qnn.sensitivity(model, data, "int8")
        assert {row.name for row in table} == {"first", "second", "head"}
        for row in table:
            twin = alone(model, row.name)
            with torch.no_grad():
                expected, got = (
                    torch.cat([m.eval()(x) for x in data]) for m in (copy.deepcopy(model), twin)
                )
            assert row.sqnr == pytest.approx(qnn.sqnr(expected, got), abs=1e-6)
            assert row.error == pytest.approx(10 ** (-qnn.sqnr(expected, got) / 10))
            layer = twin.get_submodule(row.name)
            assert row.bytes_after == sum(p.numel() * p.element_size() for p in layer.parameters())
            assert row.bytes_before == 4 * sum(
                p.numel() for p in model.get_submodule(row.name).parameters()
            )
            assert row.layers == {row.name: "int8"}
            assert row.score is None
        assert [row.error for row in table] == sorted((r.error for r in table), reverse=True)
        everything = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        assert table.bytes_before == everything

    def test_the_model_is_put_back(self) -> None:
        model = net()
        model.drop.eval()
        handle = model.first.register_forward_hook(lambda *_: None)
        before = trace(model)
        qnn.sensitivity(model, batches())
        assert trace(model) == before
        assert model.call_head.__func__ is nn.Linear.forward  # type: ignore[attr-defined]
        assert model.call_head.__self__ is model.head  # type: ignore[attr-defined]
        assert model.held["list"][0] is model.first  # type: ignore[index]
        assert model.closed.__defaults__[0] is model.second  # type: ignore[attr-defined]
        assert not hasattr(model.norm, "_qnn_reason")
        handle.remove()
        assert not model.first._forward_hooks
        table = qnn.sensitivity(model, batches(), exclude="first")
        assert {row.name for row in table} == {"second", "head"}
        assert trace(model)[0] == before[0]

    @parameterized.expand([("model",), ("quantise",), ("eval_fn",), ("interrupt",)])
    def test_put_back_after_an_exception(self, place: str) -> None:
        model, calls = net(), 0

        def fail(*_: Any, **__: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt if place == "interrupt" else RuntimeError("stop")
            return 1.0

        before = trace(model)
        options: dict[str, Any] = {"eval_fn": fail} if place in ("eval_fn", "interrupt") else {}
        error: Any = KeyboardInterrupt if place == "interrupt" else RuntimeError
        if place == "model":
            handle = model.norm.register_forward_hook(lambda *_: fail() and None)
        quantise = qnn.QLinear.from_float

        def broken(layer: nn.Linear, *args: Any) -> Any:
            return fail() if layer.weight is model.head.weight else quantise(layer, *args)

        with mock.patch.object(
            qnn.QLinear, "from_float", broken if place == "quantise" else quantise
        ):
            if place == "quantise":
                calls = 3
            with pytest.raises(error):
                qnn.sensitivity(model, batches(), **options)
        if place == "model":
            handle.remove()
        assert trace(model) == before

    def test_one_layer_is_quantised_at_a_time(self) -> None:
        model, seen = net(), list[list[str]]()

        def count(model: nn.Module) -> int:
            assert not model.training
            assert not torch.is_grad_enabled()
            assert isinstance(model, Net)
            named = {model.first: "first", model.second: "second", model.head: "head"}
            seen.append([name for m, name in named.items() if isinstance(m, qnn.QLinear)])
            assert all(m is n for m, n in zip(model.pair, (model.first, model.second), strict=True))
            assert model.call_head.__self__ is model.head  # type: ignore[attr-defined]
            return -len(seen)

        table = qnn.sensitivity(model, eval_fn=count, progress=False)
        assert seen == [[], ["first"], ["second"], ["head"]]
        assert table.score == -1
        assert [(row.name, row.score, row.drop) for row in table] == [
            ("head", -4, 3), ("second", -3, 2), ("first", -2, 1)
        ]  # fmt: skip
        assert all(row.sqnr is None for row in table)

    def test_metric(self) -> None:
        model, data = net(), batches(3)

        def agreement(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
            return (expected - got).abs().max().neg()

        table = qnn.sensitivity(model, data, metric=agreement)
        assert table.score == 0
        with torch.no_grad():
            for row in table:
                pairs = [(copy.deepcopy(model).eval()(x), alone(model, row.name).eval()(x))
                         for x in data]  # fmt: skip
                want = sum(float(agreement(a, b)) for a, b in pairs) / 3
                assert row.drop == pytest.approx(-want)
                assert row.sqnr is not None
        assert "drop" in str(table)

    def test_groups_ties_and_attention(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
                self.b.weight = self.a.weight
                self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.c(self.b(self.a(x)))
                result: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
                return result

        model, data = Tied(), [torch.randn(2, 5, 16)]
        before = trace(model)
        table = qnn.sensitivity(model, data)
        assert {row.name for row in table} == {"a", "c", "attention"}
        assert set(table["a"].layers) == {"a", "b"}
        assert table["a"].bytes_before == 4 * (16 * 16 + 2 * 16)  # the weight once
        twin = qnn.convert(model, include=["a", "b"])
        # Up to the rounding of torch's fused attention.
        assert table["a"].sqnr == pytest.approx(qnn.compare(model, twin, data[0]).output, abs=1e-2)
        table = qnn.sensitivity(model, data, groups={"all but one": ["a", "c"]})
        assert {row.name for row in table} == {"all but one", "attention"}
        assert set(table["all but one"].layers) == {"a", "b", "c"}
        assert trace(model) == before
        assert model.b.weight is model.a.weight
        with pytest.raises(
            ValueError, match=r"qnn\.sensitivity: groups\['x'\] pattern 'y' matches"
        ):
            qnn.sensitivity(model, data, groups={"x": "y"})
        with pytest.raises(ValueError, match="has no layer that is to be quantised"):
            qnn.sensitivity(model, data, groups={"x": "c"}, exclude="c")

    def test_the_fused_encoder_of_torch(self) -> None:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        model, data = nn.TransformerEncoder(layer, 1), [torch.randn(2, 5, 32)]
        fast = torch.backends.mha.get_fastpath_enabled()
        before = trace(model)
        table = qnn.sensitivity(model.eval(), data)
        assert all(15 < row.sqnr < 80 for row in table if row.sqnr is not None)
        assert torch.backends.mha.get_fastpath_enabled() is fast
        assert trace(model.train()) == before
        twin = qnn.convert(model.eval(), include="layers.0.linear1")
        assert table["layers.0.linear1"].sqnr == pytest.approx(
            qnn.compare(model, twin, data[0]).output, abs=0.1
        )

    @parameterized.expand([(False,), (True,)])
    def test_prepared(self, qat: bool) -> None:
        model, data = net().eval(), batches()
        with torch.no_grad():
            expected = torch.cat([model(x) for x in data])
        prepared = qnn.calibrate(qnn.prepare(model, qat=qat), data)
        before, flags = (
            trace(prepared),
            [
                (point.observing, point.rounding)
                for point in prepared.modules()
                if isinstance(point, qnn.FakeQuantize)
            ],
        )
        table = qnn.sensitivity(prepared, batches(4)[2:] + data)
        assert trace(prepared) == before
        assert flags == [
            (point.observing, point.rounding)
            for point in prepared.modules()
            if isinstance(point, qnn.FakeQuantize)
        ]
        assert {row.scheme for row in table} == {"int8_static"}
        table = qnn.sensitivity(prepared, data)
        static = qnn.convert(prepared).eval()
        for row in table:
            twin = copy.deepcopy(model)
            setattr(twin, row.name, static.get_submodule(row.name))
            twin.pair, twin.call_head = (twin.first, twin.second), twin.head.forward
            twin.closed = twin.second  # type: ignore[assignment]
            with torch.no_grad():
                got = torch.cat([twin(x) for x in data])
            assert row.sqnr == pytest.approx(qnn.sqnr(expected, got), abs=1e-3)
            assert row.bytes_before == 4 * sum(
                p.numel() for p in model.get_submodule(row.name).parameters()
            )
        with pytest.raises(ValueError, match="its layers know their scheme"):
            qnn.sensitivity(prepared, data, "int8")

    def test_other_kinds_and_a_bare_layer(self) -> None:
        layer, x = nn.Linear(32, 8), torch.randn(4, 32)
        table = qnn.sensitivity(layer, [x])
        assert table[""].sqnr == pytest.approx(qnn.sqnr(layer(x), qnn.convert(layer)(x)), abs=1e-6)
        assert "(model)" in str(table)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
        assert len(qnn.sensitivity(model, [torch.randn(2, 3, 6, 6)])) == 2
        lstm = nn.LSTM(8, 16)
        kinds = qnn.sensitivity(lstm, [torch.randn(5, 3, 8)])
        assert kinds[""].sqnr > 20  # type: ignore[operator]
        table = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 50, bias=False))
        table[1].weight = table[0].weight
        rows = qnn.sensitivity(
            table, [torch.arange(50)], {"*": "int8", nn.Embedding: "int8_weight"}
        )
        assert len(rows) == 1
        assert rows["0"].scheme == "int8_weight+int8"
        assert table[1].weight is table[0].weight

    def test_wrong_arguments(self) -> None:
        model, data = net(), batches()
        with pytest.raises(TypeError, match=r"qnn\.sensitivity takes an nn\.Module"):
            qnn.sensitivity(data[0], data)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="batches is a Tensor, one batch"):
            qnn.sensitivity(model, data[0])
        for empty in (None, []):
            with pytest.raises(ValueError, match=r"qnn\.sensitivity: there are no batches"):
                qnn.sensitivity(model, empty)
        with pytest.raises(ValueError, match="metric and eval_fn both give a score"):
            qnn.sensitivity(model, data, metric=max, eval_fn=max)
        with pytest.raises(TypeError, match="metric must be a function, got str"):
            qnn.sensitivity(model, data, metric="cosine")  # type: ignore[arg-type]
        for value in (None, "0.9", torch.ones(2), True):
            with pytest.raises(TypeError, match="eval_fn must return one number"):
                qnn.sensitivity(model, eval_fn=lambda _, value=value: value)
        with pytest.raises(ValueError, match="progress must be"):
            qnn.sensitivity(model, data, progress="maybe")
        with pytest.raises(ValueError, match="unknown scheme"):
            qnn.sensitivity(model, data, "int9")
        with pytest.raises(ValueError, match="scheme is an empty list"):
            qnn.sensitivity(model, data, [])
        ids = nn.Sequential(nn.Linear(4, 4), nn.Flatten())
        ids.forward = lambda x: ids[0](x).argmax(-1)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="has no float tensors to compare"):
            qnn.sensitivity(ids, [torch.randn(2, 4)])

    def test_nan_is_worst(self) -> None:
        scores = iter([1.0, 0.9, math.nan, 0.5])
        table = qnn.sensitivity(net(), eval_fn=lambda _: next(scores))
        assert [row.name for row in table] == ["second", "head", "first"]

    def test_random_numbers_are_the_same_in_each_run(self) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(32, 32)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = self.layer(x) + torch.randn(16, 32)
                return result

        model = Noisy()
        before = torch.get_rng_state()
        table = qnn.sensitivity(model, batches())
        assert table["layer"].sqnr > 30  # type: ignore[operator]
        assert torch.equal(before, torch.get_rng_state())


class TestTable:
    def setup_method(self) -> None:
        self.model = net()
        self.table = qnn.sensitivity(self.model, batches(), ["int8", "int4_weight_g32"])

    def test_views(self) -> None:
        table = self.table
        assert len(table) == len(list(table)) == 6
        assert table["head", "int8"].scheme == "int8"
        with pytest.raises(KeyError, match="has the schemes"):
            table["head"]
        with pytest.raises(KeyError, match="has no row 'neck'; its rows are"):
            table["neck"]
        assert [row.name for row in table.sort("name")] == sorted(row.name for row in table)
        saved = [row.saved for row in table.sort("saved")]
        assert saved == sorted(saved, reverse=True)
        with pytest.raises(ValueError, match=r"sort takes 'error', .* got 'size'"):
            table.sort("size")  # type: ignore[arg-type]
        json.dumps(table.to_dict())
        lines = str(table).splitlines()
        assert lines[0].split() == ["layer", "scheme", "SQNR", "dB", "before", "after"]
        assert len(lines) == 8

    def test_plot(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="needs the extra 'examples'")
        assert self.table.plot(tmp_path / "s.png").stat().st_size > 5000

    def test_plot_without_matplotlib(self, tmp_path: Path) -> None:
        hidden = {"matplotlib": None, "matplotlib.figure": None}
        with (
            mock.patch.dict(sys.modules, hidden),
            pytest.raises(ImportError, match=r"qnn\.Sensitivity\.plot needs matplotlib: pip"),
        ):
            self.table.plot(tmp_path / "s.png")

    def test_choose(self) -> None:
        table, size = self.table, self.table.bytes_before
        assert set(table.choose(size).values()) == {None}
        least = size - sum(
            max(row.saved for row in table if row.name == name)
            for name in ("first", "second", "head")
        )
        used = list[set[str | None]]()
        for budget in range(least, size, 400):
            schemes = table.choose(budget)
            assert set(schemes) == {"first", "second", "head"}
            if not any(schemes.values()):
                continue
            twin = qnn.convert(self.model, schemes)
            held = {id(t): t for t in (*twin.parameters(), *twin.buffers())}.values()
            assert sum(t.numel() * t.element_size() for t in held) <= budget
            used.append(set(schemes.values()))
        assert used[0] == {"int4_weight_g32"}
        assert {None, "int8"} in used
        with pytest.raises(ValueError, match=f"cannot be reached: the least .* is {least} "):
            table.choose(least - 1)
        with pytest.raises(TypeError, match="budget_bytes must be a number"):
            table.choose("1 MB")  # type: ignore[arg-type]

    def test_choose_takes_the_least_error_per_byte(self) -> None:
        def row(name: str, error: float, saved: int) -> Any:
            return Row(name, "int8", None, -error, error, saved, 0, {name: "int8"})

        sensitive: Callable[..., Any] = qnn.Sensitivity
        rows = [row("a[0]", 1.0, 100), row("b", 1.5, 300), row("c", math.nan, 1000)]
        table = sensitive(rows, 0.0, 1400)
        assert table.choose(1350) == {"a[[]0]": None, "b": "int8", "c": None}
        assert table.choose(1000) == {"a[[]0]": "int8", "b": "int8", "c": None}
        with pytest.raises(ValueError, match=r"the least .* is 1000"):
            table.choose(500)
