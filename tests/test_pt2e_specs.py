"""Specs and annotations, and which places of a graph share an observer; the numbers are those of
the list of behaviours.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from qnn.pt2e import specs as S
from qnn.pt2e.groups import groups_of, specs_of
from qnn.pt2e.insert import NOTES
from qnn.pt2e.observers import is_observer, make_observer, saw_nothing

from .pt2e import (
    ACT,
    SIGNED,
    WEIGHT,
    annotate,
    aten,
    export,
    node_of,
    observed,
    observer_of,
    prepare,
)

Shared = S.SharedQuantizationSpec


class TestSpecs:
    def test_fields_and_defaults(self) -> None:
        spec = S.QuantizationSpec(torch.int8)
        assert [f.name for f in dataclasses.fields(spec)] == [
            "dtype", "observer_or_fake_quant_ctr", "quant_min", "quant_max", "qscheme", "ch_axis",
            "is_dynamic",
        ]  # fmt: skip
        assert dataclasses.astuple(spec) == (torch.int8, None, None, None, None, None, False)
        empty = S.QuantizationAnnotation()
        assert (empty.input_qspec_map, empty.output_qspec) == ({}, None)
        assert empty.allow_implicit_sharing
        assert not empty._annotated
        assert S.Q_ANNOTATION_KEY == "quantization_annotation"

    def test_b18_ranges_and_axes_are_checked(self) -> None:
        with pytest.raises(ValueError, match="quant_min 3 must not be above quant_max 2"):
            S.QuantizationSpec(torch.int8, quant_min=3, quant_max=2)
        with pytest.raises(ValueError, match="ch_axis must be at least 0, got -1"):
            S.QuantizationSpec(torch.int8, ch_axis=-1)

    def test_b19_frozen_equal_and_in_sets(self) -> None:
        for make in (
            lambda: S.QuantizationSpec(torch.int8, quant_min=-7, quant_max=7),
            lambda: S.FixedQParamsQuantizationSpec(torch.uint8, 0.5, 3),
            lambda: S.QuantizationConfig(ACT, None, WEIGHT, None),
        ):
            one: Any = make()
            assert one == make()
            assert len({one, make()}) == 1
            with pytest.raises(dataclasses.FrozenInstanceError):
                one.dtype = torch.int16
        derived = S.DerivedQuantizationSpec([], lambda _: None, torch.int32)  # type: ignore[arg-type,return-value]
        with pytest.raises(TypeError, match="unhashable"):
            hash(derived)

    def test_helpers_of_configs(self) -> None:
        bias = S.QuantizationSpec(torch.float32)
        config = S.QuantizationConfig(ACT, SIGNED, WEIGHT, bias)
        assert S.get_input_act_qspec(config) is ACT
        assert S.get_output_act_qspec(config) is SIGNED
        assert S.get_weight_qspec(config) is WEIGHT
        assert S.get_bias_qspec(config) is bias
        for get in (
            S.get_input_act_qspec,
            S.get_output_act_qspec,
            S.get_weight_qspec,
            S.get_bias_qspec,
        ):
            assert get(None) is None
            assert get(S.QuantizationConfig(None, None, None, None)) is None
        wrong = S.QuantizationConfig(WEIGHT, WEIGHT, ACT, ACT)
        with pytest.raises(ValueError, match="input_activation must be one of"):
            S.get_input_act_qspec(wrong)
        with pytest.raises(ValueError, match="weight must be one of"):
            S.get_weight_qspec(wrong)
        with pytest.raises(ValueError, match="stays float32"):
            S.get_bias_qspec(wrong)
        assert S.OperatorConfig(config, [[torch.relu]]).operators == [[torch.relu]]

    def test_helpers_of_annotations(self) -> None:
        gm = export(nn.Linear(2, 2), torch.randn(1, 2))
        node = node_of(gm, aten.linear.default)
        assert not S.is_valid_annotation(None)
        assert not S.is_valid_annotation(S.QuantizationAnnotation())
        S.annotate_input_qspec_map(node, node.args[0], ACT)
        S.annotate_output_qspec(node, SIGNED)
        annotation = node.meta["quantization_annotation"]
        assert annotation.input_qspec_map == {node.args[0]: ACT}
        assert annotation.output_qspec is SIGNED
        assert S.is_valid_annotation(annotation)

    def test_b62_b63_module_names_are_whole_components(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.sub = nn.Sequential(nn.Linear(2, 2))
                self.sub_1 = nn.Linear(2, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.sub_1(self.sub(self.sub(x)))

        gm = export(Model(), torch.randn(1, 2))
        linears = [n for n in gm.graph.nodes if n.target is aten.linear.default]
        for spelt in ("sub", "L['self'].sub", "sub.0"):
            assert [S.get_module_name_filter(spelt)(n) for n in linears] == [True, True, False]
        assert [S.get_module_name_filter("sub_1")(n) for n in linears] == [False, False, True]
        assert not any(map(S.get_module_name_filter("su"), linears))

    def test_b33_annotations_follow_nodes_that_were_replaced(self) -> None:
        gm = pool_net()
        conv, relu, pool = (node_of(gm, n) for n in ("conv2d", "relu", "max_pool2d"))
        annotate(relu, {conv: ACT}, Shared((conv, relu)))
        derived = S.DerivedQuantizationSpec([(conv, relu), relu], lambda _: (0, 0), torch.int8)  # type: ignore[arg-type,return-value]
        annotate(pool, {relu: derived}, Shared(relu))
        old = pool.meta["quantization_annotation"]
        with gm.graph.inserting_after(relu):
            new = gm.graph.call_function(aten.relu.default, (conv,))
        new.meta = dict(relu.meta)
        relu.replace_all_uses_with(new)
        S.retarget_annotations(gm.graph, {relu: new})
        annotation = pool.meta["quantization_annotation"]
        assert list(annotation.input_qspec_map) == [new]
        assert annotation.input_qspec_map[new].derived_from == [(conv, new), new]
        assert annotation.output_qspec.edge_or_node is new
        assert new.meta["quantization_annotation"].output_qspec.edge_or_node == (conv, new)
        assert old.output_qspec.edge_or_node is relu  # another graph may share it


class Kwargs(nn.Module):
    """An observer that keeps what it is called with."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def calculate_qparams(self) -> None:
        raise NotImplementedError


class WithArgs:
    """A constructor with keywords, as `with_args` of torchao makes one; also of another one."""

    def __init__(self, inner: Any, **given: Any) -> None:
        import functools

        self.p = functools.partial(inner, **given)

    def __call__(self, **given: Any) -> Any:
        return self.p(**given)


class PerChannelKwargs(Kwargs):
    pass


def made(spec: Any, *, qat: bool = False, constant: bool = False) -> Any:
    return make_observer(spec, qat=qat, constant=constant, name="x -> y")


class TestObservers:
    def test_b10_b11_all_fields_and_the_spec_wins(self) -> None:
        for constructor in (
            Kwargs,
            WithArgs(Kwargs, eps=0.5, dtype=torch.float32),
            WithArgs(WithArgs(Kwargs, eps=0.5), dtype=torch.float32),
        ):
            spec = S.QuantizationSpec(
                torch.int8, constructor, -7, 7, torch.per_tensor_symmetric, None, True
            )
            given = made(spec).given
            assert given.pop("eps", 0.5) == 0.5
            assert given == {
                "dtype": torch.int8, "quant_min": -7, "quant_max": 7,
                "qscheme": torch.per_tensor_symmetric, "is_dynamic": True,
            }  # fmt: skip

    def test_b12_the_axis_reaches_what_is_per_channel(self) -> None:
        per_channel = dataclasses.replace(WEIGHT, ch_axis=1)
        for constructor in (Kwargs, WithArgs(Kwargs), PerChannelKwargs):
            spec = dataclasses.replace(per_channel, observer_or_fake_quant_ctr=constructor)
            assert made(spec).given["ch_axis"] == 1
        spec = dataclasses.replace(ACT, ch_axis=1, observer_or_fake_quant_ctr=Kwargs)
        assert "ch_axis" not in made(spec).given

    def test_b12_observers_of_torch_take_their_axis(self) -> None:
        from torch.ao.quantization import observer as ao
        from torch.ao.quantization.fake_quantize import FusedMovingAvgObsFakeQuantize

        fused = FusedMovingAvgObsFakeQuantize.with_args(
            observer=ao.MovingAveragePerChannelMinMaxObserver
        )
        spec = S.QuantizationSpec(torch.int8, fused, -128, 127, torch.per_channel_symmetric, 1)
        assert made(spec).ch_axis == 1
        assert made(dataclasses.replace(ACT, observer_or_fake_quant_ctr=ao.HistogramObserver))

    def test_b9_no_range_is_the_whole_dtype(self) -> None:
        for dtype, least, most in ((torch.int8, -128, 127), (torch.uint8, 0, 255)):
            for qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
                point = made(S.QuantizationSpec(dtype, qscheme=qscheme))
                assert (point.quant_min, point.quant_max) == (least, most)
        fixed = made(S.FixedQParamsQuantizationSpec(torch.int16, 0.5, 0))
        assert (fixed.quant_min, fixed.quant_max) == (-(2**15), 2**15 - 1)

    def test_own_observers_have_what_is_asked_of_one(self) -> None:
        point = made(WEIGHT, constant=True)
        point(torch.tensor([[1.27, 0.0], [0.0, -2.54]]))
        scale, zero = point.calculate_qparams()
        assert torch.allclose(scale, torch.tensor([0.01, 0.02]))
        assert zero.tolist() == [0, 0]
        assert (point.dtype, point.qscheme, point.ch_axis) == (torch.int8, WEIGHT.qscheme, 0)
        assert not point.is_dynamic
        assert type(point.observer).__name__ == "MinMaxObserver"
        assert type(made(ACT).observer).__name__ == "HistogramObserver"
        assert type(made(ACT, qat=True).observer).__name__ == "MovingAverageObserver"
        named = dataclasses.replace(ACT, observer_or_fake_quant_ctr="mse")
        assert type(made(named).observer).__name__ == "MSEObserver"

    def test_what_saw_nothing(self) -> None:
        from torch.ao.quantization import observer as ao
        from torch.ao.quantization.fake_quantize import FakeQuantize

        constructors = (
            None, "minmax", ao.MinMaxObserver, ao.HistogramObserver, ao.MovingAverageMinMaxObserver,
            FakeQuantize.with_args(observer=ao.MovingAverageMinMaxObserver),
        )  # fmt: skip
        for constructor in constructors:
            spec = S.QuantizationSpec(torch.uint8, constructor, 0, 255, torch.per_tensor_affine)
            point = made(spec)
            assert is_observer(point)
            assert saw_nothing(point), constructor
            point(torch.randn(8))
            assert not saw_nothing(point), constructor
        assert not saw_nothing(made(S.FixedQParamsQuantizationSpec(torch.uint8, 0.5, 3)))

    def test_b15_fixed_and_dynamic_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\(x -> y\): qparams that are fixed cannot be dyn"):
            made(S.FixedQParamsQuantizationSpec(torch.uint8, 0.5, 3, is_dynamic=True))

    def test_b17_a_derived_spec_per_channel_needs_an_axis(self) -> None:
        spec = S.DerivedQuantizationSpec(
            [], lambda _: (torch.ones(1), torch.zeros(1)), torch.int32,
            qscheme=torch.per_channel_symmetric,
        )  # fmt: skip
        with pytest.raises(ValueError, match="must have a ch_axis"):
            made(spec)

    def test_b21_what_qnn_does_not_know_needs_an_observer(self) -> None:
        with pytest.raises(ValueError, match="give an observer_or_fake_quant_ctr"):
            made(
                S.QuantizationSpec(
                    torch.int8, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0
                )
            )
        with pytest.raises(ValueError, match="needs a ch_axis"):
            made(S.QuantizationSpec(torch.int8, qscheme=torch.per_channel_symmetric))
        with pytest.raises(ValueError, match="per-tensor, in int8 or uint8"):
            made(S.QuantizationSpec(torch.int16, is_dynamic=True))
        with pytest.raises(TypeError, match="is not a spec: it has no dtype"):
            made("int8")

    def test_b13_fixed_ones_fake_quantise_in_training(self) -> None:
        spec = S.FixedQParamsQuantizationSpec(torch.uint8, 0.5, 2, 0, 7)
        x = torch.tensor([-9.0, 0.24, 0.26, 9.0], requires_grad=True)
        assert made(spec)(x) is x
        y = made(spec, qat=True)(x)
        assert y.tolist() == [-1.0, 0.0, 0.5, 2.5]
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]

    def test_b137_dynamic_ones_take_the_range_of_the_batch(self) -> None:
        spec = S.QuantizationSpec(torch.int8, qscheme=torch.per_tensor_affine, is_dynamic=True)
        point = made(spec, qat=True)
        for span in (1.0, 100.0, 1.0):
            x = torch.linspace(-span, span, 256)
            assert (point(x) - x).abs().max() <= span / 255 * 1.01
        point = made(dataclasses.replace(spec, qscheme=torch.per_tensor_symmetric), qat=True)
        assert (point(x) - x).abs().max() <= span / 127


class PoolNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_pool2d(torch.relu(self.c(x)), 2)


def pool_net() -> GraphModule:
    return export(PoolNet(), torch.randn(1, 3, 4, 4))


class CatNet(nn.Module):
    """`cat(op(a), op(b))`, with another tensor concatenated after."""

    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.cat([a + 1, b * 2]), c - 3])


def cat_net() -> tuple[GraphModule, list[Node]]:
    gm = export(CatNet(), *torch.randn(3, 2, 2))
    names = ("add", "mul", "cat", "sub", "cat_1")
    return gm, [node_of(gm, name) for name in names]


def groups(gm: GraphModule) -> dict[Any, int]:
    """A number for the group of each place."""
    found = groups_of(specs_of(gm.graph))
    numbers: dict[Any, int] = {}
    return {place: numbers.setdefault(group, len(numbers)) for place, group in found.items()}


class TestSharing:
    def test_b23_b24_the_same_object_on_both_sides(self) -> None:
        gm = pool_net()
        conv, relu, pool = (node_of(gm, n) for n in ("conv2d", "relu", "max_pool2d"))
        annotate(pool, {relu: ACT}, Shared((relu, pool)))
        prepare(gm, lambda _: None)
        assert observer_of(gm, pool.args[0]) is observer_of(gm, next(iter(pool.users)))
        assert conv.users.keys() == {relu}

    def test_b25_b26_equal_specs_on_one_tensor(self) -> None:
        gm, (add, mul, cat, sub, cat_1) = cat_net()
        annotate(add, {}, ACT)
        annotate(cat, {add: copy.copy(ACT), mul: ACT}, SIGNED)
        annotate(cat_1, {cat: SIGNED, sub: ACT}, None)
        at = groups(gm)
        assert at[add] == at[add, cat]
        assert at[cat] == at[cat, cat_1]
        assert len({at[add], at[mul, cat], at[cat], at[sub, cat_1]}) == 4

    @pytest.mark.parametrize(
        ("field", "value"),
        [("dtype", torch.uint8), ("quant_min", -127), ("quant_max", 126), ("ch_axis", 1),
         ("qscheme", torch.per_tensor_symmetric), ("is_dynamic", True)],
    )  # fmt: skip
    def test_b27_what_makes_specs_differ(self, field: str, value: Any) -> None:
        gm, (add, _, cat, _, _) = cat_net()
        annotate(add, {}, SIGNED)
        annotate(cat, {add: dataclasses.replace(SIGNED, **{field: value})})
        assert len(set(groups(gm).values())) == 2

    def test_b27_another_kind_of_observer_is_shared_and_said(self) -> None:
        gm, (add, _, cat, _, _) = cat_net()
        annotate(add, {}, ACT)
        annotate(cat, {add: dataclasses.replace(ACT, observer_or_fake_quant_ctr="mse")})
        prepare(gm, lambda _: None)
        assert len(observed(gm)) == 1
        (note,) = gm.meta[NOTES]
        assert note.startswith("(add -> cat) shares the observer of (add)")
        gm, (add, _, cat, _, _) = cat_net()
        annotate(
            add, {}, dataclasses.replace(ACT, observer_or_fake_quant_ctr=WithArgs(Kwargs, e=1))
        )
        annotate(
            cat, {add: dataclasses.replace(ACT, observer_or_fake_quant_ctr=WithArgs(Kwargs, e=1))}
        )
        prepare(gm, lambda _: None)
        assert NOTES not in gm.meta

    @pytest.mark.parametrize("anchor", range(6))
    def test_b28_b29_b34_transitive_and_any_anchor(self, anchor: int) -> None:
        """Also one that stands later in the graph."""
        gm, (add, mul, cat, sub, cat_1) = cat_net()
        places: list[Any] = [(add, cat), (mul, cat), cat, (cat, cat_1), (sub, cat_1), cat_1]
        shared = dict.fromkeys(places, Shared(places[anchor]))
        specs = {**shared, places[anchor]: ACT}
        annotate(cat, {add: specs[add, cat], mul: specs[mul, cat]}, specs[cat])
        annotate(cat_1, {cat: specs[cat, cat_1], sub: specs[sub, cat_1]}, specs[cat_1])
        assert set(groups(gm).values()) == {0}
        prepare(gm, lambda _: None)
        calls = [n for n in gm.graph.nodes if observer_of(gm, n)]
        assert len(calls) == 5
        assert len({observer_of(gm, n) for n in calls}) == 1

    def test_b28_two_groups_meet_in_an_edge(self) -> None:
        gm, (add, mul, cat, sub, cat_1) = cat_net()
        annotate(cat, {add: ACT, mul: Shared((add, cat))}, Shared((add, cat)))
        annotate(cat_1, {cat: ACT, sub: Shared((cat, cat_1))}, Shared((cat, cat_1)))
        assert set(groups(gm).values()) == {0}

    def test_b30_without_implicit_sharing(self) -> None:
        gm, (add, mul, cat, _, cat_1) = cat_net()
        annotate(add, {}, ACT, implicit=False)
        annotate(cat, {add: ACT, mul: ACT}, ACT, implicit=False)
        annotate(cat_1, {cat: ACT}, None, implicit=False)
        assert len(set(groups(gm).values())) == 5
        prepare(gm, lambda _: None)
        first, second = cat.args[0][0], cat.args[0][0].args[0]  # type: ignore[index,union-attr]
        assert observer_of(gm, first) is not observer_of(gm, second)
        assert second.args[0] is add

    def test_b31_directly_and_through_a_shared_op(self) -> None:
        class Both(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = x + 1
                return torch.maximum(y, y.clone())

        gm = export(Both(), torch.randn(2, 2))
        add, clone, top = (node_of(gm, name) for name in ("add", "clone", "maximum"))
        annotate(clone, {add: ACT}, Shared((add, clone)))
        annotate(top, {add: ACT, clone: Shared((add, top))})
        assert set(groups(gm).values()) == {0}
        prepare(gm, lambda _: None)
        assert len({observer_of(gm, n) for n in top.args}) == 1

    def test_b32_the_same_node_twice_is_one_edge(self) -> None:
        class Twice(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = x + 1
                return torch.cat([y, y])

        gm = export(Twice(), torch.randn(2, 2))
        add, cat = node_of(gm, "add"), node_of(gm, "cat")
        annotate(cat, {add: ACT})
        prepare(gm, lambda _: None)
        first, second = cat.args[0]  # type: ignore[misc]
        assert first is second
        assert len(observed(gm)) == 1

    def test_b34_no_spec_of_its_own_is_an_error_with_the_chain(self) -> None:
        gm, (add, _, cat, _, cat_1) = cat_net()
        annotate(cat, {add: Shared(cat)}, Shared((add, cat)))
        with pytest.raises(
            ValueError, match=r"\(add -> cat\), then \(cat\) and back to \(add -> c"
        ):
            groups(gm)
        annotate(cat, {add: Shared(cat_1)})
        with pytest.raises(ValueError, match=r"\(add -> cat\), then \(cat_1\), which is not annot"):
            groups(gm)
        annotate(cat, {add: Shared(cat)}, Shared(cat))
        with pytest.raises(ValueError, match=r"\(cat\) and back to \(cat\)"):
            groups(gm)
        annotate(cat, {add: Shared("cat")})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"must name an edge, as .* or a node; got 'cat'"):
            groups(gm)

    def test_b34_a_chain_of_thousands(self) -> None:
        class Long(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for _ in range(1500):
                    x = x.clone()
                return x

        gm = torch.fx.symbolic_trace(Long())
        clones = [n for n in gm.graph.nodes if n.op == "call_method"]
        for node in clones:
            before = node.args[0]
            spec = Shared(before) if before in clones else ACT
            annotate(node, {before: spec}, Shared((before, node)))
        assert set(groups(gm).values()) == {0}

    def test_b14_equal_fixed_specs_on_one_tensor(self) -> None:
        gm, (add, mul, cat, _, _) = cat_net()

        def fixed(scale: float) -> Any:
            return S.FixedQParamsQuantizationSpec(torch.uint8, scale, 3)

        annotate(add, {}, fixed(0.5))
        annotate(cat, {add: fixed(0.5), mul: fixed(0.25)})
        assert list(groups(gm).values()) == [0, 0, 1]

    def test_derived_specs_of_other_places_are_not_equal(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.b = nn.Parameter(torch.randn(4))
                self.v = nn.Parameter(torch.randn(4, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = nn.functional.linear(x, self.v, self.b)
                return nn.functional.linear(y, self.v, self.b)

        gm = export(Twice(), torch.randn(1, 4))
        one, two = (n for n in gm.graph.nodes if n.target is aten.linear.default)

        def derive(of: list[Any]) -> Any:
            return of[0].calculate_qparams()[0], torch.zeros(1)

        for node in (one, two):
            x, w, b = node.args
            spec = S.DerivedQuantizationSpec([(x, node)], derive, torch.int32)
            annotate(node, {x: ACT, w: WEIGHT, b: spec})
        at = groups(gm)
        bias = one.args[2]
        assert at[bias, one] != at[bias, two]
        assert at[one.args[1], one] == at[one.args[1], two]

    def test_derived_in_a_circle_or_of_nothing(self) -> None:
        gm, (add, mul, cat, _, _) = cat_net()
        one = S.DerivedQuantizationSpec([(mul, cat)], lambda _: (0, 0), torch.int8)  # type: ignore[arg-type,return-value]
        two = S.DerivedQuantizationSpec([(add, cat)], lambda _: (0, 0), torch.int8)  # type: ignore[arg-type,return-value]
        annotate(cat, {add: one, mul: two})
        with pytest.raises(ValueError, match=r"in a circle: \(add -> cat\), from \(mul -> cat\)"):
            prepare(gm, lambda _: None)
        annotate(cat, {add: one})
        with pytest.raises(ValueError, match=r"is derived from \(mul -> cat\), which is not anno"):
            prepare(gm, lambda _: None)
